//! xdpvs in user space: loads the data plane, keeps its configuration, shows what it does.
//!
//! Commands are short-lived: they open the pins of an instance, read or change its maps, and end. Nothing of ours has to
//! run for packets to be forwarded.
#![deny(unsafe_code)]

pub mod control;
pub mod datapath;
pub mod error;
pub mod netlink;
pub mod realserver;
