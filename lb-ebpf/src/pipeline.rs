//! The whole path of a packet. All control flow is here; the steps are in the other modules.

use lb_common::{
    abi::{Config, Dest, EndpointKey4, Target},
    addr::{Ip4, Port},
    flow::{Entry, Entry4, Key4, Place, Word, flag},
    proto::{Method, Protocol},
    reason::Reason,
    tcp::{self, Event},
};

use crate::{
    endpoint,
    env::{Clock, Env, HandOver},
    flow_table::{self, Buckets, Found, Insert, Inserted},
    forward::{self, Exit, Halt},
    icmp::{self, Complaint},
    nat::{self, End},
    packet::Packet,
    parse::{self, Frame, Ip4Packet, Segment},
    schedule,
    tables::Tables,
    track, tunnel,
};

/// The steps of the path that most packets do not take.
///
/// Verifier: the kernel's verifier follows a program once for every way of reaching each of its parts, and a program of
/// this size would exceed its patience. What is a function of its own to it, it follows once. So the steps go through
/// this trait: the programs implement it with such functions, and everybody else leaves it as it is.
pub trait Steps<P, T>: Env + Sized
where
    P: Packet + HandOver,
    T: Buckets<Entry4>,
{
    /// [`open`].
    fn open(&self, packet: &mut P, tables: &T, target: Target) -> Result<Connection, Halt> {
        open(packet, tables, self, target)
    }

    /// [`reply`].
    fn reply(&self, packet: &mut P, tables: &T, from: Target) -> Result<Exit, Halt> {
        reply(packet, tables, self, from)
    }

    /// [`icmp::relay`].
    fn relay(&self, packet: &mut P, tables: &T) -> Result<Exit, Halt> {
        icmp::relay(packet, tables, self)
    }

    /// [`icmp::answer`].
    fn answer(&self, packet: &mut P, tables: &T, complaint: Complaint) -> Option<Exit> {
        icmp::answer(packet, tables, self, complaint)
    }
}

/// Handles one frame: rewrites it, and says where it goes. Counts everything there is to count.
#[inline(always)]
pub fn process<P, T, E>(packet: &mut P, tables: &T, env: &E) -> Exit
where
    P: Packet + HandOver,
    T: Buckets<Entry4>,
    E: Steps<P, T>,
{
    let exit = match parse::frame(packet) {
        Ok(Frame::Ipv4) => ipv4(packet, tables, env),
        Err(reason) => Exit::stop(reason as u8),
    };
    if let Some(reason) = exit.reason() {
        tables.count(reason);
    }
    exit
}

#[inline(always)]
fn ipv4<P, T, E>(packet: &mut P, tables: &T, env: &E) -> Exit
where
    P: Packet + HandOver,
    T: Buckets<Entry4>,
    E: Steps<P, T>,
{
    let ip = match parse::ipv4(packet) {
        Ok(ip) => ip,
        Err(reason) => return Exit::stop(reason as u8),
    };
    let halt = match route(packet, tables, env, &ip) {
        Ok(exit) => return exit,
        Err(halt) => halt,
    };
    let reason = halt.reason();
    match halt.complaint() {
        Some(complaint) => match env.answer(packet, tables, complaint) {
            Some(exit) => exit.instead_of(reason),
            None => Exit::stop(reason),
        },
        None => Exit::stop(reason),
    }
}

/// Tells by its two ends what an IPv4 packet is to the director, and takes it there.
#[inline(always)]
fn route<P, T, E>(packet: &mut P, tables: &T, env: &E, ip: &Ip4Packet) -> Result<Exit, Halt>
where
    P: Packet + HandOver,
    T: Buckets<Entry4>,
    E: Steps<P, T>,
{
    if ip.is_fragment() {
        return Err(for_service_address(tables, ip, Reason::Fragment).into());
    }
    if ip.protocol() == icmp::IPPROTO_ICMP {
        return env.relay(packet, tables);
    }
    let segment = match ip.segment(packet) {
        Ok(segment) => segment,
        Err(Reason::TransportTruncated) => {
            return Err(for_service_address(tables, ip, Reason::TransportTruncated).into());
        }
        Err(reason) => return Err(reason.into()),
    };
    let to = endpoint::find4(tables, &EndpointKey4::new(ip.destination(), segment.destination(), segment.protocol()));
    if to.is_service() {
        return request(packet, tables, env, (ip, segment), to);
    }
    let from = endpoint::find4(tables, &EndpointKey4::new(ip.source(), segment.source(), segment.protocol()));
    if from.is_service() || from.has(Target::SERVER) {
        return env.reply(packet, tables, from);
    }
    Err(Reason::NotService.into())
}

/// `reason` when the packet is for the address of a service, else that it is not for us.
#[inline(always)]
fn for_service_address(tables: &impl Tables, ip: &Ip4Packet, reason: Reason) -> Reason {
    if endpoint::find4(tables, &EndpointKey4::address(ip.destination())).has(Target::ADDRESS) {
        reason
    } else {
        Reason::NotService
    }
}

/// The clock of a packet that is being handled now.
#[inline(always)]
pub fn clock(config: &Config, env: &impl Env) -> Clock {
    Clock { now: env.jiffies().after(config.clock_skew.load()), hz: env.hz() }
}

/// What a packet needs to know of its connection in order to be forwarded: number of the destination in bits 0-31,
/// number of the forwarding method in bits 32-39, and bit 40 if the destination is reached at the service's port.
#[derive(Clone, Copy)]
pub struct Connection(u64);

impl Connection {
    /// The connection as a word, with bit 63 clear.
    #[inline(always)]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// The connection with these bits.
    #[inline(always)]
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The connection with this word and destination.
    #[inline(always)]
    pub fn of(word: Word, dest: u32) -> Self {
        Self(u64::from(dest) | u64::from(word.method()) << 32 | u64::from(word.has(flag::SERVICE_PORT)) << 40)
    }

    /// The number of the destination.
    #[inline(always)]
    pub const fn dest(self) -> u32 {
        self.0 as u32
    }

    /// The number of the forwarding method.
    #[inline(always)]
    pub const fn method(self) -> u8 {
        (self.0 >> 32) as u8
    }

    /// The port the destination is reached at.
    #[inline(always)]
    pub fn port(self, dest: &Dest, service: Port) -> Port {
        if self.0 >> 40 & 1 != 0 { service } else { dest.port() }
    }
}

/// A packet of a client for a service.
#[inline(always)]
fn request<P, T, E>(
    packet: &mut P,
    tables: &T,
    env: &E,
    parsed: (&Ip4Packet, Segment),
    target: Target,
) -> Result<Exit, Halt>
where
    P: Packet + HandOver,
    T: Buckets<Entry4>,
    E: Steps<P, T>,
{
    let (ip, segment) = parsed;
    if !ip.checksum_holds(packet) {
        return Err(Reason::IpChecksum.into());
    }
    let config = tables.config().ok_or(Reason::Impossible)?;
    let clock = clock(config, env);
    let key = request_key(ip, segment);
    let place = Place::of(Entry4::hash(&key, &tables.seed()), tables.flow_buckets());
    let known = match flow_table::find(tables, &key, &place) {
        Some(found) => known(tables, config, &found, segment.event(), clock)?,
        None => None,
    };
    let connection = match known {
        Some(connection) => connection,
        None => env.open(packet, tables, target)?,
    };
    let connection = Connection::from_bits(tables.hide(connection.bits()));
    to_server(packet, tables, env, ip, Some(segment), connection, clock)
}

/// The connection that a client's packet belongs to.
#[inline(always)]
fn request_key(ip: &Ip4Packet, segment: Segment) -> Key4 {
    Key4 {
        caddr: ip.source(),
        vaddr: ip.destination(),
        cport: segment.source(),
        vport: segment.destination(),
        protocol: segment.protocol(),
    }
}

/// Moves the connection that a client's packet belongs to. `None` when the packet has to open a new one instead: the old
/// one is over, or may be reused.
///
/// # Errors
///
/// [`Reason::DestinationRemoved`].
#[inline(always)]
fn known(
    tables: &impl Tables,
    config: &Config,
    found: &Found<'_, Entry4>,
    event: Event,
    clock: Clock,
) -> Result<Option<Connection>, Reason> {
    let word = found.word;
    if word.expired(clock.now, clock.hz) || reusable(config, word, event) {
        flow_table::release(tables, found.entry, word, found.dest);
        return Ok(None);
    }
    let dest = tables.dest(found.dest).ok_or(Reason::Impossible)?;
    if !dest.available() {
        return Err(Reason::DestinationRemoved);
    }
    match track::step(tables, config, found, event, false, clock) {
        Ok(word) => Ok(Some(Connection::of(word, found.dest))),
        Err(track::Gone) => Ok(None),
    }
}

/// Whether a SYN may take over the addresses and ports of this connection (`docs/ipvs.md`, section 4.8).
#[inline(always)]
fn reusable(config: &Config, word: Word, event: Event) -> bool {
    const TIME_WAIT: u8 = tcp::State::TimeWait as u8;
    const CLOSE: u8 = tcp::State::Close as u8;
    const FIN_WAIT: u8 = tcp::State::FinWait as u8;
    let mode = config.conn_reuse_mode.load();
    if word.protocol() != Protocol::Tcp || event != Event::Syn || mode == 0 {
        return false;
    }
    match word.state() {
        TIME_WAIT | CLOSE => true,
        FIN_WAIT => mode & 2 != 0 && word.has(flag::NO_OUTPUT),
        _ => false,
    }
}

/// Opens a connection: schedules it and puts it into the table.
///
/// Parses the packet again: a step of [`Steps`] takes nothing that stands on the stack of its caller.
///
/// # Errors
///
/// Why the packet opens none.
#[inline(always)]
pub fn open<P, T, E>(packet: &P, tables: &T, env: &E, target: Target) -> Result<Connection, Halt>
where
    P: Packet,
    T: Buckets<Entry4>,
    E: Env,
{
    let ip = &parse::ipv4(packet)?;
    let segment = ip.segment(packet)?;
    let event = segment.event();
    let key = request_key(ip, segment);
    if key.protocol == Protocol::Tcp && event != Event::Syn {
        return Err(Reason::NoConnection.into());
    }
    let view = target.view().ok_or(Reason::NotService)?;
    if key.cport == Port::new(20) {
        return Err(Reason::FtpDataSource.into());
    }
    let number = match schedule::pick(tables, env, view, key.caddr) {
        Ok(number) => number,
        Err(Reason::NoDestination) => return Err(Halt::tell(Reason::NoDestination, Complaint::PORT_UNREACHABLE)),
        Err(reason) => return Err(reason.into()),
    };
    let config = tables.config().ok_or(Reason::Impossible)?;
    let clock = clock(config, env);
    let dest = tables.dest(number).ok_or(Reason::Impossible)?;
    let service_port = if dest.port() == Port::default() { flag::SERVICE_PORT } else { 0 };
    let birth = track::birth(config, key.protocol, event, dest.method(), service_port, clock.now);
    let place = Place::of(Entry4::hash(&key, &tables.seed()), tables.flow_buckets());
    match flow_table::insert(tables, &Insert { key, place, dest: number, birth, clock }) {
        Inserted::New => {
            if let Some(cpu) = tables.dest_cpu(number) {
                cpu.counters.connections.update(|connections| connections + 1);
            }
            Ok(Connection::of(birth, number))
        }
        Inserted::Full => Err(Reason::TableFull.into()),
        Inserted::Contended => join(packet, tables, env),
    }
}

/// Lets a packet join the connection that another CPU has just opened with a packet of the same client.
///
/// # Errors
///
/// [`Reason::FlowContended`] when the other CPU is not ready yet.
#[inline(never)]
fn join<P, T, E>(packet: &P, tables: &T, env: &E) -> Result<Connection, Halt>
where
    P: Packet,
    T: Buckets<Entry4>,
    E: Env,
{
    let ip = &parse::ipv4(packet)?;
    let segment = ip.segment(packet)?;
    let config = tables.config().ok_or(Reason::Impossible)?;
    let key = request_key(ip, segment);
    let place = Place::of(Entry4::hash(&key, &tables.seed()), tables.flow_buckets());
    let found = flow_table::find(tables, &key, &place).ok_or(Reason::FlowContended)?;
    let known = known(tables, config, &found, segment.event(), clock(config, env))?;
    known.ok_or(Halt::silent(Reason::FlowContended))
}

/// Sends a packet of a client, or an ICMP error on its behalf (without `segment`), to its destination.
///
/// # Errors
///
/// Why it does not get there.
#[inline(always)]
pub fn to_server<P, T, E>(
    packet: &mut P,
    tables: &T,
    env: &E,
    ip: &Ip4Packet,
    segment: Option<Segment>,
    connection: Connection,
    clock: Clock,
) -> Result<Exit, Halt>
where
    P: Packet + HandOver,
    T: Tables,
    E: Env,
{
    let dest = tables.dest(connection.dest()).ok_or(Reason::Impossible)?;
    let cpu = tables.dest_cpu(connection.dest()).ok_or(Reason::Impossible)?;
    cpu.counters.packets_in.update(|packets| packets + 1);
    cpu.counters.bytes_in.update(|bytes| bytes + u64::from(ip.len()));
    let hop = forward::to_dest(env, cpu, dest, clock)?;
    let method = Method::try_from(connection.method()).map_err(|_| Reason::Impossible)?;
    let local = forward::is_local(hop);
    if !local {
        let overhead = if matches!(method, Method::Tunnel) { tunnel::OVERHEAD } else { 0 };
        may_be_forwarded(ip, segment.is_some(), hop.mtu.get().saturating_sub(overhead))?;
    }
    match method {
        Method::Masq => {
            let server = (dest.addr4(), segment.map_or(Port::default(), |s| connection.port(dest, s.destination())));
            if local && !ip.source().is_loopback() {
                return Err(refuse_local(server.0).into());
            }
            let hops = if local { 0 } else { 1 };
            nat::translate(packet, ip, segment, End::Destination, server, hops).ok_or(Reason::Impossible)?;
        }
        Method::Tunnel if !local => tunnel::encapsulate(packet, ip, Ip4::from_raw(hop.source.get()), dest.addr4())?,
        Method::Route if !local => {
            nat::age(packet, ip, 1, Default::default()).ok_or(Reason::Impossible)?;
        }
        Method::Tunnel | Method::Route => {}
    }
    forward::send(packet, env, hop)
}

/// Why a masqueraded server on this host cannot be reached from outside.
#[inline(always)]
fn refuse_local(server: Ip4) -> Reason {
    if server.is_loopback() { Reason::LoopbackDestination } else { Reason::LocalMasquerade }
}

/// Checks TTL and size, in the order ip_vs does. Errors about errors are not sent.
#[inline(always)]
fn may_be_forwarded(ip: &Ip4Packet, tell: bool, mtu: u32) -> Result<(), Halt> {
    let halt = |reason, complaint| if tell { Halt::tell(reason, complaint) } else { Halt::silent(reason) };
    if ip.ttl() <= 1 {
        return Err(halt(Reason::TtlExpired, Complaint::TTL_EXPIRED));
    }
    if u32::from(ip.len()) <= mtu {
        return Ok(());
    }
    if !ip.dont_fragment() {
        return Err(Reason::NeedsFragmentation.into());
    }
    if mtu < tunnel::MTU_MIN {
        return Err(Reason::TooBig.into());
    }
    Err(halt(Reason::TooBig, Complaint::too_big(mtu)))
}

/// A packet from a real server, or from an address and port of a service.
///
/// # Errors
///
/// Why it is not forwarded.
#[inline(always)]
pub fn reply<P, T, E>(packet: &mut P, tables: &T, env: &E, from: Target) -> Result<Exit, Halt>
where
    P: Packet + HandOver,
    T: Buckets<Entry4>,
    E: Env,
{
    let ip = &parse::ipv4(packet)?;
    let segment = ip.segment(packet)?;
    let config = tables.config().ok_or(Reason::Impossible)?;
    let clock = clock(config, env);
    let found = if from.has(Target::SERVER) {
        find_masqueraded(tables, ip.source(), ip.destination(), segment)
    } else {
        None
    };
    let Some((found, key)) = found else {
        return observe(tables, config, ip, segment, clock);
    };
    if found.word.expired(clock.now, clock.hz) {
        return Err(Reason::NotService.into());
    }
    if !ip.checksum_holds(packet) {
        return Err(Reason::IpChecksum.into());
    }
    let Ok(word) = track::step(tables, config, &found, segment.event(), true, clock) else {
        return Err(Reason::NotService.into());
    };
    let ask = word != found.word;
    let hop = forward::to_client(tables, env, (found.entry, word, ask), (ip.destination(), key.vaddr), clock)?;
    let local = forward::is_local(hop);
    if !local && (ip.ttl() <= 1 || u32::from(ip.len()) > hop.mtu.get()) {
        return Err(Reason::ReplyRefused.into());
    }
    count_out(tables, found.dest, ip.len());
    let hops = if local { 0 } else { 1 };
    nat::translate(packet, ip, Some(segment), End::Source, (key.vaddr, key.vport), hops).ok_or(Reason::Impossible)?;
    forward::send(packet, env, hop)
}

/// The masqueraded connection between the server that sent `segment` from `server` and `client`.
#[inline(always)]
pub fn find_masqueraded<'t, T: Buckets<Entry4>>(
    tables: &'t T,
    server: Ip4,
    client: Ip4,
    segment: Segment,
) -> Option<(Found<'t, Entry4>, Key4)> {
    let key = Key4 {
        caddr: client,
        cport: segment.destination(),
        vaddr: Ip4::default(),
        vport: Port::default(),
        protocol: segment.protocol(),
    };
    let place = Place::of(Entry4::hash(&key, &tables.seed()), tables.flow_buckets());
    flow_table::find_reply(tables, &key, &place, |key: &Key4, word, dest| {
        let connection = Connection::of(word, dest);
        connection.method() == Method::Masq as u8
            && tables.dest(dest).is_some_and(|dest| {
                dest.addr4() == server && connection.port(dest, key.vport) == segment.source()
            })
    })
}

/// A reply of a DR or tunnel server that happens to pass the director: it moves its connection and is left alone.
#[inline(always)]
fn observe<T: Buckets<Entry4>>(
    tables: &T,
    config: &Config,
    ip: &Ip4Packet,
    segment: Segment,
    clock: Clock,
) -> Result<Exit, Halt> {
    let key = Key4 {
        caddr: ip.destination(),
        cport: segment.destination(),
        vaddr: ip.source(),
        vport: segment.source(),
        protocol: segment.protocol(),
    };
    let place = Place::of(Entry4::hash(&key, &tables.seed()), tables.flow_buckets());
    let found: Found<'_, Entry4> = flow_table::find(tables, &key, &place).ok_or(Reason::NotService)?;
    let masquerade = found.word.method() == Method::Masq as u8;
    if masquerade || found.word.expired(clock.now, clock.hz) {
        return Err(Reason::NotService.into());
    }
    count_out(tables, found.dest, ip.len());
    track::step(tables, config, &found, segment.event(), true, clock).map_err(|track::Gone| Reason::NotService)?;
    Ok(Exit::host(Reason::ReplyObserved))
}

/// Counts a packet from a server, unless the destination has been removed (`docs/ipvs.md`, section 8.1).
#[inline(always)]
pub fn count_out(tables: &impl Tables, dest: u32, len: u16) {
    let available = tables.dest(dest).is_some_and(Dest::available);
    if let Some(cpu) = tables.dest_cpu(dest)
        && available
    {
        cpu.counters.packets_out.update(|packets| packets + 1);
        cpu.counters.bytes_out.update(|bytes| bytes + u64::from(len));
    }
}
