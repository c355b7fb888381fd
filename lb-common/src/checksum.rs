//! The Internet checksum (RFC 1071) and its incremental update (RFC 1624, equation 3).
//!
//! A checksum is the one's complement of the one's complement sum of 16-bit words. That sum does not care about byte
//! order: adding the words as a little-endian machine loads them gives the byte-swapped sum, which stored back as loaded
//! is the right checksum. So nothing here converts byte order, and callers pass fields as they stand in the packet.
//!
//! RFC 1624: when a word m of the summed data becomes m', the checksum HC becomes HC' = ~(~HC + ~m + m'). A [`Delta`]
//! collects the ~m + m' of all changes and is applied once.

use crate::addr::Ip6;

/// The change of a one's complement sum, to be applied to any number of checksums that cover the changed words.
#[derive(Clone, Copy, Default)]
pub struct Delta(u64);

/// TTL, protocol and checksum of an IPv4 header, as loaded, after the TTL was lowered by one, which was not 0.
///
/// The word of TTL and protocol gets smaller by one in its high byte, so the checksum gets larger by one in its high byte,
/// carry included (RFC 1141).
#[inline(always)]
pub const fn lower_ttl(ttl_protocol_checksum: u32) -> u32 {
    const ONE: u32 = 0x0100u16.to_be() as u32;
    let checksum = (ttl_protocol_checksum >> 16) + ONE;
    // 0xffff is the other way to write 0, which the carry makes of it.
    let checksum = if checksum >= 0xffff { checksum + 1 } else { checksum };
    ((ttl_protocol_checksum - ONE) & 0xffff) | checksum << 16
}

impl Delta {
    /// The delta after a 16-bit word changed from `old` to `new`.
    #[inline(always)]
    pub const fn word(self, old: u16, new: u16) -> Self {
        Self(self.0 + (!old) as u64 + new as u64)
    }

    /// The delta after a 32-bit field, aligned to 16 bits in the packet, changed from `old` to `new`.
    #[inline(always)]
    pub const fn dword(self, old: u32, new: u32) -> Self {
        Self(self.0 + (!old) as u64 + new as u64)
    }

    /// The delta after an IPv6 address, aligned to 16 bits in the packet, changed from `old` to `new`.
    #[inline(always)]
    pub const fn address(self, old: Ip6, new: Ip6) -> Self {
        let ([a, b], [c, d]) = (old.raw(), new.raw());
        Self(self.0 + halves(!a) + halves(!b) + halves(c) + halves(d))
    }

    /// The checksum of data that had the checksum `old` before the change.
    #[inline(always)]
    pub const fn apply(self, old: u16) -> u16 {
        !fold((!old) as u64 + self.0)
    }
}

/// Adds the carries back in until 16 bits are left.
#[inline(always)]
pub const fn fold(sum: u64) -> u16 {
    // 64 -> 33 bits -> 18 bits -> 17 bits -> 16 bits.
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    sum as u16
}

/// Whether data with this unfolded sum, its checksum included, is intact: the sum, which is not 0, folds to all ones.
///
/// A sum folds to all ones when 65,535 divides it. A number is a multiple of an odd one when its product with the inverse
/// of that modulo 2^64 is as small as a quotient (Granlund and Montgomery 1994, section 9).
#[inline(always)]
pub const fn holds(sum: u64) -> bool {
    const INVERSE: u64 = 0xfffe_fffe_fffe_ffff;
    const _: () = assert!(INVERSE.wrapping_mul(0xffff) == 1);
    sum.wrapping_mul(INVERSE) <= u64::MAX / 0xffff
}

/// The unfolded sum of an IPv4 header without options, given as its five 32-bit words as loaded.
#[inline(always)]
pub const fn sum5(words: [u32; 5]) -> u64 {
    words[0] as u64 + words[1] as u64 + words[2] as u64 + words[3] as u64 + words[4] as u64
}

/// The unfolded sum of the pseudo header of RFC 9293 section 3.1 and RFC 768 for IPv4.
///
/// `source` and `destination` as loaded from the packet; `protocol` its number; `length` of the transport header and
/// payload in bytes, host order.
#[inline(always)]
pub const fn pseudo_header4(source: u32, destination: u32, protocol: u8, length: u16) -> u64 {
    source as u64 + destination as u64 + (protocol as u16).to_be() as u64 + length.to_be() as u64
}

/// The two 32-bit words of `word`, added.
#[inline(always)]
const fn halves(word: u64) -> u64 {
    (word >> 32) + (word & 0xffff_ffff)
}

/// The unfolded sum of the pseudo header of RFC 8200 section 8.1.
///
/// `protocol` its number; `length` of the transport header and payload in bytes, host order.
#[inline(always)]
pub const fn pseudo_header6(source: Ip6, destination: Ip6, protocol: u8, length: u32) -> u64 {
    let ([a, b], [c, d]) = (source.raw(), destination.raw());
    halves(a) + halves(b) + halves(c) + halves(d) + (protocol as u32).to_be() as u64 + length.to_be() as u64
}

/// The unfolded sum of `bytes`, as if followed by a zero byte when their number is odd.
pub fn sum(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<2>();
    let last = match rest {
        [byte] => u64::from(u16::from_ne_bytes([*byte, 0])),
        _ => 0,
    };
    words.iter().fold(last, |sum, word| sum + u64::from(u16::from_ne_bytes(*word)))
}

/// What a UDP sender puts on the wire for this checksum: 0 means "none" there, so a computed 0 is sent as its equal in
/// one's complement, 0xffff (RFC 768).
#[inline(always)]
pub const fn udp_on_wire(checksum: u16) -> u16 {
    if checksum == 0 { 0xffff } else { checksum }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn rfc_1071_section_3_example() {
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(fold(sum(&bytes)).to_ne_bytes(), [0xdd, 0xf2]);
    }

    #[test]
    fn rfc_1624_section_4_example() {
        // HC = 0xDD2F, m = 0x5555, m' = 0x3285 gives HC' = 0x0000.
        let delta = Delta::default().word(0x5555, 0x3285);
        assert_eq!(delta.apply(0xdd2f), 0x0000);
    }

    #[test]
    fn lowering_the_ttl_equals_an_update() {
        for checksum in 0..=u16::MAX {
            let before = u16::from_ne_bytes([64, 6]);
            let after = u16::from_ne_bytes([63, 6]);
            let word = u32::from(before) | u32::from(checksum) << 16;
            let expected = Delta::default().word(before, after).apply(checksum);
            let lowered = lower_ttl(word);
            assert_eq!(lowered as u16, after);
            let found = (lowered >> 16) as u16;
            // 0xffff is no checksum that an update gives, and equals 0.
            assert!(found == expected || checksum == 0xffff, "{checksum:#x}: {found:#x} {expected:#x}");
        }
    }

    #[test]
    fn a_computed_zero_goes_out_as_all_ones() {
        assert_eq!(udp_on_wire(0), 0xffff);
        assert_eq!(udp_on_wire(0x1234), 0x1234);
    }

    proptest! {
        #[test]
        fn an_update_equals_a_sum_from_scratch(mut bytes in prop::collection::vec(any::<u8>(), 24..200), new in any::<[u8; 6]>()) {
            bytes.truncate(bytes.len() & !1);
            let before = !fold(sum(&bytes));
            let old: [u8; 6] = bytes[8..14].try_into().unwrap();
            let delta = Delta::default()
                .dword(u32::from_ne_bytes(old[..4].try_into().unwrap()), u32::from_ne_bytes(new[..4].try_into().unwrap()))
                .word(u16::from_ne_bytes(old[4..].try_into().unwrap()), u16::from_ne_bytes(new[4..].try_into().unwrap()));
            bytes[8..14].copy_from_slice(&new);
            let after = !fold(sum(&bytes));
            let updated = delta.apply(before);
            // All-zero data has two sums, +0 and -0; every other value is unique.
            prop_assert!(updated == after || (updated ^ after) == 0xffff && (after == 0 || updated == 0));
        }

        #[test]
        fn a_sum_holds_when_it_folds_to_all_ones(sum in 1..u64::MAX, near in any::<u32>()) {
            prop_assert_eq!(holds(sum), fold(sum) == 0xffff);
            let multiple = u64::from(near) * 0xffff + 0xffff;
            prop_assert!(holds(multiple) && !holds(multiple + 1) && !holds(multiple - 1));
        }

        #[test]
        fn the_sum_does_not_depend_on_grouping(words in any::<[u32; 5]>()) {
            let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
            prop_assert_eq!(fold(sum5(words)), fold(sum(&bytes)));
        }
    }
}
