//! IP-in-IP encapsulation (RFC 2003), with the outer header as ip_vs builds it (`docs/ipvs.md`, section 5.5).

use lb_common::{addr::Ip4, checksum, reason::Reason};
use network_types::{
    eth::{EthHdr, EtherType},
    ip::Ipv4Hdr,
};

use crate::{nat, packet::Packet, parse::Ip4Packet, wire};

/// What encapsulation adds to a packet, in bytes.
pub const OVERHEAD: u32 = Ipv4Hdr::LEN as u32;

/// The smallest MTU an IPv4 link may have (RFC 791 section 3.2).
pub const MTU_MIN: u32 = 68;

/// The protocol number of IPv4 in IPv4.
pub(crate) const IPPROTO_IPIP: u8 = 4;
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

/// Lowers the TTL by one and puts the packet into another from `source` to `destination`.
///
/// # Errors
///
/// [`Reason::HeadroomExhausted`] when there is no room before the packet.
#[inline(always)]
pub fn encapsulate(packet: &mut impl Packet, ip: &Ip4Packet, source: Ip4, destination: Ip4) -> Result<(), Reason> {
    nat::lower_ttl(packet, ip).ok_or(Reason::Impossible)?;
    packet.grow_head(OVERHEAD as u16).ok_or(Reason::HeadroomExhausted)?;
    packet.write(core::mem::offset_of!(EthHdr, ether_type), EtherType::Ipv4 as u16).ok_or(Reason::Impossible)?;
    packet.write(EthHdr::LEN, outer_header(ip, source, destination)).ok_or(Reason::Impossible)
}

#[inline(always)]
fn outer_header(ip: &Ip4Packet, source: Ip4, destination: Ip4) -> Ipv4Hdr {
    let dont_fragment = ip.dont_fragment();
    // Congestion seen before the tunnel stays inside; the outer header only says that the flow understands ECN.
    let tos = if ip.tos() & ECN_MASK == ECN_CE { ip.tos() & !ECN_MASK | ECN_ECT0 } else { ip.tos() };
    let mut header = Ipv4Hdr {
        vihl: 0x45,
        tos,
        tot_len: (ip.len() + OVERHEAD as u16).to_be_bytes(),
        // A packet that is never fragmented needs no identification (RFC 6864); one that may be inherits the inner one,
        // which its sender keeps apart from its neighbours.
        id: if dont_fragment { [0, 0] } else { ip.id().to_ne_bytes() },
        frags: [if dont_fragment { DONT_FRAGMENT } else { 0 }, 0],
        ttl: ip.ttl() - 1,
        proto: IPPROTO_IPIP,
        check: [0, 0],
        src_addr: source.octets(),
        dst_addr: destination.octets(),
    };
    header.check = (!checksum::fold(checksum::sum5(wire::words(&header)))).to_ne_bytes();
    header
}
