//! Rates as ip_vs estimates them: averages of which each estimation, one every two seconds, makes up a quarter
//! (`docs/ipvs.md`, section 8.2).
//!
//! Everything is in the order of [`crate::abi::Counters`]: connections, packets in, bytes in, packets out, bytes out.

/// Whether the counter with this index counts bytes, which are many: their averages have fewer bits behind the point.
const fn is_bytes(index: usize) -> bool {
    index == 2 || index == 4
}

/// The average after an estimation before which the counter with this index has grown by `growth`.
#[inline(always)]
pub const fn step(index: usize, average: u64, growth: u64) -> u64 {
    let rate = growth << if is_bytes(index) { 4 } else { 9 };
    average.wrapping_add((rate.wrapping_sub(average).cast_signed() >> 2).cast_unsigned())
}

/// The average as a number per second.
pub const fn per_second(index: usize, average: u64) -> u64 {
    if is_bytes(index) { average.wrapping_add(0xf) >> 5 } else { average.wrapping_add(0x1ff) >> 10 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What lists show after each of these growths.
    fn shown(index: usize, growths: &[u64]) -> Vec<u64> {
        let mut average = 0;
        let each = growths.iter().map(|growth| {
            average = step(index, average, *growth);
            per_second(index, average)
        });
        each.collect()
    }

    /// The numbers are those that ip_vs was seen to show.
    #[test]
    fn rates_rise_and_fall_as_in_ip_vs() {
        for (bytes, rate) in [(40, 5), (80, 10), (120, 15)] {
            assert_eq!(shown(2, &[bytes]), [rate]);
        }
        assert_eq!(shown(0, &[200, 0, 0]), [25, 19, 14]);
    }

    #[test]
    fn a_steady_rate_is_reached_and_forgotten() {
        for index in 0..5 {
            let mut growths = vec![2000; 60];
            growths.extend([0; 120]);
            let shown = shown(index, &growths);
            assert_eq!((shown[59], shown[179]), (1000, 0), "counter {index}");
        }
    }
}
