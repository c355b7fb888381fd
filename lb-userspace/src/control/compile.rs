//! From records to what packets read: views with their lists and rings, and the endpoint table.

use std::{
    collections::{HashMap, HashSet},
    ops::Range,
};

use bytemuck::Zeroable as _;
use lb_common::{
    abi::{
        DestRecord, ENDPOINT_PROBES, EndpointBucket, EndpointKey, EndpointKey4, EndpointKey6, Record as _,
        SLOTS_PER_LINE, ServiceRecord, Slot, SlotRecord, Target, View, ViewRecord, cursor, reckon, slot,
    },
    addr::{Address, Ip4, Ip6, Port},
    hash::Seed,
    proto::{Protocol, Scheduler, service_flag},
    sched::{DrawColumn, MhDest, dh_table, draw_table, mh_table, sh_table, wrr_cycle},
};

use crate::control::{
    model::Refusal,
    shared::Shared,
    state::{State, dest_family, service_key, service_mark},
};

/// What is to be written for a change, beside what packets read now.
pub struct Compiled {
    views: Vec<CompiledView>,
    endpoints4: Vec<EndpointEdit<EndpointKey4>>,
    endpoints6: Vec<EndpointEdit<EndpointKey6>>,
    /// See [`lb_common::abi::Config::reckon`].
    reckon: u32,
}

struct CompiledView {
    index: u32,
    record: ViewRecord,
    slots: Vec<SlotRecord>,
    cursor: u32,
}

struct EndpointEdit<K> {
    bucket: usize,
    index: usize,
    /// The key to put there; `None` when it is there already.
    key: Option<K>,
    target: Target,
}

/// Where the scheduler of a service stands: the destination chosen last plus one, or 0 for none; and the threshold.
pub fn position(shared: &Shared<'_>, record: &ServiceRecord) -> (u32, u32) {
    let view = shared.views.get(record.view as usize).map(View::load);
    let at = shared.cursors.get(record.view as usize).map(|cursor| cursor.position.load());
    let (Some(view), Some(at)) = (view, at) else { return (0, 0) };
    let (start, len, threshold) = match Scheduler::try_from(record.scheduler as u8) {
        Ok(Scheduler::Rr) => (view.list, view.list_len, 0),
        Ok(Scheduler::Wrr) => (view.ring, view.ring_len, u32::MAX),
        // As good as ever.
        Ok(Scheduler::Lblc | Scheduler::Lblcr) => return (0, record.threshold),
        _ => return (0, 0),
    };
    let index = at & !cursor::FRESH;
    if index >= len {
        return (0, 0);
    }
    let Some(slot) = shared.slots.get((start + index) as usize).map(|slot| slot.load()) else { return (0, 0) };
    let threshold = slot.threshold & threshold;
    if at & cursor::FRESH != 0 { (0, threshold) } else { (slot.dest + 1, threshold) }
}

/// Compiles the views of `services`, and the edits that bring the endpoint tables to what `state` says.
///
/// # Errors
///
/// When there is no room.
pub fn compile(shared: &Shared<'_>, state: &State, services: impl Iterator<Item = u32>) -> Result<Compiled, Refusal> {
    let seed = shared.instance.load().seed;
    let endpoints4 = edits(shared.endpoints4, &seed, targets::<Ip4>(state))?;
    let endpoints6 = edits(shared.endpoints6, &seed, targets::<Ip6>(state))?;
    let mut room = Room::new(shared);
    let hz = shared.instance.hz.load();
    let views = services.map(|slot| compile_view(state, slot, hz, &mut room)).collect::<Result<_, _>>()?;
    Ok(Compiled { views, endpoints4, endpoints6, reckon: to_reckon(shared, state) })
}

impl Compiled {
    /// Writes the views, which no packet reads yet, and then puts everything in force, one store for each endpoint.
    pub fn put_in_force(&self, shared: &Shared<'_>) {
        self.retire(shared);
        for view in &self.views {
            view.write(shared);
        }
        let reckon = &shared.config.reckon;
        reckon.store(reckon.load() | self.reckon);
        write(&self.endpoints4, shared.endpoints4);
        write(&self.endpoints6, shared.endpoints6);
        reckon.store(self.reckon);
    }

    /// Makes packets notice that still look at a view which is written anew, or whose slots are.
    fn retire(&self, shared: &Shared<'_>) {
        let regions = self.views.iter().map(CompiledView::region);
        let mut regions: Vec<Range<u32>> = regions.filter(|region| !region.is_empty()).collect();
        regions.sort_by_key(|region| region.start);
        let rewritten: HashSet<u32> = self.views.iter().map(|view| view.index).collect();
        for (index, view) in (0..).zip(shared.views) {
            // A view that is no longer in force, or one of these from before.
            let old = view.load();
            let old_regions = [old.list..old.list + old.list_len, old.ring..old.ring + old.ring_len];
            if rewritten.contains(&index) || old_regions.iter().any(|old| overlaps_any(&regions, old)) {
                view.version.store(old.version.wrapping_add(1));
                view.list_len.store(0);
                view.ring_len.store(0);
            }
        }
    }
}

/// Whether a range has something in common with one of several, which are in order and apart from each other.
fn overlaps_any(regions: &[Range<u32>], range: &Range<u32>) -> bool {
    let after = regions.partition_point(|region| region.end <= range.start);
    regions.get(after).is_some_and(|region| region.start < range.end && range.start < region.end)
}

fn write<K: EndpointKey>(edits: &[EndpointEdit<K>], table: &[EndpointBucket<K>]) {
    for edit in edits {
        let bucket = table.get(edit.bucket);
        let Some(endpoint) = bucket.and_then(|bucket| bucket.endpoints.get(edit.index)) else { continue };
        match edit.key {
            Some(key) => endpoint.claim(key, edit.target),
            None => endpoint.set_target(edit.target),
        }
    }
}

impl CompiledView {
    /// The slots that it takes.
    fn region(&self) -> Range<u32> {
        self.record.list..self.record.list + self.slots.len() as u32
    }

    fn write(&self, shared: &Shared<'_>) {
        let start = self.record.list as usize;
        for (index, record) in (start..).zip(&self.slots) {
            if let Some(slot) = shared.slots.get(index) {
                slot.store(record);
            }
        }
        if let Some(view) = shared.views.get(self.index as usize) {
            view.store(&ViewRecord { version: view.version.load(), ..self.record });
        }
        if let Some(cursor) = shared.cursors.get(self.index as usize) {
            cursor.position.store(self.cursor);
        }
    }
}

fn compile_view(state: &State, slot: u32, hz: u32, room: &mut Room) -> Result<CompiledView, Refusal> {
    let service = state.services.get(&slot).copied().unwrap_or_else(ServiceRecord::zeroed);
    let key = service_key(&service);
    let list = state.list(slot);
    let weights = state.weights(slot);
    let at = |position: usize, threshold: u32| SlotRecord { dest: list.get(position).copied().unwrap_or(0), threshold };
    let ring: Vec<SlotRecord> = match Scheduler::try_from(service.scheduler as u8) {
        Ok(Scheduler::Wrr) => wrr_cycle(&weights).iter().map(|turn| at(turn.position, turn.threshold)).collect(),
        Ok(scheduler) => table(scheduler, state, list).ok_or(Refusal::MhDests(key))?,
        Err(_) => Vec::new(),
    };
    let mut slots: Vec<SlotRecord> = list.iter().map(|number| listed(service.scheduler, state, *number)).collect();
    let list_len = slots.len() as u32;
    // What fills the last line up has weight 0.
    slots.resize(slots.len().next_multiple_of(SLOTS_PER_LINE as usize), SlotRecord::zeroed());
    let ring_start = slots.len() as u32;
    slots.extend(&ring);
    let start = room.take(slots.len() as u32).ok_or(Refusal::NoSlots(key))?;
    let final_pass = ring.iter().position(|slot| slot.threshold == 1).unwrap_or(0) as u32;
    let record = ViewRecord {
        version: 0,
        service: slot,
        scheduler: service.scheduler,
        list: start,
        list_len,
        ring: start + ring_start,
        ring_len: ring.len() as u32,
        ring_final: final_pass,
        flags: service.flags,
        cache: if is_cached(service.scheduler) { service.threshold } else { 0 },
        persistence: service.persistence * hz,
        netmask: service.netmask,
        mark: service_mark(&service).map_or(0, std::num::NonZeroU32::get),
        reserved: [0; 3],
    };
    let cursor = match Scheduler::try_from(service.scheduler as u8) {
        Ok(Scheduler::Rr) => first_cursor((0..list.len()).map(|position| at(position, 0)), service.pointer, 0),
        Ok(Scheduler::Wrr) => first_cursor(ring.iter().copied(), service.pointer, service.threshold),
        _ => cursor::FRESH,
    };
    Ok(CompiledView { index: service.view, record, slots, cursor })
}

/// A destination as the list of a service with this scheduler has it. For some schedulers all weights but 0 are alike.
fn listed(scheduler: u32, state: &State, number: u32) -> SlotRecord {
    let Some(dest) = state.dests.get(&number) else { return SlotRecord::zeroed() };
    let unweighted = [Scheduler::Lc as u32, Scheduler::Random as u32].contains(&scheduler);
    let weight = if unweighted { dest.weight.min(1) } else { dest.weight };
    SlotRecord { dest: number, threshold: weight | if dest.upper == 0 { 0 } else { Slot::LIMITED } }
}

/// Whether the scheduler with this number remembers what destinations addresses have had.
pub fn is_cached(scheduler: u32) -> bool {
    [Scheduler::Lblc as u32, Scheduler::Lblcr as u32].contains(&scheduler)
}

/// The table of a scheduler that hashes or draws; empty for others. `None` when there are more destinations than it
/// has room for.
fn table(scheduler: Scheduler, state: &State, list: &[u32]) -> Option<Vec<SlotRecord>> {
    let records = || list.iter().filter_map(|number| state.dests.get(number));
    let positions = match scheduler {
        Scheduler::Sh => sh_table(&records().map(|record| record.weight).collect::<Vec<_>>()),
        Scheduler::Dh => dh_table(list.len()),
        Scheduler::Mh | Scheduler::Wdh => {
            let dests = records().map(|record| MhDest {
                address: number(record),
                port: Port::from_raw(record.port_method as u16).number(),
                // A destination of weight 0 keeps its slots with mh, and gives them up with wdh.
                last_weight: if scheduler == Scheduler::Mh { record.last_weight } else { record.weight },
            });
            mh_table(&dests.collect::<Vec<_>>())?
        }
        Scheduler::Random | Scheduler::Wrandom => {
            let weight =
                |record: &DestRecord| if scheduler == Scheduler::Random { record.weight.min(1) } else { record.weight };
            let columns = draw_table(&records().map(weight).collect::<Vec<_>>());
            let dest = |position: usize| list.get(position).copied().unwrap_or(0);
            let slots = |column: DrawColumn| {
                let own = SlotRecord { dest: dest(column.own), threshold: column.share };
                [own, SlotRecord { dest: dest(column.other), threshold: 0 }]
            };
            return Some(columns.into_iter().flat_map(slots).collect());
        }
        _ => Vec::new(),
    };
    let slot = |position: usize| SlotRecord { dest: list.get(position).copied().unwrap_or(0), threshold: 0 };
    Some(positions.into_iter().map(slot).collect())
}

/// The address of a destination as ip_vs folds it for hashing.
fn number(record: &DestRecord) -> u32 {
    match dest_family(record) {
        Ip6::FAMILY => Ip6::from_words(record.addr).number(),
        _ => Ip4::from_words(record.addr).number(),
    }
}

/// The cursor that goes on behind `pointer`, a destination plus one, in the pass with `threshold`; or, for no pointer, at
/// the start of that pass.
fn first_cursor(ring: impl Iterator<Item = SlotRecord> + Clone, pointer: u32, threshold: u32) -> u32 {
    let last = ring.clone().position(|slot| slot.dest + 1 == pointer && slot.threshold == threshold);
    let start = || ring.clone().position(|slot| slot.threshold == threshold).unwrap_or(0);
    last.map_or_else(|| start() as u32 | cursor::FRESH, |index| index as u32)
}

/// The slots that no view in force uses, by whole lines.
struct Room {
    /// Free ranges, in order.
    free: Vec<Range<u32>>,
}

impl Room {
    fn new(shared: &Shared<'_>) -> Self {
        let mut used: Vec<Range<u32>> = in_force(shared)
            .filter_map(|index| shared.views.get(index as usize))
            .map(|view| {
                let view = view.load();
                // A ring begins behind the line that its list ends with.
                view.list..(view.list + view.list_len).max(view.ring + view.ring_len)
            })
            .filter(|range| !range.is_empty())
            .collect();
        used.sort_by_key(|range| range.start);
        let mut free = Vec::new();
        let mut end = 0;
        for range in used {
            if range.start > end {
                free.push(end..range.start);
            }
            end = end.max(range.end.next_multiple_of(SLOTS_PER_LINE));
        }
        free.push(end..shared.slots.len() as u32);
        Self { free }
    }

    fn take(&mut self, len: u32) -> Option<u32> {
        let len = len.next_multiple_of(SLOTS_PER_LINE);
        let range = self.free.iter_mut().find(|range| range.end - range.start >= len)?;
        let start = range.start;
        range.start += len;
        Some(start)
    }
}

/// The views that packets find at this moment: what the endpoint tables say, not the records, which a change under way
/// may be ahead of.
pub fn in_force(shared: &Shared<'_>) -> impl Iterator<Item = u32> {
    views_in(shared.endpoints4).chain(views_in(shared.endpoints6))
}

fn views_in<K: EndpointKey>(table: &[EndpointBucket<K>]) -> impl Iterator<Item = u32> {
    let endpoints = table.iter().flat_map(|bucket| &bucket.endpoints);
    endpoints.filter_map(|endpoint| endpoint.read()).filter_map(|(_, target)| target.view())
}

/// What every endpoint of a family shall be to the director.
fn targets<A: Address>(state: &State) -> HashMap<A::Endpoint, Target> {
    let mut wanted: HashMap<A::Endpoint, Target> = HashMap::new();
    let mut add = |key: A::Endpoint, flags: u64| wanted.entry(key).or_default().0 |= flags;
    for record in state.services.values().filter(|record| record.family == A::FAMILY) {
        let persistent = if record.flags & service_flag::PERSISTENT != 0 { Target::PERSISTENT } else { 0 };
        let in_force = Target::default().with_view(record.view).0 | persistent;
        if let Some(mark) = service_mark(record) {
            if record.state == slot::USED {
                add(A::Endpoint::mark(mark.get()), in_force);
            }
            continue;
        }
        let addr = A::from_words(record.addr);
        let key = A::Endpoint::new(addr, port(record.port_protocol), protocol(record));
        add(A::Endpoint::address(addr), Target::ADDRESS);
        if record.state == slot::USED {
            add(key, in_force);
        } else {
            add(key, Target::FORMER_SERVICE);
        }
    }
    let masqueraded = |record: &&DestRecord| record.masqueraded != 0 && dest_family(record) == A::FAMILY;
    for record in state.dests.values().filter(masqueraded) {
        let Some(service) = state.services.get(&record.service) else { continue };
        let own = port(record.port_method);
        let addr = A::from_words(record.addr);
        if service_mark(service).is_none() {
            let port = if own == Port::default() { port(service.port_protocol) } else { own };
            add(A::Endpoint::new(addr, port, protocol(service)), Target::SERVER);
        } else if own != Port::default() {
            // At any port when it is that of the connection: its packets are found by their connections alone.
            for protocol in Protocol::ALL {
                add(A::Endpoint::new(addr, own, *protocol), Target::SERVER);
            }
        }
    }
    wanted
}

/// What packets have to reckon with.
fn to_reckon(shared: &Shared<'_>, state: &State) -> u32 {
    let has = |what: fn(&ServiceRecord) -> bool| state.services.values().any(what);
    let templates = || shared.dest_loads.iter().any(|load| load.templates.load() != 0);
    let bits = [
        (reckon::MARKS, has(|service| service_mark(service).is_some())),
        (reckon::ANY_PORT, has(has_unnamed_ports)),
        (reckon::TEMPLATES, has(|service| service.flags & service_flag::PERSISTENT != 0) || templates()),
    ];
    bits.into_iter().filter(|(_, set)| *set).map(|(bit, _)| bit).sum()
}

/// Whether a service gets packets to ports that it does not name: one for all ports of its address, or FTP (`docs/ipvs.md`,
/// section 2.1). One that has been removed counts, for its connections are still there.
fn has_unnamed_ports(service: &ServiceRecord) -> bool {
    let port = port(service.port_protocol).number();
    service_mark(service).is_none() && (port == 0 || port == 21 && protocol(service) == Protocol::Tcp)
}

fn port(word: u32) -> Port {
    Port::from_raw(word as u16)
}

fn protocol(record: &ServiceRecord) -> Protocol {
    Protocol::try_from((record.port_protocol >> 16) as u8).unwrap_or(Protocol::Tcp)
}

/// The edits that make an endpoint table hold `wanted` and nothing else. New and changed endpoints come first, so that
/// nothing that stays is ever missing.
fn edits<K: EndpointKey>(
    table: &[EndpointBucket<K>],
    seed: &Seed,
    wanted: HashMap<K, Target>,
) -> Result<Vec<EndpointEdit<K>>, Refusal> {
    let mut missing = wanted;
    let mut changed = Vec::new();
    let mut removed = Vec::new();
    let mut taken: Vec<[bool; 4]> = Vec::with_capacity(table.len());
    for (bucket, endpoints) in table.iter().enumerate() {
        let mut used = [false; 4];
        for (index, endpoint) in endpoints.endpoints.iter().enumerate() {
            let Some((key, target)) = endpoint.read() else { continue };
            match missing.remove(&key) {
                Some(wanted) if wanted == target => {}
                Some(target) => changed.push(EndpointEdit { bucket, index, key: None, target }),
                None => removed.push(EndpointEdit { bucket, index, key: None, target: Target::default() }),
            }
            used[index] = true;
        }
        taken.push(used);
    }
    for (key, target) in missing {
        let (bucket, index) = free_endpoint(seed, &key, &mut taken).ok_or(Refusal::NoEndpoints)?;
        changed.push(EndpointEdit { bucket, index, key: Some(key), target });
    }
    changed.extend(removed);
    Ok(changed)
}

/// A slot for `key`, which is taken then. The search of the data plane stops at a bucket with a slot that was never used,
/// so the first free one it comes by is the right one.
fn free_endpoint<K: EndpointKey>(seed: &Seed, key: &K, taken: &mut [[bool; 4]]) -> Option<(usize, usize)> {
    let buckets = taken.len();
    let first = key.bucket(seed, buckets as u32) as usize;
    for probe in 0..ENDPOINT_PROBES as usize {
        let bucket = (first + probe) & (buckets - 1);
        let used = taken.get_mut(bucket)?;
        if let Some(index) = used.iter().position(|used| !used) {
            used[index] = true;
            return Some((bucket, index));
        }
    }
    None
}
