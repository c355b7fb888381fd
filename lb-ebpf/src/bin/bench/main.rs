//! What measures the director's programs one packet at a time: a wrapper that makes every run of a repeated test run
//! begin with the same frame, and programs that do next to nothing, to know what the method itself costs.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod programs;

#[cfg(not(target_arch = "bpf"))]
fn main() {
    eprintln!("this is an eBPF program; build it with `cargo xtask build`");
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The kernel lets only GPL-compatible programs call the helpers used here; MIT OR Apache-2.0 code may say so.
#[cfg(target_arch = "bpf")]
#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
