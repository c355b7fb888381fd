//! What the xdpvs data plane and its loader must agree on: the layout of every map value, and the pure arithmetic that
//! both sides compute (checksums, hashes, state tables, scheduler tables).
//!
//! The crate knows nothing of aya, of the kernel, or of how a packet reaches it. It builds for the host and for
//! `bpfel-unknown-none`; it allocates only under the `std` feature.
#![cfg_attr(not(any(feature = "std", test)), no_std)]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch, core_intrinsics))]
#![cfg_attr(
    target_arch = "bpf",
    expect(internal_features, reason = "the target has no stable atomic read-modify-write")
)]
#![deny(unsafe_code)]

pub mod abi;
pub mod addr;
pub mod checksum;
#[cfg(all(feature = "crash", not(target_arch = "bpf")))]
pub mod crash;
pub mod crc32c;
pub mod decapsulation;
pub mod defence;
pub mod event;
pub mod flow;
pub mod hash;
#[cfg(all(feature = "interleave", not(target_arch = "bpf")))]
pub mod interleave;
pub mod jiffies;
pub mod mark;
pub mod overload;
pub mod proto;
pub mod rate;
pub mod reason;
pub mod sched;
pub mod sctp;
#[expect(unsafe_code, reason = "the one place where shared memory is touched")]
pub mod sync;
pub mod tcp;
pub mod timeout;
