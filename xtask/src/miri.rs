//! Runs the flow table's tests under Miri, which knows of undefined behaviour, data races, and memory that is as weakly
//! ordered as the language allows.

use anyhow::{Context as _, Result, ensure};

use crate::{
    machine, step,
    toolchain::{NIGHTLY, has_rustup, rustup},
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

/// The first nightly that has Miri.
fn toolchain() -> Result<String> {
    let remedy =
        format!("run `rustup toolchain install {NIGHTLY} --profile minimal --component miri --component rust-src`");
    ensure!(has_rustup(), "Miri comes by rustup alone: get it from https://rustup.rs, then {remedy}");
    let list = step::read(&mut rustup(&["toolchain", "list"]))?;
    let mut names = list.lines().filter_map(|line| line.split_whitespace().next());
    let has_miri = |name: &&str| step::read(&mut rustup(&["run", name, "cargo", "miri", "--version"])).is_ok();
    let found = names.find(|name| name.starts_with("nightly") && has_miri(name));
    found.map(str::to_owned).with_context(|| format!("no nightly has Miri: {remedy}"))
}
