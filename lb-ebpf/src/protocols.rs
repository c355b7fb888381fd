//! What differs by the transport protocol of packets.
//!
//! Nearly all packets are TCP or UDP, and their path asks for nothing else. SCTP packets, which it leaves, begin the same path
//! again, of the same code, which is generic over [`Protocols`]. Where few packets come, one program is for all of them.

use lb_common::{
    abi::{Config, switch},
    addr::Port,
    checksum::{self, Delta},
    crc32c,
    flow::{Live, Word, flag},
    proto::Protocol,
    reason::Reason,
    sctp::{self, Chunks},
    sync::opaque,
    tcp::{self, Direction, Transition},
};
use network_types::{tcp::TcpHdr, udp::UdpHdr};

use crate::{
    nat::{self, End, Rewrite},
    packet::Packet,
    parse::{Ip, Segment},
    track::From,
};

/// The transport protocols of a path: what the pipeline is generic over, beside the address family.
pub trait Protocols: Copy {
    /// Whether what comes of a packet is hidden from the verifier, which would else follow the rest once for each protocol.
    const HIDES: bool = false;

    /// Reads the transport header.
    ///
    /// # Errors
    ///
    /// [`Reason::OtherProtocol`], [`Reason::ExtensionHeader`], or [`Reason::TransportTruncated`] when the packet ends inside
    /// the header.
    fn segment(ip: &impl Ip, packet: &impl Packet) -> Result<Segment<Self>, Reason>;

    /// The protocol with this number, of those that there are.
    fn protocol(number: u64) -> Protocol;

    /// What live connections of this protocol have in their words.
    #[inline(always)]
    fn live(protocol: Protocol) -> Live {
        Live::of(protocol)
    }

    /// SYN, unless a segment without it may open a connection under these [`switch`]es.
    fn wanted(segment: &Segment<Self>, switches: u32) -> u64;

    /// What a segment with these flags makes of the state of a connection.
    fn moved(config: &Config, word: Word, flags: u8, from: From) -> Word;

    /// Whether a segment that begins a connection may take over the addresses and ports of this one, under this
    /// `conn_reuse_mode` other than 0.
    fn is_free(mode: u32, word: Word) -> bool;

    /// Updates the checksum of a segment, after address and port of one end have been rewritten. `moved` is what that
    /// changes in checksums that cover both.
    fn update_checksum<I: Rewrite>(
        packet: &mut impl Packet,
        ip: &I,
        segment: &Segment<Self>,
        to: (End, I::Addr, Port),
        moved: Delta,
    ) -> Option<()>;
}

/// TCP and UDP.
#[derive(Clone, Copy)]
pub struct TcpUdp;

impl Protocols for TcpUdp {
    #[inline(always)]
    fn segment(ip: &impl Ip, packet: &impl Packet) -> Result<Segment<Self>, Reason> {
        const TCP: u8 = Protocol::Tcp as u8;
        const UDP: u8 = Protocol::Udp as u8;
        // The packet is no longer than its frame, so what the packet has room for can be read.
        match ip.protocol() {
            TCP if ip.payload_len() >= TcpHdr::LEN => {
                // Ports, sequence number, acknowledgement number, then data offset and flags.
                let words: [u32; 4] = packet.read(ip.transport()).ok_or(Reason::TransportTruncated)?;
                Ok(Segment::read(TCP, words[0], (words[3] >> 8) as u8))
            }
            UDP if ip.payload_len() >= UdpHdr::LEN => {
                let ports: u32 = packet.read(ip.transport()).ok_or(Reason::TransportTruncated)?;
                Ok(Segment::read(UDP, ports, 0))
            }
            TCP | UDP => Err(Reason::TransportTruncated),
            other => Err(foreign(ip, other)),
        }
    }

    #[inline(always)]
    fn protocol(number: u64) -> Protocol {
        if number == Protocol::Tcp as u64 { Protocol::Tcp } else { Protocol::Udp }
    }

    #[inline(always)]
    fn wanted(_: &Segment<Self>, switches: u32) -> u64 {
        const _: () = assert!(switch::SLOPPY_TCP << 1 == tcp::flag::SYN as u32);
        u64::from(tcp::flag::SYN as u32 ^ (switches & switch::SLOPPY_TCP) << 1)
    }

    #[inline(always)]
    fn moved(config: &Config, word: Word, flags: u8, from: From) -> Word {
        const ESTABLISHED: u8 = tcp::State::Established as u8;
        const MOVING: u8 = tcp::flag::SYN | tcp::flag::FIN | tcp::flag::RST | tcp::flag::ACK;
        // What most segments are, and what the table says of them from every side: they change nothing.
        if word.protocol() != Protocol::Tcp || word.state() == ESTABLISHED && flags & MOVING == tcp::flag::ACK {
            word
        } else {
            word.moved(Transition::of(config.tcp_table.load(), word.state(), flags, direction(word, from)))
        }
    }

    #[inline(always)]
    fn is_free(mode: u32, word: Word) -> bool {
        const TIME_WAIT: u8 = tcp::State::TimeWait as u8;
        const CLOSE: u8 = tcp::State::Close as u8;
        const FIN_WAIT: u8 = tcp::State::FinWait as u8;
        if word.protocol() != Protocol::Tcp {
            return false;
        }
        match word.state() {
            TIME_WAIT | CLOSE => true,
            FIN_WAIT => mode & 2 != 0 && word.has(flag::NO_OUTPUT),
            _ => false,
        }
    }

    #[inline(always)]
    fn update_checksum<I: Rewrite>(
        packet: &mut impl Packet,
        ip: &I,
        segment: &Segment<Self>,
        (end, addr, _): (End, I::Addr, Port),
        moved: Delta,
    ) -> Option<()> {
        let transport = ip.transport();
        if segment.protocol() == Protocol::Tcp {
            return nat::update(packet, transport + core::mem::offset_of!(TcpHdr, check), moved);
        }
        let offset = transport + core::mem::offset_of!(UdpHdr, check);
        let old: u16 = packet.read(offset)?;
        let new = if old == 0 { nat::udp_from_scratch(packet, ip, end, addr)? } else { moved.apply(old) };
        packet.write(offset, checksum::udp_on_wire(new))
    }
}

/// SCTP (RFC 9260).
#[derive(Clone, Copy)]
pub struct Sctp;

/// Bytes of the header that all chunks of a packet have in common.
const COMMON_HEADER: usize = 12;
/// Bytes of a chunk without its value.
const CHUNK_HEADER: usize = 4;
/// Where the checksum stands.
const CHECKSUM: usize = 8;

impl Protocols for Sctp {
    /// The flags of a segment are [`Chunks`].
    #[inline(always)]
    fn segment(ip: &impl Ip, packet: &impl Packet) -> Result<Segment<Self>, Reason> {
        const SCTP: u8 = Protocol::Sctp as u8;
        let len = ip.payload_len();
        match ip.protocol() {
            SCTP if len >= COMMON_HEADER + CHUNK_HEADER => {}
            SCTP => return Err(Reason::TransportTruncated),
            other => return Err(foreign(ip, other)),
        }
        let words: [u32; 4] = packet.read(ip.transport()).ok_or(Reason::TransportTruncated)?;
        let [kind, _, length @ ..] = words[3].to_ne_bytes();
        let mut chunks = Chunks::of(kind);
        if chunks.may_precede_abort() && is_before_abort(ip, packet, u16::from_be_bytes(length)) {
            chunks = chunks.before_abort();
        }
        Ok(Segment::read(SCTP, words[0], chunks.bits()))
    }

    #[inline(always)]
    fn protocol(_: u64) -> Protocol {
        Protocol::Sctp
    }

    #[inline(always)]
    fn wanted(_: &Segment<Self>, switches: u32) -> u64 {
        const _: () = assert!(switch::SLOPPY_SCTP >> 7 == tcp::flag::SYN as u32);
        u64::from(tcp::flag::SYN as u32 ^ (switches & switch::SLOPPY_SCTP) >> 7)
    }

    #[inline(always)]
    fn moved(_: &Config, word: Word, flags: u8, from: From) -> Word {
        word.moved(sctp::transition(word.state(), Chunks::from_bits(flags), direction(word, from)))
    }

    #[inline(always)]
    fn is_free(_: u32, word: Word) -> bool {
        word.state() == sctp::State::Closed as u8
    }

    /// The checksum covers the ports, and no addresses. None is computed of a packet that has none: it is left to an interface, or
    /// both ends do without (RFC 9653).
    #[inline(always)]
    fn update_checksum<I: Rewrite>(
        packet: &mut impl Packet,
        ip: &I,
        segment: &Segment<Self>,
        (end, _, port): (End, I::Addr, Port),
        _: Delta,
    ) -> Option<()> {
        let changed = match end {
            End::Source => u32::from(segment.source().raw() ^ port.raw()),
            End::Destination => u32::from(segment.destination().raw() ^ port.raw()) << 16,
        };
        let offset = ip.transport() + CHECKSUM;
        match packet.read(offset)? {
            0u32 => Some(()),
            old => packet.write(offset, crc32c::update(old, changed, ip.payload_len() as u32)),
        }
    }
}

/// All of them: for programs that few packets come to.
#[derive(Clone, Copy)]
pub struct All;

impl Protocols for All {
    const HIDES: bool = true;

    #[inline(always)]
    fn segment(ip: &impl Ip, packet: &impl Packet) -> Result<Segment<Self>, Reason> {
        if ip.protocol() == Protocol::Sctp as u8 {
            Sctp::segment(ip, packet).map(Segment::cast)
        } else {
            TcpUdp::segment(ip, packet).map(Segment::cast)
        }
    }

    #[inline(always)]
    fn protocol(number: u64) -> Protocol {
        // By bits 4 and 7 of their numbers. A look-up, which leaves the verifier nothing to follow.
        static OF_BITS: [Protocol; 4] = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp, Protocol::Sctp];
        OF_BITS[opaque(number >> 4 & 1 | number >> 6 & 2) as usize & 3]
    }

    #[inline(always)]
    fn live(protocol: Protocol) -> Live {
        Live::of_any(protocol)
    }

    #[inline(always)]
    fn wanted(segment: &Segment<Self>, switches: u32) -> u64 {
        let of_sctp = segment.is(Protocol::Sctp);
        Sctp::wanted(&segment.cast(), switches) * of_sctp + TcpUdp::wanted(&segment.cast(), switches) * (of_sctp ^ 1)
    }

    #[inline(always)]
    fn moved(config: &Config, word: Word, flags: u8, from: From) -> Word {
        if word.protocol() == Protocol::Sctp {
            Sctp::moved(config, word, flags, from)
        } else {
            TcpUdp::moved(config, word, flags, from)
        }
    }

    #[inline(always)]
    fn is_free(mode: u32, word: Word) -> bool {
        if word.protocol() == Protocol::Sctp { Sctp::is_free(mode, word) } else { TcpUdp::is_free(mode, word) }
    }

    #[inline(always)]
    fn update_checksum<I: Rewrite>(
        packet: &mut impl Packet,
        ip: &I,
        segment: &Segment<Self>,
        to: (End, I::Addr, Port),
        moved: Delta,
    ) -> Option<()> {
        if segment.protocol() == Protocol::Sctp {
            Sctp::update_checksum(packet, ip, &segment.cast(), to, moved)
        } else {
            TcpUdp::update_checksum(packet, ip, &segment.cast(), to, moved)
        }
    }
}

/// Whether the chunk behind the first one, of this length, is ABORT.
#[inline(always)]
fn is_before_abort(ip: &impl Ip, packet: &impl Packet, length: u16) -> bool {
    // Longer frames do not arrive. Verifier: an offset must be seen to be small for the pointer to stay a packet pointer.
    const LONGEST: usize = 0x7fff;
    let second = COMMON_HEADER + usize::from(length).next_multiple_of(4);
    if usize::from(length) < CHUNK_HEADER || second + CHUNK_HEADER > ip.payload_len() {
        return false;
    }
    let offset = opaque((ip.transport() + second) as u64) as usize & LONGEST;
    packet.read(offset) == Some(sctp::chunk::ABORT)
}

/// Why a packet of this protocol is on no path.
#[inline(always)]
fn foreign<I: Ip>(_: &I, protocol: u8) -> Reason {
    if I::is_extension(protocol) { Reason::ExtensionHeader } else { Reason::OtherProtocol }
}

/// The direction of a packet of a connection with this word.
#[inline(always)]
fn direction(word: Word, from: From) -> Direction {
    match from {
        From::Server => Direction::Output,
        From::Client if word.has(flag::NO_OUTPUT) => Direction::InputOnly,
        From::Client => Direction::Input,
    }
}
