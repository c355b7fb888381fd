//! The values of the maps that the data plane and the loader share, one `#[repr(C)]` type each.
//!
//! Maps fall into three groups.
//!
//! *The truth*, written by the loader alone: [`Service`] and [`Dest`], one record per slot, and the [`Config`] scalars.
//! The slot of a destination is its number everywhere, and outlives its removal for as long as a connection uses it.
//!
//! *Compiled from the truth* by the loader, for the data plane to read: the [`Endpoint`] tables find a service by
//! address and port; a [`View`] says how to choose a destination, with its lists and rings in one array of [`Slot`]s.
//!
//! *Written by the data plane*: flows ([`crate::flow`]), [`DestLoad`], [`DestCpu`], [`Cursor`], [`Adjacency`].
//!
//! Records that both sides touch while packets pass come in two forms with the same layout: one of
//! [`Shared32`]/[`Shared64`] words for memory that others write too, one of plain words for values.

use core::cell::Cell;

use bytemuck::{Pod, Zeroable};

use crate::{
    addr::{Address, Ip4, Ip6, Port},
    hash::{Seed, mix, scale},
    jiffies::Jiffies,
    overload::Thresholds,
    proto::Protocol,
    sync::{Shared32, Shared64, opaque},
};

/// Incremented whenever the meaning or the layout of a pinned map changes.
pub const VERSION: u32 = 4;

/// A plain value and its form in shared memory.
pub trait Word: Copy {
    /// The form in shared memory.
    type Shared: Zeroable;
    /// Reads the value.
    fn load(shared: &Self::Shared) -> Self;
    /// Writes the value; one store for each 32- or 64-bit word.
    fn store(shared: &Self::Shared, value: Self);
}

impl Word for u32 {
    type Shared = Shared32;
    #[inline(always)]
    fn load(shared: &Shared32) -> Self {
        shared.load()
    }
    #[inline(always)]
    fn store(shared: &Shared32, value: Self) {
        shared.store(value);
    }
}

impl Word for u64 {
    type Shared = Shared64;
    #[inline(always)]
    fn load(shared: &Shared64) -> Self {
        shared.load()
    }
    #[inline(always)]
    fn store(shared: &Shared64, value: Self) {
        shared.store(value);
    }
}

impl Word for Seed {
    type Shared = [Shared64; 3];
    #[inline(always)]
    fn load(shared: &Self::Shared) -> Self {
        Self::from_words(Word::load(shared))
    }
    #[inline(always)]
    fn store(shared: &Self::Shared, value: Self) {
        Word::store(shared, value.words());
    }
}

impl<T: Word, const N: usize> Word for [T; N]
where
    [T::Shared; N]: Zeroable,
{
    type Shared = [T::Shared; N];
    #[inline(always)]
    fn load(shared: &Self::Shared) -> Self {
        core::array::from_fn(|i| T::load(&shared[i]))
    }
    #[inline(always)]
    fn store(shared: &Self::Shared, value: Self) {
        for (shared, value) in shared.iter().zip(value) {
            T::store(shared, value);
        }
    }
}

/// A record of shared memory and its plain form.
pub trait Record: Zeroable {
    /// The record as a value.
    type Plain: Pod;
    /// Reads every word, one after the other.
    fn load(&self) -> Self::Plain;
    /// Writes every word, one after the other.
    fn store(&self, value: &Self::Plain);
}

macro_rules! record {
    ($(#[$doc:meta])* $shared:ident, $plain:ident, $size:literal { $($(#[$fdoc:meta])* $field:ident: $ty:ty,)+ }) => {
        $(#[$doc])*
        ///
        /// This is its form in shared memory.
        #[derive(Zeroable)]
        #[repr(C)]
        pub struct $shared {
            $($(#[$fdoc])* pub $field: <$ty as Word>::Shared,)+
        }

        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
        #[repr(C)]
        pub struct $plain {
            $($(#[$fdoc])* pub $field: $ty,)+
        }

        const _: () = assert!(size_of::<$shared>() == $size && size_of::<$plain>() == $size);

        impl Record for $shared {
            type Plain = $plain;

            fn load(&self) -> $plain {
                $plain { $($field: <$ty as Word>::load(&self.$field),)+ }
            }

            fn store(&self, value: &$plain) {
                $(<$ty as Word>::store(&self.$field, value.$field);)+
            }
        }
    };
}

pub(crate) use record;

record! {
    /// What an instance is: written once when it is created, read by every command before anything else.
    Instance, InstanceRecord, 96 {
        /// [`VERSION`] of the program that created the instance.
        abi: u32,
        /// [`LAYOUT`] of that program.
        layout: u32,
        /// Ticks per second of the kernel.
        hz: u32,
        /// Buckets of the IPv4 flow table, an even number.
        flow_buckets: u32,
        /// Buckets of each endpoint table, a power of two.
        endpoint_buckets: u32,
        /// Service slots; there are twice as many views.
        services: u32,
        /// Destination slots.
        dests: u32,
        /// Slots for lists and rings.
        slots: u32,
        /// Connections the IPv4 flow table is sized for.
        max_flows: u32,
        /// Records of the journal.
        journal: u32,
        /// Odd while a change is being applied; a reader that sees it change has read a mixture.
        generation: u64,
        /// Where the flow table and the endpoint table put things.
        seed: Seed,
        /// Next number of [`Service::order`] and [`Dest::order`].
        next_order: u64,
        /// Service slots that have ever been used: those from here on are free.
        services_used: u32,
        /// Destination slots that have ever been used.
        dests_used: u32,
        /// Buckets of the IPv6 flow table, an even number.
        flow_buckets6: u32,
        /// Connections the IPv6 flow table is sized for.
        max_flows6: u32,
    }
}

impl InstanceRecord {
    /// Buckets of both flow tables: what sweeps and flushes go over, the IPv6 table behind the IPv4 one.
    pub const fn buckets(&self) -> u32 {
        self.flow_buckets + self.flow_buckets6
    }
}

record! {
    /// The settings that the data plane reads on every packet: one record.
    Config, ConfigRecord, 320 {
        /// Time to live of a connection, in ticks, by what [`crate::flow::Word::timeout_index`] says of it: protocol and
        /// state.
        timeouts: [u32; 64],
        /// Ticks added to the kernel's clock. Zero but in tests, which let time pass by raising it.
        clock_skew: u32,
        /// ip_vs's `conn_reuse_mode`: bit 0 reschedules a SYN that meets a connection in TIME_WAIT or CLOSE, bit 1
        /// also one in FIN_WAIT whose server is not seen.
        conn_reuse_mode: u32,
        /// ICMP errors the director may send in a second.
        icmp_per_second: u32,
        /// Changes with every change of the configuration, and is never 0: what a CPU has kept about a destination holds
        /// as long as this stays the same.
        epoch: u32,
        /// ip_vs's settings that are on or off: bits of [`switch`].
        switches: u32,
        /// Which of the tables of [`crate::tcp`] moves TCP connections: 0, or 1 while `secure_tcp` is in force.
        tcp_table: u32,
        /// One of so many packets that would open a connection is dropped; 0 for none. In force of `drop_packet`.
        drop_rate: u32,
        /// The modes of ip_vs's `drop_entry`, `drop_packet` and `secure_tcp`: see [`crate::defence`].
        defences: [u32; 3],
        /// ip_vs's `amemthresh`, in pages.
        amemthresh: u32,
        /// ip_vs's `am_droprate`.
        am_droprate: u32,
        /// What packets have to reckon with because of how services are set: bits of [`reckon`].
        reckon: u32,
        /// ip_vs's `lblc_expiration`, in seconds.
        lblc_expiration: u32,
        /// ip_vs's `lblcr_expiration`, in seconds.
        lblcr_expiration: u32,
        /// Zero.
        reserved: u32,
    }
}

/// Bits of [`Config::reckon`].
pub mod reckon {
    /// There may be connections to services of marks.
    pub const MARKS: u32 = 1 << 0;
    /// There may be connections to services at ports that they do not name: port 0, which stands for all that no other service
    /// has, or FTP, whose data connections are at any port (`docs/ipvs.md`, section 2.1).
    pub const ANY_PORT: u32 = 1 << 1;
    /// There are persistent services, or templates of such.
    pub const TEMPLATES: u32 = 1 << 2;
}

/// Bits of [`Config::switches`], by the names of ip_vs's settings.
pub mod switch {
    /// A TCP segment opens a connection even without SYN.
    pub const SLOPPY_TCP: u32 = 1 << 0;
    /// Connections end when their destination is removed.
    pub const EXPIRE_NODEST_CONN: u32 = 1 << 1;
    /// Rates are estimated.
    pub const RUN_ESTIMATION: u32 = 1 << 2;
    /// A template whose destination has weight 0 is not used any more.
    pub const EXPIRE_QUIESCENT_TEMPLATE: u32 = 1 << 3;
    /// Translated replies are routed as packets of the service's address, and not as those of the server.
    pub const SNAT_REROUTE: u32 = 1 << 4;
    /// A packet for a mark's service without a usable destination goes where it is addressed to.
    pub const CACHE_BYPASS: u32 = 1 << 5;
    /// A masqueraded server is told when it has sent a packet that belongs to no connection.
    pub const NAT_ICMP_SEND: u32 = 1 << 6;
    /// An ICMP error about what a service has sent opens a connection if it is about none.
    pub const SCHEDULE_ICMP: u32 = 1 << 7;
    /// An SCTP packet opens a connection even if its first chunk is not INIT.
    pub const SLOPPY_SCTP: u32 = 1 << 8;
}

/// What the CPUs share that limits what they do: a cache line of its own, for they write it.
#[derive(Zeroable)]
#[repr(C, align(64))]
pub struct Limiter {
    /// The second that `tokens` is for, in ticks divided by HZ.
    pub second: Shared32,
    /// ICMP errors that may still be sent in that second.
    pub tokens: Shared32,
    /// How many packets that would open a connection come before the next that is dropped, a signed number: see
    /// [`Config::drop_rate`].
    pub drop_counter: Shared32,
    /// How many connections of which 1, 2, … 8 packets have come `drop_entry` passes by before the next that it ends, signed
    /// numbers.
    pub thinning: [Shared32; 8],
    reserved: [u32; 5],
}

/// [`Service::state`] and [`Dest::state`]: what a slot holds.
pub mod slot {
    /// Nothing; every other field is left over.
    pub const FREE: u32 = 0;
    /// A configured service or destination.
    pub const USED: u32 = 1;
    /// One that has been removed and that connections still refer to.
    pub const REMOVED: u32 = 2;
}

record! {
    /// A virtual service (`docs/ipvs.md`, section 1.1).
    Service, ServiceRecord, 128 {
        /// One of [`slot`].
        state: u32,
        /// Address family: 2 (IPv4) or 10 (IPv6).
        family: u32,
        /// Address as loaded from a packet; IPv4 in the first word. The mark, in the first word, of a service of packets with
        /// one.
        addr: [u32; 4],
        /// Port as loaded from a packet in the low half, protocol number in bits 16-23. 0 for a service of a mark.
        port_protocol: u32,
        /// Number of the scheduler.
        scheduler: u32,
        /// Index of the view in force: twice the slot, or one more.
        view: u32,
        /// rr: the destination chosen last, plus one; 0 when the next choice starts at the head of the list. As of the
        /// last change of the service; the data plane goes on from there in its [`Cursor`].
        pointer: u32,
        /// wrr: the weight threshold in force. As of the last change. lblc and lblcr: see [`View::cache`].
        threshold: u32,
        /// Flags of the service and its scheduler, [`crate::proto::service_flag`] and [`crate::proto::sched_flag`].
        flags: u32,
        /// Creation order; later is greater.
        order: u64,
        /// Connections, packets in, bytes in, packets out, bytes out of destinations that are gone.
        retired: [u64; 5],
        /// How long its templates stay from each use on, in seconds; 0 if it is not persistent.
        persistence: u32,
        /// Which clients have a template together: see [`Address::network`].
        netmask: u32,
        /// Zero.
        padding: [u64; 3],
    }
}

record! {
    /// A destination (real server) of a service (`docs/ipvs.md`, section 1.2).
    Dest, DestRecord, 64 {
        /// Address as loaded from a packet; IPv4 in the first word.
        addr: [u32; 4],
        /// Port as loaded from a packet in the low half (0: the port of the connection), method in bits 16-23,
        /// address family in bits 24-31.
        port_method: u32,
        /// Weight, 0 to 2^31 - 1.
        weight: u32,
        /// One of [`slot`]. Packets of connections go through only while it is [`slot::USED`].
        state: u32,
        /// Slot of the service.
        service: u32,
        /// Upper connection threshold, 0 for none.
        upper: u32,
        /// Lower connection threshold, 0 for three quarters of the upper.
        lower: u32,
        /// The latest weight that was not 0.
        last_weight: u32,
        /// When it was removed, in seconds since boot.
        removed_at: u32,
        /// Order in which destinations were added; the list of a service runs from the greatest to the smallest.
        order: u64,
        /// 1 if it has ever been masqueraded, so that connections may exist whose replies have to be translated.
        masqueraded: u32,
        /// Zero.
        reserved: u32,
    }
}

impl Dest {
    /// Whether new connections may go to the destination.
    #[inline(always)]
    pub fn usable(&self) -> bool {
        self.weight.load() != 0 && self.available()
    }

    /// Whether packets of its connections go through.
    #[inline(always)]
    pub fn available(&self) -> bool {
        self.state.load() == slot::USED
    }

    /// How many connections it is to have.
    #[inline(always)]
    pub fn thresholds(&self) -> Thresholds {
        Thresholds { upper: self.upper.load(), lower: self.lower.load() }
    }

    /// The address.
    #[inline(always)]
    pub fn addr<A: Address>(&self) -> A {
        A::from_words(<[u32; 4] as Word>::load(&self.addr))
    }

    /// The port, 0 for that of the connection.
    #[inline(always)]
    pub fn port(&self) -> Port {
        Port::from_raw(self.port_method.load() as u16)
    }

    /// The number of the forwarding method.
    #[inline(always)]
    pub fn method(&self) -> u8 {
        (self.port_method.load() >> 16) as u8
    }

    /// The kernel's number of the address family.
    #[inline(always)]
    pub fn family(&self) -> u32 {
        self.port_method.load() >> 24
    }
}

/// What a list or ring holds: a destination, and what choosing it depends on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct SlotRecord {
    /// Number of the destination.
    pub dest: u32,
    /// In lists, the destination's weight, of which lc and random have made 1 if it is not 0, with [`Slot::LIMITED`] if it has
    /// thresholds. In the rings of wrr, the weight
    /// threshold at which it is chosen here. In those of random and wrandom, in every other slot, how many of 2^32 draws of
    /// this slot and the next fall on this one. 0 elsewhere.
    pub threshold: u32,
}

/// A [`SlotRecord`] in shared memory: destination in the low half, threshold in the high half.
#[derive(Zeroable)]
#[repr(transparent)]
pub struct Slot(pub Shared64);

/// As many slots as a cache line has: what scans of lists look up at once. A list begins with one, and has slots of weight 0
/// at its end so that it ends with one.
pub type SlotLine = [Slot; SLOTS_PER_LINE as usize];

/// Slots in a [`SlotLine`].
pub const SLOTS_PER_LINE: u32 = 8;

const _: () = assert!(size_of::<SlotLine>() == 64);

impl Slot {
    /// Set beside the weight of a destination in a list that has thresholds.
    pub const LIMITED: u32 = 1 << 31;

    /// The destination's number.
    #[inline(always)]
    pub fn dest(&self) -> u32 {
        self.0.load() as u32
    }

    /// The threshold.
    #[inline(always)]
    pub fn threshold(&self) -> u32 {
        (self.0.load() >> 32) as u32
    }

    /// Of a list, the destination's number, and its weight as it stands there.
    #[inline(always)]
    pub fn dest_and_weight(&self) -> (u32, u32) {
        let word = self.0.load();
        (word as u32, (word >> 32) as u32)
    }
}

impl Record for Slot {
    type Plain = SlotRecord;

    fn load(&self) -> SlotRecord {
        let word = self.0.load();
        SlotRecord { dest: word as u32, threshold: (word >> 32) as u32 }
    }

    fn store(&self, value: &SlotRecord) {
        self.0.store(u64::from(value.dest) | u64::from(value.threshold) << 32);
    }
}

record! {
    /// How to choose a destination of a service. A service has two; one is in force, the other is written anew for the
    /// next change and then put in force by one store in the endpoint table.
    View, ViewRecord, 64 {
        /// Incremented before the view or a list it names is written again. A packet that finds another version after
        /// it has chosen than before may have read a mixture.
        version: u32,
        /// Slot of the service.
        service: u32,
        /// Number of the scheduler.
        scheduler: u32,
        /// First slot of the list of all destinations, newest first: a multiple of [`SLOTS_PER_LINE`].
        list: u32,
        /// Number of destinations.
        list_len: u32,
        /// First slot of the scheduler's ring or table.
        ring: u32,
        /// Slots of the ring or table.
        ring_len: u32,
        /// wrr: index in the ring where the pass with threshold 1 begins.
        ring_final: u32,
        /// Flags of the service and its scheduler, [`crate::proto::service_flag`] and [`crate::proto::sched_flag`].
        flags: u32,
        /// lblc and lblcr: whose entries of the cache are this service's ([`CacheEntry::owner`]).
        cache: u32,
        /// How long templates stay from each use on, in ticks.
        persistence: u32,
        /// Which clients have a template together: see [`Address::network`].
        netmask: u32,
        /// The mark that the service is for; 0 if it is at an address.
        mark: u32,
        /// Zero.
        reserved: [u32; 3],
    }
}

/// Which destinations a destination address has had: an entry of the cache of lblc and lblcr. A cache line.
#[derive(Zeroable)]
#[repr(C)]
pub struct CacheEntry {
    /// What tells addresses apart: [`address_word`].
    pub address: Shared64,
    /// Whose entry it is, [`View::cache`]; 0 for nobody's.
    pub owner: Shared32,
    /// Odd while it is being written.
    pub version: Shared32,
    /// When it was last used, in ticks.
    pub used: Shared32,
    /// When a destination was last put into its set, or taken out, in ticks.
    pub modified: Shared32,
    /// The destinations, plus one, the one that was put in last first; 0 where there is none. lblc has one.
    pub set: [Shared32; CACHE_SET as usize],
    reserved: [u32; 2],
}

const _: () = assert!(size_of::<CacheEntry>() == 64);

/// Most destinations of an address in the cache.
pub const CACHE_SET: u32 = 8;
/// Entries of a bucket of the cache.
pub const CACHE_WAYS: u32 = 8;
/// Buckets of the cache: with these it has 65,536 entries, in 4 MiB.
pub const CACHE_BUCKETS: u32 = 8192;

/// An address as the cache tells it from others: itself in the low half, and for IPv6 a hash of all of it in the high half.
#[inline(always)]
pub fn address_word<A: Address>(address: A) -> u64 {
    let [_, b, c, d] = address.words().map(u64::from);
    // Of IPv4 addresses only the first word is not 0.
    let network = if b | c | d == 0 { 0 } else { mix(mix(b | c << 32) ^ d) >> 32 << 32 };
    address.number() as u64 | network
}

/// Where the scheduler of a view stands; a cache line of its own, for every new connection writes it.
#[derive(Zeroable)]
#[repr(C, align(64))]
pub struct Cursor {
    /// rr and wrr: see [`cursor`].
    pub position: Shared32,
    reserved: [u32; 15],
}

/// The value of [`Cursor::position`].
pub mod cursor {
    /// Set when the next choice is the ring's entry at the index in the other bits; clear when it is the one after.
    pub const FRESH: u32 = 1 << 31;
}

/// Connections of a destination; a cache line of its own.
#[derive(Zeroable)]
#[repr(C, align(64))]
pub struct DestLoad {
    /// Active connections in the high half, all connections in the low half: added to by one instruction, read
    /// together.
    pub connections: Shared64,
    /// What was last said of the way to the destination: see [`PathMtu`].
    pub path_mtu: Shared64,
    /// 1 when its thresholds made the destination overloaded; see [`DestLoad::is_overloaded`].
    pub overloaded: Shared32,
    /// 1 when the destination is not configured any more, whatever lists say: those follow a moment later.
    pub removed: Shared32,
    /// Templates of the destination.
    pub templates: Shared32,
    reserved: [u32; 9],
}

impl DestLoad {
    /// Whether a destination with these thresholds takes no new connections.
    ///
    /// What is noted is believed between the thresholds only, so that nothing comes of it when two CPUs have noted what they
    /// saw in the wrong order.
    #[inline(always)]
    pub fn is_overloaded(&self, thresholds: Thresholds) -> bool {
        thresholds.overloaded(active_and_total(self.connections.load()).1, self.overloaded.load() != 0)
    }

    /// Notes whether a destination with these thresholds is overloaded, whose connections were `before` and have become
    /// `after`.
    #[inline(always)]
    pub fn note(&self, thresholds: Thresholds, before: u64, after: u64) {
        if thresholds.upper == 0 {
            return;
        }
        let noted = self.overloaded.load() != 0;
        let was = thresholds.overloaded(active_and_total(before).1, noted);
        let is = thresholds.overloaded(active_and_total(after).1, was);
        if is != noted {
            self.overloaded.store(is.into());
        }
    }
}

/// The largest packet that gets to a destination, as an ICMP error about the tunnel to it has said: in bytes in bits 0-15,
/// 0 when none has; whom it was said of in bits 16-31, as far as sixteen bits tell; until when it holds, in ticks, in bits
/// 32-63.
#[derive(Clone, Copy)]
pub struct PathMtu(pub u64);

impl PathMtu {
    /// How long what was said holds, in seconds: the kernel's default, `net.ipv4.route.mtu_expires`.
    pub const HOLDS_S: u32 = 600;

    /// What says that packets to `addr` may have `mtu` bytes, but no less than is believed, until `until`.
    #[inline(always)]
    pub fn new<A: Address>(mtu: u16, addr: A, until: Jiffies) -> Self {
        let mtu = if mtu > A::PATH_MTU_MIN { mtu } else { A::PATH_MTU_MIN };
        Self(mtu as u64 | (Self::mark(addr) as u64) << 16 | (until.0 as u64) << 32)
    }

    /// The least of `mtu` and what was said of the way to `addr`, if that holds at `now`.
    #[inline(always)]
    pub fn limit(self, mtu: u32, addr: impl Address, now: Jiffies) -> u32 {
        let said = self.0 as u16 as u32;
        let holds =
            said != 0 && (self.0 >> 16) as u16 == Self::mark(addr) && !now.reached(Jiffies((self.0 >> 32) as u32));
        if holds && said < mtu { said } else { mtu }
    }

    /// Slots are used again for other destinations.
    fn mark(addr: impl Address) -> u16 {
        let number = addr.number();
        (number ^ number >> 16) as u16
    }
}

/// What to add to [`DestLoad::connections`] for one more connection.
pub const ONE_CONNECTION: u64 = 1;
/// What to add to [`DestLoad::connections`] for one more active connection.
pub const ONE_ACTIVE: u64 = 1 << 32;

/// Active and total connections in a value of [`DestLoad::connections`].
#[inline(always)]
pub const fn active_and_total(connections: u64) -> (u32, u32) {
    ((connections >> 32) as u32, connections as u32)
}

/// Counters of a destination on one CPU, in the order of `docs/ipvs.md`, section 8.1.
#[derive(Zeroable, Default)]
#[repr(C)]
pub struct Counters {
    /// Connections scheduled.
    pub connections: Cell<u64>,
    /// Packets from clients.
    pub packets_in: Cell<u64>,
    /// Bytes from clients, IP header included.
    pub bytes_in: Cell<u64>,
    /// Packets from the server.
    pub packets_out: Cell<u64>,
    /// Bytes from the server, IP header included.
    pub bytes_out: Cell<u64>,
}

impl Counters {
    /// Counts a packet of `len` bytes from a client.
    #[inline(always)]
    pub fn count_in(&self, len: u32) {
        self.packets_in.update(|packets| packets + 1);
        self.bytes_in.update(|bytes| bytes + u64::from(len));
    }

    /// Counts a packet of `len` bytes from the server.
    #[inline(always)]
    pub fn count_out(&self, len: u32) {
        self.packets_out.update(|packets| packets + 1);
        self.bytes_out.update(|bytes| bytes + u64::from(len));
    }
}

/// What one CPU keeps about a destination: nobody else writes it, so nothing in it is ever half-written.
#[derive(Zeroable)]
#[repr(C)]
pub struct DestCpu {
    /// Traffic.
    pub counters: Counters,
    /// The [`Config::epoch`] in which all that follows was found out; 0 when it is not to be used again: the destination
    /// is not available, or is this host, or is at a neighbour that has yet to be resolved.
    pub epoch: Cell<u32>,
    /// Address as loaded from a packet; IPv4 in the first word.
    pub addr: [Cell<u32>; 4],
    /// Port as loaded from a packet in the low half, 0 for that of the connection.
    pub port: Cell<u32>,
    /// Where its packets go.
    pub next_hop: NextHop,
}

impl DestCpu {
    /// The address.
    #[inline(always)]
    pub fn addr<A: Address>(&self) -> A {
        A::from_words(core::array::from_fn(|index| self.addr[index].get()))
    }

    /// The port, 0 for that of the connection.
    #[inline(always)]
    pub fn port(&self) -> Port {
        Port::from_raw(self.port.get() as u16)
    }
}

/// [`DestCpu`] as the loader reads it.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct DestCpuRecord {
    /// The five [`Counters`].
    pub counters: [u64; 5],
    /// Everything else, which is for the data plane alone.
    pub cache: [u64; 11],
}

const _: () = assert!(size_of::<DestCpu>() == size_of::<DestCpuRecord>() && size_of::<DestCpu>() == 128);

/// A next hop as the kernel's routing table gave it, kept by one CPU for about a second.
#[derive(Zeroable)]
#[repr(C)]
pub struct NextHop {
    /// When the kernel was asked, in ticks.
    pub asked: Cell<u32>,
    /// One of [`hop`].
    pub kind: Cell<u32>,
    /// Index of the interface that leads there.
    pub ifindex: Cell<u32>,
    /// Largest IP packet the route takes, in bytes.
    pub mtu: Cell<u32>,
    /// Destination and source address of the Ethernet header.
    pub macs: [Cell<u32>; 3],
    /// Address the host would send from on this route, as loaded from a packet; IPv4 in the first word.
    pub source: [Cell<u32>; 4],
    /// Address family of `gateway`: 2 (IPv4) or 10 (IPv6).
    pub gateway_family: Cell<u32>,
    /// Who to send to on that link, as loaded from a packet; IPv4 in the first word.
    pub gateway: Cell<[u32; 4]>,
}

impl NextHop {
    /// The address the host would send from.
    #[inline(always)]
    pub fn source<A: Address>(&self) -> A {
        A::from_words(core::array::from_fn(|index| self.source[index].get()))
    }

    /// Takes over everything that `other` says.
    #[inline(always)]
    pub fn copy_from(&self, other: &Self) {
        self.asked.set(other.asked.get());
        self.kind.set(other.kind.get());
        self.ifindex.set(other.ifindex.get());
        self.mtu.set(other.mtu.get());
        for (mac, other) in self.macs.iter().zip(&other.macs) {
            mac.set(other.get());
        }
        for (word, other) in self.source.iter().zip(&other.source) {
            word.set(other.get());
        }
        self.gateway_family.set(other.gateway_family.get());
        self.gateway.set(other.gateway.get());
    }
}

/// [`NextHop::kind`].
pub mod hop {
    /// The kernel has not been asked yet.
    pub const UNKNOWN: u32 = 0;
    /// The packet leaves by an interface, to a neighbour whose link-layer address is known.
    pub const VIA: u32 = 1;
    /// The destination is this host.
    pub const LOCAL: u32 = 2;
    /// The packet leaves by an interface, to a neighbour that has yet to be resolved. Never believed a second time.
    pub const UNRESOLVED: u32 = 3;
}

/// A next hop towards clients that has a number: a key made of its address and interface, or 0.
///
/// Numbers are given once and never reused while the instance lives, so a connection may keep the number of its
/// client's next hop.
#[derive(Zeroable)]
#[repr(transparent)]
pub struct Adjacency(pub Shared64);

/// Number of [`Adjacency`] slots, a power of two. Number 0 is not given: each CPU's [`NextHop`] of that number is for
/// next hops that are used once.
pub const ADJACENCIES: u32 = 4096;

/// What an address and port is to the director.
#[derive(Zeroable)]
#[zeroable(bound = "")]
#[repr(C)]
pub struct Endpoint<K: EndpointKey> {
    /// All 0 for a slot that was never used.
    key: K::Shared,
    /// See [`Target`]; 0 when the slot is not in use.
    target: Shared64,
}

/// Endpoints in a bucket.
pub const ENDPOINTS_PER_BUCKET: usize = 4;
/// Buckets looked at before an endpoint is known not to exist.
pub const ENDPOINT_PROBES: u32 = 4;

/// One cache line of the IPv4 endpoint table, or two of the IPv6 one.
#[derive(Zeroable)]
#[zeroable(bound = "")]
#[repr(C)]
pub struct EndpointBucket<K: EndpointKey> {
    /// The endpoints, in no order.
    pub endpoints: [Endpoint<K>; ENDPOINTS_PER_BUCKET],
}

/// A bucket of the IPv4 endpoint table.
pub type EndpointBucket4 = EndpointBucket<EndpointKey4>;
/// A bucket of the IPv6 endpoint table.
pub type EndpointBucket6 = EndpointBucket<EndpointKey6>;

const _: () = assert!(size_of::<EndpointBucket4>() == 64 && size_of::<EndpointBucket6>() == 128);

/// What is known of an endpoint.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Target(pub u64);

impl Target {
    /// A masqueraded real server listens here, or did and has connections left.
    pub const SERVER: u64 = 1 << 32;
    /// The address (with port 0 and protocol 0) belongs to a service.
    pub const ADDRESS: u64 = 1 << 33;
    /// A service was here and has connections left.
    pub const FORMER_SERVICE: u64 = 1 << 34;
    /// The service is persistent.
    pub const PERSISTENT: u64 = 1 << 35;

    /// The index of the view in force, if the endpoint is a service.
    #[inline(always)]
    pub const fn view(self) -> Option<u32> {
        (self.0 as u32).checked_sub(1)
    }

    /// The index of the view in force, if the endpoint is a service that is not persistent.
    #[inline(always)]
    pub const fn plain_view(self) -> Option<u32> {
        if self.has(Self::PERSISTENT) { None } else { self.view() }
    }

    /// This target with the view in force set.
    pub const fn with_view(self, view: u32) -> Self {
        Self(self.0 & !0xffff_ffff | (view as u64 + 1))
    }

    /// Whether all of `flags` are set.
    #[inline(always)]
    pub const fn has(self, flags: u64) -> bool {
        self.0 & flags == flags
    }

    /// Whether connections to this endpoint may exist.
    #[inline(always)]
    pub const fn is_service(self) -> bool {
        self.0 as u32 != 0 || self.has(Self::FORMER_SERVICE)
    }
}

/// An address, port and protocol, as an endpoint table is asked for them.
pub trait EndpointKey: Copy + Eq + core::hash::Hash + core::fmt::Debug + 'static {
    /// The address.
    type Addr: Address;
    /// The key in shared memory.
    type Shared: Zeroable;

    /// The endpoint of `addr` with this port and protocol: see [`port_protocol`].
    fn from_raw(addr: Self::Addr, port_protocol: u32) -> Self;
    /// The endpoint at `port` of `addr`.
    #[inline(always)]
    fn new(addr: Self::Addr, port: Port, protocol: Protocol) -> Self {
        Self::from_raw(addr, port_protocol(port, protocol))
    }
    /// The endpoint of the same protocol at `port` of `addr`.
    fn elsewhere(&self, addr: Self::Addr, port: Port) -> Self;
    /// The entry that marks `addr` as the address of a service.
    fn address(addr: Self::Addr) -> Self;
    /// The entry of the service of packets with this mark.
    fn mark(mark: u32) -> Self;
    /// The bucket searched first, of a power of two.
    fn bucket(&self, seed: &Seed, buckets: u32) -> u32;
    /// Reads a key; all 0 where there has never been one.
    fn load(shared: &Self::Shared) -> Self;
    /// Writes the key.
    fn store(&self, shared: &Self::Shared);
    /// Whether this is a key, and not all 0.
    fn is_some(&self) -> bool;
    /// Whether both are the same, found out by one branch.
    fn is(&self, other: &Self) -> bool;
}

/// What a port and protocol are in an [`EndpointKey4`], from bit 32 on, and in the last word of an [`EndpointKey6`]: the port as
/// loaded from a packet in bits 0-15, the number of the protocol in bits 16-23.
#[inline(always)]
pub const fn port_protocol(port: Port, protocol: Protocol) -> u32 {
    port.raw() as u32 | (protocol as u32) << 16
}

/// Where [`port_protocol`] has the port.
const PORT: u32 = 0xffff;
/// What stands for port and protocol in the key that marks an address.
const ADDRESS: u64 = 1 << 24;
/// What stands for port and protocol in the key of a mark, which stands for the address.
const MARK: u64 = 1 << 25;

/// An IPv4 endpoint: address in bits 0-31, port in bits 32-47, both as loaded from a packet, protocol number in bits 48-55.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct EndpointKey4(u64);

impl EndpointKey for EndpointKey4 {
    type Addr = Ip4;
    type Shared = Shared64;

    #[inline(always)]
    fn from_raw(addr: Ip4, port_protocol: u32) -> Self {
        Self(addr.raw() as u64 | (port_protocol as u64) << 32)
    }

    #[inline(always)]
    fn elsewhere(&self, addr: Ip4, port: Port) -> Self {
        Self::from_raw(addr, port.raw() as u32 | (self.0 >> 32) as u32 & !PORT)
    }

    #[inline(always)]
    fn address(addr: Ip4) -> Self {
        Self(addr.raw() as u64 | ADDRESS << 32)
    }

    #[inline(always)]
    fn mark(mark: u32) -> Self {
        Self(mark as u64 | MARK << 32)
    }

    #[inline(always)]
    fn bucket(&self, seed: &Seed, buckets: u32) -> u32 {
        scale(seed.quick_hash(self.0), buckets)
    }

    #[inline(always)]
    fn load(shared: &Shared64) -> Self {
        Self(shared.load())
    }

    #[inline(always)]
    fn store(&self, shared: &Shared64) {
        shared.store(self.0);
    }

    #[inline(always)]
    fn is_some(&self) -> bool {
        self.0 != 0
    }

    #[inline(always)]
    fn is(&self, other: &Self) -> bool {
        self == other
    }
}

/// An IPv6 endpoint: the two words of the address, then port in bits 0-15, all as loaded from a packet, and protocol number
/// in bits 16-23.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct EndpointKey6([u64; 3]);

impl EndpointKey for EndpointKey6 {
    type Addr = Ip6;
    type Shared = [Shared64; 3];

    #[inline(always)]
    fn from_raw(addr: Ip6, port_protocol: u32) -> Self {
        let [high, low] = addr.raw();
        Self([high, low, port_protocol as u64])
    }

    #[inline(always)]
    fn elsewhere(&self, addr: Ip6, port: Port) -> Self {
        Self::from_raw(addr, port.raw() as u32 | self.0[2] as u32 & !PORT)
    }

    #[inline(always)]
    fn address(addr: Ip6) -> Self {
        let [high, low] = addr.raw();
        Self([high, low, ADDRESS])
    }

    #[inline(always)]
    fn mark(mark: u32) -> Self {
        Self([mark as u64, 0, MARK])
    }

    #[inline(always)]
    fn bucket(&self, seed: &Seed, buckets: u32) -> u32 {
        let [high, low, rest] = self.0;
        scale(seed.quick_hash(low ^ high.rotate_left(23) ^ rest.rotate_left(32)), buckets)
    }

    #[inline(always)]
    fn load(shared: &[Shared64; 3]) -> Self {
        Self(<[u64; 3] as Word>::load(shared))
    }

    #[inline(always)]
    fn store(&self, shared: &[Shared64; 3]) {
        <[u64; 3] as Word>::store(shared, self.0);
    }

    #[inline(always)]
    fn is_some(&self) -> bool {
        self.0[2] != 0
    }

    #[inline(always)]
    fn is(&self, other: &Self) -> bool {
        let ([a, b, c], [d, e, f]) = (self.0, other.0);
        opaque((a ^ d) | (b ^ e) | (c ^ f)) == 0
    }
}

impl<K: EndpointKey> Endpoint<K> {
    /// The target, if this slot holds `key`. A slot may be given to another key at any time: a target counts only when
    /// the key is still there after it has been read.
    #[inline(always)]
    pub fn find(&self, key: K) -> Option<Target> {
        if !K::load(&self.key).is(&key) {
            return None;
        }
        let target = self.target.load();
        (target != 0 && K::load(&self.key).is(&key)).then_some(Target(target))
    }

    /// Whether this slot has never held a key. The search for a key ends at a bucket with such a slot.
    #[inline(always)]
    pub fn is_virgin(&self) -> bool {
        !K::load(&self.key).is_some()
    }

    /// The key and target in this slot, if it is in use.
    pub fn read(&self) -> Option<(K, Target)> {
        let target = self.target.load();
        let key = K::load(&self.key);
        (target != 0).then_some((key, Target(target)))
    }

    /// Changes the target of the key in this slot, by one store; [`Target`] 0 gives the slot up.
    pub fn set_target(&self, target: Target) {
        self.target.store(target.0);
    }

    /// Puts `key` into this slot, which is not in use. Readers find the whole of it or nothing.
    pub fn claim(&self, key: K, target: Target) {
        self.target.store(0);
        key.store(&self.key);
        self.target.store(target.0);
    }
}

/// A part of a packet's path that most packets do not take.
///
/// In the kernel each is a program of its own for either family, with a stack of its own, which the program of the first part
/// goes on to by a tail call; so the path that most packets take makes hardly any calls.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Stage {
    /// A client's packet whose connection, or the way to its destination, has to be looked up again.
    Request,
    /// A masqueraded server's packet, of which the way to its client has to be found out.
    Reply,
    /// A packet from an endpoint of a service whose servers answer clients directly.
    Observe,
    /// An ICMP message.
    Icmp,
    /// A frame that is very short, or not for this host, or whose IP header has options or cannot be believed.
    Unusual,
    /// A client's packet of which no connection is known.
    Open,
    /// A client's packet of which no connection is known, where there may be no room for one or where it may not open one.
    Overflow,
    /// An IPv6 packet: a stage of IPv4, for every frame is taken for IPv4 first.
    Six,
    /// A packet of no service's address and port and of no masqueraded server, while there are services of marks, or at ports that
    /// they do not name.
    Mark,
    /// A client's packet that opens a connection to a persistent service.
    Persist,
    /// What [`Stage::Overflow`] is for, at a persistent service.
    PersistOverflow,
    /// A client's packet for a persistent service, for whose template something has made room.
    PersistAlike,
    /// A packet of a client for whom there is no server, or of a server for whom there is no client, while it depends on the
    /// packet's own destination what becomes of it.
    Astray,
    /// An ICMP error about a packet of a service, or in a tunnel, of which no connection is known.
    Related,
    /// An ICMP error about a packet of a service that opens a connection.
    RelatedOpen,
    /// A client's packet that has just opened a connection to a persistent service.
    Opened,
    /// An SCTP packet, from where on its path is that of TCP and UDP at the beginning.
    Sctp,
}

impl Stage {
    /// Every stage that both families have, in the order of their numbers.
    pub const COMMON: [Self; 16] = [
        Self::Request,
        Self::Reply,
        Self::Observe,
        Self::Icmp,
        Self::Unusual,
        Self::Open,
        Self::Overflow,
        Self::Mark,
        Self::Persist,
        Self::PersistOverflow,
        Self::PersistAlike,
        Self::Astray,
        Self::Related,
        Self::RelatedOpen,
        Self::Opened,
        Self::Sctp,
    ];
    /// Stages of IPv4, and entries of the map of stages, with room for more.
    const OF_ONE_FAMILY: u32 = 24;
    /// Entries of the map of stages.
    pub const PROGRAMS: u32 = 2 * Self::OF_ONE_FAMILY;

    /// The index of its program for addresses of type `A`, in the map of stages.
    #[inline(always)]
    pub const fn program<A: Address>(self) -> u32 {
        self as u32 + if A::FAMILY == Ip6::FAMILY { Self::OF_ONE_FAMILY } else { 0 }
    }

    /// Every stage of both families: the index of its program in the map of stages and the program's name.
    pub fn programs() -> impl Iterator<Item = (u32, &'static str)> {
        let common = Self::COMMON.into_iter();
        let four = common.clone().map(|stage| (stage.program::<Ip4>(), stage.names()[0]));
        let six = common.map(|stage| (stage.program::<Ip6>(), stage.names()[1]));
        four.chain(six).chain([(Self::Six.program::<Ip4>(), Self::Six.names()[0])])
    }

    /// The names of its programs for IPv4 and IPv6.
    const fn names(self) -> [&'static str; 2] {
        match self {
            Self::Request => ["request", "request6"],
            Self::Reply => ["reply", "reply6"],
            Self::Observe => ["observe", "observe6"],
            Self::Icmp => ["icmp", "icmp6"],
            Self::Unusual => ["unusual", "unusual6"],
            Self::Open => ["open", "open6"],
            Self::Overflow => ["overflow", "overflow6"],
            Self::Six => ["six", "six"],
            Self::Mark => ["mark", "mark6"],
            Self::Persist => ["persist", "persist6"],
            Self::PersistOverflow => ["persist_overflow", "persist_overflow6"],
            Self::PersistAlike => ["persist_alike", "persist_alike6"],
            Self::Astray => ["astray", "astray6"],
            Self::Related => ["related", "related6"],
            Self::RelatedOpen => ["related_open", "related_open6"],
            Self::Opened => ["opened", "opened6"],
            Self::Sctp => ["sctp", "sctp6"],
        }
    }
}

/// Where ageing stands: what follows the timer in the one value of its map.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
pub struct AgeingRecord {
    /// Nanoseconds between two ticks.
    pub interval_ns: u64,
    /// Buckets looked at in one tick.
    pub slice: u32,
    /// The bucket that the next tick begins with.
    pub next: u32,
    /// Times the whole table has been looked at.
    pub sweeps: u64,
    /// When the sweep that is under way began, in ticks.
    pub began: u32,
    /// When the last whole sweep began, in ticks.
    pub last_began: u32,
    /// When the last whole sweep ended, in ticks.
    pub last_ended: u32,
    /// Of 2^32 buckets, how many `drop_entry` thins out in a sweep, less one.
    pub share: u32,
    /// Connections ended because their time was over.
    pub ended: u64,
}

record! {
    /// What the ageing timer does besides, and where it stands.
    Upkeep, UpkeepRecord, 64 {
        /// When the pass that is under way began, in ticks. A pass goes over all destinations and services, and takes two
        /// seconds.
        began: u32,
        /// The destination or service that comes next.
        next: u32,
        /// Connections that this pass has come by.
        connections: u32,
        /// Zero.
        reserved: [u32; 13],
    }
}

record! {
    /// What is known of the traffic of a destination, of a service, or of all, beside counters. Those of destinations come
    /// first, by number, then those of services, by slot, then that of all.
    Estimate, EstimateRecord, 128 {
        /// Of a destination, its counters as of the last estimation; of a service and of all, what destinations have counted
        /// since. In the order of [`Counters`], as all that follows.
        counted: [u64; 5],
        /// Rates: see [`crate::rate`].
        average: [u64; 5],
        /// The counters when they were zeroed last: lists take that off.
        base: [u64; 5],
        /// Another number for every time that the rates are to begin anew; odd if what has been counted begins at zero, too.
        wish: u32,
        /// `wish` when they last did.
        done: u32,
    }
}

impl Estimate {
    /// Lets the rates begin anew with the next estimation; and the counters at zero, if they are `fresh`.
    pub fn renew(&self, fresh: bool) {
        let wish = self.wish.load();
        let fresh = fresh || wish != self.done.load() && wish & 1 != 0;
        self.wish.store((wish | 1).wrapping_add(1) | u32::from(fresh));
    }
}

/// The value of the ageing map as the loader reads it.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct AgeingValue {
    /// The kernel's timer.
    pub timer: [u64; 2],
    /// Where ageing stands.
    pub record: AgeingRecord,
}

/// A request to the control program, at the start of the frame it is run with.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct ControlRequest {
    /// One of [`control`].
    pub operation: u32,
    /// The first bucket it is about.
    pub first: u32,
    /// The number of buckets it is about, or of connections.
    pub count: u32,
    /// The destination it is about, or [`control::ANY`]; or the slot of the service; or [`AgeingRecord::share`].
    pub subject: u32,
    /// What the program answers; its meaning depends on the operation.
    pub answer: u64,
    /// Nanoseconds between two ticks of the ageing timer.
    pub interval_ns: u64,
}

/// [`ControlRequest::operation`].
pub mod control {
    /// Starts the ageing timer, or lets one that runs go on with this program: `count` buckets every `interval_ns`, of which
    /// `drop_entry` thins out the share `subject`.
    pub const START_AGEING: u32 = 1;
    /// Answers with the time, in ticks.
    pub const CLOCK: u32 = 2;
    /// Ends the connections to the destination `subject` in `count` buckets from `first` on. Answers with their number.
    pub const FLUSH: u32 = 3;
    /// Ends those to any destination of the service in slot `subject`.
    pub const FLUSH_SERVICE: u32 = 4;
    /// Creates `count` connections, at most [`super::CONNECTIONS_MAX`]: the [`super::ConnectionRecord`]s that follow the
    /// request. Answers with the number of each [`super::Brought`], of sixteen bits, the first in the lowest.
    pub const INSERT: u32 = 5;
    /// As [`INSERT`], of at most [`super::CONNECTIONS6_MAX`] [`super::ConnectionRecord6`]s.
    pub const INSERT6: u32 = 6;
    /// Ends those to any destination that has been removed, as [`FLUSH`] does those to one.
    pub const FLUSH_REMOVED: u32 = 7;
    /// Every destination.
    pub const ANY: u32 = u32::MAX;
}

/// An IPv4 connection that no packet opens: another director has had it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct ConnectionRecord {
    /// Client address.
    pub client: Ip4,
    /// Service address.
    pub service: Ip4,
    /// Everything else.
    pub details: ConnectionDetails,
}

/// An IPv6 connection that no packet opens.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct ConnectionRecord6 {
    /// Client address.
    pub client: Ip6,
    /// Service address.
    pub service: Ip6,
    /// Everything else.
    pub details: ConnectionDetails,
}

/// What a connection that no packet opens is, beside its addresses.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct ConnectionDetails {
    /// Client port in the low half, service port in the high half, each as it stands in a packet.
    pub ports: u32,
    /// Number of the destination, which says the forwarding method.
    pub dest: u32,
    /// Protocol number in bits 0-7, number of the TCP state in bits 8-15 (0 for UDP).
    pub protocol_state: u32,
    /// Ticks until it expires if no packet comes, below 2^30.
    pub remaining: u32,
}

/// Most connections of one [`control::INSERT`]. With them the frame is as long as the kernel takes them, nearly.
pub const CONNECTIONS_MAX: usize = 128;
/// Most connections of one [`control::INSERT6`].
pub const CONNECTIONS6_MAX: usize = 64;

const _: () =
    assert!(CONNECTIONS6_MAX * size_of::<ConnectionRecord6>() <= CONNECTIONS_MAX * size_of::<ConnectionRecord>());

/// What has become of a [`ConnectionRecord`] or [`ConnectionRecord6`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Brought {
    /// The connection was created.
    New,
    /// It was there already, and has been left as it is.
    Known,
    /// There is no room for it.
    Full,
    /// It cannot be: no such protocol, state or destination.
    Refused,
}

record! {
    /// One step of a change: a record to write. The first slot of the journal holds the number of steps in `kind`; 0
    /// when no change is under way.
    JournalSlot, JournalRecord, 136 {
        /// One of [`journal`].
        kind: u32,
        /// The slot to write to.
        index: u32,
        /// The words of the record, from the first on.
        words: [u64; 16],
    }
}

/// [`JournalRecord::kind`].
pub mod journal {
    /// A [`super::ServiceRecord`].
    pub const SERVICE: u32 = 1;
    /// A [`super::DestRecord`].
    pub const DEST: u32 = 2;
    /// A [`super::DestRecord`] of a destination whose counters start at zero.
    pub const NEW_DEST: u32 = 3;
    /// A [`super::ServiceRecord`] of a service that did not exist.
    pub const NEW_SERVICE: u32 = 5;
    /// The counters of a zeroed [`super::Estimate`] in the first five words: its base.
    pub const BASE: u32 = 6;
    /// [`super::Instance::next_order`] in the first word, `services_used` and `dests_used` in the next two.
    pub const INSTANCE: u32 = 4;
}

/// What the measuring programs are told; see `lb-ebpf/src/bin/bench`.
pub mod bench {
    use super::{Pod, Record, Word, Zeroable};

    /// Bytes of an IPv4 frame that are restored before every run: its headers, and four bytes more.
    pub const HEAD: usize = 58;
    /// Bytes of an IPv6 frame that are: its headers.
    pub const HEAD6: usize = 74;

    record! {
        /// The frame that every run begins with, and how runs differ.
        Setup, SetupRecord, 108 {
            /// Length of the frame in bytes.
            len: u32,
            /// One of [`pick`].
            order: u32,
            /// Number of flows.
            flows: u32,
            /// The flow of the next run, or the state of the generator that draws it.
            next_flow: u32,
            /// Address of the first client, in host order; of an IPv6 one, its last four bytes. Sixty-four flows have the same.
            first_addr: u32,
            /// Whether the client is the destination of the frame: 0 or 1.
            reply: u32,
            /// Folded sum of the IPv4 header without checksum and client address.
            header_sum: u32,
            /// The first bytes of the frame, less the two of its type: the words that programs read.
            head: [u32; 18],
            /// The two bytes of the frame's type.
            frame_type: u32,
            /// Cache lines in the table of the program that looks at one.
            lines: u32,
        }
    }

    /// [`Setup::order`].
    pub mod pick {
        /// Every run has the first flow.
        pub const SAME: u32 = 0;
        /// Runs have flows in no order.
        pub const RANDOM: u32 = 1;
        /// Runs have one flow after the other.
        pub const SEQUENTIAL: u32 = 2;
    }
}

/// A number that changes with the layout of any shared type: what [`Instance::layout`] is compared with.
pub const LAYOUT: u32 = {
    let sizes = [
        size_of::<Instance>(),
        size_of::<Config>(),
        size_of::<Service>(),
        size_of::<Dest>(),
        size_of::<SlotLine>(),
        size_of::<View>(),
        size_of::<Cursor>(),
        size_of::<CacheEntry>(),
        size_of::<DestLoad>(),
        size_of::<DestCpu>(),
        size_of::<NextHop>(),
        size_of::<Adjacency>(),
        size_of::<EndpointBucket4>(),
        size_of::<JournalSlot>(),
        size_of::<AgeingValue>(),
        size_of::<EndpointBucket6>(),
        size_of::<Upkeep>(),
        size_of::<Estimate>(),
        size_of::<crate::mark::Marks>(),
        size_of::<crate::mark::Rule>(),
        size_of::<crate::mark::Start>(),
        crate::mark::RULES as usize,
        size_of::<crate::flow::Bucket4>(),
        size_of::<crate::flow::Bucket6>(),
        crate::reason::Reason::ALL.len(),
        crate::event::Event::ALL.len(),
        Stage::PROGRAMS as usize,
    ];
    // FNV-1a over the sizes.
    let mut hash = 0x811c_9dc5u32;
    let mut i = 0;
    while i < sizes.len() {
        hash = (hash ^ sizes[i] as u32).wrapping_mul(0x0100_0193);
        i += 1;
    }
    hash
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_and_plain_forms_have_one_layout() {
        let shared = Dest::zeroed();
        let plain = DestRecord {
            addr: [1, 2, 3, 4],
            port_method: u32::from(Port::new(8080).raw()) | 3 << 16 | 10 << 24,
            weight: 5,
            state: slot::USED,
            service: 6,
            upper: 7,
            lower: 8,
            last_weight: 9,
            removed_at: 10,
            order: 11,
            masqueraded: 1,
            reserved: 0,
        };
        shared.store(&plain);
        assert_eq!(shared.load(), plain);
        assert_eq!((shared.port(), shared.method(), shared.family()), (Port::new(8080), 3, 10));
        assert!(shared.usable());
        shared.weight.store(0);
        assert!(!shared.usable() && shared.available());
        shared.state.store(slot::REMOVED);
        assert!(!shared.available());
    }

    #[test]
    fn an_endpoint_is_found_until_its_slot_is_given_up() {
        let slot = Endpoint::<EndpointKey4>::zeroed();
        let web = EndpointKey4::new(Ip4::new([10, 0, 0, 1]), Port::new(80), Protocol::Tcp);
        let dns = EndpointKey4::new(Ip4::new([10, 0, 0, 1]), Port::new(53), Protocol::Udp);
        assert!(slot.is_virgin() && slot.find(web).is_none());
        slot.claim(web, Target::default().with_view(0));
        assert_eq!(slot.find(web).and_then(Target::view), Some(0));
        assert!(slot.find(dns).is_none());
        slot.set_target(Target::default());
        assert!(slot.find(web).is_none() && !slot.is_virgin() && slot.read().is_none());
        slot.claim(dns, Target(Target::SERVER));
        assert_eq!(slot.read(), Some((dns, Target(Target::SERVER))));
    }

    #[test]
    fn the_address_marker_is_no_endpoint() {
        let (four, six) = (Ip4::new([10, 0, 0, 1]), Ip6::new([7; 16]));
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            assert_ne!(EndpointKey4::address(four), EndpointKey4::new(four, Port::new(0), protocol));
            assert_ne!(EndpointKey6::address(six), EndpointKey6::new(six, Port::new(0), protocol));
            assert_ne!(EndpointKey4::mark(four.raw()), EndpointKey4::new(four, Port::new(0), protocol));
        }
        assert_ne!(EndpointKey4::mark(four.raw()), EndpointKey4::address(four));
        assert!(EndpointKey6::mark(1).is_some() && EndpointKey6::mark(1) != EndpointKey6::mark(2));
    }

    #[test]
    fn a_path_mtu_is_of_one_destination_and_for_a_while() {
        let (server, other) = (Ip4::new([10, 2, 0, 11]), Ip4::new([10, 2, 0, 12]));
        let until = Jiffies(5);
        let path = PathMtu::new(1300, server, until);
        let before = Jiffies(u32::MAX);
        assert_eq!(path.limit(1500, server, before), 1300);
        assert_eq!(path.limit(1200, server, before), 1200);
        assert_eq!(path.limit(1500, other, before), 1500);
        assert_eq!(path.limit(1500, server, until), 1500);
        assert_eq!(PathMtu::new(0, server, until).limit(1500, server, before), 552);
        let server = Ip6::new([0xfd; 16]);
        assert_eq!(PathMtu::new(1279, server, until).limit(1500, server, before), 1280);
        assert_eq!(PathMtu(0).limit(1500, server, before), 1500);
    }

    #[test]
    fn loads_of_active_and_total_do_not_mix() {
        let load = 3 * ONE_CONNECTION + 2 * ONE_ACTIVE;
        assert_eq!(active_and_total(load), (2, 3));
        assert_eq!(active_and_total(load.wrapping_sub(ONE_CONNECTION + ONE_ACTIVE)), (1, 2));
    }
}
