//! ICMP errors (RFC 792): those the director sends, and those it relays.

use lb_common::{
    abi::{Config, EndpointKey4, PathMtu, Target},
    addr::{Ip4, Port},
    checksum::{self, Delta},
    event::Event,
    flow::{Entry, Entry4, Key4, Place},
    jiffies::Jiffies,
    proto::{Method, Protocol},
    reason::Reason,
};
use network_types::{
    eth::{EthHdr, EtherType},
    ip::Ipv4Hdr,
};

use crate::{
    endpoint,
    env::{Clock, Env, HandOver},
    flow_table::{self, Buckets, Found},
    forward::{self, Exit, Halt},
    nat,
    packet::Packet,
    parse::{self, Ip4Packet, Segment},
    pipeline::{self, Connection, Now},
    tables::Tables,
    tunnel, wire,
};

/// IP protocol number of ICMP.
pub const IPPROTO_ICMP: u8 = 1;

/// Bytes of an ICMP header.
const HEADER: usize = 8;
/// Largest error, IP header included (RFC 1812 section 4.3.2.3).
const ERROR_MAX: usize = 576;
/// Bytes of the error before what it quotes.
const BEFORE_QUOTE: usize = Ipv4Hdr::LEN + HEADER;
/// Type of service of an error, internetwork control, as the host sends its own.
const ERROR_TOS: u8 = 0xc0;
const ERROR_TTL: u8 = 64;

const DESTINATION_UNREACHABLE: u8 = 3;
/// Code of [`DESTINATION_UNREACHABLE`].
const FRAGMENTATION_NEEDED: u8 = 4;
const SOURCE_QUENCH: u8 = 4;
const TIME_EXCEEDED: u8 = 11;

/// What an error tells the sender.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Complaint {
    /// ICMP type.
    kind: u8,
    /// ICMP code.
    code: u8,
    /// The rest of the header: the next-hop MTU of "fragmentation needed" (RFC 1191), else 0.
    mtu: u16,
}

impl Complaint {
    /// The complaint as bits of a word, not all 0.
    #[inline(always)]
    pub const fn bits(self) -> u64 {
        self.kind as u64 | (self.code as u64) << 8 | (self.mtu as u64) << 16
    }

    /// The complaint with these bits, if any is set.
    #[inline(always)]
    pub const fn from_bits(bits: u64) -> Option<Self> {
        if bits == 0 {
            return None;
        }
        Some(Self { kind: bits as u8, code: (bits >> 8) as u8, mtu: (bits >> 16) as u16 })
    }
}

impl Complaint {
    /// The TTL ran out in transit.
    pub const TTL_EXPIRED: Self = Self { kind: TIME_EXCEEDED, code: 0, mtu: 0 };
    /// No route.
    pub const HOST_UNREACHABLE: Self = Self { kind: DESTINATION_UNREACHABLE, code: 1, mtu: 0 };
    /// Nobody serves the port, which is what a service without a usable destination looks like.
    pub const PORT_UNREACHABLE: Self = Self { kind: DESTINATION_UNREACHABLE, code: 3, mtu: 0 };

    /// The packet is larger than `mtu` bytes and must not be fragmented.
    pub const fn too_big(mtu: u32) -> Self {
        // No IPv4 packet is larger than 65,535 bytes, so no larger MTU is ever exceeded.
        Self { kind: DESTINATION_UNREACHABLE, code: FRAGMENTATION_NEEDED, mtu: mtu as u16 }
    }

    const fn is_too_big(self) -> bool {
        self.kind == DESTINATION_UNREACHABLE && self.code == FRAGMENTATION_NEEDED
    }
}

/// Turns an IPv4 packet, still as it came in, into an error for its sender, from the address it was sent to.
///
/// `None` when no error may be sent: the sender is no host, this second's errors are used up, or there is no way back.
#[inline(always)]
pub fn answer<P: Packet + HandOver>(
    packet: &mut P,
    tables: &impl Tables,
    env: &impl Env,
    complaint: Complaint,
) -> Option<Exit> {
    let ip = &parse::ipv4(packet).ok()?;
    let config = tables.config()?;
    if !ip.source().is_host() || !within_limit(tables, config, env) {
        return None;
    }
    let hop = tables.adjacency_cpu(0)?;
    env.route4(ip.source(), ip.destination(), hop).ok()?;
    if complaint.is_too_big() {
        // ip_vs lowers the TTL before it looks at the size, and quotes the packet after that.
        nat::lower_ttl(packet, ip)?;
    }
    let quote = usize::from(ip.len()).min(ERROR_MAX - BEFORE_QUOTE);
    packet.truncate(EthHdr::LEN + quote)?;
    packet.grow_head(BEFORE_QUOTE as u16)?;
    let kind = [complaint.kind, complaint.code, 0, 0];
    let rest = u32::from(complaint.mtu).to_be();
    write_error(packet, env.jiffies(), (ip.destination(), ip.source()), (u32::from_ne_bytes(kind), rest), quote)?;
    tables.count_event(Event::IcmpSent);
    forward::send(packet, env, hop).ok()
}

/// Writes everything before the `quote` bytes that an error quotes, with these two words as its ICMP header.
#[inline(always)]
fn write_error(
    packet: &mut impl Packet,
    now: Jiffies,
    ends: (Ip4, Ip4),
    header: (u32, u32),
    quote: usize,
) -> Option<()> {
    packet.write(core::mem::offset_of!(EthHdr, ether_type), EtherType::Ipv4 as u16)?;
    packet.write(EthHdr::LEN, error_header(ends, quote, now))?;
    let icmp = EthHdr::LEN + Ipv4Hdr::LEN;
    packet.write(icmp, header.0)?;
    packet.write(icmp + 4, header.1)?;
    let sum = packet.sum(icmp, HEADER + quote)?;
    packet.write(icmp + 2, !checksum::fold(sum))
}

/// The IP header of an error from the first to the second of `ends`.
#[inline(always)]
fn error_header(ends: (Ip4, Ip4), quote: usize, now: Jiffies) -> Ipv4Hdr {
    let (from, to) = ends;
    let mut header = Ipv4Hdr {
        vihl: 0x45,
        tos: ERROR_TOS,
        tot_len: ((BEFORE_QUOTE + quote) as u16).to_be_bytes(),
        id: (now.0 as u16).to_be_bytes(),
        frags: [0, 0],
        ttl: ERROR_TTL,
        proto: IPPROTO_ICMP,
        check: [0, 0],
        src_addr: from.octets(),
        dst_addr: to.octets(),
    };
    header.check = (!checksum::fold(checksum::sum5(wire::words(&header)))).to_ne_bytes();
    header
}

/// Takes one error off this second's budget. Returns whether there was one left.
#[inline(always)]
fn within_limit(tables: &impl Tables, config: &Config, env: &impl Env) -> bool {
    let Some(limiter) = tables.limiter() else { return false };
    let Some(second) = env.jiffies().0.checked_div(env.hz()) else { return false };
    let last = limiter.second.load();
    if last != second && limiter.second.compare_exchange(last, second).is_ok() {
        limiter.tokens.store(config.icmp_per_second.load());
    }
    for _ in 0..4 {
        let tokens = limiter.tokens.load();
        if tokens == 0 {
            return false;
        }
        if limiter.tokens.compare_exchange(tokens, tokens - 1).is_ok() {
            return true;
        }
    }
    false
}

/// The start of the packet that an error is about.
struct Quoted {
    /// Offset of its IP header from the start of the frame.
    offset: usize,
    header: Ipv4Hdr,
    /// Offset of its transport header.
    transport: usize,
    protocol: Protocol,
    source: (Ip4, Port),
    destination: (Ip4, Port),
}

/// Whether the message is an error that is relayed.
#[inline(always)]
fn is_error(packet: &impl Packet, ip: &Ip4Packet) -> bool {
    matches!(packet.read(ip.transport), Some(DESTINATION_UNREACHABLE | SOURCE_QUENCH | TIME_EXCEEDED))
}

/// Reads what an error quotes at `offset`; `None` when it quotes no TCP or UDP packet with its ports.
#[inline(always)]
fn quoted(packet: &impl Packet, ip: &Ip4Packet, offset: usize) -> Option<Quoted> {
    let header: Ipv4Hdr = packet.read(offset)?;
    let header_len = usize::from(header.ihl());
    let later_fragment = header.frags[0] & 0x1f != 0 || header.frags[1] != 0;
    if header.version() != 4 || header_len < Ipv4Hdr::LEN || later_fragment {
        return None;
    }
    let protocol = Protocol::try_from(header.proto).ok()?;
    let transport = offset + header_len;
    if transport + 8 > EthHdr::LEN + usize::from(ip.len()) {
        return None;
    }
    let ports: [u16; 2] = packet.read(transport)?;
    let words = wire::words(&header);
    Some(Quoted {
        offset,
        header,
        transport,
        protocol,
        source: (Ip4::from_raw(words[3]), Port::from_raw(ports[0])),
        destination: (Ip4::from_raw(words[4]), Port::from_raw(ports[1])),
    })
}

/// An ICMP message: relays an error about a connection to the end that it is for.
///
/// # Errors
///
/// Why it is not relayed: [`Reason::Icmp`] when it is none of the director's business.
#[inline(always)]
pub fn relay<P, T, E>(packet: &mut P, tables: &T, env: &E) -> Result<Exit, Halt>
where
    P: Packet + HandOver,
    T: Buckets<Entry4>,
    E: Env,
{
    let ip = &parse::ipv4(packet)?;
    if !is_error(packet, ip) {
        return Err(Reason::Icmp.into());
    }
    if let Some(server) = tunnelled_to(packet, ip) {
        return relay_from_tunnel(packet, tables, env, ip, server);
    }
    let quoted = &quoted(packet, ip, ip.transport + HEADER).ok_or(Reason::Icmp)?;
    match relay_to_server(packet, tables, env, ip, quoted) {
        Some(result) => result,
        None => relay_to_client(packet, tables, env, ip, quoted).unwrap_or(Err(Reason::Icmp.into())),
    }
}

/// The other end of the tunnel that the packet that an error quotes was in, if it was in one from here. Neither the error
/// nor the packet may have IP options, which those of a tunnel from here do not have.
#[inline(always)]
fn tunnelled_to(packet: &impl Packet, ip: &Ip4Packet) -> Option<Ip4> {
    let header: Ipv4Hdr = packet.read(ip.transport + HEADER)?;
    let words = wire::words(&header);
    let ours = header.vihl == 0x45
        && header.proto == tunnel::IPPROTO_IPIP
        && Ip4::from_raw(words[3]) == ip.destination()
        && ip.transport == EthHdr::LEN + Ipv4Hdr::LEN;
    ours.then_some(Ip4::from_raw(words[4]))
}

/// Tells a client what an error says of its packet, which was in a tunnel to `server`; and remembers what it says of the
/// size of packets that get there (`docs/ipvs.md`, section 5.5).
///
/// # Errors
///
/// Why the client is not told: [`Reason::Icmp`] when the error is about no connection.
#[inline(always)]
fn relay_from_tunnel<P, T, E>(packet: &mut P, tables: &T, env: &E, ip: &Ip4Packet, server: Ip4) -> Result<Exit, Halt>
where
    P: Packet + HandOver,
    T: Buckets<Entry4>,
    E: Env,
{
    const TUNNEL: usize = Ipv4Hdr::LEN;
    let quoted = &quoted(packet, ip, ip.transport + HEADER + TUNNEL).ok_or(Reason::Icmp)?;
    let key = Key4::new(quoted.protocol, quoted.source, quoted.destination);
    let place = Place::of(Entry4::hash(&key, &tables.seed()));
    let found = flow_table::find::<Entry4>(tables, &key, place).ok_or(Reason::Icmp)?;
    let dest = tables.dest(found.dest).ok_or(Reason::Impossible)?;
    if found.word.method() != Method::Tunnel as u8 || dest.addr4() != server {
        return Err(Reason::Icmp.into());
    }
    verify_header(packet, ip)?;
    verify_message(packet, ip)?;
    let kind: u32 = packet.read(ip.transport).ok_or(Reason::Impossible)?;
    let mut rest: u32 = packet.read(ip.transport + 4).ok_or(Reason::Impossible)?;
    let [kind, code, ..] = kind.to_ne_bytes();
    let config = tables.config().ok_or(Reason::Impossible)?;
    if (kind, code) == (DESTINATION_UNREACHABLE, FRAGMENTATION_NEEDED) {
        let now = &Now::of(config, env);
        let mtu = learn(tables, env, found.dest, u32::from_be(rest) as u16, now)?;
        if quoted.header.frags[0] & 0x40 == 0 {
            return Err(Reason::TunnelError.into());
        }
        rest = inside_tunnel(mtu).to_be();
    }
    if !within_limit(tables, config, env) {
        return Err(Reason::TunnelError.into());
    }
    let (client, service) = (quoted.source.0, quoted.destination.0);
    let hop = tables.adjacency_cpu(0).ok_or(Reason::Impossible)?;
    env.route4(client, service, hop)?;
    // What was quoted of the packet in the tunnel stays where it is, and the message moves up to it.
    let quote = (ip.payload_len() - HEADER - TUNNEL).min(ERROR_MAX - BEFORE_QUOTE);
    packet.shrink_head(TUNNEL as u16).ok_or(Reason::Impossible)?;
    packet.truncate(EthHdr::LEN + BEFORE_QUOTE + quote).ok_or(Reason::Impossible)?;
    let header = (u32::from_ne_bytes([kind, code, 0, 0]), rest);
    write_error(packet, env.jiffies(), (service, client), header, quote).ok_or(Reason::Impossible)?;
    tables.count_event(Event::IcmpSent);
    forward::send(packet, env, hop)
}

/// Remembers that packets to a destination may have `said` bytes. Returns how many they could have before.
#[inline(always)]
fn learn(tables: &impl Tables, env: &impl Env, number: u32, said: u16, now: &Now<'_>) -> Result<u32, Halt> {
    let dest = tables.dest(number).ok_or(Reason::Impossible)?;
    let cpu = tables.dest_cpu(number).ok_or(Reason::Impossible)?;
    let load = tables.dest_load(number).ok_or(Reason::Impossible)?;
    forward::find_out(env, now.config, dest, load, cpu, now.clock)?;
    let before = cpu.next_hop.mtu.get();
    if u32::from(said) < before {
        let until = now.clock.now.after(PathMtu::HOLDS_S * now.clock.hz);
        load.path_mtu.store(PathMtu::new(said, dest.addr4(), until).0);
        // The next packet finds it out on this CPU; others ask within a second.
        cpu.epoch.set(0);
    }
    Ok(before)
}

/// The size of packets in a tunnel through which packets of `mtu` bytes fit, as ip_vs computes it.
#[inline(always)]
const fn inside_tunnel(mtu: u32) -> u32 {
    if mtu > tunnel::MTU_MIN + tunnel::OVERHEAD { mtu - tunnel::OVERHEAD } else { mtu }
}

/// Relays an error about what a service has sent to the server that sent it (`docs/ipvs.md`, section 5.3). `None` when it is
/// not about that.
#[inline(always)]
fn relay_to_server<P, T, E>(
    packet: &mut P,
    tables: &T,
    env: &E,
    ip: &Ip4Packet,
    quoted: &Quoted,
) -> Option<Result<Exit, Halt>>
where
    P: Packet + HandOver,
    T: Buckets<Entry4>,
    E: Env,
{
    let (vaddr, vport) = quoted.source;
    if !endpoint::find4(tables, EndpointKey4::new(vaddr, vport, quoted.protocol)).is_service() {
        return None;
    }
    let key = Key4::new(quoted.protocol, quoted.destination, quoted.source);
    let place = Place::of(Entry4::hash(&key, &tables.seed()));
    let found = flow_table::find::<Entry4>(tables, &key, place)?;
    if let Err(halt) = verify_header(packet, ip) {
        return Some(Err(halt));
    }
    let connection = Connection::of(found.word, found.dest);
    if connection.method() == Method::Masq as u8 {
        let dest = tables.dest(found.dest)?;
        let server = (dest.addr4(), connection.port(dest.port(), vport));
        if let Err(halt) = rewrite(packet, ip, quoted, nat::End::Source, server) {
            return Some(Err(halt));
        }
    }
    let now = &Now::of(tables.config()?, env);
    Some(pipeline::to_server(packet, tables, env, ip, None, connection, now))
}

/// Relays an error about what a masqueraded server was sent to the client that sent it (`docs/ipvs.md`, section 5.3). `None`
/// when it is not about that.
#[inline(always)]
fn relay_to_client<P, T, E>(
    packet: &mut P,
    tables: &T,
    env: &E,
    ip: &Ip4Packet,
    quoted: &Quoted,
) -> Option<Result<Exit, Halt>>
where
    P: Packet + HandOver,
    T: Buckets<Entry4>,
    E: Env,
{
    let (server, port) = quoted.destination;
    if !endpoint::find4(tables, EndpointKey4::new(server, port, quoted.protocol)).has(Target::SERVER) {
        return None;
    }
    // What the server would have answered.
    let answer = Segment::new(quoted.protocol, port, quoted.source.1);
    let (found, key) = pipeline::find_masqueraded(tables, server, quoted.source.0, answer)?;
    let service = (key.vaddr(), key.vport());
    if let Err(halt) = verify_header(packet, ip) {
        return Some(Err(halt));
    }
    if let Err(halt) = rewrite(packet, ip, quoted, nat::End::Destination, service) {
        return Some(Err(halt));
    }
    let now = Now::of(tables.config()?, env);
    Some(send_to_client(packet, tables, env, ip, &found, service.0, now.clock))
}

#[inline(always)]
fn send_to_client<P, T, E>(
    packet: &mut P,
    tables: &T,
    env: &E,
    ip: &Ip4Packet,
    found: &Found<'_, Entry4>,
    service: Ip4,
    clock: Clock,
) -> Result<Exit, Halt>
where
    P: Packet + HandOver,
    T: Tables,
    E: Env,
{
    let hop = forward::find_way(tables, env, found, (ip.destination(), service), clock)?;
    let hops = if forward::is_local(hop) { 0 } else { 1 };
    if ip.ttl() <= hops {
        return Err(Reason::TtlExpired.into());
    }
    nat::translate(packet, ip, None, nat::End::Source, (service, Port::default()), hops).ok_or(Reason::Impossible)?;
    pipeline::count_out(tables, found.dest, ip.len());
    forward::send(packet, env, hop)
}

/// Checks the checksum of the IP header of an error that is about to be relayed: nobody else has.
#[inline(always)]
fn verify_header(packet: &impl Packet, ip: &Ip4Packet) -> Result<(), Halt> {
    if ip.checksum_holds(packet) { Ok(()) } else { Err(Reason::IpChecksum.into()) }
}

/// Checks the checksum of an ICMP message.
#[inline(always)]
fn verify_message(packet: &impl Packet, ip: &Ip4Packet) -> Result<(), Halt> {
    let sum = packet.sum(ip.transport, ip.payload_len()).ok_or(Reason::Impossible)?;
    if checksum::holds(sum) { Ok(()) } else { Err(Reason::IcmpChecksum.into()) }
}

/// Rewrites one end of the quoted packet, unless the message's checksum is wrong: a rewrite would make it look right.
#[inline(always)]
fn rewrite(
    packet: &mut impl Packet,
    ip: &Ip4Packet,
    quoted: &Quoted,
    end: nat::End,
    to: (Ip4, Port),
) -> Result<(), Halt> {
    verify_message(packet, ip)?;
    translate_quoted(packet, ip, quoted, end, to).ok_or(Halt::silent(Reason::Impossible))
}

/// Rewrites one end of the quoted packet and the checksums that cover it: its IP header's and the message's own. The
/// checksum of the quoted segment is left as it is, like in ip_vs.
#[inline(always)]
fn translate_quoted(
    packet: &mut impl Packet,
    ip: &Ip4Packet,
    quoted: &Quoted,
    end: nat::End,
    to: (Ip4, Port),
) -> Option<()> {
    let ((old_addr, old_port), addr_offset, port_offset) = match end {
        nat::End::Source => (quoted.source, core::mem::offset_of!(Ipv4Hdr, src_addr), 0),
        nat::End::Destination => (quoted.destination, core::mem::offset_of!(Ipv4Hdr, dst_addr), 2),
    };
    let (addr, port) = to;
    let moved = Delta::default().dword(old_addr.raw(), addr.raw());
    let old_check = u16::from_ne_bytes(quoted.header.check);
    let new_check = moved.apply(old_check);
    let message = moved.word(old_port.raw(), port.raw()).word(old_check, new_check);
    packet.write(quoted.offset + addr_offset, addr.raw())?;
    packet.write(quoted.offset + core::mem::offset_of!(Ipv4Hdr, check), new_check)?;
    packet.write(quoted.transport + port_offset, port.raw())?;
    let check: u16 = packet.read(ip.transport + 2)?;
    packet.write(ip.transport + 2, message.apply(check))
}
