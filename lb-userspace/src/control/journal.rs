//! Making a change count at once, and finishing it.
//!
//! The journal holds the records that a change writes. As long as its first slot says 0, nothing has happened. From the
//! store that makes it say how many steps follow, the change is a fact, and [`carry_out`] does the rest: the very code
//! that finishes a change for a process that was killed, for every step may be taken twice.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use bytemuck::Zeroable as _;
use lb_common::abi::{DestRecord, Estimate, JournalRecord, Record as _, ServiceRecord, journal as kind};

use crate::{
    control::{
        compile::{self, Compiled},
        shared::{Counters, Object, Shared},
        state::State,
    },
    error::Error,
};

/// What a change writes.
#[derive(Default)]
pub struct Plan {
    /// Slots of services whose records change.
    pub services: BTreeSet<u32>,
    /// Numbers of destinations whose records change.
    pub dests: BTreeSet<u32>,
    /// Numbers of destinations whose counters start at zero.
    pub cleared: BTreeSet<u32>,
    /// Slots of services that did not exist.
    pub created: BTreeSet<u32>,
    /// What lists take off counters from now on.
    pub bases: BTreeMap<Object, [u64; 5]>,
}

/// Writes down a change and makes it count.
pub fn write(shared: &Shared<'_>, state: &State, plan: &Plan) {
    let Plan { services, dests, cleared, created, bases } = plan;
    let used = [u64::from(state.services_used), u64::from(state.dests_used)];
    let instance = step(kind::INSTANCE, 0, &[state.next_order, used[0], used[1]]);
    let services = services.iter().map(|slot| {
        let record = state.services.get(slot).copied().unwrap_or_else(ServiceRecord::zeroed);
        let kind = if created.contains(slot) { kind::NEW_SERVICE } else { kind::SERVICE };
        step(kind, *slot, bytemuck::cast_slice(&[record]))
    });
    let dests = dests.iter().map(|number| {
        let record = state.dests.get(number).copied().unwrap_or_else(DestRecord::zeroed);
        let kind = if cleared.contains(number) { kind::NEW_DEST } else { kind::DEST };
        step(kind, *number, bytemuck::cast_slice(&[record]))
    });
    let bases = bases.iter().map(|(object, base)| step(kind::BASE, shared.index(*object), base));
    let mut steps = 0;
    for record in std::iter::once(instance).chain(dests).chain(services).chain(bases) {
        steps += 1;
        if let Some(slot) = shared.journal.get(steps) {
            slot.store(&record);
        }
    }
    if let Some(head) = shared.journal.first() {
        head.kind.store(steps as u32);
    }
}

fn step(kind: u32, index: u32, record: &[u64]) -> JournalRecord {
    let mut words = [0; 16];
    for (word, value) in words.iter_mut().zip(record) {
        *word = *value;
    }
    JournalRecord { kind, index, words }
}

/// Whether a change has been made to count and not been carried out to its end.
pub fn is_pending(shared: &Shared<'_>) -> bool {
    shared.journal.first().is_some_and(|head| head.kind.load() != 0)
}

/// Carries out the change in the journal; `compiled` is what it makes of the data plane's tables.
///
/// # Errors
///
/// When counters cannot be cleared. The change is still pending then.
pub fn carry_out(shared: &Shared<'_>, counters: &mut impl Counters, compiled: &Compiled) -> Result<(), Error> {
    begin(shared);
    take_steps(shared, counters)?;
    compiled.put_in_force(shared);
    end(shared);
    Ok(())
}

/// Finishes what a killed process has begun. The caller holds the instance's lock.
///
/// # Errors
///
/// When counters cannot be cleared, or when there is no room, which the process that began has made sure of.
pub fn recover(shared: &Shared<'_>, counters: &mut impl Counters) -> Result<(), Error> {
    if !is_pending(shared) {
        return Ok(());
    }
    begin(shared);
    take_steps(shared, counters)?;
    let state = State::load(shared);
    // Services whose view is in force already are done, and packets read that view.
    let in_force: HashSet<u32> = compile::in_force(shared).collect();
    let done = |slot: &u32| state.services.get(slot).is_some_and(|record| in_force.contains(&record.view));
    let behind = state.lists.keys().copied().filter(|slot| !done(slot));
    let compiled = compile::compile(shared, &state, behind).map_err(|refusal| Error::Recovery(refusal.to_string()))?;
    compiled.put_in_force(shared);
    end(shared);
    Ok(())
}

fn take_steps(shared: &Shared<'_>, counters: &mut impl Counters) -> Result<(), Error> {
    let steps = shared.journal.first().map_or(0, |head| head.kind.load()) as usize;
    for slot in shared.journal.iter().skip(1).take(steps) {
        let JournalRecord { kind, index, words } = slot.load();
        match kind {
            kind::SERVICE | kind::NEW_SERVICE => {
                if kind == kind::NEW_SERVICE {
                    begin_at_zero(shared, Object::Service(index));
                }
                if let Some(service) = shared.services.get(index as usize) {
                    service.store(bytemuck::from_bytes(bytemuck::bytes_of(&words)));
                }
            }
            kind::BASE => {
                if let Some(estimate) = shared.estimates.get(index as usize) {
                    store_base(estimate, &words);
                    estimate.renew(false);
                }
            }
            kind::DEST | kind::NEW_DEST => {
                if kind == kind::NEW_DEST {
                    counters.clear(index)?;
                    // After that: an estimation between the two begins anew once more.
                    begin_at_zero(shared, Object::Dest(index));
                }
                if let Some(dest) = shared.dests.get(index as usize) {
                    let (record, _) = bytemuck::bytes_of(&words).split_at(size_of::<DestRecord>());
                    dest.store(bytemuck::from_bytes(record));
                    if let Some(load) = shared.dest_loads.get(index as usize) {
                        // Other thresholds than before may say so of the connections it has.
                        load.overloaded.store(load.is_overloaded(dest.thresholds()).into());
                        load.removed.store((!dest.available()).into());
                    }
                }
            }
            kind::INSTANCE => {
                shared.instance.next_order.store(words[0]);
                shared.instance.services_used.store(words[1] as u32);
                shared.instance.dests_used.store(words[2] as u32);
            }
            _ => {}
        }
    }
    Ok(())
}

fn begin_at_zero(shared: &Shared<'_>, object: Object) {
    if let Some(estimate) = shared.estimate(object) {
        store_base(estimate, &[0; 5]);
        estimate.renew(true);
    }
}

fn store_base(estimate: &Estimate, base: &[u64]) {
    for (shared, counter) in estimate.base.iter().zip(base) {
        shared.store(*counter);
    }
}

/// Lets readers know that the records change.
fn begin(shared: &Shared<'_>) {
    let generation = shared.instance.generation.load();
    shared.instance.generation.store(generation | 1);
}

/// The change is done: nothing is left to be finished, CPUs look at destinations anew, and readers find a whole again.
fn end(shared: &Shared<'_>) {
    shared.config.epoch.store(shared.config.epoch.load().wrapping_add(1).max(1));
    let generation = shared.instance.generation.load();
    shared.instance.generation.store((generation | 1).wrapping_add(1));
    // Last: as long as the change is pending, a process killed here leaves something to be finished.
    if let Some(head) = shared.journal.first() {
        head.kind.store(0);
    }
}

/// A copy of the records that no change was under way for. `None` when a change is: it has to be waited for, or finished.
pub fn snapshot(shared: &Shared<'_>) -> Option<State> {
    let before = shared.instance.generation.load();
    if before & 1 != 0 || is_pending(shared) {
        return None;
    }
    let state = State::load(shared);
    (shared.instance.generation.load() == before).then_some(state)
}
