//! The flow table on the CPUs of this machine, at full speed; or on those of Miri, whose memory is as weak as the language
//! allows.

use std::thread;

use lb_common::{
    abi::control,
    flow::{Entry, Entry4, Entry6, Key as _},
    proto::Protocol,
};
use lb_ebpf::{ageing::What, track::From};

use crate::table::{ACK, FIN, Fate, HZ, Opening, Packet, SYN, Table, clock, host, key};

const THREADS: u64 = 4;
const ROUNDS: u32 = if cfg!(miri) { 1 } else { 50 };
const ACTIONS: u32 = if cfg!(miri) { 20 } else { 2_000 };
/// Connections that the threads are at: a few more than the table holds.
const CLIENTS: u8 = 30;
/// Connections of each that go by its template.
const CONNECTIONS: u32 = 3;
/// Destinations of each.
const SERVERS: u32 = 2;

/// A generator of numbers that look random (xorshift64).
struct Random(u64);

impl Random {
    fn below(&mut self, end: u32) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (((self.0 >> 32) * u64::from(end)) >> 32) as u32
    }
}

/// The destination of a connection tells whose it is: a packet that goes to another's is on a wrong way.
fn opening<E: Entry>(client: u8, server: u32, tcp_flags: u8) -> Opening<E::Key> {
    let key = key::<E>(Protocol::Tcp, client, 1);
    // All in two buckets, in pairs of their own.
    let hash = u64::from(client) << 16 | (u64::from(client) * 80) & 0x3ff;
    Opening { key, place: lb_common::flow::Place::of(hash), dest: u32::from(client) * SERVERS + server, tcp_flags }
}

fn act<E: Entry>(table: &Table<E>, random: &mut Random, begin: u32) {
    let client = random.below(CLIENTS.into()) as u8;
    let ticks = begin + random.below(62 * HZ);
    let flags = [SYN, SYN, ACK, ACK, FIN][random.below(5) as usize];
    let packet = opening::<E>(client, random.below(SERVERS), flags);
    let is_own = |dest: u32| assert_eq!(dest / SERVERS, u32::from(client), "a packet went to another client's server");
    let sent = |packet| match packet {
        Packet::To(dest) | Packet::Opened(dest) => is_own(dest),
        Packet::Lost(_) => {}
    };
    match random.below(36) {
        0 => drop(table.sweep(What::dest(random.below(SERVERS * u32::from(CLIENTS))))),
        1 => drop(table.sweep(What::over(clock(ticks)))),
        2 | 3 => drop(table.displace(&packet, clock(ticks))),
        4..8 => {
            if let Some((found, key)) = table.find_reply(&packet.key, packet.place, packet.dest) {
                assert_eq!((host(key.caddr()), found.dest), (client, packet.dest));
                drop(table.step(&found, flags, From::Server, clock(ticks)));
            }
        }
        8..24 => sent(table.packet(&packet, clock(ticks))),
        24 | 25 => {
            let held = table.hold(client, clock(ticks));
            if held.is_some() {
                let template = table.template(held.number()).expect("what is held stays");
                assert_eq!((template.client, template.dest), (client, held.dest()));
                is_own(held.dest());
                table.let_go(held, 0);
            }
        }
        _ => {
            // Other connections than those without a template.
            let key = key::<E>(Protocol::Tcp, client, 2 + random.below(CONNECTIONS) as u8);
            let fate = Fate::new(1 + random.below(62 * HZ));
            let fate = if random.below(2) == 0 { fate.displace() } else { fate };
            sent(table.persistent(&Opening { key, ..packet }, fate, clock(ticks)));
        }
    }
}

#[test]
fn threads_leave_an_exact_table() {
    leave_an_exact_table::<Entry4>();
    leave_an_exact_table::<Entry6>();
}

fn leave_an_exact_table<E: Entry + Sync>() {
    let table = Table::<E>::new(2);
    for round in 0..ROUNDS {
        thread::scope(|scope| {
            for thread in 1..=THREADS {
                let (table, mut random) = (&table, Random(u64::from(round) * THREADS + thread));
                scope.spawn(move || (0..ACTIONS).for_each(|_| act(table, &mut random, round * HZ)));
            }
        });
        table.audit();
    }
    table.sweep(What::dest(control::ANY));
    assert_eq!((table.audit(), table.templates()), ([].into(), vec![]), "what is left when all have ended");
}
