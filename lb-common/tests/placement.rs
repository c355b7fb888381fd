//! Connections are spread over the buckets and pairs of the flow table as evenly as chance would, however regular their
//! addresses and ports.

use lb_common::{
    addr::{Ip4, Ip6, Port},
    flow::{Entry, Entry4, Entry6, Key as _, PAIRS, Place},
    hash::Seed,
    proto::Protocol,
};

/// Buckets: not a power of two, as most sizes are none.
const BUCKETS: u32 = 1_366;
const CONNECTIONS: u32 = 65_536;
/// How many seeds are tried. They are fixed: what chance nearly always keeps is then kept or missed every time.
const SEEDS: u64 = 16;

const SERVICE: (Ip4, Port) = (Ip4::new([203, 0, 113, 1]), Port::new(443));
const SERVICE6: (Ip6, Port) = (Ip6::new((0x2001_0db8_00cb_0071u128 << 64 | 1).to_be_bytes()), Port::new(443));

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
type Clients<A> = (&'static str, fn(u32) -> (A, u16));

const CLIENTS: &[Clients<u32>] = &[
    ("one client, 60,000 ports", |number| (0x0a00_0001, 1_024 + (number % 60_000) as u16)),
    ("one client, even ports", |number| (0x0a00_0001, (2 * (number % 32_768)) as u16)),
    ("sequential addresses", |number| (0x0a00_0000 + number, 40_000)),
    ("every eighth address", |number| (0x0a00_0000 + 8 * number, 40_000)),
    ("addresses that differ in their high bits only", |number| (number << 16, 443)),
    ("addresses that differ in their middle bits only", |number| (0x0a00_0001 ^ number << 8, 443)),
    ("16 ports each of 4,096 addresses", |number| (0xc0a8_0000 + (number >> 4), 32_768 + (number & 15) as u16)),
    ("addresses and ports that rise together", |number| (0x0a00_0000 + number, number as u16)),
];

/// An IPv6 address of these two halves: the network and the host in it.
const fn halves(network: u64, host: u64) -> u128 {
    (network as u128) << 64 | host as u128
}

/// The network of the clients that share one.
const NETWORK: u64 = 0x2001_0db8_0001_0002;

const CLIENTS6: &[Clients<u128>] = &[
    ("one IPv6 client, 60,000 ports", |number| (halves(NETWORK, 1), 1_024 + (number % 60_000) as u16)),
    ("one IPv6 client, even ports", |number| (halves(NETWORK, 1), (2 * (number % 32_768)) as u16)),
    ("sequential hosts of one network", |number| (halves(NETWORK, number.into()), 40_000)),
    ("hosts with sequential link-layer addresses", |number| {
        // RFC 4291 appendix A.
        let (high, low) = (u64::from(number >> 24), u64::from(number & 0xff_ffff));
        (halves(NETWORK, 0x0200_5eff_fe00_0000 | high << 40 | low), 40_000)
    }),
    ("one host each of sequential networks", |number| (halves(NETWORK + u64::from(number), 1), 40_000)),
    ("one host each of every 256th network", |number| (halves(NETWORK + (u64::from(number) << 8), 1), 40_000)),
    ("one host each of networks that differ in their high bits only", |number| {
        (halves(u64::from(number) << 40 | NETWORK & 0xff_ffff_ffff, 1), 40_000)
    }),
    ("hosts and networks that rise together", |number| (halves(NETWORK + u64::from(number), number.into()), 40_000)),
    ("hosts like their networks", |number| {
        let half = NETWORK ^ u64::from(number) << 16;
        (halves(half, half), 40_000)
    }),
    ("IPv4 addresses in IPv6 ones", |number| (halves(0x0064_ff9b_0000_0000, 0x0a00_0000 + u64::from(number)), 40_000)),
    ("16 ports each of 4,096 networks", |number| {
        (halves(NETWORK + u64::from(number >> 4), 1), 32_768 + (number & 15) as u16)
    }),
    ("networks and ports that rise together", |number| (halves(NETWORK + u64::from(number), 1), number as u16)),
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

/// Looks at the places of the connections of every kind of clients.
fn look<E: Entry, A: Copy + Ord>(clients: &[Clients<A>], address: fn(A) -> E::Addr, service: (E::Addr, Port)) {
    for (name, client) in clients {
        let mut clients: Vec<_> = (0..CONNECTIONS).map(client).collect();
        clients.sort_unstable();
        clients.dedup();
        let key = |(client, port)| E::Key::new(Protocol::Tcp, (address(client), Port::new(port)), service);
        let keys: Vec<E::Key> = clients.into_iter().map(key).collect();
        for number in 0..SEEDS {
            let seed = seed(number);
            let mut first = vec![0u32; BUCKETS as usize];
            let mut second = vec![0u32; BUCKETS as usize];
            let mut pairs = vec![0u32; BUCKETS as usize * PAIRS];
            // Of both buckets, 64 groups each: connections that have one in common do not have the other.
            let mut both = vec![0u32; 64 * 64];
            for key in &keys {
                let place = Place::of(E::hash(key, &seed));
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
fn connections_load_buckets_and_pairs_evenly() {
    look::<Entry4, _>(CLIENTS, |address: u32| Ip4::new(address.to_be_bytes()), SERVICE);
}

#[test]
fn connections_over_ipv6_load_buckets_and_pairs_evenly() {
    look::<Entry6, _>(CLIENTS6, |address: u128| Ip6::new(address.to_be_bytes()), SERVICE6);
}

#[test]
fn the_bound_is_that_of_chance() {
    // Of one item and many cells, one has it; two in a cell are to be expected once in 2,000 times.
    assert_eq!(most(2, 2_000), 2);
    assert_eq!(most(2, 2_000_000), 1);
    // The Poisson distribution with mean 1 exceeds 12 with a probability of 6 in 10^11, and 11 with 8 in 10^10.
    assert_eq!(most(10_000, 10_000), 12);
}
