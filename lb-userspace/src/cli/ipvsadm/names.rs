//! Names of hosts and services, where ipvsadm takes or shows them.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use dns_lookup::{AddrInfoHints, getaddrinfo, getnameinfo};
use lb_userspace::control::model::Transport;
use nix::libc::{AF_INET, NI_DGRAM, NI_NUMERICHOST, NI_NUMERICSERV, SOCK_DGRAM, SOCK_STREAM};

/// Where names are looked up.
pub(super) trait Names {
    /// The first IPv4 address of the host called `name`.
    fn host(&self, name: &str) -> Option<Ipv4Addr>;
    /// The port of the service called `name`.
    fn port(&self, name: &str, transport: Transport) -> Option<u16>;
    /// The name of the host at `address`, or the address in digits.
    fn host_at(&self, address: IpAddr) -> String;
    /// The name of the service at `port`, or the port in digits.
    fn service_at(&self, port: u16, transport: Transport) -> String;
}

/// This system's name service: files, DNS and whatever else it is set up to ask.
pub(super) struct System;

fn hints(socktype: i32) -> AddrInfoHints {
    AddrInfoHints { address: AF_INET, socktype, ..AddrInfoHints::default() }
}

/// What the services of SCTP are listed in: the C library's functions for names know none of that protocol.
const SERVICES: &str = "/etc/services";

/// Of a list of services ([`services(5)`](https://manpages.debian.org/services.5)), those of SCTP: the port, and its names.
fn sctp_services(list: &str) -> impl Iterator<Item = (u16, impl Iterator<Item = &str>)> {
    list.lines().filter_map(|line| {
        let mut words = line.split('#').next()?.split_whitespace();
        let (name, place) = (words.next()?, words.next()?);
        let port = place.strip_suffix("/sctp")?.parse().ok()?;
        Some((port, std::iter::once(name).chain(words)))
    })
}

impl Names for System {
    fn host(&self, name: &str) -> Option<Ipv4Addr> {
        if name.is_empty() {
            return None;
        }
        let mut found = getaddrinfo(Some(name), None, Some(hints(SOCK_STREAM))).ok()?.flatten();
        found.find_map(|info| match info.sockaddr {
            SocketAddr::V4(address) => Some(*address.ip()),
            SocketAddr::V6(_) => None,
        })
    }

    fn port(&self, name: &str, transport: Transport) -> Option<u16> {
        // A number would be taken for what it says: the caller has found that it is none that can be.
        if name.is_empty() || name.trim_start_matches(['-', '+', ' ']).starts_with(|c: char| c.is_ascii_digit()) {
            return None;
        }
        let socktype = match transport {
            Transport::Tcp => SOCK_STREAM,
            Transport::Udp => SOCK_DGRAM,
            Transport::Sctp => {
                let list = fs::read_to_string(SERVICES).ok()?;
                return sctp_services(&list)
                    .find_map(|(port, mut names)| names.any(|known| known == name).then_some(port));
            }
        };
        let mut found = getaddrinfo(None, Some(name), Some(hints(socktype))).ok()?.flatten();
        found.next().map(|info| info.sockaddr.port())
    }

    fn host_at(&self, address: IpAddr) -> String {
        getnameinfo(&SocketAddr::new(address, 0), NI_NUMERICSERV).map_or_else(|_| address.to_string(), |(host, _)| host)
    }

    fn service_at(&self, port: u16, transport: Transport) -> String {
        let flags = match transport {
            Transport::Tcp => NI_NUMERICHOST,
            Transport::Udp => NI_NUMERICHOST | NI_DGRAM,
            Transport::Sctp => {
                let list = fs::read_to_string(SERVICES).unwrap_or_default();
                let found = sctp_services(&list).find(|(known, _)| *known == port);
                let name = found.and_then(|(_, mut names)| names.next());
                return name.map_or_else(|| port.to_string(), str::to_owned);
            }
        };
        let any = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port);
        getnameinfo(&any, flags).map_or_else(|_| port.to_string(), |(_, service)| service)
    }
}

#[cfg(test)]
mod tests {
    use super::sctp_services;

    #[test]
    fn a_list_of_services_tells_those_of_sctp() {
        let list = "# a list\namqp\t\t5672/tcp\namqp\t\t5672/sctp\nm3ua 2905/sctp  sigtran ss7 # SS7\n#old 9/sctp\nbad x/sctp\n";
        let found: Vec<(u16, Vec<&str>)> = sctp_services(list).map(|(port, names)| (port, names.collect())).collect();
        assert_eq!(found, [(5672, vec!["amqp"]), (2905, vec!["m3ua", "sigtran", "ss7"])]);
    }
}
