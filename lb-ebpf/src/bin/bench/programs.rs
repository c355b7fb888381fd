//! The wrapper and the floors.

use aya_ebpf::{
    bindings::xdp_action,
    btf_maps::{Array, ProgramArray},
    helpers::generated::bpf_xdp_adjust_head,
    macros::{btf_map, xdp},
    programs::XdpContext,
};
use lb_common::{
    abi::bench::{Setup, pick},
    checksum,
    hash::{Seed, scale},
};
use lb_ebpf::{kernel::XdpPacket, packet::Packet};

/// `BPF_F_MMAPABLE`.
const MMAPABLE: usize = 1 << 10;

#[btf_map]
static SETUP: Array<Setup, 1, MMAPABLE> = Array::new();

/// Slot 0: the program that is measured.
#[btf_map]
static MEASURED: ProgramArray<1> = ProgramArray::new();

/// As many cache lines as the flow table has; the loader says how many.
#[btf_map]
static LINES: Array<[u64; 8], 1, MMAPABLE> = Array::new();

/// Makes the frame what it was, from one of many flows, and gives it to the program that is measured.
#[xdp]
pub(crate) fn reset(ctx: XdpContext) -> u32 {
    if restore(&ctx).is_none() {
        return xdp_action::XDP_ABORTED;
    }
    // SAFETY: the program in the slot takes the same context.
    unsafe { MEASURED.tail_call(&ctx, 0) };
    xdp_action::XDP_ABORTED
}

/// [`reset`] of an IPv6 frame.
#[xdp]
pub(crate) fn reset6(ctx: XdpContext) -> u32 {
    if restore6(&ctx).is_none() {
        return xdp_action::XDP_ABORTED;
    }
    // SAFETY: the program in the slot takes the same context.
    unsafe { MEASURED.tail_call(&ctx, 0) };
    xdp_action::XDP_ABORTED
}

/// Gives the frame the length that it had. Returns it, and the address and port of the next client as they stand in a
/// packet.
#[inline(always)]
fn begin(ctx: &XdpContext, setup: &Setup) -> Option<(XdpPacket, u32, u32)> {
    let grown = XdpPacket::new(ctx.ctx).len() as i32 - setup.len.load() as i32;
    if grown != 0 {
        // SAFETY: a helper call with the program's own context.
        if unsafe { bpf_xdp_adjust_head(ctx.ctx, grown) } != 0 {
            return None;
        }
    }
    let (flow, flows) = (setup.next_flow.load(), setup.flows.load());
    let (flow, next) = match setup.order.load() {
        pick::SAME => (0, 0),
        // A full-period generator modulo a power of two (Hull and Dobell), of which the high bits are the best.
        pick::RANDOM => (scale(flow, flows), flow.wrapping_mul(0x0019_660d).wrapping_add(0x3c6e_f35f)),
        _ => {
            let flow = if flow < flows { flow } else { 0 };
            (flow, flow + 1)
        }
    };
    setup.next_flow.store(next);
    let addr = (setup.first_addr.load().wrapping_add(flow >> 6)).to_be();
    let port = (1024 + ((flow & 63) << 4) as u16).to_be();
    Some((XdpPacket::new(ctx.ctx), addr, u32::from(port)))
}

/// The ports of a frame that has these, with the client's in its place.
#[inline(always)]
fn with_port(ports: u32, port: u32, reply: bool) -> u32 {
    if reply { ports & 0xffff | port << 16 } else { ports & 0xffff_0000 | port }
}

#[inline(always)]
fn restore(ctx: &XdpContext) -> Option<()> {
    let setup = SETUP.get(0)?;
    let (mut packet, addr, port) = begin(ctx, setup)?;
    let check = !checksum::fold(u64::from(setup.header_sum.load()) + u64::from(addr));

    // In the units that programs read: a load that spans two stores which have not reached the cache yet waits for both,
    // and that wait would be counted as the program's.
    let word = |index: usize| setup.head[index].load();
    let reply = setup.reply.load() != 0;
    let (source, destination) = if reply { (word(6), addr) } else { (addr, word(7)) };
    packet.write_words(0, [word(0), word(1), word(2)])?;
    packet.write(12, setup.frame_type.load() as u16)?;
    packet.write_words(
        14,
        [
            word(3),
            word(4),
            word(5) & 0xffff | u32::from(check) << 16,
            source,
            destination,
            with_port(word(8), port, reply),
            word(9),
            word(10),
            word(11),
            word(12),
            word(13),
        ],
    )
}

#[inline(always)]
fn restore6(ctx: &XdpContext) -> Option<()> {
    let setup = SETUP.get(0)?;
    let (mut packet, addr, port) = begin(ctx, setup)?;
    let word = |index: usize| setup.head[index].load();
    let reply = setup.reply.load() != 0;
    let (source, destination) = if reply { (word(8), addr) } else { (addr, word(12)) };
    packet.write_words(0, [word(0), word(1), word(2)])?;
    packet.write(12, setup.frame_type.load() as u16)?;
    packet.write_words(
        14,
        [
            word(3),
            word(4),
            word(5),
            word(6),
            word(7),
            source,
            word(9),
            word(10),
            word(11),
            destination,
            with_port(word(13), port, reply),
            word(14),
            word(15),
            word(16),
            word(17),
        ],
    )
}

/// The cheapest program that sends a frame back.
#[xdp]
pub(crate) fn floor_transmit(_ctx: XdpContext) -> u32 {
    xdp_action::XDP_TX
}

/// The cheapest program that looks at one cache line of a table, which one depends on the client, and sends the frame
/// back.
#[xdp]
pub(crate) fn touch(ctx: XdpContext) -> u32 {
    let client =
        XdpPacket::new(ctx.ctx).read::<[u32; 3]>(26).map(|[addr, _, ports]| u64::from(addr) << 32 | u64::from(ports));
    let seed = Seed::new([0x9e37_79b9_7f4a_7c15; 3]);
    let line = client.and_then(|client| LINES.get(scale(seed.quick_hash(client), setup_lines())));
    match line {
        // Nearly always: lines are zero.
        Some(line) if line[0] != u64::MAX => xdp_action::XDP_TX,
        _ => xdp_action::XDP_ABORTED,
    }
}

#[inline(always)]
fn setup_lines() -> u32 {
    SETUP.get(0).map_or(1, |setup| setup.lines.load())
}

/// The cheapest program that leaves a frame to the host.
#[xdp]
pub(crate) fn floor_pass(_ctx: XdpContext) -> u32 {
    xdp_action::XDP_PASS
}

/// The cheapest program that puts 20 bytes before a frame, writes two headers and sends it back.
#[xdp]
pub(crate) fn floor_push(ctx: XdpContext) -> u32 {
    let mut packet = XdpPacket::new(ctx.ctx);
    match packet.grow_head(20).and_then(|()| packet.write(0, [0u16; 17])) {
        Some(()) => xdp_action::XDP_TX,
        None => xdp_action::XDP_ABORTED,
    }
}

/// The cheapest program that puts 40 bytes before a frame, writes two headers and sends it back.
#[xdp]
pub(crate) fn floor_push6(ctx: XdpContext) -> u32 {
    let mut packet = XdpPacket::new(ctx.ctx);
    match packet.grow_head(40).and_then(|()| packet.write(0, [0u16; 27])) {
        Some(()) => xdp_action::XDP_TX,
        None => xdp_action::XDP_ABORTED,
    }
}
