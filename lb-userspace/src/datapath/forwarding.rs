//! The kernel settings that the data plane depends on: that packets may be routed on from the loopback interface.
//!
//! The data plane asks the routing table as the host itself would, which for the kernel means that the packet comes from
//! the loopback interface. It gets no answer unless `net.ipv4.conf.lo.forwarding` is on, or `net.ipv6.conf.lo.forwarding` for
//! an IPv6 packet, which `net.ipv4.ip_forward` and `net.ipv6.conf.all.forwarding` switch on with all others. ip_vs forwards by
//! DR and tunnel without them, so an instance switches them on for itself: they let through nothing but packets that come in
//! by the loopback interface. A kernel without IPv6 has no such setting, and nothing is done about it.

use std::{
    fs,
    io::ErrorKind,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use crate::{datapath::place::Place, error::Error};

/// One of the settings.
struct Setting {
    /// The setting as a file. It is that of this process's network namespace.
    file: &'static str,
    /// What the name of a note begins with that says that it was off.
    note: &'static str,
    /// Whether the kernel forgets what it has learned of routers when it is switched on.
    forgets: bool,
}

const FOUR: Setting =
    Setting { file: "/proc/sys/net/ipv4/conf/lo/forwarding", note: "forwarding-was-off-in", forgets: false };
const SIX: Setting =
    Setting { file: "/proc/sys/net/ipv6/conf/lo/forwarding", note: "forwarding6-was-off-in", forgets: true };

/// The IPv6 settings, a directory for each interface.
pub(super) const SETTINGS6: &str = "/proc/sys/net/ipv6/conf";

/// Whether this kernel has IPv6, in this process's network namespace.
pub(super) fn has_ipv6() -> bool {
    Path::new(SIX.file).exists()
}

/// The settings that this kernel has.
fn settings() -> impl Iterator<Item = Setting> {
    [FOUR].into_iter().chain(has_ipv6().then_some(SIX))
}

fn read(path: &Path) -> Result<String, Error> {
    let value = fs::read_to_string(path).map_err(|source| Error::file("read", path, source))?;
    Ok(value.trim().to_owned())
}

fn write(path: &Path, value: &str) -> Result<(), Error> {
    fs::write(path, value).map_err(|source| Error::file("write", path, source))
}

impl Setting {
    /// Whether the setting is on.
    fn is_on(&self) -> Result<bool, Error> {
        Ok(read(Path::new(self.file))? != "0")
    }

    fn set(&self, on: bool) -> Result<(), Error> {
        write(Path::new(self.file), if on { "1" } else { "0" })
    }

    /// The name of a directory among an instance's pins that says that the setting was off before, in the network namespace
    /// of this process. A BPF file system takes directories, but no files of other content than pins.
    fn note(&self) -> Result<String, Error> {
        let namespace = Path::new("/proc/self/ns/net");
        let inode = fs::metadata(namespace).map_err(|source| Error::file("look at", namespace, source))?.ino();
        Ok(format!("{}-{inode}", self.note))
    }
}

/// Whether another instance than the one at `place` has found a setting off in this network namespace.
fn noted_by_another(place: &Place, note: &str) -> bool {
    let own = place.directory();
    let instances = own.parent().and_then(|root| fs::read_dir(root).ok());
    let others = instances.into_iter().flatten().flatten().map(|entry| entry.path()).filter(|path| *path != own);
    others.map(|path| path.join(note)).any(|path| path.is_dir())
}

/// Switches the settings on, and notes in the instance at `place` which were off.
///
/// # Errors
///
/// When one cannot be written.
pub fn switch_on(place: &Place) -> Result<(), Error> {
    for setting in settings() {
        let note = setting.note()?;
        if setting.is_on()? && !noted_by_another(place, &note) {
            continue;
        }
        let path = place.directory().join(note);
        match fs::create_dir(&path) {
            Err(source) if source.kind() != ErrorKind::AlreadyExists => {
                return Err(Error::file("create", &path, source));
            }
            _ => {}
        }
        if !setting.is_on()? {
            let learned = if setting.forgets { Learned::keep() } else { Learned::default() };
            let done = setting.set(true);
            learned.release().and(done)?;
        }
    }
    Ok(())
}

/// Switches the settings off again that the instance at `place` has switched on in this network namespace and no other
/// instance there needs.
///
/// # Errors
///
/// When one cannot be written.
pub fn restore(place: &Place) -> Result<(), Error> {
    for setting in settings() {
        let note = setting.note()?;
        let noted = place.directory().join(&note).is_dir();
        if noted && !noted_by_another(place, &note) {
            setting.set(false)?;
        }
    }
    Ok(())
}

/// Default routes learned from router advertisements, kept.
///
/// Whenever forwarding of IPv6 is switched on, be it of the loopback interface alone, the kernel forgets all of them but those
/// of interfaces whose `accept_ra` is 2; the host would be cut off until the next advertisement. For an interface that does
/// not forward, 1 and 2 mean the same, so those that say 1 say 2 for that moment, and nothing is lost when this process ends
/// in it.
#[derive(Default)]
struct Learned(Vec<PathBuf>);

impl Learned {
    fn keep() -> Self {
        let interfaces = fs::read_dir(SETTINGS6).into_iter().flatten().flatten();
        let interfaces = interfaces.map(|entry| entry.path()).filter(|path| !path.ends_with("all"));
        let raised = interfaces.filter(|path| !path.ends_with("default")).filter_map(|interface| {
            // An interface may go meanwhile.
            let says = |setting, value| read(&interface.join(setting)).is_ok_and(|found| found == value);
            let setting = interface.join("accept_ra");
            (says("accept_ra", "1") && says("forwarding", "0") && write(&setting, "2").is_ok()).then_some(setting)
        });
        Self(raised.collect())
    }

    fn release(self) -> Result<(), Error> {
        self.0.iter().filter(|path| path.exists()).try_for_each(|path| write(path, "1"))
    }
}
