//! The whole path of a packet. All control flow is here; the steps are in the other modules.

use lb_common::{
    abi::{Config, Dest, DestCpu, EndpointKey4, NextHop, Target},
    addr::{Ip4, Port},
    flow::{Entry, Entry4, Key4, Place, Server4, Word, flag},
    proto::Method,
    reason::Reason,
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
    track::{self, From},
    tunnel,
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
    /// [`schedule`].
    fn schedule(&self, packet: &P, tables: &T, target: Target) -> Result<u32, Halt> {
        schedule(packet, tables, self, target)
    }

    /// [`store`].
    fn store(&self, packet: &P, tables: &T, dest: u32) -> Option<Result<Connection, Halt>> {
        store(packet, tables, self, dest)
    }

    /// [`join`].
    fn join(&self, packet: &P, tables: &T) -> Result<Connection, Halt> {
        join(packet, tables, self)
    }

    /// [`forward`].
    fn forward(&self, packet: &mut P, tables: &T, connection: Connection) -> Result<Exit, Halt> {
        forward(packet, tables, self, connection)
    }

    /// [`return_to_client`].
    fn return_to_client(&self, packet: &mut P, tables: &T) -> Result<Exit, Halt> {
        return_to_client(packet, tables, self)
    }

    /// [`observe`].
    fn observe(&self, packet: &P, tables: &T) -> Result<Exit, Halt> {
        observe(packet, tables, self)
    }

    /// [`icmp::relay_to_server`].
    fn relay_to_server(&self, packet: &mut P, tables: &T) -> Option<Result<Exit, Halt>> {
        icmp::relay_to_server(packet, tables, self)
    }

    /// [`icmp::relay_to_client`].
    fn relay_to_client(&self, packet: &mut P, tables: &T) -> Option<Result<Exit, Halt>> {
        icmp::relay_to_client(packet, tables, self)
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
    let exit = match (parse::frame(packet), tables.config()) {
        (Ok(Frame::Ipv4), Some(config)) => ipv4(packet, tables, env, &Now::of(config, env)),
        (Ok(Frame::Ipv4), None) => Exit::stop(Reason::Impossible as u8),
        (Err(reason), _) => Exit::stop(reason as u8),
    };
    if let Some(reason) = exit.reason() {
        tables.count(reason);
    }
    exit
}

/// The settings and the time while a packet is handled.
pub struct Now<'t> {
    /// The settings.
    pub config: &'t Config,
    /// The time.
    pub clock: Clock,
}

impl<'t> Now<'t> {
    /// The settings, and the time.
    #[inline(always)]
    pub fn of(config: &'t Config, env: &impl Env) -> Self {
        Self { config, clock: Clock { now: env.jiffies().after(config.clock_skew.load()), hz: env.hz() } }
    }
}

#[inline(always)]
fn ipv4<P, T, E>(packet: &mut P, tables: &T, env: &E, now: &Now<'_>) -> Exit
where
    P: Packet + HandOver,
    T: Buckets<Entry4>,
    E: Steps<P, T>,
{
    let ip = match parse::ipv4(packet) {
        Ok(ip) => ip,
        Err(reason) => return Exit::stop(reason as u8),
    };
    let halt = match route(packet, tables, env, &ip, now) {
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
fn route<P, T, E>(packet: &mut P, tables: &T, env: &E, ip: &Ip4Packet, now: &Now<'_>) -> Result<Exit, Halt>
where
    P: Packet + HandOver,
    T: Buckets<Entry4>,
    E: Steps<P, T>,
{
    if ip.is_fragment() {
        return Err(for_service_address(tables, ip, Reason::Fragment).into());
    }
    if ip.protocol() == icmp::IPPROTO_ICMP {
        // About what a service has sent, or about what it was sent; or no error of ours at all.
        return match env.relay_to_server(packet, tables).or_else(|| env.relay_to_client(packet, tables)) {
            Some(result) => result,
            None => Err(Reason::Icmp.into()),
        };
    }
    let segment = match ip.segment(packet) {
        Ok(segment) => segment,
        Err(Reason::TransportTruncated) => {
            return Err(for_service_address(tables, ip, Reason::TransportTruncated).into());
        }
        Err(reason) => return Err(reason.into()),
    };
    let to = endpoint::find4(tables, EndpointKey4::new(ip.destination(), segment.destination(), segment.protocol()));
    if to.is_service() {
        return request(packet, tables, env, (ip, segment), to, now);
    }
    let from = endpoint::find4(tables, EndpointKey4::new(ip.source(), segment.source(), segment.protocol()));
    if from.has(Target::SERVER)
        && let Some((found, key)) = find_masqueraded(tables, ip.source(), ip.destination(), segment)
    {
        return reply(packet, tables, env, (ip, segment), (&found, &key), now);
    }
    if from.is_service() {
        return env.observe(packet, tables);
    }
    Err(Reason::NotService.into())
}

/// `reason` when the packet is for the address of a service, else that it is not for us.
#[inline(always)]
fn for_service_address(tables: &impl Tables, ip: &Ip4Packet, reason: Reason) -> Reason {
    if endpoint::find4(tables, EndpointKey4::address(ip.destination())).has(Target::ADDRESS) {
        reason
    } else {
        Reason::NotService
    }
}

const MASQ: u8 = Method::Masq as u8;
const TUNNEL: u8 = Method::Tunnel as u8;
const ROUTE: u8 = Method::Route as u8;

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
    pub fn port(self, dest: Port, service: Port) -> Port {
        if self.0 >> 40 & 1 != 0 { service } else { dest }
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
    now: &Now<'_>,
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
    let key = request_key(ip, segment);
    let place = Place::of(Entry4::hash(&key, &tables.seed()));
    if let Some(found) = flow_table::find(tables, &key, place)
        && let Ok(word) = track::step(tables, &found, (segment.flags(), From::Client), now)
    {
        let connection = Connection::of(word, found.dest);
        let cpu = tables.dest_cpu(found.dest).ok_or(Reason::Impossible)?;
        if forward::is_known(now.config, cpu, now.clock) {
            return send_to_server(packet, env, ip, Some(segment), connection, cpu);
        }
        return env.forward(packet, tables, connection);
    }
    let dest = env.schedule(packet, tables, target)?;
    let connection = match env.store(packet, tables, dest) {
        Some(result) => result?,
        None => env.join(packet, tables)?,
    };
    env.forward(packet, tables, connection)
}

/// Sends the packet that has opened a connection to its destination.
///
/// # Errors
///
/// Why it does not get there.
#[inline(always)]
pub fn forward<P, T, E>(packet: &mut P, tables: &T, env: &E, connection: Connection) -> Result<Exit, Halt>
where
    P: Packet + HandOver,
    T: Tables,
    E: Env,
{
    let ip = &parse::ipv4(packet)?;
    let segment = ip.segment(packet)?;
    let now = &Now::of(tables.config().ok_or(Reason::Impossible)?, env);
    to_server(packet, tables, env, ip, Some(segment), connection, now)
}

/// The connection that a client's packet belongs to.
#[inline(always)]
fn request_key(ip: &Ip4Packet, segment: Segment) -> Key4 {
    Key4::from_raw(segment.protocol(), ip.source(), segment.ports(), ip.destination())
}

/// Chooses the destination of the connection that a packet opens, by its number.
///
/// Parses the packet again: a step of [`Steps`] takes nothing that stands on the stack of its caller.
///
/// # Errors
///
/// Why the packet opens none.
#[inline(always)]
pub fn schedule<T: Tables>(packet: &impl Packet, tables: &T, env: &impl Env, target: Target) -> Result<u32, Halt> {
    let ip = &parse::ipv4(packet)?;
    let segment = ip.segment(packet)?;
    if !segment.opens() {
        return Err(Reason::NoConnection.into());
    }
    let view = target.view().ok_or(Reason::NotService)?;
    if segment.source() == Port::new(20) {
        return Err(Reason::FtpDataSource.into());
    }
    match schedule::pick(tables, env, view, ip.source()) {
        Ok(number) => Ok(number),
        Err(Reason::NoDestination) => Err(Halt::tell(Reason::NoDestination, Complaint::PORT_UNREACHABLE)),
        Err(reason) => Err(reason.into()),
    }
}

/// Puts the connection that a packet opens into the table, with the destination number `dest`. `None` when another CPU has
/// just done so, or is about to.
///
/// # Errors
///
/// [`Reason::TableFull`].
#[inline(always)]
pub fn store<T>(packet: &impl Packet, tables: &T, env: &impl Env, dest: u32) -> Option<Result<Connection, Halt>>
where
    T: Buckets<Entry4>,
{
    let ip = &parse::ipv4(packet).ok()?;
    let segment = ip.segment(packet).ok()?;
    let now = Now::of(tables.config()?, env);
    let (method, port) = tables.dest(dest).map(|dest| (dest.method(), dest.port()))?;
    let service_port = if port == Port::default() { flag::SERVICE_PORT } else { 0 };
    let birth = track::birth(&now, segment.protocol(), segment.flags(), method, service_port);
    let key = request_key(ip, segment);
    let place = Place::of(Entry4::hash(&key, &tables.seed()));
    match flow_table::insert(tables, &Insert { key, place, dest, birth, clock: now.clock }) {
        Inserted::New => {
            let cpu = tables.dest_cpu(dest)?;
            cpu.counters.connections.update(|connections| connections + 1);
            Some(Ok(Connection::of(birth, dest)))
        }
        Inserted::Full => Some(Err(Reason::TableFull.into())),
        Inserted::Contended => None,
    }
}

/// Lets a packet join the connection that another CPU has just opened with a packet of the same client.
///
/// # Errors
///
/// [`Reason::FlowContended`] when the other CPU is not ready yet.
#[inline(always)]
pub fn join<P, T, E>(packet: &P, tables: &T, env: &E) -> Result<Connection, Halt>
where
    P: Packet,
    T: Buckets<Entry4>,
    E: Env,
{
    let ip = &parse::ipv4(packet)?;
    let segment = ip.segment(packet)?;
    let now = &Now::of(tables.config().ok_or(Reason::Impossible)?, env);
    let key = request_key(ip, segment);
    let place = Place::of(Entry4::hash(&key, &tables.seed()));
    let found: Found<'_, Entry4> = flow_table::find(tables, &key, place).ok_or(Reason::FlowContended)?;
    let step = (segment.flags(), From::Client);
    let word = track::step(tables, &found, step, now).map_err(|track::Gone| Reason::FlowContended)?;
    Ok(Connection::of(word, found.dest))
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
    now: &Now<'_>,
) -> Result<Exit, Halt>
where
    P: Packet + HandOver,
    T: Tables,
    E: Env,
{
    let dest = tables.dest(connection.dest()).ok_or(Reason::Impossible)?;
    if !dest.available() {
        return Err(Reason::DestinationRemoved.into());
    }
    let cpu = tables.dest_cpu(connection.dest()).ok_or(Reason::Impossible)?;
    if !forward::is_known(now.config, cpu, now.clock) {
        if let Err(halt) = forward::find_out(env, now.config, dest, cpu, now.clock) {
            cpu.counters.count_in(ip.len());
            return Err(halt);
        }
        if forward::is_local(&cpu.next_hop) {
            cpu.counters.count_in(ip.len());
            return deliver(packet, ip, segment, connection, cpu);
        }
    }
    send_to_server(packet, env, ip, segment, connection, cpu)
}

/// Sends a packet of a client, or an ICMP error on its behalf (without `segment`), to a destination on another host.
///
/// # Errors
///
/// Why it does not get there.
#[inline(always)]
fn send_to_server<P, E>(
    packet: &mut P,
    env: &E,
    ip: &Ip4Packet,
    segment: Option<Segment>,
    connection: Connection,
    cpu: &DestCpu,
) -> Result<Exit, Halt>
where
    P: Packet + HandOver,
    E: Env,
{
    let hop = &cpu.next_hop;
    cpu.counters.count_in(ip.len());
    match connection.method() {
        ROUTE => {
            may_be_forwarded(ip, segment.is_some(), hop.mtu.get())?;
            nat::lower_ttl(packet, ip).ok_or(Reason::Impossible)?;
        }
        MASQ => {
            may_be_forwarded(ip, segment.is_some(), hop.mtu.get())?;
            let server = (cpu.addr4(), server_port(connection, cpu, segment));
            nat::translate(packet, ip, segment, End::Destination, server, 1).ok_or(Reason::Impossible)?;
        }
        TUNNEL => {
            may_be_forwarded(ip, segment.is_some(), hop.mtu.get().saturating_sub(tunnel::OVERHEAD))?;
            tunnel::encapsulate(packet, ip, Ip4::from_raw(hop.source.get()), cpu.addr4())?;
        }
        _ => return Err(Reason::Impossible.into()),
    }
    forward::send(packet, env, hop)
}

/// The port of the server that a packet goes to.
#[inline(always)]
fn server_port(connection: Connection, cpu: &DestCpu, segment: Option<Segment>) -> Port {
    segment.map_or(Port::default(), |segment| connection.port(cpu.port(), segment.destination()))
}

/// Hands a packet of a client to a server on the director itself (`docs/ipvs.md`, section 5.6).
///
/// # Errors
///
/// When the server is masqueraded and the client is not on this host: the server's replies would not pass XDP.
#[inline(always)]
fn deliver(
    packet: &mut impl Packet,
    ip: &Ip4Packet,
    segment: Option<Segment>,
    connection: Connection,
    cpu: &DestCpu,
) -> Result<Exit, Halt> {
    if connection.method() == MASQ {
        let server = cpu.addr4();
        if !ip.source().is_loopback() {
            return Err(refuse_local(server).into());
        }
        let port = server_port(connection, cpu, segment);
        nat::translate(packet, ip, segment, End::Destination, (server, port), 0).ok_or(Reason::Impossible)?;
    }
    Ok(Exit::host(Reason::LocalDelivery))
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

/// A packet of the masqueraded server of a connection.
///
/// # Errors
///
/// Why it is not forwarded.
#[inline(always)]
fn reply<P, T, E>(
    packet: &mut P,
    tables: &T,
    env: &E,
    parsed: (&Ip4Packet, Segment),
    connection: (&Found<'_, Entry4>, &Key4),
    now: &Now<'_>,
) -> Result<Exit, Halt>
where
    P: Packet + HandOver,
    T: Buckets<Entry4>,
    E: Steps<P, T>,
{
    let (ip, segment) = parsed;
    let (found, key) = connection;
    if !ip.checksum_holds(packet) {
        return Err(Reason::IpChecksum.into());
    }
    let step = (segment.flags(), From::Server);
    let word = track::step(tables, found, step, now).map_err(|track::Gone| Reason::NotService)?;
    // A connection's word is written once a second: often enough to ask for the way to its client again.
    if word == found.word
        && let Some(hop) = forward::known_way(tables, found, now.clock)
    {
        return to_client(packet, tables, env, parsed, found.dest, (key.vaddr(), key.vport()), hop);
    }
    env.return_to_client(packet, tables)
}

/// Sends a packet of a masqueraded server to its client by a way that has to be found out.
///
/// # Errors
///
/// Why it does not get there.
#[inline(always)]
pub fn return_to_client<P, T, E>(packet: &mut P, tables: &T, env: &E) -> Result<Exit, Halt>
where
    P: Packet + HandOver,
    T: Buckets<Entry4>,
    E: Env,
{
    let ip = &parse::ipv4(packet)?;
    let segment = ip.segment(packet)?;
    let (found, key) =
        find_masqueraded(tables, ip.source(), ip.destination(), segment).ok_or(Reason::NotService)?;
    let service = (key.vaddr(), key.vport());
    let now = Now::of(tables.config().ok_or(Reason::Impossible)?, env);
    let hop = forward::find_way(tables, env, &found, (ip.destination(), service.0), now.clock)?;
    to_client(packet, tables, env, (ip, segment), found.dest, service, hop)
}

/// Sends a packet of destination number `dest` to its client, as from the service.
#[inline(always)]
fn to_client<P, T, E>(
    packet: &mut P,
    tables: &T,
    env: &E,
    parsed: (&Ip4Packet, Segment),
    dest: u32,
    service: (Ip4, Port),
    hop: &NextHop,
) -> Result<Exit, Halt>
where
    P: Packet + HandOver,
    T: Tables,
    E: Env,
{
    let (ip, segment) = parsed;
    let local = forward::is_local(hop);
    if !local && (ip.ttl() <= 1 || u32::from(ip.len()) > hop.mtu.get()) {
        return Err(Reason::ReplyRefused.into());
    }
    count_out(tables, dest, ip.len());
    let hops = if local { 0 } else { 1 };
    nat::translate(packet, ip, Some(segment), End::Source, service, hops).ok_or(Reason::Impossible)?;
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
    let key = Key4::new(segment.protocol(), (client, segment.destination()), (Ip4::default(), Port::default()));
    let place = Place::of(Entry4::hash(&key, &tables.seed()));
    flow_table::find_reply(tables, &key, place, Server4::new(server, segment.source()))
}

/// A reply of a DR or tunnel server that happens to pass the director: it moves its connection and is left alone.
///
/// # Errors
///
/// [`Reason::NotService`] when it is none.
#[inline(always)]
pub fn observe<P, T, E>(packet: &P, tables: &T, env: &E) -> Result<Exit, Halt>
where
    P: Packet,
    T: Buckets<Entry4>,
    E: Env,
{
    let ip = &parse::ipv4(packet)?;
    let segment = ip.segment(packet)?;
    let now = &Now::of(tables.config().ok_or(Reason::Impossible)?, env);
    let client = (ip.destination(), segment.destination());
    let key = Key4::new(segment.protocol(), client, (ip.source(), segment.source()));
    let place = Place::of(Entry4::hash(&key, &tables.seed()));
    let found: Found<'_, Entry4> = flow_table::find(tables, &key, place).ok_or(Reason::NotService)?;
    if found.word.method() == MASQ {
        return Err(Reason::NotService.into());
    }
    let step = (segment.flags(), From::Server);
    track::step(tables, &found, step, now).map_err(|track::Gone| Reason::NotService)?;
    count_out(tables, found.dest, ip.len());
    Ok(Exit::host(Reason::ReplyObserved))
}

/// Counts a packet from a server, unless the destination has been removed (`docs/ipvs.md`, section 8.1).
#[inline(always)]
pub fn count_out(tables: &impl Tables, dest: u32, len: u16) {
    let available = tables.dest(dest).is_some_and(Dest::available);
    if let Some(cpu) = tables.dest_cpu(dest)
        && available
    {
        cpu.counters.count_out(len);
    }
}
