//! From bytes to meaning: the only place where headers of arriving packets are interpreted.

use lb_common::{
    addr::{Ip4, Port},
    checksum,
    proto::Protocol,
    reason::Reason,
    tcp::flag,
};
use network_types::{
    eth::{EthHdr, EtherType},
    ip::Ipv4Hdr,
    tcp::TcpHdr,
    udp::UdpHdr,
};

use crate::{packet::Packet, wire};

/// What a frame carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Frame {
    /// An IPv4 packet.
    Ipv4,
}

/// Looks at the Ethernet header.
///
/// # Errors
///
/// The reason why the frame is none of the director's business.
#[inline(always)]
pub fn frame(packet: &impl Packet) -> Result<Frame, Reason> {
    let header: EthHdr = packet.read(0).ok_or(Reason::NotIp)?;
    if header.ether_type != EtherType::Ipv4 as u16 {
        return Err(Reason::NotIp);
    }
    // The group bit, IEEE 802.3 section 3.2.3.
    if header.dst_addr[0] & 1 != 0 {
        return Err(Reason::NotUnicast);
    }
    Ok(Frame::Ipv4)
}

/// An IPv4 packet with a sound header.
#[derive(Clone, Copy)]
pub struct Ip4Packet {
    /// The five words of the header without options, as loaded. Each in 64 bits, so that no two are ever copied at once.
    words: [u64; 5],
    /// Where the transport header begins, from the start of the frame.
    pub transport: usize,
}

/// Reads the IPv4 header of nearly every frame: one for this host, with room for a TCP header, whose IPv4 header is sound
/// and has no options. `None` for every other: see [`frame`] and [`ipv4`].
///
/// Ethernet frames are padded to 60 bytes, so nearly all have that room, and one look at the frame's length is enough.
#[inline(always)]
pub fn plain(packet: &impl Packet) -> Option<Ip4Packet> {
    const PLAIN: u64 = 0x45;
    packet.read::<[u32; 5]>(EthHdr::LEN + Ipv4Hdr::LEN)?;
    match frame(packet) {
        Ok(Frame::Ipv4) => {}
        Err(_) => return None,
    }
    let words: [u32; 5] = packet.read(EthHdr::LEN)?;
    let ip = Ip4Packet { words: words.map(u64::from), transport: EthHdr::LEN + Ipv4Hdr::LEN };
    (ip.words[0] & 0xff == PLAIN && ip.fits(packet)).then_some(ip)
}

/// Reads the IPv4 header (RFC 791).
///
/// # Errors
///
/// The reason why the header cannot be believed.
#[inline(always)]
pub fn ipv4(packet: &impl Packet) -> Result<Ip4Packet, Reason> {
    let header: Ipv4Hdr = packet.read(EthHdr::LEN).ok_or(Reason::IpTruncated)?;
    if header.version() != 4 {
        return Err(Reason::IpVersion);
    }
    let words = wire::words(&header).map(u64::from);
    let ip = Ip4Packet { words, transport: EthHdr::LEN + usize::from(header.ihl()) };
    if ip.transport < EthHdr::LEN + Ipv4Hdr::LEN {
        return Err(Reason::IpHeaderLength);
    }
    if ip.transport > packet.len() {
        return Err(Reason::IpTruncated);
    }
    if ip.fits(packet) { Ok(ip) } else { Err(Reason::IpTotalLength) }
}

impl Ip4Packet {
    /// Source address.
    #[inline(always)]
    pub const fn source(&self) -> Ip4 {
        Ip4::from_raw(self.words[3] as u32)
    }

    /// Destination address.
    #[inline(always)]
    pub const fn destination(&self) -> Ip4 {
        Ip4::from_raw(self.words[4] as u32)
    }

    /// Length of the packet, header included, in bytes.
    #[inline(always)]
    pub const fn len(&self) -> u16 {
        u16::from_be((self.words[0] >> 16) as u16)
    }

    /// Whether the packet ends behind its header and within its frame.
    #[inline(always)]
    fn fits(&self, packet: &impl Packet) -> bool {
        let end = EthHdr::LEN + usize::from(self.len());
        self.transport <= end && end <= packet.len()
    }

    /// Whether the packet has no bytes, which a sound header rules out.
    #[inline(always)]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Length of what follows the header, in bytes.
    #[inline(always)]
    pub const fn payload_len(&self) -> usize {
        EthHdr::LEN + self.len() as usize - self.transport
    }

    /// Type of service: DSCP and ECN.
    #[inline(always)]
    pub const fn tos(&self) -> u8 {
        (self.words[0] >> 8) as u8
    }

    /// Identification, as loaded.
    #[inline(always)]
    pub const fn id(&self) -> u16 {
        self.words[1] as u16
    }

    /// Time to live.
    #[inline(always)]
    pub const fn ttl(&self) -> u8 {
        self.words[2] as u8
    }

    /// Protocol number.
    #[inline(always)]
    pub const fn protocol(&self) -> u8 {
        (self.words[2] >> 8) as u8
    }

    /// TTL, protocol and checksum, as loaded.
    #[inline(always)]
    pub const fn ttl_protocol_checksum(&self) -> u32 {
        self.words[2] as u32
    }

    /// Whether one of these bits is set in the word of flags and fragment offset.
    #[inline(always)]
    const fn has_fragment_bits(&self, bits: u16) -> bool {
        self.words[1] & (bits.to_be() as u64) << 16 != 0
    }

    /// Whether the packet is one of several fragments (RFC 791 section 3.2): more follow, or it is not the first.
    #[inline(always)]
    pub const fn is_fragment(&self) -> bool {
        self.has_fragment_bits(0x3fff)
    }

    /// Whether the sender forbids fragmentation.
    #[inline(always)]
    pub const fn dont_fragment(&self) -> bool {
        self.has_fragment_bits(0x4000)
    }

    /// Whether the header checksum is right, options included.
    #[inline(always)]
    pub fn checksum_holds(&self, packet: &impl Packet) -> bool {
        let options = self.transport - EthHdr::LEN - Ipv4Hdr::LEN;
        // Verifier: by the packet's own sum. A loop over the options it would follow once for each length of theirs, and
        // all that comes after it as often.
        let options = if options == 0 { Some(0) } else { packet.sum(EthHdr::LEN + Ipv4Hdr::LEN, options) };
        options.is_some_and(|options| checksum::holds(self.words.iter().sum::<u64>() + options))
    }

    /// Reads the transport header.
    ///
    /// # Errors
    ///
    /// [`Reason::OtherProtocol`], or [`Reason::TransportTruncated`] when the packet ends inside the header.
    #[inline(always)]
    pub fn segment(&self, packet: &impl Packet) -> Result<Segment, Reason> {
        const TCP: u8 = Protocol::Tcp as u8;
        const UDP: u8 = Protocol::Udp as u8;
        // The packet is no longer than its frame, so what the packet has room for can be read.
        match self.protocol() {
            TCP if self.payload_len() >= TcpHdr::LEN => {
                // Ports, sequence number, acknowledgement number, then data offset and flags.
                let words: [u32; 4] = packet.read(self.transport).ok_or(Reason::TransportTruncated)?;
                Ok(Segment { ports: words[0].into(), flags: u64::from(words[3] >> 8 & 0xff), protocol: TCP.into() })
            }
            UDP if self.payload_len() >= UdpHdr::LEN => {
                let ports: u32 = packet.read(self.transport).ok_or(Reason::TransportTruncated)?;
                Ok(Segment { ports: ports.into(), flags: 0, protocol: UDP.into() })
            }
            TCP | UDP => Err(Reason::TransportTruncated),
            _ => Err(Reason::OtherProtocol),
        }
    }
}

/// What the transport header says.
#[derive(Clone, Copy)]
pub struct Segment {
    /// Both ports as loaded at once: the source in the low half of 32 bits.
    ports: u64,
    /// Flags of a TCP segment.
    flags: u64,
    /// Protocol number.
    protocol: u64,
}

impl Segment {
    /// A segment of `protocol` between these ports, without flags.
    #[inline(always)]
    pub const fn new(protocol: Protocol, source: Port, destination: Port) -> Self {
        let ports = source.raw() as u64 | (destination.raw() as u64) << 16;
        Self { ports, flags: 0, protocol: protocol as u64 }
    }

    /// Transport protocol.
    #[inline(always)]
    pub const fn protocol(&self) -> Protocol {
        if self.protocol == Protocol::Tcp as u64 { Protocol::Tcp } else { Protocol::Udp }
    }

    /// Source port.
    #[inline(always)]
    pub const fn source(&self) -> Port {
        Port::from_raw(self.ports as u16)
    }

    /// Destination port.
    #[inline(always)]
    pub const fn destination(&self) -> Port {
        Port::from_raw((self.ports >> 16) as u16)
    }

    /// Both ports as loaded at once.
    #[inline(always)]
    pub const fn ports(&self) -> u32 {
        self.ports as u32
    }

    /// Flags of a TCP segment, byte 13 of its header; 0 for other protocols.
    #[inline(always)]
    pub const fn flags(&self) -> u8 {
        self.flags as u8
    }

    /// Whether the segment may open a connection: it is UDP, or has SYN and not RST set.
    #[inline(always)]
    pub const fn opens(&self) -> bool {
        matches!(self.protocol(), Protocol::Udp) || self.flags() & (flag::SYN | flag::RST) == flag::SYN
    }
}
