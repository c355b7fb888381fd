//! ip_vs's defences against floods: `drop_entry`, `drop_packet` and `secure_tcp` (`docs/ipvs.md`, section 4.11).
//!
//! In ip_vs they go by the memory that the kernel has left. Here it is the memory of the flow table that connections have
//! not taken, in pages of 4 KiB as there: nothing else grows with the number of connections.

use crate::{abi::Config, flow::Entry4, sync::Shared32};

/// Places in [`Config::defences`].
pub mod which {
    /// Connections that few packets have come for end early.
    pub const DROP_ENTRY: usize = 0;
    /// Some of the packets that would open connections are dropped.
    pub const DROP_PACKET: usize = 1;
    /// Half-open TCP connections are treated with suspicion.
    pub const SECURE_TCP: usize = 2;
}

/// A value of [`Config::defences`].
pub mod mode {
    /// Never on.
    pub const OFF: u32 = 0;
    /// On when memory is low, which it is not.
    pub const READY: u32 = 1;
    /// On when memory is low, which it is.
    pub const ROUSED: u32 = 2;
    /// Always on.
    pub const ALWAYS: u32 = 3;
}

/// Bytes of a page.
const PAGE: u32 = 4096;

/// ip_vs's default of `amemthresh`, in pages.
pub const AMEMTHRESH: u32 = 1024;
/// ip_vs's default of `am_droprate`.
pub const AM_DROPRATE: u32 = 10;

/// The pages that are left of a flow table made for `max` connections, of which it holds `used`.
#[inline(always)]
pub const fn pages_left(max: u32, used: u32) -> u32 {
    max.saturating_sub(used) / (PAGE / size_of::<Entry4>() as u32)
}

/// Whether a defence in this mode is on.
#[inline(always)]
pub const fn is_on(mode: u32) -> bool {
    mode >= mode::ROUSED
}

/// 1 when a defence in this mode is on or may come to be, else 0, found out without a branch.
#[inline(always)]
pub const fn is_wanted(mode: u32) -> u32 {
    const _: () = assert!(mode::OFF == 0 && mode::ALWAYS == 3);
    (mode | mode >> 1) & 1
}

/// Settles which defences are on when `left` pages are left, as ip_vs does once a second and whenever it is told something
/// else. Returns the rate of `drop_packet` if it goes by memory and is on: the counter of packets begins anew then.
#[inline(always)]
pub fn settle(config: &Config, left: u32) -> Option<u32> {
    let wanted = config.amemthresh.load();
    let low = left < wanted;
    let (from, to) = if low { (mode::READY, mode::ROUSED) } else { (mode::ROUSED, mode::READY) };
    for mode in &config.defences {
        // An operator may set another mode meanwhile, and then that is what counts.
        let _ = mode.compare_exchange(from, to);
    }
    let packet = config.defences[which::DROP_PACKET].load();
    let rate = match packet {
        mode::ROUSED => wanted.checked_div(wanted.wrapping_sub(left)).unwrap_or(0),
        mode::ALWAYS => config.am_droprate.load(),
        _ => 0,
    };
    set(&config.drop_rate, rate);
    set(&config.tcp_table, is_on(config.defences[which::SECURE_TCP].load()).into());
    (packet == mode::ROUSED).then_some(rate)
}

/// Writes a word that packets read only if it changes.
#[inline(always)]
fn set(word: &Shared32, value: u32) {
    if word.load() != value {
        word.store(value);
    }
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable as _;

    use super::*;

    #[test]
    fn a_page_is_128_connections() {
        assert_eq!(pages_left(1 << 20, 0), 8192);
        assert_eq!(pages_left(1 << 20, (1 << 20) - 128), 1);
        assert_eq!(pages_left(1 << 20, (1 << 20) - 127), 0);
        assert_eq!(pages_left(1000, 1001), 0);
    }

    /// Modes, pages left; modes then, rate of `drop_packet`, table of TCP.
    type Row = ([u32; 3], u32, [u32; 3], u32, u32);

    #[test]
    fn defences_rise_and_rest_with_memory() {
        let config = Config::zeroed();
        config.amemthresh.store(AMEMTHRESH);
        config.am_droprate.store(AM_DROPRATE);
        let rows: [Row; 9] = [
            ([0, 0, 0], 0, [0, 0, 0], 0, 0),
            ([3, 3, 3], 8192, [3, 3, 3], 10, 1),
            ([1, 1, 1], 1024, [1, 1, 1], 0, 0),
            ([1, 1, 1], 1023, [2, 2, 2], 1024, 1),
            ([2, 2, 2], 512, [2, 2, 2], 2, 1),
            ([1, 2, 1], 0, [2, 2, 2], 1, 1),
            ([2, 2, 2], 1024, [1, 1, 1], 0, 0),
            ([0, 2, 3], 300, [0, 2, 3], 1, 1),
            ([2, 0, 0], 300, [2, 0, 0], 0, 0),
        ];
        for (before, left, after, rate, table) in rows {
            for (shared, mode) in config.defences.iter().zip(before) {
                shared.store(mode);
            }
            let counter = settle(&config, left);
            let found = [0, 1, 2].map(|index: usize| config.defences[index].load());
            assert_eq!((found, config.drop_rate.load(), config.tcp_table.load()), (after, rate, table), "{before:?}");
            assert_eq!(counter, (after[which::DROP_PACKET] == mode::ROUSED).then_some(rate));
        }
    }

    #[test]
    fn every_mode_but_one_may_be_on() {
        let modes = [mode::OFF, mode::READY, mode::ROUSED, mode::ALWAYS];
        assert_eq!(modes.map(is_wanted), [0, 1, 1, 1]);
    }

    #[test]
    fn no_threshold_means_that_memory_is_never_low() {
        let config = Config::zeroed();
        config.defences[which::DROP_PACKET].store(mode::READY);
        assert_eq!(settle(&config, 0), None);
        assert_eq!(config.defences[which::DROP_PACKET].load(), mode::READY);
    }
}
