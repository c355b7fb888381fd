//! Builds the eBPF objects, then the programs that embed them.

use std::ffi::OsString;

use anyhow::Result;

use crate::{
    step,
    toolchain::{Tools, host_cargo},
};

/// Builds the eBPF objects and `target/release/xdpvs`.
pub(crate) fn everything(tools: &Tools) -> Result<()> {
    objects(tools)?;
    program()?;
    println!("built target/release/xdpvs");
    Ok(())
}

/// Builds the eBPF objects to where the build scripts look for them.
pub(crate) fn objects(tools: &Tools) -> Result<()> {
    step::show(tools.cargo("build")?.arg("--bins"))
}

/// Builds the command line program.
pub(crate) fn program() -> Result<()> {
    step::show(host_cargo("build")?.args(["--release", "--package", "lb-userspace", "--bin", "xdpvs"]))
}

/// Builds everything and runs the bench.
pub(crate) fn bench(tools: &Tools, arguments: &[OsString]) -> Result<()> {
    objects(tools)?;
    step::show(host_cargo("run")?.args(["--release", "--package", "xdpvs-bench", "--"]).args(arguments))
}
