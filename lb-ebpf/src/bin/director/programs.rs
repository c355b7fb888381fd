//! The programs, each a thin wrapper around the library.

use core::ptr;

use aya_ebpf::{bindings::xdp_md, macros::xdp, programs::XdpContext};
use lb_common::{
    abi::Stage,
    addr::{Ip4, Ip6},
    reason::Reason,
};
use lb_ebpf::{
    forward::Exit,
    icmp::{self, Complaint},
    kernel::{self, Kernel, XdpPacket, action},
    mark::{self, Marked},
    parse::{Ip4Packet, Ip6Packet},
    pipeline::{self, Family, Stages},
    protocols::{All, Protocols, Sctp},
    schedule::{self, Parties},
    tables::Tables as _,
};

use crate::maps::{self, Maps, STAGES};

macro_rules! programs {
    ($($(#[$doc:meta])* $name:ident: $family:ty, $function:ident($($stage:ident)?);)+) => {$(
        $(#[$doc])*
        #[xdp]
        pub(crate) fn $name(ctx: XdpContext) -> u32 {
            let mut packet = XdpPacket::new(ctx.ctx);
            let env = maps::kernel(ctx.ctx);
            action(pipeline::$function::<$family, _, _, _>(&mut packet, &Maps, &env $(, Stage::$stage)?))
        }
    )+};
}

programs! {
    /// Every frame that arrives on an interface of the director.
    xdpvs: Ip4Packet, process();
    /// [`Stage::Six`].
    six: Ip6Packet, process();
    /// [`Stage::Request`].
    request: Ip4Packet<All>, process_stage(Request);
    /// [`Stage::Reply`].
    reply: Ip4Packet<All>, process_stage(Reply);
    /// [`Stage::Observe`].
    observe: Ip4Packet<All>, process_stage(Observe);
    /// [`Stage::Icmp`].
    icmp: Ip4Packet<All>, process_stage(Icmp);
    /// [`Stage::Unusual`].
    unusual: Ip4Packet, process_stage(Unusual);
    /// [`Stage::Open`].
    open: Ip4Packet<All>, process_stage(Open);
    /// [`Stage::Overflow`].
    overflow: Ip4Packet<All>, process_stage(Overflow);
    /// [`Stage::Mark`].
    mark: Ip4Packet<All>, process_stage(Mark);
    /// [`Stage::Persist`].
    persist: Ip4Packet<All>, process_stage(Persist);
    /// [`Stage::PersistOverflow`].
    persist_overflow: Ip4Packet<All>, process_stage(PersistOverflow);
    /// [`Stage::PersistAlike`].
    persist_alike: Ip4Packet<All>, process_stage(PersistAlike);
    /// [`Stage::Astray`].
    astray: Ip4Packet<All>, process_stage(Astray);
    /// [`Stage::Related`].
    related: Ip4Packet<All>, process_stage(Related);
    /// [`Stage::RelatedOpen`].
    related_open: Ip4Packet<All>, process_stage(RelatedOpen);
    /// [`Stage::Opened`].
    opened: Ip4Packet<All>, process_stage(Opened);
    /// [`Stage::Sctp`].
    sctp: Ip4Packet<Sctp>, process_stage(Sctp);
    /// [`Stage::Request`] of IPv6.
    request6: Ip6Packet<All>, process_stage(Request);
    /// [`Stage::Reply`] of IPv6.
    reply6: Ip6Packet<All>, process_stage(Reply);
    /// [`Stage::Observe`] of IPv6.
    observe6: Ip6Packet<All>, process_stage(Observe);
    /// [`Stage::Icmp`] of IPv6.
    icmp6: Ip6Packet<All>, process_stage(Icmp);
    /// [`Stage::Unusual`] of IPv6.
    unusual6: Ip6Packet, process_stage(Unusual);
    /// [`Stage::Open`] of IPv6.
    open6: Ip6Packet<All>, process_stage(Open);
    /// [`Stage::Overflow`] of IPv6.
    overflow6: Ip6Packet<All>, process_stage(Overflow);
    /// [`Stage::Mark`] of IPv6.
    mark6: Ip6Packet<All>, process_stage(Mark);
    /// [`Stage::Persist`] of IPv6.
    persist6: Ip6Packet<All>, process_stage(Persist);
    /// [`Stage::PersistOverflow`] of IPv6.
    persist_overflow6: Ip6Packet<All>, process_stage(PersistOverflow);
    /// [`Stage::PersistAlike`] of IPv6.
    persist_alike6: Ip6Packet<All>, process_stage(PersistAlike);
    /// [`Stage::Astray`] of IPv6.
    astray6: Ip6Packet<All>, process_stage(Astray);
    /// [`Stage::Related`] of IPv6.
    related6: Ip6Packet<All>, process_stage(Related);
    /// [`Stage::RelatedOpen`] of IPv6.
    related_open6: Ip6Packet<All>, process_stage(RelatedOpen);
    /// [`Stage::Opened`] of IPv6.
    opened6: Ip6Packet<All>, process_stage(Opened);
    /// [`Stage::Sctp`] of IPv6.
    sctp6: Ip6Packet<Sctp>, process_stage(Sctp);
}

macro_rules! stages {
    ($packet:ident, $addr:ty, $answer:ident, $marked:ident, $($stage:ident)+) => {
        impl<S: Protocols> Stages<$packet<S>, XdpPacket, Maps> for Kernel {
            #[inline(always)]
            fn enter(&self, _: &mut XdpPacket, tables: &Maps, stage: Stage) -> Exit {
                let ctx = XdpContext::new(self.ctx);
                // One call for each stage: a call of a constant program becomes a jump.
                $(if stage == Stage::$stage {
                    // SAFETY: the programs take the same context.
                    unsafe { STAGES.tail_call(&ctx, const { Stage::$stage.program::<$addr>() }) };
                })+
                tables.count(Reason::Impossible as u8);
                Exit::stop(Reason::Impossible as u8)
            }

            #[inline(always)]
            fn answer(&self, _: &mut XdpPacket, _: &Maps, complaint: Complaint) -> Option<Exit> {
                let exit = $answer(self.ctx, complaint.bits());
                (exit != NOTHING).then_some(Exit::from_bits(exit))
            }

            #[inline(always)]
            fn marked(&self, _: &XdpPacket, _: &Maps) -> Marked {
                Marked::from_bits($marked(self.ctx))
            }

            #[inline(always)]
            fn pick(&self, _: &Maps, view: u32, parties: Parties) -> Result<u32, Reason> {
                let [client, service] = parties.words();
                picked(pick(view, client, service))
            }

            #[inline(always)]
            fn pick_alike(&self, _: &Maps, view: u32, parties: Parties, connection: u64) -> Result<u32, Reason> {
                let [client, service] = parties.words();
                picked(pick_alike(view, client, service, connection))
            }
        }

        /// [`mark::service`], for every program of the family.
        ///
        /// Verifier: a global function, which it looks at once, however often it is called.
        #[unsafe(no_mangle)]
        extern "C" fn $marked(ctx: *mut xdp_md) -> u64 {
            let packet = XdpPacket::new(ctx);
            mark::service::<$packet<All>, _, _, _>(&packet, &Maps, &maps::kernel(ctx)).bits()
        }

        /// [`icmp::answer`], for every program of the family.
        ///
        /// Verifier: a global function, which it looks at once, however often it is called.
        #[unsafe(no_mangle)]
        extern "C" fn $answer(ctx: *mut xdp_md, complaint: u64) -> u64 {
            answer::<$packet>(ctx, complaint)
        }
    };
}

stages!(Ip4Packet, Ip4, answer4, marked4, Request Reply Observe Icmp Unusual Open Overflow Six Mark Persist PersistOverflow PersistAlike Astray Related RelatedOpen Opened Sctp);
stages!(Ip6Packet, Ip6, answer6, marked6, Request Reply Observe Icmp Unusual Open Overflow Mark Persist PersistOverflow PersistAlike Astray Related RelatedOpen Opened Sctp);

/// [`schedule::pick`], for every program: see [`picked`].
///
/// Verifier: a global function, which it looks at once, however often it is called.
#[unsafe(no_mangle)]
extern "C" fn pick(view: u32, client: u64, service: u64) -> u64 {
    in_a_word(schedule::pick(&Maps, &no_packet(), view, Parties::from_words([client, service])))
}

/// [`schedule::pick_alike`], for every program: see [`picked`].
///
/// Verifier: a global function, which it looks at once, however often it is called.
#[unsafe(no_mangle)]
extern "C" fn pick_alike(view: u32, client: u64, service: u64, connection: u64) -> u64 {
    let parties = Parties::from_words([client, service]);
    in_a_word(schedule::pick_alike(&Maps, &no_packet(), view, parties, connection))
}

/// The kernel for schedulers, which look at no packet.
#[inline(always)]
fn no_packet() -> Kernel {
    maps::kernel(ptr::null_mut())
}

/// The number of the destination that was picked, or one more than the number of the reason why there is none in the upper half.
#[inline(always)]
fn in_a_word(picked: Result<u32, Reason>) -> u64 {
    match picked {
        Ok(number) => number.into(),
        Err(reason) => (reason as u64 + 1) << 32,
    }
}

/// What [`in_a_word`] was given.
#[inline(always)]
fn picked(word: u64) -> Result<u32, Reason> {
    const NO_DESTINATION: u64 = Reason::NoDestination as u64 + 1;
    const CHANGED: u64 = Reason::ConfigurationChanged as u64 + 1;
    match word >> 32 {
        0 => Ok(kernel::hide(word) as u32),
        NO_DESTINATION => Err(Reason::NoDestination),
        CHANGED => Err(Reason::ConfigurationChanged),
        _ => Err(Reason::Impossible),
    }
}

/// The result of [`answer`] when there is none.
const NOTHING: u64 = u64::MAX;

#[inline(always)]
fn answer<I: Family>(ctx: *mut xdp_md, complaint: u64) -> u64 {
    let mut packet = XdpPacket::new(ctx);
    let complaint = Complaint::from_bits(complaint);
    let exit =
        complaint.and_then(|complaint| icmp::answer::<I, XdpPacket>(&mut packet, &Maps, &maps::kernel(ctx), complaint));
    exit.map_or(NOTHING, Exit::bits)
}
