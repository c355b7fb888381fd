//! SCTP: what moves an association's state, and what becomes of its checksum.

use std::num::NonZeroU32;

use lb_common::{
    overload::Thresholds,
    proto::Method,
    reason::Reason,
    sctp::{State, chunk},
};
use lb_userspace::control::model::{self, DestSpec, Identity, MarkKey, Match, Prefix, Rule, RuleProtocol};

use super::*;
use crate::frames::padded;

pub(super) fn cases(family: Family) -> Vec<Case> {
    let mut cases = Vec::new();
    for method in METHODS {
        cases.extend([association(family, method), lengths(family, method), sloppy_sctp(family, method)]);
        cases.extend([ended_by_time(family, method), aborted(family, method), reuse(family, method)]);
        cases.extend([quiescent(family, method), full_table(family, method), padding(family, method)]);
    }
    cases.extend([
        nat_port_mapping(family),
        wrong_checksum_stays_wrong(family),
        without_checksum(family),
        thresholds(family),
        of_a_mark(family, Method::Masq),
        of_a_mark(family, Method::Route),
        observed(family),
        truncated(family),
        bundled(family),
        same_port_of_all_protocols(family),
        refused_replies(family),
    ]);
    cases
}

/// A packet of one chunk of this type, without anything in it.
const fn first(kind: u8) -> impl Fn(Frame) -> Vec<u8> {
    move |frame: Frame| frame.sctp(&[(kind, b"")])
}

/// How a packet of one chunk of this type from a client counts.
fn counted(family: Family, kind: u8) -> DestCounts {
    DestCounts::input(&first(kind)(family.request()))
}

/// A client of its own.
fn numbered(family: Family, number: u16) -> Frame {
    Frame { from: (cast::CLIENT, CLIENT_PORT + number), ..family.request() }
}

/// The client sends these chunks, one after the other. The connection is opened, and active once it is established.
fn establish(mut case: Case, method: Method, request: Frame) -> Case {
    let family = case.family;
    case = passes(case, method, request, first(chunk::INIT), counted(family, chunk::INIT).opening_inactive());
    let counts = counted(family, chunk::COOKIE_ECHO);
    if method != Method::Masq {
        // Of what the server answers, nothing is seen.
        let counts = DestCounts { active: 1, inactive: -1, ..counts };
        case = passes(case, method, request, first(chunk::INIT), counted(family, chunk::INIT));
        return passes(case, method, request, first(chunk::COOKIE_ECHO), counts);
    }
    let reply = Frame { to: request.from, ..family.reply() };
    let translated = Frame { to: request.from, ..family.translated_reply() };
    let answer = first(chunk::INIT_ACK);
    case = replies(case, answer(reply), answer(translated));
    case = passes(case, method, request, first(chunk::COOKIE_ECHO), counts);
    let answer = first(chunk::COOKIE_ACK);
    let counts = DestCounts { active: 1, inactive: -1, ..DestCounts::output(&answer(reply)) };
    case.arrives(Wire::Inside, answer(reply), OUTSIDE, answer(translated), Counts::none().at(0, counts))
}

/// An association from its first packet to its last.
fn association(family: Family, method: Method) -> Case {
    let mut case = one(family, format!("{method}: an SCTP association"), SCTP, method);
    case = establish(case, method, family.request());
    let data = |frame: Frame| frame.sctp(&[(chunk::DATA, b"a message of some length"), (chunk::SACK, b"")]);
    for _ in 0..2 {
        case = passes(case, method, family.request(), data, DestCounts::input(&data(family.request())));
        if method == Method::Masq {
            case = replies(case, data(family.reply()), data(family.translated_reply()));
        }
    }
    let counts = counted(family, chunk::SHUTDOWN).calming();
    case = passes(case, method, family.request(), first(chunk::SHUTDOWN), counts);
    if method == Method::Masq {
        let answer = first(chunk::SHUTDOWN_ACK);
        case = replies(case, answer(family.reply()), answer(family.translated_reply()));
    }
    let counts = counted(family, chunk::SHUTDOWN_COMPLETE);
    passes(case, method, family.request(), first(chunk::SHUTDOWN_COMPLETE), counts)
}

/// Packets of every length up to a few hundred bytes, and of the longest ones that fit.
fn lengths(family: Family, method: Method) -> Case {
    let mut case = Case::new(family, format!("{method}: SCTP packets of every length"));
    let port = if method == Method::Masq { 9899 } else { PORT };
    case = case.service(SCTP, PORT, &[(0, port, method, 1)]);
    let mut counts = counted(family, chunk::INIT).opening_inactive();
    case = case.arrives(
        Wire::Outside,
        first(chunk::INIT)(family.request()),
        INSIDE,
        forwarded(method, 0, port, family.request(), first(chunk::INIT)),
        Counts::none().at(0, counts),
    );
    let overhead = family.header() + 12 + 4 + if method == Method::Tunnel { family.header() } else { 0 };
    for len in (0..=260).chain(1500 - overhead - 4..=1500 - overhead) {
        let value: Vec<u8> = (0..len).map(|index| (index * 7 + 3) as u8).collect();
        let build = |frame: Frame| frame.sctp(&[(chunk::DATA, &value)]);
        counts = DestCounts::input(&build(family.request()));
        let out = forwarded(method, 0, port, family.request(), build);
        case = case.arrives(Wire::Outside, build(family.request()), INSIDE, out, Counts::none().at(0, counts));
        if method == Method::Masq {
            let reply = build(Frame { from: (cast::server(0), port), ..family.reply() });
            case = replies(case, reply, build(family.translated_reply()));
        }
    }
    case
}

/// Packets that do not begin with INIT open connections when they may, but for those that begin with ABORT.
fn sloppy_sctp(family: Family, method: Method) -> Case {
    const OTHERS: [u8; 6] = [chunk::DATA, chunk::INIT_ACK, chunk::COOKIE_ECHO, chunk::SHUTDOWN_ACK, chunk::ERROR, 0x80];
    let mut case = one(family, format!("{method}: sloppy_sctp"), SCTP, method);
    for kind in OTHERS.into_iter().chain([chunk::ABORT]) {
        case = case.stops(Wire::Outside, first(kind)(family.request()), Reason::NoConnection);
    }
    case = case.setting("sloppy_tcp", 1);
    case = case.stops(Wire::Outside, first(chunk::DATA)(family.request()), Reason::NoConnection);
    case = case.setting("sloppy_sctp", 1);
    case = case.stops(Wire::Outside, first(chunk::ABORT)(family.request()), Reason::NoConnection);
    // Established at once, or closed.
    let counts = counted(family, chunk::DATA).opening_active();
    case = passes(case, method, numbered(family, 0), first(chunk::DATA), counts);
    let counts = counted(family, chunk::ERROR).opening_inactive();
    case = passes(case, method, numbered(family, 1), first(chunk::ERROR), counts);
    // ABORT counts behind a cookie, but what opens goes by the first chunk.
    let build = |frame: Frame| frame.sctp(&[(chunk::COOKIE_ECHO, b""), (chunk::ABORT, b"")]);
    let counts = DestCounts::input(&build(family.request())).opening_inactive();
    case = passes(case, method, numbered(family, 2), build, counts);
    case = case.setting("sloppy_sctp", 0);
    case = passes(case, method, numbered(family, 0), first(chunk::DATA), counted(family, chunk::DATA));
    case.stops(Wire::Outside, first(chunk::DATA)(numbered(family, 3)), Reason::NoConnection)
}

/// States last as long as they do in ip_vs.
fn ended_by_time(family: Family, method: Method) -> Case {
    let mut case = one(family, format!("{method}: SCTP connections end by time"), SCTP, method);
    let late = |case: Case, number, counts: DestCounts| {
        let frame = first(chunk::SACK)(numbered(family, number));
        let counts = Counts::of(Reason::NoConnection).at(0, counts);
        case.arrives(Wire::Outside, frame.clone(), Verdict::Pass, frame, counts)
    };
    // INIT1, which DATA leaves as it is.
    let opening = counted(family, chunk::INIT).opening_inactive();
    case = passes(case, method, numbered(family, 0), first(chunk::INIT), opening);
    case = case.pass(State::Init1.timeout_s() - 1);
    case = passes(case, method, numbered(family, 0), first(chunk::DATA), counted(family, chunk::DATA));
    case = case.pass(State::Init1.timeout_s() + 2);
    case = late(case, 0, DestCounts::default().ending_inactive());
    // INIT.
    case = passes(case, method, numbered(family, 1), first(chunk::INIT), opening);
    case = passes(case, method, numbered(family, 1), first(chunk::INIT), counted(family, chunk::INIT));
    case = case.pass(State::Init.timeout_s() - 1);
    case = passes(case, method, numbered(family, 1), first(chunk::DATA), counted(family, chunk::DATA));
    case = case.pass(State::Init.timeout_s() + 2);
    case = late(case, 1, DestCounts::default().ending_inactive());
    // ESTABLISHED.
    case = establish(case, method, numbered(family, 2));
    case = case.pass(State::Established.timeout_s() - 1);
    case = passes(case, method, numbered(family, 2), first(chunk::HEARTBEAT), counted(family, chunk::HEARTBEAT));
    case = case.pass(State::Established.timeout_s() + 2);
    case = late(case, 2, DestCounts::default().ending_active());
    // CLOSED.
    case = establish(case, method, numbered(family, 3));
    let counts = counted(family, chunk::ABORT).calming();
    case = passes(case, method, numbered(family, 3), first(chunk::ABORT), counts);
    case = case.pass(State::Closed.timeout_s() - 1);
    case = passes(case, method, numbered(family, 3), first(chunk::DATA), counted(family, chunk::DATA));
    case = case.pass(State::Closed.timeout_s() + 2);
    late(case, 3, DestCounts::default().ending_inactive())
}

/// ABORT ends an association for good: what follows changes nothing.
fn aborted(family: Family, method: Method) -> Case {
    let mut case = one(family, format!("{method}: an aborted SCTP association"), SCTP, method);
    case = establish(case, method, family.request());
    let counts = counted(family, chunk::ABORT).calming();
    case = passes(case, method, family.request(), first(chunk::ABORT), counts);
    for kind in [chunk::DATA, chunk::COOKIE_ECHO, chunk::COOKIE_ACK, chunk::ABORT] {
        case = passes(case, method, family.request(), first(kind), counted(family, kind));
    }
    case
}

/// INIT takes over the addresses and ports of a connection that is CLOSED, and of no other, unless it is told not to.
fn reuse(family: Family, method: Method) -> Case {
    let mut case = Case::new(family, format!("{method}: INIT where there was an association"));
    case = case.service(SCTP, PORT, &[(1, PORT, method, 1), (0, PORT, method, 1)]);
    case = establish(case, method, family.request());
    case = passes(case, method, family.request(), first(chunk::INIT), counted(family, chunk::INIT));
    let counts = counted(family, chunk::ABORT).calming();
    case = passes(case, method, family.request(), first(chunk::ABORT), counts);
    case = case.setting("conn_reuse_mode", 0);
    case = passes(case, method, family.request(), first(chunk::INIT), counted(family, chunk::INIT));
    case = passes(case, method, family.request(), first(chunk::ABORT), counted(family, chunk::ABORT));
    case = case.setting("conn_reuse_mode", 1);
    // The other server's turn.
    let counts = Counts::none().at(0, DestCounts::default().ending_inactive());
    let counts = counts.at(1, counted(family, chunk::INIT).opening_inactive());
    let out = forwarded(method, 1, PORT, family.request(), first(chunk::INIT));
    case.arrives(Wire::Outside, first(chunk::INIT)(family.request()), INSIDE, out, counts)
}

/// Under `expire_nodest_conn`, INIT leaves a server that has weight 0.
fn quiescent(family: Family, method: Method) -> Case {
    let mut case = Case::new(family, format!("{method}: INIT to a quiescent SCTP server"));
    case = case.service(SCTP, PORT, &[(1, PORT, method, 1), (0, PORT, method, 1)]);
    case = establish(case, method, family.request()).change(move |change| {
        change.edit_dest(family.key(SCTP), family.at(0, PORT), dest(method, 0)).expect("there");
    });
    case = case.setting("expire_nodest_conn", 1);
    case = passes(case, method, family.request(), first(chunk::DATA), counted(family, chunk::DATA));
    let counts = Counts::none().at(0, DestCounts::default().ending_active());
    let counts = counts.at(1, counted(family, chunk::INIT).opening_inactive());
    let out = forwarded(method, 1, PORT, family.request(), first(chunk::INIT));
    case.arrives(Wire::Outside, first(chunk::INIT)(family.request()), INSIDE, out, counts)
}

/// Where there is no room, an association that has not been established makes it, and no other.
fn full_table(family: Family, method: Method) -> Case {
    let mut case = one(family, format!("{method}: a full table of SCTP associations"), SCTP, method);
    for number in 0..19 {
        case = establish(case, method, numbered(family, number));
    }
    let opening = counted(family, chunk::INIT).opening_inactive();
    case = passes(case, method, numbered(family, 19), first(chunk::INIT), opening);
    let counts = DestCounts { inactive: 0, ..opening };
    let counts = Counts { evicted: 1, ..Counts::none().at(0, counts) };
    let out = forwarded(method, 0, PORT, numbered(family, 20), first(chunk::INIT));
    case = case.arrives(Wire::Outside, first(chunk::INIT)(numbered(family, 20)), INSIDE, out, counts);
    passes(case, method, numbered(family, 7), first(chunk::DATA), counted(family, chunk::DATA))
}

/// What follows a packet in its frame is no chunk and in no checksum.
fn padding(family: Family, method: Method) -> Case {
    let mut case = one(family, format!("{method}: padded SCTP packets"), SCTP, method);
    case = establish(case, method, family.request());
    for chunks in [&[(chunk::DATA, &b""[..])][..], &[(chunk::DATA, &b"more than Ethernet's least, which is 46"[..])]] {
        let build = |frame: Frame| frame.sctp(chunks);
        let counts = Counts::none().at(0, DestCounts::input(&build(family.request())));
        let out = forwarded(method, 0, PORT, family.request(), build);
        let (received, left) = (padded(build(family.request())), out.as_slice());
        let extra = received.len() - build(family.request()).len();
        let left = [left, &received[received.len() - extra..]].concat();
        case = case.arrives(Wire::Outside, received, INSIDE, left, counts);
    }
    case
}

fn nat_port_mapping(family: Family) -> Case {
    let mapped = 9899;
    let mut case = Case::new(family, "nat: SCTP, server at another port");
    case = case.service(SCTP, PORT, &[(0, mapped, Method::Masq, 1)]);
    let build = |frame: Frame| frame.sctp(&[(chunk::INIT, b"what an INIT has in it")]);
    let counts = DestCounts::input(&build(family.request())).opening_inactive();
    let out = forwarded(Method::Masq, 0, mapped, family.request(), build);
    case = case.arrives(Wire::Outside, build(family.request()), INSIDE, out, Counts::none().at(0, counts));
    let build = |frame: Frame| frame.sctp(&[(chunk::INIT_ACK, b"and its answer")]);
    let reply = Frame { from: (cast::server(0), mapped), ..family.reply() };
    replies(case, build(reply), build(family.translated_reply()))
}

/// Checksums are updated, not verified.
fn wrong_checksum_stays_wrong(family: Family) -> Case {
    let mapped = 9899;
    let mut case = Case::new(family, "nat: a wrong SCTP checksum");
    case = case.service(SCTP, PORT, &[(0, mapped, Method::Masq, 1)]);
    let wrong = |frame: Frame| {
        let mut frame = frame.sctp(&[(chunk::INIT, b"x")]);
        // A bit more or less in the checksum stays so, whatever else it says.
        frame[ETHERNET + family.header() + 9] ^= 0x10;
        frame
    };
    let counts = DestCounts::input(&wrong(family.request())).opening_inactive();
    let out = forwarded(Method::Masq, 0, mapped, family.request(), wrong);
    case.arrives(Wire::Outside, wrong(family.request()), INSIDE, out, Counts::none().at(0, counts))
}

/// A packet without a checksum stays without, both ways: there is nothing to update.
fn without_checksum(family: Family) -> Case {
    let mapped = 9899;
    let mut case = Case::new(family, "nat: SCTP without a checksum");
    case = case.service(SCTP, PORT, &[(0, mapped, Method::Masq, 1)]);
    let unsummed = |kind| {
        move |frame: Frame| {
            let mut bytes = frame.sctp(&[(kind, b"x")]);
            let checksum = ETHERNET + family.header() + 8;
            bytes[checksum..checksum + 4].fill(0);
            bytes
        }
    };
    let init = unsummed(chunk::INIT);
    let counts = DestCounts::input(&init(family.request())).opening_inactive();
    let out = forwarded(Method::Masq, 0, mapped, family.request(), init);
    case = case.arrives(Wire::Outside, init(family.request()), INSIDE, out, Counts::none().at(0, counts));
    let data = unsummed(chunk::DATA);
    let out = forwarded(Method::Masq, 0, mapped, family.request(), data);
    let counts = Counts::none().at(0, DestCounts::input(&data(family.request())));
    case = case.arrives(Wire::Outside, data(family.request()), INSIDE, out, counts);
    let reply = Frame { from: (cast::server(0), mapped), ..family.reply() };
    replies(case, data(reply), data(family.translated_reply()))
}

/// A server that has as many associations as it may have gets no other one.
fn thresholds(family: Family) -> Case {
    let method = Method::Route;
    let mut case = Case::new(family, "SCTP: a server with as many associations as it may have").change(move |change| {
        change.add_service(family.key(SCTP), scheduled(Scheduler::Rr)).expect("new");
        let full = DestSpec { thresholds: Thresholds { upper: 1, lower: 0 }, ..dest(method, 1) };
        change.add_dest(family.key(SCTP), family.at(0, PORT), full).expect("new");
    });
    let opening = counted(family, chunk::INIT).opening_inactive();
    case = passes(case, method, numbered(family, 0), first(chunk::INIT), opening);
    let refused = first(chunk::INIT)(numbered(family, 1));
    let answer = error_for_client(family, Says::PortUnreachable, &refused);
    case = case.answers(Wire::Outside, refused, Verdict::Transmit, answer, Counts::answered(Reason::NoDestination));
    passes(case, method, numbered(family, 0), first(chunk::DATA), counted(family, chunk::DATA))
}

/// Associations by the mark that a rule for SCTP gives their packets.
fn of_a_mark(family: Family, method: Method) -> Case {
    let mark = NonZeroU32::new(7).expect("a mark");
    let length = if family == Family::Four { 32 } else { 128 };
    let matches = Match {
        protocol: Some(RuleProtocol::Sctp),
        destination: Prefix::new(family.address(cast::VIP), length).expect("a length of the family"),
        ports: (9000, 9999),
        source: None,
        interface: None,
    };
    let mut case = Case::new(family, format!("{method}: SCTP by a mark")).rules(vec![Rule { mark, matches }]);
    case = case.change(move |change| {
        let family_of = if family == Family::Four { model::Family::Ipv4 } else { model::Family::Ipv6 };
        let key: Identity = MarkKey { mark, family: family_of }.into();
        change.add_service(key, scheduled(Scheduler::Rr)).expect("new");
        change.add_dest(key, family.at(0, 0), dest(method, 1)).expect("new");
    });
    let request = Frame { to: (cast::VIP, 9899), ..family.request() };
    for (kind, opens) in [(chunk::INIT, true), (chunk::INIT, false), (chunk::DATA, false)] {
        let counts = DestCounts::input(&first(kind)(request));
        let counts = if opens { counts.opening_inactive() } else { counts };
        let out = forwarded(method, 0, 9899, request, first(kind));
        case = case.arrives(Wire::Outside, first(kind)(request), INSIDE, out, Counts::none().at(0, counts));
    }
    if method == Method::Masq {
        let reply = Frame { from: (cast::server(0), 9899), ..family.reply() };
        let out = Frame { from: (cast::VIP, 9899), ..family.translated_reply() };
        case = replies(case, first(chunk::INIT_ACK)(reply), first(chunk::INIT_ACK)(out));
    }
    let other = Frame { to: (cast::VIP, 8999), ..family.request() };
    case = case.stops(Wire::Outside, first(chunk::INIT)(other), Reason::NotService);
    case.stops(Wire::Outside, request.tcp("S", b""), Reason::NotService)
}

/// What a server that answers directly sends moves its association when it passes, and is left alone.
fn observed(family: Family) -> Case {
    let mut case = one(family, "dr: SCTP replies that pass", SCTP, Method::Route);
    let init = counted(family, chunk::INIT);
    case = passes(case, Method::Route, family.request(), first(chunk::INIT), init.opening_inactive());
    let reply = Frame { from: (cast::VIP, PORT), ..family.reply() };
    let seen = |case: Case, kind, change: DestCounts| {
        let frame = first(kind)(reply);
        let counts = DestCounts { active: change.active, inactive: change.inactive, ..DestCounts::output(&frame) };
        let counts = Counts::of(Reason::ReplyObserved).at(0, counts);
        case.arrives(Wire::Inside, frame.clone(), Verdict::Pass, frame, counts)
    };
    case = seen(case, chunk::INIT_ACK, DestCounts::default());
    let counts = counted(family, chunk::COOKIE_ECHO);
    case = passes(case, Method::Route, family.request(), first(chunk::COOKIE_ECHO), counts);
    seen(case, chunk::COOKIE_ACK, DestCounts { active: 1, inactive: -1, ..DestCounts::default() })
}

/// A packet without a chunk, or without a whole header, is dropped at the address of any service.
fn truncated(family: Family) -> Case {
    let mut case = one(family, "SCTP packets that end too early", UDP, Method::Masq);
    for len in 0..16 {
        let packet = &first(chunk::INIT)(family.request())[ETHERNET + family.header()..][..len];
        let frame = family.request().packet(132, packet);
        case = case.stops(Wire::Outside, frame, Reason::TransportTruncated);
        let elsewhere = Frame { to: (cast::CLIENT_GATEWAY, PORT), ..family.request() };
        case = case.stops(Wire::Outside, elsewhere.packet(132, packet), Reason::NotService);
    }
    case.stops(Wire::Outside, first(chunk::INIT)(family.request()), Reason::NotService)
}

/// ABORT behind a cookie counts where it begins by the length of the first chunk, and lies within the packet.
fn bundled(family: Family) -> Case {
    let method = Method::Route;
    let mut case = one(family, "ABORT behind a cookie", SCTP, method);
    for (number, (chunks, aborts)) in [
        (&[(chunk::COOKIE_ECHO, &b""[..]), (chunk::ABORT, b"")][..], true),
        (&[(chunk::COOKIE_ECHO, b"cookie"), (chunk::ABORT, b"why")], true),
        (&[(chunk::COOKIE_ACK, b""), (chunk::ABORT, b"")], true),
        (&[(chunk::COOKIE_ECHO, b""), (chunk::DATA, b""), (chunk::ABORT, b"")], false),
        (&[(chunk::DATA, b""), (chunk::ABORT, b"")], false),
    ]
    .into_iter()
    .enumerate()
    {
        let request = numbered(family, number as u16);
        case = establish(case, method, request);
        let build = |frame: Frame| frame.sctp(chunks);
        let counts = DestCounts::input(&build(request));
        case = passes(case, method, request, build, if aborts { counts.calming() } else { counts });
    }
    // Lengths that lie: less than a chunk has, and more than is there.
    for (number, length) in [0u16, 3, 5, 8, 12, u16::MAX].into_iter().enumerate() {
        let request = numbered(family, 100 + number as u16);
        case = establish(case, method, request);
        let build = |frame: Frame| {
            let mut frame = frame.sctp(&[(chunk::COOKIE_ECHO, b"four"), (chunk::ABORT, b"")]);
            let place = ETHERNET + family.header() + 14;
            frame[place..place + 2].copy_from_slice(&length.to_be_bytes());
            frame
        };
        let counts = DestCounts::input(&build(request));
        let counts = if matches!(length, 5 | 8) { counts.calming() } else { counts };
        case = passes(case, method, request, build, counts);
    }
    case
}

/// Services and connections at one port are told apart by their protocol.
fn same_port_of_all_protocols(family: Family) -> Case {
    let mut case = Case::new(family, "nat: one port of three protocols")
        .service(TCP, PORT, &[(0, PORT, Method::Masq, 1)])
        .service(UDP, PORT, &[(0, PORT, Method::Masq, 1)])
        .service(SCTP, PORT, &[(0, PORT, Method::Masq, 1)]);
    let (request, reply, translated) = (family.request(), family.reply(), family.translated_reply());
    let tcp = DestCounts::input(&request.tcp("S", b"")).opening_active();
    case = passes(case, Method::Masq, request, |frame| frame.tcp("S", b""), tcp);
    case = case.stops(Wire::Outside, first(chunk::DATA)(request), Reason::NoConnection);
    let udp = DestCounts::input(&request.udp(b"x")).opening_inactive();
    case = passes(case, Method::Masq, request, |frame| frame.udp(b"x"), udp);
    case = case.stops(Wire::Inside, first(chunk::INIT_ACK)(reply), Reason::NotService);
    let sctp = counted(family, chunk::INIT).opening_inactive();
    case = passes(case, Method::Masq, request, first(chunk::INIT), sctp);
    case = replies(case, reply.tcp("SA", b""), translated.tcp("SA", b""));
    case = replies(case, reply.udp(b"y"), translated.udp(b"y"));
    replies(case, first(chunk::INIT_ACK)(reply), first(chunk::INIT_ACK)(translated))
}

/// Replies that may not leave as they are go to the host, untranslated, which tells the server.
fn refused_replies(family: Family) -> Case {
    let mut case = one(family, "nat: SCTP replies that may not leave", SCTP, Method::Masq);
    case = establish(case, Method::Masq, family.request());
    let late = Frame { ttl: 1, ..family.reply() };
    case = case.stops(Wire::Inside, first(chunk::DATA)(late), Reason::ReplyRefused);
    let nobody = Frame { from: (cast::server(0), PORT + 1), ..family.reply() };
    case.stops(Wire::Inside, first(chunk::DATA)(nobody), Reason::NotService)
}
