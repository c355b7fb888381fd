//! Names of hosts and services, where ipvsadm takes or shows them.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use dns_lookup::{AddrInfoHints, getaddrinfo, getnameinfo};
use nix::libc::{AF_INET, NI_DGRAM, NI_NUMERICHOST, NI_NUMERICSERV, SOCK_DGRAM, SOCK_STREAM};

/// Where names are looked up.
pub(super) trait Names {
    /// The first IPv4 address of the host called `name`.
    fn host(&self, name: &str) -> Option<Ipv4Addr>;
    /// The port of the service called `name`; of a datagram protocol or of a stream protocol.
    fn port(&self, name: &str, datagram: bool) -> Option<u16>;
    /// The name of the host at `address`, or the address in digits.
    fn host_at(&self, address: IpAddr) -> String;
    /// The name of the service at `port`, or the port in digits.
    fn service_at(&self, port: u16, datagram: bool) -> String;
}

/// This system's name service: files, DNS and whatever else it is set up to ask.
pub(super) struct System;

fn hints(datagram: bool) -> AddrInfoHints {
    let socktype = if datagram { SOCK_DGRAM } else { SOCK_STREAM };
    AddrInfoHints { address: AF_INET, socktype, ..AddrInfoHints::default() }
}

impl Names for System {
    fn host(&self, name: &str) -> Option<Ipv4Addr> {
        if name.is_empty() {
            return None;
        }
        let mut found = getaddrinfo(Some(name), None, Some(hints(false))).ok()?.flatten();
        found.find_map(|info| match info.sockaddr {
            SocketAddr::V4(address) => Some(*address.ip()),
            SocketAddr::V6(_) => None,
        })
    }

    fn port(&self, name: &str, datagram: bool) -> Option<u16> {
        // A number would be taken for what it says: the caller has found that it is none that can be.
        if name.is_empty() || name.trim_start_matches(['-', '+', ' ']).starts_with(|c: char| c.is_ascii_digit()) {
            return None;
        }
        let mut found = getaddrinfo(None, Some(name), Some(hints(datagram))).ok()?.flatten();
        found.next().map(|info| info.sockaddr.port())
    }

    fn host_at(&self, address: IpAddr) -> String {
        getnameinfo(&SocketAddr::new(address, 0), NI_NUMERICSERV).map_or_else(|_| address.to_string(), |(host, _)| host)
    }

    fn service_at(&self, port: u16, datagram: bool) -> String {
        let flags = NI_NUMERICHOST | if datagram { NI_DGRAM } else { 0 };
        let any = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port);
        getnameinfo(&any, flags).map_or_else(|_| port.to_string(), |(_, service)| service)
    }
}
