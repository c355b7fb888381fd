//! What the machine must be: nothing here can be installed, so what is wrong is said in one line with its remedy.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};

/// The oldest kernel that has what the programs use.
const KERNEL_MIN: (u32, u32) = (6, 1);
/// Where the kernel describes its own types.
const BTF: &str = "/sys/kernel/btf/vmlinux";
/// Where the eBPF file system belongs.
pub(crate) const BPFFS: &str = "/sys/fs/bpf";
/// Numbers of the capabilities without which even root cannot make networks and load programs: CAP_NET_ADMIN and
/// CAP_SYS_ADMIN.
const CAPABILITIES: [(u32, &str); 2] = [(12, "CAP_NET_ADMIN"), (21, "CAP_SYS_ADMIN")];

/// The top directory of the repository.
pub(crate) fn root() -> Result<PathBuf> {
    let package = env::var_os("CARGO_MANIFEST_DIR").context("no CARGO_MANIFEST_DIR: run this as `cargo xtask`")?;
    let parent = Path::new(&package).parent().context("the package has no directory above it")?;
    Ok(parent.to_owned())
}

/// Fails unless the programs can be built for this processor.
pub(crate) fn check_architecture() -> Result<()> {
    ensure!(
        cfg!(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))),
        "{} on {} is not supported: use Linux on x86_64 or aarch64",
        env::consts::OS,
        env::consts::ARCH
    );
    Ok(())
}

/// Fails unless this kernel can run the programs.
pub(crate) fn check_kernel() -> Result<()> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").context("read the kernel's release")?;
    let release = release.trim();
    let found = version(release).with_context(|| format!("kernel release `{release}` is not understood"))?;
    ensure!(found >= KERNEL_MIN, "kernel {release} is too old: boot {}.{} or newer", KERNEL_MIN.0, KERNEL_MIN.1);
    let file_systems = fs::read_to_string("/proc/filesystems").context("read /proc/filesystems")?;
    ensure!(
        file_systems.split_whitespace().any(|word| word == "bpf"),
        "kernel {release} has no eBPF: boot one that is built with CONFIG_BPF_SYSCALL"
    );
    ensure!(
        Path::new(BTF).exists(),
        "kernel {release} has no {BTF}: boot one that is built with CONFIG_DEBUG_INFO_BTF"
    );
    Ok(())
}

/// Fails unless this process may load programs and make network namespaces.
pub(crate) fn check_privileges() -> Result<()> {
    if !is_root() {
        bail!("not root, which loading programs needs: run {}", as_root());
    }
    let held = status("CapEff").and_then(|mask| u64::from_str_radix(&mask, 16).ok()).unwrap_or(u64::MAX);
    for (number, name) in CAPABILITIES {
        ensure!(
            held & (1 << number) != 0,
            "root here lacks {name}: run this outside of the container, or in a privileged one"
        );
    }
    Ok(())
}

/// Whether this process is root.
pub(crate) fn is_root() -> bool {
    status("Uid").is_some_and(|effective| effective == "0")
}

/// How to run the same command as root, with the tool chain of this user.
pub(crate) fn as_root() -> String {
    let words: Vec<_> = env::args().skip(1).collect();
    format!("`sudo env PATH=\"$PATH\" HOME=\"$HOME\" cargo xtask {}`", words.join(" "))
}

/// A field of this process's status; of the four user ids, the effective one.
fn status(field: &str) -> Option<String> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    let mut words = line.split_whitespace();
    let first = words.next()?;
    Some(words.next().unwrap_or(first).to_owned())
}

/// Whether an eBPF file system is mounted where it belongs.
pub(crate) fn has_bpffs() -> bool {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    mounts.lines().any(|line| {
        let mut words = line.split(' ').skip(1);
        words.next() == Some(BPFFS) && words.next() == Some("bpf")
    })
}

/// Whether a program of this name is on the path, or where Debian keeps the programs of root.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let directories = env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    directories.map(|directory| directory.join(name)).find(|file| file.is_file())
}

/// The first two numbers of a version.
pub(crate) fn version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split(|character: char| !character.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

#[cfg(test)]
mod tests {
    use super::version;

    #[test]
    fn a_version_is_its_first_two_numbers() {
        for (text, numbers) in [
            ("6.18.44-fc-v657", Some((6, 18))),
            ("6.1.0-28-amd64", Some((6, 1))),
            ("1.96.0+dfsg1-1~deb12u2", Some((1, 96))),
            ("0.13.0", Some((0, 13))),
            ("22", None),
            ("(none)", None),
        ] {
            assert_eq!(version(text), numbers, "{text}");
        }
    }
}
