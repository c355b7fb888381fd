//! Replays records of the real ip_vs, as far as they are about what xdpvs does.
//!
//! What is left out is left out by rules about the records themselves, and how many are replayed and left out is asserted.

mod command;
mod packets;
mod persistence;
mod sched;
mod sctp;
mod sessions;
mod states;
mod table;
