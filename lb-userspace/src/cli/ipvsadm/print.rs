//! What ipvsadm prints of services, destinations and connections (`docs/ipvs.md`, sections 10.6 and 10.7).

use std::{
    cmp::Ordering,
    io::{self, Write},
    net::{IpAddr, Ipv6Addr, SocketAddr},
};

use lb_common::{
    overload::Thresholds,
    proto::{Method, sched_flag},
};
use lb_userspace::control::{
    connections::Connection,
    model::{Dest, Family, Identity, MarkKey, Persistence, Service, ServiceKey, ServiceSpec, Transport},
    settings::Timeouts,
    traffic::{Rates, Traffic},
};

use super::{super::lines::Lines, names::Names};

/// The first line of a list of everything. The number is the size of ip_vs's connection table unless it is told
/// otherwise, which has no counterpart here; scripts look at the line.
const BANNER: &str = "IP Virtual Server version 1.2.1 (size=4096)";

/// What ipvsadm says it is.
const VERSION: &str = "ipvsadm v1.31 2019/12/24 (compiled with popt and IPVS v1.2.1)";

/// What `--version` prints.
pub(super) fn version() -> String {
    format!("{VERSION}\n")
}

/// What `--help` prints.
pub(super) fn help() -> String {
    format!("{VERSION}\n{}", include_str!("usage.txt"))
}

/// What is shown of services and destinations.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Format {
    Default,
    Stats { exact: bool },
    Rate { exact: bool },
    Thresholds,
    PersistentConn,
    TunInfo,
}

/// A service to be shown.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct ServiceRow {
    pub(super) identity: Identity,
    /// Address and port, or their names; or the mark.
    pub(super) address: String,
    pub(super) spec: ServiceSpec,
    pub(super) traffic: Traffic,
    pub(super) rates: Rates,
    pub(super) dests: Vec<DestRow>,
}

/// A destination to be shown.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct DestRow {
    /// Address and port, or their names.
    pub(super) address: String,
    pub(super) method: Method,
    pub(super) weight: u32,
    pub(super) thresholds: Thresholds,
    /// Active and inactive connections.
    pub(super) connections: [u32; 2],
    /// Persistence templates.
    pub(super) templates: u32,
    pub(super) traffic: Traffic,
    pub(super) rates: Rates,
}

/// A list of services; `all` of them, or the one that was asked for.
pub(super) fn services(rows: &[ServiceRow], format: Format, all: bool) -> String {
    let mut text = if all { format!("{BANNER}\n") } else { String::new() };
    text += &titles(format);
    for row in rows {
        let name = match row.identity {
            Identity::Address(key) => format!("{:<4} {}", upper(key.protocol), row.address),
            Identity::Mark(MarkKey { family: Family::Ipv4, .. }) => format!("FWM  {}", row.address),
            Identity::Mark(MarkKey { family: Family::Ipv6, .. }) => format!("FWM  {} IPv6", row.address),
        };
        text += &match format {
            Format::Stats { exact } => format!("{}{}\n", column(&name, 33), amounts(row.traffic.cells(), exact)),
            Format::Rate { exact } => format!("{}{}\n", column(&name, 33), amounts(row.rates.cells(), exact)),
            _ => format!("{} {}\n", cut(&name, 33), row.spec.describe()),
        };
        for dest in &row.dests {
            text += &format!("  -> {}{}\n", column(&dest.address, 28), dest_cells(dest, format));
        }
    }
    text
}

fn titles(format: Format) -> String {
    let name = "Prot LocalAddress:Port";
    match format {
        Format::Default => {
            format!("{name} Scheduler Flags\n  -> RemoteAddress:Port           Forward Weight ActiveConn InActConn\n")
        }
        Format::TunInfo => format!(
            "{name} Scheduler Flags\n  -> RemoteAddress:Port           Forward TunnelInfo    Weight ActiveConn InActConn\n"
        ),
        Format::Stats { .. } => format!(
            "{name:<33} {:>8} {:>8} {:>8} {:>8} {:>8}\n  -> RemoteAddress:Port\n",
            "Conns", "InPkts", "OutPkts", "InBytes", "OutBytes"
        ),
        Format::Rate { .. } => format!(
            "{name:<33} {:>8} {:>8} {:>8} {:>8} {:>8}\n  -> RemoteAddress:Port\n",
            "CPS", "InPPS", "OutPPS", "InBPS", "OutBPS"
        ),
        Format::Thresholds => format!(
            "{name:<33} {:<10} {:<10} {:<10} {:<10}\n  -> RemoteAddress:Port\n",
            "Uthreshold", "Lthreshold", "ActiveConn", "InActConn"
        ),
        Format::PersistentConn => format!(
            "{name:<33} {:<9} {:<11} {:<10} {:<10}\n  -> RemoteAddress:Port\n",
            "Weight", "PersistConn", "ActiveConn", "InActConn"
        ),
    }
}

fn dest_cells(dest: &DestRow, format: Format) -> String {
    let DestRow { method, weight, thresholds, connections: [active, inactive], templates, traffic, rates, .. } = dest;
    let Thresholds { upper, lower } = thresholds;
    let method = method.column();
    match format {
        Format::Default => format!(" {method:<7} {weight:<6} {active:<10} {inactive:<10}"),
        Format::Stats { exact } => amounts(traffic.cells(), exact),
        Format::Rate { exact } => {
            let Rates { cps, inpps, outpps, inbps, outbps } = rates;
            format!(" {cps:>8} {inpps:>8} {outpps:>8}") + &[*inbps, *outbps].map(|value| amount(value, exact)).concat()
        }
        Format::Thresholds => format!(" {upper:<10} {lower:<10} {active:<10} {inactive:<10}"),
        Format::PersistentConn => format!(" {weight:<9} {templates:<11} {active:<10} {inactive:<10}"),
        Format::TunInfo => {
            let tunnel = if dest.method == Method::Tunnel { "ipip" } else { "n/a" };
            format!(" {method:<7} {tunnel:<13} {weight:<6} {active:<10} {inactive:<10}")
        }
    }
}

/// The first `width` bytes of an IPv4 service's or destination's name; other names are whole.
fn cut(name: &str, width: usize) -> &str {
    if name.contains('[') { name } else { name.get(..width).unwrap_or(name) }
}

fn column(name: &str, width: usize) -> String {
    format!("{:<width$}", cut(name, width))
}

const fn upper(protocol: Transport) -> &'static str {
    match protocol {
        Transport::Tcp => "TCP",
        Transport::Udp => "UDP",
        Transport::Sctp => "SCTP",
    }
}

fn amounts(cells: [u64; 5], exact: bool) -> String {
    cells.map(|value| amount(value, exact)).concat()
}

/// A number in nine columns, unless it is to be exact.
fn amount(value: u64, exact: bool) -> String {
    let (value, unit) = match value {
        _ if exact => (value, ""),
        0..100_000_000 => (value, ""),
        100_000_000..1_000_000_000 => (value / 1000, "K"),
        1_000_000_000..100_000_000_000 => (value / 1_000_000, "M"),
        100_000_000_000..100_000_000_000_000 => (value / 1_000_000_000, "G"),
        _ => (value / 1_000_000_000_000, "T"),
    };
    if unit.is_empty() { format!(" {value:>8}") } else { format!("{value:>8}{unit}") }
}

/// Commands that make the services again.
pub(super) fn saved(rows: &[ServiceRow]) -> String {
    let mut text = String::new();
    for row in rows {
        let (option, family) = match row.identity {
            Identity::Address(ServiceKey { protocol: Transport::Tcp, .. }) => ("-t", ""),
            Identity::Address(ServiceKey { protocol: Transport::Udp, .. }) => ("-u", ""),
            Identity::Address(ServiceKey { protocol: Transport::Sctp, .. }) => ("--sctp-service", ""),
            Identity::Mark(MarkKey { family: Family::Ipv4, .. }) => ("-f", ""),
            Identity::Mark(MarkKey { family: Family::Ipv6, .. }) => ("-f", " -6"),
        };
        let service = format!("{option} {}{family}", row.address);
        let ops = if row.spec.is_one_packet() { " -o" } else { "" };
        let flags = match row.spec.flags & sched_flag::ALL {
            0 => String::new(),
            _ => format!(" -b {}", row.spec.flag_names().join(",")),
        };
        let persistence = row.spec.persistence.map_or_else(String::new, |Persistence { timeout, netmask }| {
            let mask = if netmask.is_whole() { String::new() } else { format!(" -M {netmask}") };
            format!(" -p {timeout}{mask}")
        });
        text += &format!("-A {service} -s {}{persistence}{ops}{flags}\n", row.spec.scheduler);
        for DestRow { address, method, weight, .. } in &row.dests {
            let (method, tunnel) = match method {
                Method::Masq => ("-m", ""),
                Method::Route => ("-g", ""),
                Method::Tunnel => ("-i", " --tun-type ipip"),
            };
            text += &format!("-a {service} -r {address} {method} -w {weight}{tunnel}\n");
        }
    }
    text
}

/// The title lines of a list of connections.
pub(super) fn connection_titles(persistent: bool) -> String {
    let destination = if persistent {
        format!("{:<18} {:<16} {}", "destination", "pe name", "pe_data")
    } else {
        "destination".to_owned()
    };
    format!("IPVS connection entries\npro expire {:<11} {:<18} {:<18} {destination}\n", "state", "source", "virtual")
}

/// Adds the line of a connection.
pub(super) fn connection<W: Write>(
    lines: &mut Lines<W>,
    connection: &Connection,
    names: Option<&dyn Names>,
) -> io::Result<()> {
    let Connection { protocol, client, service, destination, state, expires, .. } = *connection;
    lines.text(protocol.map_or("IP", upper)).cell(3, " ").clock(expires).cell(6, " ").text(state).cell(11, " ");
    for (end, width, gap) in [(client, 18, " "), (service, 18, " "), (destination, 0, "")] {
        match names {
            None => lines.socket(end),
            Some(_) => lines.text(&address(end, protocol, names)),
        };
        lines.cell(width, gap);
    }
    lines.end()
}

/// What `--timeout` prints.
pub(super) fn timeouts(Timeouts { tcp, tcpfin, udp }: Timeouts) -> String {
    format!("Timeout (tcp tcpfin udp): {tcp} {tcpfin} {udp}\n")
}

/// An address and port, by their names unless these are not wanted. What is of no protocol has no name for its port.
pub(super) fn address(address: SocketAddr, protocol: Option<Transport>, names: Option<&dyn Names>) -> String {
    let Some(names) = names else { return address.to_string() };
    let digits = || address.port().to_string();
    let port = protocol.map_or_else(digits, |transport| names.service_at(address.port(), transport));
    let host = names.host_at(address.ip());
    let mut text = if address.is_ipv6() { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
    let end = (0..=text.len().min(59)).rev().find(|end| text.is_char_boundary(*end));
    text.truncate(end.unwrap_or(0));
    text
}

/// Puts services, and the destinations of each, in the order of ipvsadm.
pub(super) fn sort(services: &mut Vec<Service>) {
    let rank = |key: &ServiceKey| (key.address.is_ipv6(), key.protocol.protocol() as u8);
    merge_sort(services, &|a, b| match (&a.key, &b.key) {
        (Identity::Address(a), Identity::Address(b)) => {
            rank(a).cmp(&rank(b)).then_with(|| by_address(&a.address, &b.address))
        }
        // Those of marks come behind all others.
        (a, b) => a.cmp(b),
    });
    for service in services {
        merge_sort(&mut service.dests, &|a: &Dest, b: &Dest| by_address(&a.address, &b.address));
    }
}

/// Addresses by the sign of their difference in 32 bits, or of that of the first words in which they differ, so that
/// addresses far apart come in an order that is none.
fn by_address(a: &SocketAddr, b: &SocketAddr) -> Ordering {
    let by_word = |a: u32, b: u32| a.wrapping_sub(b).cast_signed().cmp(&0);
    let order = match (a.ip(), b.ip()) {
        (IpAddr::V4(a), IpAddr::V4(b)) => by_word(a.to_bits(), b.to_bits()),
        (IpAddr::V6(a), IpAddr::V6(b)) => {
            let word = |address: Ipv6Addr, index: u32| (address.to_bits() >> (96 - 32 * index)) as u32;
            let orders = (0..4).map(|index| by_word(word(a, index), word(b, index)));
            orders.fold(Ordering::Equal, Ordering::then)
        }
        (a, b) => a.cmp(&b),
    };
    order.then(a.port().cmp(&b.port()))
}

/// Sorts as the C library's `qsort` does, which ipvsadm uses: by merging halves, the first the shorter. It matters for an
/// order that is none, which the standard library's sort may refuse.
fn merge_sort<T>(items: &mut Vec<T>, compare: &impl Fn(&T, &T) -> Ordering) {
    if items.len() <= 1 {
        return;
    }
    let mut second = items.split_off(items.len() / 2);
    let mut first = std::mem::take(items);
    merge_sort(&mut first, compare);
    merge_sort(&mut second, compare);
    let (mut first, mut second) = (first.into_iter().peekable(), second.into_iter().peekable());
    while let (Some(a), Some(b)) = (first.peek(), second.peek()) {
        let from_first = compare(a, b) != Ordering::Greater;
        items.extend(if from_first { first.next() } else { second.next() });
    }
    items.extend(first.chain(second));
}

#[cfg(test)]
mod tests {
    use lb_common::proto::Scheduler;

    use super::*;

    fn row() -> ServiceRow {
        let traffic = |connections| Traffic {
            connections,
            packets_in: 99_999_999,
            packets_out: 100_000_000,
            bytes_in: 123_456_789_012_345,
            bytes_out: 99_999_999_999,
        };
        ServiceRow {
            identity: ServiceKey { protocol: Transport::Tcp, address: ([192, 168, 100, 200], 443).into() }.into(),
            address: "192.168.100.200:443".into(),
            spec: ServiceSpec { scheduler: Scheduler::Rr, flags: 0, persistence: None },
            traffic: traffic(1_234_567_890),
            rates: Rates { cps: 123_456_789, inpps: 2, outpps: 3, inbps: 123_456_789, outbps: 4 },
            dests: vec![
                DestRow {
                    address: "10.1.1.1:443".into(),
                    method: Method::Tunnel,
                    weight: 1,
                    thresholds: Thresholds::default(),
                    connections: [0, 0],
                    templates: 0,
                    traffic: traffic(0),
                    rates: Rates::default(),
                },
                DestRow {
                    address: "10.1.1.2:8443".into(),
                    method: Method::Masq,
                    weight: 100,
                    thresholds: Thresholds { upper: 100, lower: 50 },
                    connections: [12, 34],
                    templates: 3,
                    traffic: traffic(5),
                    rates: Rates { cps: 123_456_789, inpps: 2, outpps: 3, inbps: 123_456_789, outbps: 4 },
                },
            ],
        }
    }

    #[test]
    fn lists_look_like_ipvsadms() {
        assert_eq!(
            services(&[row()], Format::Default, true),
            "IP Virtual Server version 1.2.1 (size=4096)\n\
             Prot LocalAddress:Port Scheduler Flags\n  \
               -> RemoteAddress:Port           Forward Weight ActiveConn InActConn\n\
             TCP  192.168.100.200:443 rr\n  \
               -> 10.1.1.1:443                 Tunnel  1      0          0         \n  \
               -> 10.1.1.2:8443                Masq    100    12         34        \n"
        );
        assert_eq!(
            services(&[row()], Format::Thresholds, false),
            "Prot LocalAddress:Port            Uthreshold Lthreshold ActiveConn InActConn \n  \
               -> RemoteAddress:Port\n\
             TCP  192.168.100.200:443 rr\n  \
               -> 10.1.1.1:443                 0          0          0          0         \n  \
               -> 10.1.1.2:8443                100        50         12         34        \n"
        );
        assert_eq!(
            services(&[row()], Format::Stats { exact: false }, false),
            "Prot LocalAddress:Port               Conns   InPkts  OutPkts  InBytes OutBytes\n  \
               -> RemoteAddress:Port\n\
             TCP  192.168.100.200:443             1234M 99999999  100000K     123T   99999M\n  \
               -> 10.1.1.1:443                        0 99999999  100000K     123T   99999M\n  \
               -> 10.1.1.2:8443                       5 99999999  100000K     123T   99999M\n"
        );
        // Servers' connections and packets are never cut short.
        assert_eq!(
            services(&[row()], Format::Rate { exact: false }, false),
            "Prot LocalAddress:Port                 CPS    InPPS   OutPPS    InBPS   OutBPS\n  \
               -> RemoteAddress:Port\n\
             TCP  192.168.100.200:443           123456K        2        3  123456K        4\n  \
               -> 10.1.1.1:443                        0        0        0        0        0\n  \
               -> 10.1.1.2:8443                123456789        2        3  123456K        4\n"
        );
        assert_eq!(
            saved(&[row()]),
            "-A -t 192.168.100.200:443 -s rr\n\
             -a -t 192.168.100.200:443 -r 10.1.1.1:443 -i -w 1 --tun-type ipip\n\
             -a -t 192.168.100.200:443 -r 10.1.1.2:8443 -m -w 100\n"
        );
    }

    #[test]
    fn exact_numbers_push_columns_aside() {
        assert_eq!(amount(99_999_999, true), " 99999999");
        assert_eq!(amount(123_456_789, true), " 123456789");
        assert_eq!(amount(1_234_567_890, true), " 1234567890");
    }

    #[test]
    fn a_connection_is_a_line() -> io::Result<()> {
        let shown = Connection {
            protocol: Some(Transport::Tcp),
            client: ([192, 168, 1, 1], 54_321).into(),
            service: ([192, 168, 100, 200], 443).into(),
            destination: ([10, 1, 1, 1], 443).into(),
            state: "ESTABLISHED",
            expires: 899_900,
            method: Method::Masq,
            mark: None,
        };
        let mut lines = Lines::new(Vec::new());
        lines.text(&connection_titles(false)).cell(0, "");
        connection(&mut lines, &shown, None)?;
        assert_eq!(
            String::from_utf8_lossy(&lines.finish()?),
            "IPVS connection entries\n\
             pro expire state       source             virtual            destination\n\
             TCP 14:59  ESTABLISHED 192.168.1.1:54321  192.168.100.200:443 10.1.1.1:443\n"
        );
        Ok(())
    }

    #[test]
    fn addresses_far_apart_sort_as_in_ipvsadm() {
        let at = |first: u8, port| SocketAddr::from(([first, 0, 0, 1], port));
        assert_eq!(by_address(&at(10, 80), &at(11, 1)), Ordering::Less);
        assert_eq!(by_address(&at(10, 80), &at(10, 79)), Ordering::Greater);
        // The difference does not fit in 31 bits.
        assert_eq!(by_address(&at(10, 80), &at(192, 80)), Ordering::Greater);
        let mut addresses = vec![at(192, 1), at(10, 2), at(100, 1), at(10, 1)];
        merge_sort(&mut addresses, &by_address);
        assert_eq!(addresses, [at(192, 1), at(10, 1), at(10, 2), at(100, 1)]);
        let six = |text: &str| text.parse::<SocketAddr>().expect("an address and port");
        assert_eq!(by_address(&six("[fd00::1]:80"), &six("[fd00::2]:1")), Ordering::Less);
        assert_eq!(by_address(&six("[fd00::1]:80"), &six("[fd00::1]:79")), Ordering::Greater);
        assert_eq!(by_address(&six("[fd00::ffff:1]:80"), &six("[fd00:0:0:1::]:80")), Ordering::Less);
        // The difference of their first words does not fit in 31 bits.
        assert_eq!(by_address(&six("[fd00::1]:80"), &six("[2001::1]:80")), Ordering::Less);
        assert_eq!(by_address(&six("[fd00::1]:80"), &six("[7d00::1]:80")), Ordering::Less);
        assert_eq!(by_address(&six("[7cff::1]:80"), &six("[fd00::1]:80")), Ordering::Greater);
    }
}
