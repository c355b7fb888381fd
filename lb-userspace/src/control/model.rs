//! Services and destinations as people speak of them.

use std::{
    borrow::Cow,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    num::NonZeroU32,
};

use lb_common::{
    addr::{Address as _, Ip4, Ip6},
    overload::Thresholds,
    proto::{Method, Protocol, Scheduler, sched_flag, service_flag},
};

use crate::control::settings::Value;

/// What tells services apart (`docs/ipvs.md`, section 1.1), in the order of lists.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Identity {
    /// Packets to this address and port.
    Address(ServiceKey),
    /// Packets with this mark.
    Mark(MarkKey),
}

impl Identity {
    /// The address family of its packets.
    pub const fn family(self) -> Family {
        match self {
            Self::Address(key) => Family::of(key.address.ip()),
            Self::Mark(key) => key.family,
        }
    }

    /// The port of destinations that none is given for: 0, which is that of the connection, for marks.
    pub const fn port(self) -> u16 {
        match self {
            Self::Address(key) => key.address.port(),
            Self::Mark(_) => 0,
        }
    }
}

impl From<ServiceKey> for Identity {
    fn from(key: ServiceKey) -> Self {
        Self::Address(key)
    }
}

impl From<MarkKey> for Identity {
    fn from(key: MarkKey) -> Self {
        Self::Mark(key)
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(key) => key.fmt(f),
            Self::Mark(MarkKey { mark, family: Family::Ipv4 }) => write!(f, "mark {mark}"),
            Self::Mark(MarkKey { mark, family: Family::Ipv6 }) => write!(f, "mark {mark} IPv6"),
        }
    }
}

/// The service of the packets of an address family that have a mark.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct MarkKey {
    /// The mark.
    pub mark: NonZeroU32,
    /// The address family.
    pub family: Family,
}

/// An address family.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// IPv4.
    Ipv4,
    /// IPv6.
    Ipv6,
}

impl Family {
    /// That of an address.
    pub const fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::Ipv4 } else { Self::Ipv6 }
    }

    /// The kernel's number of it.
    pub const fn number(self) -> u32 {
        match self {
            Self::Ipv4 => Ip4::FAMILY,
            Self::Ipv6 => Ip6::FAMILY,
        }
    }

    /// The family with this number; IPv4 for any that is none.
    pub const fn from_number(number: u32) -> Self {
        if number == Ip6::FAMILY { Self::Ipv6 } else { Self::Ipv4 }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ipv4 => "IPv4",
            Self::Ipv6 => "IPv6",
        })
    }
}

/// What tells services of addresses and ports apart.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ServiceKey {
    /// Transport protocol.
    pub protocol: Transport,
    /// Address and port.
    pub address: SocketAddr,
}

/// A transport protocol, in the order of its number.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Transport {
    /// The protocol in the data plane's terms.
    pub const fn protocol(self) -> Protocol {
        match self {
            Self::Tcp => Protocol::Tcp,
            Self::Udp => Protocol::Udp,
            Self::Sctp => Protocol::Sctp,
        }
    }
}

impl From<Protocol> for Transport {
    fn from(protocol: Protocol) -> Self {
        match protocol {
            Protocol::Tcp => Self::Tcp,
            Protocol::Udp => Self::Udp,
            Protocol::Sctp => Self::Sctp,
        }
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.protocol().fmt(f)
    }
}

impl fmt::Display for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.protocol, self.address)
    }
}

/// Addresses that begin alike.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Prefix {
    /// The address they begin like, all later bits 0.
    address: IpAddr,
    /// In how many bits.
    length: u8,
}

impl Prefix {
    /// The addresses that begin like `address` in `length` bits; `None` when it has not as many.
    pub fn new(address: IpAddr, length: u8) -> Option<Self> {
        let longest = if address.is_ipv4() { 32 } else { 128 };
        (length <= longest).then(|| Self { address: Self::cut(address, length), length })
    }

    /// Their address family.
    pub const fn family(self) -> Family {
        Family::of(self.address)
    }

    /// The first of them.
    pub const fn address(self) -> IpAddr {
        self.address
    }

    /// In how many bits they begin alike.
    pub const fn length(self) -> u8 {
        self.length
    }

    /// Whether `address` is one of them.
    pub fn contains(&self, address: IpAddr) -> bool {
        address.is_ipv4() == self.address.is_ipv4() && Self::cut(address, self.length) == self.address
    }

    /// The first `length` bits of an address.
    fn cut(address: IpAddr, length: u8) -> IpAddr {
        let length = u32::from(length);
        match address {
            IpAddr::V4(address) => {
                let mask = u32::MAX.checked_shl(32 - length).unwrap_or(0);
                Ipv4Addr::from_bits(address.to_bits() & mask).into()
            }
            IpAddr::V6(address) => {
                let mask = u128::MAX.checked_shl(128 - length).unwrap_or(0);
                Ipv6Addr::from_bits(address.to_bits() & mask).into()
            }
        }
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}

/// A rule that gives packets a mark.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rule {
    /// The mark.
    pub mark: NonZeroU32,
    /// Which packets.
    pub matches: Match,
}

/// Which packets a rule is for: those that all of this is true of.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Match {
    /// The protocol, or any.
    pub protocol: Option<RuleProtocol>,
    /// What the destination address begins like.
    pub destination: Prefix,
    /// The lowest and the highest destination port.
    pub ports: (u16, u16),
    /// What the source address begins like.
    pub source: Option<Prefix>,
    /// Which interface they come in by.
    pub interface: Option<RuleInterface>,
}

/// Every port.
pub const ANY_PORT: (u16, u16) = (0, u16::MAX);

/// A protocol that rules can ask for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum RuleProtocol {
    /// TCP.
    Tcp = 6,
    /// UDP.
    Udp = 17,
    /// SCTP.
    Sctp = 132,
}

impl RuleProtocol {
    /// Every one.
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::Sctp];

    /// Its name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        }
    }
}

/// An interface as a rule knows it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RuleInterface {
    /// Its index.
    pub index: u32,
    /// The name that it had when the rule was added: up to 15 bytes.
    pub name: String,
}

/// In the words that say it to `xdpvs mark add`.
impl fmt::Display for Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = self.protocol.map_or("any", RuleProtocol::as_str);
        let (low, high) = self.ports;
        write!(f, "--proto {protocol} --dst {} --dport ", self.destination)?;
        if low == high {
            write!(f, "{low}")?
        } else {
            write!(f, "{low}-{high}")?
        }
        if let Some(source) = self.source {
            write!(f, " --src {source}")?;
        }
        if let Some(RuleInterface { name, .. }) = &self.interface {
            write!(f, " --iface {name}")?;
        }
        Ok(())
    }
}

/// What can be changed about a service.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ServiceSpec {
    /// Who gets the next connection.
    pub scheduler: Scheduler,
    /// Flags of the service and its scheduler, [`service_flag`] and [`sched_flag`].
    pub flags: u32,
    /// Whether, and how, the connections of a client go to one destination.
    pub persistence: Option<Persistence>,
}

/// How the connections of a client go to one destination (`docs/ipvs.md`, section 6).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Persistence {
    /// How long that is remembered from each new connection on, in seconds, at least 1.
    pub timeout: u32,
    /// Which clients are taken for one.
    pub netmask: Netmask,
}

/// Which clients are taken for one: those whose addresses agree in some bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Netmask {
    /// Of IPv4, in these.
    V4(Ipv4Addr),
    /// Of IPv6, in so many, 1 to 128.
    V6(u8),
}

impl Netmask {
    /// Every client is one of its own.
    pub const fn whole(family: Family) -> Self {
        match family {
            Family::Ipv4 => Self::V4(Ipv4Addr::BROADCAST),
            Family::Ipv6 => Self::V6(128),
        }
    }

    /// Whether every client is one of its own.
    pub const fn is_whole(self) -> bool {
        matches!(self, Self::V4(Ipv4Addr::BROADCAST) | Self::V6(128))
    }

    /// The netmask as the maps hold it.
    pub const fn word(self) -> u32 {
        match self {
            Self::V4(mask) => Ip4::new(mask.octets()).raw(),
            Self::V6(length) => length as u32,
        }
    }

    /// The netmask of a service of this family that the maps hold as `word`.
    pub fn from_word(family: Family, word: u32) -> Self {
        match family {
            Family::Ipv4 => Self::V4(Ip4::from_raw(word).octets().into()),
            Family::Ipv6 => Self::V6(word as u8),
        }
    }

    /// Whether it is one for services of this family.
    pub const fn fits(self, family: Family) -> bool {
        match (self, family) {
            (Self::V4(_), Family::Ipv4) => true,
            (Self::V6(length), Family::Ipv6) => length >= 1 && length <= 128,
            _ => false,
        }
    }
}

impl fmt::Display for Netmask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::V4(mask) => mask.fmt(f),
            Self::V6(length) => length.fmt(f),
        }
    }
}

impl ServiceSpec {
    /// The names of the scheduler's flags that are set, as far as they have one.
    pub fn flag_names(self) -> Vec<&'static str> {
        let names = sched_flag::names(self.scheduler).iter();
        names.filter(|(_, flag)| self.flags & flag != 0).map(|(name, _)| *name).collect()
    }

    /// Whether every UDP packet is scheduled by itself.
    pub const fn is_one_packet(self) -> bool {
        self.flags & service_flag::ONE_PACKET != 0
    }

    /// The scheduler, the flags and the persistence as lists show them.
    pub fn describe(self) -> String {
        let ops = if self.is_one_packet() { " ops" } else { "" };
        let flags = match self.flags & sched_flag::ALL {
            0 => String::new(),
            _ => format!(" ({})", self.flag_names().join(",")),
        };
        let persistence = self.persistence.map_or_else(String::new, |Persistence { timeout, netmask }| {
            let mask = if netmask.is_whole() { String::new() } else { format!(" mask {netmask}") };
            format!(" persistent {timeout}{mask}")
        });
        format!("{}{flags}{persistence}{ops}", self.scheduler)
    }
}

/// What can be changed about a destination (`docs/ipvs.md`, section 1.2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DestSpec {
    /// How packets reach it.
    pub method: Method,
    /// Its share of new connections, 0 to 2^31 - 1; 0 for none.
    pub weight: u32,
    /// How many connections it is to have.
    pub thresholds: Thresholds,
}

/// A service that is configured.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Service {
    /// What it is.
    pub key: Identity,
    /// How it is set.
    pub spec: ServiceSpec,
    /// Its slot.
    pub slot: u32,
    /// Its destinations, newest first.
    pub dests: Vec<Dest>,
}

/// A destination that is configured.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Dest {
    /// Address and port; port 0 for that of the connection.
    pub address: SocketAddr,
    /// How it is set.
    pub spec: DestSpec,
    /// Its number.
    pub number: u32,
}

/// Why a change is refused.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Refusal {
    /// The service exists.
    #[error("service {0} exists already: use `xdpvs service edit` to change it")]
    ServiceExists(Identity),
    /// The service does not exist.
    #[error("no service {0}: see `xdpvs list`")]
    NoService(Identity),
    /// The destination exists.
    #[error("service {0} has destination {1} already: use `xdpvs dest edit` to change it")]
    DestExists(Identity, SocketAddr),
    /// The destination does not exist.
    #[error("service {0} has no destination {1}: see `xdpvs list`")]
    NoDest(Identity, SocketAddr),
    /// No service has or had such a destination.
    #[error("no destination {}: see `xdpvs conn list`", host(.0, *.1))]
    NoSuchDest(IpAddr, Option<u16>),
    /// An address no host can have, or that says nothing without a link.
    #[error("destination {0}: {what}", what = not_one(.0))]
    NotUnicast(SocketAddr),
    /// An address that clients cannot send to from other links, or that is not that of one host.
    #[error("service {0}: use a unicast address that is not link-local")]
    NotServed(ServiceKey),
    /// IPv4 and IPv6 do not mix.
    #[error("destination {dest}: service {service} is {}, and so must its destinations be", .service.family())]
    Families {
        /// The service.
        service: Identity,
        /// The destination.
        dest: SocketAddr,
    },
    /// DR and tunnel do not translate ports.
    #[error("destination {address}: {method} does not change the port, which is {port} for this service: leave it out")]
    PortMapping {
        /// The destination.
        address: SocketAddr,
        /// Its method.
        method: Method,
        /// The service's port.
        port: u16,
    },
    /// Out of range.
    #[error("weight {0}: use 0 to 2147483647")]
    Weight(u64),
    /// An upper threshold out of range.
    #[error("upper threshold {0}: use 0 (none) to 2147483647")]
    UpperThreshold(u32),
    /// A lower threshold above the upper one.
    #[error("lower threshold {}: use at most the upper one, which is {}", .0.lower, .0.upper)]
    LowerThreshold(Thresholds),
    /// A timeout out of range.
    #[error("timeout {seconds}: use 1 to {limit} seconds, or 0 to leave it as it is")]
    Timeout {
        /// The timeout given, in seconds.
        seconds: u32,
        /// The longest that this kernel's clock allows, in seconds.
        limit: u32,
    },
    /// One-packet scheduling of another protocol than UDP.
    #[error("service {0}: one-packet scheduling is for UDP services only: leave --ops out")]
    OnePacket(ServiceKey),
    /// No setting of ip_vs is called so.
    #[error("no setting `{0}`: see `xdpvs set`")]
    NoSetting(String),
    /// A setting out of range.
    #[error("setting {name}: `{word}` is none of its values, use {allowed}")]
    Setting {
        /// The setting.
        name: &'static str,
        /// What was given.
        word: String,
        /// What it can be.
        allowed: Cow<'static, str>,
    },
    /// A setting that cannot be set.
    #[error("setting {name} is `{is}` and cannot be changed: {because}")]
    FixedSetting {
        /// The setting.
        name: &'static str,
        /// What it is.
        is: Value,
        /// Why.
        because: &'static str,
    },
    /// Port 0.
    #[error("service {0}: port 0 is for persistent services only: use -p, or another port")]
    ZeroPort(ServiceKey),
    /// The netmask of another family, or of no length.
    #[error("netmask {netmask}: for service {service} use {}", fitting(.service))]
    Netmask {
        /// The service.
        service: Identity,
        /// The netmask.
        netmask: Netmask,
    },
    /// A netmask without anything that it is for.
    #[error("a netmask is for persistent services only: use -p, too")]
    NetmaskAlone,
    /// How long clients are remembered, out of range.
    #[error("persistence timeout {seconds}: use 1 to {limit} seconds")]
    PersistenceTimeout {
        /// The timeout given, in seconds.
        seconds: u32,
        /// The longest that this kernel's clock allows, in seconds.
        limit: u32,
    },
    /// No slot is left.
    #[error("the instance is made for {limit} {what}: `xdpvs down`, then `xdpvs up` with a higher --max-{option}")]
    Full {
        /// Services or destinations.
        what: &'static str,
        /// How many.
        limit: u32,
        /// The option that says how many.
        option: &'static str,
    },
    /// No room for lists and rings.
    #[error("no room for the schedule of service {0}: use weights with a common divisor")]
    NoSlots(Identity),
    /// A flag of another scheduler.
    #[error("scheduler {scheduler} has no flag `{name}`: leave it out")]
    SchedFlag {
        /// The scheduler.
        scheduler: Scheduler,
        /// The flag.
        name: String,
    },
    /// More destinations than a Maglev table has slots.
    #[error("service {0}: mh and wdh are for at most 4093 destinations: use sh, or another service")]
    MhDests(Identity),
    /// The mark has the rule, or another mark has it.
    #[error("mark rule {0} exists already, for mark {1}: `xdpvs mark del` it first")]
    RuleExists(Box<Match>, NonZeroU32),
    /// There is no such rule.
    #[error("no mark rule {0} for mark {1}: see `xdpvs mark list`")]
    NoRule(Box<Match>, NonZeroU32),
    /// Both prefixes of a rule are of one family.
    #[error("mark rule {0}: source and destination are of one address family")]
    RuleFamilies(Box<Match>),
    /// Too many rules.
    #[error("an instance has room for {0} mark rules: give one rule a wider prefix or port range instead of several")]
    RulesFull(usize),
    /// No room in the endpoint table.
    #[error("no room for another address and port: `xdpvs down`, then `xdpvs up` with a higher --max-dests")]
    NoEndpoints,
}

fn not_one(address: &SocketAddr) -> &'static str {
    if address.is_ipv6() { "use a unicast address that is not link-local" } else { "not the address of one host" }
}

fn fitting(key: &Identity) -> &'static str {
    match key.family() {
        Family::Ipv4 => "one of IPv4, like 255.255.255.0",
        Family::Ipv6 => "a prefix length from 1 to 128",
    }
}

fn host(address: &IpAddr, port: Option<u16>) -> String {
    port.map_or_else(|| address.to_string(), |port| SocketAddr::new(*address, port).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_has_the_addresses_that_begin_like_it() {
        let holds = |prefix: &str, length, address: &str| {
            let [prefix, address] = [prefix, address].map(|word| word.parse().expect("an address"));
            Prefix::new(prefix, length).is_some_and(|prefix| prefix.contains(address))
        };
        assert!(holds("10.1.2.3", 32, "10.1.2.3") && !holds("10.1.2.3", 32, "10.1.2.2"));
        assert!(holds("10.1.2.3", 15, "10.0.0.1") && !holds("10.1.2.3", 15, "10.2.0.1"));
        assert!(holds("10.1.2.3", 0, "255.255.255.255") && !holds("10.1.2.3", 0, "fd00::1"));
        assert!(holds("fd00::1", 8, "fdff::") && !holds("fd00::1", 8, "fe00::"));
        assert!(holds("fd00::1", 128, "fd00::1") && holds("::", 0, "fd00::1") && !holds("::", 0, "0.0.0.0"));
        assert_eq!(Prefix::new([10, 0, 0, 1].into(), 33), None);
    }
}
