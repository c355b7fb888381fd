//! The records of services and destinations, as a copy that can be looked things up in.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, SocketAddr},
    num::NonZeroU32,
};

use lb_common::{
    abi::{DestRecord, Record as _, ServiceRecord, slot},
    addr::{Address, Ip4, Ip6, Port},
    overload::Thresholds,
    proto::{Method, Protocol, Scheduler, service_flag},
};

use crate::control::{
    model::{Dest, DestSpec, Family, Identity, MarkKey, Netmask, Persistence, Service, ServiceKey, ServiceSpec},
    shared::Shared,
};

/// All records in use, by slot, and where to find them.
#[derive(Clone, Default)]
pub struct State {
    /// Services that are configured or have connections left.
    pub services: BTreeMap<u32, ServiceRecord>,
    /// Destinations that are configured or have connections left.
    pub dests: BTreeMap<u32, DestRecord>,
    /// Configured services.
    pub by_key: HashMap<Identity, u32>,
    /// Configured destinations by slot of their service, newest first.
    pub lists: HashMap<u32, Vec<u32>>,
    /// See [`lb_common::abi::Instance::next_order`].
    pub next_order: u64,
    /// Service slots ever used.
    pub services_used: u32,
    /// Destination slots ever used.
    pub dests_used: u32,
}

impl State {
    /// Reads the records.
    pub fn load(shared: &Shared<'_>) -> Self {
        let instance = shared.instance.load();
        let mut state = Self {
            next_order: instance.next_order,
            services_used: instance.services_used,
            dests_used: instance.dests_used,
            ..Self::default()
        };
        for (slot, service) in (0..).zip(shared.services.iter().take(instance.services_used as usize)) {
            let record = service.load();
            if record.state != slot::FREE {
                state.services.insert(slot, record);
            }
            if record.state == slot::USED {
                state.by_key.insert(service_key(&record), slot);
                state.lists.insert(slot, Vec::new());
            }
        }
        for (number, dest) in (0..).zip(shared.dests.iter().take(instance.dests_used as usize)) {
            let record = dest.load();
            if record.state != slot::FREE {
                state.dests.insert(number, record);
            }
            if record.state == slot::USED
                && let Some(list) = state.lists.get_mut(&record.service)
            {
                list.push(number);
            }
        }
        for list in state.lists.values_mut() {
            list.sort_by_key(|number| std::cmp::Reverse(state.dests.get(number).map(|record| record.order)));
        }
        state
    }

    /// The configured destinations of a service, newest first.
    pub fn list(&self, service: u32) -> &[u32] {
        self.lists.get(&service).map_or(&[], Vec::as_slice)
    }

    /// The weights of the configured destinations of a service, newest first.
    pub fn weights(&self, service: u32) -> Vec<u32> {
        self.list(service).iter().filter_map(|number| self.dests.get(number)).map(|record| record.weight).collect()
    }

    /// Everything that is configured, in the order services were created.
    pub fn configured(&self) -> Vec<Service> {
        let mut services: Vec<_> = self.services.iter().filter(|(_, record)| record.state == slot::USED).collect();
        services.sort_by_key(|(_, record)| record.order);
        services.into_iter().map(|(slot, record)| self.service(*slot, record)).collect()
    }

    fn service(&self, slot: u32, record: &ServiceRecord) -> Service {
        let dests = self.list(slot).iter().filter_map(|number| {
            let record = self.dests.get(number)?;
            Some(Dest { address: dest_address(record), spec: dest_spec(record), number: *number })
        });
        let scheduler = Scheduler::try_from(record.scheduler as u8).unwrap_or(Scheduler::Wlc);
        let key = service_key(record);
        let persistence = (record.flags & service_flag::PERSISTENT != 0).then(|| Persistence {
            timeout: record.persistence,
            netmask: Netmask::from_word(key.family(), record.netmask),
        });
        Service {
            key,
            spec: ServiceSpec { scheduler, flags: record.flags & !service_flag::PERSISTENT, persistence },
            slot,
            dests: dests.collect(),
        }
    }

    /// Destinations of a service that count towards its traffic: configured ones, and removed ones that are remembered.
    pub fn counted(&self, service: u32) -> impl Iterator<Item = u32> {
        self.dests.iter().filter(move |(_, record)| record.service == service).map(|(number, _)| *number)
    }
}

/// What tells a service apart from others.
pub fn service_key(record: &ServiceRecord) -> Identity {
    if let Some(mark) = service_mark(record) {
        return MarkKey { mark, family: Family::from_number(record.family) }.into();
    }
    let protocol = Protocol::try_from((record.port_protocol >> 16) as u8).unwrap_or(Protocol::Tcp);
    let address = socket_address(record.family, record.addr, record.port_protocol);
    ServiceKey { protocol: protocol.into(), address }.into()
}

/// The mark of the packets of a service, if it is one of a mark.
pub fn service_mark(record: &ServiceRecord) -> Option<NonZeroU32> {
    if record.port_protocol >> 16 == 0 { NonZeroU32::new(record.addr[0]) } else { None }
}

/// The address and port of a destination.
pub fn dest_address(record: &DestRecord) -> SocketAddr {
    socket_address(dest_family(record), record.addr, record.port_method)
}

/// The address family of a destination.
pub fn dest_family(record: &DestRecord) -> u32 {
    record.port_method >> 24
}

/// How a destination is set.
pub fn dest_spec(record: &DestRecord) -> DestSpec {
    let method = Method::try_from((record.port_method >> 16) as u8).unwrap_or(Method::Route);
    let thresholds = Thresholds { upper: record.upper, lower: record.lower };
    DestSpec { method, weight: record.weight, thresholds }
}

fn socket_address(family: u32, addr: [u32; 4], port: u32) -> SocketAddr {
    SocketAddr::new(ip(family, addr), Port::from_raw(port as u16).number())
}

/// An address of some family that the maps hold as `words`.
pub fn ip(family: u32, words: [u32; 4]) -> IpAddr {
    match family {
        Ip6::FAMILY => Ip6::from_words(words).octets().into(),
        _ => Ip4::from_words(words).octets().into(),
    }
}

/// An address as the maps hold it: its family and its words.
pub fn words(address: IpAddr) -> (u32, [u32; 4]) {
    match address {
        IpAddr::V4(address) => (Ip4::FAMILY, Ip4::new(address.octets()).words()),
        IpAddr::V6(address) => (Ip6::FAMILY, Ip6::new(address.octets()).words()),
    }
}
