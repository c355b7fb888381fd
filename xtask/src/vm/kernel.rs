//! Debian's kernels: found in its archive, checked by apt, kept in the build directory.

use std::{
    cmp::Reverse,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{machine, step};

/// The releases of Debian that are looked into: with 6.1, with 6.12, and the one that the newest kernels come to first.
const SUITES: [&str; 3] = ["bookworm", "trixie", "sid"];
/// What the archive is signed with; the names of the mirrors are this machine's own.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// The word for the newest kernel there is.
pub(super) const NEWEST: &str = "newest";
/// The modules that the tests need, besides what these need themselves.
const MODULES: [&str; 4] = ["veth", "bridge", "sch_ingress", "cls_bpf"];

/// A kernel, unpacked.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    /// What it calls itself, such as `6.1.0-50-amd64`.
    pub(crate) release: String,
    directory: PathBuf,
}

impl Kernel {
    /// The file to boot.
    pub(crate) fn image(&self) -> PathBuf {
        self.directory.join("vmlinuz")
    }

    /// The modules to load, in the order in which they must be.
    pub(crate) fn modules(&self) -> Result<Vec<PathBuf>> {
        let list = self.directory.join("modules");
        let names = fs::read_to_string(&list).with_context(|| format!("read {}", list.display()))?;
        Ok(names.lines().map(|name| self.directory.join(name)).collect())
    }

    /// One that is kept already under the name it was asked for by.
    fn kept(wanted: &str) -> Result<Option<Self>> {
        let directory = directory()?.join(wanted);
        let release = fs::read_to_string(directory.join("release")).ok();
        Ok(release.map(|release| Self { release, directory }))
    }
}

/// Where kernels are kept. Without it, they are fetched again, and are then the newest ones.
fn directory() -> Result<PathBuf> {
    Ok(machine::root()?.join("target/kernels"))
}

/// Finds kernels: `6.1` is Debian's newest 6.1, `newest` its newest of all. What was fetched before is taken from where
/// it was put.
pub(crate) fn fetch<'a>(wanted: impl Iterator<Item = &'a str>) -> Result<Vec<Kernel>> {
    let mut archive = None;
    let mut kernels = Vec::new();
    for wanted in wanted {
        let numbers = wanted.chars().all(|character| character.is_ascii_digit() || character == '.');
        ensure!(
            wanted == NEWEST || numbers && machine::version(wanted).is_some(),
            "`{wanted}` is no kernel: say a version, such as 6.1, or `{NEWEST}`"
        );
        if let Some(kernel) = Kernel::kept(wanted)? {
            kernels.push(kernel);
            continue;
        }
        let archive = match &mut archive {
            Some(archive) => archive,
            None => archive.insert(Archive::open().context("Debian's kernels cannot be had")?),
        };
        kernels.push(archive.fetch(wanted).with_context(|| format!("Debian's kernel {wanted} cannot be had"))?);
    }
    Ok(kernels)
}

/// Debian's archive, as apt sees it with settings of its own: those of the machine are left alone.
struct Archive {
    /// Removed when this is dropped.
    directory: PathBuf,
}

impl Archive {
    /// Fetches the lists of packages.
    fn open() -> Result<Self> {
        ensure!(machine::find_program("apt-get").is_some(), "apt is not installed: use Debian");
        let archive = Self { directory: directory()?.join(format!("apt-{}", std::process::id())) };
        for name in ["lists/partial", "cache/archives/partial"] {
            let directory = archive.directory.join(name);
            fs::create_dir_all(&directory).with_context(|| format!("make {}", directory.display()))?;
        }
        let mirror = mirror()?;
        let sources: String =
            SUITES.iter().map(|suite| format!("deb [signed-by={KEYRING}] {mirror} {suite} main\n")).collect();
        fs::write(archive.directory.join("sources.list"), sources).context("write apt's sources")?;
        eprintln!("vm: fetching the archive's lists ...");
        step::read(archive.apt("apt-get").args(["--quiet", "update"]))?;
        Ok(archive)
    }

    fn apt(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let path = |name: &str| self.directory.join(name).display().to_string();
        for option in [
            format!("Dir::Etc::SourceList={}", path("sources.list")),
            "Dir::Etc::SourceParts=/dev/null".to_owned(),
            format!("Dir::State::Lists={}", path("lists")),
            "Dir::State::status=/dev/null".to_owned(),
            format!("Dir::Cache={}", path("cache")),
            "APT::Architecture=amd64".to_owned(),
            "APT::Architectures=amd64".to_owned(),
            "APT::Sandbox::User=root".to_owned(),
            "APT::Update::Error-Mode=any".to_owned(),
            "Acquire::Languages=none".to_owned(),
            "Acquire::Retries=3".to_owned(),
            "Acquire::http::Timeout=30".to_owned(),
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".to_owned(),
        ] {
            command.args(["-o", &option]);
        }
        command.env("DEBIAN_FRONTEND", "noninteractive").current_dir(&self.directory);
        command
    }

    /// Fetches a kernel and keeps what is needed of it, all or nothing.
    fn fetch(&self, wanted: &str) -> Result<Kernel> {
        let names = step::read(self.apt("apt-cache").args(["pkgnames", "linux-"]))?;
        let release = newest(&names, wanted).context("no package of the archive has it")?;
        eprintln!("vm: fetching Linux {release} ...");
        // Lately, image and modules have packages of their own, and this one only refers to them.
        let packages = ["linux-image", "linux-binary", "linux-modules"].map(|kind| format!("{kind}-{release}"));
        let there = packages.iter().filter(|package| names.lines().any(|name| name == *package));
        step::read(self.apt("apt-get").args(["--quiet", "download"]).args(there))?;
        let unpacked = self.directory.join(&release);
        for file in fs::read_dir(&self.directory)?.flatten().map(|entry| entry.path()) {
            if file.extension().is_some_and(|extension| extension == "deb") {
                step::read(Command::new("dpkg-deb").arg("--extract").arg(&file).arg(&unpacked))?;
                fs::remove_file(&file)?;
            }
        }
        let kept = self.directory.join(wanted);
        keep(&unpacked, &release, &kept)?;
        let directory = directory()?.join(wanted);
        fs::rename(&kept, &directory).with_context(|| format!("make {}", directory.display()))?;
        Ok(Kernel { release, directory })
    }
}

impl Drop for Archive {
    fn drop(&mut self) {
        // What cannot be removed does no harm there.
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// The mirror that this machine has Debian from.
fn mirror() -> Result<String> {
    let format = ["indextargets", "--format", "$(REPO_URI) $(CODENAME)", "Origin: Debian", "Created-By: Packages"];
    let targets = step::read(Command::new("apt-get").args(format))?;
    let mut lines = targets.lines().filter_map(|line| line.split_once(' '));
    let plain = lines.find(|(_, suite)| !suite.contains('-'));
    let (uri, _) = plain.context("apt has no mirror of Debian in its sources: add one")?;
    Ok(uri.to_owned())
}

/// The newest release that is wanted, by the names of packages.
fn newest(names: &str, wanted: &str) -> Option<String> {
    let numbers = |release: &str| -> Vec<u32> {
        release.split(|character: char| !character.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
    };
    let prefix = if wanted == NEWEST { Vec::new() } else { numbers(wanted) };
    let plain = |release: &&str| {
        release.starts_with(|character: char| character.is_ascii_digit())
            && !["-cloud-", "-rt-"].iter().any(|flavour| release.contains(flavour))
    };
    let releases = names.lines().filter_map(|name| name.strip_prefix("linux-image-")).filter(plain);
    let releases = releases.filter(|release| release.ends_with("-amd64") && numbers(release).starts_with(&prefix));
    releases.max_by_key(|release| numbers(release)).map(str::to_owned)
}

/// Puts what is needed of an unpacked package into a directory: the file to boot, modules, and a list of them.
fn keep(unpacked: &Path, release: &str, directory: &Path) -> Result<()> {
    fs::create_dir_all(directory).with_context(|| format!("make {}", directory.display()))?;
    let trees = [unpacked.join("lib/modules").join(release), unpacked.join("usr/lib/modules").join(release)];
    let tree = trees.iter().find(|tree| tree.is_dir()).context("the package has no modules")?;
    let images = [unpacked.join("boot").join(format!("vmlinuz-{release}")), tree.join("vmlinuz")];
    let image = images.iter().find(|image| image.is_file()).context("the package has no kernel")?;
    fs::copy(image, directory.join("vmlinuz")).context("copy the kernel")?;
    let files = files(&tree.join("kernel"))?;
    let mut order = Vec::new();
    for name in MODULES {
        keep_module(&files, name, directory, &mut order)?;
    }
    fs::write(directory.join("modules"), order.join("\n"))?;
    // Last: what has it is whole.
    fs::write(directory.join("release"), release)?;
    Ok(())
}

/// Unpacks a module after those it needs. One that is not there is part of the kernel.
fn keep_module(files: &[PathBuf], name: &str, directory: &Path, order: &mut Vec<String>) -> Result<()> {
    let file_name = format!("{name}.ko");
    if order.contains(&file_name) {
        return Ok(());
    }
    let is_it = |file: &&PathBuf| {
        let found = file.file_name().and_then(|name| name.to_str()).and_then(|name| name.split_once('.'));
        found.is_some_and(|(found, rest)| rest.starts_with("ko") && found.replace('-', "_") == name.replace('-', "_"))
    };
    let Some(file) = files.iter().find(is_it) else { return Ok(()) };
    let content = match file.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => {
            let output = Command::new("xz").arg("-dc").arg(file).output().context("start xz")?;
            ensure!(output.status.success(), "{} cannot be unpacked", file.display());
            output.stdout
        }
        Some("ko") => fs::read(file).with_context(|| format!("read {}", file.display()))?,
        _ => bail!("{} is packed in a way that is not known here", file.display()),
    };
    for needed in needs(&content) {
        keep_module(files, &needed, directory, order)?;
    }
    fs::write(directory.join(&file_name), content)?;
    order.push(file_name);
    Ok(())
}

/// The modules that a module says it needs.
fn needs(module: &[u8]) -> Vec<String> {
    let entries = module.split(|byte| *byte == 0);
    let needs = entries.filter_map(|entry| entry.strip_prefix(b"depends=")).map(String::from_utf8_lossy);
    needs
        .flat_map(|names| names.split(',').map(str::to_owned).collect::<Vec<_>>())
        .filter(|name| !name.is_empty())
        .collect()
}

/// Every file below a directory, in the same order always.
fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut directories = vec![directory.to_owned()];
    while let Some(directory) = directories.pop() {
        let entries = fs::read_dir(&directory).with_context(|| format!("list {}", directory.display()))?;
        for entry in entries {
            let entry = entry?;
            if entry.file_type()?.is_dir() { directories.push(entry.path()) } else { found.push(entry.path()) }
        }
    }
    found.sort_by_key(|file| Reverse(file.clone()));
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::{needs, newest};

    #[test]
    fn the_newest_plain_kernel_is_found() {
        let names = "linux-image-6.1.0-9-amd64\nlinux-image-6.1.0-50-amd64\nlinux-image-6.1.0-51-amd64-unsigned\n\
            linux-image-6.12.94+deb13-amd64\nlinux-image-6.12.107+deb13-amd64\nlinux-image-6.12.108+deb13-cloud-amd64\n\
            linux-image-amd64\nlinux-image-7.2.13+deb14-amd64\nlinux-modules-7.3+deb14-amd64\n";
        for (wanted, expected) in [
            ("6.1", Some("6.1.0-50-amd64")),
            ("6.12", Some("6.12.107+deb13-amd64")),
            ("6.12.94", Some("6.12.94+deb13-amd64")),
            ("newest", Some("7.2.13+deb14-amd64")),
            ("6.2", None),
        ] {
            assert_eq!(newest(names, wanted).as_deref(), expected, "{wanted}");
        }
    }

    #[test]
    fn a_module_says_what_it_needs() {
        assert_eq!(needs(b"\x7fELF\0license=GPL\0depends=stp,llc\0name=bridge\0"), ["stp", "llc"]);
        assert_eq!(needs(b"depends=\0"), Vec::<String>::new());
    }
}
