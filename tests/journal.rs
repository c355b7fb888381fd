//! A change whose process is killed before any of its stores: packets and the next command find the whole old or the whole
//! new configuration.

use std::net::{Ipv4Addr, SocketAddr};

use lb_common::{
    abi::{EndpointKey as _, EndpointKey6, Record as _},
    addr::{Ip6, Port},
    crash,
    proto::{Method, Protocol, Scheduler},
};
use lb_ebpf::{endpoint, forward::Leave};
use lb_userspace::{
    control::{
        change::Change,
        journal,
        model::{Service, ServiceKey, Transport},
        shared::Counters,
        state::{State, dest_address},
    },
    error::Error,
};
use xdpvs_tests::{
    audit, cast,
    family::Family,
    frames::{ETHERNET, Frame},
    world::{HostCounters, World, at, dest, scheduled, service},
};

/// A change, and what is configured before it.
struct Scenario {
    name: &'static str,
    before: fn(&World),
    change: fn(&mut Change<'_>),
}

const WEB: u16 = 80;
const DNS: u16 = 53;

/// The service of IPv6.
fn web6() -> ServiceKey {
    Family::Six.service(Transport::Tcp, WEB)
}

/// Two services by different schedulers, a few destinations of every method, and connections.
fn furnished(world: &World) {
    world.change(|change| {
        let web = service(Transport::Tcp, WEB);
        change.add_service(web, scheduled(Scheduler::Wrr)).expect("new");
        for (index, method) in (0..).zip(Method::ALL) {
            change.add_dest(web, at(index, WEB), dest(*method, 1 + u32::from(index))).expect("new");
        }
    });
    world.change(|change| {
        let dns = service(Transport::Udp, DNS);
        change.add_service(dns, scheduled(Scheduler::Rr)).expect("new");
        change.add_dest(dns, at(3, DNS), dest(Method::Masq, 1)).expect("new");
        change.add_dest(dns, at(4, DNS), dest(Method::Masq, 1)).expect("new");
    });
    for client in 0..5 {
        pick(world, WEB, client);
        pick(world, DNS, client);
    }
}

/// A destination and a service that were removed a while ago, of which one still has connections.
fn with_trash(world: &World) {
    furnished(world);
    world.change(|change| {
        change.delete_dest(service(Transport::Tcp, WEB), at(1, WEB)).expect("there");
        change.delete_service(service(Transport::Udp, DNS)).expect("there");
    });
}

/// Trash that is about to be forgotten: its connections are over, and its time is too.
fn with_old_trash(world: &World) {
    with_trash(world);
    world.pass(2_000);
    world.age();
}

const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "the first service",
        before: |_| (),
        change: |change| change.add_service(service(Transport::Tcp, WEB), scheduled(Scheduler::Wlc)).expect("new"),
    },
    Scenario {
        name: "a service with destinations",
        before: furnished,
        change: |change| {
            let key = service(Transport::Tcp, 443);
            change.add_service(key, scheduled(Scheduler::Sh)).expect("new");
            change.add_dest(key, at(5, 443), dest(Method::Masq, 3)).expect("new");
            change.add_dest(key, at(6, 443), dest(Method::Route, 2)).expect("new");
        },
    },
    Scenario {
        name: "another destination",
        before: furnished,
        change: |change| {
            change.add_dest(service(Transport::Tcp, WEB), at(7, WEB), dest(Method::Masq, 9)).expect("new");
        },
    },
    Scenario {
        name: "another weight and method",
        before: furnished,
        change: |change| {
            change.edit_dest(service(Transport::Tcp, WEB), at(1, WEB), dest(Method::Masq, 0)).expect("there");
        },
    },
    Scenario {
        name: "another scheduler",
        before: furnished,
        change: |change| {
            change.edit_service(service(Transport::Udp, DNS), scheduled(Scheduler::Sh)).expect("there");
        },
    },
    Scenario {
        name: "a destination less",
        before: furnished,
        change: |change| change.delete_dest(service(Transport::Udp, DNS), at(3, DNS)).expect("there"),
    },
    Scenario {
        name: "a service less",
        before: furnished,
        change: |change| change.delete_service(service(Transport::Tcp, WEB)).expect("there"),
    },
    Scenario { name: "nothing left", before: furnished, change: |change| change.flush() },
    Scenario {
        name: "what was removed comes back",
        before: with_trash,
        change: |change| {
            change.add_dest(service(Transport::Tcp, WEB), at(1, WEB), dest(Method::Masq, 4)).expect("new");
            let dns = service(Transport::Udp, DNS);
            change.add_service(dns, scheduled(Scheduler::Wlc)).expect("new");
            change.add_dest(dns, at(4, DNS), dest(Method::Masq, 1)).expect("new");
        },
    },
    Scenario {
        name: "old trash is forgotten",
        before: with_old_trash,
        change: |change| {
            change.add_dest(service(Transport::Tcp, WEB), at(1, WEB), dest(Method::Route, 1)).expect("new");
        },
    },
    Scenario {
        name: "the first service of IPv6",
        before: furnished,
        change: |change| {
            change.add_service(web6(), scheduled(Scheduler::Rr)).expect("new");
            change.add_dest(web6(), Family::Six.at(5, WEB), dest(Method::Masq, 3)).expect("new");
        },
    },
    Scenario {
        name: "both families at once",
        before: |world| {
            furnished(world);
            world.change(|change| {
                change.add_service(web6(), scheduled(Scheduler::Wrr)).expect("new");
                change.add_dest(web6(), Family::Six.at(5, WEB), dest(Method::Masq, 3)).expect("new");
                change.add_dest(web6(), Family::Six.at(6, WEB), dest(Method::Route, 1)).expect("new");
            });
        },
        change: |change| {
            change.delete_dest(web6(), Family::Six.at(5, WEB)).expect("there");
            change.add_dest(web6(), Family::Six.at(7, WEB), dest(Method::Tunnel, 2)).expect("new");
            change.delete_dest(service(Transport::Tcp, WEB), at(0, WEB)).expect("there");
            change.delete_service(service(Transport::Udp, DNS)).expect("there");
        },
    },
    Scenario {
        name: "everything at once",
        before: furnished,
        change: |change| {
            let (web, dns) = (service(Transport::Tcp, WEB), service(Transport::Udp, DNS));
            change.edit_service(web, scheduled(Scheduler::Rr)).expect("there");
            change.delete_dest(web, at(0, WEB)).expect("there");
            change.delete_service(dns).expect("there");
            change.add_service(dns, scheduled(Scheduler::Rr)).expect("new");
            change.add_dest(dns, at(8, DNS), dest(Method::Tunnel, 1)).expect("new");
        },
    },
];

/// Who gets a new connection of this client: the frame as it left, but for what the tunnel or NAT has made of its payload;
/// `None` when nobody does.
fn pick(world: &World, port: u16, client: u8) -> Option<(Ipv4Addr, [u8; 6])> {
    let macs = (cast::CLIENT_MAC, cast::DIRECTOR_OUTSIDE_MAC);
    let frame = Frame::new(macs, (Ipv4Addr::new(10, 1, 9, client), 1000 + port), (cast::VIP, port));
    let frame = if port == DNS { frame.udp(b"?") } else { frame.tcp("S", b"") };
    let outcome = world.arrive(cast::OUTSIDE, &frame);
    let to = &outcome.frame[ETHERNET + 16..ETHERNET + 20];
    let mac = outcome.frame[..6].try_into().expect("six bytes");
    (outcome.leave == Leave::Redirect(cast::INSIDE)).then(|| (Ipv4Addr::new(to[0], to[1], to[2], to[3]), mac))
}

/// Who gets the next connections to every service there may be.
fn picks(world: &World, first: u8) -> Vec<Option<(Ipv4Addr, [u8; 6])>> {
    let clients = (first..first + 6).flat_map(|client| [WEB, DNS, 443].map(|port| (port, client)));
    clients.map(|(port, client)| pick(world, port, client)).collect()
}

fn configured(world: &World) -> Vec<Service> {
    State::load(&world.shared()).configured()
}

fn world(scenario: &Scenario) -> World {
    let world = World::new(64);
    (scenario.before)(&world);
    world
}

/// Counters in the kernel: clearing them is a call, before which a process may be killed like before a store.
struct KernelCounters<'a>(HostCounters<'a>);

impl<'a> KernelCounters<'a> {
    fn of(world: &'a World) -> Self {
        Self(HostCounters(&world.tables.dest_cpus))
    }
}

impl Counters for KernelCounters<'_> {
    fn read(&self, dest: u32) -> Result<[u64; 5], Error> {
        self.0.read(dest)
    }

    fn clear(&mut self, dest: u32) -> Result<(), Error> {
        crash::step();
        self.0.clear(dest)
    }
}

/// Makes the change of a scenario.
fn change(world: &World, scenario: &Scenario) {
    let mut counters = KernelCounters::of(world);
    let mut change = Change::begin(world.shared(), &counters, world.seconds()).expect("counters can be read");
    (scenario.change)(&mut change);
    change.commit(&mut counters).expect("there is room");
}

fn recover(world: &World) {
    journal::recover(&world.shared(), &mut KernelCounters::of(world)).expect("counters can be cleared");
}

/// The destinations that packets find for the service of IPv6; `None` when they find no service.
fn found6(world: &World) -> Option<Vec<SocketAddr>> {
    let SocketAddr::V6(address) = web6().address else { panic!("an IPv6 address") };
    let key = EndpointKey6::new(Ip6::new(address.ip().octets()), Port::new(WEB), Protocol::Tcp);
    let tables = &world.tables;
    let view = tables.views[endpoint::find(tables, key).view()? as usize].load();
    let numbers = (view.list..view.list + view.list_len).map(|index| tables.slots[index as usize].dest());
    Some(numbers.map(|number| dest_address(&tables.dests[number as usize].load())).collect())
}

/// What there is of a world that can be told from outside: what is configured, and who gets the next connections.
#[derive(PartialEq, Debug)]
struct Behaviour {
    configured: Vec<Service>,
    picks: Vec<Option<(Ipv4Addr, [u8; 6])>>,
    found6: Option<Vec<SocketAddr>>,
}

impl Behaviour {
    fn of(world: &World) -> Self {
        Self { configured: configured(world), picks: picks(world, 100), found6: found6(world) }
    }
}

/// Checks a world that has recovered. Returns whether the change is in force.
fn check(scenario: &Scenario, stores: u64, world: &World, [old, new]: [&Behaviour; 2]) -> bool {
    let about = format!("{}, killed after {stores} stores", scenario.name);
    let shared = world.shared();
    assert!(!journal::is_pending(&shared), "{about}: still pending");
    assert!(journal::snapshot(&shared).is_some(), "{about}: readers are kept waiting");
    let found = Behaviour::of(world);
    assert!(found == *old || found == *new, "{about}: neither old nor new:\n{found:?}\nold {old:?}\nnew {new:?}");
    audit::check(&world.tables.flows4, &world.tables.flows6, &world.tables.dest_loads).expect("exact counters");
    // The next change finds nothing in its way.
    world.change(|change| {
        let key = service(Transport::Tcp, 9999);
        change.add_service(key, scheduled(Scheduler::Rr)).expect("new");
        change.add_dest(key, at(0, 9999), dest(Method::Route, 1)).expect("new");
    });
    assert!(pick(world, 9999, 0).is_some(), "{about}: no further change");
    found == *new
}

/// How many stores it takes to add `number` destinations at once, and then one more.
fn stores_for(number: u8) -> [u64; 2] {
    let world = World::new(64);
    let web = service(Transport::Tcp, WEB);
    world.change(|change| change.add_service(web, scheduled(Scheduler::Wlc)).expect("new"));
    let add = |numbers: std::ops::Range<u8>| {
        world.change(|change| {
            for number in numbers.clone() {
                let address = (Ipv4Addr::new(10, 3, 0, number), WEB).into();
                change.add_dest(web, address, dest(Method::Route, 1)).expect("new");
            }
        });
    };
    [crash::count(|| add(0..number)), crash::count(|| add(number..number + 1))]
}

#[test]
fn a_change_of_many_costs_as_much_as_it_changes() {
    let [hundred, hundred_and_first] = stores_for(100);
    let [two_hundred, two_hundred_and_first] = stores_for(200);
    assert!(two_hundred <= 2 * hundred, "{hundred} stores for 100 destinations, {two_hundred} for 200");
    // For one more, the list alone is longer.
    let more = two_hundred_and_first - hundred_and_first;
    assert!((92..=108).contains(&more), "{hundred_and_first} and {two_hundred_and_first} stores for one more");
}

/// Every store of every scenario, and a few of each recovery.
#[test]
fn a_change_that_is_killed_anywhere_is_made_whole_or_not_at_all() {
    for scenario in SCENARIOS {
        let old = Behaviour::of(&world(scenario));
        let changed = world(scenario);
        change(&changed, scenario);
        let new = Behaviour::of(&changed);
        assert_ne!(old, new, "{}: changes nothing", scenario.name);
        let mut in_force = false;
        for stores in 0.. {
            let killed = world(scenario);
            let finished = crash::after(stores, || change(&killed, scenario)).is_some();
            // A reader gets the one or the other, or has to wait.
            if let Some(state) = journal::snapshot(&killed.shared()) {
                let seen = state.configured();
                assert!(seen == old.configured || seen == new.configured, "{}: a mixture", scenario.name);
            }
            recover(&killed);
            let is_new = check(scenario, stores, &killed, [&old, &new]);
            // From the store on that makes the change count it is never taken back.
            assert!(is_new || !in_force, "{}, killed after {stores} stores: taken back", scenario.name);
            in_force = is_new;
            if finished {
                assert!(in_force && stores > 10, "{}: {stores} stores", scenario.name);
                break;
            }
            // The one who recovers may be killed as well.
            let again = world(scenario);
            let _ = crash::after(stores, || change(&again, scenario));
            let _ = crash::after(stores * 7919 % 211, || recover(&again));
            recover(&again);
            assert_eq!(check(scenario, stores, &again, [&old, &new]), is_new, "{}: killed twice", scenario.name);
        }
    }
}

/// Between a kill and the recovery, packets of both services go to somebody that the old or the new configuration names.
#[test]
fn packets_never_see_a_mixture() {
    for scenario in SCENARIOS {
        let servers = |world: &World, port: u16| -> Vec<Ipv4Addr> {
            let of_port = |service: &Service| {
                service.key.port() == port && service.key.family() == lb_userspace::control::model::Family::Ipv4
            };
            let services = configured(world);
            let dests = services.iter().filter(|service| of_port(service)).flat_map(|service| &service.dests);
            let address = |dest: &lb_userspace::control::model::Dest| match dest.address {
                SocketAddr::V4(address) => *address.ip(),
                SocketAddr::V6(_) => panic!("no IPv6 here"),
            };
            dests.filter(|dest| dest.spec.weight != 0).map(address).collect()
        };
        let before = world(scenario);
        let changed = world(scenario);
        change(&changed, scenario);
        for stores in 0.. {
            let killed = world(scenario);
            let finished = crash::after(stores, || change(&killed, scenario)).is_some();
            for (port, client) in [(WEB, 200), (WEB, 201), (WEB, 202), (DNS, 200), (DNS, 201), (443, 200)] {
                let Some((_, mac)) = pick(&killed, port, client) else { continue };
                let server = (0..16).find(|index| cast::server_mac(*index) == mac).map(cast::server);
                let either = [servers(&before, port), servers(&changed, port)].concat();
                assert!(
                    server.is_some_and(|server| either.contains(&server)),
                    "{}, killed after {stores} stores: a connection to port {port} went to {server:?}, not to one of {either:?}",
                    scenario.name
                );
            }
            audit::check(&killed.tables.flows4, &killed.tables.flows6, &killed.tables.dest_loads)
                .expect("exact counters");
            if finished {
                break;
            }
        }
    }
}
