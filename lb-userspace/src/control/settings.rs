//! Settings that hold for all services.

use std::{borrow::Cow, fmt, slice};

use lb_common::{
    abi::{Config, DestLoad, InstanceRecord, active_and_total, switch},
    defence::{self, which},
    proto::Protocol,
    sync::Shared32,
    tcp, timeout,
};
use serde::Serialize;

use crate::control::{model::Refusal, shared::Shared};

/// ICMP errors an instance may send in a second: the kernel's own default, `net.ipv4.icmp_msgs_per_sec`.
const ICMP_PER_SECOND: u32 = 1000;

/// ip_vs's default of `lblc_expiration` and `lblcr_expiration`, in seconds.
const CACHE_EXPIRATION_S: u32 = 86_400;

/// Sets everything to what a new instance begins with, ip_vs's defaults, in a kernel with `hz` ticks per second.
pub fn set_defaults(config: &Config, hz: u32) {
    for (shared, ticks) in config.timeouts.iter().zip(timeout::defaults(hz)) {
        shared.store(ticks);
    }
    config.icmp_per_second.store(ICMP_PER_SECOND);
    config.conn_reuse_mode.store(1);
    config.switches.store(switch::RUN_ESTIMATION | switch::SNAT_REROUTE);
    config.lblc_expiration.store(CACHE_EXPIRATION_S);
    config.lblcr_expiration.store(CACHE_EXPIRATION_S);
    for mode in &config.defences {
        mode.store(defence::mode::OFF);
    }
    config.amemthresh.store(defence::AMEMTHRESH);
    config.am_droprate.store(defence::AM_DROPRATE);
    // With the defences off, how much memory is left makes no difference.
    defence::settle(config, u32::MAX);
}

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

/// The longest timeout that a kernel with `hz` ticks per second allows, in seconds.
pub fn longest_s(hz: u32) -> u32 {
    LONGEST_S.min(LONGEST_TICKS / hz.max(1))
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
        let limit = longest_s(hz);
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

/// One of the settings that ip_vs has below `/proc/sys/net/ipv4/vs/` (`docs/ipvs.md`, section 9), by its name there.
#[derive(Clone, Copy)]
pub struct Setting {
    /// Its name.
    pub name: &'static str,
    kind: Kind,
}

/// What a setting can be.
#[derive(Clone, Copy)]
enum Kind {
    /// On or off: a bit of [`Config::switches`].
    Switch(u32),
    /// A mode of a defence: its place in [`Config::defences`].
    Mode(usize),
    /// Any number that ip_vs takes.
    Number(fn(&Config) -> &Shared32),
    /// Any number of seconds that ip_vs takes: as many as it can count ticks.
    Seconds(fn(&Config) -> &Shared32),
    /// Nothing but what it is.
    Fixed {
        is: Value,
        /// Why, as the end of a sentence.
        because: &'static str,
    },
}

/// What a setting is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(untagged)]
pub enum Value {
    /// A number.
    Number(u32),
    /// Something else.
    Text(&'static str),
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => number.fmt(f),
            Self::Text(text) => text.fmt(f),
        }
    }
}

const fn setting(name: &'static str, kind: Kind) -> Setting {
    Setting { name, kind }
}

const fn fixed(name: &'static str, is: u32, because: &'static str) -> Setting {
    setting(name, Kind::Fixed { is: Value::Number(is), because })
}

const NO_DAEMON: &str = "connections are not synchronised";
const NO_THREADS: &str = "the timer that ages connections estimates rates";

/// Every setting, in the order of their names.
static SETTINGS: [Setting; 31] = [
    setting("am_droprate", Kind::Number(|config| &config.am_droprate)),
    setting("amemthresh", Kind::Number(|config| &config.amemthresh)),
    fixed("backup_only", 0, NO_DAEMON),
    setting("cache_bypass", Kind::Switch(switch::CACHE_BYPASS)),
    setting("conn_reuse_mode", Kind::Number(|config| &config.conn_reuse_mode)),
    fixed("conntrack", 0, "XDP comes before netfilter, so packets have no conntrack entries"),
    setting("drop_entry", Kind::Mode(which::DROP_ENTRY)),
    setting("drop_packet", Kind::Mode(which::DROP_PACKET)),
    setting("est_cpulist", Kind::Fixed { is: Value::Text(""), because: NO_THREADS }),
    fixed("est_nice", 0, NO_THREADS),
    setting("expire_nodest_conn", Kind::Switch(switch::EXPIRE_NODEST_CONN)),
    setting("expire_quiescent_template", Kind::Switch(switch::EXPIRE_QUIESCENT_TEMPLATE)),
    fixed("ignore_tunneled", 1, "a packet that the host takes out of a tunnel does not come by XDP again"),
    setting("lblc_expiration", Kind::Seconds(|config| &config.lblc_expiration)),
    setting("lblcr_expiration", Kind::Seconds(|config| &config.lblcr_expiration)),
    setting("nat_icmp_send", Kind::Switch(switch::NAT_ICMP_SEND)),
    fixed("pmtu_disc", 1, "an XDP program cannot fragment packets"),
    setting("run_estimation", Kind::Switch(switch::RUN_ESTIMATION)),
    setting("schedule_icmp", Kind::Switch(switch::SCHEDULE_ICMP)),
    setting("secure_tcp", Kind::Mode(which::SECURE_TCP)),
    setting("sloppy_sctp", Kind::Switch(switch::SLOPPY_SCTP)),
    setting("sloppy_tcp", Kind::Switch(switch::SLOPPY_TCP)),
    setting("snat_reroute", Kind::Switch(switch::SNAT_REROUTE)),
    fixed("sync_persist_mode", 0, NO_DAEMON),
    fixed("sync_ports", 1, NO_DAEMON),
    fixed("sync_qlen_max", 0, NO_DAEMON),
    fixed("sync_refresh_period", 0, NO_DAEMON),
    fixed("sync_retries", 0, NO_DAEMON),
    fixed("sync_sock_size", 0, NO_DAEMON),
    setting("sync_threshold", Kind::Fixed { is: Value::Text("3 50"), because: NO_DAEMON }),
    fixed("sync_version", 1, NO_DAEMON),
];

impl Setting {
    /// Every setting, in the order of their names.
    pub fn all() -> slice::Iter<'static, Self> {
        SETTINGS.iter()
    }

    /// The setting called `name`.
    ///
    /// # Errors
    ///
    /// [`Refusal::NoSetting`].
    pub fn named(name: &str) -> Result<&'static Self, Refusal> {
        Self::all().find(|setting| setting.name == name).ok_or_else(|| Refusal::NoSetting(name.to_owned()))
    }

    /// What it is.
    pub fn value(&self, config: &Config) -> Value {
        Value::Number(match self.kind {
            Kind::Switch(bit) => (config.switches.load() & bit != 0).into(),
            Kind::Mode(place) => config.defences[place].load(),
            Kind::Number(word) | Kind::Seconds(word) => word(config).load(),
            Kind::Fixed { is, .. } => return is,
        })
    }

    /// Why it cannot be anything else, as the end of a sentence; `None` if it can.
    pub fn fixed_because(&self) -> Option<&'static str> {
        match self.kind {
            Kind::Fixed { because, .. } => Some(because),
            _ => None,
        }
    }

    /// Sets it. Packets go by it from then on.
    ///
    /// The caller holds the instance's lock.
    ///
    /// # Errors
    ///
    /// [`Refusal::Setting`] when it cannot be that, [`Refusal::FixedSetting`] when it cannot be set. Nothing has changed
    /// then.
    pub fn set(&self, shared: &Shared<'_>, word: &str) -> Result<(), Refusal> {
        let Self { name, kind } = *self;
        let number = |greatest: u32, allowed: Cow<'static, str>| {
            let number = word.parse().ok().filter(|number| *number <= greatest);
            number.ok_or_else(|| Refusal::Setting { name, word: word.to_owned(), allowed })
        };
        let config = shared.config;
        match kind {
            Kind::Switch(bit) => {
                let others = config.switches.load() & !bit;
                config.switches.store(others | if number(1, "0 or 1".into())? == 0 { 0 } else { bit });
            }
            Kind::Mode(place) => config.defences[place].store(number(defence::mode::ALWAYS, "0 to 3".into())?),
            Kind::Number(of) => of(config).store(number(i32::MAX as u32, "0 to 2147483647".into())?),
            Kind::Seconds(of) => {
                let longest = i32::MAX as u32 / shared.instance.hz.load().max(1);
                of(config).store(number(longest, format!("0 to {longest}").into())?);
            }
            Kind::Fixed { is, .. } if is.to_string() == word.split_whitespace().collect::<Vec<_>>().join(" ") => {}
            Kind::Fixed { is, because } => return Err(Refusal::FixedSetting { name, is, because }),
        }
        defence::settle(config, pages_left(shared));
        // What CPUs keep about destinations may go by the setting.
        config.epoch.store(config.epoch.load().wrapping_add(1).max(1));
        Ok(())
    }
}

/// Pages that are left of the flow table, as the defences count them.
fn pages_left(shared: &Shared<'_>) -> u32 {
    let InstanceRecord { max_flows, max_flows6, dests_used, .. } = lb_common::abi::Record::load(shared.instance);
    let total = |load: &DestLoad| u64::from(active_and_total(load.connections.load()).1);
    let used: u64 = shared.dest_loads.iter().take(dests_used as usize).map(total).sum();
    defence::pages_left(max_flows + max_flows6, u32::try_from(used).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable as _;

    use super::*;

    fn config(hz: u32) -> Config {
        let config = Config::zeroed();
        set_defaults(&config, hz);
        config
    }

    #[test]
    fn settings_have_their_names_and_defaults() {
        let config = config(250);
        let names: Vec<_> = Setting::all().map(|setting| setting.name).collect();
        assert!(names.is_sorted(), "{names:?}");
        for (name, value) in [
            ("am_droprate", 10),
            ("amemthresh", 1024),
            ("conn_reuse_mode", 1),
            ("drop_packet", 0),
            ("expire_nodest_conn", 0),
            ("expire_quiescent_template", 0),
            ("lblc_expiration", 86_400),
            ("lblcr_expiration", 86_400),
            ("run_estimation", 1),
            ("secure_tcp", 0),
            ("sloppy_sctp", 0),
            ("sloppy_tcp", 0),
            ("snat_reroute", 1),
        ] {
            let setting = Setting::named(name).expect("there");
            assert_eq!((setting.value(&config), setting.fixed_because()), (Value::Number(value), None), "{name}");
        }
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
