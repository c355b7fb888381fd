//! The program and its maps.

use core::cell::Cell;

use aya_ebpf::{
    bindings::xdp_action,
    btf_maps::{HashMap, PerCpuArray},
    macros::{btf_map, xdp},
    programs::XdpContext,
};
use lb_common::{
    addr::{Ip4, Ip6},
    decapsulation::Decapsulation,
    reason::Fate,
};
use lb_ebpf::{
    decapsulate::{self, Serves, VirtualAddresses},
    kernel::XdpPacket,
};

/// `BPF_F_NO_PREALLOC`: a real server has few virtual addresses.
const NO_PREALLOC: usize = 1;

/// The virtual IPv4 addresses, as they stand in a packet, that packets are taken out of the tunnel for.
#[btf_map]
static VIPS4: HashMap<u32, u32, 1024, NO_PREALLOC> = HashMap::new();
/// The virtual IPv6 addresses, likewise.
#[btf_map]
static VIPS6: HashMap<[u64; 2], u32, 1024, NO_PREALLOC> = HashMap::new();
/// Packets for them, by [`Decapsulation`] number.
#[btf_map]
static OUTCOMES: PerCpuArray<Cell<u64>, { Decapsulation::ALL.len() }> = PerCpuArray::new();

/// Every frame that arrives on an interface of the real server.
#[xdp]
pub(crate) fn decapsulate(ctx: XdpContext) -> u32 {
    match decapsulate::decapsulate(&mut XdpPacket::new(ctx.ctx), &Maps) {
        Fate::Passed => xdp_action::XDP_PASS,
        Fate::Dropped => xdp_action::XDP_DROP,
    }
}

struct Maps;

impl Serves<Ip4> for Maps {
    #[inline(always)]
    fn contains(&self, address: Ip4) -> bool {
        VIPS4.get_ptr(address.raw()).is_some()
    }
}

impl Serves<Ip6> for Maps {
    #[inline(always)]
    fn contains(&self, address: Ip6) -> bool {
        VIPS6.get_ptr(address.raw()).is_some()
    }
}

impl VirtualAddresses for Maps {
    #[inline(always)]
    fn count(&self, outcome: Decapsulation) {
        if let Some(counter) = OUTCOMES.get(outcome as u32) {
            counter.set(counter.get() + 1);
        }
    }
}
