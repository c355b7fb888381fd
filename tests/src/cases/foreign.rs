//! What is none of the director's business, and what it cannot handle.

use std::net::Ipv4Addr;

use etherparse::EtherType;
use lb_common::{proto::Method, reason::Reason};

use super::*;
use crate::frames::{ethernet, padded};

pub(super) fn cases() -> Vec<Case> {
    vec![other_frames(), other_packets(), fragments(), addresses(), sources(), nothing_configured()]
}

/// A director with a service of every kind and a connection, for what comes next to be about neither.
fn busy(name: &str) -> Case {
    let mut case = Case::new(name);
    for (port, method) in (PORT..).zip(METHODS) {
        for protocol in [TCP, UDP] {
            case = case.service(protocol, port, &[(0, port, method, 1)]);
        }
    }
    passes(
        case,
        Method::Masq,
        REQUEST,
        |frame| frame.tcp("S", b""),
        DestCounts::input(&REQUEST.tcp("S", b"")).opening_active(),
    )
}

fn other_frames() -> Case {
    let mut case = busy("frames that are not IP, or not for one host");
    let arp = [0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0x0c, 0, 10, 0, 0, 2, 0, 0, 0, 0, 0, 0, 10, 9, 9, 9];
    let request = REQUEST.tcp("S", b"");
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
    for destination in [[0xff; 6], [1, 0, 0x5e, 9, 9, 9], [3, 0, 0, 0, 0, 1]] {
        let frame = Frame { macs: (cast::CLIENT_MAC, destination), ..REQUEST };
        case = case.stops(Wire::Outside, frame.tcp("S", b""), Reason::NotUnicast);
    }
    case
}

fn other_packets() -> Case {
    let mut case = busy("packets that are of no service");
    let router = Frame { to: (Ipv4Addr::new(10, 9, 9, 8), PORT), ..REQUEST };
    let port = Frame { to: (cast::VIP, 9), ..REQUEST };
    let server = Frame { to: (cast::server(0), PORT), ..REQUEST };
    for frame in [router, port, server] {
        case = case
            .stops(Wire::Outside, frame.tcp("S", b""), Reason::NotService)
            .stops(Wire::Outside, frame.tcp("A", b"data"), Reason::NotService)
            .stops(Wire::Outside, frame.udp(b"data"), Reason::NotService)
            .stops(Wire::Outside, frame.udp_unsummed(b""), Reason::NotService)
            .stops(Wire::Outside, Frame { ttl: 1, ..frame }.udp(b""), Reason::NotService)
            .stops(Wire::Outside, Frame { options: &[1; 4], ..frame }.udp(b""), Reason::NotService);
    }
    // SCTP, GRE, IPIP, ESP, and a protocol that nobody has.
    for protocol in [132, 47, 4, 50, 0, 255] {
        case = case.stops(Wire::Outside, REQUEST.packet(protocol, &[0; 20]), Reason::OtherProtocol);
        case = case.stops(Wire::Outside, REQUEST.packet(protocol, &[]), Reason::OtherProtocol);
    }
    // A server's own traffic, and a wrong IP checksum of a packet that is nobody's.
    let mut wrong = port.udp(b"x");
    wrong[ETHERNET + 10] ^= 0x55;
    case.stops(Wire::Outside, wrong, Reason::NotService)
        .stops(Wire::Inside, Frame { to: (cast::CLIENT, 53), ..REPLY }.udp(b"query"), Reason::NotService)
        .stops(Wire::Inside, Frame { from: (cast::server(0), 22), ..REPLY }.tcp("SA", b""), Reason::NotService)
}

/// Ports are known of the first fragment only: none gets through.
fn fragments() -> Case {
    let mut case = busy("fragments");
    let elsewhere = Frame { to: (Ipv4Addr::new(10, 9, 9, 8), 0), ..REQUEST };
    let whole = Frame { to: (cast::VIP, PORT), ..REQUEST }.udp(&[0; 64]);
    let payload = &whole[ETHERNET + 20..];
    for protocol in [17, 6, ICMP, 132] {
        for (offset, more) in [(0, true), (4, true), (4, false), (0x1fff, false)] {
            let fragment = |frame: Frame| frame.fragment(protocol, offset, more, &payload[..32]);
            case = case
                .stops(Wire::Outside, fragment(REQUEST), Reason::Fragment)
                .stops(Wire::Outside, fragment(elsewhere), Reason::NotService)
                .stops(Wire::Inside, fragment(REPLY), Reason::NotService);
        }
    }
    case
}

/// Segments to services that open no connection, and belong to none.
fn addresses() -> Case {
    let mut case = busy("segments that open no connection");
    for flags in ["A", "FA", "F", "R", "RA", "SR", "P", ""] {
        let frame = Frame { from: (cast::CLIENT, 1), ..REQUEST }.tcp(flags, b"");
        case = case.stops(Wire::Outside, frame, Reason::NoConnection);
    }
    for port in [PORT, PORT + 1] {
        let from_ftp = Frame { from: (cast::CLIENT, 20), to: (cast::VIP, port), ..REQUEST };
        case = case
            .stops(Wire::Outside, from_ftp.tcp("S", b""), Reason::FtpDataSource)
            .stops(Wire::Outside, from_ftp.udp(b""), Reason::FtpDataSource)
            .stops(Wire::Outside, from_ftp.tcp("A", b""), Reason::NoConnection);
    }
    // A SYN with an ACK opens one.
    let request = Frame { from: (cast::CLIENT, 2), ..REQUEST };
    let build = |frame: Frame| frame.tcp("SA", b"");
    passes(case, Method::Masq, request, build, DestCounts::input(&build(request)).opening_active())
}

/// Sources that no packet on a wire may have.
fn sources() -> Case {
    let mut case = busy("sources that are no host");
    for source in [[0, 0, 0, 0], [0, 1, 2, 3], [127, 0, 0, 1], [224, 0, 0, 5], [239, 1, 1, 1], [255, 255, 255, 255]] {
        let frame = Frame { from: (source.into(), CLIENT_PORT), ..REQUEST };
        case = case.stops(Wire::Outside, frame.tcp("S", b""), Reason::SourceAddress).stops(
            Wire::Outside,
            frame.udp(b""),
            Reason::SourceAddress,
        );
    }
    // What was reserved once is as good as any other.
    let request = Frame { from: ([240, 0, 0, 1].into(), CLIENT_PORT), ..REQUEST };
    let build = |frame: Frame| frame.tcp("S", b"");
    passes(case, Method::Masq, request, build, DestCounts::input(&build(request)).opening_active())
}

fn nothing_configured() -> Case {
    Case::new("a director without services")
        .stops(Wire::Outside, REQUEST.tcp("S", b""), Reason::NotService)
        .stops(Wire::Outside, REQUEST.udp(b"x"), Reason::NotService)
        .stops(Wire::Inside, REPLY.tcp("SA", b""), Reason::NotService)
        .stops(Wire::Outside, REQUEST.icmp(8, 0, [0; 4], b"ping"), Reason::Icmp)
        .stops(Wire::Outside, REQUEST.fragment(17, 0, true, &[0; 8]), Reason::NotService)
        .stops(Wire::Outside, REQUEST.packet(17, &[0; 4]), Reason::NotService)
}
