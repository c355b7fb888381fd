//! Builds what the demo shows and hands over to it.

use std::{os::unix::process::CommandExt as _, process::Command};

use anyhow::{Context as _, Result};

use crate::{
    build, machine, step,
    toolchain::{Tools, host_cargo},
};

/// Runs the demo. Returns only if it cannot be started.
pub(crate) fn run(tools: &Tools) -> Result<()> {
    build::objects(tools)?;
    let packages = ["--package", "lb-userspace", "--package", "xdpvs-bench", "--package", "xdpvs-tests"];
    step::show(host_cargo("build")?.arg("--release").args(packages).arg("--bins"))?;
    let demo = machine::root()?.join("target/release/xdpvs-demo");
    // In place of this process, so that Ctrl-C is the demo's alone, which then clears up.
    Err(Command::new(demo).env_remove("XDPVS").exec()).context("start the demo")
}
