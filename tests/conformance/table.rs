//! Every cell of the tables of TCP states, as `docs/ipvs.md` has them, packet by packet: also those that no packets lead to.

use lb_common::{
    abi::{ONE_ACTIVE, ONE_CONNECTION, active_and_total},
    flow::{Entry as _, Word, flag},
    proto::{Method, Protocol, Scheduler},
    tcp::State,
};
use lb_userspace::control::{model::Transport, settings::Setting};
use xdpvs_tests::{
    cast,
    frames::Frame,
    world::{HZ, World, at, dest, scheduled, service},
};

const SPECIFICATION: &str = include_str!("../../docs/ipvs.md");
const PORT: u16 = 80;

/// The rows of the first table below `heading` in section 4.4 that begins with `head`, by cells.
fn rows(heading: &str, head: &str) -> Vec<Vec<&'static str>> {
    let (_, section) = SPECIFICATION.split_once("\n### 4.4 TCP\n").expect("section 4.4");
    let (section, _) = section.split_once("\n### ").expect("section 4.5");
    let (_, below) = section.split_once(heading).expect("the heading");
    let lines = below.lines().skip_while(|line| !line.starts_with(head)).skip(2);
    let cells = |line: &'static str| line.trim_matches('|').split('|').map(str::trim).collect();
    lines.take_while(|line| line.starts_with('|')).map(cells).collect()
}

/// A state: code, name, timeout in seconds, whether a connection in it counts as active.
struct Known {
    code: &'static str,
    name: &'static str,
    timeout_s: u32,
    active: bool,
}

fn states() -> Vec<Known> {
    let states = rows("States, default timeout", "| code |");
    let known = |row: Vec<&'static str>| {
        let [code, name, timeout_s, active] = row[..] else { panic!("four cells: {row:?}") };
        Known { code, name, timeout_s: timeout_s.parse().expect("seconds"), active: active == "yes" }
    };
    states.into_iter().map(known).collect()
}

/// A connection whose state can be set.
struct Subject {
    world: World,
    method: Method,
}

impl Subject {
    /// One that is masqueraded, or not: then only its client is seen, until a packet of the server is.
    fn new(method: Method, secure: bool) -> Self {
        let world = World::new(2);
        world.route_client(cast::CLIENT);
        let key = service(Transport::Tcp, PORT);
        world.change(|change| {
            change.add_service(key, scheduled(Scheduler::Rr)).expect("new");
            change.add_dest(key, at(0, PORT), dest(method, 1)).expect("new");
        });
        let set =
            |name: &str, value| Setting::named(name).expect("a setting").set(&world.shared(), value).expect("a value");
        set("secure_tcp", if secure { "3" } else { "0" });
        // A SYN is to move a connection, whatever its state is.
        set("conn_reuse_mode", "0");
        let subject = Self { world, method };
        subject.send(true, "S");
        subject
    }

    fn send(&self, client: bool, flags: &'static str) {
        let from = if self.method == Method::Masq { cast::server(0) } else { cast::VIP };
        let (client_end, service) = ((cast::CLIENT, 40_000), (cast::VIP, PORT));
        let (interface, frame) = if client {
            (cast::OUTSIDE, Frame::new((cast::CLIENT_MAC, cast::DIRECTOR_OUTSIDE_MAC), client_end, service))
        } else {
            let macs = (cast::server_mac(0), cast::DIRECTOR_INSIDE_MAC);
            (cast::INSIDE, Frame::new(macs, (from, PORT), client_end))
        };
        self.world.arrive(interface, &frame.tcp(flags, b""));
    }

    /// Puts the connection into a state, as if it were over now.
    fn put(&self, state: &Known) {
        let number = State::ALL.iter().position(|known| known.as_str() == state.name).expect("a state");
        let entries = || self.world.tables.flows4.iter().flat_map(|bucket| bucket.entries());
        let entry = entries().find(|entry| Word(entry.word().load()).is_live()).expect("a connection");
        let inactive = if state.active { 0 } else { flag::INACTIVE };
        let no_output = if self.method == Method::Masq { 0 } else { flag::NO_OUTPUT };
        let now = lb_common::jiffies::Jiffies(self.world.env.jiffies.get());
        let born = Word::born(Protocol::Tcp, number as u8, self.method as u8, inactive | no_output, now);
        entry.word().store(Word(0).claimed(1).live(born).0);
        let active = if state.active { ONE_ACTIVE } else { 0 };
        self.world.tables.dest_loads[0].connections.store(ONE_CONNECTION + active);
    }

    /// The name of the state, the seconds until the connection is over, and whether it counts as active.
    fn is(&self) -> (&'static str, u32, bool) {
        let entries = || self.world.tables.flows4.iter().flat_map(|bucket| bucket.entries());
        let words = || entries().map(|entry| Word(entry.word().load())).filter(|word| word.is_live());
        assert_eq!(words().count(), 1, "connections");
        let word = words().next().expect("a connection");
        let (active, total) = active_and_total(self.world.tables.dest_loads[0].connections.load());
        assert_eq!((total, active == 1), (1, !word.has(flag::INACTIVE)), "connections, and whether it is active");
        let left = word.expires().0.wrapping_sub(self.world.env.jiffies.get());
        assert_eq!(left % HZ, 0, "ticks left");
        (State::try_from(word.state()).expect("a state").as_str(), left / HZ, active == 1)
    }
}

/// Direction, flags of a segment, and the same with others that make no difference, in the order of the columns.
const COLUMNS: [(Method, bool, [&str; 2]); 12] = [
    (Method::Masq, true, ["S", "SA"]),
    (Method::Masq, true, ["F", "FA"]),
    (Method::Masq, true, ["A", "PA"]),
    (Method::Masq, true, ["R", "RSFA"]),
    (Method::Masq, false, ["S", "SFA"]),
    (Method::Masq, false, ["F", "FA"]),
    (Method::Masq, false, ["A", "PA"]),
    (Method::Masq, false, ["R", "RA"]),
    (Method::Route, true, ["S", "SA"]),
    (Method::Route, true, ["F", "FPA"]),
    (Method::Route, true, ["A", "PA"]),
    (Method::Route, true, ["R", "RA"]),
];

fn every_cell(heading: &str, secure: bool) {
    let states = states();
    assert_eq!(states.len(), State::ALL.len(), "states");
    let state = |code: &str| states.iter().find(|state| state.code == code).expect("a state");
    let rows = rows(heading, "| from |");
    assert_eq!(rows.len(), states.len(), "rows");
    let masqueraded = Subject::new(Method::Masq, secure);
    let direct = Subject::new(Method::Route, secure);
    // By a server that answers its clients itself, the director may see the answers, too.
    let subjects = |method, client| match (method, client) {
        (Method::Masq, true) => vec![&masqueraded],
        (Method::Masq, false) => vec![&masqueraded, &direct],
        _ => vec![&direct],
    };
    for row in rows {
        let (from, cells) = row.split_first().expect("a state");
        assert_eq!(cells.len(), COLUMNS.len(), "columns");
        for (to, (method, client, flags)) in cells.iter().zip(COLUMNS) {
            let closed = state("CL");
            for (flags, to) in [(flags[0], state(to)), (flags[1], state(to)), ("", closed), ("P", closed)] {
                for subject in subjects(method, client) {
                    subject.put(state(from));
                    subject.send(client, flags);
                    // How long, and whether it counts, goes by the state that it is in then.
                    let expected = (to.name, to.timeout_s, to.active);
                    assert_eq!(subject.is(), expected, "{heading}: {from}, {:?}, `{flags}`", subject.method);
                }
            }
        }
    }
}

#[test]
fn every_cell_of_the_normal_table_holds() {
    every_cell("Normal table", false);
}

#[test]
fn every_cell_of_the_table_of_secure_tcp_holds() {
    every_cell("secure_tcp (\"dos\") table", true);
}
