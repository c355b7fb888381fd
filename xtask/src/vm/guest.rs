//! The virtual machine: a file system in memory with the tests and what they need, and a shell script that runs them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs::{self, File},
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    machine::{self, find_program},
    step,
    vm::{Selection, kernel::Kernel},
};

/// The host's programs that the tests start.
const PROGRAMS: [&str; 4] = ["ip", "nsenter", "ethtool", "ping"];
/// How long a selection of tests may take, in seconds. The longest takes a tenth of it.
const PATIENCE_S: usize = 900;
/// How long all else may take, in seconds: starting and ending takes about ten.
const BOOT_S: usize = 120;
/// Memory of the machine.
const MEMORY: &str = "1536M";

/// What the machine writes before the tests of a selection.
pub(super) fn begin_mark(index: usize) -> String {
    format!("@@ begin {index}")
}

/// What the machine writes after them, before their exit status.
pub(super) fn end_mark(index: usize) -> String {
    format!("@@ end {index} ")
}

/// A machine that is ready to run. Its files are gone when this is dropped.
pub(super) struct Guest {
    image: PathBuf,
    /// The file system, as a tree and packed.
    tree: PathBuf,
    packed: PathBuf,
    limit_s: usize,
}

impl Guest {
    /// Makes the file system of a machine below `directory`.
    pub(super) fn make(
        kernel: &Kernel,
        programs: &BTreeMap<String, PathBuf>,
        selections: &[Selection],
        directory: &Path,
    ) -> Result<Self> {
        let guest = Self {
            image: kernel.image(),
            tree: directory.join(format!("{}.tree", kernel.release)),
            packed: directory.join(format!("{}.cpio", kernel.release)),
            limit_s: BOOT_S + PATIENCE_S * selections.len(),
        };
        // What a run left that was killed.
        guest.clear();
        guest.fill(kernel, programs, selections).with_context(|| format!("make {}", guest.tree.display()))?;
        let tree =
            Command::new("find").current_dir(&guest.tree).stdout(Stdio::piped()).spawn().context("start find")?;
        let files = tree.stdout.context("find has no output")?;
        let mut cpio = Command::new("cpio");
        cpio.args(["--create", "--format=newc", "--quiet"]).current_dir(&guest.tree).stdin(files);
        let status = cpio.stdout(File::create(&guest.packed)?).status().context("start cpio")?;
        ensure!(status.success(), "{} cannot be packed", guest.tree.display());
        Ok(guest)
    }

    fn fill(&self, kernel: &Kernel, programs: &BTreeMap<String, PathBuf>, selections: &[Selection]) -> Result<()> {
        for name in ["bin", "dev", "etc", "modules", "proc", "root", "run", "sys", "tmp", "var"] {
            fs::create_dir_all(self.tree.join(name))?;
        }
        symlink("bin", self.tree.join("sbin"))?;
        symlink("../run", self.tree.join("var/run"))?;
        for module in kernel.modules()? {
            let name = module.file_name().context("a module without a name")?;
            fs::copy(&module, self.tree.join("modules").join(name))?;
        }
        let on_path = |name: &str| find_program(name).with_context(|| format!("no program {name}"));
        self.take("busybox", &on_path("busybox")?)?;
        for name in PROGRAMS {
            self.take(name, &on_path(name)?)?;
        }
        self.take("xdpvs", &machine::root()?.join("target/release/xdpvs"))?;
        let wanted: BTreeSet<&str> = selections.iter().map(|selection| selection.program.as_str()).collect();
        for name in wanted {
            let program = programs.get(name).with_context(|| format!("no test program {name}"))?;
            self.take(name, program)?;
        }
        let init = self.tree.join("init");
        fs::write(&init, script(&kernel.modules()?, selections)?)?;
        fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
        Ok(())
    }

    /// Puts a program into the file system, with the libraries it needs and without what debuggers need.
    fn take(&self, name: &str, program: &Path) -> Result<()> {
        step::read(Command::new("strip").arg("-o").arg(self.tree.join("bin").join(name)).arg(program))?;
        // It fails for programs that need none.
        let said = step::read(Command::new("ldd").arg(program)).unwrap_or_default();
        for library in said.split_whitespace().filter(|word| word.starts_with('/')) {
            let place = self.tree.join(library.trim_start_matches('/'));
            if !place.exists() {
                fs::create_dir_all(place.parent().context("a library has a directory")?)?;
                fs::copy(library, &place).with_context(|| format!("copy {library}"))?;
            }
        }
        Ok(())
    }

    /// Runs the machine to its end, or until its time is over. What it writes goes into `log`. Returns why it has not come to
    /// its end, if it has not.
    ///
    /// Another process watches the time, and ends the machine also when this one is killed.
    pub(super) fn run(&self, log: File) -> Result<Option<String>> {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "TERM", "timeout", "--kill-after=5", &self.limit_s.to_string()]);
        command.arg("qemu-system-x86_64");
        // Some instructions that copy are emulated byte by byte.
        command.args(["-accel", "tcg,thread=multi", "-cpu", "max,-erms,-fsrm", "-smp", "2", "-m", MEMORY]);
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"]);
        command.arg("-kernel").arg(&self.image).arg("-initrd").arg(&self.packed);
        command.args(["-append", "console=ttyS0 quiet panic=-1 mitigations=off init_on_alloc=0"]);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let status = command.status().context("start setpriv")?;
        Ok(match status.code() {
            Some(0) => None,
            Some(124) => Some(format!("the machine hung, and was ended after {} s", self.limit_s)),
            _ => Some(format!("the machine was ended by something else ({status})")),
        })
    }
}

impl Guest {
    fn clear(&self) {
        // What cannot be removed is in the build directory.
        let _ = fs::remove_dir_all(&self.tree);
        let _ = fs::remove_file(&self.packed);
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.clear();
    }
}

/// What the machine does.
fn script(modules: &[PathBuf], selections: &[Selection]) -> Result<String> {
    let mut script = "#!/bin/busybox sh\n/bin/busybox --install -s /tmp\nPATH=/bin:/tmp\n".to_owned();
    for (kind, place) in
        [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/run"), ("bpf", "/sys/fs/bpf")]
    {
        writeln!(script, "mount -t {kind} {kind} {place}")?;
    }
    for module in modules {
        let name = module.file_name().context("a module without a name")?.to_string_lossy();
        writeln!(script, "insmod /modules/{name}")?;
    }
    script += "ip link set lo up\nexport PATH XDPVS=/bin/xdpvs\n";
    for (index, Selection { program, word }) in selections.iter().enumerate() {
        let word = word.as_deref().unwrap_or_default();
        writeln!(script, "echo '{}'", begin_mark(index))?;
        writeln!(script, "timeout {PATIENCE_S} /bin/{program} --nocapture --test-threads=1 {word} 2>&1")?;
        writeln!(script, "echo \"{}$?\"", end_mark(index))?;
    }
    script += "poweroff -f\n";
    Ok(script)
}
