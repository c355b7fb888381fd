//! Network namespaces and the cables between them, gone when their guards are dropped.

use std::{
    fs::{self, File},
    net::Ipv4Addr,
    path::PathBuf,
    process::Command,
    sync::{
        Once,
        atomic::{AtomicU32, Ordering},
    },
    thread,
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::{
    Ebpf,
    programs::{Xdp, XdpMode},
};
use lb_userspace::datapath::place::{Place, remove_tree};
use nix::sched::{CloneFlags, setns};

use crate::{bulk, family::Family};

/// Where `ip netns` keeps its namespaces.
const NAMESPACES: &str = "/run/netns";
/// What the names of our namespaces begin with.
const PREFIX: &str = "xdpvs-";

/// Runs a command to its end and returns what it wrote to its standard output.
///
/// # Errors
///
/// When it cannot be started or fails; the message holds what it wrote to its standard error.
pub fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .with_context(|| format!("start `{program}`: is it installed?"))?;
    ensure!(
        output.status.success(),
        "`{program} {}` failed: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A network namespace.
#[derive(Debug)]
pub struct NetNs {
    name: String,
}

impl NetNs {
    /// Makes a namespace with its loopback up, named after this process and `role`.
    ///
    /// # Errors
    ///
    /// When it cannot be made: this needs root.
    pub fn new(role: &str) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        static SWEPT: Once = Once::new();
        SWEPT.call_once(sweep);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("{PREFIX}{}-{number}-{role}", std::process::id());
        run("ip", &["netns", "add", &name])?;
        let namespace = Self { name };
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// The namespace's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that stands for the namespace.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(NAMESPACES).join(&self.name)
    }

    /// Runs `ip` with these words in the namespace.
    ///
    /// # Errors
    ///
    /// When it fails.
    pub fn ip(&self, words: &str) -> Result<String> {
        let mut arguments = vec!["-n", &self.name];
        arguments.extend(words.split_whitespace());
        run("ip", &arguments)
    }

    /// Gives an interface the addresses that `address` stands for in each family, of the networks of its first `octets`; the
    /// addresses alone, if these are four.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn give(&self, interface: &str, address: Ipv4Addr, octets: usize) -> Result<()> {
        Family::ALL.into_iter().try_for_each(|family| {
            let (length, flags) = match family {
                Family::Four => (8 * octets, ""),
                // Nobody else has the address, and until that were found out it could not be sent from.
                Family::Six => (if octets < 4 { 8 * (octets + 1) } else { 128 }, "nodad"),
            };
            let address = family.address(address);
            self.ip(&format!("address add {address}/{length} dev {interface} {flags}")).map(drop)
        })
    }

    /// A command that runs in the namespace. Only its network is the namespace's; it sees the file systems of this
    /// process.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path().display())).arg("--").arg(program);
        command
    }

    /// Runs a command in the namespace to its end and returns what it wrote to its standard output.
    ///
    /// # Errors
    ///
    /// When it fails.
    pub fn exec(&self, words: &str) -> Result<String> {
        let mut words = words.split_whitespace();
        let program = words.next().context("no command")?;
        let output = self.command(program).args(words).output().context("start nsenter")?;
        ensure!(output.status.success(), "{program} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Sets a kernel setting of the namespace.
    ///
    /// # Errors
    ///
    /// When there is none of that name.
    pub fn sysctl(&self, name: &str, value: &str) -> Result<()> {
        let path = PathBuf::from("/proc/sys").join(name.replace('.', "/"));
        let value = value.to_owned();
        self.enter(move || fs::write(&path, value).with_context(|| format!("write {}", path.display())))?
    }

    /// Runs `work` on a thread whose network is the namespace's.
    ///
    /// # Errors
    ///
    /// When the namespace cannot be entered.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let path = self.path();
        let inside = || -> Result<T> {
            let file = File::open(&path).with_context(|| format!("open {}", path.display()))?;
            setns(file, CloneFlags::CLONE_NEWNET).context("enter the network namespace")?;
            Ok(work())
        };
        thread::scope(|scope| match scope.spawn(inside).join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    }
}

impl Drop for NetNs {
    fn drop(&mut self) {
        // What cannot be removed now is removed by the next run.
        let _ = run("ip", &["netns", "del", &self.name]);
    }
}

/// Removes the namespaces of processes that are no more.
fn sweep() {
    let Ok(entries) = fs::read_dir(NAMESPACES) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next()).map(str::to_owned);
        if owner.is_some_and(|owner| !PathBuf::from("/proc").join(owner).exists()) {
            let _ = run("ip", &["netns", "del", &name]);
        }
    }
}

/// Removes the pins of the instances of processes that are no more, of those whose names are `prefix`, the number of the
/// process, and anything after a `-`.
///
/// # Errors
///
/// When no BPF file system is mounted, or a pin cannot be removed.
pub fn sweep_instances(prefix: &str) -> Result<()> {
    let place = Place::find(prefix)?;
    place.prepare()?;
    let Some(instances) = place.directory().parent().map(PathBuf::from) else { return Ok(()) };
    for entry in fs::read_dir(&instances).with_context(|| format!("list {}", instances.display()))?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name.strip_prefix(prefix).and_then(|rest| rest.split(['-', '~']).next());
        if owner.is_some_and(|owner| !PathBuf::from("/proc").join(owner).exists()) {
            remove_tree(&entry.path())?;
        }
    }
    Ok(())
}

/// One end of a cable.
#[derive(Clone, Copy, Debug)]
pub struct End<'a> {
    /// The namespace it is in.
    pub namespace: &'a NetNs,
    /// The interface's name.
    pub name: &'a str,
    /// Its link-layer address.
    pub mac: [u8; 6],
    /// Its address and prefix length, if it has one.
    pub address: Option<&'a str>,
}

/// Lays a cable: a pair of veth interfaces, up, with their addresses.
///
/// Both ends compute checksums and cut segments before they send, as a network card does on the wire: XDP would see
/// neither done otherwise. Both receive through NAPI (GRO on), or frames from an XDP program would be lost on them.
///
/// # Errors
///
/// When the kernel refuses.
pub fn cable(a: End<'_>, b: End<'_>) -> Result<()> {
    let [mac_a, mac_b] = [a.mac, b.mac].map(mac);
    a.namespace.ip(&format!(
        "link add {} address {mac_a} type veth peer name {} address {mac_b} netns {}",
        a.name,
        b.name,
        b.namespace.name()
    ))?;
    for end in [a, b] {
        end.namespace.exec(&format!("ethtool -K {} tx off tso off gso off gro on", end.name))?;
        if let Some(address) = end.address {
            end.namespace.ip(&format!("address add {address} dev {}", end.name))?;
        }
        end.namespace.ip(&format!("link set {} up", end.name))?;
    }
    Ok(())
}

/// A program that passes every frame.
///
/// A veth wakes its other end after `XDP_TX` only if that has a program too: without, frames that a director sends back by
/// the interface they came in by lie there until something else comes along.
#[derive(Debug)]
pub struct Passing {
    ebpf: Ebpf,
}

impl Passing {
    /// Loads the program.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn new() -> Result<Self> {
        let mut passing = Self { ebpf: Ebpf::load(bulk::OBJECT)? };
        passing.program()?.load()?;
        Ok(passing)
    }

    /// Puts the program on an interface, until this is dropped.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn attach(&mut self, namespace: &NetNs, interface: &str) -> Result<()> {
        let program = self.program()?;
        namespace.enter(|| program.attach(interface, XdpMode::Driver).map(drop))??;
        Ok(())
    }

    fn program(&mut self) -> Result<&mut Xdp> {
        Ok(self.ebpf.program_mut("floor_pass").context("no program floor_pass")?.try_into()?)
    }
}

/// A link-layer address as people write it.
pub fn mac(bytes: [u8; 6]) -> String {
    bytes.map(|byte| format!("{byte:02x}")).join(":")
}

/// Fails unless this process may do what the laboratory needs.
///
/// # Errors
///
/// When it does not run as root.
pub fn require_root() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("this needs root: it makes network namespaces and loads eBPF programs");
    }
    Ok(())
}
