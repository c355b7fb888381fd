//! The tool chain that builds the eBPF programs: Debian's packaged one, or rustup's nightly.
//!
//! Debian ships `core` for the eBPF target ready-made. With rustup it is built from rust-src, which is a nightly
//! feature. Both write LLVM's bitcode, which `bpf-linker` reads: it must be made with the same LLVM.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::ValueEnum;

use crate::{
    machine::{self, find_program, version},
    step,
};

/// The target of the programs.
pub(crate) const TARGET: &str = "bpfel-unknown-none";
/// The release of `bpf-linker` that is installed; any 0.13 is good.
pub(crate) const LINKER_VERSION: &str = "0.13.0";
/// The majors of LLVM that this `bpf-linker` can be built with.
const LLVM: std::ops::RangeInclusive<u32> = 21..=23;
/// The LLVM of Debian's packages and of the nightly below.
const LLVM_USUAL: u32 = 22;
/// The nightly that is installed where there is none: one whose LLVM Debian has, too.
pub(crate) const NIGHTLY: &str = "nightly-2026-05-20";
/// Debian's compiler; one that rustup installed may hide it on the path.
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";

/// Which tool chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// Debian's packages
    Debian,
    /// A nightly of rustup, with rust-src
    Rustup,
}

/// A tool chain, which may lack parts.
#[derive(Clone, Debug)]
pub(crate) struct Toolchain {
    pub(crate) kind: Kind,
    /// The nightly's name, with rustup.
    name: String,
    /// The compiler, if it can build the programs.
    pub(crate) compiler: Option<Compiler>,
}

/// A compiler that can build the programs.
#[derive(Clone, Debug)]
pub(crate) struct Compiler {
    release: String,
    llvm: u32,
}

impl Toolchain {
    /// Chooses one: what is installed before what can be installed, Debian's before rustup's.
    pub(crate) fn choose(wanted: Option<Kind>) -> Result<Self> {
        let debian = Self { kind: Kind::Debian, name: String::new(), compiler: debian_compiler() };
        let of_rustup = || {
            let (name, compiler) = nightly().unzip();
            Self { kind: Kind::Rustup, name: name.unwrap_or_else(|| NIGHTLY.to_owned()), compiler }
        };
        match wanted {
            Some(Kind::Debian) => {
                ensure!(is_debian(), "this is not Debian 12 or newer: use `--toolchain rustup`");
                return Ok(debian);
            }
            Some(Kind::Rustup) => {
                ensure!(has_rustup(), "rustup is not installed: get it from https://rustup.rs");
                return Ok(of_rustup());
            }
            None => {}
        }
        if debian.compiler.is_some() {
            return Ok(debian);
        }
        let nightly = has_rustup().then(of_rustup);
        match nightly {
            Some(nightly) if nightly.compiler.is_some() => Ok(nightly),
            _ if is_debian() => Ok(debian),
            Some(nightly) => Ok(nightly),
            None => bail!("no tool chain for eBPF can be had here: install rustup from https://rustup.rs"),
        }
    }

    /// The nightly's name, with rustup.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Whether a nightly has its lints.
    pub(crate) fn has_clippy(&self) -> bool {
        step::read(&mut rustup(&["run", &self.name, "cargo", "clippy", "--version"])).is_ok()
    }

    /// The major of its LLVM.
    pub(crate) fn llvm(&self) -> u32 {
        self.compiler.as_ref().map_or(LLVM_USUAL, |compiler| compiler.llvm)
    }

    /// A sentence about it, for people.
    pub(crate) fn describe(&self) -> String {
        let from = match self.kind {
            Kind::Debian => "Debian's packages".to_owned(),
            Kind::Rustup => format!("rustup's {}", self.name),
        };
        match &self.compiler {
            Some(compiler) => format!("{from} (rustc {}, LLVM {})", compiler.release, compiler.llvm),
            None => format!("{from} (not complete yet)"),
        }
    }

    /// A compiler's command line.
    fn rustc(&self) -> Command {
        let mut command = match self.kind {
            Kind::Debian => Command::new(DEBIAN_RUSTC),
            Kind::Rustup => rustup(&["run", &self.name, "rustc"]),
        };
        forget_flags(&mut command);
        command.env("RUSTC_BOOTSTRAP", "1");
        command
    }

    /// Whether this linker is of the right version and reads what the compiler writes.
    fn links_with(&self, linker: &Path) -> bool {
        let Ok(said) = step::read(Command::new(linker).arg("--version")) else { return false };
        let wanted = version(LINKER_VERSION);
        if said.split_whitespace().nth(1).and_then(version) != wanted {
            return false;
        }
        if self.compiler.is_none() {
            return true;
        }
        // The smallest program: it needs no `core`, so it can be built before that is.
        const PROGRAM: &str = "#![feature(no_core)]\n#![no_core]\n#![crate_type = \"cdylib\"]\n";
        let directory = env::temp_dir().join(format!("xdpvs-setup-{}", std::process::id()));
        let source = directory.join("empty.rs");
        let links = fs::create_dir_all(&directory).is_ok() && fs::write(&source, PROGRAM).is_ok() && {
            let mut rustc = self.rustc();
            rustc.args(["--target", TARGET, "--out-dir"]).arg(&directory).args(flags(linker)).arg(&source);
            rustc.stdin(Stdio::null()).output().is_ok_and(|output| output.status.success())
        };
        // A directory that cannot be removed is one that could not be made.
        let _ = fs::remove_dir_all(&directory);
        links
    }

    /// The linker: the repository's own, else one on the path.
    pub(crate) fn linker(&self) -> Option<PathBuf> {
        let own = own_linker().ok().filter(|file| file.is_file());
        own.into_iter().chain(find_program("bpf-linker")).find(|linker| self.links_with(linker))
    }

    /// Where the LLVM is that the linker is built with.
    pub(crate) fn llvm_prefix(&self) -> Option<PathBuf> {
        let major = self.llvm();
        if let Some(prefix) = env::var_os("LLVM_PREFIX") {
            return Some(prefix.into());
        }
        [format!("/usr/lib/llvm-{major}/bin/llvm-config"), format!("llvm-config-{major}"), "llvm-config".to_owned()]
            .iter()
            .find_map(|config| {
                let said = step::read(Command::new(config).args(["--version", "--prefix"])).ok()?;
                let (found, prefix) = said.trim().split_once('\n')?;
                (version(found)?.0 == major).then(|| prefix.into())
            })
    }
}

/// A tool chain with its linker: all that builds the programs.
pub(crate) struct Tools {
    pub(crate) toolchain: Toolchain,
    pub(crate) linker: PathBuf,
}

impl Tools {
    /// A cargo command for the eBPF target, in the repository.
    ///
    /// What the caller has set for the host's compiler does not reach it.
    pub(crate) fn cargo(&self, task: &str) -> Result<Command> {
        let mut command = match (self.toolchain.kind, task) {
            (Kind::Rustup, _) => rustup(&["run", &self.toolchain.name, "cargo"]),
            // The lints of a compiler are those of its own release.
            (Kind::Debian, "clippy") => Command::new("/usr/bin/cargo-clippy"),
            (Kind::Debian, _) => Command::new(host_cargo_path()),
        };
        forget_flags(&mut command);
        if self.toolchain.kind == Kind::Debian {
            command.env("RUSTC", DEBIAN_RUSTC).env("CARGO", host_cargo_path());
        }
        let root = machine::root()?;
        command
            .current_dir(&root)
            // The data plane's library uses features that only nightly compilers admit to having.
            .env("RUSTC_BOOTSTRAP", "1")
            .env("CARGO_ENCODED_RUSTFLAGS", flags(&self.linker).join("\x1f"))
            .arg(task)
            .args(["--release", "--package", "lb-ebpf", "--target", TARGET, "--target-dir"])
            .arg(root.join("target/bpf"));
        if self.toolchain.kind == Kind::Rustup {
            command.args(["-Z", "build-std=core"]);
        }
        Ok(command)
    }
}

/// The compiler's options for the programs.
fn flags(linker: &Path) -> Vec<String> {
    let linker = format!("linker={}", linker.display());
    let options = [
        linker.as_str(),
        // With v4, jump tables appear, which aya cannot load.
        "target-cpu=v3",
        // Headers are at any address; without this they are read byte by byte.
        "target-feature=+allows-misaligned-mem-access",
        "debuginfo=2",
        "link-arg=--btf",
    ];
    options.iter().flat_map(|option| ["-C".to_owned(), (*option).to_owned()]).collect()
}

/// A cargo command for this machine, in the repository.
pub(crate) fn host_cargo(task: &str) -> Result<Command> {
    let root = machine::root()?;
    let mut command = Command::new(host_cargo_path());
    for variable in ["RUSTC", "RUSTC_BOOTSTRAP", "CARGO_BUILD_RUSTC", "CARGO_BUILD_TARGET"] {
        command.env_remove(variable);
    }
    command.current_dir(&root).env("CARGO_TARGET_DIR", root.join("target")).arg(task);
    Ok(command)
}

/// The cargo that runs this program.
fn host_cargo_path() -> PathBuf {
    env::var_os("CARGO").map_or_else(|| "cargo".into(), PathBuf::from)
}

/// A command that installs the linker into the repository.
pub(crate) fn install_linker(toolchain: &Toolchain) -> Result<Command> {
    let prefix = toolchain.llvm_prefix().context("no LLVM to build bpf-linker with")?;
    let directory = linker_root()?;
    let mut command = host_cargo("install")?;
    forget_flags(&mut command);
    command
        .args(["bpf-linker", "--version", LINKER_VERSION, "--locked", "--force", "--no-default-features", "--features"])
        .arg(format!("llvm-{}", toolchain.llvm()))
        .arg("--root")
        .arg(&directory)
        .arg("--target-dir")
        .arg(directory.join("build"))
        .env("LLVM_PREFIX", prefix);
    Ok(command)
}

/// Where the repository has its own linker installed.
pub(crate) fn linker_root() -> Result<PathBuf> {
    Ok(machine::root()?.join(".tools"))
}

fn own_linker() -> Result<PathBuf> {
    Ok(linker_root()?.join("bin/bpf-linker"))
}

/// Keeps from a command what is set for another compiler.
fn forget_flags(command: &mut Command) {
    const PREFIXES: [&str; 4] = ["RUSTC", "CARGO_BUILD_", "CARGO_PROFILE_", "CARGO_TARGET_"];
    const NAMES: [&str; 4] = ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "RUSTUP_TOOLCHAIN", "LD_LIBRARY_PATH"];
    for (name, _) in env::vars_os() {
        let name = name.to_string_lossy();
        if NAMES.contains(&&*name) || PREFIXES.iter().any(|prefix| name.starts_with(prefix)) {
            command.env_remove(&*name);
        }
    }
}

fn debian_compiler() -> Option<Compiler> {
    let compiler = compiler(&mut Command::new(DEBIAN_RUSTC))?;
    let libraries = step::read(Command::new(DEBIAN_RUSTC).args(["--print", "target-libdir", "--target", TARGET]));
    let core = libraries.is_ok_and(|directory| Path::new(directory.trim()).is_dir());
    core.then_some(compiler)
}

/// What a compiler says of itself, if it is new enough and its LLVM is one that can be linked.
fn compiler(rustc: &mut Command) -> Option<Compiler> {
    let said = step::read(rustc.env_remove("RUSTC_BOOTSTRAP").arg("-vV")).ok()?;
    let field = |name: &str| said.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let release = field("release:")?.to_owned();
    let llvm = version(field("LLVM version:")?)?.0;
    let new_enough = version(&release)? >= version(env!("CARGO_PKG_RUST_VERSION"))?;
    (new_enough && LLVM.contains(&llvm)).then_some(Compiler { release, llvm })
}

/// The nightlies that are installed, are new enough and have the standard library's source: first the one that would be
/// installed.
fn nightlies() -> impl Iterator<Item = (String, Compiler)> {
    let list = step::read(&mut rustup(&["toolchain", "list"])).unwrap_or_default();
    let names = list.lines().filter_map(|line| line.split_whitespace().next());
    let mut nightlies: Vec<_> = names.filter(|name| name.starts_with("nightly")).map(str::to_owned).collect();
    nightlies.sort_by_key(|name| !name.starts_with(NIGHTLY));
    nightlies.into_iter().filter_map(|name| {
        let compiler = compiler(&mut rustup(&["run", &name, "rustc"]))?;
        let sysroot = step::read(&mut rustup(&["run", &name, "rustc", "--print", "sysroot"])).ok()?;
        let source = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core");
        source.is_dir().then_some((name, compiler))
    })
}

/// The nightly that can build the programs, if one is installed.
fn nightly() -> Option<(String, Compiler)> {
    nightlies().next()
}

/// The nightly that has Miri, if one is installed.
pub(crate) fn nightly_with_miri() -> Option<String> {
    let has_miri = |name: &str| step::read(&mut rustup(&["run", name, "cargo", "miri", "--version"])).is_ok();
    nightlies().map(|(name, _)| name).find(|name| has_miri(name))
}

/// A rustup command.
pub(crate) fn rustup(words: &[&str]) -> Command {
    let mut command = Command::new("rustup");
    forget_flags(&mut command);
    command.args(words);
    command
}

/// Whether rustup is here.
pub(crate) fn has_rustup() -> bool {
    find_program("rustup").is_some()
}

/// Whether this is a Debian whose packages have the tool chain.
fn is_debian() -> bool {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let field = |name: &str| {
        let value = release.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        value.map(|value| value.trim_matches('"').to_owned())
    };
    field("ID").as_deref() == Some("debian")
        && field("VERSION_ID").and_then(|id| id.parse().ok()).is_some_and(|id: u32| id >= 12)
}
