//! What the ageing timer does besides: it goes over all destinations every two seconds, a few in each tick.

use lb_common::{
    abi::{Config, Upkeep, active_and_total},
    defence,
    jiffies::Jiffies,
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

/// Goes over destinations.
pub struct Round<'t, T> {
    /// The tables.
    pub tables: &'t T,
    /// The first destination; the scan's index is added to it.
    pub first: u32,
    /// How many connections they have.
    pub connections: u32,
}

impl<T: Tables> Scan for Round<'_, T> {
    #[inline(always)]
    fn visit(&mut self, index: u32) -> bool {
        if let Some(load) = self.tables.dest_load(self.first + index) {
            self.connections = self.connections.wrapping_add(active_and_total(load.connections.load()).1);
        }
        true
    }
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
    use bytemuck::Zeroable as _;

    use super::*;

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
