//! The states of SCTP, as `docs/ipvs.md`, section 4.6, has them: every cell of its tables, by a packet each.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use lb_common::{
    abi::ONE_ACTIVE,
    flow::{Bucket, Entry, Word, flag},
    proto::{Method, Protocol, Scheduler},
    sctp::chunk,
    sync::Shared64,
};
use lb_userspace::control::{
    bulk::{self, NewConnection, ProtocolState},
    model::Transport,
    session::Session,
};
use xdpvs_tests::{
    cast,
    executor::{Executor, Host, Kernel, Site, Wire},
    family::Family,
    frames::Frame,
    world::{dest, scheduled},
};

const BOOK: &str = include_str!("../../docs/ipvs.md");
const PORT: u16 = 80;
const CLIENT: (Ipv4Addr, u16) = (cast::CLIENT, 40_000);

/// The rows of the table that follows `heading` in the book's section, without what is above the line of dashes.
fn table(heading: &str) -> Vec<Vec<&'static str>> {
    let (_, section) = BOOK.split_once("### 4.6 SCTP\n").expect("the section");
    let (section, _) = section.split_once("\n### ").expect("the next section");
    let (_, below) = section.split_once(&format!("\n{heading}")).expect("the heading");
    let lines = below.lines().skip_while(|line| !line.starts_with("|---")).skip(1);
    let cells = |line: &'static str| line.trim_matches('|').split('|').map(str::trim).collect();
    lines.take_while(|line| line.starts_with('|')).map(cells).collect()
}

/// A state of the book.
struct State {
    code: &'static str,
    number: u8,
    timeout_s: u32,
}

fn states() -> Vec<State> {
    let number = |word: &str| word.parse::<u32>().expect("a number");
    let rows = table("| code | value |").into_iter();
    let states = rows.map(|row| State { code: row[0], number: number(row[1]) as u8, timeout_s: number(row[3]) });
    states.collect()
}

/// The types of chunks that the columns of the book's tables stand for, in their order.
const COLUMNS: [&[u8]; 10] = [
    &[chunk::DATA, chunk::SACK, chunk::HEARTBEAT, 5, 12, 13, 15, 63, 0x80, u8::MAX],
    &[chunk::INIT],
    &[chunk::INIT_ACK],
    &[chunk::COOKIE_ECHO],
    &[chunk::COOKIE_ACK],
    &[chunk::SHUTDOWN],
    &[chunk::SHUTDOWN_ACK],
    &[chunk::SHUTDOWN_COMPLETE],
    &[chunk::ERROR],
    &[chunk::ABORT],
];

/// A packet of one chunk of this type, from the client or from the server, on a connection by this method.
fn packet(family: Family, method: Method, wire: Wire, kind: u8) -> Vec<u8> {
    let frame = if wire == Wire::Outside {
        Frame::new((cast::CLIENT_MAC, cast::DIRECTOR_OUTSIDE_MAC), CLIENT, (cast::VIP, PORT))
    } else {
        let from = if method == Method::Masq { cast::server(0) } else { cast::VIP };
        Frame::new((cast::server_mac(0), cast::DIRECTOR_INSIDE_MAC), (from, PORT), CLIENT)
    };
    Frame { family, ..frame }.sctp(&[(kind, b"")])
}

/// The word of the only connection that there is, and the number of its destination.
fn the_connection(executor: &impl Executor, family: Family) -> (&Shared64, u32) {
    fn live<E: Entry>(flows: &[Bucket<E>]) -> Option<(&Shared64, u32)> {
        let live = |entry: &&E| Word(entry.word().load()).is_live();
        let entry = flows.iter().flat_map(|bucket| bucket.entries()).find(live)?;
        Some((entry.word(), entry.dest().load()))
    }
    let found = match family {
        Family::Four => live(executor.flows()),
        Family::Six => live(executor.flows6()),
    };
    found.expect("a connection")
}

/// Puts the connection into a state, as it would be without a packet of the server unless it is masqueraded. Its destination's
/// connections count accordingly.
fn put(host: &Host, family: Family, method: Method, state: &State) {
    let (shared, dest) = the_connection(host, family);
    let load = &host.shared().dest_loads[dest as usize].connections;
    let word = Word(shared.load());
    if !word.has(flag::INACTIVE) {
        load.fetch_add(ONE_ACTIVE.wrapping_neg());
    }
    let mut bits = u64::from(state.number) << 4;
    if method != Method::Masq {
        bits |= flag::NO_OUTPUT;
    }
    if state.code == "ES" {
        load.fetch_add(ONE_ACTIVE);
    } else {
        bits |= flag::INACTIVE;
    }
    shared.store(word.without(0xf << 4 | flag::INACTIVE | flag::NO_OUTPUT).with(bits).0);
}

/// The connection in a state, as another director may have had it.
fn connection(family: Family, state: &State) -> NewConnection {
    NewConnection {
        service: family.service(Transport::Sctp, PORT),
        client: SocketAddr::new(family.address(CLIENT.0), CLIENT.1),
        destination: family.at(0, PORT),
        state: ProtocolState::Sctp(state.number.try_into().expect("a state")),
        remaining: Duration::from_secs(60),
    }
}

/// Lets a packet arrive for every cell of the tables, on a connection that `put` puts into the state it is for.
fn every_cell<E: Executor>(executor: &mut E, mut put: impl FnMut(&mut E, Family, Method, &State)) {
    let states = states();
    assert_eq!(states.len(), 14, "states");
    // The sides that packets come from, and how the connection is made that is looked at by such a table.
    let directions = [
        ("INPUT\n", Method::Masq, Wire::Outside, false),
        ("OUTPUT\n", Method::Masq, Wire::Inside, false),
        ("OUTPUT\n", Method::Route, Wire::Inside, true),
        ("INPUT-ONLY\n", Method::Route, Wire::Outside, true),
        ("INPUT-ONLY\n", Method::Tunnel, Wire::Outside, true),
    ];
    for family in Family::ALL {
        for (heading, method, wire, no_output) in directions {
            executor.reset();
            // INIT shall move the connection that there is.
            executor.shared().config.conn_reuse_mode.store(0);
            let key = family.service(Transport::Sctp, PORT);
            executor.change(&|change| {
                change.add_service(key, scheduled(Scheduler::Rr)).expect("new");
                change.add_dest(key, family.at(0, PORT), dest(method, 1)).expect("new");
            });
            executor.arrive(Wire::Outside, &packet(family, method, Wire::Outside, chunk::INIT));
            let rows = table(heading);
            assert_eq!(rows.len(), states.len(), "rows of {heading}");
            for (from, row) in states.iter().zip(&rows) {
                assert_eq!((from.code, row.len()), (row[0], 1 + COLUMNS.len()));
                for (kinds, next) in COLUMNS.iter().zip(&row[1..]) {
                    let to = states.iter().find(|state| state.code == *next).expect("a state");
                    for kind in *kinds {
                        put(executor, family, method, from);
                        executor.arrive(wire, &packet(family, method, wire, *kind));
                        let what = format!("{:?} by {method}, {heading}{} and chunk {kind}", family, from.code);
                        let word = Word(the_connection(executor, family).0.load());
                        assert_eq!((word.protocol(), word.state()), (Protocol::Sctp, to.number), "{what}");
                        assert_eq!(word.has(flag::INACTIVE), to.code != "ES", "{what}");
                        assert_eq!(word.has(flag::NO_OUTPUT), no_output && wire == Wire::Outside, "{what}");
                        let hz = executor.shared().instance.hz.load();
                        let left = word.expires().since(executor.now()).cast_unsigned();
                        // It is written once a second, and the kernel's clock goes on.
                        assert!(left <= to.timeout_s * hz && left + 2 * hz > to.timeout_s * hz, "{what}: {left} ticks");
                        executor.audit().expect("exact counters");
                    }
                }
            }
        }
    }
}

/// Buckets of the flow tables.
const TABLE: u32 = 4;

#[test]
fn every_cell_of_the_tables_of_sctp_on_the_host() {
    every_cell(&mut Host::new(TABLE), |host, family, method, state| put(host, family, method, state));
}

#[test]
fn every_cell_of_the_tables_of_sctp_in_the_kernel() {
    let site = Site::new("sctp", TABLE).expect("a director in the kernel");
    let bring = |kernel: &mut Kernel<'_>, family, _: Method, state: &State| {
        kernel.end_connections();
        let lock = site.place().lock().expect("the lock can be taken");
        let mut session = Session::open(site.place()).expect("the pins open");
        let brought = bulk::insert(&mut session, &lock, [connection(family, state)]).expect("the control program runs");
        assert_eq!(brought.created, 1);
    };
    site.enter(|kernel| every_cell(kernel, bring)).expect("the pins open");
}
