//! Choosing the destination of a new connection by lot: random, wrandom, and twos (`docs/ipvs.md`, section 3.12).

use lb_common::{
    abi::{Slot, View, active_and_total},
    hash::scale,
    proto::Scheduler,
};

use crate::{
    env::{Env, Scan},
    schedule::{Choice, Limits, is_usable, usable_at},
    tables::Tables,
};

/// How often random and wrandom draw from their ring before they look at all destinations.
///
/// A ring knows weights, and nothing of thresholds: what it gives may be overloaded. Drawing again until something usable
/// comes gives every usable destination its share; and so does the look at all of them.
const DRAWS: u32 = 8;

struct Draws<'t, T, E> {
    tables: &'t T,
    env: &'t E,
    start: u32,
    columns: u32,
    /// The usable destination that was drawn, plus one; 0 before there is one.
    found: u64,
}

impl<T: Tables, E: Env> Scan for Draws<'_, T, E> {
    #[inline(always)]
    fn visit(&mut self, _: u32) -> bool {
        let column = self.start + 2 * scale(self.env.random(), self.columns);
        // Everything below the share is the column's own.
        let other = u32::from(self.env.random() >= self.tables.slot(column).map_or(0, Slot::threshold));
        self.found = Choice::of(usable_at(self.tables, column + other, Limits::Heeded)).0;
        self.found == 0
    }
}

/// random and wrandom: a usable destination by lot.
///
/// The ring has two slots for every destination with a weight, its own and another's, and says how often it is the first
/// (Walker's method): so one draw is as good as a walk along all of them.
#[inline(never)]
pub(crate) fn drawn(tables: &impl Tables, env: &impl Env, view: &View) -> Choice {
    let (start, columns) = (view.ring.load(), view.ring_len.load() / 2);
    if columns == 0 {
        return Choice::NONE;
    }
    let mut draws = Draws { tables, env, start, columns, found: 0 };
    env.scan(DRAWS, &mut draws);
    if draws.found != 0 {
        return Choice(draws.found);
    }
    let unweighted = u64::from(view.scheduler.load() == Scheduler::Random as u32);
    let total = total(tables, env, view, unweighted);
    if total == 0 {
        return Choice::NONE;
    }
    let lot = 1 + below(env, total);
    Choice(walk(tables, env, view, unweighted, [lot, lot])[0])
}

/// twos: of two destinations drawn by weight, the one with less overhead for its weight.
#[inline(never)]
pub(crate) fn less_loaded_of_two(tables: &impl Tables, env: &impl Env, view: &View) -> Choice {
    let total = total(tables, env, view, 0);
    if total == 0 {
        return Choice::NONE;
    }
    let [first, second] = walk(tables, env, view, 0, [below(env, total + 1), below(env, total + 1)]);
    let (of_first, of_second) = (weight_and_overhead(tables, first), weight_and_overhead(tables, second));
    // In 32 bits, as ip_vs does it.
    let product = |weight: u64, overhead: u64| ((weight >> 32) as i32).wrapping_mul(overhead as i32);
    let second_is_better = product(of_second, of_first) > product(of_first, of_second);
    Choice(if second_is_better { second } else { first })
}

/// The weight of the destination with this number less one in the high half, its overhead by wlc's measure in the low half.
///
/// Verifier: one word, for an unset half of an `Option` is uninitialised memory to it.
#[inline(always)]
fn weight_and_overhead(tables: &impl Tables, choice: u64) -> u64 {
    let number = (choice as u32).wrapping_sub(1);
    let weight = tables.dest(number).map_or(0, |dest| dest.weight.load());
    let connections = tables.dest_load(number).map_or(0, |load| load.connections.load());
    let (active, total) = active_and_total(connections);
    tables.hide(u64::from(weight) << 32 | u64::from(active.wrapping_mul(256).wrapping_add(total)))
}

/// A random number below `limit`, which is not 0.
#[inline(always)]
fn below(env: &impl Env, limit: u64) -> u64 {
    let number = u64::from(env.random()) << 32 | u64::from(env.random());
    number.checked_rem(limit).unwrap_or_default()
}

/// The number of a destination in the low half, its weight in the high half: 0 when it is not usable, 1 when weights do not
/// matter.
///
/// Verifier: one word, as above.
#[inline(always)]
fn weight_at(tables: &impl Tables, index: u32, unweighted: u64) -> u64 {
    let Some(slot) = tables.slot(index) else { return 0 };
    let number = slot.dest();
    let Some(dest) = tables.dest(number) else { return 0 };
    let usable = u64::from(is_usable(tables, number, dest, Limits::Heeded));
    let weight = u64::from(dest.weight.load());
    tables.hide((usable * (weight * (unweighted ^ 1) + unweighted)) << 32 | u64::from(number))
}

struct Total<'t, T> {
    tables: &'t T,
    start: u32,
    unweighted: u64,
    total: u64,
}

impl<T: Tables> Scan for Total<'_, T> {
    #[inline(always)]
    fn visit(&mut self, index: u32) -> bool {
        self.total += weight_at(self.tables, self.start + index, self.unweighted) >> 32;
        true
    }
}

/// The weights of all usable destinations.
#[inline(always)]
fn total(tables: &impl Tables, env: &impl Env, view: &View, unweighted: u64) -> u64 {
    let mut scan = Total { tables, start: view.list.load(), unweighted, total: 0 };
    env.scan(view.list_len.load(), &mut scan);
    scan.total
}

struct Walk<'t, T> {
    tables: &'t T,
    start: u32,
    unweighted: u64,
    /// What is left of each lot.
    lots: [u64; 2],
    /// The destination that each lot has fallen on, plus one; 0 before it has.
    found: [u64; 2],
}

impl<T: Tables> Scan for Walk<'_, T> {
    #[inline(always)]
    fn visit(&mut self, index: u32) -> bool {
        let found = weight_at(self.tables, self.start + index, self.unweighted);
        let (weight, choice) = (found >> 32, (found & 0xffff_ffff) + 1);
        if weight == 0 {
            return true;
        }
        for (lot, found) in self.lots.iter_mut().zip(&mut self.found) {
            if *found == 0 && weight >= *lot {
                *found = choice;
            }
            *lot = lot.saturating_sub(weight);
        }
        self.found[0] == 0 || self.found[1] == 0
    }
}

/// The usable destinations that two lots fall on, plus one: those at which the weights from the first on reach the lot.
#[inline(always)]
fn walk(tables: &impl Tables, env: &impl Env, view: &View, unweighted: u64, lots: [u64; 2]) -> [u64; 2] {
    let mut scan = Walk { tables, start: view.list.load(), unweighted, lots, found: [0; 2] };
    env.scan(view.list_len.load(), &mut scan);
    scan.found
}
