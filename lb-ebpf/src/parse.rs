//! From bytes to meaning: the only place where headers of arriving packets are interpreted.

use core::marker::PhantomData;

use lb_common::{
    addr::{Address, Ip4, Ip6, Port},
    checksum,
    flow::{Live, nonzero},
    proto::Protocol,
    reason::Reason,
    tcp,
};
use network_types::{
    eth::{EthHdr, EtherType},
    ip::{Ipv4Hdr, Ipv6Hdr},
};

use crate::{
    packet::Packet,
    protocols::{Protocols, TcpUdp},
    wire,
};

/// A packet of an address family, with a sound header: what the pipeline is generic over.
///
/// The parts of a packet that the pipeline writes are in other traits, each beside the code that uses it; see
/// [`crate::pipeline::Family`].
pub trait Ip: Copy {
    /// Its addresses.
    type Addr: Address;
    /// What it may carry.
    type Protocols: Protocols;

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
    /// See [`Protocols::segment`].
    #[inline(always)]
    fn segment(&self, packet: &impl Packet) -> Result<Segment<Self::Protocols>, Reason> {
        Self::Protocols::segment(self, packet)
    }

    /// Whether this is the number of an extension header.
    fn is_extension(protocol: u8) -> bool;

    /// The packet, with its length and protocol hidden from the verifier.
    fn hidden(self, packet: &impl Packet) -> Self;
}

/// Reads the headers of IP and transport, of a frame that has been read before.
///
/// # Errors
///
/// Those of [`Ip::parse`] and [`Ip::segment`].
#[inline(always)]
pub fn whole<I: Ip>(packet: &impl Packet) -> Result<(I, Segment<I::Protocols>), Reason> {
    let ip = I::parse(packet)?;
    let segment = ip.segment(packet)?;
    Ok(if I::Protocols::HIDES { (ip.hidden(packet), segment.hidden(packet)) } else { (ip, segment) })
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
pub struct Ip4Packet<S = TcpUdp> {
    /// The five words of the header without options, as loaded. Each in 64 bits, so that no two are ever copied at once.
    words: [u64; 5],
    /// Where the transport header begins, from the start of the frame.
    transport: usize,
    carries: PhantomData<S>,
}

impl<S> Ip4Packet<S> {
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

impl<S: Protocols> Ip for Ip4Packet<S> {
    type Addr = Ip4;
    type Protocols = S;

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
        let ip = Self { words: words.map(u64::from), transport: EthHdr::LEN + Self::HEADER, carries: PhantomData };
        (ip.words[0] & 0xff == PLAIN && fits(&ip, packet)).then_some(ip)
    }

    #[inline(always)]
    fn parse(packet: &impl Packet) -> Result<Self, Reason> {
        let header: Ipv4Hdr = packet.read(EthHdr::LEN).ok_or(Reason::IpTruncated)?;
        if header.version() != 4 {
            return Err(Reason::IpVersion);
        }
        let words = wire::words(&header).map(u64::from);
        let ip = Self { words, transport: EthHdr::LEN + usize::from(header.ihl()), carries: PhantomData };
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

    #[inline(always)]
    fn hidden(self, packet: &impl Packet) -> Self {
        let [first, second, third, ..] = self.words;
        Self { words: [packet.hide(first), second, packet.hide(third), self.words[3], self.words[4]], ..self }
    }
}

/// An IPv6 packet with a sound header (RFC 8200).
#[derive(Clone, Copy)]
pub struct Ip6Packet<S = TcpUdp> {
    /// The header, as loaded.
    words: [u64; 5],
    carries: PhantomData<S>,
}

impl<S> Ip6Packet<S> {
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
        if words[0] & 0xf0 == 0x60 { Ok(Self { words, carries: PhantomData }) } else { Err(Reason::IpVersion) }
    }
}

impl<S: Protocols> Ip for Ip6Packet<S> {
    type Addr = Ip6;
    type Protocols = S;

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

    #[inline(always)]
    fn hidden(self, packet: &impl Packet) -> Self {
        let [first, rest @ ..] = self.words;
        let [a, b, c, d] = rest;
        Self { words: [packet.hide(first), a, b, c, d], ..self }
    }
}

/// What the transport header says.
#[derive(Clone, Copy)]
pub struct Segment<S = TcpUdp> {
    /// Both ports as loaded at once: the source in the low half of 32 bits.
    ports: u64,
    /// Flags of a TCP segment, or what an SCTP packet has in their place.
    flags: u64,
    /// Protocol number.
    protocol: u64,
    of: PhantomData<S>,
}

impl<S: Protocols> Segment<S> {
    /// A segment of the protocol with this number, with both ports as loaded at once, and with these flags.
    #[inline(always)]
    pub const fn read(protocol: u8, ports: u32, flags: u8) -> Self {
        Self { ports: ports as u64, flags: flags as u64, protocol: protocol as u64, of: PhantomData }
    }

    /// Transport protocol.
    #[inline(always)]
    pub fn protocol(&self) -> Protocol {
        S::protocol(self.protocol)
    }

    /// What live connections of the segment's protocol have in their words.
    #[inline(always)]
    pub fn live(&self) -> Live {
        S::live(self.protocol())
    }

    /// 1 if the segment is of this protocol, 0 if it is not, found out without a branch.
    #[inline(always)]
    pub fn is(&self, protocol: Protocol) -> u64 {
        nonzero(self.protocol ^ protocol as u64) ^ 1
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

    /// What the segment says of its connection: flags of TCP, byte 13 of its header, or [`lb_common::sctp::Chunks`]; 0 of UDP.
    #[inline(always)]
    pub const fn flags(&self) -> u8 {
        self.flags as u8
    }

    /// Whether the segment resets its connection: one of TCP with RST, or of SCTP with ABORT.
    #[inline(always)]
    pub const fn resets(&self) -> bool {
        // Those of UDP have no flags.
        self.flags() & tcp::flag::RST != 0
    }

    /// Whether the segment may open a connection under these [`lb_common::abi::switch`]es: it is UDP, or has SYN and not RST
    /// set; with `sloppy_tcp`, SYN may be missing. An SCTP packet has SYN set if its first chunk is INIT, and RST if that is
    /// ABORT; there `sloppy_sctp` counts.
    #[inline(always)]
    pub fn opens(&self, switches: u32) -> bool {
        // Without a branch, which the verifier would follow both ways.
        let (wanted, rst) = (S::wanted(self, switches), u64::from(tcp::flag::RST));
        self.is(Protocol::Udp) | nonzero(self.flags & (wanted | rst) ^ wanted) ^ 1 != 0
    }

    /// The segment, with all that it may not be hidden from the verifier.
    #[inline(always)]
    pub fn hidden(self, packet: &impl Packet) -> Self {
        Self { flags: packet.hide(self.flags), protocol: packet.hide(self.protocol), ..self }
    }

    /// The segment, on a path of other protocols.
    #[inline(always)]
    pub const fn cast<Z>(self) -> Segment<Z> {
        Segment { ports: self.ports, flags: self.flags, protocol: self.protocol, of: PhantomData }
    }
}
