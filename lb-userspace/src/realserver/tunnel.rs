//! The program that takes packets out of the tunnel, on one interface: its pins, and the addresses it serves.

use std::{
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfLoader, Pod,
    maps::{HashMap, Map, MapData, MapError, PerCpuArray},
    programs::{
        ProgramError, Xdp, XdpMode,
        links::{FdLink, PinnedLink},
    },
};
use lb_common::{
    addr::{Ip4, Ip6},
    decapsulation::Decapsulation,
};

use crate::{
    datapath::{
        object::{
            self,
            realserver::{DECAPSULATE, OUTCOMES, VIPS4, VIPS6},
        },
        place::{self, remove_tree},
    },
    error::Error,
    netlink::Interface,
    realserver::record::Home,
};

/// The directory on the BPF file system that holds all namespaces.
const DIRECTORY: &str = "xdpvs-realserver";

/// The pin of the link, made last: where it is, everything is.
const LINK: &str = "link";

/// The maps that are pinned beside it.
const PINNED: [&str; 3] = [VIPS4, VIPS6, OUTCOMES];

/// The most virtual addresses of each family that one interface serves from tunnels.
pub(super) const VIPS_MAX: usize = 1024;

/// The place of the program on one interface.
pub(super) struct Tunnel {
    /// The interface's directory, in that of its namespace.
    directory: PathBuf,
}

impl Tunnel {
    /// Finds the program on the interface called `name`, or the place where it would be.
    pub(super) fn find(home: &Home, name: &str) -> Result<Self, Error> {
        // The BPF file system takes no `.` in a name, and interface names hold no `:`.
        let name = name.replace('.', ":");
        let mounted = place::mounted()?;
        let directory = |mount: &PathBuf| mount.join(DIRECTORY).join(home.namespace()).join(&name);
        let mut tunnels: Vec<Self> = mounted.iter().map(|mount| Self { directory: directory(mount) }).collect();
        let position = tunnels.iter().position(|tunnel| tunnel.directory.is_dir()).unwrap_or(0);
        if tunnels.is_empty() {
            Err(Error::NoBpffs { looked: place::looked_at() })
        } else {
            Ok(tunnels.swap_remove(position))
        }
    }

    /// The program that the pinned link runs, if it does so on this interface.
    pub(super) fn program_on(&self, interface: &Interface) -> Option<u32> {
        let link = PinnedLink::from_pin(self.directory.join(LINK)).ok()?;
        let program = FdLink::from(link).info().ok()?.program_id();
        // A link whose interface has been removed is on none.
        interface.xdp.filter(|xdp| xdp.program == program).map(|xdp| xdp.program)
    }

    /// Whether the program is on this interface.
    pub(super) fn is_attached(&self, interface: &Interface) -> bool {
        self.program_on(interface).is_some()
    }

    /// Whether the pins are those of this version's program.
    pub(super) fn is_current(&self) -> bool {
        PINNED.iter().all(|name| self.directory.join(name).exists())
    }

    /// Puts the program on the interface, for these addresses. Returns why the driver does not run it, when it has to run
    /// in the kernel's receive path.
    pub(super) fn attach(&self, interface: &Interface, vips: &[IpAddr]) -> Result<Option<ProgramError>, Error> {
        self.sweep();
        // What a killed process has left.
        remove_tree(&self.directory)?;
        fs::create_dir_all(&self.directory).map_err(|source| Error::file("create", &self.directory, source))?;
        let mut loader = EbpfLoader::new();
        for name in PINNED {
            loader.map_pin_path(name, self.directory.join(name));
        }
        let mut ebpf = loader.load(object::REALSERVER)?;
        for vip in vips {
            self.add(*vip)?;
        }
        self.put_on(&mut ebpf, interface)
    }

    fn put_on(&self, ebpf: &mut Ebpf, interface: &Interface) -> Result<Option<ProgramError>, Error> {
        let failed = |action| move |source| Error::program(action, DECAPSULATE, source);
        let program = ebpf.program_mut(DECAPSULATE).ok_or(Error::NoProgram { program: DECAPSULATE })?;
        let program: &mut Xdp = program.try_into().map_err(failed("use"))?;
        program.load().map_err(failed("load"))?;
        let (id, refusal) = match program.attach_to_if_index(interface.index, XdpMode::Driver) {
            Ok(id) => (id, None),
            Err(refusal) => {
                let id = program.attach_to_if_index(interface.index, XdpMode::Skb).map_err(failed("attach"))?;
                (id, Some(refusal))
            }
        };
        let link = program.take_link(id).map_err(failed("attach"))?;
        let kept = FdLink::try_from(link);
        let link = kept.map_err(|source| Error::Link { action: "keep", name: interface.name.clone(), source })?;
        let path = self.directory.join(LINK);
        link.pin(&path).map_err(|source| Error::Pin { path, source })?;
        Ok(refusal)
    }

    /// Removes the pins of programs whose interfaces are gone, mostly with their namespaces, and which nobody will take
    /// down. They hold nothing but memory: what cannot be removed does no harm.
    fn sweep(&self) {
        let list = |directory: &Path| {
            let entries = fs::read_dir(directory).into_iter().flatten().flatten();
            entries.map(|entry| entry.path()).collect::<Vec<_>>()
        };
        let Some(root) = self.directory.ancestors().nth(2) else { return };
        for namespace in list(root) {
            for interface in list(&namespace) {
                if is_dead(&interface.join(LINK)) {
                    let _ = remove_tree(&interface);
                }
            }
            let _ = fs::remove_dir(&namespace);
        }
    }

    /// Takes the program off the interface. What is already gone is no error.
    pub(super) fn detach(&self) -> Result<(), Error> {
        remove_tree(&self.directory)?;
        // Those of other interfaces and of other namespaces may be in them.
        for directory in self.directory.ancestors().skip(1).take(2) {
            if fs::remove_dir(directory).is_err() {
                break;
            }
        }
        Ok(())
    }

    fn map(&self, name: &'static str) -> Result<MapData, Error> {
        MapData::from_pin(self.directory.join(name)).map_err(|source| Error::map("open", name, source))
    }

    fn vips<K: Pod>(&self, name: &'static str) -> Result<HashMap<MapData, K, u32>, Error> {
        HashMap::try_from(Map::HashMap(self.map(name)?)).map_err(|source| Error::map("open", name, source))
    }

    fn insert<K: Pod>(&self, name: &'static str, key: K) -> Result<(), Error> {
        self.vips(name)?.insert(key, 1, 0).map_err(|source| Error::map("write", name, source))
    }

    fn erase<K: Pod>(&self, name: &'static str, key: K) -> Result<(), Error> {
        if !self.directory.join(name).exists() {
            return Ok(());
        }
        match self.vips(name)?.remove(&key) {
            Err(MapError::KeyNotFound) | Ok(()) => Ok(()),
            Err(source) => Err(Error::map("write", name, source)),
        }
    }

    /// Lets packets for `vip` out of the tunnel.
    pub(super) fn add(&self, vip: IpAddr) -> Result<(), Error> {
        match vip {
            IpAddr::V4(vip) => self.insert(VIPS4, Ip4::new(vip.octets()).raw()),
            IpAddr::V6(vip) => self.insert(VIPS6, Ip6::new(vip.octets()).raw()),
        }
    }

    /// Leaves packets for `vip` where they are. What is already gone is no error.
    pub(super) fn remove(&self, vip: IpAddr) -> Result<(), Error> {
        match vip {
            IpAddr::V4(vip) => self.erase(VIPS4, Ip4::new(vip.octets()).raw()),
            IpAddr::V6(vip) => self.erase(VIPS6, Ip6::new(vip.octets()).raw()),
        }
    }

    /// What became of packets for the addresses since the program was put on the interface, and how many.
    pub(super) fn outcomes(&self) -> Result<Vec<(Decapsulation, u64)>, Error> {
        let failed = |source| Error::map("read", OUTCOMES, source);
        let map: PerCpuArray<_, u64> = Map::PerCpuArray(self.map(OUTCOMES)?).try_into().map_err(failed)?;
        let count = |outcome: Decapsulation| Ok((outcome, map.get(&(outcome as u32), 0).map_err(failed)?.iter().sum()));
        Decapsulation::ALL.iter().copied().map(count).collect()
    }
}

/// Whether a link is pinned here whose interface is gone.
fn is_dead(pin: &Path) -> bool {
    let Ok(link) = PinnedLink::from_pin(pin).map(FdLink::from) else { return false };
    let Ok(info) = link.info() else { return false };
    // The kernel tells the interface here and in a part of the link's information that aya does not show.
    let ours = format!("link_id:\t{}", info.id());
    let descriptors = fs::read_dir("/proc/self/fdinfo").into_iter().flatten().flatten();
    let mut texts = descriptors.filter_map(|entry| fs::read_to_string(entry.path()).ok());
    texts.any(|text| {
        let has = |wanted: &str| text.lines().any(|line| line == wanted);
        has("link_type:\txdp") && has(&ours) && has("ifindex:\t0")
    })
}
