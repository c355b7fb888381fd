//! ICMP errors of which no connection is known: those about packets that were forwarded without one, and those that open one.

use lb_common::{
    abi::{Stage, Target, switch},
    addr::{Address as _, Port},
    event::Event,
    flow::{Entry as _, Key as _, Place, Word, flag},
    proto::{Method, Protocol},
    reason::Reason,
};

use crate::{
    endpoint::{self, By},
    env::HandOver,
    flow_table::{self, Insert, Inserted},
    forward::{Exit, Halt},
    icmp::{self, Quoted},
    packet::Packet,
    parse::{Ip, Segment},
    pipeline::{self, Connection, EntryOf, Family, KeyOf, Now, Persistent, SegmentOf, Stages},
    protocols::Protocols,
    schedule::Parties,
    tables::TablesOf,
    template::{self, Held},
};

/// How long a connection stays that an ICMP error has opened, if no packet follows, in seconds (`docs/ipvs.md`, section 4.3).
const LIFE_S: u32 = 3;

/// Who has spoken to whom, of what an error quotes.
struct Ends<I: Ip> {
    client: I::Addr,
    service: I::Addr,
    /// A segment of the client's.
    segment: SegmentOf<I>,
}

/// A segment of this protocol and with these ports, without flags.
#[inline(always)]
fn segment_between<S: Protocols>(protocol: Protocol, source: Port, destination: Port) -> Segment<S> {
    let ports = u32::from(source.raw()) | u32::from(destination.raw()) << 16;
    Segment::read(protocol as u8, ports, 0)
}

impl<I: Ip> Ends<I> {
    /// Of a packet of the service.
    #[inline(always)]
    fn of_reply(quoted: &Quoted<I>) -> Self {
        let ((service, vport), (client, cport)) = (quoted.source, quoted.destination);
        Self { client, service, segment: segment_between(quoted.protocol, cport, vport) }
    }

    /// Of a packet of the client.
    #[inline(always)]
    fn of_request(quoted: &Quoted<I>) -> Self {
        let ((client, cport), (service, vport)) = (quoted.source, quoted.destination);
        Self { client, service, segment: segment_between(quoted.protocol, cport, vport) }
    }

    #[inline(always)]
    fn key(&self) -> KeyOf<I> {
        let Self { client, service, segment } = *self;
        KeyOf::<I>::new(segment.live(), (client, segment.source()), (service, segment.destination()))
    }

    /// The service, as a view and as what it is persistent as, if it is.
    #[inline(always)]
    fn service<'t>(&self, tables: &'t impl TablesOf<I::Addr>) -> Result<(Persistent<'t>, bool), Reason> {
        let (port, protocol) = (self.segment.destination(), self.segment.protocol());
        let (to, by) = endpoint::serving(tables, self.service, port, protocol);
        let number = to.view().ok_or(Reason::Icmp)?;
        let view = tables.view(number).ok_or(Reason::Impossible)?;
        Ok((Persistent { number, view, by }, to.has(Target::PERSISTENT)))
    }
}

/// An ICMP error about a packet of a service, or of a client that was in a tunnel, of which no connection is known.
///
/// Where there is no room for the connection, its packets are forwarded without one, and the error goes the way that they go. One
/// about a service whose packets are scheduled one by one does so under `schedule_icmp`. Others may open a connection then.
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
    E: Stages<I, P, T>,
{
    let now = &Now::of(tables.config().ok_or(Reason::Impossible)?, env);
    let connection = Connection::from_bits(tables.hide(without_entry::<I, P, T, E>(packet, tables, env, now)?.bits()));
    // Verifier: parsed again, so that nothing of it takes up stack meanwhile.
    let ip = &I::parse(packet)?;
    if let Some(server) = ip.tunnelled_to(packet) {
        let quoted = &icmp::of_tunnelled(packet, ip).ok_or(Reason::Icmp)?;
        return icmp::tell_client(packet, tables, env, ip, quoted, (server, connection));
    }
    icmp::verify_header(packet, ip)?;
    let exit = pipeline::to_server(packet, tables, env, ip, None, connection, now)?;
    tables.count_event(Event::Stateless);
    Ok(exit)
}

/// The connection that an error is about, which is stored nowhere.
#[inline(always)]
fn without_entry<I, P, T, E>(packet: &P, tables: &T, env: &E, now: &Now<'_>) -> Result<Connection, Halt>
where
    I: Family,
    P: Packet + HandOver,
    T: TablesOf<I::Addr>,
    E: Stages<I, P, T>,
{
    let ip = &I::parse(packet)?;
    let tunnelled = ip.tunnelled_to(packet).is_some();
    let ends = &if tunnelled {
        Ends::of_request(&icmp::of_tunnelled(packet, ip).ok_or(Reason::Icmp)?)
    } else {
        Ends::of_reply(&icmp::of_reply(packet, ip).ok_or(Reason::Icmp)?)
    };
    let (service, persistent) = ends.service(tables)?;
    let schedules = now.config.switches.load() & switch::SCHEDULE_ICMP != 0 && !tunnelled;
    let mut key = ends.key();
    let place = Place::of(EntryOf::<I>::hash(&key, &tables.seed()));
    let one_by_one = schedules && pipeline::is_one_packet(tables, service.number, ends.segment);
    if !one_by_one && flow_table::has_room(tables, place, now.clock) {
        return Err(if schedules { Halt::go_on(Stage::RelatedOpen) } else { Reason::Icmp.into() });
    }
    let mut held = Held::NONE;
    if persistent {
        key = service.template_between::<I>((ends.client, ends.service), ends.segment);
        held = template::hold::<EntryOf<I>>(tables, &key, now.clock.now.0, now.clock.hz);
        held = Held::from_bits(tables.hide(held.bits()));
    }
    let number = if held.is_some() {
        tables.let_go(held.number(), 0);
        held.dest()
    } else {
        let common = EntryOf::<I>::common_hash(&key);
        match env.pick_alike(tables, service.number, Parties::of(&key), common) {
            Ok(number) => number,
            Err(Reason::NoDestination) => return Err(Reason::Icmp.into()),
            Err(reason) => return Err(reason.into()),
        }
    };
    let method = tables.dest(number).ok_or(Reason::Impossible)?.method();
    if method == Method::Masq as u8 {
        // Nothing is forwarded to it without a connection.
        return Err(Reason::Icmp.into());
    }
    let word = Word::born(Protocol::Tcp, 0, method, 0, now.clock.now);
    Ok(Connection::of(word, number))
}

/// An ICMP error about a packet of a service that opens a connection, under `schedule_icmp` (`docs/ipvs.md`, section 4.9). Nothing
/// is known of it but its ends.
///
/// # Errors
///
/// Where its path goes on, or why it opens none.
#[inline(always)]
pub fn open<I, P, T, E>(packet: &P, tables: &T, env: &E) -> Result<Exit, Halt>
where
    I: Family,
    P: Packet + HandOver,
    T: TablesOf<I::Addr>,
    E: Stages<I, P, T>,
{
    let now = &Now::of(tables.config().ok_or(Reason::Impossible)?, env);
    let ip = &I::parse(packet)?;
    icmp::verify_header(packet, ip)?;
    let ends = &Ends::of_reply(&icmp::of_reply(packet, ip).ok_or(Reason::Icmp)?);
    let (service, persistent) = ends.service(tables)?;
    if pipeline::is_dropped(tables, now.config) {
        return Err(Reason::DropPacket.into());
    }
    if !ends.client.is_host() || ends.client.is_loopback() || ends.segment.source() == endpoint::FTP_DATA {
        return Err(Reason::Icmp.into());
    }
    let mut held = Held::NONE;
    let template = &service.template_between::<I>((ends.client, ends.service), ends.segment);
    if persistent {
        held = template::hold::<EntryOf<I>>(tables, template, now.clock.now.0, now.clock.hz);
        held = Held::from_bits(tables.hide(held.bits()));
        if held == Held::CONTENDED {
            return Err(Reason::FlowContended.into());
        }
    } else if service.by != By::Itself {
        // Nobody serves the port.
        return Err(Reason::Icmp.into());
    }
    let key = &ends.key();
    let number = if held.is_some() {
        held.dest()
    } else {
        match env.pick(tables, service.number, Parties::of(key)) {
            Ok(number) => number,
            Err(Reason::NoDestination) if service.by == By::Ftp => return Err(Reason::Icmp.into()),
            Err(reason) => return Err(reason.into()),
        }
    };
    let dest = tables.dest(number).ok_or(Reason::Impossible)?;
    if persistent && !held.is_some() {
        // Then the path begins here again.
        return Err(match service.make(tables, template, (number, dest), ends.segment, now) {
            Inserted::New => Halt::go_on(Stage::RelatedOpen),
            Inserted::Full => Halt::go_on(Stage::Related),
            Inserted::Contended => Reason::FlowContended.into(),
        });
    }
    let controlled = if persistent { flag::CONTROLLED } else { 0 };
    // As when a packet of the client opens it: an answer by UDP assures the template.
    let waits = dest.method() != Method::Masq as u8 || persistent && ends.segment.is(Protocol::Udp) != 0;
    let no_output = if waits { flag::NO_OUTPUT } else { 0 };
    let flags = service.service_port(dest) | no_output | controlled | flag::INACTIVE;
    let until = now.clock.now.after(LIFE_S * now.clock.hz);
    let birth = Word(tables.hide(Word::born(ends.segment.protocol(), 0, dest.method(), flags, until).0));
    let place = Place::of(EntryOf::<I>::hash(key, &tables.seed()));
    let control = held.number();
    match flow_table::insert(tables, &Insert { key, place, dest: number, birth, clock: now.clock, control }) {
        Inserted::New => {
            let cpu = tables.dest_cpu(number).ok_or(Reason::Impossible)?;
            cpu.counters.connections.update(|connections| connections + 1);
            Err(Halt::go_on(Stage::Icmp))
        }
        other => {
            if held.is_some() {
                tables.let_go(held.number(), 0);
            }
            Err(if other == Inserted::Full { Halt::go_on(Stage::Related) } else { Reason::FlowContended.into() })
        }
    }
}
