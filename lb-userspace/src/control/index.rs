//! Where a change finds destinations and free slots, so that one of a thousand steps costs as much as one of ten.

use std::{
    collections::{HashMap, hash_map::Entry},
    net::SocketAddr,
};

use lb_common::{abi::slot, sched::WrrParameters};

use crate::control::{
    model::Identity,
    state::{State, dest_address, service_key},
};

/// What is known of a [`State`] beside what it says. Who changes the state tells the index.
#[derive(Default)]
pub struct Index {
    /// Configured destinations by address, of the services that have been asked for, by slot.
    dests: HashMap<u32, HashMap<SocketAddr, u32>>,
    /// Removed destinations that are remembered.
    trash: HashMap<(Identity, SocketAddr), u32>,
    /// wrr's parameters for all destinations of a service, by slot, as far as they are known.
    wrr: HashMap<u32, WrrParameters>,
    /// The service slots before this one are in use.
    services: u32,
    /// The destination slots before this one are in use.
    numbers: u32,
}

impl Index {
    /// What is known of a state at first.
    pub fn of(state: &State) -> Self {
        let mut index = Self::default();
        let removed = state.dests.iter().filter(|(_, record)| record.state == slot::REMOVED);
        for number in removed.map(|(number, _)| *number) {
            index.removed(state, number);
        }
        index
    }

    /// The destination that a configured service has at an address.
    pub fn dest(&mut self, state: &State, service: u32, address: SocketAddr) -> Option<u32> {
        let dests = self.dests.entry(service).or_insert_with(|| {
            let records = state.list(service).iter().filter_map(|number| Some((*number, state.dests.get(number)?)));
            records.map(|(number, record)| (dest_address(record), number)).collect()
        });
        dests.get(&address).copied()
    }

    /// The removed destination that this service, or one with the same key before it, had at an address.
    pub fn trashed(&self, key: Identity, address: SocketAddr) -> Option<u32> {
        self.trash.get(&(key, address)).copied()
    }

    /// A service has a destination that it had not: `number`, which [`Index::dest`] has not found.
    pub fn added(&mut self, state: &State, key: Identity, number: u32) {
        let Some(record) = state.dests.get(&number) else { return };
        let address = dest_address(record);
        self.trash.remove(&(key, address));
        if let Some(dests) = self.dests.get_mut(&record.service) {
            dests.insert(address, number);
        }
        if let Some(parameters) = self.wrr.get_mut(&record.service) {
            *parameters = parameters.with(record.weight);
        }
    }

    /// A destination of a service has another weight.
    pub fn edited(&mut self, service: u32) {
        self.wrr.remove(&service);
    }

    /// A destination has been removed.
    pub fn removed(&mut self, state: &State, number: u32) {
        let Some(record) = state.dests.get(&number) else { return };
        let address = dest_address(record);
        if let Some(dests) = self.dests.get_mut(&record.service) {
            dests.remove(&address);
        }
        self.wrr.remove(&record.service);
        if let Some(service) = state.services.get(&record.service) {
            self.trash.insert((service_key(service), address), number);
        }
    }

    /// wrr's parameters for the destinations of a service.
    pub fn wrr(&mut self, state: &State, service: u32) -> WrrParameters {
        match self.wrr.entry(service) {
            Entry::Occupied(known) => *known.get(),
            Entry::Vacant(unknown) => *unknown.insert(WrrParameters::of(&state.weights(service))),
        }
    }

    /// The first free service slot that has been used, or else the one after those.
    pub fn free_service(&mut self, state: &State) -> u32 {
        let free = (self.services..state.services_used).find(|slot| !state.services.contains_key(slot));
        self.services = free.unwrap_or(state.services_used);
        self.services
    }

    /// The first free destination slot below `slots`.
    pub fn free_dest(&mut self, state: &State, slots: u32) -> Option<u32> {
        let free = (self.numbers..slots).find(|number| !state.dests.contains_key(number));
        self.numbers = free.unwrap_or(slots);
        free
    }
}
