//! The ageing timer.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::bpf_timer,
    helpers::generated::{bpf_get_prandom_u32, bpf_timer_init, bpf_timer_set_callback, bpf_timer_start},
};
use lb_common::{
    abi::switch,
    defence::{self, mode, which},
};
use lb_ebpf::{
    ageing::{self, Sweep, Thinning, What},
    kernel,
    tables::Tables,
    upkeep::{self, Extent, Round},
};

use crate::maps::{self, AGEING, Ageing, Maps, UPKEEP};

const CLOCK_MONOTONIC: u64 = 1;
/// What `bpf_timer_init` answers when the timer exists.
const EBUSY: i64 = -16;

/// Sets the pace and starts the timer; one that runs goes on under this program.
#[inline(always)]
pub(crate) fn start(slice: u32, interval_ns: u64, share: u32) -> Option<()> {
    let value = AGEING.get_ptr_mut(0)?;
    // SAFETY: the value is valid while the program runs, and no timer runs before this has set its callback.
    unsafe {
        (*value).record.slice = slice;
        (*value).record.interval_ns = interval_ns;
        (*value).record.share = share;
    }
    let timer = value.cast::<bpf_timer>();
    let map = (&raw const AGEING).cast_mut().cast::<c_void>();
    // SAFETY: the timer stands in a value of this map, and the callback has the signature that timers call.
    unsafe {
        let made = bpf_timer_init(timer, map, CLOCK_MONOTONIC);
        if made != 0 && made != EBUSY {
            return None;
        }
        if bpf_timer_set_callback(timer, tick as *mut c_void) != 0 {
            return None;
        }
        (bpf_timer_start(timer, interval_ns, 0) == 0).then_some(())
    }
}

/// Does what is due of [`upkeep`].
#[inline(always)]
fn keep_up() -> Option<()> {
    let (config, keeping, instance) = (Maps.config()?, UPKEEP.get(0)?, maps::instance()?);
    let extent = Extent::of(instance);
    let due = upkeep::due(keeping, maps::clock()?, extent.objects());
    let estimates = u64::from(config.switches.load() & switch::RUN_ESTIMATION != 0);
    let mut round = Round { tables: &Maps, first: due.first, extent, estimates, connections: 0 };
    kernel::repeat(due.count, &mut round);
    let max = instance.max_flows.load() + instance.max_flows6.load();
    upkeep::close(&Maps, keeping, config, due, round.connections, max);
    Some(())
}

/// Which buckets are thinned out in this tick.
#[inline(always)]
fn thinning(share: u32) -> Thinning {
    let mode = Maps.config().map_or(mode::OFF, |config| config.defences[which::DROP_ENTRY].load());
    let share = if defence::is_on(mode) { u64::from(share) + 1 } else { 0 };
    // SAFETY: the helper has no preconditions.
    Thinning { share, lot: unsafe { bpf_get_prandom_u32() as u32 } }
}

/// Looks at the next slice of the flow tables and arms the timer again.
unsafe extern "C" fn tick(_map: *mut c_void, _key: *mut u32, value: *mut Ageing) -> i64 {
    // SAFETY: the kernel passes the value that the timer stands in. Only this callback writes the record while the
    // timer runs, and a timer does not run twice at a time.
    let record = unsafe { &mut (*value).record };
    if let Some(clock) = maps::clock() {
        let buckets = ageing::buckets(&Maps);
        if record.next == 0 {
            record.began = clock.now.0;
        }
        let count = record.slice.min(buckets.saturating_sub(record.next));
        let thinning = thinning(record.share);
        let mut sweep = Sweep { tables: &Maps, first: record.next, what: What::over(clock), thinning, ended: 0 };
        kernel::repeat(count, &mut sweep);
        record.ended += sweep.ended;
        record.next += count;
        if record.next >= buckets {
            record.next = 0;
            record.sweeps += 1;
            record.last_began = record.began;
            record.last_ended = clock.now.0;
        }
    }
    keep_up();
    // SAFETY: the timer stands in the value that the kernel passed.
    unsafe { bpf_timer_start(value.cast::<bpf_timer>(), record.interval_ns, 0) };
    0
}
