//! Services of marks, and the rules that say which packets have which mark.

use std::{net::Ipv4Addr, num::NonZeroU32};

use lb_common::{proto::Method, reason::Reason};
use lb_userspace::control::model::{
    self, ANY_PORT, Identity, MarkKey, Match, Prefix, Rule, RuleInterface, RuleProtocol,
};

use super::*;

pub(super) fn cases(family: Family) -> Vec<Case> {
    let mut cases = Vec::new();
    for method in METHODS {
        cases.extend([
            any_port(family, method),
            removed(family, method),
            full_table(family, method),
            errors_about_replies(family, method),
        ]);
    }
    cases.extend([
        port_mapping(family),
        first_rule(family),
        interfaces(family),
        before_services(family),
        not_marked(family),
        no_destination(family),
        errors_about_requests(family),
        of_one_family(family),
    ]);
    if family == Family::Four {
        cases.push(wrong_ip_checksums(family));
    }
    cases
}

/// The mark of most cases.
pub(super) const MARK: u32 = 7;

/// The service of packets with `mark`.
pub(super) fn key(family: Family, mark: u32) -> Identity {
    let family = match family {
        Family::Four => model::Family::Ipv4,
        Family::Six => model::Family::Ipv6,
    };
    MarkKey { mark: NonZeroU32::new(mark).expect("a mark"), family }.into()
}

/// The network of a family that the IPv4 network of the first `octets` of `address` stands for.
pub(super) fn prefix(family: Family, address: Ipv4Addr, octets: u8) -> Prefix {
    let length = match family {
        Family::Four => 8 * octets,
        Family::Six if octets == 4 => 128,
        Family::Six => 8 * (octets + 1),
    };
    Prefix::new(family.address(address), length).expect("a length of the family")
}

/// A rule for all packets to the network of the first `octets` of [`cast::VIP`].
pub(super) fn rule(family: Family, mark: u32, octets: u8) -> Rule {
    Rule {
        mark: NonZeroU32::new(mark).expect("a mark"),
        matches: Match {
            protocol: None,
            destination: prefix(family, cast::VIP, octets),
            ports: ANY_PORT,
            source: None,
            interface: None,
        },
    }
}

/// A rule and what else must be true.
pub(super) fn rule_if(family: Family, mark: u32, octets: u8, and: impl Fn(&mut Match)) -> Rule {
    let mut rule = rule(family, mark, octets);
    and(&mut rule.matches);
    rule
}

impl Case {
    /// Adds the service of a mark by rr, and its destinations: number of the real server, port and method.
    pub(super) fn mark_service(self, mark: u32, dests: &[(u8, u16, Method)]) -> Self {
        let (family, dests) = (self.family, dests.to_vec());
        self.change(move |change| {
            change.add_service(key(family, mark), scheduled(Scheduler::Rr)).expect("new");
            for &(index, port, method) in &dests {
                change.add_dest(key(family, mark), family.at(index, port), dest(method, 1)).expect("new");
            }
        })
    }
}

/// A case with the service of [`MARK`], of real server number 0, for all packets to the network of [`cast::VIP`].
fn one(family: Family, name: impl Display, method: Method) -> Case {
    Case::new(family, format!("marks: {name}")).mark_service(MARK, &[(0, 0, method)]).rules(vec![rule(family, MARK, 3)])
}

fn tcp(flags: &'static str) -> impl Fn(Frame) -> Vec<u8> {
    move |frame: Frame| frame.tcp(flags, b"")
}

/// What `build` makes of a request reaches real server number `index` at the port that it was sent to.
fn reaches(
    case: Case,
    method: Method,
    index: u8,
    request: Frame,
    build: impl Fn(Frame) -> Vec<u8>,
    counts: impl FnOnce(DestCounts) -> DestCounts,
) -> Case {
    let frame = build(request);
    let out = forwarded(method, index, request.to.1, request, &build);
    let counts = Counts::none().at(index, counts(DestCounts::input(&frame)));
    case.arrives(Wire::Outside, frame, INSIDE, out, counts)
}

fn same(counts: DestCounts) -> DestCounts {
    counts
}

/// Another address than the one that most services have, in the same network.
const OTHER_VIP: Ipv4Addr = Ipv4Addr::new(10, 9, 9, 200);

/// Packets to every address and port that has the mark, which goes on with the connection.
fn any_port(family: Family, method: Method) -> Case {
    let mut case = one(family, format!("{method}: any port"), method);
    for (vip, port) in [(cast::VIP, 8081), (OTHER_VIP, 1), (OTHER_VIP, 65_535)] {
        let request = Frame { to: (vip, port), ..family.request() };
        case = reaches(case, method, 0, request, tcp("S"), DestCounts::opening_active);
        case = match method {
            Method::Masq => {
                let reply = Frame { from: (cast::server(0), port), ..family.reply() };
                let translated = Frame { from: (vip, port), ..family.translated_reply() };
                let case = replies(case, reply.tcp("SA", b""), translated.tcp("SA", b""));
                replies(case, reply.tcp("PA", b"hello"), translated.tcp("PA", b"hello"))
            }
            _ => {
                // Replies that pass by are seen.
                let reply = Frame { from: (vip, port), ..family.reply() }.tcp("SA", b"");
                let counts = Counts::of(Reason::ReplyObserved).at(0, DestCounts::output(&reply));
                case.arrives(Wire::Inside, reply.clone(), Verdict::Pass, reply, counts)
            }
        };
        case = reaches(case, method, 0, request, tcp("A"), same);
        case = reaches(case, method, 0, request, |frame| frame.tcp("PA", b"GET /"), same);
        case = reaches(case, method, 0, request, tcp("FA"), DestCounts::calming);
        case = reaches(case, method, 0, request, |frame| frame.udp(b"x"), DestCounts::opening_inactive);
    }
    case
}

/// The port of a masqueraded destination is not that of the connection.
fn port_mapping(family: Family) -> Case {
    let mut case = Case::new(family, "marks: nat: a server at another port")
        .mark_service(MARK, &[(0, 99, Method::Masq)])
        .rules(vec![rule(family, MARK, 4)]);
    let reply = Frame { from: (cast::server(0), 99), ..family.reply() };
    for (protocol, build) in
        [(UDP, (|frame| frame.udp(b"x")) as fn(Frame) -> Vec<u8>), (TCP, |frame| frame.tcp("S", b""))]
    {
        let out = forwarded(Method::Masq, 0, 99, family.request(), build);
        let counts = DestCounts::input(&build(family.request()));
        let counts = if protocol == UDP { counts.opening_inactive() } else { counts.opening_active() };
        case = case.arrives(Wire::Outside, build(family.request()), INSIDE, out, Counts::none().at(0, counts));
        case = replies(case, build(reply), build(family.translated_reply()));
    }
    case
}

/// Of all rules that are true of a packet, the one that was added first says its mark.
fn first_rule(family: Family) -> Case {
    let method = Method::Route;
    let mut case = Case::new(family, "marks: the first rule says the mark");
    for (mark, index) in (1..).zip(0..6) {
        case = case.mark_service(mark, &[(index, 0, method)]);
    }
    let only = |address| Prefix::new(family.address(address), if family == Family::Four { 32 } else { 128 });
    case = case.rules(vec![
        rule_if(family, 1, 4, |matches| matches.ports = (1000, 2000)),
        rule_if(family, 2, 2, |matches| {
            matches.protocol = Some(RuleProtocol::Udp);
            matches.ports = (2000, 3000);
        }),
        // Never: the first one is true of all that this one is true of.
        rule_if(family, 6, 4, |matches| matches.ports = (1500, 1500)),
        rule_if(family, 3, 3, |matches| matches.source = only(Ipv4Addr::new(10, 1, 0, 9))),
        rule_if(family, 4, 4, |matches| matches.protocol = Some(RuleProtocol::Tcp)),
        rule(family, 5, 1),
    ]);
    let udp = |frame: Frame| frame.udp(b"x");
    let tcp = |frame: Frame| frame.tcp("S", b"");
    let in_network = Ipv4Addr::new(10, 9, 200, 1);
    for (number, (is_tcp, source, to, port, index)) in [
        (true, 1, cast::VIP, 1000, 0),
        (true, 1, cast::VIP, 2000, 0),
        (false, 1, cast::VIP, 1500, 0),
        (false, 1, cast::VIP, 2000, 0),
        (false, 1, cast::VIP, 2001, 1),
        (false, 9, in_network, 3000, 1),
        (false, 9, OTHER_VIP, 3001, 2),
        (true, 9, cast::VIP, 2500, 2),
        (true, 9, cast::VIP, 1999, 0),
        (true, 1, cast::VIP, 999, 3),
        (true, 1, cast::VIP, 2001, 3),
        (true, 1, OTHER_VIP, 1500, 4),
        (false, 1, cast::VIP, 3001, 4),
        (false, 9, in_network, 1999, 4),
    ]
    .into_iter()
    .enumerate()
    {
        let from = (Ipv4Addr::new(10, 1, 0, source), CLIENT_PORT + number as u16);
        let request = Frame { from, to: (to, port), ..family.request() };
        case = if is_tcp {
            reaches(case, method, index, request, tcp, DestCounts::opening_active)
        } else {
            reaches(case, method, index, request, udp, DestCounts::opening_inactive)
        };
    }
    // The marks are now others, and the connections where they were.
    case = case.rules(vec![rule(family, 6, 3)]);
    let request = Frame { to: (cast::VIP, 1000), ..family.request() };
    case = reaches(case, method, 0, request, |frame| frame.tcp("A", b""), same);
    reaches(case, method, 5, Frame { from: (cast::CLIENT, 9), ..request }, tcp, DestCounts::opening_active)
}

/// Rules for packets that come in by one interface.
fn interfaces(family: Family) -> Case {
    let by = |mark, wire| rule_if(family, mark, 3, |matches| matches.interface = Some(at(wire)));
    let mut case = Case::new(family, "marks: by interface")
        .mark_service(1, &[(0, 0, Method::Route)])
        .mark_service(2, &[(1, 0, Method::Route)])
        .rules(vec![by(1, Wire::Inside), by(2, Wire::Outside)]);
    let build = |frame: Frame| frame.udp(b"x");
    case = reaches(case, Method::Route, 1, family.request(), build, DestCounts::opening_inactive);
    let request = Frame { from: (cast::CLIENT, 1), macs: from_server(0), ..family.request() };
    let counts = Counts::none().at(0, DestCounts::input(&build(request)).opening_inactive());
    let out = forwarded(Method::Route, 0, PORT, request, build);
    case = case.arrives(Wire::Inside, build(request), Verdict::Transmit, out, counts);
    let frame = build(Frame { from: (cast::CLIENT, 2), ..family.request() });
    case.stops(Wire::Loopback, frame, Reason::NotService)
}

/// What stands for an interface of the director in a rule, until [`Case::rules`] puts its index there.
fn at(wire: Wire) -> RuleInterface {
    RuleInterface { index: 0, name: format!("{wire:?}") }
}

/// A mark goes before the address and port of a service, when a connection is opened.
fn before_services(family: Family) -> Case {
    let method = Method::Masq;
    let client = |port| Frame { from: (cast::CLIENT, port), ..family.request() };
    let mut case = Case::new(family, "marks: before addresses and ports").service(TCP, PORT, &[(0, PORT, method, 1)]);
    case = reaches(case, method, 0, client(1), tcp("S"), DestCounts::opening_active);
    case = case.mark_service(MARK, &[(1, 0, method)]);
    case = reaches(case, method, 0, client(2), tcp("S"), DestCounts::opening_active);
    case = case.rules(vec![rule_if(family, MARK, 4, |matches| matches.protocol = Some(RuleProtocol::Tcp))]);
    case = reaches(case, method, 1, client(3), tcp("S"), DestCounts::opening_active);
    let reply = Frame { from: (cast::server(1), PORT), to: (cast::CLIENT, 3), macs: from_server(1), ..family.reply() };
    let translated = Frame { to: (cast::CLIENT, 3), ..family.translated_reply() };
    let frame = reply.tcp("SA", b"");
    let counts = Counts::none().at(1, DestCounts::output(&frame));
    case = case.arrives(Wire::Inside, frame, OUTSIDE, translated.tcp("SA", b""), counts);
    case = reaches(case, method, 0, client(2), tcp("A"), same);
    case = reaches(case, method, 1, client(3), tcp("A"), same);
    // A mark that no service is for says nothing.
    case = case.rules(vec![rule(family, MARK + 1, 4)]);
    case = reaches(case, method, 0, client(4), tcp("S"), DestCounts::opening_active);
    reaches(case, method, 1, client(3), tcp("A"), same)
}

/// What has no mark, or does not open a connection.
fn not_marked(family: Family) -> Case {
    let mut case = one(family, "what has none, and what opens no connection", Method::Masq);
    let request = family.request();
    for frame in [
        Frame { to: (Ipv4Addr::new(10, 9, 8, 9), PORT), ..request }.tcp("S", b""),
        Frame { to: (Ipv4Addr::new(10, 9, 10, 9), PORT), ..request }.udp(b"x"),
        family.reply().tcp("SA", b""),
    ] {
        case = case.stops(Wire::Outside, frame, Reason::NotService);
    }
    case = case
        .stops(Wire::Outside, request.tcp("A", b""), Reason::NoConnection)
        .stops(Wire::Outside, Frame { from: (cast::CLIENT, 20), ..request }.tcp("S", b""), Reason::FtpDataSource)
        .stops(Wire::Outside, Frame { from: (Ipv4Addr::LOCALHOST, 1), ..request }.udp(b"x"), Reason::SourceAddress)
        // Nothing says which address has which service, so there is none for a fragment.
        .stops(Wire::Outside, request.fragment(17, 0, true, &[0; 32]), Reason::NotService);
    case = case.rules(vec![]);
    case = case.stops(Wire::Outside, request.tcp("S", b""), Reason::NotService);
    let other = Frame { to: (OTHER_VIP, PORT), ..request };
    case = case.rules(vec![rule(family, MARK, 3)]);
    case = reaches(case, Method::Masq, 0, other, tcp("S"), DestCounts::opening_active);
    // A reply from another port or server.
    let reply = family.reply();
    case = case
        .stops(Wire::Inside, Frame { from: (cast::server(0), PORT + 1), ..reply }.tcp("A", b""), Reason::NotService)
        .stops(Wire::Inside, Frame { from: (cast::server(1), PORT), ..reply }.tcp("A", b""), Reason::NotService)
        .stops(Wire::Inside, Frame { to: (cast::CLIENT, 1), ..reply }.tcp("A", b""), Reason::NotService);
    replies(case, reply.tcp("A", b""), Frame { from: (OTHER_VIP, PORT), ..family.translated_reply() }.tcp("A", b""))
}

/// The packets of a service of one family have no mark in the other.
fn of_one_family(family: Family) -> Case {
    let other = if family == Family::Four { Family::Six } else { Family::Four };
    let case = Case::new(family, "marks: of one family").change(move |change| {
        change.add_service(key(other, MARK), scheduled(Scheduler::Rr)).expect("new");
        change.add_dest(key(other, MARK), other.at(0, 0), dest(Method::Route, 1)).expect("new");
    });
    let case = case.rules(vec![rule(family, MARK, 3), rule(other, MARK, 3)]);
    case.stops(Wire::Outside, family.request().tcp("S", b""), Reason::NotService)
}

fn no_destination(family: Family) -> Case {
    let case = Case::new(family, "marks: no destination").mark_service(MARK, &[]).rules(vec![rule(family, MARK, 3)]);
    let frame = family.request().udp(b"x");
    let error = error_for_client(family, Says::PortUnreachable, &frame);
    case.answers(Wire::Outside, frame, Verdict::Transmit, error, Counts::answered(Reason::NoDestination))
}

/// Connections stay when their service goes, and their packets go nowhere until it is there again.
fn removed(family: Family, method: Method) -> Case {
    let mut case = one(family, format!("{method}: a service is removed and comes back"), method);
    case = reaches(case, method, 0, family.request(), tcp("S"), DestCounts::opening_active);
    case = case.change(move |change| change.delete_service(key(family, MARK)).expect("there"));
    let newcomer = Frame { from: (cast::CLIENT, 1), ..family.request() };
    case = case.stops(Wire::Outside, family.request().tcp("A", b""), Reason::DestinationRemoved).stops(
        Wire::Outside,
        newcomer.tcp("S", b""),
        Reason::NotService,
    );
    case = case.mark_service(MARK, &[(0, 0, method)]);
    case = reaches(case, method, 0, family.request(), tcp("A"), same);
    case = case.change(move |change| change.delete_dest(key(family, MARK), family.at(0, 0)).expect("there"));
    case = case.stops(Wire::Outside, family.request().tcp("A", b""), Reason::DestinationRemoved);
    case = case.change(move |change| {
        change.add_dest(key(family, MARK), family.at(0, 0), dest(method, 1)).expect("new");
    });
    case = reaches(case, method, 0, family.request(), tcp("A"), same);
    reaches(case, method, 0, newcomer, tcp("S"), DestCounts::opening_active)
}

/// Without room in the table, as for every other service.
fn full_table(family: Family, method: Method) -> Case {
    let mut case = one(family, format!("{method}: a full table"), method);
    let client = |number| Frame { from: (cast::CLIENT, 1000 + number), ..family.request() };
    for number in 0..20 {
        case = reaches(case, method, 0, client(number), tcp("S"), DestCounts::opening_active);
        case = reaches(case, method, 0, client(number), tcp("A"), same);
        if method == Method::Masq {
            let reply = Frame { to: (cast::CLIENT, 1000 + number), ..family.reply() };
            let translated = Frame { to: (cast::CLIENT, 1000 + number), ..family.translated_reply() };
            case = replies(case, reply.tcp("SA", b""), translated.tcp("SA", b""));
            case = reaches(case, method, 0, client(number), tcp("A"), same);
        }
    }
    let frame = client(20).tcp("S", b"");
    if method == Method::Masq {
        return case.stops(Wire::Outside, frame, Reason::TableFull);
    }
    let out = forwarded(method, 0, PORT, client(20), tcp("S"));
    let counts = Counts { stateless: 1, ..Counts::none() }.at(0, DestCounts::input(&frame));
    case.arrives(Wire::Outside, frame, INSIDE, out, counts)
}

/// What would be too wrong for the host is dropped, if it has the mark.
fn wrong_ip_checksums(family: Family) -> Case {
    let wrong = |mut frame: Vec<u8>| {
        frame[ETHERNET + 10] ^= 1;
        frame
    };
    let mut case = one(family, "wrong checksums", Method::Masq);
    case = case.stops(Wire::Outside, wrong(family.request().tcp("S", b"")), Reason::IpChecksum);
    case = reaches(case, Method::Masq, 0, family.request(), tcp("S"), DestCounts::opening_active);
    let elsewhere = Frame { to: (Ipv4Addr::new(10, 9, 8, 9), PORT), ..family.request() };
    case.stops(Wire::Outside, wrong(family.request().tcp("A", b"")), Reason::IpChecksum)
        .stops(Wire::Inside, wrong(family.reply().tcp("SA", b"")), Reason::IpChecksum)
        .stops(Wire::Outside, wrong(elsewhere.tcp("S", b"")), Reason::NotService)
}

/// Errors about what the service has sent get to the server.
fn errors_about_replies(family: Family, method: Method) -> Case {
    let mut case = one(family, format!("{method}: errors about replies"), method);
    case = reaches(case, method, 0, family.request(), |frame| frame.udp(b"q"), DestCounts::opening_inactive);
    let quote = ETHERNET..ETHERNET + family.header() + 8;
    let reply = Frame { ttl: 60, ..family.translated_reply() }.udp(b"a");
    let mut original = Frame { ttl: 60, ..family.reply() }.udp(b"a");
    // What is quoted of the segment keeps its checksum.
    let checksum = ETHERNET + family.header() + 6;
    original[checksum..checksum + 2].copy_from_slice(&reply[checksum..checksum + 2]);
    let error = family.frame(FROM_CLIENT, (cast::CLIENT, 0), (cast::VIP, 0));
    let received = error.error(Says::PortUnreachable, &reply[quote.clone()]);
    let shown = if method == Method::Masq { &original } else { &reply };
    let out = forwarded(method, 0, 0, error, |frame| frame.error(Says::PortUnreachable, &shown[quote.clone()]));
    let counts = Counts::none().at(0, DestCounts::input(&received));
    case = case.arrives(Wire::Outside, received, INSIDE, out, counts);
    let other = Frame { to: (cast::CLIENT, 1), ..family.translated_reply() }.udp(b"a");
    case.stops(Wire::Outside, error.error(Says::PortUnreachable, &other[quote]), Reason::Icmp)
}

/// Errors about what the client has sent get to it.
fn errors_about_requests(family: Family) -> Case {
    let mut case = one(family, "nat: errors about requests", Method::Masq);
    case = reaches(case, Method::Masq, 0, family.request(), |frame| frame.udp(b"q"), DestCounts::opening_inactive);
    let quote = ETHERNET..ETHERNET + family.header() + 8;
    let translated = forwarded(Method::Masq, 0, PORT, family.request(), |frame| frame.udp(b"q"));
    let mut request = Frame { ttl: 63, ..family.request() }.udp(b"q");
    let checksum = ETHERNET + family.header() + 6;
    request[checksum..checksum + 2].copy_from_slice(&translated[checksum..checksum + 2]);
    let error = |macs, from| family.frame(macs, (from, 0), (cast::CLIENT, 0));
    let received = error(from_server(0), cast::server(0)).error(Says::PortUnreachable, &translated[quote.clone()]);
    let out = Frame { ttl: 63, ..error(TO_CLIENT, cast::VIP) }.error(Says::PortUnreachable, &request[quote]);
    let counts = Counts::none().at(0, DestCounts::output(&received));
    case.arrives(Wire::Inside, received, OUTSIDE, out, counts)
}
