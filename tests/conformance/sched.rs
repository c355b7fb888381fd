//! Who got which connection.

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    num::NonZeroU32,
};

use lb_common::{proto::Scheduler, sctp::chunk};
use lb_userspace::control::{
    marks,
    model::{ANY_PORT, Family, Identity, MarkKey, Match, Prefix, Rule, Transport},
};
use serde::Deserialize;
use xdpvs_tests::{
    cast,
    executor::{Executor, Host, Kernel, Verdict, Wire},
    frames::Frame,
    world::service,
};

use crate::command::Command;

#[derive(Deserialize)]
struct Record {
    sched: String,
    variant: String,
    proto: String,
    #[serde(default)]
    flags: String,
    weights: Vec<u32>,
    #[serde(default)]
    seq: Vec<Option<u8>>,
    /// The same again, of other connections.
    #[serde(default)]
    seq2: Vec<Option<u8>>,
    #[serde(default)]
    srcs: Vec<String>,
    /// The addresses that connections are to, with a service of a mark for all of them.
    #[serde(default)]
    vips: Vec<Ipv4Addr>,
    /// The client of the connections in `seq`, and that of those in `seq2`.
    #[serde(default)]
    src: Vec<SocketAddrV4>,
    #[serde(default)]
    steps: Vec<Step>,
    #[serde(default)]
    service: String,
    /// Options of each server, beside its weight.
    #[serde(default)]
    dest_options: Vec<String>,
    after: Vec<[u32; 4]>,
}

#[derive(Deserialize)]
struct Step {
    seq: Vec<Option<u8>>,
    then: String,
}

fn records() -> Vec<Record> {
    include_str!("../golden/sched.jsonl")
        .lines()
        .filter(|line| !line.contains("\"note\""))
        .map(|line| serde_json::from_str(line).expect("a record is an object"))
        .collect()
}

/// Which records can be replayed: those whose schedulers and options exist.
fn is_supported(record: &Record) -> bool {
    Scheduler::from_name(&record.sched).is_some()
}

const PORT: u16 = 80;

struct Replay<'e, E> {
    executor: &'e mut E,
    protocol: Transport,
    key: Identity,
    next: u16,
}

impl<'e, E: Executor> Replay<'e, E> {
    fn new(executor: &'e mut E, record: &Record) -> Self {
        executor.reset();
        let protocol = if record.proto == "TCP" { Transport::Tcp } else { Transport::Udp };
        let mut key = service(protocol, PORT).into();
        if record.variant == "fwmark" {
            let mark = NonZeroU32::MIN;
            key = MarkKey { mark, family: Family::Ipv4 }.into();
            let destination = Prefix::new(Ipv4Addr::new(10, 9, 0, 0).into(), 16).expect("a prefix");
            let matches = Match { protocol: None, destination, ports: ANY_PORT, source: None, interface: None };
            marks::put_in_force(&executor.shared(), &[Rule { mark, matches }]).expect("room for a rule");
        }
        let mut replay = Self { executor, protocol, key, next: 0 };
        let flags = if record.flags.is_empty() { String::new() } else { format!("-b {}", record.flags) };
        replay.command(&format!("-A @ -s {} {flags} {}", record.sched, record.service));
        for (index, weight) in (0..).zip(&record.weights) {
            let options = record.dest_options.get(usize::from(index)).map_or("", String::as_str);
            replay.command(&format!("-a @ -r {}:{PORT} -m -w {weight} {options}", cast::server(index)));
        }
        replay
    }

    /// A command of the records: `-e @ -r ADDRESS:PORT -m -w WEIGHT` and the like.
    fn command(&mut self, line: &str) {
        let key = self.key;
        self.executor.change(&|change| Command(line).apply(change, Some(key)).expect(line));
    }

    fn send(&mut self, from: (Ipv4Addr, u16), to: Ipv4Addr, flags: &'static str) -> Option<u8> {
        let macs = (cast::CLIENT_MAC, cast::DIRECTOR_OUTSIDE_MAC);
        let frame = Frame::new(macs, from, (to, PORT));
        let bytes = match self.protocol {
            Transport::Tcp => frame.tcp(flags, &[]),
            Transport::Udp => frame.udp(b"hello"),
            Transport::Sctp => frame.sctp(&[(chunk::INIT, b"")]),
        };
        let outcome = self.executor.arrive(Wire::Outside, &bytes);
        if !Verdict::redirect(Wire::Inside).is_met_by(outcome.verdict) {
            return None;
        }
        (0..16).find(|index| outcome.frame[30..34] == cast::server(*index).octets())
    }

    /// Opens the next connection. Returns the number of its server.
    fn open(&mut self, record: &Record) -> Option<u8> {
        let number = self.next;
        self.next += 1;
        let from = match record.srcs.get(usize::from(number)) {
            Some(source) => {
                let source: std::net::SocketAddrV4 = source.parse().expect("an address and port");
                (*source.ip(), source.port())
            }
            // The records with changes do not name their client. Of the cast's, only this one explains the picks of sh.
            None if record.variant == "edit" => (Ipv4Addr::new(10, 1, 0, 2), 10_000 + number),
            None => (cast::CLIENT, 10_000 + number),
        };
        let mut send = |flags| self.send(from, cast::VIP, flags);
        let server = send("S");
        if record.variant == "rst3" {
            assert_eq!(send("A"), server);
            if number.is_multiple_of(3) {
                assert_eq!(send("R"), server);
            }
        }
        server
    }

    fn check(&self, record: &Record) {
        let counts = self.executor.counts();
        for [index, weight, active, inactive] in &record.after {
            let found = counts.dests.get(&cast::server(*index as u8)).copied().unwrap_or_default();
            let found = (found.active, found.inactive);
            let about = format!("server {index} of weight {weight} of {}", record.sched);
            assert_eq!(found, (i64::from(*active), i64::from(*inactive)), "{about}");
        }
        self.executor.audit().expect("exact counters");
    }
}

/// Buckets of the flow tables.
const TABLE: u32 = 64;

fn replay_all(executor: &mut impl Executor) {
    let mut replayed = 0;
    let records = records();
    for record in records.iter().filter(|record| is_supported(record)) {
        let mut replay = Replay::new(executor, record);
        let about = format!("{} {} {} {:?}", record.sched, record.variant, record.proto, record.weights);
        for (from, picks) in record.src.iter().zip([&record.seq, &record.seq2]) {
            // From ports of their own: here a client's port has no more than twenty connections.
            let ports = (from.port()..).step_by(record.src.len());
            let open = |(vip, port)| replay.send((*from.ip(), port), vip, "S");
            let found: Vec<_> = record.vips.iter().copied().zip(ports).map(open).collect();
            assert_eq!(found, *picks, "{about} from {from:?}");
        }
        if record.steps.is_empty() && record.vips.is_empty() {
            let picks: Vec<_> = record.seq.iter().map(|_| replay.open(record)).collect();
            assert_eq!(picks, record.seq, "{about}");
        }
        for step in &record.steps {
            let picks: Vec<_> = step.seq.iter().map(|_| replay.open(record)).collect();
            assert_eq!(picks, step.seq, "{about} before `{}`", step.then);
            if !step.then.is_empty() {
                replay.command(&step.then);
            }
        }
        replay.check(record);
        replayed += 1;
    }
    println!("sched.jsonl, {}: {replayed} records replayed, {} excluded", executor.name(), records.len() - replayed);
    assert_eq!((replayed, records.len()), (251, 251), "records replayed, and all");
}

#[test]
fn every_new_connection_goes_to_the_server_that_ip_vs_gave_it_to_on_the_host() {
    replay_all(&mut Host::new(TABLE));
}

#[test]
fn every_new_connection_goes_to_the_server_that_ip_vs_gave_it_to_in_the_kernel() {
    Kernel::with("schedulers", TABLE, |kernel| replay_all(kernel)).expect("a director in the kernel");
}
