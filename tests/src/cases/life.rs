//! Connections from their first packet to their end, and what changes of the configuration do to them.

use std::net::{Ipv4Addr, SocketAddr};

use lb_common::{
    proto::{Method, Protocol},
    reason::Reason,
    tcp::State,
    timeout,
};

use super::*;

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for method in METHODS {
        cases.extend([ended_by_time_tcp(method), ended_by_time_udp(method), removed_destination(method)]);
        cases.extend([removed_service(method), quiescent(method), mode_changed(method)]);
        cases.extend([full_table(method), making_room(method), idle_udp_makes_room(method)]);
    }
    cases.extend([
        kept_by_replies(),
        shorter_timeouts(),
        port_reuse(Method::Masq, 1),
        port_reuse(Method::Route, 1),
        port_reuse(Method::Masq, 0),
        reuse_of_fin_wait(1),
        reuse_of_fin_wait(2),
        reset_instead_of_reuse(),
        replies_of_a_removed_destination(),
        in_turn(),
        one_client_port_to_two_services(),
        full_table_on_this_host(),
        wrong_ip_checksums(),
    ]);
    cases
}

const fn tcp(flags: &'static str) -> impl Fn(Frame) -> Vec<u8> {
    move |frame: Frame| frame.tcp(flags, b"")
}

fn segment(flags: &'static str) -> DestCounts {
    DestCounts::input(&REQUEST.tcp(flags, b""))
}

/// The client and the server take turns; only the client is heard of a server that is not masqueraded.
fn ended_by_time_tcp(method: Method) -> Case {
    // The client's segments, the state that they lead to, and one that leaves it there.
    let fin = if method == Method::Masq { State::CloseWait } else { State::FinWait };
    let mut case = one(format!("{method}: TCP connections end by time"), TCP, method);
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
        let request = Frame { from: (cast::CLIENT, CLIENT_PORT + number as u16), ..REQUEST };
        let active = matches!(state, State::SynRecv | State::Established);
        for (turn, flags) in flags.iter().enumerate() {
            let counts = segment(flags);
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
            case = passes(case, method, request, tcp(probe), segment(probe));
        }
        // A connection lives up to a second longer than its time, and no two.
        case = case.pass(state.default_timeout_s() + 2);
        let late = request.tcp(probe, b"");
        case = if probe == "S" {
            let counts = DestCounts { active: 0, ..segment(probe).opening_active() };
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

fn ended_by_time_udp(method: Method) -> Case {
    let mut case = Case::new(format!("{method}: UDP connections end by time"));
    case = case.service(UDP, PORT, &[(1, PORT, method, 1), (0, PORT, method, 1)]);
    let build = |frame: Frame| frame.udp(b"hello");
    let counts = DestCounts::input(&build(REQUEST));
    case = passes(case, method, REQUEST, build, counts.opening_inactive());
    for _ in 0..2 {
        case = case.pass(timeout::UDP_S - 1);
        case = passes(case, method, REQUEST, build, counts);
    }
    // The next is another connection, and the other server's turn.
    case = case.pass(timeout::UDP_S + 2);
    let counts = Counts::none().at(0, DestCounts::default().ending_inactive()).at(1, counts.opening_inactive());
    case.arrives(Wire::Outside, build(REQUEST), INSIDE, forwarded(method, 1, PORT, REQUEST, build), counts)
}

fn kept_by_replies() -> Case {
    let mut case = one("nat: replies keep a connection alive", UDP, Method::Masq);
    let build = |frame: Frame| frame.udp(b"hello");
    let counts = DestCounts::input(&build(REQUEST));
    case = passes(case, Method::Masq, REQUEST, build, counts.opening_inactive());
    for _ in 0..3 {
        case = case.pass(timeout::UDP_S - 1);
        case = replies(case, REPLY.udp(b"x"), TRANSLATED_REPLY.udp(b"x"));
    }
    case = case.pass(timeout::UDP_S + 2);
    let reply = REPLY.udp(b"x");
    let ended = DestCounts::default().ending_inactive();
    case.arrives(Wire::Inside, reply.clone(), Verdict::Pass, reply, Counts::of(Reason::NotService).at(0, ended))
}

/// A changed timeout applies from the next packet on.
fn shorter_timeouts() -> Case {
    let mut case = one("shorter timeouts", TCP, Method::Masq);
    for (flags, counts) in [("S", segment("S").opening_active()), ("A", segment("A"))] {
        case = passes(case, Method::Masq, REQUEST, tcp(flags), counts);
    }
    case = case.set(|config, hz| {
        config.timeouts[timeout::index(Protocol::Tcp, State::Established as u8)].store(30 * hz);
    });
    // The connection still has its 900 seconds.
    case = case.pass(800);
    case = passes(case, Method::Masq, REQUEST, tcp("A"), segment("A")).pass(29);
    case = passes(case, Method::Masq, REQUEST, tcp("A"), segment("A")).pass(32);
    let late = REQUEST.tcp("A", b"");
    let counts = Counts::of(Reason::NoConnection).at(0, DestCounts::default().ending_active());
    case.arrives(Wire::Outside, late.clone(), Verdict::Pass, late, counts)
}

/// A SYN that meets a connection which is over opens another one, at the next server; unless that is switched off.
fn port_reuse(method: Method, mode: u32) -> Case {
    let mut case = Case::new(format!("{method}: a client's port is used again, conn_reuse_mode {mode}"));
    case = case.service(TCP, PORT, &[(1, PORT, method, 1), (0, PORT, method, 1)]);
    case = case.set(move |config, _| config.conn_reuse_mode.store(mode));
    case = passes(case, method, REQUEST, tcp("S"), segment("S").opening_active());
    // In SYN_RECV and ESTABLISHED it is the same connection.
    for (flags, counts) in
        [("S", segment("S")), ("A", segment("A")), ("S", segment("S")), ("R", segment("R").calming())]
    {
        case = passes(case, method, REQUEST, tcp(flags), counts);
    }
    if mode == 0 {
        let counts = DestCounts { active: 1, inactive: -1, ..segment("S") };
        return passes(case, method, REQUEST, tcp("S"), counts);
    }
    let counts = Counts::none().at(0, DestCounts::default().ending_inactive()).at(1, segment("S").opening_active());
    let build = tcp("S");
    case.arrives(Wire::Outside, build(REQUEST), INSIDE, forwarded(method, 1, PORT, REQUEST, build), counts)
}

/// In FIN_WAIT of a server that is not seen only mode 2 says so.
fn reuse_of_fin_wait(mode: u32) -> Case {
    let method = Method::Route;
    let mut case = one(format!("{method}: a SYN in FIN_WAIT, conn_reuse_mode {mode}"), TCP, method);
    case = case.set(move |config, _| config.conn_reuse_mode.store(mode));
    for (flags, counts) in [("S", segment("S").opening_active()), ("A", segment("A")), ("F", segment("F").calming())] {
        case = passes(case, method, REQUEST, tcp(flags), counts);
    }
    let connections = i64::from(mode == 2);
    passes(case, method, REQUEST, tcp("S"), DestCounts { connections, active: 1, inactive: -1, ..segment("S") })
}

/// A reset is a reset, whatever else it says.
fn reset_instead_of_reuse() -> Case {
    let mut case = one("a SYN with RST", TCP, Method::Masq);
    case = passes(case, Method::Masq, REQUEST, tcp("S"), segment("S").opening_active());
    case = passes(case, Method::Masq, REQUEST, tcp("A"), segment("A"));
    case = passes(case, Method::Masq, REQUEST, tcp("SR"), segment("SR").calming());
    passes(case, Method::Masq, REQUEST, tcp("SR"), segment("SR"))
}

fn remove(change: &mut Change<'_>) {
    change.delete_dest(key(TCP), at(0, PORT)).expect("there");
}

fn removed_destination(method: Method) -> Case {
    let mut case = one(format!("{method}: a destination is removed and comes back"), TCP, method);
    case = passes(case, method, REQUEST, tcp("S"), segment("S").opening_active());
    case = passes(case, method, REQUEST, tcp("A"), segment("A"));
    case = case.change(remove);
    case = case.stops(Wire::Outside, REQUEST.tcp("A", b""), Reason::DestinationRemoved);
    case = case.stops(Wire::Outside, REQUEST.tcp("S", b""), Reason::DestinationRemoved);
    // Its connections go on when it is back, and their time has run meanwhile.
    case = case.pass(800).stops(Wire::Outside, REQUEST.tcp("A", b""), Reason::DestinationRemoved);
    case = case.change(move |change| change.add_dest(key(TCP), at(0, PORT), dest(method, 1)).expect("new"));
    case = passes(case, method, REQUEST, tcp("A"), segment("A"));
    case = case.change(remove).pass(902);
    let late = REQUEST.tcp("A", b"");
    let counts = Counts::of(Reason::NoConnection).at(0, DestCounts::default().ending_active());
    case.arrives(Wire::Outside, late.clone(), Verdict::Pass, late, counts)
}

/// What is on its way back from a removed server reaches the client, and is not counted.
fn replies_of_a_removed_destination() -> Case {
    let mut case = one("nat: replies of a removed destination", TCP, Method::Masq);
    case = passes(case, Method::Masq, REQUEST, tcp("S"), segment("S").opening_active());
    case = replies(case, REPLY.tcp("SA", b""), TRANSLATED_REPLY.tcp("SA", b"")).change(remove);
    let out = TRANSLATED_REPLY.tcp("PA", b"bye");
    case.arrives(Wire::Inside, REPLY.tcp("PA", b"bye"), OUTSIDE, out, Counts::none())
}

fn removed_service(method: Method) -> Case {
    let mut case = one(format!("{method}: a service is removed and comes back"), TCP, method);
    case = passes(case, method, REQUEST, tcp("S"), segment("S").opening_active());
    case = case.change(|change| change.delete_service(key(TCP)).expect("there"));
    let newcomer = Frame { from: (cast::CLIENT, 1), ..REQUEST };
    case = case
        .stops(Wire::Outside, REQUEST.tcp("A", b""), Reason::DestinationRemoved)
        .stops(Wire::Outside, newcomer.tcp("S", b""), Reason::NotService)
        .stops(Wire::Outside, newcomer.tcp("A", b""), Reason::NoConnection);
    case = case.service(TCP, PORT, &[(0, PORT, method, 1)]);
    case = passes(case, method, REQUEST, tcp("A"), segment("A"));
    passes(case, method, newcomer, tcp("S"), segment("S").opening_active())
}

fn no_destination(case: Case, request: Frame, build: impl Fn(Frame) -> Vec<u8>) -> Case {
    let frame = build(request);
    let error = error_for_client(3, 3, [0; 4], &frame);
    case.answers(Wire::Outside, frame, Verdict::Transmit, error, Counts::answered(Reason::NoDestination))
}

/// Weight 0: connections stay, and there are no new ones.
fn quiescent(method: Method) -> Case {
    let mut case = one(format!("{method}: weight 0"), TCP, method);
    case = passes(case, method, REQUEST, tcp("S"), segment("S").opening_active());
    case = case.change(move |change| change.edit_dest(key(TCP), at(0, PORT), dest(method, 0)).expect("there"));
    let newcomer = Frame { from: (cast::CLIENT, 1), ..REQUEST };
    case = passes(case, method, REQUEST, tcp("A"), segment("A"));
    case = no_destination(case, newcomer, tcp("S"));
    // What opens no connection is the host's, servers or not.
    case = case.stops(Wire::Outside, newcomer.tcp("R", b""), Reason::NoConnection);
    case = case.change(move |change| change.edit_dest(key(TCP), at(0, PORT), dest(method, 5)).expect("there"));
    passes(case, method, newcomer, tcp("S"), segment("S").opening_active())
}

/// A destination with another method: connections keep the one they have.
fn mode_changed(method: Method) -> Case {
    let other = if method == Method::Route { Method::Masq } else { Method::Route };
    let mut case = one(format!("{method}: a destination's method is changed"), TCP, method);
    case = passes(case, method, REQUEST, tcp("S"), segment("S").opening_active());
    case = case.change(move |change| change.edit_dest(key(TCP), at(0, PORT), dest(other, 1)).expect("there"));
    case = passes(case, method, REQUEST, tcp("A"), segment("A"));
    if method == Method::Masq {
        case = replies(case, REPLY.tcp("SA", b""), TRANSLATED_REPLY.tcp("SA", b""));
    }
    let newcomer = Frame { from: (cast::CLIENT, 1), ..REQUEST };
    passes(case, other, newcomer, tcp("S"), segment("S").opening_active())
}

/// Three servers and three methods in one service, newest first.
fn in_turn() -> Case {
    let dests: Vec<_> = (0..).zip(METHODS).map(|(index, method)| (index, PORT, method, 1)).collect();
    let mut case = Case::new("rr: three servers in turn").service(TCP, PORT, &dests);
    for number in 0..6 {
        let request = Frame { from: (cast::CLIENT, CLIENT_PORT + number), ..REQUEST };
        let (index, _, method, _) = dests[2 - usize::from(number) % 3];
        let counts = Counts::none().at(index, segment("S").opening_active());
        let out = forwarded(method, index, PORT, request, tcp("S"));
        case = case.arrives(Wire::Outside, request.tcp("S", b""), INSIDE, out, counts);
    }
    case
}

/// Connections of one client port to one port of two addresses stand in one place of the table, and are told apart.
fn one_client_port_to_two_services() -> Case {
    let second = SocketAddr::from((Ipv4Addr::new(10, 9, 9, 10), PORT));
    let mut case = one("one client port to services at two addresses", TCP, Method::Route).change(move |change| {
        let key = ServiceKey { protocol: TCP, address: second };
        change.add_service(key, scheduled(Scheduler::Rr)).expect("new");
        change.add_dest(key, at(1, PORT), dest(Method::Route, 1)).expect("new");
    });
    let others = Frame { to: (Ipv4Addr::new(10, 9, 9, 10), PORT), ..REQUEST };
    for (flags, counts) in [("S", segment("S").opening_active()), ("A", segment("A")), ("A", segment("A"))] {
        for (index, request) in [(0, REQUEST), (1, others)] {
            let out = forwarded(Method::Route, index, PORT, request, tcp(flags));
            case = case.arrives(Wire::Outside, request.tcp(flags, b""), INSIDE, out, Counts::none().at(index, counts));
        }
    }
    case
}

/// A client of the cases of full tables, in which all connections have the same two buckets.
fn numbered(number: u16) -> Frame {
    Frame { from: (cast::CLIENT, CLIENT_PORT + number), ..REQUEST }
}

/// Opens a TCP connection and establishes it. The first packet counts as `opened` says.
fn established(case: Case, method: Method, number: u16, opened: Counts) -> Case {
    let out = forwarded(method, 0, PORT, numbered(number), tcp("S"));
    let case = case.arrives(Wire::Outside, numbered(number).tcp("S", b""), INSIDE, out, opened);
    passes(case, method, numbered(number), tcp("A"), segment("A"))
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
fn full_table(method: Method) -> Case {
    let mut case = one(format!("{method}: a full table"), TCP, method);
    for number in 0..20 {
        case = established(case, method, number, Counts::none().at(0, segment("S").opening_active()));
    }
    case = has_no_room(case, method, numbered(20), tcp("S"), Reason::TableFull);
    // All that follows goes the same way, also what opens no connection.
    for flags in ["A", "FA", "R"] {
        case = has_no_room(case, method, numbered(20), tcp(flags), Reason::NoConnection);
    }
    // Strangers cannot be answered, in a full table or not.
    for from in [(Ipv4Addr::UNSPECIFIED, 1), (Ipv4Addr::LOCALHOST, 1), (cast::CLIENT, 20)] {
        case = case.stops(Wire::Outside, Frame { from, ..REQUEST }.tcp("A", b""), Reason::NoConnection);
    }
    case = case.pass(800);
    for number in 1..20 {
        case = passes(case, method, numbered(number), tcp("A"), segment("A"));
    }
    // There is room when the first is over: for what opens a connection.
    case = case.pass(102).stops(Wire::Outside, numbered(20).tcp("A", b""), Reason::NoConnection);
    let counts = DestCounts { active: 0, ..segment("S").opening_active() };
    case = established(case, method, 20, Counts::none().at(0, counts));
    case = has_no_room(case, method, numbered(0), tcp("A"), Reason::NoConnection);
    for number in 1..21 {
        case = passes(case, method, numbered(number), tcp("A"), segment("A"));
    }
    // Nowhere to go: what opens a connection is told, what does not is the host's.
    case = case.change(move |change| change.edit_dest(key(TCP), at(0, PORT), dest(method, 0)).expect("there"));
    case = no_destination(case, numbered(0), tcp("S"));
    case = case.stops(Wire::Outside, numbered(0).tcp("A", b""), Reason::NoConnection);
    passes(case, method, numbered(1), tcp("A"), segment("A"))
}

/// Connections that are not established make room: those that have not been yet before those that no longer are.
fn making_room(method: Method) -> Case {
    let mut case = one(format!("{method}: connections make room"), TCP, method);
    for number in 0..16 {
        case = established(case, method, number, Counts::none().at(0, segment("S").opening_active()));
    }
    let open = |case, number| passes(case, method, numbered(number), tcp("S"), segment("S").opening_active());
    // Half-closed, reset, and two that are half-open.
    for (number, flags) in [(16, "FA"), (17, "R")] {
        case = established(case, method, number, Counts::none().at(0, segment("S").opening_active()));
        case = passes(case, method, numbered(number), tcp(flags), segment(flags).calming());
    }
    case = open(case, 18).pass(5);
    case = open(case, 19);
    // Whoever makes room was active, or was not.
    let evicting = |active: i64, inactive: i64| {
        let counts = DestCounts { active: 1 - active, inactive: -inactive, ..segment("S").opening_active() };
        Counts { evicted: 1, ..Counts::none().at(0, counts) }
    };
    for (turn, evicted) in [18, 19, 17, 16].into_iter().enumerate() {
        let counts = if evicted >= 18 { evicting(1, 0) } else { evicting(0, 1) };
        case = established(case, method, 20 + turn as u16, counts);
        case = has_no_room(case, method, numbered(evicted), tcp("A"), Reason::NoConnection);
    }
    case = has_no_room(case, method, numbered(24), tcp("S"), Reason::TableFull);
    for number in (0..16).chain(20..24) {
        case = passes(case, method, numbered(number), tcp("A"), segment("A"));
    }
    case
}

/// UDP connections make room when half their time has passed without a packet.
fn idle_udp_makes_room(method: Method) -> Case {
    let mut case = one(format!("{method}: UDP connections make room"), UDP, method);
    let build = |frame: Frame| frame.udp(b"hello");
    let counts = DestCounts::input(&build(REQUEST));
    for number in 0..20 {
        case = passes(case, method, numbered(number), build, counts.opening_inactive());
    }
    case = has_no_room(case, method, numbered(20), build, Reason::TableFull).pass(timeout::UDP_S / 2 - 5);
    case = has_no_room(case, method, numbered(20), build, Reason::TableFull);
    for number in 1..20 {
        case = passes(case, method, numbered(number), build, counts);
    }
    case = case.pass(10);
    let out = forwarded(method, 0, PORT, numbered(20), build);
    let counts = DestCounts { inactive: 0, ..counts.opening_inactive() };
    let counts = Counts { evicted: 1, ..Counts::none().at(0, counts) };
    case = case.arrives(Wire::Outside, build(numbered(20)), INSIDE, out, counts);
    has_no_room(case, method, numbered(0), build, Reason::TableFull)
}

/// A client on the director itself, for whom there is no room, gets to servers on it and to no other.
fn full_table_on_this_host() -> Case {
    let request = |number: u16| Frame { from: (Ipv4Addr::LOCALHOST, CLIENT_PORT + number), ..REQUEST };
    let server = cast::special::LOCAL;
    let mut case = Case::new("a full table, and a client on the director");
    case = case.service(TCP, PORT, &[(server, PORT, Method::Route, 1)]);
    for number in 0..20 {
        for (flags, counts) in [("S", segment("S").opening_active()), ("A", segment("A"))] {
            let counts = Counts::of(Reason::LocalDelivery).at(server, counts);
            let frame = request(number).tcp(flags, b"");
            case = case.arrives(Wire::Loopback, frame.clone(), Verdict::Pass, frame, counts);
        }
    }
    let frame = request(20).tcp("S", b"");
    let counts = Counts { stateless: 1, ..Counts::of(Reason::LocalDelivery).at(server, segment("S")) };
    case = case.arrives(Wire::Loopback, frame.clone(), Verdict::Pass, frame, counts);
    case = case.change(move |change| {
        change.add_dest(key(TCP), at(0, PORT), dest(Method::Route, 1)).expect("new");
        change.delete_dest(key(TCP), at(server, PORT)).expect("there");
    });
    case.stops(Wire::Loopback, request(20).tcp("S", b""), Reason::SourceAddress)
}

/// A packet for a service, and a masqueraded server's, with a wrong IP header checksum: nothing about it can be believed.
fn wrong_ip_checksums() -> Case {
    let mut case = one("wrong IP header checksums", TCP, Method::Masq);
    let spoil = |mut frame: Vec<u8>, offset: usize| {
        frame[ETHERNET + offset] ^= 0x10;
        frame
    };
    let with_options = Frame { options: &[1, 1, 1, 1], ..REQUEST };
    case = case
        .stops(Wire::Outside, spoil(REQUEST.tcp("S", b""), 11), Reason::IpChecksum)
        .stops(Wire::Outside, spoil(REQUEST.tcp("S", b""), 8), Reason::IpChecksum)
        .stops(Wire::Outside, spoil(with_options.tcp("S", b""), 21), Reason::IpChecksum);
    case = passes(case, Method::Masq, REQUEST, tcp("S"), segment("S").opening_active());
    case.stops(Wire::Outside, spoil(REQUEST.tcp("A", b""), 1), Reason::IpChecksum)
        .stops(Wire::Outside, spoil(with_options.tcp("A", b""), 20), Reason::IpChecksum)
        .stops(Wire::Inside, spoil(REPLY.tcp("SA", b""), 10), Reason::IpChecksum)
}
