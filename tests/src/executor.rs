//! A director that packet cases are run on: one on the memory of this process, one in the kernel.
//!
//! Both have the topology of [`cast`], and no ageing timer: a connection whose time is over ends when a packet meets it.

use std::{collections::BTreeMap, net::Ipv4Addr};

use anyhow::Result;
use lb_common::{
    abi::{active_and_total, slot},
    event::Event,
    flow::{Bucket4, Bucket6},
    jiffies::Jiffies,
    reason::Reason,
};
use lb_userspace::control::{
    change::Change,
    connections::Reader,
    marks, settings,
    shared::Shared,
    state::{State, dest_address},
};

use crate::{
    audit::{self, Connections},
    cast,
    family::{self, Family},
};

mod host;
mod kernel;

pub use host::{Driver, Host};
pub use kernel::{Kernel, Site};

/// Buckets of a flow table that twenty connections fill: as few as there can be.
pub const SMALL_TABLE: u32 = 2;
/// Slots for services of the tables.
const SERVICES: u32 = 64;
/// Slots for destinations of the tables.
const DESTS: u32 = 256;

/// An interface of the director.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wire {
    /// The loopback interface.
    Loopback,
    /// Towards the clients.
    Outside,
    /// Towards the real servers.
    Inside,
}

impl Wire {
    /// Every interface.
    pub const ALL: [Self; 3] = [Self::Loopback, Self::Outside, Self::Inside];
}

/// Where a frame goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Nowhere.
    Drop,
    /// To the host's own stack.
    Pass,
    /// To the host's own stack, to be sent out of an interface to a neighbour that is not known yet; see [`family::member`].
    HandOver(Wire, Ipv4Addr),
    /// Out of the interface it came in by.
    Transmit,
    /// Out of an interface. `None` in what an executor reports that cannot tell which one.
    Redirect(Option<Wire>),
}

impl Verdict {
    /// Out of `wire`.
    pub const fn redirect(wire: Wire) -> Self {
        Self::Redirect(Some(wire))
    }

    /// Whether what was seen is what this says, as far as it could be seen.
    pub fn is_met_by(self, seen: Self) -> bool {
        seen == self || matches!((self, seen), (Self::Redirect(_), Self::Redirect(None)))
    }
}

/// What became of a frame.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Outcome {
    /// Where it went.
    pub verdict: Verdict,
    /// The frame as it left, also when it was dropped.
    pub frame: Vec<u8>,
}

/// Counters of a destination, or what has been added to them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[expect(missing_docs, reason = "the counters of docs/ipvs.md, sections 8.1 and 1.3")]
pub struct DestCounts {
    pub connections: i64,
    pub packets_in: i64,
    pub bytes_in: i64,
    pub packets_out: i64,
    pub bytes_out: i64,
    pub active: i64,
    pub inactive: i64,
    pub templates: i64,
}

impl DestCounts {
    fn minus(self, other: Self) -> Self {
        Self {
            connections: self.connections - other.connections,
            packets_in: self.packets_in - other.packets_in,
            bytes_in: self.bytes_in - other.bytes_in,
            packets_out: self.packets_out - other.packets_out,
            bytes_out: self.bytes_out - other.bytes_out,
            active: self.active - other.active,
            inactive: self.inactive - other.inactive,
            templates: self.templates - other.templates,
        }
    }
}

/// Every counter of a director, or what has been added to them. Counters that are zero are left out.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    /// Packets not forwarded, by the name of the reason.
    pub reasons: BTreeMap<&'static str, i64>,
    /// ICMP errors sent.
    pub icmp_sent: i64,
    /// Connections ended to make room.
    pub evicted: i64,
    /// Packets forwarded without a connection.
    pub stateless: i64,
    /// Connections and templates that the timer has ended before their time.
    pub thinned: i64,
    /// Destinations, by address; see [`family::member`].
    pub dests: BTreeMap<Ipv4Addr, DestCounts>,
}

impl Counts {
    /// What has been added since `before`.
    pub fn since(&self, before: &Self) -> Self {
        let mut added = Self {
            icmp_sent: self.icmp_sent - before.icmp_sent,
            evicted: self.evicted - before.evicted,
            stateless: self.stateless - before.stateless,
            thinned: self.thinned - before.thinned,
            ..Self::default()
        };
        for (reason, count) in &self.reasons {
            let difference = count - before.reasons.get(reason).copied().unwrap_or_default();
            if difference != 0 {
                added.reasons.insert(reason, difference);
            }
        }
        for (address, counts) in &self.dests {
            let difference = counts.minus(before.dests.get(address).copied().unwrap_or_default());
            if difference != DestCounts::default() {
                added.dests.insert(*address, difference);
            }
        }
        added
    }
}

/// A director that packet cases are run on.
pub trait Executor {
    /// Where the director is.
    fn name(&self) -> &'static str;

    /// Its configuration.
    fn shared(&self) -> Shared<'_>;

    /// Its IPv4 flow table.
    fn flows(&self) -> &[Bucket4];

    /// Its IPv6 flow table.
    fn flows6(&self) -> &[Bucket6];

    /// What reads the connections in them.
    fn reader(&self) -> Reader<'_> {
        Reader::new(&self.shared(), (self.flows(), self.flows6()), self.now())
    }

    /// Compares its flow tables with its counters.
    ///
    /// # Errors
    ///
    /// When they differ.
    fn audit(&self) -> Result<Connections> {
        audit::check(self.flows(), self.flows6(), self.shared().dest_loads)
    }

    /// Index of an interface.
    fn ifindex(&self, wire: Wire) -> u32;

    /// The data plane's clock.
    fn now(&self) -> Jiffies;

    /// Makes a change, which must be possible, `later_s` seconds from now.
    fn change_later(&mut self, later_s: u32, plan: &dyn Fn(&mut Change<'_>));

    /// Ends all connections.
    fn end_connections(&mut self);

    /// Lets the ageing timer go over the tables, and ends it.
    fn age(&mut self);

    /// Lets the director send as many ICMP errors as it may in a second, and begins to count anew which packets it drops.
    fn refill_limiter(&mut self);

    /// Waits until the limit of ICMP errors will not be renewed for a while.
    fn wait_for_a_young_second(&self);

    /// Whether the host forwards what no local socket has sent: `net.ipv4.conf.lo.forwarding` and
    /// `net.ipv6.conf.lo.forwarding`.
    fn set_forwarding(&mut self, on: bool);

    /// How often the reason or event with this number has been counted.
    fn counter(&self, number: u8) -> u64;

    /// The five counters of a destination.
    fn traffic(&self, dest: u32) -> [u64; 5];

    /// Lets a frame arrive.
    fn arrive(&mut self, wire: Wire, frame: &[u8]) -> Outcome;

    /// Makes a change, which must be possible.
    fn change(&mut self, plan: &dyn Fn(&mut Change<'_>)) {
        self.change_later(0, plan);
    }

    /// Lets time pass. Connections that are over by then are still in the table.
    fn pass(&mut self, seconds: u32) {
        let shared = self.shared();
        let skew = &shared.config.clock_skew;
        skew.store(skew.load().wrapping_add(seconds * shared.instance.hz.load()));
    }

    /// Makes the director as new, but for its clock.
    fn reset(&mut self) {
        self.set_forwarding(true);
        self.change(&|change| change.flush());
        marks::put_in_force(&self.shared(), &[]).expect("no rules are not too many");
        self.end_connections();
        // Late enough for every removed destination to be forgotten.
        self.change_later(1 << 20, &|_| ());
        let hz = self.shared().instance.hz.load();
        settings::set_defaults(self.shared().config, hz);
        self.refill_limiter();
    }

    /// Every counter.
    fn counts(&self) -> Counts {
        let counter = |number| self.counter(number).cast_signed();
        let mut counts = Counts {
            icmp_sent: counter(Event::IcmpSent as u8),
            evicted: counter(Event::Evicted as u8),
            stateless: counter(Event::Stateless as u8),
            thinned: counter(Event::Thinned as u8),
            ..Counts::default()
        };
        for reason in Reason::ALL {
            counts.reasons.insert(reason.as_str(), counter(*reason as u8));
        }
        let shared = self.shared();
        for (number, record) in State::load(&shared).dests {
            if record.state == slot::FREE {
                continue;
            }
            let address = family::member(dest_address(&record).ip());
            let load = shared.dest_loads.get(number as usize);
            let (active, total) = active_and_total(load.map_or(0, |load| load.connections.load()));
            let traffic = self.traffic(number).map(u64::cast_signed);
            let sum = counts.dests.entry(address).or_default();
            sum.connections += traffic[0];
            sum.packets_in += traffic[1];
            sum.bytes_in += traffic[2];
            sum.packets_out += traffic[3];
            sum.bytes_out += traffic[4];
            sum.active += i64::from(active);
            sum.inactive += i64::from(total) - i64::from(active);
            sum.templates += i64::from(load.map_or(0, |load| load.templates.load()));
        }
        counts
    }
}

/// MTU of every way that [`cast::special`] says nothing else about.
const MTU: u32 = 1500;

/// Real servers of the topology.
const SERVERS: u8 = 12;

/// MTU of the way to real server number `index`.
const fn mtu(family: Family, index: u8) -> u32 {
    match index {
        cast::special::NARROW => cast::special::NARROW_MTU,
        cast::special::TINY => cast::special::tiny_mtu(family),
        _ => MTU,
    }
}
