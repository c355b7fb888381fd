//! How long a connection lives without a packet, by its protocol and state (`docs/ipvs.md`, section 4.7).

use crate::{flow::Word, jiffies::Jiffies, proto::Protocol, sctp, tcp};

/// ip_vs's default for UDP, in seconds.
pub const UDP_S: u32 = 300;

/// Where [`crate::abi::Config::timeouts`] has the time to live of a connection.
pub const fn index(protocol: Protocol, state: u8) -> usize {
    Word::born(protocol, state, 0, 0, Jiffies(0)).timeout_index()
}

/// ip_vs's defaults, in ticks of which `hz` make a second.
pub fn defaults(hz: u32) -> [u32; 64] {
    let mut timeouts = [0; 64];
    for state in tcp::State::ALL {
        timeouts[index(Protocol::Tcp, state as u8)] = state.default_timeout_s() * hz;
    }
    timeouts[index(Protocol::Udp, 0)] = UDP_S * hz;
    for state in sctp::State::ALL {
        timeouts[index(Protocol::Sctp, state as u8)] = state.timeout_s() * hz;
    }
    timeouts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_of_different_protocols_have_timeouts_of_their_own() {
        let timeouts = defaults(250);
        assert_eq!(timeouts[index(Protocol::Tcp, tcp::State::Established as u8)], 900 * 250);
        assert_eq!(timeouts[index(Protocol::Tcp, tcp::State::None as u8)], 2 * 250);
        assert_eq!(timeouts[index(Protocol::Udp, 0)], 300 * 250);
        assert_eq!(timeouts[index(Protocol::Sctp, sctp::State::Established as u8)], 900 * 250);
        assert_eq!(timeouts[index(Protocol::Sctp, sctp::State::Closed as u8)], 61 * 250);
    }
}
