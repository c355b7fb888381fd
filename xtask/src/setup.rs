//! Finds what this machine lacks and installs it.

use std::{collections::BTreeSet, fs, path::Path, process::Command};

use anyhow::{Result, bail, ensure};

use crate::{
    machine::{self, BPFFS, find_program},
    step::{self, Log},
    toolchain::{self, Kind, LINKER_VERSION, NIGHTLY, Toolchain, Tools, host_cargo},
    vm,
};

/// How much is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Scope {
    /// To build.
    Build,
    /// And to run it.
    Run,
    /// And to run it on other kernels.
    Machines,
    /// And to check its source.
    All,
}

/// Something that is missing.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Need {
    what: String,
    why: &'static str,
    fix: Fix,
}

/// How it is supplied.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Fix {
    /// By a package of Debian.
    Package(String),
    /// By rustup.
    Rustup(Vec<String>),
    /// By building it from crates.io.
    Linker,
    /// By mounting it.
    Mount,
    /// By a person.
    Person(String),
}

/// The programs that run besides ours, the packages they are in, and what they are for.
const PROGRAMS: [(&str, &str, &str); 6] = [
    ("ip", "iproute2", "makes the networks of tests and demo"),
    ("nsenter", "util-linux", "starts programs inside of those networks"),
    ("ethtool", "ethtool", "switches offloads of their interfaces"),
    ("ping", "iputils-ping", "asks whether their hosts answer"),
    ("curl", "curl", "sends their requests"),
    ("nginx", WEB_SERVER, "answers their requests"),
];

/// The package with the web server.
const WEB_SERVER: &str = "nginx-light";

/// Installs what is missing, in rounds: some of it is needed to see what else is missing. Returns the tools, which are complete.
pub(crate) fn ensure(scope: Scope, wanted: Option<Kind>) -> Result<Tools> {
    check_machine(scope)?;
    let mut log: Option<Log> = None;
    let mut before = Vec::new();
    loop {
        let toolchain = Toolchain::choose(wanted)?;
        let linker = toolchain.linker();
        let needs = missing(scope, &toolchain, linker.as_deref())?;
        if let (Some(linker), []) = (&linker, needs.as_slice()) {
            let verdict = if log.is_some() { "complete" } else { "nothing to do" };
            eprintln!("setup: {verdict}: {}, {}", toolchain.describe(), linker.display());
            return Ok(Tools { toolchain, linker: linker.clone() });
        }
        let log = match &mut log {
            Some(log) => log,
            None => log.insert(Log::new()?),
        };
        let names: Vec<_> = needs.iter().map(|need| need.what.as_str()).collect();
        ensure!(needs != before, "installed, but not usable: {}: see {}", names.join(", "), log.path().display());
        install(&needs, &toolchain, log)?;
        before = needs;
    }
}

/// Says what is missing, and fails if anything is.
pub(crate) fn check(wanted: Option<Kind>) -> Result<()> {
    check_machine(Scope::All)?;
    let toolchain = Toolchain::choose(wanted)?;
    println!("tool chain: {}", toolchain.describe());
    let linker = toolchain.linker();
    if let Some(linker) = &linker {
        println!("linker: {}", linker.display());
    }
    let needs = missing(Scope::All, &toolchain, linker.as_deref())?;
    for need in &needs {
        println!("missing: {} ({}): {}", need.what, need.why, need.fix.describe(&toolchain));
    }
    match needs.len() {
        0 => println!("nothing is missing"),
        count => bail!("{count} missing: run `cargo xtask setup`"),
    }
    Ok(())
}

fn check_machine(scope: Scope) -> Result<()> {
    machine::check_architecture()?;
    if scope > Scope::Build {
        machine::check_kernel()?;
    }
    Ok(())
}

/// What is missing, in the order in which it is installed.
fn missing(scope: Scope, toolchain: &Toolchain, linker: Option<&Path>) -> Result<Vec<Need>> {
    let mut needs = of_toolchain(toolchain, linker);
    if scope == Scope::All {
        needs.extend(of_lints(toolchain)?);
    }
    if scope > Scope::Build {
        let absent = PROGRAMS.iter().filter(|(program, ..)| find_program(program).is_none());
        needs.extend(absent.map(|&(program, package, why)| Need::package(program, package, why)));
        if !machine::has_bpffs() {
            needs.push(Need { what: BPFFS.to_owned(), why: "keeps programs and maps in force", fix: Fix::Mount });
        }
    }
    // Where Debian's packages cannot be had, neither can its kernels.
    if scope >= Scope::Machines && find_program("apt-get").is_some() {
        let absent = vm::PROGRAMS.iter().filter(|(program, ..)| find_program(program).is_none());
        needs.extend(absent.map(|&(program, package, why)| Need::package(program, package, why)));
    }
    Ok(needs)
}

fn of_toolchain(toolchain: &Toolchain, linker: Option<&Path>) -> Vec<Need> {
    let mut needs = Vec::new();
    if toolchain.compiler.is_none() {
        match toolchain.kind {
            Kind::Debian => {
                needs.push(Need::package("rustc", "rustc-web", "compiles the eBPF programs"));
                needs.push(Need::package("core", "libstd-rust-web-dev-bpf", "is the base of the eBPF programs"));
            }
            Kind::Rustup => {
                let words = [
                    "toolchain",
                    "install",
                    NIGHTLY,
                    "--no-self-update",
                    "--profile",
                    "minimal",
                    "--component",
                    "rust-src,clippy",
                ];
                needs.push(Need {
                    what: NIGHTLY.to_owned(),
                    why: "compiles the eBPF programs",
                    fix: Fix::Rustup(words.map(str::to_owned).to_vec()),
                });
            }
        }
    }
    if linker.is_none() {
        let llvm = toolchain.llvm();
        if toolchain.llvm_prefix().is_none() {
            needs.push(Need::package(
                &format!("LLVM {llvm}"),
                &format!("llvm-{llvm}-dev"),
                "is what bpf-linker links with",
            ));
        }
        let what = format!("bpf-linker {LINKER_VERSION}");
        needs.push(Need { what, why: "links the eBPF programs", fix: Fix::Linker });
    }
    needs
}

/// What checks the source.
fn of_lints(toolchain: &Toolchain) -> Result<Vec<Need>> {
    let mut needs = Vec::new();
    for (task, component, package) in [("fmt", "rustfmt", "rustfmt-web"), ("clippy", "clippy", "rust-web-clippy")] {
        if step::read(host_cargo(task)?.arg("--version")).is_err() {
            let why = "checks the source";
            needs.push(match std::env::var("RUSTUP_TOOLCHAIN") {
                Ok(name) => Need::component(component, &name, why),
                Err(_) => Need::package(component, package, why),
            });
        }
    }
    let why = "checks the source of the eBPF programs";
    match toolchain.kind {
        Kind::Debian if !Path::new("/usr/bin/cargo-clippy").exists() => {
            needs.push(Need::package("Debian's clippy", "rust-web-clippy", why));
        }
        Kind::Rustup if toolchain.compiler.is_some() && !toolchain.has_clippy() => {
            needs.push(Need::component("clippy", toolchain.name(), why));
        }
        _ => {}
    }
    Ok(needs)
}

impl Need {
    fn package(what: &str, package: &str, why: &'static str) -> Self {
        let fix = if find_program("apt-get").is_some() {
            Fix::Package(package.to_owned())
        } else {
            Fix::Person(format!("install it (on Debian it is in {package})"))
        };
        Self { what: what.to_owned(), why, fix }
    }

    fn component(component: &str, toolchain: &str, why: &'static str) -> Self {
        let words = ["component", "add", component, "--toolchain", toolchain];
        Self { what: component.to_owned(), why, fix: Fix::Rustup(words.map(str::to_owned).to_vec()) }
    }
}

impl Fix {
    fn package(&self) -> Option<&str> {
        match self {
            Self::Package(package) => Some(package),
            _ => None,
        }
    }

    fn describe(&self, toolchain: &Toolchain) -> String {
        match self {
            Self::Package(package) => format!("Debian's package {package}"),
            Self::Rustup(words) => format!("`rustup {}`", words.join(" ")),
            Self::Linker => format!("from crates.io into .tools, with LLVM {}", toolchain.llvm()),
            Self::Mount => "`mount -t bpf bpf /sys/fs/bpf`".to_owned(),
            Self::Person(remedy) => remedy.clone(),
        }
    }
}

fn install(needs: &[Need], toolchain: &Toolchain, log: &mut Log) -> Result<()> {
    for need in needs {
        if let Fix::Person(remedy) = &need.fix {
            bail!("{} is missing ({}): {remedy}", need.what, need.why);
        }
    }
    let privileged: Vec<_> = needs
        .iter()
        .filter(|need| matches!(need.fix, Fix::Package(_) | Fix::Mount))
        .map(|need| need.what.as_str())
        .collect();
    if !privileged.is_empty() && !machine::is_root() {
        bail!("not root, which installing {} needs: run {}", privileged.join(", "), machine::as_root());
    }
    let packages: Vec<_> = needs.iter().filter(|need| need.fix.package().is_some()).collect();
    if !packages.is_empty() {
        install_packages(&packages, log)?;
    }
    for need in needs {
        match &need.fix {
            Fix::Rustup(words) => {
                let words: Vec<_> = words.iter().map(String::as_str).collect();
                let what = format!("installing {} by rustup, which {}", need.what, need.why);
                log.run(&what, &mut toolchain::rustup(&words), "check the network, then run this again")?;
            }
            Fix::Linker if toolchain.compiler.is_some() && toolchain.llvm_prefix().is_some() => {
                let what = format!("building {} from crates.io, which {}", need.what, need.why);
                let mut command = toolchain::install_linker(toolchain)?;
                log.run(&what, &mut command, "check the network, then run this again")?;
                let _ = fs::remove_dir_all(toolchain::linker_root()?.join("build"));
            }
            Fix::Mount => {
                let what = format!("mounting {BPFFS}, which {}", need.why);
                log.run(&what, Command::new("mount").args(["-t", "bpf", "bpf", BPFFS]), "mount it by hand")?;
            }
            // Packages are installed; the linker waits for what it is built with.
            Fix::Package(_) | Fix::Person(_) | Fix::Linker => {}
        }
    }
    Ok(())
}

fn install_packages(needs: &[&Need], log: &mut Log) -> Result<()> {
    let names: BTreeSet<_> = needs.iter().filter_map(|need| need.fix.package()).collect();
    for need in needs {
        eprintln!("setup: {} is missing, which {}", need.what, need.why);
    }
    let apt = || {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive").args(["--quiet", "--option", "DPkg::Lock::Timeout=120"]);
        command
    };
    // Lists that cannot be fetched do no harm if the packages can be.
    let _ = log.run("fetching apt's lists", apt().arg("update"), "check the network");
    // The package would start a web server on port 80, now and at every boot; only the program is wanted.
    let holds_service = names.contains(&WEB_SERVER) && Path::new("/run/systemd/system").is_dir();
    let service = |verb: &str, log: &mut Log| {
        log.run(&format!("{verb}ing the service of nginx"), Command::new("systemctl").args([verb, "nginx.service"]), "")
    };
    if holds_service {
        service("mask", log)?;
    }
    let what = format!("installing {}", Vec::from_iter(names.iter().copied()).join(" "));
    let remedy = "check the network and apt's sources, then run this again";
    let install = ["--yes", "--no-install-recommends", "--no-remove", "install"];
    let installed = log.run(&what, apt().args(install).args(&names), remedy);
    if holds_service {
        service("unmask", log)?;
        if installed.is_ok() {
            service("disable", log)?;
        }
    }
    installed
}
