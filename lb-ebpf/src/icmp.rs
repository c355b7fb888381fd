//! ICMP errors (RFC 792, RFC 4443): those the director sends, and those it relays.

use lb_common::{
    abi::{Config, EndpointKey as _, PathMtu, Stage, Target, reckon},
    addr::{Address as _, Ip4, Ip6, Port},
    checksum::{self, Delta},
    event::Event,
    flow::{Entry as _, Key as _, Place},
    jiffies::Jiffies,
    proto::{Method, Protocol},
    reason::Reason,
};
use network_types::{
    eth::EthHdr,
    ip::{Ipv4Hdr, Ipv6Hdr},
};

use crate::{
    endpoint,
    env::{Env, HandOver},
    flow_table::{self, Found},
    forward::{self, Exit, Halt},
    nat::{self, Rewrite},
    packet::Packet,
    parse::{Ip, Ip4Packet, Ip6Packet},
    pipeline::{self, Connection, EndpointOf, EntryOf, Family, KeyOf, Now, ProtocolsOf},
    protocols::Protocols,
    tables::{Tables, TablesOf},
    tunnel::Wrap,
    wire,
};

/// Bytes of an ICMP header.
const HEADER: usize = 8;
/// Type of service of an IPv4 error, internetwork control, and which bits it has of that of the packet it quotes: as the host's own.
const ERROR_TOS: u8 = 0xc0;
const KEPT_TOS: u8 = 0x1e;
const ERROR_TTL: u8 = 64;

/// What an error tells the sender.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Complaint {
    about: About,
    /// With [`About::TooBig`] the largest packet, in bytes; else 0.
    mtu: u16,
}

/// What an error is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum About {
    /// The TTL ran out in transit.
    TtlExpired = 1,
    /// No route.
    HostUnreachable = 2,
    /// Nobody serves the port.
    PortUnreachable = 3,
    /// The packet is too large and must not be fragmented.
    TooBig = 4,
    /// Nobody waits for the reply.
    StrayReply = 5,
}

impl Complaint {
    /// The TTL ran out in transit.
    pub const TTL_EXPIRED: Self = Self { about: About::TtlExpired, mtu: 0 };
    /// No route.
    pub const HOST_UNREACHABLE: Self = Self { about: About::HostUnreachable, mtu: 0 };
    /// Nobody serves the port, which is what a service without a usable destination looks like.
    pub const PORT_UNREACHABLE: Self = Self { about: About::PortUnreachable, mtu: 0 };

    /// Nobody waits for the reply. The director says so in its own name: the packet was on its way through it.
    pub const STRAY_REPLY: Self = Self { about: About::StrayReply, mtu: 0 };

    /// The packet is larger than `mtu` bytes and must not be fragmented.
    pub const fn too_big(mtu: u32) -> Self {
        // No packet is larger than 65,535 bytes, so no larger MTU is ever exceeded.
        Self { about: About::TooBig, mtu: mtu as u16 }
    }

    /// The complaint as bits of a word, not all 0.
    #[inline(always)]
    pub const fn bits(self) -> u64 {
        self.about as u64 | (self.mtu as u64) << 8
    }

    /// The complaint with these bits, if any is set.
    #[inline(always)]
    pub const fn from_bits(bits: u64) -> Option<Self> {
        let about = match bits as u8 {
            1 => About::TtlExpired,
            2 => About::HostUnreachable,
            3 => About::PortUnreachable,
            4 => About::TooBig,
            5 => About::StrayReply,
            _ => return None,
        };
        Some(Self { about, mtu: (bits >> 8) as u16 })
    }

    /// Whether the TTL of the packet that is quoted is one less than it came in with.
    const fn comes_late(self) -> bool {
        matches!(self.about, About::TooBig | About::StrayReply)
    }

    const fn is_in_own_name(self) -> bool {
        matches!(self.about, About::StrayReply)
    }
}

/// The ICMP of an address family.
pub trait Messages: Wrap {
    /// Largest error, IP header included, in bytes.
    const ERROR_MAX: usize;

    /// Type and code of an error.
    fn kind(about: About) -> [u8; 2];

    /// Whether messages of this type are errors that are relayed.
    fn is_error(kind: u8) -> bool;

    /// Whether such an error about a tunnel says something of the packet in it, too: not one that points at a field.
    fn is_of_tunnel(kind: u8) -> bool;

    /// The size of packets, in bytes, that an error about a packet that is too big says, with this word at the end of its header,
    /// as loaded.
    fn size_said(rest: u32) -> u16;

    /// Writes the IP header of an error with `len` bytes behind that header, which end with what it quotes. `None` when the frame
    /// is too short.
    fn write_error_header(
        packet: &mut impl Packet,
        from: Self::Addr,
        to: Self::Addr,
        len: usize,
        now: Jiffies,
    ) -> Option<()>;

    /// Reads the packet that an error quotes at `offset`, of which there are bytes up to `end`; `None` when there is no TCP or
    /// UDP packet with its ports.
    fn quoted(packet: &impl Packet, offset: usize, end: usize) -> Option<Quoted<Self>>;

    /// The other end of the tunnel from here that the quoted packet was in, if an error from this one's sender quotes one. Neither
    /// may have options or extension headers, which those of a tunnel from here do not have.
    fn tunnelled_to(&self, packet: &impl Packet) -> Option<Self::Addr>;

    /// Rewrites the address of one end of the packet that is quoted. Returns what that changes in the message's checksum. `None`
    /// when the frame is shorter than it was.
    fn readdress_quoted(
        packet: &mut impl Packet,
        quoted: &Quoted<Self>,
        end: nat::End,
        to: Self::Addr,
    ) -> Option<Delta>;
}

/// The start of the packet that an error is about.
pub struct Quoted<I: Ip> {
    /// Offset of its IP header from the start of the frame.
    offset: usize,
    /// Offset of its transport header.
    transport: usize,
    /// Its transport protocol.
    pub protocol: Protocol,
    /// Who has sent it.
    pub source: (I::Addr, Port),
    /// For whom it was.
    pub destination: (I::Addr, Port),
    /// Whether routers may fragment it.
    may_be_fragmented: bool,
}

impl<S: Protocols> Messages for Ip4Packet<S> {
    /// RFC 1812 section 4.3.2.3.
    const ERROR_MAX: usize = 576;

    /// RFC 792.
    #[inline(always)]
    fn kind(about: About) -> [u8; 2] {
        match about {
            About::TtlExpired => [11, 0],
            About::HostUnreachable => [3, 1],
            About::PortUnreachable | About::StrayReply => [3, 3],
            About::TooBig => [3, 4],
        }
    }

    /// Destination unreachable, source quench, time exceeded.
    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        matches!(kind, 3 | 4 | 11)
    }

    #[inline(always)]
    fn is_of_tunnel(_: u8) -> bool {
        true
    }

    /// RFC 1191: the other half of the word says something else, or nothing.
    #[inline(always)]
    fn size_said(rest: u32) -> u16 {
        u32::from_be(rest) as u16
    }

    #[inline(always)]
    fn write_error_header(packet: &mut impl Packet, from: Ip4, to: Ip4, len: usize, now: Jiffies) -> Option<()> {
        let quoted_tos: u8 = packet.read(EthHdr::LEN + Self::HEADER + HEADER + core::mem::offset_of!(Ipv4Hdr, tos))?;
        let mut header = Ipv4Hdr {
            vihl: 0x45,
            tos: ERROR_TOS | quoted_tos & KEPT_TOS,
            tot_len: ((Self::HEADER + len) as u16).to_be_bytes(),
            id: (now.0 as u16).to_be_bytes(),
            frags: [0, 0],
            ttl: ERROR_TTL,
            proto: Self::ICMP,
            check: [0, 0],
            src_addr: from.octets(),
            dst_addr: to.octets(),
        };
        header.check = (!checksum::fold(checksum::sum5(wire::words(&header)))).to_ne_bytes();
        packet.write(EthHdr::LEN, header)
    }

    #[inline(always)]
    fn quoted(packet: &impl Packet, offset: usize, end: usize) -> Option<Quoted<Self>> {
        let header: Ipv4Hdr = packet.read(offset)?;
        let header_len = usize::from(header.ihl());
        let later_fragment = header.frags[0] & 0x1f != 0 || header.frags[1] != 0;
        if header.version() != 4 || header_len < Ipv4Hdr::LEN || later_fragment {
            return None;
        }
        let protocol = Protocol::try_from(header.proto).ok()?;
        let transport = offset + header_len;
        if transport + 8 > end {
            return None;
        }
        let ports: [u16; 2] = packet.read(transport)?;
        let words = wire::words(&header);
        Some(Quoted {
            offset,
            transport,
            protocol,
            source: (Ip4::from_raw(words[3]), Port::from_raw(ports[0])),
            destination: (Ip4::from_raw(words[4]), Port::from_raw(ports[1])),
            may_be_fragmented: header.frags[0] & 0x40 == 0,
        })
    }

    #[inline(always)]
    fn tunnelled_to(&self, packet: &impl Packet) -> Option<Ip4> {
        let header: Ipv4Hdr = packet.read(self.transport() + HEADER)?;
        let words = wire::words(&header);
        let ours = header.vihl == 0x45
            && header.proto == Self::IN_IP
            && Ip4::from_raw(words[3]) == self.destination()
            && self.transport() == EthHdr::LEN + Self::HEADER;
        ours.then_some(Ip4::from_raw(words[4]))
    }

    /// The header checksum is among what changes.
    #[inline(always)]
    fn readdress_quoted(packet: &mut impl Packet, quoted: &Quoted<Self>, end: nat::End, to: Ip4) -> Option<Delta> {
        let (old, addr_offset) = match end {
            nat::End::Source => (quoted.source.0, core::mem::offset_of!(Ipv4Hdr, src_addr)),
            nat::End::Destination => (quoted.destination.0, core::mem::offset_of!(Ipv4Hdr, dst_addr)),
        };
        let moved = Delta::default().dword(old.raw(), to.raw());
        let check_offset = quoted.offset + core::mem::offset_of!(Ipv4Hdr, check);
        let old_check = packet.read(check_offset)?;
        let new_check = moved.apply(old_check);
        packet.write(quoted.offset + addr_offset, to.raw())?;
        packet.write(check_offset, new_check)?;
        Some(moved.word(old_check, new_check))
    }
}

impl<S: Protocols> Messages for Ip6Packet<S> {
    /// RFC 4443 section 2.4 (c).
    const ERROR_MAX: usize = 1280;

    /// RFC 4443 section 3.
    #[inline(always)]
    fn kind(about: About) -> [u8; 2] {
        match about {
            About::TtlExpired => [3, 0],
            About::HostUnreachable => [1, 3],
            About::PortUnreachable | About::StrayReply => [1, 4],
            About::TooBig => [2, 0],
        }
    }

    /// RFC 4443, section 2.1.
    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        kind < 128
    }

    /// Destination unreachable, packet too big, time exceeded.
    #[inline(always)]
    fn is_of_tunnel(kind: u8) -> bool {
        matches!(kind, 1..=3)
    }

    /// No packet has more than 65,535 bytes here.
    #[inline(always)]
    fn size_said(rest: u32) -> u16 {
        u32::from_be(rest).min(u16::MAX.into()) as u16
    }

    #[inline(always)]
    fn write_error_header(packet: &mut impl Packet, from: Ip6, to: Ip6, len: usize, _: Jiffies) -> Option<()> {
        let ([a, b], [c, d]) = (from.raw(), to.raw());
        packet.write(EthHdr::LEN, [Self::first_word(0, len as u16, Self::ICMP, ERROR_TTL), a, b, c, d])
    }

    #[inline(always)]
    fn quoted(packet: &impl Packet, offset: usize, end: usize) -> Option<Quoted<Self>> {
        let ip = Self::of(packet.read(offset)?).ok()?;
        let protocol = Protocol::try_from(ip.protocol()).ok()?;
        let transport = offset + Self::HEADER;
        if transport + 8 > end {
            return None;
        }
        let ports: [u16; 2] = packet.read(transport)?;
        Some(Quoted {
            offset,
            transport,
            protocol,
            source: (ip.source(), Port::from_raw(ports[0])),
            destination: (ip.destination(), Port::from_raw(ports[1])),
            may_be_fragmented: false,
        })
    }

    #[inline(always)]
    fn tunnelled_to(&self, packet: &impl Packet) -> Option<Ip6> {
        let outer = Self::of(packet.read(self.transport() + HEADER)?).ok()?;
        let ours = outer.protocol() == Self::IN_IP && outer.source() == self.destination();
        ours.then_some(outer.destination())
    }

    #[inline(always)]
    fn readdress_quoted(packet: &mut impl Packet, quoted: &Quoted<Self>, end: nat::End, to: Ip6) -> Option<Delta> {
        let (old, addr_offset) = match end {
            nat::End::Source => (quoted.source.0, core::mem::offset_of!(Ipv6Hdr, src_addr)),
            nat::End::Destination => (quoted.destination.0, core::mem::offset_of!(Ipv6Hdr, dst_addr)),
        };
        packet.write(quoted.offset + addr_offset, to.raw())?;
        Some(Delta::default().address(old, to))
    }
}

/// Turns a packet, still as it came in, into an error for its sender, from the address it was sent to or from one of this host's.
///
/// `None` when no error may be sent: the sender is no host, this second's errors are used up, or there is no way back.
#[inline(always)]
pub fn answer<I: Family, P: Packet + HandOver>(
    packet: &mut P,
    tables: &impl Tables,
    env: &impl Env,
    complaint: Complaint,
) -> Option<Exit> {
    let ip = &I::parse(packet).ok()?;
    let config = tables.config()?;
    if !ip.source().is_host() || !within_limit(tables, config, env) {
        return None;
    }
    let hop = tables.adjacency_cpu(0)?;
    let own_name = complaint.is_in_own_name();
    env.route(ip.source(), if own_name { I::Addr::default() } else { ip.destination() }, hop).ok()?;
    if complaint.comes_late() {
        // ip_vs lowers the TTL before it looks at the size, and the host before ip_vs sees what it forwards.
        ip.lower_ttl(packet)?;
    }
    let before_quote = I::HEADER + HEADER;
    let quote = (ip.len() as usize).min(I::ERROR_MAX - before_quote);
    packet.truncate(EthHdr::LEN + quote)?;
    packet.grow_head(before_quote as u16)?;
    let [kind, code] = I::kind(complaint.about);
    let rest = u32::from(complaint.mtu).to_be();
    let header = (u32::from_ne_bytes([kind, code, 0, 0]), rest);
    let from = if own_name { hop.source() } else { ip.destination() };
    write_error::<I>(packet, env.jiffies(), (from, ip.source()), header, quote)?;
    tables.count_event(Event::IcmpSent);
    forward::send(packet, env, hop).ok()
}

/// Writes everything before the `quote` bytes that an error from the first to the second of `ends` quotes, with these two
/// words as its ICMP header.
#[inline(always)]
fn write_error<I: Family>(
    packet: &mut impl Packet,
    now: Jiffies,
    ends: (I::Addr, I::Addr),
    header: (u32, u32),
    quote: usize,
) -> Option<()> {
    let (from, to) = ends;
    let len = HEADER + quote;
    packet.write(core::mem::offset_of!(EthHdr, ether_type), I::ETHER_TYPE as u16)?;
    I::write_error_header(packet, from, to, len, now)?;
    let icmp = EthHdr::LEN + I::HEADER;
    packet.write(icmp, header.0)?;
    packet.write(icmp + 4, header.1)?;
    let sum = packet.sum(icmp, len)? + covered::<I>(from, to, len);
    packet.write(icmp + 2, !checksum::fold(sum))
}

/// What the checksum of an ICMP message of `len` bytes covers beside the message.
#[inline(always)]
fn covered<I: Rewrite>(source: I::Addr, destination: I::Addr, len: usize) -> u64 {
    if I::ICMP_COVERS_ADDRESSES { I::pseudo_header(source, destination, I::ICMP, len as u32) } else { 0 }
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

/// An ICMP message: relays an error about a connection to the end that it is for.
///
/// # Errors
///
/// Why it is not relayed: [`Reason::Icmp`] when it is none of the director's business. Or where its path goes on.
#[inline(always)]
pub fn relay<I, P, T, E>(packet: &mut P, tables: &T, env: &E) -> Result<Exit, Halt>
where
    I: Family,
    P: Packet + HandOver,
    T: TablesOf<I::Addr>,
    E: Env,
{
    let ip = &I::parse(packet)?;
    let kind = packet.read(ip.transport()).ok_or(Reason::Icmp)?;
    if !I::is_error(kind) {
        return Err(Reason::Icmp.into());
    }
    if let Some(server) = ip.tunnelled_to(packet) {
        if !I::is_of_tunnel(kind) {
            return Err(Reason::Icmp.into());
        }
        return relay_from_tunnel(packet, tables, env, ip, server);
    }
    let quoted = &of_reply(packet, ip).ok_or(Reason::Icmp)?;
    match relay_to_server(packet, tables, env, ip, quoted) {
        Some(result) => result,
        None => relay_to_client(packet, tables, env, ip, quoted).unwrap_or(Err(Halt::go_on(Stage::Related))),
    }
}

/// What an error quotes if it is about what a service or a server has sent.
#[inline(always)]
pub fn of_reply<I: Messages>(packet: &impl Packet, ip: &I) -> Option<Quoted<I>> {
    I::quoted(packet, ip.transport() + HEADER, end_of(ip))
}

/// What an error quotes of a packet that was in a tunnel from here.
#[inline(always)]
pub fn of_tunnelled<I: Messages>(packet: &impl Packet, ip: &I) -> Option<Quoted<I>> {
    I::quoted(packet, ip.transport() + HEADER + I::HEADER, end_of(ip))
}

/// Where a packet ends, from the start of the frame.
#[inline(always)]
fn end_of(ip: &impl Ip) -> usize {
    EthHdr::LEN + ip.len() as usize
}

/// Tells a client what an error says of its packet, which was in a tunnel to `server`; and remembers what it says of the
/// size of packets that get there (`docs/ipvs.md`, section 5.5).
///
/// # Errors
///
/// Why the client is not told: [`Reason::Icmp`] when the error is about no connection. Or where its path goes on.
#[inline(always)]
fn relay_from_tunnel<I, P, T, E>(packet: &mut P, tables: &T, env: &E, ip: &I, server: I::Addr) -> Result<Exit, Halt>
where
    I: Family,
    P: Packet + HandOver,
    T: TablesOf<I::Addr>,
    E: Env,
{
    let quoted = &of_tunnelled(packet, ip).ok_or(Reason::Icmp)?;
    let key = KeyOf::<I>::new(ProtocolsOf::<I>::live(quoted.protocol), quoted.source, quoted.destination);
    let place = Place::of(EntryOf::<I>::hash(&key, &tables.seed()));
    let found = flow_table::find::<EntryOf<I>>(tables, &key, place).ok_or(Halt::go_on(Stage::Related))?;
    tell_client(packet, tables, env, ip, quoted, (server, Connection::of(found.word, found.dest)))
}

/// [`relay_from_tunnel`], for a packet of this connection that was in a tunnel to the server at this address.
#[inline(always)]
pub fn tell_client<I, P, T, E>(
    packet: &mut P,
    tables: &T,
    env: &E,
    ip: &I,
    quoted: &Quoted<I>,
    tunnel: (I::Addr, Connection),
) -> Result<Exit, Halt>
where
    I: Family,
    P: Packet + HandOver,
    T: TablesOf<I::Addr>,
    E: Env,
{
    let (server, connection) = tunnel;
    let tunnel = I::HEADER;
    let dest = tables.dest(connection.dest()).ok_or(Reason::Impossible)?;
    if connection.method() != Method::Tunnel as u8 || dest.addr::<I::Addr>() != server {
        return Err(Reason::Icmp.into());
    }
    verify_header(packet, ip)?;
    verify_message(packet, ip)?;
    let kind: u32 = packet.read(ip.transport()).ok_or(Reason::Impossible)?;
    let mut rest: u32 = packet.read(ip.transport() + 4).ok_or(Reason::Impossible)?;
    let [kind, code, ..] = kind.to_ne_bytes();
    let config = tables.config().ok_or(Reason::Impossible)?;
    if [kind, code] == I::kind(About::TooBig) {
        let now = &Now::of(config, env);
        let mtu = learn::<I>(tables, env, connection.dest(), I::size_said(rest), now)?;
        if quoted.may_be_fragmented {
            return Err(Reason::TunnelError.into());
        }
        rest = inside_tunnel::<I>(mtu).to_be();
    }
    if !within_limit(tables, config, env) {
        return Err(Reason::TunnelError.into());
    }
    let (client, service) = (quoted.source.0, quoted.destination.0);
    let hop = tables.adjacency_cpu(0).ok_or(Reason::Impossible)?;
    env.route(client, service, hop)?;
    // What was quoted of the packet in the tunnel stays where it is, and the message moves up to it.
    let before_quote = I::HEADER + HEADER;
    let quote = (ip.payload_len() - HEADER - tunnel).min(I::ERROR_MAX - before_quote);
    packet.shrink_head(tunnel as u16).ok_or(Reason::Impossible)?;
    packet.truncate(EthHdr::LEN + before_quote + quote).ok_or(Reason::Impossible)?;
    let header = (u32::from_ne_bytes([kind, code, 0, 0]), rest);
    write_error::<I>(packet, env.jiffies(), (service, client), header, quote).ok_or(Reason::Impossible)?;
    tables.count_event(Event::IcmpSent);
    forward::send(packet, env, hop)
}

/// Remembers that packets to a destination may have `said` bytes. Returns how many they could have before.
#[inline(always)]
fn learn<I: Ip>(tables: &impl Tables, env: &impl Env, number: u32, said: u16, now: &Now<'_>) -> Result<u32, Halt> {
    let dest = tables.dest(number).ok_or(Reason::Impossible)?;
    let cpu = tables.dest_cpu(number).ok_or(Reason::Impossible)?;
    let load = tables.dest_load(number).ok_or(Reason::Impossible)?;
    forward::find_out::<I::Addr>(env, now.config, dest, load, cpu, now.clock)?;
    let before = cpu.next_hop.mtu.get();
    if u32::from(said) < before {
        let until = now.clock.now.after(PathMtu::HOLDS_S * now.clock.hz);
        load.path_mtu.store(PathMtu::new(said, dest.addr::<I::Addr>(), until).0);
        // The next packet finds it out on this CPU; others ask within a second.
        cpu.epoch.set(0);
    }
    Ok(before)
}

/// The size of packets in a tunnel through which packets of `mtu` bytes fit, as ip_vs computes it.
#[inline(always)]
const fn inside_tunnel<I: Wrap>(mtu: u32) -> u32 {
    let overhead = I::HEADER as u32;
    if mtu > I::MTU_MIN + overhead { mtu - overhead } else { mtu }
}

/// Whether there may be connections at an end of a quoted packet: it is `known` to be one of a service's or server's, or there
/// are services of marks, or at ports that they do not name, whose ends nobody knows.
///
/// Verifier: hidden, or it would follow the rest once for each reason.
#[inline(always)]
fn may_be_ours(tables: &impl Tables, known: bool) -> bool {
    let unknown = tables.config().map_or(0, |config| config.reckon.load() & (reckon::MARKS | reckon::ANY_PORT));
    tables.hide(u64::from(known) | u64::from(unknown)) != 0
}

/// Relays an error about what a service has sent to the server that sent it (`docs/ipvs.md`, section 5.3). `None` when it is
/// not about that.
#[inline(always)]
fn relay_to_server<I, P, T, E>(
    packet: &mut P,
    tables: &T,
    env: &E,
    ip: &I,
    quoted: &Quoted<I>,
) -> Option<Result<Exit, Halt>>
where
    I: Family,
    P: Packet + HandOver,
    T: TablesOf<I::Addr>,
    E: Env,
{
    let (vaddr, vport) = quoted.source;
    let known = endpoint::find(tables, EndpointOf::<I>::new(vaddr, vport, quoted.protocol));
    if !may_be_ours(tables, known.is_service()) {
        return None;
    }
    let key = KeyOf::<I>::new(ProtocolsOf::<I>::live(quoted.protocol), quoted.destination, quoted.source);
    let place = Place::of(EntryOf::<I>::hash(&key, &tables.seed()));
    let found = flow_table::find::<EntryOf<I>>(tables, &key, place)?;
    if let Err(halt) = verify_header(packet, ip) {
        return Some(Err(halt));
    }
    let connection = Connection::of(found.word, found.dest);
    if connection.method() == Method::Masq as u8 {
        let dest = tables.dest(found.dest)?;
        let server = (dest.addr(), connection.port(dest.port(), vport));
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
fn relay_to_client<I, P, T, E>(
    packet: &mut P,
    tables: &T,
    env: &E,
    ip: &I,
    quoted: &Quoted<I>,
) -> Option<Result<Exit, Halt>>
where
    I: Family,
    P: Packet + HandOver,
    T: TablesOf<I::Addr>,
    E: Env,
{
    let (server, port) = quoted.destination;
    let known = endpoint::find(tables, EndpointOf::<I>::new(server, port, quoted.protocol));
    if !may_be_ours(tables, known.has(Target::SERVER)) {
        return None;
    }
    let (found, key) = pipeline::find_masqueraded::<I, T>(tables, quoted.protocol, quoted.destination, quoted.source)?;
    let service = (key.vaddr(), key.vport());
    if let Err(halt) = verify_header(packet, ip) {
        return Some(Err(halt));
    }
    if let Err(halt) = rewrite(packet, ip, quoted, nat::End::Destination, service) {
        return Some(Err(halt));
    }
    let now = Now::of(tables.config()?, env);
    Some(send_to_client(packet, tables, env, ip, &found, service.0, &now))
}

#[inline(always)]
fn send_to_client<I, P, T, E>(
    packet: &mut P,
    tables: &T,
    env: &E,
    ip: &I,
    found: &Found<'_, EntryOf<I>>,
    service: I::Addr,
    now: &Now<'_>,
) -> Result<Exit, Halt>
where
    I: Family,
    P: Packet + HandOver,
    T: Tables,
    E: Env,
{
    let source = forward::routed_as(now.config, service, ip.source());
    let hop = forward::find_way(tables, env, found, (ip.destination(), source), now.clock)?;
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
pub fn verify_header(packet: &impl Packet, ip: &impl Ip) -> Result<(), Halt> {
    if ip.checksum_holds(packet) { Ok(()) } else { Err(Reason::IpChecksum.into()) }
}

/// Checks the checksum of an ICMP message.
#[inline(always)]
fn verify_message<I: Rewrite>(packet: &impl Packet, ip: &I) -> Result<(), Halt> {
    let len = ip.payload_len();
    let sum = packet.sum(ip.transport(), len).ok_or(Reason::Impossible)?;
    let covered = covered::<I>(ip.source(), ip.destination(), len);
    if checksum::holds(sum + covered) { Ok(()) } else { Err(Reason::IcmpChecksum.into()) }
}

/// Rewrites one end of the quoted packet, unless the message's checksum is wrong: a rewrite would make it look right.
#[inline(always)]
fn rewrite<I: Messages>(
    packet: &mut impl Packet,
    ip: &I,
    quoted: &Quoted<I>,
    end: nat::End,
    to: (I::Addr, Port),
) -> Result<(), Halt> {
    verify_message(packet, ip)?;
    translate_quoted(packet, ip, quoted, end, to).ok_or(Halt::silent(Reason::Impossible))
}

/// Rewrites one end of the quoted packet and the message's own checksum. The checksum of the quoted segment is left as it is,
/// like in ip_vs.
#[inline(always)]
fn translate_quoted<I: Messages>(
    packet: &mut impl Packet,
    ip: &I,
    quoted: &Quoted<I>,
    end: nat::End,
    to: (I::Addr, Port),
) -> Option<()> {
    let (old_port, port_offset) = match end {
        nat::End::Source => (quoted.source.1, 0),
        nat::End::Destination => (quoted.destination.1, 2),
    };
    let (addr, port) = to;
    let message = I::readdress_quoted(packet, quoted, end, addr)?.word(old_port.raw(), port.raw());
    packet.write(quoted.transport + port_offset, port.raw())?;
    let check: u16 = packet.read(ip.transport() + 2)?;
    packet.write(ip.transport() + 2, message.apply(check))
}
