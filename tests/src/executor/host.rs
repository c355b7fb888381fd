//! The data plane's library on the memory of this process.

use std::net::Ipv4Addr;

use lb_common::{
    abi::{Limiter, Record as _},
    flow::{Bucket4, Bucket6},
    jiffies::Jiffies,
    reason::Reason,
};
use lb_ebpf::{
    ageing::{self, Sweep, Thinning, What},
    env::Scan as _,
    forward::Leave,
    host::{HEADROOM, HostPacket, HostRoute},
    parse::Ip4Packet,
    pipeline::{self, Now},
};
use lb_userspace::control::{
    change::Change,
    shared::{Counters as _, Shared},
    state::ip,
};

use crate::{
    cast::{self, special},
    executor::{Executor, MTU, Outcome, SERVERS, Verdict, Wire, mtu},
    family::{self, Family},
    world::{HostCounters, World},
};

/// What a network driver gives an XDP program.
#[derive(Clone, Copy, Debug)]
pub struct Driver {
    /// Whether a packet may carry metadata to the host.
    pub metadata: bool,
    /// Room before a frame, in bytes.
    pub headroom: usize,
}

impl Default for Driver {
    fn default() -> Self {
        Self { metadata: true, headroom: HEADROOM }
    }
}

/// A director on the memory of this process.
pub struct Host {
    world: World,
    /// What the driver of every interface gives.
    pub driver: Driver,
}

const LOOPBACK: u32 = 1;

const fn index(wire: Wire) -> u32 {
    match wire {
        Wire::Loopback => LOOPBACK,
        Wire::Outside => cast::OUTSIDE,
        Wire::Inside => cast::INSIDE,
    }
}

fn wire(ifindex: u32) -> Wire {
    Wire::ALL.into_iter().find(|wire| index(*wire) == ifindex).expect("an interface of the director")
}

impl Host {
    /// A director with a flow table of this many buckets.
    pub fn new(flow_buckets: u32) -> Self {
        Self::of(World::new(flow_buckets))
    }

    /// [`Self::new`], whose connections have the places in the table that they have in that of `other`.
    pub fn alike(flow_buckets: u32, other: &impl Executor) -> Self {
        Self::of(World::with_seed(flow_buckets, other.shared().instance.load().seed))
    }

    fn of(world: World) -> Self {
        let host = Self { world, driver: Driver::default() };
        host.lay_routes();
        host
    }

    /// How many steps of scans its packets have taken.
    pub fn scanned(&self) -> u32 {
        self.world.env.scanned.get()
    }

    fn lay_routes(&self) {
        Family::ALL.into_iter().for_each(|family| self.lay_routes_of(family));
    }

    fn lay_routes_of(&self, family: Family) {
        for number in 0..SERVERS {
            let server = family.address(cast::server(number));
            let inside = HostRoute::Via {
                ifindex: cast::INSIDE,
                mtu: mtu(family, number),
                to: cast::server_mac(number),
                from: cast::DIRECTOR_INSIDE_MAC,
                source: family.address(cast::DIRECTOR_INSIDE),
                gateway: server,
            };
            self.world.route(
                server,
                match number {
                    special::UNRESOLVED => HostRoute::Unresolved {
                        ifindex: cast::INSIDE,
                        source: family.address(cast::DIRECTOR_INSIDE),
                        gateway: server,
                    },
                    special::UNREACHABLE => HostRoute::Nowhere(Reason::NoRoute),
                    special::LOCAL => HostRoute::Local,
                    special::ONE_ARMED => HostRoute::Via {
                        ifindex: cast::OUTSIDE,
                        mtu: MTU,
                        to: cast::server_mac(number),
                        from: cast::DIRECTOR_OUTSIDE_MAC,
                        source: family.address(cast::DIRECTOR_OUTSIDE),
                        gateway: server,
                    },
                    _ => inside,
                },
            );
        }
        for own in [Ipv4Addr::LOCALHOST, cast::DIRECTOR_OUTSIDE, cast::DIRECTOR_INSIDE] {
            self.world.route(family.address(own), HostRoute::Local);
        }
        let barred = (family.address(cast::BARRED_CLIENT), family.address(cast::server(0)));
        self.world.env.routes_from.borrow_mut().insert(barred, HostRoute::Nowhere(Reason::NoRoute));
        self.world.route_clients(family);
        self.world.route_client_of(family, cast::CLIENT_GATEWAY);
        self.world.route(
            family.address(cast::FAR_CLIENT),
            HostRoute::Unresolved {
                ifindex: cast::OUTSIDE,
                source: family.address(cast::DIRECTOR_OUTSIDE),
                gateway: family.address(cast::FAR_GATEWAY),
            },
        );
        self.world.route(family.address(cast::LOST_CLIENT), HostRoute::Nowhere(Reason::NoRoute));
    }
}

impl Executor for Host {
    fn name(&self) -> &'static str {
        "on the host"
    }

    fn shared(&self) -> Shared<'_> {
        self.world.shared()
    }

    fn flows(&self) -> &[Bucket4] {
        &self.world.tables.flows4
    }

    fn flows6(&self) -> &[Bucket6] {
        &self.world.tables.flows6
    }

    fn ifindex(&self, wire: Wire) -> u32 {
        index(wire)
    }

    fn now(&self) -> Jiffies {
        Now::of(&self.world.tables.config[0], &self.world.env).clock.now
    }

    fn change_later(&mut self, later_s: u32, plan: &dyn Fn(&mut Change<'_>)) {
        self.world.change_at(self.world.seconds() + later_s, plan);
    }

    fn end_connections(&mut self) {
        let tables = &self.world.tables;
        let what = What::dest(lb_common::abi::control::ANY);
        let mut sweep = Sweep { tables, first: 0, what, thinning: Thinning::NONE, ended: 0 };
        for bucket in 0..ageing::buckets(tables) {
            sweep.visit(bucket);
        }
    }

    fn age(&mut self) {
        self.world.age();
    }

    fn refill_limiter(&mut self) {
        let Limiter { second, drop_counter, thinning, .. } = &self.world.tables.limiter[0];
        second.store(0);
        drop_counter.store(0);
        thinning.iter().for_each(|passed| passed.store(0));
    }

    fn wait_for_a_young_second(&self) {
        // The clock of this kernel stands still.
    }

    fn set_forwarding(&mut self, on: bool) {
        self.lay_routes();
        if !on {
            let (mut routes, mut networks) = (self.world.env.routes.borrow_mut(), self.world.env.networks.borrow_mut());
            let all = routes.values_mut().chain(networks.values_mut());
            all.for_each(|route| *route = HostRoute::Nowhere(Reason::ForwardingOff));
        }
    }

    fn counter(&self, number: u8) -> u64 {
        self.world.tables.counters[usize::from(number)].get()
    }

    fn traffic(&self, dest: u32) -> [u64; 5] {
        HostCounters(&self.world.tables.dest_cpus).read(dest).expect("memory can be read")
    }

    fn arrive(&mut self, by: Wire, frame: &[u8]) -> Outcome {
        self.world.env.ingress.set(index(by));
        let mut packet = HostPacket::with_headroom(frame, self.driver.headroom);
        packet.metadata = self.driver.metadata;
        let exit = pipeline::process::<Ip4Packet, _, _, _>(&mut packet, &self.world.tables, &self.world.env);
        let verdict = match (exit.leave(), packet.handed_over) {
            (Leave::Host, Some((ifindex, family, gateway))) => {
                Verdict::HandOver(wire(ifindex), family::member(ip(family, gateway)))
            }
            (Leave::Host, None) => Verdict::Pass,
            (Leave::Drop, _) => Verdict::Drop,
            (Leave::Transmit, _) => Verdict::Transmit,
            (Leave::Redirect(ifindex), _) => Verdict::redirect(wire(ifindex)),
        };
        Outcome { verdict, frame: packet.bytes().to_vec() }
    }
}
