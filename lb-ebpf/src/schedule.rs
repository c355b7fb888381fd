//! Choosing the destination of a new connection: ip_vs's schedulers (`docs/ipvs.md`, section 3).

use lb_common::{
    abi::{Dest, SLOTS_PER_LINE, Slot, View, address_word, cursor},
    addr::Address as _,
    flow::Key,
    hash::mix,
    proto::{Scheduler, sched_flag},
    reason::Reason,
    sched::{self, Bid},
};

use crate::{
    cache, draw,
    env::{Env, Scan},
    overload,
    tables::Tables,
};

/// How often a round robin tries to move its cursor before it goes without.
const CURSOR_ATTEMPTS: usize = 3;

/// The two ends of a new connection, as far as schedulers look at them, in host byte order: two words for any family.
#[derive(Clone, Copy)]
pub struct Parties {
    /// The client's address, folded, and in bits 32-47 its port.
    client: u64,
    /// The service's address, as [`address_word`] tells it from others.
    service: u64,
}

impl Parties {
    /// The ends of the connection `key`.
    #[inline(always)]
    pub fn of(key: &impl Key) -> Self {
        let client = u64::from(key.caddr().number()) | u64::from(key.cport().number()) << 32;
        Self { client, service: address_word(key.vaddr()) }
    }

    /// The ends that these words stand for.
    #[inline(always)]
    pub const fn from_words([client, service]: [u64; 2]) -> Self {
        Self { client, service }
    }

    /// The ends as words.
    #[inline(always)]
    pub const fn words(self) -> [u64; 2] {
        [self.client, self.service]
    }

    #[inline(always)]
    const fn client(self) -> u32 {
        self.client as u32
    }

    #[inline(always)]
    const fn port(self) -> u16 {
        (self.client >> 32) as u16
    }

    #[inline(always)]
    const fn service(self) -> u32 {
        self.service as u32
    }
}

/// The number of the destination that the view's scheduler gives a new connection between `parties`.
///
/// # Errors
///
/// [`Reason::NoDestination`] when no destination is usable; [`Reason::ConfigurationChanged`] when the view was rewritten
/// meanwhile, which takes two changes of the service during one packet.
#[inline(always)]
pub fn pick(tables: &impl Tables, env: &impl Env, view: u32, parties: Parties) -> Result<u32, Reason> {
    let number = view;
    let view = tables.view(number).ok_or(Reason::Impossible)?;
    let version = view.version.load();
    let scheduler = Scheduler::try_from(view.scheduler.load() as u8).map_err(|_| Reason::Impossible)?;
    let choice = match scheduler {
        Scheduler::Rr | Scheduler::Wrr => ring(tables, env, view, number),
        Scheduler::Dh => Choice::of(bucket(tables, view, sched::dh_bucket(parties.service()), Limits::Heeded)),
        Scheduler::Sh | Scheduler::Mh | Scheduler::Wdh => {
            hashed(tables, env, view, subject(view, parties), Limits::Heeded)
        }
        Scheduler::Random | Scheduler::Wrandom => draw::drawn(tables, env, view),
        Scheduler::Lblc | Scheduler::Lblcr => cache::pick(tables, env, view, parties.service),
        Scheduler::Twos => draw::less_loaded_of_two(tables, env, view),
        Scheduler::Lc | Scheduler::Wlc | Scheduler::Sed | Scheduler::Nq | Scheduler::Fo | Scheduler::Ovf => {
            least_loaded(tables, env, view)
        }
    };
    if view.version.load() != version {
        return Err(Reason::ConfigurationChanged);
    }
    choice.dest().ok_or(Reason::NoDestination)
}

/// The number of the destination that was chosen, plus one; 0 for none. Bit 63: see [`Choice::saw_idle`].
///
/// Verifier: a word, for an unset half of an `Option` is uninitialised memory to it.
///
/// The ways of choosing are functions of their own, so that only the stack of one counts.
#[derive(Clone, Copy)]
pub(crate) struct Choice(pub(crate) u64);

impl Choice {
    pub(crate) const NONE: Self = Self(0);

    #[inline(always)]
    pub(crate) fn of(dest: Option<u32>) -> Self {
        dest.map_or(Self::NONE, |dest| Self(u64::from(dest) + 1))
    }

    #[inline(always)]
    pub(crate) fn dest(self) -> Option<u32> {
        (self.0 as u32).checked_sub(1)
    }

    /// Of the least loaded: whether some destination of the service, full or not, has less than half as many active connections as
    /// its weight.
    #[inline(always)]
    pub(crate) fn saw_idle(self) -> bool {
        self.0 >> 63 != 0
    }
}

/// Whether the thresholds of destinations count.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Limits {
    Heeded,
    Ignored,
}

/// Whether new connections may go to destination number `number`, which is `dest`.
#[inline(always)]
pub(crate) fn is_usable(tables: &impl Tables, number: u32, dest: &Dest, limits: Limits) -> bool {
    dest.usable() && (limits == Limits::Ignored || overload::is_overloaded(tables, number, dest) == 0)
}

/// The destination in slot `index`, if it is usable.
#[inline(always)]
pub(crate) fn usable_at(tables: &impl Tables, index: u32, limits: Limits) -> Option<u32> {
    let number = tables.slot(index)?.dest();
    is_usable(tables, number, tables.dest(number)?, limits).then_some(number)
}

/// rr and wrr: the next usable entry of a ring, after the one chosen last. For rr the ring is the list.
#[inline(never)]
fn ring(tables: &impl Tables, env: &impl Env, view: &View, number: u32) -> Choice {
    let Some(cursor) = tables.cursor(number) else { return Choice::NONE };
    let position = &cursor.position;
    let (start, len) = if view.scheduler.load() == Scheduler::Rr as u32 {
        (view.list.load(), view.list_len.load())
    } else {
        (view.ring.load(), view.ring_len.load())
    };
    if len == 0 {
        return Choice::NONE;
    }
    for _ in 0..CURSOR_ATTEMPTS {
        let old = position.load();
        let index = if old & cursor::FRESH != 0 { old & !cursor::FRESH } else { old + 1 };
        let index = if index < len { index } else { 0 };
        let (index, dest) = match usable_at(tables, start + index, Limits::Heeded) {
            Some(dest) => (index, dest),
            None => match next_usable(tables, env, start, len, index) {
                Some(found) => found,
                None => {
                    exhausted(view, position, old);
                    return Choice::NONE;
                }
            },
        };
        if position.compare_exchange(old, index).is_ok() {
            return Choice::of(Some(dest));
        }
    }
    // So many new connections at once that the order between them means nothing.
    Choice::of(usable_at(tables, start + position.load(), Limits::Heeded))
}

/// Leaves the cursor where ip_vs leaves it when nothing is usable: rr where it was; wrr at the start of the cycle,
/// unless it stands in the last pass.
#[inline(always)]
fn exhausted(view: &View, position: &lb_common::sync::Shared32, old: u32) {
    let wrr = view.scheduler.load() == Scheduler::Wrr as u32;
    let in_last_pass = old & cursor::FRESH == 0 && old >= view.ring_final.load();
    if wrr && !in_last_pass {
        // Losing to another CPU leaves its choice standing, which is as good an order as any.
        let _ = position.compare_exchange(old, cursor::FRESH);
    }
}

struct NextUsable<'t, T> {
    tables: &'t T,
    start: u32,
    len: u32,
    index: u32,
    /// The destination in the slot at `index`, plus one, when it is usable.
    ///
    /// Verifier: a number, for an unset half of an `Option` is uninitialised memory to it.
    found: u32,
}

impl<T: Tables> Scan for NextUsable<'_, T> {
    #[inline(always)]
    fn hide(&mut self, hide: impl Fn(u64) -> u64) {
        self.index = hide(self.index.into()) as u32;
    }

    #[inline(always)]
    fn visit(&mut self, _: u32) -> bool {
        self.index += 1;
        if self.index >= self.len {
            self.index = 0;
        }
        self.found = usable_at(self.tables, self.start + self.index, Limits::Heeded).map_or(0, |dest| dest + 1);
        self.found == 0
    }
}

/// The first usable entry after `index`, going round.
#[inline(always)]
fn next_usable(tables: &impl Tables, env: &impl Env, start: u32, len: u32, index: u32) -> Option<(u32, u32)> {
    let mut scan = NextUsable { tables, start, len, index, found: 0 };
    env.scan(len, &mut scan);
    Some((scan.index, scan.found.checked_sub(1)?))
}

/// sh, mh and wdh: what the hash names, and how the search goes on from there.
struct Hashed<'t, T> {
    tables: &'t T,
    view: &'t View,
    /// 0 for sh, 1 for the others.
    maglev: u64,
    /// What is hashed.
    subject: u32,
    /// The bucket that the hash names.
    first: u32,
    limits: Limits,
    /// The destination that was found, plus one.
    found: u32,
}

impl<T: Tables> Scan for Hashed<'_, T> {
    #[inline(always)]
    fn hide(&mut self, hide: impl Fn(u64) -> u64) {
        self.maglev = hide(self.maglev);
    }

    #[inline(always)]
    fn visit(&mut self, probe: u32) -> bool {
        let index = if self.maglev != 0 {
            sched::mh_slot(self.subject.wrapping_add((probe + self.first) % sched::MH_SLOTS))
        } else {
            (2 * self.first + probe) % sched::SH_BUCKETS
        };
        self.found = bucket(self.tables, self.view, index, self.limits).map_or(0, |dest| dest + 1);
        self.found == 0
    }
}

/// sh, mh and wdh: what is hashed of a connection, the client or for wdh the service's address.
#[inline(always)]
fn subject(view: &View, parties: Parties) -> u32 {
    if view.scheduler.load() == Scheduler::Wdh as u32 {
        return parties.service();
    }
    let port = if view.flags.load() & sched_flag::PORT != 0 { parties.port() } else { 0 };
    parties.client().wrapping_add(port.into())
}

/// sh, mh and wdh: the destination that `subject` is hashed to, or for wdh and with the flag for it, the first usable one of a
/// sequence of others that the hash begins.
#[inline(never)]
fn hashed(tables: &impl Tables, env: &impl Env, view: &View, subject: u32, limits: Limits) -> Choice {
    let scheduler = view.scheduler.load();
    let maglev = scheduler != Scheduler::Sh as u32;
    let goes_on = scheduler == Scheduler::Wdh as u32 || view.flags.load() & sched_flag::FALLBACK != 0;
    let first = if maglev { sched::mh_slot(subject) } else { sched::sh_bucket(subject) };
    let found = bucket(tables, view, first, limits);
    if found.is_some() || !goes_on || view.ring_len.load() == 0 {
        return Choice::of(found);
    }
    let mut scan = Hashed { tables, view, maglev: maglev.into(), subject, first, limits, found: 0 };
    env.scan(view.ring_len.load(), &mut scan);
    Choice(scan.found.into())
}

/// sh, dh, mh and wdh: the destination of a bucket, if it is usable.
#[inline(always)]
fn bucket(tables: &impl Tables, view: &View, bucket: u32, limits: Limits) -> Option<u32> {
    if bucket >= view.ring_len.load() {
        return None;
    }
    usable_at(tables, view.ring.load() + bucket, limits)
}

/// What a scanning scheduler compares destinations by: the least overhead for its weight is best. A destination with A
/// active of T connections has the overhead `active * A + total * T + constant`. For lc, lists say that all weights are 1.
///
/// Verifier: numbers instead of choices, so that it follows one loop for all schedulers; and all in one word, for they would
/// take up a third of the stack.
#[derive(Clone, Copy)]
struct Measure(u64);

impl Measure {
    /// Inactive connections count a 256th of active ones, with inactive = T - A: 257 A + (T - A).
    const LOAD: u64 = 256 | Self::TOTAL;
    const DELAY: u64 = 1 | Self::CONSTANT;
    const CONSTANT: u64 = 1 << 16;
    /// A destination without active connections has no overhead.
    const IDLE: u64 = 1 << 24;
    /// A destination with more active connections than its weight is out of the question.
    const LIMITED: u64 = 1 << 25;
    /// All connections count.
    const TOTAL: u64 = 0xffff_ffff << 32;

    #[inline(always)]
    const fn of(scheduler: Scheduler) -> Self {
        Self(match scheduler {
            Scheduler::Sed => Self::DELAY,
            Scheduler::Nq => Self::DELAY | Self::IDLE,
            Scheduler::Fo => Self::CONSTANT,
            Scheduler::Ovf => Self::CONSTANT | Self::LIMITED,
            _ => Self::LOAD,
        })
    }

    /// The overhead of `active` connections of `connections`, a number whose low half are all of them.
    #[inline(always)]
    const fn overhead(self, active: u64, connections: u64) -> u64 {
        (self.0 & 0xffff) * active + (connections & self.0 >> 32) + (self.0 >> 16 & 0xff)
    }

    #[inline(always)]
    const fn has(self, property: u64) -> bool {
        self.0 & property != 0
    }
}

/// Calls something for every slot of a line.
///
/// Verifier: written out, for a loop over a slice compares pointers.
macro_rules! each_of {
    ($line:expr, $visit:expr) => {{
        let ([a, b, c, d, e, f, g, h], mut visit) = ($line, $visit);
        visit(a);
        visit(b);
        visit(c);
        visit(d);
        visit(e);
        visit(f);
        visit(g);
        visit(h);
    }};
}
pub(crate) use each_of;

/// The lines of a view's list: the first, and how many there are.
#[inline(always)]
pub(crate) fn lines(view: &View) -> (u32, u32) {
    (view.list.load() / SLOTS_PER_LINE, view.list_len.load().div_ceil(SLOTS_PER_LINE))
}

/// The destination with the least overhead for its weight.
///
/// Of a destination it looks at one cache line, that of its connections; all else that counts is in the list.
pub(crate) struct LeastLoaded<'t, T> {
    tables: &'t T,
    measure: Measure,
    first: u32,
    /// The best destination so far, plus one; 0 before there is one.
    best: u32,
    overhead: u64,
    weight: u64,
    /// Bit 63: some destination has less than half as many active connections as its weight.
    idle: u64,
}

impl<T: Tables> Scan for LeastLoaded<'_, T> {
    #[inline(always)]
    fn hide(&mut self, hide: impl Fn(u64) -> u64) {
        self.best = hide(self.best.into()) as u32;
        self.overhead = hide(self.overhead);
        self.weight = hide(self.weight);
        self.idle = hide(self.idle);
    }

    #[inline(always)]
    fn visit(&mut self, index: u32) -> bool {
        let Some(line) = self.tables.slots(self.first + index) else { return false };
        each_of!(
            line,
            #[inline(always)]
            |slot: &Slot| {
                let (number, weight) = slot.dest_and_weight();
                self.consider(number, weight);
            }
        );
        true
    }
}

impl<'t, T: Tables> LeastLoaded<'t, T> {
    /// A scan that begins at a line of slots.
    ///
    /// Verifier: everything is hidden, or it would follow the scan once for each scheduler, and each destination once as the
    /// first and once as another.
    #[inline(always)]
    fn new(tables: &'t T, measure: Measure, first: u32) -> Self {
        let measure = Measure(tables.hide(measure.0));
        let [best, overhead, weight, idle] = [0, 1, 0, 0].map(|number| tables.hide(number));
        Self { tables, measure, first, best: best as u32, overhead, weight, idle }
    }

    /// A scan by lc's and wlc's measure of destinations in no list.
    #[inline(always)]
    pub(crate) fn by_load(tables: &'t T) -> Self {
        Self::new(tables, Measure::of(Scheduler::Wlc), 0)
    }

    /// The number of the best destination, plus one; 0 when there is none.
    #[inline(always)]
    pub(crate) fn choice(&self) -> u32 {
        self.best
    }

    /// Compares destination number `number`, whose weight is as in a list, with the best so far.
    #[inline(always)]
    pub(crate) fn consider(&mut self, number: u32, weight: u32) -> Option<()> {
        let (weight, limited) = (u64::from(weight & !Slot::LIMITED), weight & Slot::LIMITED);
        if weight == 0 {
            return None;
        }
        let load = self.tables.dest_load(number)?;
        if load.removed.load() != 0 {
            return None;
        }
        let (connections, measure) = (load.connections.load(), self.measure);
        let active = connections >> 32;
        // Verifier: no comparison, for it would follow both ways.
        self.idle |= (2 * active).wrapping_sub(weight);
        if limited != 0 && self.tables.is_overloaded(number) != 0 {
            return None;
        }
        let mut overhead = measure.overhead(active, connections);
        if measure.has(Measure::IDLE | Measure::LIMITED) {
            if measure.has(Measure::LIMITED) && active > weight {
                return None;
            }
            if measure.has(Measure::IDLE) && active == 0 {
                overhead = 0;
            }
        }
        // No division: self.overhead / self.weight > overhead / weight. Before there is a best one that is 1 / 0, more than any.
        if self.overhead * weight > overhead * self.weight {
            self.best = number + 1;
            self.overhead = overhead;
            self.weight = weight;
        }
        Some(())
    }
}

struct Bids<'t, T> {
    tables: &'t T,
    start: u32,
    /// The connection's common hash.
    connection: u64,
    /// 1 when weights alone count, else 0.
    by_weight: u64,
    /// The best destination so far, plus one; 0 before there is one.
    best: u32,
    bid: Bid,
}

impl<T: Tables> Scan for Bids<'_, T> {
    #[inline(always)]
    fn hide(&mut self, hide: impl Fn(u64) -> u64) {
        self.by_weight = hide(self.by_weight);
        self.bid = self.bid.each(hide);
    }

    #[inline(always)]
    fn visit(&mut self, index: u32) -> bool {
        self.consider(index);
        true
    }
}

impl<T: Tables> Bids<'_, T> {
    #[inline(always)]
    fn consider(&mut self, index: u32) -> Option<()> {
        let number = self.tables.slot(self.start + index)?.dest();
        let dest = self.tables.dest(number)?;
        if !dest.usable() {
            return None;
        }
        let [a, b, c, d] = dest.addr.each_ref().map(|word| u64::from(word.load()));
        // Of IPv4 addresses only the first word is not 0.
        let network = if b | c | d == 0 { 0 } else { mix(mix(b | c << 32) ^ d) };
        let address = network ^ (a | u64::from(dest.port().raw()) << 32);
        let weight = dest.weight.load();
        let bid = if self.by_weight != 0 { Bid::of_weight(weight) } else { Bid::new(self.connection, address, weight) };
        if bid.beats(&self.bid) {
            self.best = number + 1;
            self.bid = bid;
        }
        Some(())
    }
}

/// The number of the destination that every director with the same configuration gives a connection between `parties`, whose
/// [`lb_common::flow::Entry::common_hash`] is `connection`.
///
/// Schedulers that go by nothing but addresses, ports and weights (sh, dh, mh, wdh, fo) choose it themselves; the others go by
/// what each director counts, so rendezvous hashing chooses for them. Thresholds are about such a count, and say nothing here.
///
/// # Errors
///
/// As those of [`pick`].
#[inline(always)]
pub fn pick_alike(
    tables: &impl Tables,
    env: &impl Env,
    view: u32,
    parties: Parties,
    connection: u64,
) -> Result<u32, Reason> {
    let view = tables.view(view).ok_or(Reason::Impossible)?;
    let version = view.version.load();
    let scheduler = Scheduler::try_from(view.scheduler.load() as u8).map_err(|_| Reason::Impossible)?;
    let choice = match scheduler {
        Scheduler::Dh => Choice::of(bucket(tables, view, sched::dh_bucket(parties.service()), Limits::Ignored)),
        Scheduler::Sh | Scheduler::Mh | Scheduler::Wdh => {
            hashed(tables, env, view, subject(view, parties), Limits::Ignored)
        }
        _ => {
            let start = view.list.load();
            let by_weight = (scheduler == Scheduler::Fo).into();
            let mut bids = Bids { tables, start, connection, by_weight, best: 0, bid: Bid::NONE };
            env.scan(view.list_len.load(), &mut bids);
            Choice(bids.best.into())
        }
    };
    if view.version.load() != version {
        return Err(Reason::ConfigurationChanged);
    }
    choice.dest().ok_or(Reason::NoDestination)
}

/// The usable destination with the least overhead for its weight; of equals, the first in the list.
#[inline(never)]
pub(crate) fn least_loaded(tables: &impl Tables, env: &impl Env, view: &View) -> Choice {
    let Ok(scheduler) = Scheduler::try_from(view.scheduler.load() as u8) else { return Choice::NONE };
    let (first, count) = lines(view);
    let mut scan = LeastLoaded::new(tables, Measure::of(scheduler), first);
    env.scan(count, &mut scan);
    Choice(u64::from(scan.best) | scan.idle & 1 << 63)
}
