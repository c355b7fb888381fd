//! ICMP: errors that the director sends, and messages that it relays or leaves alone.

use std::net::Ipv4Addr;

use lb_common::{proto::Method, reason::Reason, sctp::chunk};

use super::*;
use crate::{cast::special, frames::padded};

pub(super) fn cases(family: Family) -> Vec<Case> {
    let mut cases = Vec::new();
    for method in METHODS {
        for protocol in [TCP, UDP, SCTP] {
            cases.push(about_a_reply(family, method, protocol));
        }
        cases.push(about_a_reply_of_a_removed_destination(family, method));
    }
    cases.extend([
        no_destination(family),
        rate_limit(family),
        senders_who_are_not_told(family),
        about_a_request(family, TCP),
        about_a_request(family, UDP),
        about_a_request(family, SCTP),
        about_mapped_ports(family),
        wrong_checksums(family),
        left_alone(family),
        quotes_that_say_too_little(family),
        relayed_by_unknown_neighbours(family),
        about_a_tunnel(family, TCP),
        about_a_tunnel(family, UDP),
        about_a_tunnel(family, SCTP),
        limit_of_errors_about_tunnels(family),
        path_mtu_of_a_tunnel(family),
    ]);
    cases
}

/// A service without usable servers tells every client so, TCP and UDP alike.
fn no_destination(family: Family) -> Case {
    let mut case = Case::new(family, "no destination").service(TCP, PORT, &[]).service(
        UDP,
        PORT,
        &[(0, PORT, Method::Masq, 0), (1, PORT, Method::Route, 0)],
    );
    let options: &[u8] = if family == Family::Four { &[1, 1, 1, 1] } else { &[] };
    // The longest that is quoted whole.
    let whole = family.error_max() - 2 * (family.header() + 8);
    for frame in [
        family.request().tcp("S", b""),
        Frame { dscp: 0x2e, ecn: 1, id: 7, dont_fragment: false, ttl: 1, ..family.request() }.tcp("S", b"fast open"),
        Frame { options, ..family.request() }.udp(b"x"),
        family.request().udp(b""),
        family.request().udp(&vec![1; whole]),
        family.request().udp(&vec![2; whole + 1]),
        family.request().udp(&[3; 1452]),
    ] {
        let error = error_for_client(family, Says::PortUnreachable, &frame);
        assert!(error.len() <= ETHERNET + family.error_max());
        let counts = Counts::answered(Reason::NoDestination);
        case = case.answers(Wire::Outside, frame, Verdict::Transmit, error, counts);
    }
    // Padding is not quoted.
    let frame = family.request().tcp("S", b"");
    let error = error_for_client(family, Says::PortUnreachable, &frame);
    let counts = Counts::answered(Reason::NoDestination);
    case.answers(Wire::Outside, padded(frame), Verdict::Transmit, error, counts)
}

/// Two errors a second: the third client gets none.
fn rate_limit(family: Family) -> Case {
    let mut case = Case::new(family, "the limit of ICMP errors").service(TCP, PORT, &[]);
    case = case.set(|config, _| config.icmp_per_second.store(2)).in_a_young_second();
    let frame = family.request().tcp("S", b"");
    for _ in 0..2 {
        let error = error_for_client(family, Says::PortUnreachable, &frame);
        let counts = Counts::answered(Reason::NoDestination);
        case = case.answers(Wire::Outside, frame.clone(), Verdict::Transmit, error, counts);
    }
    case.stops(Wire::Outside, frame.clone(), Reason::NoDestination).stops(Wire::Outside, frame, Reason::NoDestination)
}

/// Nobody hears of an error who is no one host, and no connection is opened for them.
fn senders_who_are_not_told(family: Family) -> Case {
    let mut case = Case::new(family, "senders of errors who are no host").service(UDP, PORT, &[]);
    let broadcast: &[_] = if family == Family::Four { &[[255, 255, 255, 255]] } else { &[] };
    for &source in [[224, 0, 0, 1], [0, 0, 0, 0]].iter().chain(broadcast) {
        let frame = Frame { from: (source.into(), CLIENT_PORT), ..family.request() };
        case = case.stops(Wire::Outside, frame.udp(b"x"), Reason::SourceAddress);
    }
    case
}

fn segment(protocol: Transport, frame: Frame) -> Vec<u8> {
    match protocol {
        TCP => frame.tcp("S", b"some payload"),
        UDP => frame.udp(b"some payload"),
        SCTP => frame.sctp(&[(chunk::INIT, b"some payload")]),
    }
}

/// The least that an error must quote: the IP header and eight bytes.
pub(super) const fn least_quote(family: Family) -> usize {
    family.header() + 8
}

fn opened(case: Case, protocol: Transport, method: Method) -> Case {
    let family = case.family;
    let counts = DestCounts::input(&segment(protocol, family.request()));
    let counts = if protocol == TCP { counts.opening_active() } else { counts.opening_inactive() };
    passes(case, method, family.request(), |frame| segment(protocol, frame), counts)
}

/// A router between director and client.
pub(super) const ROUTER: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 99);

/// An error from `from` to the service, as it comes in by the clients' interface.
pub(super) const fn error_to_service(family: Family, from: Ipv4Addr) -> Frame {
    Frame { dscp: 0x30, id: 0x99, dont_fragment: false, ..family.frame(FROM_CLIENT, (from, 0), (cast::VIP, 0)) }
}

/// Type, code and the rest of the header of errors that are relayed: of every type.
fn relayed(family: Family) -> Vec<(u8, u8, [u8; 4])> {
    let mut headers = vec![
        Says::HostUnreachable.header(family),
        Says::PortUnreachable.header(family),
        Says::TooBig(1400).header(family),
        Says::TtlExpired.header(family),
        Says::FragmentsMissing.header(family),
    ];
    match family {
        // Source quench.
        Family::Four => headers.push((4, 0, [1, 2, 3, 4])),
        // Parameter problem, and what has no name.
        Family::Six => {
            headers.extend([(4, 0, [0, 0, 0, 40]), (0, 1, [0; 4]), (100, 0, [0; 4]), (127, 7, [1, 2, 3, 4])])
        }
    }
    headers
}

/// What a client, or a router on the way, says of what the service has sent: it goes to the server, which learns what it
/// has sent itself when it is masqueraded.
fn about_a_reply(family: Family, method: Method, protocol: Transport) -> Case {
    let mut case = one(family, format!("{method}: errors about a {protocol} reply"), protocol, method);
    case = opened(case, protocol, method);
    let reply = segment(protocol, Frame { ttl: 60, ..family.translated_reply() });
    // The checksum within is of the packet that the client has got.
    let original = segment(protocol, Frame { ttl: 60, ..family.reply() });
    let original = with_checksum_of(original, family, protocol, &reply);
    let least = least_quote(family);
    for (kind, code, rest) in relayed(family) {
        // Eight bytes of the segment, an odd number, all of them.
        for quote in [least, least + 3, reply.len() - ETHERNET] {
            for from in [cast::CLIENT, ROUTER] {
                let quoted = &reply[ETHERNET..ETHERNET + quote];
                let received = error_to_service(family, from).icmp(kind, code, rest, quoted);
                let shown = if method == Method::Masq { &original } else { &reply };
                let build = |frame: Frame| frame.icmp(kind, code, rest, &shown[ETHERNET..ETHERNET + quote]);
                let out = forwarded(method, 0, 0, error_to_service(family, from), build);
                let counts = Counts::none().at(0, DestCounts::input(&received));
                case = case.arrives(Wire::Outside, received, INSIDE, out, counts);
            }
        }
    }
    // Errors about errors are not sent: an error that has come too far is dropped.
    let quote = &reply[ETHERNET..ETHERNET + least];
    let late = Frame { ttl: 1, ..error_to_service(family, ROUTER) }.error(Says::TtlExpired, quote);
    let shown = if method == Method::Masq { &original } else { &reply };
    // It has been translated by then.
    let left = match method {
        Method::Masq => Frame { ttl: 1, ..error_to_service(family, ROUTER) }
            .error(Says::TtlExpired, &shown[ETHERNET..ETHERNET + least]),
        _ => late.clone(),
    };
    let counts = Counts::of(Reason::TtlExpired).at(0, DestCounts::input(&late));
    case = case.arrives(Wire::Outside, late, Verdict::Drop, left, counts);
    // A connection of another client is none of ours.
    let other = Frame { to: (cast::CLIENT, 1), ..family.translated_reply() };
    let frame = error_to_service(family, ROUTER).error(Says::PortUnreachable, &segment(protocol, other)[ETHERNET..]);
    case.stops(Wire::Outside, frame, Reason::Icmp)
}

fn about_a_reply_of_a_removed_destination(family: Family, method: Method) -> Case {
    let mut case = one(family, format!("{method}: an error about a reply of a removed destination"), UDP, method);
    case = opened(case, UDP, method)
        .change(move |change| change.delete_dest(family.key(UDP), family.at(0, PORT)).expect("there"));
    let reply = segment(UDP, family.translated_reply());
    let frame = error_to_service(family, ROUTER).error(Says::PortUnreachable, &reply[ETHERNET..]);
    let left = match method {
        Method::Masq => {
            let original = segment(UDP, Frame { ttl: 63, ..family.reply() });
            let original = with_checksum_of(original, family, UDP, &reply);
            error_to_service(family, ROUTER).error(Says::PortUnreachable, &original[ETHERNET..])
        }
        _ => frame.clone(),
    };
    case.arrives(Wire::Outside, frame, Verdict::Drop, left, Counts::of(Reason::DestinationRemoved))
}

/// What a masqueraded server, or a router before it, says of what the client has sent: it comes from the service, about
/// what the client has sent to it.
fn about_a_request(family: Family, protocol: Transport) -> Case {
    let mut case = one(family, format!("nat: errors about a {protocol} request"), protocol, Method::Masq);
    case = opened(case, protocol, Method::Masq);
    let translated = forwarded(Method::Masq, 0, PORT, family.request(), |frame| segment(protocol, frame));
    let request = segment(protocol, Frame { ttl: 63, ..family.request() });
    let request = with_checksum_of(request, family, protocol, &translated);
    let least = least_quote(family);
    let error = |macs, from| Frame { dont_fragment: false, ..family.frame(macs, (from, 0), (cast::CLIENT, 0)) };
    for (kind, code, rest) in relayed(family) {
        for quote in [least, least + 5, request.len() - ETHERNET] {
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
    let other = Frame { from: (cast::CLIENT, 1), to: (cast::server(0), PORT), ..family.request() };
    let frame =
        error(from_server(0), cast::server(0)).error(Says::PortUnreachable, &segment(protocol, other)[ETHERNET..]);
    case = case.stops(Wire::Inside, frame, Reason::Icmp);
    let other = Frame { to: (cast::server(1), PORT), ..family.request() };
    let frame =
        error(from_server(0), cast::server(1)).error(Says::PortUnreachable, &segment(protocol, other)[ETHERNET..]);
    case.stops(Wire::Inside, frame, Reason::Icmp)
}

/// The port within is translated like the address.
fn about_mapped_ports(family: Family) -> Case {
    let mapped = 8080;
    let mut case = Case::new(family, "nat: errors about a server at another port").service(
        UDP,
        PORT,
        &[(0, mapped, Method::Masq, 1)],
    );
    let build = |frame: Frame| frame.udp(b"q");
    let out = forwarded(Method::Masq, 0, mapped, family.request(), build);
    let counts = Counts::none().at(0, DestCounts::input(&build(family.request())).opening_inactive());
    case = case.arrives(Wire::Outside, build(family.request()), INSIDE, out.clone(), counts);

    let request = build(Frame { ttl: 63, ..family.request() });
    let request = with_checksum_of(request, family, UDP, &out);
    let error = |macs, from, ttl| Frame { ttl, ..family.frame(macs, (from, 0), (cast::CLIENT, 0)) };
    let received = error(from_server(0), cast::server(0), 64).error(Says::PortUnreachable, &out[ETHERNET..]);
    let relayed = error(TO_CLIENT, cast::VIP, 63).error(Says::PortUnreachable, &request[ETHERNET..]);
    let counts = Counts::none().at(0, DestCounts::output(&received));
    case = case.arrives(Wire::Inside, received, OUTSIDE, relayed, counts);

    let reply = build(family.translated_reply());
    let original = build(Frame { ttl: 63, from: (cast::server(0), mapped), ..family.reply() });
    let original = with_checksum_of(original, family, UDP, &reply);
    let received = error_to_service(family, ROUTER).error(Says::PortUnreachable, &reply[ETHERNET..]);
    let relayed = forwarded(Method::Masq, 0, 0, error_to_service(family, ROUTER), |frame| {
        frame.error(Says::PortUnreachable, &original[ETHERNET..])
    });
    let counts = Counts::none().at(0, DestCounts::input(&received));
    case.arrives(Wire::Outside, received, INSIDE, relayed, counts)
}

/// A message that is to be rewritten must be right before; what is passed on as it is need not be.
fn wrong_checksums(family: Family) -> Case {
    let mut case = Case::new(family, "errors with wrong ICMP checksums");
    case = case.service(UDP, PORT, &[(0, PORT, Method::Masq, 1)]).service(
        UDP,
        PORT + 1,
        &[(0, PORT + 1, Method::Route, 1)],
    );
    let spoil = |mut frame: Vec<u8>| {
        frame[ETHERNET + family.header() + 2] ^= 1;
        frame
    };
    let spoil_header = |mut frame: Vec<u8>| {
        frame[ETHERNET + 10] ^= 1;
        frame
    };
    let opening = DestCounts::input(&family.request().udp(b"q")).opening_inactive();
    case = passes(case, Method::Masq, family.request(), |frame| frame.udp(b"q"), opening);
    let error = error_to_service(family, ROUTER);
    let about = family.translated_reply().udp(b"a");
    case =
        case.stops(Wire::Outside, spoil(error.error(Says::PortUnreachable, &about[ETHERNET..])), Reason::IcmpChecksum);
    if family == Family::Four {
        let frame = spoil_header(error.error(Says::PortUnreachable, &about[ETHERNET..]));
        case = case.stops(Wire::Outside, frame, Reason::IpChecksum);
    }
    let about = forwarded(Method::Masq, 0, PORT, family.request(), |frame| frame.udp(b"q"));
    let from_server = family.frame(from_server(0), (cast::server(0), 0), (cast::CLIENT, 0));
    case = case.stops(
        Wire::Inside,
        spoil(from_server.error(Says::PortUnreachable, &about[ETHERNET..])),
        Reason::IcmpChecksum,
    );
    if family == Family::Four {
        let frame = spoil_header(from_server.error(Says::PortUnreachable, &about[ETHERNET..]));
        case = case.stops(Wire::Inside, frame, Reason::IpChecksum);
    } else {
        // It covers the addresses.
        let mut frame = from_server.error(Says::PortUnreachable, &about[ETHERNET..]);
        frame[ETHERNET + 8 + 7] ^= 1;
        case = case.stops(Wire::Inside, frame, Reason::IcmpChecksum);
    }

    let request = Frame { to: (cast::VIP, PORT + 1), ..family.request() };
    case = passes(case, Method::Route, request, |frame| frame.udp(b"q"), opening);
    let about = Frame { from: (cast::VIP, PORT + 1), ..family.translated_reply() }.udp(b"a");
    if family == Family::Four {
        let frame = spoil_header(error.error(Says::PortUnreachable, &about[ETHERNET..]));
        case = case.stops(Wire::Outside, frame, Reason::IpChecksum);
    }
    let build = |frame: Frame| spoil(frame.error(Says::PortUnreachable, &about[ETHERNET..]));
    let counts = Counts::none().at(0, DestCounts::input(&build(error)));
    case.arrives(Wire::Outside, build(error), INSIDE, forwarded(Method::Route, 0, 0, error, build), counts)
}

/// Messages that are not errors, and errors that ip_vs does not handle.
fn left_alone(family: Family) -> Case {
    let mut case = opened(one(family, "ICMP messages that are left alone", UDP, Method::Masq), UDP, Method::Masq);
    let ping = Frame { to: (cast::VIP, 0), ..family.request() };
    let (echo, echo_reply) = if family == Family::Four { (8, 0) } else { (128, 129) };
    case = case
        .stops(Wire::Outside, ping.icmp(echo, 0, [0, 1, 0, 1], b"abcdefgh"), Reason::Icmp)
        .stops(Wire::Outside, ping.icmp(echo_reply, 0, [0, 1, 0, 1], b"abcdefgh"), Reason::Icmp)
        .stops(Wire::Outside, Frame { ttl: 1, ..ping }.icmp(echo, 0, [0; 4], b""), Reason::Icmp)
        .stops(
            Wire::Outside,
            Frame { to: (Ipv4Addr::new(10, 9, 9, 8), 0), ..family.request() }.icmp(echo, 0, [0; 4], b"x"),
            Reason::Icmp,
        )
        .stops(Wire::Inside, family.reply().icmp(echo, 0, [0; 4], b"x"), Reason::Icmp);
    let reply = family.translated_reply().udp(b"about this");
    // Of IPv6: multicast listeners, and all of neighbour discovery.
    let kinds: &[u8] = match family {
        Family::Four => &[5, 12, 9, 13, 30, 255],
        Family::Six => &[130, 131, 132, 133, 134, 135, 136, 137, 143, 255],
    };
    for &kind in kinds {
        let frame = error_to_service(family, ROUTER).icmp(kind, 0, [0; 4], &reply[ETHERNET..]);
        case = case.stops(Wire::Outside, frame, Reason::Icmp);
    }
    case
}

/// What an error quotes does not say enough, or is not believed.
fn quotes_that_say_too_little(family: Family) -> Case {
    let mut case = opened(one(family, "errors with short and odd quotes", UDP, Method::Masq), UDP, Method::Masq);
    let about = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut quote = family.translated_reply().udp(b"about this").split_off(ETHERNET);
        change(&mut quote);
        error_to_service(family, ROUTER).error(Says::PortUnreachable, &quote)
    };
    for len in 0..least_quote(family) {
        case = case.stops(Wire::Outside, about(&|quote| quote.truncate(len)), Reason::Icmp);
    }
    let firsts = if family == Family::Four { [0x44, 0x40, 0x65, 0x4f, 0x05] } else { [0x45, 0x40, 0x50, 0x70, 0x06] };
    for first in firsts {
        case = case.stops(Wire::Outside, about(&|quote| quote[0] = first), Reason::Icmp);
    }
    // A later fragment has no ports, nor any that are known behind an extension header; another protocol has none either.
    let odd: &[(usize, u8)] = match family {
        Family::Four => &[(7, 1), (6, 0x1f), (9, 132), (9, 47), (9, 1)],
        Family::Six => &[(6, 44), (6, 0), (6, 60), (6, 132), (6, 47), (6, 58)],
    };
    for &(offset, value) in odd {
        case = case.stops(Wire::Outside, about(&|quote| quote[offset] = value), Reason::Icmp);
    }

    // The quoted packet's length and checksum are not looked at: routers get them wrong. With options, all is further back.
    let request = Frame { from: (cast::CLIENT, CLIENT_PORT), ..family.request() };
    let options: &[u8] = if family == Family::Four { &[1, 1, 1, 1] } else { &[] };
    let reply = Frame { options, ..family.translated_reply() };
    let quoted = reply.udp(b"about this");
    let mut original = Frame { from: (cast::server(0), PORT), ..reply }.udp(b"about this");
    let checksum = checksum_place(family, UDP).start + options.len();
    original[checksum..checksum + 2].copy_from_slice(&quoted[checksum..checksum + 2]);
    let received = error_to_service(family, ROUTER).error(Says::TtlExpired, &quoted[ETHERNET..]);
    let out = forwarded(Method::Masq, 0, 0, error_to_service(family, ROUTER), |frame| {
        frame.error(Says::TtlExpired, &original[ETHERNET..])
    });
    let counts = Counts::none().at(0, DestCounts::input(&received));
    case = case.arrives(Wire::Outside, received, INSIDE, out, counts);
    // An error does not keep a connection alive.
    case = case.pass(299);
    let received = error_to_service(family, ROUTER).error(Says::TtlExpired, &quoted[ETHERNET..]);
    let out = forwarded(Method::Masq, 0, 0, error_to_service(family, ROUTER), |frame| {
        frame.error(Says::TtlExpired, &original[ETHERNET..])
    });
    let counts = Counts::none().at(0, DestCounts::input(&received));
    case = case.arrives(Wire::Outside, received, INSIDE, out, counts).pass(3);
    let counts = DestCounts { connections: 1, ..DestCounts::input(&request.udp(b"again")) };
    passes(case, Method::Masq, request, |frame| frame.udp(b"again"), counts)
}

/// Errors go the way that packets go.
fn relayed_by_unknown_neighbours(family: Family) -> Case {
    let index = special::UNRESOLVED;
    let mut case = Case::new(family, "dr: an error for a server that is an unknown neighbour");
    case = case.service(UDP, PORT, &[(index, PORT, Method::Route, 1)]);
    let request = family.request().udp(b"q");
    let hand_over = Verdict::HandOver(Wire::Inside, cast::server(index));
    let counts = Counts::of(Reason::NeighbourUnknown).at(index, DestCounts::input(&request).opening_inactive());
    let out = forwarded(Method::Route, index, PORT, family.request(), |frame| frame.udp(b"q"));
    case = case.arrives(Wire::Outside, request, hand_over, out, counts);
    let reply = family.translated_reply().udp(b"a");
    let build = |frame: Frame| frame.error(Says::PortUnreachable, &reply[ETHERNET..]);
    let error = error_to_service(family, ROUTER);
    let counts = Counts::of(Reason::NeighbourUnknown).at(index, DestCounts::input(&build(error)));
    case.arrives(Wire::Outside, build(error), hand_over, forwarded(Method::Route, index, 0, error, build), counts)
}

/// What is said on the way of a tunnel from the director, to it, of a packet that the client has sent: type, code and the rest
/// of the error's header. Quotes `quote` bytes of the packet in the tunnel.
pub(super) fn error_about_tunnel(
    family: Family,
    from: Ipv4Addr,
    (kind, code, rest): (u8, u8, [u8; 4]),
    about: &[u8],
    quote: usize,
) -> Vec<u8> {
    let error = Frame { dont_fragment: false, ..family.frame(from_server(0), (from, 0), (cast::DIRECTOR_INSIDE, 0)) };
    error.icmp(kind, code, rest, &about[ETHERNET..ETHERNET + family.header() + quote])
}

/// A router on the way of the tunnel.
pub(super) const INNER_ROUTER: Ipv4Addr = Ipv4Addr::new(10, 2, 0, 254);

/// The client is told by the service what the tunnel's other end, or a router on its way, says of the packet around its
/// own.
fn about_a_tunnel(family: Family, protocol: Transport) -> Case {
    let mut case = one(family, format!("tunnel: errors about a {protocol} packet in it"), protocol, Method::Tunnel);
    case = opened(case, protocol, Method::Tunnel);
    let build = |frame: Frame| segment(protocol, frame);
    let sent = forwarded(Method::Tunnel, 0, PORT, family.request(), build);
    let inner = segment(protocol, Frame { ttl: 63, ..family.request() });
    let least = least_quote(family);
    let is_too_big = |header: &(u8, u8, [u8; 4])| *header == Says::TooBig(1400).header(family);
    for (kind, code, rest) in relayed(family).into_iter().filter(|header| !is_too_big(header)) {
        if family == Family::Six && !(1..=3).contains(&kind) {
            // It may point at what the client has not sent.
            let received = error_about_tunnel(family, INNER_ROUTER, (kind, code, rest), &sent, least);
            case = case.stops(Wire::Inside, received, Reason::Icmp);
            continue;
        }
        for quote in [least, least + 1, inner.len() - ETHERNET] {
            for from in [cast::server(0), INNER_ROUTER] {
                let received = error_about_tunnel(family, from, (kind, code, rest), &sent, quote);
                let out = director_error(family).icmp(kind, code, rest, &inner[ETHERNET..ETHERNET + quote]);
                let counts = Counts { icmp_sent: 1, ..Counts::none() };
                // Padding of the frame is not quoted.
                case = case.answers(Wire::Inside, padded(received), OUTSIDE, out, counts);
            }
        }
    }
    // A packet with another type of service that may be fragmented, and one whose TTL has run out on the way.
    let request = Frame { dont_fragment: false, dscp: 0x2e, ecn: 2, ..family.request() };
    let sent = forwarded(Method::Tunnel, 0, PORT, request, build);
    let inner = segment(protocol, Frame { ttl: 63, ..request });
    let received = error_about_tunnel(family, INNER_ROUTER, Says::TtlExpired.header(family), &sent, least);
    let error = director_error(family).of_the_class_of(&inner);
    let out = error.error(Says::TtlExpired, &inner[ETHERNET..ETHERNET + least]);
    case = case.answers(Wire::Inside, received, OUTSIDE, out, Counts { icmp_sent: 1, ..Counts::none() });
    // What is not believed, or says nothing of a connection.
    let about = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut quoted = sent.clone();
        change(&mut quoted);
        let len = quoted.len() - ETHERNET - family.header();
        error_about_tunnel(family, INNER_ROUTER, Says::HostUnreachable.header(family), &quoted, len)
    };
    let (outer, within) = (ETHERNET, ETHERNET + family.header());
    let changes: &[(usize, u8)] = match family {
        Family::Four => &[
            // Of the tunnel: options, another protocol, another source, another server.
            (outer, 0x46),
            (outer + 9, 47),
            (outer + 15, 99),
            (outer + 19, 99),
            // Of the packet in it: another version, a later fragment, another protocol, client, service, ports.
            (within, 0x65),
            (within + 7, 1),
            (within + 9, 47),
            (within + 15, 99),
            (within + 19, 99),
            (within + 21, 0),
            (within + 23, 0),
        ],
        Family::Six => &[
            // Of the tunnel: another version, an extension header, another protocol, source, server.
            (outer, 0x45),
            (outer + 6, 60),
            (outer + 6, 47),
            (outer + 8, 99),
            (outer + 23, 99),
            (outer + 24, 99),
            (outer + 39, 99),
            // Of the packet in it: another version, a fragment, another protocol, client, service, ports.
            (within, 0x45),
            (within + 6, 44),
            (within + 6, 47),
            (within + 8, 99),
            (within + 23, 99),
            (within + 24, 99),
            (within + 39, 99),
            (within + 41, 0),
            (within + 43, 0),
        ],
    };
    for &(offset, value) in changes {
        case = case.stops(Wire::Inside, about(&|quoted| quoted[offset] = value), Reason::Icmp);
    }
    for len in [0, 12, least - 9, least - 8, least - 1] {
        case = case.stops(Wire::Inside, about(&|quoted| quoted.truncate(within + len)), Reason::Icmp);
    }
    let mut wrong = about(&|_| ());
    wrong[ETHERNET + family.header() + 2] ^= 1;
    case = case.stops(Wire::Inside, wrong, Reason::IcmpChecksum);
    if family == Family::Six {
        return case;
    }
    let mut wrong = about(&|_| ());
    wrong[ETHERNET + 4] ^= 1;
    case.stops(Wire::Inside, wrong, Reason::IpChecksum)
}

/// They count towards the limit of errors.
fn limit_of_errors_about_tunnels(family: Family) -> Case {
    let mut case = one(family, "tunnel: an error about a packet in it, and none may be sent", UDP, Method::Tunnel);
    case = opened(case, UDP, Method::Tunnel).set(|config, _| config.icmp_per_second.store(0));
    let sent = forwarded(Method::Tunnel, 0, PORT, family.request(), |frame| segment(UDP, frame));
    let error =
        error_about_tunnel(family, INNER_ROUTER, Says::HostUnreachable.header(family), &sent, least_quote(family));
    case.stops(Wire::Inside, error, Reason::TunnelError)
}

/// What is said of the size of packets in the tunnel is remembered for ten minutes, and told to clients who forbid
/// fragmentation; the first of them hears what was known before.
fn path_mtu_of_a_tunnel(family: Family) -> Case {
    const MTU: usize = 1400;
    let method = Method::Tunnel;
    let mut case = one(family, "tunnel: the path MTU is learned", UDP, method);
    let header = family.header();
    let build = |len: usize| move |frame: Frame| frame.udp(&vec![b'x'; len - header - 8]);
    let [long, fits, too_long] = [1440, MTU - header, MTU - header + 1].map(build);
    let counts = |len: usize| DestCounts::input(&build(len)(family.request()));
    case = passes(case, method, family.request(), long, counts(1440).opening_inactive());

    let said = |request: Frame, mtu: usize| {
        let sent = forwarded(method, 0, PORT, request, long);
        let header = Says::TooBig(mtu as u16).header(family);
        error_about_tunnel(family, INNER_ROUTER, header, &sent, least_quote(family))
    };
    let told = |mtu: usize| {
        let inner = long(Frame { ttl: 63, ..family.request() });
        director_error(family).error(Says::TooBig(mtu as u16), &inner[ETHERNET..ETHERNET + least_quote(family)])
    };
    let one_error = || Counts { icmp_sent: 1, ..Counts::none() };
    case = case.answers(Wire::Inside, said(family.request(), MTU), OUTSIDE, told(1500 - header), one_error());
    case = passes(case, method, family.request(), fits, counts(MTU - header));
    let too_big = |case: Case, build: &dyn Fn(Frame) -> Vec<u8>, mtu: usize| {
        let request = build(family.request());
        let quoted = build(Frame { ttl: 63, ..family.request() });
        let counts = Counts::answered(Reason::TooBig).at(0, DestCounts::input(&request));
        let error = error_for_client(family, Says::TooBig(mtu as u16), &quoted);
        case.answers(Wire::Outside, request, Verdict::Transmit, error, counts)
    };
    case = too_big(case, &too_long, MTU - header);
    // A larger one is no news.
    case = case.answers(Wire::Inside, said(family.request(), 1450), OUTSIDE, told(MTU - header), one_error());
    case = too_big(case, &too_long, MTU - header);
    if family == Family::Six {
        // Nor is one that is larger than any packet.
        let sent = forwarded(method, 0, PORT, family.request(), long);
        let frame = error_about_tunnel(family, INNER_ROUTER, (2, 0, [0, 1, 0, 0]), &sent, least_quote(family));
        case = case.answers(Wire::Inside, frame, OUTSIDE, told(MTU - header), one_error());
        case = too_big(case, &too_long, MTU - header);
    }
    // One that is too small to be true is taken for the least that is.
    case = case.answers(Wire::Inside, said(family.request(), 68), OUTSIDE, told(MTU - header), one_error());
    if family == Family::Four {
        case = too_big(case, &fits, 552 - header);
        // Nobody is told of a packet that may be fragmented, and it is remembered all the same.
        let request = Frame { dont_fragment: false, ..family.request() };
        let counts_of_none = Counts::of(Reason::NeedsFragmentation).at(0, counts(MTU - header));
        let in_pieces = fits(request);
        case = case.arrives(Wire::Outside, in_pieces.clone(), Verdict::Drop, in_pieces, counts_of_none);
        case = case.stops(Wire::Inside, said(request, 600), Reason::TunnelError);
        // It holds for ten minutes.
        for _ in 0..2 {
            case = case.pass(299);
            case = too_big(case, &fits, 552 - header);
        }
    } else {
        // A link that carries no more than every IPv6 link does: what it has room for in the tunnel is less than senders can be
        // told.
        let in_vain = |case: Case, len: usize| {
            let frame = build(len)(family.request());
            let counts = Counts::of(Reason::TooBig).at(0, counts(len));
            case.arrives(Wire::Outside, frame.clone(), Verdict::Drop, frame, counts)
        };
        for _ in 0..2 {
            case = in_vain(case, 1280 - header + 1).pass(299);
            case = passes(case, method, family.request(), build(1280 - header), counts(1280 - header));
        }
    }
    case = case.pass(3);
    passes(case, method, family.request(), build(1500 - header), counts(1500 - header))
}
