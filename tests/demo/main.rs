//! Shows xdpvs at work: real requests, by every forwarding method, to real web servers; what it counts meanwhile; what
//! a packet costs; and the first exercise of everybody who meets `ipvsadm`.
//!
//! Everything happens in network namespaces that are gone at the end, also after an interrupt or a failure.

#![forbid(unsafe_code)]

use std::{
    process::{Command, ExitCode},
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};
use lb_common::proto::Method;
use xdpvs_tests::{cast, family::Family, lab, program};

use crate::{child::Child, interrupt::Interrupt};

mod child;
mod exercise;
mod forwarding;
mod interrupt;
mod web;

/// The network of [`xdpvs_tests::network::Shape::TwoArmed`], for people.
const PICTURE: &str = "
Each host below is a network namespace, and the real servers run nginx:

  client ------- router ------- director ------- switch ------- real servers
  10.1.0.1          |        10.0.0.1, 10.2.0.1     |           10.2.0.11, .12, .13
                    |    service at 10.9.9.9:80     |
                    +--- replies of DR and IPIP ----+";

fn main() -> ExitCode {
    let shown = lab::require_root().and_then(|()| Interrupt::catch()).and_then(|interrupt| {
        // What fails after an interrupt fails because of it.
        demo(&interrupt).map_err(|error| interrupt.check().err().unwrap_or(error))
    });
    match shown {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn demo(interrupt: &Interrupt) -> Result<()> {
    let begun = Instant::now();
    // What a demo that was killed could not clear up.
    lab::sweep_instances("xdpvs-")?;
    println!("{PICTURE}");
    println!(
        "\nEach has IPv6 addresses of the same numbers, too: the service's is {}.",
        Family::Six.address(cast::VIP)
    );
    for method in [Method::Masq, Method::Route, Method::Tunnel] {
        forwarding::show(method, interrupt)?;
    }
    show_costs(interrupt)?;
    exercise::show(interrupt)?;
    println!(
        "\nThat is all, in {} seconds: every request was answered, and every server had its share.",
        begun.elapsed().as_secs()
    );
    Ok(())
}

fn title(text: &str) {
    println!("\n{text}\n{}\n", "=".repeat(text.chars().count()));
}

/// Shows nanoseconds per packet, measured here and now.
fn show_costs(interrupt: &Interrupt) -> Result<()> {
    title("What a packet costs: nanoseconds on this machine, above what the measurement itself costs");
    let bench = program::path()?.with_file_name("xdpvs-bench");
    ensure!(bench.is_file(), "no {}: run this as `cargo xtask demo`", bench.display());
    let words = ["packet", "--rounds", "3", "--flows", "1024"];
    println!("$ xdpvs-bench {}", words.join(" "));
    let mut command = Command::new(bench);
    command.args(words);
    // It clears up behind itself when it ends, so it is not ended before.
    let status = Child::spawn(&mut command).context("measure")?.wait()?;
    ensure!(status.success(), "the measurement failed ({status})");
    interrupt.check()
}
