//! The same over IPv6, where headers have no checksum and no options of their own.

use std::net::Ipv6Addr;

use etherparse::{IpNumber, Ipv6FlowLabel, Ipv6Header, PacketBuilder, PacketBuilderStep};
use lb_common::decapsulation::Decapsulation;

use super::{Cases, ECN, ETHERNET, Expected};
use crate::cast::{self, six};

/// Length of an IPv6 header.
const IP: usize = 40;
/// Where a header has the length of what follows it.
const PAYLOAD_LEN: std::ops::Range<usize> = 4..6;
/// Where a header says what follows it.
const NEXT: usize = 6;
/// IPv6 in IP.
const IPV6: u8 = 41;
/// The fragment header.
const FRAGMENT: u8 = 44;

fn from_to(from: Ipv6Addr, to: Ipv6Addr, traffic_class: u8) -> PacketBuilderStep<etherparse::IpHeaders> {
    let header = Ipv6Header {
        traffic_class,
        // All bits, so that a wrong mask is seen.
        flow_label: Ipv6FlowLabel::try_new(0xf_ffff).expect("twenty bits"),
        payload_length: 0,
        next_header: IpNumber(0),
        hop_limit: 63,
        source: from.octets(),
        destination: to.octets(),
    };
    PacketBuilder::ethernet2(cast::DIRECTOR_INSIDE_MAC, cast::server_mac(0))
        .ip(etherparse::IpHeaders::Ipv6(header, Default::default()))
}

fn segment(from: Ipv6Addr, to: Ipv6Addr, traffic_class: u8) -> Vec<u8> {
    let mut frame = Vec::new();
    let step = from_to(from, to, traffic_class).tcp(40_000, 80, 1000, 64_240).syn();
    step.write(&mut frame, &[]).expect("a vector takes every byte");
    frame
}

/// A frame with a packet for [`six::VIP`], as it was before it was tunnelled.
pub fn inner() -> Vec<u8> {
    segment(six::CLIENT, six::VIP, 0)
}

/// Puts the packet of a frame into another, from the director to the first real server, with these extension headers before
/// it, the first of which has the number `next`.
fn behind(inner: &[u8], next: u8, extensions: &[u8]) -> Vec<u8> {
    let (ethernet, packet) = inner.split_at(ETHERNET);
    let mut frame = ethernet.to_vec();
    frame.extend([0x60, 0, 0, 0]);
    frame.extend(((extensions.len() + packet.len()) as u16).to_be_bytes());
    frame.extend([next, 64]);
    frame.extend(six::DIRECTOR_INSIDE.octets());
    frame.extend(six::server(0).octets());
    frame.extend(extensions);
    frame.extend(packet);
    frame
}

/// Puts the packet of a frame into another, from the director to the first real server.
pub fn tunnelled(inner: &[u8]) -> Vec<u8> {
    behind(inner, IPV6, &[])
}

/// Makes the packet say that `len` bytes follow its header.
fn set_payload_len(packet: &mut [u8], len: u16) {
    packet[PAYLOAD_LEN].copy_from_slice(&len.to_be_bytes());
}

impl Cases {
    /// A sound tunnelled frame with this changed in its outer header.
    fn outer6(&mut self, name: &str, change: impl FnOnce(&mut [u8]), expected: Expected) {
        let mut frame = tunnelled(&inner());
        change(&mut frame[ETHERNET..]);
        self.add(format!("IPv6, outer {name}"), frame, expected);
    }

    /// A sound tunnelled frame with this changed in its inner header.
    fn inner6(&mut self, name: &str, change: impl FnOnce(&mut [u8]), expected: impl FnOnce(Vec<u8>) -> Expected) {
        let mut frame = inner();
        change(&mut frame[ETHERNET..]);
        self.add(format!("IPv6, inner {name}"), tunnelled(&frame), expected(frame));
    }
}

/// Adds every kind of frame with an IPv6 packet that a real server must tell apart.
pub(super) fn add(cases: &mut Cases) {
    sound(cases);
    truncated(cases);
    bad_outer(cases);
    fragments(cases);
    bad_inner(cases);
    congestion(cases);
    others(cases);
}

fn sound(cases: &mut Cases) {
    cases.add("IPv6, sound", tunnelled(&inner()), Expected::Delivered(inner()));
    let mut datagram = Vec::new();
    let step = from_to(six::CLIENT, six::VIP, 0).udp(5, 53);
    step.write(&mut datagram, &[7; 1400]).expect("a vector takes every byte");
    cases.add("IPv6, sound, long", tunnelled(&datagram), Expected::Delivered(datagram));
    let mut padded = inner();
    let mut frame = tunnelled(&padded);
    padded.extend([0; 6]);
    frame.extend([0; 6]);
    cases.add("IPv6, sound, padded", frame, Expected::Delivered(padded));
    let mut bare = inner()[..ETHERNET + IP].to_vec();
    set_payload_len(&mut bare[ETHERNET..], 0);
    cases.add("IPv6, sound, carries a header only", tunnelled(&bare), Expected::Delivered(bare));
    cases.outer6("traffic class and flow label", |ip| ip[..4].copy_from_slice(&[0x6f, 0xcf, 0xff, 0xff]), {
        Expected::Delivered(inner())
    });
    cases.outer6("hop limit", |ip| ip[7] = 0, Expected::Delivered(inner()));
    // What the carried packet carries is the host's business: hop-by-hop options, a fragment, ICMPv6, nothing.
    for next in [0, FRAGMENT, 58, 59, 255] {
        cases.inner6(&format!("protocol {next}"), |ip| ip[NEXT] = next, Expected::Delivered);
    }
}

fn truncated(cases: &mut Cases) {
    let frame = tunnelled(&inner());
    // Up to the end of the inner destination.
    let recognised = ETHERNET + IP + IP;
    for len in 0..frame.len() {
        let expected =
            if len < recognised { Expected::Untouched } else { Expected::Dropped(Decapsulation::OuterTotalLength) };
        cases.add(format!("IPv6, frame truncated to {len}"), frame[..len].to_vec(), expected);
    }
    // The same with an outer header that says so.
    for len in ETHERNET + IP..frame.len() {
        let mut frame = frame[..len].to_vec();
        set_payload_len(&mut frame[ETHERNET..], (len - ETHERNET - IP) as u16);
        let expected =
            if len < recognised { Expected::Untouched } else { Expected::Dropped(Decapsulation::InnerTotalLength) };
        cases.add(format!("IPv6, packet truncated to {len}"), frame, expected);
    }
}

fn bad_outer(cases: &mut Cases) {
    use Decapsulation::{InnerTotalLength, InnerTruncated, OuterTotalLength};
    let whole = (inner().len() - ETHERNET) as u16;
    for version in [0, 3, 4, 5, 7, 15] {
        cases.outer6(&format!("version {version}"), |ip| ip[0] = version << 4, Expected::Untouched);
    }
    let mut length = |len: u16, outcome| {
        cases.outer6(&format!("payload length {len}"), |ip| set_payload_len(ip, len), Expected::Dropped(outcome));
    };
    for len in [whole + 1, 1500, u16::MAX] {
        length(len, OuterTotalLength);
    }
    // 0 is also what a jumbogram says (RFC 2675), which no Ethernet frame holds.
    for len in [0, 1, 20, 39] {
        length(len, InnerTruncated);
    }
    for len in [40, 41, whole - 1] {
        length(len, InnerTotalLength);
    }
}

fn fragments(cases: &mut Cases) {
    use Decapsulation::{OuterFragment, OuterTotalLength};
    let header = |next: u8, offset_and_flags: u16| {
        let [high, low] = offset_and_flags.to_be_bytes();
        [next, 0, high, low, 0, 0, 0, 1]
    };
    let mut fragment = |name: &str, inner: &[u8], header: [u8; 8], expected| {
        cases.add(format!("IPv6, {name}"), behind(inner, FRAGMENT, &header), expected);
    };
    let first = header(IPV6, 1);
    fragment("first fragment", &inner(), first, Expected::Dropped(OuterFragment));
    fragment("only fragment", &inner(), header(IPV6, 0), Expected::Dropped(OuterFragment));
    fragment("first fragment, reserved bits", &inner(), header(IPV6, 0b110), Expected::Dropped(OuterFragment));
    for offset in [1, 2, 31, 32, 0x1000, 0x1fff] {
        fragment(&format!("later fragment {offset}"), &inner(), header(IPV6, offset << 3), Expected::Untouched);
        fragment(&format!("middle fragment {offset}"), &inner(), header(IPV6, offset << 3 | 1), Expected::Untouched);
    }
    for next in [0, 4, 6, 17, FRAGMENT, 255] {
        fragment(&format!("first fragment of protocol {next}"), &inner(), header(next, 1), Expected::Untouched);
    }
    let other = segment(six::CLIENT, six::server(0), 0);
    fragment("first fragment for another address", &other, first, Expected::Untouched);

    let frame = behind(&inner(), FRAGMENT, &first);
    let recognised = ETHERNET + IP + first.len() + IP;
    for len in ETHERNET + IP..frame.len() {
        let expected = if len < recognised { Expected::Untouched } else { Expected::Dropped(OuterTotalLength) };
        cases.add(format!("IPv6, fragment truncated to {len}"), frame[..len].to_vec(), expected);
    }
}

fn bad_inner(cases: &mut Cases) {
    use Decapsulation::{InnerTotalLength, InnerVersion};
    for version in [0, 3, 4, 5, 7, 15] {
        let expected = |_| Expected::Dropped(InnerVersion);
        cases.inner6(&format!("version {version}"), |ip| ip[0] = version << 4, expected);
    }
    // A SYN without options is 20 bytes long.
    for len in [21, 1500, u16::MAX] {
        let expected = |_| Expected::Dropped(InnerTotalLength);
        cases.inner6(&format!("payload length {len}"), |ip| set_payload_len(ip, len), expected);
    }
    // A shorter one leaves bytes behind it, which are padding to the host.
    for len in [0, 1, 19] {
        cases.inner6(&format!("payload length {len}"), |ip| set_payload_len(ip, len), Expected::Delivered);
    }
}

fn congestion(cases: &mut Cases) {
    for (inner_ecn, row) in (0..).zip(ECN) {
        for (outer_ecn, left) in (0..).zip(row) {
            for dscp in [0, 46, 63] {
                let inner = |ecn: u8| segment(six::CLIENT, six::VIP, dscp << 2 | ecn);
                let mut frame = tunnelled(&inner(inner_ecn));
                frame[ETHERNET..ETHERNET + 2].copy_from_slice(&(0x6b80_u16 | outer_ecn << 4).to_be_bytes());
                let dropped = Expected::Dropped(Decapsulation::CongestionUnknown);
                let expected = left.map_or(dropped, |ecn| Expected::Delivered(inner(ecn)));
                cases.add(format!("IPv6, congestion {inner_ecn} in {outer_ecn}, DSCP {dscp}"), frame, expected);
            }
        }
    }
}

fn others(cases: &mut Cases) {
    cases.add("IPv6, no tunnel", inner(), Expected::Untouched);
    for byte in 0..16 {
        let mut address = six::VIP.octets();
        address[byte] ^= 1;
        let other = segment(six::CLIENT, address.into(), 0);
        cases.add(format!("IPv6, another address, by byte {byte}"), tunnelled(&other), Expected::Untouched);
    }
    let reply = segment(six::VIP, six::CLIENT, 0);
    cases.add("IPv6, from the address", tunnelled(&reply), Expected::Untouched);
    let mut broken = segment(six::CLIENT, six::server(0), 0);
    broken[ETHERNET] = 0;
    cases.add("IPv6, another address, broken", tunnelled(&broken), Expected::Untouched);
    for protocol in [0, 1, 4, 6, 17, 43, 47, 50, 51, 58, 59, 60, 255] {
        cases.outer6(&format!("protocol {protocol}"), |ip| ip[NEXT] = protocol, Expected::Untouched);
    }
    // What a tunnel device of Linux puts there (RFC 2473 section 4.1.1): a limit to further tunnels.
    let limit = [IPV6, 0, 4, 1, 4, 1, 1, 0];
    cases.add("IPv6, destination options", behind(&inner(), 60, &limit), Expected::Untouched);
    // Padding that would be an offset of 0 in a fragment header.
    for next in [0, 43, 60, 135] {
        let header = [IPV6, 0, 0, 0, 1, 2, 0, 0];
        cases.add(format!("IPv6, extension header {next}"), behind(&inner(), next, &header), Expected::Untouched);
    }
    let four = super::inner();
    cases.add("IPv4 in IPv6", behind(&four, 4, &[]), Expected::Untouched);
    for (name, ether_type) in [("ARP", [0x08, 0x06]), ("IPv4", [0x08, 0]), ("VLAN", [0x81, 0x00]), ("802.3", [0, 80])] {
        let mut frame = tunnelled(&inner());
        frame[12..14].copy_from_slice(&ether_type);
        cases.add(format!("IPv6, frame type {name}"), frame, Expected::Untouched);
    }
    for first in [0x01, 0x33, 0xff] {
        let mut frame = tunnelled(&inner());
        frame[0] = first;
        cases.add(format!("IPv6, link-layer group address {first:#x}"), frame, Expected::Untouched);
    }
}
