//! What services and destinations have carried, and what became of the packets that were not forwarded.

use std::ops::AddAssign;

use lb_common::{abi::ServiceRecord, event::Event, reason::Reason};
use serde::Serialize;

use crate::{
    control::{shared::Counters, state::State},
    datapath::open::PerCpu,
    error::Error,
};

/// The counters of `docs/ipvs.md`, section 8.1.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Traffic {
    /// Connections scheduled.
    pub connections: u64,
    /// Packets from clients.
    pub packets_in: u64,
    /// Packets from servers.
    pub packets_out: u64,
    /// Bytes from clients, IP headers included.
    pub bytes_in: u64,
    /// Bytes from servers, IP headers included.
    pub bytes_out: u64,
}

impl From<[u64; 5]> for Traffic {
    /// From counters in the order of [`Counters`].
    fn from([connections, packets_in, bytes_in, packets_out, bytes_out]: [u64; 5]) -> Self {
        Self { connections, packets_in, packets_out, bytes_in, bytes_out }
    }
}

impl AddAssign for Traffic {
    fn add_assign(&mut self, other: Self) {
        self.connections += other.connections;
        self.packets_in += other.packets_in;
        self.packets_out += other.packets_out;
        self.bytes_in += other.bytes_in;
        self.bytes_out += other.bytes_out;
    }
}

impl Traffic {
    /// What a destination has carried.
    ///
    /// # Errors
    ///
    /// When the kernel does not say.
    pub fn of_dest(counters: &impl Counters, number: u32) -> Result<Self, Error> {
        counters.read(number).map(Self::from)
    }

    /// What the service in `slot` has carried, by destinations of which some may be gone.
    ///
    /// # Errors
    ///
    /// When the kernel does not say.
    pub fn of_service(state: &State, counters: &impl Counters, slot: u32) -> Result<Self, Error> {
        let retired = state.services.get(&slot).map_or([0; 5], |record: &ServiceRecord| record.retired);
        let mut sum = Self::from(retired);
        for number in state.counted(slot) {
            sum += Self::of_dest(counters, number)?;
        }
        Ok(sum)
    }
}

/// How many packets were not forwarded for each reason.
///
/// # Errors
///
/// When the kernel does not say.
pub fn reasons(counters: &PerCpu<u64>) -> Result<Vec<(Reason, u64)>, Error> {
    Reason::ALL.iter().map(|&reason| Ok((reason, counters.get(reason as u32)?.iter().sum()))).collect()
}

/// How often the director has done something.
///
/// # Errors
///
/// When the kernel does not say.
pub fn events(counters: &PerCpu<u64>) -> Result<Vec<(Event, u64)>, Error> {
    Event::ALL.iter().map(|&event| Ok((event, counters.get(event as u32)?.iter().sum()))).collect()
}
