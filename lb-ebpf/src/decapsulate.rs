//! The other end of the tunnel: taking packets out of the packets that a director put them in ([`crate::tunnel`],
//! RFC 2003, RFC 2473), at the real server.
//!
//! A packet is taken out when it is for a virtual address of this host and came in a packet that can be believed. The
//! outer destination is not looked at: which addresses the host has is known to the host alone, and what carries a
//! packet for an address that it serves was meant for it. Everything else is left to the host as it is.

use lb_common::{
    addr::{Address, Ip4, Ip6},
    checksum::Delta,
    decapsulation::Decapsulation,
    reason::{Fate, Reason},
};
use network_types::{
    eth::EthHdr,
    ip::{Ipv4Hdr, Ipv6Hdr},
};

use crate::{
    packet::Packet,
    parse::{self, Ip, Ip4Packet, Ip6Packet},
    tunnel::{ECN_CE, ECN_ECT0, ECN_ECT1, ECN_MASK, ECN_NOT_ECT, Wrap},
};

/// The virtual addresses of a real server, and what becomes of packets for them.
pub trait VirtualAddresses: Serves<Ip4> + Serves<Ip6> {
    /// Counts a packet.
    fn count(&self, outcome: Decapsulation);
}

/// The virtual addresses of one address family.
pub trait Serves<A: Address> {
    /// Whether the host serves this address.
    fn contains(&self, address: A) -> bool;
}

/// Takes the packet for a virtual address out of the one it came in. Returns what happens to the frame: the host gets it,
/// unless it carries a packet for a virtual address that cannot be taken out.
#[inline(always)]
pub fn decapsulate(packet: &mut impl Packet, addresses: &impl VirtualAddresses) -> Fate {
    if parse::carries::<Ip6Packet>(packet) {
        decapsulate_from::<Ip6Packet, _>(packet, addresses)
    } else {
        decapsulate_from::<Ip4Packet, _>(packet, addresses)
    }
}

#[inline(always)]
fn decapsulate_from<I: Unwrap, V: VirtualAddresses + Serves<I::Addr>>(packet: &mut impl Packet, addresses: &V) -> Fate {
    let Some((inner, destination)) = carried::<I>(packet) else { return Fate::Passed };
    if !addresses.contains(destination) {
        return Fate::Passed;
    }
    let outcome = match take_out::<I>(packet, inner) {
        Ok(()) => Decapsulation::Delivered,
        Err(outcome) => outcome,
    };
    addresses.count(outcome);
    outcome.fate()
}

/// What there is to know of a packet of an address family that comes in another of the same.
trait Unwrap: Wrap {
    /// Where the header begins of the packet that one with this header carries, from the start of the frame. `None` when it
    /// carries none, or one that cannot be seen.
    fn inner(packet: &impl Packet) -> Option<usize>;

    /// The destination in the header at `offset`. `None` when the frame ends before it does.
    fn destination_at(packet: &impl Packet, offset: usize) -> Option<Self::Addr>;

    /// Writes the type of service, which differs from the packet's own in the ECN field only. `None` when the packet is
    /// shorter than it was.
    fn set_tos(&self, packet: &mut impl Packet, tos: u8) -> Option<()>;
}

/// Where the header of the carried packet begins, and its destination. `None` when the frame carries none, or one that
/// cannot be seen: the host knows what to do about such a frame.
#[inline(always)]
fn carried<I: Unwrap>(packet: &impl Packet) -> Option<(usize, I::Addr)> {
    parse::frame::<I>(packet).ok()?;
    let inner = I::inner(packet)?;
    Some((inner, I::destination_at(packet, inner)?))
}

/// Removes what is before the carried packet, whose header begins at `inner`, but for the Ethernet header.
#[inline(always)]
fn take_out<I: Unwrap>(packet: &mut impl Packet, inner: usize) -> Result<(), Decapsulation> {
    // Of the reasons not to believe the header, only its length is left; the others make it one that carries nothing.
    let outer = I::parse(packet).map_err(|_| Decapsulation::OuterTotalLength)?;
    if outer.is_fragment() {
        return Err(Decapsulation::OuterFragment);
    }
    if !outer.checksum_holds(packet) {
        return Err(Decapsulation::OuterChecksum);
    }
    let room = outer.payload_len();

    // The header keeps its addresses, and behind it is a packet of the same family as before.
    let addresses: [u32; 3] = packet.read(0).ok_or(Decapsulation::Impossible)?;
    packet.shrink_head((inner - EthHdr::LEN) as u16).ok_or(Decapsulation::Impossible)?;
    packet.write_words(0, addresses).ok_or(Decapsulation::Impossible)?;
    let ether_type = core::mem::offset_of!(EthHdr, ether_type);
    packet.write(ether_type, I::ETHER_TYPE as u16).ok_or(Decapsulation::Impossible)?;

    let inner = I::parse(packet).map_err(distrust)?;
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
    let tos = inner.tos() & !ECN_MASK | ecn;
    let written = if tos == inner.tos() { Some(()) } else { inner.set_tos(packet, tos) };
    written.ok_or(Decapsulation::Impossible)
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

impl Unwrap for Ip4Packet {
    #[inline(always)]
    fn inner(packet: &impl Packet) -> Option<usize> {
        let header: Ipv4Hdr = packet.read(EthHdr::LEN)?;
        let header_len = usize::from(header.ihl());
        // Behind the header of any but the first fragment is some piece of a packet.
        let later_fragment = u16::from_ne_bytes(header.frags) & 0x1fff_u16.to_be() != 0;
        let carries = header.version() == 4 && header_len >= Self::HEADER && header.proto == Self::IN_IP;
        (carries && !later_fragment).then_some(EthHdr::LEN + header_len)
    }

    #[inline(always)]
    fn destination_at(packet: &impl Packet, offset: usize) -> Option<Ip4> {
        packet.read(offset + core::mem::offset_of!(Ipv4Hdr, dst_addr)).map(Ip4::from_raw)
    }

    #[inline(always)]
    fn set_tos(&self, packet: &mut impl Packet, tos: u8) -> Option<()> {
        const CHECK: usize = EthHdr::LEN + core::mem::offset_of!(Ipv4Hdr, check);
        // The field is the low byte of a 16-bit word whose other byte stays.
        let word = |tos| u16::from_ne_bytes([0, tos]);
        let check: u16 = packet.read(CHECK)?;
        packet.write(EthHdr::LEN + core::mem::offset_of!(Ipv4Hdr, tos), tos)?;
        packet.write(CHECK, Delta::default().word(word(self.tos()), word(tos)).apply(check))
    }
}

impl Unwrap for Ip6Packet {
    /// Of extension headers before the packet only a fragment header is looked at, as that of a packet in pieces; directors
    /// send none.
    #[inline(always)]
    fn inner(packet: &impl Packet) -> Option<usize> {
        const HEADER_END: usize = EthHdr::LEN + <Ip6Packet>::HEADER;
        const FRAGMENT_LEN: usize = 8;
        let ip = Self::of(packet.read(EthHdr::LEN)?).ok()?;
        if ip.protocol() == Self::IN_IP {
            return Some(HEADER_END);
        }
        // Next header, a reserved byte, and the offset above three bits that say other things (RFC 8200 section 4.5).
        let fragment: u32 = packet.read(HEADER_END)?;
        let later_fragment = fragment & 0xfff8_u32.to_be() != 0;
        let carries = ip.is_fragment() && fragment as u8 == Self::IN_IP && !later_fragment;
        carries.then_some(HEADER_END + FRAGMENT_LEN)
    }

    #[inline(always)]
    fn destination_at(packet: &impl Packet, offset: usize) -> Option<Ip6> {
        packet.read(offset + core::mem::offset_of!(Ipv6Hdr, dst_addr)).map(Ip6::from_raw)
    }

    #[inline(always)]
    fn set_tos(&self, packet: &mut impl Packet, tos: u8) -> Option<()> {
        // The traffic class stands between version and flow label, across the bytes.
        let changed = u32::from(self.tos() ^ tos) << 20;
        let word: u32 = packet.read(EthHdr::LEN)?;
        packet.write(EthHdr::LEN, word ^ changed.to_be())
    }
}
