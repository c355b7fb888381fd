//! A director on the memory of this process: the data plane, its control plane and a kernel that does as it is told.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use lb_common::{
    abi::{DestCpu, active_and_total},
    addr::Ip4,
    defence::{self, which},
    hash::Seed,
    overload::Thresholds,
    proto::{Method, Scheduler},
    reason::Reason,
};
use lb_ebpf::{
    ageing::{self, Sweep, Thinning, What},
    env::Scan as _,
    forward::{Exit, Leave},
    host::{HostEnv, HostPacket, HostRoute, HostSizes, HostTables},
    parse::Ip4Packet,
    pipeline::{self, Now},
};
use lb_userspace::{
    control::{
        change::Change,
        model::{DestSpec, ServiceKey, ServiceSpec, Transport},
        settings,
        shared::{Counters, Shared},
        state::State,
    },
    error::Error,
};

use crate::{cast, family::Family};

/// Ticks per second of the worlds of tests.
pub const HZ: u32 = 250;

/// A director.
pub struct World {
    /// Its maps.
    pub tables: HostTables,
    /// The kernel around it.
    pub env: HostEnv,
}

/// What became of a frame.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Where it went.
    pub leave: Leave,
    /// Why it was not forwarded.
    pub reason: Option<Reason>,
    /// The frame as it left.
    pub frame: Vec<u8>,
}

impl Default for World {
    fn default() -> Self {
        Self::new(1024)
    }
}

impl World {
    /// A director with a flow table of this many buckets, and routes to the whole cast.
    pub fn new(flow_buckets: u32) -> Self {
        Self::with_seed(flow_buckets, Seed::new([0x243f_6a88_85a3_08d3, 0x1319_8a2e_0370_7344, 0xa409_3822_299f_31d0]))
    }

    /// [`Self::new`], with the secret of the hashes.
    pub fn with_seed(flow_buckets: u32, seed: Seed) -> Self {
        let sizes = HostSizes {
            services: 64,
            dests: 256,
            slots: 1 << 16,
            endpoint_buckets: 256,
            flow_buckets,
            flow_buckets6: flow_buckets,
        };
        let world = Self { tables: HostTables::new(sizes, seed, HZ), env: HostEnv::new(HZ) };
        let config = &world.tables.config[0];
        settings::set_defaults(config, HZ);
        for index in 0..16 {
            world.route(
                cast::server(index),
                HostRoute::Via {
                    ifindex: cast::INSIDE,
                    mtu: 1500,
                    to: cast::server_mac(index),
                    from: cast::DIRECTOR_INSIDE_MAC,
                    source: cast::DIRECTOR_INSIDE.into(),
                    gateway: cast::server(index).into(),
                },
            );
        }
        world
    }

    /// Sets what the routing table says about an address.
    pub fn route(&self, address: impl Into<IpAddr>, route: HostRoute) {
        self.env.routes.borrow_mut().insert(address.into(), route);
    }

    /// Makes clients reachable, all by one router.
    pub fn route_client(&self, address: Ipv4Addr) {
        self.route_client_of(Family::Four, address);
    }

    /// Makes clients reachable by what `address` stands for in a family, all by one router.
    pub fn route_client_of(&self, family: Family, address: Ipv4Addr) {
        self.route(family.address(address), to_clients(family));
    }

    /// Makes all clients of the cast reachable.
    pub fn route_clients(&self, family: Family) {
        let network = family.network(cast::CLIENT, 2);
        let (first, bits) = network.split_once('/').expect("a network has a length");
        let network = (first.parse().expect("an address"), bits.parse().expect("a number"));
        self.env.networks.borrow_mut().insert(network, to_clients(family));
    }

    /// The maps as the control plane takes them.
    pub fn shared(&self) -> Shared<'_> {
        let tables = &self.tables;
        Shared {
            instance: &tables.instance[0],
            config: &tables.config[0],
            journal: &tables.journal,
            services: &tables.services,
            dests: &tables.dests,
            endpoints4: &tables.endpoints4,
            endpoints6: &tables.endpoints6,
            views: &tables.views,
            slots: &tables.slots,
            cursors: &tables.cursors,
            dest_loads: &tables.dest_loads,
            estimates: &tables.estimates,
            marks: &tables.marks[0],
            mark_rules: &tables.mark_rules,
            mark_starts: &tables.mark_starts,
        }
    }

    /// Makes a change, which must be possible.
    pub fn change(&self, plan: impl FnOnce(&mut Change<'_>)) {
        self.change_at(self.seconds(), plan);
    }

    /// Makes a change, which must be possible, at some other time than now.
    pub fn change_at(&self, seconds: u32, plan: impl FnOnce(&mut Change<'_>)) {
        let mut counters = HostCounters(&self.tables.dest_cpus);
        let mut change = Change::begin(self.shared(), &counters, seconds).expect("counters can be read");
        plan(&mut change);
        change.commit(&mut counters).expect("there is room");
    }

    /// Seconds since the world began.
    pub fn seconds(&self) -> u32 {
        self.env.jiffies.get() / HZ
    }

    /// Lets time pass, without ageing.
    pub fn pass(&self, seconds: u32) {
        self.env.jiffies.set(self.env.jiffies.get() + seconds * HZ);
    }

    /// Ends the connections whose time is over, as the timer does, and thins out every bucket if `drop_entry` is on. Returns how
    /// many were over.
    pub fn age(&self) -> u64 {
        let config = &self.tables.config[0];
        let clock = Now::of(config, &self.env).clock;
        let on = defence::is_on(config.defences[which::DROP_ENTRY].load());
        let thinning = if on { Thinning::ALL } else { Thinning::NONE };
        let mut sweep = Sweep { tables: &self.tables, first: 0, what: What::over(clock), thinning, ended: 0 };
        for index in 0..ageing::buckets(&self.tables) {
            sweep.visit(index);
        }
        sweep.ended
    }

    /// Lets a frame arrive by the interface with index `ingress`.
    pub fn arrive(&self, ingress: u32, frame: &[u8]) -> Outcome {
        self.env.ingress.set(ingress);
        let mut packet = HostPacket::new(frame);
        let exit: Exit = pipeline::process::<Ip4Packet, _, _, _>(&mut packet, &self.tables, &self.env);
        let reason = exit.reason().and_then(|number| Reason::ALL.get(usize::from(number)).copied());
        Outcome { leave: exit.leave(), reason, frame: packet.bytes().to_vec() }
    }

    /// Active and inactive connections of the destination with this address, wherever it is configured.
    pub fn connections(&self, address: Ipv4Addr) -> (u32, u32) {
        let state = State::load(&self.shared());
        let wanted = ip4(address).raw();
        let number = state.dests.iter().find(|(_, record)| record.addr[0] == wanted).map_or(0, |(number, _)| *number);
        let (active, total) = active_and_total(self.tables.dest_loads[number as usize].connections.load());
        (active, total - active)
    }
}

/// The counters of the destinations of a [`World`].
pub struct HostCounters<'a>(pub &'a [DestCpu]);

impl Counters for HostCounters<'_> {
    fn read(&self, dest: u32) -> Result<[u64; 5], Error> {
        let counters = &self.0[dest as usize].counters;
        Ok([
            counters.connections.get(),
            counters.packets_in.get(),
            counters.bytes_in.get(),
            counters.packets_out.get(),
            counters.bytes_out.get(),
        ])
    }

    fn clear(&mut self, dest: u32) -> Result<(), Error> {
        let cpu = &self.0[dest as usize];
        for counter in [
            &cpu.counters.connections,
            &cpu.counters.packets_in,
            &cpu.counters.bytes_in,
            &cpu.counters.packets_out,
            &cpu.counters.bytes_out,
        ] {
            counter.set(0);
        }
        Ok(())
    }
}

/// An address in the data plane's terms.
pub fn ip4(address: Ipv4Addr) -> Ip4 {
    Ip4::new(address.octets())
}

/// A service at a port of the [`cast::VIP`].
pub fn service(protocol: Transport, port: u16) -> ServiceKey {
    Family::Four.service(protocol, port)
}

/// How a service is set that has this scheduler.
pub const fn scheduled(scheduler: Scheduler) -> ServiceSpec {
    ServiceSpec { scheduler, flags: 0, persistence: None }
}

/// The way to the clients.
fn to_clients(family: Family) -> HostRoute {
    HostRoute::Via {
        ifindex: cast::OUTSIDE,
        mtu: 1500,
        to: cast::CLIENT_MAC,
        from: cast::DIRECTOR_OUTSIDE_MAC,
        source: family.address(cast::DIRECTOR_OUTSIDE),
        gateway: family.address(cast::CLIENT_GATEWAY),
    }
}

/// How a destination is set.
pub const fn dest(method: Method, weight: u32) -> DestSpec {
    DestSpec { method, weight, thresholds: Thresholds { upper: 0, lower: 0 } }
}

/// Port `port` of real server number `index`.
pub fn at(index: u8, port: u16) -> SocketAddr {
    Family::Four.at(index, port)
}
