//! The one kernel setting that the data plane depends on: that packets may be routed on from the loopback interface.
//!
//! The data plane asks the routing table as the host itself would, which for the kernel means that the packet comes from
//! the loopback interface. It gets no answer unless `net.ipv4.conf.lo.forwarding` is on, which `net.ipv4.ip_forward`
//! switches on with all others. ip_vs forwards by DR and tunnel without it, so an instance switches it on for itself: it lets
//! through nothing but packets that come in by the loopback interface.

use std::{fs, io::ErrorKind, os::unix::fs::MetadataExt as _, path::Path};

use crate::{datapath::place::Place, error::Error};

/// The setting as a file. It is that of this process's network namespace.
const FILE: &str = "/proc/sys/net/ipv4/conf/lo/forwarding";

/// Whether the setting is on.
fn is_on() -> Result<bool, Error> {
    let path = Path::new(FILE);
    let value = fs::read_to_string(path).map_err(|source| Error::file("read", path, source))?;
    Ok(value.trim() != "0")
}

fn set(on: bool) -> Result<(), Error> {
    let path = Path::new(FILE);
    fs::write(path, if on { "1" } else { "0" }).map_err(|source| Error::file("write", path, source))
}

/// The name of a directory among an instance's pins that says that the setting was off before, in the network namespace of
/// this process. A BPF file system takes directories, but no files of other content than pins.
fn note() -> Result<String, Error> {
    let namespace = Path::new("/proc/self/ns/net");
    let inode = fs::metadata(namespace).map_err(|source| Error::file("look at", namespace, source))?.ino();
    Ok(format!("forwarding-was-off-in-{inode}"))
}

/// Whether another instance than the one at `place` has found the setting off in this network namespace.
fn noted_by_another(place: &Place, note: &str) -> bool {
    let own = place.directory();
    let instances = own.parent().and_then(|root| fs::read_dir(root).ok());
    let others = instances.into_iter().flatten().flatten().map(|entry| entry.path()).filter(|path| *path != own);
    others.map(|path| path.join(note)).any(|path| path.is_dir())
}

/// Switches the setting on, and notes in the instance at `place` that it was off.
///
/// # Errors
///
/// When it cannot be written.
pub fn switch_on(place: &Place) -> Result<(), Error> {
    let note = note()?;
    if is_on()? && !noted_by_another(place, &note) {
        return Ok(());
    }
    let path = place.directory().join(note);
    match fs::create_dir(&path) {
        Err(source) if source.kind() != ErrorKind::AlreadyExists => return Err(Error::file("create", &path, source)),
        _ => {}
    }
    set(true)
}

/// Switches the setting off again, if the instance at `place` has switched it on in this network namespace and no other
/// instance there needs it.
///
/// # Errors
///
/// When it cannot be written.
pub fn restore(place: &Place) -> Result<(), Error> {
    let note = note()?;
    let noted = place.directory().join(&note).is_dir();
    if noted && !noted_by_another(place, &note) { set(false) } else { Ok(()) }
}
