//! Persistent services: which destination a client stays at, for how long, and what its template looks like meanwhile.

use std::{
    net::{IpAddr, Ipv4Addr},
    num::NonZeroU32,
};

use lb_common::{
    abi::switch,
    proto::{Method, Scheduler, service_flag},
    reason::Reason,
    sctp::{State, chunk},
};
use lb_userspace::control::model::{
    self, ANY_PORT, Identity, MarkKey, Match, Netmask, Persistence, Prefix, Rule, ServiceSpec, Transport,
};

use super::*;

pub(super) fn cases(family: Family) -> Vec<Case> {
    let mut cases = Vec::new();
    for method in METHODS {
        cases.extend([stays(family, method), other_port(family, method), all_ports(family, method)]);
        cases.extend([ftp(family, method), no_room(family, method), room_for_one(family, method)]);
        cases.push(of_a_mark(family, method));
        cases.extend([associations(family, method), associations_at_all_ports(family, method)]);
    }
    cases.extend([
        one_client_of_a_network(family),
        how_long(family),
        while_it_controls_connections(family),
        not_taken_over(family),
        quiescent_and_expired(family),
        established_at_once(family),
        datagrams(family),
        quiescent(family, false),
        quiescent(family, true),
        removed(family),
        nobody(family),
        edited(family),
        named_ports_come_first(family),
        plain_ftp(family),
        one_by_one(family),
        flood(family),
    ]);
    cases
}

const TIMEOUT_S: u32 = 100;
/// Another client, of the network of the first one's first three octets.
const OTHER: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 2);

pub(super) fn persistent(family: Family, timeout: u32, octets: usize) -> ServiceSpec {
    let netmask = match family.address(cast::CLIENT) {
        IpAddr::V4(_) => Netmask::V4(Ipv4Addr::from_bits(u32::MAX.checked_shl(32 - 8 * octets as u32).unwrap_or(0))),
        IpAddr::V6(_) if octets == 4 => Netmask::V6(128),
        IpAddr::V6(_) => Netmask::V6(8 * (octets as u8 + 1)),
    };
    ServiceSpec { persistence: Some(Persistence { timeout, netmask }), ..scheduled(Scheduler::Rr) }
}

impl Case {
    /// Adds a persistent service, whose templates are for clients that agree in so many octets, and its destinations.
    fn persistent(self, protocol: Transport, port: u16, octets: usize, dests: &[(u8, u16, Method)]) -> Self {
        let (family, dests) = (self.family, dests.to_vec());
        self.change(move |change| {
            let key = family.service(protocol, port);
            change.add_service(key, persistent(family, TIMEOUT_S, octets)).expect("new");
            for &(index, port, method) in &dests {
                change.add_dest(key, family.at(index, port), dest(method, 1)).expect("new");
            }
        })
    }

    /// What `build` makes of a request reaches port `port` of real server number `index`.
    fn reaches(
        self,
        (index, port, method): (u8, u16, Method),
        request: Frame,
        build: impl Fn(Frame) -> Vec<u8>,
        counts: DestCounts,
    ) -> Self {
        let out = forwarded(method, index, port, request, &build);
        let counts = DestCounts { packets_in: 1, bytes_in: ip_len(&build(request)), ..counts };
        self.arrives(Wire::Outside, build(request), INSIDE, out, Counts::none().at(index, counts))
    }
}

/// A new connection.
const OPENS: DestCounts = DestCounts { connections: 1, active: 1, ..NOTHING };
/// A new connection, and a new template.
const BINDS: DestCounts = DestCounts { templates: 1, ..OPENS };
const NOTHING: DestCounts = DestCounts {
    connections: 0,
    packets_in: 0,
    bytes_in: 0,
    packets_out: 0,
    bytes_out: 0,
    active: 0,
    inactive: 0,
    templates: 0,
};

const fn tcp(flags: &'static str) -> impl Fn(Frame) -> Vec<u8> {
    move |frame: Frame| frame.tcp(flags, b"")
}

/// A request of a client from its port number `number` on, to a port of the service's address.
fn request(family: Family, client: Ipv4Addr, number: u16, port: u16) -> Frame {
    Frame { from: (client, CLIENT_PORT + number), to: (cast::VIP, port), ..family.request() }
}

fn two(family: Family, name: impl Display, method: Method) -> Case {
    Case::new(family, format!("persistent, {name}")).persistent(TCP, PORT, 4, &[(1, PORT, method), (0, PORT, method)])
}

fn stays(family: Family, method: Method) -> Case {
    let mut case = two(family, format!("{method}: a client stays"), method);
    let at = |index| (index, PORT, method);
    case = case.reaches(at(0), request(family, cast::CLIENT, 0, PORT), tcp("S"), BINDS);
    case = case.shows(["tcp NONE 10.1.0.1:0 10.9.9.9:80 10.2.0.11:80"]);
    for number in 1..4 {
        case = case.reaches(at(0), request(family, cast::CLIENT, number, PORT), tcp("S"), OPENS);
    }
    case = case.reaches(at(1), request(family, OTHER, 0, PORT), tcp("S"), BINDS);
    // Once one of its connections is established, the template is assured, and not the other one.
    case = case.reaches(at(0), request(family, cast::CLIENT, 2, PORT), tcp("A"), NOTHING);
    case =
        case.shows(["tcp ASSURED 10.1.0.1:0 10.9.9.9:80 10.2.0.11:80", "tcp NONE 10.1.0.2:0 10.9.9.9:80 10.2.0.12:80"]);
    // FTP servers are the host's.
    case.stops(
        Wire::Outside,
        Frame { from: (cast::CLIENT, 20), ..family.request() }.tcp("S", b""),
        Reason::FtpDataSource,
    )
}

/// The destination has a port of its own, if the method translates ports.
fn other_port(family: Family, method: Method) -> Case {
    let port = if method == Method::Masq { 8080 } else { PORT };
    let mut case = Case::new(family, format!("persistent, {method}: a port of its own"));
    case = case.persistent(TCP, PORT, 4, &[(0, port, method)]);
    case = case.reaches((0, port, method), family.request(), tcp("S"), BINDS);
    let shown = format!("tcp NONE 10.1.0.1:0 10.9.9.9:80 10.2.0.11:{port}");
    case = case.shows([shown.as_str()]);
    case.reaches((0, port, method), request(family, cast::CLIENT, 1, PORT), tcp("S"), OPENS)
}

fn one_client_of_a_network(family: Family) -> Case {
    let method = Method::Route;
    let mut case = Case::new(family, "persistent: one template for a network of clients");
    case = case.persistent(TCP, PORT, 3, &[(1, PORT, method), (0, PORT, method)]);
    case = case.reaches((0, PORT, method), request(family, cast::CLIENT, 0, PORT), tcp("S"), BINDS);
    case = case.shows(["tcp NONE 10.1.0.0:0 10.9.9.9:80 10.2.0.11:80"]);
    for last in 2..6 {
        let client = Ipv4Addr::new(10, 1, 0, last);
        case = case.reaches((0, PORT, method), request(family, client, 0, PORT), tcp("S"), OPENS);
    }
    let elsewhere = Ipv4Addr::new(10, 1, 1, 1);
    case.reaches((1, PORT, method), request(family, elsewhere, 0, PORT), tcp("S"), BINDS)
}

/// All ports of the address that no other service has, with one template for all of them.
fn all_ports(family: Family, method: Method) -> Case {
    let mut case = Case::new(family, format!("persistent, {method}: all ports"));
    case = case.persistent(TCP, 0, 4, &[(1, 0, method), (0, 0, method)]);
    for (number, port) in [22, 80, 8080, 65_535].into_iter().enumerate() {
        let counts = if number == 0 { BINDS } else { OPENS };
        let request = request(family, cast::CLIENT, 0, port);
        case = case.reaches((0, port, method), request, tcp("S"), counts);
        case = case.reaches((0, port, method), request, tcp("A"), NOTHING);
        let server = if method == Method::Masq { cast::server(0) } else { cast::VIP };
        let reply = family.frame(from_server(0), (server, port), request.from);
        let counts = Counts::none().at(0, DestCounts::output(&reply.tcp("A", b"x")));
        case = if method == Method::Masq {
            let out = Frame { ttl: 63, ..family.frame(TO_CLIENT, (cast::VIP, port), request.from) };
            case.arrives(Wire::Inside, reply.tcp("A", b"x"), OUTSIDE, out.tcp("A", b"x"), counts)
        } else {
            let seen = Counts { reasons: Counts::of(Reason::ReplyObserved).reasons, ..counts };
            case.arrives(Wire::Inside, reply.tcp("A", b"x"), Verdict::Pass, reply.tcp("A", b"x"), seen)
        };
    }
    case = case.shows(["tcp ASSURED 10.1.0.1:0 10.9.9.9:0 10.2.0.11:0"]);
    case = case.reaches((1, 443, method), request(family, OTHER, 0, 443), tcp("S"), BINDS);
    // No datagrams, and nothing that opens no connection.
    case = case.stops(Wire::Outside, request(family, OTHER, 0, 443).udp(b"x"), Reason::NotService);
    case.stops(Wire::Outside, request(family, OTHER, 9, 443).tcp("A", b""), Reason::NoConnection)
}

fn named_ports_come_first(family: Family) -> Case {
    let method = Method::Route;
    let mut case = Case::new(family, "persistent: a port that another service has");
    case = case.persistent(TCP, 0, 4, &[(0, 0, method)]).service(TCP, PORT, &[(1, PORT, method, 1)]);
    case = case.reaches((0, 81, method), request(family, cast::CLIENT, 0, 81), tcp("S"), BINDS);
    case = case.reaches((1, PORT, method), request(family, cast::CLIENT, 0, PORT), tcp("S"), OPENS);
    // When the other service goes, its connections stay what they are, and new ones are the first's.
    case = case.change(move |change| change.delete_service(family.key(TCP)).expect("there"));
    case = case.stops(Wire::Outside, request(family, cast::CLIENT, 0, PORT).tcp("A", b""), Reason::DestinationRemoved);
    case = case.reaches((0, PORT, method), request(family, cast::CLIENT, 1, PORT), tcp("S"), OPENS);
    case.reaches((0, PORT, method), request(family, cast::CLIENT, 1, PORT), tcp("A"), NOTHING)
}

/// Data connections go where the control connection went.
fn ftp(family: Family, method: Method) -> Case {
    let mut case = Case::new(family, format!("persistent, {method}: FTP"));
    let control = if method == Method::Masq { 2121 } else { 21 };
    case = case.persistent(TCP, 21, 4, &[(1, control, method), (0, control, method)]);
    case = case.reaches((0, control, method), request(family, cast::CLIENT, 0, 21), tcp("S"), BINDS);
    case = case.shows(["tcp NONE 10.1.0.1:0 10.9.9.9:0 10.2.0.11:0"]);
    for port in [40_000, 1024, 20] {
        case = case.reaches((0, port, method), request(family, cast::CLIENT, 1, port), tcp("S"), OPENS);
    }
    // The system's ports are not FTP's.
    case = case.stops(Wire::Outside, request(family, cast::CLIENT, 1, 1023).tcp("S", b""), Reason::NotService);
    case = case.stops(Wire::Outside, request(family, cast::CLIENT, 1, 40_000).udp(b"x"), Reason::NotService);
    if method == Method::Masq {
        let to = (cast::CLIENT, CLIENT_PORT + 1);
        let reply = family.frame(from_server(0), (cast::server(0), 40_000), to);
        let out = Frame { ttl: 63, ..family.frame(TO_CLIENT, (cast::VIP, 40_000), to) };
        case = replies(case, reply.tcp("SA", b""), out.tcp("SA", b""));
        // The error goes to the client whose segment it is about.
        let about = Frame { ttl: 63, ..family.frame(to_server(0), to, (cast::server(0), 40_000)) };
        let translated = Frame { to: (cast::VIP, 40_000), ..about };
        let error = family.frame(from_server(0), (cast::server(0), 0), (cast::CLIENT, 0));
        let relayed = Frame { ttl: 63, ..family.frame(TO_CLIENT, (cast::VIP, 0), (cast::CLIENT, 0)) };
        let says = Says::PortUnreachable;
        let frame = error.error(says, packet_of(&about.tcp("A", b"")));
        let out = relayed.error(says, &translated_quote(&about, &translated));
        case = replies(case, frame, out);
    }
    // Without a destination, control connections are refused, and what may be data is the host's.
    case = case.change(move |change| {
        let key = family.service(TCP, 21);
        [0, 1]
            .into_iter()
            .for_each(|index| change.edit_dest(key, family.at(index, control), dest(method, 0)).expect("there"));
    });
    case.stops(Wire::Outside, request(family, OTHER, 1, 40_000).tcp("S", b""), Reason::NotService)
}

/// What an error quotes of a segment when only its addresses and ports have been translated, and not its checksum.
fn translated_quote(about: &Frame, translated: &Frame) -> Vec<u8> {
    let (before, after) = (about.tcp("A", b""), translated.tcp("A", b""));
    let (mut quote, before) = (packet_of(&after).to_vec(), packet_of(&before));
    let checksum = about.family.header() + 16;
    quote[checksum..checksum + 2].copy_from_slice(&before[checksum..checksum + 2]);
    quote
}

/// One template for all protocols, addresses and ports that have a mark; the destination's own port counts for nothing.
fn of_a_mark(family: Family, method: Method) -> Case {
    let mark = NonZeroU32::new(7).expect("a mark");
    let of = if family == Family::Four { model::Family::Ipv4 } else { model::Family::Ipv6 };
    let length = if family == Family::Four { 24 } else { 32 };
    let destination = Prefix::new(family.address(cast::VIP), length).expect("a length of the family");
    let matches = Match { protocol: None, destination, ports: ANY_PORT, source: None, interface: None };
    let mut case = Case::new(family, format!("persistent, {method}: a mark")).rules(vec![Rule { mark, matches }]);
    let own = if method == Method::Masq { 8080 } else { 0 };
    case = case.change(move |change| {
        let key: Identity = MarkKey { mark, family: of }.into();
        change.add_service(key, persistent(family, TIMEOUT_S, 4)).expect("new");
        for index in [1, 0] {
            change.add_dest(key, family.at(index, own), dest(method, 1)).expect("new");
        }
    });
    case = case.reaches((0, 443, method), request(family, cast::CLIENT, 0, 443), tcp("S"), BINDS);
    case = case.reaches((0, 443, method), request(family, cast::CLIENT, 0, 443), tcp("A"), NOTHING);
    // The mark stands where others have an address: its four bytes at the beginning.
    let shown = if family == Family::Four { "0.0.0.7" } else { "0.0.7.0" };
    let shown = format!("ip ASSURED 10.1.0.1:0 {shown}:0 10.2.0.11:0");
    case = case.shows([shown.as_str()]);
    let opens = DestCounts { connections: 1, inactive: 1, ..NOTHING };
    case = case.reaches((0, 53, method), request(family, cast::CLIENT, 1, 53), |frame| frame.udp(b"x"), opens);
    case = case.reaches((0, 99, method), request(family, cast::CLIENT, 3, 99), sctp(chunk::INIT), INIT_OPENS);
    let elsewhere = Frame { to: (Ipv4Addr::new(10, 9, 9, 10), 80), ..request(family, cast::CLIENT, 2, 80) };
    case = case.reaches((0, 80, method), elsewhere, tcp("S"), OPENS);
    case.reaches((1, 443, method), request(family, OTHER, 0, 443), tcp("S"), BINDS)
}

const fn sctp(kind: u8) -> impl Fn(Frame) -> Vec<u8> {
    move |frame: Frame| frame.sctp(&[(kind, b"")])
}

/// A new SCTP connection.
const INIT_OPENS: DestCounts = DestCounts { connections: 1, inactive: 1, ..NOTHING };
/// A new SCTP connection, and a new template.
const INIT_BINDS: DestCounts = DestCounts { templates: 1, ..INIT_OPENS };

/// Templates of SCTP are its own, and assured once an association is established.
fn associations(family: Family, method: Method) -> Case {
    let at = |index| (index, PORT, method);
    let mut case = Case::new(family, format!("persistent, {method}: associations"));
    for protocol in [TCP, SCTP] {
        case = case.persistent(protocol, PORT, 4, &[(1, PORT, method), (0, PORT, method)]);
    }
    let first = request(family, cast::CLIENT, 0, PORT);
    case = case.reaches(at(0), request(family, OTHER, 0, PORT), tcp("S"), BINDS);
    case = case.reaches(at(0), first, sctp(chunk::INIT), INIT_BINDS);
    case = case.reaches(at(1), request(family, OTHER, 1, PORT), sctp(chunk::INIT), INIT_BINDS);
    case = case.reaches(at(1), first, tcp("S"), BINDS);
    for number in 1..3 {
        case = case.reaches(at(0), request(family, cast::CLIENT, number, PORT), sctp(chunk::INIT), INIT_OPENS);
    }
    let (of_first, of_other) = ("10.1.0.1:0 10.9.9.9:80 10.2.0.11:80", "10.1.0.2:0 10.9.9.9:80 10.2.0.12:80");
    case = case.shows_one(&format!("sctp NONE {of_first}"));
    let becomes_active = DestCounts { active: 1, inactive: -1, ..NOTHING };
    if method == Method::Masq {
        let (reply, out) = (family.reply(), family.translated_reply());
        case = replies(case, sctp(chunk::INIT_ACK)(reply), sctp(chunk::INIT_ACK)(out));
        case = case.reaches(at(0), first, sctp(chunk::COOKIE_ECHO), NOTHING);
        let answer = sctp(chunk::COOKIE_ACK)(reply);
        let counts = DestCounts { active: 1, inactive: -1, ..DestCounts::output(&answer) };
        let counts = Counts::none().at(0, counts);
        case = case.arrives(Wire::Inside, answer, OUTSIDE, sctp(chunk::COOKIE_ACK)(out), counts);
    } else {
        case = case.reaches(at(0), first, sctp(chunk::COOKIE_ECHO), becomes_active);
    }
    case = case.shows_one(&format!("sctp ASSURED {of_first}")).shows_one(&format!("sctp NONE {of_other}"));
    // When all of a client's associations are over, and then its template, the next one goes to the other server.
    let closes = DestCounts { active: -1, inactive: 1, ..NOTHING };
    case = case.reaches(at(0), first, sctp(chunk::ABORT), closes);
    case = case.pass(State::Closed.timeout_s() + 2).age().pass(TIMEOUT_S).age();
    case = case.reaches(at(0), request(family, OTHER, 3, PORT), sctp(chunk::INIT), INIT_BINDS);
    case.reaches(at(1), request(family, cast::CLIENT, 3, PORT), sctp(chunk::INIT), INIT_BINDS)
}

/// All ports of the address; FTP's are none of SCTP's.
fn associations_at_all_ports(family: Family, method: Method) -> Case {
    let mut case = Case::new(family, format!("persistent, {method}: associations at all ports"));
    case = case.persistent(SCTP, 0, 4, &[(1, 0, method), (0, 0, method)]);
    for (number, port) in [21, 80, 9899, 65_535].into_iter().enumerate() {
        let counts = if number == 0 { INIT_BINDS } else { INIT_OPENS };
        let request = request(family, cast::CLIENT, 0, port);
        case = case.reaches((0, port, method), request, sctp(chunk::INIT), counts);
        case = case.reaches((0, port, method), request, sctp(chunk::INIT), NOTHING);
        if method == Method::Masq {
            let reply = sctp(chunk::INIT_ACK)(family.frame(from_server(0), (cast::server(0), port), request.from));
            let out = Frame { ttl: 63, ..family.frame(TO_CLIENT, (cast::VIP, port), request.from) };
            case = replies(case, reply, sctp(chunk::INIT_ACK)(out));
        }
    }
    case = case.shows(["sctp NONE 10.1.0.1:0 10.9.9.9:0 10.2.0.11:0"]);
    case = case.stops(Wire::Outside, request(family, OTHER, 0, 443).tcp("S", b""), Reason::NotService);
    case.stops(Wire::Outside, request(family, OTHER, 9, 443).sctp(&[(chunk::DATA, b"")]), Reason::NoConnection)
}

/// Packets that are scheduled one by one go the way of the template, too, and leave no connection.
fn one_by_one(family: Family) -> Case {
    let method = Method::Masq;
    let mut case = Case::new(family, "persistent: packets one by one").change(move |change| {
        let key = family.service(UDP, PORT);
        let spec = ServiceSpec { flags: service_flag::ONE_PACKET, ..persistent(family, TIMEOUT_S, 4) };
        change.add_service(key, spec).expect("new");
        for index in [1, 0] {
            change.add_dest(key, family.at(index, PORT), dest(method, 1)).expect("new");
        }
    });
    let build = |frame: Frame| frame.udp(b"hello");
    let passes = DestCounts { connections: 1, ..NOTHING };
    let binds = DestCounts { templates: 1, ..passes };
    for (index, client, number, counts) in
        [(0, cast::CLIENT, 0, binds), (0, cast::CLIENT, 0, passes), (1, OTHER, 0, binds), (0, cast::CLIENT, 1, passes)]
    {
        case = case.reaches((index, PORT, method), request(family, client, number, PORT), build, counts);
    }
    case.shows(["udp NONE 10.1.0.1:0 10.9.9.9:80 10.2.0.11:80", "udp NONE 10.1.0.2:0 10.9.9.9:80 10.2.0.12:80"])
}

/// An FTP service that is not persistent has control connections only.
fn plain_ftp(family: Family) -> Case {
    let mut case = Case::new(family, "FTP that is not persistent").service(TCP, 21, &[(0, 21, Method::Route, 1)]);
    case = case.reaches((0, 21, Method::Route), request(family, cast::CLIENT, 0, 21), tcp("S"), OPENS);
    case.stops(Wire::Outside, request(family, cast::CLIENT, 1, 40_000).tcp("S", b""), Reason::NotService)
}

/// The client establishes its connection number `number` to real server number 0, and resets it.
fn reset(case: Case, number: u16) -> Case {
    let (at, request) = ((0, PORT, Method::Route), request(case.family, cast::CLIENT, number, PORT));
    let closes = DestCounts { active: -1, inactive: 1, ..NOTHING };
    case.reaches(at, request, tcp("A"), NOTHING).reaches(at, request, tcp("R"), closes)
}

/// A client is remembered from each new connection on.
fn how_long(family: Family) -> Case {
    let method = Method::Route;
    let at = |index| (index, PORT, method);
    let mut case = two(family, "how long", method);
    case = reset(case.reaches(at(0), request(family, cast::CLIENT, 0, PORT), tcp("S"), BINDS), 0);
    for number in 1..4 {
        let request = request(family, cast::CLIENT, number, PORT);
        // A connection that has been reset is over after ten seconds.
        case = reset(case.pass(TIMEOUT_S - 2).age().reaches(at(0), request, tcp("S"), OPENS), number);
    }
    // Packets of a connection that is there do not count.
    case = case.pass(5).reaches(at(0), request(family, cast::CLIENT, 3, PORT), tcp("A"), NOTHING);
    case = case.pass(20).age().pass(TIMEOUT_S - 23).age().shows([]);
    case.reaches(at(1), request(family, cast::CLIENT, 4, PORT), tcp("S"), BINDS)
}

/// A template whose time is over stays as long as it controls connections, and a minute after that at most.
fn while_it_controls_connections(family: Family) -> Case {
    let method = Method::Route;
    let at = |index| (index, PORT, method);
    let mut case = two(family, "while it controls connections", method);
    let first = request(family, cast::CLIENT, 0, PORT);
    case = case.reaches(at(0), first, tcp("S"), BINDS).reaches(at(0), first, tcp("A"), NOTHING);
    let shown = "tcp ASSURED 10.1.0.1:0 10.9.9.9:80 10.2.0.11:80";
    case = case.pass(TIMEOUT_S + 700).age().shows([shown]).reaches(at(0), first, tcp("A"), NOTHING);
    case = case.pass(TIMEOUT_S + 700).age().shows([shown]);
    case = reset(case, 0).pass(12).age().shows([shown]);
    // From now on a new connection makes it stay for a minute, not for as long as the service says.
    let second = request(family, cast::CLIENT, 1, PORT);
    case = reset(case.reaches(at(0), second, tcp("S"), OPENS), 1).pass(58).age().shows([shown]);
    case.pass(4).age().shows([]).reaches(at(1), request(family, cast::CLIENT, 2, PORT), tcp("S"), BINDS)
}

fn datagrams(family: Family) -> Case {
    let method = Method::Masq;
    let mut case = Case::new(family, "persistent: datagrams");
    case = case.persistent(UDP, PORT, 4, &[(1, PORT, method), (0, PORT, method)]);
    let build = |frame: Frame| frame.udp(b"hello");
    let opens = DestCounts { connections: 1, inactive: 1, ..NOTHING };
    let binds = DestCounts { templates: 1, ..opens };
    case = case.reaches((0, PORT, method), request(family, cast::CLIENT, 0, PORT), build, binds);
    case = case.reaches((0, PORT, method), request(family, cast::CLIENT, 1, PORT), build, opens);
    case = case.shows(["udp NONE 10.1.0.1:0 10.9.9.9:80 10.2.0.11:80"]);
    // Assured by an answer.
    case = replies(case, family.reply().udp(b"x"), family.translated_reply().udp(b"x"));
    case = case.shows(["udp ASSURED 10.1.0.1:0 10.9.9.9:80 10.2.0.11:80"]);
    case.reaches((1, PORT, method), request(family, OTHER, 0, PORT), build, binds)
}

/// Weight 0 keeps new clients away; whether it also sends those away that are known is a setting.
fn quiescent(family: Family, expire: bool) -> Case {
    let method = Method::Route;
    let at = |index| (index, PORT, method);
    let mut case = two(family, format!("weight 0, expire_quiescent_template {}", u8::from(expire)), method);
    let switches = if expire { switch::EXPIRE_QUIESCENT_TEMPLATE } else { 0 };
    case = case.set(move |config, _| config.switches.store(switches));
    case = case.reaches(at(0), request(family, cast::CLIENT, 0, PORT), tcp("S"), BINDS);
    case = case.change(move |change| {
        change.edit_dest(family.key(TCP), family.at(0, PORT), dest(method, 0)).expect("there");
    });
    case = case.reaches(at(1), request(family, OTHER, 0, PORT), tcp("S"), BINDS);
    if !expire {
        return case.reaches(at(0), request(family, cast::CLIENT, 1, PORT), tcp("S"), OPENS);
    }
    case = case.reaches(at(1), request(family, cast::CLIENT, 1, PORT), tcp("S"), BINDS);
    // Its connections are where they were.
    case = case.reaches(at(0), request(family, cast::CLIENT, 0, PORT), tcp("A"), NOTHING);
    case.shows([
        "tcp ASSURED 10.1.0.1:0 10.9.9.9:65535 10.2.0.11:65535",
        "tcp NONE 10.1.0.1:0 10.9.9.9:80 10.2.0.12:80",
        "tcp NONE 10.1.0.2:0 10.9.9.9:80 10.2.0.12:80",
    ])
}

fn removed(family: Family) -> Case {
    let method = Method::Route;
    let at = |index| (index, PORT, method);
    let mut case = two(family, "a destination is removed", method);
    case = case.reaches(at(0), request(family, cast::CLIENT, 0, PORT), tcp("S"), BINDS);
    case = case.reaches(at(1), request(family, OTHER, 0, PORT), tcp("S"), BINDS);
    case = case.change(move |change| change.delete_dest(family.key(TCP), family.at(0, PORT)).expect("there"));
    case = case.reaches(at(1), request(family, cast::CLIENT, 1, PORT), tcp("S"), BINDS);
    // When it comes back, its own clients have gone elsewhere, and those of the other stay there.
    case = case.change(move |change| {
        change.add_dest(family.key(TCP), family.at(0, PORT), dest(method, 1)).expect("new");
    });
    case = case.reaches(at(1), request(family, cast::CLIENT, 2, PORT), tcp("S"), OPENS);
    case = case.shows([
        "tcp NONE 10.1.0.1:0 10.9.9.9:65535 10.2.0.11:65535",
        "tcp NONE 10.1.0.1:0 10.9.9.9:80 10.2.0.12:80",
        "tcp NONE 10.1.0.2:0 10.9.9.9:80 10.2.0.12:80",
    ]);
    // The service, too, may come back, with the destination that a template is about.
    case = case.change(move |change| change.delete_service(family.key(TCP)).expect("there"));
    case = case.stops(Wire::Outside, request(family, OTHER, 1, PORT).tcp("S", b""), Reason::NotService);
    case = case.persistent(TCP, PORT, 4, &[(0, PORT, method), (1, PORT, method)]);
    case.reaches(at(1), request(family, OTHER, 1, PORT), tcp("S"), OPENS)
}

fn nobody(family: Family) -> Case {
    let mut case = Case::new(family, "persistent: without a destination").persistent(TCP, PORT, 4, &[]);
    let frame = family.request().tcp("S", b"");
    let out = error_for_client(family, Says::PortUnreachable, &frame);
    case =
        case.answers(Wire::Outside, frame, Verdict::Transmit, out, Counts::answered(Reason::NoDestination)).shows([]);
    case = case.persistent(TCP, 0, 4, &[]);
    let frame = request(family, cast::CLIENT, 0, 5000).tcp("S", b"");
    let out = error_for_client(family, Says::PortUnreachable, &frame);
    case.answers(Wire::Outside, frame, Verdict::Transmit, out, Counts::answered(Reason::NoDestination)).shows([])
}

/// A service may become persistent, and cease to be so. Templates wait for it.
fn edited(family: Family) -> Case {
    let method = Method::Route;
    let at = |index| (index, PORT, method);
    let mut case = Case::new(family, "persistent: not always");
    case = case.service(TCP, PORT, &[(1, PORT, method, 1), (0, PORT, method, 1)]);
    case = case.reaches(at(0), request(family, cast::CLIENT, 0, PORT), tcp("S"), OPENS).shows([]);
    let edit =
        |spec: ServiceSpec| move |change: &mut Change<'_>| change.edit_service(family.key(TCP), spec).expect("there");
    case = case.change(edit(persistent(family, TIMEOUT_S, 4)));
    case = case.reaches(at(1), request(family, cast::CLIENT, 1, PORT), tcp("S"), BINDS);
    case = case.reaches(at(1), request(family, cast::CLIENT, 2, PORT), tcp("S"), OPENS);
    case = case.change(edit(scheduled(Scheduler::Rr)));
    case = case.reaches(at(0), request(family, cast::CLIENT, 3, PORT), tcp("S"), OPENS);
    case = case.change(edit(persistent(family, TIMEOUT_S, 4)));
    case.reaches(at(1), request(family, cast::CLIENT, 4, PORT), tcp("S"), OPENS)
}

/// A table of twenty entries, all of them established connections: neither template nor connection can be stored.
fn no_room(family: Family, method: Method) -> Case {
    let mut case = Case::new(family, format!("persistent, {method}: no room"));
    case = case.service(TCP, PORT, &[(0, PORT, method, 1)]);
    case = case.persistent(TCP, 443, 4, &[(0, 443, method), (1, 443, method), (2, 443, method)]);
    for number in 0..20 {
        for (flags, counts) in [("S", OPENS), ("A", NOTHING)] {
            case = case.reaches((0, PORT, method), request(family, OTHER, number, PORT), tcp(flags), counts);
        }
    }
    // By NAT the replies could not be translated.
    if method == Method::Masq {
        return case.stops(Wire::Outside, request(family, cast::CLIENT, 0, 443).tcp("S", b""), Reason::TableFull);
    }
    case.together(
        (0..6)
            .flat_map(|number| ["S", "A"].map(|flags| request(family, cast::CLIENT, number, 443).tcp(flags, b"")))
            .collect(),
    )
}

/// There is room for the template and nothing else that could make any: it does not make room for its own connections.
fn room_for_one(family: Family, method: Method) -> Case {
    let mut case = Case::new(family, format!("persistent, {method}: room for the template"));
    case = case.service(TCP, PORT, &[(0, PORT, method, 1)]);
    case = case.persistent(TCP, 443, 4, &[(0, 443, method), (1, 443, method), (2, 443, method)]);
    for number in 0..19 {
        for (flags, counts) in [("S", OPENS), ("A", NOTHING)] {
            case = case.reaches((0, PORT, method), request(family, OTHER, number, PORT), tcp(flags), counts);
        }
    }
    let opening = |number| request(family, cast::CLIENT, number, 443).tcp("S", b"");
    if method == Method::Masq {
        let counts = Counts::of(Reason::TableFull).at(2, DestCounts { templates: 1, ..NOTHING });
        case = case.arrives(Wire::Outside, opening(0), Verdict::Drop, opening(0), counts);
    } else {
        case = case.leaves(opening(0)).together((1..6).map(opening).collect());
    }
    case.shows(["tcp NONE 10.1.0.1:0 10.9.9.9:443 10.2.0.13:443"])
}

/// Half-open connections make room, and then their templates do, which nobody else has any use for. An assured one does not.
fn flood(family: Family) -> Case {
    let method = Method::Route;
    let mut case = Case::new(family, "persistent: a flood");
    case = case.persistent(TCP, PORT, 4, &[(0, PORT, method)]);
    let first = request(family, cast::CLIENT, 0, PORT);
    case = case.reaches((0, PORT, method), first, tcp("S"), BINDS).reaches((0, PORT, method), first, tcp("A"), NOTHING);
    for last in 0..9 {
        let client = Ipv4Addr::new(10, 1, 0, 100 + last);
        case = case.reaches((0, PORT, method), request(family, client, 0, PORT), tcp("S"), BINDS);
    }
    for last in 0..40 {
        let client = Ipv4Addr::new(10, 1, 0, 150 + last);
        case = case.leaves(request(family, client, 0, PORT).tcp("S", b""));
    }
    case = case.reaches((0, PORT, method), first, tcp("A"), NOTHING);
    case.shows_one("tcp ASSURED 10.1.0.1:0 10.9.9.9:80 10.2.0.11:80")
}

/// The connection of a persistent client is not taken over by a SYN, whatever its state is.
fn not_taken_over(family: Family) -> Case {
    let method = Method::Route;
    let mut case = two(family, "a closed connection goes on with a SYN", method);
    let (at, first) = ((0, PORT, method), request(family, cast::CLIENT, 0, PORT));
    case = case.reaches(at, first, tcp("S"), BINDS).reaches(at, first, tcp("A"), NOTHING);
    case = reset(case, 0);
    // It would else be one connection more.
    case.reaches(at, first, tcp("S"), DestCounts { active: 1, inactive: -1, ..NOTHING })
}

/// A connection that is established from its first segment on assures its template.
fn established_at_once(family: Family) -> Case {
    let method = Method::Route;
    let mut case = two(family, "established at once", method).setting("sloppy_tcp", 1);
    case = case.reaches((0, PORT, method), request(family, cast::CLIENT, 0, PORT), tcp("A"), BINDS);
    case = case.reaches((1, PORT, method), request(family, OTHER, 0, PORT), tcp("S"), BINDS);
    case.shows(["tcp ASSURED 10.1.0.1:0 10.9.9.9:80 10.2.0.11:80", "tcp NONE 10.1.0.2:0 10.9.9.9:80 10.2.0.12:80"])
}

/// Under expire_nodest_conn a SYN to a server of weight 0 begins another connection, once, and the template says that it is to the
/// same server.
fn quiescent_and_expired(family: Family) -> Case {
    let method = Method::Route;
    let mut case = two(family, "expire_nodest_conn, a server gets weight 0", method);
    let (at, first) = ((0, PORT, method), request(family, cast::CLIENT, 0, PORT));
    case = case.reaches(at, first, tcp("S"), BINDS).reaches(at, first, tcp("A"), NOTHING);
    case = case.change(move |change| {
        change.edit_dest(family.key(TCP), family.at(0, PORT), dest(method, 0)).expect("there");
    });
    case = case.setting("expire_nodest_conn", 1);
    case = case.reaches(at, first, tcp("A"), NOTHING);
    case = case.reaches(at, first, tcp("S"), DestCounts { connections: 1, ..NOTHING });
    case.reaches(at, request(family, cast::CLIENT, 1, PORT), tcp("S"), OPENS)
}
