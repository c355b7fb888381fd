//! Finds the eBPF objects that the program embeds. `cargo xtask build` makes them and says where they are.

use std::{env, path::Path};

fn main() {
    for (variable, name) in [("XDPVS_DIRECTOR_OBJECT", "director"), ("XDPVS_REALSERVER_OBJECT", "realserver")] {
        println!("cargo::rerun-if-env-changed={variable}");
        let default = format!("{}/../target/bpf/bpfel-unknown-none/release/{name}", env!("CARGO_MANIFEST_DIR"));
        let path = env::var(variable).unwrap_or(default);
        println!("cargo::rerun-if-changed={path}");
        if !Path::new(&path).exists() {
            println!("cargo::error=the eBPF object {path} does not exist: run `cargo xtask build` first");
        }
        println!("cargo::rustc-env={variable}={path}");
    }
}
