//! Masquerading: rewriting one end of a packet (`docs/ipvs.md`, section 5.2).

use lb_common::{
    addr::{Ip4, Port},
    checksum::{self, Delta},
    proto::Protocol,
};
use network_types::{eth::EthHdr, ip::Ipv4Hdr, tcp::TcpHdr, udp::UdpHdr};

use crate::{
    packet::Packet,
    parse::{Ip4Packet, Segment},
};

/// Which end of a packet is rewritten.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// The source, of a server's reply.
    Source,
    /// The destination, of a client's packet.
    Destination,
}

/// Rewrites address and port of one end, and lowers the TTL by `hops`. Without a `segment` there is no port to rewrite
/// and no checksum that covers the addresses: the packet is an ICMP message.
///
/// Checksums are updated, not verified: a wrong one stays wrong. A UDP datagram without a checksum gets one, as from
/// ip_vs. `None` when the packet ends inside a header that was read before, which cannot be.
#[inline(always)]
pub fn translate(
    packet: &mut impl Packet,
    ip: &Ip4Packet,
    segment: Option<Segment>,
    end: End,
    to: (Ip4, Port),
    hops: u8,
) -> Option<()> {
    let (addr, port) = to;
    let (old_addr, addr_offset) = match end {
        End::Source => (ip.source(), core::mem::offset_of!(Ipv4Hdr, src_addr)),
        End::Destination => (ip.destination(), core::mem::offset_of!(Ipv4Hdr, dst_addr)),
    };
    let moved = Delta::default().dword(old_addr.raw(), addr.raw());
    packet.write(EthHdr::LEN + addr_offset, addr.raw())?;
    age(packet, ip, hops, moved)?;

    let Some(segment) = segment else { return Some(()) };
    let (old_port, port_offset) = match end {
        End::Source => (segment.source(), 0),
        End::Destination => (segment.destination(), 2),
    };
    let transport = ip.transport;
    packet.write(transport + port_offset, port.raw())?;
    let moved = moved.word(old_port.raw(), port.raw());
    match segment.protocol() {
        Protocol::Tcp => {
            let offset = transport + core::mem::offset_of!(TcpHdr, check);
            let old = packet.read(offset)?;
            packet.write(offset, moved.apply(old))
        }
        Protocol::Udp => {
            let offset = transport + core::mem::offset_of!(UdpHdr, check);
            let old: u16 = packet.read(offset)?;
            let new = if old == 0 { udp_from_scratch(packet, ip, end, addr)? } else { moved.apply(old) };
            packet.write(offset, checksum::udp_on_wire(new))
        }
    }
}

/// Lowers the TTL by `hops` and updates the header checksum for that and for `change`.
#[inline(always)]
fn age(packet: &mut impl Packet, ip: &Ip4Packet, hops: u8, change: Delta) -> Option<()> {
    let word = |ttl| u16::from_ne_bytes([ttl, ip.protocol()]);
    let (before, after) = (word(ip.ttl()), word(ip.ttl() - hops));
    let check = change.word(before, after).apply((ip.ttl_protocol_checksum() >> 16) as u16);
    packet.write(TTL_PROTOCOL_CHECKSUM, u32::from(after) | u32::from(check) << 16)
}

/// Where TTL, protocol and checksum stand, one after the other.
const TTL_PROTOCOL_CHECKSUM: usize = EthHdr::LEN + core::mem::offset_of!(Ipv4Hdr, ttl);

/// Lowers the TTL by one, as every router does.
#[inline(always)]
pub fn lower_ttl(packet: &mut impl Packet, ip: &Ip4Packet) -> Option<()> {
    packet.write(TTL_PROTOCOL_CHECKSUM, checksum::lower_ttl(ip.ttl_protocol_checksum()))
}

/// The checksum of a datagram that came without one, after its rewrite.
#[inline(always)]
fn udp_from_scratch(packet: &impl Packet, ip: &Ip4Packet, end: End, addr: Ip4) -> Option<u16> {
    let (source, destination) = match end {
        End::Source => (addr, ip.destination()),
        End::Destination => (ip.source(), addr),
    };
    let len = ip.payload_len();
    let pseudo = checksum::pseudo_header4(source.raw(), destination.raw(), Protocol::Udp as u8, len as u16);
    Some(!checksum::fold(pseudo + packet.sum(ip.transport, len)?))
}
