//! lblc and lblcr: which destinations a destination address has had (`docs/ipvs.md`, sections 3.13 and 3.14).
//!
//! ip_vs keeps a table for each service and sweeps it by a timer. Here one table of a fixed size is for all services. An
//! address has one bucket; when that is full, the entry that has not been used for longest makes room. What ip_vs
//! would sweep away some time after a day without use, or whatever it is set to, is over after exactly that time.
//!
//! An entry is read and written while other CPUs do the same. One that another CPU is writing is as good as none: the
//! packet's destination is chosen by wlc then, and nothing is remembered.

use lb_common::{
    abi::{CACHE_BUCKETS, CACHE_SET, CACHE_WAYS, CacheEntry, Config, Slot, View, active_and_total},
    hash::scale,
    proto::Scheduler,
    sync::opaque,
};

use crate::{
    env::{Clock, Env, Scan},
    pipeline::Now,
    schedule::{Choice, LeastLoaded, least_loaded},
    tables::Tables,
};

/// Ticks without use after which an entry of this service is over, and without change after which a set loses one: ip_vs's
/// `lblc_expiration` and `lblcr_expiration`.
#[inline(always)]
fn expiration(config: &Config, view: &View, clock: Clock) -> u32 {
    let seconds = if view.scheduler.load() == Scheduler::Lblc as u32 {
        config.lblc_expiration.load()
    } else {
        config.lblcr_expiration.load()
    };
    seconds.wrapping_mul(clock.hz)
}

/// What was found for an address.
///
/// Verifier: one word. The destination that the address has, plus one, in the low half. In the high half what to remember: the
/// entry, plus one, in bits 32-61, and bit 63 if it is this address's already. Bit 62 if the destination is [`Found::OVERLOADED`].
#[derive(Clone, Copy)]
struct Found(u64);

impl Found {
    const KNOWN: u64 = 1 << 63;
    /// The destination has more active connections than its weight: it is used only if no other is idle.
    const OVERLOADED: u64 = 1 << 62;

    /// The destination that the address has.
    #[inline(always)]
    fn choice(self) -> Choice {
        Choice(self.0 & 0xffff_ffff)
    }

    /// Whether the destination is used whatever the load of others.
    #[inline(always)]
    fn is_certain(self) -> bool {
        self.choice().dest().is_some() && self.0 & Self::OVERLOADED == 0
    }

    #[inline(always)]
    fn entry(self) -> Option<u32> {
        ((self.0 >> 32) as u32 & 0x3fff_ffff).checked_sub(1)
    }
}

struct Search<'t, T> {
    tables: &'t T,
    address: u64,
    /// Verifier: a word of 64 bits, or the compiler would write some of those of 32 together where that is not aligned.
    owner: u64,
    first: u32,
    now: u32,
    /// Ticks after which an entry of the owner is over.
    expiration: u64,
    /// Ticks after which an entry of anybody is over.
    longest: u64,
    /// The entry of the address, plus one.
    found: u32,
    /// The entry that makes room, plus one, and for how many ticks it has not been used, plus one; more than any of these when it
    /// is free or over.
    victim: u32,
    idle: u64,
}

impl<T: Tables> Scan for Search<'_, T> {
    #[inline(always)]
    fn hide(&mut self, hide: impl Fn(u64) -> u64) {
        self.idle = hide(self.idle);
    }

    #[inline(always)]
    fn visit(&mut self, way: u32) -> bool {
        let index = self.first + way;
        let Some(entry) = self.tables.cache(index) else { return false };
        let idle = u64::from(self.now.wrapping_sub(entry.used.load()));
        let owner = u64::from(entry.owner.load());
        let live = owner != 0 && idle < if owner == self.owner { self.expiration } else { self.longest };
        if live && owner == self.owner && entry.address.load() == self.address {
            self.found = index + 1;
            return false;
        }
        let idle = if live { idle + 1 } else { 1 << 33 };
        if idle > self.idle {
            self.idle = idle;
            self.victim = index + 1;
        }
        true
    }
}

#[inline(always)]
fn now<'t>(tables: &'t impl Tables, env: &impl Env) -> Option<Now<'t>> {
    Some(Now::of(tables.config()?, env))
}

/// The destination that `address` has, if it is to be used again; else the least loaded one, which it has from now on.
#[inline(always)]
pub(crate) fn pick(tables: &impl Tables, env: &impl Env, view: &View, address: u64) -> Choice {
    let found = look_up(tables, env, view, address);
    if found.is_certain() {
        return found.choice();
    }
    let least = least_loaded(tables, env, view);
    if found.choice().dest().is_some() && !least.saw_idle() {
        return found.choice();
    }
    if least.dest().is_some() {
        remember(tables, env, view, address, (found, least));
    }
    least
}

/// What is known of `address`.
///
/// Verifier: the steps are functions of their own, so that only the stack of one counts.
#[inline(always)]
fn look_up(tables: &impl Tables, env: &impl Env, view: &View, address: u64) -> Found {
    let found = search(tables, env, view, address);
    if found.0 & Found::KNOWN == 0 {
        return found;
    }
    let best = best_of_set(tables, view, found);
    if view.scheduler.load() == Scheduler::Lblcr as u32 {
        shrink_if_due(tables, env, view, found);
    }
    let overloaded = best.dest().is_some_and(|number| is_overloaded(tables, number));
    Found(found.0 | best.0 | if overloaded { Found::OVERLOADED } else { 0 })
}

/// The entry of `address`, or the one to be used for it.
#[inline(never)]
fn search(tables: &impl Tables, env: &impl Env, view: &View, address: u64) -> Found {
    let Some(Now { config, clock }) = now(tables, env) else { return Found(0) };
    let (owner, now) = (view.cache.load(), clock.now.0);
    let bucket = scale(tables.seed().quick_hash(address ^ u64::from(owner) << 32), CACHE_BUCKETS);
    let expiration = expiration(config, view, clock).into();
    let first = bucket * CACHE_WAYS;
    let longest = config.lblc_expiration.load().max(config.lblcr_expiration.load()).wrapping_mul(clock.hz).into();
    let owner = owner.into();
    let mut search = Search { tables, address, owner, first, now, expiration, longest, found: 0, victim: 0, idle: 0 };
    env.scan(CACHE_WAYS, &mut search);
    if search.found == 0 {
        return Found(u64::from(search.victim) << 32);
    }
    if let Some(entry) = tables.cache(search.found - 1) {
        entry.used.store(now);
    }
    Found(u64::from(search.found) << 32 | Found::KNOWN)
}

/// The destination of an entry: for lblcr, the least loaded of its set.
#[inline(never)]
fn best_of_set(tables: &impl Tables, view: &View, found: Found) -> Choice {
    let Some(entry) = found.entry().and_then(|index| tables.cache(index)) else { return Choice::NONE };
    let service = view.service.load();
    if view.scheduler.load() == Scheduler::Lblc as u32 {
        // Thresholds do not count.
        let chosen = entry.set[0].load();
        let dest = tables.dest(chosen.wrapping_sub(1));
        let usable = dest.is_some_and(|dest| dest.usable() && dest.service.load() == service);
        return if usable { Choice(chosen.into()) } else { Choice::NONE };
    }
    let mut best = LeastLoaded::by_load(tables);
    // Verifier: no scan, whose callback would take up stack below everything else.
    for index in 0..opaque(CACHE_SET.into()) {
        let Some(dest) = entry.set.get(opaque(index) as usize) else { break };
        let number = dest.load().wrapping_sub(1);
        if let Some(dest) = tables.dest(number)
            && dest.service.load() == service
            && dest.available()
        {
            let limited = if dest.upper.load() == 0 { 0 } else { Slot::LIMITED };
            best.consider(number, dest.weight.load() | limited);
        }
        // Verifier: hidden, or it would follow the loop once for every combination of comparisons.
        best.hide(|number| tables.hide(number));
    }
    Choice(best.choice().into())
}

/// Takes the most loaded destination out of the set of an entry, if it has others and has been the same for long.
#[inline(never)]
fn shrink_if_due(tables: &impl Tables, env: &impl Env, view: &View, found: Found) {
    if let Some(entry) = found.entry().and_then(|index| tables.cache(index))
        && entry.set[1].load() != 0
        && let Some(Now { config, clock }) = now(tables, env)
        && clock.now.0.wrapping_sub(entry.modified.load()) > expiration(config, view, clock)
    {
        shrink(tables, entry, clock.now.0);
    }
}

/// Remembers that `address` has a destination.
#[inline(never)]
fn remember(
    tables: &impl Tables,
    env: &impl Env,
    view: &View,
    address: u64,
    (found, choice): (Found, Choice),
) -> Option<()> {
    let chosen = choice.0 as u32;
    let entry = tables.cache(found.entry()?)?;
    let now = now(tables, env)?.clock.now.0;
    let owner = view.cache.load();
    let version = begin(entry)?;
    let known = found.0 & Found::KNOWN != 0;
    if known && (entry.owner.load() != owner || entry.address.load() != address) {
        // Another address has taken the entry meanwhile.
        end(entry, version);
        return None;
    }
    if known && view.scheduler.load() == Scheduler::Lblcr as u32 {
        if !entry.set.iter().any(|dest| dest.load() == chosen) {
            // The newest first; what was put in first of as many as there is room for is lost.
            for index in (1..CACHE_SET as usize).rev() {
                entry.set[index].store(entry.set[index - 1].load());
            }
            entry.set[0].store(chosen);
            entry.modified.store(now);
        }
    } else {
        entry.owner.store(0);
        entry.address.store(address);
        entry.used.store(now);
        entry.modified.store(now);
        for dest in &entry.set {
            dest.store(0);
        }
        entry.set[0].store(chosen);
        entry.owner.store(owner);
    }
    end(entry, version);
    Some(())
}

/// Begins to write an entry. `None` when another CPU is at it.
#[inline(always)]
fn begin(entry: &CacheEntry) -> Option<u32> {
    let version = entry.version.load();
    let claimed = version & 1 == 0 && entry.version.compare_exchange(version, version.wrapping_add(1)).is_ok();
    claimed.then_some(version)
}

#[inline(always)]
fn end(entry: &CacheEntry, version: u32) {
    entry.version.store(version.wrapping_add(2));
}

/// Whether a destination has more active connections than its weight.
#[inline(always)]
fn is_overloaded(tables: &impl Tables, number: u32) -> bool {
    let active = tables.dest_load(number).map_or(0, |load| active_and_total(load.connections.load()).0);
    active > tables.dest(number).map_or(0, |dest| dest.weight.load())
}

/// Takes the most loaded destination out of a set.
#[inline(always)]
fn shrink(tables: &impl Tables, entry: &CacheEntry, now: u32) {
    let Some(version) = begin(entry) else { return };
    let (mut most, mut most_overhead, mut most_weight) = (0, 0, 0);
    for dest in &entry.set {
        let chosen = dest.load();
        let number = chosen.wrapping_sub(1);
        let weight = u64::from(tables.dest(number).map_or(0, |dest| dest.weight.load()));
        let connections = tables.dest_load(number).map_or(0, |load| load.connections.load());
        let (active, total) = active_and_total(connections);
        let overhead = 256 * u64::from(active) + u64::from(total);
        if chosen != 0 && weight != 0 && (most == 0 || most_overhead * weight < overhead * most_weight) {
            (most, most_overhead, most_weight) = (chosen, overhead, weight);
        }
        (most_overhead, most_weight) = (tables.hide(most_overhead), tables.hide(most_weight));
        most = tables.hide(most.into()) as u32;
    }
    if most != 0 {
        let mut beyond = false;
        for index in 0..CACHE_SET as usize {
            beyond |= entry.set[index].load() == most;
            if beyond {
                entry.set[index].store(entry.set.get(index + 1).map_or(0, |next| next.load()));
            }
        }
        entry.modified.store(now);
    }
    end(entry, version);
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable as _;
    use lb_common::{
        abi::{DestRecord, ONE_ACTIVE, ONE_CONNECTION, Record as _, SlotRecord, ViewRecord, slot},
        hash::Seed,
    };

    use super::*;
    use crate::host::{HostEnv, HostSizes, HostTables};

    const HZ: u32 = 250;
    const DAY_S: u32 = 86_400;
    const DAY: u32 = DAY_S * HZ;

    /// A service with as many destinations of this weight.
    fn service(dests: u32, weight: u32, scheduler: Scheduler) -> (HostTables, HostEnv) {
        let sizes =
            HostSizes { services: 1, dests: 16, slots: 16, endpoint_buckets: 1, flow_buckets: 2, flow_buckets6: 2 };
        let tables = HostTables::new(
            sizes,
            Seed::new([0x243f_6a88_85a3_08d3, 0x1319_8a2e_0370_7344, 0xa409_3822_299f_31d0]),
            HZ,
        );
        for number in 0..dests {
            let record = DestRecord { state: slot::USED, weight, ..DestRecord::zeroed() };
            tables.dests[number as usize].store(&record);
            tables.slots[number as usize].store(&SlotRecord { dest: number, threshold: weight });
        }
        let view = ViewRecord { scheduler: scheduler as u32, list_len: dests, cache: 7, ..ViewRecord::zeroed() };
        tables.views[0].store(&view);
        tables.config[0].lblc_expiration.store(DAY_S);
        tables.config[0].lblcr_expiration.store(DAY_S);
        (tables, HostEnv::new(HZ))
    }

    /// The destination of `address` that stays so.
    fn found(tables: &HostTables, env: &HostEnv, address: u64) -> Option<u32> {
        let view = &tables.views[0];
        let found = look_up(tables, env, view, address);
        let stays = found.is_certain() || !least_loaded(tables, env, view).saw_idle();
        if stays { found.choice().dest() } else { None }
    }

    /// Looks `address` up, and then remembers destination number `dest`.
    fn learn(tables: &HostTables, env: &HostEnv, address: u64, dest: u32) {
        let found = look_up(tables, env, &tables.views[0], address);
        remember(tables, env, &tables.views[0], address, (found, Choice::of(Some(dest)))).expect("room");
    }

    fn load(tables: &HostTables, dest: u32, active: u64) {
        tables.dest_loads[dest as usize].connections.store(active * (ONE_CONNECTION + ONE_ACTIVE));
    }

    fn set(tables: &HostTables) -> Vec<u32> {
        let entry = tables.cache.iter().find(|entry| entry.owner.load() != 0).expect("an entry");
        entry.set.iter().filter_map(|dest| dest.load().checked_sub(1)).collect()
    }

    #[test]
    fn an_address_keeps_its_destination_until_it_is_not_used_for_a_day() {
        let (tables, env) = service(2, 10, Scheduler::Lblc);
        assert_eq!(found(&tables, &env, 1), None);
        learn(&tables, &env, 1, 1);
        for _ in 0..3 {
            env.jiffies.update(|now| now + DAY - 1);
            assert_eq!(found(&tables, &env, 1), Some(1));
        }
        env.jiffies.update(|now| now + DAY);
        assert_eq!(found(&tables, &env, 1), None);
    }

    #[test]
    fn an_address_is_forgotten_as_soon_as_is_set_for_its_own_scheduler() {
        for (scheduler, other) in [(Scheduler::Lblc, Scheduler::Lblcr), (Scheduler::Lblcr, Scheduler::Lblc)] {
            let (tables, env) = service(2, 10, scheduler);
            let config = &tables.config[0];
            let own = if scheduler == Scheduler::Lblc { &config.lblc_expiration } else { &config.lblcr_expiration };
            own.store(60);
            learn(&tables, &env, 1, 1);
            env.jiffies.update(|now| now + 60 * HZ - 1);
            assert_eq!(found(&tables, &env, 1), Some(1));
            env.jiffies.update(|now| now + 60 * HZ);
            assert_eq!(found(&tables, &env, 1), None);
            own.store(0);
            learn(&tables, &env, 1, 1);
            assert_eq!(found(&tables, &env, 1), None);
            // What belongs to a service of the other scheduler stays as long as it may.
            own.store(DAY_S);
            learn(&tables, &env, 1, 1);
            own.store(60);
            tables.views[0].scheduler.store(other as u32);
            env.jiffies.update(|now| now + 3600 * HZ);
            assert_eq!(found(&tables, &env, 1), Some(1));
            tables.views[0].cache.store(8);
            let bucket =
                |address: u64, owner: u64| scale(tables.seed().quick_hash(address ^ owner << 32), CACHE_BUCKETS);
            for address in (0u64..).filter(|address| bucket(*address, 8) == bucket(1, 7)).take(7) {
                learn(&tables, &env, address, 0);
            }
            tables.views[0].cache.store(7);
            assert_eq!(found(&tables, &env, 1), Some(1));
        }
    }

    #[test]
    fn a_destination_that_is_not_the_service_s_any_more_is_not_used() {
        let (tables, env) = service(2, 10, Scheduler::Lblc);
        learn(&tables, &env, 1, 1);
        tables.dests[1].state.store(slot::REMOVED);
        assert_eq!(found(&tables, &env, 1), None);
        tables.dests[1].state.store(slot::USED);
        assert_eq!(found(&tables, &env, 1), Some(1));
        tables.dests[1].service.store(5);
        assert_eq!(found(&tables, &env, 1), None);
        // Another scheduler and back: nothing is known any more.
        tables.dests[1].service.store(0);
        tables.views[0].cache.store(8);
        assert_eq!(found(&tables, &env, 1), None);
    }

    #[test]
    fn a_destination_is_overloaded_only_if_another_is_idle() {
        let (tables, env) = service(2, 10, Scheduler::Lblc);
        learn(&tables, &env, 1, 1);
        load(&tables, 1, 11);
        load(&tables, 0, 5);
        assert_eq!(found(&tables, &env, 1), Some(1));
        load(&tables, 0, 4);
        assert_eq!(found(&tables, &env, 1), None);
        load(&tables, 1, 10);
        assert_eq!(found(&tables, &env, 1), Some(1));
    }

    #[test]
    fn the_address_that_has_not_been_used_for_longest_makes_room() {
        let (tables, env) = service(1, 10, Scheduler::Lblc);
        let bucket = |address: u64| scale(tables.seed().quick_hash(address ^ 7 << 32), CACHE_BUCKETS);
        let addresses: Vec<u64> = (0u64..).filter(|address| bucket(*address) == 5).take(9).collect();
        for address in &addresses[..8] {
            env.jiffies.update(|now| now + 1);
            learn(&tables, &env, *address, 0);
        }
        env.jiffies.update(|now| now + 1);
        assert_eq!(found(&tables, &env, addresses[0]), Some(0));
        learn(&tables, &env, addresses[8], 0);
        let known: Vec<bool> = addresses.iter().map(|address| found(&tables, &env, *address).is_some()).collect();
        assert_eq!(known, [true, false, true, true, true, true, true, true, true]);
    }

    #[test]
    fn a_set_has_the_newest_first_and_at_most_eight() {
        let (tables, env) = service(9, 10, Scheduler::Lblcr);
        for dest in 0..9 {
            // All that are known are overloaded, and the last is idle.
            learn(&tables, &env, 1, dest);
            load(&tables, dest, 20);
        }
        assert_eq!(set(&tables), [8, 7, 6, 5, 4, 3, 2, 1]);
        // What is there already stays where it is.
        learn(&tables, &env, 1, 3);
        assert_eq!(set(&tables), [8, 7, 6, 5, 4, 3, 2, 1]);
        // The least loaded is used; of equals, the newest.
        assert_eq!(found(&tables, &env, 1), Some(8));
        load(&tables, 4, 9);
        load(&tables, 2, 9);
        assert_eq!(found(&tables, &env, 1), Some(4));
    }

    #[test]
    fn a_set_that_is_the_same_for_a_day_loses_its_most_loaded() {
        let (tables, env) = service(3, 10, Scheduler::Lblcr);
        for dest in 0..3 {
            learn(&tables, &env, 1, dest);
            load(&tables, dest, 20);
        }
        (0..3).for_each(|dest| load(&tables, dest, [1, 3, 2][dest as usize]));
        env.jiffies.update(|now| now + DAY - 1);
        assert_eq!((found(&tables, &env, 1), set(&tables)), (Some(0), vec![2, 1, 0]));
        env.jiffies.update(|now| now + 2);
        assert_eq!((found(&tables, &env, 1), set(&tables)), (Some(0), vec![2, 0]));
        env.jiffies.update(|now| now + DAY - 1);
        assert_eq!((found(&tables, &env, 1), set(&tables)), (Some(0), vec![2, 0]));
        env.jiffies.update(|now| now + 2);
        assert_eq!((found(&tables, &env, 1), set(&tables)), (Some(0), vec![0]));
        env.jiffies.update(|now| now + DAY - 1);
        assert_eq!((found(&tables, &env, 1), set(&tables)), (Some(0), vec![0]));
    }

    #[test]
    fn what_another_cpu_is_writing_is_left_alone() {
        let (tables, env) = service(2, 10, Scheduler::Lblc);
        learn(&tables, &env, 1, 1);
        let found = look_up(&tables, &env, &tables.views[0], 1);
        let entry = &tables.cache[found.entry().expect("known") as usize];
        let version = begin(entry).expect("at rest");
        assert_eq!(remember(&tables, &env, &tables.views[0], 1, (found, Choice::of(Some(0)))), None);
        end(entry, version);
        assert_eq!(remember(&tables, &env, &tables.views[0], 1, (found, Choice::of(Some(0)))), Some(()));
        assert_eq!(set(&tables), [0]);
    }
}
