//! Hashes: the seeded one that places flows and service addresses in their tables, and ip_vs's own that schedulers use.

/// The secret of one instance: three random words drawn when it is created.
///
/// Without it nobody outside can tell which flows share a bucket. Both multipliers are odd.
#[derive(Clone, Copy, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct Seed {
    offset: u64,
    multipliers: [u64; 2],
}

impl Seed {
    /// The seed made of these random words.
    pub const fn new(random: [u64; 3]) -> Self {
        Self { offset: random[0], multipliers: [random[1] | 1, random[2] | 1] }
    }

    /// The seed with these words, as another has returned them.
    #[inline(always)]
    pub const fn from_words(words: [u64; 3]) -> Self {
        Self { offset: words[0], multipliers: [words[1], words[2]] }
    }

    /// The words of the seed, which are as secret as the seed.
    pub const fn words(&self) -> [u64; 3] {
        [self.offset, self.multipliers[0], self.multipliers[1]]
    }

    /// Hashes one word to 32 bits, cheaply: enough to find one of few things, of which nobody outside chooses the keys.
    #[inline(always)]
    pub const fn quick_hash(&self, key: u64) -> u32 {
        ((key ^ self.offset).wrapping_mul(self.multipliers[0]) >> 32) as u32
    }

    /// Hashes one word.
    ///
    /// Multiplying by a random odd number and keeping high bits is universal (Dietzfelbinger et al. 1997): two fixed
    /// keys collide with probability at most 2/buckets over the choice of the seed. Folding the high half down before and
    /// between the two multiplications makes every output bit depend on every input bit. Without the first fold, the ports
    /// of one client would stay in the high half, where the first multiplication leaves them in a row.
    #[inline(always)]
    pub const fn hash(&self, key: u64) -> u64 {
        let x = key ^ self.offset;
        let x = (x ^ (x >> 32)).wrapping_mul(self.multipliers[0]);
        let x = (x ^ (x >> 32)).wrapping_mul(self.multipliers[1]);
        x ^ (x >> 32)
    }
}

impl core::fmt::Debug for Seed {
    /// Never shows the secret.
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Seed(..)")
    }
}

/// Mixes a word, so that every bit of the result depends on every bit of it: the finaliser of SplitMix64 (Steele, Lea and
/// Flood 2014). It holds no secret, so every director mixes alike.
#[inline(always)]
pub const fn mix(word: u64) -> u64 {
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// Scales the 32-bit `hash` to 0..`buckets` without a division.
#[inline(always)]
pub const fn scale(hash: u32, buckets: u32) -> u32 {
    ((hash as u64 * buckets as u64) >> 32) as u32
}

/// ip_vs's multiplicative hash of a host-order number to `bits` bits (`docs/ipvs.md`, section 3.0).
#[inline(always)]
pub const fn hash32(value: u32, bits: u32) -> u32 {
    value.wrapping_mul(0x61c8_8647) >> (32 - bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hash32_gives_the_positions_seen_in_ip_vs() {
        // docs/ipvs.md, section 14.1.
        let address = |octets: [u8; 4]| u32::from_be_bytes(octets);
        for (octets, bits8, bits10, with_port) in [
            ([10, 0, 0, 1], 39, 159, 134),
            ([10, 0, 0, 2], 137, 550, 232),
            ([192, 168, 1, 1], 136, 547, 231),
            ([203, 0, 113, 7], 124, 499, 219),
            ([255, 255, 255, 255], 158, 632, 253),
            ([0, 0, 0, 0], 0, 0, 94),
        ] {
            assert_eq!(hash32(address(octets), 8), bits8);
            assert_eq!(hash32(address(octets), 10), bits10);
            assert_eq!(hash32(address(octets).wrapping_add(12_345), 8), with_port);
        }
    }
}
