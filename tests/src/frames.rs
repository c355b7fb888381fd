//! Frames to send, and frames to expect: built by etherparse, not by the code under test.

use std::net::Ipv4Addr;

use etherparse::{
    EtherType, Ethernet2Header, IpFragOffset, IpHeaders, IpNumber, Ipv4Header, Ipv4Options, Ipv6FragmentHeader,
    Ipv6Header, PacketBuilder, PacketBuilderStep,
};

use crate::family::{Family, six};

/// TCP header flags by their usual letters: S, A, F, R, P.
pub type Flags = &'static str;

/// Bytes of an Ethernet header.
pub const ETHERNET: usize = 14;

/// A frame to be built: who to whom, over which family.
#[derive(Clone, Copy, Debug)]
pub struct Frame {
    /// Source and destination link-layer address.
    pub macs: ([u8; 6], [u8; 6]),
    /// What the addresses below stand for an address of.
    pub family: Family,
    /// Source address and port.
    pub from: (Ipv4Addr, u16),
    /// Destination address and port.
    pub to: (Ipv4Addr, u16),
    /// Time to live, or hop limit.
    pub ttl: u8,
    /// Whether fragmentation is forbidden, which it always is of IPv6.
    pub dont_fragment: bool,
    /// Identification, or the upper bits of the flow label.
    pub id: u16,
    /// Type of service, or traffic class, by its DSCP.
    pub dscp: u8,
    /// Type of service, or traffic class, by its ECN.
    pub ecn: u8,
    /// IP options, a multiple of four bytes; none of IPv6.
    pub options: &'static [u8],
}

impl Frame {
    /// An IPv4 frame between these ends, with TTL 64 and DF set.
    pub const fn new(macs: ([u8; 6], [u8; 6]), from: (Ipv4Addr, u16), to: (Ipv4Addr, u16)) -> Self {
        let family = Family::Four;
        Self { macs, family, from, to, ttl: 64, dont_fragment: true, id: 0x1234, dscp: 0, ecn: 0, options: &[] }
    }

    fn header4(&self) -> Ipv4Header {
        let mut header = Ipv4Header::new(0, self.ttl, IpNumber(0), self.from.0.octets(), self.to.0.octets())
            .expect("no payload is not too much");
        header.dont_fragment = self.dont_fragment;
        header.identification = self.id;
        header.dscp = self.dscp.try_into().expect("six bits");
        header.ecn = self.ecn.try_into().expect("two bits");
        header.options = Ipv4Options::try_from(self.options).expect("whole words");
        header
    }

    fn header6(&self) -> Ipv6Header {
        assert!(self.options.is_empty(), "IPv6 has extension headers instead");
        Ipv6Header {
            traffic_class: self.dscp << 2 | self.ecn,
            flow_label: (u32::from(self.id) << 4).try_into().expect("twenty bits"),
            hop_limit: self.ttl,
            source: six(self.from.0).octets(),
            destination: six(self.to.0).octets(),
            ..Ipv6Header::default()
        }
    }

    fn ip(&self) -> PacketBuilderStep<IpHeaders> {
        PacketBuilder::ethernet2(self.macs.0, self.macs.1).ip(match self.family {
            Family::Four => IpHeaders::Ipv4(self.header4(), Default::default()),
            Family::Six => IpHeaders::Ipv6(self.header6(), Default::default()),
        })
    }

    /// A TCP segment.
    pub fn tcp(&self, flags: Flags, payload: &[u8]) -> Vec<u8> {
        let mut step = self.ip().tcp(self.from.1, self.to.1, 1000, 64_240);
        for flag in flags.chars() {
            step = match flag {
                'S' => step.syn(),
                'A' => step.ack(1),
                'F' => step.fin(),
                'R' => step.rst(),
                'P' => step.psh(),
                other => panic!("no TCP flag is written `{other}`"),
            };
        }
        let mut frame = Vec::new();
        step.write(&mut frame, payload).expect("a vector takes every byte");
        frame
    }

    /// A UDP datagram.
    pub fn udp(&self, payload: &[u8]) -> Vec<u8> {
        let mut frame = Vec::new();
        self.ip().udp(self.from.1, self.to.1).write(&mut frame, payload).expect("a vector takes every byte");
        frame
    }

    /// An SCTP packet of these chunks, by type and value.
    pub fn sctp(&self, chunks: &[(u8, &[u8])]) -> Vec<u8> {
        self.packet(IpNumber::SCTP.0, &sctp(self.from.1, self.to.1, chunks))
    }

    /// A UDP datagram without a checksum.
    pub fn udp_unsummed(&self, payload: &[u8]) -> Vec<u8> {
        let mut frame = self.udp(payload);
        let checksum = ETHERNET + self.family.header() + self.options.len() + 6;
        frame[checksum..checksum + 2].fill(0);
        frame
    }

    /// An ICMP message; the ports of the frame do not count.
    pub fn icmp(&self, kind: u8, code: u8, rest: [u8; 4], payload: &[u8]) -> Vec<u8> {
        let mut frame = Vec::new();
        match self.family {
            Family::Four => self.ip().icmpv4_raw(kind, code, rest).write(&mut frame, payload),
            Family::Six => self.ip().icmpv6_raw(kind, code, rest).write(&mut frame, payload),
        }
        .expect("a vector takes every byte");
        frame
    }

    /// A packet of any protocol; the ports of the frame do not count.
    pub fn packet(&self, protocol: u8, payload: &[u8]) -> Vec<u8> {
        match self.family {
            Family::Four => self.packet4(Ipv4Header { protocol: IpNumber(protocol), ..self.header4() }, payload),
            Family::Six => {
                let mut header = Ipv6Header { next_header: IpNumber(protocol), ..self.header6() };
                header.set_payload_length(payload.len()).expect("fits");
                [&ethernet(self.macs, EtherType::IPV6), &header.to_bytes()[..], payload].concat()
            }
        }
    }

    /// A fragment of a packet, at an offset in units of eight bytes; the ports of the frame do not count.
    pub fn fragment(&self, protocol: u8, offset: u16, more: bool, payload: &[u8]) -> Vec<u8> {
        let offset = IpFragOffset::try_new(offset).expect("thirteen bits");
        if self.family == Family::Six {
            let header = Ipv6FragmentHeader::new(IpNumber(protocol), offset, more, 0x1234_5678);
            return self.packet(IpNumber::IPV6_FRAGMENTATION_HEADER.0, &[&header.to_bytes(), payload].concat());
        }
        let header = Ipv4Header { protocol: IpNumber(protocol), fragment_offset: offset, ..self.header4() };
        self.packet4(Ipv4Header { more_fragments: more, ..header }, payload)
    }

    fn packet4(&self, mut header: Ipv4Header, payload: &[u8]) -> Vec<u8> {
        header.set_payload_len(payload.len()).expect("fits");
        header.header_checksum = header.calc_header_checksum();
        [&ethernet(self.macs, EtherType::IPV4), &header.to_bytes()[..], payload].concat()
    }
}

/// An SCTP packet between these ports of these chunks, by type and value, without what carries it.
pub fn sctp(from: u16, to: u16, chunks: &[(u8, &[u8])]) -> Vec<u8> {
    let mut packet = [from.to_be_bytes(), to.to_be_bytes()].concat();
    // The verification tag, and the place of the checksum.
    packet.extend([0x5e, 0xed, 0xca, 0xfe, 0, 0, 0, 0]);
    for (kind, value) in chunks {
        packet.extend([*kind, 0]);
        packet.extend((4 + value.len() as u16).to_be_bytes());
        packet.extend(*value);
        packet.resize(packet.len().next_multiple_of(4), 0);
    }
    let checksum = crc32c(&packet);
    packet[8..12].copy_from_slice(&checksum.to_le_bytes());
    packet
}

/// The checksum of an SCTP packet, bit by bit with the lowest bit of each byte first (RFC 9260 appendix A).
fn crc32c(bytes: &[u8]) -> u32 {
    // Another way to reckon it than that of the code under test: with the highest power in the highest bit.
    const POLYNOMIAL: u32 = 0x1edc_6f41;
    let step = |remainder: u32, bit: u32| {
        let carry = remainder >> 31 ^ bit;
        remainder << 1 ^ if carry == 0 { 0 } else { POLYNOMIAL }
    };
    let bits = bytes.iter().flat_map(|byte| (0..8).map(move |bit| u32::from(byte >> bit & 1)));
    !bits.fold(u32::MAX, step).reverse_bits()
}

/// An Ethernet header.
pub fn ethernet(macs: ([u8; 6], [u8; 6]), ether_type: EtherType) -> [u8; ETHERNET] {
    Ethernet2Header { source: macs.0, destination: macs.1, ether_type }.to_bytes()
}

/// The IP packet in a frame.
pub fn packet_of(frame: &[u8]) -> &[u8] {
    &frame[ETHERNET..]
}

/// The frame, followed by what pads it to the least that Ethernet sends, or by a few bytes that some switch has left behind
/// it.
pub fn padded(mut frame: Vec<u8>) -> Vec<u8> {
    let len = if frame.len() < 60 { 60 } else { frame.len() + 6 };
    // Not zeros: padding must not count in any checksum.
    frame.resize(len, 0xa5);
    frame
}

/// An IPv4 frame with another identification, and the header checksum for it. Its own checksum must hold. Other frames stay
/// as they are: IPv6 has none.
pub fn with_id(frame: &[u8], id: [u8; 2]) -> Vec<u8> {
    if Family::of(frame) != Some(Family::Four) {
        return frame.to_vec();
    }
    let (mut header, _) = Ipv4Header::from_slice(packet_of(frame)).expect("an IPv4 header");
    assert_eq!(header.header_checksum, header.calc_header_checksum(), "the IP header checksum is wrong: {frame:02x?}");
    header.identification = u16::from_be_bytes(id);
    header.header_checksum = header.calc_header_checksum();
    let bytes = header.to_bytes();
    let mut frame = frame.to_vec();
    frame[ETHERNET..ETHERNET + bytes.len()].copy_from_slice(&bytes);
    frame
}
