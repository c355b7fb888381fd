//! From bytes to meaning: the only place where headers of arriving packets are interpreted.

use lb_common::{
    abi::switch,
    addr::{Address, Ip4, Ip6, Port},
    checksum,
    flow::nonzero,
    proto::Protocol,
    reason::Reason,
    tcp::flag,
};
use network_types::{
    eth::{EthHdr, EtherType},
    ip::{Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
    udp::UdpHdr,
};

use crate::{packet::Packet, wire};

/// A packet of an address family, with a sound header: what the pipeline is generic over.
///
/// The parts of a packet that the pipeline writes are in other traits, each beside the code that uses it; see
/// [`crate::pipeline::Family`].
pub trait Ip: Copy {
    /// Its addresses.
    type Addr: Address;

    /// Length of the header without options and extensions, in bytes.
    const HEADER: usize;
    /// The type of frames that carry such packets.
    const ETHER_TYPE: EtherType;
    /// The protocol number of the family's ICMP.
    const ICMP: u8;

    /// Reads the header of nearly every frame: one for this host, with room for a TCP header, whose IP header is sound and
    /// has no options. `None` for every other: see [`frame`] and [`Ip::parse`].
    fn plain(packet: &impl Packet) -> Option<Self>;

    /// Reads the header, of a frame that [`frame`] has found to carry one.
    ///
    /// # Errors
    ///
    /// The reason why the header cannot be believed.
    fn parse(packet: &impl Packet) -> Result<Self, Reason>;

    /// Where the transport header begins, from the start of the frame.
    fn transport(&self) -> usize;
    /// Source address.
    fn source(&self) -> Self::Addr;
    /// Destination address.
    fn destination(&self) -> Self::Addr;
    /// Length of the packet, header included, in bytes.
    fn len(&self) -> u32;
    /// Type of service or traffic class: DSCP and ECN.
    fn tos(&self) -> u8;
    /// Time to live or hop limit.
    fn ttl(&self) -> u8;
    /// Number of the protocol, or of the extension header, that follows.
    fn protocol(&self) -> u8;
    /// Whether the packet is one of several fragments.
    fn is_fragment(&self) -> bool;
    /// Whether a router may fragment the packet.
    fn may_be_fragmented(&self) -> bool;
    /// Whether the header's own checksum is right, if the family has one.
    fn checksum_holds(&self, packet: &impl Packet) -> bool;

    /// Whether the packet has no bytes, which a sound header rules out.
    #[inline(always)]
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Length of what follows the header, in bytes.
    #[inline(always)]
    fn payload_len(&self) -> usize {
        EthHdr::LEN + self.len() as usize - self.transport()
    }

    /// Reads the transport header.
    ///
    /// # Errors
    ///
    /// [`Reason::OtherProtocol`], [`Reason::ExtensionHeader`], or [`Reason::TransportTruncated`] when the packet ends inside
    /// the header.
    #[inline(always)]
    fn segment(&self, packet: &impl Packet) -> Result<Segment, Reason> {
        const TCP: u8 = Protocol::Tcp as u8;
        const UDP: u8 = Protocol::Udp as u8;
        // The packet is no longer than its frame, so what the packet has room for can be read.
        match self.protocol() {
            TCP if self.payload_len() >= TcpHdr::LEN => {
                // Ports, sequence number, acknowledgement number, then data offset and flags.
                let words: [u32; 4] = packet.read(self.transport()).ok_or(Reason::TransportTruncated)?;
                Ok(Segment { ports: words[0].into(), flags: u64::from(words[3] >> 8 & 0xff), protocol: TCP.into() })
            }
            UDP if self.payload_len() >= UdpHdr::LEN => {
                let ports: u32 = packet.read(self.transport()).ok_or(Reason::TransportTruncated)?;
                Ok(Segment { ports: ports.into(), flags: 0, protocol: UDP.into() })
            }
            TCP | UDP => Err(Reason::TransportTruncated),
            other if Self::is_extension(other) => Err(Reason::ExtensionHeader),
            _ => Err(Reason::OtherProtocol),
        }
    }

    /// Whether this is the number of an extension header.
    fn is_extension(protocol: u8) -> bool;
}

/// Looks at the Ethernet header of a frame that is to carry a packet of this family.
///
/// # Errors
///
/// The reason why the frame is none of the director's business.
#[inline(always)]
pub fn frame<I: Ip>(packet: &impl Packet) -> Result<(), Reason> {
    let header: EthHdr = packet.read(0).ok_or(Reason::NotIp)?;
    if header.ether_type != I::ETHER_TYPE as u16 {
        return Err(Reason::NotIp);
    }
    // The group bit, IEEE 802.3 section 3.2.3.
    if header.dst_addr[0] & 1 != 0 {
        return Err(Reason::NotUnicast);
    }
    Ok(())
}

/// Whether a frame says that it carries a packet of this family.
#[inline(always)]
pub fn carries<I: Ip>(packet: &impl Packet) -> bool {
    packet.read(core::mem::offset_of!(EthHdr, ether_type)) == Some(I::ETHER_TYPE as u16)
}

/// Whether a packet ends behind its header and within its frame.
#[inline(always)]
fn fits(ip: &impl Ip, packet: &impl Packet) -> bool {
    let end = EthHdr::LEN + ip.len() as usize;
    ip.transport() <= end && end <= packet.len()
}

/// An IPv4 packet with a sound header (RFC 791).
#[derive(Clone, Copy)]
pub struct Ip4Packet {
    /// The five words of the header without options, as loaded. Each in 64 bits, so that no two are ever copied at once.
    words: [u64; 5],
    /// Where the transport header begins, from the start of the frame.
    transport: usize,
}

impl Ip4Packet {
    /// Identification, as loaded.
    #[inline(always)]
    pub const fn id(&self) -> u16 {
        self.words[1] as u16
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
}

impl Ip for Ip4Packet {
    type Addr = Ip4;

    const HEADER: usize = Ipv4Hdr::LEN;
    const ETHER_TYPE: EtherType = EtherType::Ipv4;
    const ICMP: u8 = 1;

    /// Ethernet frames are padded to 60 bytes, so nearly all have room for a TCP header, and one look at the frame's length
    /// is enough.
    #[inline(always)]
    fn plain(packet: &impl Packet) -> Option<Self> {
        const PLAIN: u64 = 0x45;
        packet.read::<[u32; 5]>(EthHdr::LEN + Self::HEADER)?;
        frame::<Self>(packet).ok()?;
        let words: [u32; 5] = packet.read(EthHdr::LEN)?;
        let ip = Self { words: words.map(u64::from), transport: EthHdr::LEN + Self::HEADER };
        (ip.words[0] & 0xff == PLAIN && fits(&ip, packet)).then_some(ip)
    }

    #[inline(always)]
    fn parse(packet: &impl Packet) -> Result<Self, Reason> {
        let header: Ipv4Hdr = packet.read(EthHdr::LEN).ok_or(Reason::IpTruncated)?;
        if header.version() != 4 {
            return Err(Reason::IpVersion);
        }
        let words = wire::words(&header).map(u64::from);
        let ip = Self { words, transport: EthHdr::LEN + usize::from(header.ihl()) };
        if ip.transport < EthHdr::LEN + Self::HEADER {
            return Err(Reason::IpHeaderLength);
        }
        if ip.transport > packet.len() {
            return Err(Reason::IpTruncated);
        }
        if fits(&ip, packet) { Ok(ip) } else { Err(Reason::IpTotalLength) }
    }

    #[inline(always)]
    fn transport(&self) -> usize {
        self.transport
    }

    #[inline(always)]
    fn source(&self) -> Ip4 {
        Ip4::from_raw(self.words[3] as u32)
    }

    #[inline(always)]
    fn destination(&self) -> Ip4 {
        Ip4::from_raw(self.words[4] as u32)
    }

    #[inline(always)]
    fn len(&self) -> u32 {
        u16::from_be((self.words[0] >> 16) as u16).into()
    }

    #[inline(always)]
    fn tos(&self) -> u8 {
        (self.words[0] >> 8) as u8
    }

    #[inline(always)]
    fn ttl(&self) -> u8 {
        self.words[2] as u8
    }

    #[inline(always)]
    fn protocol(&self) -> u8 {
        (self.words[2] >> 8) as u8
    }

    /// Whether more fragments follow, or the packet is not the first (RFC 791 section 3.2).
    #[inline(always)]
    fn is_fragment(&self) -> bool {
        self.has_fragment_bits(0x3fff)
    }

    #[inline(always)]
    fn may_be_fragmented(&self) -> bool {
        !self.has_fragment_bits(0x4000)
    }

    /// Whether the header checksum is right, options included.
    #[inline(always)]
    fn checksum_holds(&self, packet: &impl Packet) -> bool {
        let options = self.transport - EthHdr::LEN - Self::HEADER;
        // Verifier: by the packet's own sum. A loop over the options it would follow once for each length of theirs, and
        // all that comes after it as often.
        let options = if options == 0 { Some(0) } else { packet.sum(EthHdr::LEN + Self::HEADER, options) };
        options.is_some_and(|options| checksum::holds(self.words.iter().sum::<u64>() + options))
    }

    #[inline(always)]
    fn is_extension(_: u8) -> bool {
        false
    }
}

/// An IPv6 packet with a sound header (RFC 8200).
#[derive(Clone, Copy)]
pub struct Ip6Packet {
    /// The header, as loaded.
    words: [u64; 5],
}

impl Ip6Packet {
    /// The number of the fragment header.
    const FRAGMENT: u8 = 44;

    /// The first eight bytes of a header without a flow label, as they stand in a packet: of a packet with this traffic class,
    /// length of payload, next header and hop limit.
    #[inline(always)]
    pub const fn first_word(tos: u8, payload_len: u16, protocol: u8, ttl: u8) -> u64 {
        let start = (6 << 28 | (tos as u32) << 20).to_be();
        start as u64 | (payload_len.to_be() as u64) << 32 | (protocol as u64) << 48 | (ttl as u64) << 56
    }

    /// The packet with this header, as loaded.
    ///
    /// # Errors
    ///
    /// [`Reason::IpVersion`] when it is none of version 6.
    #[inline(always)]
    pub fn of(words: [u64; 5]) -> Result<Self, Reason> {
        if words[0] & 0xf0 == 0x60 { Ok(Self { words }) } else { Err(Reason::IpVersion) }
    }
}

impl Ip for Ip6Packet {
    type Addr = Ip6;

    const HEADER: usize = Ipv6Hdr::LEN;
    const ETHER_TYPE: EtherType = EtherType::Ipv6;
    const ICMP: u8 = 58;

    #[inline(always)]
    fn plain(packet: &impl Packet) -> Option<Self> {
        packet.read::<[u32; 5]>(EthHdr::LEN + Self::HEADER)?;
        frame::<Self>(packet).ok()?;
        let ip = Self::of(packet.read(EthHdr::LEN)?).ok()?;
        fits(&ip, packet).then_some(ip)
    }

    #[inline(always)]
    fn parse(packet: &impl Packet) -> Result<Self, Reason> {
        let ip = Self::of(packet.read(EthHdr::LEN).ok_or(Reason::IpTruncated)?)?;
        if fits(&ip, packet) { Ok(ip) } else { Err(Reason::IpTotalLength) }
    }

    #[inline(always)]
    fn transport(&self) -> usize {
        EthHdr::LEN + Self::HEADER
    }

    #[inline(always)]
    fn source(&self) -> Ip6 {
        Ip6::from_raw([self.words[1], self.words[2]])
    }

    #[inline(always)]
    fn destination(&self) -> Ip6 {
        Ip6::from_raw([self.words[3], self.words[4]])
    }

    #[inline(always)]
    fn len(&self) -> u32 {
        Self::HEADER as u32 + u32::from(u16::from_be((self.words[0] >> 32) as u16))
    }

    #[inline(always)]
    fn tos(&self) -> u8 {
        (u32::from_be(self.words[0] as u32) >> 20) as u8
    }

    #[inline(always)]
    fn ttl(&self) -> u8 {
        (self.words[0] >> 56) as u8
    }

    #[inline(always)]
    fn protocol(&self) -> u8 {
        (self.words[0] >> 48) as u8
    }

    /// Whether a fragment header follows (RFC 8200 section 4.5).
    #[inline(always)]
    fn is_fragment(&self) -> bool {
        self.protocol() == Self::FRAGMENT
    }

    #[inline(always)]
    fn may_be_fragmented(&self) -> bool {
        false
    }

    #[inline(always)]
    fn checksum_holds(&self, _: &impl Packet) -> bool {
        true
    }

    /// Whether this is the number of an extension header that the kernel reads on its way to the transport header, and not the
    /// fragment header: hop-by-hop options, routing, authentication, destination options, mobility.
    #[inline(always)]
    fn is_extension(protocol: u8) -> bool {
        matches!(protocol, 0 | 43 | 51 | 60 | 135)
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

    /// 1 if the segment is UDP, 0 if it is not, found out without a branch.
    #[inline(always)]
    pub fn is_udp(&self) -> u64 {
        nonzero(self.protocol ^ Protocol::Udp as u64) ^ 1
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

    /// Whether the segment is one of TCP that resets its connection.
    #[inline(always)]
    pub const fn resets(&self) -> bool {
        // Those of UDP have no flags.
        self.flags() & flag::RST != 0
    }

    /// Whether the segment may open a connection under these [`switch`]es: it is UDP, or has SYN and not RST set; with
    /// `sloppy_tcp`, SYN may be missing.
    #[inline(always)]
    pub const fn opens(&self, switches: u32) -> bool {
        // Without a branch, which the verifier would follow both ways.
        const _: () = assert!(switch::SLOPPY_TCP << 1 == flag::SYN as u32);
        let wanted = flag::SYN ^ ((switches & switch::SLOPPY_TCP) << 1) as u8;
        matches!(self.protocol(), Protocol::Udp) || self.flags() & (wanted | flag::RST) == wanted
    }
}
