//! What can go wrong, in one line each: what was attempted, on what, and what to do about it.

use std::{io, path::Path, path::PathBuf};

use aya::{EbpfError, maps::MapError, pin::PinError, programs::ProgramError, programs::links::LinkError};

use crate::{control::model::Identity, netlink::Mode};

/// Why a command cannot be carried out. Nothing has been changed then, unless the variant says so.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The caller may not do this.
    #[error("permission denied: xdpvs needs root (CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON)")]
    NotRoot,

    /// An instance name that makes no file name.
    #[error("instance name `{name}`: use 1 to 64 letters, digits, `-` or `_`")]
    InstanceName {
        /// The name given.
        name: String,
    },

    /// No BPF file system.
    #[error("no BPF file system is mounted (looked at {}): run `mount -t bpf bpf /sys/fs/bpf`", list(looked))]
    NoBpffs {
        /// Where it was looked for.
        looked: Vec<PathBuf>,
    },

    /// The instance does not exist.
    #[error("instance `{name}` is not running: start it with `xdpvs up IFACE`")]
    NotRunning {
        /// Its name.
        name: String,
    },

    /// The instance was made by an incompatible version.
    #[error(
        "instance `{name}` was created by another version of xdpvs (map layout {found}, this is {expected}): use that \
         version, or `xdpvs down` and `xdpvs up`, which ends all connections"
    )]
    Version {
        /// Its name.
        name: String,
        /// The layout of this program.
        expected: String,
        /// The layout of the instance.
        found: String,
    },

    /// A map has values of another size than this program knows.
    #[error(
        "map {map} has values of {found} bytes where {expected} are expected: it belongs to another version of xdpvs"
    )]
    Layout {
        /// The map's name.
        map: &'static str,
        /// Bytes expected.
        expected: usize,
        /// Bytes found.
        found: usize,
    },

    /// The kernel lacks something.
    #[error("this kernel ({release}) lacks {feature}, which xdpvs needs: {remedy}")]
    Kernel {
        /// `uname -r`.
        release: String,
        /// What is missing.
        feature: &'static str,
        /// Where to get it.
        remedy: &'static str,
    },

    /// A service that there are no packets for.
    #[error("service {service}: {why}")]
    NoIpv6 {
        /// The service.
        service: Identity,
        /// Why, and what to do about it.
        why: &'static str,
    },

    /// An interface that does not exist in this network namespace.
    #[error("no interface `{name}` in this network namespace: see `ip link`")]
    NoInterface {
        /// The name given.
        name: String,
    },

    /// Another XDP program is on the interface.
    #[error(
        "{name} already has another XDP program (id {id}): detach it first, for example with `ip link set {name} xdp off`"
    )]
    InterfaceTaken {
        /// The interface.
        name: String,
        /// The program's id, or 0 when the kernel did not say.
        id: u32,
    },

    /// The driver does not run XDP programs.
    #[error(
        "the driver of {name} does not run XDP programs ({}): use `--mode generic`, which is slower",
        with_causes(.source)
    )]
    NoDriverMode {
        /// The interface.
        name: String,
        /// The kernel's answer.
        source: ProgramError,
    },

    /// The kernel does not put the program on the interface.
    #[error("attach to {name}: {source}")]
    Attach {
        /// The interface.
        name: String,
        /// The kernel's answer.
        source: ProgramError,
    },

    /// The programs run on the interface in another mode than is asked for.
    #[error("{name} runs in {mode} mode already: `xdpvs down` first to change that, which ends all connections")]
    ModeFixed {
        /// The interface.
        name: String,
        /// The mode.
        mode: Mode,
    },

    /// An instance that runs was made for another number of something than is asked for.
    #[error("instance `{name}` runs with --max-{option} {found}: `xdpvs down` first, which ends all connections")]
    Capacity {
        /// The instance's name.
        name: String,
        /// The option that says how many.
        option: &'static str,
        /// How many it was made for.
        found: u32,
    },

    /// The flow tables cannot be looked at so often.
    #[error("--sweep-ms {wanted}: tables for {flows} connections take {shortest} ms at the least")]
    Sweep {
        /// Milliseconds wanted.
        wanted: u32,
        /// Connections that the tables are made for.
        flows: u32,
        /// The shortest that there is, in milliseconds.
        shortest: u32,
    },

    /// The kernel's network configuration could not be read or changed.
    #[error("{action}: {source}")]
    Netlink {
        /// What was attempted.
        action: &'static str,
        /// The answer.
        source: Box<rtnetlink::Error>,
    },

    /// No connection to the kernel's network configuration.
    #[error("{action}: netlink socket: {source}")]
    NetlinkSocket {
        /// What was attempted.
        action: &'static str,
        /// The answer.
        source: io::Error,
    },

    /// A file could not be dealt with.
    #[error("{action} {path}: {source}")]
    File {
        /// What was attempted.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The answer.
        source: io::Error,
    },

    /// A map could not be dealt with.
    #[error("{action} map {map}: {source}")]
    Map {
        /// What was attempted.
        action: &'static str,
        /// The map's name.
        map: String,
        /// The answer.
        source: MapError,
    },

    /// A map could not be mapped into memory.
    #[error("map {map} into memory: {source}")]
    MapMemory {
        /// The map's name.
        map: &'static str,
        /// The answer.
        source: io::Error,
    },

    /// A program could not be dealt with.
    #[error("{action} program {program}: {source}")]
    Program {
        /// What was attempted.
        action: &'static str,
        /// The program's name.
        program: &'static str,
        /// The answer.
        source: ProgramError,
    },

    /// The object could not be loaded.
    #[error("load the eBPF object: {0}")]
    Object(#[from] EbpfError),

    /// The object lacks a program.
    #[error("the eBPF object has no program {program}: rebuild xdpvs")]
    NoProgram {
        /// The program's name.
        program: &'static str,
    },

    /// A change of a killed process cannot be finished.
    #[error("finish the change that another xdpvs was killed in: {0}")]
    Recovery(String),

    /// The control program did not do what it was asked.
    #[error("the instance's control program refused the request: run `xdpvs up` to replace its programs")]
    ControlRefused,

    /// A pin could not be made.
    #[error("pin {path}: {source}")]
    Pin {
        /// Where.
        path: PathBuf,
        /// The answer.
        source: PinError,
    },

    /// A link could not be dealt with.
    #[error("{action} the link to {name}: {source}")]
    Link {
        /// What was attempted.
        action: &'static str,
        /// The interface.
        name: String,
        /// The answer.
        source: LinkError,
    },
}

impl Error {
    /// A file could not be dealt with.
    pub fn file(action: &'static str, path: &Path, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::PermissionDenied => Self::NotRoot,
            _ => Self::File { action, path: path.to_owned(), source },
        }
    }

    /// A map could not be dealt with.
    pub fn map(action: &'static str, map: impl Into<String>, source: MapError) -> Self {
        Self::Map { action, map: map.into(), source }
    }

    /// A program could not be dealt with.
    pub fn program(action: &'static str, program: &'static str, source: ProgramError) -> Self {
        Self::Program { action, program, source }
    }
}

fn list(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// What went wrong with everything that led to it, in one line.
pub fn with_causes(error: &dyn std::error::Error) -> String {
    // The kernel's verifier writes pages; what it was about stands in the first line.
    let first_line = |text: String| text.lines().next().unwrap_or_default().trim_end_matches(':').to_owned();
    let mut line = first_line(error.to_string());
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = first_line(error.to_string());
        if !line.contains(&text) {
            line = format!("{line}: {text}");
        }
        cause = error.source();
    }
    line
}
