//! What ip_vs's settings do to packets.

use std::net::Ipv4Addr;

use lb_common::{overload::Thresholds, proto::service_flag};
use lb_userspace::control::model::{self, DestSpec, Netmask, Persistence, ServiceSpec};

use super::{
    marks::{self, MARK},
    persistence, *,
};

pub(super) fn cases(family: Family) -> Vec<Case> {
    let mut cases = Vec::new();
    for method in METHODS {
        cases.extend([
            sloppy_tcp(family, method),
            removed_and_expired(family, method),
            quiescent_and_expired(family, method),
        ]);
        cases.extend((0..=4).flat_map(|mode| STATES.map(|state| reuse(family, method, mode, state))));
        cases.extend([secure_tcp(family, method), some_are_dropped(family, method), one_packet(family, method)]);
        cases.push(thinned_out(family, method));
    }
    cases.extend([
        removed_and_expired_udp(family),
        all_are_dropped(family),
        full_and_sloppy(family),
        one_packet_too_many(family),
        none_of_no_service(family),
        rerouted(family),
        stray_replies(family),
        limit_of_stray_replies(family),
        stray_replies_to_marks(family),
        bypassed(family, false),
        bypassed(family, true),
        not_bypassed(family),
        thinned_out_udp(family),
        thinned_out_templates(family),
        thinned_out_templates_of_datagrams(family),
    ]);
    cases
}

const fn tcp(flags: &'static str) -> impl Fn(Frame) -> Vec<u8> {
    move |frame: Frame| frame.tcp(flags, b"")
}

fn segment(family: Family, flags: &'static str) -> DestCounts {
    DestCounts::input(&family.request().tcp(flags, b""))
}

/// A client of its own.
fn numbered(family: Family, number: u16) -> Frame {
    Frame { from: (cast::CLIENT, CLIENT_PORT + number), ..family.request() }
}

/// What `flags` make of a request reaches real server number `index`, and counts so for each of the servers.
fn reaches(
    case: Case,
    (method, index): (Method, u8),
    request: Frame,
    flags: &'static str,
    counts: &[(u8, DestCounts)],
) -> Case {
    let counts = counts.iter().fold(Counts::none(), |sum, (index, counts)| sum.at(*index, *counts));
    let out = forwarded(method, index, PORT, request, tcp(flags));
    case.arrives(Wire::Outside, request.tcp(flags, b""), INSIDE, out, counts)
}

/// Segments without SYN open connections when they may, but for those with RST.
fn sloppy_tcp(family: Family, method: Method) -> Case {
    let mut case = one(family, format!("{method}: sloppy_tcp"), TCP, method);
    for flags in ["A", "FA", "PA", "F"] {
        case = case.stops(Wire::Outside, family.request().tcp(flags, b""), Reason::NoConnection);
    }
    case = case.setting("sloppy_tcp", 1);
    for flags in ["R", "RA", "SR"] {
        case = case.stops(Wire::Outside, family.request().tcp(flags, b""), Reason::NoConnection);
    }
    // Established at once, or closed.
    case = passes(case, method, numbered(family, 0), tcp("A"), segment(family, "A").opening_active());
    case = passes(case, method, numbered(family, 1), tcp("FA"), segment(family, "FA").opening_inactive());
    case = case.pass(60);
    case = passes(case, method, numbered(family, 0), tcp("PA"), segment(family, "PA"));
    case = case.setting("sloppy_tcp", 0);
    case = passes(case, method, numbered(family, 0), tcp("A"), segment(family, "A"));
    case.stops(Wire::Outside, numbered(family, 2).tcp("A", b""), Reason::NoConnection)
}

/// In a full table too, a segment that may open a connection takes the place of one that makes room.
fn full_and_sloppy(family: Family) -> Case {
    let method = Method::Route;
    let mut case = one(family, "a full table and sloppy_tcp", TCP, method).setting("sloppy_tcp", 1);
    for number in 0..20 {
        case = passes(case, method, numbered(family, number), tcp("A"), segment(family, "A").opening_active());
    }
    case = passes(case, method, numbered(family, 7), tcp("R"), segment(family, "R").calming());
    let counts = DestCounts { inactive: -1, ..segment(family, "A").opening_active() };
    let counts = Counts { evicted: 1, ..Counts::none().at(0, counts) };
    let out = forwarded(method, 0, PORT, numbered(family, 20), tcp("A"));
    case.arrives(Wire::Outside, numbered(family, 20).tcp("A", b""), INSIDE, out, counts)
}

/// Two servers, of which number 0 is the first in turn.
fn two(family: Family, name: String, protocol: Transport, method: Method) -> Case {
    Case::new(family, name).service(protocol, PORT, &[(1, PORT, method, 1), (0, PORT, method, 1)])
}

fn remove(family: Family, protocol: Transport) -> impl Fn(&mut Change<'_>) + Send {
    move |change| change.delete_dest(family.key(protocol), family.at(0, PORT)).expect("there")
}

/// Connections to a server that is removed end with their next packet, and what may opens another.
fn removed_and_expired(family: Family, method: Method) -> Case {
    let mut case = two(family, format!("{method}: expire_nodest_conn, a server is removed"), TCP, method);
    for number in [0, 2] {
        // The other server has the one between.
        case = reaches(case, (method, 0), numbered(family, number), "S", &[(0, segment(family, "S").opening_active())]);
        case = reaches(case, (method, 0), numbered(family, number), "A", &[(0, segment(family, "A"))]);
        case = reaches(
            case,
            (method, 1),
            numbered(family, number + 1),
            "S",
            &[(1, segment(family, "S").opening_active())],
        );
    }
    case = case.change(remove(family, TCP));
    case = case.stops(Wire::Outside, numbered(family, 0).tcp("A", b""), Reason::DestinationRemoved);
    case = case.setting("expire_nodest_conn", 1);
    let ended = DestCounts::default().ending_active();
    let late = numbered(family, 0).tcp("A", b"");
    let counts = Counts::of(Reason::NoConnection).at(0, ended);
    case = case.arrives(Wire::Outside, late.clone(), Verdict::Pass, late.clone(), counts);
    case = case.stops(Wire::Outside, late, Reason::NoConnection);
    case =
        reaches(case, (method, 1), numbered(family, 2), "S", &[(0, ended), (1, segment(family, "S").opening_active())]);
    reaches(case, (method, 1), numbered(family, 1), "A", &[(1, segment(family, "A"))])
}

fn removed_and_expired_udp(family: Family) -> Case {
    let method = Method::Masq;
    let mut case = two(family, "expire_nodest_conn, a UDP server is removed".into(), UDP, method);
    let build = |frame: Frame| frame.udp(b"hello");
    let counts = DestCounts::input(&build(family.request())).opening_inactive();
    case = passes(case, method, family.request(), build, counts)
        .setting("expire_nodest_conn", 1)
        .change(remove(family, UDP));
    let counts = Counts::none().at(0, DestCounts::default().ending_inactive()).at(1, counts);
    case.arrives(
        Wire::Outside,
        build(family.request()),
        INSIDE,
        forwarded(method, 1, PORT, family.request(), build),
        counts,
    )
}

/// A server with weight 0 keeps its connections, but not when their clients begin anew.
fn quiescent_and_expired(family: Family, method: Method) -> Case {
    let mut case = two(family, format!("{method}: expire_nodest_conn, a server gets weight 0"), TCP, method);
    let again = |case, index, other: &[(u8, DestCounts)], opened: DestCounts| {
        let counts = [other, &[(index, opened)]].concat();
        reaches(case, (method, index), family.request(), "S", &counts)
    };
    case = again(case, 0, &[], segment(family, "S").opening_active());
    case = reaches(case, (method, 0), family.request(), "A", &[(0, segment(family, "A"))]);
    case = case
        .change(move |change| change.edit_dest(family.key(TCP), family.at(0, PORT), dest(method, 0)).expect("there"));
    case = again(case, 0, &[], segment(family, "S"));
    case = case.setting("expire_nodest_conn", 1);
    for flags in ["A", "PA", "A"] {
        case = reaches(case, (method, 0), family.request(), flags, &[(0, segment(family, flags))]);
    }
    case = again(case, 1, &[(0, DestCounts::default().ending_active())], segment(family, "S").opening_active());
    reaches(case, (method, 1), family.request(), "A", &[(1, segment(family, "A"))])
}

/// The client's segments that lead to a state, and those of the server between.
struct Way {
    name: &'static str,
    steps: &'static [(&'static str, bool)],
}

const CLIENT: bool = true;
const SERVER: bool = false;

const STATES: [&Way; 6] = [
    &Way { name: "SYN_RECV", steps: &[("S", CLIENT)] },
    &Way { name: "ESTABLISHED", steps: &[("S", CLIENT), ("A", CLIENT)] },
    // Of a server that is not seen this is FIN_WAIT.
    &Way { name: "after FIN", steps: &[("S", CLIENT), ("A", CLIENT), ("F", CLIENT)] },
    &Way { name: "FIN_WAIT of a server that is seen", steps: &[("S", CLIENT), ("A", CLIENT), ("F", SERVER)] },
    &Way { name: "TIME_WAIT", steps: &[("S", CLIENT), ("F", CLIENT)] },
    &Way { name: "CLOSE", steps: &[("S", CLIENT), ("A", CLIENT), ("R", CLIENT)] },
];

/// A SYN that meets a connection opens another one, at the next server, if mode and state say so (`docs/ipvs.md`, section 4.8).
fn reuse(family: Family, method: Method, mode: u32, way: &'static Way) -> Case {
    let mut case = two(family, format!("{method}: a SYN in {}, conn_reuse_mode {mode}", way.name), TCP, method);
    case = case.setting("conn_reuse_mode", mode);
    let mut active = false;
    for (turn, (flags, from)) in way.steps.iter().enumerate() {
        let closes = matches!(*flags, "F" | "R");
        if *from == CLIENT {
            let counts = segment(family, flags);
            let counts = match turn {
                0 => counts.opening_active(),
                _ if closes => counts.calming(),
                _ => counts,
            };
            case = reaches(case, (method, 0), family.request(), flags, &[(0, counts)]);
        } else if method == Method::Masq {
            let counts = DestCounts::output(&family.reply().tcp(flags, b"")).calming();
            let out = family.translated_reply().tcp(flags, b"");
            case =
                case.arrives(Wire::Inside, family.reply().tcp(flags, b""), OUTSIDE, out, Counts::none().at(0, counts));
        } else {
            // It passes the director, as it may.
            let frame = Frame { macs: from_server(0), from: (cast::VIP, PORT), ..family.reply() }.tcp(flags, b"");
            let counts = Counts::of(Reason::ReplyObserved).at(0, DestCounts::output(&frame).calming());
            case = case.arrives(Wire::Inside, frame.clone(), Verdict::Pass, frame, counts);
        }
        active = !closes;
    }
    let unseen_fin_wait = way.name == "after FIN" && method != Method::Masq;
    let taken = mode != 0 && matches!(way.name, "TIME_WAIT" | "CLOSE") || mode & 2 != 0 && unseen_fin_wait;
    if taken {
        let counts = [(0, DestCounts::default().ending_inactive()), (1, segment(family, "S").opening_active())];
        return reaches(case, (method, 1), family.request(), "S", &counts);
    }
    // It is the same connection, and is half-open again unless it was established; the server's SYN makes it SYN_SENT, which
    // counts too.
    let counts =
        if active { segment(family, "S") } else { DestCounts { active: 1, inactive: -1, ..segment(family, "S") } };
    reaches(case, (method, 0), family.request(), "S", &[(0, counts)])
}

/// Under suspicion an ACK of the client does not establish a connection of which its server has sent nothing, where servers
/// are heard; and where they are not, the client's first SYN counts as answered.
fn secure_tcp(family: Family, method: Method) -> Case {
    let mut case = one(family, format!("{method}: secure_tcp"), TCP, method).setting("secure_tcp", 3);
    case = passes(case, method, family.request(), tcp("S"), segment(family, "S").opening_active());
    case = passes(case, method, family.request(), tcp("A"), segment(family, "A"));
    if method == Method::Masq {
        // Still SYN_RECV, so gone after a minute.
        let frame = numbered(family, 1);
        case = passes(case, method, frame, tcp("S"), segment(family, "S").opening_active());
        let reply = Frame { to: frame.from, ..family.reply() };
        let out = Frame { to: frame.from, ..family.translated_reply() }.tcp("A", b"");
        case = replies(case, reply.tcp("A", b""), out).pass(62);
        let late = family.request().tcp("A", b"");
        let counts = Counts::of(Reason::NoConnection).at(0, DestCounts::default().ending_active());
        case = case.arrives(Wire::Outside, late.clone(), Verdict::Pass, late, counts);
        // The server's own established the other.
        return passes(case, method, frame, tcp("A"), segment(family, "A"));
    }
    // From SYNACK, whose time is two minutes, to ESTABLISHED.
    case = passes(case, method, numbered(family, 1), tcp("S"), segment(family, "S").opening_active()).pass(119);
    case = passes(case, method, numbered(family, 1), tcp("R"), segment(family, "R").calming())
        .setting("secure_tcp", 0)
        .pass(700);
    passes(case, method, family.request(), tcp("A"), segment(family, "A"))
}

/// One of three, beginning with the first; connections that are there are spared, and so is what opens none.
fn some_are_dropped(family: Family, method: Method) -> Case {
    let mut case = one(family, format!("{method}: drop_packet"), TCP, method);
    case = passes(case, method, numbered(family, 99), tcp("S"), segment(family, "S").opening_active());
    case = case.setting("am_droprate", 3).setting("drop_packet", 3);
    for number in 0..7 {
        case = if number % 3 == 0 {
            case.stops(Wire::Outside, numbered(family, number).tcp("S", b""), Reason::DropPacket)
        } else {
            passes(case, method, numbered(family, number), tcp("S"), segment(family, "S").opening_active())
        };
        case = passes(case, method, numbered(family, 99), tcp("A"), segment(family, "A"));
        case = case.stops(Wire::Outside, numbered(family, number + 50).tcp("A", b""), Reason::NoConnection);
    }
    case = case.setting("drop_packet", 0);
    (0..7).step_by(3).fold(case, |case, number| {
        passes(case, method, numbered(family, number), tcp("S"), segment(family, "S").opening_active())
    })
}

/// Packets to a port whose service is gone are none that would open a connection, though others at its address are for a
/// service for all ports.
fn none_of_no_service(family: Family) -> Case {
    let method = Method::Route;
    let persistence =
        Some(Persistence { timeout: 100, netmask: Netmask::whole(model::Family::of(family.address(cast::VIP))) });
    let mut case = one(family, "drop_packet and a service that is gone", UDP, method).change(move |change| {
        let key = family.service(TCP, 0);
        change.add_service(key, ServiceSpec { persistence, ..scheduled(Scheduler::Rr) }).expect("new");
        change.add_dest(key, family.at(0, 0), dest(method, 1)).expect("new");
    });
    let build = |frame: Frame| frame.udp(b"hello");
    let counts = DestCounts::input(&build(family.request())).opening_inactive();
    case = passes(case, method, numbered(family, 9), build, counts);
    case = case.change(move |change| change.delete_service(family.key(UDP)).expect("there"));
    case = case.setting("am_droprate", 2).setting("drop_packet", 3);
    case = case.stops(Wire::Outside, numbered(family, 0).tcp("S", b""), Reason::DropPacket);
    case = case.stops(Wire::Outside, build(numbered(family, 1)), Reason::NotService);
    let counts = DestCounts { templates: 1, ..segment(family, "S").opening_active() };
    case = passes(case, method, numbered(family, 2), tcp("S"), counts);
    case.stops(Wire::Outside, numbered(family, 3).tcp("S", b""), Reason::DropPacket)
}

/// With memory short from the outset, the automatic mode drops whatever would open a connection.
fn all_are_dropped(family: Family) -> Case {
    let mut case = one(family, "drop_packet when memory is low", UDP, Method::Route);
    let build = |frame: Frame| frame.udp(b"hello");
    let counts = DestCounts::input(&build(family.request())).opening_inactive();
    case = passes(case, Method::Route, numbered(family, 0), build, counts).setting("drop_packet", 1);
    for number in 1..4 {
        case = case.stops(Wire::Outside, build(numbered(family, number)), Reason::DropPacket);
    }
    case = case.setting("amemthresh", 0);
    passes(case, Method::Route, numbered(family, 1), build, counts)
}

/// One-packet scheduling: every datagram is a connection of its own, of which nothing is left. What a masqueraded server
/// answers is not translated.
fn one_packet(family: Family, method: Method) -> Case {
    let spec = |flags| ServiceSpec { flags, ..scheduled(Scheduler::Rr) };
    let build = |frame: Frame| frame.udp(b"hello");
    let counts = DestCounts { connections: 1, ..DestCounts::input(&build(family.request())) };
    let mut case = Case::new(family, format!("{method}: one-packet scheduling")).change(move |change| {
        change.add_service(family.key(UDP), spec(service_flag::ONE_PACKET)).expect("new");
        for index in [1, 0] {
            change.add_dest(family.key(UDP), family.at(index, PORT), dest(method, 1)).expect("new");
        }
    });
    let send = |case: Case, index, counts| {
        let out = forwarded(method, index, PORT, family.request(), build);
        case.arrives(Wire::Outside, build(family.request()), INSIDE, out, Counts::none().at(index, counts))
    };
    for index in [0, 1, 0, 1] {
        case = send(case, index, counts);
    }
    case = case.stops(Wire::Inside, family.reply().udp(b"x"), Reason::NotService);
    // More of them than the table has room for, at any time.
    for turn in 0..30 {
        let request = numbered(family, turn);
        let (index, out) = ((turn % 2) as u8, forwarded(method, (turn % 2) as u8, PORT, request, build));
        case = case.arrives(Wire::Outside, build(request), INSIDE, out, Counts::none().at(index, counts));
    }
    // A connection that is there when the service is edited goes on at its server.
    case = case.change(move |change| change.edit_service(family.key(UDP), spec(0)).expect("there"));
    case = send(case, 0, DestCounts { inactive: 1, ..counts });
    case =
        case.change(move |change| change.edit_service(family.key(UDP), spec(service_flag::ONE_PACKET)).expect("there"));
    for _ in 0..3 {
        case = send(case, 0, DestCounts::input(&build(family.request())));
    }
    case
}

/// A datagram that is scheduled by itself is a connection while it passes, and may be the one too many. Until the ones that
/// last are fewer than the lower threshold, the server gets no more.
fn one_packet_too_many(family: Family) -> Case {
    let method = Method::Route;
    let spec = |flags| ServiceSpec { flags, ..scheduled(Scheduler::Fo) };
    let build = |frame: Frame| frame.udp(b"hello");
    let counts = DestCounts { connections: 1, ..DestCounts::input(&build(family.request())) };
    let thresholds = Thresholds { upper: 4, lower: 0 };
    let mut case = Case::new(family, "one packet too many for a threshold").change(move |change| {
        change.add_service(family.key(UDP), spec(0)).expect("new");
        change.add_dest(family.key(UDP), family.at(1, PORT), dest(method, 1)).expect("new");
        let limited = DestSpec { thresholds, ..dest(method, 2) };
        change.add_dest(family.key(UDP), family.at(0, PORT), limited).expect("new");
    });
    let send = |case: Case, number, index, counts| {
        let out = forwarded(method, index, PORT, numbered(family, number), build);
        case.arrives(Wire::Outside, build(numbered(family, number)), INSIDE, out, Counts::none().at(index, counts))
    };
    for number in 0..3 {
        case = send(case, number, 0, DestCounts { inactive: 1, ..counts });
    }
    case =
        case.change(move |change| change.edit_service(family.key(UDP), spec(service_flag::ONE_PACKET)).expect("there"));
    for index in [0, 1, 1] {
        case = send(case, 3, index, counts);
    }
    case
}

/// Replies have the way of the service's address, or that of their own server's.
fn rerouted(family: Family) -> Case {
    let build = |frame: Frame| frame.udp(b"x");
    let of_client = |frame: Frame| Frame { from: (cast::BARRED_CLIENT, CLIENT_PORT), ..frame };
    let to_client = |frame: Frame| Frame { to: (cast::BARRED_CLIENT, CLIENT_PORT), ..frame };
    let mut case = one(family, "snat_reroute", UDP, Method::Masq);
    let request = of_client(family.request());
    case = passes(case, Method::Masq, request, build, DestCounts::input(&build(request)).opening_inactive());
    let (reply, translated) = (build(to_client(family.reply())), build(to_client(family.translated_reply())));
    case = replies(case, reply.clone(), translated.clone());
    case = case.setting("snat_reroute", 0).pass(2).stops(Wire::Inside, reply.clone(), Reason::NoRoute);
    // So have errors about requests.
    let about = forwarded(Method::Masq, 0, PORT, request, build);
    let error = to_client(family.frame(from_server(0), (cast::server(0), 0), (cast::CLIENT, 0)));
    let error = error.error(Says::PortUnreachable, &about[ETHERNET..]);
    let answered = with_checksum_of(build(Frame { ttl: 63, ..request }), family, UDP, &about);
    let told = |frame: Frame| to_client(frame).error(Says::PortUnreachable, &answered[ETHERNET..]);
    let within = told(family.frame(from_server(0), (cast::server(0), 0), (cast::CLIENT, 0)));
    case = case.arrives(Wire::Inside, error.clone(), Verdict::Drop, within, Counts::of(Reason::NoRoute));
    // Other clients' packets have one way.
    let near = build(family.request());
    case = passes(case, Method::Masq, family.request(), build, DestCounts::input(&near).opening_inactive());
    case = replies(case, build(family.reply()), build(family.translated_reply()));
    case = case.setting("snat_reroute", 1);
    let counts = Counts::none().at(0, DestCounts::output(&error));
    let out = told(Frame { ttl: 63, ..family.frame(TO_CLIENT, (cast::VIP, 0), (cast::CLIENT, 0)) });
    case = case.arrives(Wire::Inside, error, OUTSIDE, out, counts);
    replies(case, reply, translated)
}

/// What the director tells real server number 0 about a packet that it has received from it.
fn error_for_server(family: Family, about: &[u8]) -> Vec<u8> {
    let frame = family.frame(to_server(0), (cast::DIRECTOR_INSIDE, 0), (cast::server(0), 0));
    let frame = Frame { id: 0, dont_fragment: false, dscp: director_error(family).dscp, ..frame };
    frame.of_the_class_of(about).error(Says::PortUnreachable, &about[ETHERNET..])
}

/// A packet of a masqueraded server that belongs to no connection.
fn strays(case: Case, build: impl Fn(Frame) -> Vec<u8>, reply: Frame) -> Case {
    let about = build(Frame { ttl: reply.ttl - 1, ..reply });
    let error = error_for_server(case.family, &about);
    case.answers(Wire::Inside, build(reply), Verdict::Transmit, error, Counts::answered(Reason::StrayReply))
}

/// A masqueraded server is told that nobody waits for its packet, which goes no further.
fn stray_replies(family: Family) -> Case {
    let methods = [(0, Method::Masq), (1, Method::Route)];
    let dests = methods.map(|(index, method)| (index, PORT, method, 1));
    let mut case = Case::new(family, "nat_icmp_send").service(TCP, PORT, &dests).service(
        UDP,
        PORT + 1,
        &[(0, 53, Method::Masq, 1)],
    );
    let reply = family.reply();
    let named = Frame { from: (cast::server(0), 53), ..reply };
    let udp = |frame: Frame| frame.udp(b"answer");
    case = case.stops(Wire::Inside, reply.tcp("SA", b""), Reason::NotService).stops(
        Wire::Inside,
        udp(named),
        Reason::NotService,
    );
    case = case.setting("nat_icmp_send", 1);
    for flags in ["SA", "A", "FA", "PA", "S"] {
        case = strays(case, tcp(flags), reply);
    }
    case = strays(case, udp, named);
    case = strays(case, udp, Frame { to: (cast::LOST_CLIENT, 7), dscp: 0x2e, ttl: 2, ..named });
    let others = [
        // Nobody is told about a reset.
        reply.tcp("R", b""),
        reply.tcp("RA", b""),
        // What the host does not forward.
        Frame { ttl: 1, ..reply }.tcp("A", b""),
        Frame { to: (cast::DIRECTOR_OUTSIDE, CLIENT_PORT), ..reply }.tcp("SA", b""),
        // No masqueraded server, or another of its ports, or protocols.
        Frame { from: (cast::server(1), PORT), macs: from_server(1), ..reply }.tcp("SA", b""),
        Frame { from: (cast::server(0), PORT + 2), ..reply }.tcp("SA", b""),
        udp(reply),
        named.tcp("SA", b""),
    ];
    for frame in others {
        case = case.stops(Wire::Inside, frame, Reason::NotService);
    }
    if family == Family::Four {
        let mut wrong = reply.tcp("A", b"");
        wrong[ETHERNET + 10] ^= 1;
        case = case.stops(Wire::Inside, wrong, Reason::NotService);
    }
    // What belongs to a connection is a reply.
    let counts = segment(family, "S").opening_active();
    case = reaches(case, (Method::Route, 1), numbered(family, 1), "S", &[(1, counts)]);
    case = passes(case, Method::Masq, family.request(), tcp("S"), counts);
    case = replies(case, reply.tcp("SA", b""), family.translated_reply().tcp("SA", b""));
    case.setting("nat_icmp_send", 0).stops(Wire::Inside, udp(named), Reason::NotService)
}

/// When no more errors may be sent, the packet goes no further all the same.
fn limit_of_stray_replies(family: Family) -> Case {
    let mut case = one(family, "nat_icmp_send, the limit of errors", UDP, Method::Masq).setting("nat_icmp_send", 1);
    case = case.set(|config, _| config.icmp_per_second.store(1)).in_a_young_second();
    case = strays(case, |frame| frame.udp(b"answer"), family.reply());
    case.stops(Wire::Inside, family.reply().udp(b"answer"), Reason::StrayReply)
}

/// Servers of services of marks are known by the ports that they have of their own, for any protocol.
fn stray_replies_to_marks(family: Family) -> Case {
    let mut case = Case::new(family, "nat_icmp_send, marks")
        .mark_service(MARK, &[(0, 99, Method::Masq), (1, 0, Method::Masq)])
        .rules(vec![marks::rule(family, MARK, 4)])
        .setting("nat_icmp_send", 1);
    let reply = Frame { from: (cast::server(0), 99), ..family.reply() };
    case = strays(case, tcp("SA"), reply);
    case = strays(case, |frame| frame.udp(b"x"), reply);
    case.stops(Wire::Inside, family.reply().tcp("SA", b""), Reason::NotService)
}

/// A packet for a mark's service without a usable server goes where it is addressed to, which is the host's to find out.
fn bypassed(family: Family, persistent: bool) -> Case {
    let origin = 5;
    let client = |number| Frame { to: (cast::server(origin), PORT), ..numbered(family, number) };
    let rule =
        marks::rule_if(family, MARK, 3, |matches| matches.destination = marks::prefix(family, cast::server(0), 3));
    let spec = if persistent { persistence::persistent(family, 300, 4) } else { scheduled(Scheduler::Rr) };
    let mut case = Case::new(family, format!("cache_bypass, persistent: {persistent}"))
        .change(move |change| {
            let key = marks::key(family, MARK);
            change.add_service(key, spec).expect("new");
            change.add_dest(key, family.at(1, 0), dest(Method::Route, 0)).expect("new");
        })
        .rules(vec![rule]);
    let told = |case: Case, frame: Vec<u8>, to| {
        let error = Frame { from: (to, 0), ..director_error(family) }.error(Says::PortUnreachable, &frame[ETHERNET..]);
        case.answers(Wire::Outside, frame, Verdict::Transmit, error, Counts::answered(Reason::NoDestination))
    };
    case = told(case, client(0).tcp("S", b""), cast::server(origin));
    case = case.setting("cache_bypass", 1);
    for frame in [client(0).tcp("S", b""), client(1).udp(b"x"), Frame { ttl: 1, ..client(2) }.udp(b"y")] {
        case = case.stops(Wire::Outside, frame, Reason::CacheBypass);
    }
    // It has opened no connection.
    case = case.stops(Wire::Outside, client(0).tcp("A", b""), Reason::NoConnection);
    // An address that packets have no way to is none of this host.
    let lost = Frame { to: (cast::server(cast::special::UNREACHABLE), PORT), ..client(3) };
    case = case.stops(Wire::Outside, lost.tcp("S", b""), Reason::CacheBypass);
    let here = cast::server(cast::special::LOCAL);
    case = told(case, Frame { to: (here, PORT), ..client(4) }.tcp("S", b""), here);
    case = case.change(move |change| {
        change.edit_dest(marks::key(family, MARK), family.at(1, 0), dest(Method::Route, 1)).expect("there");
    });
    let counts = segment(family, "S").opening_active();
    let counts = DestCounts { templates: persistent.into(), ..counts };
    case = reaches(case, (Method::Route, 1), client(5), "S", &[(1, counts)]);
    case = case.change(move |change| {
        change.delete_dest(marks::key(family, MARK), family.at(1, 0)).expect("there");
    });
    case = case.stops(Wire::Outside, client(6).udp(b"x"), Reason::CacheBypass).setting("cache_bypass", 0);
    told(case, client(6).udp(b"x"), cast::server(origin))
}

/// Of a service that is at an address of its own, clients are told all the same.
fn not_bypassed(family: Family) -> Case {
    let mut case =
        Case::new(family, "cache_bypass, a service at an address").service(TCP, PORT, &[]).setting("cache_bypass", 1);
    let spec = persistence::persistent(family, 300, 4);
    case = case.change(move |change| change.add_service(family.key(UDP), spec).expect("new"));
    for frame in [family.request().tcp("S", b""), family.request().udp(b"x")] {
        let error = error_for_client(family, Says::PortUnreachable, &frame);
        case = case.answers(Wire::Outside, frame, Verdict::Transmit, error, Counts::answered(Reason::NoDestination));
    }
    case
}

/// Sends the segments of client number `number` to the only server, the first of which opens its connection.
fn converses(mut case: Case, method: Method, number: u16, flags: &[&'static str]) -> Case {
    let family = case.family;
    let mut active = true;
    for (turn, flags) in flags.iter().enumerate() {
        let counts = segment(family, flags);
        let counts = match turn {
            0 => counts.opening_active(),
            // One that resets a half-open connection leaves it as it is.
            _ if active && turn > 1 && flags.contains(['F', 'R']) => {
                active = false;
                counts.calming()
            }
            _ => counts,
        };
        case = passes(case, method, numbered(family, number), tcp(flags), counts);
    }
    case
}

/// `drop_entry` ends half-open connections, and established ones that have been idle for a minute after few packets.
fn thinned_out(family: Family, method: Method) -> Case {
    let mut case = one(family, format!("{method}: drop_entry"), TCP, method);
    // Not counted.
    case = converses(case, method, 0, &["S", "A"]).thins(0).setting("drop_entry", 3);
    case = converses(case, method, 1, &["S"]);
    case = converses(case, method, 2, &["S", "A"]);
    case = converses(case, method, 3, &["S", "A", "PA", "PA", "A", "A", "A", "A"]);
    case = converses(case, method, 4, &["S", "A", "PA", "PA", "A", "A", "A", "A", "A"]);
    case = converses(case, method, 5, &["S", "A", "F"]);
    case = converses(case, method, 6, &["S", "R"]);
    if method == Method::Masq {
        // What servers send does not count.
        let to = numbered(family, 2).from;
        for flags in ["SA", "A", "PA", "A", "PA", "A", "PA", "A", "PA"] {
            let reply = Frame { to, ..family.reply() }.tcp(flags, b"");
            case = replies(case, reply, Frame { to, ..family.translated_reply() }.tcp(flags, b""));
        }
    }
    // The two that are half-open.
    case = case.thins(2);
    let gone = |case: Case, number| {
        let frame = numbered(family, number).tcp("A", b"");
        case.stops(Wire::Outside, frame, Reason::NoConnection)
    };
    case = gone(case, 1);
    case = gone(case, 6);
    case = case.pass(58).thins(0).pass(4).thins(2);
    case = gone(case, 2);
    case = gone(case, 3);
    for number in [0, 4] {
        case = passes(case, method, numbered(family, number), tcp("A"), segment(family, "A"));
    }
    // Of those that are closed none ends early, nor does any when the defence rests.
    case = converses(case, method, 7, &["S"]).setting("drop_entry", 0).thins(0);
    case = passes(case, method, numbered(family, 7), tcp("A"), segment(family, "A"));
    // The automatic mode, with memory short.
    case = converses(case, method, 8, &["S"]).setting("amemthresh", 0).setting("drop_entry", 1).thins(0);
    gone(case.setting("amemthresh", 1024).thins(1), 8)
}

/// Datagrams are no more nor less than what an established connection gets.
fn thinned_out_udp(family: Family) -> Case {
    let method = Method::Masq;
    let build = |frame: Frame| frame.udp(b"q");
    let mut case = one(family, "drop_entry, datagrams", UDP, method).setting("drop_entry", 3);
    let counts = DestCounts::input(&build(family.request()));
    for (number, datagrams) in [(0, 1), (1, 8), (2, 9)] {
        for turn in 0..datagrams {
            let counts = if turn == 0 { counts.opening_inactive() } else { counts };
            case = passes(case, method, numbered(family, number), build, counts);
        }
    }
    case = case.pass(58).thins(0).pass(4).thins(2).thins(0);
    for number in [0, 1] {
        case = passes(case, method, numbered(family, number), build, counts.opening_inactive());
    }
    passes(case, method, numbered(family, 2), build, counts)
}

/// Half-open connections take templates with them that are there for them alone; those that have had better ones stay.
fn thinned_out_templates(family: Family) -> Case {
    let method = Method::Route;
    let mut case = Case::new(family, "drop_entry, persistent").change(move |change| {
        change.add_service(family.key(TCP), persistence::persistent(family, 100, 4)).expect("new");
        change.add_dest(family.key(TCP), family.at(0, PORT), dest(method, 1)).expect("new");
    });
    let client = |last: u8| Frame { from: (Ipv4Addr::new(10, 1, 0, last), CLIENT_PORT), ..family.request() };
    let opens = |case: Case, last, templates| {
        let counts = DestCounts { templates, ..segment(family, "S").opening_active() };
        passes(case, method, client(last), tcp("S"), counts)
    };
    let line = |state: &str, last: u8| format!("tcp {state} 10.1.0.{last}:0 10.9.9.9:80 10.2.0.11:80");
    // One whose connection is over, and which has not served another.
    case = opens(case, 3, 1).pass(62).age().shows([&line("NONE", 3)]).setting("drop_entry", 3);
    case = case.thins(1).shows([]);
    for last in [1, 2] {
        case = opens(case, last, 1);
    }
    case = passes(case, method, client(2), tcp("A"), segment(family, "A"));
    case = case.thins(1).shows([&line("ASSURED", 2)]);
    // With the connection idle for a minute, there is nothing that it controls.
    case = case.pass(62).thins(1).shows([&line("ASSURED", 2)]).thins(0);
    // Eight packets are few, nine are not.
    case = opens(case, 2, 0);
    for _ in 0..7 {
        case = passes(case, method, client(2), tcp("A"), segment(family, "A"));
    }
    case = case.pass(62).thins(1);
    case = opens(case, 2, 0);
    for _ in 0..8 {
        case = passes(case, method, client(2), tcp("A"), segment(family, "A"));
    }
    case = case.pass(62).thins(0);
    passes(case, method, client(2), tcp("A"), segment(family, "A"))
}

/// Templates of a service whose datagrams are scheduled one by one stay for a minute at least.
fn thinned_out_templates_of_datagrams(family: Family) -> Case {
    let method = Method::Route;
    let spec = ServiceSpec { flags: service_flag::ONE_PACKET, ..persistence::persistent(family, 300, 4) };
    let build = |frame: Frame| frame.udp(b"q");
    let counts = DestCounts { connections: 1, ..DestCounts::input(&build(family.request())) };
    let mut case = Case::new(family, "drop_entry, persistent datagrams").change(move |change| {
        change.add_service(family.key(UDP), spec).expect("new");
        change.add_dest(family.key(UDP), family.at(0, PORT), dest(method, 1)).expect("new");
    });
    case = case.setting("drop_entry", 3);
    case = passes(case, method, family.request(), build, DestCounts { templates: 1, ..counts });
    let line = "udp NONE 10.1.0.1:0 10.9.9.9:80 10.2.0.11:80";
    case = case.thins(0).pass(58).thins(0).shows([line]);
    passes(case, method, family.request(), build, counts).pass(58).thins(0).pass(4).thins(1).shows([])
}
