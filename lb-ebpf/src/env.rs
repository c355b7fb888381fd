//! The kernel around the pipeline: its clock and its routing table.

use lb_common::{abi::NextHop, addr::Address, jiffies::Jiffies, reason::Reason};

/// The clock of one packet.
#[derive(Clone, Copy, Debug)]
#[repr(align(8))]
pub struct Clock {
    /// The time.
    pub now: Jiffies,
    /// Ticks per second.
    pub hz: u32,
}

/// Something done many times over, in order; see [`Env::scan`].
///
/// Verifier: Linux 6.1 looks at a callback with the constants that it finds on its caller's stack, once: not again for those of
/// another caller, nor for what the first call makes of them. The branches that have not been taken then it removes.
pub trait Scan {
    /// Hides by `hide` what begins as a constant, of all that [`Scan::visit`] branches on. Called before the first visit.
    fn hide(&mut self, hide: impl Fn(u64) -> u64);

    /// Does it for `index`. Returns whether to go on.
    fn visit(&mut self, index: u32) -> bool;
}

/// The kernel around the pipeline.
pub trait Env {
    /// The tick counter, without the skew of [`lb_common::abi::Config`].
    fn jiffies(&self) -> Jiffies;

    /// Ticks per second.
    fn hz(&self) -> u32;

    /// A random number.
    fn random(&self) -> u32;

    /// Index of the interface the packet came in by.
    fn ingress(&self) -> u32;

    /// Asks the routing table for the way to `destination`, as for a packet of this host from `source` (the default: any),
    /// and writes it to `hop`, all but the time.
    ///
    /// # Errors
    ///
    /// Why there is no way; nothing is written then.
    fn route<A: Address>(&self, destination: A, source: A, hop: &NextHop) -> Result<(), Reason>;

    /// Calls `scan` for 0, 1, 2, … until it has enough or `count` is reached.
    fn scan<S: Scan>(&self, count: u32, scan: &mut S);
}

/// A packet that can be given to the host with the request to send it on by itself.
pub trait HandOver {
    /// Arranges that the host sends the packet, as it now stands, to the gateway of `hop`, once it knows its link-layer
    /// address. `None` when the driver cannot carry the request.
    fn hand_over(&mut self, hop: &NextHop) -> Option<()>;
}
