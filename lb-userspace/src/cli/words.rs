//! The words that stand for services and destinations on the command line.

use std::net::{IpAddr, SocketAddr};

use clap::Args;
use lb_common::proto::{Method, Scheduler, sched_flag};
use lb_userspace::control::model::{Refusal, ServiceKey, ServiceSpec, Transport};

/// Which service.
#[derive(Args, Clone, Copy, Debug)]
#[group(required = true, multiple = false)]
pub(crate) struct ServiceWords {
    /// A TCP service, by address and port (1 to 65535)
    #[arg(short = 't', long = "tcp-service", value_name = "VIP:PORT", value_parser = socket)]
    tcp: Option<SocketAddr>,
    /// A UDP service, by address and port (1 to 65535)
    #[arg(short = 'u', long = "udp-service", value_name = "VIP:PORT", value_parser = socket)]
    udp: Option<SocketAddr>,
}

impl ServiceWords {
    /// The service.
    pub(crate) fn key(self) -> ServiceKey {
        let (protocol, address) = match (self.tcp, self.udp) {
            (Some(address), _) => (Transport::Tcp, address),
            (None, Some(address)) => (Transport::Udp, address),
            (None, None) => unreachable!("clap requires one of the group"),
        };
        ServiceKey { protocol, address }
    }
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
    pub(crate) fn keys(self) -> (ServiceKey, SocketAddr) {
        let key = self.service.key();
        let port = self.server.port.unwrap_or(key.address.port());
        (key, SocketAddr::new(self.server.address, port))
    }
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
}

impl FlagWords {
    /// The scheduler with these flags.
    pub(crate) fn of(self, scheduler: Scheduler) -> Result<ServiceSpec, Refusal> {
        let mut flags = 0;
        for name in self.flags {
            let known = sched_flag::names(scheduler).iter().find(|(known, _)| *known == name);
            flags |= known.map(|(_, flag)| flag).ok_or(Refusal::SchedFlag { scheduler, name })?;
        }
        Ok(ServiceSpec { scheduler, flags })
    }
}

/// A weight. Beyond what fits, the control plane refuses it.
pub(crate) fn weight(word: &str) -> Result<u32, String> {
    let weight: Option<u32> = word.parse().ok();
    weight.filter(|weight| *weight <= i32::MAX as u32).ok_or_else(|| "use a number from 0 to 2147483647".into())
}

fn method(word: &str) -> Result<Method, String> {
    let found = Method::ALL.iter().copied().find(|method| method.as_str() == word);
    found.ok_or_else(|| "no such method, use dr, nat or ipip".into())
}

fn socket(word: &str) -> Result<SocketAddr, String> {
    let Host { address, port } = host(word)?;
    let port = port.ok_or("a service has a port, write ADDRESS:PORT")?;
    Ok(SocketAddr::new(address, port))
}

fn host(word: &str) -> Result<Host, String> {
    // IPv6 addresses with a port stand in brackets.
    let (address, port) = match word.rsplit_once(':') {
        Some((address, port)) if !address.contains(':') || address.ends_with(']') => (address, Some(port)),
        _ => (word, None),
    };
    let bare = address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(address);
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
        assert_eq!(read("10.0.0"), Err("`10.0.0` is no IP address".into()));
        assert_eq!(read("10.0.0.1:"), Err("`` is no port, use 1 to 65535".into()));
        assert_eq!(read("10.0.0.1:70000"), Err("`70000` is no port, use 1 to 65535".into()));
        assert_eq!(socket("10.0.0.1"), Err("a service has a port, write ADDRESS:PORT".into()));
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
