//! What is none of the director's business, and what it cannot handle.

use std::net::Ipv4Addr;

use etherparse::EtherType;
use lb_common::{proto::Method, reason::Reason};

use super::*;
use crate::{
    family::six,
    frames::{ethernet, padded},
};

pub(super) fn cases(family: Family) -> Vec<Case> {
    let mut cases = vec![
        other_frames(family),
        other_packets(family),
        fragments(family),
        addresses(family),
        sources(family),
        nothing_configured(family),
    ];
    if family == Family::Six {
        cases.push(neighbour_discovery());
    }
    cases
}

/// A director with a service of every kind and a connection, for what comes next to be about neither.
fn busy(family: Family, name: &str) -> Case {
    let mut case = Case::new(family, name);
    for (port, method) in (PORT..).zip(METHODS) {
        for protocol in [TCP, UDP] {
            case = case.service(protocol, port, &[(0, port, method, 1)]);
        }
    }
    passes(
        case,
        Method::Masq,
        family.request(),
        |frame| frame.tcp("S", b""),
        DestCounts::input(&family.request().tcp("S", b"")).opening_active(),
    )
}

fn other_frames(family: Family) -> Case {
    let mut case = busy(family, "frames that are not IP, or not for one host");
    let arp = [0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0x0c, 0, 10, 0, 0, 2, 0, 0, 0, 0, 0, 0, 10, 9, 9, 9];
    let request = family.request().tcp("S", b"");
    let tagged = [&[0, 5][..], &request[12..]].concat();
    for (ether_type, payload) in [
        (EtherType::ARP, &arp[..]),
        (EtherType::VLAN_TAGGED_FRAME, &tagged),
        (EtherType::PROVIDER_BRIDGING, &tagged),
        (EtherType(0x88cc), b"anything"),
        // A length, as IEEE 802.3 has it.
        (EtherType(46), &[0xaa; 46]),
    ] {
        let frame = [&ethernet(FROM_CLIENT, ether_type), payload].concat();
        case = case.stops(Wire::Outside, padded(frame), Reason::NotIp);
    }
    for destination in [[0xff; 6], [1, 0, 0x5e, 9, 9, 9], [0x33, 0x33, 0, 0, 0, 1], [3, 0, 0, 0, 0, 1]] {
        let frame = Frame { macs: (cast::CLIENT_MAC, destination), ..family.request() };
        case = case.stops(Wire::Outside, frame.tcp("S", b""), Reason::NotUnicast);
    }
    case
}

fn other_packets(family: Family) -> Case {
    let mut case = busy(family, "packets that are of no service");
    let router = Frame { to: (Ipv4Addr::new(10, 9, 9, 8), PORT), ..family.request() };
    let port = Frame { to: (cast::VIP, 9), ..family.request() };
    let server = Frame { to: (cast::server(0), PORT), ..family.request() };
    let options: &[u8] = if family == Family::Four { &[1; 4] } else { &[] };
    for frame in [router, port, server] {
        case = case
            .stops(Wire::Outside, frame.tcp("S", b""), Reason::NotService)
            .stops(Wire::Outside, frame.tcp("A", b"data"), Reason::NotService)
            .stops(Wire::Outside, frame.udp(b"data"), Reason::NotService)
            .stops(Wire::Outside, frame.udp_unsummed(b""), Reason::NotService)
            .stops(Wire::Outside, Frame { ttl: 1, ..frame }.udp(b""), Reason::NotService)
            .stops(Wire::Outside, Frame { options, ..frame }.udp(b""), Reason::NotService);
    }
    // GRE, IP in IP, ESP, what the other family alone has, and a protocol that nobody has.
    let others = if family == Family::Four { [47, 4, 50, 0, 58, 255] } else { [47, 41, 50, 59, 1, 255] };
    for protocol in others {
        case = case.stops(Wire::Outside, family.request().packet(protocol, &[0; 20]), Reason::OtherProtocol);
        case = case.stops(Wire::Outside, family.request().packet(protocol, &[]), Reason::OtherProtocol);
    }
    if family == Family::Four {
        // A wrong IP checksum of a packet that is nobody's.
        let mut wrong = port.udp(b"x");
        wrong[ETHERNET + 10] ^= 0x55;
        case = case.stops(Wire::Outside, wrong, Reason::NotService);
    }
    // A server's own traffic.
    case.stops(Wire::Inside, Frame { to: (cast::CLIENT, 53), ..family.reply() }.udp(b"query"), Reason::NotService)
        .stops(Wire::Inside, Frame { from: (cast::server(0), 22), ..family.reply() }.tcp("SA", b""), Reason::NotService)
}

/// Messages of neighbour discovery are the host's, whoever sends them to whom: without it nobody finds the director, nor the
/// director anybody.
fn neighbour_discovery() -> Case {
    let family = Family::Six;
    let mut case = busy(family, "neighbour discovery");
    // What is asked about, and the asker's link-layer address.
    let target = six(cast::VIP).octets();
    let body = [&target[..], &[1, 1], &cast::CLIENT_MAC].concat();
    let (all_nodes, all_nodes_mac) = (Ipv4Addr::new(224, 0, 0, 1), [0x33, 0x33, 0, 0, 0, 1]);
    // Router solicitation and advertisement, neighbour solicitation and advertisement, redirect.
    for kind in 133..=137 {
        for (wire, macs, from) in [
            (Wire::Outside, FROM_CLIENT, cast::CLIENT_GATEWAY),
            (Wire::Inside, from_server(0), cast::server(0)),
            // Whoever asks whether an address is in use has none yet.
            (Wire::Outside, FROM_CLIENT, Ipv4Addr::UNSPECIFIED),
        ] {
            for to in [cast::VIP, cast::DIRECTOR_OUTSIDE, cast::server(0), cast::CLIENT] {
                let frame = Frame { ttl: 255, ..family.frame(macs, (from, 0), (to, 0)) };
                case = case.stops(wire, frame.icmp(kind, 0, [0; 4], &body), Reason::Icmp);
            }
            let macs = (macs.0, all_nodes_mac);
            let frame = Frame { ttl: 255, ..family.frame(macs, (from, 0), (all_nodes, 0)) };
            case = case.stops(wire, frame.icmp(kind, 0, [0; 4], &body), Reason::NotUnicast);
        }
    }
    case
}

/// Ports are known of the first fragment only: none gets through.
fn fragments(family: Family) -> Case {
    let mut case = busy(family, "fragments");
    let elsewhere = Frame { to: (Ipv4Addr::new(10, 9, 9, 8), 0), ..family.request() };
    let whole = Frame { to: (cast::VIP, PORT), ..family.request() }.udp(&[0; 64]);
    let payload = &whole[ETHERNET + family.header()..];
    for protocol in [17, 6, family.icmp(), 132] {
        for (offset, more) in [(0, true), (4, true), (4, false), (0x1fff, false)] {
            let fragment = |frame: Frame| frame.fragment(protocol, offset, more, &payload[..32]);
            case = case
                .stops(Wire::Outside, fragment(family.request()), Reason::Fragment)
                .stops(Wire::Outside, fragment(elsewhere), Reason::NotService)
                .stops(Wire::Inside, fragment(family.reply()), Reason::NotService);
        }
    }
    case
}

/// Segments to services that open no connection, and belong to none.
fn addresses(family: Family) -> Case {
    let mut case = busy(family, "segments that open no connection");
    for flags in ["A", "FA", "F", "R", "RA", "SR", "P", ""] {
        let frame = Frame { from: (cast::CLIENT, 1), ..family.request() }.tcp(flags, b"");
        case = case.stops(Wire::Outside, frame, Reason::NoConnection);
    }
    for port in [PORT, PORT + 1] {
        let from_ftp = Frame { from: (cast::CLIENT, 20), to: (cast::VIP, port), ..family.request() };
        case = case
            .stops(Wire::Outside, from_ftp.tcp("S", b""), Reason::FtpDataSource)
            .stops(Wire::Outside, from_ftp.udp(b""), Reason::FtpDataSource)
            .stops(Wire::Outside, from_ftp.tcp("A", b""), Reason::NoConnection);
    }
    // A SYN with an ACK opens one.
    let request = Frame { from: (cast::CLIENT, 2), ..family.request() };
    let build = |frame: Frame| frame.tcp("SA", b"");
    passes(case, Method::Masq, request, build, DestCounts::input(&build(request)).opening_active())
}

/// Sources that no packet on a wire may have.
fn sources(family: Family) -> Case {
    let mut case = busy(family, "sources that are no host");
    let sources: &[[u8; 4]] = match family {
        Family::Four => {
            &[[0, 0, 0, 0], [0, 1, 2, 3], [127, 0, 0, 1], [224, 0, 0, 5], [239, 1, 1, 1], [255, 255, 255, 255]]
        }
        Family::Six => &[[0, 0, 0, 0], [127, 0, 0, 1], [224, 0, 0, 5], [239, 1, 1, 1]],
    };
    for &source in sources {
        let frame = Frame { from: (source.into(), CLIENT_PORT), ..family.request() };
        case = case.stops(Wire::Outside, frame.tcp("S", b""), Reason::SourceAddress).stops(
            Wire::Outside,
            frame.udp(b""),
            Reason::SourceAddress,
        );
    }
    // What was reserved once is as good as any other, and so is a unique local address.
    let request = Frame { from: ([240, 0, 0, 1].into(), CLIENT_PORT), ..family.request() };
    let build = |frame: Frame| frame.tcp("S", b"");
    passes(case, Method::Masq, request, build, DestCounts::input(&build(request)).opening_active())
}

fn nothing_configured(family: Family) -> Case {
    let ping = if family == Family::Four { 8 } else { 128 };
    Case::new(family, "a director without services")
        .stops(Wire::Outside, family.request().tcp("S", b""), Reason::NotService)
        .stops(Wire::Outside, family.request().udp(b"x"), Reason::NotService)
        .stops(Wire::Inside, family.reply().tcp("SA", b""), Reason::NotService)
        .stops(Wire::Outside, family.request().icmp(ping, 0, [0; 4], b"ping"), Reason::Icmp)
        .stops(Wire::Outside, family.request().fragment(17, 0, true, &[0; 8]), Reason::NotService)
        .stops(Wire::Outside, family.request().packet(17, &[0; 4]), Reason::NotService)
}
