//! The checksum of SCTP packets (RFC 9260 section 6.8 and appendix A) and its incremental update.
//!
//! A CRC is the remainder of the packet, taken for a polynomial over GF(2), and so linear: when bytes of a packet change, the
//! checksum changes by the remainder of their difference, which is what they differ in, multiplied by x for every bit that
//! follows. Ports stand at the start of a packet, so that is x to the power of all its bits. What that leaves, for every
//! length, is the product of two numbers from tables. So an update takes as long for a packet of 9,000 bytes as for one of
//! 16, and a checksum that was wrong stays wrong.
//!
//! Polynomials are words with the coefficient of the highest power, x^31, in the lowest bit, as CRC32c has them. The checksum
//! stands in the packet with its least significant byte first, so a little-endian machine loads it as it is.

use crate::sync::opaque;

/// The polynomial of Castagnoli, but for x^32.
const POLYNOMIAL: u32 = 0x82f6_3b78;
/// The polynomial 1.
const ONE: u32 = 1 << 31;

/// x times `a`.
#[inline(always)]
const fn times_x(a: u32) -> u32 {
    (a >> 1) ^ (POLYNOMIAL & (a & 1).wrapping_neg())
}

/// x^(8 · `bytes`) to the powers of 0 to 255.
const fn powers(bytes: u32) -> [u32; 256] {
    let (mut step, mut bit) = (ONE, 0);
    while bit < 8 * bytes {
        step = times_x(step);
        bit += 1;
    }
    let (mut table, mut index) = ([ONE; 256], 1);
    while index < table.len() {
        table[index] = multiply(table[index - 1], step);
        index += 1;
    }
    table
}

/// What bytes are multiplied by when as many follow, from 0 to 255.
static BYTES: [u32; 256] = powers(1);
/// What bytes are multiplied by when 256 times as many follow.
static PAGES: [u32; 256] = powers(256);

/// The quotient of x^64 and the polynomial, but for x^32: what [`multiply`] divides by.
const QUOTIENT: u32 = {
    // Long division, from the highest power on.
    let (mut rest, mut quotient, mut bit) = (POLYNOMIAL, 0, 0);
    while bit < 32 {
        quotient |= (rest & 1) << bit;
        rest = times_x(rest);
        bit += 1;
    }
    quotient
};

/// The product over GF(2) of two numbers, whose bits are the coefficients of powers of two.
///
/// Of every fourth bit of each: so the sums in a product of integers are at most 8, for which four bits are enough, and the lowest
/// bit of each is what is wanted.
#[inline(always)]
const fn carryless(a: u32, b: u32) -> u64 {
    const FOURTH: u64 = 0x1111_1111_1111_1111;
    let (a, b) = (a as u64, b as u64);
    let (a0, a1, a2, a3) = (a & FOURTH, a & FOURTH << 1, a & FOURTH << 2, a & FOURTH << 3);
    let (b0, b1, b2, b3) = (b & FOURTH, b & FOURTH << 1, b & FOURTH << 2, b & FOURTH << 3);
    let sum0 = (a0 * b0) ^ (a1 * b3) ^ (a2 * b2) ^ (a3 * b1);
    let sum1 = (a0 * b1) ^ (a1 * b0) ^ (a2 * b3) ^ (a3 * b2);
    let sum2 = (a0 * b2) ^ (a1 * b1) ^ (a2 * b0) ^ (a3 * b3);
    let sum3 = (a0 * b3) ^ (a1 * b2) ^ (a2 * b1) ^ (a3 * b0);
    sum0 & FOURTH | sum1 & FOURTH << 1 | sum2 & FOURTH << 2 | sum3 & FOURTH << 3
}

/// The product of two polynomials, without a loop, whose turns the verifier would count.
///
/// Barrett's way: what of the product is x^32 times a polynomial is taken off by the multiple of the polynomial that it is the
/// highest part of. In a product of words the highest powers stand in the lowest bits, one further up than in the words.
#[inline(always)]
const fn multiply(a: u32, b: u32) -> u32 {
    let whole = carryless(a, b) << 1;
    let multiple = whole as u32 ^ (carryless(whole as u32, QUOTIENT) << 1) as u32;
    ((whole ^ carryless(multiple, POLYNOMIAL) << 1) >> 32) as u32
}

/// The checksum of a packet of `len` bytes, below 65,536, that had the checksum `old` before its first four bytes were
/// changed; `changed` is what they differ in. All as loaded from the packet.
///
/// Verifier: a function of its own, of numbers only, which it follows in a straight line.
#[inline(never)]
pub fn update(old: u32, changed: u32, len: u32) -> u32 {
    let (low, high) = (opaque(u64::from(len)) as usize & 0xff, opaque(u64::from(len >> 8)) as usize & 0xff);
    old ^ multiply(multiply(changed, BYTES[low]), PAGES[high])
}

/// The checksum of `bytes`, which have 0 where it stands.
pub fn of(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), |crc, _| times_x(crc)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The product of two polynomials, bit by bit.
    fn product(a: u32, mut b: u32) -> u32 {
        let (mut sum, mut bit) = (0, 32);
        while bit > 0 {
            bit -= 1;
            sum ^= b & (a >> bit & 1).wrapping_neg();
            b = times_x(b);
        }
        sum
    }

    /// RFC 3720 appendix B.4, and the check value of every list of CRCs.
    #[test]
    fn published_values() {
        assert_eq!(of(b"123456789"), 0xe306_9283);
        assert_eq!(of(&[0; 32]), 0x8a91_36aa);
        assert_eq!(of(&[0xff; 32]), 0x62a8_ab43);
    }

    #[test]
    fn an_update_equals_a_checksum_from_scratch_for_every_length() {
        let mut bytes: Vec<u8> = (0..65_535u32).map(|index| (index.wrapping_mul(0x9e37_79b9) >> 24) as u8).collect();
        // The register after every number of bytes, before and after the change.
        let registers = |bytes: &[u8]| {
            let mut register = !0u32;
            let step = |byte: &u8| {
                register = (0..8).fold(register ^ u32::from(*byte), |crc, _| times_x(crc));
                !register
            };
            bytes.iter().map(step).collect::<Vec<_>>()
        };
        let before = registers(&bytes);
        let changed = [0x12, 0x34, 0x56, 0x78];
        for (byte, change) in bytes.iter_mut().zip(changed) {
            *byte ^= change;
        }
        for (index, (old, new)) in before.into_iter().zip(registers(&bytes)).enumerate().skip(3) {
            assert_eq!(update(old, u32::from_le_bytes(changed), index as u32 + 1), new, "{} bytes", index + 1);
        }
    }

    proptest! {
        #[test]
        fn an_update_equals_a_checksum_from_scratch(mut bytes in prop::collection::vec(any::<u8>(), 4..600), new: [u8; 4]) {
            let before = of(&bytes);
            let old: [u8; 4] = bytes[..4].try_into().unwrap();
            bytes[..4].copy_from_slice(&new);
            let changed = u32::from_le_bytes(old) ^ u32::from_le_bytes(new);
            prop_assert_eq!(update(before, changed, bytes.len() as u32), of(&bytes));
        }

        #[test]
        fn both_ways_to_multiply_agree(a: u32, b: u32) {
            prop_assert_eq!(multiply(a, b), product(a, b));
        }
    }
}
