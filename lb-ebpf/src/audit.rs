//! Counting the flow table, to compare it with the counters that the data plane keeps. For tests.

use std::collections::{BTreeMap, BTreeSet};

use lb_common::{
    abi::{DestLoad, active_and_total},
    flow::{Bucket, Bucket4, Bucket6, Entry, Purpose, Status, Word, control, flag},
};

/// Active and all connections of destinations, by number; none without connections.
pub type Connections = BTreeMap<u32, (u32, u32)>;

/// Templates of destinations, by number; none without templates.
type Templates = BTreeMap<u32, u32>;

/// The connections that the table holds, whether or not their time is over: their keys, words and destinations.
///
/// # Errors
///
/// When an entry is neither free nor a connection, or two are the same connection: at rest, none may be.
pub fn connections<E: Entry>(flows: &[Bucket<E>]) -> Result<Vec<(E::Key, Word, u32)>, String>
where
    E::Key: core::fmt::Debug,
{
    let (mut found, mut names) = (Vec::new(), BTreeSet::new());
    for entry in flows.iter().flat_map(Bucket::entries) {
        let word = Word(entry.word().load());
        match word.status() {
            Status::Free => {}
            Status::Live if word.is_template() => {}
            Status::Live => {
                let key = entry.key(word);
                if !names.insert(format!("{key:?}")) {
                    return Err(format!("a connection with several entries: {key:?}"));
                }
                found.push((key, word, entry.dest().load()));
            }
            Status::Busy | Status::Killed => return Err(format!("an entry is still {word:?}")),
        }
    }
    Ok(found)
}

/// The templates that the table holds.
///
/// # Errors
///
/// When two have one key, or one is held by others than the connections that it controls, or one of these goes elsewhere.
fn templates<E: Entry>(flows: &[Bucket<E>]) -> Result<Templates, String> {
    let (mut found, mut names, mut holders) = (Templates::new(), BTreeSet::new(), BTreeMap::new());
    let entries = || (1..).zip(flows.iter().flat_map(Bucket::entries)).map(|(n, e)| (n, e, Word(e.word().load())));
    for (_, entry, word) in entries() {
        if word.is_live() && !word.is_template() && word.has(flag::CONTROLLED) {
            *holders
                .entry(entry.control().load())
                .or_insert_with(BTreeMap::new)
                .entry(entry.dest().load())
                .or_insert(0u32) += 1;
        }
    }
    for (number, entry, word) in entries().filter(|(_, _, word)| word.is_live() && word.is_template()) {
        let key = entry.key(word);
        if !Purpose::of(&key).is_retired() && !names.insert(format!("{key:?}")) {
            return Err(format!("a template with several entries: {key:?}"));
        }
        let (held, dest) = (control::holders(entry.control().load()), entry.dest().load());
        let mut controls = holders.remove(&number).unwrap_or_default();
        let own = controls.remove(&dest).unwrap_or(0);
        if held != Some(own) || !controls.is_empty() {
            return Err(format!(
                "{key:?} controls {own} connections to destination {dest}, and to others {controls:?}; it is held by {held:?}"
            ));
        }
        *found.entry(dest).or_default() += 1;
    }
    if holders.is_empty() {
        Ok(found)
    } else {
        Err(format!("connections of templates that are not there: {holders:?}"))
    }
}

/// What the table holds.
///
/// # Errors
///
/// Those of [`connections`].
pub fn recount<E: Entry>(flows: &[Bucket<E>]) -> Result<Connections, String>
where
    E::Key: core::fmt::Debug,
{
    let mut found = Connections::new();
    for (_, word, dest) in connections(flows)? {
        let (active, total) = found.entry(dest).or_default();
        *active += u32::from(!word.has(flag::INACTIVE));
        *total += 1;
    }
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
/// Those of [`connections`], and when the two differ, or when templates are not as they shall be.
pub fn check<E: Entry>(flows: &[Bucket<E>], loads: &[DestLoad]) -> Result<Connections, String>
where
    E::Key: core::fmt::Debug,
{
    compare_templates(&templates(flows)?, loads)?;
    compare(recount(flows)?, loads)
}

/// Compares the tables of both families with what the counters say of them together. To be called while no packet passes.
///
/// # Errors
///
/// Those of [`check`].
pub fn check_both(flows4: &[Bucket4], flows6: &[Bucket6], loads: &[DestLoad]) -> Result<Connections, String> {
    let mut found = recount(flows4)?;
    for (dest, (active, total)) in recount(flows6)? {
        let sum = found.entry(dest).or_default();
        *sum = (sum.0 + active, sum.1 + total);
    }
    let mut of_both = templates(flows4)?;
    for (dest, count) in templates(flows6)? {
        *of_both.entry(dest).or_default() += count;
    }
    compare_templates(&of_both, loads)?;
    compare(found, loads)
}

fn compare_templates(found: &Templates, loads: &[DestLoad]) -> Result<(), String> {
    let counted = (0..).zip(loads).map(|(number, load)| (number, load.templates.load()));
    let counted: Templates = counted.filter(|(_, count)| *count != 0).collect();
    if *found == counted {
        Ok(())
    } else {
        Err(format!("the table holds templates {found:?}, the counters say {counted:?}"))
    }
}

fn compare(found: Connections, loads: &[DestLoad]) -> Result<Connections, String> {
    let counted = counted(loads);
    if found != counted {
        return Err(format!("the table holds {found:?}, the counters say {counted:?} (active, all)"));
    }
    Ok(found)
}
