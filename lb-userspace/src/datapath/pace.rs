//! How fast the ageing timer goes over the flow tables, which are one to it: the buckets of both.
//!
//! The timer looks at a slice of them in each tick. A slice has a greatest size, so that no tick takes long, whatever
//! their size; and ticks have a least distance, so that they do not take the processor from packets.

/// Least time between two ticks, in milliseconds.
const INTERVAL_MS: u32 = 10;
/// Most buckets looked at in a tick: some tenths of a millisecond's worth.
const SLICE_MAX: u32 = 8192;

/// How much is looked at, and how often.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pace {
    /// Buckets looked at in a tick.
    pub slice: u32,
    /// Nanoseconds between two ticks.
    pub interval_ns: u64,
    /// Of 2^32 buckets, how many `drop_entry` thins out in a sweep, less one: see [`Pace::share`].
    pub share: u32,
}

impl Pace {
    /// The shortest sweep of any table, in milliseconds.
    pub const SWEEP_MIN_MS: u32 = INTERVAL_MS;
    /// The longest sweep, in milliseconds.
    pub const SWEEP_MAX_MS: u32 = 60_000;
    /// A sweep unless another is wanted, in milliseconds; of tables too large for that, the shortest that there is.
    pub const SWEEP_MS: u32 = 1000;

    /// The pace at which a table of `buckets` buckets, at least one, is looked at once in `sweep_ms` milliseconds; `None`
    /// when that is shorter than [`Pace::shortest_ms`].
    pub const fn new(buckets: u32, sweep_ms: u32) -> Option<Self> {
        let most = sweep_ms / INTERVAL_MS;
        if most == 0 {
            return None;
        }
        let slice = buckets.div_ceil(most);
        if slice > SLICE_MAX {
            return None;
        }
        // Small tables, of which one bucket in each tick would be too many, have fewer ticks.
        let ticks = buckets.div_ceil(slice) as u64;
        Some(Self { slice, interval_ns: sweep_ms as u64 * 1_000_000 / ticks, share: Self::share(sweep_ms) })
    }

    /// The pace at which a table of `buckets` buckets is looked at unless another is wanted.
    pub const fn usual(buckets: u32) -> Self {
        match Self::new(buckets, Self::SWEEP_MS) {
            Some(pace) => pace,
            None => {
                let share = Self::share(Self::shortest_ms(buckets));
                Self { slice: SLICE_MAX, interval_ns: INTERVAL_MS as u64 * 1_000_000, share }
            }
        }
    }

    /// The share of buckets to be thinned out in a sweep of so many milliseconds: as many in a second as in ip_vs, which are one of
    /// 32 (`docs/ipvs.md`, section 4.11), but none more than once.
    const fn share(sweep_ms: u32) -> u32 {
        let share = ((sweep_ms as u64) << 32) / 32_000;
        if share > u32::MAX as u64 { u32::MAX } else { share as u32 }
    }

    /// The shortest time in which a table of `buckets` buckets is looked at, in milliseconds.
    pub const fn shortest_ms(buckets: u32) -> u32 {
        buckets.div_ceil(SLICE_MAX) * INTERVAL_MS
    }

    /// The time in which a table of `buckets` buckets is looked at, in milliseconds.
    pub const fn sweep_ms(self, buckets: u32) -> u64 {
        let ticks = if self.slice == 0 { 0 } else { buckets.div_ceil(self.slice) };
        (ticks as u64 * self.interval_ns + 500_000) / 1_000_000
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::sizes::Capacity;

    fn buckets(flows: u32) -> u32 {
        let capacity = Capacity { flows, flows6: Capacity::flows6_for(flows), ..Capacity::default() };
        capacity.flow_buckets() + capacity.flow_buckets6()
    }

    #[test]
    fn a_sweep_takes_as_long_as_is_wanted_within_bounds() {
        let tables =
            [1, 2, 7, 8192, 8193].into_iter().chain([Capacity::FLOWS_MIN, 1 << 20, Capacity::FLOWS_MAX].map(buckets));
        for buckets in tables {
            let shortest = Pace::shortest_ms(buckets);
            for sweep_ms in [10, 25, 100, 999, 1000, 4260, 4270, 60_000] {
                let pace = Pace::new(buckets, sweep_ms);
                assert_eq!(pace.is_some(), sweep_ms >= shortest, "{buckets} buckets in {sweep_ms} ms");
                let Some(pace) = pace else { continue };
                assert!((1..=SLICE_MAX).contains(&pace.slice) && pace.interval_ns >= 10_000_000, "{pace:?}");
                assert_eq!(pace.sweep_ms(buckets), u64::from(sweep_ms), "{buckets} buckets: {pace:?}");
            }
            assert_eq!(Pace::usual(buckets).sweep_ms(buckets), u64::from(Pace::SWEEP_MS.max(shortest)));
        }
        assert_eq!(Pace::new(1, 9), None);
    }

    #[test]
    fn the_largest_tables_are_swept_in_seven_seconds() {
        assert_eq!(Pace::shortest_ms(buckets(Capacity::FLOWS_MAX)), 4270);
        let largest = Capacity { flows: Capacity::FLOWS_MAX, flows6: Capacity::FLOWS_MAX, ..Capacity::default() };
        assert_eq!(Pace::shortest_ms(largest.flow_buckets() + largest.flow_buckets6()), 6830);
    }
}
