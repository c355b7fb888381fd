//! What services and destinations have carried, and what became of the packets that were not forwarded.

use lb_common::{
    abi::{Estimate, EstimateRecord, Record as _, ServiceRecord},
    event::Event,
    rate,
    reason::Reason,
};
use serde::Serialize;

use crate::{
    control::{
        shared::{Counters, Object, Shared},
        state::State,
    },
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

/// What the service in `slot` has carried since it exists, by destinations of which some may be gone.
///
/// # Errors
///
/// When the kernel does not say.
pub fn carried(state: &State, counters: &impl Counters, slot: u32) -> Result<[u64; 5], Error> {
    let mut sum = state.services.get(&slot).map_or([0; 5], |record: &ServiceRecord| record.retired);
    for number in state.counted(slot) {
        add(&mut sum, counters.read(number)?);
    }
    Ok(sum)
}

/// What all services have carried that are remembered.
///
/// # Errors
///
/// When the kernel does not say.
pub fn carried_by_all(state: &State, counters: &impl Counters) -> Result<[u64; 5], Error> {
    let mut sum = [0; 5];
    for slot in state.services.keys() {
        add(&mut sum, carried(state, counters, *slot)?);
    }
    Ok(sum)
}

fn add(sum: &mut [u64; 5], counters: [u64; 5]) {
    for (sum, counter) in sum.iter_mut().zip(counters) {
        *sum += counter;
    }
}

impl Traffic {
    /// They, in the order of lists.
    pub const fn cells(&self) -> [u64; 5] {
        [self.connections, self.packets_in, self.packets_out, self.bytes_in, self.bytes_out]
    }

    /// What an object has carried since it was zeroed.
    ///
    /// # Errors
    ///
    /// When the kernel does not say.
    pub fn of(shared: &Shared<'_>, state: &State, counters: &impl Counters, object: Object) -> Result<Self, Error> {
        let carried = match object {
            Object::Dest(number) => counters.read(number)?,
            Object::Service(slot) => carried(state, counters, slot)?,
            Object::All => carried_by_all(state, counters)?,
        };
        let base = shared.estimate(object).map_or([0; 5], |estimate| estimate.load().base);
        Ok(std::array::from_fn(|index| carried[index].wrapping_sub(base[index])).into())
    }
}

/// What is carried in a second, as ip_vs estimates it (`docs/ipvs.md`, section 8.2), by ipvsadm's names.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Rates {
    /// Connections.
    pub cps: u64,
    /// Packets from clients.
    pub inpps: u64,
    /// Packets from servers.
    pub outpps: u64,
    /// Bytes from clients.
    pub inbps: u64,
    /// Bytes from servers.
    pub outbps: u64,
}

impl Rates {
    /// They, in the order of lists.
    pub const fn cells(&self) -> [u64; 5] {
        [self.cps, self.inpps, self.outpps, self.inbps, self.outbps]
    }

    /// Those of an object as of its last estimation.
    pub fn of(shared: &Shared<'_>, object: Object) -> Self {
        let Some(EstimateRecord { average, wish, done, .. }) = shared.estimate(object).map(Estimate::load) else {
            return Self::default();
        };
        if wish != done {
            // They begin anew with the next estimation.
            return Self::default();
        }
        let [cps, inpps, inbps, outpps, outbps] = std::array::from_fn(|index| rate::per_second(index, average[index]));
        Self { cps, inpps, outpps, inbps, outbps }
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
