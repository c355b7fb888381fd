//! Runs the packet cases: on the host, and in the kernel, which needs root.

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, SocketAddr},
};

use lb_common::{
    proto::{Method, Scheduler},
    reason::Reason,
};
use lb_userspace::control::model::Transport;
use xdpvs_tests::{
    cases::{self, Case},
    cast,
    executor::{Counts, Driver, Executor, Host, Kernel, SMALL_TABLE, Verdict, Wire},
    family::Family,
    frames::Frame,
    world::{dest, scheduled},
};

/// Runs every case, and fails with all differences at once.
fn run_all(cases: &[Case], executor: &mut impl Executor) {
    let failures: Vec<String> = cases.iter().filter_map(|case| cases::run(case, executor).err()).collect();
    assert!(failures.is_empty(), "{} of {} cases:\n{}", failures.len(), cases.len(), failures.join("\n"));
    println!("{} cases hold {}", cases.len(), executor.name());
}

/// Reasons that no frame of the table can stop for.
const ELSEWHERE: &[Reason] = &[
    // Frames that are not whole have a test of their own.
    Reason::IpTruncated,
    Reason::IpVersion,
    Reason::IpHeaderLength,
    Reason::IpTotalLength,
    // The drivers of both executors can do everything: see below.
    Reason::MetadataUnsupported,
    Reason::HeadroomExhausted,
    // Routes with an encapsulation of their own, which not every kernel has.
    Reason::RouteUnsupported,
    // It takes several CPUs.
    Reason::ConfigurationChanged,
    Reason::FlowContended,
    // It takes a defect.
    Reason::Impossible,
];

#[test]
fn the_table_has_every_reason() {
    let cases = cases::all();
    let given: BTreeSet<&str> = cases.iter().flat_map(Case::reasons).collect();
    let missing = Reason::ALL.iter().filter(|reason| !given.contains(reason.as_str()) && !ELSEWHERE.contains(reason));
    assert_eq!(missing.collect::<Vec<_>>(), Vec::<&Reason>::new(), "reasons without a case");
    let covered: Vec<_> = ELSEWHERE.iter().filter(|reason| given.contains(reason.as_str())).collect();
    assert_eq!(covered, Vec::<&Reason>::new(), "reasons that have a case");
}

/// A driver that cannot carry a request to the host, and one that leaves no room before a frame.
#[test]
fn drivers_that_lack_something() {
    let macs = (cast::CLIENT_MAC, cast::DIRECTOR_OUTSIDE_MAC);
    let request = Frame::new(macs, (cast::CLIENT, 40_000), (cast::VIP, 80));
    let server = cast::special::UNRESOLVED;
    let driver = Driver { metadata: false, ..Driver::default() };
    let without_metadata = (driver, server, Method::Route, Reason::MetadataUnsupported);
    for (family, (driver, index, method, reason)) in Family::ALL.into_iter().flat_map(|family| {
        let driver = Driver { headroom: family.header() - 1, ..Driver::default() };
        [(family, without_metadata), (family, (driver, 0, Method::Tunnel, Reason::HeadroomExhausted))]
    }) {
        let key = family.service(Transport::Udp, 80);
        let mut host = Host::new(SMALL_TABLE);
        host.driver = driver;
        host.change(&|change| {
            change.add_service(key, scheduled(Scheduler::Rr)).expect("new");
            change.add_dest(key, family.at(index, 80), dest(method, 1)).expect("new");
        });
        let before = host.counts();
        let outcome = host.arrive(Wire::Outside, &Frame { family, ..request }.udp(b"hello"));
        let counts = host.counts().since(&before);
        assert_eq!((outcome.verdict, counts.reasons), (Verdict::Drop, Counts::of(reason).reasons));
    }
}

#[test]
fn every_case_holds_on_the_host() {
    run_all(&cases::all(), &mut Host::new(SMALL_TABLE));
}

#[test]
fn every_case_holds_in_the_kernel() {
    Kernel::with("cases", SMALL_TABLE, |kernel| run_all(&cases::all(), kernel)).expect("a director in the kernel");
}

/// What the kernel's routing table does not tell an XDP program, and what becomes of packets then.
#[test]
fn routes_that_the_kernel_does_not_tell_of() {
    const NOWHERE: Ipv4Addr = Ipv4Addr::new(172, 16, 0, 1);
    let work = |kernel: &mut Kernel<'_>, family: Family| {
        let key = family.service(Transport::Udp, 80);
        let macs = (cast::CLIENT_MAC, cast::DIRECTOR_OUTSIDE_MAC);
        let request = Frame { family, ..Frame::new(macs, (cast::CLIENT, 40_000), (cast::VIP, 80)) };
        kernel.reset();
        kernel.change(&|change| change.add_service(key, scheduled(Scheduler::Rr)).expect("new"));
        let send = |kernel: &mut Kernel<'_>, frame: &[u8]| {
            let before = kernel.counts();
            let outcome = kernel.arrive(Wire::Outside, frame);
            (outcome.verdict, kernel.counts().since(&before).reasons)
        };
        // No route at all looks like a route to the host itself. An unreachable route is told apart.
        let nowhere = SocketAddr::new(family.address(NOWHERE), 80);
        kernel.change(&|change| change.add_dest(key, nowhere, dest(Method::Route, 1)).expect("new"));
        assert_eq!(send(kernel, &request.udp(b"x")), (Verdict::Pass, Counts::of(Reason::LocalDelivery).reasons));
        let everything = if family == Family::Four { "0.0.0.0/0" } else { "::/0" };
        kernel.namespace().ip(&format!("route add unreachable {everything} metric 4294967295")).expect("a route");
        kernel.pass(2);
        assert_eq!(send(kernel, &request.udp(b"x")).1, Counts::of(Reason::NoRoute).reasons);
        kernel.namespace().ip(&format!("route del unreachable {everything} metric 4294967295")).expect("a route");
        // An MTU of a route counts only when it is locked, or, of IPv4, when forwarding is told to use it.
        kernel.change(&|change| {
            change.delete_dest(key, nowhere).expect("there");
            change.add_dest(key, family.at(0, 80), dest(Method::Route, 1)).expect("new");
        });
        let long = Frame { from: (cast::CLIENT, 40_001), ..request }.udp(&[0; 1400]);
        let server = family.address(cast::server(0));
        kernel.namespace().ip(&format!("route add {server} dev inside mtu 1400")).expect("a route");
        assert_eq!(send(kernel, &long), (Verdict::Redirect(None), Counts::none().reasons));
        if family == Family::Four {
            kernel.namespace().sysctl("net.ipv4.ip_forward_use_pmtu", "1").expect("a setting");
        } else {
            kernel.namespace().ip(&format!("route replace {server} dev inside mtu lock 1400")).expect("a route");
        }
        kernel.pass(2);
        assert_eq!(send(kernel, &long), (Verdict::Transmit, Counts::of(Reason::TooBig).reasons));
    };
    Kernel::with("routes", SMALL_TABLE, |kernel| Family::ALL.into_iter().for_each(|family| work(kernel, family)))
        .expect("a director in the kernel");
}
