//! The maps of a running instance.

use std::path::Path;

use aya::maps::{Map, MapData, PerCpuArray, PerCpuValues};
use lb_common::{
    abi::{
        self, AgeingValue, Config, Cursor, Dest, DestCpuRecord, DestLoad, EndpointBucket4, EndpointBucket6, Estimate,
        Instance, InstanceRecord, JournalSlot, Record as _, Service, SlotLine, View,
    },
    flow::{Bucket4, Bucket6},
    mark::{Marks, Rule, Start},
};

use crate::{
    datapath::{
        memory::{Access, Mapped, Plain},
        object::map,
        place::Place,
    },
    error::Error,
};

/// The maps of an instance that live in shared memory.
pub struct Maps {
    /// What the instance is.
    pub instance: Mapped<Instance>,
    /// The settings.
    pub config: Mapped<Config>,
    /// A change that is under way.
    pub journal: Mapped<JournalSlot>,
    /// The services.
    pub services: Mapped<Service>,
    /// The destinations.
    pub dests: Mapped<Dest>,
    /// What IPv4 addresses and ports are to the director.
    pub endpoints4: Mapped<EndpointBucket4>,
    /// What IPv6 addresses and ports are to the director.
    pub endpoints6: Mapped<EndpointBucket6>,
    /// How services choose destinations.
    pub views: Mapped<View>,
    /// Lists and rings.
    pub slots: Mapped<SlotLine>,
    /// Where schedulers stand.
    pub cursors: Mapped<Cursor>,
    /// Connections of destinations.
    pub dest_loads: Mapped<DestLoad>,
    /// Rates, and what lists take off counters.
    pub estimates: Mapped<Estimate>,
    /// Which mark rules are in force.
    pub marks: Mapped<Marks>,
    /// The mark rules.
    pub mark_rules: Mapped<Rule>,
    /// Where pieces of the addresses begin that mark rules are for.
    pub mark_starts: Mapped<Start>,
    /// The IPv4 flow table.
    pub flows4: Mapped<Bucket4>,
    /// The IPv6 flow table.
    pub flows6: Mapped<Bucket6>,
}

impl Maps {
    /// Opens the maps of the instance at `place`.
    ///
    /// # Errors
    ///
    /// [`Error::NotRunning`]; [`Error::Version`] when the instance belongs to another version of this program.
    pub fn open(place: &Place, access: Access) -> Result<Self, Error> {
        if !place.exists() {
            return Err(Error::NotRunning { name: place.name().to_owned() });
        }
        let directory = place.directory();
        let instance = mapped(&directory, map::INSTANCE, access)?;
        check_version(place, &instance)?;
        Self::in_directory(&directory, instance, access)
    }

    /// Opens the maps pinned in `directory`, whose version is known to be this one.
    pub(super) fn in_directory(directory: &Path, instance: Mapped<Instance>, access: Access) -> Result<Self, Error> {
        Ok(Self {
            instance,
            config: mapped(directory, map::CONFIG, access)?,
            journal: mapped(directory, map::JOURNAL, access)?,
            services: mapped(directory, map::SERVICES, access)?,
            dests: mapped(directory, map::DESTS, access)?,
            endpoints4: mapped(directory, map::ENDPOINTS4, access)?,
            endpoints6: mapped(directory, map::ENDPOINTS6, access)?,
            views: mapped(directory, map::VIEWS, access)?,
            slots: mapped(directory, map::SLOTS, access)?,
            cursors: mapped(directory, map::CURSORS, access)?,
            dest_loads: mapped(directory, map::DEST_LOADS, access)?,
            estimates: mapped(directory, map::ESTIMATES, access)?,
            marks: mapped(directory, map::MARKS, access)?,
            mark_rules: mapped(directory, map::MARK_RULES, access)?,
            mark_starts: mapped(directory, map::MARK_STARTS, access)?,
            flows4: mapped(directory, map::FLOWS4, Access::Read)?,
            flows6: mapped(directory, map::FLOWS6, Access::Read)?,
        })
    }

    /// What the instance is.
    pub fn instance(&self) -> InstanceRecord {
        self.instance[0].load()
    }
}

/// Directory of an instance's map pins.
pub(super) const MAPS: &str = "maps";

pub(super) fn map_data(directory: &Path, name: &str) -> Result<MapData, Error> {
    MapData::from_pin(directory.join(MAPS).join(name)).map_err(|source| Error::map("open", name, source))
}

pub(super) fn mapped<T: bytemuck::Zeroable>(
    directory: &Path,
    name: &'static str,
    access: Access,
) -> Result<Mapped<T>, Error> {
    Mapped::new(&map_data(directory, name)?, name, access)
}

fn check_version(place: &Place, instance: &Mapped<Instance>) -> Result<(), Error> {
    let found = instance[0].load();
    if (found.abi, found.layout) == (abi::VERSION, abi::LAYOUT) {
        return Ok(());
    }
    let show = |version: u32, layout: u32| format!("{version}-{layout:08x}");
    Err(Error::Version {
        name: place.name().to_owned(),
        expected: show(abi::VERSION, abi::LAYOUT),
        found: show(found.abi, found.layout),
    })
}

/// A per-CPU map of an instance.
pub struct PerCpu<T: bytemuck::Pod> {
    name: &'static str,
    array: PerCpuArray<MapData, Plain<T>>,
}

impl<T: bytemuck::Pod> PerCpu<T> {
    fn open(place: &Place, name: &'static str) -> Result<Self, Error> {
        let data = map_data(&place.directory(), name)?;
        let array = PerCpuArray::try_from(Map::PerCpuArray(data)).map_err(|source| Error::map("open", name, source))?;
        Ok(Self { name, array })
    }

    /// The value of every CPU.
    ///
    /// # Errors
    ///
    /// When the index is out of range.
    pub fn get(&self, index: u32) -> Result<Vec<T>, Error> {
        let values = self.array.get(&index, 0).map_err(|source| Error::map("read", self.name, source))?;
        Ok(values.iter().map(|value| value.0).collect())
    }

    /// Writes the same value for every CPU.
    ///
    /// # Errors
    ///
    /// When the index is out of range.
    pub fn set_all(&mut self, index: u32, value: T) -> Result<(), Error> {
        let refused = |source| Error::map("write", self.name, source);
        let cpus = aya::util::nr_cpus().map_err(|(_, source)| refused(source.into()))?;
        let values = PerCpuValues::try_from(vec![Plain(value); cpus]).map_err(|source| refused(source.into()))?;
        self.array.set(index, values, 0).map_err(refused)
    }
}

/// What CPUs keep about destinations.
pub fn dest_cpus(place: &Place) -> Result<PerCpu<DestCpuRecord>, Error> {
    PerCpu::open(place, map::DEST_CPUS)
}

/// Packets not forwarded, by the number of the reason, and what else is counted, by the number of the event.
pub fn reasons(place: &Place) -> Result<PerCpu<u64>, Error> {
    PerCpu::open(place, map::REASONS)
}

/// Where ageing stands.
pub fn ageing(place: &Place) -> Result<AgeingValue, Error> {
    let data = map_data(&place.directory(), map::AGEING)?;
    let refused = |source| Error::map("read", map::AGEING, source);
    let array: aya::maps::Array<_, Plain<AgeingValue>> = Map::Array(data).try_into().map_err(refused)?;
    Ok(array.get(&0, 0).map_err(refused)?.0)
}
