//! Settings that hold for all services.

use lb_common::{abi::Config, proto::Protocol, tcp, timeout};
use serde::Serialize;

use crate::control::model::Refusal;

/// The timeouts that ip_vs lets one set, in seconds (`docs/ipvs.md`, section 4.7).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct Timeouts {
    /// Of a TCP connection in the state ESTABLISHED.
    pub tcp: u32,
    /// Of a TCP connection in the state FIN_WAIT.
    pub tcpfin: u32,
    /// Of a UDP connection.
    pub udp: u32,
}

/// The longest timeout that ip_vs takes, in seconds: 31 days.
const LONGEST_S: u32 = 2_678_400;

/// The longest timeout in ticks. No instant may be farther from now than half of what signed ticks can tell apart.
const LONGEST_TICKS: u32 = 1 << 30;

/// Where the three are in [`Config::timeouts`].
const fn indices() -> [usize; 3] {
    [
        timeout::index(Protocol::Tcp, tcp::State::Established as u8),
        timeout::index(Protocol::Tcp, tcp::State::FinWait as u8),
        timeout::index(Protocol::Udp, 0),
    ]
}

impl Timeouts {
    /// The timeouts in force, of an instance whose kernel has `hz` ticks per second.
    pub fn of(config: &Config, hz: u32) -> Self {
        let [tcp, tcpfin, udp] = indices().map(|index| config.timeouts[index].load() / hz.max(1));
        Self { tcp, tcpfin, udp }
    }

    /// Sets those that are not 0. A connection has its new timeout from its next packet on.
    ///
    /// The caller holds the instance's lock.
    ///
    /// # Errors
    ///
    /// [`Refusal::Timeout`] when one is too long; none is set then.
    pub fn set(self, config: &Config, hz: u32) -> Result<(), Refusal> {
        let limit = LONGEST_S.min(LONGEST_TICKS / hz.max(1));
        let wanted = [self.tcp, self.tcpfin, self.udp];
        if let Some(&seconds) = wanted.iter().find(|seconds| **seconds > limit) {
            return Err(Refusal::Timeout { seconds, limit });
        }
        for (index, seconds) in indices().into_iter().zip(wanted) {
            if seconds != 0 {
                config.timeouts[index].store(seconds * hz);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable as _;

    use super::*;

    fn config(hz: u32) -> Config {
        let config = Config::zeroed();
        for (shared, ticks) in config.timeouts.iter().zip(timeout::defaults(hz)) {
            shared.store(ticks);
        }
        config
    }

    #[test]
    fn zero_leaves_a_timeout_and_too_much_changes_none() {
        let config = config(250);
        assert_eq!(Timeouts::of(&config, 250), Timeouts { tcp: 900, tcpfin: 120, udp: 300 });
        assert_eq!(Timeouts { tcp: 60, tcpfin: 0, udp: 7 }.set(&config, 250), Ok(()));
        assert_eq!(Timeouts::of(&config, 250), Timeouts { tcp: 60, tcpfin: 120, udp: 7 });
        let refused = Timeouts { tcp: 61, tcpfin: 0, udp: LONGEST_S + 1 }.set(&config, 250);
        assert_eq!(refused, Err(Refusal::Timeout { seconds: LONGEST_S + 1, limit: LONGEST_S }));
        assert_eq!(Timeouts::of(&config, 250), Timeouts { tcp: 60, tcpfin: 120, udp: 7 });
    }

    #[test]
    fn no_timeout_is_longer_than_ticks_can_tell() {
        let config = config(1000);
        let limit = LONGEST_TICKS / 1000;
        assert_eq!(
            Timeouts { tcp: limit + 1, tcpfin: 0, udp: 0 }.set(&config, 1000),
            Err(Refusal::Timeout { seconds: limit + 1, limit })
        );
        assert_eq!(Timeouts { tcp: limit, tcpfin: 0, udp: 0 }.set(&config, 1000), Ok(()));
    }
}
