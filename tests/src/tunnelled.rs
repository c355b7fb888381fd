//! Packets in packets: what a real server gets from a director that tunnels, and what it might get instead.

use lb_common::{checksum, decapsulation::Decapsulation};

use crate::{cast, frames::Frame};

pub mod six;

/// Length of an Ethernet header.
const ETHERNET: usize = 14;
/// Length of an IPv4 header without options.
const IP: usize = 20;

/// What is to become of a frame.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Expected {
    /// The host gets it as it is, and nothing is counted.
    Untouched,
    /// The host gets this frame.
    Delivered(Vec<u8>),
    /// It is dropped.
    Dropped(Decapsulation),
}

/// A frame, and what is to become of it.
#[derive(Clone, Debug)]
pub struct Case {
    /// What is special about it.
    pub name: String,
    /// The frame.
    pub frame: Vec<u8>,
    /// What is to become of it, when the host serves [`cast::VIP`] and [`cast::six::VIP`].
    pub expected: Expected,
}

/// A frame with a packet for [`cast::VIP`], as it was before it was tunnelled.
pub fn inner() -> Vec<u8> {
    Frame::new((cast::DIRECTOR_INSIDE_MAC, cast::server_mac(0)), (cast::CLIENT, 40_000), (cast::VIP, 80)).tcp("S", b"")
}

/// Puts the packet of a frame into another, from the director to the first real server, with `options` bytes of IP options.
pub fn tunnelled(inner: &[u8], options: usize) -> Vec<u8> {
    let (ethernet, packet) = inner.split_at(ETHERNET);
    let header = IP + options;
    let mut frame = ethernet.to_vec();
    frame.extend([0x40 | (header / 4) as u8, 0]);
    frame.extend(((header + packet.len()) as u16).to_be_bytes());
    frame.extend([0, 0, 0x40, 0, 64, 4, 0, 0]);
    frame.extend(cast::DIRECTOR_INSIDE.octets());
    frame.extend(cast::server(0).octets());
    // No operation.
    frame.extend(std::iter::repeat_n(1, options));
    frame.extend(packet);
    right_checksum(&mut frame, ETHERNET);
    frame
}

/// Makes the checksum of the IP header at `offset` right, if the header lies within the frame.
pub fn right_checksum(frame: &mut [u8], offset: usize) {
    let len = usize::from(frame[offset] & 0xf) * 4;
    frame[offset + 10..offset + 12].fill(0);
    let Some(header) = frame.get(offset..offset + len) else { return };
    let check = !checksum::fold(checksum::sum(header));
    frame[offset + 10..offset + 12].copy_from_slice(&check.to_ne_bytes());
}

/// Puts `options` bytes of IP options into the packet of a frame.
fn with_options(mut frame: Vec<u8>, options: usize) -> Vec<u8> {
    frame[ETHERNET] += (options / 4) as u8;
    let len = (frame.len() - ETHERNET + options) as u16;
    frame[ETHERNET + 2..ETHERNET + 4].copy_from_slice(&len.to_be_bytes());
    frame.splice(ETHERNET + IP..ETHERNET + IP, std::iter::repeat_n(1, options));
    right_checksum(&mut frame, ETHERNET);
    frame
}

/// Collects cases.
#[derive(Default)]
struct Cases(Vec<Case>);

impl Cases {
    fn add(&mut self, name: impl Into<String>, frame: Vec<u8>, expected: Expected) {
        self.0.push(Case { name: name.into(), frame, expected });
    }

    /// A sound tunnelled frame with this changed in its outer header, whose checksum is made right again.
    fn outer(&mut self, name: &str, change: impl FnOnce(&mut [u8]), expected: Expected) {
        let mut frame = tunnelled(&inner(), 0);
        change(&mut frame[ETHERNET..]);
        right_checksum(&mut frame, ETHERNET);
        self.add(format!("outer {name}"), frame, expected);
    }

    /// A sound tunnelled frame with this changed in its inner header, whose checksum is made right again.
    fn inner(&mut self, name: &str, change: impl FnOnce(&mut [u8]), outcome: Decapsulation) {
        let mut frame = inner();
        change(&mut frame[ETHERNET..]);
        right_checksum(&mut frame, ETHERNET);
        self.add(format!("inner {name}"), tunnelled(&frame, 0), Expected::Dropped(outcome));
    }
}

/// Every kind of frame that a real server must tell apart.
pub fn cases() -> Vec<Case> {
    let mut cases = Cases::default();
    sound(&mut cases);
    truncated(&mut cases);
    bad_outer(&mut cases);
    bad_inner(&mut cases);
    congestion(&mut cases);
    others(&mut cases);
    six::add(&mut cases);
    cases.0
}

fn sound(cases: &mut Cases) {
    for outer in (0..=40).step_by(4) {
        for options in (0..=40).step_by(20) {
            let inner = with_options(inner(), options);
            let name = format!("sound, {outer} bytes of outer and {options} of inner options");
            cases.add(name, tunnelled(&inner, outer), Expected::Delivered(inner));
        }
    }
    let frame = Frame::new((cast::DIRECTOR_INSIDE_MAC, cast::server_mac(0)), (cast::CLIENT, 5), (cast::VIP, 53));
    let datagram = frame.udp(&[7; 1400]);
    cases.add("sound, long", tunnelled(&datagram, 0), Expected::Delivered(datagram));
    let mut padded = inner();
    let mut frame = tunnelled(&padded, 0);
    padded.extend([0; 6]);
    frame.extend([0; 6]);
    cases.add("sound, padded", frame, Expected::Delivered(padded));
    // Of a fragment that the client sent, the host puts together the whole.
    let mut fragment = inner();
    fragment[ETHERNET + 6] = 0x20;
    right_checksum(&mut fragment, ETHERNET);
    cases.add("sound, carries a fragment", tunnelled(&fragment, 0), Expected::Delivered(fragment));
}

fn truncated(cases: &mut Cases) {
    let frame = tunnelled(&inner(), 4);
    // Up to the end of the inner destination.
    let recognised = ETHERNET + IP + 4 + IP;
    for len in 0..frame.len() {
        let expected =
            if len < recognised { Expected::Untouched } else { Expected::Dropped(Decapsulation::OuterTotalLength) };
        cases.add(format!("frame truncated to {len}"), frame[..len].to_vec(), expected);
    }
    // The same with an outer header that says so.
    for len in ETHERNET + IP + 4..frame.len() {
        let mut frame = frame[..len].to_vec();
        frame[ETHERNET + 2..ETHERNET + 4].copy_from_slice(&((len - ETHERNET) as u16).to_be_bytes());
        right_checksum(&mut frame, ETHERNET);
        let expected =
            if len < recognised { Expected::Untouched } else { Expected::Dropped(Decapsulation::InnerTotalLength) };
        cases.add(format!("packet truncated to {len}"), frame, expected);
    }
}

fn bad_outer(cases: &mut Cases) {
    use Decapsulation::{InnerTotalLength, InnerTruncated, OuterChecksum, OuterFragment, OuterTotalLength};
    let whole = (tunnelled(&inner(), 0).len() - ETHERNET) as u16;
    let total = |len: u16| move |ip: &mut [u8]| ip[2..4].copy_from_slice(&len.to_be_bytes());
    for version in [0, 3, 5, 6, 15] {
        cases.outer(&format!("version {version}"), |ip| ip[0] = version << 4 | 5, Expected::Untouched);
    }
    for words in 0..5 {
        cases.outer(&format!("header of {words} words"), |ip| ip[0] = 0x40 | words, Expected::Untouched);
    }
    for len in [0, 1, 19, whole + 1, 1500, u16::MAX] {
        cases.outer(&format!("total length {len}"), total(len), Expected::Dropped(OuterTotalLength));
    }
    for len in [20, 21, 39] {
        cases.outer(&format!("total length {len}"), total(len), Expected::Dropped(InnerTruncated));
    }
    for len in [40, 41, whole - 1] {
        cases.outer(&format!("total length {len}"), total(len), Expected::Dropped(InnerTotalLength));
    }
    cases.outer("first fragment", |ip| ip[6] = 0x20, Expected::Dropped(OuterFragment));
    cases.outer("later fragment", |ip| ip[7] = 1, Expected::Untouched);
    cases.outer("last fragment far behind", |ip| ip[6..8].copy_from_slice(&[0x1f, 0xff]), Expected::Untouched);
    for byte in [1, 3, 8, 10, 11, 15, 16] {
        let mut frame = tunnelled(&inner(), 0);
        // Makes the total length smaller, or the frame would be too short for it.
        frame[ETHERNET + byte] = if byte == 3 { frame[ETHERNET + byte] - 1 } else { !frame[ETHERNET + byte] };
        cases.add(format!("outer checksum, byte {byte} changed"), frame, Expected::Dropped(OuterChecksum));
    }
    let mut frame = tunnelled(&inner(), 40);
    frame[ETHERNET + IP + 39] ^= 1;
    cases.add("outer checksum, last option changed", frame, Expected::Dropped(OuterChecksum));
}

fn bad_inner(cases: &mut Cases) {
    use Decapsulation::{InnerChecksum, InnerHeaderLength, InnerTotalLength, InnerTruncated, InnerVersion};
    let whole = (inner().len() - ETHERNET) as u16;
    for version in [0, 3, 5, 6, 15] {
        cases.inner(&format!("version {version}"), |ip| ip[0] = version << 4 | 5, InnerVersion);
    }
    for words in 0..5 {
        cases.inner(&format!("header of {words} words"), |ip| ip[0] = 0x40 | words, InnerHeaderLength);
    }
    // A SYN without options is 40 bytes long.
    for words in 11..16 {
        cases.inner(&format!("header of {words} words"), |ip| ip[0] = 0x40 | words, InnerTruncated);
    }
    for len in [0, 19, whole + 1, 1500, u16::MAX] {
        let change = |ip: &mut [u8]| ip[2..4].copy_from_slice(&len.to_be_bytes());
        cases.inner(&format!("total length {len}"), change, InnerTotalLength);
    }
    for byte in [1, 4, 8, 9, 10, 11, 12] {
        let mut frame = inner();
        frame[ETHERNET + byte] ^= 0x10;
        cases.add(
            format!("inner checksum, byte {byte} changed"),
            tunnelled(&frame, 0),
            Expected::Dropped(InnerChecksum),
        );
    }
    let mut frame = with_options(inner(), 40);
    frame[ETHERNET + IP + 39] ^= 1;
    cases.add("inner checksum, last option changed", tunnelled(&frame, 0), Expected::Dropped(InnerChecksum));
}

/// RFC 6040, figure 4: the field of the packet that leaves the tunnel by inner (row) and outer (column) field, both in
/// the order Not-ECT, ECT(1), ECT(0), CE, which is that of their codes.
const ECN: [[Option<u8>; 4]; 4] = [
    [Some(0), Some(0), Some(0), None],
    [Some(1), Some(1), Some(1), Some(3)],
    [Some(2), Some(1), Some(2), Some(3)],
    [Some(3), Some(3), Some(3), Some(3)],
];

fn congestion(cases: &mut Cases) {
    for (inner_ecn, row) in (0..).zip(ECN) {
        for (outer_ecn, left) in (0..).zip(row) {
            for (dscp, id) in [(0, 0x1234), (46, 0xbeef), (63, 0xffff)] {
                let inner = |ecn: u8| {
                    let macs = (cast::DIRECTOR_INSIDE_MAC, cast::server_mac(0));
                    let frame = Frame { dscp, id, ..Frame::new(macs, (cast::CLIENT, 40_000), (cast::VIP, 80)) };
                    let mut frame = frame.tcp("S", b"");
                    frame[ETHERNET + 1] |= ecn;
                    right_checksum(&mut frame, ETHERNET);
                    frame
                };
                let mut frame = tunnelled(&inner(inner_ecn), 0);
                frame[ETHERNET + 1] = 0xb8 | outer_ecn;
                right_checksum(&mut frame, ETHERNET);
                let dropped = Expected::Dropped(Decapsulation::CongestionUnknown);
                let expected = left.map_or(dropped, |ecn| Expected::Delivered(inner(ecn)));
                cases.add(format!("congestion {inner_ecn} in {outer_ecn}, DSCP {dscp}"), frame, expected);
            }
        }
    }
}

fn others(cases: &mut Cases) {
    cases.add("no tunnel", inner(), Expected::Untouched);
    let other =
        Frame::new((cast::DIRECTOR_INSIDE_MAC, cast::server_mac(0)), (cast::CLIENT, 40_000), (cast::server(0), 80));
    cases.add("another address", tunnelled(&other.tcp("S", b""), 0), Expected::Untouched);
    // A packet about the address that carries it elsewhere: its source.
    let reply = Frame::new((cast::DIRECTOR_INSIDE_MAC, cast::server_mac(0)), (cast::VIP, 80), (cast::CLIENT, 40_000));
    cases.add("from the address", tunnelled(&reply.tcp("SA", b""), 0), Expected::Untouched);
    let mut broken = other.tcp("S", b"");
    broken[ETHERNET + 10] ^= 1;
    cases.add("another address, broken", tunnelled(&broken, 0), Expected::Untouched);
    for protocol in [0, 1, 6, 17, 41, 47, 50, 255] {
        cases.outer(&format!("protocol {protocol}"), |ip| ip[9] = protocol, Expected::Untouched);
    }
    for (name, ether_type) in
        [("ARP", [0x08, 0x06]), ("IPv6", [0x86, 0xdd]), ("VLAN", [0x81, 0x00]), ("802.3", [0, 40])]
    {
        let mut frame = tunnelled(&inner(), 0);
        frame[12..14].copy_from_slice(&ether_type);
        cases.add(format!("frame type {name}"), frame, Expected::Untouched);
    }
    for first in [0x01, 0xff] {
        let mut frame = tunnelled(&inner(), 0);
        frame[0] = first;
        cases.add(format!("link-layer group address {first:#x}"), frame, Expected::Untouched);
    }
}
