//! Real traffic: sockets of a client, a director in its own network namespace, three real servers. Needs root.

use std::{
    net::SocketAddr,
    process::Stdio,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use lb_common::proto::Method;
use lb_userspace::control::model::Transport;
use serde_json::Value;
use xdpvs_tests::{
    cast,
    family::Family,
    network::{Network, SERVERS, Shape},
    peers::{self, Server},
    program::Director,
};

#[path = "traffic/persistence.rs"]
mod persistence;

/// The port of services, and of real servers by DR and tunnel.
const PORT: u16 = 8080;
/// The port of masqueraded real servers.
const MAPPED: u16 = 9090;

const fn vip(family: Family) -> SocketAddr {
    SocketAddr::new(family.address(cast::VIP), PORT)
}

/// The option that names a service.
fn service(family: Family, transport: Transport) -> String {
    let option = match transport {
        Transport::Tcp => "-t",
        Transport::Udp => "-u",
        Transport::Sctp => "--sctp-service",
    };
    format!("{option} {}", vip(family))
}

const fn server_port(method: Method) -> u16 {
    match method {
        Method::Masq => MAPPED,
        Method::Route | Method::Tunnel => PORT,
    }
}

fn destination(family: Family, method: Method, index: u8) -> String {
    family.at(index, server_port(method)).to_string()
}

const fn option(method: Method) -> &'static str {
    match method {
        Method::Masq => "-m",
        Method::Route => "-g",
        Method::Tunnel => "-i",
    }
}

/// Configures a service with all real servers; server 0 is first in turn, for ip_vs puts the newest first.
fn configure(
    director: &Director<'_>,
    (family, transport): (Family, Transport),
    method: Method,
    scheduler: &str,
) -> Result<()> {
    let service = service(family, transport);
    director.say(&format!("service add {service} -s {scheduler}"))?;
    for index in (0..SERVERS).rev() {
        director.say(&format!("dest add {service} -r {} {}", destination(family, method, index), option(method)))?;
    }
    Ok(())
}

fn start_servers(network: &Network, method: Method) -> Result<Vec<Server>> {
    let start = |(index, namespace), family: Family| {
        let address = if method == Method::Masq { cast::server(index) } else { cast::VIP };
        Server::start(namespace, SocketAddr::new(family.address(address), server_port(method)), index)
    };
    let servers = (0..).zip(&network.servers);
    servers.flat_map(|server| Family::ALL.map(|family| start(server, family))).collect()
}

fn ask(family: Family, transport: Transport, sent: &[u8], wanted: usize) -> Result<u8> {
    match transport {
        Transport::Tcp => peers::ask_tcp(vip(family), sent, wanted),
        Transport::Udp => peers::ask_udp(vip(family), sent, wanted),
        Transport::Sctp => peers::ask_sctp(vip(family), sent, wanted),
    }
}

/// The sum of `field` over all destinations of the first service, and over the first destination of each pair wanted.
fn of_destinations<'v>(list: &'v Value, field: &'v str) -> impl Iterator<Item = u64> + 'v {
    let destinations = list["services"][0]["destinations"].as_array();
    destinations.into_iter().flatten().map(move |destination| destination[field].as_u64().unwrap_or(u64::MAX))
}

/// Sizes of what is sent: nothing, one byte, and as much as there may be.
fn sizes(family: Family, transport: Transport, method: Method) -> Vec<usize> {
    let header = family.header();
    match (transport, method) {
        (Transport::Tcp, _) => vec![0, 1, 1000, 100_000, 3 << 20],
        // The largest datagrams that fit into one packet, of 1,500 bytes or a header less in a tunnel. A request has 8 bytes
        // before what is sent, an answer 9.
        (Transport::Udp, Method::Tunnel) => vec![0, 1, 1000, 1500 - 2 * header - 8 - 9],
        (Transport::Udp, _) => vec![0, 1, 1000, 1500 - header - 8 - 9],
        // The same, with the headers of the packet and of its chunk.
        (Transport::Sctp, Method::Tunnel) => vec![0, 1, 1000, 1500 - 2 * header - 16 - 9],
        (Transport::Sctp, _) => vec![0, 1, 1000, 1500 - header - 16 - 9],
    }
}

fn every_byte_arrives(shape: Shape, method: Method) -> Result<()> {
    bytes_arrive(shape, method, sizes)
}

/// Clients send as much as `sizes` says, over TCP, UDP and SCTP, IPv4 and IPv6.
fn bytes_arrive(shape: Shape, method: Method, sizes: impl Fn(Family, Transport, Method) -> Vec<usize>) -> Result<()> {
    let network = Network::new(shape, method)?;
    let _servers = start_servers(&network, method)?;
    let director = network.start()?;
    let transports = [Transport::Tcp, Transport::Udp, Transport::Sctp];
    for (family, transport) in
        Family::ALL.into_iter().flat_map(|family| transports.map(|transport| (family, transport)))
    {
        configure(&director, (family, transport), method, "rr")?;
        let sizes = sizes(family, transport, method);
        let served = network.client.enter(|| -> Result<Vec<u8>> {
            // Each size as often as there are servers, so that each server gets each size.
            let sizes = sizes.iter().flat_map(|size| [size; SERVERS as usize]);
            sizes
                .map(|&size| {
                    let size_of_that = || {
                        let reasons = director.say("stats").unwrap_or_else(|error| format!("{error:#}"));
                        format!("{transport} of {size} bytes by {method}, {shape:?}, {family:?}\n{reasons}")
                    };
                    ask(family, transport, &peers::pattern(size), size).with_context(size_of_that)
                })
                .collect()
        })??;
        let in_turn: Vec<u8> = (0..SERVERS).cycle().take(served.len()).collect();
        ensure!(served == in_turn, "rr served {served:?}");
        let stats = director.ask("stats")?;
        for connections in of_destinations(&stats, "connections") {
            ensure!(connections == sizes.len() as u64, "{connections} connections counted: {stats}");
        }
        ensure!(of_destinations(&stats, "packets_in").all(|packets| packets > 0), "no packets counted: {stats}");
        let replies_pass = method == Method::Masq;
        ensure!(of_destinations(&stats, "packets_out").all(|packets| (packets > 0) == replies_pass), "{stats}");
        director.say("service flush")?;
    }
    Ok(())
}

macro_rules! every_byte_arrives {
    ($($name:ident: $shape:ident $method:ident;)+) => {$(
        #[test]
        fn $name() -> Result<()> {
            every_byte_arrives(Shape::$shape, Method::$method)
        }
    )+};
}

every_byte_arrives! {
    every_byte_arrives_by_nat_one_armed: OneArmed Masq;
    every_byte_arrives_by_nat_two_armed: TwoArmed Masq;
    every_byte_arrives_by_dr_one_armed: OneArmed Route;
    every_byte_arrives_by_dr_two_armed: TwoArmed Route;
    every_byte_arrives_by_tunnel_one_armed: OneArmed Tunnel;
    every_byte_arrives_by_tunnel_two_armed: TwoArmed Tunnel;
}

/// Every method, transport and family in brief: what is asked of machines on which everything is slow.
#[test]
fn smoke() -> Result<()> {
    let brief = |_, _, _| vec![1, 1000];
    [Method::Masq, Method::Route, Method::Tunnel]
        .into_iter()
        .try_for_each(|method| bytes_arrive(Shape::OneArmed, method, brief))
}

/// The very first packet finds no neighbour known, and arrives all the same: nobody sends a datagram again.
#[test]
fn the_first_packet_arrives() -> Result<()> {
    for method in [Method::Masq, Method::Route, Method::Tunnel] {
        let network = Network::new(Shape::TwoArmed, method)?;
        let _servers = start_servers(&network, method)?;
        let director = network.start()?;
        let mut before = Some(0);
        for family in Family::ALL {
            configure(&director, (family, Transport::Udp), method, "rr")?;
            network.director.ip("neigh flush all")?;
            network.client.enter(|| peers::ask_udp(vip(family), b"first", 10))??;
            let unknown = director.ask("stats")?["reasons"]["neighbour-unknown"].as_u64();
            ensure!(unknown > before, "{family:?}, {method}: the neighbour was known");
            before = unknown;
        }
    }
    Ok(())
}

/// One service of a mark for everything that its rules give the mark: both protocols, by every method.
#[test]
fn marked_bytes_arrive() -> Result<()> {
    for (method, family) in [Method::Masq, Method::Route, Method::Tunnel]
        .into_iter()
        .flat_map(|method| Family::ALL.map(|family| (method, family)))
    {
        let network = Network::new(Shape::TwoArmed, method)?;
        let _servers = start_servers(&network, method)?;
        let director = network.start()?;
        let service = if family == Family::Four { "-f 7" } else { "-f 7 -6" };
        director.say(&format!("mark add 9 --proto udp --dst {} --dport 1-79", family.network(cast::VIP, 2)))?;
        director.say(&format!("mark add 7 --dst {} --dport {PORT} --iface eth0", family.network(cast::VIP, 3)))?;
        director.say(&format!("service add {service} -s rr"))?;
        for index in (0..SERVERS).rev() {
            director.say(&format!(
                "dest add {service} -r {} {}",
                destination(family, method, index),
                option(method)
            ))?;
        }
        let served = network.client.enter(|| -> Result<Vec<u8>> {
            let transports = [Transport::Tcp, Transport::Udp];
            let asked =
                transports.into_iter().flat_map(|transport| [(transport, 1), (transport, 1000), (transport, 7)]);
            asked.map(|(transport, size)| ask(family, transport, &peers::pattern(size), size)).collect()
        })??;
        ensure!(served == [0, 1, 2, 0, 1, 2], "{method}, {family:?}: rr served {served:?}");
        let marked = director.ask("conn list --count -f 7")?["count"].as_u64();
        let of_family = director.ask(&format!("conn list --count {service}"))?["count"].as_u64();
        let expected = if family == Family::Four { (Some(6), Some(6)) } else { (Some(0), Some(6)) };
        ensure!((marked, of_family) == expected, "{method}, {family:?}: {marked:?} and {of_family:?} connections");
    }
    Ok(())
}

/// The address of a service answers to ping as on any host.
#[test]
fn the_host_answers_echo_requests_to_the_service() -> Result<()> {
    let network = Network::new(Shape::OneArmed, Method::Masq)?;
    let director = network.start()?;
    for family in Family::ALL {
        configure(&director, (family, Transport::Tcp), Method::Masq, "rr")?;
        network.client.exec(&format!("ping -c 2 -W 5 {}", family.address(cast::VIP)))?;
    }
    Ok(())
}

/// Requests that go on until something else is done.
struct Load {
    requests: AtomicU32,
    served: Mutex<[u32; SERVERS as usize]>,
    failures: Mutex<Vec<String>>,
    end: AtomicBool,
}

impl Load {
    /// Runs `work` while clients of `network` ask a service over TCP, three at a time. Returns how often they asked.
    fn during<T>(network: &Network, work: impl FnOnce(&Self) -> Result<T>) -> Result<(T, u32)> {
        let load = Self {
            requests: AtomicU32::new(0),
            served: Mutex::default(),
            failures: Mutex::default(),
            end: AtomicBool::new(false),
        };
        let result = thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| network.client.enter(|| load.ask_until_the_end()));
            }
            let result = work(&load);
            load.end.store(true, Ordering::Relaxed);
            result
        })?;
        let failures = load.failures.into_inner().unwrap_or_default();
        ensure!(failures.is_empty(), "{} requests failed, the first: {}", failures.len(), failures[0]);
        Ok((result, load.requests.into_inner()))
    }

    fn ask_until_the_end(&self) {
        let bytes = peers::pattern(20_000);
        while !self.end.load(Ordering::Relaxed) {
            match peers::ask_tcp(vip(Family::Four), &bytes, bytes.len()) {
                Ok(number) => self.served.lock().expect("no panic while counting")[usize::from(number)] += 1,
                Err(error) => self.failures.lock().expect("no panic while counting").push(format!("{error:#}")),
            }
            self.requests.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Waits until `count` more requests are done.
    fn wait(&self, count: u32) -> Result<()> {
        let (begun, first) = (Instant::now(), self.requests.load(Ordering::Relaxed));
        while self.requests.load(Ordering::Relaxed).wrapping_sub(first) < count {
            ensure!(begun.elapsed() < Duration::from_secs(60), "no {count} requests are done in a minute");
            thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    fn served(&self) -> [u32; SERVERS as usize] {
        *self.served.lock().expect("no panic while counting")
    }
}

/// Weights change while requests come in: no request fails, and a server of weight 0 gets no new ones.
#[test]
fn weights_change_under_load() -> Result<()> {
    let method = Method::Masq;
    let network = Network::new(Shape::OneArmed, method)?;
    let _servers = start_servers(&network, method)?;
    let director = network.start()?;
    configure(&director, (Family::Four, Transport::Tcp), method, "wrr")?;
    let weigh = |index, weight: u32| {
        let (service, destination) = (service(Family::Four, Transport::Tcp), destination(Family::Four, method, index));
        director.say(&format!("dest edit {service} -r {destination} -m -w {weight}"))
    };
    Load::during(&network, |load| {
        for weight in [1, 7, 3, 100, 2] {
            for index in 0..SERVERS {
                weigh(index, weight * u32::from(index + 1))?;
                load.wait(5)?;
            }
        }
        weigh(1, 0)?;
        // Those that began before.
        load.wait(6)?;
        let before = load.served();
        load.wait(60)?;
        let after = load.served();
        ensure!(after[1] == before[1], "server 1 has weight 0 and got {} requests", after[1] - before[1]);
        ensure!(after[0] > before[0] && after[2] > before[2], "the others got nothing: {before:?}, {after:?}");
        Ok(())
    })?;
    Ok(())
}

/// A destination is removed while requests come in: the others go on. Its connections stand still, and go on when it
/// comes back (`docs/ipvs.md`, section 1.4).
#[test]
fn a_destination_is_removed_under_load() -> Result<()> {
    use std::io::{Read as _, Write as _};

    let method = Method::Route;
    let network = Network::new(Shape::OneArmed, method)?;
    let _servers = start_servers(&network, method)?;
    let director = network.start()?;
    configure(&director, (Family::Four, Transport::Tcp), method, "rr")?;
    let service = service(Family::Four, Transport::Tcp);
    let weigh = |weight| {
        director.say(&format!("dest edit {service} -r {} -g -w {weight}", destination(Family::Four, method, 0)))
    };
    // A connection to server 0, which then gets no others, so that none is caught by its removal.
    let mut stream = network.client.enter(|| std::net::TcpStream::connect(vip(Family::Four)))??;
    weigh(0)?;
    let wanted = 5u64;
    stream.write_all(&wanted.to_be_bytes())?;
    let (_, requests) = Load::during(&network, |load| {
        load.wait(10)?;
        director.say(&format!("dest del {service} -r {}", destination(Family::Four, method, 0)))?;
        stream.write_all(b"nobody gets this yet")?;
        stream.shutdown(std::net::Shutdown::Write)?;
        load.wait(60)?;
        let dropped = director.ask("stats")?["reasons"]["destination-removed"].as_u64();
        ensure!(dropped.is_some_and(|dropped| dropped > 0), "its packets were not dropped: {dropped:?}");
        ensure!(load.served()[0] == 0, "the removed server got {} requests", load.served()[0]);
        director.say(&format!("dest add {service} -r {} -g -w 1", destination(Family::Four, method, 0)))?;
        load.wait(30)?;
        ensure!(load.served()[0] > 0, "the server came back and got no requests");
        Ok(())
    })?;
    ensure!(requests >= 100, "only {requests} requests were made");
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).context("the connection did not go on")?;
    ensure!(answer.len() == 1 + 8 + wanted as usize && answer[0] == 0, "answered {answer:?}");
    Ok(())
}

/// A command is killed at any moment of a change: what is in force is the old configuration or the new one, and no
/// request notices.
#[test]
fn commands_are_killed_under_load() -> Result<()> {
    let method = Method::Masq;
    let network = Network::new(Shape::TwoArmed, method)?;
    let _servers = start_servers(&network, method)?;
    let director = network.start()?;
    configure(&director, (Family::Four, Transport::Tcp), method, "wlc")?;
    let service = service(Family::Four, Transport::Tcp);
    let mut last = 1;
    Load::during(&network, |load| {
        const ROUNDS: u32 = 60;
        let destination = destination(Family::Four, method, 0);
        let change = |weight| format!("dest edit {service} -r {destination} -m -w {weight}");
        let begun = Instant::now();
        director.say(&change(last))?;
        let usual = begun.elapsed();
        for round in 0..ROUNDS {
            let weight = 2 + u64::from(round);
            let mut command = director.command(&change(weight).split_whitespace().collect::<Vec<_>>());
            let mut child = command.stderr(Stdio::null()).spawn()?;
            // From before the program has started to after it has ended.
            thread::sleep(2 * usual * round / ROUNDS);
            child.kill()?;
            child.wait()?;
            let list = director.ask("list")?;
            let weights: Vec<u64> = of_destinations(&list, "weight").collect();
            ensure!(weights.len() == usize::from(SERVERS) && weights[1..] == [1, 1], "{list}");
            ensure!(weights[0] == last || weights[0] == weight, "weight {} after {last} and {weight}", weights[0]);
            last = weights[0];
            load.wait(1)?;
        }
        Ok(())
    })?;
    ensure!(last > 1, "every command was killed before it did anything");
    Ok(())
}

/// The programs are exchanged for new ones while requests come in: none fails, no packet of a connection from before is
/// lost.
#[test]
fn programs_are_replaced_under_load() -> Result<()> {
    let method = Method::Masq;
    let network = Network::new(Shape::TwoArmed, method)?;
    let _servers = start_servers(&network, method)?;
    let director = network.start()?;
    configure(&director, (Family::Four, Transport::Tcp), method, "rr")?;
    configure(&director, (Family::Four, Transport::Udp), method, "rr")?;
    let up = [&["up"], network.interfaces()].concat();
    let program = || -> Result<u64> {
        let links = network.director.ip("-details -json link show eth0")?;
        let links: Value = serde_json::from_str(&links)?;
        links[0]["xdp"]["prog"]["id"].as_u64().with_context(|| format!("no XDP program: {links}"))
    };
    let before = program()?;
    // One datagram at a time, on one connection: if any is lost, no answer comes to it.
    let socket = network.client.enter(|| peers::udp_socket(vip(Family::Four)))??;
    let server = peers::ask_by(&socket, b"before", 1)?;
    let end = AtomicBool::new(false);
    let exchange = || -> Result<u32> {
        let mut asked = 0;
        while !end.load(Ordering::Relaxed) {
            let answered = peers::ask_by(&socket, &peers::pattern(100), 100)?;
            ensure!(answered == server, "server {answered} answered instead of {server}");
            asked += 1;
        }
        Ok(asked)
    };
    thread::scope(|scope| {
        let exchange = scope.spawn(exchange);
        let replaced = Load::during(&network, |load| {
            for _ in 0..5 {
                load.wait(20)?;
                director.run(&up)?;
            }
            load.wait(20)
        });
        end.store(true, Ordering::Relaxed);
        let asked = exchange.join().expect("no panic while asking")?;
        ensure!(asked > 1000, "only {asked} datagrams were sent");
        replaced
    })?;
    ensure!(program()? != before, "the program is the same as before");
    Ok(())
}

/// Nothing of ours runs, and connections end when their time is over.
#[test]
fn connections_age_without_a_process() -> Result<()> {
    let method = Method::Masq;
    let network = Network::new(Shape::OneArmed, method)?;
    let _servers = start_servers(&network, method)?;
    let director = network.start()?;
    for family in Family::ALL {
        configure(&director, (family, Transport::Udp), method, "rr")?;
    }
    director.say("timeout set 0 0 6")?;
    let ask = |family| peers::ask_udp(vip(family), b"hello", 5).map(drop);
    network.client.enter(|| (0..12).try_for_each(|_| Family::ALL.into_iter().try_for_each(ask)))??;
    let inactive = |list: &Value| {
        let services = list["services"].as_array().into_iter().flatten();
        let destinations = services.flat_map(|service| service["destinations"].as_array().into_iter().flatten());
        destinations.map(|destination| destination["inactive"].as_u64().unwrap_or(u64::MAX)).sum::<u64>()
    };
    ensure!(inactive(&director.ask("list")?) == 24, "{}", director.ask("list")?);
    let begun = Instant::now();
    while inactive(&director.ask("list")?) > 0 {
        ensure!(begun.elapsed() < Duration::from_secs(30), "connections did not end: {}", director.ask("conn list")?);
        thread::sleep(Duration::from_millis(200));
    }
    let status = director.ask("status")?;
    ensure!(status["ageing"]["ended"].as_u64() == Some(24), "{status}");
    Ok(())
}
