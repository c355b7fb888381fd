//! The words that stand for services and destinations on the command line.

use std::{
    net::{IpAddr, SocketAddr},
    num::NonZeroU32,
};

use clap::Args;
use lb_common::{
    overload::Thresholds,
    proto::{Method, Scheduler, sched_flag, service_flag},
    sctp, tcp,
};
use lb_userspace::control::{
    bulk::Selection,
    connections::{ASSURED, UDP},
    model::{
        Family, Identity, MarkKey, Netmask, Persistence, Prefix, Refusal, RuleProtocol, ServiceKey, ServiceSpec,
        Transport,
    },
};

/// Which service.
#[derive(Args, Clone, Copy, Debug)]
#[command(group = clap::ArgGroup::new("one").args(["tcp", "udp", "sctp", "mark"]).required(true))]
pub(crate) struct ServiceWords {
    #[command(flatten)]
    which: MaybeServiceWords,
}

/// Which service, if one is named.
#[derive(Args, Clone, Copy, Debug)]
#[command(group = clap::ArgGroup::new("at_most_one").args(["tcp", "udp", "sctp", "mark"]))]
pub(crate) struct MaybeServiceWords {
    /// A TCP service, by address and port (1 to 65535, or 0 with -p for all that no other service has)
    #[arg(short = 't', long = "tcp-service", value_name = "VIP:PORT", value_parser = socket)]
    tcp: Option<SocketAddr>,
    /// A UDP service, by address and port (1 to 65535, or 0 with -p for all that no other service has)
    #[arg(short = 'u', long = "udp-service", value_name = "VIP:PORT", value_parser = socket)]
    udp: Option<SocketAddr>,
    /// An SCTP service, by address and port (1 to 65535, or 0 with -p for all that no other service has)
    #[arg(long = "sctp-service", value_name = "VIP:PORT", value_parser = socket)]
    sctp: Option<SocketAddr>,
    /// The service of packets with this mark, 1 to 4294967295: see `xdpvs mark`
    #[arg(short = 'f', long = "fwmark-service", visible_alias = "mark", value_name = "N", value_parser = mark)]
    mark: Option<NonZeroU32>,
    /// The service of IPv6 packets with that mark
    #[arg(short = '6', long, requires = "mark", conflicts_with_all = ["tcp", "udp", "sctp"])]
    ipv6: bool,
}

impl ServiceWords {
    /// The service.
    pub(crate) fn key(self) -> Identity {
        self.which.key().unwrap_or_else(|| unreachable!("clap requires one of the group"))
    }
}

impl MaybeServiceWords {
    /// The service, if one is named.
    pub(crate) fn key(self) -> Option<Identity> {
        let Self { tcp, udp, sctp, mark, ipv6 } = self;
        let of = |protocol| move |address| Identity::from(ServiceKey { protocol, address });
        let address = tcp.map(of(Transport::Tcp)).or(udp.map(of(Transport::Udp))).or(sctp.map(of(Transport::Sctp)));
        address.or(mark.map(of_mark(ipv6)))
    }
}

fn of_mark(ipv6: bool) -> impl Fn(NonZeroU32) -> Identity {
    move |mark| MarkKey { mark, family: if ipv6 { Family::Ipv6 } else { Family::Ipv4 } }.into()
}

/// Which destination of which service.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct DestWords {
    #[command(flatten)]
    service: ServiceWords,
    /// The real server's address; with no port, at the service's port
    #[arg(short = 'r', long = "real-server", value_name = "ADDR[:PORT]", value_parser = host)]
    server: Host,
}

impl DestWords {
    /// The service, and the destination's address.
    pub(crate) fn keys(self) -> (Identity, SocketAddr) {
        let key = self.service.key();
        let port = self.server.port.unwrap_or(key.port());
        (key, SocketAddr::new(self.server.address, port))
    }
}

/// To which service and destination connections are.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct SelectionWords {
    /// Only those to this service
    #[arg(long, group = "of_service", value_name = "tcp|udp|sctp:VIP:PORT", value_parser = service)]
    service: Option<ServiceKey>,
    /// Only those to this TCP service
    #[arg(short = 't', long = "tcp-service", group = "of_service", value_name = "VIP:PORT", value_parser = socket)]
    tcp: Option<SocketAddr>,
    /// Only those to this UDP service
    #[arg(short = 'u', long = "udp-service", group = "of_service", value_name = "VIP:PORT", value_parser = socket)]
    udp: Option<SocketAddr>,
    /// Only those to this SCTP service
    #[arg(long = "sctp-service", group = "of_service", value_name = "VIP:PORT", value_parser = socket)]
    sctp: Option<SocketAddr>,
    /// Only those to the service of this mark
    #[arg(
        short = 'f', long = "fwmark-service", visible_alias = "mark", group = "of_service", value_name = "N",
        value_parser = mark
    )]
    mark: Option<NonZeroU32>,
    /// Only those to the service of IPv6 packets with that mark
    #[arg(short = '6', long, requires = "mark", conflicts_with_all = ["service", "tcp", "udp", "sctp"])]
    ipv6: bool,
    /// Only those to this destination; with no port, at any
    #[arg(long, value_name = "ADDR[:PORT]", value_parser = host)]
    dest: Option<Host>,
}

impl SelectionWords {
    /// What has been said.
    pub(crate) fn selection(self) -> Selection {
        let of = |protocol| move |address| ServiceKey { protocol, address };
        let Self { service, tcp, udp, sctp, .. } = self;
        let named = tcp.map(of(Transport::Tcp)).or(udp.map(of(Transport::Udp))).or(sctp.map(of(Transport::Sctp)));
        let key = service.or(named);
        Selection {
            service: key.map(Identity::from).or(self.mark.map(of_mark(self.ipv6))),
            dest: self.dest.map(|Host { address, port }| (address, port)),
        }
    }
}

/// Whose connections, and in which state.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct ClientWords {
    /// Only those of clients with this address, or with addresses that begin like it
    #[arg(long, value_name = "ADDR[/LENGTH]", value_parser = prefix)]
    pub(crate) client: Option<Prefix>,
    /// Only those in this state, by its name in lists
    #[arg(long, value_name = "NAME", value_parser = state)]
    pub(crate) state: Option<&'static str>,
}

/// An address, with a port or without.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Host {
    address: IpAddr,
    port: Option<u16>,
}

/// How packets reach a destination.
#[derive(Args, Clone, Copy, Debug)]
#[group(multiple = false)]
pub(crate) struct MethodWords {
    /// Direct routing: the server has the service's address too (the default)
    #[arg(short = 'g', long = "gatewaying")]
    gatewaying: bool,
    /// NAT: the server's replies must come back through the director
    #[arg(short = 'm', long = "masquerading")]
    masquerading: bool,
    /// IP-in-IP tunnel: the server has the service's address too, and may be anywhere
    #[arg(short = 'i', long = "ipip")]
    ipip: bool,
    /// The same by name: dr, nat or ipip
    #[arg(long, value_name = "METHOD", value_parser = method)]
    method: Option<Method>,
}

impl MethodWords {
    /// The method, if one was named.
    pub(crate) fn method(self) -> Option<Method> {
        match self {
            Self { gatewaying: true, .. } => Some(Method::Route),
            Self { masquerading: true, .. } => Some(Method::Masq),
            Self { ipip: true, .. } => Some(Method::Tunnel),
            Self { method, .. } => method,
        }
    }
}

/// A scheduler by its name.
pub(crate) fn scheduler(word: &str) -> Result<Scheduler, String> {
    let names = || Scheduler::ALL.iter().map(|scheduler| scheduler.as_str()).collect::<Vec<_>>().join(", ");
    Scheduler::from_name(word).ok_or_else(|| format!("no such scheduler, use one of {}", names()))
}

/// How a service schedules.
#[derive(Args, Clone, Debug)]
pub(crate) struct FlagWords {
    /// Flags of the scheduler, with commas between: sh-fallback, sh-port; mh-fallback, mh-port
    #[arg(short = 'b', long = "sched-flags", value_delimiter = ',', value_name = "FLAGS")]
    flags: Vec<String>,
    /// One-packet scheduling: every UDP packet may go to another destination, and replies are not translated
    #[arg(short = 'o', long = "ops")]
    one_packet: bool,
}

impl FlagWords {
    /// The scheduler with these flags, and those of the service.
    pub(crate) fn of(self, scheduler: Scheduler) -> Result<ServiceSpec, Refusal> {
        let mut flags = if self.one_packet { service_flag::ONE_PACKET } else { 0 };
        for name in self.flags {
            let known = sched_flag::names(scheduler).iter().find(|(known, _)| *known == name);
            flags |= known.map(|(_, flag)| flag).ok_or(Refusal::SchedFlag { scheduler, name })?;
        }
        Ok(ServiceSpec { scheduler, flags, persistence: None })
    }
}

/// Whether, and how, the connections of a client go to one destination.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct PersistenceWords {
    /// All connections of a client go to the destination of its first, until it has opened none for so many seconds
    #[arg(short, long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "360")]
    persistent: Option<u32>,
    /// Which clients are taken for one: an IPv4 mask, or the length of an IPv6 prefix (for -p)
    #[arg(short = 'M', long, value_name = "MASK", value_parser = netmask)]
    netmask: Option<Netmask>,
}

impl PersistenceWords {
    /// What has been said about the service `key`.
    pub(crate) fn of(self, key: Identity) -> Result<Option<Persistence>, Refusal> {
        match (self.persistent, self.netmask) {
            (None, Some(_)) => Err(Refusal::NetmaskAlone),
            (None, None) => Ok(None),
            (Some(timeout), netmask) => {
                Ok(Some(Persistence { timeout, netmask: netmask.unwrap_or(Netmask::whole(key.family())) }))
            }
        }
    }
}

fn netmask(word: &str) -> Result<Netmask, String> {
    let length = word.parse().ok().filter(|length| (1..=128).contains(length)).map(Netmask::V6);
    let netmask = length.or_else(|| word.parse().ok().map(Netmask::V4));
    netmask.ok_or_else(|| "use a mask like 255.255.255.0, or for IPv6 a prefix length from 1 to 128".into())
}

/// How many connections a destination is to have.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct ThresholdWords {
    /// With this many connections, active and inactive, it gets no new ones: 0 (no limit) to 2147483647
    #[arg(short = 'x', long = "u-threshold", value_name = "CONNECTIONS", value_parser = weight, allow_negative_numbers = true)]
    u_threshold: Option<u32>,
    /// With fewer than this many it gets new ones again; 0 for three quarters of the upper threshold
    #[arg(short = 'y', long = "l-threshold", value_name = "CONNECTIONS", value_parser = weight, allow_negative_numbers = true)]
    l_threshold: Option<u32>,
}

impl ThresholdWords {
    /// The thresholds that were given, and those of `old` for the others.
    pub(crate) fn instead_of(self, old: Thresholds) -> Thresholds {
        Thresholds { upper: self.u_threshold.unwrap_or(old.upper), lower: self.l_threshold.unwrap_or(old.lower) }
    }
}

/// A weight, or a threshold. Beyond what fits, the control plane refuses it.
pub(crate) fn weight(word: &str) -> Result<u32, String> {
    let weight: Option<u32> = word.parse().ok();
    weight.filter(|weight| *weight <= i32::MAX as u32).ok_or_else(|| "use a number from 0 to 2147483647".into())
}

fn service(word: &str) -> Result<ServiceKey, String> {
    let protocols = [Transport::Tcp, Transport::Udp, Transport::Sctp];
    let (protocol, address) = word
        .split_once(':')
        .and_then(|(name, address)| Some((protocols.into_iter().find(|known| known.to_string() == name)?, address)))
        .ok_or("write tcp:ADDRESS:PORT, udp:ADDRESS:PORT or sctp:ADDRESS:PORT")?;
    Ok(ServiceKey { protocol, address: socket(address)? })
}

/// A mark.
pub(crate) fn mark(word: &str) -> Result<NonZeroU32, String> {
    word.parse().map_err(|_| "use a number from 1 to 4294967295".into())
}

/// A port, or a lowest and a highest one.
pub(crate) fn ports(word: &str) -> Result<(u16, u16), String> {
    let (low, high) = word.split_once('-').unwrap_or((word, word));
    let port = |word: &str| word.parse::<u16>().map_err(|_| format!("`{word}` is no port, use 0 to 65535"));
    let (low, high) = (port(low)?, port(high)?);
    if low <= high { Ok((low, high)) } else { Err(format!("write {high}-{low}, the lowest port first")) }
}

/// A protocol that rules ask for, or any.
pub(crate) fn rule_protocol(word: &str) -> Result<AnyOr, String> {
    let found = RuleProtocol::ALL.into_iter().find(|protocol| protocol.as_str() == word);
    match found {
        None if word != "any" => Err("use tcp, udp, sctp or any".into()),
        found => Ok(AnyOr(found)),
    }
}

/// A protocol, or any.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AnyOr(pub(crate) Option<RuleProtocol>);

/// Addresses that begin alike.
pub(crate) fn prefix(word: &str) -> Result<Prefix, String> {
    let (address, length) = word.split_once('/').map_or((word, None), |(address, length)| (address, Some(length)));
    let address: IpAddr = address.parse().map_err(|_| format!("`{address}` is no IP address"))?;
    let longest = if address.is_ipv4() { 32 } else { 128 };
    let length = length.map_or(Ok(longest), str::parse);
    let prefix = length.ok().and_then(|length| Prefix::new(address, length));
    prefix.ok_or_else(|| format!("use a length from 0 to {longest}"))
}

fn state(word: &str) -> Result<&'static str, String> {
    let tcp = tcp::State::ALL.iter().map(|state| state.as_str());
    // Those that are not called like one of TCP.
    let sctp =
        sctp::State::ALL.iter().map(|state| state.as_str()).filter(|name| tcp.clone().all(|other| other != *name));
    let names = tcp.clone().chain([UDP, ASSURED]).chain(sctp);
    let all = || names.clone().collect::<Vec<_>>().join(", ");
    names
        .clone()
        .find(|name| name.eq_ignore_ascii_case(word))
        .ok_or_else(|| format!("no such state, use one of {}", all()))
}

fn method(word: &str) -> Result<Method, String> {
    let found = Method::ALL.iter().copied().find(|method| method.as_str() == word);
    found.ok_or_else(|| "no such method, use dr, nat or ipip".into())
}

/// An address and port.
fn socket(word: &str) -> Result<SocketAddr, String> {
    let Host { address, port } = host(word)?;
    let written = if address.is_ipv4() { "ADDRESS:PORT" } else { "[ADDRESS]:PORT" };
    let port = port.ok_or_else(|| format!("a service has a port, write {written}"))?;
    Ok(SocketAddr::new(address, port))
}

fn host(word: &str) -> Result<Host, String> {
    // IPv6 addresses with a port stand in brackets.
    let (address, port) = match word.rsplit_once(':') {
        Some((address, port)) if !address.contains(':') || address.ends_with(']') => (address, Some(port)),
        _ => (word, None),
    };
    let in_brackets = address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    let bare = in_brackets.filter(|bare| bare.contains(':')).unwrap_or(address);
    let address = bare.parse().map_err(|_| format!("`{bare}` is no IP address"))?;
    let port = port.map(|port| port.parse().map_err(|_| format!("`{port}` is no port, use 1 to 65535"))).transpose()?;
    Ok(Host { address, port })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_ports_are_told_apart() {
        let read = |word| host(word).map(|Host { address, port }| (address.to_string(), port));
        assert_eq!(read("10.0.0.1"), Ok(("10.0.0.1".into(), None)));
        assert_eq!(read("10.0.0.1:80"), Ok(("10.0.0.1".into(), Some(80))));
        assert_eq!(read("[fd00::1]:80"), Ok(("fd00::1".into(), Some(80))));
        assert_eq!(read("fd00::1"), Ok(("fd00::1".into(), None)));
        assert_eq!(read("[fd00::1]"), Ok(("fd00::1".into(), None)));
        assert_eq!(read("[fd00::1]:"), Err("`` is no port, use 1 to 65535".into()));
        assert_eq!(read("fd00::1%eth0"), Err("`fd00::1%eth0` is no IP address".into()));
        assert_eq!(read("[10.0.0.1]:80"), Err("`[10.0.0.1]` is no IP address".into()));
        assert_eq!(socket("fd00::1"), Err("a service has a port, write [ADDRESS]:PORT".into()));
        assert_eq!(read("10.0.0"), Err("`10.0.0` is no IP address".into()));
        assert_eq!(read("10.0.0.1:"), Err("`` is no port, use 1 to 65535".into()));
        assert_eq!(read("10.0.0.1:70000"), Err("`70000` is no port, use 1 to 65535".into()));
        assert_eq!(socket("10.0.0.1"), Err("a service has a port, write ADDRESS:PORT".into()));
    }

    #[test]
    fn services_prefixes_and_states_are_told_by_their_words() {
        let key = |word| service(word).map(|key| key.to_string());
        assert_eq!(key("tcp:10.9.9.9:80"), Ok("tcp 10.9.9.9:80".into()));
        assert_eq!(key("udp:[fd00::1]:53"), Ok("udp [fd00::1]:53".into()));
        assert_eq!(key("sctp:10.9.9.9:99"), Ok("sctp 10.9.9.9:99".into()));
        let words = "write tcp:ADDRESS:PORT, udp:ADDRESS:PORT or sctp:ADDRESS:PORT";
        assert_eq!(key("10.9.9.9:80"), Err(words.into()));
        assert_eq!(key("tcp:10.9.9.9"), Err("a service has a port, write ADDRESS:PORT".into()));
        let of = |address: [u8; 4], length| Prefix::new(address.into(), length).ok_or_else(String::new);
        assert_eq!(prefix("10.1.2.3"), of([10, 1, 2, 3], 32));
        assert_eq!(prefix("10.1.2.3/8"), of([10, 0, 0, 0], 8));
        assert_eq!(prefix("10.1.2.3/33"), Err("use a length from 0 to 32".into()));
        assert_eq!(prefix("10.1.2/24"), Err("`10.1.2` is no IP address".into()));
        assert_eq!(state("time_wait"), Ok("TIME_WAIT"));
        assert_eq!(state("UDP"), Ok("UDP"));
        assert_eq!(state("c-echoed"), Ok("C-ECHOED"));
        assert!(state("OPEN").is_err_and(|line| line.contains("LISTEN, SYNACK, UDP, ASSURED, INIT1, INIT, C-SENT")));
    }

    #[test]
    fn marks_and_ports_of_rules() {
        assert_eq!(mark("4294967295").map(NonZeroU32::get), Ok(u32::MAX));
        assert!(["0", "4294967296", "-1", "x"].iter().all(|word| mark(word).is_err()));
        assert_eq!((ports("80"), ports("0-65535")), (Ok((80, 80)), Ok((0, 65535))));
        assert_eq!(ports("90-80"), Err("write 80-90, the lowest port first".into()));
        assert_eq!(ports("80-"), Err("`` is no port, use 0 to 65535".into()));
        assert!(rule_protocol("any").is_ok_and(|AnyOr(protocol)| protocol.is_none()));
        assert_eq!(rule_protocol("icmp").err(), Some("use tcp, udp, sctp or any".into()));
    }

    #[test]
    fn weights_are_those_of_ip_vs() {
        assert_eq!(weight("0"), Ok(0));
        assert_eq!(weight("2147483647"), Ok(i32::MAX as u32));
        for word in ["2147483648", "-1", "", "1.5", "x"] {
            assert!(weight(word).is_err(), "{word}");
        }
    }
}
