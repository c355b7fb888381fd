//! Choosing the destination of a new connection: ip_vs's schedulers (`docs/ipvs.md`, section 3).

use lb_common::{
    abi::{View, active_and_total, cursor},
    addr::Address as _,
    flow::Key,
    hash::mix,
    proto::{Scheduler, sched_flag},
    reason::Reason,
    sched::{self, Bid},
    sync::opaque,
};

use crate::{
    env::{Env, Scan},
    tables::Tables,
};

/// How often a round robin tries to move its cursor before it goes without.
const CURSOR_ATTEMPTS: usize = 3;

/// The two ends of a new connection, as far as schedulers look at them, in host byte order: two words for any family.
#[derive(Clone, Copy)]
pub struct Parties {
    /// The client's address, folded, and in bits 32-47 its port.
    client: u64,
    /// The service's address, folded.
    service: u64,
}

impl Parties {
    /// The ends of the connection `key`.
    #[inline(always)]
    pub fn of(key: &impl Key) -> Self {
        let client = u64::from(key.caddr().number()) | u64::from(key.cport().number()) << 32;
        Self { client, service: key.vaddr().number().into() }
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
#[inline(never)]
pub fn pick(tables: &impl Tables, env: &impl Env, view: u32, parties: Parties) -> Result<u32, Reason> {
    let number = view;
    let view = tables.view(number).ok_or(Reason::Impossible)?;
    let version = view.version.load();
    let scheduler = Scheduler::try_from(view.scheduler.load() as u8).map_err(|_| Reason::Impossible)?;
    let dest = match scheduler {
        Scheduler::Rr => ring(tables, env, number, view, view.list.load(), view.list_len.load()),
        Scheduler::Wrr => ring(tables, env, number, view, view.ring.load(), view.ring_len.load()),
        Scheduler::Dh => bucket(tables, view, sched::dh_bucket(parties.service())),
        Scheduler::Sh | Scheduler::Mh => hashed(tables, env, view, parties),
        Scheduler::Lc | Scheduler::Wlc | Scheduler::Sed | Scheduler::Nq | Scheduler::Fo | Scheduler::Ovf => {
            least_loaded(tables, env, view, Measure::of(scheduler).hidden(tables))
        }
    };
    if view.version.load() != version {
        return Err(Reason::ConfigurationChanged);
    }
    dest.ok_or(Reason::NoDestination)
}

/// The destination in slot `index`, if it is usable.
#[inline(always)]
fn usable_at(tables: &impl Tables, index: u32) -> Option<u32> {
    let dest = tables.slot(index)?.dest();
    tables.dest(dest)?.usable().then_some(dest)
}

/// rr and wrr: the next usable entry of a ring, after the one chosen last.
#[inline(always)]
fn ring(tables: &impl Tables, env: &impl Env, number: u32, view: &View, start: u32, len: u32) -> Option<u32> {
    if len == 0 {
        return None;
    }
    let position = &tables.cursor(number)?.position;
    for _ in 0..CURSOR_ATTEMPTS {
        let old = position.load();
        let index = if old & cursor::FRESH != 0 { old & !cursor::FRESH } else { old + 1 };
        let index = if index < len { index } else { 0 };
        let (index, dest) = match usable_at(tables, start + index) {
            Some(dest) => (index, dest),
            None => match next_usable(tables, env, start, len, index) {
                Some(found) => found,
                None => {
                    exhausted(view, position, old);
                    return None;
                }
            },
        };
        if position.compare_exchange(old, index).is_ok() {
            return Some(dest);
        }
    }
    // So many new connections at once that the order between them means nothing.
    usable_at(tables, start + position.load())
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
    fn visit(&mut self, _: u32) -> bool {
        self.index += 1;
        if self.index >= self.len {
            self.index = 0;
        }
        self.found = usable_at(self.tables, self.start + self.index).map_or(0, |dest| dest + 1);
        self.found == 0
    }
}

/// The first usable entry after `index`, going round.
#[inline(always)]
fn next_usable(tables: &impl Tables, env: &impl Env, start: u32, len: u32, index: u32) -> Option<(u32, u32)> {
    let index = tables.hide(index.into()) as u32;
    let mut scan = NextUsable { tables, start, len, index, found: 0 };
    env.scan(len, &mut scan);
    Some((scan.index, scan.found.checked_sub(1)?))
}

/// sh and mh: what the client is hashed to, and how the search goes on from there.
struct Hashed<'t, T> {
    tables: &'t T,
    view: &'t View,
    /// 1 for mh, 0 for sh.
    maglev: u64,
    /// The client, and its port where that counts: what is hashed.
    client: u32,
    /// The bucket that the hash names.
    first: u32,
    /// The destination that was found, plus one.
    found: u32,
}

impl<T: Tables> Scan for Hashed<'_, T> {
    #[inline(always)]
    fn visit(&mut self, probe: u32) -> bool {
        let index = if self.maglev != 0 {
            sched::mh_slot(self.client.wrapping_add((probe + self.first) % sched::MH_SLOTS))
        } else {
            (2 * self.first + probe) % sched::SH_BUCKETS
        };
        self.found = bucket(self.tables, self.view, index).map_or(0, |dest| dest + 1);
        self.found == 0
    }
}

/// sh and mh: the destination that the client is hashed to, or with the flag for it, the first usable one of a sequence of
/// others that the hash begins.
#[inline(always)]
fn hashed(tables: &impl Tables, env: &impl Env, view: &View, parties: Parties) -> Option<u32> {
    let flags = view.flags.load();
    let port = if flags & sched_flag::PORT != 0 { parties.port() } else { 0 };
    let client = parties.client().wrapping_add(port.into());
    let maglev = view.scheduler.load() == Scheduler::Mh as u32;
    let first = if maglev { sched::mh_slot(client) } else { sched::sh_bucket(client) };
    let found = bucket(tables, view, first);
    if found.is_some() || flags & sched_flag::FALLBACK == 0 || view.ring_len.load() == 0 {
        return found;
    }
    let maglev = tables.hide(maglev.into());
    let mut scan = Hashed { tables, view, maglev, client, first, found: 0 };
    env.scan(view.ring_len.load(), &mut scan);
    scan.found.checked_sub(1)
}

/// sh, dh and mh: the destination of a bucket, if it is usable.
#[inline(always)]
fn bucket(tables: &impl Tables, view: &View, bucket: u32) -> Option<u32> {
    if bucket >= view.ring_len.load() {
        return None;
    }
    usable_at(tables, view.ring.load() + bucket)
}

/// What a scanning scheduler compares destinations by: the least overhead for its weight is best. A destination with A
/// active of T connections has the overhead `active * A + total * T + constant`.
///
/// Verifier: numbers instead of choices, so that it follows one loop for all schedulers, and one path in it.
#[derive(Clone, Copy)]
struct Measure {
    active: u64,
    total: u64,
    constant: u64,
    /// 1 to compare overheads as if all weights were equal.
    unweighted: u64,
    /// 1 when a destination without active connections has no overhead.
    idle: u64,
    /// 1 when a destination with more active connections than its weight is out of the question.
    limited: u64,
}

impl Measure {
    /// The same, unknown to the verifier, which would else follow the scan once for each scheduler.
    #[inline(always)]
    fn hidden(self, tables: &impl Tables) -> Self {
        Self {
            active: tables.hide(self.active),
            total: tables.hide(self.total),
            constant: tables.hide(self.constant),
            unweighted: tables.hide(self.unweighted),
            idle: tables.hide(self.idle),
            limited: tables.hide(self.limited),
        }
    }

    #[inline(always)]
    const fn of(scheduler: Scheduler) -> Self {
        // Inactive connections count a 256th of active ones, with inactive = T - A: 257 A + (T - A).
        const LOAD: Measure = Measure { active: 256, total: 1, constant: 0, unweighted: 0, idle: 0, limited: 0 };
        const DELAY: Measure = Measure { active: 1, total: 0, constant: 1, unweighted: 0, idle: 0, limited: 0 };
        const WEIGHT: Measure = Measure { active: 0, total: 0, constant: 1, unweighted: 0, idle: 0, limited: 0 };
        match scheduler {
            Scheduler::Lc => Self { unweighted: 1, ..LOAD },
            Scheduler::Sed => DELAY,
            Scheduler::Nq => Self { idle: 1, ..DELAY },
            Scheduler::Fo => WEIGHT,
            Scheduler::Ovf => Self { limited: 1, ..WEIGHT },
            _ => LOAD,
        }
    }
}

struct LeastLoaded<'t, T> {
    tables: &'t T,
    measure: Measure,
    start: u32,
    /// The best destination so far, plus one; 0 before there is one.
    best: u32,
    overhead: u64,
    weight: u64,
}

impl<T: Tables> Scan for LeastLoaded<'_, T> {
    #[inline(always)]
    fn visit(&mut self, index: u32) -> bool {
        self.consider(index);
        true
    }
}

impl<T: Tables> LeastLoaded<'_, T> {
    #[inline(always)]
    fn consider(&mut self, index: u32) -> Option<()> {
        let number = self.tables.slot(self.start + index)?.dest();
        let dest = self.tables.dest(number)?;
        if !dest.usable() {
            return None;
        }
        let weight = u64::from(dest.weight.load());
        let (active, total) = active_and_total(self.tables.dest_load(number)?.connections.load());
        let (active, total) = (u64::from(active), u64::from(total));
        let measure = &self.measure;
        // One where the first is less than the second, both below 2^63.
        let less = |a: u64, b: u64| opaque(a.wrapping_sub(b)) >> 63;
        if less(weight, active) & measure.limited != 0 {
            return None;
        }
        let overhead = measure.active * active + measure.total * total + measure.constant;
        let overhead = overhead * (less(active, 1) & measure.idle ^ 1);
        let weight = weight * (measure.unweighted ^ 1) + measure.unweighted;
        // No division: self.overhead / self.weight > overhead / weight.
        if self.best == 0 || self.overhead * weight > overhead * self.weight {
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
/// Schedulers that go by nothing but addresses, ports and weights (sh, dh, mh, fo) choose it themselves; the others go by
/// what each director counts, so rendezvous hashing chooses for them.
///
/// # Errors
///
/// As those of [`pick`].
#[inline(never)]
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
    let dest = match scheduler {
        Scheduler::Dh => bucket(tables, view, sched::dh_bucket(parties.service())),
        Scheduler::Sh | Scheduler::Mh => hashed(tables, env, view, parties),
        _ => {
            let start = view.list.load();
            let by_weight = tables.hide((scheduler == Scheduler::Fo).into());
            let bid = Bid::NONE.each(|number| tables.hide(number));
            let mut bids = Bids { tables, start, connection, by_weight, best: 0, bid };
            env.scan(view.list_len.load(), &mut bids);
            bids.best.checked_sub(1)
        }
    };
    if view.version.load() != version {
        return Err(Reason::ConfigurationChanged);
    }
    dest.ok_or(Reason::NoDestination)
}

/// Destinations that a scan looks at itself, before it has itself called for each.
const SHORT_LIST: u32 = 16;

/// The usable destination with the least overhead for its weight; of equals, the first in the list.
#[inline(always)]
fn least_loaded(tables: &impl Tables, env: &impl Env, view: &View, measure: Measure) -> Option<u32> {
    let mut scan = LeastLoaded { tables, measure, start: view.list.load(), best: 0, overhead: 0, weight: 0 };
    let len = view.list_len.load();
    for index in 0..SHORT_LIST {
        if index >= len {
            return scan.best.checked_sub(1);
        }
        scan.consider(index);
        // Verifier: hidden, or it would follow the loop once for every combination of comparisons.
        scan.best = tables.hide(scan.best.into()) as u32;
        scan.overhead = tables.hide(scan.overhead);
        scan.weight = tables.hide(scan.weight);
    }
    scan.start += SHORT_LIST;
    env.scan(len - SHORT_LIST, &mut scan);
    scan.best.checked_sub(1)
}
