//! The pipeline's traits on what the kernel gives an XDP program.

use core::{cell::Cell, ffi::c_void, mem::offset_of, ptr};

use aya_ebpf::{
    bindings::{
        BPF_FIB_LKUP_RET_BLACKHOLE, BPF_FIB_LKUP_RET_FWD_DISABLED, BPF_FIB_LKUP_RET_NO_NEIGH,
        BPF_FIB_LKUP_RET_NOT_FWDED, BPF_FIB_LKUP_RET_PROHIBIT, BPF_FIB_LKUP_RET_SUCCESS, BPF_FIB_LOOKUP_SRC,
        bpf_fib_lookup as FibLookup, xdp_md,
    },
    helpers::generated::{
        bpf_csum_diff, bpf_fib_lookup, bpf_get_prandom_u32, bpf_jiffies64, bpf_loop, bpf_redirect, bpf_xdp_adjust_head,
        bpf_xdp_adjust_meta, bpf_xdp_adjust_tail,
    },
};
use lb_common::{
    abi::{NextHop, hop},
    addr::{Address, Ip4},
    checksum,
    jiffies::Jiffies,
    reason::Reason,
    sync::{Shared64, opaque},
};

use crate::{
    env::{Env, HandOver, Scan},
    forward::Exit,
    packet::Packet,
    wire::Wire,
};

/// Reads a pointer from the context.
///
/// Verifier: in assembly, or the compiler knows that the field has 32 bits, and keeps no more of the pointer on the stack.
macro_rules! load {
    ($ctx:expr, $field:ident) => {{
        let pointer: u64;
        // SAFETY: the kernel keeps the context valid while the program runs.
        unsafe {
            core::arch::asm!(
                "{pointer} = *(u32 *)({ctx} + {offset})",
                pointer = out(reg) pointer,
                ctx = in(reg) $ctx,
                offset = const core::mem::offset_of!(xdp_md, $field),
                options(nostack, readonly),
            )
        };
        pointer as usize
    }};
}

/// The loopback interface has this index in every network namespace.
const LOOPBACK: u32 = 1;

/// The frame of an XDP program.
///
/// An answer of [`crate::pipeline::Stages`] moves the frame behind the back of its caller, who must not use its own packet
/// after that.
pub struct XdpPacket {
    ctx: *mut xdp_md,
    start: usize,
    end: usize,
}

impl XdpPacket {
    /// The frame of the program that was given `ctx`.
    #[inline(always)]
    pub fn new(ctx: *mut xdp_md) -> Self {
        Self { ctx, start: load!(ctx, data), end: load!(ctx, data_end) }
    }

    /// Finds the frame again, after it has moved.
    #[inline(always)]
    fn moved(&mut self) {
        *self = Self::new(self.ctx);
    }

    /// The address of `len` bytes at `offset`, if the frame has them.
    #[inline(always)]
    fn at(&self, offset: usize, len: usize) -> Option<usize> {
        if core::intrinsics::is_val_statically_known(offset) {
            // SAFETY: no frame is at the end of the address space. Told so, the compiler leaves out checks that follow from
            // others.
            let (address, beyond) =
                unsafe { (self.start.unchecked_add(offset), self.start.unchecked_add(offset + len)) };
            return (beyond <= self.end).then_some(address);
        }
        // Verifier: opaque, or the compiler leaves out checks that the verifier cannot do without where the offset is not
        // constant.
        let address = self.start + offset;
        let beyond = opaque((address + len) as u64) as usize;
        (beyond <= self.end).then_some(address)
    }
}

impl Packet for XdpPacket {
    #[inline(always)]
    fn len(&self) -> usize {
        // Verifier: opaque, or the compiler subtracts 32-bit halves of pointers where it can.
        opaque((self.end - self.start) as u64) as usize
    }

    #[inline(always)]
    fn hide(&self, value: u64) -> u64 {
        hide(value)
    }

    #[inline(always)]
    fn read<T: Wire>(&self, offset: usize) -> Option<T> {
        let address = self.at(offset, size_of::<T>())?;
        // SAFETY: `at` has checked the bounds, and any bytes are a `T`.
        Some(unsafe { (address as *const T).read_unaligned() })
    }

    #[inline(always)]
    fn write<T: Wire>(&mut self, offset: usize, value: T) -> Option<()> {
        let address = self.at(offset, size_of::<T>())?;
        // SAFETY: `at` has checked the bounds; a `T` has no padding that could leak.
        unsafe { (address as *mut T).write_unaligned(value) };
        Some(())
    }

    #[inline(always)]
    fn write_words<const N: usize>(&mut self, offset: usize, words: [u32; N]) -> Option<()> {
        let address = self.at(offset, 4 * N)?;
        for (index, word) in words.into_iter().enumerate() {
            // One word at a time: of several at once the compiler makes a call of a copying function.
            // SAFETY: `at` has checked the bounds of all words.
            unsafe { (address as *mut u32).add(index).write_unaligned(word) };
        }
        Some(())
    }

    #[inline(always)]
    fn grow_head(&mut self, by: u16) -> Option<()> {
        // SAFETY: a helper call with the program's own context.
        let result = unsafe { bpf_xdp_adjust_head(self.ctx, -i32::from(by)) };
        self.moved();
        (result == 0).then_some(())
    }

    #[inline(always)]
    fn shrink_head(&mut self, by: u16) -> Option<()> {
        // SAFETY: a helper call with the program's own context.
        let result = unsafe { bpf_xdp_adjust_head(self.ctx, i32::from(by)) };
        self.moved();
        (result == 0).then_some(())
    }

    #[inline(always)]
    fn truncate(&mut self, len: usize) -> Option<()> {
        let by = len as i32 - self.len() as i32;
        if by == 0 {
            return Some(());
        }
        // SAFETY: a helper call with the program's own context.
        let result = unsafe { bpf_xdp_adjust_tail(self.ctx, by) };
        self.moved();
        (by < 0 && result == 0).then_some(())
    }

    #[inline(always)]
    fn sum(&self, offset: usize, len: usize) -> Option<u64> {
        u64::try_from(sum_packet(self.ctx, offset as u32, len as u32)).ok()
    }
}

/// Largest packet whose bytes can be summed.
const SUM_MAX: u32 = 16 * 1024;
/// The longest piece that is summed at once: the most that `bpf_csum_diff` takes.
const SUM_PIECE: u32 = 512;

/// Always 0, which the verifier cannot know: the memory of this variable could be written.
static ZERO: Shared64 = Shared64::ZERO;

/// Returns `value` in a way that the verifier cannot see through. It then follows the rest of a program once, and not
/// once for every value that it has seen.
#[inline(always)]
pub fn hide(value: u64) -> u64 {
    value.wrapping_add(ZERO.load())
}

/// The folded sum of `len` bytes at `offset`, or a negative number when the frame ends before.
///
/// Sums by `bpf_csum_diff` over a ladder of constant sizes.
///
/// Verifier: the helper wants a length whose bounds check it can see at the same pointer, which a variable length never
/// gives. A global function, because the verifier looks at those once and not once for each of their callers.
#[unsafe(no_mangle)]
pub extern "C" fn sum_packet(ctx: *mut xdp_md, offset: u32, len: u32) -> i64 {
    if ctx.is_null() {
        return -1;
    }
    sum(&XdpPacket::new(ctx), offset, len).map_or(-1, |sum| i64::from(checksum::fold(sum)))
}

#[inline(always)]
fn sum(packet: &XdpPacket, mut offset: u32, mut len: u32) -> Option<u64> {
    if len > SUM_MAX {
        return None;
    }
    let mut total = 0;
    for _ in 0..SUM_MAX / SUM_PIECE {
        if len < SUM_PIECE {
            break;
        }
        total = packet.sum_piece::<{ SUM_PIECE as usize }>(&mut offset, total)?;
        len -= SUM_PIECE;
    }
    macro_rules! rungs {
        ($($size:literal)+) => {$(
            if len & $size != 0 {
                total = packet.sum_piece::<$size>(&mut offset, total)?;
            }
        )+};
    }
    rungs!(256 128 64 32 16 8 4);
    let mut rest = 0u64;
    if len & 2 != 0 {
        rest += u64::from(packet.read::<u16>((offset & OFFSET_MASK) as usize)?);
        offset = hide(u64::from(offset + 2)) as u32;
    }
    if len & 1 != 0 {
        rest += u64::from(u16::from_ne_bytes([packet.read::<u8>((offset & OFFSET_MASK) as usize)?, 0]));
    }
    Some(u64::from(total) + rest)
}

/// Verifier: an offset must be seen to be small for the pointer to stay a packet pointer.
const OFFSET_MASK: u32 = 0x7fff;

impl XdpPacket {
    /// Adds the sum of the `N` bytes at `offset` to `seed`, and moves `offset` behind them.
    #[inline(always)]
    fn sum_piece<const N: usize>(&self, offset: &mut u32, seed: u32) -> Option<u32> {
        let address = self.at((*offset & OFFSET_MASK) as usize, N)?;
        *offset = hide(u64::from(*offset + N as u32)) as u32;
        // SAFETY: `at` has checked that `N` bytes are there.
        let sum = unsafe { bpf_csum_diff(ptr::null_mut(), 0, address as *mut u32, N as u32, seed) };
        u32::try_from(sum).ok()
    }
}

/// What the XDP program leaves in front of a packet for the TC program behind it.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Errand {
    /// [`Errand::MAGIC`].
    pub magic: u32,
    /// The interface to send it out of.
    pub ifindex: u32,
    /// Address family of the gateway.
    pub family: u32,
    /// The neighbour to send it to; IPv4 in the first word.
    pub gateway: [u32; 4],
}

impl Errand {
    /// Tells an errand from metadata of other programs.
    pub const MAGIC: u32 = 0x7864_7076;
}

impl HandOver for XdpPacket {
    #[inline(always)]
    fn hand_over(&mut self, hop: &NextHop) -> Option<()> {
        const LEN: usize = size_of::<Errand>();
        // SAFETY: a helper call with the program's own context.
        let result = unsafe { bpf_xdp_adjust_meta(self.ctx, -(LEN as i32)) };
        self.moved();
        let address = load!(self.ctx, data_meta);
        if result != 0 || address + LEN > self.start {
            return None;
        }
        let errand = Errand {
            magic: Errand::MAGIC,
            ifindex: hop.ifindex.get(),
            family: hop.gateway_family.get(),
            gateway: hop.gateway.get(),
        };
        // SAFETY: the bounds have been checked, and metadata is aligned to four bytes.
        unsafe { (address as *mut Errand).write(errand) };
        Some(())
    }
}

/// The kernel, around a program that was given `ctx`.
pub struct Kernel {
    /// The program's context.
    pub ctx: *mut xdp_md,
    /// Ticks per second.
    pub hz: u32,
}

impl Env for Kernel {
    #[inline(always)]
    fn jiffies(&self) -> Jiffies {
        jiffies()
    }

    #[inline(always)]
    fn hz(&self) -> u32 {
        self.hz
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        // SAFETY: the helper has no preconditions.
        unsafe { bpf_get_prandom_u32() as u32 }
    }

    #[inline(always)]
    fn ingress(&self) -> u32 {
        // SAFETY: the kernel keeps the context valid while the program runs.
        unsafe { (*self.ctx).ingress_ifindex }
    }

    #[inline(always)]
    fn route<A: Address>(&self, destination: A, source: A, hop: &NextHop) -> Result<(), Reason> {
        fib_lookup(self.ctx, &destination, &source, hop)
    }

    #[inline(always)]
    fn scan<S: Scan>(&self, count: u32, scan: &mut S) {
        repeat(count, scan);
    }
}

/// Calls `scan` for 0, 1, 2, … until it has enough or `count` is reached.
#[inline(always)]
pub fn repeat<S: Scan>(count: u32, scan: &mut S) {
    unsafe extern "C" fn visit<S: Scan>(index: u32, scan: *mut c_void) -> i64 {
        // SAFETY: `bpf_loop` passes on the pointer below, and nobody else uses it meanwhile.
        let scan = unsafe { &mut *scan.cast::<S>() };
        i64::from(!scan.visit(index))
    }
    scan.hide(hide);
    let callback = visit::<S> as *mut c_void;
    // SAFETY: the callback has the signature that `bpf_loop` calls, and `scan` outlives the call.
    unsafe { bpf_loop(count, callback, ptr::from_mut(scan).cast(), 0) };
}

/// The tick counter.
#[inline(always)]
pub fn jiffies() -> Jiffies {
    // SAFETY: the helper has no preconditions.
    Jiffies(unsafe { bpf_jiffies64() } as u32)
}

/// Asks the kernel's routing table.
///
/// The interface given is the loopback, because the kernel routes what the host itself sends as if it came from there:
/// rules and routes apply as they do to ip_vs, and forwarding need not be on for the interface the packet came in by
/// (for IPv4, `fl4.flowi4_iif` in
/// <https://github.com/torvalds/linux/blob/v6.12/net/core/filter.c#L5908>, `LOOPBACK_IFINDEX` in
/// <https://github.com/torvalds/linux/blob/v6.12/net/ipv4/route.c#L2679>).
#[inline(never)]
fn fib_lookup<A: Address>(ctx: *mut xdp_md, destination: &A, source: &A, hop: &NextHop) -> Result<(), Reason> {
    const _: () = assert!(size_of::<FibLookup>() == size_of::<[u64; 8]>() && offset_of!(FibLookup, ifindex) == 8);
    const _: () =
        assert!(offset_of!(FibLookup, __bindgen_anon_3) == 16 && offset_of!(FibLookup, __bindgen_anon_4) == 32);
    let halves = |words: [u32; 4]| [[words[0], words[1]], [words[2], words[3]]].map(pair);
    // An IPv4 address is the first word.
    let ([from, from_rest], [to, to_rest]) = (halves(source.words()), halves(destination.words()));
    // Verifier: word by word, so that all is aligned, and opaque, or the compiler would call a function to write zeros. That one
    // would have a stack frame, and Linux 6.1 counts at least 32 bytes for each.
    let mut query = [u64::from(A::FAMILY), u64::from(LOOPBACK), from, from_rest, to, to_rest, opaque(0), opaque(0)];
    // SAFETY: a plain C struct of this size, for which any bytes are a value, and which is aligned to less.
    let query = unsafe { &mut *query.as_mut_ptr().cast::<FibLookup>() };
    // SAFETY: a helper call with the program's own context and a struct of the size given.
    let result =
        unsafe { bpf_fib_lookup(ctx.cast(), ptr::from_mut(query), size_of::<FibLookup>() as i32, BPF_FIB_LOOKUP_SRC) };
    const SUCCESS: i64 = BPF_FIB_LKUP_RET_SUCCESS as i64;
    const NO_NEIGH: i64 = BPF_FIB_LKUP_RET_NO_NEIGH as i64;
    const NOT_FWDED: i64 = BPF_FIB_LKUP_RET_NOT_FWDED as i64;
    const FWD_DISABLED: i64 = BPF_FIB_LKUP_RET_FWD_DISABLED as i64;
    const BLACKHOLE: i64 = BPF_FIB_LKUP_RET_BLACKHOLE as i64;
    const PROHIBIT: i64 = BPF_FIB_LKUP_RET_PROHIBIT as i64;
    match result {
        SUCCESS => {
            hop.kind.set(hop::VIA);
            // SAFETY: every variant of the union is plain data.
            hop.mtu.set(u32::from(unsafe { query.__bindgen_anon_1.mtu_result }));
            for (mac, word) in hop.macs.iter().zip(macs(query)) {
                mac.set(word);
            }
        }
        NO_NEIGH => {
            hop.kind.set(hop::UNRESOLVED);
            // The kernel has not filled it in; the interface enforces it on this one packet.
            hop.mtu.set(u32::MAX);
        }
        NOT_FWDED => {
            hop.kind.set(hop::LOCAL);
            hop.mtu.set(u32::MAX);
        }
        FWD_DISABLED => return Err(Reason::ForwardingOff),
        BLACKHOLE..=PROHIBIT => return Err(Reason::NoRoute),
        _ => return Err(Reason::RouteUnsupported),
    }
    hop.ifindex.set(query.ifindex);
    let family = u32::from(query.family);
    hop.gateway_family.set(family);
    // SAFETY: every variant of the unions is plain data.
    let (source, gateway) = unsafe { (&query.__bindgen_anon_3.ipv6_src, &query.__bindgen_anon_4.ipv6_dst) };
    keep(&hop.source, source, A::FAMILY);
    keep(hop.gateway.as_array_of_cells(), gateway, family);
    Ok(())
}

/// Two words of memory as one, the first at the lower address.
#[inline(always)]
const fn pair(words: [u32; 2]) -> u64 {
    words[0] as u64 | (words[1] as u64) << 32
}

/// Keeps an address of this family, of which the kernel has written all the words, or the first.
///
/// Verifier: from memory to memory, for the stack is short.
#[inline(always)]
fn keep(kept: &[Cell<u32>; 4], words: &[u32; 4], family: u32) {
    for (index, (kept, word)) in kept.iter().zip(words).enumerate() {
        kept.set(if index > 0 && family == Ip4::FAMILY { 0 } else { *word });
    }
}

/// The two addresses at the start of an Ethernet header: the neighbour's, then the interface's.
#[inline(always)]
fn macs(query: &FibLookup) -> [u32; 3] {
    // Verifier: in halves of words, which both are aligned to on the stack.
    let half = |mac: &[u8; 6], index: usize| {
        // SAFETY: both addresses begin at an even offset of a struct aligned to four bytes, and `index` is below 3.
        u32::from(unsafe { mac.as_ptr().cast::<u16>().add(index).read_volatile() })
    };
    let (to, from) = (&query.dmac, &query.smac);
    [half(to, 0) | half(to, 1) << 16, half(to, 2) | half(from, 0) << 16, half(from, 1) | half(from, 2) << 16]
}

/// The XDP action for a packet that leaves this way.
#[inline(always)]
pub fn action(exit: Exit) -> u32 {
    match exit.interface() {
        // SAFETY: the helper has no preconditions.
        Some(ifindex) => unsafe { bpf_redirect(ifindex, 0) as u32 },
        None => exit.action(),
    }
}
