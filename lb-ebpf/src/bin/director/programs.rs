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

fn pack_option<T>(result: Option<Result<T, Halt>>, bits: impl Fn(T) -> u64) -> u64 {
    result.map_or(NOTHING, |result| pack(result, bits))
}

fn unpack_option<T>(result: u64, from_bits: impl Fn(u64) -> T) -> Option<Result<T, Halt>> {
    (result != NOTHING).then(|| unpack(result, from_bits))
}

impl Steps<XdpPacket, Maps> for Kernel {
    #[inline(always)]
    fn schedule(&self, _: &XdpPacket, _: &Maps, target: Target) -> Result<u32, Halt> {
        unpack(step_schedule(self.ctx, target.0), |bits| bits as u32)
    }

    #[inline(always)]
    fn store(&self, _: &XdpPacket, _: &Maps, dest: u32) -> Option<Result<Connection, Halt>> {
        unpack_option(step_store(self.ctx, dest), Connection::from_bits)
    }

    #[inline(always)]
    fn join(&self, _: &XdpPacket, _: &Maps) -> Result<Connection, Halt> {
        unpack(step_join(self.ctx), Connection::from_bits)
    }

    #[inline(always)]
    fn forward(&self, _: &mut XdpPacket, _: &Maps, connection: Connection) -> Result<Exit, Halt> {
        unpack(step_forward(self.ctx, connection.bits()), Exit::from_bits)
    }

    #[inline(always)]
    fn return_to_client(&self, _: &mut XdpPacket, _: &Maps) -> Result<Exit, Halt> {
        unpack(step_return_to_client(self.ctx), Exit::from_bits)
    }

    #[inline(always)]
    fn observe(&self, _: &XdpPacket, _: &Maps) -> Result<Exit, Halt> {
        unpack(step_observe(self.ctx), Exit::from_bits)
    }

    #[inline(always)]
    fn relay_to_server(&self, _: &mut XdpPacket, _: &Maps) -> Option<Result<Exit, Halt>> {
        unpack_option(step_relay_to_server(self.ctx), Exit::from_bits)
    }

    #[inline(always)]
    fn relay_to_client(&self, _: &mut XdpPacket, _: &Maps) -> Option<Result<Exit, Halt>> {
        unpack_option(step_relay_to_client(self.ctx), Exit::from_bits)
    }

    #[inline(always)]
    fn answer(&self, _: &mut XdpPacket, _: &Maps, complaint: Complaint) -> Option<Exit> {
        let exit = step_answer(self.ctx, complaint.bits());
        (exit != NOTHING).then_some(Exit::from_bits(exit))
    }
}

/// Defines a step as a global function, which the verifier looks at once, however it is reached.
macro_rules! step {
    ($name:ident($($argument:ident: $type:ty),*), $packet:ident, $kernel:ident => $body:expr) => {
        #[unsafe(no_mangle)]
        extern "C" fn $name(ctx: *mut xdp_md $(, $argument: $type)*) -> u64 {
            #[allow(unused_mut, reason = "not every step writes to its packet")]
            let mut $packet = XdpPacket::new(ctx);
            let $kernel = maps::kernel(ctx);
            $body
        }
    };
}

step!(step_schedule(target: u64), packet, kernel => {
    pack(pipeline::schedule(&packet, &Maps, &kernel, Target(target)), u64::from)
});
step!(step_store(dest: u32), packet, kernel => {
    pack_option(pipeline::store(&packet, &Maps, &kernel, dest), Connection::bits)
});
step!(step_join(), packet, kernel => pack(pipeline::join(&packet, &Maps, &kernel), Connection::bits));
step!(step_forward(connection: u64), packet, kernel => {
    pack(pipeline::forward(&mut packet, &Maps, &kernel, Connection::from_bits(connection)), Exit::bits)
});
step!(step_return_to_client(), packet, kernel => {
    pack(pipeline::return_to_client(&mut packet, &Maps, &kernel), Exit::bits)
});
step!(step_observe(), packet, kernel => pack(pipeline::observe(&packet, &Maps, &kernel), Exit::bits));
step!(step_relay_to_server(), packet, kernel => {
    pack_option(icmp::relay_to_server(&mut packet, &Maps, &kernel), Exit::bits)
});
step!(step_relay_to_client(), packet, kernel => {
    pack_option(icmp::relay_to_client(&mut packet, &Maps, &kernel), Exit::bits)
});
step!(step_answer(complaint: u64), packet, kernel => {
    let complaint = Complaint::from_bits(complaint);
    let exit = complaint.and_then(|complaint| icmp::answer(&mut packet, &Maps, &kernel, complaint));
    exit.map_or(NOTHING, Exit::bits)
});
