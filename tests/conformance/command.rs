//! Commands of ipvsadm in the records, as changes.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    num::NonZeroU32,
};

use lb_common::{
    overload::Thresholds,
    proto::{Method, Scheduler, sched_flag, service_flag},
};
use lb_userspace::control::{
    change::Change,
    model::{DestSpec, Family, Identity, MarkKey, Netmask, Persistence, Refusal, ServiceKey, ServiceSpec, Transport},
};

/// A command line without the program's name.
#[derive(Clone, Copy)]
pub(crate) struct Command<'l>(pub(crate) &'l str);

impl<'l> Command<'l> {
    fn has(self, option: &str) -> bool {
        self.0.split_whitespace().any(|word| word == option)
    }

    /// The word after an option.
    fn after(self, option: &str) -> Option<&'l str> {
        self.0.split_whitespace().skip_while(|word| *word != option).nth(1)
    }

    fn number(self, option: &str) -> Option<u32> {
        self.after(option).map(|word| word.parse().expect("a number"))
    }

    /// The service that it names, if it names one.
    pub(crate) fn service(self) -> Option<Identity> {
        let transports =
            [("-t", Transport::Tcp), ("-u", Transport::Udp), ("--sctp-service", Transport::Sctp)].into_iter();
        let mut named = transports.filter_map(|(option, protocol)| Some((protocol, self.after(option)?)));
        if let Some((protocol, word)) = named.next() {
            return Some(ServiceKey { protocol, address: word.parse().expect("an address and port") }.into());
        }
        let mark = NonZeroU32::new(self.number("-f")?).expect("a mark");
        Some(MarkKey { mark, family: Family::Ipv4 }.into())
    }

    fn service_spec(self) -> ServiceSpec {
        let scheduler = self.after("-s").and_then(Scheduler::from_name).expect("a scheduler");
        let known = sched_flag::names(scheduler);
        let flag = |name: &str| known.iter().find(|(known, _)| *known == name).expect("a flag of the scheduler").1;
        let flags: u32 = self.after("-b").map_or(0, |words| words.split(',').map(flag).sum());
        let netmask = self.after("-M").map_or(Ipv4Addr::BROADCAST, |mask| mask.parse().expect("a mask"));
        let persistence = self.number("-p").map(|timeout| Persistence { timeout, netmask: Netmask::V4(netmask) });
        let ops = if self.has("-o") { service_flag::ONE_PACKET } else { 0 };
        ServiceSpec { scheduler, flags: flags | ops, persistence }
    }

    /// The real server, at port 0 if none is named.
    fn server(self) -> SocketAddr {
        let word = self.after("-r").expect("a server");
        word.parse().unwrap_or_else(|_| (word.parse::<IpAddr>().expect("an address"), 0).into())
    }

    fn dest_spec(self) -> DestSpec {
        let number = |option| self.number(option).unwrap_or(0);
        DestSpec {
            method: match () {
                () if self.has("-m") => Method::Masq,
                () if self.has("-i") => Method::Tunnel,
                () => Method::Route,
            },
            weight: self.number("-w").unwrap_or(1),
            thresholds: Thresholds { upper: number("-x"), lower: number("-y") },
        }
    }

    /// Makes the change that it asks for, of the service that it names or else of this one.
    pub(crate) fn apply(self, change: &mut Change<'_>, of: Option<Identity>) -> Result<(), Refusal> {
        let key = self.service().or(of).expect("a service");
        match self.0.split_whitespace().next().unwrap_or_default() {
            "-A" => change.add_service(key, self.service_spec()),
            "-E" => change.edit_service(key, self.service_spec()),
            "-D" => change.delete_service(key),
            "-a" => change.add_dest(key, self.server(), self.dest_spec()),
            "-e" => change.edit_dest(key, self.server(), self.dest_spec()),
            "-d" => change.delete_dest(key, self.server()),
            other => panic!("no command is called `{other}`"),
        }
    }
}
