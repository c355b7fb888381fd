//! A small flow table with everything that the code under test asks of the tables around it.

use bytemuck::{Zeroable, allocation::zeroed_slice_box};
use lb_common::{
    abi::{
        Adjacency, CacheEntry, Config, Cursor, Dest, DestCpu, DestLoad, DestRecord, EndpointKey as _, Limiter, NextHop,
        Record as _, SlotLine, View, slot, switch,
    },
    addr::{Address, Ip4, Port},
    event::Event,
    flow::{
        Bucket, ENTRIES_PER_BUCKET, Endpoint, Entry, Entry4, Key as _, Key4, Place, Purpose, Word, control, flag,
        template,
    },
    hash::Seed,
    jiffies::Jiffies,
    mark::{Marks, Rule, Start},
    proto::{Method, Protocol},
    tcp, timeout,
};
use lb_ebpf::{
    ageing::{Sweep, Thinning, What},
    audit,
    env::Clock,
    flow_table::{self, Buckets, Found, Insert, Inserted},
    pipeline::Now,
    protocols::TcpUdp,
    tables::Tables,
    template::{self as templates, Held, Made},
    track::{self, From, Gone},
};

/// Ticks per second.
pub(crate) const HZ: u32 = 250;
/// What is left of the time of a UDP connection that makes room, in ticks.
pub(crate) const IDLE: u32 = 100 * HZ;
/// How many destinations there are. Their addresses are 10.0.0.NUMBER.
pub(crate) const DESTS: u32 = 64;

/// The table, its counters, its destinations and its settings.
pub(crate) struct Table<E = Entry4> {
    flows: Box<[Bucket<E>]>,
    loads: Box<[DestLoad]>,
    dests: Box<[Dest]>,
    config: Box<[Config]>,
}

/// A connection to be opened: who, and to which destination.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Opening<K = Key4> {
    pub(crate) key: K,
    pub(crate) place: Place,
    pub(crate) dest: u32,
    /// The flags of its first segment; none for UDP.
    pub(crate) tcp_flags: u8,
}

/// What becomes of templates, and for them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fate {
    /// How long they stay from each use on, in ticks.
    timeout: u32,
    /// Whether others make room when there is none.
    displace: bool,
}

impl Fate {
    pub(crate) const fn new(timeout: u32) -> Self {
        Self { timeout, displace: false }
    }

    pub(crate) const fn displace(self) -> Self {
        Self { displace: true, ..self }
    }
}

/// What a packet came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Packet {
    /// It belongs to a connection to this destination.
    To(u32),
    /// It opened a connection to this destination.
    Opened(u32),
    /// It belongs to none, and there was no room for one, or others were quicker.
    Lost(Inserted),
}

/// A host of a network, as the last octets of its address.
fn address<A: Address>(network: [u8; 2], host: u8) -> A {
    let word = u32::from_ne_bytes([10, network[0], network[1], host]);
    A::from_words(if A::FAMILY == Ip4::FAMILY { [word, 0, 0, 0] } else { [1, 2, 3, word] })
}

/// The number of the host in an [`address`].
pub(crate) fn host(address: impl Address) -> u8 {
    address.words().into_iter().rfind(|word| *word != 0).map_or(0, |word| word.to_ne_bytes()[3])
}

/// The connections of `protocol` between a client and a service, by their numbers.
pub(crate) fn key<E: Entry>(protocol: Protocol, client: u8, service: u8) -> E::Key {
    let client = (address([1, 0], client), Port::new(40_000));
    E::Key::new(protocol, client, (address([9, 9], service), Port::new(80)))
}

/// The template of a client, by its number.
pub(crate) fn template_key<E: Entry>(client: u8) -> E::Key {
    E::Key::template(Protocol::Tcp as u8, address([1, 0], client), address([9, 9], 0), Port::new(80))
}

/// A template as the table has it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Template {
    /// The number of its entry, plus one.
    pub(crate) number: u32,
    /// Its client, by number.
    pub(crate) client: u8,
    pub(crate) word: Word,
    pub(crate) dest: u32,
    pub(crate) retired: bool,
}

/// Where the destination with this number listens.
fn server<E: Entry>(dest: u32, protocol: Protocol) -> Endpoint<E> {
    Endpoint::<E>::new(address([0, 0], dest as u8), Port::new(8080), protocol)
}

/// The time `ticks` after the clock began, which wraps soon after.
pub(crate) fn clock(ticks: u32) -> Clock {
    Clock { now: Jiffies((u32::MAX - 500).wrapping_add(ticks)), hz: HZ }
}

impl<E: Entry> Table<E> {
    /// An empty table.
    pub(crate) fn new(buckets: usize) -> Self {
        let table = Self {
            flows: zeroed_slice_box(buckets),
            loads: zeroed_slice_box(DESTS as usize),
            dests: zeroed_slice_box(DESTS as usize),
            config: zeroed_slice_box(1),
        };
        for (number, dest) in (0..).zip(&table.dests) {
            let addr = address::<E::Addr>([0, 0], number).words();
            let port_method = u32::from(Port::new(8080).raw()) | u32::from(Method::Masq as u8) << 16;
            let record = DestRecord { addr, port_method, weight: 1, state: slot::USED, ..Zeroable::zeroed() };
            dest.store(&record);
        }
        for (shared, timeout) in table.config[0].timeouts.iter().zip(timeout::defaults(HZ)) {
            shared.store(timeout);
        }
        table.config[0].conn_reuse_mode.store(1);
        table
    }

    /// Makes it as new. Every word keeps its address.
    pub(crate) fn clear(&self) {
        for entry in self.flows.iter().flat_map(Bucket::entries) {
            entry.fill(&key::<E>(Protocol::Tcp, 0, 0), 0, 0);
            entry.word().store(0);
        }
        for load in &self.loads {
            load.connections.store(0);
            load.templates.store(0);
        }
        self.dests.iter().for_each(|dest| dest.weight.store(1));
    }

    /// Gives a destination weight 0, which sends clients away that have templates.
    pub(crate) fn quiesce(&self, dest: u32) {
        self.config[0].switches.store(switch::EXPIRE_QUIESCENT_TEMPLATE);
        self.dests[dest as usize].weight.store(0);
    }

    fn now(&self, clock: Clock) -> Now<'_> {
        Now { config: &self.config[0], clock }
    }

    fn birth<'k>(&self, opening: &'k Opening<E::Key>, held: Held, clock: Clock) -> Insert<'k, E> {
        let Opening { ref key, place, mut dest, tcp_flags } = *opening;
        let mut flags = 0;
        if held.is_some() {
            dest = held.dest();
            flags = flag::CONTROLLED | if key.protocol() == Protocol::Udp { flag::NO_OUTPUT } else { 0 };
        }
        let birth =
            track::birth::<TcpUdp>(&self.now(clock), key.protocol().into(), tcp_flags, Method::Masq as u8, flags);
        Insert { key, place, dest, birth, clock, control: held.number() }
    }

    /// Creates a connection that has not been found.
    pub(crate) fn insert(&self, opening: &Opening<E::Key>, clock: Clock) -> Inserted {
        flow_table::insert(self, &self.birth(opening, Held::NONE, clock))
    }

    /// Creates a connection that has not been found and that there is no room for.
    pub(crate) fn displace(&self, opening: &Opening<E::Key>, clock: Clock) -> Inserted {
        self.clear_way(opening.place, clock);
        self.insert(opening, clock)
    }

    /// The connection, if there is one; it may be past its time.
    pub(crate) fn find(&self, key: &E::Key, place: Place) -> Option<Found<'_, E>> {
        flow_table::find(self, key, place)
    }

    /// The connection between the client of `key` and the destination with this number, and its whole key.
    pub(crate) fn find_reply(&self, key: &E::Key, place: Place, dest: u32) -> Option<(Found<'_, E>, E::Key)> {
        flow_table::find_reply(self, key, place, server::<E>(dest, key.protocol()))
    }

    /// Lets a packet change the connection that was found for it.
    pub(crate) fn step(&self, found: &Found<'_, E>, tcp_flags: u8, from: From, clock: Clock) -> Result<Word, Gone> {
        track::step::<TcpUdp, _>(self, found, (tcp_flags, from), &self.now(clock))
    }

    /// Lets a packet change the connection that it belongs to, and returns its destination.
    fn join(&self, opening: &Opening<E::Key>, clock: Clock) -> Option<u32> {
        let found = self.find(&opening.key, opening.place)?;
        self.step(&found, opening.tcp_flags, From::Client, clock).ok()?;
        Some(found.dest)
    }

    /// Does what the pipeline does with a packet of a client.
    pub(crate) fn packet(&self, opening: &Opening<E::Key>, clock: Clock) -> Packet {
        if let Some(dest) = self.join(opening, clock) {
            return Packet::To(dest);
        }
        match self.insert(opening, clock) {
            Inserted::New => Packet::Opened(opening.dest),
            Inserted::Contended => self.join(opening, clock).map_or(Packet::Lost(Inserted::Contended), Packet::To),
            Inserted::Full => Packet::Lost(Inserted::Full),
        }
    }

    /// Makes room for an entry with this place, if anything may make room. Returns whether there is some.
    pub(crate) fn clear_way(&self, place: Place, clock: Clock) -> bool {
        flow_table::clear_way(self, place, clock, IDLE) != 0
    }

    /// Makes a template, which stays for so many ticks from each use on.
    pub(crate) fn make(&self, client: u8, dest: u32, timeout: u32, clock: Clock) -> Inserted {
        let word = Word::template(Method::Masq as u8, 0, clock.now);
        templates::make(self, &template_key::<E>(client), &Made { word, timeout, dest }, clock)
    }

    /// Holds a client's template, which is used once more.
    pub(crate) fn hold(&self, client: u8, clock: Clock) -> Held {
        templates::hold(self, &template_key::<E>(client), clock.now.0, clock.hz)
    }

    /// A template that is held already.
    pub(crate) fn held(&self, template: Template) -> Held {
        Held::from_bits(u64::from(template.dest) | u64::from(template.number) << 32)
    }

    /// Lets go of a template. Returns whether that has ended it.
    pub(crate) fn let_go(&self, held: Held, how: u64) -> bool {
        templates::let_go(self, held.number(), how) != 0
    }

    /// Does what the pipeline does with a packet of a client for a persistent service: opens a connection to the destination of
    /// its template, which is made for that of `opening` when there is none.
    pub(crate) fn persistent(&self, opening: &Opening<E::Key>, fate: Fate, clock: Clock) -> Packet {
        let client = host(opening.key.caddr());
        let template = E::template_place(&template_key::<E>(client), &self.seed());
        if let Some(dest) = self.join(opening, clock) {
            return Packet::To(dest);
        }
        // Room for a template, and for a connection; and each once more, when others have taken it.
        let mut ways = if fate.displace { 4 } else { 0 };
        let mut make_room = |place| {
            let may = ways > 0;
            ways -= i32::from(may);
            may && self.clear_way(place, clock)
        };
        // Two templates may come and go meanwhile.
        for _ in 0..7 {
            let held = self.hold(client, clock);
            if held.is_some() {
                let inserted = flow_table::insert(self, &self.birth(opening, held, clock));
                if inserted == Inserted::New {
                    return Packet::Opened(held.dest());
                }
                // Held until then, for it must not be what makes room.
                let cleared = inserted == Inserted::Full && make_room(opening.place);
                self.let_go(held, 0);
                match inserted {
                    Inserted::Full if cleared => continue,
                    Inserted::Full => return Packet::Lost(Inserted::Full),
                    _ => return self.join(opening, clock).map_or(Packet::Lost(Inserted::Contended), Packet::To),
                }
            }
            let made = if held == Held::NONE {
                self.make(client, opening.dest, fate.timeout, clock)
            } else {
                Inserted::Contended
            };
            match made {
                Inserted::New => {}
                Inserted::Full if make_room(template) => {}
                other => return Packet::Lost(other),
            }
        }
        Packet::Lost(Inserted::Contended)
    }

    /// Ends connections of all buckets. Returns how many.
    pub(crate) fn sweep(&self, what: What) -> u64 {
        let mut sweep = Sweep { tables: self, first: 0, what, thinning: Thinning::NONE, ended: 0 };
        (0..self.buckets()).for_each(|index| sweep.bucket::<E>(index, what));
        sweep.ended
    }

    /// The connections that the table holds, whether or not their time is over.
    pub(crate) fn connections(&self) -> Vec<(E::Key, Word, u32)> {
        audit::connections(&self.flows).expect("at rest, every connection has one entry")
    }

    /// The entry with this number, which counts from one.
    fn entry(&self, number: u32) -> &E {
        let (bucket, index) = ((number - 1) as usize / ENTRIES_PER_BUCKET, (number - 1) as usize % ENTRIES_PER_BUCKET);
        &self.flows[bucket].entries()[index]
    }

    /// The template with this number, if it is one.
    pub(crate) fn template(&self, number: u32) -> Option<Template> {
        let entry = self.entry(number);
        let word = Word(entry.word().load());
        let key = entry.key(word);
        let (client, retired) = (host(key.caddr()), Purpose::of(&key).is_retired());
        let is_template = word.is_live() && word.is_template();
        is_template.then(|| Template { number, client, word, dest: entry.dest().load(), retired })
    }

    /// The templates that the table holds, whether or not their time is over.
    pub(crate) fn templates(&self) -> Vec<Template> {
        (1..=(self.flows.len() * ENTRIES_PER_BUCKET) as u32).filter_map(|number| self.template(number)).collect()
    }

    /// The template of a client that new connections would go by, if there is one.
    pub(crate) fn template_of(&self, client: u8) -> Option<Template> {
        self.templates().into_iter().find(|template| template.client == client && !template.retired)
    }

    /// Active and all connections of every destination, which must be what the counters say. Everything else that is to hold
    /// at rest is checked, too.
    pub(crate) fn audit(&self) -> audit::Connections {
        for entry in self.flows.iter().flat_map(Bucket::entries) {
            let word = Word(entry.word().load());
            if word.is_live() && !word.is_template() && word.has(flag::CONTROLLED) {
                let template = self.template(entry.control().load()).expect("a template that controls stays");
                let of = (template.client, template.dest);
                assert_eq!((host(entry.key(word).caddr()), entry.dest().load()), of, "the template is its own");
            }
        }
        for template in self.templates() {
            let held = control::holders(self.entry(template.number).control().load());
            let left = template.word.has(template::DOOMED) && held == Some(0);
            assert!(!left, "{template:?} is doomed, and controls nothing");
        }
        audit::check(&self.flows, &self.loads).expect("at rest, the table and its counters agree")
    }
}

/// The first segment of a connection.
pub(crate) const SYN: u8 = tcp::flag::SYN;
/// A segment in the middle of one.
pub(crate) const ACK: u8 = tcp::flag::ACK;
/// The last segment of one side.
pub(crate) const FIN: u8 = tcp::flag::FIN | tcp::flag::ACK;

impl<E: Entry> Tables for Table<E> {
    fn seed(&self) -> Seed {
        Seed::new([0; 3])
    }
    fn endpoint_buckets(&self) -> u32 {
        0
    }
    fn config(&self) -> Option<&Config> {
        self.config.first()
    }
    fn limiter(&self) -> Option<&Limiter> {
        None
    }
    fn view(&self, _: u32) -> Option<&View> {
        None
    }
    fn cursor(&self, _: u32) -> Option<&Cursor> {
        None
    }
    fn slots(&self, _: u32) -> Option<&SlotLine> {
        None
    }
    fn dest(&self, index: u32) -> Option<&Dest> {
        self.dests.get(index as usize)
    }
    fn cache(&self, _: u32) -> Option<&CacheEntry> {
        None
    }
    fn dest_load(&self, index: u32) -> Option<&DestLoad> {
        self.loads.get(index as usize)
    }
    fn dest_cpu(&self, _: u32) -> Option<&DestCpu> {
        None
    }
    fn adjacency(&self, _: u32) -> Option<&Adjacency> {
        None
    }
    fn adjacency_cpu(&self, _: u32) -> Option<&NextHop> {
        None
    }
    fn marks(&self) -> Option<&Marks> {
        None
    }
    fn mark_rule(&self, _: u32) -> Option<&Rule> {
        None
    }
    fn mark_start(&self, _: u32) -> Option<&Start> {
        None
    }
    fn hide(&self, value: u64) -> u64 {
        value
    }
    fn count(&self, _: u8) {}
    fn count_event(&self, _: Event) {}
}

impl<E: Entry> Buckets<E> for Table<E> {
    fn buckets(&self) -> u32 {
        self.flows.len() as u32
    }
    fn bucket(&self, index: u32) -> Option<&Bucket<E>> {
        self.flows.get(index as usize)
    }
}
