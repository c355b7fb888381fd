//! Connections are spread over the buckets and pairs of the flow table as evenly as chance would, however regular their
//! addresses and ports.

use lb_common::{
    addr::{Ip4, Port},
    flow::{Entry as _, Entry4, Key as _, Key4, PAIRS, Place},
    hash::Seed,
    proto::Protocol,
};

/// Buckets: not a power of two, as most sizes are none.
const BUCKETS: u32 = 1_366;
const CONNECTIONS: u32 = 65_536;
/// How many seeds are tried. They are fixed: what chance nearly always keeps is then kept or missed every time.
const SEEDS: u64 = 16;

const SERVICE: (Ip4, Port) = (Ip4::new([203, 0, 113, 1]), Port::new(443));

/// Seed number `number`: words that look random (splitmix64).
fn seed(number: u64) -> Seed {
    Seed::new(std::array::from_fn(|word| {
        let mut x = (3 * number + word as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ x >> 31
    }))
}

/// A kind of clients: its name, and address and port of its connection number `number`.
type Clients = (&'static str, fn(u32) -> (u32, u16));

const CLIENTS: &[Clients] = &[
    ("one client, 60,000 ports", |number| (0x0a00_0001, 1_024 + (number % 60_000) as u16)),
    ("one client, even ports", |number| (0x0a00_0001, (2 * (number % 32_768)) as u16)),
    ("sequential addresses", |number| (0x0a00_0000 + number, 40_000)),
    ("every eighth address", |number| (0x0a00_0000 + 8 * number, 40_000)),
    ("addresses that differ in their high bits only", |number| (number << 16, 443)),
    ("addresses that differ in their middle bits only", |number| (0x0a00_0001 ^ number << 8, 443)),
    ("16 ports each of 4,096 addresses", |number| (0xc0a8_0000 + (number >> 4), 32_768 + (number & 15) as u16)),
    ("addresses and ports that rise together", |number| (0x0a00_0000 + number, number as u16)),
];

/// Pearson's chi-squared statistic of `counts`: by how many standard deviations it is above its mean.
fn deviation(counts: &[u32]) -> f64 {
    let mean = f64::from(counts.iter().sum::<u32>()) / counts.len() as f64;
    let chi2: f64 = counts.iter().map(|&count| (f64::from(count) - mean).powi(2) / mean).sum();
    let freedom = counts.len() as f64 - 1.0;
    (chi2 - freedom) / (2.0 * freedom).sqrt()
}

/// The least number that the fullest of `cells` cells does not exceed but for one time in a million, when chance alone
/// puts `items` into them: by the union bound over the binomial distribution of each.
fn most(items: u32, cells: usize) -> u32 {
    let chance = 1.0 / cells as f64;
    // The probability of each number of items in one cell, as long as it is not nothing.
    let probabilities: Vec<f64> = (0..=items)
        .scan(f64::from(items) * (1.0 - chance).ln(), |logarithm, count| {
            let probability = logarithm.exp();
            *logarithm += (f64::from(items - count) / f64::from(count + 1) * chance / (1.0 - chance)).ln();
            Some(probability)
        })
        .collect();
    let mut above = 0.0;
    let mut count = items;
    while count > 0 && (above + probabilities[count as usize]) * cells as f64 <= 1e-6 {
        above += probabilities[count as usize];
        count -= 1;
    }
    count
}

#[test]
fn connections_load_buckets_and_pairs_evenly() {
    for (name, client) in CLIENTS {
        let mut keys: Vec<_> = (0..CONNECTIONS).map(client).collect();
        keys.sort_unstable();
        keys.dedup();
        let keys: Vec<_> = keys
            .into_iter()
            .map(|(address, port)| {
                Key4::new(Protocol::Tcp, (Ip4::new(address.to_be_bytes()), Port::new(port)), SERVICE)
            })
            .collect();
        for number in 0..SEEDS {
            let seed = seed(number);
            let mut first = vec![0u32; BUCKETS as usize];
            let mut second = vec![0u32; BUCKETS as usize];
            let mut pairs = vec![0u32; BUCKETS as usize * PAIRS];
            // Of both buckets, 64 groups each: connections that have one in common do not have the other.
            let mut both = vec![0u32; 64 * 64];
            for key in &keys {
                let place = Place::of(Entry4::hash(key, &seed));
                let buckets = (place.first(BUCKETS), place.second(BUCKETS));
                first[buckets.0 as usize] += 1;
                second[buckets.1 as usize] += 1;
                pairs[buckets.0 as usize * PAIRS + place.start() as usize] += 1;
                both[(buckets.0 * 64 / BUCKETS * 64 + buckets.1 * 64 / BUCKETS) as usize] += 1;
            }
            for (what, counts) in
                [("first buckets", first), ("second buckets", second), ("pairs", pairs), ("both buckets", both)]
            {
                let (deviation, fullest) = (deviation(&counts), counts.iter().copied().max().unwrap_or_default());
                let bound = most(keys.len() as u32, counts.len());
                let found = format!("{name}, seed {number}, {what}: {deviation:.1} deviations, {fullest} of {bound}");
                // More even than by chance is welcome.
                assert!(deviation < 5.0 && fullest <= bound, "{found}");
            }
        }
    }
}

#[test]
fn the_bound_is_that_of_chance() {
    // Of one item and many cells, one has it; two in a cell are to be expected once in 2,000 times.
    assert_eq!(most(2, 2_000), 2);
    assert_eq!(most(2, 2_000_000), 1);
    // The Poisson distribution with mean 1 exceeds 12 with a probability of 6 in 10^11, and 11 with 8 in 10^10.
    assert_eq!(most(10_000, 10_000), 12);
}
