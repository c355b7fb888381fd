//! Measures what xdpvs costs. Every figure is printed with the floor of the method that gave it.

use anyhow::Result;
use clap::{Parser, Subcommand};

mod packet;
mod scale;
mod site;

#[derive(Parser)]
#[command(name = "cargo xtask bench", about = "Measures what xdpvs costs")]
struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Nanoseconds per packet, one packet at a time, above the floor of the method
    Packet(packet::Options),
    /// The flow table by its fill: what packets and new connections cost, and how many find no room
    Scale(scale::Options),
}

fn main() -> Result<()> {
    xdpvs_tests::lab::require_root()?;
    match Arguments::parse().what {
        What::Packet(options) => packet::run(&options),
        What::Scale(options) => scale::run(&options),
    }
}
