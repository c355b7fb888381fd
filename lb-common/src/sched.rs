//! What schedulers compute ahead of time, and the hashes they look up with (`docs/ipvs.md`, section 3).
//!
//! The loader builds rings and tables from a service's destinations *in list order*, newest first; the data plane only
//! indexes them. Positions here are positions in that list.

use crate::hash::{hash32, mix};

/// Buckets of the sh table.
pub const SH_BUCKETS: u32 = 256;

/// The sh bucket of a client: its address or, with sh-port, the sum of its address and port, in host order.
#[inline(always)]
pub const fn sh_bucket(client: u32) -> u32 {
    hash32(client, SH_BUCKETS.trailing_zeros())
}

/// Buckets of the dh table.
pub const DH_BUCKETS: u32 = 256;

/// The dh bucket of a service's address, in host order.
#[inline(always)]
pub const fn dh_bucket(service: u32) -> u32 {
    hash32(service, DH_BUCKETS.trailing_zeros())
}

/// Slots of the mh table, a prime.
pub const MH_SLOTS: u32 = 4093;

/// The mh slot of a client: its address or, with mh-port, the sum of its address and port, in host order.
#[inline(always)]
pub const fn mh_slot(client: u32) -> u32 {
    mh_hash(MH_FIRST, client) % MH_SLOTS
}

/// Both halves of the key of mh's first hash.
const MH_FIRST: u64 = 2_654_435_761;

/// SipHash-1-3 (Aumasson and Bernstein, 2012) of the four bytes of `value`, with a key of two equal halves; its low half.
#[inline(always)]
const fn mh_hash(key: u64, value: u32) -> u32 {
    sip_hash([key; 2], value)
}

#[inline(always)]
const fn sip_hash(key: [u64; 2], value: u32) -> u32 {
    let block = 4 << 56 | value as u64;
    let mut v = [
        0x736f_6d65_7073_6575 ^ key[0],
        0x646f_7261_6e64_6f6d ^ key[1],
        0x6c79_6765_6e65_7261 ^ key[0],
        0x7465_6462_7974_6573 ^ key[1],
    ];
    v[3] ^= block;
    v = sip_round(v);
    v[0] ^= block;
    v[2] ^= 0xff;
    v = sip_round(sip_round(sip_round(v)));
    (v[0] ^ v[1] ^ v[2] ^ v[3]) as u32
}

#[inline(always)]
const fn sip_round([mut v0, mut v1, mut v2, mut v3]: [u64; 4]) -> [u64; 4] {
    v0 = v0.wrapping_add(v1);
    v1 = v1.rotate_left(13) ^ v0;
    v0 = v0.rotate_left(32);
    v2 = v2.wrapping_add(v3);
    v3 = v3.rotate_left(16) ^ v2;
    v0 = v0.wrapping_add(v3);
    v3 = v3.rotate_left(21) ^ v0;
    v2 = v2.wrapping_add(v1);
    v1 = v1.rotate_left(17) ^ v2;
    v2 = v2.rotate_left(32);
    [v0, v1, v2, v3]
}

/// What a connection would have of a destination, for the choice that all directors make alike.
///
/// Every director draws the same number for a connection and a destination, and the highest wins (rendezvous hashing,
/// Thaler and Ravishankar 1998), so that a change of the destinations moves only the connections of those that come or go.
/// With weights it is the least of `-log(draw) / weight` that wins, by which each destination wins as often as its weight says
/// (Schindelhauer and Schomaker 2005).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bid {
    draw: u64,
    distance: u64,
    weight: u64,
}

impl Bid {
    /// Of nobody: every other bid is better.
    pub const NONE: Self = Self { draw: 0, distance: 1, weight: 0 };

    /// The bid for a connection with this hash of a destination with this address and port, as one word, and this weight,
    /// which is not 0.
    #[inline(always)]
    pub const fn new(connection: u64, dest: u64, weight: u32) -> Self {
        let draw = mix(connection ^ mix(dest));
        Self { draw, distance: distance(draw), weight: weight as u64 }
    }

    /// The bid of a destination with this weight, which is not 0, for any connection: the greatest weight is best, and of
    /// equals none is better than another.
    #[inline(always)]
    pub const fn of_weight(weight: u32) -> Self {
        Self { draw: 0, distance: 1, weight: weight as u64 }
    }

    /// The same, with each of its numbers changed by `change`.
    #[inline(always)]
    pub fn each(self, change: impl Fn(u64) -> u64) -> Self {
        Self { draw: change(self.draw), distance: change(self.distance), weight: change(self.weight) }
    }

    /// Whether this bid is the better one.
    ///
    /// Which of two bids wins does not depend on their order, for directors may have their destinations in any.
    #[inline(always)]
    pub const fn beats(&self, other: &Self) -> bool {
        // No division: self.distance / self.weight < other.distance / other.weight.
        let (own, others) = (self.distance * other.weight, other.distance * self.weight);
        own < others || own == others && self.draw > other.draw
    }
}

/// Bits of a [`distance`] behind the point.
const FRACTION: u32 = 24;

/// `-log2(draw / 2^64)`, with [`FRACTION`] bits behind the point, at least the smallest such number.
///
/// Of the whole part the number of leading zeros says everything. The logarithm of the rest, 1 + f, is taken from a cubic
/// in f that is exact, and has the slope of the logarithm, at both ends; it is nowhere wrong by more than 0.006.
#[inline(always)]
const fn distance(draw: u64) -> u64 {
    /// 1 / ln 2 - 1, the slope at 0 less that of a straight line.
    const AT_ZERO: u64 = 7_427_190;
    /// 1 - 1 / (2 ln 2), that of a straight line less the slope at 1.
    const AT_ONE: u64 = 4_675_013;
    let draw = draw | 1;
    let zeros = draw.leading_zeros();
    // The leading one falls out at the top.
    let f = ((draw << zeros) << 1) >> (64 - FRACTION);
    let rest = (1 << FRACTION) - f;
    let bow = (f * rest) >> FRACTION;
    let slope = (AT_ZERO * rest + AT_ONE * f) >> FRACTION;
    let log = f + ((bow * slope) >> FRACTION);
    ((zeros as u64 + 1) << FRACTION) - log
}

#[cfg(any(feature = "std", test))]
pub use builders::*;

#[cfg(any(feature = "std", test))]
mod builders {
    use super::{DH_BUCKETS, MH_FIRST, MH_SLOTS, SH_BUCKETS, mh_hash};

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

    /// The dh table of `count` destinations: for each bucket the list position of its destination; empty without
    /// destinations. Weights do not matter.
    pub fn dh_table(count: usize) -> Vec<usize> {
        (0..count).cycle().take(DH_BUCKETS as usize).collect()
    }

    /// Both halves of the key of mh's second hash.
    const MH_SECOND: u64 = 2_654_446_892;

    /// A destination as mh sees it.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct MhDest {
        /// Its address, in host order.
        pub address: u32,
        /// Its port, in host order.
        pub port: u16,
        /// The latest of its weights that was not 0.
        pub last_weight: u32,
    }

    /// The mh table: for each slot the list position of its destination; empty when no destination has ever had a weight.
    /// `None` when there are more destinations than slots.
    ///
    /// Every destination claims slots in an order of its own, as many in a row as its share of the weights (Eisenbud et
    /// al., "Maglev", NSDI 2016, section 3.4).
    pub fn mh_table(dests: &[MhDest]) -> Option<Vec<usize>> {
        /// Bits of the largest share.
        const SHARE_BITS: u32 = 6;
        if dests.len() > MH_SLOTS as usize {
            return None;
        }
        let divisor = dests.iter().map(|dest| dest.last_weight).filter(|weight| *weight > 0).fold(0, gcd);
        if divisor == 0 {
            return Some(Vec::new());
        }
        let largest = dests.iter().map(|dest| dest.last_weight).max().unwrap_or(0) / divisor;
        let shift = (u32::BITS - largest.leading_zeros()).saturating_sub(SHARE_BITS);
        let share = |weight: u32| if weight == 0 { 0 } else { ((weight / divisor) >> shift).max(1) };
        let hash = |key, dest: &MhDest| mh_hash(key, dest.address.wrapping_add(dest.port.into()));
        let mut next: Vec<u32> = dests.iter().map(|dest| hash(MH_FIRST, dest) % MH_SLOTS).collect();
        let mut table = vec![None; MH_SLOTS as usize];
        let mut free = MH_SLOTS;
        loop {
            for (position, dest) in dests.iter().enumerate() {
                let skip = hash(MH_SECOND, dest) % (MH_SLOTS - 1) + 1;
                for _ in 0..share(dest.last_weight) {
                    while table[next[position] as usize].is_some() {
                        next[position] = (next[position] + skip) % MH_SLOTS;
                    }
                    table[next[position] as usize] = Some(position);
                    free -= 1;
                    if free == 0 {
                        return table.into_iter().collect();
                    }
                }
            }
        }
    }

    /// A column of what random and wrandom draw from.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct DrawColumn {
        /// Whom it belongs to, as a list position.
        pub own: usize,
        /// How many of 2^32 draws are his.
        pub share: u32,
        /// Who gets the others.
        pub other: usize,
    }

    /// A column for each destination with a weight above 0: drawing one of them, each as often as another, and then by its
    /// share, gives every destination its part of the weights (Walker 1977, made as by Vose 1991).
    pub fn draw_table(weights: &[u32]) -> Vec<DrawColumn> {
        let total: u128 = weights.iter().map(|weight| u128::from(*weight)).sum();
        let owners = weights.iter().enumerate().filter(|(_, weight)| **weight > 0);
        // What is left of each, where a column is as wide as the total.
        let mut rest: Vec<(usize, u128)> = owners.map(|(position, weight)| (position, u128::from(*weight))).collect();
        let columns = rest.len() as u128;
        rest.iter_mut().for_each(|(_, width)| *width *= columns);
        let (mut narrow, mut wide): (Vec<_>, Vec<_>) = rest.into_iter().partition(|(_, width)| *width < total);
        let mut table = Vec::new();
        while let Some((own, width)) = narrow.pop() {
            // The narrow ones leave as much free as the wide ones have too much, so there is one.
            let Some((other, too_wide)) = wide.pop() else { break };
            table.push(DrawColumn { own, share: ((width << 32) / total) as u32, other });
            let left = (other, too_wide - (total - width));
            if left.1 < total { narrow.push(left) } else { wide.push(left) }
        }
        table.extend(wide.into_iter().map(|(own, _)| DrawColumn { own, share: u32::MAX, other: own }));
        table
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

        /// The parameters for one more weight.
        #[must_use]
        pub fn with(self, weight: u32) -> Self {
            // The weights before, as far as it matters: the greatest one is a multiple of the step, and so is 0.
            let greatest = if self.top == 0 { 0 } else { self.top + (self.step - 1) };
            let step = if self.top == 0 { 0 } else { self.step };
            let step = gcd(step, weight).max(1);
            Self { step, top: greatest.max(weight).saturating_sub(step - 1) }
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
    fn wrr_parameters_grow_with_the_weights() {
        for weights in [&[4, 6, 3, 9][..], &[0, 0, 5, 0, 10], &[i32::MAX as u32, 2], &[7, 7], &[0], &[12, 0, 18, 6]] {
            let mut parameters = WrrParameters::of(&[]);
            for (index, weight) in weights.iter().enumerate() {
                parameters = parameters.with(*weight);
                assert_eq!(parameters, WrrParameters::of(&weights[..=index]), "{:?}", &weights[..=index]);
            }
        }
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
    fn the_draw_table_gives_every_weight_its_share() {
        for weights in [&[1, 1, 1][..], &[5, 0, 3, 1], &[1], &[i32::MAX as u32, 1], &[7; 1000], &[0, 0], &[]] {
            let table = draw_table(weights);
            let total: f64 = weights.iter().map(|weight| f64::from(*weight)).sum();
            for (position, weight) in weights.iter().enumerate() {
                let part = |column: &DrawColumn| {
                    let share = f64::from(column.share) / (u64::from(u32::MAX) + 1) as f64;
                    f64::from(u8::from(column.own == position)) * share
                        + f64::from(u8::from(column.other == position)) * (1.0 - share)
                };
                let found = table.iter().map(part).sum::<f64>() / table.len().max(1) as f64;
                assert!(
                    (found * total - f64::from(*weight)).abs() <= total * 1e-6,
                    "{position} of {weights:?}: {found}"
                );
            }
            assert!(table.len() <= weights.len());
        }
    }

    #[test]
    fn the_dh_table_takes_turns() {
        let table = dh_table(3);
        assert_eq!((table.len(), &table[..4]), (256, &[0, 1, 2, 0][..]));
        assert!(dh_table(0).is_empty());
    }

    #[test]
    fn the_hash_of_mh_is_siphash_1_3() {
        // docs/ipvs.md, section 3.11.
        assert_eq!(sip_hash([0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908], 0x0302_0100), 0x88d3_8328);
    }

    #[test]
    fn the_mh_table_is_shared_by_weight_and_hardly_moves() {
        let dest = |number: u32, last_weight| MhDest { address: 0x0a02_000b + number, port: 80, last_weight };
        let dests = [dest(0, 1), dest(1, 2), dest(2, 1), dest(3, 0)];
        let table = mh_table(&dests).expect("room");
        let count = |table: &[usize], position| table.iter().filter(|slot| **slot == position).count();
        assert_eq!(table.len(), MH_SLOTS as usize);
        assert_eq!([0, 1, 2, 3].map(|position| count(&table, position) / 100), [10, 20, 10, 0]);
        // Without the last one, nearly all slots of the others stay theirs.
        let fewer = mh_table(&dests[..2]).expect("room");
        let moved = table.iter().zip(&fewer).filter(|(before, after)| **before < 2 && before != after).count();
        assert!(moved < MH_SLOTS as usize / 10, "{moved} slots moved");
        assert!(mh_table(&[dest(0, 0)]).is_some_and(|table| table.is_empty()));
        assert!(mh_table(&vec![dest(0, 1); MH_SLOTS as usize + 1]).is_none());
    }

    #[test]
    fn sh_buckets_are_those_of_ip_vs() {
        // docs/ipvs.md, section 14.1.
        assert_eq!(sh_bucket(u32::from_be_bytes([192, 168, 1, 100])), 89);
        assert_eq!(sh_bucket(u32::from_be_bytes([192, 168, 1, 100]) + 12_345), 184);
    }

    /// The position of the destination that wins a connection, of destinations with these numbers and weights.
    fn winner(connection: u64, dests: &[(u64, u32)]) -> usize {
        let mut best = (0, Bid::NONE);
        for (position, &(dest, weight)) in dests.iter().enumerate() {
            let bid = Bid::new(mix(connection), dest, weight);
            if bid.beats(&best.1) {
                best = (position, bid);
            }
        }
        best.0
    }

    const CONNECTIONS: u64 = 100_000;

    #[test]
    fn destinations_win_as_often_as_their_weights_say() {
        let many: Vec<_> = (0..500).map(|dest| (dest, 1 + (dest % 3) as u32)).collect();
        let few = [(1, 1), (2, 2), (3, 5), (4, u32::MAX >> 1)];
        for dests in [&[(7, 1), (8, 1)][..], &few[..3], &many, &few] {
            let mut won = vec![0u64; dests.len()];
            (0..CONNECTIONS).for_each(|connection| won[winner(connection, dests)] += 1);
            let weights: f64 = dests.iter().map(|&(_, weight)| f64::from(weight)).sum();
            for (&(dest, weight), won) in dests.iter().zip(won) {
                let share = f64::from(weight) / weights;
                let mean = CONNECTIONS as f64 * share;
                let deviation = (mean * (1.0 - share)).sqrt();
                let off = (won as f64 - mean).abs();
                assert!(off <= 5.0 * deviation + 0.02 * mean, "{dest} of weight {weight} wins {won}, not {mean:.0}");
            }
        }
    }

    #[test]
    fn a_destination_that_goes_or_comes_moves_no_other_connections() {
        let all: Vec<_> = (0..20).map(|dest| (dest << 32, 1 + dest as u32 % 4)).collect();
        for gone in [0, 7, 19] {
            let mut rest = all.clone();
            rest.remove(gone);
            for connection in 0..CONNECTIONS / 10 {
                let before = winner(connection, &all);
                if before != gone {
                    assert_eq!(rest[winner(connection, &rest)], all[before]);
                }
            }
        }
    }

    #[test]
    fn the_choice_does_not_depend_on_the_order_of_destinations() {
        let dests: Vec<_> = (0..50).map(|dest| (dest, 1 + dest as u32 % 3)).collect();
        let reversed: Vec<_> = dests.iter().rev().copied().collect();
        for connection in 0..CONNECTIONS / 10 {
            assert_eq!(dests[winner(connection, &dests)], reversed[winner(connection, &reversed)]);
        }
    }

    #[test]
    fn bids_of_weight_go_by_weight() {
        let [light, heavy] = [1, 2].map(Bid::of_weight);
        assert!(heavy.beats(&light) && !light.beats(&heavy) && !light.beats(&light));
        assert!(light.beats(&Bid::NONE) && Bid::new(1, 2, 1).beats(&Bid::NONE) && !Bid::NONE.beats(&light));
    }

    #[test]
    fn distances_are_logarithms() {
        let unit = f64::from(1 << FRACTION);
        for step in 1..100_000u64 {
            let draw = step.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let exact = 64.0 - (draw as f64).log2();
            assert!((distance(draw) as f64 / unit - exact).abs() < 0.006, "{draw:#x}: {exact}");
        }
        // Where many destinations compete, the winner is near the end of the range.
        for step in 1..1000 {
            let draw = u64::MAX - (step << 48);
            let exact = 64.0 - (draw as f64).log2();
            assert!((distance(draw) as f64 / unit / exact - 1.0).abs() < 0.01, "{draw:#x}: {exact}");
        }
        assert_eq!((distance(u64::MAX), distance(0)), (1, 64 << FRACTION));
    }
}
