//! States, timeouts and counters after each packet.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};

use anyhow::{Result, ensure};
use lb_common::{
    abi::{DestRecord, active_and_total},
    addr::Ip4,
    flow::{Entry as _, Key as _, Word},
    proto::{Method, Protocol, Scheduler},
    sctp,
    tcp::State,
    timeout,
};
use lb_userspace::control::{
    model::{ServiceKey, Transport},
    state::{State as Configured, dest_address},
};
use xdpvs_tests::{
    cast,
    executor::{Executor, Host, Kernel, Wire},
    frames::Frame,
    world::{World, dest, ip4, scheduled},
};

const RECORDS: &str = include_str!("../golden/states.txt");
/// Where the connections begin in a line.
const CONNECTIONS: usize = 37;

/// A heading and the lines below it.
pub(crate) struct Section<'a> {
    pub(crate) heading: &'a str,
    pub(crate) lines: Vec<&'a str>,
}

pub(crate) fn sections() -> Vec<Section<'static>> {
    let mut sections: Vec<Section<'_>> = Vec::new();
    for line in RECORDS.lines() {
        if let Some(heading) = line.strip_prefix("=== ") {
            sections.push(Section { heading, lines: Vec::new() });
        } else if let Some(section) = sections.last_mut()
            && !line.trim().is_empty()
        {
            section.lines.push(line);
        }
    }
    sections
}

/// Which sections are about what xdpvs does, packet by packet: persistence has a replay of its own.
fn is_supported(section: &Section<'_>) -> bool {
    let about = section.heading;
    let other_defence = about.contains("secure_tcp") && !about.contains("secure_tcp 0");
    !(other_defence || about.contains("persistence") || about.contains("fwmark"))
}

/// A connection as a line shows it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Connection {
    protocol: &'static str,
    state: String,
    client: SocketAddrV4,
    service: SocketAddrV4,
    server: SocketAddrV4,
    /// Whole seconds until it expires, rounded up.
    expires_s: u32,
}

/// A destination as a line shows it.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Server {
    address: SocketAddrV4,
    method: Method,
    weight: u32,
    active: u32,
    inactive: u32,
}

/// A line: what happens, and what is there then.
struct Line<'a> {
    what: &'a str,
    connections: Vec<Connection>,
    servers: Vec<Server>,
}

fn address(word: &str) -> SocketAddrV4 {
    word.parse().unwrap_or_else(|_| panic!("`{word}` is no address and port"))
}

impl<'a> Line<'a> {
    fn parse(line: &'a str) -> Self {
        let (what, rest) = line.split_at(CONNECTIONS);
        let (connections, rest) = rest.split_once("proc expires [").expect("the times of expiry");
        let (times, servers) = rest.split_once(']').expect("the end of the times");
        let times: Vec<u32> = times.split(", ").map(|time| time.parse().expect("seconds")).collect();
        let connections: Vec<_> = connections
            .split(" | ")
            .zip(times)
            .map(|(connection, time)| {
                let words: Vec<&str> = connection.split_whitespace().collect();
                let [protocol, _, state, client, service, server] = words[..] else {
                    panic!("no connection: {connection}")
                };
                Connection {
                    protocol: if protocol == "TCP" { "tcp" } else { "udp" },
                    state: state.into(),
                    client: address(client),
                    service: address(service),
                    server: address(server),
                    // The kernel's timers are shown rounded down.
                    expires_s: time + 1,
                }
            })
            .collect();
        let mut servers: Vec<_> = servers
            .split("-> ")
            .skip(1)
            .map(|server| {
                let words: Vec<&str> = server.split_whitespace().collect();
                let [server, method, weight, active, inactive] = words[..] else { panic!("no server: {server}") };
                let number = |word: &str| word.parse().expect("a number");
                Server {
                    address: address(server),
                    method: *Method::ALL.iter().find(|known| known.column() == method).expect("a method"),
                    weight: number(weight),
                    active: number(active),
                    inactive: number(inactive),
                }
            })
            .collect();
        servers.sort_by_key(|server| server.address);
        let mut connections = connections;
        connections.sort();
        Self { what: what.trim(), connections, servers }
    }
}

struct Replay<'e, E> {
    executor: &'e mut E,
    key: ServiceKey,
    servers: Vec<Server>,
    client: SocketAddrV4,
    next: u16,
}

impl<'e, E: Executor> Replay<'e, E> {
    /// The director as it is before the first line of a section.
    fn new(executor: &'e mut E, first: &Line<'_>) -> Self {
        let connection = &first.connections[0];
        let key = key(connection);
        let mut replay = Self { executor, key, servers: first.servers.clone(), client: connection.client, next: 0 };
        replay.executor.reset();
        replay.configure();
        replay
    }

    fn configure(&mut self) {
        let (key, servers) = (self.key, self.servers.clone());
        self.executor.change(&|change| {
            change.add_service(key, scheduled(Scheduler::Rr)).expect("new");
            for server in &servers {
                change.add_dest(key, SocketAddr::V4(server.address), dest(server.method, server.weight)).expect("new");
            }
        });
    }

    /// A section may turn to another connection of a service of its own.
    fn turn_to(&mut self, line: &Line<'_>) {
        let connection = &line.connections[0];
        if key(connection) != self.key {
            (self.key, self.client, self.servers) = (key(connection), connection.client, line.servers.clone());
            self.configure();
        }
    }

    fn set_timeouts(&mut self, seconds: [u32; 3]) {
        let shared = self.executor.shared();
        let hz = shared.instance.hz.load();
        for (index, seconds) in [
            timeout::index(Protocol::Tcp, State::Established as u8),
            timeout::index(Protocol::Tcp, State::FinWait as u8),
            timeout::index(Protocol::Udp, 0),
        ]
        .into_iter()
        .zip(seconds)
        {
            shared.config.timeouts[index].store(seconds * hz);
        }
    }

    fn client_sends(&mut self, client: SocketAddrV4, what: &str) {
        let to = (cast::VIP, self.key.address.port());
        let frame = Frame::new((cast::CLIENT_MAC, cast::DIRECTOR_OUTSIDE_MAC), (*client.ip(), client.port()), to);
        let outcome = self.executor.arrive(Wire::Outside, &segment(frame, what));
        assert_ne!(outcome.frame, segment(frame, what), "`{what}` was not forwarded");
    }

    fn server_sends(&mut self, what: &str) {
        let server = self.servers[0].address;
        let macs = (cast::server_mac(0), cast::DIRECTOR_INSIDE_MAC);
        let frame = Frame::new(macs, (*server.ip(), server.port()), (*self.client.ip(), self.client.port()));
        let outcome = self.executor.arrive(Wire::Inside, &segment(frame, what));
        assert_ne!(outcome.frame, segment(frame, what), "`{what}` was not translated");
    }

    /// Does what the first column of a line says.
    fn act(&mut self, what: &str) {
        if let Some(what) = what.strip_prefix("C ") {
            self.client_sends(self.client, what);
        } else if let Some(what) = what.strip_prefix("S ") {
            self.server_sends(what);
        } else if let Some(seconds) = what.strip_suffix(" s later") {
            self.executor.pass(seconds.parse().expect("seconds"));
        } else if what == "UDP" {
            self.client_sends(self.client, "datagram");
        } else if let Some(count) = what.strip_suffix(" SYNs") {
            self.several(count.parse().expect("a number"));
        } else if let Some((count, rest)) = what.split_once(" more after server ")
            && let Some((server, weight)) = rest.split_once(" got weight ")
        {
            let (key, server) = (self.key, self.servers[server.parse::<usize>().expect("a number")].clone());
            let weight = weight.parse().expect("a number");
            self.executor.change(&|change| {
                change.edit_dest(key, SocketAddr::V4(server.address), dest(server.method, weight)).expect("there");
            });
            self.several(count.parse().expect("a number"));
        } else {
            panic!("nobody knows how to replay `{what}`");
        }
    }

    /// Opens connections from one client port after the other.
    fn several(&mut self, count: u16) {
        for _ in 0..count {
            let client = SocketAddrV4::new(*self.client.ip(), 800 + self.next);
            self.next += 1;
            self.client_sends(client, "SYN");
        }
    }

    /// The connections of the service.
    fn connections(&self) -> Vec<Connection> {
        let shared = self.executor.shared();
        let hz = shared.instance.hz.load();
        let now = self.executor.now();
        let mut found = Vec::new();
        for entry in self.executor.flows().iter().flat_map(|bucket| bucket.entries()) {
            let word = Word(entry.word().load());
            let key = entry.key(word);
            let service = SocketAddrV4::new(Ipv4Addr::from(key.vaddr().octets()), key.vport().number());
            if !word.is_live() || SocketAddr::V4(service) != self.key.address {
                continue;
            }
            let server = &shared.dests[entry.dest().load() as usize];
            found.push(Connection {
                protocol: word.protocol().as_str(),
                state: match word.protocol() {
                    Protocol::Tcp => State::try_from(word.state()).expect("a state").as_str().into(),
                    Protocol::Udp => "UDP".into(),
                    Protocol::Sctp => sctp::State::try_from(word.state()).expect("a state").as_str().into(),
                },
                client: SocketAddrV4::new(Ipv4Addr::from(key.caddr().octets()), key.cport().number()),
                service,
                server: SocketAddrV4::new(
                    Ipv4Addr::from(server.addr::<Ip4>().octets()),
                    word.port(server.port(), key.vport()).number(),
                ),
                expires_s: u32::try_from(word.expires().since(now)).unwrap_or(0).div_ceil(hz),
            });
        }
        found.sort();
        found
    }

    /// The destinations of the service, of which `shown` says which there are.
    fn servers(&self, shown: &[Server]) -> Vec<Server> {
        let shared = self.executor.shared();
        let dests = Configured::load(&shared).dests;
        let counted = |server: &Server| {
            let is_it = |record: &&DestRecord| dest_address(record) == SocketAddr::V4(server.address);
            let (number, record) = dests.iter().find(|(_, record)| is_it(record)).expect("there");
            let (active, total) = active_and_total(shared.dest_loads[*number as usize].connections.load());
            Server { weight: record.weight, active, inactive: total - active, ..server.clone() }
        };
        shown.iter().map(counted).collect()
    }
}

fn key(connection: &Connection) -> ServiceKey {
    let protocol = if connection.protocol == "tcp" { Transport::Tcp } else { Transport::Udp };
    ServiceKey { protocol, address: SocketAddr::V4(connection.service) }
}

/// The segment that a line speaks of: flags joined by `+`, `data`, or `datagram`, and perhaps a remark.
fn segment(frame: Frame, what: &str) -> Vec<u8> {
    let word = what.split([' ', ',']).next().unwrap_or_default();
    match word {
        "datagram" => frame.udp(b"hello"),
        "data" => frame.tcp("PA", b"hello"),
        "SYN" => frame.tcp("S", b""),
        "ACK" => frame.tcp("A", b""),
        "FIN" => frame.tcp("F", b""),
        "RST" => frame.tcp("R", b""),
        "SYN+ACK" => frame.tcp("SA", b""),
        "FIN+ACK" => frame.tcp("FA", b""),
        "RST+ACK" => frame.tcp("RA", b""),
        other => panic!("nobody knows what `{other}` is"),
    }
}

/// Replays a section from its beginning. Returns the number of its packets.
fn replay(executor: &mut impl Executor, section: &Section<'_>) -> Result<u32> {
    let (told, rest): (Vec<&str>, Vec<&str>) =
        section.lines.iter().partition(|line| line.trim().starts_with("Timeout"));
    let mut replay = Replay::new(executor, &Line::parse(rest[0]));
    for line in told {
        let (_, seconds) = line.split_once("): ").expect("three timeouts");
        let seconds: Vec<u32> = seconds.split(' ').map(|word| word.parse().expect("seconds")).collect();
        replay.set_timeouts(seconds.try_into().expect("three timeouts"));
    }
    for line in &rest {
        let line = Line::parse(line);
        replay.turn_to(&line);
        replay.act(line.what);
        let found = (replay.connections(), replay.servers(&line.servers));
        let expected = (line.connections, line.servers);
        ensure!(found == expected, "{}, after `{}`: {found:?}, expected {expected:?}", section.heading, line.what);
        replay.executor.audit()?;
    }
    Ok(rest.len() as u32)
}

/// Times a section is begun. The kernel's clock does not wait for a test that is held up for a second.
const ATTEMPTS: usize = 3;

fn replay_all(executor: &mut impl Executor) {
    let sections = sections();
    let (mut replayed, mut excluded, mut lines) = (0, 0, 0);
    for section in sections.iter().filter(|section| !section.heading.starts_with("real expiry")) {
        if !is_supported(section) {
            excluded += 1;
            continue;
        }
        replayed += 1;
        let mut results = (0..ATTEMPTS).map(|_| replay(executor, section));
        let first = results.next().expect("at least one attempt");
        lines += first.or_else(|error| results.find_map(Result::ok).ok_or(error)).expect("as in ip_vs");
    }
    println!(
        "states.txt, {}: {replayed} sections with {lines} packets replayed, {excluded} sections excluded",
        executor.name()
    );
    assert_eq!((replayed, lines, excluded), (18, 84, 1), "sections and packets replayed, sections excluded");
}

/// Buckets of the flow tables.
const TABLE: u32 = 64;

#[test]
fn every_packet_leads_to_the_state_that_it_led_to_in_ip_vs_on_the_host() {
    replay_all(&mut Host::new(TABLE));
}

#[test]
fn every_packet_leads_to_the_state_that_it_led_to_in_ip_vs_in_the_kernel() {
    Kernel::with("states", TABLE, |kernel| replay_all(kernel)).expect("a director in the kernel");
}

/// Connections are never gone before their time, and not much later than those of ip_vs.
#[test]
fn connections_end_when_those_of_ip_vs_ended() {
    let sections = sections();
    let section = sections.iter().find(|section| section.heading.starts_with("real expiry")).expect("the section");
    let mut replayed = 0;
    for line in &section.lines {
        let (what, times) = line.trim().split_once(": last seen ").expect("a time");
        let (_, gone) = times.split_once("gone at ").expect("a time");
        let gone: f64 = gone.trim_end_matches(" s").parse().expect("seconds");
        let masq = what.contains("NAT") || what == "UDP";
        let protocol = if what.starts_with("TCP") { Transport::Tcp } else { Transport::Udp };
        let (flags, seconds): (&[&str], u32) = match what {
            "UDP" => (&["datagram"], timeout::UDP_S),
            _ if what.contains("SYN_RECV") => (&["SYN"], State::SynRecv.default_timeout_s()),
            _ if what.contains("ESTABLISHED") => (&["SYN", "ACK"], State::Established.default_timeout_s()),
            _ if what.contains("CLOSE after RST") => (&["SYN", "ACK", "RST"], State::Close.default_timeout_s()),
            _ if what.contains("CLOSE_WAIT") => (&["SYN", "ACK", "FIN"], State::CloseWait.default_timeout_s()),
            _ if what.contains("FIN_WAIT") => (&["SYN", "ACK", "FIN"], State::FinWait.default_timeout_s()),
            _ => panic!("nobody knows how to replay `{what}`"),
        };
        let world = World::default();
        let key = xdpvs_tests::world::service(protocol, 80);
        world.change(|change| {
            change.add_service(key, scheduled(Scheduler::Rr)).expect("new");
            let method = if masq { Method::Masq } else { Method::Route };
            change.add_dest(key, xdpvs_tests::world::at(0, 80), dest(method, 1)).expect("new");
        });
        let macs = (cast::CLIENT_MAC, cast::DIRECTOR_OUTSIDE_MAC);
        for flags in flags {
            world.arrive(cast::OUTSIDE, &segment(Frame::new(macs, (cast::CLIENT, 40_000), (cast::VIP, 80)), flags));
        }
        world.pass(seconds);
        assert_eq!(world.age(), 0, "{what}: gone too early");
        world.pass(gone.ceil() as u32 - seconds);
        assert_eq!(world.age(), 1, "{what}: still there");
        assert_eq!(world.connections(Ipv4Addr::from(ip4(cast::server(0)).octets())), (0, 0));
        replayed += 1;
    }
    println!("states.txt: {replayed} real expiries replayed");
    assert_eq!((replayed, section.lines.len()), (6, 6), "lines replayed, and all");
}
