//! The flow table, alone: against a plain map, under every interleaving of a few accesses, and on the CPUs of this machine.

mod interleavings;
mod model;
mod scheduler;
mod table;
mod templates;
mod threads;
