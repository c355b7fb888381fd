//! Connections from their first packet to their end, and what changes of the configuration do to them.

use std::net::{Ipv4Addr, SocketAddr};

use lb_common::{
    proto::{Method, Protocol},
    reason::Reason,
    tcp::State,
    timeout,
};

use super::*;

pub(super) fn cases(family: Family) -> Vec<Case> {
    let mut cases = Vec::new();
    for method in METHODS {
        cases.extend([
            ended_by_time_tcp(family, method),
            ended_by_time_udp(family, method),
            removed_destination(family, method),
        ]);
        cases.extend([removed_service(family, method), quiescent(family, method), mode_changed(family, method)]);
        cases.extend([full_table(family, method), making_room(family, method), idle_udp_makes_room(family, method)]);
    }
    cases.extend([
        kept_by_replies(family),
        shorter_timeouts(family),
        port_reuse(family, Method::Masq, 1),
        port_reuse(family, Method::Route, 1),
        port_reuse(family, Method::Masq, 0),
        reuse_of_fin_wait(family, 1),
        reuse_of_fin_wait(family, 2),
        reset_instead_of_reuse(family),
        replies_of_a_removed_destination(family),
        in_turn(family),
        one_client_port_to_two_services(family),
        full_table_on_this_host(family),
    ]);
    if family == Family::Four {
        cases.push(wrong_ip_checksums(family));
    }
    cases
}

const fn tcp(flags: &'static str) -> impl Fn(Frame) -> Vec<u8> {
    move |frame: Frame| frame.tcp(flags, b"")
}

fn segment(family: Family, flags: &'static str) -> DestCounts {
    DestCounts::input(&family.request().tcp(flags, b""))
}

/// The client and the server take turns; only the client is heard of a server that is not masqueraded.
fn ended_by_time_tcp(family: Family, method: Method) -> Case {
    // The client's segments, the state that they lead to, and one that leaves it there.
    let fin = if method == Method::Masq { State::CloseWait } else { State::FinWait };
    let mut case = one(family, format!("{method}: TCP connections end by time"), TCP, method);
    for (number, (flags, state, probe)) in [
        (&["S"][..], State::SynRecv, "S"),
        (&["S", "A"], State::Established, "A"),
        (&["S", "A", "FA"], fin, "A"),
        (&["S", "A", "R"], State::Close, "A"),
        (&["S", "F"], State::TimeWait, "A"),
    ]
    .into_iter()
    .enumerate()
    {
        let request = Frame { from: (cast::CLIENT, CLIENT_PORT + number as u16), ..family.request() };
        let active = matches!(state, State::SynRecv | State::Established);
        for (turn, flags) in flags.iter().enumerate() {
            let counts = segment(family, flags);
            let counts = match turn {
                0 => counts.opening_active(),
                _ if !active && matches!(*flags, "FA" | "R" | "F") => counts.calming(),
                _ => counts,
            };
            case = passes(case, method, request, tcp(flags), counts);
        }
        // A second before its time, and again: every packet sets it anew.
        for _ in 0..2 {
            case = case.pass(state.default_timeout_s() - 1);
            case = passes(case, method, request, tcp(probe), segment(family, probe));
        }
        // A connection lives up to a second longer than its time, and no two.
        case = case.pass(state.default_timeout_s() + 2);
        let late = request.tcp(probe, b"");
        case = if probe == "S" {
            let counts = DestCounts { active: 0, ..segment(family, probe).opening_active() };
            // Which is opened is ended too, for the next turn.
            let case = passes(case, method, request, tcp(probe), counts).pass(62);
            let counts = DestCounts::default().ending_active();
            case.arrives(
                Wire::Outside,
                request.tcp("A", b""),
                Verdict::Pass,
                request.tcp("A", b""),
                Counts::of(Reason::NoConnection).at(0, counts),
            )
        } else {
            let counts = DestCounts::default();
            let counts = if active { counts.ending_active() } else { counts.ending_inactive() };
            let counts = Counts::of(Reason::NoConnection).at(0, counts);
            case.arrives(Wire::Outside, late.clone(), Verdict::Pass, late, counts)
        };
    }
    case
}

fn ended_by_time_udp(family: Family, method: Method) -> Case {
    let mut case = Case::new(family, format!("{method}: UDP connections end by time"));
    case = case.service(UDP, PORT, &[(1, PORT, method, 1), (0, PORT, method, 1)]);
    let build = |frame: Frame| frame.udp(b"hello");
    let counts = DestCounts::input(&build(family.request()));
    case = passes(case, method, family.request(), build, counts.opening_inactive());
    for _ in 0..2 {
        case = case.pass(timeout::UDP_S - 1);
        case = passes(case, method, family.request(), build, counts);
    }
    // The next is another connection, and the other server's turn.
    case = case.pass(timeout::UDP_S + 2);
    let counts = Counts::none().at(0, DestCounts::default().ending_inactive()).at(1, counts.opening_inactive());
    case.arrives(
        Wire::Outside,
        build(family.request()),
        INSIDE,
        forwarded(method, 1, PORT, family.request(), build),
        counts,
    )
}

fn kept_by_replies(family: Family) -> Case {
    let mut case = one(family, "nat: replies keep a connection alive", UDP, Method::Masq);
    let build = |frame: Frame| frame.udp(b"hello");
    let counts = DestCounts::input(&build(family.request()));
    case = passes(case, Method::Masq, family.request(), build, counts.opening_inactive());
    for _ in 0..3 {
        case = case.pass(timeout::UDP_S - 1);
        case = replies(case, family.reply().udp(b"x"), family.translated_reply().udp(b"x"));
    }
    case = case.pass(timeout::UDP_S + 2);
    let reply = family.reply().udp(b"x");
    let ended = DestCounts::default().ending_inactive();
    case.arrives(Wire::Inside, reply.clone(), Verdict::Pass, reply, Counts::of(Reason::NotService).at(0, ended))
}

/// A changed timeout applies from the next packet on.
fn shorter_timeouts(family: Family) -> Case {
    let mut case = one(family, "shorter timeouts", TCP, Method::Masq);
    for (flags, counts) in [("S", segment(family, "S").opening_active()), ("A", segment(family, "A"))] {
        case = passes(case, Method::Masq, family.request(), tcp(flags), counts);
    }
    case = case.set(|config, hz| {
        config.timeouts[timeout::index(Protocol::Tcp, State::Established as u8)].store(30 * hz);
    });
    // The connection still has its 900 seconds.
    case = case.pass(800);
    case = passes(case, Method::Masq, family.request(), tcp("A"), segment(family, "A")).pass(29);
    case = passes(case, Method::Masq, family.request(), tcp("A"), segment(family, "A")).pass(32);
    let late = family.request().tcp("A", b"");
    let counts = Counts::of(Reason::NoConnection).at(0, DestCounts::default().ending_active());
    case.arrives(Wire::Outside, late.clone(), Verdict::Pass, late, counts)
}

/// A SYN that meets a connection which is over opens another one, at the next server; unless that is switched off.
fn port_reuse(family: Family, method: Method, mode: u32) -> Case {
    let mut case = Case::new(family, format!("{method}: a client's port is used again, conn_reuse_mode {mode}"));
    case = case.service(TCP, PORT, &[(1, PORT, method, 1), (0, PORT, method, 1)]);
    case = case.set(move |config, _| config.conn_reuse_mode.store(mode));
    case = passes(case, method, family.request(), tcp("S"), segment(family, "S").opening_active());
    // In SYN_RECV and ESTABLISHED it is the same connection.
    for (flags, counts) in [
        ("S", segment(family, "S")),
        ("A", segment(family, "A")),
        ("S", segment(family, "S")),
        ("R", segment(family, "R").calming()),
    ] {
        case = passes(case, method, family.request(), tcp(flags), counts);
    }
    if mode == 0 {
        let counts = DestCounts { active: 1, inactive: -1, ..segment(family, "S") };
        return passes(case, method, family.request(), tcp("S"), counts);
    }
    let counts =
        Counts::none().at(0, DestCounts::default().ending_inactive()).at(1, segment(family, "S").opening_active());
    let build = tcp("S");
    case.arrives(
        Wire::Outside,
        build(family.request()),
        INSIDE,
        forwarded(method, 1, PORT, family.request(), build),
        counts,
    )
}

/// In FIN_WAIT of a server that is not seen only mode 2 says so.
fn reuse_of_fin_wait(family: Family, mode: u32) -> Case {
    let method = Method::Route;
    let mut case = one(family, format!("{method}: a SYN in FIN_WAIT, conn_reuse_mode {mode}"), TCP, method);
    case = case.set(move |config, _| config.conn_reuse_mode.store(mode));
    for (flags, counts) in [
        ("S", segment(family, "S").opening_active()),
        ("A", segment(family, "A")),
        ("F", segment(family, "F").calming()),
    ] {
        case = passes(case, method, family.request(), tcp(flags), counts);
    }
    let connections = i64::from(mode == 2);
    passes(
        case,
        method,
        family.request(),
        tcp("S"),
        DestCounts { connections, active: 1, inactive: -1, ..segment(family, "S") },
    )
}

/// A reset is a reset, whatever else it says.
fn reset_instead_of_reuse(family: Family) -> Case {
    let mut case = one(family, "a SYN with RST", TCP, Method::Masq);
    case = passes(case, Method::Masq, family.request(), tcp("S"), segment(family, "S").opening_active());
    case = passes(case, Method::Masq, family.request(), tcp("A"), segment(family, "A"));
    case = passes(case, Method::Masq, family.request(), tcp("SR"), segment(family, "SR").calming());
    // One that is over ends, as for any SYN; but this one opens none in its place.
    let again = family.request().tcp("SR", b"");
    let counts = Counts::of(Reason::NoConnection).at(0, DestCounts::default().ending_inactive());
    case.arrives(Wire::Outside, again.clone(), Verdict::Pass, again, counts)
}

fn remove(family: Family, change: &mut Change<'_>) {
    change.delete_dest(family.key(TCP), family.at(0, PORT)).expect("there");
}

fn removed_destination(family: Family, method: Method) -> Case {
    let mut case = one(family, format!("{method}: a destination is removed and comes back"), TCP, method);
    case = passes(case, method, family.request(), tcp("S"), segment(family, "S").opening_active());
    case = passes(case, method, family.request(), tcp("A"), segment(family, "A"));
    case = case.change(move |change| remove(family, change));
    case = case.stops(Wire::Outside, family.request().tcp("A", b""), Reason::DestinationRemoved);
    case = case.stops(Wire::Outside, family.request().tcp("S", b""), Reason::DestinationRemoved);
    // Its connections go on when it is back, and their time has run meanwhile.
    case = case.pass(800).stops(Wire::Outside, family.request().tcp("A", b""), Reason::DestinationRemoved);
    case =
        case.change(move |change| change.add_dest(family.key(TCP), family.at(0, PORT), dest(method, 1)).expect("new"));
    case = passes(case, method, family.request(), tcp("A"), segment(family, "A"));
    case = case.change(move |change| remove(family, change)).pass(902);
    let late = family.request().tcp("A", b"");
    let counts = Counts::of(Reason::NoConnection).at(0, DestCounts::default().ending_active());
    case.arrives(Wire::Outside, late.clone(), Verdict::Pass, late, counts)
}

/// What is on its way back from a removed server reaches the client, and is not counted.
fn replies_of_a_removed_destination(family: Family) -> Case {
    let mut case = one(family, "nat: replies of a removed destination", TCP, Method::Masq);
    case = passes(case, Method::Masq, family.request(), tcp("S"), segment(family, "S").opening_active());
    case = replies(case, family.reply().tcp("SA", b""), family.translated_reply().tcp("SA", b""))
        .change(move |change| remove(family, change));
    let out = family.translated_reply().tcp("PA", b"bye");
    case.arrives(Wire::Inside, family.reply().tcp("PA", b"bye"), OUTSIDE, out, Counts::none())
}

fn removed_service(family: Family, method: Method) -> Case {
    let mut case = one(family, format!("{method}: a service is removed and comes back"), TCP, method);
    case = passes(case, method, family.request(), tcp("S"), segment(family, "S").opening_active());
    case = case.change(move |change| change.delete_service(family.key(TCP)).expect("there"));
    let newcomer = Frame { from: (cast::CLIENT, 1), ..family.request() };
    case = case
        .stops(Wire::Outside, family.request().tcp("A", b""), Reason::DestinationRemoved)
        .stops(Wire::Outside, newcomer.tcp("S", b""), Reason::NotService)
        .stops(Wire::Outside, newcomer.tcp("A", b""), Reason::NoConnection);
    case = case.service(TCP, PORT, &[(0, PORT, method, 1)]);
    case = passes(case, method, family.request(), tcp("A"), segment(family, "A"));
    passes(case, method, newcomer, tcp("S"), segment(family, "S").opening_active())
}

fn no_destination(case: Case, request: Frame, build: impl Fn(Frame) -> Vec<u8>) -> Case {
    let frame = build(request);
    let error = error_for_client(request.family, Says::PortUnreachable, &frame);
    case.answers(Wire::Outside, frame, Verdict::Transmit, error, Counts::answered(Reason::NoDestination))
}

/// Weight 0: connections stay, and there are no new ones.
fn quiescent(family: Family, method: Method) -> Case {
    let mut case = one(family, format!("{method}: weight 0"), TCP, method);
    case = passes(case, method, family.request(), tcp("S"), segment(family, "S").opening_active());
    case = case
        .change(move |change| change.edit_dest(family.key(TCP), family.at(0, PORT), dest(method, 0)).expect("there"));
    let newcomer = Frame { from: (cast::CLIENT, 1), ..family.request() };
    case = passes(case, method, family.request(), tcp("A"), segment(family, "A"));
    case = no_destination(case, newcomer, tcp("S"));
    // What opens no connection is the host's, servers or not.
    case = case.stops(Wire::Outside, newcomer.tcp("R", b""), Reason::NoConnection);
    case = case
        .change(move |change| change.edit_dest(family.key(TCP), family.at(0, PORT), dest(method, 5)).expect("there"));
    passes(case, method, newcomer, tcp("S"), segment(family, "S").opening_active())
}

/// A destination with another method: connections keep the one they have.
fn mode_changed(family: Family, method: Method) -> Case {
    let other = if method == Method::Route { Method::Masq } else { Method::Route };
    let mut case = one(family, format!("{method}: a destination's method is changed"), TCP, method);
    case = passes(case, method, family.request(), tcp("S"), segment(family, "S").opening_active());
    case = case
        .change(move |change| change.edit_dest(family.key(TCP), family.at(0, PORT), dest(other, 1)).expect("there"));
    case = passes(case, method, family.request(), tcp("A"), segment(family, "A"));
    if method == Method::Masq {
        case = replies(case, family.reply().tcp("SA", b""), family.translated_reply().tcp("SA", b""));
    }
    let newcomer = Frame { from: (cast::CLIENT, 1), ..family.request() };
    passes(case, other, newcomer, tcp("S"), segment(family, "S").opening_active())
}

/// Three servers and three methods in one service, newest first.
fn in_turn(family: Family) -> Case {
    let dests: Vec<_> = (0..).zip(METHODS).map(|(index, method)| (index, PORT, method, 1)).collect();
    let mut case = Case::new(family, "rr: three servers in turn").service(TCP, PORT, &dests);
    for number in 0..6 {
        let request = Frame { from: (cast::CLIENT, CLIENT_PORT + number), ..family.request() };
        let (index, _, method, _) = dests[2 - usize::from(number) % 3];
        let counts = Counts::none().at(index, segment(family, "S").opening_active());
        let out = forwarded(method, index, PORT, request, tcp("S"));
        case = case.arrives(Wire::Outside, request.tcp("S", b""), INSIDE, out, counts);
    }
    case
}

/// Connections of one client port to one port of two addresses stand in one place of the table, and are told apart.
fn one_client_port_to_two_services(family: Family) -> Case {
    let second = SocketAddr::new(family.address(Ipv4Addr::new(10, 9, 9, 10)), PORT);
    let mut case =
        one(family, "one client port to services at two addresses", TCP, Method::Route).change(move |change| {
            let key = ServiceKey { protocol: TCP, address: second };
            change.add_service(key, scheduled(Scheduler::Rr)).expect("new");
            change.add_dest(key, family.at(1, PORT), dest(Method::Route, 1)).expect("new");
        });
    let others = Frame { to: (Ipv4Addr::new(10, 9, 9, 10), PORT), ..family.request() };
    for (flags, counts) in
        [("S", segment(family, "S").opening_active()), ("A", segment(family, "A")), ("A", segment(family, "A"))]
    {
        for (index, request) in [(0, family.request()), (1, others)] {
            let out = forwarded(Method::Route, index, PORT, request, tcp(flags));
            case = case.arrives(Wire::Outside, request.tcp(flags, b""), INSIDE, out, Counts::none().at(index, counts));
        }
    }
    case
}

/// A client of the cases of full tables, in which all connections have the same two buckets.
fn numbered(family: Family, number: u16) -> Frame {
    Frame { from: (cast::CLIENT, CLIENT_PORT + number), ..family.request() }
}

/// Opens a TCP connection and establishes it. The first packet counts as `opened` says.
fn established(case: Case, method: Method, number: u16, opened: Counts) -> Case {
    let family = case.family;
    let out = forwarded(method, 0, PORT, numbered(family, number), tcp("S"));
    let case = case.arrives(Wire::Outside, numbered(family, number).tcp("S", b""), INSIDE, out, opened);
    passes(case, method, numbered(family, number), tcp("A"), segment(family, "A"))
}

/// A packet that there is no room for is forwarded all the same, unless its answer would have to be translated: then it stops
/// for `reason`.
fn has_no_room(case: Case, method: Method, request: Frame, build: impl Fn(Frame) -> Vec<u8>, reason: Reason) -> Case {
    let frame = build(request);
    if method == Method::Masq {
        return case.stops(Wire::Outside, frame, reason);
    }
    let counts = Counts { stateless: 1, ..Counts::none().at(0, DestCounts::input(&frame)) };
    case.arrives(Wire::Outside, frame, INSIDE, forwarded(method, 0, PORT, request, build), counts)
}

/// Twenty established connections fill the table. One whose time is over makes room, no other does.
fn full_table(family: Family, method: Method) -> Case {
    let mut case = one(family, format!("{method}: a full table"), TCP, method);
    for number in 0..20 {
        case = established(case, method, number, Counts::none().at(0, segment(family, "S").opening_active()));
    }
    case = has_no_room(case, method, numbered(family, 20), tcp("S"), Reason::TableFull);
    // All that follows goes the same way, also what opens no connection.
    for flags in ["A", "FA", "R"] {
        case = has_no_room(case, method, numbered(family, 20), tcp(flags), Reason::NoConnection);
    }
    // Strangers cannot be answered, in a full table or not.
    for from in [(Ipv4Addr::UNSPECIFIED, 1), (Ipv4Addr::LOCALHOST, 1), (cast::CLIENT, 20)] {
        case = case.stops(Wire::Outside, Frame { from, ..family.request() }.tcp("A", b""), Reason::NoConnection);
    }
    case = case.pass(800);
    for number in 1..20 {
        case = passes(case, method, numbered(family, number), tcp("A"), segment(family, "A"));
    }
    // There is room when the first is over: for what opens a connection.
    case = case.pass(102).stops(Wire::Outside, numbered(family, 20).tcp("A", b""), Reason::NoConnection);
    let counts = DestCounts { active: 0, ..segment(family, "S").opening_active() };
    case = established(case, method, 20, Counts::none().at(0, counts));
    case = has_no_room(case, method, numbered(family, 0), tcp("A"), Reason::NoConnection);
    for number in 1..21 {
        case = passes(case, method, numbered(family, number), tcp("A"), segment(family, "A"));
    }
    // Nowhere to go: what opens a connection is told, what does not is the host's.
    case = case
        .change(move |change| change.edit_dest(family.key(TCP), family.at(0, PORT), dest(method, 0)).expect("there"));
    case = no_destination(case, numbered(family, 0), tcp("S"));
    case = case.stops(Wire::Outside, numbered(family, 0).tcp("A", b""), Reason::NoConnection);
    passes(case, method, numbered(family, 1), tcp("A"), segment(family, "A"))
}

/// Connections that are not established make room: those that have not been yet before those that no longer are.
fn making_room(family: Family, method: Method) -> Case {
    let mut case = one(family, format!("{method}: connections make room"), TCP, method);
    for number in 0..16 {
        case = established(case, method, number, Counts::none().at(0, segment(family, "S").opening_active()));
    }
    let open =
        |case, number| passes(case, method, numbered(family, number), tcp("S"), segment(family, "S").opening_active());
    // Half-closed, reset, and two that are half-open.
    for (number, flags) in [(16, "FA"), (17, "R")] {
        case = established(case, method, number, Counts::none().at(0, segment(family, "S").opening_active()));
        case = passes(case, method, numbered(family, number), tcp(flags), segment(family, flags).calming());
    }
    case = open(case, 18).pass(5);
    case = open(case, 19);
    // Whoever makes room was active, or was not.
    let evicting = |active: i64, inactive: i64| {
        let counts = DestCounts { active: 1 - active, inactive: -inactive, ..segment(family, "S").opening_active() };
        Counts { evicted: 1, ..Counts::none().at(0, counts) }
    };
    for (turn, evicted) in [18, 19, 17, 16].into_iter().enumerate() {
        let counts = if evicted >= 18 { evicting(1, 0) } else { evicting(0, 1) };
        case = established(case, method, 20 + turn as u16, counts);
        case = has_no_room(case, method, numbered(family, evicted), tcp("A"), Reason::NoConnection);
    }
    case = has_no_room(case, method, numbered(family, 24), tcp("S"), Reason::TableFull);
    for number in (0..16).chain(20..24) {
        case = passes(case, method, numbered(family, number), tcp("A"), segment(family, "A"));
    }
    case
}

/// UDP connections make room when half their time has passed without a packet.
fn idle_udp_makes_room(family: Family, method: Method) -> Case {
    let mut case = one(family, format!("{method}: UDP connections make room"), UDP, method);
    let build = |frame: Frame| frame.udp(b"hello");
    let counts = DestCounts::input(&build(family.request()));
    for number in 0..20 {
        case = passes(case, method, numbered(family, number), build, counts.opening_inactive());
    }
    case = has_no_room(case, method, numbered(family, 20), build, Reason::TableFull).pass(timeout::UDP_S / 2 - 5);
    case = has_no_room(case, method, numbered(family, 20), build, Reason::TableFull);
    for number in 1..20 {
        case = passes(case, method, numbered(family, number), build, counts);
    }
    case = case.pass(10);
    let out = forwarded(method, 0, PORT, numbered(family, 20), build);
    let counts = DestCounts { inactive: 0, ..counts.opening_inactive() };
    let counts = Counts { evicted: 1, ..Counts::none().at(0, counts) };
    case = case.arrives(Wire::Outside, build(numbered(family, 20)), INSIDE, out, counts);
    has_no_room(case, method, numbered(family, 0), build, Reason::TableFull)
}

/// A client on the director itself, for whom there is no room, gets to servers on it and to no other.
fn full_table_on_this_host(family: Family) -> Case {
    let request = |number: u16| Frame { from: (Ipv4Addr::LOCALHOST, CLIENT_PORT + number), ..family.request() };
    let server = cast::special::LOCAL;
    let mut case = Case::new(family, "a full table, and a client on the director");
    case = case.service(TCP, PORT, &[(server, PORT, Method::Route, 1)]);
    for number in 0..20 {
        for (flags, counts) in [("S", segment(family, "S").opening_active()), ("A", segment(family, "A"))] {
            let counts = Counts::of(Reason::LocalDelivery).at(server, counts);
            let frame = request(number).tcp(flags, b"");
            case = case.arrives(Wire::Loopback, frame.clone(), Verdict::Pass, frame, counts);
        }
    }
    let frame = request(20).tcp("S", b"");
    let counts = Counts { stateless: 1, ..Counts::of(Reason::LocalDelivery).at(server, segment(family, "S")) };
    case = case.arrives(Wire::Loopback, frame.clone(), Verdict::Pass, frame, counts);
    case = case.change(move |change| {
        change.add_dest(family.key(TCP), family.at(0, PORT), dest(Method::Route, 1)).expect("new");
        change.delete_dest(family.key(TCP), family.at(server, PORT)).expect("there");
    });
    case.stops(Wire::Loopback, request(20).tcp("S", b""), Reason::SourceAddress)
}

/// A packet for a service, and a masqueraded server's, with a wrong IP header checksum: nothing about it can be believed.
fn wrong_ip_checksums(family: Family) -> Case {
    let mut case = one(family, "wrong IP header checksums", TCP, Method::Masq);
    let spoil = |mut frame: Vec<u8>, offset: usize| {
        frame[ETHERNET + offset] ^= 0x10;
        frame
    };
    let with_options = Frame { options: &[1, 1, 1, 1], ..family.request() };
    case = case
        .stops(Wire::Outside, spoil(family.request().tcp("S", b""), 11), Reason::IpChecksum)
        .stops(Wire::Outside, spoil(family.request().tcp("S", b""), 8), Reason::IpChecksum)
        .stops(Wire::Outside, spoil(with_options.tcp("S", b""), 21), Reason::IpChecksum);
    case = passes(case, Method::Masq, family.request(), tcp("S"), segment(family, "S").opening_active());
    case.stops(Wire::Outside, spoil(family.request().tcp("A", b""), 1), Reason::IpChecksum)
        .stops(Wire::Outside, spoil(with_options.tcp("A", b""), 20), Reason::IpChecksum)
        .stops(Wire::Inside, spoil(family.reply().tcp("SA", b""), 10), Reason::IpChecksum)
}
