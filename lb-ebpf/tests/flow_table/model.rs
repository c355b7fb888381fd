//! The flow table does what a plain map does, with any hashes.

use std::collections::BTreeMap;

use lb_common::{
    addr::Address as _,
    flow::{ENTRIES_PER_BUCKET, Entry, Entry4, Entry6, Key as _, Place, Word, flag, template},
    proto::Protocol,
    tcp::{self, Direction, Transition},
    timeout,
};
use lb_ebpf::{
    ageing::What,
    flow_table::{Buckets as _, Inserted},
    tables::Tables as _,
    track::From,
};
use proptest::{
    prelude::*,
    test_runner::{Config, RngSeed},
};

use crate::table::{ACK, FIN, Fate, HZ, IDLE, Opening, Packet, SYN, Table, Template, clock, host, key, template_key};

const CLIENTS: usize = 24;
const SERVICES: u8 = 3;
/// How long templates stay from each use on, in ticks.
const TIMEOUTS: [u32; 3] = [HZ, 100 * HZ, 400 * HZ];
/// How long they stay whose time was over while they controlled connections.
const RETRY: u32 = template::RETRY_S * HZ;
const FLAGS: [u8; 5] = [SYN, ACK, FIN, tcp::flag::RST, SYN | ACK];
/// Ticks: within the second that a connection's word may be behind, about it, and about timeouts of states.
const SPANS: [u32; 12] =
    [1, 100, HZ - 1, HZ, HZ + 1, 10 * HZ, 60 * HZ - 50, 60 * HZ, 61 * HZ, 120 * HZ - 50, 300 * HZ - 50, 900 * HZ - 50];

/// Something that happens to the table. Clients, services and destinations by their numbers.
#[derive(Clone, Copy, Debug)]
enum Action {
    /// A packet of a client: joins its connection or opens one. If there is no room, others may have to make some.
    Packet { udp: bool, client: usize, service: u8, dest: u32, flags: usize, displace: bool },
    /// The same for a persistent service; they have other numbers.
    Persistent { udp: bool, client: usize, service: u8, dest: u32, flags: usize, displace: bool, timeout: usize },
    /// An attempt to create a connection without a look whether there is one.
    Insert { udp: bool, client: usize, service: u8, dest: u32 },
    /// A packet of a destination to a client.
    Reply { udp: bool, client: usize, dest: u32, flags: usize },
    /// Time passes.
    Pass(usize),
    /// The timer looks at everything.
    Age,
    /// The connections to a destination are ended.
    Flush(u32),
}

fn action() -> impl Strategy<Value = Action> {
    let (udp, client, service, dest) = (prop::bool::weighted(0.2), 0..CLIENTS, 0..SERVICES, 0..8u32);
    prop_oneof![
        20 => (udp, client.clone(), service.clone(), dest.clone(), 0..FLAGS.len(), any::<bool>()).prop_map(
            |(udp, client, service, dest, flags, displace)| Action::Packet { udp, client, service, dest, flags, displace }
        ),
        14 => (udp, client.clone(), service.clone(), dest.clone(), 0..FLAGS.len(), any::<bool>(), 0..TIMEOUTS.len())
            .prop_map(|(udp, client, service, dest, flags, displace, timeout)| {
                Action::Persistent { udp, client, service: SERVICES + service, dest, flags, displace, timeout }
            }),
        3 => (udp, client.clone(), service, dest.clone())
            .prop_map(|(udp, client, service, dest)| Action::Insert { udp, client, service, dest }),
        6 => (udp, client, dest.clone(), 0..FLAGS.len())
            .prop_map(|(udp, client, dest, flags)| Action::Reply { udp, client, dest, flags }),
        4 => (0..SPANS.len()).prop_map(Action::Pass),
        2 => Just(Action::Age),
        1 => dest.prop_map(Action::Flush),
    ]
}

/// Hashes of clients, for either protocol: good ones, and the worst there are.
fn hashes() -> impl Strategy<Value = Vec<u64>> {
    let number = 2 * CLIENTS;
    // Hashes of different clients differ, if only in bits that nothing but the tag of a claim looks at.
    let alike = any::<u64>().prop_map(move |hash| (0..number as u64).map(|client| hash ^ client << 12).collect());
    let few = prop::collection::vec(any::<u64>(), 3).prop_map(move |hashes| {
        (0..number).map(|client| hashes[client % hashes.len()] ^ (client as u64) << 12).collect()
    });
    // One bucket from both halves, and every pair.
    let one_bucket = Just((0..number as u64).map(|client| client << 12 | (client * 43) & 0x3ff).collect());
    let any = prop::collection::vec(any::<u64>(), number);
    prop_oneof![any, alike, few, one_bucket]
}

/// What the model knows of a connection. All are masqueraded.
#[derive(Clone, Copy, Debug)]
struct Connection {
    dest: u32,
    state: u8,
    active: bool,
    /// When it is over, if no packet follows: not before this, and not a second later.
    over: u32,
}

/// What the model knows of a template.
#[derive(Clone, Copy, Debug)]
struct Known {
    dest: u32,
    timeout: u32,
    /// When its time is over.
    over: u32,
    assured: bool,
}

struct Model<E: Entry> {
    table: Table<E>,
    hashes: Vec<u64>,
    timeouts: [u32; 64],
    now: u32,
    connections: BTreeMap<Name, (E::Key, Connection)>,
    /// By client.
    templates: BTreeMap<u8, Known>,
}

/// What tells keys apart, in an order.
type Name = ([u32; 4], [u32; 4], u32, u8);

fn name<E: Entry>(key: &E::Key) -> Name {
    (key.caddr().words(), key.vaddr().words(), key.ports(), key.protocol() as u8)
}

fn protocol(udp: bool) -> Protocol {
    if udp { Protocol::Udp } else { Protocol::Tcp }
}

/// Whether connections with this key go by templates.
fn is_persistent<E: Entry>(key: &E::Key) -> bool {
    host(key.vaddr()) >= SERVICES
}

impl<E: Entry> Model<E> {
    fn new(buckets: usize, hashes: Vec<u64>) -> Self {
        let timeouts = timeout::defaults(HZ);
        Self {
            table: Table::new(buckets),
            hashes,
            timeouts,
            now: 0,
            connections: BTreeMap::new(),
            templates: BTreeMap::new(),
        }
    }

    fn place(&self, key: &E::Key) -> Place {
        let client = usize::from(host(key.caddr()));
        Place::of(self.hashes[client + if key.protocol() == Protocol::Udp { CLIENTS } else { 0 }])
    }

    fn opening(&self, key: E::Key, dest: u32, tcp_flags: u8) -> Opening<E::Key> {
        Opening { key, place: self.place(&key), dest, tcp_flags }
    }

    /// The connection, if it is in the table and a packet of now belongs to it; `Err` if that is uncertain, for its last
    /// second has begun.
    fn alive(&self, key: &E::Key) -> Result<Option<Connection>, Connection> {
        match self.connections.get(&name::<E>(key)) {
            Some((_, connection)) if self.now < connection.over => Ok(Some(*connection)),
            Some((_, connection)) if self.now < connection.over + HZ => Err(*connection),
            _ => Ok(None),
        }
    }

    /// What a packet makes of a connection, or of none.
    fn moved(
        &self,
        key: &E::Key,
        before: Option<Connection>,
        dest: u32,
        tcp_flags: u8,
        direction: Direction,
    ) -> Connection {
        let (state, active) = match key.protocol() {
            Protocol::Udp => (0, false),
            _ => {
                let moved = Transition::of(0, before.map_or(0, |before| before.state), tcp_flags, direction);
                (moved.state(), moved.is_active())
            }
        };
        let timeout = self.timeouts[timeout::index(key.protocol(), state)];
        Connection { dest: before.map_or(dest, |before| before.dest), state, active, over: self.now + timeout }
    }

    fn remember(&mut self, key: E::Key, connection: Connection) {
        self.connections.insert(name::<E>(&key), (key, connection));
    }

    /// Remembers what a packet has made of a connection that was there before, and of its template.
    fn go_on(&mut self, key: E::Key, before: Connection, after: Connection, direction: Direction) {
        const ESTABLISHED: u8 = tcp::State::Established as u8;
        let assures = match key.protocol() {
            Protocol::Tcp => after.state == ESTABLISHED && before.state != ESTABLISHED,
            _ => direction == Direction::Output,
        };
        if assures && is_persistent::<E>(&key) {
            self.templates.get_mut(&host(key.caddr())).expect("it controls the connection").assured = true;
        }
        self.remember(key, after);
    }

    /// Whether a SYN begins another connection: `docs/ipvs.md`, section 4.8.
    fn is_reused(connection: &Connection, tcp_flags: u8) -> bool {
        tcp_flags & SYN != 0 && [tcp::State::TimeWait as u8, tcp::State::Close as u8].contains(&connection.state)
    }

    /// Both buckets of this place are full of connections that are not over, or may be not.
    fn is_full(&self, place: Place) -> bool {
        let buckets = self.table.buckets();
        [place.first(buckets), place.second(buckets)].into_iter().all(|number| {
            let bucket = self.table.bucket(number).expect("a bucket");
            let used = bucket.entries().iter().filter(|entry| {
                let word = Word(entry.word().load());
                word.is_live() && (word.is_template() || !word.expired(clock(self.now).now, HZ))
            });
            used.count() == ENTRIES_PER_BUCKET
        })
    }

    /// Creates a connection. Returns whether there was room.
    fn create(&mut self, opening: &Opening<E::Key>, displace: bool) -> Result<bool, TestCaseError> {
        let full = self.is_full(opening.place);
        let mut inserted = self.table.insert(opening, clock(self.now));
        prop_assert_eq!(inserted, if full { Inserted::Full } else { Inserted::New });
        if full && displace {
            let before = self.table.connections();
            let templates = self.table.templates().len();
            inserted = self.table.displace(opening, clock(self.now));
            if inserted == Inserted::New {
                let gone = self.displaced(&before)?;
                let templates = templates - self.table.templates().len();
                // One has made room: a connection, perhaps with its template, or a template.
                prop_assert!(gone + templates > 0 && gone <= 1 && templates <= 1, "{} and {}", gone, templates);
            } else {
                prop_assert_eq!(inserted, Inserted::Full);
            }
        }
        if inserted == Inserted::New {
            let connection = self.moved(&opening.key, None, opening.dest, opening.tcp_flags, Direction::Input);
            self.remember(opening.key, connection);
        }
        Ok(inserted == Inserted::New)
    }

    /// How many connections have made room since there were these: none that is not over and has been established, or idle for
    /// less than it takes.
    fn displaced(&mut self, before: &[(E::Key, Word, u32)]) -> Result<usize, TestCaseError> {
        let after = self.table.connections();
        let mut gone = 0;
        for (key, ..) in before.iter().filter(|(key, ..)| !after.iter().any(|(other, ..)| other == key)) {
            gone += 1;
            let Some((key, connection)) = self.connections.remove(&name::<E>(key)) else { continue };
            if self.now >= connection.over {
                continue;
            }
            match key.protocol() {
                Protocol::Tcp => prop_assert_ne!(connection.state, tcp::State::Established as u8, "{:?}", key),
                _ => prop_assert!(connection.over <= self.now + IDLE + HZ, "{:?}: {:?}", key, connection),
            }
        }
        Ok(gone)
    }

    /// How many connections in the table the templates of clients control, whether or not their time is over.
    fn controlled(&self) -> BTreeMap<u8, usize> {
        let mut controlled = BTreeMap::new();
        for (key, ..) in self.table.connections().iter().filter(|(key, ..)| is_persistent::<E>(key)) {
            *controlled.entry(host(key.caddr())).or_default() += 1;
        }
        controlled
    }

    /// A packet of a client for a persistent service.
    fn persistent(&mut self, opening: &Opening<E::Key>, timeout: u32, displace: bool) -> Result<(), TestCaseError> {
        let Opening { key, place, dest, tcp_flags } = *opening;
        let client = host(key.caddr());
        let fate = if displace { Fate::new(timeout).displace() } else { Fate::new(timeout) };
        let alive = self.alive(&key);
        let known = self.templates.get(&client).copied();
        let controlled = self.controlled().contains_key(&client);
        let before = self.table.connections();
        let packet = self.table.persistent(opening, fate, clock(self.now));
        match packet {
            Packet::To(to) => {
                let (Ok(Some(connection)) | Err(connection)) = alive else {
                    return Err(TestCaseError::fail(format!("a packet of nobody joined {key:?}")));
                };
                prop_assert_eq!(to, connection.dest);
                let moved = self.moved(&key, Some(connection), to, tcp_flags, Direction::Input);
                self.go_on(key, connection, moved, Direction::Input);
            }
            Packet::Opened(to) => {
                let reused = matches!(alive, Ok(Some(connection)) if Self::is_reused(&connection, tcp_flags));
                prop_assert!(reused || !matches!(alive, Ok(Some(_))), "{:?} was opened twice", key);
                self.connections.remove(&name::<E>(&key));
                self.displaced(&before)?;
                let actual = self.table.template_of(client).expect("it controls the connection");
                prop_assert_eq!(to, actual.dest);
                let goes_on = match known {
                    Some(known) if self.now < known.over && !displace => true,
                    // It may have made room. Or what it controlled has made room, or has been found to be over.
                    Some(known) if self.now < known.over || controlled => to == known.dest,
                    _ => false,
                };
                let mut template = match known {
                    Some(known) if goes_on => {
                        prop_assert_eq!(to, known.dest);
                        known
                    }
                    _ => {
                        prop_assert_eq!(to, dest);
                        Known { dest, timeout, over: 0, assured: false }
                    }
                };
                if actual.word.has(template::RETRIED) {
                    prop_assert!(goes_on && (controlled || template.timeout == RETRY), "{:?}", actual);
                    template.timeout = RETRY;
                }
                // One made anew for the same destination cannot be told from one that went on otherwise.
                if displace || known.is_some_and(|known| self.now >= known.over) {
                    template.assured &= actual.word.has(template::ASSURED);
                    if !actual.word.has(template::RETRIED) && actual.word.expires() == clock(self.now + timeout).now {
                        template.timeout = timeout;
                    }
                }
                template.over = self.now + template.timeout;
                self.templates.insert(client, template);
                let connection = self.moved(&key, None, to, tcp_flags, Direction::Input);
                self.remember(key, connection);
            }
            Packet::Lost(how) => {
                prop_assert_eq!(how, Inserted::Full);
                let template = E::template_place(&template_key::<E>(client), &self.table.seed());
                prop_assert!(self.is_full(place) || self.is_full(template));
                if !matches!(alive, Ok(Some(connection)) if !Self::is_reused(&connection, tcp_flags)) {
                    self.connections.remove(&name::<E>(&key));
                }
                self.displaced(&before)?;
                if let Some(actual) = self.table.template_of(client) {
                    self.used_in_vain(client, actual, (dest, timeout));
                }
            }
        }
        Ok(())
    }

    /// A template was used, and perhaps made, for a connection that there was no room for.
    fn used_in_vain(&mut self, client: u8, actual: Template, (dest, timeout): (u32, u32)) {
        let known = self.templates.entry(client).or_insert(Known { dest, timeout, over: 0, assured: false });
        let fresh = Known { dest, timeout, over: self.now + timeout, assured: false };
        let is_fresh = actual.dest == dest && actual.word.0 >> 4 & 0xf == 0;
        if is_fresh && actual.word.expires() == clock(fresh.over).now {
            *known = fresh;
            return;
        }
        if actual.word.has(template::RETRIED) {
            known.timeout = RETRY;
        }
        known.over = self.now + known.timeout;
    }

    /// Compares templates with what they were before an action: how many connections they controlled, and whether they may
    /// have ended by it.
    fn check_templates(
        &mut self,
        controlled: &BTreeMap<u8, usize>,
        may_end: impl Fn(&Known) -> bool,
    ) -> Result<(), TestCaseError> {
        let mut actual: BTreeMap<u8, Template> = BTreeMap::new();
        for template in self.table.templates() {
            prop_assert!(!template.retired, "{:?}", template);
            prop_assert!(actual.insert(template.client, template).is_none(), "two of one client: {:?}", template);
        }
        let now = self.now;
        for (client, known) in std::mem::take(&mut self.templates) {
            let Some(template) = actual.remove(&client) else {
                prop_assert!(now >= known.over || may_end(&known), "{:?} of {} has ended", known, client);
                continue;
            };
            let mut known = known;
            let (expires, over) = (template.word.expires(), clock(known.over).now);
            if expires != over {
                // It was looked at when its time was over.
                prop_assert!(now >= known.over && controlled.contains_key(&client), "{:?}: {:?}", known, template);
                let later = expires.since(over).cast_unsigned();
                prop_assert!(later % RETRY == 0 && known.over + later > now && known.over + later <= now + RETRY);
                known.over += later;
                known.timeout = RETRY;
            }
            prop_assert_eq!(template.dest, known.dest);
            prop_assert_eq!(template.word.has(template::ASSURED), known.assured, "{:?}: {:?}", known, template);
            prop_assert!(!template.word.has(template::RETRIED) || known.timeout == RETRY);
            self.templates.insert(client, known);
        }
        prop_assert!(actual.is_empty(), "they are of nobody: {:?}", actual);
        Ok(())
    }

    fn act(&mut self, action: Action) -> Result<(), TestCaseError> {
        let now = clock(self.now);
        let controlled = self.controlled();
        match action {
            Action::Packet { udp, client, service, dest, flags, displace } => {
                let key = key::<E>(protocol(udp), client as u8, service);
                let flags = FLAGS[flags];
                let opening = self.opening(key, dest, flags);
                let before = match self.alive(&key) {
                    Err(connection) => self.join(&opening).then_some(connection),
                    Ok(None) => {
                        prop_assert!(!self.join(&opening), "a packet of nobody joined {:?}", key);
                        None
                    }
                    Ok(Some(connection)) => {
                        let joined = self.join(&opening);
                        let reused = !udp && Self::is_reused(&connection, flags);
                        prop_assert_eq!(joined, !reused, "{:?} {:?}", key, connection);
                        joined.then_some(connection)
                    }
                };
                match before {
                    Some(connection) => {
                        let moved = self.moved(&key, Some(connection), dest, flags, Direction::Input);
                        self.go_on(key, connection, moved, Direction::Input);
                    }
                    None => {
                        self.connections.remove(&name::<E>(&key));
                        self.create(&opening, displace)?;
                    }
                }
            }
            Action::Persistent { udp, client, service, dest, flags, displace, timeout } => {
                let key = key::<E>(protocol(udp), client as u8, service);
                let opening = self.opening(key, dest, FLAGS[flags]);
                self.persistent(&opening, TIMEOUTS[timeout], displace)?;
            }
            Action::Insert { udp, client, service, dest } => {
                let key = key::<E>(protocol(udp), client as u8, service);
                let opening = self.opening(key, dest, SYN);
                if self.table.find(&key, opening.place).is_some_and(|found| !found.word.expired(now.now, HZ)) {
                    // There is one: whether or not there is room for another, none is made.
                    prop_assert_ne!(self.table.insert(&opening, now), Inserted::New);
                } else {
                    self.connections.remove(&name::<E>(&key));
                    self.create(&opening, false)?;
                }
            }
            Action::Reply { udp, client, dest, flags } => {
                let client = key::<E>(protocol(udp), client as u8, 0);
                let of_client =
                    |other: &E::Key| (other.protocol(), other.caddr()) == (client.protocol(), client.caddr());
                let certain = self
                    .connections
                    .values()
                    .any(|(key, connection)| of_client(key) && connection.dest == dest && self.now < connection.over);
                match self.table.find_reply(&client, self.place(&client), dest) {
                    None => prop_assert!(!certain, "a reply of {} to {:?} belongs to nobody", dest, client),
                    Some((found, key)) => {
                        prop_assert_eq!(found.dest, dest);
                        let known = self.connections.get(&name::<E>(&key)).copied();
                        let Some((_, connection)) = known else { return Err(TestCaseError::fail("found nobody")) };
                        prop_assert_eq!(connection.dest, dest);
                        let alive = self.now < connection.over;
                        let over = self.now >= connection.over + HZ;
                        match self.table.step(&found, FLAGS[flags], From::Server, now) {
                            Ok(_) => {
                                prop_assert!(!over);
                                let moved = self.moved(&key, Some(connection), dest, FLAGS[flags], Direction::Output);
                                self.go_on(key, connection, moved, Direction::Output);
                            }
                            Err(_) => {
                                prop_assert!(!alive);
                                self.connections.remove(&name::<E>(&key));
                            }
                        }
                    }
                }
            }
            Action::Pass(span) => self.now += SPANS[span],
            Action::Age => {
                self.table.sweep(What::over(now));
                let now = self.now;
                self.connections.retain(|_, (_, connection)| now < connection.over + HZ);
                prop_assert_eq!(self.check()?, self.table.connections().len());
            }
            Action::Flush(dest) => {
                self.table.sweep(What::dest(dest));
                self.connections.retain(|_, (_, connection)| connection.dest != dest);
                prop_assert!(self.table.audit().keys().all(|left| *left != dest));
            }
        }
        self.check_templates(&controlled, |known| match action {
            // None that is assured makes room.
            Action::Packet { displace: true, .. } | Action::Persistent { displace: true, .. } => !known.assured,
            Action::Flush(dest) => known.dest == dest,
            _ => false,
        })?;
        if let Action::Age = action {
            let now = self.now;
            prop_assert!(self.templates.values().all(|known| now < known.over), "{:?}", self.templates);
        }
        self.check().map(drop)
    }

    /// Whether a packet of a client belongs to a connection, which it moves then.
    fn join(&self, opening: &Opening<E::Key>) -> bool {
        let Some(found) = self.table.find(&opening.key, opening.place) else { return false };
        let known = self.connections.get(&name::<E>(&opening.key)).map(|(_, connection)| connection.dest);
        assert_eq!(Some(found.dest), known, "{:?}", opening.key);
        self.table.step(&found, opening.tcp_flags, From::Client, clock(self.now)).is_ok()
    }

    /// Compares all of the table with all of the model. Returns how many connections they have in common.
    fn check(&mut self) -> Result<usize, TestCaseError> {
        self.table.audit();
        let mut found = BTreeMap::new();
        for (key, word, dest) in self.table.connections() {
            found.insert(name::<E>(&key), ());
            // A connection that is over may be in the table still, whatever the model has forgotten of it.
            let Some((_, connection)) = self.connections.get(&name::<E>(&key)) else {
                prop_assert!(word.expired(clock(self.now).now, HZ), "{:?} {:?} is of nobody", key, word);
                continue;
            };
            prop_assert_eq!(dest, connection.dest);
            prop_assert_eq!(
                (word.state(), !word.has(flag::INACTIVE)),
                (connection.state, connection.active),
                "{:?}",
                key
            );
            let behind = clock(connection.over).now.since(word.expires());
            prop_assert!((0..=HZ as i32).contains(&behind), "{:?} is {} ticks behind", key, behind);
        }
        // What is not over is there; what is over may have made room.
        let now = self.now;
        for (name, (key, connection)) in &self.connections {
            prop_assert!(now >= connection.over || found.contains_key(name), "{:?} {:?} is lost", key, connection);
        }
        self.connections.retain(|name, _| found.contains_key(name));
        Ok(self.connections.len())
    }
}

proptest! {
    #![proptest_config(Config {
        failure_persistence: None,
        // What this notices, it notices every time.
        rng_seed: RngSeed::Fixed(0x1234),
        ..Config::with_cases(if cfg!(miri) { 2 } else { 500 })
    })]

    #[test]
    fn the_table_is_a_map(
        buckets in prop_oneof![Just(2usize), Just(4), Just(6)],
        hashes in hashes(),
        actions in prop::collection::vec(action(), 1..if cfg!(miri) { 30 } else { 300 }),
    ) {
        let mut model = Model::<Entry4>::new(buckets, hashes.clone());
        let mut model6 = Model::<Entry6>::new(buckets, hashes);
        for action in actions {
            model.act(action)?;
            model6.act(action)?;
        }
    }
}
