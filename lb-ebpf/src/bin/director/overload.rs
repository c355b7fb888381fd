//! What depends on the thresholds of destinations.
//!
//! Verifier: global functions, which it looks at once, however often they are called.

use lb_ebpf::overload;

use crate::maps::Maps;

/// Whether a destination that has thresholds takes no new connections: 0 or 1.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn is_overloaded(number: u32) -> u64 {
    overload::look_up(&Maps, number).unwrap_or_default()
}

/// Adds to the connections of a destination.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn add_connections(number: u32, share: u64) -> u64 {
    overload::add(&Maps, number, share).is_some().into()
}

/// Counts a connection of a destination that ends with its first packet.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn pass_connection(number: u32) -> u64 {
    overload::pass(&Maps, number).is_some().into()
}
