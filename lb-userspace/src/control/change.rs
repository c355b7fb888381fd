//! Planning a change: what ip_vs would do, done to a copy of the records.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv6Addr, SocketAddr},
};

use bytemuck::Zeroable as _;
use lb_common::{
    abi::{DestLoad, DestRecord, Record as _, ServiceRecord, active_and_total, slot},
    addr::Port,
    proto::{Method, Scheduler, service_flag},
};

use crate::{
    control::{
        compile::{self, Compiled},
        index::Index,
        journal::{self, Plan},
        model::{DestSpec, Family, Identity, MarkKey, Persistence, Refusal, ServiceKey, ServiceSpec, Transport},
        settings::longest_s,
        shared::{Counters, Object, Shared},
        state::{State, dest_family, dest_spec, words},
        traffic,
    },
    error::Error,
};

/// How long a removed destination without connections is remembered, in seconds: as long as ip_vs keeps one in its trash
/// at most.
const TRASH_S: u32 = 180;

/// A change that is being planned. Dropping it changes nothing.
pub struct Change<'a> {
    shared: Shared<'a>,
    state: State,
    index: Index,
    now_s: u32,
    /// What is to be written.
    plan: Plan,
    /// Slots of services whose views are compiled anew.
    views: BTreeSet<u32>,
    /// Whether destinations are removed.
    removes: bool,
    /// What was refused because no slot is free.
    lack: Option<Refusal>,
}

/// What a change does to the list of a service.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Touch {
    Added,
    Edited,
    /// With the position in the list from which a destination is removed.
    Removed(usize),
}

impl<'a> Change<'a> {
    /// Begins a change of the configuration in `shared`, `now_s` seconds after the machine has started.
    ///
    /// The caller holds the instance's lock, and no other change is unfinished.
    ///
    /// # Errors
    ///
    /// When counters of a destination that is forgotten cannot be read.
    pub fn begin(shared: Shared<'a>, counters: &impl Counters, now_s: u32) -> Result<Self, Error> {
        let mut change = Self {
            shared,
            state: State::load(&shared),
            index: Index::default(),
            now_s,
            plan: Plan::default(),
            views: BTreeSet::new(),
            removes: false,
            lack: None,
        };
        change.forget(counters)?;
        change.index = Index::of(&change.state);
        Ok(change)
    }

    /// Whether destinations are removed.
    pub fn removes(&self) -> bool {
        self.removes
    }

    /// What was refused because no slot is free, if anything was: there may be one once the rest is in force.
    pub fn lack(&self) -> Option<&Refusal> {
        self.lack.as_ref()
    }

    /// The configuration as it is planned.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Adds a service without destinations.
    ///
    /// # Errors
    ///
    /// When it exists, or cannot be, or there is no room for it.
    pub fn add_service(&mut self, key: impl Into<Identity>, spec: ServiceSpec) -> Result<(), Refusal> {
        let key = key.into();
        self.check_spec(key, spec)?;
        let (family, addr, port_protocol) = match key {
            Identity::Address(key) => {
                check_service(key)?;
                let (family, addr) = words(key.address.ip());
                let port = u32::from(Port::new(key.address.port()).raw());
                (family, addr, port | (key.protocol.protocol() as u32) << 16)
            }
            Identity::Mark(MarkKey { mark, family }) => (family.number(), [mark.get(), 0, 0, 0], 0),
        };
        if self.state.by_key.contains_key(&key) {
            return Err(Refusal::ServiceExists(key));
        }
        let slot = self.free_service()?;
        let order = self.next_order();
        let record = ServiceRecord {
            state: slot::USED,
            family,
            addr,
            port_protocol,
            scheduler: spec.scheduler as u32,
            flags: flags(spec),
            persistence: spec.persistence.map_or(0, |persistence| persistence.timeout),
            netmask: spec.persistence.map_or(0, |persistence| persistence.netmask.word()),
            // The first view of a slot that was used before must not be the one that packets may still look at.
            view: self.shared.services.get(slot as usize).map_or(2 * slot, |old| 2 * slot + (!old.load().view & 1)),
            threshold: if compile::is_cached(spec.scheduler as u32) { cache(order) } else { 0 },
            order,
            ..ServiceRecord::zeroed()
        };
        self.state.services.insert(slot, record);
        self.state.by_key.insert(key, slot);
        self.state.lists.insert(slot, Vec::new());
        self.plan.services.insert(slot);
        self.plan.created.insert(slot);
        self.views.insert(slot);
        Ok(())
    }

    /// Changes a service. Another scheduler starts afresh; the same one goes on where it stands.
    ///
    /// # Errors
    ///
    /// When it does not exist, or cannot be.
    pub fn edit_service(&mut self, key: impl Into<Identity>, spec: ServiceSpec) -> Result<(), Refusal> {
        let key = key.into();
        let slot = self.service(key)?;
        self.check_spec(key, spec)?;
        self.catch_up(slot);
        let top = if spec.scheduler == Scheduler::Wrr { self.index.wrr(&self.state, slot).top } else { 0 };
        let order = self.next_order();
        let Some(record) = self.state.services.get_mut(&slot) else { return Ok(()) };
        record.flags = flags(spec);
        record.persistence = spec.persistence.map_or(0, |persistence| persistence.timeout);
        record.netmask = spec.persistence.map_or(0, |persistence| persistence.netmask.word());
        if record.scheduler != spec.scheduler as u32 {
            record.scheduler = spec.scheduler as u32;
            record.pointer = 0;
            record.threshold = match spec.scheduler {
                Scheduler::Wrr => top,
                scheduler if compile::is_cached(scheduler as u32) => cache(order),
                _ => 0,
            };
        }
        Ok(())
    }

    /// Removes a service with its destinations. Connections stay, but their packets go nowhere.
    ///
    /// # Errors
    ///
    /// When it does not exist.
    pub fn delete_service(&mut self, key: impl Into<Identity>) -> Result<(), Refusal> {
        let key = key.into();
        let slot = self.service(key)?;
        for number in self.state.lists.remove(&slot).unwrap_or_default() {
            self.remove_dest(number);
        }
        self.state.by_key.remove(&key);
        if let Some(record) = self.state.services.get_mut(&slot) {
            record.state = slot::REMOVED;
        }
        self.plan.services.insert(slot);
        Ok(())
    }

    /// Removes all services.
    pub fn flush(&mut self) {
        let keys: Vec<_> = self.state.by_key.keys().copied().collect();
        for key in keys {
            // It was found a moment ago.
            let _ = self.delete_service(key);
        }
    }

    /// Adds a destination to a service. One that was removed a while ago, or has connections left, comes back with its
    /// counters and connections (`docs/ipvs.md`, section 1.4).
    ///
    /// # Errors
    ///
    /// When there is no such service, when it has the destination, or when the destination cannot be.
    pub fn add_dest(&mut self, key: impl Into<Identity>, address: SocketAddr, spec: DestSpec) -> Result<(), Refusal> {
        let key = key.into();
        let service = self.service(key)?;
        check_dest(key, address, spec)?;
        if self.index.dest(&self.state, service, address).is_some() {
            return Err(Refusal::DestExists(key, address));
        }
        check_address(key, address)?;
        let (number, fresh) = match self.index.trashed(key, address) {
            Some(number) => (number, self.state.dests.get(&number).is_none_or(|old| old.service != service)),
            None => (self.free_dest()?, true),
        };
        if fresh {
            self.plan.cleared.insert(number);
        }
        self.catch_up(service);
        let masqueraded = self.state.dests.get(&number).map_or(0, |old| old.masqueraded);
        let (family, addr) = words(address.ip());
        let record = DestRecord {
            addr,
            port_method: port_method(family, address.port(), spec.method),
            weight: spec.weight,
            state: slot::USED,
            service,
            upper: spec.thresholds.upper,
            lower: spec.thresholds.lower,
            last_weight: spec.weight,
            removed_at: 0,
            order: self.next_order(),
            masqueraded: masqueraded | u32::from(spec.method == Method::Masq),
            reserved: 0,
        };
        self.state.dests.insert(number, record);
        self.state.lists.entry(service).or_default().insert(0, number);
        self.index.added(&self.state, key, number);
        self.plan.dests.insert(number);
        self.scheduler_sees(service, Touch::Added);
        Ok(())
    }

    /// Changes a destination. Connections that exist keep the method they have.
    ///
    /// # Errors
    ///
    /// When there is no such service or destination, or when the destination cannot be.
    pub fn edit_dest(&mut self, key: impl Into<Identity>, address: SocketAddr, spec: DestSpec) -> Result<(), Refusal> {
        let key = key.into();
        let service = self.service(key)?;
        check_dest(key, address, spec)?;
        let number = self.index.dest(&self.state, service, address).ok_or(Refusal::NoDest(key, address))?;
        self.catch_up(service);
        if let Some(record) = self.state.dests.get_mut(&number) {
            record.port_method = port_method(dest_family(record), address.port(), spec.method);
            record.weight = spec.weight;
            record.upper = spec.thresholds.upper;
            record.lower = spec.thresholds.lower;
            if spec.weight != 0 {
                record.last_weight = spec.weight;
            }
            record.masqueraded |= u32::from(spec.method == Method::Masq);
        }
        self.index.edited(service);
        self.plan.dests.insert(number);
        self.scheduler_sees(service, Touch::Edited);
        Ok(())
    }

    /// How a destination is set.
    ///
    /// # Errors
    ///
    /// When there is no such service or destination.
    pub fn dest(&mut self, key: impl Into<Identity>, address: SocketAddr) -> Result<DestSpec, Refusal> {
        let key = key.into();
        let service = self.service(key)?;
        let number = self.index.dest(&self.state, service, address);
        let record = number.and_then(|number| self.state.dests.get(&number)).ok_or(Refusal::NoDest(key, address))?;
        Ok(dest_spec(record))
    }

    /// Removes a destination. Connections to it stay, but their packets go nowhere until it is added again.
    ///
    /// # Errors
    ///
    /// When there is no such service or destination.
    pub fn delete_dest(&mut self, key: impl Into<Identity>, address: SocketAddr) -> Result<(), Refusal> {
        let key = key.into();
        let service = self.service(key)?;
        let number = self.index.dest(&self.state, service, address).ok_or(Refusal::NoDest(key, address))?;
        self.catch_up(service);
        let list = self.state.lists.entry(service).or_default();
        if let Some(position) = list.iter().position(|other| *other == number) {
            self.scheduler_sees(service, Touch::Removed(position));
            self.state.lists.entry(service).or_default().remove(position);
        }
        self.remove_dest(number);
        self.scheduler_sees(service, Touch::Edited);
        Ok(())
    }

    /// Lets the counters of a service and its destinations begin at zero, as far as lists show them, and their rates; or
    /// those of everything (`docs/ipvs.md`, section 8.3).
    ///
    /// # Errors
    ///
    /// When there is no such service, or the kernel does not tell a counter.
    pub fn zero(&mut self, key: Option<Identity>, counters: &impl Counters) -> Result<(), Commit> {
        let slots = match key {
            Some(key) => vec![self.service(key)?],
            None => self.state.by_key.values().copied().collect(),
        };
        for slot in slots {
            for number in self.state.list(slot).to_vec() {
                self.plan.bases.insert(Object::Dest(number), counters.read(number)?);
            }
            let carried = traffic::carried(&self.state, counters, slot)?;
            self.plan.bases.insert(Object::Service(slot), carried);
        }
        if key.is_none() {
            self.plan.bases.insert(Object::All, traffic::carried_by_all(&self.state, counters)?);
        }
        Ok(())
    }

    /// What lists take off the counters of an object.
    fn base(&self, object: Object) -> [u64; 5] {
        let in_force = || self.shared.estimate(object).map_or([0; 5], |estimate| estimate.load().base);
        self.plan.bases.get(&object).copied().unwrap_or_else(in_force)
    }

    /// Puts the planned configuration in force, all of it or nothing.
    ///
    /// # Errors
    ///
    /// [`Commit::Refused`] when there is no room for it: nothing has changed then.
    pub fn commit(self, counters: &mut impl Counters) -> Result<(), Commit> {
        if self.plan.services.is_empty() && self.plan.dests.is_empty() && self.plan.bases.is_empty() {
            return Ok(());
        }
        let compiled = self.compile()?;
        journal::write(&self.shared, &self.state, &self.plan);
        journal::carry_out(&self.shared, counters, &compiled)?;
        Ok(())
    }

    fn compile(&self) -> Result<Compiled, Refusal> {
        let views = self.views.iter().copied().filter(|slot| self.state.lists.contains_key(slot));
        compile::compile(&self.shared, &self.state, views)
    }

    fn check_spec(&self, key: Identity, spec: ServiceSpec) -> Result<(), Refusal> {
        check_flags(key, spec)?;
        let limit = longest_s(self.shared.instance.hz.load());
        match (key, spec.persistence) {
            (Identity::Address(key), None) if key.address.port() == 0 => Err(Refusal::ZeroPort(key)),
            (_, Some(Persistence { netmask, .. })) if !netmask.fits(key.family()) => {
                Err(Refusal::Netmask { service: key, netmask })
            }
            (_, Some(Persistence { timeout, .. })) if timeout == 0 || timeout > limit => {
                Err(Refusal::PersistenceTimeout { seconds: timeout, limit })
            }
            _ => Ok(()),
        }
    }

    fn service(&self, key: Identity) -> Result<u32, Refusal> {
        self.state.by_key.get(&key).copied().ok_or(Refusal::NoService(key))
    }

    fn next_order(&mut self) -> u64 {
        let order = self.state.next_order;
        self.state.next_order += 1;
        order
    }

    fn free_service(&mut self) -> Result<u32, Refusal> {
        let slots = self.shared.services.len() as u32;
        let slot = self.index.free_service(&self.state);
        if slot >= slots {
            return Err(self.full(Refusal::Full { what: "services", limit: slots, option: "services" }));
        }
        self.state.services_used = self.state.services_used.max(slot + 1);
        Ok(slot)
    }

    fn free_dest(&mut self) -> Result<u32, Refusal> {
        let slots = self.shared.dests.len() as u32;
        let number = if self.state.dests_used < slots {
            // Slots that were never used first: the longer one stays unused, the better is what it was remembered.
            self.state.dests_used
        } else if let Some(free) = self.index.free_dest(&self.state, slots) {
            free
        } else {
            return Err(self.full(Refusal::Full { what: "destinations", limit: slots, option: "dests" }));
        };
        self.state.dests_used = self.state.dests_used.max(number + 1);
        Ok(number)
    }

    fn full(&mut self, refusal: Refusal) -> Refusal {
        self.lack.insert(refusal).clone()
    }

    fn remove_dest(&mut self, number: u32) {
        let now_s = self.now_s;
        if let Some(record) = self.state.dests.get_mut(&number) {
            record.state = slot::REMOVED;
            record.removed_at = now_s;
        }
        self.index.removed(&self.state, number);
        self.removes = true;
        self.plan.dests.insert(number);
    }

    /// Forgets removed destinations without connections and templates, and removed services without destinations.
    fn forget(&mut self, counters: &impl Counters) -> Result<(), Error> {
        let connections = |number: u32| {
            let of = |load: &DestLoad| active_and_total(load.connections.load()).1.max(load.templates.load());
            self.shared.dest_loads.get(number as usize).map_or(0, of)
        };
        let over = |(number, record): (&u32, &DestRecord)| {
            let old = self.now_s.saturating_sub(record.removed_at) > TRASH_S;
            (record.state == slot::REMOVED && old && connections(*number) == 0).then_some(*number)
        };
        let forgotten: Vec<u32> = self.state.dests.iter().filter_map(over).collect();
        for number in forgotten {
            let traffic = counters.read(number)?;
            let Some(record) = self.state.dests.remove(&number) else { continue };
            if let Some(service) = self.state.services.get_mut(&record.service) {
                for (retired, counter) in service.retired.iter_mut().zip(traffic) {
                    *retired += counter;
                }
                self.plan.services.insert(record.service);
            }
            self.plan.dests.insert(number);
        }
        let occupied: BTreeSet<u32> = self.state.dests.values().map(|record| record.service).collect();
        let empty = |(slot, record): (&u32, &ServiceRecord)| {
            (record.state == slot::REMOVED && !occupied.contains(slot)).then_some(*slot)
        };
        let empty: Vec<u32> = self.state.services.iter().filter_map(empty).collect();
        for slot in empty {
            if let Some(record) = self.state.services.remove(&slot) {
                // What it has carried goes on counting among all.
                let base = self.base(Object::All);
                let without = std::array::from_fn(|index| base[index].wrapping_sub(record.retired[index]));
                self.plan.bases.insert(Object::All, without);
            }
            self.plan.services.insert(slot);
        }
        Ok(())
    }

    /// Takes over where the data plane's scheduler stands, before anything is changed that it looks at; and gives the
    /// service another view to be compiled into.
    fn catch_up(&mut self, slot: u32) {
        self.plan.services.insert(slot);
        if !self.views.insert(slot) {
            return;
        }
        if let Some(record) = self.state.services.get_mut(&slot) {
            (record.pointer, record.threshold) = compile::position(&self.shared, record);
            record.view ^= 1;
        }
    }

    /// Does to a scheduler's position what ip_vs's hooks do to it (`docs/ipvs.md`, sections 3.0 to 3.2).
    fn scheduler_sees(&mut self, slot: u32, touch: Touch) {
        let Some(record) = self.state.services.get(&slot).copied() else { return };
        let (pointer, threshold) = match (Scheduler::try_from(record.scheduler as u8), touch) {
            (Ok(Scheduler::Rr), Touch::Removed(position)) => {
                let list = self.state.list(slot);
                let points_there = list.get(position).is_some_and(|number| number + 1 == record.pointer);
                if !points_there {
                    return;
                }
                let before = position.checked_sub(1).and_then(|before| list.get(before));
                (before.map_or(0, |number| number + 1), record.threshold)
            }
            (Ok(Scheduler::Wrr), Touch::Added | Touch::Edited) => {
                (0, self.index.wrr(&self.state, slot).threshold_after_change(record.threshold))
            }
            _ => return,
        };
        if let Some(record) = self.state.services.get_mut(&slot) {
            (record.pointer, record.threshold) = (pointer, threshold);
        }
    }
}

/// A number that tells the addresses in the cache that one service's scheduler has had since it was set from all others.
fn cache(order: u64) -> u32 {
    (order as u32).max(1)
}

/// Why a change was not put in force.
#[derive(Debug, thiserror::Error)]
pub enum Commit {
    /// It cannot be; nothing has changed.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The kernel did not let it be finished; the next command does.
    #[error(transparent)]
    Failed(#[from] Error),
}

fn port_method(family: u32, port: u16, method: Method) -> u32 {
    u32::from(Port::new(port).raw()) | (method as u32) << 16 | family << 24
}

/// Whether hosts on more than one link can send packets to this address, and it is that of one host (RFC 4291).
const fn is_routed_unicast(address: Ipv6Addr) -> bool {
    !(address.is_unspecified()
        || address.is_multicast()
        || address.is_unicast_link_local()
        || address.to_ipv4_mapped().is_some())
}

/// The flags of a service as its record has them.
fn flags(spec: ServiceSpec) -> u32 {
    spec.flags | if spec.persistence.is_some() { service_flag::PERSISTENT } else { 0 }
}

fn check_service(key: ServiceKey) -> Result<(), Refusal> {
    match key.address.ip() {
        IpAddr::V6(address) if !is_routed_unicast(address) => Err(Refusal::NotServed(key)),
        _ => Ok(()),
    }
}

fn check_flags(key: Identity, spec: ServiceSpec) -> Result<(), Refusal> {
    match key {
        Identity::Address(key) if spec.is_one_packet() && key.protocol != Transport::Udp => {
            Err(Refusal::OnePacket(key))
        }
        // Of the packets with a mark, those of UDP are meant.
        _ => Ok(()),
    }
}

/// Whether a destination of a service can have this address.
fn check_address(key: Identity, address: SocketAddr) -> Result<(), Refusal> {
    if Family::of(address.ip()) != key.family() {
        return Err(Refusal::Families { service: key, dest: address });
    }
    let unicast = match address.ip() {
        IpAddr::V4(ip) => !(ip.is_unspecified() || ip.is_multicast() || ip.is_broadcast()),
        IpAddr::V6(ip) => is_routed_unicast(ip),
    };
    if unicast { Ok(()) } else { Err(Refusal::NotUnicast(address)) }
}

fn check_dest(key: Identity, address: SocketAddr, spec: DestSpec) -> Result<(), Refusal> {
    if let Identity::Address(ServiceKey { address: service, .. }) = key
        && spec.method != Method::Masq
        && address.port() != service.port()
    {
        return Err(Refusal::PortMapping { address, method: spec.method, port: service.port() });
    }
    if spec.weight > i32::MAX as u32 {
        return Err(Refusal::Weight(spec.weight.into()));
    }
    if spec.thresholds.lower > spec.thresholds.upper {
        return Err(Refusal::LowerThreshold(spec.thresholds));
    }
    if spec.thresholds.upper > i32::MAX as u32 {
        return Err(Refusal::UpperThreshold(spec.thresholds.upper));
    }
    Ok(())
}
