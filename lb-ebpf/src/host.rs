//! The pipeline's traits on the memory of an ordinary process: what tests run the data plane on.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use bytemuck::{Zeroable, zeroed_slice_box};
use lb_common::{
    abi::{
        ADJACENCIES, Adjacency, CACHE_BUCKETS, CACHE_WAYS, CacheEntry, Config, Counters, Cursor, Dest, DestCpu,
        DestLoad, EndpointBucket, EndpointBucket4, EndpointBucket6, EndpointKey4, EndpointKey6, Estimate, Instance,
        JournalSlot, Limiter, NextHop, Record as _, Service, Slot, SlotLine, Stage, View, hop,
    },
    addr::{Address, Ip4, Ip6},
    checksum,
    event::{COUNTERS, Event},
    flow::{Bucket, Bucket4, Bucket6, Entry4, Entry6},
    hash::{Seed, mix},
    jiffies::Jiffies,
    mark::{self, Marks, Rule, Start},
    reason::Reason,
};
use network_types::eth::EthHdr;

use crate::{
    env::{Env, HandOver, Scan},
    flow_table::Buckets,
    forward::Exit,
    packet::Packet,
    parse::{Ip4Packet, Ip6Packet},
    pipeline::{self, Family, Stages},
    protocols::{All, Protocols, Sctp},
    tables::{Endpoints, Tables, TablesOf},
    upkeep::Objects,
    wire::Wire,
};

/// Room before a frame, as much as XDP gives.
pub const HEADROOM: usize = 256;

/// A frame in a vector.
#[derive(Clone, Debug)]
pub struct HostPacket {
    memory: Vec<u8>,
    start: usize,
    /// Where the host was asked to send the packet: interface, address family and gateway.
    pub handed_over: Option<(u32, u32, [u32; 4])>,
    /// Whether the driver can carry such a request.
    pub metadata: bool,
}

impl HostPacket {
    /// A frame with these bytes, and as much room before it as XDP gives.
    pub fn new(bytes: &[u8]) -> Self {
        Self::with_headroom(bytes, HEADROOM)
    }

    /// A frame with these bytes, and this much room before it.
    pub fn with_headroom(bytes: &[u8], headroom: usize) -> Self {
        // As in a driver's buffer there is something from before, and of all that may be there the worst.
        let mut memory = vec![0xff; headroom];
        memory.extend_from_slice(bytes);
        Self { memory, start: headroom, handed_over: None, metadata: true }
    }

    /// The frame as it stands.
    pub fn bytes(&self) -> &[u8] {
        self.memory.get(self.start..).unwrap_or_default()
    }

    fn range(&self, offset: usize, len: usize) -> Option<std::ops::Range<usize>> {
        let start = self.start.checked_add(offset)?;
        let end = start.checked_add(len)?;
        (end <= self.memory.len()).then_some(start..end)
    }
}

impl Packet for HostPacket {
    fn len(&self) -> usize {
        self.memory.len() - self.start
    }

    fn read<T: Wire>(&self, offset: usize) -> Option<T> {
        let bytes = self.memory.get(self.range(offset, size_of::<T>())?)?;
        Some(T::from_bytes(bytes))
    }

    fn write<T: Wire>(&mut self, offset: usize, value: T) -> Option<()> {
        let range = self.range(offset, size_of::<T>())?;
        value.to_bytes(self.memory.get_mut(range)?);
        Some(())
    }

    fn write_words<const N: usize>(&mut self, offset: usize, words: [u32; N]) -> Option<()> {
        self.write(offset, words)
    }

    fn grow_head(&mut self, by: u16) -> Option<()> {
        self.start = self.start.checked_sub(by.into())?;
        Some(())
    }

    fn shrink_head(&mut self, by: u16) -> Option<()> {
        if usize::from(by) + EthHdr::LEN > self.len() {
            return None;
        }
        self.start += usize::from(by);
        Some(())
    }

    fn truncate(&mut self, len: usize) -> Option<()> {
        if len > self.len() {
            return None;
        }
        self.memory.truncate(self.start + len);
        Some(())
    }

    fn sum(&self, offset: usize, len: usize) -> Option<u64> {
        Some(checksum::sum(self.memory.get(self.range(offset, len)?)?))
    }
}

impl HandOver for HostPacket {
    fn hand_over(&mut self, hop: &NextHop) -> Option<()> {
        if !self.metadata {
            return None;
        }
        self.handed_over = Some((hop.ifindex.get(), hop.gateway_family.get(), hop.gateway.get()));
        Some(())
    }
}

/// The maps of an instance, in memory of this process, as its only CPU sees them.
pub struct HostTables {
    /// What the instance is.
    pub instance: Box<[Instance]>,
    /// The settings.
    pub config: Box<[Config]>,
    /// A change that is under way.
    pub journal: Box<[JournalSlot]>,
    /// The services.
    pub services: Box<[Service]>,
    /// The destinations.
    pub dests: Box<[Dest]>,
    /// What IPv4 addresses and ports are to the director.
    pub endpoints4: Box<[EndpointBucket4]>,
    /// What IPv6 addresses and ports are to the director.
    pub endpoints6: Box<[EndpointBucket6]>,
    /// How services choose destinations.
    pub views: Box<[View]>,
    /// Lists and rings.
    pub slots: Box<[Slot]>,
    /// Where schedulers stand.
    pub cursors: Box<[Cursor]>,
    /// The cache of lblc and lblcr.
    pub cache: Box<[CacheEntry]>,
    /// Connections of destinations.
    pub dest_loads: Box<[DestLoad]>,
    /// What the CPU keeps about destinations.
    pub dest_cpus: Box<[DestCpu]>,
    /// The IPv4 flow table.
    pub flows4: Box<[Bucket4]>,
    /// The IPv6 flow table.
    pub flows6: Box<[Bucket6]>,
    /// Numbers of next hops towards clients.
    pub adjacency: Box<[Adjacency]>,
    /// What the CPU knows of next hops towards clients.
    pub adjacency_cpus: Box<[NextHop]>,
    /// Which mark rules are in force.
    pub marks: Box<[Marks]>,
    /// The mark rules.
    pub mark_rules: Box<[Rule]>,
    /// Where pieces of the addresses begin that mark rules are for.
    pub mark_starts: Box<[Start]>,
    /// The budget of ICMP errors.
    pub limiter: Box<[Limiter]>,
    /// Rates, and what lists take off counters.
    pub estimates: Box<[Estimate]>,
    /// Packets not forwarded, by reason, and from the end backwards events.
    pub counters: Box<[Cell<u64>]>,
}

/// Sizes of [`HostTables`].
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "the fields are named like the tables")]
pub struct HostSizes {
    pub services: u32,
    pub dests: u32,
    pub slots: u32,
    pub endpoint_buckets: u32,
    pub flow_buckets: u32,
    pub flow_buckets6: u32,
}

fn zeroed<T: Zeroable>(len: u32) -> Box<[T]> {
    zeroed_slice_box(len as usize)
}

impl HostTables {
    /// Empty tables of an instance with this secret.
    pub fn new(sizes: HostSizes, seed: Seed, hz: u32) -> Self {
        let tables = Self {
            instance: zeroed(1),
            config: zeroed(1),
            journal: zeroed(2 * (sizes.services + sizes.dests) + 3),
            services: zeroed(sizes.services),
            dests: zeroed(sizes.dests),
            endpoints4: zeroed(sizes.endpoint_buckets),
            endpoints6: zeroed(sizes.endpoint_buckets),
            views: zeroed(2 * sizes.services),
            slots: zeroed(sizes.slots),
            cursors: zeroed(2 * sizes.services),
            cache: zeroed(CACHE_BUCKETS * CACHE_WAYS),
            dest_loads: zeroed(sizes.dests),
            dest_cpus: zeroed(sizes.dests),
            flows4: zeroed(sizes.flow_buckets),
            flows6: zeroed(sizes.flow_buckets6),
            adjacency: zeroed(ADJACENCIES),
            adjacency_cpus: zeroed(ADJACENCIES),
            marks: zeroed(1),
            mark_rules: zeroed(mark::BANKS * mark::RULES),
            mark_starts: zeroed(mark::BANKS * mark::FAMILIES * mark::STARTS),
            limiter: zeroed(1),
            estimates: zeroed(sizes.dests + sizes.services + 1),
            counters: zeroed(COUNTERS),
        };
        let mut instance = tables.instance[0].load();
        instance.hz = hz;
        instance.flow_buckets = sizes.flow_buckets;
        instance.flow_buckets6 = sizes.flow_buckets6;
        instance.endpoint_buckets = sizes.endpoint_buckets;
        instance.seed = seed;
        instance.next_order = 1;
        instance.services = sizes.services;
        instance.dests = sizes.dests;
        tables.instance[0].store(&instance);
        tables
    }
}

macro_rules! getters {
    ($($name:ident, $field:ident, $value:ty;)+) => {$(
        fn $name(&self, index: u32) -> Option<&$value> {
            self.$field.get(index as usize)
        }
    )+};
}

impl Tables for HostTables {
    fn seed(&self) -> Seed {
        self.instance[0].load().seed
    }

    fn endpoint_buckets(&self) -> u32 {
        self.endpoints4.len() as u32
    }

    fn config(&self) -> Option<&Config> {
        self.config.first()
    }

    fn limiter(&self) -> Option<&Limiter> {
        self.limiter.first()
    }

    fn marks(&self) -> Option<&Marks> {
        self.marks.first()
    }

    getters! {
        mark_rule, mark_rules, Rule;
        mark_start, mark_starts, Start;
        view, views, View;
        cursor, cursors, Cursor;
        cache, cache, CacheEntry;
        dest, dests, Dest;
        dest_load, dest_loads, DestLoad;
        dest_cpu, dest_cpus, DestCpu;
        adjacency, adjacency, Adjacency;
        adjacency_cpu, adjacency_cpus, NextHop;
    }

    fn slots(&self, line: u32) -> Option<&SlotLine> {
        self.slots.as_chunks().0.get(line as usize)
    }

    fn hide(&self, value: u64) -> u64 {
        value
    }

    fn count(&self, reason: u8) {
        if let Some(counter) = self.counters.get(usize::from(reason)) {
            counter.set(counter.get() + 1);
        }
    }

    fn count_event(&self, event: Event) {
        self.count(event as u8);
    }
}

impl Objects for HostTables {
    fn estimate(&self, index: u32) -> Option<&Estimate> {
        self.estimates.get(index as usize)
    }

    fn traffic(&self, dest: u32) -> [u64; 5] {
        self.dest_cpus.get(dest as usize).map_or([0; 5], |cpu| {
            let Counters { connections, packets_in, bytes_in, packets_out, bytes_out } = &cpu.counters;
            [connections, packets_in, bytes_in, packets_out, bytes_out].map(Cell::get)
        })
    }
}

macro_rules! of_families {
    ($($entry:ident, $flows:ident, $key:ident, $endpoints:ident;)+) => {$(
        impl Buckets<$entry> for HostTables {
            fn buckets(&self) -> u32 {
                self.$flows.len() as u32
            }

            fn bucket(&self, index: u32) -> Option<&Bucket<$entry>> {
                self.$flows.get(index as usize)
            }
        }

        impl Endpoints<$key> for HostTables {
            fn endpoint_bucket(&self, index: u32) -> Option<&EndpointBucket<$key>> {
                self.$endpoints.get(index as usize)
            }
        }
    )+};
}

of_families! {
    Entry4, flows4, EndpointKey4, endpoints4;
    Entry6, flows6, EndpointKey6, endpoints6;
}

/// What the routing table of [`HostEnv`] says about an address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HostRoute {
    /// By an interface, to a neighbour whose link-layer address is known.
    Via {
        /// Index of the interface.
        ifindex: u32,
        /// Largest IP packet the route takes.
        mtu: u32,
        /// Destination address of the Ethernet header.
        to: [u8; 6],
        /// Source address of the Ethernet header.
        from: [u8; 6],
        /// Address the host sends from.
        source: IpAddr,
        /// The neighbour's own address.
        gateway: IpAddr,
    },
    /// By an interface, to a neighbour that has yet to be resolved.
    Unresolved {
        /// Index of the interface.
        ifindex: u32,
        /// Address the host sends from.
        source: IpAddr,
        /// The neighbour's own address.
        gateway: IpAddr,
    },
    /// This host.
    Local,
    /// Nowhere.
    Nowhere(Reason),
}

/// A kernel that does as it is told.
pub struct HostEnv {
    /// The tick counter.
    pub jiffies: Cell<u32>,
    /// Ticks per second.
    pub hz: u32,
    /// Index of the interface that packets come in by.
    pub ingress: Cell<u32>,
    /// The routing table: what is not in it has no route.
    pub routes: RefCell<HashMap<IpAddr, HostRoute>>,
    /// What it says of addresses that begin like one in as many bits, if it says nothing of the address itself.
    pub networks: RefCell<HashMap<(IpAddr, u32), HostRoute>>,
    /// What it says of packets to the first address from the second, before all else.
    pub routes_from: RefCell<HashMap<(IpAddr, IpAddr), HostRoute>>,
    /// How many steps there have been of scans.
    pub scanned: Cell<u32>,
    /// How many random numbers there have been.
    pub drawn: Cell<u64>,
}

impl HostEnv {
    /// A kernel with `hz` ticks a second and no routes.
    pub fn new(hz: u32) -> Self {
        Self {
            jiffies: Cell::new(1 << 20),
            hz,
            ingress: Cell::new(2),
            routes: RefCell::new(HashMap::new()),
            networks: RefCell::new(HashMap::new()),
            routes_from: RefCell::new(HashMap::new()),
            scanned: Cell::new(0),
            drawn: Cell::new(0),
        }
    }
}

/// Whether an address begins like another in as many bits.
fn begins_like(address: IpAddr, (network, bits): (IpAddr, u32)) -> bool {
    match (address, network) {
        (IpAddr::V4(a), IpAddr::V4(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros() >= bits,
        (IpAddr::V6(a), IpAddr::V6(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros() >= bits,
        _ => false,
    }
}

/// The address in the words of maps; IPv4 in the first.
pub fn words(address: IpAddr) -> [u32; 4] {
    match address {
        IpAddr::V4(address) => Ip4::new(address.octets()).words(),
        IpAddr::V6(address) => Ip6::new(address.octets()).words(),
    }
}

/// The address of this family in these words.
pub fn address<A: Address>(address: A) -> IpAddr {
    let words = address.words();
    if A::FAMILY == Ip4::FAMILY {
        Ipv4Addr::from(Ip4::from_words(words).octets()).into()
    } else {
        Ipv6Addr::from(Ip6::from_words(words).octets()).into()
    }
}

impl Env for HostEnv {
    fn jiffies(&self) -> Jiffies {
        Jiffies(self.jiffies.get())
    }

    fn hz(&self) -> u32 {
        self.hz
    }

    /// The same numbers in every run.
    fn random(&self) -> u32 {
        self.drawn.set(self.drawn.get() + 1);
        (mix(self.drawn.get()) >> 32) as u32
    }

    fn ingress(&self) -> u32 {
        self.ingress.get()
    }

    fn route<A: Address>(&self, destination: A, source: A, hop: &NextHop) -> Result<(), Reason> {
        let via = |ifindex: u32, source: IpAddr, gateway: IpAddr| {
            hop.ifindex.set(ifindex);
            for (kept, word) in hop.source.iter().zip(words(source)) {
                kept.set(word);
            }
            hop.gateway_family.set(if gateway.is_ipv4() { Ip4::FAMILY } else { Ip6::FAMILY });
            hop.gateway.set(words(gateway));
        };
        let destination = address(destination);
        let of_source = self.routes_from.borrow().get(&(destination, address(source))).copied();
        let of_any = || self.routes.borrow().get(&destination).copied();
        let of_network = || {
            let networks = self.networks.borrow();
            networks.iter().find(|(network, _)| begins_like(destination, **network)).map(|(_, route)| *route)
        };
        match of_source.or_else(of_any).or_else(of_network).unwrap_or(HostRoute::Nowhere(Reason::NoRoute)) {
            HostRoute::Via { ifindex, mtu, to, from, source, gateway } => {
                via(ifindex, source, gateway);
                hop.kind.set(hop::VIA);
                hop.mtu.set(mtu);
                let mut macs = [0; 12];
                macs[..6].copy_from_slice(&to);
                macs[6..].copy_from_slice(&from);
                for (mac, word) in hop.macs.iter().zip(bytemuck::cast::<_, [u32; 3]>(macs)) {
                    mac.set(word);
                }
            }
            HostRoute::Unresolved { ifindex, source, gateway } => {
                via(ifindex, source, gateway);
                hop.kind.set(hop::UNRESOLVED);
                hop.mtu.set(u32::MAX);
            }
            HostRoute::Local => {
                hop.kind.set(hop::LOCAL);
                hop.mtu.set(u32::MAX);
            }
            HostRoute::Nowhere(reason) => return Err(reason),
        }
        Ok(())
    }

    fn scan<S: Scan>(&self, count: u32, scan: &mut S) {
        scan.hide(|number| number);
        for index in 0..count {
            self.scanned.set(self.scanned.get() + 1);
            if !scan.visit(index) {
                break;
            }
        }
    }
}

/// [`pipeline::process_stage`], as a function of its own: a path goes through several, one in the other.
#[inline(never)]
fn process_stage<I: Family>(packet: &mut HostPacket, tables: &HostTables, env: &HostEnv, stage: Stage) -> Exit
where
    HostTables: TablesOf<I::Addr>,
    HostEnv: Stages<I, HostPacket, HostTables>,
{
    pipeline::process_stage::<I, _, _, _>(packet, tables, env, stage)
}

impl<S: Protocols> Stages<Ip4Packet<S>, HostPacket, HostTables> for HostEnv {
    fn enter(&self, packet: &mut HostPacket, tables: &HostTables, stage: Stage) -> Exit {
        match stage {
            Stage::Six => pipeline::process::<Ip6Packet, _, _, _>(packet, tables, self),
            Stage::Unusual => process_stage::<Ip4Packet>(packet, tables, self, stage),
            Stage::Sctp => process_stage::<Ip4Packet<Sctp>>(packet, tables, self, stage),
            _ => process_stage::<Ip4Packet<All>>(packet, tables, self, stage),
        }
    }
}

impl<S: Protocols> Stages<Ip6Packet<S>, HostPacket, HostTables> for HostEnv {
    fn enter(&self, packet: &mut HostPacket, tables: &HostTables, stage: Stage) -> Exit {
        match stage {
            Stage::Unusual => process_stage::<Ip6Packet>(packet, tables, self, stage),
            Stage::Sctp => process_stage::<Ip6Packet<Sctp>>(packet, tables, self, stage),
            _ => process_stage::<Ip6Packet<All>>(packet, tables, self, stage),
        }
    }
}
