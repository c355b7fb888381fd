//! ICMP: errors that the director sends, and messages that it relays or leaves alone.

use std::net::Ipv4Addr;

use lb_common::{proto::Method, reason::Reason};

use super::*;
use crate::{cast::special, frames::padded};

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for method in METHODS {
        for protocol in [TCP, UDP] {
            cases.push(about_a_reply(method, protocol));
        }
        cases.push(about_a_reply_of_a_removed_destination(method));
    }
    cases.extend([
        no_destination(),
        rate_limit(),
        senders_who_are_not_told(),
        about_a_request(TCP),
        about_a_request(UDP),
        about_mapped_ports(),
        wrong_checksums(),
        left_alone(),
        quotes_that_say_too_little(),
        relayed_by_unknown_neighbours(),
        about_a_tunnel(TCP),
        about_a_tunnel(UDP),
        limit_of_errors_about_tunnels(),
        path_mtu_of_a_tunnel(),
    ]);
    cases
}

/// A service without usable servers tells every client so, TCP and UDP alike.
fn no_destination() -> Case {
    let mut case = Case::new("no destination").service(TCP, PORT, &[]).service(
        UDP,
        PORT,
        &[(0, PORT, Method::Masq, 0), (1, PORT, Method::Route, 0)],
    );
    for frame in [
        REQUEST.tcp("S", b""),
        Frame { dscp: 0x2e, ecn: 1, id: 7, dont_fragment: false, ttl: 1, ..REQUEST }.tcp("S", b"fast open"),
        Frame { options: &[1, 1, 1, 1], ..REQUEST }.udp(b"x"),
        REQUEST.udp(b""),
        // The longest that is quoted whole, and longer ones.
        REQUEST.udp(&[1; 520]),
        REQUEST.udp(&[2; 521]),
        REQUEST.udp(&[3; 1472]),
    ] {
        let error = error_for_client(3, 3, [0; 4], &frame);
        assert!(error.len() <= ETHERNET + 576);
        let counts = Counts::answered(Reason::NoDestination);
        case = case.answers(Wire::Outside, frame, Verdict::Transmit, error, counts);
    }
    // Padding is not quoted.
    let frame = REQUEST.tcp("S", b"");
    let error = error_for_client(3, 3, [0; 4], &frame);
    let counts = Counts::answered(Reason::NoDestination);
    case.answers(Wire::Outside, padded(frame), Verdict::Transmit, error, counts)
}

/// Two errors a second: the third client gets none.
fn rate_limit() -> Case {
    let mut case = Case::new("the limit of ICMP errors").service(TCP, PORT, &[]);
    case = case.set(|config, _| config.icmp_per_second.store(2)).in_a_young_second();
    let frame = REQUEST.tcp("S", b"");
    for _ in 0..2 {
        let error = error_for_client(3, 3, [0; 4], &frame);
        let counts = Counts::answered(Reason::NoDestination);
        case = case.answers(Wire::Outside, frame.clone(), Verdict::Transmit, error, counts);
    }
    case.stops(Wire::Outside, frame.clone(), Reason::NoDestination).stops(Wire::Outside, frame, Reason::NoDestination)
}

/// Nobody hears of an error who is no one host, and no connection is opened for them.
fn senders_who_are_not_told() -> Case {
    let mut case = Case::new("senders of errors who are no host").service(UDP, PORT, &[]);
    for source in [[255, 255, 255, 255], [224, 0, 0, 1], [0, 0, 0, 0]] {
        let frame = Frame { from: (source.into(), CLIENT_PORT), ..REQUEST };
        case = case.stops(Wire::Outside, frame.udp(b"x"), Reason::SourceAddress);
    }
    case
}

fn segment(protocol: Transport, frame: Frame) -> Vec<u8> {
    match protocol {
        TCP => frame.tcp("S", b"some payload"),
        UDP => frame.udp(b"some payload"),
    }
}

fn opened(case: Case, protocol: Transport, method: Method) -> Case {
    let counts = DestCounts::input(&segment(protocol, REQUEST));
    let counts = if protocol == TCP { counts.opening_active() } else { counts.opening_inactive() };
    passes(case, method, REQUEST, |frame| segment(protocol, frame), counts)
}

/// A router between director and client.
const ROUTER: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 99);

/// An error from `from` to the service, as it comes in by the clients' interface.
const fn error_to_service(from: Ipv4Addr) -> Frame {
    Frame { dscp: 0x30, id: 0x99, dont_fragment: false, ..Frame::new(FROM_CLIENT, (from, 0), (cast::VIP, 0)) }
}

/// What a client, or a router on the way, says of what the service has sent: it goes to the server, which learns what it
/// has sent itself when it is masqueraded.
fn about_a_reply(method: Method, protocol: Transport) -> Case {
    let mut case = one(format!("{method}: errors about a {protocol} reply"), protocol, method);
    case = opened(case, protocol, method);
    let reply = segment(protocol, Frame { ttl: 60, ..TRANSLATED_REPLY });
    // The checksum within is of the packet that the client has got.
    let mut original = segment(protocol, Frame { ttl: 60, ..REPLY });
    let checksum = ETHERNET + 20 + if protocol == TCP { 16 } else { 6 };
    original[checksum..checksum + 2].copy_from_slice(&reply[checksum..checksum + 2]);
    for (kind, code, rest) in [(3, 4, [0, 0, 5, 120]), (3, 3, [0; 4]), (4, 0, [0; 4]), (11, 0, [0; 4]), (11, 1, [0; 4])]
    {
        // Eight bytes of the segment, an odd number, all of them.
        for quote in [28, 31, reply.len() - ETHERNET] {
            for from in [cast::CLIENT, ROUTER] {
                let received = error_to_service(from).icmp(kind, code, rest, &reply[ETHERNET..ETHERNET + quote]);
                let shown = if method == Method::Masq { &original } else { &reply };
                let build = |frame: Frame| frame.icmp(kind, code, rest, &shown[ETHERNET..ETHERNET + quote]);
                let out = forwarded(method, 0, 0, error_to_service(from), build);
                let counts = Counts::none().at(0, DestCounts::input(&received));
                case = case.arrives(Wire::Outside, received, INSIDE, out, counts);
            }
        }
    }
    // Errors about errors are not sent: an error that has come too far is dropped.
    let quote = &reply[ETHERNET..ETHERNET + 28];
    let late = Frame { ttl: 1, ..error_to_service(ROUTER) }.icmp(11, 0, [0; 4], quote);
    let shown = if method == Method::Masq { &original } else { &reply };
    // It has been translated by then.
    let left = match method {
        Method::Masq => {
            Frame { ttl: 1, ..error_to_service(ROUTER) }.icmp(11, 0, [0; 4], &shown[ETHERNET..ETHERNET + 28])
        }
        _ => late.clone(),
    };
    let counts = Counts::of(Reason::TtlExpired).at(0, DestCounts::input(&late));
    case = case.arrives(Wire::Outside, late, Verdict::Drop, left, counts);
    // A connection of another client is none of ours.
    let other = Frame { to: (cast::CLIENT, 1), ..TRANSLATED_REPLY };
    let frame = error_to_service(ROUTER).icmp(3, 3, [0; 4], &segment(protocol, other)[ETHERNET..]);
    case.stops(Wire::Outside, frame, Reason::Icmp)
}

fn about_a_reply_of_a_removed_destination(method: Method) -> Case {
    let mut case = one(format!("{method}: an error about a reply of a removed destination"), UDP, method);
    case = opened(case, UDP, method).change(|change| change.delete_dest(key(UDP), at(0, PORT)).expect("there"));
    let reply = segment(UDP, TRANSLATED_REPLY);
    let frame = error_to_service(ROUTER).icmp(3, 3, [0; 4], &reply[ETHERNET..]);
    let left = match method {
        Method::Masq => {
            let mut original = segment(UDP, Frame { ttl: 63, ..REPLY });
            original[ETHERNET + 26..ETHERNET + 28].copy_from_slice(&reply[ETHERNET + 26..ETHERNET + 28]);
            error_to_service(ROUTER).icmp(3, 3, [0; 4], &original[ETHERNET..])
        }
        _ => frame.clone(),
    };
    case.arrives(Wire::Outside, frame, Verdict::Drop, left, Counts::of(Reason::DestinationRemoved))
}

/// What a masqueraded server, or a router before it, says of what the client has sent: it comes from the service, about
/// what the client has sent to it.
fn about_a_request(protocol: Transport) -> Case {
    let mut case = one(format!("nat: errors about a {protocol} request"), protocol, Method::Masq);
    case = opened(case, protocol, Method::Masq);
    let translated = forwarded(Method::Masq, 0, PORT, REQUEST, |frame| segment(protocol, frame));
    let mut request = segment(protocol, Frame { ttl: 63, ..REQUEST });
    let checksum = ETHERNET + 20 + if protocol == TCP { 16 } else { 6 };
    request[checksum..checksum + 2].copy_from_slice(&translated[checksum..checksum + 2]);
    let error = |macs, from| Frame { dont_fragment: false, ..Frame::new(macs, (from, 0), (cast::CLIENT, 0)) };
    for (kind, code, rest) in [(3, 3, [0; 4]), (3, 4, [0, 0, 5, 120]), (4, 0, [0; 4]), (11, 0, [0; 4])] {
        for quote in [28, 33, request.len() - ETHERNET] {
            for from in [cast::server(0), Ipv4Addr::new(10, 2, 0, 254)] {
                let received = error(from_server(0), from);
                let received = received.icmp(kind, code, rest, &translated[ETHERNET..ETHERNET + quote]);
                let out = Frame { ttl: 63, ..error(TO_CLIENT, cast::VIP) };
                let out = out.icmp(kind, code, rest, &request[ETHERNET..ETHERNET + quote]);
                let counts = Counts::none().at(0, DestCounts::output(&received));
                case = case.arrives(Wire::Inside, received, OUTSIDE, out, counts);
            }
        }
    }
    // About what another client has sent, or at another server.
    let other = Frame { from: (cast::CLIENT, 1), to: (cast::server(0), PORT), ..REQUEST };
    let frame = error(from_server(0), cast::server(0)).icmp(3, 3, [0; 4], &segment(protocol, other)[ETHERNET..]);
    case = case.stops(Wire::Inside, frame, Reason::Icmp);
    let other = Frame { to: (cast::server(1), PORT), ..REQUEST };
    let frame = error(from_server(0), cast::server(1)).icmp(3, 3, [0; 4], &segment(protocol, other)[ETHERNET..]);
    case.stops(Wire::Inside, frame, Reason::Icmp)
}

/// The port within is translated like the address.
fn about_mapped_ports() -> Case {
    let mapped = 8080;
    let mut case =
        Case::new("nat: errors about a server at another port").service(UDP, PORT, &[(0, mapped, Method::Masq, 1)]);
    let build = |frame: Frame| frame.udp(b"q");
    let out = forwarded(Method::Masq, 0, mapped, REQUEST, build);
    let counts = Counts::none().at(0, DestCounts::input(&build(REQUEST)).opening_inactive());
    case = case.arrives(Wire::Outside, build(REQUEST), INSIDE, out.clone(), counts);

    let mut request = build(Frame { ttl: 63, ..REQUEST });
    request[ETHERNET + 26..ETHERNET + 28].copy_from_slice(&out[ETHERNET + 26..ETHERNET + 28]);
    let error = |macs, from, ttl| Frame { ttl, ..Frame::new(macs, (from, 0), (cast::CLIENT, 0)) };
    let received = error(from_server(0), cast::server(0), 64).icmp(3, 3, [0; 4], &out[ETHERNET..]);
    let relayed = error(TO_CLIENT, cast::VIP, 63).icmp(3, 3, [0; 4], &request[ETHERNET..]);
    let counts = Counts::none().at(0, DestCounts::output(&received));
    case = case.arrives(Wire::Inside, received, OUTSIDE, relayed, counts);

    let reply = build(TRANSLATED_REPLY);
    let mut original = build(Frame { ttl: 63, from: (cast::server(0), mapped), ..REPLY });
    original[ETHERNET + 26..ETHERNET + 28].copy_from_slice(&reply[ETHERNET + 26..ETHERNET + 28]);
    let received = error_to_service(ROUTER).icmp(3, 3, [0; 4], &reply[ETHERNET..]);
    let relayed = forwarded(Method::Masq, 0, 0, error_to_service(ROUTER), |frame| {
        frame.icmp(3, 3, [0; 4], &original[ETHERNET..])
    });
    let counts = Counts::none().at(0, DestCounts::input(&received));
    case.arrives(Wire::Outside, received, INSIDE, relayed, counts)
}

/// A message that is to be rewritten must be right before; what is passed on as it is need not be.
fn wrong_checksums() -> Case {
    let mut case = Case::new("errors with wrong ICMP checksums");
    case = case.service(UDP, PORT, &[(0, PORT, Method::Masq, 1)]).service(
        UDP,
        PORT + 1,
        &[(0, PORT + 1, Method::Route, 1)],
    );
    let spoil = |mut frame: Vec<u8>| {
        frame[ETHERNET + 22] ^= 1;
        frame
    };
    let spoil_header = |mut frame: Vec<u8>| {
        frame[ETHERNET + 10] ^= 1;
        frame
    };
    let opening = DestCounts::input(&REQUEST.udp(b"q")).opening_inactive();
    case = passes(case, Method::Masq, REQUEST, |frame| frame.udp(b"q"), opening);
    let error = error_to_service(ROUTER);
    let about = TRANSLATED_REPLY.udp(b"a");
    case = case.stops(Wire::Outside, spoil(error.icmp(3, 3, [0; 4], &about[ETHERNET..])), Reason::IcmpChecksum);
    case = case.stops(Wire::Outside, spoil_header(error.icmp(3, 3, [0; 4], &about[ETHERNET..])), Reason::IpChecksum);
    let about = forwarded(Method::Masq, 0, PORT, REQUEST, |frame| frame.udp(b"q"));
    let from_server = Frame::new(from_server(0), (cast::server(0), 0), (cast::CLIENT, 0));
    case = case.stops(Wire::Inside, spoil(from_server.icmp(3, 3, [0; 4], &about[ETHERNET..])), Reason::IcmpChecksum);
    let frame = spoil_header(from_server.icmp(3, 3, [0; 4], &about[ETHERNET..]));
    case = case.stops(Wire::Inside, frame, Reason::IpChecksum);

    let request = Frame { to: (cast::VIP, PORT + 1), ..REQUEST };
    case = passes(case, Method::Route, request, |frame| frame.udp(b"q"), opening);
    let about = Frame { from: (cast::VIP, PORT + 1), ..TRANSLATED_REPLY }.udp(b"a");
    let frame = spoil_header(error.icmp(3, 3, [0; 4], &about[ETHERNET..]));
    case = case.stops(Wire::Outside, frame, Reason::IpChecksum);
    let build = |frame: Frame| spoil(frame.icmp(3, 3, [0; 4], &about[ETHERNET..]));
    let counts = Counts::none().at(0, DestCounts::input(&build(error)));
    case.arrives(Wire::Outside, build(error), INSIDE, forwarded(Method::Route, 0, 0, error, build), counts)
}

/// Messages that are not errors, and errors that ip_vs does not handle.
fn left_alone() -> Case {
    let mut case = opened(one("ICMP messages that are left alone", UDP, Method::Masq), UDP, Method::Masq);
    let ping = Frame { to: (cast::VIP, 0), ..REQUEST };
    case = case
        .stops(Wire::Outside, ping.icmp(8, 0, [0, 1, 0, 1], b"abcdefgh"), Reason::Icmp)
        .stops(Wire::Outside, ping.icmp(0, 0, [0, 1, 0, 1], b"abcdefgh"), Reason::Icmp)
        .stops(Wire::Outside, Frame { ttl: 1, ..ping }.icmp(8, 0, [0; 4], b""), Reason::Icmp)
        .stops(
            Wire::Outside,
            Frame { to: (Ipv4Addr::new(10, 9, 9, 8), 0), ..REQUEST }.icmp(8, 0, [0; 4], b"x"),
            Reason::Icmp,
        )
        .stops(Wire::Inside, REPLY.icmp(8, 0, [0; 4], b"x"), Reason::Icmp);
    let reply = TRANSLATED_REPLY.udp(b"about this");
    for kind in [5, 12, 9, 13, 30, 255] {
        let frame = error_to_service(ROUTER).icmp(kind, 0, [0; 4], &reply[ETHERNET..]);
        case = case.stops(Wire::Outside, frame, Reason::Icmp);
    }
    case
}

/// What an error quotes does not say enough, or is not believed.
fn quotes_that_say_too_little() -> Case {
    let mut case = opened(one("errors with short and odd quotes", UDP, Method::Masq), UDP, Method::Masq);
    let about = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut quote = TRANSLATED_REPLY.udp(b"about this").split_off(ETHERNET);
        change(&mut quote);
        error_to_service(ROUTER).icmp(3, 3, [0; 4], &quote)
    };
    for len in 0..28 {
        case = case.stops(Wire::Outside, about(&|quote| quote.truncate(len)), Reason::Icmp);
    }
    for first in [0x44, 0x40, 0x65, 0x4f, 0x05] {
        case = case.stops(Wire::Outside, about(&|quote| quote[0] = first), Reason::Icmp);
    }
    // A later fragment has no ports; another protocol has none that are known.
    case = case.stops(Wire::Outside, about(&|quote| quote[7] = 1), Reason::Icmp);
    case = case.stops(Wire::Outside, about(&|quote| quote[6] = 0x1f), Reason::Icmp);
    case = case.stops(Wire::Outside, about(&|quote| quote[9] = 132), Reason::Icmp);
    case = case.stops(Wire::Outside, about(&|quote| quote[9] = 1), Reason::Icmp);

    // The quoted packet's length and checksum are not looked at: routers get them wrong. With options, all is further back.
    let request = Frame { from: (cast::CLIENT, CLIENT_PORT), ..REQUEST };
    let reply = Frame { options: &[1, 1, 1, 1], ..TRANSLATED_REPLY };
    let quoted = reply.udp(b"about this");
    let mut original = Frame { from: (cast::server(0), PORT), ..reply }.udp(b"about this");
    original[ETHERNET + 30..ETHERNET + 32].copy_from_slice(&quoted[ETHERNET + 30..ETHERNET + 32]);
    let received = error_to_service(ROUTER).icmp(11, 0, [0; 4], &quoted[ETHERNET..]);
    let out = forwarded(Method::Masq, 0, 0, error_to_service(ROUTER), |frame| {
        frame.icmp(11, 0, [0; 4], &original[ETHERNET..])
    });
    let counts = Counts::none().at(0, DestCounts::input(&received));
    case = case.arrives(Wire::Outside, received, INSIDE, out, counts);
    // An error does not keep a connection alive.
    case = case.pass(299);
    let received = error_to_service(ROUTER).icmp(11, 0, [0; 4], &quoted[ETHERNET..]);
    let out = forwarded(Method::Masq, 0, 0, error_to_service(ROUTER), |frame| {
        frame.icmp(11, 0, [0; 4], &original[ETHERNET..])
    });
    let counts = Counts::none().at(0, DestCounts::input(&received));
    case = case.arrives(Wire::Outside, received, INSIDE, out, counts).pass(3);
    let counts = DestCounts { connections: 1, ..DestCounts::input(&request.udp(b"again")) };
    passes(case, Method::Masq, request, |frame| frame.udp(b"again"), counts)
}

/// Errors go the way that packets go.
fn relayed_by_unknown_neighbours() -> Case {
    let index = special::UNRESOLVED;
    let mut case = Case::new("dr: an error for a server that is an unknown neighbour");
    case = case.service(UDP, PORT, &[(index, PORT, Method::Route, 1)]);
    let request = REQUEST.udp(b"q");
    let hand_over = Verdict::HandOver(Wire::Inside, cast::server(index));
    let counts = Counts::of(Reason::NeighbourUnknown).at(index, DestCounts::input(&request).opening_inactive());
    let out = forwarded(Method::Route, index, PORT, REQUEST, |frame| frame.udp(b"q"));
    case = case.arrives(Wire::Outside, request, hand_over, out, counts);
    let reply = TRANSLATED_REPLY.udp(b"a");
    let build = |frame: Frame| frame.icmp(3, 3, [0; 4], &reply[ETHERNET..]);
    let error = error_to_service(ROUTER);
    let counts = Counts::of(Reason::NeighbourUnknown).at(index, DestCounts::input(&build(error)));
    case.arrives(Wire::Outside, build(error), hand_over, forwarded(Method::Route, index, 0, error, build), counts)
}

/// What is said on the way of a tunnel from the director, to it, of a packet that the client has sent; the `rest` of the
/// error's header is this. Quotes `quote` bytes of the packet in the tunnel.
fn error_about_tunnel(from: Ipv4Addr, kind: u8, code: u8, rest: [u8; 4], about: &[u8], quote: usize) -> Vec<u8> {
    let error = Frame { dont_fragment: false, ..Frame::new(from_server(0), (from, 0), (cast::DIRECTOR_INSIDE, 0)) };
    error.icmp(kind, code, rest, &about[ETHERNET..ETHERNET + 20 + quote])
}

/// A router on the way of the tunnel.
const INNER_ROUTER: Ipv4Addr = Ipv4Addr::new(10, 2, 0, 254);

/// The client is told by the service what the tunnel's other end, or a router on its way, says of the packet around its
/// own.
fn about_a_tunnel(protocol: Transport) -> Case {
    let mut case = one(format!("tunnel: errors about a {protocol} packet in it"), protocol, Method::Tunnel);
    case = opened(case, protocol, Method::Tunnel);
    let build = |frame: Frame| segment(protocol, frame);
    let sent = forwarded(Method::Tunnel, 0, PORT, REQUEST, build);
    let inner = segment(protocol, Frame { ttl: 63, ..REQUEST });
    for (kind, code, rest) in [(3, 1, [0; 4]), (3, 2, [0; 4]), (3, 3, [0; 4]), (11, 0, [0; 4]), (4, 0, [1, 2, 3, 4])] {
        for quote in [28, 29, inner.len() - ETHERNET] {
            for from in [cast::server(0), INNER_ROUTER] {
                let received = error_about_tunnel(from, kind, code, rest, &sent, quote);
                let out = director_error().icmp(kind, code, rest, &inner[ETHERNET..ETHERNET + quote]);
                let counts = Counts { icmp_sent: 1, ..Counts::none() };
                // Padding of the frame is not quoted.
                case = case.answers(Wire::Inside, padded(received), OUTSIDE, out, counts);
            }
        }
    }
    // A packet that may be fragmented, and one whose TTL has run out on the way.
    let request = Frame { dont_fragment: false, ..REQUEST };
    let sent = forwarded(Method::Tunnel, 0, PORT, request, build);
    let inner = segment(protocol, Frame { ttl: 63, ..request });
    let received = error_about_tunnel(INNER_ROUTER, 11, 0, [0; 4], &sent, 28);
    let out = director_error().icmp(11, 0, [0; 4], &inner[ETHERNET..ETHERNET + 28]);
    case = case.answers(Wire::Inside, received, OUTSIDE, out, Counts { icmp_sent: 1, ..Counts::none() });
    // What is not believed, or says nothing of a connection.
    let about = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut quoted = sent.clone();
        change(&mut quoted);
        let len = quoted.len() - ETHERNET - 20;
        error_about_tunnel(INNER_ROUTER, 3, 1, [0; 4], &quoted, len)
    };
    let (outer, within) = (ETHERNET, ETHERNET + 20);
    for (offset, value) in [
        // Of the tunnel: options, another protocol, another source, another server.
        (outer, 0x46),
        (outer + 9, 47),
        (outer + 15, 99),
        (outer + 19, 99),
        // Of the packet in it: another version, a later fragment, another protocol, client, service, ports.
        (within, 0x65),
        (within + 7, 1),
        (within + 9, 132),
        (within + 15, 99),
        (within + 19, 99),
        (within + 21, 0),
        (within + 23, 0),
    ] {
        case = case.stops(Wire::Inside, about(&|quoted| quoted[offset] = value), Reason::Icmp);
    }
    for len in [0, 12, 19, 20, 27] {
        case = case.stops(Wire::Inside, about(&|quoted| quoted.truncate(within + len)), Reason::Icmp);
    }
    let mut wrong = about(&|_| ());
    wrong[ETHERNET + 22] ^= 1;
    case = case.stops(Wire::Inside, wrong, Reason::IcmpChecksum);
    let mut wrong = about(&|_| ());
    wrong[ETHERNET + 4] ^= 1;
    case.stops(Wire::Inside, wrong, Reason::IpChecksum)
}

/// They count towards the limit of errors.
fn limit_of_errors_about_tunnels() -> Case {
    let mut case = one("tunnel: an error about a packet in it, and none may be sent", UDP, Method::Tunnel);
    case = opened(case, UDP, Method::Tunnel).set(|config, _| config.icmp_per_second.store(0));
    let sent = forwarded(Method::Tunnel, 0, PORT, REQUEST, |frame| segment(UDP, frame));
    let error = error_about_tunnel(INNER_ROUTER, 3, 1, [0; 4], &sent, 28);
    case.stops(Wire::Inside, error, Reason::TunnelError)
}

/// What is said of the size of packets in the tunnel is remembered for ten minutes, and told to clients who forbid
/// fragmentation; the first of them hears what was known before.
fn path_mtu_of_a_tunnel() -> Case {
    const MTU: usize = 1300;
    let method = Method::Tunnel;
    let mut case = one("tunnel: the path MTU is learned", UDP, method);
    let build = |len: usize| move |frame: Frame| frame.udp(&vec![b'x'; len - 28]);
    let [long, fits, too_long] = [1400, MTU - 20, MTU - 19].map(build);
    let counts = |len: usize| DestCounts::input(&build(len)(REQUEST));
    case = passes(case, method, REQUEST, long, counts(1400).opening_inactive());

    let said = |request: Frame, mtu: usize| {
        let [high, low] = (mtu as u16).to_be_bytes();
        let sent = forwarded(method, 0, PORT, request, long);
        error_about_tunnel(INNER_ROUTER, 3, 4, [0, 0, high, low], &sent, 28)
    };
    let told = |mtu: usize| {
        let [high, low] = (mtu as u16).to_be_bytes();
        let inner = long(Frame { ttl: 63, ..REQUEST });
        director_error().icmp(3, 4, [0, 0, high, low], &inner[ETHERNET..ETHERNET + 28])
    };
    let one_error = || Counts { icmp_sent: 1, ..Counts::none() };
    case = case.answers(Wire::Inside, said(REQUEST, MTU), OUTSIDE, told(1480), one_error());
    case = passes(case, method, REQUEST, fits, counts(MTU - 20));
    let too_big = |case: Case, build: &dyn Fn(Frame) -> Vec<u8>, mtu: usize| {
        let [high, low] = (mtu as u16).to_be_bytes();
        let request = build(REQUEST);
        let error = error_for_client(3, 4, [0, 0, high, low], &build(Frame { ttl: 63, ..REQUEST }));
        let counts = Counts::answered(Reason::TooBig).at(0, DestCounts::input(&request));
        case.answers(Wire::Outside, request, Verdict::Transmit, error, counts)
    };
    case = too_big(case, &too_long, MTU - 20);
    // A larger one is no news. One that is too small to be true is taken for the least that is.
    case = case.answers(Wire::Inside, said(REQUEST, 1400), OUTSIDE, told(MTU - 20), one_error());
    case = too_big(case, &too_long, MTU - 20);
    case = case.answers(Wire::Inside, said(REQUEST, 68), OUTSIDE, told(MTU - 20), one_error());
    case = too_big(case, &fits, 552 - 20);
    // Nobody is told of a packet that may be fragmented, and it is remembered all the same.
    let request = Frame { dont_fragment: false, ..REQUEST };
    let counts_of_none = Counts::of(Reason::NeedsFragmentation).at(0, counts(MTU - 20));
    let in_pieces = fits(request);
    case = case.arrives(Wire::Outside, in_pieces.clone(), Verdict::Drop, in_pieces, counts_of_none);
    case = case.stops(Wire::Inside, said(request, 600), Reason::TunnelError);
    // It holds for ten minutes.
    for _ in 0..2 {
        case = case.pass(299);
        case = too_big(case, &fits, 552 - 20);
    }
    case = case.pass(3);
    passes(case, method, REQUEST, build(1480), counts(1480))
}
