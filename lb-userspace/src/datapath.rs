//! The running instance: loading its programs, attaching them, opening its maps.

pub mod attach;
pub mod forwarding;
pub mod ipv6;
pub mod lifecycle;
pub mod load;
#[expect(unsafe_code, reason = "memory shared with the kernel")]
pub mod memory;
pub mod object;
pub mod open;
pub mod pace;
pub mod place;
pub mod run;
pub mod sizes;
