//! Counts the flow table and compares it with the counters that the data plane keeps.

use std::{collections::BTreeMap, thread, time::Duration};

use anyhow::{Result, ensure};
use lb_common::{
    abi::{DestLoad, active_and_total},
    flow::{Bucket4, Entry as _, Status, Word, flag},
};
use lb_userspace::datapath::open::Maps;

/// Active and all connections of destinations, by number; none without connections.
pub type Connections = BTreeMap<u32, (u32, u32)>;

/// What the table holds.
///
/// # Errors
///
/// When an entry is neither free nor a connection, or two are the same connection: at rest, none may be.
pub fn recount(flows: &[Bucket4]) -> Result<Connections> {
    let mut found = Connections::new();
    let mut keys: BTreeMap<String, u32> = BTreeMap::new();
    for entry in flows.iter().flat_map(|bucket| bucket.entries()) {
        let word = Word(entry.word().load());
        ensure!(matches!(word.status(), Status::Free | Status::Live), "an entry is still {word:?}");
        if !word.is_live() {
            continue;
        }
        let key = format!("{:?}", entry.key(word));
        *keys.entry(key).or_default() += 1;
        let (active, total) = found.entry(entry.dest().load()).or_default();
        *active += u32::from(!word.has(flag::INACTIVE));
        *total += 1;
    }
    let twice: Vec<_> = keys.iter().filter(|(_, count)| **count > 1).collect();
    ensure!(twice.is_empty(), "connections with several entries: {twice:?}");
    Ok(found)
}

/// What the counters say.
pub fn counted(loads: &[DestLoad]) -> Connections {
    let loads = (0..).zip(loads).map(|(number, load)| (number, load.connections.load()));
    loads.filter(|(_, connections)| *connections != 0).map(|(number, load)| (number, active_and_total(load))).collect()
}

/// Compares the two. To be called while no packet passes.
///
/// # Errors
///
/// When they differ.
pub fn check(flows: &[Bucket4], loads: &[DestLoad]) -> Result<Connections> {
    let (found, counted) = (recount(flows)?, counted(loads));
    ensure!(found == counted, "the table holds {found:?}, the counters say {counted:?} (active, all)");
    Ok(found)
}

/// How often a running instance is counted before a difference counts.
const ATTEMPTS: usize = 20;

/// [`check`] for a running instance that no packets pass. Its ageing timer may end a connection while it is counted, so a
/// difference must last.
///
/// # Errors
///
/// When the two differ.
pub fn check_instance(maps: &Maps) -> Result<Connections> {
    let count = || check(&maps.flows4, &maps.dest_loads);
    for _ in 1..ATTEMPTS {
        if let Ok(connections) = count() {
            return Ok(connections);
        }
        thread::sleep(Duration::from_millis(50));
    }
    count()
}
