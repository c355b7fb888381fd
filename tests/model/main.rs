//! The data plane and its control plane do what a plain model of `docs/ipvs.md` does, whatever happens.

use std::net::Ipv4Addr;

use lb_common::{
    abi::{DestRecord, active_and_total},
    flow::{Key as _, Word},
    proto::{Scheduler, sched_flag},
    reason::Reason,
};
use lb_ebpf::forward::Leave;
use lb_userspace::control::{
    change::Change,
    model::{self, ServiceSpec, Transport},
    settings::Timeouts,
    shared::Counters as _,
    state::{State as Configured, dest_address},
};
use proptest::{
    prelude::*,
    test_runner::{Config, RngSeed},
};
use xdpvs_tests::{
    audit, cast,
    frames::{ETHERNET, Frame},
    world::{self, HostCounters, World},
};

mod spec;

use spec::{Client, Director, Fate, Flags, HZ, Method, ServiceKey, TCP, UDP};

const SERVERS: u8 = 6;
/// The port of the first service of each protocol.
const PORT: u16 = 80;
const SERVICES: u16 = 3;
const CLIENTS: u8 = 10;
const WEIGHTS: [u32; 8] = [0, 1, 1, 2, 3, 5, 10, 100];
const SCHEDULERS: [&str; 11] = ["rr", "wrr", "lc", "wlc", "sed", "nq", "fo", "ovf", "dh", "sh", "mh"];
const FLAGS: [&str; 12] = ["S", "S", "S", "SA", "A", "A", "A", "FA", "RA", "", "SR", "SF"];
/// Seconds.
const SPANS: [u64; 8] = [1, 3, 9, 30, 61, 121, 301, 901];

/// Something that happens. Services, servers and clients by their numbers.
#[derive(Clone, Copy, Debug)]
enum Action {
    AddService { service: usize, scheduler: usize, flags: (bool, bool) },
    EditService { service: usize, scheduler: usize, flags: (bool, bool) },
    DeleteService { service: usize },
    AddDest { service: usize, server: u8, method: usize, weight: usize },
    EditDest { service: usize, server: u8, method: usize, weight: usize },
    DeleteDest { service: usize, server: u8 },
    Request { service: usize, client: u8, port: u16, flags: usize },
    Reply { service: usize, server: u8, client: u8, port: u16, flags: usize },
    Pass { span: usize, ticks: u64 },
    SetTimeouts { tcp: u32, tcpfin: u32, udp: u32 },
    SetReuse { mode: u32 },
}

fn action() -> impl Strategy<Value = Action> {
    let service = || 0..usize::from(2 * SERVICES);
    let scheduler = || 0..SCHEDULERS.len();
    let (server, method, weight) = (|| 0..SERVERS, || 0..3usize, || 0..WEIGHTS.len());
    let flags = any::<(bool, bool)>;
    let (client, port) = (|| 0..CLIENTS, || prop_oneof![Just(20u16), 1024..1027u16]);
    prop_oneof![
        3 => (service(), scheduler(), flags())
            .prop_map(|(service, scheduler, flags)| Action::AddService { service, scheduler, flags }),
        1 => (service(), scheduler(), flags())
            .prop_map(|(service, scheduler, flags)| Action::EditService { service, scheduler, flags }),
        1 => service().prop_map(|service| Action::DeleteService { service }),
        12 => (service(), server(), method(), weight())
            .prop_map(|(service, server, method, weight)| Action::AddDest { service, server, method, weight }),
        4 => (service(), server(), method(), weight())
            .prop_map(|(service, server, method, weight)| Action::EditDest { service, server, method, weight }),
        3 => (service(), server()).prop_map(|(service, server)| Action::DeleteDest { service, server }),
        60 => (service(), client(), port(), 0..FLAGS.len())
            .prop_map(|(service, client, port, flags)| Action::Request { service, client, port, flags }),
        15 => (service(), server(), client(), port(), 0..FLAGS.len())
            .prop_map(|(service, server, client, port, flags)| Action::Reply { service, server, client, port, flags }),
        5 => (0..SPANS.len(), 0..HZ).prop_map(|(span, ticks)| Action::Pass { span, ticks }),
        1 => (0..100u32, 0..100u32, 0..100u32)
            .prop_map(|(tcp, tcpfin, udp)| Action::SetTimeouts { tcp, tcpfin, udp }),
        1 => (0..4u32).prop_map(|mode| Action::SetReuse { mode }),
    ]
}

fn address_of_client(client: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 1, 0, client)
}

fn key(service: usize) -> ServiceKey {
    let service = service as u16;
    ServiceKey { protocol: if service < SERVICES { TCP } else { UDP }, port: PORT + service % SERVICES }
}

/// Where a server listens: by NAT at a port for each service, so that no two connections of a client meet at one server; else at
/// the service's own, which is not changed on the way.
fn server_port(service: ServiceKey, method: Method) -> u16 {
    if method == Method::Nat { service.port + 8000 } else { service.port }
}

fn flags_of(letters: &str) -> Flags {
    let has = |letter| letters.contains(letter);
    Flags { syn: has('S'), ack: has('A'), fin: has('F'), rst: has('R') }
}

const METHODS: [Method; 3] = [Method::Nat, Method::Direct, Method::Tunnel];

fn product_method(method: Method) -> lb_common::proto::Method {
    match method {
        Method::Nat => lb_common::proto::Method::Masq,
        Method::Direct => lb_common::proto::Method::Route,
        Method::Tunnel => lb_common::proto::Method::Tunnel,
    }
}

fn product_key(key: ServiceKey) -> model::ServiceKey {
    world::service(if key.protocol == TCP { Transport::Tcp } else { Transport::Udp }, key.port)
}

/// The product and the model of it, side by side.
struct Pair {
    world: World,
    model: Director,
}

impl Pair {
    fn new() -> Self {
        let world = World::new(64);
        (0..CLIENTS).for_each(|client| world.route_client(address_of_client(client)));
        let model = Director::new(
            |server| cast::server(server).to_bits(),
            |client| address_of_client(client).to_bits(),
            cast::VIP.to_bits(),
        );
        Self { world, model }
    }

    /// Makes a change on both sides. Both do it, or both refuse.
    fn change<E: std::fmt::Debug>(
        &mut self,
        product: impl FnOnce(&mut Change<'_>) -> Result<(), E>,
        model: impl FnOnce(&mut Director) -> bool,
    ) -> Result<(), TestCaseError> {
        let mut result = None;
        self.world.change(|change| result = Some(product(change)));
        let result = result.expect("the change has been planned");
        prop_assert_eq!(result.is_ok(), model(&mut self.model), "{:?}", result);
        Ok(())
    }

    fn act(&mut self, action: Action) -> Result<(), TestCaseError> {
        match action {
            Action::AddService { service, scheduler, flags } => {
                let (key, name) = (key(service), SCHEDULERS[scheduler]);
                let spec = service_spec(name, flags);
                self.change(
                    |change| change.add_service(product_key(key), spec),
                    |model| model.add_service(key, name, flags),
                )
            }
            Action::EditService { service, scheduler, flags } => {
                let (key, name) = (key(service), SCHEDULERS[scheduler]);
                let spec = service_spec(name, flags);
                self.change(
                    |change| change.edit_service(product_key(key), spec),
                    |model| model.edit_service(key, name, flags),
                )
            }
            Action::DeleteService { service } => {
                let key = key(service);
                self.change(|change| change.delete_service(product_key(key)), |model| model.delete_service(key))
            }
            Action::AddDest { service, server, method, weight } => {
                let (key, method, weight) = (key(service), METHODS[method], WEIGHTS[weight]);
                let at = (server, server_port(key, method));
                let uncertain = self.model.may_be_forgotten(key, at);
                let spec = world::dest(product_method(method), weight);
                self.change(
                    |change| change.add_dest(product_key(key), world::at(server, at.1), spec),
                    |model| model.add_dest(key, at, method, weight),
                )?;
                if uncertain {
                    self.adopt_counters(key, at);
                }
                Ok(())
            }
            Action::EditDest { service, server, method, weight } => {
                let (key, method, weight) = (key(service), METHODS[method], WEIGHTS[weight]);
                let at = (server, server_port(key, method));
                let spec = world::dest(product_method(method), weight);
                self.change(
                    |change| change.edit_dest(product_key(key), world::at(server, at.1), spec),
                    |model| model.edit_dest(key, at, method, weight),
                )
            }
            Action::DeleteDest { service, server } => {
                let key = key(service);
                let ports = [Method::Nat, Method::Direct].map(|method| server_port(key, method));
                let linked = |port: &u16| {
                    self.model.services.get(&key).is_some_and(|service| {
                        service.dests.iter().any(|dest| self.model.dests[*dest].server == (server, *port))
                    })
                };
                let port = ports.into_iter().find(linked).unwrap_or(ports[0]);
                self.change(
                    |change| change.delete_dest(product_key(key), world::at(server, port)),
                    |model| model.delete_dest(key, (server, port)),
                )
            }
            Action::Request { service, client, port, flags } => {
                self.request(key(service), (client, port), FLAGS[flags])
            }
            Action::Reply { service, server, client, port, flags } => {
                self.reply(key(service), server, (client, port), FLAGS[flags])
            }
            Action::Pass { span, ticks } => {
                self.pass(SPANS[span] * HZ + ticks);
                Ok(())
            }
            Action::SetTimeouts { tcp, tcpfin, udp } => {
                let set = Timeouts { tcp, tcpfin, udp }.set(&self.world.tables.config[0], world::HZ);
                prop_assert!(set.is_ok());
                self.model.set_timeouts(tcp.into(), tcpfin.into(), udp.into());
                Ok(())
            }
            Action::SetReuse { mode } => {
                self.world.tables.config[0].conn_reuse_mode.store(mode);
                self.model.reuse_mode = mode;
                Ok(())
            }
        }?;
        self.compare()
    }

    /// Lets time pass on both sides, and more of it until every connection is either over on both or on none: a connection of
    /// the product may live a second longer.
    fn pass(&mut self, ticks: u64) {
        let mut until = self.model.now + ticks;
        while let Some(last) = self
            .model
            .connections
            .iter()
            .map(|connection| connection.expires)
            .find(|expires| (*expires..*expires + HZ + 1).contains(&until))
        {
            until = last + HZ + 1;
        }
        let jiffies = &self.world.env.jiffies;
        jiffies.set(jiffies.get().wrapping_add((until - self.model.now) as u32));
        self.model.pass(until - self.model.now);
        self.world.age();
    }

    fn request(&mut self, key: ServiceKey, client: Client, letters: &'static str) -> Result<(), TestCaseError> {
        let macs = (cast::CLIENT_MAC, cast::DIRECTOR_OUTSIDE_MAC);
        let frame = Frame::new(macs, (address_of_client(client.0), client.1), (cast::VIP, key.port));
        let bytes = if key.protocol == TCP { frame.tcp(letters, b"data") } else { frame.udp(b"data") };
        let fate = self.model.request(key, client, flags_of(letters), (bytes.len() - ETHERNET) as u64);
        let outcome = self.world.arrive(cast::OUTSIDE, &bytes);
        let word = |at: usize| Ipv4Addr::from(<[u8; 4]>::try_from(&outcome.frame[at..at + 4]).expect("four bytes"));
        let port = |at: usize| u16::from_be_bytes([outcome.frame[at], outcome.frame[at + 1]]);
        match (fate, outcome.leave) {
            (Fate::To(server, method, to), Leave::Redirect(cast::INSIDE)) => {
                prop_assert_eq!(&outcome.frame[..6], &cast::server_mac(server));
                match method {
                    Method::Direct => prop_assert_eq!((word(30), port(36)), (cast::VIP, key.port)),
                    Method::Nat => prop_assert_eq!((word(30), port(36)), (cast::server(server), to)),
                    Method::Tunnel => {
                        prop_assert_eq!((word(30), word(50), port(56)), (cast::server(server), cast::VIP, key.port));
                    }
                }
            }
            (Fate::Host, Leave::Host) => {}
            (Fate::Dropped, Leave::Drop) => prop_assert_eq!(outcome.reason, Some(Reason::DestinationRemoved)),
            (Fate::Refused, Leave::Transmit) => prop_assert_eq!(outcome.reason, Some(Reason::NoDestination)),
            _ => prop_assert!(false, "{:?}, and the packet is at {:?}", fate, outcome),
        }
        Ok(())
    }

    fn reply(
        &mut self,
        key: ServiceKey,
        server: u8,
        client: Client,
        letters: &'static str,
    ) -> Result<(), TestCaseError> {
        let port = server_port(key, Method::Nat);
        let macs = (cast::server_mac(server), cast::DIRECTOR_INSIDE_MAC);
        let frame = Frame::new(macs, (cast::server(server), port), (address_of_client(client.0), client.1));
        let bytes = if key.protocol == TCP { frame.tcp(letters, b"reply") } else { frame.udp(b"reply") };
        let len = (bytes.len() - ETHERNET) as u64;
        let fate = self.model.reply(key.protocol, (server, port), client, flags_of(letters), len);
        let outcome = self.world.arrive(cast::INSIDE, &bytes);
        match (fate, outcome.leave) {
            (Fate::ToClient, Leave::Redirect(cast::OUTSIDE)) => {
                prop_assert_eq!(&outcome.frame[26..30], &cast::VIP.octets());
                prop_assert_eq!(&outcome.frame[34..36], &key.port.to_be_bytes());
            }
            (Fate::Host, Leave::Host) => {}
            _ => prop_assert!(false, "{:?}, and the packet is at {:?}", fate, outcome),
        }
        Ok(())
    }

    /// The record and the number of a destination that is configured.
    fn record(&self, key: ServiceKey, server: spec::Server) -> Option<(u32, DestRecord)> {
        let state = Configured::load(&self.world.shared());
        let slot = state.by_key.get(&product_key(key).into())?;
        let numbers = state.list(*slot).iter();
        numbers
            .map(|number| (*number, state.dests[number]))
            .find(|(_, record)| dest_address(record) == world::at(server.0, server.1))
    }

    fn counters(&self, number: u32) -> [u64; 5] {
        HostCounters(&self.world.tables.dest_cpus).read(number).expect("memory can be read")
    }

    /// Takes over the counters of a destination of which the specification does not tell whether it has been forgotten.
    fn adopt_counters(&mut self, key: ServiceKey, server: spec::Server) {
        let Some((number, _)) = self.record(key, server) else { return };
        let counters = self.counters(number);
        if let Some(dest) =
            self.model.dests.iter_mut().find(|dest| dest.available && (dest.service, dest.server) == (key, server))
        {
            dest.counters = counters;
        }
    }

    /// Compares everything that there is.
    fn compare(&self) -> Result<(), TestCaseError> {
        let tables = &self.world.tables;
        audit::check(&tables.flows4, &tables.flows6, &tables.dest_loads)
            .map_err(|difference| TestCaseError::fail(difference.to_string()))?;
        let mut found = Vec::new();
        for (flow, word, dest) in lb_ebpf::audit::connections(&tables.flows4).map_err(TestCaseError::fail)? {
            let key = ServiceKey { protocol: flow.protocol() as u8, port: flow.vport().number() };
            let [.., client] = flow.caddr().octets();
            found.push(((key, (client, flow.cport().number())), word, dest));
        }
        let name = |connection: &spec::Connection| (connection.service, connection.client);
        let mut expected: Vec<_> = self.model.connections.iter().map(name).collect();
        expected.sort_unstable();
        found.sort_unstable_by_key(|(name, ..)| *name);
        prop_assert_eq!(found.iter().map(|(name, ..)| *name).collect::<Vec<_>>(), expected);
        let now = i64::from(self.world.env.jiffies.get());
        for ((key, client), word, number) in found {
            let is_it = |connection: &&spec::Connection| name(connection) == (key, client);
            let Some(connection) = self.model.connections.iter().find(is_it) else { continue };
            self.compare_connection(connection, word, number, now)?;
        }
        for dest in self.model.dests.iter().filter(|dest| dest.available) {
            let Some((number, record)) = self.record(dest.service, dest.server) else {
                return Err(TestCaseError::fail(format!("{dest:?} is not configured")));
            };
            prop_assert_eq!(record.weight, dest.weight);
            let loads = active_and_total(tables.dest_loads[number as usize].connections.load());
            prop_assert_eq!(loads, (dest.active, dest.total), "{:?}", dest);
            prop_assert_eq!(self.counters(number), dest.counters, "{:?}", dest);
        }
        Ok(())
    }

    fn compare_connection(
        &self,
        connection: &spec::Connection,
        word: Word,
        number: u32,
        now: i64,
    ) -> Result<(), TestCaseError> {
        prop_assert_eq!(word.state(), connection.state as u8, "{:?}", connection);
        prop_assert_eq!(word.has(lb_common::flow::flag::INACTIVE), connection.inactive, "{:?}", connection);
        let left = i64::from(word.expires().0.wrapping_sub(now as u32).cast_signed());
        let exact = (connection.expires - self.model.now) as i64;
        prop_assert!(
            (exact - HZ as i64..=exact).contains(&left),
            "{:?} has {} ticks left, not {}",
            connection,
            left,
            exact
        );
        let dest = &self.model.dests[connection.dest];
        let record = &self.world.tables.dests[number as usize];
        let server = u32::from_be(record.addr[0].load()).wrapping_sub(cast::server(0).to_bits());
        prop_assert_eq!(server, u32::from(dest.server.0), "{:?}", connection);
        Ok(())
    }
}

fn service_spec(scheduler: &str, (fallback, with_port): (bool, bool)) -> ServiceSpec {
    let flag = |set: bool, flag: u32| if set { flag } else { 0 };
    ServiceSpec {
        scheduler: Scheduler::from_name(scheduler).expect("a scheduler"),
        flags: flag(fallback, sched_flag::FALLBACK) | flag(with_port, sched_flag::PORT),
        persistence: None,
    }
}

/// Most steps of a sequence, and sequences: with half of the most on average, more than 100,000 steps in all.
const STEPS: usize = 900;
const SEQUENCES: u32 = 250;

proptest! {
    #![proptest_config(Config {
        failure_persistence: None,
        // What this notices, it notices every time.
        rng_seed: RngSeed::Fixed(0x1234),
        max_shrink_iters: 3000,
        ..Config::with_cases(SEQUENCES)
    })]

    #[test]
    fn the_product_does_what_the_model_does(actions in prop::collection::vec(action(), 1..=STEPS)) {
        let mut pair = Pair::new();
        for action in actions {
            pair.act(action)?;
        }
    }
}
