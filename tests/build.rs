//! Finds the eBPF object with the measuring programs, for the bench as well as for tests. `cargo xtask build` makes it.

use std::{env, path::Path};

fn main() {
    const VARIABLE: &str = "XDPVS_BENCH_OBJECT";
    println!("cargo::rerun-if-env-changed={VARIABLE}");
    let default = format!("{}/../target/bpf/bpfel-unknown-none/release/bench", env!("CARGO_MANIFEST_DIR"));
    let path = env::var(VARIABLE).unwrap_or(default);
    println!("cargo::rerun-if-changed={path}");
    if !Path::new(&path).exists() {
        println!("cargo::error=the eBPF object {path} does not exist: run `cargo xtask build` first");
    }
    println!("cargo::rustc-env={VARIABLE}={path}");
}
