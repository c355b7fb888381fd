//! A full flow table, on the host: who makes room and who never does, and where packets go that there is no room for.

use std::{cell::RefCell, collections::HashMap, net::Ipv4Addr, ops::Range};

use lb_common::{
    abi::Record as _,
    addr::Port,
    event::Event,
    flow::{ENTRIES_PER_BUCKET, Entry as _, Entry4, Key as _, Key4, Place, Word, Yield},
    hash::Seed,
    proto::{Method, Protocol, Scheduler},
    reason::Reason,
    tcp::State,
    timeout,
};
use lb_ebpf::{forward::Leave, pipeline::Now, tables::Tables as _};
use lb_userspace::control::model::Transport;
use proptest::{
    prelude::*,
    test_runner::{Config, TestCaseError, TestRunner},
};
use xdpvs_tests::{
    audit, cast,
    frames::Frame,
    world::{HZ, Outcome, World, at, dest, ip4, scheduled, service},
};

const PORT: u16 = 80;
const SERVERS: [u8; 5] = [0, 1, 2, 3, 4];
/// Clients that there are in random traffic: three times as many as the smallest table has entries.
const CLIENTS: u16 = 60;

/// A director with services by TCP and UDP that have destinations at `servers`, added in this order.
fn director(flow_buckets: u32, secret: u64, scheduler: Scheduler, method: Method, servers: &[u8]) -> World {
    let world = World::new(flow_buckets);
    let mut instance = world.tables.instance[0].load();
    instance.seed = Seed::new([secret, !secret, secret.rotate_left(32)]);
    world.tables.instance[0].store(&instance);
    (0..=u16::MAX >> 8).for_each(|number| world.route_client(client(number).0));
    world.change(|change| {
        for protocol in [Transport::Tcp, Transport::Udp] {
            let key = service(protocol, PORT);
            change.add_service(key, scheduled(scheduler)).expect("new");
            for &index in servers {
                change.add_dest(key, at(index, PORT), dest(method, 1 + u32::from(index % 3))).expect("new");
            }
        }
    });
    world
}

fn client(number: u16) -> (Ipv4Addr, u16) {
    (Ipv4Addr::new(10, 1, 0, number as u8), 40_000 + number)
}

fn request(number: u16) -> Frame {
    Frame::new((cast::CLIENT_MAC, cast::DIRECTOR_OUTSIDE_MAC), client(number), (cast::VIP, PORT))
}

fn key(protocol: Protocol, number: u16) -> Key4 {
    let (address, port) = client(number);
    Key4::new(protocol, (ip4(address), Port::new(port)), (ip4(cast::VIP), Port::new(PORT)))
}

/// The real server that a frame is for which has left, by its link-layer address.
fn server_of(outcome: &Outcome) -> Option<u8> {
    let is_gone = matches!(outcome.leave, Leave::Transmit | Leave::Redirect(_));
    SERVERS.into_iter().find(|index| is_gone && cast::server_mac(*index) == outcome.frame[..6])
}

/// What an entry of the table holds.
#[derive(Clone, Copy)]
struct Stored {
    word: Word,
    dest: u32,
    key: Key4,
    /// Whether its time is over.
    over: bool,
    /// What it is and what is left of its time, if it makes room.
    rank: Option<(Yield, i32)>,
}

impl Stored {
    fn is_connection(&self) -> bool {
        self.word.is_live() && !self.over
    }
}

/// All entries, bucket by bucket. They never move.
fn stored(world: &World) -> Vec<Stored> {
    let now = Now::of(&world.tables.config[0], &world.env).clock.now;
    let entries = world.tables.flows4.iter().flat_map(|bucket| bucket.entries());
    let look = |entry: &Entry4| {
        let word = Word(entry.word().load());
        let left = word.expires().since(now);
        let rank = if word.protocol() == Protocol::Udp {
            // Connections live a second longer than their words say.
            let idle = left + HZ as i32 <= (timeout::UDP_S * HZ / 2) as i32;
            idle.then_some(Yield::Idle)
        } else {
            match State::try_from(word.state()).expect("a state") {
                State::Established => None,
                State::FinWait | State::CloseWait => Some(Yield::Closing),
                State::Close | State::TimeWait | State::LastAck => Some(Yield::Closed),
                State::None | State::SynSent | State::SynRecv | State::SynAck | State::Listen => Some(Yield::HalfOpen),
            }
        };
        let rank = rank.map(|yields| (yields, left));
        Stored { word, dest: entry.dest().load(), key: entry.key(word), over: word.expired(now, HZ), rank }
    };
    entries.map(look).collect()
}

#[derive(Clone, Debug)]
enum Action {
    Tcp { client: u16, flags: &'static [&'static str] },
    Udp { client: u16 },
    Reply { client: u16, server: u8, own: bool, flags: &'static str },
    Pass { ticks: u32 },
}

fn action() -> impl Strategy<Value = Action> {
    let segments: &[&[&str]] =
        &[&["S"], &["S"], &["A"], &["PA"], &["FA"], &["R"], &["SA"], &["S", "A"], &["S", "A"], &["S", "A", "FA"]];
    let replies = prop::sample::select(vec!["SA", "A", "FA", "R"]);
    prop_oneof![
        12 => (0..CLIENTS, prop::sample::select(segments))
            .prop_map(|(client, flags)| Action::Tcp { client, flags }),
        3 => (0..CLIENTS).prop_map(|client| Action::Udp { client }),
        3 => (0..CLIENTS, prop::sample::select(&SERVERS), any::<bool>(), replies)
            .prop_map(|(client, server, own, flags)| Action::Reply { client, server, own, flags }),
        1 => prop_oneof![6 => 1..20 * HZ, 1 => 100 * HZ..400 * HZ].prop_map(|ticks| Action::Pass { ticks }),
    ]
}

/// What has happened in all runs, lest nothing has.
#[derive(Default, Debug)]
struct Tally {
    made_room: HashMap<u8, u32>,
    stateless: u32,
    full: u32,
}

/// A director and what has been seen of it.
struct Run<'a> {
    world: World,
    method: Method,
    /// Where connections have gone for which there was no room, or for which another has made room.
    seen: HashMap<(Protocol, u16), u8>,
    tally: &'a mut Tally,
}

impl Run<'_> {
    fn counted(&self, event: Event) -> u64 {
        self.world.tables.counters[event as usize].get()
    }

    fn act(&mut self, action: &Action) -> Result<(), TestCaseError> {
        match *action {
            Action::Tcp { client, flags } => flags.iter().try_for_each(|flags| {
                let opens = flags.contains('S') && !flags.contains('R');
                self.arrive(cast::OUTSIDE, &request(client).tcp(flags, b""), key(Protocol::Tcp, client), opens)
            }),
            Action::Udp { client } => {
                self.arrive(cast::OUTSIDE, &request(client).udp(b"x"), key(Protocol::Udp, client), true)
            }
            Action::Reply { client: to, server, own, flags } => {
                let macs = (cast::server_mac(server), cast::DIRECTOR_INSIDE_MAC);
                let from = if own { cast::server(server) } else { cast::VIP };
                let frame = Frame::new(macs, (from, PORT), client(to)).tcp(flags, b"");
                self.arrive(cast::INSIDE, &frame, key(Protocol::Tcp, to), false)
            }
            Action::Pass { ticks } => {
                self.world.env.jiffies.update(|now| now + ticks);
                Ok(())
            }
        }
    }

    /// Lets a frame of the connection `own` arrive, and looks at what that has done to all connections.
    fn arrive(&mut self, wire: u32, frame: &[u8], own: Key4, opens: bool) -> Result<(), TestCaseError> {
        let before = stored(&self.world);
        let counts = [Event::Evicted, Event::Stateless].map(|event| self.counted(event));
        let outcome = self.world.arrive(wire, frame);
        let evicted = self.counted(Event::Evicted) - counts[0];
        let stateless = self.counted(Event::Stateless) - counts[1];

        // Nobody else's connection ends, unless it is over or makes room; and no more than one.
        let after = stored(&self.world);
        let ended: Vec<&Stored> = before
            .iter()
            .zip(&after)
            .filter(|(before, after)| {
                let stayed = after.word.same_life(before.word) && after.dest == before.dest;
                before.word.is_live() && before.key != own && !stayed
            })
            .map(|(before, _)| before)
            .collect();
        prop_assert!(ended.len() <= 1, "{} connections ended", ended.len());
        let made_room = ended.iter().find(|stored| !stored.over);
        prop_assert_eq!(u64::from(made_room.is_some()), evicted, "connections that made room");

        // Only where there is no room at all, and in order.
        let place = Place::of(Entry4::hash(&own, &self.world.tables.seed()));
        let buckets = self.world.tables.flows4.len() as u32;
        let near: Vec<&Stored> = [place.first(buckets), place.second(buckets)]
            .iter()
            .flat_map(|number| before.iter().skip(*number as usize * ENTRIES_PER_BUCKET).take(ENTRIES_PER_BUCKET))
            .collect();
        let is_full = near.iter().all(|stored| stored.is_connection());
        let first = near.iter().filter_map(|stored| stored.rank).min();
        if let Some(made_room) = made_room {
            prop_assert!(is_full && opens, "{:?} has made room without need", made_room.key);
            prop_assert!(made_room.rank.is_some(), "{:?} has made room", made_room.key);
            prop_assert_eq!(made_room.rank, first, "{:?} has made room before its turn", made_room.key);
            let yields = first.map_or(Yield::Never, |(yields, _)| yields);
            *self.tally.made_room.entry(yields as u8).or_default() += 1;
        }
        let is_lost = stateless > 0 || outcome.reason == Some(Reason::TableFull);
        if is_lost {
            prop_assert!(is_full, "there was room for {:?}", own);
            prop_assert!(!opens || first.is_none(), "somebody could have made room for {:?}", own);
            prop_assert_eq!(outcome.reason, (self.method == Method::Masq).then_some(Reason::TableFull));
            prop_assert_eq!(stateless, u64::from(self.method != Method::Masq));
            self.tally.stateless += u32::from(stateless > 0);
            self.tally.full += u32::from(stateless == 0);
        }
        if evicted + stateless > 0 {
            let server = server_of(&outcome).expect("it is forwarded");
            let known = *self.seen.entry((own.protocol(), own.cport().number())).or_insert(server);
            prop_assert_eq!(server, known, "{:?} has gone to another server before", own);
        }
        Ok(())
    }
}

/// Whatever arrives, no established connection ends before its time, nor does any other out of turn; and what is forwarded
/// without a connection goes to one server.
#[test]
fn only_connections_that_are_not_established_make_room() {
    let tally = RefCell::new(Tally::default());
    let mut runner = TestRunner::new(Config { failure_persistence: None, ..Config::with_cases(150) });
    let sequences = (prop::sample::select(Method::ALL), prop::sample::select(&[2u32, 4]), any::<u64>());
    let result = runner.run(
        &(sequences, prop::collection::vec(action(), 1..300)),
        |((method, flow_buckets, secret), actions)| {
            let world = director(flow_buckets, secret, Scheduler::Rr, method, &SERVERS);
            let mut run = Run { world, method, seen: HashMap::new(), tally: &mut tally.borrow_mut() };
            actions.iter().try_for_each(|action| run.act(action))?;
            let tables = &run.world.tables;
            prop_assert!(audit::check(&tables.flows4, &tables.flows6, &tables.dest_loads).is_ok(), "inexact counters");
            Ok(())
        },
    );
    result.expect("no connection ends before its time or turn");
    let tally = tally.into_inner();
    let all = [Yield::HalfOpen, Yield::Closed, Yield::Closing, Yield::Idle];
    assert!(all.iter().all(|yields| tally.made_room.contains_key(&(*yields as u8))), "{tally:?}");
    assert!(tally.stateless > 0 && tally.full > 0, "{tally:?}");
}

/// Lets clients establish so many connections that the smallest table is full.
fn fill(world: &World) {
    for number in 0..2 * ENTRIES_PER_BUCKET as u16 {
        for flags in ["S", "A"] {
            let outcome = world.arrive(cast::OUTSIDE, &request(number).tcp(flags, b""));
            assert!(server_of(&outcome).is_some(), "{outcome:?}");
        }
    }
}

/// The real server that a client's segment goes to.
fn forward(world: &World, number: u16, flags: &'static str) -> u8 {
    let outcome = world.arrive(cast::OUTSIDE, &request(number).tcp(flags, b""));
    server_of(&outcome).expect("it is forwarded")
}

/// Clients that a full table has no room for.
const NEWCOMERS: Range<u16> = 2 * ENTRIES_PER_BUCKET as u16..256;

/// Directors with other secrets, whose destinations were added in another order, choose the same servers.
#[test]
fn every_director_forwards_what_it_cannot_store_to_the_same_server() {
    let reversed: Vec<u8> = SERVERS.iter().rev().copied().collect();
    for scheduler in [Scheduler::Rr, Scheduler::Wrr, Scheduler::Lc, Scheduler::Wlc, Scheduler::Sed, Scheduler::Nq] {
        let directors = [(1, &SERVERS[..]), (2, &reversed)].map(|(secret, servers)| {
            let world = director(2, secret, scheduler, Method::Route, servers);
            fill(&world);
            world
        });
        let mut chosen = HashMap::new();
        for number in NEWCOMERS {
            let servers =
                ["S", "A", "PA", "FA"].map(|flags| directors.each_ref().map(|world| forward(world, number, flags)));
            assert!(servers.iter().flatten().all(|server| *server == servers[0][0]), "client {number}: {servers:?}");
            chosen.insert(number, servers[0][0]);
        }
        assert!(SERVERS.iter().all(|server| chosen.values().any(|chosen| chosen == server)), "{chosen:?}");

        // A server that goes takes only its own connections with it.
        let gone = SERVERS[2];
        for world in &directors {
            world.change(|change| change.delete_dest(service(Transport::Tcp, PORT), at(gone, PORT)).expect("there"));
        }
        for number in NEWCOMERS {
            let servers = directors.each_ref().map(|world| forward(world, number, "A"));
            assert_eq!(servers[0], servers[1], "client {number}");
            assert!(servers[0] == chosen[&number] || chosen[&number] == gone, "client {number}");
        }
    }
}

/// Where the scheduler itself goes by nothing that only one director knows, a connection goes to the same server whether it
/// is stored or not.
#[test]
fn schedulers_that_every_director_agrees_with_choose_themselves() {
    for scheduler in [Scheduler::Sh, Scheduler::Dh, Scheduler::Mh, Scheduler::Fo] {
        let [full, roomy] = [2, 1024].map(|buckets| director(buckets, 1, scheduler, Method::Route, &SERVERS));
        fill(&full);
        for number in NEWCOMERS {
            assert_eq!(forward(&full, number, "S"), forward(&roomy, number, "S"), "{scheduler}: client {number}");
        }
        assert_eq!(full.tables.counters[Event::Stateless as usize].get(), NEWCOMERS.count() as u64);
        assert_eq!(roomy.tables.counters[Event::Stateless as usize].get(), 0);
    }
}
