//! Whole packets: what went in, and what came out.
//!
//! The records do not say how the director was set, but in words; what can be told from a record is taken from it: the
//! service from the packet sent, the method and the server's port from the packet received.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use etherparse::{Ipv4HeaderSlice, NetSlice, SlicedPacket, TransportSlice};
use lb_common::{
    proto::{Method, Scheduler},
    sctp::chunk,
};
use lb_userspace::control::{
    model::{ServiceKey, Transport},
    settings::Setting,
};
use serde::Deserialize;
use xdpvs_tests::{
    cast::{self, special},
    executor::{Executor, Host, Kernel, Verdict, Wire},
    frames::{ETHERNET, Frame, with_id},
    world::{dest, scheduled},
};

#[derive(Deserialize)]
struct Record {
    case: String,
    sent_by: String,
    #[serde(deserialize_with = "hex")]
    sent: Vec<u8>,
    received: Vec<Received>,
}

#[derive(Deserialize)]
struct Received {
    at: String,
    #[serde(deserialize_with = "hex")]
    frame: Vec<u8>,
}

fn hex<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    let text = String::deserialize(deserializer)?;
    let byte = |index: usize| text.get(index..index + 2).and_then(|byte| u8::from_str_radix(byte, 16).ok());
    (0..text.len())
        .step_by(2)
        .map(byte)
        .collect::<Option<_>>()
        .ok_or_else(|| serde::de::Error::custom("not hexadecimal"))
}

fn records() -> Vec<Record> {
    serde_json::from_str(include_str!("../golden/packets.json")).expect("a list of records")
}

const TCP: u8 = 6;
const UDP: u8 = 17;
const SCTP: u8 = 132;
const ICMP: u8 = 1;
const IPIP: u8 = 4;

/// Buckets of the flow tables.
const TABLE: u32 = 64;

/// The parts of a frame that matter here.
#[derive(Clone, Copy)]
struct Parts<'a> {
    ip: Ipv4HeaderSlice<'a>,
    payload: &'a [u8],
}

impl<'a> Parts<'a> {
    fn of(frame: &'a [u8]) -> Self {
        let ip = Ipv4HeaderSlice::from_slice(&frame[ETHERNET..]).expect("an IPv4 header");
        Self { ip, payload: &frame[ETHERNET + ip.slice().len()..] }
    }

    fn protocol(&self) -> u8 {
        self.ip.protocol().0
    }

    fn transport(&self) -> Option<Transport> {
        match self.protocol() {
            TCP => Some(Transport::Tcp),
            UDP => Some(Transport::Udp),
            SCTP => Some(Transport::Sctp),
            _ => None,
        }
    }

    fn word(&self, index: usize) -> u16 {
        u16::from_be_bytes([self.payload[2 * index], self.payload[2 * index + 1]])
    }

    fn source(&self) -> (Ipv4Addr, u16) {
        (self.ip.source_addr(), self.word(0))
    }

    fn destination(&self) -> (Ipv4Addr, u16) {
        (self.ip.destination_addr(), self.word(1))
    }

    fn tcp_flags(&self) -> Option<u8> {
        (self.protocol() == TCP).then(|| self.payload[13])
    }
}

/// Why a record is not replayed; `None` when it is.
fn excluded(record: &Record) -> Option<&'static str> {
    let words: Vec<&str> = record.case.split([' ', ':']).collect();
    if words.iter().any(|word| matches!(*word, "gre" | "gue")) {
        return Some("a tunnel of another kind");
    }
    if record.sent[12..14] != [8, 0] {
        return Some("not IPv4");
    }
    let sent = Parts::of(&record.sent);
    if !matches!(sent.protocol(), TCP | UDP | SCTP | ICMP) {
        return Some("another protocol");
    }
    let is_fragment = |frame: &[u8]| Parts::of(frame).ip.is_fragmenting_payload();
    if is_fragment(&record.sent) || record.received.iter().any(|received| is_fragment(&received.frame)) {
        return Some("fragments");
    }
    None
}

/// Whether the host's own stack made a frame that was received: XDP is to leave to it what led to that.
fn made_by_the_host(received: &Parts<'_>) -> bool {
    const RST: u8 = 4;
    const ECHO_REPLY: u8 = 0;
    let from = received.ip.source_addr();
    let of_its_own = from == cast::DIRECTOR_INSIDE || from == cast::DIRECTOR_OUTSIDE;
    let answer = from == cast::VIP
        && (received.tcp_flags().is_some_and(|flags| flags & RST != 0)
            || received.protocol() == ICMP && received.payload[0] == ECHO_REPLY);
    (of_its_own && received.protocol() != IPIP) || answer
}

/// The director while it is replayed on.
struct Replay<'e, E> {
    executor: &'e mut E,
    services: BTreeMap<ServiceKey, BTreeSet<SocketAddr>>,
}

impl<E: Executor> Replay<'_, E> {
    fn service(&mut self, key: ServiceKey) {
        if let std::collections::btree_map::Entry::Vacant(entry) = self.services.entry(key) {
            entry.insert(BTreeSet::new());
            self.executor.change(&|change| change.add_service(key, scheduled(Scheduler::Rr)).expect("new"));
        }
    }

    /// Lets the service have this one destination, with this weight.
    fn server(&mut self, key: ServiceKey, address: SocketAddr, method: Method, weight: u32) {
        self.service(key);
        let dests = self.services.get_mut(&key).expect("added a moment ago");
        let others: Vec<_> = dests.iter().copied().filter(|other| *other != address).collect();
        let is_new = dests.insert(address);
        for other in &others {
            dests.remove(other);
        }
        self.executor.change(&|change| {
            for other in &others {
                change.delete_dest(key, *other).expect("there");
            }
            let spec = dest(method, weight);
            if is_new {
                change.add_dest(key, address, spec).expect("new");
            } else {
                change.edit_dest(key, address, spec).expect("there");
            }
        });
    }

    fn remove_servers(&mut self, key: ServiceKey) {
        let dests = std::mem::take(self.services.get_mut(&key).expect("a service"));
        self.executor.change(&|change| {
            for address in &dests {
                change.delete_dest(key, *address).expect("there");
            }
        });
    }

    /// Sets the director as it must have been for this record.
    fn set_up(&mut self, record: &Record) {
        let sent = Parts::of(&record.sent);
        let says = |words: &str| record.case.contains(words);
        let server = |index: u8, port| SocketAddr::new(IpAddr::V4(cast::server(index)), port);
        let expires = if says("expire_nodest_conn 1") { "1" } else { "0" };
        let setting = Setting::named("expire_nodest_conn").expect("a setting");
        setting.set(&self.executor.shared(), expires).expect("a value");
        if record.sent_by == "client"
            && sent.destination().0 == cast::VIP
            && !says("no service")
            && !says("without a service")
            && let Some(protocol) = sent.transport()
        {
            let port = sent.destination().1;
            let key = ServiceKey { protocol, address: SocketAddr::new(IpAddr::V4(cast::VIP), port) };
            let (method, server_port) = way(record, port);
            if says("without servers") {
                self.service(key);
                self.remove_servers(key);
            } else if says("server removed") {
                self.remove_servers(key);
            } else if says("director's eth1 has MTU 1400") {
                // No packet gets to the server, so it may be another one than ip_vs had.
                self.server(key, server(special::NARROW, server_port), method, 1);
            } else {
                let weight = u32::from(!says("weight 0") && !says("weight now 0"));
                self.server(key, server(0, server_port), method, weight);
            }
        }
        if record.sent_by == "rs"
            && let (Some(protocol), [received]) = (sent.transport(), &record.received[..])
            && let received = Parts::of(&received.frame)
            && received.source().0 == cast::VIP
        {
            // A reply: the connection that it belongs to may have been opened by a packet that is not in the records.
            let service = received.source();
            let key = ServiceKey { protocol, address: SocketAddr::new(IpAddr::V4(service.0), service.1) };
            if !self.services.contains_key(&key) {
                self.server(key, server(0, sent.source().1), Method::Masq, 1);
                let macs = (cast::CLIENT_MAC, cast::DIRECTOR_OUTSIDE_MAC);
                let opening = Frame::new(macs, received.destination(), service);
                let opening = match protocol {
                    Transport::Tcp => opening.tcp("S", b""),
                    Transport::Udp => opening.udp(b"open"),
                    Transport::Sctp => opening.sctp(&[(chunk::INIT, b"")]),
                };
                let outcome = self.executor.arrive(Wire::Outside, &opening);
                assert!(Verdict::redirect(Wire::Inside).is_met_by(outcome.verdict), "{}: no connection", record.case);
            }
        }
    }

    /// Replays one record. What differs is described in the error.
    fn replay(&mut self, record: &Record) -> Result<(), String> {
        self.set_up(record);
        let wire = if record.sent_by == "client" { Wire::Outside } else { Wire::Inside };
        let outcome = self.executor.arrive(wire, &record.sent);
        let sent = Parts::of(&record.sent);
        let (verdict, frame) = match &record.received[..] {
            [] => {
                const RST: u8 = 4;
                // The host answers no RST.
                let silent = sent.tcp_flags().is_some_and(|flags| flags & RST != 0);
                (if silent { Verdict::Pass } else { Verdict::Drop }, &record.sent)
            }
            [received] if made_by_the_host(&Parts::of(&received.frame)) => (Verdict::Pass, &record.sent),
            [received] => {
                let out = if received.at.starts_with("client") { Wire::Outside } else { Wire::Inside };
                (if out == wire { Verdict::Transmit } else { Verdict::redirect(out) }, &received.frame)
            }
            _ => return Err("more than one frame".into()),
        };
        let mut difference = String::new();
        if !verdict.is_met_by(outcome.verdict) {
            let _ = writeln!(difference, "  verdict {:?}, expected {verdict:?}", outcome.verdict);
        }
        let anonymous =
            |bytes: &[u8]| if has_id_of_the_director(record) { with_id(bytes, [0; 2]) } else { bytes.to_vec() };
        if difference.is_empty() && anonymous(&outcome.frame) != anonymous(frame) {
            let _ = writeln!(difference, "     left {:02x?}\n expected {frame:02x?}", outcome.frame);
        }
        self.executor.audit().map_err(|error| error.to_string())?;
        if difference.is_empty() { Ok(()) } else { Err(difference) }
    }
}

/// Method and server's port, as the frame that reached the server tells, or the name of the record when none did.
fn way(record: &Record, port: u16) -> (Method, u16) {
    let arrived = record.received.iter().find(|received| received.at.starts_with("real server"));
    if let Some(received) = arrived {
        let packet = SlicedPacket::from_ethernet(&received.frame).expect("a frame");
        let Some(NetSlice::Ipv4(ip)) = &packet.net else { panic!("{}: not IPv4", record.case) };
        let parts = Parts::of(&received.frame);
        if parts.protocol() == IPIP {
            return (Method::Tunnel, port);
        }
        if ip.header().destination_addr() == cast::VIP {
            return (Method::Route, port);
        }
        let port = match &packet.transport {
            Some(TransportSlice::Tcp(tcp)) => tcp.destination_port(),
            Some(TransportSlice::Udp(udp)) => udp.destination_port(),
            _ => port,
        };
        return (Method::Masq, port);
    }
    let method = match record.case.split([' ', ':']).next() {
        Some("dr") => Method::Route,
        Some("tun") => Method::Tunnel,
        _ => Method::Masq,
    };
    (method, port)
}

/// Whether the identification of what was received is of the director's own choice: of the errors that it makes, and of
/// tunnels that may be fragmented.
fn has_id_of_the_director(record: &Record) -> bool {
    let [received] = &record.received[..] else { return false };
    let (sent, received) = (Parts::of(&record.sent), Parts::of(&received.frame));
    let error = received.protocol() == ICMP && (sent.protocol() != ICMP || is_about_a_tunnel(&sent));
    error || received.protocol() == IPIP && !received.ip.dont_fragment()
}

/// Whether an ICMP error quotes a packet of a tunnel.
fn is_about_a_tunnel(error: &Parts<'_>) -> bool {
    error
        .payload
        .get(8..)
        .and_then(|quote| Ipv4HeaderSlice::from_slice(quote).ok())
        .is_some_and(|ip| ip.protocol().0 == IPIP)
}

fn replay_all(executor: &mut impl Executor) {
    executor.reset();
    let mut replay = Replay { executor, services: BTreeMap::new() };
    let mut left_out: BTreeMap<&str, u32> = BTreeMap::new();
    let (mut replayed, mut failures) = (0, Vec::new());
    for record in records() {
        if let Some(why) = excluded(&record) {
            *left_out.entry(why).or_default() += 1;
            continue;
        }
        replayed += 1;
        if let Err(difference) = replay.replay(&record) {
            failures.push(format!("{}, {}:\n{difference}", record.case, replay.executor.name()));
        }
        // The records were taken seconds apart.
        replay.executor.pass(2);
    }
    assert!(failures.is_empty(), "{} of {replayed} records:\n{}", failures.len(), failures.join("\n"));
    println!("packets.json, {}: {replayed} replayed, excluded {left_out:?}", replay.executor.name());
    assert_eq!((replayed, left_out.values().sum::<u32>()), (59, 38), "records replayed and excluded");
}

#[test]
fn every_packet_leaves_as_from_ip_vs_on_the_host() {
    replay_all(&mut Host::new(TABLE));
}

#[test]
fn every_packet_leaves_as_from_ip_vs_in_the_kernel() {
    Kernel::with("conformance", TABLE, |kernel| replay_all(kernel)).expect("a director in the kernel");
}
