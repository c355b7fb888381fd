//! The whole path of a packet. All control flow is here; the steps are in the other modules.

use lb_common::{
    abi::{
        Config, Dest, DestCpu, EndpointKey as _, Limiter, NextHop, Stage, Target, View, port_protocol, reckon, switch,
    },
    addr::{Address, Ip4, Port},
    event::Event,
    flow::{self, Entry, Key as _, Place, Word, flag},
    proto::{Method, Protocol, service_flag},
    reason::Reason,
    sync::opaque,
    timeout,
};

use crate::{
    endpoint::{self, By},
    env::{Clock, Env, HandOver},
    flow_table::{self, Buckets, Found, Insert, Inserted},
    forward::{self, Exit, Halt},
    icmp::{self, Complaint, Messages},
    mark::{self, Marked},
    nat::{self, End},
    packet::Packet,
    parse::{self, Ip, Ip4Packet, Ip6Packet, Segment},
    protocols::Protocols,
    related,
    schedule::{self, Parties},
    tables::{Tables, TablesOf},
    template::{self, Held, Made},
    track::{self, From},
    tunnel,
};

/// Packets of an address family: what the pipeline is generic over.
pub trait Family: Messages {}

impl<S: Protocols> Family for Ip4Packet<S> {}
impl<S: Protocols> Family for Ip6Packet<S> {}

/// Connections of packets of type `I`.
pub type EntryOf<I> = <<I as Ip>::Addr as Address>::Entry;
/// What tells connections of packets of type `I` apart.
pub type KeyOf<I> = <EntryOf<I> as Entry>::Key;
/// The transport protocols of packets of type `I`.
pub type ProtocolsOf<I> = <I as Ip>::Protocols;
/// What the transport header of packets of type `I` says.
pub type SegmentOf<I> = Segment<ProtocolsOf<I>>;
/// An end of packets of type `I`.
pub type EndpointOf<I> = <<I as Ip>::Addr as Address>::Endpoint;

/// What the path of packets of type `I` does not do itself.
pub trait Stages<I: Family, P, T>: Env + Sized
where
    P: Packet + HandOver,
    T: TablesOf<I::Addr>,
{
    /// Goes on with [`process_stage`], or at [`Stage::Six`] with [`process`] for IPv6, and at [`Stage::Sctp`] for SCTP.
    fn enter(&self, packet: &mut P, tables: &T, stage: Stage) -> Exit;

    /// [`icmp::answer`].
    fn answer(&self, packet: &mut P, tables: &T, complaint: Complaint) -> Option<Exit> {
        icmp::answer::<I, P>(packet, tables, self, complaint)
    }

    /// [`mark::service`].
    fn marked(&self, packet: &P, tables: &T) -> Marked {
        mark::service::<I, P, T, Self>(packet, tables, self)
    }

    /// [`schedule::pick`].
    ///
    /// # Errors
    ///
    /// As there.
    fn pick(&self, tables: &T, view: u32, parties: Parties) -> Result<u32, Reason> {
        schedule::pick(tables, self, view, parties)
    }

    /// [`schedule::pick_alike`].
    ///
    /// # Errors
    ///
    /// As there.
    fn pick_alike(&self, tables: &T, view: u32, parties: Parties, connection: u64) -> Result<u32, Reason> {
        schedule::pick_alike(tables, self, view, parties, connection)
    }
}

/// Handles one frame, which is taken for one of the family of `I`: rewrites it, and says where it goes. Counts everything there is to count.
#[inline(always)]
pub fn process<I, P, T, E>(packet: &mut P, tables: &T, env: &E) -> Exit
where
    I: Family,
    P: Packet + HandOver,
    T: TablesOf<I::Addr>,
    E: Stages<I, P, T>,
{
    match arrive::<I, P, T, E>(packet, tables, env) {
        // On its way to its destination or client: no reason to count.
        Ok(exit) => exit,
        halted => finish::<I, P, T, E>(packet, tables, env, halted),
    }
}

/// Handles a frame whose path has come to `stage`.
#[inline(always)]
pub fn process_stage<I, P, T, E>(packet: &mut P, tables: &T, env: &E, stage: Stage) -> Exit
where
    I: Family,
    P: Packet + HandOver,
    T: TablesOf<I::Addr>,
    E: Stages<I, P, T>,
{
    let result = match stage {
        Stage::Request => request::<I, P, T, E>(packet, tables, env),
        Stage::Reply => reply::<I, P, T, E>(packet, tables, env),
        Stage::Observe => observe::<I, P, T, E>(packet, tables, env),
        Stage::Icmp => icmp::relay::<I, P, T, E>(packet, tables, env),
        Stage::Unusual | Stage::Sctp => unusual::<I, P, T, E>(packet, tables, env),
        Stage::Open => open::<I, P, T, E>(packet, tables, env),
        Stage::Overflow => overflow::<I, P, T, E>(packet, tables, env),
        Stage::Mark => marked::<I, P, T, E>(packet, tables, env),
        Stage::Persist => persist::<I, P, T, E>(packet, tables, env),
        Stage::PersistOverflow => persist_overflow::<I, P, T, E>(packet, tables, env),
        Stage::PersistAlike => persist_alike::<I, P, T, E>(packet, tables, env),
        Stage::Astray => astray::<I, P, T, E>(packet, tables, env),
        Stage::Related => related::relay::<I, P, T, E>(packet, tables, env),
        Stage::RelatedOpen => related::open::<I, P, T, E>(packet, tables, env),
        Stage::Opened => opened::<I, P, T, E>(packet, tables, env),
        // Not of this family.
        Stage::Six => Err(Reason::Impossible.into()),
    };
    finish::<I, P, T, E>(packet, tables, env, result)
}

/// Goes on to the next stage, or ends the path: tells the sender, counts.
#[inline(always)]
fn finish<I, P, T, E>(packet: &mut P, tables: &T, env: &E, result: Result<Exit, Halt>) -> Exit
where
    I: Family,
    P: Packet + HandOver,
    T: TablesOf<I::Addr>,
    E: Stages<I, P, T>,
{
    let exit = match result {
        Ok(exit) => exit,
        Err(halt) => {
            if let Some(stage) = halt.stage() {
                return env.enter(packet, tables, stage);
            }
            let reason = halt.reason();
            let answer = halt.complaint().and_then(|complaint| env.answer(packet, tables, complaint));
            answer.map_or(Exit::stop(reason), |answer| answer.instead_of(reason))
        }
    };
    if let Some(reason) = exit.reason() {
        tables.count(reason);
    }
    exit
}

/// Handles a frame as far as nearly all need it.
#[inline(always)]
fn arrive<I, P, T, E>(packet: &mut P, tables: &T, env: &E) -> Result<Exit, Halt>
where
    I: Family,
    P: Packet + HandOver,
    T: TablesOf<I::Addr>,
    E: Env,
{
    match I::plain(packet) {
        Some(ip) => classify(packet, tables, env, &ip),
        None if I::Addr::FAMILY == Ip4::FAMILY && parse::carries::<Ip6Packet>(packet) => Err(Halt::go_on(Stage::Six)),
        None => Err(Halt::go_on(Stage::Unusual)),
    }
}

/// A frame that is not [`Ip::plain`].
///
/// # Errors
///
/// Why it is not forwarded, or where its path goes on.
#[inline(always)]
pub fn unusual<I, P, T, E>(packet: &mut P, tables: &T, env: &E) -> Result<Exit, Halt>
where
    I: Family,
    P: Packet + HandOver,
    T: TablesOf<I::Addr>,
    E: Env,
{
    parse::frame::<I>(packet)?;
    let ip = &I::parse(packet)?;
    classify(packet, tables, env, ip)
}

/// Tells by its two ends what a packet is to the director. Packets of established connections go all their way from here.
#[inline(always)]
fn classify<I, P, T, E>(packet: &mut P, tables: &T, env: &E, ip: &I) -> Result<Exit, Halt>
where
    I: Family,
    P: Packet + HandOver,
    T: TablesOf<I::Addr>,
    E: Env,
{
    if ip.is_fragment() {
        return Err(for_service_address(tables, ip, Reason::Fragment).into());
    }
    let segment = match ip.segment(packet) {
        Ok(segment) => segment,
        Err(Reason::OtherProtocol) if ip.protocol() == I::ICMP => return Err(Halt::go_on(Stage::Icmp)),
        Err(Reason::OtherProtocol) if is_sctp(ip) => return Err(Halt::go_on(Stage::Sctp)),
        Err(reason @ (Reason::TransportTruncated | Reason::ExtensionHeader)) => {
            return Err(for_service_address(tables, ip, reason).into());
        }
        Err(reason) => return Err(reason.into()),
    };
    let to = endpoint::find(tables, EndpointOf::<I>::new(ip.destination(), segment.destination(), segment.protocol()));
    if to.is_service() {
        return established_request(packet, tables, env, ip, segment);
    }
    let from = endpoint::find(tables, EndpointOf::<I>::new(ip.source(), segment.source(), segment.protocol()));
    if from.has(Target::SERVER)
        && let Some((found, key)) = find_replied::<I, T>(tables, ip, segment)
    {
        return established_reply(packet, tables, env, (ip, segment), (&found, &key));
    }
    if from.is_service() {
        return Err(Halt::go_on(Stage::Observe));
    }
    Err(unless_marked(tables, from))
}

/// Whether a packet is SCTP. Opaque, or the compiler would ask so of every UDP packet.
#[inline(always)]
fn is_sctp(ip: &impl Ip) -> bool {
    opaque(ip.protocol().into()) == Protocol::Sctp as u64
}

/// What becomes of a packet of no service's address and port and of no masqueraded connection, which comes from this endpoint.
#[inline(always)]
fn unless_marked(tables: &impl Tables, from: Target) -> Halt {
    let Some(config) = tables.config() else { return Reason::Impossible.into() };
    // The setting's bit, if a masqueraded server has sent it.
    let told = (from.0 & Target::SERVER) >> Target::SERVER.ilog2() << switch::NAT_ICMP_SEND.ilog2();
    let known = config.reckon.load() & (reckon::MARKS | reckon::ANY_PORT) | config.switches.load() & told as u32;
    if known != 0 { Halt::go_on(Stage::Mark) } else { Reason::NotService.into() }
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

/// `reason` when the packet is for the address of a service, else that it is not for us.
#[inline(always)]
fn for_service_address<I: Ip>(tables: &impl TablesOf<I::Addr>, ip: &I, reason: Reason) -> Reason {
    if endpoint::find(tables, EndpointOf::<I>::address(ip.destination())).has(Target::ADDRESS) {
        reason
    } else {
        Reason::NotService
    }
}

const MASQ: u8 = Method::Masq as u8;
const TUNNEL: u8 = Method::Tunnel as u8;
const ROUTE: u8 = Method::Route as u8;

/// What a packet needs to know of its connection in order to be forwarded: number of the destination in bits 0-31,
/// number of the forwarding method in bits 32-39, bit 40 if the destination is reached at the service's port, and bit 41 if the
/// connection is stored nowhere.
#[derive(Clone, Copy)]
pub struct Connection(u64);

impl Connection {
    /// The connection with this word and destination.
    #[inline(always)]
    pub fn of(word: Word, dest: u32) -> Self {
        Self(u64::from(dest) | u64::from(word.method()) << 32 | u64::from(word.has(flag::SERVICE_PORT)) << 40)
    }

    /// The connection with these bits.
    #[inline(always)]
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The connection as bits.
    #[inline(always)]
    pub const fn bits(self) -> u64 {
        self.0
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

    /// The connection, which is stored nowhere.
    #[inline(always)]
    const fn stateless(self) -> Self {
        Self(self.0 | 1 << 41)
    }

    /// Whether the connection is stored nowhere.
    #[inline(always)]
    const fn is_stateless(self) -> bool {
        self.0 >> 41 & 1 != 0
    }

    /// The port the destination is reached at.
    #[inline(always)]
    pub fn port(self, dest: Port, service: Port) -> Port {
        if self.0 >> 40 & 1 != 0 { service } else { dest }
    }
}

/// A packet of a client for a service, as far as its connection is known and the way to its destination too.
#[inline(always)]
fn established_request<I, P, T, E>(
    packet: &mut P,
    tables: &T,
    env: &E,
    ip: &I,
    segment: SegmentOf<I>,
) -> Result<Exit, Halt>
where
    I: Family,
    P: Packet + HandOver,
    T: TablesOf<I::Addr>,
    E: Env,
{
    if !ip.checksum_holds(packet) {
        return Err(Reason::IpChecksum.into());
    }
    let now = &Now::of(tables.config().ok_or(Reason::Impossible)?, env);
    let key = request_key(ip, segment);
    let place = Place::of(EntryOf::<I>::hash(&key, &tables.seed()));
    match flow_table::find(tables, &key, place) {
        Some(found) => to_known_server(packet, tables, env, (ip, segment), &found, now),
        None => Err(Halt::go_on(Stage::Open)),
    }
}

/// A packet of a client on the connection that was found, as far as the way to its destination is known. Its header checksum has
/// been looked at.
#[inline(always)]
fn to_known_server<I, P, T, E>(
    packet: &mut P,
    tables: &T,
    env: &E,
    parsed: (&I, SegmentOf<I>),
    found: &Found<'_, EntryOf<I>>,
    now: &Now<'_>,
) -> Result<Exit, Halt>
where
    I: Family,
    P: Packet + HandOver,
    T: TablesOf<I::Addr>,
    E: Env,
{
    let (ip, segment) = parsed;
    let cpu = tables.dest_cpu(found.dest).ok_or(Reason::Impossible)?;
    if forward::is_known(now.config, cpu, now.clock)
        && let Ok(word) = track::step::<ProtocolsOf<I>, _>(tables, found, (segment.flags(), From::Client), now)
    {
        let connection = Connection::of(word, found.dest);
        rewrite_to_server(packet, ip, Some(segment), connection, cpu)?;
        return forward::transmit(packet, env, &cpu.next_hop);
    }
    Err(Halt::go_on(Stage::Request))
}

/// A packet of a client for a service, of a connection that was there a moment ago. Its header checksum has been looked at.
///
/// # Errors
///
/// Why it does not get to a destination.
#[inline(always)]
pub fn request<I, P, T, E>(packet: &mut P, tables: &T, env: &E) -> Result<Exit, Halt>
where
    I: Family,
    P: Packet + HandOver,
    T: TablesOf<I::Addr>,
    E: Env,
{
    let now = &Now::of(tables.config().ok_or(Reason::Impossible)?, env);
    let (ip, segment) = &parse::whole::<I>(packet)?;
    let segment = *segment;
    let key = request_key(ip, segment);
    let place = Place::of(EntryOf::<I>::hash(&key, &tables.seed()));
    let Some(found) = flow_table::find::<EntryOf<I>>(tables, &key, place) else {
        return Err(Halt::go_on(Stage::Open));
    };
    if tables.dest(found.dest).is_some_and(|dest| track::is_left(now.config, dest, segment.flags())) {
        flow_table::release(tables, found.entry, found.word, found.dest);
        return Err(Halt::go_on(Stage::Open));
    }
    let Ok(word) = track::step::<ProtocolsOf<I>, _>(tables, &found, (segment.flags(), From::Client), now) else {
        return Err(Halt::go_on(Stage::Open));
    };
    let connection = Connection::of(word, found.dest);
    to_server(packet, tables, env, ip, Some(segment), connection, now)
}

/// A packet of a client for a service, of which no connection is known: opens one, if the packet may.
///
/// # Errors
///
/// Why it does not get to a destination.
#[inline(always)]
fn open<I, P, T, E>(packet: &mut P, tables: &T, env: &E) -> Result<Exit, Halt>
where
    I: Family,
    P: Packet + HandOver,
    T: TablesOf<I::Addr>,
    E: Stages<I, P, T>,
{
    let now = &Now::of(tables.config().ok_or(Reason::Impossible)?, env);
    let connection = open_connection::<I, P, T, E>(packet, tables, env, now)?;
    let connection = Connection(tables.hide(connection.0));
    // Verifier: parsed again, so that nothing of it takes up stack while the connection is opened.
    let (ip, segment) = &parse::whole::<I>(packet)?;
    let segment = *segment;
    to_server(packet, tables, env, ip, Some(segment), connection, now)
}

/// The connection that a client's packet belongs to.
#[inline(always)]
fn request_key<I: Ip>(ip: &I, segment: SegmentOf<I>) -> KeyOf<I> {
    KeyOf::<I>::from_raw(segment.live(), ip.source(), segment.ports(), ip.destination())
}

/// The connection that a client's packet belongs to and that another CPU has just opened, moved by it.
#[inline(always)]
fn join<I: Ip, T: TablesOf<I::Addr>>(
    tables: &T,
    segment: SegmentOf<I>,
    key: &KeyOf<I>,
    place: Place,
    now: &Now<'_>,
) -> Option<Connection> {
    let found = flow_table::find(tables, key, place)?;
    let word = track::step::<ProtocolsOf<I>, _>(tables, &found, (segment.flags(), From::Client), now).ok()?;
    Some(Connection::of(word, found.dest))
}

/// Opens a connection: chooses its destination and puts it into the table.
#[inline(always)]
fn open_connection<I, P, T, E>(packet: &P, tables: &T, env: &E, now: &Now<'_>) -> Result<Connection, Halt>
where
    I: Family,
    P: Packet + HandOver,
    T: TablesOf<I::Addr>,
    E: Stages<I, P, T>,
{
    let marked = service_of_mark::<I, P, T, E>(packet, tables, env, now);
    let (ip, segment) = &parse::whole::<I>(packet)?;
    let segment = *segment;
    let key = &request_key(ip, segment);
    let place = Place::of(EntryOf::<I>::hash(key, &tables.seed()));
    if !segment.opens(now.config.switches.load()) {
        return Err(Halt::go_on(Stage::Overflow));
    }
    let service = service_for(tables, marked, ip, segment)?;
    if service.view().is_none() {
        // A service that was here has left the port to one for all ports, if there is one.
        return Err(unless_marked(tables, Target::default()));
    }
    may_open(tables, now, ip, segment)?;
    let Some(view) = service.plain_view() else { return Err(Halt::go_on(Stage::Persist)) };
    let number = match env.pick(tables, view, Parties::of(key)) {
        Ok(number) => number,
        Err(Reason::NoDestination) => return Err(no_destination(now.config, By::Itself)),
        Err(reason) => return Err(reason.into()),
    };
    let dest = tables.dest(number).ok_or(Reason::Impossible)?;
    if ip.source().is_loopback() {
        stays_here::<I::Addr, T, E>(tables, env, now, dest, number)?;
    }
    let service_port = if dest.port() == Port::default() { flag::SERVICE_PORT } else { 0 };
    let birth = track::birth::<ProtocolsOf<I>>(now, segment.live(), segment.flags(), dest.method(), service_port);
    // Verifier: hidden, or it would follow what comes after once for every state that a connection may begin in.
    let birth = Word(tables.hide(birth.0));
    let inserted = if is_one_packet(tables, view, segment) {
        tables.pass_connection(number);
        Inserted::New
    } else {
        flow_table::insert(tables, &Insert { key, place, dest: number, birth, clock: now.clock, control: 0 })
    };
    match inserted {
        Inserted::New => {
            let cpu = tables.dest_cpu(number).ok_or(Reason::Impossible)?;
            cpu.counters.connections.update(|connections| connections + 1);
            Ok(Connection::of(birth, number))
        }
        Inserted::Full => Err(Halt::go_on(Stage::Overflow)),
        // Another CPU has just opened it with a packet of the same client, or is about to.
        Inserted::Contended => join::<I, T>(tables, segment, key, place, now).ok_or(Reason::FlowContended.into()),
    }
}

/// Whether a segment to the service of a view is scheduled by itself (`docs/ipvs.md`, section 4.12).
///
/// Verifier: hidden, or it would follow the rest of the path once for each protocol.
#[inline(always)]
pub(crate) fn is_one_packet(tables: &impl Tables, view: u32, segment: Segment<impl Protocols>) -> bool {
    let flags = tables.view(view).map_or(0, |view| view.flags.load());
    let one_packet =
        u64::from(flags & service_flag::ONE_PACKET) & segment.is(Protocol::Udp) << service_flag::ONE_PACKET.ilog2();
    tables.hide(one_packet) != 0
}

/// The service of the mark of a packet, if there are services of marks.
///
/// Verifier: before the packet is parsed, so that nothing of it takes up stack meanwhile.
#[inline(always)]
fn service_of_mark<I, P, T, E>(packet: &P, tables: &T, env: &E, now: &Now<'_>) -> Marked
where
    I: Family,
    P: Packet + HandOver,
    T: TablesOf<I::Addr>,
    E: Stages<I, P, T>,
{
    if now.config.reckon.load() & reckon::MARKS == 0 { Marked::NONE } else { env.marked(packet, tables) }
}

/// The service that a new connection is to: that of the packet's mark, else that of its destination.
#[inline(always)]
fn service_for<I: Ip>(
    tables: &impl TablesOf<I::Addr>,
    marked: Marked,
    ip: &I,
    segment: SegmentOf<I>,
) -> Result<Target, Reason> {
    if marked != Marked::NONE {
        return marked.target();
    }
    let key = EndpointOf::<I>::new(ip.destination(), segment.destination(), segment.protocol());
    Ok(endpoint::find(tables, key))
}

/// Whether a packet that would open a connection is one of those that ip_vs's `drop_packet` drops (`docs/ipvs.md`, section
/// 4.11).
///
/// Verifier: a function of its own with a hidden result, or it would follow the rest of the path once for each way to it.
#[inline(never)]
pub(crate) fn is_dropped(tables: &impl Tables, config: &Config) -> bool {
    let rate = config.drop_rate.load();
    let mut dropped = 0;
    if rate != 0
        && let Some(Limiter { drop_counter, .. }) = tables.limiter()
        && drop_counter.fetch_add(u32::MAX).wrapping_sub(1).cast_signed() <= 0
    {
        drop_counter.store(rate);
        dropped = 1;
    }
    tables.hide(dropped) != 0
}

/// Checks that a packet comes from where one may that opens a connection, and is not to be dropped.
///
/// # Errors
///
/// Why it may not.
#[inline(always)]
fn may_open<I: Ip>(tables: &impl Tables, now: &Now<'_>, ip: &I, segment: SegmentOf<I>) -> Result<(), Halt> {
    if is_dropped(tables, now.config) {
        return Err(Reason::DropPacket.into());
    }
    if !ip.source().is_host() {
        return Err(Reason::SourceAddress.into());
    }
    if segment.source() == endpoint::FTP_DATA {
        return Err(Reason::FtpDataSource.into());
    }
    Ok(())
}

/// A packet of a client that opens a connection to a persistent service, of which no connection is known: the client's template
/// says to which destination, or the scheduler, which says it for a new template, too.
///
/// # Errors
///
/// Where its path goes on, or why it opens none.
#[inline(always)]
fn persist<I, P, T, E>(packet: &P, tables: &T, env: &E) -> Result<Exit, Halt>
where
    I: Family,
    P: Packet + HandOver,
    T: TablesOf<I::Addr>,
    E: Stages<I, P, T>,
{
    let now = &Now::of(tables.config().ok_or(Reason::Impossible)?, env);
    open_persistent::<I, P, T, E>(packet, tables, env, now)?;
    Err(Halt::go_on(Stage::Opened))
}

/// A packet of a client that has just opened a connection. Nothing that is asked of packets of known connections is asked: under
/// `expire_nodest_conn` it would be taken for one that begins another, if the template's destination has weight 0.
///
/// # Errors
///
/// Why it does not get to a destination.
#[inline(always)]
fn opened<I, P, T, E>(packet: &mut P, tables: &T, env: &E) -> Result<Exit, Halt>
where
    I: Family,
    P: Packet + HandOver,
    T: TablesOf<I::Addr>,
    E: Env,
{
    let now = &Now::of(tables.config().ok_or(Reason::Impossible)?, env);
    let ip = &I::parse(packet)?;
    let segment = ip.segment(packet)?;
    let key = request_key(ip, segment);
    let place = Place::of(EntryOf::<I>::hash(&key, &tables.seed()));
    // Another CPU may have ended it.
    let found = flow_table::find::<EntryOf<I>>(tables, &key, place).ok_or(Reason::FlowContended)?;
    let connection = Connection::of(found.word, found.dest);
    to_server(packet, tables, env, ip, Some(segment), connection, now)
}

/// A persistent service, as a packet for it has found it.
#[derive(Clone, Copy)]
pub(crate) struct Persistent<'t> {
    /// The number of its view.
    pub(crate) number: u32,
    pub(crate) view: &'t View,
    /// How the packet has come to it.
    pub(crate) by: By,
}

impl<'t> Persistent<'t> {
    /// The persistent service that a packet is for, if any.
    #[inline(always)]
    fn find<I: Ip, T: TablesOf<I::Addr>>(
        tables: &'t T,
        marked: Marked,
        ip: &I,
        segment: SegmentOf<I>,
        nobody: Reason,
    ) -> Result<Self, Reason> {
        let (to, by) = if marked == Marked::NONE {
            endpoint::serving(tables, ip.destination(), segment.destination(), segment.protocol())
        } else {
            (marked.target()?, By::Mark)
        };
        match to.view() {
            Some(number) if to.has(Target::PERSISTENT) => {
                Ok(Self { number, view: tables.view(number).ok_or(Reason::Impossible)?, by })
            }
            _ => Err(nobody),
        }
    }

    /// Whether templates are for one port, and not for all of the address (`docs/ipvs.md`, section 6.1).
    #[inline(always)]
    fn is_of_one_port(&self, segment: Segment<impl Protocols>) -> bool {
        self.by == By::Itself && segment.destination() != endpoint::FTP
    }

    /// The template that a packet belongs to.
    #[inline(always)]
    fn template<I: Ip>(&self, ip: &I, segment: SegmentOf<I>) -> KeyOf<I> {
        self.template_between::<I>((ip.source(), ip.destination()), segment)
    }

    /// The template that packets of a client to a service belong to.
    #[inline(always)]
    pub(crate) fn template_between<I: Ip>(&self, ends: (I::Addr, I::Addr), segment: SegmentOf<I>) -> KeyOf<I> {
        let (client, service) = ends;
        let port = if self.is_of_one_port(segment) { segment.destination() } else { Port::default() };
        let clients = client.network(self.view.netmask.load());
        if self.by == By::Mark {
            // For all protocols, and all addresses and ports that have the mark.
            let mark = I::Addr::from_words([self.view.mark.load().to_be(), 0, 0, 0]);
            return KeyOf::<I>::template(0, clients, mark, port);
        }
        KeyOf::<I>::template(segment.protocol() as u8, clients, service, port)
    }

    /// Makes a template, whose connections go to this destination.
    #[inline(always)]
    pub(crate) fn make<E: Entry>(
        &self,
        tables: &impl Buckets<E>,
        key: &E::Key,
        (number, dest): (u32, &Dest),
        segment: Segment<impl Protocols>,
        now: &Now<'_>,
    ) -> Inserted {
        let port = if self.is_of_one_port(segment) { 0 } else { flag::SERVICE_PORT };
        // The flag of the template is that of the service, without a branch.
        const SHIFT: u32 = flow::template::ONE_PACKET.ilog2() - service_flag::ONE_PACKET.ilog2();
        let one_packet = u64::from(self.view.flags.load() & service_flag::ONE_PACKET) << SHIFT;
        let word = Word(tables.hide(Word::template(dest.method(), port | one_packet, now.clock.now).0));
        let made = &Made { word, timeout: self.view.persistence.load(), dest: number };
        template::make::<E>(tables, key, made, now.clock)
    }

    /// Whether packets reach the destination at the port that they are for, as a flag of the connection.
    #[inline(always)]
    pub(crate) fn service_port(&self, dest: &Dest) -> u64 {
        if self.by == By::Itself && dest.port() != Port::default() { 0 } else { flag::SERVICE_PORT }
    }
}

/// Opens a connection that a template controls.
#[inline(always)]
fn open_persistent<I, P, T, E>(packet: &P, tables: &T, env: &E, now: &Now<'_>) -> Result<(), Halt>
where
    I: Family,
    P: Packet + HandOver,
    T: TablesOf<I::Addr>,
    E: Stages<I, P, T>,
{
    let marked = service_of_mark::<I, P, T, E>(packet, tables, env, now);
    let (ip, segment) = &parse::whole::<I>(packet)?;
    let segment = *segment;
    let service = Persistent::find(tables, marked, ip, segment, Reason::NotService)?;
    let held = template_for::<I, P, T, E>(tables, env, ip, segment, service, now)?;
    let number = held.dest();
    if is_one_packet(tables, service.number, segment) {
        tables.let_go(held.number(), 0);
        return Err(Halt::go_on(Stage::PersistOverflow));
    }
    let dest = tables.dest(number).ok_or(Reason::Impossible)?;
    if ip.source().is_loopback()
        && let Err(halt) = stays_here::<I::Addr, T, E>(tables, env, now, dest, number)
    {
        tables.let_go(held.number(), 0);
        return Err(halt);
    }
    // Of UDP connections it has to be noticed when a server answers, masqueraded or not: that assures the template.
    let no_output = segment.is(Protocol::Udp) * flag::NO_OUTPUT;
    let flags = service.service_port(dest) | no_output | flag::CONTROLLED;
    let birth = track::birth::<ProtocolsOf<I>>(now, segment.live(), segment.flags(), dest.method(), flags);
    let birth = Word(tables.hide(birth.0));
    let key = &request_key(ip, segment);
    let place = Place::of(EntryOf::<I>::hash(key, &tables.seed()));
    let control = held.number();
    let insert = Insert { key, place, dest: number, birth, clock: now.clock, control };
    // Asked for while the template is held.
    let to_assure = if track::is_established(birth) { tables.template_word(control) } else { 0 };
    let inserted = flow_table::insert(tables, &insert);
    if inserted == Inserted::New {
        if to_assure != 0 {
            tables.assure(control, to_assure);
        }
        let cpu = tables.dest_cpu(number).ok_or(Reason::Impossible)?;
        cpu.counters.connections.update(|connections| connections + 1);
        return Ok(());
    }
    tables.let_go(held.number(), 0);
    if inserted == Inserted::Full {
        return Err(Halt::go_on(Stage::PersistOverflow));
    }
    // Another CPU has just opened it with a packet of the same client, or is about to.
    let found = flow_table::find_number(tables, key, place);
    Err(if found == 0 { Reason::FlowContended.into() } else { Halt::go_on(Stage::Request) })
}

/// The template that a packet belongs to, which is held then.
///
/// Verifier: when there is none that is valid, one is made, and the path begins anew: so what comes after is followed once.
///
/// # Errors
///
/// Why there is none, or where the path goes on.
#[inline(always)]
fn template_for<I, P, T, E>(
    tables: &T,
    env: &E,
    ip: &I,
    segment: SegmentOf<I>,
    service: Persistent<'_>,
    now: &Now<'_>,
) -> Result<Held, Halt>
where
    I: Family,
    P: Packet + HandOver,
    T: TablesOf<I::Addr>,
    E: Stages<I, P, T>,
{
    let key = &service.template(ip, segment);
    let clock = now.clock;
    let held = Held::from_bits(tables.hide(template::hold::<EntryOf<I>>(tables, key, clock.now.0, clock.hz).bits()));
    if held.is_some() {
        return Ok(held);
    }
    if held != Held::NONE {
        // Another CPU makes or ends it at this moment.
        return Err(Reason::FlowContended.into());
    }
    let number = match env.pick(tables, service.number, Parties::of(&request_key(ip, segment))) {
        Ok(number) => number,
        Err(Reason::NoDestination) => return Err(no_destination(now.config, service.by)),
        Err(reason) => return Err(reason.into()),
    };
    let dest = tables.dest(number).ok_or(Reason::Impossible)?;
    made(service.make(tables, key, (number, dest), segment, now))
}

/// What becomes of a packet for a service without a usable destination (`docs/ipvs.md`, section 2.5). What may be a data
/// connection of FTP may as well be one to this host.
#[inline(always)]
fn no_destination(config: &Config, by: By) -> Halt {
    if by == By::Ftp {
        return Reason::NotService.into();
    }
    if config.switches.load() & switch::CACHE_BYPASS != 0 {
        return Halt::go_on(Stage::Astray);
    }
    nobody_serves()
}

/// A packet for a service without a usable destination, under ip_vs's `cache_bypass`: one that has its service by a mark goes
/// where it is addressed to, unless that is this host (`docs/ipvs.md`, section 2.5). Or else one of a masqueraded server that
/// belongs to no connection, under `nat_icmp_send` (section 5.2).
///
/// # Errors
///
/// Why it is left to the host or dropped.
#[inline(always)]
fn astray<I, P, T, E>(packet: &P, tables: &T, env: &E) -> Result<Exit, Halt>
where
    I: Family,
    P: Packet + HandOver,
    T: TablesOf<I::Addr>,
    E: Stages<I, P, T>,
{
    let now = &Now::of(tables.config().ok_or(Reason::Impossible)?, env);
    let marked = service_of_mark::<I, P, T, E>(packet, tables, env, now);
    let ip = &I::parse(packet)?;
    let segment = ip.segment(packet)?;
    let once = tables.adjacency_cpu(0).ok_or(Reason::Impossible)?;
    let stays = env.route(ip.destination(), I::Addr::default(), once).is_ok() && forward::is_local(once);
    let stays = tables.hide(stays.into()) != 0;
    if marked.view()?.is_some() {
        let leaves = ip.destination().is_host() && !stays;
        return Err(if leaves { Reason::CacheBypass.into() } else { nobody_serves() });
    }
    let (to, port, protocol) = (ip.destination(), segment.destination(), segment.protocol());
    let (target, _) = endpoint::serving(tables, to, port, protocol);
    if target.view().is_some() {
        return Err(nobody_serves());
    }
    if stays || ip.ttl() <= 1 || segment.resets() || !ip.checksum_holds(packet) {
        return Err(Reason::NotService.into());
    }
    Err(Halt::tell(Reason::StrayReply, Complaint::STRAY_REPLY))
}

/// The client is told that nobody serves the port.
#[inline(always)]
const fn nobody_serves() -> Halt {
    Halt::tell(Reason::NoDestination, Complaint::PORT_UNREACHABLE)
}

/// A packet of a client for a service, of which no connection is known, where there is no room for one, or which opens
/// none.
///
/// Where both buckets are full, a destination is chosen that depends on nothing but the connection and the configuration, by
/// [`schedule::pick_alike`]. A packet that may open a connection does so in the place of one that makes room. Every other
/// one is forwarded all the same. So a connection that could not be stored, or that has made room before it was
/// established, goes on at one destination, as long as its buckets stay full.
///
/// # Errors
///
/// Why it does not get to a destination.
#[inline(always)]
fn overflow<I, P, T, E>(packet: &mut P, tables: &T, env: &E) -> Result<Exit, Halt>
where
    I: Family,
    P: Packet + HandOver,
    T: TablesOf<I::Addr>,
    E: Stages<I, P, T>,
{
    let now = &Now::of(tables.config().ok_or(Reason::Impossible)?, env);
    let connection = make_room::<I, P, T, E>(packet, tables, env, now)?;
    send_without_entry::<I, P, T, E>(packet, tables, env, connection, now)
}

/// Sends a packet of a client on its connection, which may be stored nowhere.
#[inline(always)]
fn send_without_entry<I, P, T, E>(
    packet: &mut P,
    tables: &T,
    env: &E,
    connection: Connection,
    now: &Now<'_>,
) -> Result<Exit, Halt>
where
    I: Family,
    P: Packet + HandOver,
    T: TablesOf<I::Addr>,
    E: Env,
{
    let connection = Connection(tables.hide(connection.0));
    let (ip, segment) = &parse::whole::<I>(packet)?;
    let segment = *segment;
    let exit = to_server(packet, tables, env, ip, Some(segment), connection, now)?;
    if connection.is_stateless() {
        tables.count_event(Event::Stateless);
    }
    Ok(exit)
}

/// The connection of a packet of which none is known: another has made room for it, or it is stored nowhere.
#[inline(always)]
fn make_room<I, P, T, E>(packet: &P, tables: &T, env: &E, now: &Now<'_>) -> Result<Connection, Halt>
where
    I: Family,
    P: Packet + HandOver,
    T: TablesOf<I::Addr>,
    E: Stages<I, P, T>,
{
    let marked = service_of_mark::<I, P, T, E>(packet, tables, env, now);
    let (ip, segment) = &parse::whole::<I>(packet)?;
    let segment = *segment;
    let key = &request_key(ip, segment);
    let place = Place::of(EntryOf::<I>::hash(key, &tables.seed()));
    let opens = segment.opens(now.config.switches.load());
    // What was asked of a packet that opens a connection has not been asked of others.
    let is_strange = !ip.source().is_host() || ip.source().is_loopback() || segment.source() == endpoint::FTP_DATA;
    if !opens && (is_strange || flow_table::has_room(tables, place, now.clock)) {
        return Err(Reason::NoConnection.into());
    }
    let Some(view) = service_for(tables, marked, ip, segment)?.plain_view() else {
        return Err(Halt::go_on(Stage::PersistOverflow));
    };
    let number = match env.pick_alike(tables, view, Parties::of(key), EntryOf::<I>::common_hash(key)) {
        Ok(number) => number,
        Err(Reason::NoDestination) if !opens => return Err(Reason::NoConnection.into()),
        Err(Reason::NoDestination) => return Err(no_destination(now.config, By::Itself)),
        Err(reason) => return Err(reason.into()),
    };
    let dest = tables.dest(number).ok_or(Reason::Impossible)?;
    if ip.source().is_loopback() {
        stays_here::<I::Addr, T, E>(tables, env, now, dest, number)?;
    }
    let service_port = if dest.port() == Port::default() { flag::SERVICE_PORT } else { 0 };
    let birth = track::birth::<ProtocolsOf<I>>(now, segment.live(), segment.flags(), dest.method(), service_port);
    // Verifier: hidden, or it would follow what comes after once for every state that a connection may begin in.
    let birth = Word(tables.hide(birth.0));
    if opens {
        tables.clear_way(place, now.clock, idle(now));
        match flow_table::insert(tables, &Insert { key, place, dest: number, birth, clock: now.clock, control: 0 }) {
            Inserted::New => {
                let cpu = tables.dest_cpu(number).ok_or(Reason::Impossible)?;
                cpu.counters.connections.update(|connections| connections + 1);
                return Ok(Connection::of(birth, number));
            }
            Inserted::Full => {}
            Inserted::Contended => {
                return join::<I, T>(tables, segment, key, place, now).ok_or(Reason::FlowContended.into());
            }
        }
    }
    if dest.method() == MASQ {
        // The replies could not be translated.
        return Err(if opens { Reason::TableFull } else { Reason::NoConnection }.into());
    }
    Ok(Connection::of(birth, number).stateless())
}

/// A packet of a client for a persistent service, of which no connection is known, where there is no room for one, or for the
/// template, or which opens none; or one of a UDP service whose packets are scheduled one by one, the way that its template goes.
///
/// What shall make room first does, if anything shall, and the connection is opened after all. Else the packet is forwarded as by
/// [`overflow`]; but to the destination of the client's template, or one that depends on nothing but the client's network, the
/// service and the configuration. So a client stays at one destination without a template, too, as long as it cannot have one.
///
/// # Errors
///
/// Why it does not get to a destination, or where its path goes on.
#[inline(always)]
fn persist_overflow<I, P, T, E>(packet: &mut P, tables: &T, env: &E) -> Result<Exit, Halt>
where
    I: Family,
    P: Packet + HandOver,
    T: TablesOf<I::Addr>,
    E: Stages<I, P, T>,
{
    let now = &Now::of(tables.config().ok_or(Reason::Impossible)?, env);
    let connection = stateless_persistent::<I, P, T, E>(packet, tables, env, now)?;
    send_without_entry::<I, P, T, E>(packet, tables, env, connection, now)
}

/// Makes a template for a packet for which something has made room. Its connections go where they would go without it: should it
/// have to make room again before they are established, they go on at the same destination.
///
/// # Errors
///
/// Where the path goes on, or why there is no template.
#[inline(always)]
fn persist_alike<I, P, T, E>(packet: &P, tables: &T, env: &E) -> Result<Exit, Halt>
where
    I: Family,
    P: Packet + HandOver,
    T: TablesOf<I::Addr>,
    E: Stages<I, P, T>,
{
    let now = &Now::of(tables.config().ok_or(Reason::Impossible)?, env);
    let marked = service_of_mark::<I, P, T, E>(packet, tables, env, now);
    let (ip, segment) = &parse::whole::<I>(packet)?;
    let segment = *segment;
    let service = Persistent::find(tables, marked, ip, segment, Reason::NotService)?;
    let key = &service.template(ip, segment);
    let common = EntryOf::<I>::common_hash(key);
    let number = match env.pick_alike(tables, service.number, Parties::of(key), common) {
        Ok(number) => number,
        Err(Reason::NoDestination) => return Err(no_destination(now.config, service.by)),
        Err(reason) => return Err(reason.into()),
    };
    let dest = tables.dest(number).ok_or(Reason::Impossible)?;
    made(service.make(tables, key, (number, dest), segment, now))
}

/// Where a path goes on after a template has been made, or not.
#[inline(always)]
fn made<R>(result: Inserted) -> Result<R, Halt> {
    match result {
        Inserted::New => Err(Halt::go_on(Stage::Persist)),
        Inserted::Full => Err(Halt::go_on(Stage::PersistOverflow)),
        Inserted::Contended => Err(Reason::FlowContended.into()),
    }
}

/// The connection of a packet for [`persist_overflow`], which is stored nowhere.
#[inline(always)]
fn stateless_persistent<I, P, T, E>(packet: &P, tables: &T, env: &E, now: &Now<'_>) -> Result<Connection, Halt>
where
    I: Family,
    P: Packet + HandOver,
    T: TablesOf<I::Addr>,
    E: Stages<I, P, T>,
{
    let marked = service_of_mark::<I, P, T, E>(packet, tables, env, now);
    let (ip, segment) = &parse::whole::<I>(packet)?;
    let segment = *segment;
    let opens = segment.opens(now.config.switches.load());
    let nobody = if opens { Reason::NotService } else { Reason::NoConnection };
    let service = Persistent::find(tables, marked, ip, segment, nobody)?;
    let one_packet = is_one_packet(tables, service.number, segment);
    let key = &service.template(ip, segment);
    let held = template::hold::<EntryOf<I>>(tables, key, now.clock.now.0, now.clock.hz);
    let held = Held::from_bits(tables.hide(held.bits()));
    let mut cleared = 0;
    if opens && !one_packet {
        // Either there is a template, and no room for the connection, or there is no room for a template.
        let place = if held.is_some() {
            Place::of(EntryOf::<I>::hash(&request_key(ip, segment), &tables.seed()))
        } else {
            EntryOf::<I>::template_place(key, &tables.seed())
        };
        cleared = tables.clear_way(place, now.clock, idle(now));
    }
    if held.is_some() {
        // Held until now, for it must not be what makes room for its own connection.
        tables.let_go(held.number(), 0);
    }
    if cleared != 0 {
        return Err(Halt::go_on(if held.is_some() { Stage::Persist } else { Stage::PersistAlike }));
    }
    let number = if held.is_some() {
        held.dest()
    } else {
        let common = EntryOf::<I>::common_hash(key);
        match env.pick_alike(tables, service.number, Parties::of(key), common) {
            Ok(number) => number,
            Err(Reason::NoDestination) if !opens => return Err(Reason::NoConnection.into()),
            Err(Reason::NoDestination) => return Err(no_destination(now.config, service.by)),
            Err(reason) => return Err(reason.into()),
        }
    };
    let dest = tables.dest(number).ok_or(Reason::Impossible)?;
    if ip.source().is_loopback() {
        stays_here::<I::Addr, T, E>(tables, env, now, dest, number)?;
    }
    let word = Word::new_born(segment.live(), dest.method(), service.service_port(dest), now.clock.now);
    if one_packet {
        tables.pass_connection(number);
        let cpu = tables.dest_cpu(number).ok_or(Reason::Impossible)?;
        cpu.counters.connections.update(|connections| connections + 1);
        return Ok(Connection::of(word, number));
    }
    if dest.method() == MASQ {
        // The replies could not be translated.
        return Err(if opens { Reason::TableFull } else { Reason::NoConnection }.into());
    }
    Ok(Connection::of(word, number).stateless())
}

/// How many ticks a UDP connection has left when half its time has passed without a packet.
#[inline(always)]
fn idle(now: &Now<'_>) -> u32 {
    const UDP: usize = timeout::index(Protocol::Udp, 0);
    now.config.timeouts[UDP].load() / 2
}

/// Checks that a destination is this host: packets from a loopback address go nowhere else (`docs/ipvs.md`, section 5.1).
#[inline(always)]
fn stays_here<A, T, E>(tables: &T, env: &E, now: &Now<'_>, dest: &Dest, number: u32) -> Result<(), Halt>
where
    A: Address,
    T: Tables,
    E: Env,
{
    let cpu = tables.dest_cpu(number).ok_or(Reason::Impossible)?;
    let load = tables.dest_load(number).ok_or(Reason::Impossible)?;
    forward::find_out::<A>(env, now.config, dest, load, cpu, now.clock)?;
    if forward::is_local(&cpu.next_hop) { Ok(()) } else { Err(Reason::SourceAddress.into()) }
}

/// Sends a packet of a client, or an ICMP error on its behalf (without `segment`), to its destination.
///
/// # Errors
///
/// Why it does not get there.
#[inline(always)]
pub fn to_server<I, P, T, E>(
    packet: &mut P,
    tables: &T,
    env: &E,
    ip: &I,
    segment: Option<SegmentOf<I>>,
    connection: Connection,
    now: &Now<'_>,
) -> Result<Exit, Halt>
where
    I: Family,
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
        let load = tables.dest_load(connection.dest()).ok_or(Reason::Impossible)?;
        if let Err(halt) = forward::find_out::<I::Addr>(env, now.config, dest, load, cpu, now.clock) {
            cpu.counters.count_in(ip.len());
            return Err(halt);
        }
        if forward::is_local(&cpu.next_hop) {
            cpu.counters.count_in(ip.len());
            return deliver(packet, ip, segment, connection, cpu);
        }
    }
    rewrite_to_server(packet, ip, segment, connection, cpu)?;
    forward::send(packet, env, &cpu.next_hop)
}

/// Makes the network layer of a packet of a client, or of an ICMP error on its behalf (without `segment`), what a
/// destination on another host is to get.
///
/// # Errors
///
/// Why the destination does not get it.
#[inline(always)]
fn rewrite_to_server<I: Family>(
    packet: &mut impl Packet,
    ip: &I,
    segment: Option<SegmentOf<I>>,
    connection: Connection,
    cpu: &DestCpu,
) -> Result<(), Halt> {
    let hop = &cpu.next_hop;
    cpu.counters.count_in(ip.len());
    match connection.method() {
        ROUTE => {
            may_be_forwarded(ip, segment.is_some(), hop.mtu.get())?;
            ip.lower_ttl(packet).ok_or(Reason::Impossible)?;
        }
        MASQ => {
            may_be_forwarded(ip, segment.is_some(), hop.mtu.get())?;
            let server = (cpu.addr::<I::Addr>(), server_port(connection, cpu, segment));
            nat::translate(packet, ip, segment, End::Destination, server, 1).ok_or(Reason::Impossible)?;
        }
        TUNNEL => {
            may_be_forwarded(ip, segment.is_some(), hop.mtu.get().saturating_sub(I::HEADER as u32))?;
            tunnel::encapsulate(packet, ip, hop.source(), cpu.addr::<I::Addr>())?;
        }
        _ => return Err(Reason::Impossible.into()),
    }
    Ok(())
}

/// The port of the server that a packet goes to.
#[inline(always)]
fn server_port(connection: Connection, cpu: &DestCpu, segment: Option<Segment<impl Protocols>>) -> Port {
    segment.map_or(Port::default(), |segment| connection.port(cpu.port(), segment.destination()))
}

/// Hands a packet of a client to a server on the director itself (`docs/ipvs.md`, section 5.6).
///
/// # Errors
///
/// When the server is masqueraded and the client is not on this host: the server's replies would not pass XDP.
#[inline(always)]
fn deliver<I: Family>(
    packet: &mut impl Packet,
    ip: &I,
    segment: Option<SegmentOf<I>>,
    connection: Connection,
    cpu: &DestCpu,
) -> Result<Exit, Halt> {
    if connection.method() == MASQ {
        let server = cpu.addr::<I::Addr>();
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
fn refuse_local(server: impl Address) -> Reason {
    if server.is_loopback() { Reason::LoopbackDestination } else { Reason::LocalMasquerade }
}

/// Checks TTL and size, in the order ip_vs does. Errors about errors are not sent.
#[inline(always)]
fn may_be_forwarded<I: Family>(ip: &I, tell: bool, mtu: u32) -> Result<(), Halt> {
    let halt = |reason, complaint| if tell { Halt::tell(reason, complaint) } else { Halt::silent(reason) };
    if ip.ttl() <= 1 {
        return Err(halt(Reason::TtlExpired, Complaint::TTL_EXPIRED));
    }
    if ip.len() <= mtu {
        return Ok(());
    }
    if ip.may_be_fragmented() {
        return Err(Reason::NeedsFragmentation.into());
    }
    if mtu < I::MTU_MIN {
        return Err(Reason::TooBig.into());
    }
    Err(halt(Reason::TooBig, Complaint::too_big(mtu)))
}

/// The word of a connection after this packet of its masqueraded server.
///
/// # Errors
///
/// Why it does not get to the client, or where its path goes on.
#[inline(always)]
fn replied<I: Ip, T: TablesOf<I::Addr>>(
    packet: &impl Packet,
    tables: &T,
    (ip, segment): (&I, SegmentOf<I>),
    found: &Found<'_, EntryOf<I>>,
    now: &Now<'_>,
) -> Result<Word, Halt> {
    if !ip.checksum_holds(packet) {
        return Err(Reason::IpChecksum.into());
    }
    if ip.ttl() <= 1 {
        // What the host would not forward changes nothing.
        return Err(Halt::go_on(Stage::Reply));
    }
    let step = (segment.flags(), From::Server);
    track::step::<ProtocolsOf<I>, _>(tables, found, step, now).map_err(|track::Gone| Reason::NotService.into())
}

/// A packet of the masqueraded server of a connection, as far as the way to its client is known.
#[inline(always)]
fn established_reply<I, P, T, E>(
    packet: &mut P,
    tables: &T,
    env: &E,
    parsed: (&I, SegmentOf<I>),
    connection: (&Found<'_, EntryOf<I>>, &KeyOf<I>),
) -> Result<Exit, Halt>
where
    I: Family,
    P: Packet + HandOver,
    T: TablesOf<I::Addr>,
    E: Env,
{
    let (found, key) = connection;
    let now = &Now::of(tables.config().ok_or(Reason::Impossible)?, env);
    let word = replied(packet, tables, parsed, found, now)?;
    // A connection's word is written once a second: often enough to ask for the way to its client again.
    if word == found.word
        && let Some(hop) = forward::known_way(tables, found, now.clock)
    {
        rewrite_to_client(packet, tables, parsed, found.dest, (key.vaddr(), key.vport()), hop)?;
        return forward::transmit(packet, env, hop);
    }
    Err(Halt::go_on(Stage::Reply))
}

/// A packet of a masqueraded server, which has moved its connection, and of which the way to its client has to be found
/// out.
///
/// # Errors
///
/// Why it does not get there.
#[inline(always)]
pub fn reply<I, P, T, E>(packet: &mut P, tables: &T, env: &E) -> Result<Exit, Halt>
where
    I: Family,
    P: Packet + HandOver,
    T: TablesOf<I::Addr>,
    E: Env,
{
    let (ip, segment) = &parse::whole::<I>(packet)?;
    let segment = *segment;
    let Some((found, key)) = find_replied::<I, T>(tables, ip, segment) else {
        return Err(Reason::NotService.into());
    };
    let service = (key.vaddr(), key.vport());
    let now = Now::of(tables.config().ok_or(Reason::Impossible)?, env);
    let source = forward::routed_as(now.config, service.0, ip.source());
    let hop = forward::find_way(tables, env, &found, (ip.destination(), source), now.clock)?;
    rewrite_to_client(packet, tables, (ip, segment), found.dest, service, hop)?;
    forward::send(packet, env, hop)
}

/// Makes the network layer of a packet of destination number `dest` what its client is to get, as from the service.
///
/// # Errors
///
/// [`Reason::ReplyRefused`] when the host is to tell the server why, and [`Reason::NeedsFragmentation`] when it would not:
/// it would fragment the packet and send it on as it is, untranslated.
#[inline(always)]
fn rewrite_to_client<I: Family>(
    packet: &mut impl Packet,
    tables: &impl Tables,
    parsed: (&I, SegmentOf<I>),
    dest: u32,
    service: (I::Addr, Port),
    hop: &NextHop,
) -> Result<(), Halt> {
    let (ip, segment) = parsed;
    let local = forward::is_local(hop);
    if !local && (ip.ttl() <= 1 || ip.len() > hop.mtu.get()) {
        let told = ip.ttl() <= 1 || !ip.may_be_fragmented();
        return Err(if told { Reason::ReplyRefused } else { Reason::NeedsFragmentation }.into());
    }
    count_out(tables, dest, ip.len());
    let hops = if local { 0 } else { 1 };
    nat::translate(packet, ip, Some(segment), End::Source, service, hops).ok_or(Reason::Impossible.into())
}

/// A packet of no service's address and port and of no masqueraded server, while there are services of marks, or at ports that
/// they do not name: one of a connection to such a service, or one that may open one.
///
/// # Errors
///
/// [`Reason::NotService`] when it is neither, or else why it does not get where it is to go, or where its path goes on.
#[inline(always)]
fn marked<I, P, T, E>(packet: &mut P, tables: &T, env: &E) -> Result<Exit, Halt>
where
    I: Family,
    P: Packet + HandOver,
    T: TablesOf<I::Addr>,
    E: Stages<I, P, T>,
{
    let (ip, segment) = &parse::whole::<I>(packet)?;
    let segment = *segment;
    let key = request_key(ip, segment);
    let place = Place::of(EntryOf::<I>::hash(&key, &tables.seed()));
    if let Some(found) = flow_table::find(tables, &key, place) {
        if !ip.checksum_holds(packet) {
            return Err(Reason::IpChecksum.into());
        }
        let now = &Now::of(tables.config().ok_or(Reason::Impossible)?, env);
        return to_known_server(packet, tables, env, (ip, segment), &found, now);
    }
    if let Some((found, _)) = find_replied::<I, T>(tables, ip, segment) {
        let now = &Now::of(tables.config().ok_or(Reason::Impossible)?, env);
        replied(packet, tables, (ip, segment), &found, now)?;
        // Verifier: the rest is done there, for here is no stack left for it.
        return Err(Halt::go_on(Stage::Reply));
    }
    let client = (ip.destination(), segment.destination());
    let key = KeyOf::<I>::new(segment.live(), client, (ip.source(), segment.source()));
    let place = Place::of(EntryOf::<I>::hash(&key, &tables.seed()));
    if flow_table::find::<EntryOf<I>>(tables, &key, place).is_some() {
        return Err(Halt::go_on(Stage::Observe));
    }
    let now = &Now::of(tables.config().ok_or(Reason::Impossible)?, env);
    let port_protocol = port_protocol(segment.destination(), segment.protocol());
    let is_of_mark = service_of_mark::<I, P, T, E>(packet, tables, env, now).view()?.is_some();
    if !is_of_mark && endpoint::any_port(tables, ip.destination(), port_protocol).0.view().is_none() {
        let told = now.config.switches.load() & switch::NAT_ICMP_SEND != 0;
        let from = EndpointOf::<I>::new(ip.source(), segment.source(), segment.protocol());
        return Err(if told && endpoint::find(tables, from).has(Target::SERVER) {
            Halt::go_on(Stage::Astray)
        } else {
            Reason::NotService.into()
        });
    }
    if !ip.checksum_holds(packet) {
        return Err(Reason::IpChecksum.into());
    }
    if is_of_mark {
        return Err(Halt::go_on(Stage::Open));
    }
    if !segment.opens(now.config.switches.load()) {
        return Err(Halt::go_on(Stage::Overflow));
    }
    may_open(tables, now, ip, segment)?;
    Err(Halt::go_on(Stage::Persist))
}

/// The masqueraded connection between `server` and `client`.
#[inline(always)]
pub fn find_masqueraded<'t, I: Ip, T: TablesOf<I::Addr>>(
    tables: &'t T,
    protocol: Protocol,
    server: (I::Addr, Port),
    client: (I::Addr, Port),
) -> Option<(Found<'t, EntryOf<I>>, KeyOf<I>)> {
    let key = KeyOf::<I>::new(ProtocolsOf::<I>::live(protocol), client, (I::Addr::default(), Port::default()));
    let place = Place::of(EntryOf::<I>::hash(&key, &tables.seed()));
    flow_table::find_reply(tables, &key, place, EndpointOf::<I>::new(server.0, server.1, protocol))
}

/// The masqueraded connection that a server's packet belongs to.
#[inline(always)]
fn find_replied<'t, I: Ip, T: TablesOf<I::Addr>>(
    tables: &'t T,
    ip: &I,
    segment: SegmentOf<I>,
) -> Option<(Found<'t, EntryOf<I>>, KeyOf<I>)> {
    let server = (ip.source(), segment.source());
    find_masqueraded::<I, T>(tables, segment.protocol(), server, (ip.destination(), segment.destination()))
}

/// A reply of a DR or tunnel server that happens to pass the director: it moves its connection and is left alone.
///
/// # Errors
///
/// [`Reason::NotService`] when it is none.
#[inline(always)]
pub fn observe<I, P, T, E>(packet: &P, tables: &T, env: &E) -> Result<Exit, Halt>
where
    I: Family,
    P: Packet,
    T: TablesOf<I::Addr>,
    E: Env,
{
    let (ip, segment) = &parse::whole::<I>(packet)?;
    let segment = *segment;
    let now = &Now::of(tables.config().ok_or(Reason::Impossible)?, env);
    let client = (ip.destination(), segment.destination());
    let key = KeyOf::<I>::new(segment.live(), client, (ip.source(), segment.source()));
    let place = Place::of(EntryOf::<I>::hash(&key, &tables.seed()));
    let found: Found<'_, EntryOf<I>> = flow_table::find(tables, &key, place).ok_or(Reason::NotService)?;
    if found.word.method() == MASQ {
        return Err(Reason::NotService.into());
    }
    let step = (segment.flags(), From::Server);
    track::step::<ProtocolsOf<I>, _>(tables, &found, step, now).map_err(|track::Gone| Reason::NotService)?;
    count_out(tables, found.dest, ip.len());
    Ok(Exit::host(Reason::ReplyObserved))
}

/// Counts a packet from a server, unless the destination has been removed (`docs/ipvs.md`, section 8.1).
#[inline(always)]
pub fn count_out(tables: &impl Tables, dest: u32, len: u32) {
    let available = tables.dest(dest).is_some_and(Dest::available);
    if let Some(cpu) = tables.dest_cpu(dest)
        && available
    {
        cpu.counters.count_out(len);
    }
}
