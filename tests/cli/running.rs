//! What happens to a director that runs: connections, counters, several commands at once, new programs.

use std::{
    collections::BTreeSet,
    fs,
    net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use aya::{
    maps::{MapData, MapInfo},
    programs::{ProgramInfo, loaded_programs},
};
use lb_common::{abi::Stage as Stages, event::Event, reason::Reason};
use lb_userspace::datapath::object::map;
use serde_json::{Value, json};
use xdpvs_tests::cast;

use crate::stage::{Said, Stage, WIRE};

/// The client's address.
pub(crate) const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);

fn udp_service() -> SocketAddr {
    (cast::VIP, 53).into()
}

/// Configures a UDP and a TCP service with two destinations each.
pub(crate) fn configure(stage: &Stage) -> Result<()> {
    for service in ["-u 10.9.9.9:53", "-t 10.9.9.9:80"] {
        stage.ok(&format!("service add {service} -s rr"))?;
        for server in ["10.2.0.11", "10.2.0.12"] {
            stage.ok(&format!("dest add {service} -r {server}"))?;
        }
    }
    Ok(())
}

/// Opens `count` UDP connections and as many TCP connections, which nobody accepts.
pub(crate) fn connect(stage: &Stage, count: u16) -> Result<()> {
    stage.client.enter(|| -> Result<()> {
        for port in 20_000..20_000 + count {
            UdpSocket::bind((CLIENT, port))?.send_to(b"question", udp_service())?;
            // Nobody answers: the SYN is all there is to it.
            let _ = TcpStream::connect_timeout(&(cast::VIP, 80).into(), Duration::from_millis(5));
        }
        Ok(())
    })?
}

/// The connections without the time they have left.
fn connections(stage: &Stage) -> Result<BTreeSet<String>> {
    let mut list = stage.ask("conn list")?;
    let connections = list["connections"].as_array_mut().context("a list")?;
    for connection in connections.iter_mut() {
        let left = connection["expires_ms"].take().as_u64().context("a time")?;
        ensure!(left > 0 && left <= 300_000, "{left} ms left of {connection}");
    }
    Ok(connections.iter().map(Value::to_string).collect())
}

/// Waits until `connections` answers a set of this size: packets are on their way for a moment.
pub(crate) fn settled(stage: &Stage, size: usize) -> Result<BTreeSet<String>> {
    for _ in 0..100 {
        let found = connections(stage)?;
        if found.len() == size {
            return Ok(found);
        }
        thread::sleep(Duration::from_millis(20));
    }
    connections(stage)
}

#[test]
fn connections_are_listed_counted_and_ended() -> Result<()> {
    let stage = Stage::with_director()?;
    configure(&stage)?;
    connect(&stage, 6)?;
    let found = settled(&stage, 12)?;
    assert_eq!(found.len(), 12);
    let first = json!({
        "protocol": "udp", "client": "10.0.0.2:20000", "service": "10.9.9.9:53", "destination": "10.2.0.12:53",
        "state": "UDP", "expires_ms": null, "method": "dr",
    });
    // The newest destination is the first in turn.
    assert!(found.contains(&first.to_string()), "{found:?}");
    assert!(found.iter().filter(|connection| connection.contains("\"SYN_RECV\"")).count() == 6, "{found:?}");

    let list = stage.ask("list")?;
    for (service, [active, inactive]) in [(0, [3, 0]), (1, [0, 3])] {
        for dest in list["services"][service]["destinations"].as_array().context("destinations")? {
            assert_eq!((&dest["active"], &dest["inactive"]), (&json!(active), &json!(inactive)), "{list}");
        }
    }
    let stats = stage.ask("stats")?;
    let udp = &stats["services"][1];
    assert_eq!((&udp["protocol"], &udp["address"]), (&json!("udp"), &json!("10.9.9.9:53")));
    assert_eq!((&udp["connections"], &udp["packets_in"], &udp["packets_out"]), (&json!(6), &json!(6), &json!(0)));
    // IP and UDP headers and eight bytes.
    assert_eq!(udp["bytes_in"], json!(6 * (20 + 8 + 8)));
    assert_eq!(udp["destinations"][0]["connections"], json!(3));
    assert_eq!(stats["total"]["connections"], json!(12));
    for reason in Reason::ALL {
        assert!(stats["reasons"][reason.as_str()].is_u64(), "{} in {stats}", reason.as_str());
    }
    for event in Event::ALL {
        assert_eq!(stats["events"][event.as_str()], json!(0), "{} in {stats}", event.as_str());
    }
    let text = stage.ok("stats")?;
    assert!(text.contains("udp 10.9.9.9:53"), "{text}");

    let lines = stage.ok("conn list")?;
    assert_eq!(lines.lines().count(), 13, "{lines}");
    let lines = stage.ok("ipvsadm -Lnc")?;
    assert_eq!(lines.lines().filter(|line| line.starts_with("UDP 04:")).count(), 6, "{lines}");
    assert_eq!(lines.lines().filter(|line| line.starts_with("TCP 00:")).count(), 6, "{lines}");
    let stats = stage.ok("ipvsadm -Ln --stats -u 10.9.9.9:53")?;
    let service = stats.lines().find(|line| line.starts_with("UDP")).context("the service")?;
    assert_eq!(service, "UDP  10.9.9.9:53                         6        6        0      216        0");

    assert_eq!(stage.ask("status")?["flows"], json!(12));
    assert_eq!(stage.ok("conn flush")?, "12 connections ended\n");
    assert!(connections(&stage)?.is_empty());
    assert_eq!(stage.ask("status")?["flows"], json!(0));
    Ok(())
}

#[test]
fn connections_are_listed_and_ended_by_what_is_true_of_them() -> Result<()> {
    let stage = Stage::with_director()?;
    configure(&stage)?;
    connect(&stage, 6)?;
    assert_eq!(settled(&stage, 12)?.len(), 12);
    for (options, count) in [
        ("", 12),
        ("--service udp:10.9.9.9:53", 6),
        ("-t 10.9.9.9:80", 6),
        ("-u 10.9.9.9:80", 0),
        ("--dest 10.2.0.12", 6),
        ("--dest 10.2.0.12:80", 3),
        ("--udp-service 10.9.9.9:53 --dest 10.2.0.12", 3),
        ("--client 10.0.0.99/24", 12),
        ("--client 10.0.0.2", 12),
        ("--client 10.0.0.3", 0),
        ("--client 10.0.0.2 --state syn_recv", 6),
        ("--state UDP --dest 10.2.0.11:53", 3),
        ("--state ESTABLISHED", 0),
    ] {
        assert_eq!(stage.ok(&format!("conn list --count {options}"))?, format!("{count}\n"), "{options}");
        assert_eq!(stage.ask(&format!("conn list --count {options}"))?, json!({"count": count}), "{options}");
        let listed = stage.ask(&format!("conn list {options}"))?;
        assert_eq!(listed["connections"].as_array().map(Vec::len), Some(count), "{options}");
        assert_eq!(stage.ok(&format!("conn list {options}"))?.lines().count(), 1 + count, "{options}");
    }
    let found = stage.ask("conn list --dest 10.2.0.12:80")?;
    assert!(found["connections"].as_array().context("a list")?.iter().all(|one| one["destination"] == "10.2.0.12:80"));
    assert_eq!(stage.ok("conn flush --dest 10.2.0.12:80")?, "3 connections ended\n");
    assert_eq!(stage.ok("conn flush -u 10.9.9.9:53 --dest 10.2.0.11")?, "3 connections ended\n");
    assert_eq!(stage.ok("conn flush --service udp:10.9.9.9:53")?, "3 connections ended\n");
    assert_eq!(stage.ok("conn list --count -t 10.9.9.9:80 --dest 10.2.0.11")?, "3\n");
    assert_eq!(stage.ok("conn list --count")?, "3\n");
    Ok(())
}

#[test]
fn up_on_a_running_director_loses_no_connection_and_no_packet() -> Result<()> {
    let stage = Stage::with_director()?;
    stage.director.ip("link add spare type veth peer name other")?;
    configure(&stage)?;
    connect(&stage, 50)?;
    let before = settled(&stage, 100)?;
    assert_eq!(before.len(), 100);
    let counted = stage.ask("stats")?["services"][1]["packets_in"].as_u64().context("a count")?;

    let over = AtomicBool::new(false);
    let sent = thread::scope(|scope| -> Result<u64> {
        let sender = scope.spawn(|| {
            stage.client.enter(|| -> Result<u64> {
                let socket = UdpSocket::bind((CLIENT, 20_000))?;
                let mut sent = 0;
                while !over.load(Ordering::Relaxed) && sent < 100_000 {
                    socket.send_to(b"more", udp_service())?;
                    sent += 1;
                    thread::sleep(Duration::from_micros(200));
                }
                Ok(sent)
            })
        });
        let renewed = (0..2).try_for_each(|_| {
            stage.ok(&format!("up {WIRE}"))?;
            // Interfaces that are not named get the new programs too.
            stage.ok("up spare").map(drop)
        });
        over.store(true, Ordering::Relaxed);
        let sent = sender.join().expect("the sender does not panic")??;
        renewed.map(|()| sent)
    })?;
    assert_eq!(settled(&stage, 100)?, before);
    let mut arrived = 0;
    for _ in 0..100 {
        arrived = stage.ask("stats")?["services"][1]["packets_in"].as_u64().context("a count")? - counted;
        if arrived == sent {
            break;
        }
        thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(arrived, sent);
    assert!(sent > 100, "only {sent} packets were sent meanwhile");
    let modes = json!([{"interface": "spare", "mode": "native"}, {"interface": WIRE, "mode": "native"}]);
    assert_eq!(stage.ask("status")?["attachments"], modes);
    assert_eq!(fs::read_dir(stage.place().generations())?.count(), 1, "old programs are gone");
    // The timer goes on under the new programs.
    let sweeps = || -> Result<u64> { stage.ask("status")?["ageing"]["sweeps"].as_u64().context("a count") };
    let first = sweeps()?;
    for _ in 0..100 {
        if sweeps()? > first {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(50));
    }
    panic!("ageing has stopped");
}

/// The maps of an instance and the programs that use them, by their ids, as far as the kernel has them.
struct Loaded {
    maps: BTreeSet<u32>,
    programs: BTreeSet<u32>,
}

impl Loaded {
    /// Those of the instance of a stage.
    fn of(stage: &Stage) -> Result<Self> {
        let (mut maps, mut programs) = (BTreeSet::new(), BTreeSet::new());
        for pin in fs::read_dir(stage.place().directory().join("maps"))?.chain(fs::read_dir(stage.place().programs()?)?)
        {
            // Names of programs are in lower case.
            let path = pin?.path();
            let is_map = path.file_name().is_some_and(|name| name.as_encoded_bytes()[0].is_ascii_uppercase());
            if is_map {
                maps.insert(MapInfo::from_pin(path)?.id());
            } else {
                programs.insert(ProgramInfo::from_pin(path)?.id());
            }
        }
        // Those of stages have no pins of their own.
        for program in loaded_programs().flatten() {
            let used = program.map_ids()?.unwrap_or_default();
            if used.iter().any(|id| maps.contains(id)) {
                programs.insert(program.id());
            }
        }
        Ok(Self { maps, programs })
    }

    /// Whether the kernel has none of them any longer.
    ///
    /// The maps are looked for when the programs are gone: opening the map of stages while the kernel empties it, after its
    /// last pin has gone, makes kernels up to this day forget to free it.
    fn are_gone(&self) -> bool {
        !loaded_programs().flatten().any(|program| self.programs.contains(&program.id()))
            && !self.maps.iter().any(|map| MapData::from_id(*map).is_ok())
    }
}

#[test]
fn ageing_goes_on_until_the_director_is_ended_and_no_longer() -> Result<()> {
    let stage = Stage::with_director()?;
    let ageing = || -> Result<Value> { Ok(stage.ask("status")?["ageing"].take()) };
    let number = |ageing: &Value, name: &str| ageing[name].as_u64().with_context(|| format!("{name} of {ageing}"));
    // No process of ours runs now but the one that asks.
    let goes_on = || -> Result<Value> {
        let before = number(&ageing()?, "sweeps")?;
        for _ in 0..400 {
            let now = ageing()?;
            if number(&now, "sweeps")? >= before + 2 {
                return Ok(now);
            }
            thread::sleep(Duration::from_millis(25));
        }
        anyhow::bail!("ageing has stopped: {}", ageing()?)
    };
    let found = goes_on()?;
    assert_eq!(number(&found, "sweep_ms")?, 1000);
    // The first tick of a sweep is part of it, what is before it is not.
    ensure!(number(&found, "last_sweep_ms")? >= 900 && found["last_sweep_ago_ms"].is_u64(), "{found}");

    stage.ok(&format!("up {WIRE} --sweep-ms 200"))?;
    let found = goes_on()?;
    assert_eq!(number(&found, "sweep_ms")?, 200);
    ensure!((150..900).contains(&number(&found, "last_sweep_ms")?), "{found}");
    let said = stage.ok("status")?;
    assert!(said.contains("a sweep every 200 ms, ") && said.contains(" ms ago; 0 connections ended\n"), "{said}");
    // New programs keep the pace, and the old ones are gone with their timer.
    let old = Loaded::of(&stage)?;
    stage.ok(&format!("up {WIRE}"))?;
    assert_eq!(number(&goes_on()?, "sweep_ms")?, 200);
    let loaded = Loaded::of(&stage)?;
    ensure!(loaded.programs.len() == 3 + Stages::programs().count() && loaded.maps.len() == 1 + map::ALL.len());
    ensure!(loaded.maps.intersection(&old.maps).count() == map::ALL.len(), "another flow table");

    stage.ok("down")?;
    for _ in 0..200 {
        // The kernel takes its time.
        if old.are_gone() && loaded.are_gone() {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(25));
    }
    panic!("maps or programs are left");
}

#[test]
fn tables_of_any_size_are_made_and_swept() -> Result<()> {
    let stage = Stage::new()?;
    for (flows, sweep_ms) in [("1000", 1000), ("16777216", 3420)] {
        stage.ok(&format!("up {WIRE} --max-flows {flows} --max-flows6 1000 --max-services 16 --max-dests 64"))?;
        let status = stage.ask("status")?;
        assert_eq!((status["max_flows"].to_string(), &status["ageing"]["sweep_ms"]), (flows.into(), &json!(sweep_ms)));
        configure(&stage)?;
        connect(&stage, 6)?;
        let found = settled(&stage, 12)?;
        assert_eq!(found.len(), 12);
        // What the table is too large for is refused, and changes nothing.
        if flows != "1000" {
            let said = stage.say(&format!("up {WIRE} --sweep-ms 3419"))?;
            let line = "xdpvs: --sweep-ms 3419: tables for 16778216 connections take 3420 ms at the least\n";
            assert_eq!((said.err.as_str(), said.code), (line, Some(1)));
        }
        assert_eq!(settled(&stage, 12)?, found);
        assert_eq!(stage.ok("conn flush")?, "12 connections ended\n");
        stage.ok("down")?;
    }
    let said = stage.say(&format!("up {WIRE} --max-flows 16777216 --max-flows6 16777216 --sweep-ms 1000"))?;
    let line = "xdpvs: --sweep-ms 1000: tables for 33554432 connections take 6830 ms at the least\n";
    assert_eq!((said.err.as_str(), said.code), (line, Some(1)));
    assert!(!stage.place().exists() && stage.is_bare()?);
    Ok(())
}

#[test]
fn a_renewal_that_fails_changes_nothing() -> Result<()> {
    let stage = Stage::with_director()?;
    let before = (stage.ask("list")?, fs::read_dir(stage.place().generations())?.count());
    let said = stage.say("up lo --mode native")?;
    assert_eq!(said.code, Some(1));
    assert_eq!(
        said.err,
        "xdpvs: the driver of lo does not run XDP programs (`bpf_link_create` failed: Operation not supported (os error \
         95)): use `--mode generic`, which is slower\n"
    );
    assert_eq!((stage.ask("list")?, fs::read_dir(stage.place().generations())?.count()), before);
    let said = stage.say(&format!("up {WIRE} --mode generic"))?;
    assert_eq!(
        said.err,
        format!(
            "xdpvs: {WIRE} runs in native mode already: `xdpvs down` first to change that, which ends all connections\n"
        )
    );
    assert_eq!((stage.ask("list")?, fs::read_dir(stage.place().generations())?.count()), before);
    Ok(())
}

#[test]
fn generic_mode_is_announced_and_forwarding_is_put_back() -> Result<()> {
    let stage = Stage::new()?;
    let forwarding = || stage.director.exec("cat /proc/sys/net/ipv4/conf/lo/forwarding");
    assert_eq!(forwarding()?, "0\n");
    let said = stage.say(&format!("up {WIRE} lo --mode native --max-flows 1000"))?;
    assert_eq!(said.code, Some(1));
    assert!(!stage.place().exists(), "an instance that could not be attached is undone");
    assert_eq!(forwarding()?, "0\n");
    assert!(stage.is_bare()?);

    let said = stage.say(&format!("up {WIRE} lo --max-flows 1000"))?;
    let line = "xdpvs: lo: the driver does not run XDP programs (`bpf_link_create` failed: Operation not supported (os \
                error 95)); using generic mode, which is much slower\n";
    assert_eq!(said, Said { out: String::new(), err: line.into(), code: Some(0) });
    let modes = json!([{"interface": "lo", "mode": "generic"}, {"interface": WIRE, "mode": "native"}]);
    assert_eq!(stage.ask("list")?["mode"], modes);
    assert_eq!(forwarding()?, "1\n");
    stage.ok("down")?;
    assert_eq!(forwarding()?, "0\n");
    assert!(!stage.place().directory().exists() && !stage.place().nursery().exists());
    assert!(stage.is_bare()?);
    Ok(())
}

#[test]
fn an_interface_that_was_made_anew_is_taken_back() -> Result<()> {
    let stage = Stage::with_director()?;
    stage.director.ip("link add spare type veth peer name other")?;
    stage.ok("up spare")?;
    stage.director.ip("link del spare")?;
    let modes = |spare| json!([{"interface": "spare", "mode": spare}, {"interface": WIRE, "mode": "native"}]);
    assert_eq!(stage.ask("list")?["mode"], modes(Value::Null));
    stage.director.ip("link add spare type veth peer name other")?;
    assert_eq!(stage.ask("list")?["mode"], modes(Value::Null));
    stage.ok(&format!("up {WIRE}"))?;
    assert_eq!(stage.ask("list")?["mode"], modes(json!("native")));
    stage.director.ip("link del spare")?;
    let said = stage.say(&format!("up {WIRE}"))?;
    assert_eq!(said.err, "xdpvs: spare: gone, or taken by another XDP program; left out\n");
    assert_eq!(stage.ask("list")?["mode"], json!([{"interface": WIRE, "mode": "native"}]));
    Ok(())
}

#[test]
fn commands_at_once_are_carried_out_one_after_the_other() -> Result<()> {
    let stage = Stage::with_director()?;
    stage.ok("service add -t 10.9.9.9:80")?;
    thread::scope(|scope| {
        let add = |number: u32| stage.ok(&format!("dest add -t 10.9.9.9:80 -r 10.2.0.{number} -w {number}")).map(drop);
        let adding: Vec<_> = (1..=8).map(|number| scope.spawn(move || add(number))).collect();
        adding.into_iter().try_for_each(|thread| thread.join().expect("no panic"))
    })?;
    let list = stage.ask("list")?;
    let dests = list["services"][0]["destinations"].as_array().context("destinations")?;
    let found: BTreeSet<(String, u64)> = dests
        .iter()
        .filter_map(|dest| Some((dest["address"].as_str()?.to_owned(), dest["weight"].as_u64()?)))
        .collect();
    assert_eq!(found, (1..=8).map(|number| (format!("10.2.0.{number}:80"), number)).collect());
    Ok(())
}
