//! The maps of an instance that the control plane reads and writes, wherever their memory is.

use lb_common::{
    abi::{
        Config, Cursor, Dest, DestLoad, EndpointBucket4, EndpointBucket6, Estimate, Instance, JournalSlot, Service,
        Slot, View,
    },
    mark::{Marks, Rule, Start},
};

use crate::{datapath::open::Maps, error::Error};

/// The maps of an instance. In production their memory is the kernel's, in tests it is the host's.
#[derive(Clone, Copy)]
#[expect(missing_docs, reason = "the values of each are described in lb_common::abi and lb_common::mark")]
pub struct Shared<'a> {
    pub instance: &'a Instance,
    pub config: &'a Config,
    pub journal: &'a [JournalSlot],
    pub services: &'a [Service],
    pub dests: &'a [Dest],
    pub endpoints4: &'a [EndpointBucket4],
    pub endpoints6: &'a [EndpointBucket6],
    pub views: &'a [View],
    pub slots: &'a [Slot],
    pub cursors: &'a [Cursor],
    pub dest_loads: &'a [DestLoad],
    pub marks: &'a Marks,
    pub mark_rules: &'a [Rule],
    pub mark_starts: &'a [Start],
    pub estimates: &'a [Estimate],
}

/// Something that is counted.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Object {
    /// The destination with this number.
    Dest(u32),
    /// The service in this slot.
    Service(u32),
    /// All together.
    All,
}

impl Shared<'_> {
    /// Where [`Shared::estimates`] has an object.
    pub fn index(&self, object: Object) -> u32 {
        let dests = self.dests.len() as u32;
        match object {
            Object::Dest(number) => number,
            Object::Service(slot) => dests + slot,
            Object::All => dests + self.services.len() as u32,
        }
    }

    /// What is known of the traffic of an object.
    pub fn estimate(&self, object: Object) -> Option<&Estimate> {
        self.estimates.get(self.index(object) as usize)
    }
}

impl Maps {
    /// The part of the maps that configuration is made of.
    pub fn shared(&self) -> Shared<'_> {
        Shared {
            instance: &self.instance[0],
            config: &self.config[0],
            journal: &self.journal,
            services: &self.services,
            dests: &self.dests,
            endpoints4: &self.endpoints4,
            endpoints6: &self.endpoints6,
            views: &self.views,
            slots: self.slots.as_flattened(),
            cursors: &self.cursors,
            dest_loads: &self.dest_loads,
            estimates: &self.estimates,
            marks: &self.marks[0],
            mark_rules: &self.mark_rules,
            mark_starts: &self.mark_starts,
        }
    }
}

/// Counters of destinations: connections, packets in, bytes in, packets out, bytes out.
pub trait Counters {
    /// The sum over all CPUs.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    fn read(&self, dest: u32) -> Result<[u64; 5], Error>;

    /// Starts them at zero, on all CPUs.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    fn clear(&mut self, dest: u32) -> Result<(), Error>;
}
