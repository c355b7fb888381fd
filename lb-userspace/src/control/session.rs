//! A running instance, opened to be looked at or changed.

use std::{
    thread,
    time::{Duration, Instant},
};

use lb_common::abi::{DestCpuRecord, switch};

use crate::{
    control::{
        change::{Change, Commit},
        journal, marks,
        model::{Identity, Refusal, Rule},
        shared::Counters,
        state::State,
    },
    datapath::{
        memory::Access,
        open::{self, Maps, PerCpu},
        place::{Lock, Place},
        run::{Control, Ending},
    },
    error::Error,
};

/// How long a reader waits for a change to end before it finds out whether anybody is still at it.
const PATIENCE: Duration = Duration::from_millis(200);

/// A running instance.
pub struct Session {
    place: Place,
    maps: Maps,
    counters: KernelCounters,
}

impl Session {
    /// Opens the instance at `place`.
    ///
    /// # Errors
    ///
    /// [`Error::NotRunning`], or [`Error::Version`].
    pub fn open(place: &Place) -> Result<Self, Error> {
        let maps = Maps::open(place, Access::Write)?;
        Ok(Self { place: place.clone(), maps, counters: KernelCounters(open::dest_cpus(place)?) })
    }

    /// Where the instance is.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Its maps.
    pub fn maps(&self) -> &Maps {
        &self.maps
    }

    /// The counters of its destinations.
    pub fn counters(&self) -> &KernelCounters {
        &self.counters
    }

    /// The configuration, whole: never in the middle of a change.
    ///
    /// # Errors
    ///
    /// When a change that a killed process has begun cannot be finished.
    pub fn state(&mut self) -> Result<State, Error> {
        let begun = Instant::now();
        loop {
            if let Some(state) = journal::snapshot(&self.maps.shared()) {
                return Ok(state);
            }
            if begun.elapsed() > PATIENCE {
                let lock = self.place.lock()?;
                self.recover(&lock)?;
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Finishes a change that a killed process has begun.
    ///
    /// # Errors
    ///
    /// When it cannot be finished.
    pub fn recover(&mut self, _: &Lock) -> Result<(), Error> {
        journal::recover(&self.maps.shared(), &mut self.counters)
    }

    /// Plans a change and puts it in force, all of it or nothing. One change is made at a time: another waits.
    ///
    /// # Errors
    ///
    /// What `plan` fails with, or why the change cannot be put in force; nothing has changed then.
    pub fn change<T, E>(&mut self, plan: impl FnOnce(&mut Change<'_>) -> Result<T, E>) -> Result<T, E>
    where
        E: From<Error> + From<Commit>,
    {
        let lock = self.place.lock()?;
        self.change_under(&lock, plan)
    }

    /// Changes the mark rules, all of them or none.
    ///
    /// # Errors
    ///
    /// What `plan` fails with, or why the rules cannot be put in force; nothing has changed then.
    pub fn change_marks<E>(&mut self, _: &Lock, plan: impl FnOnce(&mut Vec<Rule>) -> Result<(), E>) -> Result<(), E>
    where
        E: From<Refusal>,
    {
        let shared = self.maps.shared();
        let mut rules = marks::load(&shared);
        plan(&mut rules)?;
        Ok(marks::put_in_force(&shared, &rules)?)
    }

    /// [`Session::change`] for a caller that holds the lock.
    ///
    /// # Errors
    ///
    /// As [`Session::change`].
    pub fn change_under<T, E>(
        &mut self,
        lock: &Lock,
        plan: impl FnOnce(&mut Change<'_>) -> Result<T, E>,
    ) -> Result<T, E>
    where
        E: From<Error> + From<Commit>,
    {
        self.recover(lock)?;
        let mut change = Change::begin(self.maps.shared(), &self.counters, seconds_since_boot())?;
        let result = plan(&mut change)?;
        let removes = change.removes();
        change.commit(&mut self.counters)?;
        if removes {
            self.expire()?;
        }
        Ok(result)
    }

    /// [`Change::zero`], for a caller that holds the lock.
    ///
    /// # Errors
    ///
    /// Those of [`Change::zero`] and [`Change::commit`].
    pub fn zero(&mut self, lock: &Lock, key: Option<Identity>) -> Result<(), Commit> {
        self.recover(lock)?;
        let mut change = Change::begin(self.maps.shared(), &self.counters, seconds_since_boot())?;
        change.zero(key, &self.counters)?;
        change.commit(&mut self.counters)
    }

    /// Ends the connections of removed destinations, if ip_vs's `expire_nodest_conn` says so. Of those that are left when
    /// this process is killed, each ends with its next packet.
    fn expire(&self) -> Result<(), Error> {
        if self.maps.config[0].switches.load() & switch::EXPIRE_NODEST_CONN != 0 {
            Control::open(&self.place)?.flush(self.maps.instance().buckets(), Ending::Removed)?;
        }
        Ok(())
    }
}

/// Seconds since the machine has started, time asleep included.
fn seconds_since_boot() -> u32 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).map_or(0, |time| time.tv_sec() as u32)
}

/// The counters of destinations in the kernel.
pub struct KernelCounters(PerCpu<DestCpuRecord>);

impl Counters for KernelCounters {
    fn read(&self, dest: u32) -> Result<[u64; 5], Error> {
        let cpus = self.0.get(dest)?;
        let add = |sum: [u64; 5], cpu: &DestCpuRecord| std::array::from_fn(|i| sum[i] + cpu.counters[i]);
        Ok(cpus.iter().fold([0; 5], add))
    }

    fn clear(&mut self, dest: u32) -> Result<(), Error> {
        self.0.set_all(dest, bytemuck::Zeroable::zeroed())
    }
}
