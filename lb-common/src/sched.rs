//! What schedulers compute ahead of time, and the hashes they look up with (`docs/ipvs.md`, section 3).
//!
//! The loader builds rings and tables from a service's destinations *in list order*, newest first; the data plane only
//! indexes them. Positions here are positions in that list.

use crate::hash::hash32;

/// Buckets of the sh table.
pub const SH_BUCKETS: u32 = 256;

/// The sh bucket of a client: its address and, with sh-port, its port (else 0), both in host order.
#[inline(always)]
pub const fn sh_bucket(client: u32, port: u32) -> u32 {
    hash32(client.wrapping_add(port), SH_BUCKETS.trailing_zeros())
}

#[cfg(any(feature = "std", test))]
pub use builders::*;

#[cfg(any(feature = "std", test))]
mod builders {
    use super::SH_BUCKETS;

    /// Most entries of a wrr ring. A cycle that would be longer is built from weights scaled down.
    pub const WRR_RING_MAX: usize = 1 << 18;

    /// The sh table: for each bucket the list position of its destination; empty without destinations.
    ///
    /// Walks the list round and round, giving each destination as many buckets in a row as its weight, at least one.
    pub fn sh_table(weights: &[u32]) -> Vec<usize> {
        weights
            .iter()
            .enumerate()
            .cycle()
            .flat_map(|(position, weight)| std::iter::repeat_n(position, (*weight).clamp(1, SH_BUCKETS) as usize))
            .take(SH_BUCKETS as usize)
            .collect()
    }

    /// The step and the highest threshold of wrr for these weights.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct WrrParameters {
        /// Greatest common divisor of the weights above 0; 1 when there is none.
        pub step: u32,
        /// The threshold a cycle starts with; 0 when no weight is above 0.
        pub top: u32,
    }

    impl WrrParameters {
        /// The parameters for these weights.
        pub fn of(weights: &[u32]) -> Self {
            let step = weights.iter().copied().filter(|weight| *weight > 0).fold(0, gcd).max(1);
            let top = weights.iter().copied().max().unwrap_or(0).saturating_sub(step - 1);
            Self { step, top }
        }

        /// The threshold that stays in force when destinations change while it is `threshold`.
        pub fn threshold_after_change(self, threshold: u32) -> u32 {
            if threshold > self.top || threshold == 0 {
                self.top
            } else if self.step > 1 {
                threshold / self.step * self.step + 1
            } else {
                threshold
            }
        }
    }

    /// One entry of a wrr cycle.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct WrrTurn {
        /// Whose turn it is, as a list position.
        pub position: usize,
        /// The threshold of the pass.
        pub threshold: u32,
    }

    /// A whole wrr cycle: one pass over the list for each threshold from the top down to 1, taking every destination
    /// whose weight reaches the threshold.
    ///
    /// A cycle longer than [`WRR_RING_MAX`] is built from proportionally smaller weights, none below 1.
    pub fn wrr_cycle(weights: &[u32]) -> Vec<WrrTurn> {
        let parameters = WrrParameters::of(weights);
        let turns: u64 = weights.iter().map(|weight| u64::from(weight / parameters.step)).sum();
        if turns > WRR_RING_MAX as u64 {
            // Rounding each weight up to 1 adds at most one turn a destination.
            let room = WRR_RING_MAX.saturating_sub(weights.len()).max(1) as u64;
            let smaller: Vec<u32> = weights
                .iter()
                .map(|weight| {
                    let scaled = u64::from(weight / parameters.step) * room / turns;
                    if *weight == 0 { 0 } else { scaled.max(1) as u32 }
                })
                .collect();
            return wrr_cycle(&smaller);
        }
        let mut cycle = Vec::with_capacity(turns as usize);
        let mut threshold = parameters.top;
        while threshold > 0 {
            cycle.extend(
                weights
                    .iter()
                    .enumerate()
                    .filter(|(_, weight)| **weight >= threshold)
                    .map(|(position, _)| WrrTurn { position, threshold }),
            );
            threshold = threshold.saturating_sub(parameters.step);
        }
        cycle
    }

    fn gcd(mut a: u32, mut b: u32) -> u32 {
        while b != 0 {
            (a, b) = (b, a % b);
        }
        a
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn positions(weights: &[u32], number: usize) -> String {
        let cycle = wrr_cycle(weights);
        cycle.iter().cycle().take(number).map(|turn| char::from(b'A' + turn.position as u8)).collect()
    }

    #[test]
    fn wrr_cycles_are_those_of_a_fresh_ip_vs() {
        // docs/ipvs.md, section 14.3.
        assert_eq!(positions(&[4, 3, 2], 12), "AABABCABCAAB");
        assert_eq!(positions(&[1, 1, 1], 12), "ABCABCABCABC");
        assert_eq!(positions(&[10, 0, 5], 12), "AACAACAACAAC");
        assert_eq!(positions(&[3, 5], 12), "BBABABABBBAB");
        assert_eq!(WrrParameters::of(&[10, 0, 5]), WrrParameters { step: 5, top: 6 });
        assert_eq!(WrrParameters::of(&[]), WrrParameters { step: 1, top: 0 });
        assert_eq!(WrrParameters::of(&[0, 0]), WrrParameters { step: 1, top: 0 });
    }

    #[test]
    fn a_wrr_cycle_holds_each_destination_weight_over_step_times() {
        let weights = [6, 4, 0, 2];
        let cycle = wrr_cycle(&weights);
        for (position, weight) in weights.iter().enumerate() {
            assert_eq!(cycle.iter().filter(|turn| turn.position == position).count(), *weight as usize / 2);
        }
        assert!(cycle.is_sorted_by(|a, b| a.threshold >= b.threshold));
        assert_eq!(cycle.last().map(|turn| turn.threshold), Some(1));
    }

    #[test]
    fn a_threshold_survives_a_change_as_far_as_the_weights_allow() {
        let parameters = WrrParameters { step: 2, top: 5 };
        assert_eq!(parameters.threshold_after_change(0), 5);
        assert_eq!(parameters.threshold_after_change(9), 5);
        assert_eq!(parameters.threshold_after_change(4), 5);
        assert_eq!(parameters.threshold_after_change(3), 3);
        assert_eq!(WrrParameters { step: 1, top: 5 }.threshold_after_change(4), 4);
    }

    #[test]
    fn a_cycle_too_long_for_a_ring_keeps_its_proportions() {
        let cycle = wrr_cycle(&[1_000_003, 500_001, 1]);
        assert!(cycle.len() <= WRR_RING_MAX);
        let count = |position| cycle.iter().filter(|turn| turn.position == position).count() as f64;
        assert!((count(0) / count(1) - 2.0).abs() < 0.001);
        assert!(count(2) >= 1.0);
    }

    #[test]
    fn the_sh_table_gives_buckets_in_a_row_by_weight() {
        let table = sh_table(&[2, 0, 3]);
        assert_eq!(table.len(), 256);
        assert_eq!(table[..8], [0, 0, 1, 2, 2, 2, 0, 0]);
        assert!(sh_table(&[]).is_empty());
        assert!(sh_table(&[u32::MAX, 1]).iter().all(|position| *position == 0));
    }

    #[test]
    fn sh_buckets_are_those_of_ip_vs() {
        // docs/ipvs.md, section 14.1.
        assert_eq!(sh_bucket(u32::from_be_bytes([192, 168, 1, 100]), 0), 89);
        assert_eq!(sh_bucket(u32::from_be_bytes([192, 168, 1, 100]), 12_345), 184);
    }
}
