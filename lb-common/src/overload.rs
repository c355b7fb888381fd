//! When a destination takes no more new connections (`docs/ipvs.md`, section 1.3).

/// How many connections a destination is to have, active and inactive ones together.
///
/// When it has as many as the upper threshold says, it is overloaded, and stays so until it has fewer than the lower one
/// says.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Thresholds {
    /// The upper threshold, at most 2^31 - 1; 0 for none.
    pub upper: u32,
    /// The lower threshold, at most the upper one; 0 for three quarters of that, rounded up.
    pub lower: u32,
}

impl Thresholds {
    /// Whether a destination with `total` connections is overloaded that was so, or was not, before their number changed.
    #[inline(always)]
    pub const fn overloaded(self, total: u32, was: bool) -> bool {
        let lower = if self.lower != 0 { self.lower } else { self.upper - (self.upper >> 2) };
        self.upper != 0 && (total >= self.upper || was && total >= lower)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers of connections at which new ones are refused and taken again, found by going up and down.
    fn turns(upper: u32, lower: u32) -> (u32, u32) {
        let thresholds = Thresholds { upper, lower };
        let up = (0..100).find(|total| thresholds.overloaded(*total, false)).expect("an upper threshold");
        let down = (0..up).rev().find(|total| !thresholds.overloaded(*total, true)).expect("a lower threshold");
        (up, down)
    }

    #[test]
    fn a_destination_is_overloaded_from_the_upper_threshold_down_to_the_lower_one() {
        // docs/ipvs.md, sections 1.3 and 14.4.
        for (upper, down) in [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (8, 5), (10, 7)] {
            assert_eq!(turns(upper, 0), (upper, down), "upper threshold {upper}");
        }
        assert_eq!(turns(4, 4), (4, 3));
        assert_eq!(turns(3, 1), (3, 0));
        assert_eq!(turns(4, 2), (4, 1));
    }

    #[test]
    fn nothing_is_overloaded_without_an_upper_threshold() {
        assert!(!Thresholds::default().overloaded(u32::MAX, true));
    }
}
