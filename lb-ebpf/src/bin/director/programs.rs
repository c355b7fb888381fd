//! The programs, each a thin wrapper around the library.

use aya_ebpf::{bindings::xdp_md, macros::xdp, programs::XdpContext};
use lb_common::{abi::Stage, reason::Reason};
use lb_ebpf::{
    forward::Exit,
    icmp::{self, Complaint},
    kernel::{Kernel, XdpPacket, action},
    pipeline::{self, Stages},
    tables::Tables as _,
};

use crate::maps::{self, Maps, STAGES};

/// Every frame that arrives on an interface of the director.
#[xdp]
pub(crate) fn xdpvs(ctx: XdpContext) -> u32 {
    let mut packet = XdpPacket::new(ctx.ctx);
    action(pipeline::process(&mut packet, &Maps, &maps::kernel(ctx.ctx)))
}

macro_rules! stage {
    ($($(#[$doc:meta])* $name:ident: $stage:ident;)+) => {$(
        $(#[$doc])*
        #[xdp]
        pub(crate) fn $name(ctx: XdpContext) -> u32 {
            let mut packet = XdpPacket::new(ctx.ctx);
            action(pipeline::process_stage(&mut packet, &Maps, &maps::kernel(ctx.ctx), Stage::$stage))
        }
    )+};
}

stage! {
    /// [`Stage::Request`].
    request: Request;
    /// [`Stage::Reply`].
    reply: Reply;
    /// [`Stage::Observe`].
    observe: Observe;
    /// [`Stage::Icmp`].
    icmp: Icmp;
    /// [`Stage::Unusual`].
    unusual: Unusual;
    /// [`Stage::Open`].
    open: Open;
    /// [`Stage::Overflow`].
    overflow: Overflow;
}

impl Stages<XdpPacket, Maps> for Kernel {
    #[inline(always)]
    fn enter(&self, _: &mut XdpPacket, tables: &Maps, stage: Stage) -> Exit {
        let ctx = XdpContext::new(self.ctx);
        // One call for each stage: a call of a constant program becomes a jump.
        // SAFETY: the programs take the same context.
        unsafe {
            match stage {
                Stage::Request => STAGES.tail_call(&ctx, Stage::Request as u32),
                Stage::Reply => STAGES.tail_call(&ctx, Stage::Reply as u32),
                Stage::Observe => STAGES.tail_call(&ctx, Stage::Observe as u32),
                Stage::Icmp => STAGES.tail_call(&ctx, Stage::Icmp as u32),
                Stage::Unusual => STAGES.tail_call(&ctx, Stage::Unusual as u32),
                Stage::Open => STAGES.tail_call(&ctx, Stage::Open as u32),
                Stage::Overflow => STAGES.tail_call(&ctx, Stage::Overflow as u32),
            }
        }
        tables.count(Reason::Impossible as u8);
        Exit::stop(Reason::Impossible as u8)
    }

    #[inline(always)]
    fn answer(&self, _: &mut XdpPacket, _: &Maps, complaint: Complaint) -> Option<Exit> {
        let exit = answer(self.ctx, complaint.bits());
        (exit != NOTHING).then_some(Exit::from_bits(exit))
    }
}

/// The result of [`answer`] when there is none.
const NOTHING: u64 = u64::MAX;

/// [`icmp::answer`], for every program.
///
/// Verifier: a global function, which it looks at once, however often it is called.
#[unsafe(no_mangle)]
extern "C" fn answer(ctx: *mut xdp_md, complaint: u64) -> u64 {
    let mut packet = XdpPacket::new(ctx);
    let complaint = Complaint::from_bits(complaint);
    let exit = complaint.and_then(|complaint| icmp::answer(&mut packet, &Maps, &maps::kernel(ctx), complaint));
    exit.map_or(NOTHING, Exit::bits)
}
