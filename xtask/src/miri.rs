//! Runs the flow table's tests under Miri, which knows of undefined behaviour, data races, and memory that is as weakly
//! ordered as the language allows.

use anyhow::{Context as _, Result, ensure};

use crate::{
    machine,
    step::{self, Log},
    toolchain::{NIGHTLY, has_rustup, nightly_with_miri, rustup},
};

/// What is run, by the arguments of `cargo miri test` and those of Miri.
///
/// Left out is what would take minutes and say nothing more: statistics, and the orders that shuttle makes, which switches
/// stacks in a way that Miri cannot follow.
const RUNS: [(&str, &[&str], &str); 3] = [
    (
        "layouts and shared words",
        &["--package", "lb-common", "--lib", "--", "sync", "abi", "flow", "--skip", "every_claim", "--skip", "pairs"],
        "",
    ),
    ("the flow table and a map", &["--package", "lb-ebpf", "--test", "flow_table", "--", "model"], ""),
    (
        "the flow table and four threads, eight times",
        &["--package", "lb-ebpf", "--test", "flow_table", "--", "threads"],
        "-Zmiri-many-seeds=0..8 -Zmiri-preemption-rate=0.1",
    ),
];

/// Runs all of it.
pub(crate) fn run() -> Result<()> {
    let toolchain = toolchain()?;
    let root = machine::root()?;
    for (heading, arguments, flags) in RUNS {
        let mut command = rustup(&["run", &toolchain, "cargo", "miri", "test", "--target-dir"]);
        command.arg(root.join("target/miri")).args(arguments).current_dir(&root);
        // proptest asks for the working directory.
        command.env("MIRIFLAGS", format!("-Zmiri-disable-isolation {flags}"));
        step::headed(heading, || step::show(&mut command))?;
    }
    Ok(())
}

/// A nightly that has Miri, which is installed if there is none.
fn toolchain() -> Result<String> {
    ensure!(has_rustup(), "Miri comes by rustup alone: get it from https://rustup.rs, then run this again");
    if let Some(name) = nightly_with_miri() {
        return Ok(name);
    }
    let install = ["toolchain", "install", NIGHTLY, "--no-self-update", "--profile", "minimal"];
    let mut command = rustup(&install);
    command.args(["--component", "miri,rust-src"]);
    let what = format!("installing {NIGHTLY} by rustup, which has Miri");
    let mut log = Log::new()?;
    log.run(&what, &mut command, "check the network, then run this again")?;
    nightly_with_miri().with_context(|| format!("installed, but not usable: Miri: see {}", log.path().display()))
}
