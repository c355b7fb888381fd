//! Many connections at once: created without packets, ended by service and destination, and read while they come and go.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use lb_common::{
    abi::switch,
    proto::{Method, Scheduler},
    sctp::{self, chunk},
    tcp,
};
use lb_userspace::{
    control::{
        bulk::{self, NewConnection, ProtocolState, Selection},
        change::Change,
        connections::{Connection, Reader},
        model::{Refusal, ServiceKey, Transport},
        session::Session,
    },
    datapath::{
        memory::Access,
        open::Maps,
        place::Place,
        run::{Control, Ending, Insertions},
    },
};
use serde_json::Value;
use xdpvs_tests::{
    audit, cast,
    executor::{Executor, Kernel, Site, Verdict, Wire},
    family::{self, Family},
    frames::Frame,
    program,
    world::{at, dest, scheduled, service},
};

const PORT: u16 = 80;
const PROTOCOLS: [Transport; 3] = [Transport::Tcp, Transport::Udp, Transport::Sctp];
const METHODS: [Method; 3] = [Method::Masq, Method::Route, Method::Tunnel];

/// A service of each protocol and either family, each with one destination of each method.
fn services(change: &mut Change<'_>) {
    for protocol in PROTOCOLS {
        let [key, key6] = [service(protocol, PORT), Family::Six.service(protocol, PORT)];
        change.add_service(key, scheduled(Scheduler::Sh)).expect("new");
        change.add_service(key6, scheduled(Scheduler::Sh)).expect("new");
        for (index, method) in (0..).zip(METHODS) {
            change.add_dest(key, at(index, PORT), dest(method, 1)).expect("new");
            change.add_dest(key6, Family::Six.at(index, PORT), dest(method, 1)).expect("new");
        }
    }
}

fn site(role: &str, buckets: u32) -> Site {
    let site = Site::new(role, buckets).expect("a director in the kernel");
    site.enter(|kernel| kernel.change(&services)).expect("the pins open");
    site
}

/// Connection number `number`: its client's address determines all of it.
fn numbered(number: u32) -> NewConnection {
    let address = Ipv4Addr::from_bits(Ipv4Addr::new(10, 64, 0, 0).to_bits() + number);
    NewConnection {
        service: service(PROTOCOLS[number as usize % 3], PORT),
        client: (address, 1024 + (number % 60_000) as u16).into(),
        destination: at((number / 3 % 3) as u8, PORT),
        state: match PROTOCOLS[number as usize % 3] {
            Transport::Tcp => ProtocolState::Tcp(tcp::State::ALL[number as usize / 9 % tcp::STATES]),
            Transport::Udp => ProtocolState::Udp,
            Transport::Sctp => ProtocolState::Sctp(sctp::State::ALL[number as usize / 9 % sctp::STATES]),
        },
        remaining: Duration::from_secs(600),
    }
}

/// The client of IPv6 that a client of IPv4 stands for.
fn six(client: SocketAddr) -> SocketAddr {
    let SocketAddr::V4(four) = client else { panic!("IPv4") };
    (family::six(*four.ip()), four.port()).into()
}

/// As [`numbered`], by IPv6.
fn numbered6(number: u32) -> NewConnection {
    let NewConnection { service, client, state, remaining, .. } = numbered(number);
    NewConnection {
        service: Family::Six.service(service.protocol, PORT),
        client: six(client),
        destination: Family::Six.at((number / 3 % 3) as u8, PORT),
        state,
        remaining,
    }
}

/// Connections with these numbers, by either family in turn.
fn both(numbers: std::ops::Range<u32>) -> impl Iterator<Item = NewConnection> {
    numbers.flat_map(|number| [numbered(number), numbered6(number)])
}

fn insert(place: &Place, connections: impl IntoIterator<Item = NewConnection>) -> Insertions {
    let lock = place.lock().expect("the lock can be taken");
    let mut session = Session::open(place).expect("the pins open");
    bulk::insert(&mut session, &lock, connections).expect("the control program runs")
}

fn flush(place: &Place, selection: Selection) -> Result<u64, Refusal> {
    let mut session = Session::open(place).expect("the pins open");
    let endings = selection.endings(&session.state().expect("a whole configuration"))?;
    let control = Control::open(place).expect("the pin opens");
    let buckets = session.maps().instance().buckets();
    Ok(endings.into_iter().map(|ending| control.flush(buckets, ending).expect("the control program runs")).sum())
}

fn reader<'a>(maps: &'a Maps, control: &Control) -> Reader<'a> {
    let now = control.clock().expect("the control program runs");
    Reader::new(&maps.shared(), (&maps.flows4, &maps.flows6), now)
}

fn connections(place: &Place) -> Vec<Connection> {
    let session = Session::open(place).expect("the pins open");
    reader(session.maps(), &Control::open(place).expect("the pin opens")).connections().collect()
}

fn audited(site: &Site) -> audit::Connections {
    site.enter(|kernel| audit::check_instance(kernel.maps())).expect("the pins open").expect("exact counters")
}

#[test]
fn connections_are_created_as_they_are_said_to_be() {
    const NUMBER: u32 = 1000;
    let site = site("bulk", 200);
    let all = Insertions { created: 2 * u64::from(NUMBER), ..Insertions::default() };
    assert_eq!(insert(site.place(), both(0..NUMBER)), all);
    // Again, they are there already; among them are some that cannot be.
    let odd = numbered(0);
    let impossible = [
        NewConnection { service: service(Transport::Tcp, 81), ..odd },
        NewConnection { destination: at(5, PORT), ..odd },
        NewConnection { client: six(odd.client), ..odd },
        NewConnection { destination: Family::Six.at(0, PORT), ..odd },
        NewConnection { state: ProtocolState::Sctp(sctp::State::Established), ..odd },
        NewConnection { state: ProtocolState::Udp, ..odd },
        NewConnection { service: Family::Six.service(Transport::Tcp, 81), ..numbered6(0) },
        NewConnection { remaining: Duration::from_secs(1 << 30), ..numbered6(NUMBER) },
        NewConnection { remaining: Duration::from_secs(1 << 30), ..numbered(NUMBER) },
    ];
    let again = insert(site.place(), impossible.into_iter().chain(both(0..NUMBER)));
    assert_eq!(again, Insertions { known: 2 * u64::from(NUMBER), refused: 9, ..Insertions::default() });

    let found: HashMap<SocketAddr, Connection> =
        connections(site.place()).into_iter().map(|connection| (connection.client, connection)).collect();
    assert_eq!(found.len(), 2 * NUMBER as usize);
    for (index, expected) in both(0..NUMBER).enumerate() {
        let NewConnection { service, client, destination, state, .. } = expected;
        let connection = found[&client];
        let state = match state {
            ProtocolState::Tcp(state) => state.as_str(),
            ProtocolState::Udp => "UDP",
            ProtocolState::Sctp(state) => state.as_str(),
        };
        assert_eq!(
            (connection.protocol, connection.service),
            (Some(service.protocol), service.address),
            "{connection:?}"
        );
        assert_eq!((connection.destination, connection.state), (destination, state), "{connection:?}");
        assert_eq!(connection.method, METHODS[index / 6 % 3], "{connection:?}");
        assert!((590_000..=600_000).contains(&connection.expires), "{connection:?}");
    }
    assert_eq!(audited(&site).values().map(|(_, total)| total).sum::<u32>(), 2 * NUMBER);
}

#[test]
fn packets_belong_to_connections_that_were_created_for_them() {
    let site = site("bulkpackets", 20);
    let established = |connection: NewConnection| NewConnection {
        state: match connection.state {
            ProtocolState::Tcp(_) => ProtocolState::Tcp(tcp::State::Established),
            ProtocolState::Udp => ProtocolState::Udp,
            ProtocolState::Sctp(_) => ProtocolState::Sctp(sctp::State::Established),
        },
        ..connection
    };
    let connections: Vec<NewConnection> = both(0..9).map(established).collect();
    assert_eq!(insert(site.place(), connections.iter().copied()).created, 18);
    site.enter(|kernel| {
        for connection in &connections {
            let client = (family::member(connection.client.ip()), connection.client.port());
            let macs = (cast::CLIENT_MAC, cast::DIRECTOR_OUTSIDE_MAC);
            let family = if connection.client.is_ipv4() { Family::Four } else { Family::Six };
            let frame = Frame { family, ..Frame::new(macs, client, (cast::VIP, PORT)) };
            let frame = match connection.service.protocol {
                Transport::Tcp => frame.tcp("A", b"x"),
                Transport::Udp => frame.udp(b"x"),
                Transport::Sctp => frame.sctp(&[(chunk::DATA, b"x")]),
            };
            let outcome = kernel.arrive(Wire::Outside, &frame);
            assert!(Verdict::redirect(Wire::Inside).is_met_by(outcome.verdict), "{outcome:?}");
            let index = (0..3).find(|index| connection.destination == family.at(*index, PORT)).expect("a destination");
            assert_eq!(outcome.frame[..6], cast::server_mac(index), "{connection:?}");
        }
    })
    .expect("the pins open");
    assert_eq!(audited(&site).values().map(|(_, total)| total).sum::<u32>(), 18);
}

#[test]
fn what_there_is_no_room_for_is_told() {
    let site = site("bulkfull", 2);
    let Insertions { created, full, known, refused } = insert(site.place(), (0..100).map(numbered));
    assert_eq!((created, full, known, refused), (20, 80, 0, 0));
    assert_eq!(audited(&site).values().map(|(_, total)| total).sum::<u32>(), 20);
}

#[test]
fn the_connections_of_a_service_or_destination_are_ended() {
    let site = site("bulkflush", 200);
    let fill = || insert(site.place(), both(0..900));
    let [tcp6, udp6, sctp6] = PROTOCOLS.map(|protocol| Some(Family::Six.service(protocol, PORT).into()));
    let server6 = |index| Family::Six.at(index, PORT).ip();
    let [tcp, udp, sctp] = PROTOCOLS.map(|protocol| Some(service(protocol, PORT).into()));
    let server = |index| IpAddr::V4(cast::server(index));
    for (selection, ended) in [
        (Selection { service: tcp, dest: None }, 300),
        (Selection { service: sctp, dest: None }, 300),
        (Selection { service: None, dest: Some((server(1), None)) }, 300),
        (Selection { service: udp, dest: Some((server(1), Some(PORT))) }, 100),
        (Selection { service: tcp6, dest: None }, 300),
        (Selection { service: sctp6, dest: None }, 300),
        (Selection { service: None, dest: Some((server6(1), None)) }, 300),
        (Selection { service: udp6, dest: Some((server6(1), Some(PORT))) }, 100),
        (Selection::default(), 1800),
    ] {
        fill();
        let is_meant = |connection: &Connection| {
            let key = ServiceKey { protocol: connection.protocol.expect("a connection"), address: connection.service };
            selection.service.is_none_or(|service| service == key.into())
                && selection.dest.is_none_or(|(address, _)| address == connection.destination.ip())
        };
        assert_eq!(connections(site.place()).iter().filter(|connection| is_meant(connection)).count(), ended);
        assert_eq!(flush(site.place(), selection), Ok(ended as u64), "{selection:?}");
        let left = connections(site.place());
        assert!(left.len() == 1800 - ended && !left.iter().any(is_meant), "{selection:?} left {left:?}");
        assert_eq!(audited(&site).values().map(|(_, total)| *total as usize).sum::<usize>(), 1800 - ended);
    }
    let elsewhere = service(Transport::Tcp, 81).into();
    assert_eq!(
        flush(site.place(), Selection { service: Some(elsewhere), dest: None }),
        Err(Refusal::NoService(elsewhere))
    );
    for dest in [(server(5), None), (server(1), Some(81)), (server6(1), None)] {
        let selection = Selection { service: tcp, dest: Some(dest) };
        assert_eq!(flush(site.place(), selection), Err(Refusal::NoSuchDest(dest.0, dest.1)));
    }
    // One that has been removed has its connections left.
    fill();
    let key = service(Transport::Tcp, PORT);
    site.enter(|kernel| kernel.change(&|change| change.delete_dest(key, at(1, PORT)).expect("there")))
        .expect("the pins open");
    assert_eq!(flush(site.place(), Selection { service: tcp, dest: Some((server(1), None)) }), Ok(100));
    site.enter(|kernel| kernel.change(&|change| change.delete_service(key).expect("there"))).expect("the pins open");
    assert_eq!(flush(site.place(), Selection { service: tcp, dest: None }), Ok(200));
}

/// Under ip_vs's `expire_nodest_conn`, what is removed takes its connections with it (`docs/ipvs.md`, section 4.8).
#[test]
fn the_connections_of_removed_destinations_end_if_that_is_set() -> Result<()> {
    let site = site("bulknodest", 200);
    let keys = PROTOCOLS.map(|protocol| [service(protocol, PORT), Family::Six.service(protocol, PORT)]).concat();
    let remove = |index| -> Result<()> {
        Session::open(site.place())?.change(|change| -> Result<()> {
            for key in &keys {
                let dest = if key.address.is_ipv6() { Family::Six.at(index, PORT) } else { at(index, PORT) };
                change.delete_dest(*key, dest).expect("there");
            }
            Ok(())
        })
    };
    insert(site.place(), both(0..900));
    remove(0)?;
    assert_eq!(connections(site.place()).len(), 1800);
    Maps::open(site.place(), Access::Write)?.config[0].switches.store(switch::EXPIRE_NODEST_CONN);
    remove(1)?;
    // With those of what has been removed before.
    let left = connections(site.place());
    let is_left = |connection: &Connection| [at(2, PORT), Family::Six.at(2, PORT)].contains(&connection.destination);
    assert!(left.len() == 600 && left.iter().all(is_left), "{left:?}");
    audited(&site);
    Ok(())
}

/// Tells the process that this test starts and kills which instance to create connections in.
const INSTANCE: &str = "XDPVS_TEST_INSERT_INTO";

/// The process that is killed is this test, which finds the variable set.
#[test]
fn a_caller_that_is_killed_leaves_a_consistent_table() -> Result<()> {
    const NUMBER: u32 = 40_000;
    if let Ok(instance) = std::env::var(INSTANCE) {
        let place = Place::find(&instance)?;
        loop {
            insert(&place, (0..NUMBER).map(numbered));
            flush(&place, Selection::default())?;
        }
    }
    let site = site("bulkkill", 8000);
    let mut seen = Vec::new();
    for round in 0..12 {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["--exact", "a_caller_that_is_killed_leaves_a_consistent_table"])
            .env(INSTANCE, site.place().name())
            .stdout(Stdio::null())
            .spawn()?;
        thread::sleep(Duration::from_millis(60 + 17 * round));
        child.kill()?;
        ensure!(child.wait()?.code().is_none(), "the process has ended by itself");
        seen.push(audited(&site).values().map(|(_, total)| total).sum::<u32>());
    }
    ensure!(seen.iter().any(|found| (1..NUMBER).contains(found)), "nobody was killed in the middle: {seen:?}");
    insert(site.place(), (0..NUMBER).map(numbered));
    ensure!(audited(&site).values().map(|(_, total)| total).sum::<u32>() == NUMBER);
    Ok(())
}

/// A client whose address determines its port and protocol; its packets open connections.
fn sender(number: u32) -> (Frame, Transport) {
    let address = Ipv4Addr::new(10, 1, (number >> 8) as u8, number as u8);
    let macs = (cast::CLIENT_MAC, cast::DIRECTOR_OUTSIDE_MAC);
    let port = 2000 + 7 * number as u16;
    (Frame::new(macs, (address, port), (cast::VIP, PORT)), PROTOCOLS[number as usize % 3])
}

/// Lets packets of clients arrive, which open, move and close connections.
fn send(kernel: &mut Kernel<'_>, number: u32, flags: &'static str) {
    let (frame, protocol) = sender(number);
    let frame = match protocol {
        Transport::Tcp => frame.tcp(flags, b""),
        Transport::Udp => frame.udp(b"x"),
        Transport::Sctp => {
            let kind = match flags {
                "S" => chunk::INIT,
                "R" => chunk::ABORT,
                _ => chunk::DATA,
            };
            frame.sctp(&[(kind, b"")])
        }
    };
    kernel.arrive(Wire::Outside, &frame);
}

const SENDERS: u32 = 60;

/// What is the same in all lives of a connection, by its client's address.
type Identity = (Transport, SocketAddr, SocketAddr, SocketAddr, &'static str);

fn identity(connection: &Connection) -> Identity {
    let Connection { protocol, client, service, destination, method, .. } = connection;
    (protocol.expect("a connection"), *client, *service, *destination, method.as_str())
}

/// All connections that there can be.
fn identities(site: &Site) -> BTreeMap<IpAddr, Identity> {
    let found = site
        .enter(|kernel| {
            let mut found = BTreeMap::new();
            for number in 0..SENDERS {
                send(kernel, number, "S");
                let maps = kernel.maps();
                let control = Control::open(site.place()).expect("the pin opens");
                found.extend(reader(maps, &control).connections().map(|one| (one.client.ip(), identity(&one))));
                kernel.end_connections();
            }
            found
        })
        .expect("the pins open");
    assert_eq!(found.len(), SENDERS as usize);
    let created = (0..SENDERS).map(|number| {
        let NewConnection { service, client, destination, .. } = numbered(number);
        let method = METHODS[number as usize / 3 % 3].as_str();
        (client.ip(), (service.protocol, client, service.address, destination, method))
    });
    found.into_iter().chain(created).collect()
}

/// Connections come and go as fast as two threads can make them, in a table so small that every entry is given from one to
/// the other all the time. Whatever is read meanwhile is a connection that there was, and no mixture of two.
#[test]
fn no_connection_is_read_in_parts() {
    const ROUNDS: u32 = 30_000;
    /// Connections to be read.
    const ENOUGH: u64 = 100_000;
    let site = site("listing", 4);
    let known = identities(&site);
    let is_whole = |one: &Connection| known.get(&one.client.ip()) == Some(&identity(one));
    let place = site.place();
    let (over, seen) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        let creator = scope.spawn(|| {
            let mut session = Session::open(place).expect("the pins open");
            let control = Control::open(place).expect("the pin opens");
            let mut created = 0;
            // Until enough has been read, however slow the machine is; but not for ever.
            for turn in 0..ROUNDS / 10 {
                if turn >= ROUNDS / 100 && seen.load(Ordering::Relaxed) > ENOUGH {
                    break;
                }
                let lock = place.lock().expect("the lock can be taken");
                for _ in 0..10 {
                    let connections = (0..SENDERS).map(numbered);
                    created += bulk::insert(&mut session, &lock, connections).expect("the program runs").created;
                    control.flush(site.flow_buckets(), Ending::All).expect("the program runs");
                }
            }
            created
        });
        let packets = scope.spawn(|| {
            site.enter(|kernel| {
                for round in 0..ROUNDS {
                    send(kernel, round * 7 % SENDERS, ["S", "A", "R", "S"][round as usize % 4]);
                    if round % 64 == 0 {
                        kernel.pass(61);
                    }
                }
            })
            .expect("the pins open");
        });
        let read = scope.spawn(|| {
            let session = Session::open(place).expect("the pins open");
            let control = Control::open(place).expect("the pin opens");
            let (mut read, mut torn) = (0u64, None);
            while !over.load(Ordering::Relaxed) && torn.is_none() {
                for connection in reader(session.maps(), &control).connections() {
                    read = seen.fetch_add(1, Ordering::Relaxed) + 1;
                    if !is_whole(&connection) {
                        torn = Some(connection);
                    }
                }
            }
            (read, torn)
        });
        let listed = scope.spawn(|| -> Result<usize> {
            let mut listed = 0;
            while !over.load(Ordering::Relaxed) {
                listed += list(place, &known)?;
            }
            Ok(listed)
        });
        let created = creator.join();
        let packets = packets.join();
        over.store(true, Ordering::Relaxed);
        packets.expect("packets are sent");
        assert!(created.expect("connections are created") > u64::from(ROUNDS), "hardly any has come and gone");
        let (read, torn) = read.join().expect("the table is read");
        assert_eq!(torn, None, "after {read} connections");
        assert!(read > ENOUGH, "only {read} connections were read");
        assert!(listed.join().expect("connections are listed").expect("xdpvs lists them") > 0);
    });
    audited(&site);
}

/// Has the program list connections. All must be known. Returns how many there are.
fn list(place: &Place, known: &BTreeMap<IpAddr, Identity>) -> Result<usize> {
    let words = ["conn", "list", "--json", "--instance", place.name()];
    let answer = program::output(Command::new(program::path()?).args(words))?;
    let mut answer: Value = serde_json::from_str(&answer).with_context(|| answer.clone())?;
    let connections = answer["connections"].take();
    let connections = connections.as_array().context("a list")?;
    for one in connections {
        let word = |name: &str| one[name].as_str().with_context(|| format!("{name} of {one}"));
        let client: SocketAddr = word("client")?.parse()?;
        let (protocol, client, service, destination, method) = known.get(&client.ip()).context("a client")?;
        let expected = format!("{protocol} {client} {service} {destination} {method}");
        let found = ["protocol", "client", "service", "destination", "method"].map(word);
        let found = found.into_iter().collect::<Result<Vec<_>>>()?.join(" ");
        ensure!(found == expected, "{one} is in parts of {expected}");
    }
    Ok(connections.len())
}
