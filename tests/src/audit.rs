//! Counts the flow table and compares it with the counters that the data plane keeps: [`lb_ebpf::audit`] for all of the
//! tests.

use std::{thread, time::Duration};

use anyhow::{Result, anyhow};
use lb_common::{
    abi::DestLoad,
    flow::{Bucket4, Bucket6},
};
pub use lb_ebpf::audit::Connections;
use lb_userspace::datapath::open::Maps;

/// Compares the flow tables with the counters. To be called while no packet passes.
///
/// # Errors
///
/// When they differ, an entry is neither free nor a connection, or two are the same connection.
pub fn check(flows4: &[Bucket4], flows6: &[Bucket6], loads: &[DestLoad]) -> Result<Connections> {
    lb_ebpf::audit::check_both(flows4, flows6, loads).map_err(|difference| anyhow!(difference))
}

/// How often a running instance is counted before a difference counts.
const ATTEMPTS: usize = 20;

/// [`check`] for both tables of a running instance that no packets pass. Its ageing timer may end a connection while it is counted, so a
/// difference must last.
///
/// # Errors
///
/// When the two differ.
pub fn check_instance(maps: &Maps) -> Result<Connections> {
    let count = || check(&maps.flows4, &maps.flows6, &maps.dest_loads);
    for _ in 1..ATTEMPTS {
        if let Ok(connections) = count() {
            return Ok(connections);
        }
        thread::sleep(Duration::from_millis(50));
    }
    count()
}
