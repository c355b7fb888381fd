//! Where an instance lives: a directory of pins on a BPF file system, and the lock on it.

use std::{
    fs::{self, File},
    io::ErrorKind,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

use crate::error::Error;

/// Environment variable that names another mount point of a BPF file system.
pub const BPFFS_VARIABLE: &str = "XDPVS_BPFFS";

/// Where a BPF file system is looked for, in this order.
///
/// `ip netns exec` mounts a new sysfs over `/sys`, which hides the file system mounted below it. The one of the first
/// process is still reachable through its root.
const CANDIDATES: [&str; 3] = ["/sys/fs/bpf", "/run/xdpvs/bpf", "/proc/1/root/sys/fs/bpf"];

/// The directory in the file system that holds all instances.
const DIRECTORY: &str = "xdpvs";

/// The directory of an instance that holds the generations of its programs.
pub(super) const GENERATIONS: &str = "programs";

/// Where one instance's pins are.
#[derive(Clone, Debug)]
pub struct Place {
    name: String,
    root: PathBuf,
}

impl Place {
    /// Finds the instance `name`, or the place where it would be created when it does not exist.
    ///
    /// # Errors
    ///
    /// When the name is not usable or no BPF file system is mounted.
    pub fn find(name: &str) -> Result<Self, Error> {
        check_name(name)?;
        let mounted = mounted()?;
        let places = mounted.iter().map(|mount| Self { name: name.to_owned(), root: mount.join(DIRECTORY) });
        let place = places.clone().find(|place| place.directory().is_dir()).or_else(|| places.clone().next());
        place.ok_or_else(|| Error::NoBpffs { looked: looked_at() })
    }

    /// The instance's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The directory of the instance's pins.
    pub fn directory(&self) -> PathBuf {
        self.root.join(&self.name)
    }

    /// Where the pins of an instance are put while it is being created. Renamed to [`Place::directory`] when all is
    /// done, so what is there is whole.
    pub fn nursery(&self) -> PathBuf {
        self.root.join(format!("{}~", self.name))
    }

    /// The directory of the generations of the instance's programs.
    ///
    /// Each generation is a directory with a number for a name, the newest the greatest. Older ones are left only by a
    /// process that was killed before it had exchanged all links.
    pub fn generations(&self) -> PathBuf {
        self.directory().join(GENERATIONS)
    }

    /// The directory of the instance's newest programs.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn programs(&self) -> Result<PathBuf, Error> {
        let directory = self.generations();
        let newest = generations(&directory)?.into_iter().max();
        newest
            .map(|number| directory.join(number.to_string()))
            .ok_or_else(|| Error::file("find programs in", &directory, ErrorKind::NotFound.into()))
    }

    /// Whether the instance exists.
    pub fn exists(&self) -> bool {
        self.directory().is_dir()
    }

    /// Makes the directory for all instances.
    ///
    /// # Errors
    ///
    /// When it cannot be made.
    pub fn prepare(&self) -> Result<(), Error> {
        fs::create_dir_all(&self.root).map_err(|source| Error::file("create", &self.root, source))
    }

    /// Waits for the lock that every change takes. It ends with the returned value, or with the process.
    ///
    /// # Errors
    ///
    /// When the directory of all instances cannot be opened.
    pub fn lock(&self) -> Result<Lock, Error> {
        self.prepare()?;
        let directory = File::open(&self.root).map_err(|source| Error::file("open", &self.root, source))?;
        // The file system's own directory is the lock: nothing is left behind when its holder is killed.
        Flock::lock(directory, FlockArg::LockExclusive)
            .map(Lock)
            .map_err(|(_, errno)| Error::file("lock", &self.root, errno.into()))
    }
}

/// The numbers of the generations in `directory`.
pub(super) fn generations(directory: &Path) -> Result<Vec<u32>, Error> {
    let entries = fs::read_dir(directory).map_err(|source| Error::file("list", directory, source))?;
    Ok(entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
}

/// The right to change instances.
#[derive(Debug)]
pub struct Lock(#[expect(dead_code, reason = "held for its drop")] Flock<File>);

/// Removes a directory of pins with everything below it. What is already gone is no error.
///
/// # Errors
///
/// When something cannot be removed.
pub fn remove_tree(directory: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(directory) {
        Err(source) if source.kind() != ErrorKind::NotFound => Err(Error::file("remove", directory, source)),
        _ => Ok(()),
    }
}

fn check_name(name: &str) -> Result<(), Error> {
    let usable = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if (1..=64).contains(&name.len()) && name.chars().all(usable) {
        Ok(())
    } else {
        Err(Error::InstanceName { name: name.to_owned() })
    }
}

/// Where a BPF file system is looked for, best first.
pub(crate) fn looked_at() -> Vec<PathBuf> {
    match std::env::var_os(BPFFS_VARIABLE) {
        Some(path) => vec![path.into()],
        None => CANDIDATES.map(PathBuf::from).to_vec(),
    }
}

/// The BPF file systems that are mounted, best first.
///
/// # Errors
///
/// When the kernel does not tell.
pub(crate) fn mounted() -> Result<Vec<PathBuf>, Error> {
    let mut found = Vec::new();
    for path in looked_at() {
        match statfs(&path) {
            Ok(status) if status.filesystem_type() == BPF_FS_MAGIC => found.push(path),
            Ok(_) | Err(Errno::ENOENT | Errno::EACCES | Errno::ENOTDIR) => {}
            Err(errno) => return Err(Error::file("look at", &path, errno.into())),
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_make_no_file_are_refused() {
        for name in ["", "a/b", "..", "a.b", "a~", "ä", &"x".repeat(65)] {
            assert!(matches!(check_name(name), Err(Error::InstanceName { .. })), "{name}");
        }
        for name in ["default", "vip-1", "A_2"] {
            assert!(check_name(name).is_ok());
        }
    }
}
