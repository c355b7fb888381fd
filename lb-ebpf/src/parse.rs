//! From bytes to meaning: the only place where headers of arriving packets are interpreted.

use lb_common::{
    addr::{Ip4, Port},
    checksum,
    proto::Protocol,
    reason::Reason,
    tcp::Event,
};
use network_types::{
    eth::{EthHdr, EtherType},
    ip::Ipv4Hdr,
    udp::UdpHdr,
};

use crate::{packet::Packet, wire};

/// Length of a TCP header without options, RFC 9293 section 3.1.
pub const TCP_LEN: usize = 20;
/// Offset of the flags in a TCP header.
const TCP_FLAGS: usize = 13;

/// What a frame carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Frame {
    /// An IPv4 packet.
    Ipv4,
}

/// An IPv4 packet with a sound header.
#[derive(Clone, Copy)]
pub struct Ip4Packet {
    /// The five words of the header without options, as loaded. Each in 64 bits, so that no two are ever copied at once.
    words: [u64; 5],
    /// Where the transport header begins, from the start of the frame.
    pub transport: usize,
}

/// What the transport header says: source port in bits 0-15, destination port in bits 16-31, protocol number in bits
/// 32-39, TCP flags in bits 40-47.
#[derive(Clone, Copy)]
pub struct Segment(u64);

impl Segment {
    /// A segment with these ports, and the flags of a TCP header.
    #[inline(always)]
    pub const fn new(protocol: Protocol, source: Port, destination: Port, flags: u8) -> Self {
        Self(
            source.raw() as u64
                | (destination.raw() as u64) << 16
                | (protocol as u64) << 32
                | (flags as u64) << 40,
        )
    }

    /// Transport protocol.
    #[inline(always)]
    pub const fn protocol(self) -> Protocol {
        const TCP: u8 = Protocol::Tcp as u8;
        match (self.0 >> 32) as u8 {
            TCP => Protocol::Tcp,
            _ => Protocol::Udp,
        }
    }

    /// Source port.
    #[inline(always)]
    pub const fn source(self) -> Port {
        Port::from_raw(self.0 as u16)
    }

    /// Destination port.
    #[inline(always)]
    pub const fn destination(self) -> Port {
        Port::from_raw((self.0 >> 16) as u16)
    }

    /// What the flags of a TCP segment mean; no matter for other protocols.
    #[inline(always)]
    pub const fn event(self) -> Event {
        Event::of((self.0 >> 40) as u8)
    }
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
    let header_len = usize::from(header.ihl());
    if header_len < Ipv4Hdr::LEN {
        return Err(Reason::IpHeaderLength);
    }
    let transport = EthHdr::LEN + header_len;
    if transport > packet.len() {
        return Err(Reason::IpTruncated);
    }
    let len = header.tot_len();
    if usize::from(len) < header_len || EthHdr::LEN + usize::from(len) > packet.len() {
        return Err(Reason::IpTotalLength);
    }
    Ok(Ip4Packet { words: wire::words(&header).map(u64::from), transport })
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

    /// Flags and fragment offset, in host order.
    #[inline(always)]
    const fn fragment(&self) -> u16 {
        u16::from_be((self.words[1] >> 16) as u16)
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

    /// Header checksum, as loaded.
    #[inline(always)]
    pub const fn checksum(&self) -> u16 {
        (self.words[2] >> 16) as u16
    }

    /// Whether the packet is one of several fragments (RFC 791 section 3.2): more follow, or it is not the first.
    #[inline(always)]
    pub const fn is_fragment(&self) -> bool {
        self.fragment() & 0x3fff != 0
    }

    /// Whether the sender forbids fragmentation.
    #[inline(always)]
    pub const fn dont_fragment(&self) -> bool {
        self.fragment() & 0x4000 != 0
    }

    /// Whether the header checksum is right, options included.
    #[inline(always)]
    pub fn checksum_holds(&self, packet: &impl Packet) -> bool {
        let fixed = self.words.iter().sum::<u64>();
        let options = sum_of_options(packet, self.transport);
        options.is_some_and(|options| checksum::fold(fixed + options) == 0xffff)
    }

    /// Reads the transport header.
    ///
    /// # Errors
    ///
    /// [`Reason::OtherProtocol`], or [`Reason::TransportTruncated`] when the packet ends inside the header.
    #[inline(always)]
    pub fn segment(&self, packet: &impl Packet) -> Result<Segment, Reason> {
        let protocol = Protocol::try_from(self.protocol()).map_err(|_| Reason::OtherProtocol)?;
        let room = self.payload_len();
        let need = match protocol {
            Protocol::Tcp => TCP_LEN,
            Protocol::Udp => UdpHdr::LEN,
        };
        if room < need {
            return Err(Reason::TransportTruncated);
        }
        let ports: [u16; 2] = packet.read(self.transport).ok_or(Reason::TransportTruncated)?;
        let flags = match protocol {
            Protocol::Tcp => packet.read(self.transport + TCP_FLAGS).ok_or(Reason::TransportTruncated)?,
            Protocol::Udp => 0,
        };
        Ok(Segment::new(protocol, Port::from_raw(ports[0]), Port::from_raw(ports[1]), flags))
    }
}

/// The sum of the IP options, which end where the transport header begins; none are left out, for there are at most ten
/// words of them.
#[inline(always)]
fn sum_of_options(packet: &impl Packet, transport: usize) -> Option<u64> {
    let mut sum = 0;
    let mut offset = EthHdr::LEN + Ipv4Hdr::LEN;
    for _ in 0..10 {
        if offset >= transport {
            break;
        }
        sum += u64::from(packet.read::<u32>(offset)?);
        offset += 4;
    }
    Some(sum)
}
