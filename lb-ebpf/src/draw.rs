//! Choosing the destination of a new connection by lot: random, wrandom, and twos (`docs/ipvs.md`, section 3.12).

use lb_common::{
    abi::{Slot, View, active_and_total},
    hash::scale,
};

use crate::{
    env::{Env, Scan},
    schedule::{Choice, Limits, each_of, lines, usable_at},
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
    fn hide(&mut self, _: impl Fn(u64) -> u64) {}

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
    let total = total(tables, env, view);
    if total == 0 {
        return Choice::NONE;
    }
    let lot = 1 + below(env, total);
    let found = walk(tables, env, view, [lot, lot])[0];
    // The list may be behind.
    if is_removed(tables, found) != 0 { Choice::NONE } else { Choice(found) }
}

/// twos: of two destinations drawn by weight, the one with less overhead for its weight.
#[inline(never)]
pub(crate) fn less_loaded_of_two(tables: &impl Tables, env: &impl Env, view: &View) -> Choice {
    let total = total(tables, env, view);
    if total == 0 {
        return Choice::NONE;
    }
    let [first, second] = walk(tables, env, view, [below(env, total + 1), below(env, total + 1)]);
    // Lists may be behind.
    if is_removed(tables, first) != 0 || is_removed(tables, second) != 0 {
        let other = if is_removed(tables, first) != 0 { second } else { first };
        return if is_removed(tables, other) != 0 { Choice::NONE } else { Choice(other) };
    }
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

/// 1 when the destination with this number less one is not configured any more, else 0.
#[inline(always)]
fn is_removed(tables: &impl Tables, choice: u64) -> u64 {
    let load = tables.dest_load((choice as u32).wrapping_sub(1));
    tables.hide(load.map_or(1, |load| load.removed.load()).into())
}

/// The weight of a list's destination: 0 when it is not usable. For random, lists say that all weights are 1.
#[inline(always)]
fn weight_in(tables: &impl Tables, slot: &Slot) -> u64 {
    let (number, weight) = slot.dest_and_weight();
    if weight & Slot::LIMITED != 0 && tables.is_overloaded(number) != 0 {
        return 0;
    }
    u64::from(weight & !Slot::LIMITED)
}

struct Total<'t, T> {
    tables: &'t T,
    first: u32,
    total: u64,
}

impl<T: Tables> Scan for Total<'_, T> {
    #[inline(always)]
    fn hide(&mut self, _: impl Fn(u64) -> u64) {}

    #[inline(always)]
    fn visit(&mut self, index: u32) -> bool {
        let Some(line) = self.tables.slots(self.first + index) else { return false };
        each_of!(
            line,
            #[inline(always)]
            |slot: &Slot| self.total += weight_in(self.tables, slot)
        );
        true
    }
}

/// The weights of all usable destinations.
#[inline(always)]
fn total(tables: &impl Tables, env: &impl Env, view: &View) -> u64 {
    let (first, count) = lines(view);
    // Verifier: hidden, or it would add up numbers that it knows.
    let mut scan = Total { tables, first, total: tables.hide(0) };
    env.scan(count, &mut scan);
    scan.total
}

struct Walk<'t, T> {
    tables: &'t T,
    first: u32,
    /// What is left of each lot.
    lots: [u64; 2],
    /// The destination that each lot has fallen on, plus one; 0 before it has.
    found: [u64; 2],
}

impl<T: Tables> Scan for Walk<'_, T> {
    #[inline(always)]
    fn hide(&mut self, hide: impl Fn(u64) -> u64) {
        self.found = self.found.map(hide);
    }

    #[inline(always)]
    fn visit(&mut self, index: u32) -> bool {
        let Some(line) = self.tables.slots(self.first + index) else { return false };
        each_of!(
            line,
            #[inline(always)]
            |slot: &Slot| self.step(slot)
        );
        self.found[0] == 0 || self.found[1] == 0
    }
}

impl<T: Tables> Walk<'_, T> {
    #[inline(always)]
    fn step(&mut self, slot: &Slot) {
        let weight = weight_in(self.tables, slot);
        if weight == 0 {
            return;
        }
        let choice = u64::from(slot.dest()) + 1;
        for (lot, found) in self.lots.iter_mut().zip(&mut self.found) {
            if *found == 0 && weight >= *lot {
                *found = choice;
            }
            *lot = lot.saturating_sub(weight);
        }
    }
}

/// The usable destinations that two lots fall on, plus one: those at which the weights from the first on reach the lot.
#[inline(always)]
fn walk(tables: &impl Tables, env: &impl Env, view: &View, lots: [u64; 2]) -> [u64; 2] {
    let (first, count) = lines(view);
    // Verifier: hidden, as above.
    let found = [tables.hide(0), tables.hide(0)];
    let mut scan = Walk { tables, first, lots, found };
    env.scan(count, &mut scan);
    scan.found
}
