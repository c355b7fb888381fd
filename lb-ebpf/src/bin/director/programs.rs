//! The programs, each a thin wrapper around the library.

use aya_ebpf::{bindings::xdp_md, macros::xdp, programs::XdpContext};
use lb_common::abi::Target;
use lb_ebpf::{
    forward::{Exit, Halt},
    icmp::{self, Complaint},
    kernel::{Kernel, XdpPacket, action},
    pipeline::{self, Connection, Steps},
};

use crate::maps::{self, Maps};

/// Every frame that arrives on an interface of the director.
#[xdp]
pub(crate) fn xdpvs(ctx: XdpContext) -> u32 {
    let mut packet = XdpPacket::new(ctx.ctx);
    action(pipeline::process(&mut packet, &Maps, &maps::kernel(ctx.ctx)))
}

/// Set in the result of a step that failed; the other bits are those of a [`Halt`] then.
const FAILED: u64 = 1 << 63;
/// The result of a step that has none.
const NOTHING: u64 = u64::MAX;

fn pack<T>(result: Result<T, Halt>, bits: impl Fn(T) -> u64) -> u64 {
    match result {
        Ok(value) => bits(value),
        Err(halt) => halt.bits() | FAILED,
    }
}

fn unpack<T>(result: u64, from_bits: impl Fn(u64) -> T) -> Result<T, Halt> {
    if result & FAILED == 0 { Ok(from_bits(result)) } else { Err(Halt::from_bits(result & !FAILED)) }
}

impl Steps<XdpPacket, Maps> for Kernel {
    #[inline(always)]
    fn open(&self, _: &mut XdpPacket, _: &Maps, target: Target) -> Result<Connection, Halt> {
        unpack(step_open(self.ctx, target.0), Connection::from_bits)
    }

    #[inline(always)]
    fn reply(&self, _: &mut XdpPacket, _: &Maps, from: Target) -> Result<Exit, Halt> {
        unpack(step_reply(self.ctx, from.0), Exit::from_bits)
    }

    #[inline(always)]
    fn relay(&self, _: &mut XdpPacket, _: &Maps) -> Result<Exit, Halt> {
        unpack(step_relay(self.ctx), Exit::from_bits)
    }

    #[inline(always)]
    fn answer(&self, _: &mut XdpPacket, _: &Maps, complaint: Complaint) -> Option<Exit> {
        let exit = step_answer(self.ctx, complaint.bits());
        (exit != NOTHING).then_some(Exit::from_bits(exit))
    }
}

#[unsafe(no_mangle)]
extern "C" fn step_open(ctx: *mut xdp_md, target: u64) -> u64 {
    let packet = XdpPacket::new(ctx);
    pack(pipeline::open(&packet, &Maps, &maps::kernel(ctx), Target(target)), Connection::bits)
}

#[unsafe(no_mangle)]
extern "C" fn step_reply(ctx: *mut xdp_md, from: u64) -> u64 {
    let mut packet = XdpPacket::new(ctx);
    pack(pipeline::reply(&mut packet, &Maps, &maps::kernel(ctx), Target(from)), Exit::bits)
}

#[unsafe(no_mangle)]
extern "C" fn step_relay(ctx: *mut xdp_md) -> u64 {
    let mut packet = XdpPacket::new(ctx);
    pack(icmp::relay(&mut packet, &Maps, &maps::kernel(ctx)), Exit::bits)
}

#[unsafe(no_mangle)]
extern "C" fn step_answer(ctx: *mut xdp_md, complaint: u64) -> u64 {
    let Some(complaint) = Complaint::from_bits(complaint) else { return NOTHING };
    let mut packet = XdpPacket::new(ctx);
    icmp::answer(&mut packet, &Maps, &maps::kernel(ctx), complaint).map_or(NOTHING, Exit::bits)
}
