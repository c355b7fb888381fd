//! What the ageing timer does besides: it goes over all destinations and services every two seconds, a few in
//! each tick, estimates their rates, and settles which defences are on.

use lb_common::{
    abi::{Config, Estimate, Instance, Upkeep, active_and_total, slot},
    defence,
    jiffies::Jiffies,
    rate,
};

use crate::{
    env::{Clock, Scan},
    tables::Tables,
};

/// How long a pass takes, in seconds: as often as ip_vs estimates rates.
pub const PASS_S: u32 = 2;

/// The part of a pass that is due, and what comes with the end of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Due {
    /// The object that the pass goes on with.
    pub first: u32,
    /// How many are due.
    pub count: u32,
    /// Whether the pass ends with them.
    pub ends: bool,
}

/// Which objects of `objects` are due. Has them done, as far as `upkeep` says.
///
/// A pass begins when the one before has had its time, so that every object comes by once in that time exactly, whatever
/// the distance of ticks. One that is late by as much again begins anew.
#[inline(always)]
pub fn due(upkeep: &Upkeep, clock: Clock, objects: u32) -> Due {
    let length = PASS_S * clock.hz;
    // As an unsigned number: a time before the beginning is far behind its end, too.
    let passed = clock.now.since(Jiffies(upkeep.began.load())).cast_unsigned();
    if passed >= 2 * length {
        upkeep.began.store(clock.now.0);
        upkeep.next.store(0);
        upkeep.connections.store(0);
        return Due { first: 0, count: 0, ends: false };
    }
    let ends = passed >= length;
    let target = if ends {
        objects
    } else {
        (u64::from(objects) * u64::from(passed)).checked_div(length.into()).unwrap_or(0) as u32
    };
    let first = upkeep.next.load();
    upkeep.next.store(if ends { 0 } else { target.max(first) });
    if ends {
        upkeep.began.store(upkeep.began.load().wrapping_add(length));
    }
    Due { first, count: target.saturating_sub(first), ends }
}

/// What there is to go over.
pub trait Objects: Tables {
    /// What is known of the traffic of an object: see [`Estimate`].
    fn estimate(&self, index: u32) -> Option<&Estimate>;

    /// The counters of a destination, of all CPUs together.
    fn traffic(&self, dest: u32) -> [u64; 5];
}

/// How many objects there are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// Destinations that there is room for.
    pub dests: u32,
    /// Services that there is room for.
    pub services: u32,
    /// Destinations that have ever been used.
    pub dests_used: u32,
    /// Services that have ever been used.
    pub services_used: u32,
}

impl Extent {
    /// What an instance has.
    #[inline(always)]
    pub fn of(instance: &Instance) -> Self {
        Self {
            dests: instance.dests.load(),
            services: instance.services.load(),
            dests_used: instance.dests_used.load(),
            services_used: instance.services_used.load(),
        }
    }

    /// The objects of a pass: destinations, services, and all together.
    #[inline(always)]
    pub const fn objects(&self) -> u32 {
        self.dests_used + self.services_used + 1
    }
}

/// Goes over objects.
pub struct Round<'t, T> {
    /// The tables.
    pub tables: &'t T,
    /// The first object; the scan's index is added to it.
    pub first: u32,
    /// How many objects there are.
    pub extent: Extent,
    /// 1 when rates are estimated, else 0.
    pub estimates: u64,
    /// How many connections the destinations among them have.
    pub connections: u32,
}

impl<T: Objects> Scan for Round<'_, T> {
    #[inline(always)]
    fn hide(&mut self, hide: impl Fn(u64) -> u64) {
        self.estimates = hide(self.estimates);
    }

    #[inline(always)]
    fn visit(&mut self, index: u32) -> bool {
        let (number, Extent { dests, services, dests_used, services_used }) = (self.first + index, self.extent);
        if number < dests_used {
            self.dest(number);
        } else if self.estimates != 0 {
            let service = number - dests_used;
            self.sum(dests + if service < services_used { service } else { services });
        }
        true
    }
}

impl<T: Objects> Round<'_, T> {
    /// Estimates the rates of a destination, and lets its service and all together know what it has counted.
    #[inline(always)]
    fn dest(&mut self, number: u32) -> Option<()> {
        let load = self.tables.dest_load(number)?;
        self.connections = self.connections.wrapping_add(active_and_total(load.connections.load()).1);
        let dest = self.tables.dest(number)?;
        if self.estimates == 0 || dest.state.load() == slot::FREE {
            return None;
        }
        let (estimate, traffic) = (self.tables.estimate(number)?, self.tables.traffic(number));
        if begin(estimate) {
            estimate.counted.iter().for_each(|counted| counted.store(0));
        }
        let Extent { dests, services, .. } = self.extent;
        let service = self.tables.estimate(dests + dest.service.load())?;
        let all = self.tables.estimate(dests + services)?;
        for (index, now) in traffic.into_iter().enumerate() {
            let before = estimate.counted[index].load();
            // They have begun at zero meanwhile if there are fewer than before.
            let growth = if now < before { now } else { now - before };
            estimate.counted[index].store(now);
            grow(estimate, index, growth);
            for sum in [service, all] {
                sum.counted[index].store(sum.counted[index].load().wrapping_add(growth));
            }
        }
        Some(())
    }

    /// Estimates the rates of a service, or of all, from what destinations have counted since.
    #[inline(always)]
    fn sum(&self, index: u32) -> Option<()> {
        let estimate = self.tables.estimate(index)?;
        begin(estimate);
        for index in 0..5 {
            let growth = estimate.counted[index].load();
            estimate.counted[index].store(0);
            grow(estimate, index, growth);
        }
        Some(())
    }
}

/// Begins anew, if that is wished. Returns whether counters do, too.
#[inline(always)]
fn begin(estimate: &Estimate) -> bool {
    let wish = estimate.wish.load();
    if wish == estimate.done.load() {
        return false;
    }
    estimate.average.iter().for_each(|average| average.store(0));
    estimate.done.store(wish);
    wish & 1 != 0
}

#[inline(always)]
fn grow(estimate: &Estimate, index: usize, growth: u64) {
    let average = &estimate.average[index];
    average.store(rate::step(index, average.load(), growth));
}

/// Notes what a part of a pass has come by; and at its end, what follows for the defences, in an instance made for `max`
/// connections.
#[inline(always)]
pub fn close(tables: &impl Tables, upkeep: &Upkeep, config: &Config, due: Due, connections: u32, max: u32) {
    let connections = upkeep.connections.load().wrapping_add(connections);
    upkeep.connections.store(if due.ends { 0 } else { connections });
    if due.ends
        && let Some(rate) = defence::settle(config, defence::pages_left(max, connections))
        && let Some(limiter) = tables.limiter()
    {
        limiter.drop_counter.store(rate);
    }
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable;
    use lb_common::{abi::Record as _, hash::Seed};

    use super::*;
    use crate::host::{HostSizes, HostTables};

    const HZ: u32 = 250;

    /// The objects that come by in ticks at these times.
    fn run(upkeep: &Upkeep, objects: u32, times: impl IntoIterator<Item = u32>) -> Vec<(u32, u32)> {
        let mut seen = Vec::new();
        for now in times {
            let due = due(upkeep, Clock { now: Jiffies(now), hz: HZ }, objects);
            seen.extend((due.first..due.first + due.count).map(|object| (object, now)));
        }
        seen
    }

    #[test]
    fn every_object_comes_by_once_in_a_pass() {
        for step in [1, 2, 3, 7, 100, 499] {
            let upkeep = Upkeep::zeroed();
            // From just before the clock wraps on.
            let seen = run(&upkeep, 10, (0..2000).map(|turn| (u32::MAX - 4000).wrapping_add(step * turn)));
            let passes = step * 1999 / (PASS_S * HZ);
            for object in 0..10 {
                let turns = seen.iter().filter(|(other, _)| *other == object).count() as u32;
                assert!((passes..=passes + 1).contains(&turns), "{object} came by {turns} times in {passes} passes");
            }
        }
    }

    #[test]
    fn passes_are_two_seconds_apart_although_ticks_are_not_on_time() {
        let upkeep = Upkeep::zeroed();
        let seen = run(&upkeep, 4, (0..=5000).map(|time| 10_000 + time).filter(|time| time % 7 == 0));
        let first: Vec<u32> = seen.iter().filter(|(object, _)| *object == 2).map(|(_, now)| *now).collect();
        assert_eq!(first.len(), 10);
        for (turn, now) in (0..).zip(&first) {
            assert!(now.abs_diff(first[0] + turn * PASS_S * HZ) <= 7, "{first:?}");
        }
    }

    /// One destination that is used, number 1, of a service in slot 0; and a pass over all.
    struct Lone(HostTables);

    impl Lone {
        fn new() -> Self {
            let sizes =
                HostSizes { services: 2, dests: 3, slots: 1, endpoint_buckets: 1, flow_buckets: 2, flow_buckets6: 2 };
            let tables = HostTables::new(sizes, Seed::new([1, 2, 3]), HZ);
            tables.dests[1].state.store(slot::USED);
            tables.instance[0].dests_used.store(2);
            tables.instance[0].services_used.store(1);
            Self(tables)
        }

        fn pass(&self, connections: u64, bytes: u64) {
            let counters = &self.0.dest_cpus[1].counters;
            counters.connections.update(|sum| sum + connections);
            counters.bytes_out.update(|sum| sum + bytes);
            let extent = Extent::of(&self.0.instance[0]);
            let mut round = Round { tables: &self.0, first: 0, extent, estimates: 1, connections: 0 };
            (0..extent.objects()).for_each(|index| assert!(round.visit(index)));
        }

        /// Connections and bytes sent per second, of the destination, its service, and all.
        fn rates(&self) -> [(u64, u64); 3] {
            [1, 3, 5].map(|index: usize| {
                let average = &self.0.estimates[index].average;
                (rate::per_second(0, average[0].load()), rate::per_second(4, average[4].load()))
            })
        }
    }

    #[test]
    fn a_destination_its_service_and_all_have_rates() {
        let lone = Lone::new();
        lone.pass(200, 40);
        assert_eq!(lone.rates(), [(25, 5); 3]);
        lone.pass(0, 0);
        assert_eq!(lone.rates(), [(19, 4); 3]);
        for unused in [0, 2, 4] {
            assert_eq!(lone.0.estimates[unused].load(), Zeroable::zeroed(), "{unused}");
        }
    }

    #[test]
    fn rates_begin_anew_by_themselves_and_counters_only_if_they_are_fresh() {
        let lone = Lone::new();
        lone.pass(200, 400);
        lone.0.estimates[1].renew(false);
        // What has been carried since the last estimation counts.
        lone.pass(200, 0);
        assert_eq!(lone.rates()[0], (25, 0));
        // Another destination at the same number, whose first connections are fewer than those of the one before, or more.
        for (round, connections) in [100, 800].into_iter().enumerate() {
            lone.0.dest_cpus[1].counters.connections.set(0);
            if round == 0 {
                lone.0.estimates[1].renew(true);
                // Zeroed before anything has been estimated.
                lone.0.estimates[1].renew(false);
            } else {
                lone.0.estimates[1].renew(true);
            }
            lone.pass(connections, 0);
            assert_eq!(lone.rates()[0].0, connections / 8, "{connections}");
        }
        // Its counters begin at zero, and there is an estimation before it is known that they do.
        let all = lone.rates()[2].0;
        lone.0.dest_cpus[1].counters.connections.set(0);
        lone.pass(0, 0);
        assert!(lone.rates()[2].0 < all, "{all} and then {:?}", lone.rates());
    }

    #[test]
    fn a_pass_that_is_long_overdue_begins_anew() {
        let upkeep = Upkeep::zeroed();
        assert!(run(&upkeep, 4, [50_000, 50_100]).is_empty());
        assert_eq!(run(&upkeep, 4, [50_250]), [(0, 50_250), (1, 50_250)]);
        assert!(run(&upkeep, 4, [60_000]).is_empty());
        assert_eq!(run(&upkeep, 4, [60_126]), [(0, 60_126)]);
        // The clock was put back.
        assert!(run(&upkeep, 4, [40_000]).is_empty());
        assert_eq!(run(&upkeep, 4, [40_126]), [(0, 40_126)]);
    }
}
