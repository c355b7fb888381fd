//! What can happen, and to whom.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use proptest::prelude::*;
use xdpvs_tests::{cast, family::Family};

use crate::{
    mark::{Prefix, Rule},
    persistence::{FTP, Persistence},
    spec::{DestSpec, HZ, Method, Protocol, ServiceKey, ServiceSpec, TCP, UDP},
    states::Flags,
};

/// A client: which of the addresses, and the port.
pub(crate) type Client = (u8, u16);

/// A port of one of the addresses of services.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target {
    family: Family,
    pub(crate) protocol: Protocol,
    address: Ipv4Addr,
    port: u16,
}

/// Who answers a client.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Sender {
    /// A server, from a port that stands for that of the service: see [`Target::answers_from`].
    Server(u8, usize),
    /// A server, with the address of the service.
    Service,
}

/// Something that happens.
#[derive(Clone, Debug)]
pub(crate) enum Action {
    AddService {
        key: ServiceKey,
        spec: ServiceSpec,
    },
    EditService {
        key: ServiceKey,
        spec: ServiceSpec,
    },
    DeleteService {
        key: ServiceKey,
    },
    AddDest {
        key: ServiceKey,
        server: u8,
        spec: DestSpec,
    },
    EditDest {
        key: ServiceKey,
        server: u8,
        spec: DestSpec,
    },
    DeleteDest {
        key: ServiceKey,
        server: u8,
    },
    Request {
        to: Target,
        client: Client,
        flags: &'static str,
    },
    Reply {
        from: Sender,
        to: Target,
        client: Client,
        flags: &'static str,
    },
    /// Time goes by, in ticks.
    Pass {
        ticks: u64,
    },
    /// Timeouts are set, in seconds.
    SetTimeouts {
        tcp: u32,
        tcpfin: u32,
        udp: u32,
    },
    Set {
        name: &'static str,
        value: u32,
    },
    SetRules {
        rules: Vec<Rule>,
    },
}

const SERVERS: u8 = 6;
const CLIENTS: u8 = 10;
const SCHEDULERS: [&str; 14] =
    ["rr", "wrr", "lc", "wlc", "sed", "nq", "fo", "ovf", "dh", "sh", "mh", "lblc", "lblcr", "wdh"];
const WEIGHTS: [u32; 8] = [0, 1, 1, 2, 3, 5, 10, 100];
/// Upper and lower thresholds.
const THRESHOLDS: [(u32, u32); 12] =
    [(0, 0), (0, 0), (0, 0), (0, 0), (1, 0), (2, 0), (3, 1), (4, 0), (4, 2), (4, 4), (8, 0), (2, 3)];
/// How long clients are remembered, in seconds. None of them and no sum with minutes is a second more than the timeout of a
/// state: what a template does that is over at the moment when a connection ends is not said by anything.
const PERSISTENCE: [u64; 4] = [5, 50, 100, 400];
/// Timeouts of states, in seconds; 0 leaves one as it is.
const TIMEOUTS: [u32; 6] = [0, 0, 7, 20, 33, 80];
const METHODS: [Method; 3] = [Method::Nat, Method::Direct, Method::Tunnel];
const FLAGS: [&str; 12] = ["S", "S", "S", "SA", "A", "A", "A", "FA", "RA", "", "SR", "SF"];
/// Seconds.
const SPANS: [u64; 10] = [1, 3, 9, 30, 61, 121, 301, 901, 43_200, 86_400];

/// Every server, of one family after the other.
pub(crate) fn servers() -> impl Iterator<Item = (u8, IpAddr)> {
    FAMILIES
        .into_iter()
        .flat_map(|family| (0..SERVERS).map(move |server| (server, family.address(cast::server(server)))))
}

/// Every address of a client.
pub(crate) fn clients() -> impl Iterator<Item = Ipv4Addr> {
    (0..CLIENTS).map(client)
}

pub(crate) const FAMILIES: [Family; 2] = Family::ALL;

fn client(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 1, number / 4, 1 + number % 4)
}

/// The address family of the packets of a service.
fn family(key: ServiceKey) -> Family {
    match key {
        ServiceKey::At(_, address) if address.is_ipv4() => Family::Four,
        ServiceKey::Mark { six: false, .. } => Family::Four,
        _ => Family::Six,
    }
}

/// What a port of a masqueraded server has more than that of the service.
const SHIFT: u16 = 8000;
/// The port of the masqueraded servers of a mark.
const MARKED: u16 = 9000;

/// Where a server listens: by NAT at a port for each service; else at the service's own, which is not changed on the way.
pub(crate) fn listener(key: ServiceKey, server: u8, method: Method) -> SocketAddr {
    let port = match (key, method) {
        (ServiceKey::At(_, address), Method::Nat) => address.port() + SHIFT,
        (ServiceKey::At(_, address), _) => address.port(),
        (ServiceKey::Mark { mark: 2, .. }, Method::Nat) => MARKED,
        (ServiceKey::Mark { .. }, _) => 0,
    };
    SocketAddr::new(family(key).address(cast::server(server)), port)
}

impl Target {
    pub(crate) const fn address(self) -> SocketAddr {
        SocketAddr::new(self.family.address(self.address), self.port)
    }

    /// Where a client sends from.
    pub(crate) fn client(self, (number, port): Client) -> SocketAddr {
        SocketAddr::new(self.family.address(client(number)), port)
    }

    /// Where an answer is sent from.
    pub(crate) fn answers_from(self, sender: Sender) -> SocketAddr {
        match sender {
            Sender::Server(server, port) => {
                let ports = [self.port + SHIFT, self.port, MARKED];
                SocketAddr::new(self.family.address(cast::server(server)), ports[port])
            }
            Sender::Service => self.address(),
        }
    }
}

/// In how many bits the addresses agree that stand for those that agree in so many octets: of IPv6, in one octet more.
fn bits_of_octets(family: Family, octets: u8) -> u8 {
    match (family, octets) {
        (Family::Six, 4) => 128,
        (Family::Six, _) => 8 * (octets + 1),
        (Family::Four, _) => 8 * octets,
    }
}

pub(crate) fn flags_of(letters: &str) -> Flags {
    let has = |letter| letters.contains(letter);
    Flags { syn: has('S'), ack: has('A'), fin: has('F'), rst: has('R') }
}

/// The addresses of services. Those of marks are at both.
const ADDRESSES: [Ipv4Addr; 2] = [cast::VIP, Ipv4Addr::new(10, 9, 9, 10)];

fn any_family() -> impl Strategy<Value = Family> {
    prop::sample::select(&FAMILIES[..])
}

fn any_key() -> impl Strategy<Value = ServiceKey> {
    const KEYS: [(Protocol, u16); 7] = [(TCP, 80), (TCP, 81), (UDP, 80), (UDP, 81), (TCP, 21), (TCP, 0), (UDP, 0)];
    let at = (any_family(), prop::sample::select(&KEYS[..])).prop_map(|(family, (protocol, port))| {
        ServiceKey::At(protocol, SocketAddr::new(family.address(cast::VIP), port))
    });
    let mark = (1..=2u32, any::<bool>()).prop_map(|(mark, six)| ServiceKey::Mark { mark, six });
    prop_oneof![2 => at, 1 => mark]
}

fn any_protocol() -> impl Strategy<Value = Protocol> {
    prop_oneof![Just(TCP), Just(UDP)]
}

/// A target, most likely one that one of these services is for.
fn any_target(keys: &[ServiceKey]) -> impl Strategy<Value = Target> + use<> {
    let of_service = (prop::sample::select(keys.to_vec()), anywhere()).prop_map(|(key, anywhere)| {
        let family = family(key);
        match key {
            ServiceKey::Mark { .. } => Target { family, ..anywhere },
            ServiceKey::At(protocol, address) => {
                let port = match address.port() {
                    0 => anywhere.port,
                    FTP if anywhere.port > 1000 => anywhere.port,
                    port => port,
                };
                Target { family, protocol, address: cast::VIP, port }
            }
        }
    });
    prop_oneof![4 => of_service, 1 => anywhere()]
}

fn anywhere() -> impl Strategy<Value = Target> {
    let port = prop_oneof![4 => 80..82u16, 1 => prop::sample::select(&[20, 21, 443, 1023, 1024, 2000][..])];
    let address = prop_oneof![3 => Just(ADDRESSES[0]), 1 => Just(ADDRESSES[1])];
    (any_family(), any_protocol(), address, port).prop_map(|(family, protocol, address, port)| Target {
        family,
        protocol,
        address,
        port,
    })
}

fn any_sender() -> impl Strategy<Value = Sender> {
    prop_oneof![3 => (0..SERVERS, 0..3usize).prop_map(|(server, port)| Sender::Server(server, port)), 1 => Just(Sender::Service)]
}

fn any_rule() -> impl Strategy<Value = Rule> {
    const PORTS: [(u16, u16); 4] = [(0, u16::MAX), (80, 81), (443, 443), (81, u16::MAX)];
    let protocol = prop_oneof![Just(None), Just(Some(TCP)), Just(Some(UDP))];
    // Clients have no mark.
    let destination = (prop::sample::select(&ADDRESSES[..]), 2..=4u8);
    let source = prop::option::weighted(0.3, (0..CLIENTS, 2..=4u8));
    let interface = prop_oneof![3 => Just(None), 1 => Just(Some(cast::OUTSIDE)), 1 => Just(Some(cast::INSIDE))];
    (1..=2u32, any_family(), protocol, destination, prop::sample::select(&PORTS[..]), source, interface).prop_map(
        |(mark, family, protocol, destination, ports, source, interface)| {
            let prefix =
                |(address, octets): (Ipv4Addr, u8)| Prefix(family.address(address), bits_of_octets(family, octets));
            let source = source.map(|(number, octets)| prefix((client(number), octets)));
            Rule { mark, protocol, destination: prefix(destination), ports, source, interface }
        },
    )
}

/// A service, and how it is set.
fn any_service(keys: &[ServiceKey]) -> impl Strategy<Value = (ServiceKey, ServiceSpec)> + use<> {
    let persistence = prop::option::weighted(0.4, (prop::sample::select(&PERSISTENCE[..]), 2..=4u8));
    let scheduler = prop::sample::select(&SCHEDULERS[..]);
    (prop::sample::select(keys.to_vec()), scheduler, any::<(bool, bool)>(), prop::bool::weighted(0.2), persistence)
        .prop_map(|(key, scheduler, (fallback, with_port), one_packet, persistence)| {
            let persistence =
                persistence.map(|(timeout, octets)| Persistence { timeout, bits: bits_of_octets(family(key), octets) });
            (key, ServiceSpec { scheduler, fallback, with_port, one_packet, persistence })
        })
}

fn any_dest() -> impl Strategy<Value = DestSpec> {
    (prop::sample::select(&METHODS[..]), prop::sample::select(&WEIGHTS[..]), prop::sample::select(&THRESHOLDS[..]))
        .prop_map(|(method, weight, (upper, lower))| DestSpec { method, weight, upper, lower })
}

fn any_client() -> impl Strategy<Value = Client> {
    (0..CLIENTS, prop_oneof![1 => Just(20u16), 4 => 1024..1027u16])
}

fn any_setting() -> impl Strategy<Value = (&'static str, u32)> {
    // What drops packets is off most of the time.
    let always = |often| prop_oneof![often => Just(0u32), 1 => Just(3u32)];
    prop_oneof![
        (Just("conn_reuse_mode"), 0..4u32),
        (Just("sloppy_tcp"), 0..=1u32),
        (Just("expire_nodest_conn"), 0..=1u32),
        (Just("expire_quiescent_template"), 0..=1u32),
        (Just("secure_tcp"), always(1)),
        (Just("drop_packet"), always(4)),
        (Just("am_droprate"), 0..6u32),
    ]
}

fn any_span() -> impl Strategy<Value = u64> {
    // Days pass less often.
    let seconds = prop_oneof![12 => prop::sample::select(&SPANS[..8]), 1 => prop::sample::select(&SPANS[8..])];
    (seconds, 0..HZ).prop_map(|(seconds, ticks)| seconds * HZ + ticks)
}

fn any_action(keys: &[ServiceKey]) -> impl Strategy<Value = Action> + use<> {
    let key = || prop::sample::select(keys.to_vec());
    let flags = || prop::sample::select(&FLAGS[..]);
    let server = || 0..SERVERS;
    let timeout = || prop::sample::select(&TIMEOUTS[..]);
    prop_oneof![
        3 => any_service(keys).prop_map(|(key, spec)| Action::AddService { key, spec }),
        1 => any_service(keys).prop_map(|(key, spec)| Action::EditService { key, spec }),
        1 => key().prop_map(|key| Action::DeleteService { key }),
        12 => (key(), server(), any_dest()).prop_map(|(key, server, spec)| Action::AddDest { key, server, spec }),
        4 => (key(), server(), any_dest()).prop_map(|(key, server, spec)| Action::EditDest { key, server, spec }),
        3 => (key(), server()).prop_map(|(key, server)| Action::DeleteDest { key, server }),
        60 => (any_target(keys), any_client(), flags())
            .prop_map(|(to, client, flags)| Action::Request { to, client, flags }),
        20 => (any_sender(), any_target(keys), any_client(), flags())
            .prop_map(|(from, to, client, flags)| Action::Reply { from, to, client, flags }),
        2 => prop::collection::vec(any_rule(), 0..4).prop_map(|rules| Action::SetRules { rules }),
        5 => any_span().prop_map(|ticks| Action::Pass { ticks }),
        1 => (timeout(), timeout(), timeout())
            .prop_map(|(tcp, tcpfin, udp)| Action::SetTimeouts { tcp, tcpfin, udp }),
        2 => any_setting().prop_map(|(name, value)| Action::Set { name, value }),
    ]
}

/// Services of a sequence: few of all that there may be, so that much happens to each of them.
const SERVICES: usize = 4;

/// A sequence of at most so many actions.
pub(crate) fn any_actions(most: usize) -> impl Strategy<Value = Vec<Action>> {
    prop::collection::vec(any_key(), SERVICES)
        .prop_flat_map(move |keys| prop::collection::vec(any_action(&keys), 1..=most))
}
