//! What can happen, and to whom.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use proptest::prelude::*;
use xdpvs_tests::{cast, family::Family};

use crate::{
    spec::{DestSpec, HZ, Method, Protocol, ServiceKey, ServiceSpec, TCP, UDP},
    states::Flags,
};

/// A client: which of the addresses, and the port.
pub(crate) type Client = (u8, u16);

/// Something that happens.
#[derive(Clone, Copy, Debug)]
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
        key: ServiceKey,
        client: Client,
        flags: &'static str,
    },
    Reply {
        key: ServiceKey,
        server: u8,
        client: Client,
        flags: &'static str,
    },
    /// In ticks.
    Pass {
        ticks: u64,
    },
    /// In seconds.
    SetTimeouts {
        tcp: u32,
        tcpfin: u32,
        udp: u32,
    },
    Set {
        name: &'static str,
        value: u32,
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

/// Where a client sends from, to a service.
pub(crate) fn client_of(key: ServiceKey, (number, port): Client) -> SocketAddr {
    SocketAddr::new(family(key).address(client(number)), port)
}

/// The address family of the packets of a service.
pub(crate) fn family(key: ServiceKey) -> Family {
    if key.address.is_ipv4() { Family::Four } else { Family::Six }
}

/// Where a server listens: by NAT at a port for each service; else at the service's own, which is not changed on the way.
pub(crate) fn listener(key: ServiceKey, server: u8, method: Method) -> SocketAddr {
    let port = key.address.port();
    let port = if method == Method::Nat { port + 8000 } else { port };
    SocketAddr::new(family(key).address(cast::server(server)), port)
}

pub(crate) fn flags_of(letters: &str) -> Flags {
    let has = |letter| letters.contains(letter);
    Flags { syn: has('S'), ack: has('A'), fin: has('F'), rst: has('R') }
}

fn any_key() -> impl Strategy<Value = ServiceKey> {
    const KEYS: [(Protocol, u16); 4] = [(TCP, 80), (TCP, 81), (UDP, 80), (UDP, 81)];
    (prop::sample::select(&FAMILIES[..]), prop::sample::select(&KEYS[..])).prop_map(|(family, (protocol, port))| {
        ServiceKey { protocol, address: SocketAddr::new(family.address(cast::VIP), port) }
    })
}

fn any_service() -> impl Strategy<Value = ServiceSpec> {
    (prop::sample::select(&SCHEDULERS[..]), any::<(bool, bool)>(), prop::bool::weighted(0.2)).prop_map(
        |(scheduler, (fallback, with_port), one_packet)| ServiceSpec { scheduler, fallback, with_port, one_packet },
    )
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

pub(crate) fn any_action() -> impl Strategy<Value = Action> {
    let flags = || prop::sample::select(&FLAGS[..]);
    let server = || 0..SERVERS;
    prop_oneof![
        3 => (any_key(), any_service()).prop_map(|(key, spec)| Action::AddService { key, spec }),
        1 => (any_key(), any_service()).prop_map(|(key, spec)| Action::EditService { key, spec }),
        1 => any_key().prop_map(|key| Action::DeleteService { key }),
        12 => (any_key(), server(), any_dest()).prop_map(|(key, server, spec)| Action::AddDest { key, server, spec }),
        4 => (any_key(), server(), any_dest()).prop_map(|(key, server, spec)| Action::EditDest { key, server, spec }),
        3 => (any_key(), server()).prop_map(|(key, server)| Action::DeleteDest { key, server }),
        60 => (any_key(), any_client(), flags())
            .prop_map(|(key, client, flags)| Action::Request { key, client, flags }),
        15 => (any_key(), server(), any_client(), flags())
            .prop_map(|(key, server, client, flags)| Action::Reply { key, server, client, flags }),
        5 => any_span().prop_map(|ticks| Action::Pass { ticks }),
        1 => (0..100u32, 0..100u32, 0..100u32)
            .prop_map(|(tcp, tcpfin, udp)| Action::SetTimeouts { tcp, tcpfin, udp }),
        2 => any_setting().prop_map(|(name, value)| Action::Set { name, value }),
    ]
}
