//! IP-in-IP encapsulation (RFC 2003, RFC 2473), with the outer header as ip_vs builds it (`docs/ipvs.md`, section 5.5).

use lb_common::{
    addr::{Ip4, Ip6},
    checksum,
    reason::Reason,
};
use network_types::{eth::EthHdr, ip::Ipv4Hdr};

use crate::{
    nat::Rewrite,
    packet::Packet,
    parse::{Ip as _, Ip4Packet, Ip6Packet},
    protocols::Protocols,
    wire,
};

/// The protocol number of IPv4 in IP.
const IPPROTO_IPIP: u8 = 4;
/// The protocol number of IPv6 in IP.
const IPPROTO_IPV6: u8 = 41;
const DONT_FRAGMENT: u8 = 0x40;

/// The bits of the type of service that are the ECN field (RFC 3168 section 5).
pub(crate) const ECN_MASK: u8 = 0x03;
/// Its sender does not understand ECN.
pub(crate) const ECN_NOT_ECT: u8 = 0x00;
/// Its sender understands ECN.
pub(crate) const ECN_ECT1: u8 = 0x01;
/// Its sender understands ECN.
pub(crate) const ECN_ECT0: u8 = 0x02;
/// It met congestion.
pub(crate) const ECN_CE: u8 = 0x03;

/// What there is to know of a packet of an address family that is put into another of the same.
pub trait Wrap: Rewrite {
    /// The protocol number of such a packet.
    const IN_IP: u8;
    /// The smallest MTU a link may have.
    const MTU_MIN: u32;

    /// Writes the header of a packet from `source` to `destination` that has this one in it, its TTL lowered by one, at the
    /// place of the first header. `None` when the frame is too short.
    fn write_outer(&self, packet: &mut impl Packet, source: Self::Addr, destination: Self::Addr) -> Option<()>;
}

/// Lowers the TTL by one and puts the packet into another from `source` to `destination`.
///
/// # Errors
///
/// [`Reason::HeadroomExhausted`] when there is no room before the packet.
#[inline(always)]
pub fn encapsulate<I: Wrap>(
    packet: &mut impl Packet,
    ip: &I,
    source: I::Addr,
    destination: I::Addr,
) -> Result<(), Reason> {
    ip.lower_ttl(packet).ok_or(Reason::Impossible)?;
    packet.grow_head(I::HEADER as u16).ok_or(Reason::HeadroomExhausted)?;
    packet.write(core::mem::offset_of!(EthHdr, ether_type), I::ETHER_TYPE as u16).ok_or(Reason::Impossible)?;
    ip.write_outer(packet, source, destination).ok_or(Reason::Impossible)
}

/// The type of service of the outer packet. Congestion seen before the tunnel stays inside; the outer header only says that
/// the flow understands ECN.
#[inline(always)]
const fn outer_tos(tos: u8) -> u8 {
    if tos & ECN_MASK == ECN_CE { tos & !ECN_MASK | ECN_ECT0 } else { tos }
}

impl<S: Protocols> Wrap for Ip4Packet<S> {
    const IN_IP: u8 = IPPROTO_IPIP;
    /// RFC 791 section 3.2.
    const MTU_MIN: u32 = 68;

    #[inline(always)]
    fn write_outer(&self, packet: &mut impl Packet, source: Ip4, destination: Ip4) -> Option<()> {
        let dont_fragment = !self.may_be_fragmented();
        let mut header = Ipv4Hdr {
            vihl: 0x45,
            tos: outer_tos(self.tos()),
            tot_len: (self.len() as u16 + Self::HEADER as u16).to_be_bytes(),
            // A packet that is never fragmented needs no identification (RFC 6864); one that may be inherits the inner one,
            // which its sender keeps apart from its neighbours.
            id: if dont_fragment { [0, 0] } else { self.id().to_ne_bytes() },
            frags: [if dont_fragment { DONT_FRAGMENT } else { 0 }, 0],
            ttl: self.ttl() - 1,
            proto: Self::IN_IP,
            check: [0, 0],
            src_addr: source.octets(),
            dst_addr: destination.octets(),
        };
        header.check = (!checksum::fold(checksum::sum5(wire::words(&header)))).to_ne_bytes();
        packet.write(EthHdr::LEN, header)
    }
}

impl<S: Protocols> Wrap for Ip6Packet<S> {
    const IN_IP: u8 = IPPROTO_IPV6;
    /// RFC 8200 section 5.
    const MTU_MIN: u32 = 1280;

    #[inline(always)]
    fn write_outer(&self, packet: &mut impl Packet, source: Ip6, destination: Ip6) -> Option<()> {
        let first = Self::first_word(outer_tos(self.tos()), self.len() as u16, Self::IN_IP, self.ttl() - 1);
        let ([a, b], [c, d]) = (source.raw(), destination.raw());
        packet.write(EthHdr::LEN, [first, a, b, c, d])
    }
}
