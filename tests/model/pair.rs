//! The product and the model of it, side by side.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    num::NonZeroU32,
};

use lb_common::{
    abi::{active_and_total, slot},
    addr::Address as _,
    flow::{Bucket, Entry, Key as _, Word, flag},
    overload::Thresholds,
    proto::{Scheduler, sched_flag, service_flag},
    reason::Reason,
};
use lb_ebpf::{
    ageing::{self, Sweep, Thinning, What, of},
    env::Scan as _,
    forward::Leave,
    host::HostRoute,
    pipeline::Now,
};
use lb_userspace::control::{
    change::Change,
    connections::Reader,
    marks,
    model::{self as product, Transport},
    settings::{Setting, Timeouts},
    shared::Counters as _,
    state::{State as Configured, dest_address, ip},
};
use proptest::prelude::*;
use xdpvs_tests::{
    audit, cast,
    family::Family,
    frames::{ETHERNET, Frame},
    world::{self, HostCounters, World},
};

use crate::{
    action::{self, Action, Client, FAMILIES, Sender, Target},
    mark::{Prefix, Rule},
    persistence::TemplateKey,
    spec::{Connection, DestId, DestSpec, Director, Fate, HZ, Method, Packet, ServiceKey, ServiceSpec, TCP},
};

pub(crate) struct Pair {
    world: World,
    model: Director,
    /// The numbers that the product has for the model's destinations.
    numbers: Vec<u32>,
}

/// A connection of the product: protocol, client, service; its word, and the number of its destination.
type Found = ((u8, SocketAddr, SocketAddr), Word, u32);

fn product_key(key: ServiceKey) -> product::Identity {
    match key {
        ServiceKey::At(protocol, address) => {
            let protocol = if protocol == TCP { Transport::Tcp } else { Transport::Udp };
            product::ServiceKey { protocol, address }.into()
        }
        ServiceKey::Mark { mark, six } => {
            let family = if six { product::Family::Ipv6 } else { product::Family::Ipv4 };
            product::MarkKey { mark: NonZeroU32::new(mark).expect("a mark"), family }.into()
        }
    }
}

fn product_rule(rule: &Rule) -> product::Rule {
    let prefix = |Prefix(address, length): Prefix| product::Prefix::new(address, length).expect("a length");
    let protocol = |protocol| if protocol == TCP { product::RuleProtocol::Tcp } else { product::RuleProtocol::Udp };
    let interface = |index| product::RuleInterface { index, name: format!("if{index}") };
    product::Rule {
        mark: NonZeroU32::new(rule.mark).expect("a mark"),
        matches: product::Match {
            protocol: rule.protocol.map(protocol),
            destination: prefix(rule.destination),
            ports: rule.ports,
            source: rule.source.map(prefix),
            interface: rule.interface.map(interface),
        },
    }
}

fn product_service(key: ServiceKey, spec: ServiceSpec) -> product::ServiceSpec {
    let six = matches!(key, ServiceKey::At(_, SocketAddr::V6(_)) | ServiceKey::Mark { six: true, .. });
    let flag = |set: bool, flag: u32| if set { flag } else { 0 };
    product::ServiceSpec {
        scheduler: Scheduler::from_name(spec.scheduler).expect("a scheduler"),
        flags: flag(spec.fallback, sched_flag::FALLBACK)
            | flag(spec.with_port, sched_flag::PORT)
            | flag(spec.one_packet, service_flag::ONE_PACKET),
        persistence: spec.persistence.map(|persistence| product::Persistence {
            timeout: persistence.timeout as u32,
            netmask: if six {
                product::Netmask::V6(persistence.bits)
            } else {
                product::Netmask::V4(Ipv4Addr::from_bits(u32::MAX << (32 - persistence.bits)))
            },
        }),
    }
}

fn product_dest(spec: DestSpec) -> product::DestSpec {
    let method = match spec.method {
        Method::Nat => lb_common::proto::Method::Masq,
        Method::Direct => lb_common::proto::Method::Route,
        Method::Tunnel => lb_common::proto::Method::Tunnel,
    };
    let thresholds = Thresholds { upper: spec.upper, lower: spec.lower };
    product::DestSpec { thresholds, ..world::dest(method, spec.weight) }
}

/// Source and destination of the packet that begins at `at` in a frame.
fn ends(family: Family, frame: &[u8], at: usize) -> (SocketAddr, SocketAddr) {
    let address = |at: usize| match family {
        Family::Four => IpAddr::from(<[u8; 4]>::try_from(&frame[at..at + 4]).expect("four bytes")),
        Family::Six => IpAddr::from(<[u8; 16]>::try_from(&frame[at..at + 16]).expect("sixteen bytes")),
    };
    let port = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
    let (source, destination) = if family == Family::Four { (at + 12, at + 16) } else { (at + 8, at + 24) };
    let ports = at + family.header();
    (SocketAddr::new(address(source), port(ports)), SocketAddr::new(address(destination), port(ports + 2)))
}

impl Pair {
    pub(crate) fn new() -> Self {
        let world = World::new(64);
        for (number, address) in action::servers() {
            let to = HostRoute::Via {
                ifindex: cast::INSIDE,
                mtu: 1500,
                to: cast::server_mac(number),
                from: cast::DIRECTOR_INSIDE_MAC,
                source: Family::address(
                    if address.is_ipv4() { Family::Four } else { Family::Six },
                    cast::DIRECTOR_INSIDE,
                ),
                gateway: address,
            };
            world.route(address, to);
        }
        for client in action::clients() {
            FAMILIES.into_iter().for_each(|family| world.route_client_of(family, client));
        }
        Self { world, model: Director::new(), numbers: Vec::new() }
    }

    /// Changes the product. Returns whether it did.
    fn change<E: std::fmt::Debug>(&mut self, plan: impl FnOnce(&mut Change<'_>) -> Result<(), E>) -> bool {
        let mut result = None;
        self.world.change(|change| result = Some(plan(change)));
        result.expect("the change has been planned").is_ok()
    }

    pub(crate) fn act(&mut self, action: Action) -> Result<(), TestCaseError> {
        match action {
            Action::AddService { key, spec } => {
                let done = self.change(|change| change.add_service(product_key(key), product_service(key, spec)));
                prop_assert_eq!(done, self.model.add_service(key, spec));
            }
            Action::EditService { key, spec } => {
                let done = self.change(|change| change.edit_service(product_key(key), product_service(key, spec)));
                prop_assert_eq!(done, self.model.edit_service(key, spec));
            }
            Action::DeleteService { key } => {
                let done = self.change(|change| change.delete_service(product_key(key)));
                self.expire_removed(done);
                prop_assert_eq!(done, self.model.delete_service(key));
            }
            Action::AddDest { key, server, spec } => self.add_dest(key, server, spec)?,
            Action::EditDest { key, server, spec } => {
                let at = action::listener(key, server, spec.method);
                let done = self.change(|change| change.edit_dest(product_key(key), at, product_dest(spec)));
                prop_assert_eq!(done, self.model.edit_dest(key, at, spec));
            }
            Action::DeleteDest { key, server } => {
                let listeners = [Method::Nat, Method::Direct].map(|method| action::listener(key, server, method));
                let is_linked = |at: &SocketAddr| self.model.linked(key, *at).is_some();
                let at = listeners.into_iter().find(is_linked).unwrap_or(listeners[0]);
                let done = self.change(|change| change.delete_dest(product_key(key), at));
                self.expire_removed(done);
                prop_assert_eq!(done, self.model.delete_dest(key, at));
            }
            Action::Request { to, client, flags } => self.request(to, client, flags)?,
            Action::Reply { from, to, client, flags } => self.reply(from, to, client, flags)?,
            Action::SetRules { rules } => {
                let product: Vec<_> = rules.iter().map(product_rule).collect();
                prop_assert!(marks::put_in_force(&self.world.shared(), &product).is_ok());
                self.model.rules = rules;
            }
            Action::Pass { ticks } => self.pass(ticks),
            Action::SetTimeouts { tcp, tcpfin, udp } => {
                let set = Timeouts { tcp, tcpfin, udp }.set(&self.world.tables.config[0], world::HZ);
                prop_assert!(set.is_ok());
                self.model.set_timeouts(tcp.into(), tcpfin.into(), udp.into());
            }
            Action::Set { name, value } => self.set(name, value),
        }
        self.compare()
    }

    fn set(&mut self, name: &'static str, value: u32) {
        let setting = Setting::named(name).expect("a setting");
        setting.set(&self.world.shared(), &value.to_string()).expect("a value of the setting");
        let settings = &mut self.model.settings;
        *match name {
            "conn_reuse_mode" => &mut settings.conn_reuse_mode,
            "sloppy_tcp" => &mut settings.sloppy_tcp,
            "expire_quiescent_template" => &mut settings.expire_quiescent_template,
            "expire_nodest_conn" => &mut settings.expire_nodest_conn,
            "secure_tcp" => &mut settings.secure_tcp,
            "drop_packet" => &mut settings.drop_packet,
            "am_droprate" => &mut settings.am_droprate,
            other => panic!("the model has no setting {other}"),
        } = value;
    }

    /// What commands do after they have removed destinations.
    fn expire_removed(&self, done: bool) {
        if done && self.model.settings.expire_nodest_conn != 0 {
            let tables = &self.world.tables;
            let what = What { kind: of::STATE, number: slot::REMOVED.into() };
            let mut sweep = Sweep { tables, first: 0, what, thinning: Thinning::NONE, ended: 0 };
            (0..ageing::buckets(tables)).for_each(|bucket| {
                sweep.visit(bucket);
            });
        }
    }

    fn add_dest(&mut self, key: ServiceKey, server: u8, spec: DestSpec) -> Result<(), TestCaseError> {
        let at = action::listener(key, server, spec.method);
        let done = self.change(|change| change.add_dest(product_key(key), at, product_dest(spec)));
        let number = self.number(key, at);
        let mut old = self.model.trashed(key, at);
        if done
            && let Some(dest) = old
            && number != Some(self.numbers[dest])
        {
            prop_assert!(self.model.may_be_forgotten(dest), "{:?} has been forgotten", self.model.dests[dest]);
            old = None;
        }
        let added = self.model.add_dest(key, at, spec, old);
        prop_assert_eq!(done, added.is_some());
        if let (Some(dest), Some(number)) = (added, number) {
            self.numbers.resize(self.model.dests.len(), number);
            self.numbers[dest] = number;
        }
        Ok(())
    }

    /// The number that the product has for a destination that is configured.
    fn number(&self, key: ServiceKey, at: SocketAddr) -> Option<u32> {
        let state = Configured::load(&self.world.shared());
        let slot = state.by_key.get(&product_key(key))?;
        state.list(*slot).iter().copied().find(|number| dest_address(&state.dests[number]) == at)
    }

    /// Lets time pass on both sides. The product is asked for what is over whenever something is.
    fn pass(&mut self, ticks: u64) {
        let until = self.model.now + ticks;
        while self.model.now < until {
            let next = self.model.next_end().map_or(until, |end| end.min(until));
            let jiffies = &self.world.env.jiffies;
            jiffies.set(jiffies.get().wrapping_add((next - self.model.now) as u32));
            self.model.pass(next);
            self.world.age();
        }
    }

    fn request(&mut self, to: Target, client: Client, letters: &'static str) -> Result<(), TestCaseError> {
        let macs = (cast::CLIENT_MAC, cast::DIRECTOR_OUTSIDE_MAC);
        let (packet, frame) = packet((cast::OUTSIDE, macs), to, (to.client(client), to.address()), letters);
        self.arrives(&packet, &frame)
    }

    fn reply(&mut self, from: Sender, to: Target, client: Client, letters: &'static str) -> Result<(), TestCaseError> {
        let server = if let Sender::Server(server, _) = from { server } else { 0 };
        let macs = (cast::server_mac(server), cast::DIRECTOR_INSIDE_MAC);
        let (packet, frame) = packet((cast::INSIDE, macs), to, (to.answers_from(from), to.client(client)), letters);
        if self.model.is_ambiguous(&packet) {
            return Ok(());
        }
        self.arrives(&packet, &frame)
    }

    /// Lets a packet arrive on both sides.
    fn arrives(&mut self, packet: &Packet, frame: &[u8]) -> Result<(), TestCaseError> {
        let fate = self.model.arrives(packet);
        let outcome = self.world.arrive(packet.interface, frame);
        let family = family_of(packet.to);
        let came = |reason| {
            prop_assert_eq!(outcome.reason, Some(reason));
            Ok(())
        };
        // What leaves by the interface by which it came is sent back.
        let leave = match outcome.leave {
            Leave::Transmit if outcome.reason.is_none() => Leave::Redirect(packet.interface),
            leave => leave,
        };
        match (fate, leave) {
            (Fate::To(server, method), Leave::Redirect(cast::INSIDE)) => {
                let (number, _) = action::servers().find(|(_, address)| *address == server.ip()).expect("a server");
                prop_assert_eq!(&outcome.frame[..6], &cast::server_mac(number));
                let (_, destination) = ends(family, &outcome.frame, ETHERNET);
                match method {
                    Method::Direct => prop_assert_eq!(destination, packet.to),
                    Method::Nat => prop_assert_eq!(destination, server),
                    Method::Tunnel => {
                        let (_, inner) = ends(family, &outcome.frame, ETHERNET + family.header());
                        prop_assert_eq!((destination.ip(), inner), (server.ip(), packet.to));
                    }
                }
                Ok(())
            }
            (Fate::ToClient(service), Leave::Redirect(cast::OUTSIDE)) => {
                prop_assert_eq!(ends(family, &outcome.frame, ETHERNET), (service, packet.to));
                Ok(())
            }
            (Fate::Host, Leave::Host) => {
                prop_assert_ne!(outcome.reason, Some(Reason::ReplyObserved));
                Ok(())
            }
            (Fate::Observed, Leave::Host) => came(Reason::ReplyObserved),
            (Fate::Removed, Leave::Drop) => came(Reason::DestinationRemoved),
            (Fate::Thinned, Leave::Drop) => came(Reason::DropPacket),
            (Fate::Refused, Leave::Transmit) => came(Reason::NoDestination),
            _ => Err(TestCaseError::fail(format!("{fate:?}, and the packet is at {outcome:?}"))),
        }
    }

    /// Compares everything that there is.
    fn compare(&mut self) -> Result<(), TestCaseError> {
        let tables = &self.world.tables;
        audit::check(&tables.flows4, &tables.flows6, &tables.dest_loads)
            .map_err(|difference| TestCaseError::fail(difference.to_string()))?;
        let mut found = connections(&tables.flows4)?;
        found.extend(connections(&tables.flows6)?);
        found.sort_unstable_by_key(|(name, ..)| *name);
        self.model.connections.sort_unstable_by_key(name);
        let expected: Vec<_> = self.model.connections.iter().map(name).collect();
        prop_assert_eq!(found.iter().map(|(name, ..)| *name).collect::<Vec<_>>(), expected);
        for (at, (_, word, number)) in found.into_iter().enumerate() {
            self.compare_connection(at, word, number)?;
        }
        self.compare_templates()?;
        self.compare_dests()
    }

    fn compare_connection(&mut self, at: usize, word: Word, number: u32) -> Result<(), TestCaseError> {
        let now = self.model.now;
        let connection = &mut self.model.connections[at];
        prop_assert_eq!(word.state(), connection.state as u8, "{:?}", connection);
        prop_assert_eq!(word.has(flag::INACTIVE), connection.inactive, "{:?}", connection);
        prop_assert_eq!(number, self.numbers[connection.dest], "{:?}", connection);
        // The product's connections may live a second longer; and then that is when they end.
        let left = word.expires().0.wrapping_sub(self.world.env.jiffies.get()).cast_signed();
        connection.ends = now.wrapping_add_signed(left.into()) + HZ;
        prop_assert!(
            (connection.expires..=connection.expires + HZ).contains(&connection.ends),
            "{:?}, and it is {}",
            connection,
            now
        );
        Ok(())
    }

    fn compare_templates(&self) -> Result<(), TestCaseError> {
        let tables = &self.world.tables;
        let shared = self.world.shared();
        let now = Now::of(shared.config, &self.world.env).clock.now;
        let reader = Reader::new(&shared, (&tables.flows4, &tables.flows6), now);
        let templates = reader.connections().filter(|connection| connection.client.port() == 0);
        let mut found: Vec<_> = templates
            .map(|product| {
                let protocol = product.protocol.map_or(0, |protocol| protocol.protocol() as u8);
                let ends = (product.client.ip(), product.service, product.destination);
                (protocol, ends, product.state, product.expires)
            })
            .collect();
        let mut expected: Vec<_> = self
            .model
            .templates
            .iter()
            .map(|template| {
                let TemplateKey { protocol, clients, service } = template.key;
                let (service_port, port) =
                    if template.retired { (65_535, 65_535) } else { (service.port(), template.port) };
                let service = SocketAddr::new(service.ip(), service_port);
                let server = SocketAddr::new(self.model.dests[template.dest].server.ip(), port);
                let state = if template.assured { "ASSURED" } else { "NONE" };
                (protocol, (clients, service, server), state, (template.expires - self.model.now) * 1000 / HZ)
            })
            .collect();
        found.sort_unstable();
        expected.sort_unstable();
        prop_assert_eq!(found, expected);
        Ok(())
    }

    fn compare_dests(&self) -> Result<(), TestCaseError> {
        let state = Configured::load(&self.world.shared());
        for (key, service) in &self.model.services {
            let slot = state.by_key.get(&product_key(*key)).copied();
            let list = slot.map_or(&[][..], |slot| state.list(slot));
            let numbers: Vec<u32> = service.dests.iter().map(|dest: &DestId| self.numbers[*dest]).collect();
            prop_assert_eq!(list, &numbers[..], "{:?}", key);
            for (number, dest) in numbers.into_iter().zip(&service.dests) {
                let dest = &self.model.dests[*dest];
                let load = &self.world.tables.dest_loads[number as usize];
                let record = &state.dests[&number];
                prop_assert_eq!(record.weight, dest.spec.weight, "{:?}", dest);
                let thresholds = Thresholds { upper: dest.spec.upper, lower: dest.spec.lower };
                prop_assert_eq!(load.is_overloaded(thresholds), dest.overloaded, "{:?}", dest);
                prop_assert_eq!(active_and_total(load.connections.load()), (dest.active, dest.total), "{:?}", dest);
                prop_assert_eq!(load.templates.load(), dest.templates, "{:?}", dest);
                let counters = HostCounters(&self.world.tables.dest_cpus).read(number).expect("memory can be read");
                prop_assert_eq!(counters, dest.counters, "{:?}", dest);
            }
        }
        prop_assert_eq!(state.by_key.len(), self.model.services.len());
        Ok(())
    }
}

/// A packet as the model sees it, and as it is sent: by an interface and between two stations; from one end to the other.
fn packet(
    (interface, macs): (u32, ([u8; 6], [u8; 6])),
    Target { protocol, .. }: Target,
    (from, to): (SocketAddr, SocketAddr),
    letters: &'static str,
) -> (Packet, Vec<u8>) {
    let member = |end: SocketAddr| (xdpvs_tests::family::member(end.ip()), end.port());
    let frame = Frame { family: family_of(from), ..Frame::new(macs, member(from), member(to)) };
    let frame = if protocol == TCP { frame.tcp(letters, b"data") } else { frame.udp(b"data") };
    let len = (frame.len() - ETHERNET) as u64;
    (Packet { protocol, from, to, interface, flags: action::flags_of(letters), len }, frame)
}

fn family_of(end: SocketAddr) -> Family {
    if end.is_ipv4() { Family::Four } else { Family::Six }
}

fn name(connection: &Connection) -> (u8, SocketAddr, SocketAddr) {
    (connection.protocol, connection.client, connection.service)
}

/// The connections of a flow table.
fn connections<E: Entry>(flows: &[Bucket<E>]) -> Result<Vec<Found>, TestCaseError>
where
    E::Key: std::fmt::Debug,
{
    let found = lb_ebpf::audit::connections(flows).map_err(TestCaseError::fail)?;
    let named = |(key, word, dest): (E::Key, Word, u32)| {
        let client = SocketAddr::new(
            ip(<E::Key as lb_common::flow::Key>::Addr::FAMILY, key.caddr().words()),
            key.cport().number(),
        );
        let service = SocketAddr::new(
            ip(<E::Key as lb_common::flow::Key>::Addr::FAMILY, key.vaddr().words()),
            key.vport().number(),
        );
        ((word.protocol() as u8, client, service), word, dest)
    };
    Ok(found.into_iter().map(named).collect())
}
