//! How large the maps of an instance are.

use lb_common::{
    abi::{ENDPOINTS_PER_BUCKET, SLOTS_PER_LINE},
    flow::ENTRIES_PER_BUCKET,
};

/// What an instance is to hold, as the user says it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Capacity {
    /// IPv4 connections, 1,000 to 16,777,216.
    pub flows: u32,
    /// IPv6 connections, 1,000 to 16,777,216.
    pub flows6: u32,
    /// Services, 1 to 65,536.
    pub services: u32,
    /// Destinations of all services together, 1 to 262,144.
    pub dests: u32,
}

impl Default for Capacity {
    fn default() -> Self {
        Self { flows: 1 << 20, flows6: Self::flows6_for(1 << 20), services: 4096, dests: 16_384 }
    }
}

/// Slots beside the lists of destinations: room for the wrr rings and the hash tables of all services.
const RING_SLOTS: u32 = 1 << 20;
/// As many of them for each service at the least: twice what sh and dh take, while one table is exchanged for another.
const RING_SLOTS_PER_SERVICE: u32 = 512;

impl Capacity {
    /// Fewest connections a table is made for.
    pub const FLOWS_MIN: u32 = 1_000;
    /// Most connections a table is made for.
    pub const FLOWS_MAX: u32 = 1 << 24;
    /// Most services.
    pub const SERVICES_MAX: u32 = 1 << 16;
    /// Most destinations.
    pub const DESTS_MAX: u32 = 1 << 18;

    /// The IPv6 connections that an instance for `flows` IPv4 connections is made for unless it is told: a quarter, which
    /// takes half as much memory.
    pub const fn flows6_for(flows: u32) -> u32 {
        if flows / 4 < Self::FLOWS_MIN { Self::FLOWS_MIN } else { flows / 4 }
    }

    /// Buckets of the IPv4 flow table: six tenths of its entries are in use when it holds as many connections as it is
    /// made for, so that both buckets of a connection are practically never full.
    pub const fn flow_buckets(&self) -> u32 {
        Self::buckets_for(self.flows)
    }

    /// Buckets of the IPv6 flow table.
    pub const fn flow_buckets6(&self) -> u32 {
        Self::buckets_for(self.flows6)
    }

    const fn buckets_for(flows: u32) -> u32 {
        let entries = flows as u64 * 5 / 3;
        let buckets = entries.div_ceil(ENTRIES_PER_BUCKET as u64) as u32;
        buckets.next_multiple_of(2)
    }

    /// Buckets of each endpoint table, a power of two: less than half of it is in use when every service has an address
    /// of its own and every destination is masqueraded.
    pub const fn endpoint_buckets(&self) -> u32 {
        let endpoints = 2 * self.services + self.dests;
        (2 * endpoints).div_ceil(ENDPOINTS_PER_BUCKET as u32).next_power_of_two()
    }

    /// Views: two for each service.
    pub const fn views(&self) -> u32 {
        2 * self.services
    }

    /// Slots for lists and rings, by whole lines. Lists take up to twice the number of destinations while one is exchanged for
    /// another, and the rest of their last lines.
    pub const fn slots(&self) -> u32 {
        let rings = self.services * RING_SLOTS_PER_SERVICE;
        let rings = if rings < RING_SLOTS { RING_SLOTS } else { rings };
        let lists = 2 * (self.dests + self.services * (SLOTS_PER_LINE - 1));
        (lists + rings).next_multiple_of(SLOTS_PER_LINE)
    }

    /// Records of the journal: one change may touch everything and zero it. The first holds their number, and one more is
    /// about the instance, and one about the counters of all.
    pub const fn journal(&self) -> u32 {
        2 * (self.services + self.dests) + 3
    }
}

#[cfg(test)]
mod tests {
    use lb_common::{
        abi::{
            Cursor, Dest, DestCpu, DestLoad, EndpointBucket4, EndpointBucket6, Estimate, JournalSlot, Service, Slot,
            View,
        },
        flow::{Bucket4, Bucket6},
    };

    use super::*;

    #[test]
    fn ten_million_flows_fit_in_512_mib() {
        let capacity = Capacity { flows: 10_000_000, ..Capacity::default() };
        let bytes = u64::from(capacity.flow_buckets()) * size_of::<Bucket4>() as u64;
        assert!(bytes <= 512 << 20, "{bytes}");
    }

    /// As the manual has it.
    #[test]
    fn the_usual_tables_take_53_and_27_mib() {
        let capacity = Capacity::default();
        let mib = |buckets: u32, size: usize| (u64::from(buckets) * size as u64 + (1 << 19)) >> 20;
        assert_eq!(mib(capacity.flow_buckets(), size_of::<Bucket4>()), 53);
        assert_eq!(mib(capacity.flow_buckets6(), size_of::<Bucket6>()), 27);
    }

    /// As the manual has it.
    #[test]
    fn many_services_and_destinations_take_66_mib_and_8_for_each_cpu() {
        let capacity = Capacity { services: 4096, dests: 65_536, ..Capacity::default() };
        let (services, dests) = (capacity.services as usize, capacity.dests as usize);
        let bytes = services * size_of::<Service>()
            + capacity.views() as usize * (size_of::<View>() + size_of::<Cursor>())
            + dests * (size_of::<Dest>() + size_of::<DestLoad>())
            + (dests + services + 1) * size_of::<Estimate>()
            + capacity.slots() as usize * size_of::<Slot>()
            + capacity.endpoint_buckets() as usize * (size_of::<EndpointBucket4>() + size_of::<EndpointBucket6>())
            + capacity.journal() as usize * size_of::<JournalSlot>();
        assert_eq!((bytes + (1 << 19)) >> 20, 66);
        assert_eq!(dests * size_of::<DestCpu>(), 8 << 20);
    }

    #[test]
    fn buckets_suit_the_tables() {
        for flows in [Capacity::FLOWS_MIN, 1 << 20, Capacity::FLOWS_MAX] {
            let capacity = Capacity { flows, flows6: Capacity::flows6_for(flows), ..Capacity::default() };
            assert!((Capacity::FLOWS_MIN..=Capacity::FLOWS_MAX).contains(&capacity.flows6));
            assert!(capacity.flow_buckets().is_multiple_of(2) && capacity.flow_buckets6().is_multiple_of(2));
            assert!(capacity.endpoint_buckets().is_power_of_two());
        }
    }
}
