//! Creating an instance, and giving a running one new programs.
//!
//! Everything of a new instance is made and pinned in its nursery, a directory of its own, and the directory is renamed
//! when it is whole. What a killed process leaves in a nursery is removed by the next.

use std::{
    fs,
    num::NonZero,
    panic::resume_unwind,
    path::Path,
    sync::{Mutex, PoisonError},
    thread,
};

use aya::{
    Ebpf, EbpfLoader, GlobalData,
    maps::{MapData, ProgramArray},
    programs::{Program, ProgramError, ProgramType, SchedClassifier, Xdp},
    sys::is_helper_supported,
};
use aya_obj::generated::bpf_func_id;
use lb_common::{
    abi::{self, AgeingRecord, Instance, InstanceRecord, Record as _, SLOTS_PER_LINE, Stage},
    hash::Seed,
};

use crate::{
    control::settings,
    datapath::{
        memory::{Access, Mapped},
        object::{self, STAGES, map, program},
        open::{self, MAPS, Maps},
        pace::Pace,
        place::{self, GENERATIONS, Lock, Place, remove_tree},
        run::Control,
        sizes::Capacity,
    },
    error::Error,
};

/// The programs of an instance, loaded.
pub struct Programs {
    ebpf: Ebpf,
}

impl Programs {
    /// The XDP program.
    ///
    /// # Errors
    ///
    /// When the object has none, which is a defect of this build.
    pub fn xdpvs(&mut self) -> Result<&mut Xdp, Error> {
        self.get(program::XDPVS)
    }

    /// The TC program.
    ///
    /// # Errors
    ///
    /// When the object has none, which is a defect of this build.
    pub fn neighbour(&mut self) -> Result<&mut SchedClassifier, Error> {
        self.get(program::NEIGHBOUR)
    }

    fn get<'a, P>(&'a mut self, name: &'static str) -> Result<&'a mut P, Error>
    where
        &'a mut P: TryFrom<&'a mut aya::programs::Program, Error = aya::programs::ProgramError>,
    {
        let found = self.ebpf.program_mut(name).ok_or(Error::NoProgram { program: name })?;
        found.try_into().map_err(|source| Error::program("use", name, source))
    }
}

/// Makes an instance at `place`, which does not exist.
///
/// # Errors
///
/// When the kernel lacks something or refuses something; nothing is left behind then.
pub fn create(place: &Place, _: &Lock, capacity: &Capacity) -> Result<Programs, Error> {
    require_kernel()?;
    let nursery = place.nursery();
    remove_tree(&nursery)?;
    let result = create_in(&nursery, capacity).and_then(|programs| {
        let directory = place.directory();
        fs::rename(&nursery, &directory).map_err(|source| Error::file("create", &directory, source))?;
        Ok(programs)
    });
    if result.is_err() {
        remove_tree(&nursery)?;
    }
    result
}

fn create_in(nursery: &Path, capacity: &Capacity) -> Result<Programs, Error> {
    let programs_directory = nursery.join(GENERATIONS).join("1");
    for directory in [&nursery.join(MAPS), &programs_directory] {
        fs::create_dir_all(directory).map_err(|source| Error::file("create", directory, source))?;
    }
    let record = InstanceRecord {
        abi: abi::VERSION,
        layout: abi::LAYOUT,
        hz: ticks_per_second(),
        flow_buckets: capacity.flow_buckets(),
        flow_buckets6: capacity.flow_buckets6(),
        endpoint_buckets: capacity.endpoint_buckets(),
        services: capacity.services,
        dests: capacity.dests,
        slots: capacity.slots(),
        max_flows: capacity.flows,
        max_flows6: capacity.flows6,
        journal: capacity.journal(),
        generation: 0,
        seed: random_seed()?,
        next_order: 1,
        services_used: 0,
        dests_used: 0,
    };
    let programs = load(nursery, &record, &programs_directory)?;
    let instance: Mapped<Instance> = open::mapped(nursery, map::INSTANCE, Access::Write)?;
    instance[0].store(&record);
    let maps = Maps::in_directory(nursery, instance, Access::Write)?;
    settings::set_defaults(&maps.config[0], record.hz);
    Ok(programs)
}

/// Loads new programs for the instance at `place` and pins them beside its old ones, which links still run. When no link
/// runs them any longer, [`retire`] removes the old ones.
///
/// # Errors
///
/// When the kernel refuses the programs; the old ones stay then.
pub fn replace(place: &Place, _: &Lock, maps: &Maps) -> Result<Programs, Error> {
    let generations = place.generations();
    let nursery = generations.join("next~");
    remove_tree(&nursery)?;
    fs::create_dir(&nursery).map_err(|source| Error::file("create", &nursery, source))?;
    let programs = load(&place.directory(), &maps.instance(), &nursery)?;
    let newest = place::generations(&generations)?.into_iter().max().unwrap_or(0);
    let pins = generations.join((newest + 1).to_string());
    fs::rename(&nursery, &pins).map_err(|source| Error::file("create", &pins, source))?;
    Ok(programs)
}

/// Removes the newest programs of the instance at `place`, which no link runs: the ones before are the newest again.
///
/// # Errors
///
/// When a pin cannot be removed.
pub fn discard_newest(place: &Place, _: &Lock) -> Result<(), Error> {
    remove_tree(&place.programs()?)
}

/// Removes the instance at `place`, which no link runs, and what a killed process may have left of one.
///
/// # Errors
///
/// When a pin cannot be removed.
pub fn remove(place: &Place, _: &Lock) -> Result<(), Error> {
    let (directory, nursery) = (place.directory(), place.nursery());
    remove_tree(&nursery)?;
    // Under its own name there is all of an instance or nothing.
    match fs::rename(&directory, &nursery) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            return Err(Error::file("remove", &directory, source));
        }
        _ => {}
    }
    remove_tree(&nursery)
}

/// Removes all programs of the instance at `place` but the newest.
///
/// # Errors
///
/// When a pin cannot be removed.
pub fn retire(place: &Place, _: &Lock) -> Result<(), Error> {
    let directory = place.generations();
    let numbers = place::generations(&directory)?;
    let newest = numbers.iter().max();
    let old = numbers.iter().filter(|number| Some(*number) != newest);
    old.map(|number| directory.join(number.to_string())).try_for_each(|directory| remove_tree(&directory))
}

/// Lets the ageing timer of the instance run, under the programs that are pinned now. With no pace given it keeps the one
/// it has, and a new one has the usual.
///
/// # Errors
///
/// When the kernel does not start it.
pub fn start_ageing(place: &Place, maps: &Maps, pace: Option<Pace>) -> Result<(), Error> {
    let AgeingRecord { slice, interval_ns, share, .. } = open::ageing(place)?.record;
    let kept = if slice == 0 { Pace::usual(maps.instance().buckets()) } else { Pace { slice, interval_ns, share } };
    Control::open(place)?.start_ageing(pace.unwrap_or(kept))
}

/// Loads the programs, with maps that are pinned below `directory` or are pinned there now, and pins them in `pins`.
fn load(directory: &Path, record: &InstanceRecord, pins: &Path) -> Result<Programs, Error> {
    let seed = record.seed.words();
    let mut loader = EbpfLoader::new();
    for (name, entries) in [
        (map::JOURNAL, record.journal),
        (map::SERVICES, record.services),
        (map::DESTS, record.dests),
        (map::ENDPOINTS4, record.endpoint_buckets),
        (map::ENDPOINTS6, record.endpoint_buckets),
        (map::VIEWS, 2 * record.services),
        (map::SLOTS, record.slots / SLOTS_PER_LINE),
        (map::CURSORS, 2 * record.services),
        (map::DEST_LOADS, record.dests),
        (map::DEST_CPUS, record.dests),
        (map::FLOWS4, record.flow_buckets),
        (map::FLOWS6, record.flow_buckets6),
        (map::ESTIMATES, record.dests + record.services + 1),
    ] {
        loader.map_max_entries(name, entries);
    }
    for name in map::ALL {
        loader.map_pin_path(name, directory.join(MAPS).join(name));
    }
    for (name, value) in [
        ("HZ", GlobalData::from(&record.hz)),
        ("FLOW_BUCKETS", GlobalData::from(&record.flow_buckets)),
        ("FLOW_BUCKETS6", GlobalData::from(&record.flow_buckets6)),
        ("ENDPOINT_BUCKETS", GlobalData::from(&record.endpoint_buckets)),
        ("SEED", GlobalData::from(&seed)),
    ] {
        loader.override_global(name, value, true);
    }
    let mut ebpf = loader.load(object::DIRECTOR)?;
    verify(&mut ebpf)?;
    let stages = ebpf.take_map(STAGES).ok_or(Error::NoProgram { program: STAGES })?;
    let mut stages = ProgramArray::try_from(stages).map_err(|source| Error::map("open", STAGES, source))?;
    let mut programs = Programs { ebpf };
    for (index, name) in Stage::programs() {
        let xdp: &mut Xdp = programs.get(name)?;
        let fd = xdp.fd().and_then(|fd| fd.try_clone().map_err(Into::into));
        let fd = fd.map_err(|source| Error::program("keep", name, source))?;
        stages.set(index, &fd, 0).map_err(|source| Error::map("write", STAGES, source))?;
    }
    pin(&mut programs, stages, pins)?;
    Ok(programs)
}

/// Gives the programs to the kernel, as many at a time as there are CPUs: its verifier takes its time for each.
fn verify(ebpf: &mut Ebpf) -> Result<(), Error> {
    let workers = thread::available_parallelism().map_or(1, NonZero::get);
    let name_of = |name: &str| {
        let mut names = program::ALL.into_iter().chain(Stage::programs().map(|(_, name)| name));
        names.find(|known| *known == name)
    };
    let waiting: Vec<_> = ebpf.programs_mut().filter_map(|(name, program)| Some((name_of(name)?, program))).collect();
    let waiting = Mutex::new(waiting.into_iter());
    let next = || waiting.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work = || {
        while let Some((name, program)) = next() {
            match program {
                Program::Xdp(xdp) => xdp.load(),
                Program::SchedClassifier(classifier) => classifier.load(),
                _ => Err(ProgramError::UnexpectedProgramType),
            }
            .map_err(|source| Error::program("load", name, source))?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().unwrap_or_else(|panic| resume_unwind(panic)))
    })
}

fn pin(programs: &mut Programs, stages: ProgramArray<MapData>, directory: &Path) -> Result<(), Error> {
    for name in program::ALL {
        let path = directory.join(name);
        let found = programs.ebpf.program_mut(name).ok_or(Error::NoProgram { program: name })?;
        found.pin(&path).map_err(|source| Error::Pin { path, source })?;
    }
    // Pinned, the map keeps the programs of the stages; unpinned, it would lose them with this process.
    let path = directory.join(STAGES);
    stages.pin(&path).map_err(|source| Error::Pin { path, source })
}

/// Ticks per second of the running kernel: its coarse clocks advance by one tick at a time.
fn ticks_per_second() -> u32 {
    let tick = nix::time::clock_getres(nix::time::ClockId::CLOCK_MONOTONIC_COARSE)
        .map_or(4_000_000, |resolution| resolution.tv_nsec());
    u32::try_from((1_000_000_000 + tick / 2) / tick).unwrap_or(250)
}

fn random_seed() -> Result<Seed, Error> {
    use std::io::Read as _;
    let path = Path::new("/dev/urandom");
    let mut seed = [0u64; 3];
    fs::File::open(path)
        .and_then(|mut file| file.read_exact(bytemuck::bytes_of_mut(&mut seed)))
        .map_err(|source| Error::file("read", path, source))?;
    Ok(Seed::new(seed))
}

/// Where the kernel describes its own types.
const BTF: &str = "/sys/kernel/btf/vmlinux";

/// Asks the kernel for what the programs need, so that a lack of it is named.
fn require_kernel() -> Result<(), Error> {
    use bpf_func_id::{BPF_FUNC_fib_lookup, BPF_FUNC_loop, BPF_FUNC_redirect_neigh, BPF_FUNC_timer_start};
    if !nix::unistd::geteuid().is_root() {
        return Err(Error::NotRoot);
    }
    let lacks = |feature, remedy| Error::Kernel { release: release(), feature, remedy };
    for (kind, helper, feature, remedy) in [
        (
            ProgramType::Xdp,
            BPF_FUNC_fib_lookup,
            "the BPF helper fib_lookup",
            "boot one that is built with CONFIG_BPF_SYSCALL and CONFIG_INET",
        ),
        (ProgramType::Xdp, BPF_FUNC_loop, "the BPF helper loop", "boot Linux 6.1 or later, built with CONFIG_BPF_JIT"),
        (
            ProgramType::Xdp,
            BPF_FUNC_timer_start,
            "BPF timers",
            "boot Linux 6.1 or later, built with CONFIG_BPF_SYSCALL",
        ),
        (
            ProgramType::SchedClassifier,
            BPF_FUNC_redirect_neigh,
            "the BPF helper redirect_neigh",
            "boot Linux 6.1 or later, built with CONFIG_NET_CLS_BPF",
        ),
    ] {
        let supported = is_helper_supported(kind, helper).map_err(|source| Error::program("probe", "a", source))?;
        if !supported {
            return Err(lacks(feature, remedy));
        }
    }
    let Ok(types) = fs::read(BTF) else {
        return Err(lacks("a description of its types", "boot one that is built with CONFIG_DEBUG_INFO_BTF"));
    };
    if !names_source_address(&types) {
        return Err(lacks(
            "BPF_FIB_LOOKUP_SRC",
            "boot Linux 6.7 or later, or a current update of an older longterm kernel",
        ));
    }
    Ok(())
}

/// Whether `bpf_fib_lookup` of the kernel with these types says from which address the host would send.
///
/// Without, nobody would know what to put into the outer header of a tunnel. Longterm kernels had it added later: their
/// version does not tell.
fn names_source_address(types: &[u8]) -> bool {
    memchr::memmem::find(types, b"\0BPF_FIB_LOOKUP_SRC\0").is_some()
}

fn release() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease").map_or_else(|_| "unknown".into(), |text| text.trim().to_owned())
}
