//! The tables the pipeline looks things up in.

use lb_common::{
    abi::{
        Adjacency, CacheEntry, Config, Cursor, Dest, DestCpu, DestLoad, EndpointBucket, EndpointKey, Limiter, NextHop,
        SLOTS_PER_LINE, Slot, SlotLine, View,
    },
    addr::Address,
    event::Event,
    hash::Seed,
    mark,
    sync::opaque,
};

use crate::{flow_table::Buckets, overload};

/// The tables of an instance, as one CPU sees them.
///
/// An index out of range gives `None`. The pipeline never makes one; it answers with [`Reason::Impossible`].
pub trait Tables {
    /// What the flow and endpoint tables are hashed with.
    fn seed(&self) -> Seed;
    /// Buckets of each endpoint table.
    fn endpoint_buckets(&self) -> u32;

    /// The settings.
    fn config(&self) -> Option<&Config>;
    /// The budget of ICMP errors.
    fn limiter(&self) -> Option<&Limiter>;
    /// How to choose a destination of a service.
    fn view(&self, index: u32) -> Option<&View>;
    /// Where the scheduler of a view stands.
    fn cursor(&self, index: u32) -> Option<&Cursor>;
    /// As many entries of lists and rings as are looked up at once, from the one with [`SLOTS_PER_LINE`] times this index on.
    fn slots(&self, line: u32) -> Option<&SlotLine>;
    /// An entry of a list or ring.
    #[inline(always)]
    fn slot(&self, index: u32) -> Option<&Slot> {
        // Verifier: opaque, so that the bounds check stays.
        self.slots(index / SLOTS_PER_LINE)?.get(opaque((index % SLOTS_PER_LINE).into()) as usize)
    }
    /// A destination.
    fn dest(&self, index: u32) -> Option<&Dest>;
    /// An entry of the cache of lblc and lblcr.
    fn cache(&self, index: u32) -> Option<&CacheEntry>;
    /// A destination's connections.
    fn dest_load(&self, index: u32) -> Option<&DestLoad>;
    /// What this CPU keeps about a destination.
    fn dest_cpu(&self, index: u32) -> Option<&DestCpu>;
    /// The key of a next hop towards clients.
    fn adjacency(&self, index: u32) -> Option<&Adjacency>;
    /// What this CPU knows of a next hop towards clients.
    fn adjacency_cpu(&self, index: u32) -> Option<&NextHop>;

    /// Which mark rules are in force.
    fn marks(&self) -> Option<&mark::Marks>;
    /// A mark rule.
    fn mark_rule(&self, index: u32) -> Option<&mark::Rule>;
    /// Where a piece of the addresses begins that mark rules are for.
    fn mark_start(&self, index: u32) -> Option<&mark::Start>;

    /// 1 when destination number `number`, which has thresholds, takes no new connections, else 0.
    fn is_overloaded(&self, number: u32) -> u64
    where
        Self: Sized,
    {
        overload::look_up(self, number).unwrap_or_default()
    }

    /// Adds `share` to the [`DestLoad::connections`] of destination number `number`, and notes whether it is overloaded now.
    fn add_connections(&self, number: u32, share: u64)
    where
        Self: Sized,
    {
        overload::add(self, number, share);
    }

    /// Counts a connection of destination number `number` that ends with its first packet. As in ip_vs it is one more while it
    /// lasts, and may be the one that the upper threshold says is enough (`docs/ipvs.md`, section 4.12).
    fn pass_connection(&self, number: u32)
    where
        Self: Sized,
    {
        overload::pass(self, number);
    }

    /// Returns `value` in a way that the kernel's verifier cannot see through. Used where paths meet again that have
    /// taught the verifier different things about a value, so that it follows the rest once and not once for each.
    fn hide(&self, value: u64) -> u64;

    /// Counts a packet that is not forwarded, by the number of the reason.
    fn count(&self, reason: u8);
    /// Counts something that the director has done.
    fn count_event(&self, event: Event);
}

/// The endpoint table of one address family.
pub trait Endpoints<K: EndpointKey>: Tables {
    /// A bucket of it.
    fn endpoint_bucket(&self, index: u32) -> Option<&EndpointBucket<K>>;
}

/// The tables of which each address family has its own.
pub trait TablesOf<A: Address>: Buckets<A::Entry> + Endpoints<A::Endpoint> {}

impl<A: Address, T: Buckets<A::Entry> + Endpoints<A::Endpoint>> TablesOf<A> for T {}
