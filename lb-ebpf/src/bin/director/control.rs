//! The control program, which carries out what the loader asks of the flow table and of the ageing timer.

use core::mem::offset_of;

use aya_ebpf::{
    bindings::{xdp_action, xdp_md},
    macros::xdp,
    programs::XdpContext,
};
use lb_common::{
    abi::{Brought, CONNECTIONS_MAX, ConnectionRecord, ControlRequest, control},
    sync::opaque,
};
use lb_ebpf::{
    ageing::{Sweep, What},
    bring,
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
            ageing::start(count, packet.read(offset_of!(ControlRequest, interval_ns))?)?;
            0
        }
        control::CLOCK => u64::from(maps::clock()?.now.0),
        control::FLUSH | control::FLUSH_SERVICE => {
            let service = kernel::hide(u64::from(operation == control::FLUSH_SERVICE));
            flush(first, count, What::Of { service, number: subject })
        }
        control::INSERT => insert(ctx, count),
        _ => return None,
    };
    let offset = offset_of!(ControlRequest, answer);
    packet.write(offset, answer as u32)?;
    packet.write(offset + 4, (answer >> 32) as u32)
}

#[inline(always)]
fn flush(first: u32, count: u32, what: What) -> u64 {
    let mut sweep = Sweep { tables: &Maps, first, what, ended: 0 };
    kernel::repeat(count, &mut sweep);
    sweep.ended
}

/// Creates the connections that follow the request.
#[inline(always)]
fn insert(ctx: *mut xdp_md, count: u32) -> u64 {
    let mut answer = 0;
    for index in 0..opaque(CONNECTIONS_MAX as u64) {
        if index >= u64::from(count) {
            break;
        }
        answer += 1 << (16 * (bring_one(ctx, index as u32) & 3));
    }
    answer
}

/// Creates the connection in record number `index`. Returns the number of a [`Brought`].
///
/// Verifier: a global function, which it looks at once, and not once for every connection.
#[unsafe(no_mangle)]
extern "C" fn bring_one(ctx: *mut xdp_md, index: u32) -> u64 {
    let brought = record(ctx, index).zip(maps::clock()).map(|(record, clock)| bring::bring(&Maps, clock, &record));
    brought.unwrap_or(Brought::Refused) as u64
}

#[inline(always)]
fn record(ctx: *mut xdp_md, index: u32) -> Option<ConnectionRecord> {
    let packet = XdpPacket::new(ctx);
    // Verifier: masked, for the offset into a packet must be seen to be small.
    let index = opaque(u64::from(index)) as usize & (CONNECTIONS_MAX - 1);
    let offset = size_of::<ControlRequest>() + index * size_of::<ConnectionRecord>();
    let [client, service, ports, dest, protocol_state, remaining] = packet.read(offset)?;
    Some(ConnectionRecord { client, service, ports, dest, protocol_state, remaining })
}
