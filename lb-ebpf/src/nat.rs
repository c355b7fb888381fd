//! Masquerading: rewriting one end of a packet (`docs/ipvs.md`, section 5.2).

use lb_common::{
    addr::{Ip4, Ip6, Port},
    checksum::{self, Delta},
    proto::Protocol,
};
use network_types::{
    eth::EthHdr,
    ip::{Ipv4Hdr, Ipv6Hdr},
};

use crate::{
    packet::Packet,
    parse::{Ip, Ip4Packet, Ip6Packet, Segment},
    protocols::Protocols,
};

/// Which end of a packet is rewritten.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// The source, of a server's reply.
    Source,
    /// The destination, of a client's packet.
    Destination,
}

/// What there is to rewrite in the header of a packet of an address family.
pub trait Rewrite: Ip {
    /// Whether ICMP messages have a checksum that covers the addresses.
    const ICMP_COVERS_ADDRESSES: bool;

    /// Writes the address of one end and lowers the TTL by `hops`. Returns what that changes in checksums that cover the
    /// addresses. `None` when the packet is shorter than it was.
    fn readdress(&self, packet: &mut impl Packet, end: End, addr: Self::Addr, hops: u8) -> Option<Delta>;

    /// Lowers the TTL by one, as every router does.
    fn lower_ttl(&self, packet: &mut impl Packet) -> Option<()>;

    /// The unfolded sum of the pseudo header of a transport protocol; `len` of transport header and payload in bytes.
    fn pseudo_header(source: Self::Addr, destination: Self::Addr, protocol: u8, len: u32) -> u64;
}

/// Where TTL, protocol and checksum stand, one after the other.
const TTL_PROTOCOL_CHECKSUM: usize = EthHdr::LEN + core::mem::offset_of!(Ipv4Hdr, ttl);

impl<S: Protocols> Rewrite for Ip4Packet<S> {
    const ICMP_COVERS_ADDRESSES: bool = false;

    #[inline(always)]
    fn readdress(&self, packet: &mut impl Packet, end: End, addr: Ip4, hops: u8) -> Option<Delta> {
        let (old, offset) = match end {
            End::Source => (self.source(), core::mem::offset_of!(Ipv4Hdr, src_addr)),
            End::Destination => (self.destination(), core::mem::offset_of!(Ipv4Hdr, dst_addr)),
        };
        let moved = Delta::default().dword(old.raw(), addr.raw());
        packet.write(EthHdr::LEN + offset, addr.raw())?;
        let word = |ttl| u16::from_ne_bytes([ttl, self.protocol()]);
        let (before, after) = (word(self.ttl()), word(self.ttl() - hops));
        let check = moved.word(before, after).apply((self.ttl_protocol_checksum() >> 16) as u16);
        packet.write(TTL_PROTOCOL_CHECKSUM, u32::from(after) | u32::from(check) << 16)?;
        Some(moved)
    }

    #[inline(always)]
    fn lower_ttl(&self, packet: &mut impl Packet) -> Option<()> {
        packet.write(TTL_PROTOCOL_CHECKSUM, checksum::lower_ttl(self.ttl_protocol_checksum()))
    }

    #[inline(always)]
    fn pseudo_header(source: Ip4, destination: Ip4, protocol: u8, len: u32) -> u64 {
        checksum::pseudo_header4(source.raw(), destination.raw(), protocol, len as u16)
    }
}

/// Where the hop limit stands.
const HOP_LIMIT: usize = EthHdr::LEN + core::mem::offset_of!(Ipv6Hdr, hop_limit);

impl<S: Protocols> Rewrite for Ip6Packet<S> {
    const ICMP_COVERS_ADDRESSES: bool = true;

    #[inline(always)]
    fn readdress(&self, packet: &mut impl Packet, end: End, addr: Ip6, hops: u8) -> Option<Delta> {
        let (old, offset) = match end {
            End::Source => (self.source(), core::mem::offset_of!(Ipv6Hdr, src_addr)),
            End::Destination => (self.destination(), core::mem::offset_of!(Ipv6Hdr, dst_addr)),
        };
        packet.write(EthHdr::LEN + offset, addr.raw())?;
        packet.write(HOP_LIMIT, self.ttl() - hops)?;
        Some(Delta::default().address(old, addr))
    }

    #[inline(always)]
    fn lower_ttl(&self, packet: &mut impl Packet) -> Option<()> {
        packet.write(HOP_LIMIT, self.ttl() - 1)
    }

    #[inline(always)]
    fn pseudo_header(source: Ip6, destination: Ip6, protocol: u8, len: u32) -> u64 {
        checksum::pseudo_header6(source, destination, protocol, len)
    }
}

/// Rewrites address and port of one end, and lowers the TTL by `hops`. Without a `segment` there is no port to rewrite: the
/// packet is an ICMP message.
///
/// Checksums are updated, not verified: a wrong one stays wrong. A UDP datagram without a checksum gets one, as from
/// ip_vs. `None` when the packet ends inside a header that was read before, which cannot be.
#[inline(always)]
pub fn translate<I: Rewrite>(
    packet: &mut impl Packet,
    ip: &I,
    segment: Option<Segment<I::Protocols>>,
    end: End,
    to: (I::Addr, Port),
    hops: u8,
) -> Option<()> {
    let (addr, port) = to;
    let moved = ip.readdress(packet, end, addr, hops)?;
    let transport = ip.transport();
    let Some(segment) = segment else {
        return if I::ICMP_COVERS_ADDRESSES { update(packet, transport + 2, moved) } else { Some(()) };
    };
    let (old_port, port_offset) = match end {
        End::Source => (segment.source(), 0),
        End::Destination => (segment.destination(), 2),
    };
    packet.write(transport + port_offset, port.raw())?;
    let moved = moved.word(old_port.raw(), port.raw());
    I::Protocols::update_checksum(packet, ip, &segment, (end, addr, port), moved)
}

/// Updates the checksum at `offset`.
#[inline(always)]
pub fn update(packet: &mut impl Packet, offset: usize, moved: Delta) -> Option<()> {
    let old = packet.read(offset)?;
    packet.write(offset, moved.apply(old))
}

/// The checksum of a datagram that came without one, after its rewrite.
#[inline(always)]
pub fn udp_from_scratch<I: Rewrite>(packet: &impl Packet, ip: &I, end: End, addr: I::Addr) -> Option<u16> {
    let (source, destination) = match end {
        End::Source => (addr, ip.destination()),
        End::Destination => (ip.source(), addr),
    };
    let len = ip.payload_len();
    let pseudo = I::pseudo_header(source, destination, Protocol::Udp as u8, len as u32);
    Some(!checksum::fold(pseudo + packet.sum(ip.transport(), len)?))
}
