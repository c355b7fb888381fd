//! The data plane's clock: the kernel's tick counter, cut to 32 bits.
//!
//! `bpf_jiffies64` costs less than a nanosecond where `bpf_ktime_get_ns` costs 30, so all times of the data plane are in
//! ticks. A tick is 1/HZ seconds; HZ is fixed when a kernel is built (100 to 1000) and the loader reads it at load time.
//! A 32-bit counter wraps after 24 days at HZ 1000: instants are compared by the sign of their difference, and no stored
//! instant is ever more than 12 days from now.

/// An instant on the tick counter, modulo 2^32.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Jiffies(pub u32);

impl Jiffies {
    /// The instant `ticks` after this one.
    #[inline(always)]
    pub const fn after(self, ticks: u32) -> Self {
        Self(self.0.wrapping_add(ticks))
    }

    /// Ticks from `earlier` to this instant; negative when `earlier` is the later one.
    #[inline(always)]
    pub const fn since(self, earlier: Self) -> i32 {
        self.0.wrapping_sub(earlier.0).cast_signed()
    }

    /// Whether this instant is `other` or later.
    #[inline(always)]
    pub const fn reached(self, other: Self) -> bool {
        self.since(other) >= 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_survives_the_wrap() {
        let before = Jiffies(u32::MAX - 5);
        let after = before.after(10);
        assert_eq!(after, Jiffies(4));
        assert!(after.reached(before));
        assert!(!before.reached(after));
        assert_eq!(after.since(before), 10);
        assert_eq!(before.since(after), -10);
    }
}
