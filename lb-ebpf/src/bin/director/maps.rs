//! Every map of the director, and what the loader sets before it loads the programs.
//!
//! A map's name is the name of its pin. The sizes written here are placeholders: the loader sets the real ones from its
//! options, except those of one record.

use core::{cell::Cell, ffi::c_void};

use aya_ebpf::{
    Global,
    bindings::{bpf_timer, xdp_md},
    btf_maps::{Array, PerCpuArray, ProgramArray},
    helpers::generated::bpf_map_lookup_percpu_elem,
    macros::btf_map,
};
use lb_common::{
    abi::{
        ADJACENCIES, Adjacency, AgeingRecord, AgeingValue, CACHE_BUCKETS, CACHE_WAYS, CacheEntry, Config, Counters,
        Cursor, Dest, DestCpu, DestLoad, EndpointBucket, EndpointBucket4, EndpointBucket6, EndpointKey4, EndpointKey6,
        Estimate, Instance, JournalSlot, Limiter, NextHop, Service, SlotLine, Stage, Upkeep, View,
    },
    event::{COUNTERS, Event},
    flow::{Bucket, Bucket4, Bucket6, Candidate, Entry4, Entry6, Place},
    hash::Seed,
    mark::{self, Marks, Rule, Start},
};
use lb_ebpf::{
    ageing::What,
    env::{Clock, Scan},
    flow_table::Buckets,
    kernel::{self, Kernel},
    tables::{Endpoints, Tables},
    upkeep::Objects,
};

use crate::{flows, overload};

/// `BPF_F_MMAPABLE`: userspace maps the values into its memory, and they begin on a page.
const MMAPABLE: usize = 1 << 10;

#[btf_map]
static INSTANCE: Array<Instance, 1, MMAPABLE> = Array::new();
#[btf_map]
static CONFIG: Array<Config, 1, MMAPABLE> = Array::new();
#[btf_map]
static JOURNAL: Array<JournalSlot, 1, MMAPABLE> = Array::new();
#[btf_map]
static SERVICES: Array<Service, 1, MMAPABLE> = Array::new();
#[btf_map]
static DESTS: Array<Dest, 1, MMAPABLE> = Array::new();
#[btf_map]
static ENDPOINTS4: Array<EndpointBucket4, 1, MMAPABLE> = Array::new();
#[btf_map]
static ENDPOINTS6: Array<EndpointBucket6, 1, MMAPABLE> = Array::new();
#[btf_map]
static VIEWS: Array<View, 1, MMAPABLE> = Array::new();
#[btf_map]
static SLOTS: Array<SlotLine, 1, MMAPABLE> = Array::new();
#[btf_map]
static CURSORS: Array<Cursor, 1, MMAPABLE> = Array::new();
#[btf_map]
static CACHE: Array<CacheEntry, { (CACHE_BUCKETS * CACHE_WAYS) as usize }> = Array::new();
#[btf_map]
static DEST_LOADS: Array<DestLoad, 1, MMAPABLE> = Array::new();
#[btf_map]
static DEST_CPUS: PerCpuArray<DestCpu, 1> = PerCpuArray::new();
#[btf_map]
static FLOWS4: Array<Bucket4, 2, MMAPABLE> = Array::new();
#[btf_map]
static FLOWS6: Array<Bucket6, 2, MMAPABLE> = Array::new();
#[btf_map]
static ADJACENCY: Array<Adjacency, { ADJACENCIES as usize }> = Array::new();
#[btf_map]
static ADJACENCY_CPUS: PerCpuArray<NextHop, { ADJACENCIES as usize }> = PerCpuArray::new();
#[btf_map]
static MARKS: Array<Marks, 1, MMAPABLE> = Array::new();
#[btf_map]
static MARK_RULES: Array<Rule, { (mark::BANKS * mark::RULES) as usize }, MMAPABLE> = Array::new();
#[btf_map]
static MARK_STARTS: Array<Start, { (mark::BANKS * mark::FAMILIES * mark::STARTS) as usize }, MMAPABLE> = Array::new();
#[btf_map]
static LIMITER: Array<Limiter, 1> = Array::new();
/// Packets not forwarded, by the number of the [`lb_common::reason::Reason`], and what else is counted, by the number of the
/// [`Event`].
#[btf_map]
static REASONS: PerCpuArray<Cell<u64>, { COUNTERS as usize }> = PerCpuArray::new();
#[btf_map]
pub(crate) static AGEING: Array<Ageing, 1> = Array::new();
#[btf_map]
pub(crate) static UPKEEP: Array<Upkeep, 1, MMAPABLE> = Array::new();
#[btf_map]
static ESTIMATES: Array<Estimate, 1, MMAPABLE> = Array::new();
/// The program of each [`Stage`].
#[btf_map]
pub(crate) static STAGES: ProgramArray<{ Stage::PROGRAMS as usize }> = ProgramArray::new();

/// The ageing timer and where it stands; see [`lb_common::abi::AgeingValue`].
#[repr(C)]
pub(crate) struct Ageing {
    pub(crate) timer: bpf_timer,
    pub(crate) record: AgeingRecord,
}

const _: () = assert!(size_of::<Ageing>() == size_of::<AgeingValue>());

/// Ticks per second of the kernel.
#[unsafe(no_mangle)]
static HZ: Global<u32> = Global::new(250);
/// Buckets of the IPv4 flow table.
#[unsafe(no_mangle)]
static FLOW_BUCKETS: Global<u32> = Global::new(2);
/// Buckets of the IPv6 flow table.
#[unsafe(no_mangle)]
static FLOW_BUCKETS6: Global<u32> = Global::new(2);
/// Buckets of each endpoint table.
#[unsafe(no_mangle)]
static ENDPOINT_BUCKETS: Global<u32> = Global::new(1);
/// The instance's secret.
#[unsafe(no_mangle)]
static SEED: Global<[u64; 3]> = Global::new([0; 3]);

/// The clock of a program that is not about a packet.
#[inline(always)]
pub(crate) fn clock() -> Option<Clock> {
    let skew = CONFIG.get(0)?.clock_skew.load();
    Some(Clock { now: kernel::jiffies().after(skew), hz: HZ.load() })
}

/// What the instance is.
#[inline(always)]
pub(crate) fn instance() -> Option<&'static Instance> {
    INSTANCE.get(0)
}

/// The kernel around a program that was given `ctx`.
#[inline(always)]
pub(crate) fn kernel(ctx: *mut xdp_md) -> Kernel {
    Kernel { ctx, hz: HZ.load() }
}

/// The maps of the loaded instance.
pub(crate) struct Maps;

macro_rules! getters {
    ($($name:ident, $map:ident, $value:ty;)+) => {$(
        #[inline(always)]
        fn $name(&self, index: u32) -> Option<&$value> {
            $map.get(index)
        }
    )+};
}

impl Tables for Maps {
    #[inline(always)]
    fn seed(&self) -> Seed {
        Seed::from_words(SEED.load())
    }

    #[inline(always)]
    fn endpoint_buckets(&self) -> u32 {
        ENDPOINT_BUCKETS.load()
    }

    #[inline(always)]
    fn config(&self) -> Option<&Config> {
        CONFIG.get(0)
    }

    #[inline(always)]
    fn limiter(&self) -> Option<&Limiter> {
        LIMITER.get(0)
    }

    #[inline(always)]
    fn marks(&self) -> Option<&Marks> {
        MARKS.get(0)
    }

    getters! {
        mark_rule, MARK_RULES, Rule;
        mark_start, MARK_STARTS, Start;
        view, VIEWS, View;
        cursor, CURSORS, Cursor;
        cache, CACHE, CacheEntry;
        slots, SLOTS, SlotLine;
        dest, DESTS, Dest;
        dest_load, DEST_LOADS, DestLoad;
        dest_cpu, DEST_CPUS, DestCpu;
        adjacency, ADJACENCY, Adjacency;
        adjacency_cpu, ADJACENCY_CPUS, NextHop;
    }

    #[inline(always)]
    fn is_overloaded(&self, number: u32) -> u64 {
        overload::is_overloaded(number)
    }

    #[inline(always)]
    fn add_connections(&self, number: u32, share: u64) {
        overload::add_connections(number, share);
    }

    fn pass_connection(&self, number: u32) {
        overload::pass_connection(number);
    }

    #[inline(always)]
    fn hide(&self, value: u64) -> u64 {
        kernel::hide(value)
    }

    #[inline(always)]
    fn count(&self, reason: u8) {
        increment(u32::from(reason));
    }

    #[inline(always)]
    fn count_event(&self, event: Event) {
        increment(event as u32);
    }
}

#[inline(always)]
fn increment(index: u32) {
    if let Some(counter) = REASONS.get(index) {
        counter.set(counter.get() + 1);
    }
}

impl Objects for Maps {
    #[inline(always)]
    fn estimate(&self, index: u32) -> Option<&Estimate> {
        ESTIMATES.get(index)
    }

    #[inline(always)]
    fn traffic(&self, dest: u32) -> [u64; 5] {
        let mut sum = OverCpus { dest, sum: [0; 5] };
        kernel::repeat(CPUS_MAX, &mut sum);
        sum.sum
    }
}

/// More CPUs than any kernel has.
const CPUS_MAX: u32 = 1 << 14;

/// Adds up the counters of a destination on one CPU after the other.
struct OverCpus {
    dest: u32,
    sum: [u64; 5],
}

impl Scan for OverCpus {
    #[inline(always)]
    fn hide(&mut self, _: impl Fn(u64) -> u64) {}

    #[inline(always)]
    fn visit(&mut self, cpu: u32) -> bool {
        let map = (&raw const DEST_CPUS).cast_mut().cast::<c_void>();
        // SAFETY: the map's values are of this type, and the kernel gives none for a CPU that there is not.
        let value =
            unsafe { bpf_map_lookup_percpu_elem(map, (&raw const self.dest).cast(), cpu).cast::<DestCpu>().as_ref() };
        let Some(DestCpu { counters, .. }) = value else { return false };
        let Counters { connections, packets_in, bytes_in, packets_out, bytes_out } = counters;
        for (sum, counter) in self.sum.iter_mut().zip([connections, packets_in, bytes_in, packets_out, bytes_out]) {
            *sum += counter.get();
        }
        true
    }
}

macro_rules! of_families {
    ($(
        $entry:ident, $buckets:ident, $flows:ident ($candidate:ident, $clear_way:ident, $let_go:ident, $template_word:ident, $assure:ident, $end:ident),
        $key:ident, $endpoints:ident;
    )+) => {$(
        impl Buckets<$entry> for Maps {
            #[inline(always)]
            fn buckets(&self) -> u32 {
                $buckets.load()
            }

            #[inline(always)]
            fn bucket(&self, index: u32) -> Option<&Bucket<$entry>> {
                $flows.get(index)
            }

            #[inline(always)]
            fn candidate(&self, place: Place, clock: Clock, idle: u32) -> Candidate {
                Candidate(kernel::hide(flows::$candidate(place.hash(), clock.now.0, clock.hz, idle)))
            }

            #[inline(always)]
            fn clear_way(&self, place: Place, clock: Clock, idle: u32) -> u64 {
                flows::$clear_way(place.hash(), clock.now.0, clock.hz, idle)
            }

            #[inline(always)]
            fn let_go(&self, number: u32, how: u64) -> u64 {
                flows::$let_go(number, how)
            }

            #[inline(always)]
            fn template_word(&self, number: u32) -> u64 {
                flows::$template_word(number)
            }

            #[inline(always)]
            fn assure(&self, number: u32, word: u64) -> u64 {
                flows::$assure(number, word)
            }

            #[inline(always)]
            fn end(&self, number: u32, what: What) -> u64 {
                flows::$end(number, what.kind, what.number)
            }
        }

        impl Endpoints<$key> for Maps {
            #[inline(always)]
            fn endpoint_bucket(&self, index: u32) -> Option<&EndpointBucket<$key>> {
                $endpoints.get(index)
            }
        }
    )+};
}

of_families! {
    Entry4, FLOW_BUCKETS, FLOWS4 (candidate4, clear_way4, let_go4, template_word4, assure4, end4), EndpointKey4, ENDPOINTS4;
    Entry6, FLOW_BUCKETS6, FLOWS6 (candidate6, clear_way6, let_go6, template_word6, assure6, end6), EndpointKey6, ENDPOINTS6;
}
