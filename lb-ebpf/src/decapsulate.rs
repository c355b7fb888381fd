//! The other end of the tunnel: taking packets out of the packets that a director put them in ([`crate::tunnel`],
//! RFC 2003), at the real server.
//!
//! A packet is taken out when it is for a virtual address of this host and came in a packet that can be believed. The
//! outer destination is not looked at: which addresses the host has is known to the host alone, and what carries a
//! packet for an address that it serves was meant for it. Everything else is left to the host as it is.

use lb_common::{
    addr::Ip4,
    checksum::Delta,
    decapsulation::Decapsulation,
    reason::{Fate, Reason},
};
use network_types::{
    eth::{EthHdr, EtherType},
    ip::Ipv4Hdr,
};

use crate::{
    packet::Packet,
    parse::{self, Ip, Ip4Packet},
    tunnel::{ECN_CE, ECN_ECT0, ECN_ECT1, ECN_MASK, ECN_NOT_ECT, IPPROTO_IPIP},
};

/// The virtual addresses of a real server, and what becomes of packets for them.
pub trait VirtualAddresses {
    /// Whether the host serves this address.
    fn contains(&self, address: Ip4) -> bool;

    /// Counts a packet.
    fn count(&self, outcome: Decapsulation);
}

/// Takes the packet for a virtual address out of the one it came in. Returns what happens to the frame: the host gets it,
/// unless it carries a packet for a virtual address that cannot be taken out.
#[inline(always)]
pub fn decapsulate(packet: &mut impl Packet, addresses: &impl VirtualAddresses) -> Fate {
    let Some((inner, destination)) = carried(packet) else { return Fate::Passed };
    if !addresses.contains(destination) {
        return Fate::Passed;
    }
    let outcome = match take_out(packet, inner) {
        Ok(()) => Decapsulation::Delivered,
        Err(outcome) => outcome,
    };
    addresses.count(outcome);
    outcome.fate()
}

/// Where the header of the carried packet begins, and its destination. `None` when the frame carries none, or one that
/// cannot be seen: the host knows what to do about such a frame.
#[inline(always)]
fn carried(packet: &impl Packet) -> Option<(usize, Ip4)> {
    parse::frame::<Ip4Packet>(packet).ok()?;
    let header: Ipv4Hdr = packet.read(EthHdr::LEN)?;
    let header_len = usize::from(header.ihl());
    // Behind the header of any but the first fragment is some piece of a packet.
    let later_fragment = u16::from_ne_bytes(header.frags) & 0x1fff_u16.to_be() != 0;
    if header.version() != 4 || header_len < Ipv4Hdr::LEN || header.proto != IPPROTO_IPIP || later_fragment {
        return None;
    }
    let inner = EthHdr::LEN + header_len;
    let destination: u32 = packet.read(inner + core::mem::offset_of!(Ipv4Hdr, dst_addr))?;
    Some((inner, Ip4::from_raw(destination)))
}

/// Removes what is before the carried packet, whose header begins at `inner`, but for the Ethernet header.
#[inline(always)]
fn take_out(packet: &mut impl Packet, inner: usize) -> Result<(), Decapsulation> {
    // Of the reasons not to believe the header, only its length is left; the others make it one that carries nothing.
    let outer = Ip4Packet::parse(packet).map_err(|_| Decapsulation::OuterTotalLength)?;
    if outer.is_fragment() {
        return Err(Decapsulation::OuterFragment);
    }
    if !outer.checksum_holds(packet) {
        return Err(Decapsulation::OuterChecksum);
    }
    let room = outer.payload_len();

    // The header keeps its addresses, and behind it is IPv4 as before.
    let addresses: [u32; 3] = packet.read(0).ok_or(Decapsulation::Impossible)?;
    packet.shrink_head((inner - EthHdr::LEN) as u16).ok_or(Decapsulation::Impossible)?;
    packet.write_words(0, addresses).ok_or(Decapsulation::Impossible)?;
    let ether_type = core::mem::offset_of!(EthHdr, ether_type);
    packet.write(ether_type, EtherType::Ipv4 as u16).ok_or(Decapsulation::Impossible)?;

    let inner = Ip4Packet::parse(packet).map_err(distrust)?;
    if inner.transport() > EthHdr::LEN + room {
        return Err(Decapsulation::InnerTruncated);
    }
    if inner.len() as usize > room {
        return Err(Decapsulation::InnerTotalLength);
    }
    if !inner.checksum_holds(packet) {
        return Err(Decapsulation::InnerChecksum);
    }
    let ecn = merge_ecn(inner.tos(), outer.tos()).ok_or(Decapsulation::CongestionUnknown)?;
    set_ecn(packet, &inner, ecn).ok_or(Decapsulation::Impossible)
}

#[inline(always)]
fn distrust(reason: Reason) -> Decapsulation {
    match reason {
        Reason::IpVersion => Decapsulation::InnerVersion,
        Reason::IpHeaderLength => Decapsulation::InnerHeaderLength,
        Reason::IpTotalLength => Decapsulation::InnerTotalLength,
        _ => Decapsulation::InnerTruncated,
    }
}

/// The ECN field of a packet that leaves a tunnel, given the type of service of the inner and of the outer header
/// (RFC 6040 section 4.2). `None` when the packet must be dropped: its sender slows down for nothing else.
#[inline(always)]
const fn merge_ecn(inner: u8, outer: u8) -> Option<u8> {
    match (inner & ECN_MASK, outer & ECN_MASK) {
        (ECN_NOT_ECT, ECN_CE) => None,
        (ECN_ECT0 | ECN_ECT1, ECN_CE) => Some(ECN_CE),
        (ECN_ECT0, ECN_ECT1) => Some(ECN_ECT1),
        (inner, _) => Some(inner),
    }
}

/// Writes the ECN field and updates the header checksum.
#[inline(always)]
fn set_ecn(packet: &mut impl Packet, ip: &Ip4Packet, ecn: u8) -> Option<()> {
    let tos = ip.tos() & !ECN_MASK | ecn;
    if tos == ip.tos() {
        return Some(());
    }
    const CHECK: usize = EthHdr::LEN + core::mem::offset_of!(Ipv4Hdr, check);
    // The field is the low byte of a 16-bit word whose other byte stays.
    let word = |tos| u16::from_ne_bytes([0, tos]);
    let check: u16 = packet.read(CHECK)?;
    packet.write(EthHdr::LEN + core::mem::offset_of!(Ipv4Hdr, tos), tos)?;
    packet.write(CHECK, Delta::default().word(word(ip.tos()), word(tos)).apply(check))
}
