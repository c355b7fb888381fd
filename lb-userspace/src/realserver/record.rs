//! What has been changed to make this host a real server, and where that is written down.
//!
//! One file for each network namespace, replaced as a whole and on disk before the first change is made. A namespace is
//! known by its cookie, a number that the kernel gives to no other until it is booted again.

use std::{
    fs::{self, File, OpenOptions},
    io::{ErrorKind, Write as _},
    net::IpAddr,
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{Flock, FlockArg},
    getsockopt_impl, libc, sockopt_impl,
    sys::socket::{AddressFamily, SockFlag, SockType, getsockopt, socket},
};
use serde::{Deserialize, Serialize};

use crate::{
    error,
    netlink::Interface,
    realserver::{Error, Method, setting::Name},
};

/// Where the files are.
pub const DIRECTORY: &str = "/run/xdpvs/realserver";

/// A setting of an interface that was changed.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Setting {
    /// Which one.
    pub name: Name,
    /// Its value before.
    pub before: i32,
    /// Its value since.
    pub set: i32,
}

/// A virtual address on an interface.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Server {
    /// The address.
    pub vip: IpAddr,
    /// How its packets arrive.
    pub method: Method,
    /// Whether everything it needs has been done.
    pub complete: bool,
}

/// An interface that virtual addresses have been set up on.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Site {
    /// Its name then.
    pub name: String,
    /// Its index.
    pub index: u32,
    /// What was changed for all of them.
    pub settings: Vec<Setting>,
    /// The virtual addresses.
    pub servers: Vec<Server>,
}

impl Site {
    /// The virtual address `vip` on this interface.
    pub fn server(&self, vip: IpAddr) -> Option<&Server> {
        self.servers.iter().find(|server| server.vip == vip)
    }

    pub(super) fn server_mut(&mut self, vip: IpAddr) -> Option<&mut Server> {
        self.servers.iter_mut().find(|server| server.vip == vip)
    }

    /// The virtual addresses whose packets arrive in a tunnel.
    pub(super) fn tunnelled(&self) -> impl Iterator<Item = IpAddr> {
        self.servers.iter().filter(|server| server.method == Method::Tun).map(|server| server.vip)
    }
}

/// Everything that has been changed in a network namespace.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Record {
    /// The boot of the kernel that the changes were made to.
    boot: String,
    /// Addresses that were put on the loopback interface.
    pub addresses: Vec<IpAddr>,
    /// The interfaces.
    pub sites: Vec<Site>,
}

impl Record {
    /// The interface that was called `name`.
    pub fn site(&self, name: &str) -> Option<&Site> {
        self.sites.iter().find(|site| site.name == name)
    }

    pub(super) fn site_mut_by_name(&mut self, name: &str) -> Option<&mut Site> {
        self.sites.iter_mut().find(|site| site.name == name)
    }

    /// The entry of `interface`, made if there is none.
    pub(super) fn site_mut(&mut self, interface: &Interface) -> &mut Site {
        let position = self.sites.iter().position(|site| site.name == interface.name).unwrap_or_else(|| {
            let (name, index) = (interface.name.clone(), interface.index);
            self.sites.push(Site { name, index, settings: Vec::new(), servers: Vec::new() });
            self.sites.len() - 1
        });
        &mut self.sites[position]
    }
}

sockopt_impl!(
    /// The number of a socket's network namespace, never given twice.
    NetNsCookie,
    GetOnly,
    libc::SOL_SOCKET,
    libc::SO_NETNS_COOKIE,
    u64
);

/// The number of the calling thread's network namespace: the name of its record.
///
/// # Errors
///
/// When the kernel does not tell.
pub fn namespace() -> Result<u64, error::Error> {
    let failed = |errno: nix::errno::Errno| error::Error::NetlinkSocket {
        action: "find out the network namespace",
        source: errno.into(),
    };
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None).map_err(failed)?;
    getsockopt(&socket, NetNsCookie).map_err(failed)
}

fn boot() -> Result<String, error::Error> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    let text = fs::read_to_string(path).map_err(|source| error::Error::file("read", path, source))?;
    Ok(text.trim().to_owned())
}

/// The place of one namespace's record.
pub struct Home {
    namespace: u64,
    boot: String,
    lock: Option<Flock<File>>,
}

impl Home {
    /// Opens it to look only.
    pub(super) fn look() -> Result<Self, error::Error> {
        Ok(Self { namespace: namespace()?, boot: boot()?, lock: None })
    }

    /// Opens it and waits for the lock that every change takes. It ends with the returned value, or with the process.
    pub(super) fn lock() -> Result<Self, error::Error> {
        let directory = Path::new(DIRECTORY);
        fs::create_dir_all(directory).map_err(|source| error::Error::file("create", directory, source))?;
        let file = File::open(directory).map_err(|source| error::Error::file("open", directory, source))?;
        // The directory itself is the lock: nothing is left behind when its holder is killed.
        let lock = Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, errno)| error::Error::file("lock", directory, errno.into()))?;
        Ok(Self { lock: Some(lock), ..Self::look()? })
    }

    /// The name of the namespace in file names.
    pub(super) fn namespace(&self) -> String {
        self.namespace.to_string()
    }

    fn path(&self) -> PathBuf {
        Path::new(DIRECTORY).join(format!("{}.json", self.namespace))
    }

    /// What has been written down. Empty when nothing has been, or before the kernel was booted: it is all undone then.
    pub(super) fn load(&self) -> Result<Record, Error> {
        let path = self.path();
        let text = match fs::read_to_string(&path) {
            Err(source) if source.kind() == ErrorKind::NotFound => None,
            Err(source) => return Err(error::Error::file("read", &path, source).into()),
            Ok(text) => Some(text),
        };
        let understood = |text: String| {
            serde_json::from_str(&text).map_err(|source| Error::Record { path: path.display().to_string(), source })
        };
        let record: Option<Record> = text.map(understood).transpose()?;
        let empty = Record { boot: self.boot.clone(), ..Record::default() };
        Ok(record.filter(|record| record.boot == self.boot).unwrap_or(empty))
    }

    /// Removes the records of earlier boots: all that they tell of is undone. What cannot be removed does no harm.
    pub(super) fn sweep(&self) {
        let files = fs::read_dir(DIRECTORY).into_iter().flatten().flatten().map(|entry| entry.path());
        for file in files.filter(|file| file.extension().is_some_and(|extension| extension == "json")) {
            let record: Option<Record> = fs::read(&file).ok().and_then(|text| serde_json::from_slice(&text).ok());
            if record.is_some_and(|record| record.boot != self.boot) {
                let _ = fs::remove_file(&file);
            }
        }
    }

    /// Writes down `record`, or that there is nothing to undo. It is on disk when this returns.
    pub(super) fn save(&self, record: &Record) -> Result<(), error::Error> {
        let path = self.path();
        if record.sites.is_empty() {
            return match fs::remove_file(&path) {
                Err(source) if source.kind() != ErrorKind::NotFound => Err(error::Error::file("remove", &path, source)),
                _ => Ok(()),
            };
        }
        // A killed process leaves at most this file, which the next one writes again and renames.
        let draft = path.with_extension("json~");
        let failed = |source| error::Error::file("write", &draft, source);
        let text = serde_json::to_vec_pretty(record).map_err(|source| failed(source.into()))?;
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).open(&draft).map_err(failed)?;
        file.write_all(&text).and_then(|()| file.sync_all()).map_err(failed)?;
        fs::rename(&draft, &path).map_err(failed)?;
        let directory = self.lock.as_deref().map(File::sync_all);
        directory.unwrap_or(Ok(())).map_err(|source| error::Error::file("write", Path::new(DIRECTORY), source))
    }
}
