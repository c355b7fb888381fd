//! A hundred thousand established connections with steady traffic, and a flood at full speed, all of it in the kernel: no
//! connection ends, and no packet of one goes anywhere but to its own real server.

use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};
use lb_common::{
    abi::bench::{HEAD, pick},
    addr::Ip4,
    event::Event,
    flow::{Entry as _, Key as _, Word, control},
    jiffies::Jiffies,
    proto::{Method, Scheduler},
    reason::Reason,
    tcp::State,
};
use lb_userspace::{
    control::{
        change::Change,
        model::{Netmask, Persistence, ServiceSpec, Transport},
    },
    datapath::sizes::Capacity,
};
use xdpvs_tests::{
    audit,
    bulk::{Bulk, Clients},
    cast,
    executor::{Executor as _, Kernel, Site, Verdict, Wire},
    frames::{ETHERNET, Frame},
    world::{at, dest, scheduled, service},
};

/// Real servers of each service.
const SERVERS: u8 = 6;

/// Connections of one service that are established: the port of the service, its forwarding method, whether it is persistent,
/// the first client's address, and how many there are.
struct Established {
    port: u16,
    method: Method,
    persistent: bool,
    first: Ipv4Addr,
    number: u32,
}

const ESTABLISHED: [Established; 4] = [
    Established::new(80, Method::Route, false, Ipv4Addr::new(10, 1, 0, 0), 20_000),
    Established::new(81, Method::Masq, false, Ipv4Addr::new(10, 1, 16, 0), 30_000),
    Established::new(82, Method::Tunnel, false, Ipv4Addr::new(10, 1, 32, 0), 30_000),
    Established::new(83, Method::Route, true, Ipv4Addr::new(10, 1, 48, 0), 20_000),
];
const ALL: u32 = 100_000;

/// What segments of established connections carry. Those of the flood carry less, so that counters of packets and bytes tell
/// how many there were of either.
const PAYLOAD: &[u8] = b"GET / HTTP/1.1\r\n";
/// What segments of the flood carry, and those that open connections: as little as fills the part of a frame that is restored.
const LITTLE: &[u8] = &[0; HEAD - ETHERNET - HEADERS];
/// Bytes of IP and TCP headers.
const HEADERS: usize = 40;

/// Where the flood comes from: eight million clients, none of them established.
const FLOOD: Clients =
    Clients { first: Ipv4Addr::new(11, 0, 0, 0), number: 1 << 23, order: pick::RANDOM, reply: false };

fn services(change: &mut Change<'_>) {
    for Established { port, method, persistent, .. } in ESTABLISHED {
        let key = service(Transport::Tcp, port);
        // So short that the templates of established connections are over before the flood is.
        let persistence = Persistence { timeout: 10, netmask: Netmask::V4(Ipv4Addr::BROADCAST) };
        let persistence = persistent.then_some(persistence);
        change.add_service(key, ServiceSpec { persistence, ..scheduled(Scheduler::Rr) }).expect("new");
        for index in 0..SERVERS {
            change.add_dest(key, at(index, port), dest(method, 1)).expect("new");
        }
    }
}

impl Established {
    const fn new(port: u16, method: Method, persistent: bool, first: Ipv4Addr, number: u32) -> Self {
        Self { port, method, persistent, first, number }
    }

    fn clients(&self) -> Clients {
        Clients { first: self.first, number: self.number.next_power_of_two(), order: pick::SEQUENTIAL, reply: false }
    }

    fn frame(&self, client: (Ipv4Addr, u16), flags: &'static str, payload: &[u8]) -> Vec<u8> {
        let macs = (cast::CLIENT_MAC, cast::DIRECTOR_OUTSIDE_MAC);
        Frame::new(macs, client, (cast::VIP, self.port)).tcp(flags, payload)
    }

    /// Lets every connection send such a segment.
    fn send(&self, bulk: &mut Bulk, flags: &'static str, payload: &[u8]) -> Result<()> {
        let frame = self.frame((self.first, 1024), flags, payload);
        bulk.set_up(&frame, self.clients());
        bulk.begin_with(0);
        let action = bulk.repeat(&frame, self.number)?.action;
        ensure!(action == XDP_REDIRECT, "the last segment was not forwarded: action {action}");
        Ok(())
    }
}

const XDP_ABORTED: u32 = 0;
const XDP_REDIRECT: u32 = 4;

/// A connection as the table has it.
#[derive(Clone, Copy)]
struct Stored {
    word: Word,
    dest: u32,
    port: u16,
    client: (Ipv4Addr, u16),
}

/// The established connections of the clients that are not of the flood, by client.
fn established(kernel: &Kernel<'_>) -> BTreeMap<(Ipv4Addr, u16), Stored> {
    let (now, hz) = (kernel.now(), kernel.maps().instance().hz);
    let entries = kernel.flows().iter().flat_map(|bucket| bucket.entries());
    let stored = entries.filter_map(|entry| {
        let word = Word(entry.word().load());
        let key = entry.key(word);
        let client = (Ipv4Addr::from(key.caddr().octets()), key.cport().number());
        let is_one = is_established(word, now, hz) && client.0 < FLOOD.first;
        is_one.then(|| (client, Stored { word, dest: entry.dest().load(), port: key.vport().number(), client }))
    });
    stored.collect()
}

fn is_established(word: Word, now: Jiffies, hz: u32) -> bool {
    word.is_live() && !word.is_template() && word.state() == State::Established as u8 && !word.expired(now, hz)
}

/// The templates of the clients that are not of the flood, by client: their words, their destinations, and how many connections
/// they control.
fn templates(kernel: &Kernel<'_>) -> BTreeMap<Ipv4Addr, (Word, u32, Option<u32>)> {
    let entries = kernel.flows().iter().flat_map(|bucket| bucket.entries());
    let templates = entries.filter_map(|entry| {
        let word = Word(entry.word().load());
        let client = Ipv4Addr::from(entry.key(word).caddr().octets());
        let controls = control::holders(entry.control().load());
        let is_one = word.is_live() && word.is_template() && client < FLOOD.first;
        is_one.then(|| (client, (word, entry.dest().load(), controls)))
    });
    templates.collect()
}

/// The real server with this number.
fn address(kernel: &Kernel<'_>, dest: u32) -> Ipv4Addr {
    Ip4::from_raw(kernel.maps().dests[dest as usize].addr[0].load()).octets().into()
}

/// What every destination has been sent: packets and bytes.
fn received(kernel: &Kernel<'_>) -> Vec<[u64; 2]> {
    let dests = 0..kernel.maps().instance().dests.min(ESTABLISHED.len() as u32 * u32::from(SERVERS));
    dests.map(|dest| kernel.traffic(dest)).map(|[_, packets, bytes, ..]| [packets, bytes]).collect()
}

/// Steady traffic until it is `over`, and at least twice. Returns how many segments each connection has sent.
fn steady(bulk: &mut Bulk, over: &AtomicBool) -> Result<u64> {
    let mut rounds = 0;
    while rounds < 2 || !over.load(Ordering::Relaxed) {
        ESTABLISHED.iter().try_for_each(|established| established.send(bulk, "A", PAYLOAD))?;
        rounds += 1;
    }
    Ok(rounds)
}

/// What the director has counted.
struct Counted {
    opened: u64,
    evicted: u64,
    stateless: u64,
    reasons: BTreeMap<&'static str, u64>,
}

impl Counted {
    fn of(kernel: &Kernel<'_>) -> Self {
        let dests = 0..ESTABLISHED.len() as u32 * u32::from(SERVERS);
        Self {
            opened: dests.map(|dest| kernel.traffic(dest)[0]).sum(),
            evicted: kernel.counter(Event::Evicted as u8),
            stateless: kernel.counter(Event::Stateless as u8),
            reasons: Reason::ALL.iter().map(|reason| (reason.as_str(), kernel.counter(*reason as u8))).collect(),
        }
    }

    /// What has been added since `before`; reasons only if there is anything.
    fn since(mut self, before: &Self) -> Self {
        self.opened -= before.opened;
        self.evicted -= before.evicted;
        self.stateless -= before.stateless;
        self.reasons.iter_mut().for_each(|(reason, count)| *count -= before.reasons[reason]);
        self.reasons.retain(|_, count| *count > 0);
        self
    }
}

/// Sets a flag when it is dropped, whatever for.
struct WhenDropped<'a>(&'a AtomicBool);

impl Drop for WhenDropped<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Establishes all connections, lets `flood` run beside steady traffic, and looks at every connection before and after.
fn withstand(
    role: &str,
    max_flows: u32,
    flood: impl Fn(&mut Bulk) -> Result<()> + Sync,
    verdict: impl Fn(&Counted) -> Result<()> + Sync,
) -> Result<()> {
    let capacity = Capacity { flows: max_flows, ..Capacity::default() };
    let site = Site::new(role, capacity.flow_buckets())?;
    let (before, remembered, counted, sent) = site.enter(|kernel| -> Result<_> {
        kernel.start_ageing()?;
        kernel.change(&services);
        let mut bulk = kernel.bulk(Wire::Outside)?;
        for flags in ["S", "A"] {
            ESTABLISHED.iter().try_for_each(|established| established.send(&mut bulk, flags, LITTLE))?;
        }
        Ok((established(kernel), templates(kernel), Counted::of(kernel), received(kernel)))
    })??;
    ensure!(before.len() == ALL as usize, "{} connections are established", before.len());
    let controlled: u32 = remembered.values().map(|(.., controls)| controls.unwrap_or(0)).sum();
    let persistent: u32 = ESTABLISHED.iter().filter(|service| service.persistent).map(|service| service.number).sum();
    ensure!(controlled == persistent, "templates control {controlled} connections of {persistent}");

    let (over, begun) = (AtomicBool::new(false), Instant::now());
    let rounds = thread::scope(|scope| -> Result<u64> {
        let traffic = scope
            .spawn(|| site.enter(|kernel| kernel.bulk(Wire::Outside).and_then(|mut bulk| steady(&mut bulk, &over))));
        let flooded = {
            let _over = WhenDropped(&over);
            site.enter(|kernel| kernel.bulk(Wire::Outside).and_then(|mut bulk| flood(&mut bulk)))
        };
        let rounds = traffic.join().expect("the traffic does not panic")??;
        flooded??;
        Ok(rounds)
    })?;
    let lasted = begun.elapsed();

    site.enter(|kernel| -> Result<()> {
        let counted = Counted::of(kernel).since(&counted);
        println!(
            "{role}: {lasted:?}, {rounds} segments of each of {ALL} connections; {} connections opened, {} evicted, \
             {} packets without one, {:?} not forwarded",
            counted.opened, counted.evicted, counted.stateless, counted.reasons
        );
        verdict(&counted)?;
        audit::check_instance(kernel.maps())?;

        // Each is the same as before: it has neither ended nor been opened again.
        let after = established(kernel);
        ensure!(after.len() == before.len(), "{} of {} are still established", after.len(), before.len());
        for (client, stored) in &before {
            let now = after.get(client).with_context(|| format!("{client:?} has no connection any more"))?;
            let same = now.word.same_life(stored.word) && (now.dest, now.port) == (stored.dest, stored.port);
            ensure!(same, "{client:?} has another connection");
        }

        // So are their templates, which control them still.
        let after = templates(kernel);
        ensure!(after.len() == remembered.len(), "{} of {} templates are left", after.len(), remembered.len());
        for (client, (word, dest, controls)) in &remembered {
            let now = after.get(client).with_context(|| format!("{client} has no template any more"))?;
            ensure!(now.0.same_life(*word) && (now.1, now.2) == (*dest, *controls), "{client} has another template");
        }

        // Each real server has got every segment of its own connections, and of no others.
        let mut own = vec![0; sent.len()];
        before.values().for_each(|stored| own[stored.dest as usize] += rounds);
        for (dest, (now, then)) in received(kernel).iter().zip(&sent).enumerate() {
            let [packets, bytes] = [now[0] - then[0], now[1] - then[1]];
            let more = bytes - (HEADERS + LITTLE.len()) as u64 * packets;
            let segments = more / (PAYLOAD.len() - LITTLE.len()) as u64;
            ensure!(segments == own[dest], "destination {dest} got {segments} segments instead of {}", own[dest]);
        }
        before.values().try_for_each(|stored| goes_home(kernel, stored))
    })?
}

/// Lets a connection send one more segment, and looks where that goes.
fn goes_home(kernel: &mut Kernel<'_>, stored: &Stored) -> Result<()> {
    let service = ESTABLISHED.iter().find(|service| service.port == stored.port).context("a service")?;
    let outcome = kernel.arrive(Wire::Outside, &service.frame(stored.client, "A", PAYLOAD));
    ensure!(Verdict::redirect(Wire::Inside).is_met_by(outcome.verdict), "{:?}: {outcome:?}", stored.client);
    let server = address(kernel, stored.dest);
    let index = (0..SERVERS).find(|index| cast::server(*index) == server).context("a real server")?;
    let to = &outcome.frame[ETHERNET + 16..ETHERNET + 20];
    let expected = if service.method == Method::Route { cast::VIP } else { server };
    ensure!(
        outcome.frame[..6] == cast::server_mac(index) && to == expected.octets(),
        "{:?} belongs to {server}: {outcome:02x?}",
        stored.client
    );
    Ok(())
}

/// Lets so many of the clients send such a segment, to one service.
fn pour(bulk: &mut Bulk, service: &Established, clients: Clients, flags: &'static str, packets: u32) -> Result<()> {
    let frame = service.frame((clients.first, 1024), flags, LITTLE);
    bulk.set_up(&frame, clients);
    // What becomes of them is seen by the counters.
    ensure!(bulk.repeat(&frame, packets)?.action != XDP_ABORTED, "the wrapper has failed");
    Ok(())
}

/// Ten million SYNs from random clients, into a table for 131,072 connections.
#[test]
fn a_flood_of_syns_ends_no_established_connection() -> Result<()> {
    const SYNS: u32 = 10_000_000;
    const BURST: u32 = 250_000;
    let flood = |bulk: &mut Bulk| {
        let bursts = (0..SYNS / BURST).zip(ESTABLISHED.iter().cycle());
        bursts.into_iter().try_for_each(|(_, service)| pour(bulk, service, FLOOD, "S", BURST))
    };
    let verdict = |counted: &Counted| {
        ensure!(counted.reasons.is_empty(), "packets were not forwarded: {:?}", counted.reasons);
        // Nearly every SYN opens one: clients that come again have had to make room by then.
        ensure!(counted.opened > u64::from(SYNS / 2), "{} connections opened", counted.opened);
        ensure!(counted.evicted > u64::from(SYNS / 2), "{} connections evicted", counted.evicted);
        Ok(())
    };
    withstand("flood-syn", 1 << 17, flood, verdict)
}

/// Clients that establish their connections: the table fills with those, and no connection can make room.
#[test]
fn a_flood_of_handshakes_ends_no_established_connection() -> Result<()> {
    const HANDSHAKES: u32 = 1_000_000;
    const BURST: u32 = 20_000;
    let flood = |bulk: &mut Bulk| {
        let bursts = (0..HANDSHAKES / BURST).zip(ESTABLISHED.iter().cycle());
        bursts.into_iter().try_for_each(|(burst, service)| {
            let clients = Clients { order: pick::SEQUENTIAL, ..FLOOD };
            ["S", "A"].into_iter().try_for_each(|flags| {
                bulk.begin_with(burst * BURST);
                pour(bulk, service, clients, flags, BURST)
            })
        })
    };
    let verdict = |counted: &Counted| {
        let of = |reason: Reason| counted.reasons.get(reason.as_str()).copied().unwrap_or_default();
        // All of the packets are accounted for: replies of masqueraded servers would have to be translated.
        ensure!(of(Reason::TableFull) > 0 && of(Reason::NoConnection) > 0, "{:?}", counted.reasons);
        ensure!(counted.reasons.len() == 2, "{:?}", counted.reasons);
        ensure!(counted.stateless > u64::from(HANDSHAKES / 2), "{} packets without one", counted.stateless);
        let all = counted.opened + counted.stateless / 2 + of(Reason::TableFull);
        ensure!(all.abs_diff(u64::from(HANDSHAKES)) < u64::from(BURST), "{all} handshakes");
        Ok(())
    };
    withstand("flood-ack", 1 << 17, flood, verdict)
}
