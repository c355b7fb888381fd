//! What the methods make of packets.

use std::net::Ipv4Addr;

use lb_common::{proto::Method, reason::Reason};

use super::*;
use crate::{cast::special, frames::padded};

pub(super) fn cases(family: Family) -> Vec<Case> {
    let mut cases = Vec::new();
    for method in METHODS {
        cases.extend([
            tcp(family, method),
            udp(family, method),
            header_fields(family, method),
            ttl(family, method),
            mtu(family, method),
            padding(family, method),
        ]);
        cases.extend([payload_lengths(family, method), reply_observed(family, method)]);
        cases.push(match family {
            Family::Four => options(family, method),
            Family::Six => extension_headers(family, method),
        });
    }
    cases.extend([
        nat_port_mapping(family),
        nat_server_without_port(family),
        nat_udp_without_checksum(family),
        nat_udp_sums_to_zero(family),
        nat_wrong_checksum_stays_wrong(family),
        nat_refused_replies(family),
        nat_late_reset(family),
        nat_reply_of_nobody(family),
        nat_two_services_of_one_server(family),
        tunnel_over_a_tiny_link(family),
    ]);
    cases
}

fn tcp(family: Family, method: Method) -> Case {
    let segment = |flags, payload: &'static [u8]| move |frame: Frame| frame.tcp(flags, payload);
    let mut case = one(family, format!("{method}: a TCP connection"), TCP, method);
    case = passes(
        case,
        method,
        family.request(),
        segment("S", b""),
        DestCounts::input(&family.request().tcp("S", b"")).opening_active(),
    );
    if method == Method::Masq {
        case = replies(case, family.reply().tcp("SA", b""), family.translated_reply().tcp("SA", b""));
    }
    for (flags, payload) in [("A", &b""[..]), ("PA", b"GET / HTTP/1.0\r\n\r\n"), ("A", b"")] {
        let counts = DestCounts::input(&family.request().tcp(flags, payload));
        case = passes(case, method, family.request(), segment(flags, payload), counts);
    }
    if method == Method::Masq {
        case = replies(case, family.reply().tcp("PA", b"OK"), family.translated_reply().tcp("PA", b"OK"));
    }
    // CLOSE_WAIT of a server that is seen, FIN_WAIT of one that is not: neither is active.
    let counts = DestCounts::input(&family.request().tcp("FA", b"")).calming();
    passes(case, method, family.request(), segment("FA", b""), counts)
}

fn udp(family: Family, method: Method) -> Case {
    let mut case = one(family, format!("{method}: a UDP connection"), UDP, method);
    let datagram = |frame: Frame| frame.udp(b"who is it");
    let counts = DestCounts::input(&datagram(family.request()));
    case = passes(case, method, family.request(), datagram, counts.opening_inactive());
    case = passes(case, method, family.request(), datagram, counts);
    if method == Method::Masq {
        case = replies(case, family.reply().udp(b"me"), family.translated_reply().udp(b"me"));
    }
    passes(case, method, family.request(), datagram, counts)
}

/// Type of service, identification and DF, which every method keeps, and a tunnel shows outside.
fn header_fields(family: Family, method: Method) -> Case {
    let mut case = one(family, format!("{method}: TOS, identification and DF"), UDP, method);
    let mut counts = DestCounts::input(&family.request().udp(b"x")).opening_inactive();
    for ecn in 0..4 {
        for (dscp, id, dont_fragment) in [(0, 0, true), (0x2e, 0xbeef, false), (0x3f, 0xffff, true), (1, 1, false)] {
            let request = Frame { dscp, ecn, id, dont_fragment, ..family.request() };
            case = passes(case, method, request, |frame| frame.udp(b"x"), counts);
            counts = DestCounts::input(&family.request().udp(b"x"));
        }
    }
    case
}

fn ttl(family: Family, method: Method) -> Case {
    let mut case = one(family, format!("{method}: TTL"), UDP, method);
    let build = |frame: Frame| frame.udp(b"hello");
    let counts = DestCounts::input(&build(family.request()));
    let mut opening = counts.opening_inactive();
    for ttl in [1, 0] {
        let request = build(Frame { ttl, ..family.request() });
        // The connection is there, and the packet counts: it is on its way out that it fails.
        case = case.answers(
            Wire::Outside,
            request.clone(),
            Verdict::Transmit,
            error_for_client(family, Says::TtlExpired, &request),
            Counts::answered(Reason::TtlExpired).at(0, opening),
        );
        opening = counts;
    }
    for ttl in [2, 255] {
        case = passes(case, method, Frame { ttl, ..family.request() }, build, counts);
    }
    case
}

/// The longest packet that fits, and one that is a byte longer.
fn mtu(family: Family, method: Method) -> Case {
    let overhead = if method == Method::Tunnel { family.header() } else { 0 };
    let mut case = Case::new(family, format!("{method}: MTU"));
    for (port, index, mtu) in [(PORT, 0, 1500), (PORT + 1, special::NARROW, special::NARROW_MTU as usize)] {
        let mtu = mtu - overhead;
        case = case.service(UDP, port, &[(index, port, method, 1)]);
        let request = Frame { to: (cast::VIP, port), ..family.request() };
        let build = |len: usize| move |frame: Frame| frame.udp(&vec![b'x'; len - family.header() - 8]);
        let fits = build(mtu)(request);
        case = case.arrives(
            Wire::Outside,
            fits.clone(),
            INSIDE,
            forwarded(method, index, port, request, build(mtu)),
            Counts::none().at(index, DestCounts::input(&fits).opening_inactive()),
        );
        let too_big = build(mtu + 1)(request);
        // The error quotes the packet as it is after its TTL has been lowered.
        let quoted = build(mtu + 1)(Frame { ttl: request.ttl - 1, ..request });
        case = case.answers(
            Wire::Outside,
            too_big.clone(),
            Verdict::Transmit,
            error_for_client(family, Says::TooBig(mtu as u16), &quoted),
            Counts::answered(Reason::TooBig).at(index, DestCounts::input(&too_big)),
        );
        if family == Family::Six {
            continue;
        }
        let in_pieces = build(mtu + 1)(Frame { dont_fragment: false, ..request });
        let counts = Counts::of(Reason::NeedsFragmentation).at(index, DestCounts::input(&in_pieces));
        case = case.arrives(Wire::Outside, in_pieces.clone(), Verdict::Drop, in_pieces, counts);
    }
    case
}

/// Frames that are longer than their packets: padding stays outside of lengths and checksums, and follows the packet out.
fn padding(family: Family, method: Method) -> Case {
    let mut case = one(family, format!("{method}: a padded frame"), TCP, method);
    for (flags, counts) in [("S", DestCounts::default().opening_active()), ("A", DestCounts::default())] {
        let build = |frame: Frame| frame.tcp(flags, b"");
        let request = build(family.request());
        let frame = padded(request.clone());
        let out = [&forwarded(method, 0, PORT, family.request(), build), &frame[request.len()..]].concat();
        let input = DestCounts::input(&request);
        let counts = DestCounts { packets_in: input.packets_in, bytes_in: input.bytes_in, ..counts };
        case = case.arrives(Wire::Outside, frame, INSIDE, out, Counts::none().at(0, counts));
    }
    case
}

fn options(family: Family, method: Method) -> Case {
    /// As many as there can be, with an odd one among them.
    const MOST: [u8; 40] = {
        let mut options = [1; 40];
        options[39] = 0;
        options
    };
    let mut case = one(family, format!("{method}: IP options"), TCP, method);
    let mut opened = false;
    for options in [&[1, 1, 1, 1][..], &[0x94, 4, 0, 0, 1, 1, 1, 0], &MOST, &[]] {
        let request = Frame { options, ..family.request() };
        for flags in if opened { ["A", "PA"] } else { ["S", "A"] } {
            let build = move |frame: Frame| frame.tcp(flags, b"");
            let counts = DestCounts::input(&build(request));
            let counts = if opened { counts } else { counts.opening_active() };
            opened = true;
            case = passes(case, method, request, build, counts);
        }
    }
    case
}

/// Packets with extension headers go nowhere: the ports are behind them. With no next header there are none.
fn extension_headers(family: Family, method: Method) -> Case {
    // Padding, but for what the kernel would do with a routing or authentication header.
    const HEADER: [u8; 8] = [0, 0, 1, 4, 0, 0, 0, 0];
    let mut case = one(family, format!("{method}: extension headers"), TCP, method);
    let build = |frame: Frame| frame.tcp("S", b"");
    case = passes(case, method, family.request(), build, DestCounts::input(&build(family.request())).opening_active());
    for (number, reason) in [
        (0, Reason::ExtensionHeader),
        (43, Reason::ExtensionHeader),
        (44, Reason::Fragment),
        (51, Reason::ExtensionHeader),
        (60, Reason::ExtensionHeader),
        (135, Reason::ExtensionHeader),
        (59, Reason::OtherProtocol),
        (50, Reason::OtherProtocol),
    ] {
        for flags in ["S", "A"] {
            let extended = |frame: Frame| {
                let segment = frame.tcp(flags, b"data").split_off(ETHERNET + family.header());
                let mut header = HEADER;
                header[0] = 6;
                frame.packet(number, &[&header[..], &segment].concat())
            };
            let elsewhere = Frame { to: (Ipv4Addr::new(10, 9, 9, 8), PORT), ..family.request() };
            let other = if reason == Reason::OtherProtocol { reason } else { Reason::NotService };
            case = case
                .stops(Wire::Outside, extended(family.request()), reason)
                .stops(Wire::Outside, extended(elsewhere), other)
                .stops(Wire::Inside, extended(family.reply()), other);
        }
        // Nothing behind it, not even the header itself.
        case = case.stops(Wire::Outside, family.request().packet(number, &[]), reason);
    }
    case
}

fn payload_lengths(family: Family, method: Method) -> Case {
    let mut case = one(family, format!("{method}: payloads of every length around a word"), UDP, method);
    for len in 0..9 {
        let build = |frame: Frame| frame.udp(&[0xff; 9][..len]);
        let counts = DestCounts::input(&build(family.request()));
        let counts = if len == 0 { counts.opening_inactive() } else { counts };
        case = passes(case, method, family.request(), build, counts);
    }
    case
}

/// A reply from the service's own address that passes the director: those of DR and tunnel servers move the connection and
/// go on as they are; masqueraded ones have another source.
fn reply_observed(family: Family, method: Method) -> Case {
    let mut case = one(family, format!("{method}: a reply from the service's own address"), TCP, method);
    let build = |flags| move |frame: Frame| frame.tcp(flags, b"");
    let counts = DestCounts::input(&build("S")(family.request()));
    case = passes(case, method, family.request(), build("S"), counts.opening_active());
    let reply = Frame { from: (cast::VIP, PORT), ..family.reply() };
    if method == Method::Masq {
        return case.stops(Wire::Inside, reply.tcp("SA", b""), Reason::NotService);
    }
    let observed = |frame: &[u8]| Counts::of(Reason::ReplyObserved).at(0, DestCounts::output(frame));
    let frame = reply.tcp("SA", b"");
    case = case.arrives(Wire::Inside, frame.clone(), Verdict::Pass, frame.clone(), observed(&frame));
    case = passes(case, method, family.request(), build("A"), counts);
    // The server has been seen: the client's FIN leads to CLOSE_WAIT and the server's to TIME_WAIT, not FIN_WAIT.
    case = passes(case, method, family.request(), build("FA"), counts.calming());
    let frame = reply.tcp("FA", b"");
    case = case.arrives(Wire::Inside, frame.clone(), Verdict::Pass, frame.clone(), observed(&frame));
    // Which a SYN shows: it opens another connection.
    let counts = DestCounts { connections: 1, inactive: -1, active: 1, ..counts };
    case = passes(case, method, family.request(), build("S"), counts);
    case.stops(Wire::Inside, Frame { to: (cast::CLIENT, 1), ..reply }.tcp("SA", b""), Reason::NotService)
}

fn nat_port_mapping(family: Family) -> Case {
    let mapped = 8080;
    let case = Case::new(family, "nat: a server at another port").service(TCP, PORT, &[(0, mapped, Method::Masq, 1)]);
    let request = family.request().tcp("S", b"");
    let counts = Counts::none().at(0, DestCounts::input(&request).opening_active());
    let out = forwarded(Method::Masq, 0, mapped, family.request(), |frame| frame.tcp("S", b""));
    let reply = Frame { from: (cast::server(0), mapped), ..family.reply() };
    let case = case.arrives(Wire::Outside, request, INSIDE, out, counts);
    let case = replies(case, reply.tcp("SA", b""), family.translated_reply().tcp("SA", b""));
    // What the server sends from the service's port is something else.
    case.stops(Wire::Inside, family.reply().tcp("SA", b""), Reason::NotService)
}

/// A server without a port of its own is reached at the service's.
fn nat_server_without_port(family: Family) -> Case {
    let case = Case::new(family, "nat: a server with port 0").service(TCP, PORT, &[(0, 0, Method::Masq, 1)]);
    let counts = DestCounts::input(&family.request().tcp("S", b"")).opening_active();
    let case = passes(case, Method::Masq, family.request(), |frame| frame.tcp("S", b""), counts);
    replies(case, family.reply().tcp("SA", b""), family.translated_reply().tcp("SA", b""))
}

/// A datagram without a checksum gets one, computed over all of it.
fn nat_udp_without_checksum(family: Family) -> Case {
    let mut case = one(family, "nat: UDP without a checksum", UDP, Method::Masq);
    for (number, payload) in [&b""[..], b"a", b"ab", b"odd", &[0xab; 777], &[0xff; 1452]].into_iter().enumerate() {
        let request = family.request().udp_unsummed(payload);
        let counts = DestCounts::input(&request);
        let counts = if number == 0 { counts.opening_inactive() } else { counts };
        let out = forwarded(Method::Masq, 0, PORT, family.request(), |frame| frame.udp(payload));
        case = case.arrives(Wire::Outside, request, INSIDE, out, Counts::none().at(0, counts));
        case = replies(case, family.reply().udp_unsummed(payload), family.translated_reply().udp(payload));
    }
    // Behind options, and with padding that must not be summed.
    let options: &[u8] = if family == Family::Four { &[1, 1, 1, 1] } else { &[] };
    let request = Frame { options, ..family.request() };
    let frame = padded(request.udp_unsummed(b"z"));
    let out = forwarded(Method::Masq, 0, PORT, request, |frame| frame.udp(b"z"));
    let out = [out.as_slice(), &frame[request.udp(b"z").len()..]].concat();
    let counts = Counts::none().at(0, DestCounts::input(&request.udp(b"z")));
    case.arrives(Wire::Outside, frame, INSIDE, out, counts)
}

/// A checksum that comes out as 0 is sent as 0xffff.
fn nat_udp_sums_to_zero(family: Family) -> Case {
    let mut case = one(family, "nat: UDP whose checksum becomes 0", UDP, Method::Masq);
    // The two bytes that make the checksum of the translated datagram 0, found by trying.
    let translated = |payload: &[u8]| forwarded(Method::Masq, 0, PORT, family.request(), |frame| frame.udp(payload));
    let checksum = ETHERNET + family.header() + 6;
    let word = (0..=u16::MAX)
        .find(|word| translated(&word.to_be_bytes())[checksum..checksum + 2] == [0xff, 0xff])
        .expect("one of all words");
    let payload = word.to_be_bytes();
    for (number, request) in
        [family.request().udp(&payload), family.request().udp_unsummed(&payload)].into_iter().enumerate()
    {
        let counts = DestCounts::input(&request);
        let counts = if number == 0 { counts.opening_inactive() } else { counts };
        case = case.arrives(Wire::Outside, request, INSIDE, translated(&payload), Counts::none().at(0, counts));
    }
    case
}

/// It is updated, not verified and not computed anew: the server is to find out.
fn nat_wrong_checksum_stays_wrong(family: Family) -> Case {
    let case = one(family, "nat: a wrong TCP checksum", TCP, Method::Masq);
    let spoil = |mut frame: Vec<u8>| {
        let checksum = ETHERNET + family.header() + 16;
        // The same distance from the right one before and after, in one's complement.
        let (wrong, carry) = u16::from_be_bytes([frame[checksum], frame[checksum + 1]]).overflowing_add(0x0101);
        frame[checksum..checksum + 2].copy_from_slice(&(wrong + u16::from(carry)).to_be_bytes());
        frame
    };
    let request = spoil(family.request().tcp("S", b""));
    let out = spoil(forwarded(Method::Masq, 0, PORT, family.request(), |frame| frame.tcp("S", b"")));
    let counts = Counts::none().at(0, DestCounts::input(&request).opening_active());
    case.arrives(Wire::Outside, request, INSIDE, out, counts)
}

/// Replies that cannot be forwarded go to the host as they are: it tells the server.
fn nat_refused_replies(family: Family) -> Case {
    let mut case = one(family, "nat: replies with TTL 1, and too long ones", UDP, Method::Masq);
    let counts = DestCounts::input(&family.request().udp(b"x")).opening_inactive();
    case = passes(case, Method::Masq, family.request(), |frame| frame.udp(b"x"), counts);
    let too_long = vec![7; 1500 - family.header() - 8 + 1];
    let longest = &too_long[1..];
    case = replies(case, family.reply().udp(longest), family.translated_reply().udp(longest));
    for reply in [
        Frame { ttl: 1, ..family.reply() }.udp(b"late"),
        Frame { ttl: 0, ..family.reply() }.udp(b"late"),
        family.reply().udp(&too_long),
        Frame { ttl: 1, dont_fragment: false, ..family.reply() }.udp(&too_long),
    ] {
        case = case.stops(Wire::Inside, reply, Reason::ReplyRefused);
    }
    if family == Family::Four {
        // But one that may be fragmented the host would send on, as from the server.
        let reply = Frame { dont_fragment: false, ..family.reply() }.udp(&too_long);
        case = case.stops(Wire::Inside, reply, Reason::NeedsFragmentation);
    }
    let reply = Frame { ttl: 2, ..family.reply() };
    replies(case, reply.udp(b"soon"), Frame { ttl: 1, ..family.translated_reply() }.udp(b"soon"))
}

/// What the host does not send on leaves its connection as it is.
fn nat_late_reset(family: Family) -> Case {
    let mut case = one(family, "nat: a reset with TTL 1", TCP, Method::Masq);
    let syn = |frame: Frame| frame.tcp("S", b"");
    case =
        passes(case, Method::Masq, family.request(), syn, DestCounts::input(&syn(family.request())).opening_active());
    case = case.stops(Wire::Inside, Frame { ttl: 1, ..family.reply() }.tcp("R", b""), Reason::ReplyRefused);
    replies(case, family.reply().tcp("SA", b""), family.translated_reply().tcp("SA", b""))
}

fn nat_reply_of_nobody(family: Family) -> Case {
    one(family, "nat: replies without a connection", TCP, Method::Masq)
        .stops(Wire::Inside, family.reply().tcp("SA", b""), Reason::NotService)
        .stops(Wire::Inside, family.reply().tcp("R", b""), Reason::NotService)
        .stops(Wire::Inside, family.reply().udp(b"hello"), Reason::NotService)
}

/// One client port, two services, one server: the server's ports tell the connections apart.
fn nat_two_services_of_one_server(family: Family) -> Case {
    let mut case = Case::new(family, "nat: one client port to two services of one server");
    for port in [PORT, 443] {
        case = case.service(TCP, port, &[(0, port + 8000, Method::Masq, 1)]);
        let request = Frame { to: (cast::VIP, port), ..family.request() };
        let out = forwarded(Method::Masq, 0, port + 8000, request, |frame| frame.tcp("S", b""));
        let counts = Counts::none().at(0, DestCounts::input(&request.tcp("S", b"")).opening_active());
        case = case.arrives(Wire::Outside, request.tcp("S", b""), INSIDE, out, counts);
    }
    for port in [443, PORT] {
        let reply = Frame { from: (cast::server(0), port + 8000), ..family.reply() };
        let out = Frame { from: (cast::VIP, port), ..family.translated_reply() };
        case = replies(case, reply.tcp("SA", b""), out.tcp("SA", b""));
    }
    case
}

/// A tunnel needs an MTU of 88, of IPv6 one of 1320; below that nothing that must not be fragmented and is longer than what
/// is left goes through, and nobody is told.
fn tunnel_over_a_tiny_link(family: Family) -> Case {
    let index = special::TINY;
    let case = Case::new(family, "tunnel: over a link that is too small").service(
        UDP,
        PORT,
        &[(index, PORT, Method::Tunnel, 1)],
    );
    let left = special::tiny_mtu(family) as usize - family.header();
    let request = family.request().udp(&vec![1; left - family.header() - 8 + 1]);
    let counts = Counts::of(Reason::TooBig).at(index, DestCounts::input(&request).opening_inactive());
    case.arrives(Wire::Outside, request.clone(), Verdict::Drop, request, counts)
}
