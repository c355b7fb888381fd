//! Services and destinations as people speak of them.

use std::{fmt, net::SocketAddr};

use lb_common::proto::{Method, Protocol, Scheduler, sched_flag};

/// What tells services apart (`docs/ipvs.md`, section 1.1).
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
}

impl Transport {
    /// The protocol in the data plane's terms.
    pub const fn protocol(self) -> Protocol {
        match self {
            Self::Tcp => Protocol::Tcp,
            Self::Udp => Protocol::Udp,
        }
    }
}

impl From<Protocol> for Transport {
    fn from(protocol: Protocol) -> Self {
        match protocol {
            Protocol::Tcp => Self::Tcp,
            Protocol::Udp => Self::Udp,
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

/// What can be changed about a service.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ServiceSpec {
    /// Who gets the next connection.
    pub scheduler: Scheduler,
    /// Flags of the scheduler, [`sched_flag`].
    pub flags: u32,
}

impl ServiceSpec {
    /// The names of the scheduler's flags that are set, as far as they have one.
    pub fn flag_names(self) -> Vec<&'static str> {
        let names = sched_flag::names(self.scheduler).iter();
        names.filter(|(_, flag)| self.flags & flag != 0).map(|(name, _)| *name).collect()
    }

    /// The scheduler and its flags as lists show them.
    pub fn describe(self) -> String {
        match self.flags {
            0 => self.scheduler.to_string(),
            _ => format!("{} ({})", self.scheduler, self.flag_names().join(",")),
        }
    }
}

/// What can be changed about a destination (`docs/ipvs.md`, section 1.2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DestSpec {
    /// How packets reach it.
    pub method: Method,
    /// Its share of new connections, 0 to 2^31 - 1; 0 for none.
    pub weight: u32,
}

/// A service that is configured.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Service {
    /// What it is.
    pub key: ServiceKey,
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
    ServiceExists(ServiceKey),
    /// The service does not exist.
    #[error("no service {0}: see `xdpvs list`")]
    NoService(ServiceKey),
    /// The destination exists.
    #[error("service {0} has destination {1} already: use `xdpvs dest edit` to change it")]
    DestExists(ServiceKey, SocketAddr),
    /// The destination does not exist.
    #[error("service {0} has no destination {1}: see `xdpvs list`")]
    NoDest(ServiceKey, SocketAddr),
    /// An address no host can have.
    #[error("destination {0}: not the address of one host")]
    NotUnicast(SocketAddr),
    /// IPv6.
    #[error("{0}: IPv6 is not supported yet")]
    Family(SocketAddr),
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
    /// A timeout out of range.
    #[error("timeout {seconds}: use 1 to {limit} seconds, or 0 to leave it as it is")]
    Timeout {
        /// The timeout given, in seconds.
        seconds: u32,
        /// The longest that this kernel's clock allows, in seconds.
        limit: u32,
    },
    /// Port 0.
    #[error("service {0}: port 0 is for persistent services only")]
    ZeroPort(ServiceKey),
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
    NoSlots(ServiceKey),
    /// A flag of another scheduler.
    #[error("scheduler {scheduler} has no flag `{name}`: leave it out")]
    SchedFlag {
        /// The scheduler.
        scheduler: Scheduler,
        /// The flag.
        name: String,
    },
    /// More destinations than a Maglev table has slots.
    #[error("service {0}: mh is for at most 4093 destinations: use sh, or another service")]
    MhDests(ServiceKey),
    /// No room in the endpoint table.
    #[error("no room for another address and port: `xdpvs down`, then `xdpvs up` with a higher --max-dests")]
    NoEndpoints,
}
