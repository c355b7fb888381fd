//! Keeping new connections from destinations that have as many as they are to have (`docs/ipvs.md`, section 1.3).

use lb_common::abi::{Dest, ONE_CONNECTION};

use crate::tables::Tables;

/// 1 when destination number `number`, which is `dest`, takes no new connections, else 0.
///
/// Verifier: a number that it cannot see through, which may be looked at together with others.
#[inline(always)]
pub fn is_overloaded(tables: &impl Tables, number: u32, dest: &Dest) -> u64 {
    let overloaded = if dest.upper.load() == 0 { 0 } else { tables.is_overloaded(number) };
    tables.hide(overloaded)
}

/// [`Tables::is_overloaded`].
#[inline(always)]
pub fn look_up(tables: &impl Tables, number: u32) -> Option<u64> {
    Some(tables.dest_load(number)?.is_overloaded(tables.dest(number)?.thresholds()).into())
}

/// [`Tables::add_connections`].
#[inline(always)]
pub fn add(tables: &impl Tables, number: u32, share: u64) -> Option<()> {
    let load = tables.dest_load(number)?;
    let before = load.connections.fetch_add(share);
    load.note(tables.dest(number)?.thresholds(), before, before.wrapping_add(share));
    Some(())
}

/// [`Tables::pass_connection`].
#[inline(always)]
pub fn pass(tables: &impl Tables, number: u32) -> Option<()> {
    if tables.dest(number)?.upper.load() != 0 {
        add(tables, number, ONE_CONNECTION)?;
        add(tables, number, ONE_CONNECTION.wrapping_neg())?;
    }
    Some(())
}
