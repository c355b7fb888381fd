//! Clients of persistent services stay at their servers.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::bail;
use xdpvs_tests::ftp;

use super::*;

/// Addresses of the client, of two networks of sixteen.
const CLIENTS: [Ipv4Addr; 4] =
    [cast::CLIENT, Ipv4Addr::new(10, 1, 0, 2), Ipv4Addr::new(10, 1, 0, 17), Ipv4Addr::new(10, 1, 0, 18)];
/// How long clients are remembered: longer than a test takes.
const LONG: &str = "-p 900";
/// Another port that every server serves.
const OTHER: u16 = 7070;

const METHODS: [Method; 3] = [Method::Masq, Method::Route, Method::Tunnel];
const TRANSPORTS: [Transport; 2] = [Transport::Tcp, Transport::Udp];

/// What makes all addresses of a network one client.
const fn netmask(family: Family) -> &'static str {
    match family {
        Family::Four => "-M 255.255.255.240",
        // The fifth byte is the first that tells clients apart.
        Family::Six => "-M 36",
    }
}

/// The network with the clients with numbers 0 and 1, or with the others.
fn network_of(family: Family, client: usize) -> IpAddr {
    match family.address(CLIENTS[client]) {
        IpAddr::V4(address) => (address & Ipv4Addr::new(255, 255, 255, 240)).into(),
        IpAddr::V6(address) => (address & std::net::Ipv6Addr::from_bits(u128::MAX << (128 - 36))).into(),
    }
}

const fn server_address(method: Method, index: u8) -> Ipv4Addr {
    match method {
        Method::Masq => cast::server(index),
        Method::Route | Method::Tunnel => cast::VIP,
    }
}

/// The network, with all addresses of the client.
fn network(method: Method) -> Result<Network> {
    let network = Network::new(Shape::TwoArmed, method)?;
    CLIENTS[1..].iter().try_for_each(|address| network.client.give("eth0", *address, 4))?;
    Ok(network)
}

/// Servers of this port, whatever the method.
fn start_servers_at(network: &Network, method: Method, port: u16) -> Result<Vec<Server>> {
    let servers = (0..).zip(&network.servers);
    let all = servers.flat_map(|server| Family::ALL.map(|family| (server, family)));
    all.map(|((index, namespace), family)| {
        let address = family.address(server_address(method, index));
        Server::start(namespace, SocketAddr::new(address, port), index)
    })
    .collect()
}

/// Configures a persistent service with all real servers, at this port of theirs; server 0 is first in turn.
fn persist(director: &Director<'_>, family: Family, service: &str, (method, port): (Method, u16)) -> Result<()> {
    director.say(&format!("service add {service} -s rr {LONG}"))?;
    for index in (0..SERVERS).rev() {
        director.say(&format!("dest add {service} -r {} {}", family.at(index, port), option(method)))?;
    }
    Ok(())
}

/// The client with this number asks a port of the service, or of what has its address. Returns the number of the server.
fn ask_from(network: &Network, family: Family, client: usize, transport: Transport, port: u16) -> Result<u8> {
    let (client, service) = (family.address(CLIENTS[client]), SocketAddr::new(family.address(cast::VIP), port));
    let bytes = peers::pattern(500);
    let answered = network.client.enter(|| match transport {
        Transport::Tcp => peers::ask_tcp_from(client, service, &bytes, bytes.len()),
        Transport::Udp => peers::ask_udp_from(client, service, &bytes, bytes.len()),
        Transport::Sctp => bail!("its clients have no addresses of their own"),
    })?;
    answered.with_context(|| format!("{client} asks {transport} {service}"))
}

/// Templates as `ipvsadm -Lnc` shows them: protocol, state, client, service and destination; sorted.
fn templates(director: &Director<'_>) -> Result<Vec<[String; 5]>> {
    let list = director.say("ipvsadm -Lnc")?;
    let mut templates = Vec::new();
    // Two lines of titles.
    for line in list.lines().skip(2) {
        let columns: Vec<&str> = line.split_whitespace().collect();
        let &[protocol, _, state, client, service, destination] = columns.as_slice() else { bail!("{line:?}") };
        if client.ends_with(":0") {
            templates.push([protocol, state, client, service, destination].map(str::to_owned));
        }
    }
    templates.sort();
    Ok(templates)
}

/// What [`templates`] are to be: of these clients, each with the number of its server.
fn expected(
    (protocol, service): (&str, SocketAddr),
    port: u16,
    clients: impl IntoIterator<Item = (IpAddr, u8)>,
) -> Vec<[String; 5]> {
    let family = if service.is_ipv4() { Family::Four } else { Family::Six };
    let row = |(client, server)| {
        let (client, destination) = (SocketAddr::new(client, 0), family.at(server, port));
        [protocol.into(), "ASSURED".into(), client.to_string(), service.to_string(), destination.to_string()]
    };
    let mut rows: Vec<_> = clients.into_iter().map(row).collect();
    rows.sort();
    rows
}

/// How many templates each server has, as `ipvsadm -Ln --persistent-conn` shows them, in the order of their numbers.
fn templates_of_servers(director: &Director<'_>) -> Result<Vec<u32>> {
    let list = director.say("ipvsadm -Ln --persistent-conn")?;
    let rows = list.lines().filter_map(|line| line.trim_start().strip_prefix("-> "));
    let counts = rows.skip(1).map(|row| {
        let mut columns = row.split_whitespace().skip(2);
        Ok(columns.next().with_context(|| format!("{row:?}"))?.parse()?)
    });
    counts.collect()
}

/// Ends everything, and then the services. Templates live longer than the services that they are for.
fn forget(director: &Director<'_>) -> Result<()> {
    director.say("conn flush")?;
    let left = templates(director)?;
    ensure!(left.is_empty(), "they are left: {left:?}");
    director.say("service flush")?;
    Ok(())
}

/// Every client is served by the server it has had, whose turn it was when it first came.
#[test]
fn clients_stay_at_their_servers() -> Result<()> {
    for method in METHODS {
        let network = network(method)?;
        let _servers = start_servers(&network, method)?;
        let director = network.start()?;
        for (family, transport) in Family::ALL.into_iter().flat_map(|family| TRANSPORTS.map(|one| (family, one))) {
            let (service, port) = (service(family, transport), server_port(method));
            persist(&director, family, &service, (method, port))?;
            for round in 0..3 {
                for (client, server) in [(0, 0), (1, 1), (2, 2), (3, 0)] {
                    let served = ask_from(&network, family, client, transport, PORT)?;
                    ensure!(served == server, "{method}, {family:?}, round {round}: {served} served {client}");
                }
            }
            let name = if transport == Transport::Tcp { "TCP" } else { "UDP" };
            if transport == Transport::Tcp || method == Method::Masq {
                let clients = CLIENTS.map(|client| family.address(client)).into_iter().zip([0, 1, 2, 0]);
                let (shown, expected) = (templates(&director)?, expected((name, vip(family)), port, clients));
                ensure!(shown == expected, "{method}: {shown:?} instead of {expected:?}");
            } else {
                // Answers of these servers pass the director by, so it does not know of any.
                let shown = templates(&director)?;
                ensure!(shown.len() == 4 && shown.iter().all(|template| template[1] == "NONE"), "{shown:?}");
            }
            let counts = templates_of_servers(&director)?;
            ensure!(counts == [2, 1, 1], "{method}: {counts:?} templates");
            forget(&director)?;
        }
    }
    Ok(())
}

/// With a netmask, all of a network are one client.
#[test]
fn networks_of_clients_stay_at_their_servers() -> Result<()> {
    let method = Method::Route;
    let network = network(method)?;
    let _servers = start_servers(&network, method)?;
    let director = network.start()?;
    for family in Family::ALL {
        let service = format!("{} {}", service(family, Transport::Tcp), netmask(family));
        director.say(&format!("service add {service} -s rr {LONG}"))?;
        let service = super::service(family, Transport::Tcp);
        for index in (0..SERVERS).rev() {
            director.say(&format!("dest add {service} -r {} -g", family.at(index, PORT)))?;
        }
        for _ in 0..3 {
            for (client, server) in [(0, 0), (2, 1), (1, 0), (3, 1)] {
                let served = ask_from(&network, family, client, Transport::Tcp, PORT)?;
                ensure!(served == server, "{family:?}: {served} served {client}");
            }
        }
        let networks = [(network_of(family, 0), 0), (network_of(family, 2), 1)];
        let (shown, expected) = (templates(&director)?, expected(("TCP", vip(family)), PORT, networks));
        ensure!(shown == expected, "{shown:?} instead of {expected:?}");
        forget(&director)?;
    }
    Ok(())
}

/// A service of port 0 has all ports of its address, and a client one server for them all.
#[test]
fn clients_stay_at_their_servers_over_all_ports() -> Result<()> {
    for method in METHODS {
        let network = network(method)?;
        let _servers = start_servers_at(&network, method, PORT)?;
        let _others = start_servers_at(&network, method, OTHER)?;
        let director = network.start()?;
        for family in Family::ALL {
            let all_ports = SocketAddr::new(family.address(cast::VIP), 0);
            persist(&director, family, &format!("-t {all_ports}"), (method, 0))?;
            for port in [PORT, OTHER, OTHER, PORT] {
                for (client, server) in [(0, 0), (1, 1), (2, 2), (3, 0)] {
                    let served = ask_from(&network, family, client, Transport::Tcp, port)?;
                    ensure!(served == server, "{method}, {family:?}, port {port}: {served} served {client}");
                }
            }
            let clients = CLIENTS.map(|client| family.address(client)).into_iter().zip([0, 1, 2, 0]);
            let (shown, expected) = (templates(&director)?, expected(("TCP", all_ports), 0, clients));
            ensure!(shown == expected, "{method}: {shown:?} instead of {expected:?}");
            forget(&director)?;
        }
    }
    Ok(())
}

/// A service of a mark gives a client one server for everything that has the mark, of either protocol.
#[test]
fn clients_stay_at_their_servers_for_all_of_a_mark() -> Result<()> {
    for method in METHODS {
        let network = network(method)?;
        let _servers = start_servers_at(&network, method, PORT)?;
        let _others = start_servers_at(&network, method, OTHER)?;
        let director = network.start()?;
        for family in Family::ALL {
            director.say(&format!("mark add 7 --dst {} --dport {OTHER}-{PORT}", family.network(cast::VIP, 3)))?;
            let service = if family == Family::Four { "-f 7" } else { "-f 7 -6" };
            persist(&director, family, service, (method, 0))?;
            let of_transports = |port| TRANSPORTS.map(|transport| (transport, port));
            for (transport, port) in [PORT, OTHER].into_iter().flat_map(of_transports) {
                for (client, server) in [(0, 0), (1, 1), (2, 2), (3, 0)] {
                    let served = ask_from(&network, family, client, transport, port)?;
                    ensure!(served == server, "{method}, {family:?}, {transport} {port}: {served} served {client}");
                }
            }
            let shown = templates(&director)?;
            let protocols = shown.iter().all(|[protocol, ..]| protocol == "IP");
            ensure!(protocols && shown.len() == CLIENTS.len(), "{method}: {shown:?}");
            let counts = templates_of_servers(&director)?;
            ensure!(counts == [2, 1, 1], "{method}: {counts:?} templates");
            forget(&director)?;
        }
    }
    Ok(())
}

/// Files come from the server that the client has asked for them.
#[test]
fn files_come_from_the_server_that_was_asked() -> Result<()> {
    const FTP: u16 = 21;
    for method in METHODS {
        let network = network(method)?;
        let director = network.start()?;
        let servers = (0..).zip(&network.servers);
        let _servers = servers
            .flat_map(|server| Family::ALL.map(|family| (server, family)))
            .map(|((index, namespace), family)| {
                let address = SocketAddr::new(family.address(server_address(method, index)), FTP);
                ftp::Server::start(namespace, address, index)
            })
            .collect::<Result<Vec<_>>>()?;
        for family in Family::ALL {
            let address = SocketAddr::new(family.address(cast::VIP), FTP);
            persist(&director, family, &format!("-t {address}"), (method, FTP))?;
            for (client, server) in [(0, 0), (1, 1), (2, 2), (0, 0)] {
                let client = family.address(CLIENTS[client]);
                network.client.enter(|| -> Result<()> {
                    let mut session = ftp::Client::connect(client, address)?;
                    ensure!(session.server == server, "{method}: {} serves {client}", session.server);
                    for _ in 0..3 {
                        let from = session.fetch().with_context(|| format!("{method}, {client}"))?;
                        ensure!(from == server, "{method}: {client} was asked for a file by {from}");
                    }
                    Ok(())
                })??;
            }
            let shown = templates(&director)?;
            ensure!(shown.len() == 3, "{method}: {shown:?}");
            forget(&director)?;
        }
    }
    Ok(())
}

/// New programs know the clients of the old ones.
#[test]
fn clients_stay_at_their_servers_when_programs_are_replaced() -> Result<()> {
    let method = Method::Masq;
    let network = network(method)?;
    let _servers = start_servers(&network, method)?;
    let director = network.start()?;
    let up = [&["up"], network.interfaces()].concat();
    for family in Family::ALL {
        persist(&director, family, &service(family, Transport::Tcp), (method, MAPPED))?;
    }
    let mut before = Vec::new();
    for round in 0..4 {
        for family in Family::ALL {
            for (client, server) in [(0, 0), (1, 1), (2, 2), (3, 0)] {
                let served = ask_from(&network, family, client, Transport::Tcp, PORT)?;
                ensure!(served == server, "{family:?}, round {round}: {served} served {client}");
            }
        }
        let shown = templates(&director)?;
        ensure!(shown.len() == 2 * CLIENTS.len(), "{shown:?}");
        ensure!(round == 0 || shown == before, "{shown:?} instead of {before:?}");
        before = shown;
        director.run(&up)?;
    }
    Ok(())
}
