//! Templates and the connections that they control, over time.

use std::net::SocketAddr;

use lb_common::{
    abi::active_and_total,
    proto::{Method, Scheduler},
};
use lb_userspace::control::{
    connections::Connection,
    model::{Family, Netmask, Persistence, ServiceSpec, Transport},
    state::{State, dest_address},
};
use xdpvs_tests::{
    cast,
    executor::{Executor, Host, Kernel, Wire},
    frames::Frame,
    world::{at, dest, scheduled, service},
};

use crate::states::sections;

const PORT: u16 = 5043;
/// How far the times of the records may be off, in seconds: the kernel's timers are late, and its times are shown rounded down.
const LATE_S: i64 = 2;

/// What is listed after a remark: connections with their seconds, and destinations.
#[derive(Debug, Default)]
struct Listed {
    connections: Vec<(String, i64)>,
    dests: Vec<String>,
}

/// The remarks of the section, and what is listed after each.
fn remarks() -> Vec<(&'static str, Listed)> {
    let section =
        sections().into_iter().find(|section| section.heading.starts_with("persistence -p 5")).expect("there");
    let mut remarks: Vec<(&str, Listed)> = Vec::new();
    for line in section.lines {
        if let Some(remark) = line.strip_prefix("  -- ") {
            remarks.push((remark, Listed::default()));
            continue;
        }
        let listed = &mut remarks.last_mut().expect("a remark comes first").1;
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["TCP", time, state, client, service, server] => {
                let (minutes, seconds) = time.split_once(':').expect("minutes and seconds");
                let number = |word: &str| word.parse::<i64>().expect("a number");
                let seconds = 60 * number(minutes) + number(seconds);
                listed.connections.push((format!("{state} {client} {service} {server}"), seconds));
            }
            ["->", _, "1", ..] => listed.dests.push(words[1..].join(" ")),
            _ => {}
        }
    }
    remarks.iter_mut().for_each(|(_, listed)| listed.connections.sort());
    remarks
}

fn list(executor: &impl Executor) -> Listed {
    let shared = executor.shared();
    let connection = |Connection { client, service, destination, state, expires, .. }| {
        (format!("{state} {client} {service} {destination}"), expires as i64 / 1000)
    };
    let mut connections: Vec<_> = executor.reader().connections().map(connection).collect();
    connections.sort();
    let mut dests: Vec<String> = State::load(&shared)
        .dests
        .iter()
        .map(|(number, record)| {
            let load = &shared.dest_loads[*number as usize];
            let (active, total) = active_and_total(load.connections.load());
            let (address, templates) = (dest_address(record), load.templates.load());
            format!("{address} {} {templates} {active} {}", record.weight, total - active)
        })
        .collect();
    dests.sort();
    Listed { connections, dests }
}

/// Replays the section; the ageing timer runs every `step_s` seconds.
fn replay(executor: &mut impl Executor, step_s: u32) {
    executor.reset();
    let key = service(Transport::Tcp, PORT);
    executor.change(&|change| {
        let persistence = Persistence { timeout: 5, netmask: Netmask::whole(Family::Ipv4) };
        let spec = ServiceSpec { persistence: Some(persistence), ..scheduled(Scheduler::Rr) };
        change.add_service(key, spec).expect("new");
        (0..3).for_each(|index| change.add_dest(key, at(index, PORT), dest(Method::Masq, 1)).expect("new"));
    });
    let send = |executor: &mut _, client: &str, flags: &'static str| {
        let SocketAddr::V4(client) = client.parse().expect("an address and port") else { panic!("IPv4") };
        let macs = (cast::CLIENT_MAC, cast::DIRECTOR_OUTSIDE_MAC);
        let frame = Frame::new(macs, (*client.ip(), client.port()), (cast::VIP, PORT)).tcp(flags, b"");
        assert_ne!(
            Executor::arrive(executor, Wire::Outside, &frame).frame,
            frame,
            "{client}: {flags} was not forwarded"
        );
    };
    let remarks = remarks();
    assert_eq!(remarks.len(), 6, "remarks of the section");
    for (remark, expected) in remarks {
        let (later, what) = remark.split_once(" s later").unwrap_or(("0", remark));
        for _ in 0..later.parse::<u32>().expect("seconds") / step_s {
            executor.pass(step_s);
            executor.age();
        }
        match what {
            "three SYNs, two of them from 10.1.0.7" => {
                ["10.1.0.7:100", "10.1.0.8:100", "10.1.0.7:101"].into_iter().for_each(|from| send(executor, from, "S"));
            }
            " an ACK of the second connection" => send(executor, "10.1.0.7:101", "A"),
            "a new SYN from 10.1.0.7" => send(executor, "10.1.0.7:103", "S"),
            "" | ": does the template outlive its 5 s while connections hold it?" => {}
            other => panic!("nobody knows how to replay `{other}`"),
        }
        let found = list(executor);
        let names = |listed: &Listed| listed.connections.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
        assert_eq!((names(&found), &found.dests), (names(&expected), &expected.dests), "after `{remark}`");
        for ((name, found), (_, expected)) in found.connections.iter().zip(&expected.connections) {
            assert!((found - expected).abs() <= LATE_S, "{name} after `{remark}`: {found} s, expected {expected}");
        }
        executor.audit().expect("exact counters");
    }
}

/// Buckets of the flow tables.
const TABLE: u32 = 64;

#[test]
fn templates_live_as_long_as_those_of_ip_vs_on_the_host() {
    replay(&mut Host::new(TABLE), 1);
}

#[test]
fn templates_live_as_long_as_those_of_ip_vs_in_the_kernel() {
    Kernel::with("persistence", TABLE, |kernel| replay(kernel, 4)).expect("a director in the kernel");
}
