//! The control program, which carries out what the loader asks of the flow table and of the ageing timer.

use core::mem::offset_of;

use aya_ebpf::{
    bindings::{xdp_action, xdp_md},
    macros::xdp,
    programs::XdpContext,
};
use lb_common::{
    abi::{
        Brought, CONNECTIONS_MAX, CONNECTIONS6_MAX, ConnectionDetails, ConnectionRecord, ConnectionRecord6,
        ControlRequest, control, slot,
    },
    addr::{Address, Ip4, Ip6},
    sync::opaque,
};
use lb_ebpf::{
    ageing::{Sweep, Thinning, What, of},
    bring,
    flow_table::Buckets,
    kernel::{self, XdpPacket},
    packet::Packet,
};

use crate::{
    ageing,
    maps::{self, Maps},
};

/// Carries out one request of the loader, which is the frame, and answers in its place. Run by `BPF_PROG_TEST_RUN`.
#[xdp]
pub(crate) fn control(ctx: XdpContext) -> u32 {
    match carry_out(ctx.ctx) {
        Some(()) => xdp_action::XDP_PASS,
        None => xdp_action::XDP_ABORTED,
    }
}

#[inline(always)]
fn carry_out(ctx: *mut xdp_md) -> Option<()> {
    let mut packet = XdpPacket::new(ctx);
    let word = |field: usize| packet.read::<u32>(field);
    let operation = word(offset_of!(ControlRequest, operation))?;
    let first = word(offset_of!(ControlRequest, first))?;
    let count = word(offset_of!(ControlRequest, count))?;
    let subject = u64::from(word(offset_of!(ControlRequest, subject))?);
    let answer = match operation {
        control::START_AGEING => {
            ageing::start(count, packet.read(offset_of!(ControlRequest, interval_ns))?, subject as u32)?;
            0
        }
        control::CLOCK => u64::from(maps::clock()?.now.0),
        control::FLUSH | control::FLUSH_SERVICE | control::FLUSH_REMOVED => {
            let (kind, number) = match operation {
                control::FLUSH => (of::DEST, subject),
                control::FLUSH_SERVICE => (of::SERVICE, subject),
                _ => (of::STATE, u64::from(slot::REMOVED)),
            };
            flush(first, count, What { kind, number })
        }
        control::INSERT => insert(count, CONNECTIONS_MAX, |index| bring_one(ctx, index)),
        control::INSERT6 => insert(count, CONNECTIONS6_MAX, |index| bring_one6(ctx, index)),
        _ => return None,
    };
    let offset = offset_of!(ControlRequest, answer);
    packet.write(offset, answer as u32)?;
    packet.write(offset + 4, (answer >> 32) as u32)
}

#[inline(always)]
fn flush(first: u32, count: u32, what: What) -> u64 {
    let mut sweep = Sweep { tables: &Maps, first, what, thinning: Thinning::NONE, ended: 0 };
    kernel::repeat(count, &mut sweep);
    sweep.ended
}

/// Creates the connections that follow the request, `most` at the most.
#[inline(always)]
fn insert(count: u32, most: usize, bring_one: impl Fn(u32) -> u64) -> u64 {
    let mut answer = 0;
    for index in 0..opaque(most as u64) {
        if index >= u64::from(count) {
            break;
        }
        answer += 1 << (16 * (bring_one(index as u32) & 3));
    }
    answer
}

/// Creates the connection in the IPv4 record number `index`. Returns the number of a [`Brought`].
///
/// Verifier: a global function, which it looks at once, and not once for every connection.
#[unsafe(no_mangle)]
extern "C" fn bring_one(ctx: *mut xdp_md, index: u32) -> u64 {
    // Verifier: masked, for the offset into a packet must be seen to be small.
    let index = opaque(u64::from(index)) as usize & (CONNECTIONS_MAX - 1);
    let offset = size_of::<ControlRequest>() + index * size_of::<ConnectionRecord>();
    let ends = [offset_of!(ConnectionRecord, client), offset_of!(ConnectionRecord, service)];
    let details = offset + offset_of!(ConnectionRecord, details);
    bring_from::<Ip4>(ctx, ends.map(|end| offset + end), details)
}

/// [`bring_one`] of an IPv6 record.
#[unsafe(no_mangle)]
extern "C" fn bring_one6(ctx: *mut xdp_md, index: u32) -> u64 {
    let index = opaque(u64::from(index)) as usize & (CONNECTIONS6_MAX - 1);
    let offset = size_of::<ControlRequest>() + index * size_of::<ConnectionRecord6>();
    let ends = [offset_of!(ConnectionRecord6, client), offset_of!(ConnectionRecord6, service)];
    let details = offset + offset_of!(ConnectionRecord6, details);
    bring_from::<Ip6>(ctx, ends.map(|end| offset + end), details)
}

/// Creates the connection whose addresses and details stand at these places of the frame.
#[inline(always)]
fn bring_from<A: Address>(ctx: *mut xdp_md, ends: [usize; 2], details: usize) -> u64
where
    Maps: Buckets<A::Entry>,
{
    let packet = XdpPacket::new(ctx);
    let brought = || {
        let [client, service] = ends;
        let ends = (address::<A>(&packet, client)?, address::<A>(&packet, service)?);
        let [ports, dest, protocol_state, remaining] = packet.read(details)?;
        let details = ConnectionDetails { ports, dest, protocol_state, remaining };
        Some(bring::bring(&Maps, maps::clock()?, ends, &details))
    };
    brought().unwrap_or(Brought::Refused) as u64
}

#[inline(always)]
fn address<A: Address>(packet: &XdpPacket, offset: usize) -> Option<A> {
    if A::FAMILY == Ip6::FAMILY {
        Some(A::from_words(packet.read(offset)?))
    } else {
        Some(A::from_words([packet.read(offset)?, 0, 0, 0]))
    }
}
