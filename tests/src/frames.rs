//! Frames to send, and frames to expect: built by etherparse, not by the code under test.

use std::net::Ipv4Addr;

use etherparse::{
    EtherType, Ethernet2Header, IpFragOffset, IpHeaders, IpNumber, Ipv4Header, Ipv4Options, PacketBuilder,
    PacketBuilderStep,
};

/// TCP header flags by their usual letters: S, A, F, R, P.
pub type Flags = &'static str;

/// Bytes of an Ethernet header.
pub const ETHERNET: usize = 14;
/// Bytes of an IPv4 header without options.
pub const IPV4: usize = 20;

/// A frame to be built: who to whom, over IPv4.
#[derive(Clone, Copy, Debug)]
pub struct Frame {
    /// Source and destination link-layer address.
    pub macs: ([u8; 6], [u8; 6]),
    /// Source address and port.
    pub from: (Ipv4Addr, u16),
    /// Destination address and port.
    pub to: (Ipv4Addr, u16),
    /// Time to live.
    pub ttl: u8,
    /// Whether fragmentation is forbidden.
    pub dont_fragment: bool,
    /// Identification.
    pub id: u16,
    /// Type of service, by its DSCP.
    pub dscp: u8,
    /// Type of service, by its ECN.
    pub ecn: u8,
    /// IP options, a multiple of four bytes.
    pub options: &'static [u8],
}

impl Frame {
    /// A frame between these ends, with TTL 64 and DF set.
    pub const fn new(macs: ([u8; 6], [u8; 6]), from: (Ipv4Addr, u16), to: (Ipv4Addr, u16)) -> Self {
        Self { macs, from, to, ttl: 64, dont_fragment: true, id: 0x1234, dscp: 0, ecn: 0, options: &[] }
    }

    fn header(&self) -> Ipv4Header {
        let mut header = Ipv4Header::new(0, self.ttl, IpNumber(0), self.from.0.octets(), self.to.0.octets())
            .expect("no payload is not too much");
        header.dont_fragment = self.dont_fragment;
        header.identification = self.id;
        header.dscp = self.dscp.try_into().expect("six bits");
        header.ecn = self.ecn.try_into().expect("two bits");
        header.options = Ipv4Options::try_from(self.options).expect("whole words");
        header
    }

    fn ip(&self) -> PacketBuilderStep<IpHeaders> {
        PacketBuilder::ethernet2(self.macs.0, self.macs.1).ip(IpHeaders::Ipv4(self.header(), Default::default()))
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

    /// A UDP datagram without a checksum.
    pub fn udp_unsummed(&self, payload: &[u8]) -> Vec<u8> {
        let mut frame = self.udp(payload);
        let checksum = ETHERNET + IPV4 + self.options.len() + 6;
        frame[checksum..checksum + 2].fill(0);
        frame
    }

    /// An ICMP message; the ports of the frame do not count.
    pub fn icmp(&self, kind: u8, code: u8, rest: [u8; 4], payload: &[u8]) -> Vec<u8> {
        let mut frame = Vec::new();
        self.ip().icmpv4_raw(kind, code, rest).write(&mut frame, payload).expect("a vector takes every byte");
        frame
    }

    /// A packet of any protocol; the ports of the frame do not count.
    pub fn packet(&self, protocol: u8, payload: &[u8]) -> Vec<u8> {
        let mut header = self.header();
        header.protocol = IpNumber(protocol);
        self.finish(header, payload)
    }

    /// A fragment of a packet, at an offset in units of eight bytes; the ports of the frame do not count.
    pub fn fragment(&self, protocol: u8, offset: u16, more: bool, payload: &[u8]) -> Vec<u8> {
        let mut header = self.header();
        header.protocol = IpNumber(protocol);
        header.fragment_offset = IpFragOffset::try_new(offset).expect("thirteen bits");
        header.more_fragments = more;
        self.finish(header, payload)
    }

    fn finish(&self, mut header: Ipv4Header, payload: &[u8]) -> Vec<u8> {
        header.set_payload_len(payload.len()).expect("fits");
        header.header_checksum = header.calc_header_checksum();
        let mut frame = ethernet(self.macs, EtherType::IPV4).to_vec();
        frame.extend_from_slice(&header.to_bytes());
        frame.extend_from_slice(payload);
        frame
    }
}

/// An Ethernet header.
pub fn ethernet(macs: ([u8; 6], [u8; 6]), ether_type: EtherType) -> [u8; ETHERNET] {
    Ethernet2Header { source: macs.0, destination: macs.1, ether_type }.to_bytes()
}

/// The IP packet in a frame.
pub fn packet_of(frame: &[u8]) -> &[u8] {
    &frame[ETHERNET..]
}

/// The frame, followed by what pads it to the least that Ethernet sends.
pub fn padded(mut frame: Vec<u8>) -> Vec<u8> {
    // Not zeros: padding must not count in any checksum.
    frame.resize(frame.len().max(60), 0xa5);
    frame
}

/// An IPv4 frame with another identification, and the header checksum for it. Its own checksum must hold.
pub fn with_id(frame: &[u8], id: [u8; 2]) -> Vec<u8> {
    let (mut header, _) = Ipv4Header::from_slice(packet_of(frame)).expect("an IPv4 header");
    assert_eq!(header.header_checksum, header.calc_header_checksum(), "the IP header checksum is wrong: {frame:02x?}");
    header.identification = u16::from_be_bytes(id);
    header.header_checksum = header.calc_header_checksum();
    let bytes = header.to_bytes();
    let mut frame = frame.to_vec();
    frame[ETHERNET..ETHERNET + bytes.len()].copy_from_slice(&bytes);
    frame
}
