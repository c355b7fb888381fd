//! The xdpvs data plane as a library.
//!
//! [`pipeline::process`] is the whole path of a packet. It is generic over three traits: the [`packet::Packet`] it reads
//! and rewrites, the [`tables::Tables`] it looks things up in, and the [`env::Env`] that is the kernel around it. The
//! programs under `src/bin` bind the traits to XDP and BPF maps; [`host`] binds them to plain memory, so that the same
//! code runs under the tests of an ordinary host.
//!
//! The library never panics: it indexes nothing, divides by nothing that may be zero, and meets every impossible table
//! miss with [`lb_common::reason::Reason::Impossible`].
//!
//! Values that may stand on the stack are single 64-bit words or aligned to them. The eBPF target is told that memory
//! may be accessed misaligned, which packets need; but the compiler then also copies structs on the stack in misaligned
//! pieces, which the verifier refuses. For the same reason nothing returns an enum with a payload of bytes.
#![cfg_attr(
    target_arch = "bpf",
    no_std,
    feature(asm_experimental_arch, core_intrinsics),
    expect(internal_features, reason = "the target has no stable atomic read-modify-write")
)]
#![deny(unsafe_code)]

pub mod ageing;
#[cfg(not(target_arch = "bpf"))]
pub mod audit;
pub mod bring;
mod cache;
pub mod decapsulate;
mod draw;
pub mod endpoint;
pub mod env;
pub mod flow_table;
pub mod forward;
#[cfg(not(target_arch = "bpf"))]
pub mod host;
pub mod icmp;
#[cfg(target_arch = "bpf")]
#[expect(unsafe_code, reason = "packet memory and helper calls of the kernel")]
pub mod kernel;
pub mod mark;
pub mod nat;
pub mod overload;
pub mod packet;
pub mod parse;
pub mod pipeline;
pub mod protocols;
pub mod related;
pub mod schedule;
pub mod tables;
pub mod template;
pub mod track;
pub mod tunnel;
pub mod upkeep;
#[expect(unsafe_code, reason = "declares which types may be read from raw packet bytes")]
pub mod wire;
