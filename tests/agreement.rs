//! The data plane's library on the host and its programs in the kernel do the same with the same traffic, whatever it is.
//!
//! This is what makes tests on the host tests of the kernel's programs: helpers, maps, tail calls and the compiler's work
//! lie between the two.

use std::{cell::RefCell, net::Ipv4Addr};

use lb_common::{
    proto::{Method, Scheduler},
    sctp::chunk,
};
use lb_userspace::control::{
    change::Change,
    model::Transport,
    state::{State, dest_address},
};
use proptest::{
    prelude::*,
    test_runner::{Config, TestCaseError, TestRunner},
};
use xdpvs_tests::{
    cast,
    executor::{Counts, Executor, Host, Kernel, Verdict, Wire},
    family::Family,
    frames::{ETHERNET, Frame, with_id},
    world::{dest, scheduled},
};

/// Buckets of the flow tables: so few that connections take the place of others that are over.
const TABLE: u32 = 4;

const PORTS: [u16; 3] = [80, 81, 82];
const PROTOCOLS: [Transport; 3] = [Transport::Tcp, Transport::Udp, Transport::Sctp];
const FLAGS: [&str; 8] = ["S", "S", "A", "PA", "FA", "R", "SA", ""];
/// The types of two chunks, for each of [`FLAGS`].
const CHUNKS: [[u8; 2]; 8] = [
    [chunk::INIT, chunk::DATA],
    [chunk::INIT_ACK, chunk::DATA],
    [chunk::COOKIE_ECHO, chunk::DATA],
    [chunk::COOKIE_ACK, chunk::SACK],
    [chunk::SHUTDOWN, chunk::DATA],
    [chunk::SHUTDOWN_ACK, chunk::DATA],
    [chunk::COOKIE_ACK, chunk::ABORT],
    [chunk::ABORT, chunk::DATA],
];
/// Multiples of ten: no timeout ends a second after one, which is when the last packet of a connection is due.
const SPANS: [u32; 6] = [10, 30, 50, 110, 290, 890];

/// Something that happens to a director.
#[derive(Clone, Debug)]
enum Action {
    /// A client sends something to a service.
    Request { client: u8, port: usize, protocol: Transport, flags: usize, ttl: u8, dont_fragment: bool, len: usize },
    /// A real server answers, from its own address or from the service's.
    Reply { server: u8, own: bool, client: u8, port: usize, protocol: Transport, flags: usize, ttl: u8 },
    /// A router complains about what a service has sent, or about what a server was sent.
    Error { server: Option<u8>, client: u8, port: usize, protocol: Transport, kind: u8 },
    /// Time passes.
    Pass(usize),
    /// A destination is added, or gets another weight and method.
    Set { port: usize, protocol: Transport, server: u8, method: usize, weight: u32 },
    /// A destination is removed.
    Remove { port: usize, protocol: Transport, server: u8 },
    /// A service gets another scheduler.
    Schedule { port: usize, protocol: Transport, scheduler: Scheduler },
}

fn protocol() -> impl Strategy<Value = Transport> + Clone {
    prop::sample::select(&PROTOCOLS[..])
}

fn family() -> impl Strategy<Value = Family> {
    prop::sample::select(&Family::ALL[..])
}

/// Schedulers that do not draw lots: those choose differently here and there.
fn schedulers() -> impl Strategy<Value = Scheduler> {
    let draws = |scheduler| matches!(scheduler, Scheduler::Random | Scheduler::Wrandom | Scheduler::Twos);
    prop::sample::select(Scheduler::ALL.iter().copied().filter(|scheduler| !draws(*scheduler)).collect::<Vec<_>>())
}

fn action() -> impl Strategy<Value = Action> {
    let ttl = prop_oneof![1 => 0u8..3, 8 => Just(64u8)];
    let len = prop_oneof![8 => 0usize..40, 1 => Just(1400usize), 1 => Just(1460)];
    let (client, server) = (0u8..4, 0u8..5);
    let about = (client, 0..PORTS.len(), protocol(), 0..FLAGS.len(), ttl);
    prop_oneof![
        12 => (about.clone(), any::<bool>(), len).prop_map(|((client, port, protocol, flags, ttl), dont_fragment, len)| {
            Action::Request { client, port, protocol, flags, ttl, dont_fragment, len }
        }),
        6 => (about.clone(), server.clone(), any::<bool>()).prop_map(|((client, port, protocol, flags, ttl), server, own)| {
            Action::Reply { server, own, client, port, protocol, flags, ttl }
        }),
        2 => (about, prop::option::of(server.clone()), 1u8..13).prop_map(|((client, port, protocol, ..), server, kind)| {
            Action::Error { server, client, port, protocol, kind }
        }),
        2 => (0..SPANS.len()).prop_map(Action::Pass),
        2 => (0..PORTS.len(), protocol(), server.clone(), 0..Method::ALL.len(), 0u32..4).prop_map(
            |(port, protocol, server, method, weight)| Action::Set { port, protocol, server, method, weight }
        ),
        1 => (0..PORTS.len(), protocol(), server).prop_map(|(port, protocol, server)| Action::Remove { port, protocol, server }),
        1 => (0..PORTS.len(), protocol(), schedulers()).prop_map(|(port, protocol, scheduler)| {
            Action::Schedule { port, protocol, scheduler }
        }),
    ]
}

/// Real server number `index` of the actions: ordinary ones, and one of every special kind.
fn server(index: u8) -> u8 {
    [0, 1, cast::special::NARROW, cast::special::UNRESOLVED, cast::special::UNREACHABLE][usize::from(index)]
}

fn client(index: u8) -> (Ipv4Addr, u16) {
    (Ipv4Addr::new(10, 1, 0, 1 + index), 40_000)
}

fn segment(frame: Frame, protocol: Transport, flags: usize, len: usize) -> Vec<u8> {
    let payload = vec![0x5a; len];
    match protocol {
        Transport::Tcp => frame.tcp(FLAGS[flags], &payload),
        Transport::Udp => frame.udp(&payload),
        Transport::Sctp => frame.sctp(&[(CHUNKS[flags][0], &payload), (CHUNKS[flags][1], b"")]),
    }
}

/// What begins every sequence: services of every method.
fn services(change: &mut Change<'_>) {
    for (family, protocol) in Family::ALL.into_iter().flat_map(|family| PROTOCOLS.map(|protocol| (family, protocol))) {
        for (port, method) in PORTS.into_iter().zip(Method::ALL) {
            let key = family.service(protocol, port);
            change.add_service(key, scheduled(Scheduler::Wlc)).expect("new");
            for index in [0, 1] {
                let address = family.at(server(index), port);
                change.add_dest(key, address, dest(*method, 1 + u32::from(index))).expect("new");
            }
        }
    }
}

/// Does an action. Returns what became of the frame, if there is one, without what differs by nature.
fn act(executor: &mut impl Executor, family: Family, action: &Action) -> Option<(Verdict, Vec<u8>, Counts)> {
    let new = |macs, from, to| Frame { family, ..Frame::new(macs, from, to) };
    let (wire, frame) = match *action {
        Action::Request { client: number, port, protocol, flags, ttl, dont_fragment, len } => {
            let macs = (cast::CLIENT_MAC, cast::DIRECTOR_OUTSIDE_MAC);
            let frame = new(macs, client(number), (cast::VIP, PORTS[port]));
            (Wire::Outside, segment(Frame { ttl, dont_fragment, ..frame }, protocol, flags, len))
        }
        Action::Reply { server: number, own, client: to, port, protocol, flags, ttl } => {
            let from = if own { cast::server(server(number)) } else { cast::VIP };
            let macs = (cast::server_mac(server(number)), cast::DIRECTOR_INSIDE_MAC);
            let frame = new(macs, (from, PORTS[port]), client(to));
            (Wire::Inside, segment(Frame { ttl, ..frame }, protocol, flags, 5))
        }
        Action::Error { server: Some(number), client: from, port, protocol, kind } => {
            let macs = (cast::server_mac(server(number)), cast::DIRECTOR_INSIDE_MAC);
            let about = new(macs, client(from), (cast::server(server(number)), PORTS[port]));
            let error = new(macs, (cast::server(server(number)), 0), (client(from).0, 0));
            (Wire::Inside, error.icmp(kind, 1, [0; 4], &segment(about, protocol, 2, 8)[ETHERNET..]))
        }
        Action::Error { server: None, client: to, port, protocol, kind } => {
            let macs = (cast::CLIENT_MAC, cast::DIRECTOR_OUTSIDE_MAC);
            let about = new(macs, (cast::VIP, PORTS[port]), client(to));
            let error = new(macs, (Ipv4Addr::new(10, 1, 0, 99), 0), (cast::VIP, 0));
            (Wire::Outside, error.icmp(kind, 1, [0; 4], &segment(about, protocol, 2, 8)[ETHERNET..]))
        }
        Action::Pass(span) => {
            executor.pass(SPANS[span]);
            return None;
        }
        Action::Set { port, protocol, server: number, method, weight } => {
            let (key, address) = (family.service(protocol, PORTS[port]), family.at(server(number), PORTS[port]));
            let spec = dest(Method::ALL[method], weight);
            let exists = has(executor, family, protocol, port, number);
            executor.change(&|change| {
                let result =
                    if exists { change.edit_dest(key, address, spec) } else { change.add_dest(key, address, spec) };
                result.expect("possible");
            });
            return None;
        }
        Action::Remove { port, protocol, server: number } => {
            if has(executor, family, protocol, port, number) {
                let (key, address) = (family.service(protocol, PORTS[port]), family.at(server(number), PORTS[port]));
                executor.change(&|change| change.delete_dest(key, address).expect("there"));
            }
            return None;
        }
        Action::Schedule { port, protocol, scheduler } => {
            let key = family.service(protocol, PORTS[port]);
            executor.change(&|change| change.edit_service(key, scheduled(scheduler)).expect("there"));
            return None;
        }
    };
    let before = executor.counts();
    let outcome = executor.arrive(wire, &frame);
    let counts = executor.counts().since(&before);
    let mut left = outcome.frame;
    if counts.icmp_sent > 0 {
        left = with_id(&left, [0; 2]);
    }
    if matches!(outcome.verdict, Verdict::HandOver(..)) {
        // The host writes the link-layer addresses.
        left[..12].fill(0);
    }
    let verdict = match outcome.verdict {
        // Only the host's executor can tell where to.
        Verdict::Redirect(_) => Verdict::Redirect(None),
        other => other,
    };
    Some((verdict, left, counts))
}

fn has(executor: &impl Executor, family: Family, protocol: Transport, port: usize, number: u8) -> bool {
    let state = State::load(&executor.shared());
    let slot = state.by_key.get(&family.service(protocol, PORTS[port]).into()).copied().expect("a service");
    let address = family.at(server(number), PORTS[port]);
    state.list(slot).iter().any(|number| dest_address(&state.dests[number]) == address)
}

/// Lets both directors go through a sequence.
fn compare(host: &mut Host, kernel: &mut Kernel<'_>, actions: &[(Family, Action)]) -> Result<(), TestCaseError> {
    host.reset();
    kernel.reset();
    host.change(&services);
    kernel.change(&services);
    for (number, (family, action)) in actions.iter().enumerate() {
        let (there, here) = (act(host, *family, action), act(kernel, *family, action));
        prop_assert_eq!(here, there, "action {}: {:?} {:?}, in the kernel and on the host", number, family, action);
    }
    for audit in [host.audit(), kernel.audit()] {
        prop_assert!(audit.is_ok(), "inexact counters");
    }
    Ok(())
}

#[test]
fn the_kernel_and_the_host_agree_about_any_traffic() {
    let work = |kernel: &mut Kernel<'_>| {
        let both = RefCell::new((Host::alike(TABLE, kernel), kernel));
        let mut runner = TestRunner::new(Config { failure_persistence: None, ..Config::with_cases(200) });
        let result = runner.run(&prop::collection::vec((family(), action()), 1..60), |actions| {
            let (host, kernel) = &mut *both.borrow_mut();
            // The kernel's clock does not wait for a test that is held up for a second; a real difference stays.
            let mut attempt = || compare(host, kernel, &actions);
            attempt().or_else(|_| attempt()).or_else(|_| attempt()).or_else(|_| attempt())
        });
        result.map_err(|error| error.to_string())
    };
    Kernel::with("agreement", TABLE, work).expect("a director in the kernel").expect("agreement");
}
