//! What a person types: `cargo xtask setup`, `build`, `demo`, `test`, `vm`, `mutate`, `miri` and `bench`.

#![forbid(unsafe_code)]

use std::{ffi::OsString, process::ExitCode};

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::{setup::Scope, toolchain::Kind};

mod build;
mod demo;
mod machine;
mod miri;
mod mutate;
mod setup;
mod step;
mod test;
mod toolchain;
mod vm;

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    about = "Sets up, builds, shows, tests and measures xdpvs",
    arg_required_else_help = true
)]
struct Arguments {
    /// The tool chain for the eBPF programs; without this, the one that the machine offers
    #[arg(long, global = true, env = "XDPVS_TOOLCHAIN", value_enum)]
    toolchain: Option<Kind>,
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Installs what the other tasks need and this machine lacks
    Setup {
        /// Only say what is missing, and fail if anything is
        #[arg(long)]
        check: bool,
    },
    /// Builds target/release/xdpvs, one file with the eBPF programs inside
    Build,
    /// Sends real requests through a director to three real servers, by NAT, DR and IPIP
    Demo,
    /// Checks formatting and lints, builds, and runs every test
    Test,
    /// Runs tests on kernels of Debian in virtual machines, and prints a table
    Vm {
        /// Versions, such as 6.1, or `newest`; without any, 6.1, 6.12 and newest
        kernels: Vec<String>,
        /// Test programs, such as `journal`, or `traffic:nat` for those with a word in their names; without any, all eBPF
        /// programs are loaded, and packet cases and a laboratory run in brief
        #[arg(last = true)]
        tests: Vec<String>,
    },
    /// Breaks the flow table's protocol in many ways, one at a time, and fails if the tests do not notice
    Mutate {
        /// Only ways with one of these words in what they are called, such as `template`
        words: Vec<String>,
    },
    /// Runs the flow table's tests under Miri, which is installed if it is missing
    Miri,
    /// Measures: the arguments go to the bench, try `cargo xtask bench --help`
    #[command(disable_help_flag = true)]
    Bench {
        /// What the bench takes
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let wanted = arguments.toolchain;
    match &arguments.task {
        Task::Setup { check: true } => setup::check(wanted),
        Task::Setup { check: false } => setup::ensure(Scope::All, wanted).map(drop),
        Task::Build => {
            let tools = setup::ensure(Scope::Build, wanted)?;
            build::everything(&tools)
        }
        Task::Demo => {
            machine::check_privileges()?;
            let tools = setup::ensure(Scope::Run, wanted)?;
            demo::run(&tools)
        }
        Task::Test => {
            machine::check_privileges()?;
            let tools = setup::ensure(Scope::All, wanted)?;
            test::run(&tools)
        }
        Task::Vm { kernels, tests } => {
            let kernels = if kernels.is_empty() { vm::all() } else { kernels.clone() };
            let tools = setup::ensure(Scope::Machines, wanted)?;
            vm::run(&tools, &kernels, &vm::Selection::of(tests))
        }
        Task::Mutate { words } => mutate::run(words),
        Task::Miri => miri::run(),
        Task::Bench { arguments } => {
            machine::check_privileges()?;
            let tools = setup::ensure(Scope::Run, wanted)?;
            build::bench(&tools, arguments)
        }
    }
}
