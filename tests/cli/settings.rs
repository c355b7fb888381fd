//! ip_vs's own settings: what is said about them, and what the timer makes of them.

use std::{net::UdpSocket, thread, time::Duration};

use anyhow::Result;
use serde_json::{Value, json};
use xdpvs_tests::cast;

use crate::{
    running::{CLIENT, configure, connect, settled},
    stage::{Said, Stage, WIRE},
};

/// What every setting is in a new instance.
fn defaults() -> Value {
    json!({
        "am_droprate": 10, "amemthresh": 1024, "backup_only": 0, "cache_bypass": 0, "conn_reuse_mode": 1, "conntrack": 0,
        "drop_entry": 0, "drop_packet": 0, "est_cpulist": "", "est_nice": 0, "expire_nodest_conn": 0,
        "expire_quiescent_template": 0, "ignore_tunneled": 1, "lblc_expiration": 86_400, "lblcr_expiration": 86_400,
        "nat_icmp_send": 0, "pmtu_disc": 1, "run_estimation": 1,
        "schedule_icmp": 0, "secure_tcp": 0, "sloppy_sctp": 0, "sloppy_tcp": 0, "snat_reroute": 1,
        "sync_persist_mode": 0, "sync_ports": 1, "sync_qlen_max": 0, "sync_refresh_period": 0, "sync_retries": 0,
        "sync_sock_size": 0, "sync_threshold": "3 50", "sync_version": 1,
    })
}

#[test]
fn settings_are_shown_set_and_kept_by_new_programs() -> Result<()> {
    let stage = Stage::with_director()?;
    assert_eq!(stage.ask("set")?, json!({"settings": defaults()}));
    for (name, value) in [
        ("am_droprate", 7),
        ("amemthresh", 0),
        ("cache_bypass", 1),
        ("conn_reuse_mode", 2),
        ("drop_entry", 3),
        ("drop_packet", 3),
        ("expire_nodest_conn", 1),
        ("lblc_expiration", 360),
        ("lblcr_expiration", 0),
        ("nat_icmp_send", 1),
        ("run_estimation", 0),
        ("schedule_icmp", 1),
        ("secure_tcp", 3),
        ("sloppy_sctp", 1),
        ("sloppy_tcp", 1),
        ("snat_reroute", 0),
    ] {
        assert_eq!(stage.ok(&format!("set {name} {value}"))?, "", "{name}");
        assert_eq!(stage.ask(&format!("set {name}"))?, json!({"settings": {name: value}}));
        assert_eq!(stage.ok(&format!("set {name}"))?, format!("{name}  {value}\n"));
    }
    let set = stage.ask("set")?;
    assert_eq!(set["settings"].as_object().map(|settings| settings.len()), defaults().as_object().map(|all| all.len()));
    stage.ok(&format!("up {WIRE}"))?;
    assert_eq!(stage.ask("set")?, set);
    // What cannot be changed can be set to what it is.
    assert_eq!(stage.ok("set conntrack 0")?, "");
    let text = stage.ok("set")?;
    let fixed =
        "conntrack                  0     fixed: XDP comes before netfilter, so packets have no conntrack entries";
    assert!(text.lines().any(|line| line == fixed), "{text}");
    Ok(())
}

#[test]
fn settings_that_cannot_be_are_refused_and_change_nothing() -> Result<()> {
    let stage = Stage::with_director()?;
    for (words, line) in [
        ("sloppy_tpc 1", "no setting `sloppy_tpc`: see `xdpvs set`"),
        ("sloppy_tcp 2", "setting sloppy_tcp: `2` is none of its values, use 0 or 1"),
        ("sloppy_tcp -1", "setting sloppy_tcp: `-1` is none of its values, use 0 or 1"),
        ("drop_entry 4", "setting drop_entry: `4` is none of its values, use 0 to 3"),
        ("drop_packet 4", "setting drop_packet: `4` is none of its values, use 0 to 3"),
        ("am_droprate many", "setting am_droprate: `many` is none of its values, use 0 to 2147483647"),
        ("amemthresh 2147483648", "setting amemthresh: `2147483648` is none of its values, use 0 to 2147483647"),
        ("cache_bypass 2", "setting cache_bypass: `2` is none of its values, use 0 or 1"),
        (
            "conntrack 1",
            "setting conntrack is `0` and cannot be changed: XDP comes before netfilter, so packets have no conntrack \
             entries",
        ),
        ("sync_version 0", "setting sync_version is `1` and cannot be changed: connections are not synchronised"),
    ] {
        let expected = Said { out: String::new(), err: format!("xdpvs: {line}\n"), code: Some(1) };
        assert_eq!(stage.say(&format!("set {words}"))?, expected, "{words}");
    }
    // As many ticks as ip_vs can count are fewer seconds, how many depends on the kernel's clock.
    let said = stage.say("set lblc_expiration 2147483647")?;
    let line = "xdpvs: setting lblc_expiration: `2147483647` is none of its values, use 0 to ";
    assert!(said.code == Some(1) && said.out.is_empty() && said.err.starts_with(line), "{said:?}");
    assert_eq!(stage.ask("set")?, json!({"settings": defaults()}));
    Ok(())
}

/// Waits until a setting is this, which takes the timer a pass or two.
fn becomes(stage: &Stage, name: &str, value: u32) -> Result<()> {
    let wanted = json!({"settings": {name: value}});
    for _ in 0..100 {
        if stage.ask(&format!("set {name}"))? == wanted {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(100));
    }
    anyhow::bail!("{name} is not {value}: {}", stage.ask("set")?)
}

#[test]
fn the_timer_rouses_the_defences_when_memory_is_low_and_lets_them_rest() -> Result<()> {
    let stage = Stage::new()?;
    // Fifteen pages of 128 connections.
    stage.ok(&format!("up {WIRE} --max-flows 1000 --max-flows6 1000"))?;
    configure(&stage)?;
    for setting in ["amemthresh 15", "drop_packet 1", "secure_tcp 3"] {
        stage.ok(&format!("set {setting}"))?;
    }
    assert_eq!(stage.ask("set")?["settings"]["drop_packet"], json!(1));
    connect(&stage, 70)?;
    settled(&stage, 140)?;
    becomes(&stage, "drop_packet", 2)?;
    // Of fifteen pages one is missing: every fifteenth packet that would open a connection is dropped.
    assert_eq!(stage.ask("stats")?["reasons"]["drop-packet"], json!(0));
    connect(&stage, 130)?;
    assert!(stage.ask("stats")?["reasons"]["drop-packet"].as_u64().is_some_and(|dropped| dropped > 0));
    stage.ok("conn flush")?;
    becomes(&stage, "drop_packet", 1)?;
    assert_eq!(stage.ask("set")?["settings"]["secure_tcp"], json!(3));
    Ok(())
}

#[test]
fn the_timer_thins_out_half_open_connections() -> Result<()> {
    let stage = Stage::new()?;
    stage.ok(&format!("up {WIRE} --max-flows 1000 --max-flows6 1000"))?;
    configure(&stage)?;
    connect(&stage, 200)?;
    settled(&stage, 400)?;
    let half_open = || -> Result<usize> { Ok(stage.ok("conn list --state SYN_RECV --count")?.trim().parse()?) };
    let thinned = || -> Result<Option<u64>> { Ok(stage.ask("stats")?["events"]["thinned"].as_u64()) };
    assert_eq!((half_open()?, thinned()?), (200, Some(0)));
    stage.ok("set drop_entry 3")?;
    for _ in 0..300 {
        if half_open()? < 150 {
            break;
        }
        thread::sleep(Duration::from_millis(100));
    }
    stage.ok("set drop_entry 0")?;
    // A tick may be under way.
    thread::sleep(Duration::from_millis(100));
    let left = half_open()?;
    // Half of it is gone in twenty seconds: a bucket of 32 each second. Other connections are not old enough.
    assert!(left < 150, "{left} are left");
    assert_eq!((thinned()?, stage.ok("conn list --count")?), (Some(200 - left as u64), format!("{}\n", 200 + left)));
    Ok(())
}

#[test]
fn connections_of_removed_servers_end_if_that_is_wanted() -> Result<()> {
    let stage = Stage::with_director()?;
    configure(&stage)?;
    connect(&stage, 6)?;
    settled(&stage, 12)?;
    stage.ok("dest del -t 10.9.9.9:80 -r 10.2.0.11")?;
    assert_eq!(stage.ok("conn list --count")?, "12\n");
    stage.ok("set expire_nodest_conn 1")?;
    assert_eq!(stage.ok("conn list --count")?, "12\n");
    stage.ok("dest del -t 10.9.9.9:80 -r 10.2.0.12")?;
    assert_eq!(stage.ok("conn list --count")?, "6\n");
    assert_eq!(stage.ok("conn list --count -t 10.9.9.9:80")?, "0\n");
    stage.ok("ipvsadm -D -u 10.9.9.9:53")?;
    assert_eq!(stage.ok("conn list --count")?, "0\n");
    Ok(())
}

/// The counters that `stats` shows of a service, a destination of it, or of all.
fn connections(stats: &Value, pointer: &str) -> Option<u64> {
    stats.pointer(pointer).and_then(|amounts| amounts["connections"].as_u64())
}

#[test]
fn counters_are_zeroed_as_far_as_lists_show_them() -> Result<()> {
    let stage = Stage::with_director()?;
    configure(&stage)?;
    connect(&stage, 6)?;
    settled(&stage, 12)?;
    let shown = || -> Result<[Option<u64>; 5]> {
        let stats = stage.ask("stats")?;
        let pointers =
            ["/services/0", "/services/0/destinations/0", "/services/1", "/services/1/destinations/1", "/total"];
        Ok(pointers.map(|pointer| connections(&stats, pointer)))
    };
    assert_eq!(shown()?, [6, 3, 6, 3, 12].map(Some));
    // One service; all together still count what it has carried.
    assert_eq!(stage.ok("zero -t 10.9.9.9:80")?, "");
    assert_eq!(shown()?, [0, 0, 6, 3, 12].map(Some));
    assert_eq!(stage.ask("list")?["services"][0]["destinations"][0]["active"], json!(3));
    stage.ok("ipvsadm -Z -u 10.9.9.9:53")?;
    assert_eq!(shown()?, [0, 0, 0, 0, 12].map(Some));
    // Datagrams are of the same connections again, but for two.
    connect(&stage, 8)?;
    settled(&stage, 22)?;
    assert_eq!(shown()?, [8, 4, 2, 1, 22].map(Some));
    stage.ok("ipvsadm --zero")?;
    assert_eq!(shown()?, [0; 5].map(Some));
    let stats = stage.ok("ipvsadm -Ln --stats -u 10.9.9.9:53")?;
    let service = stats.lines().find(|line| line.starts_with("UDP")).unwrap_or_default();
    assert_eq!(service, "UDP  10.9.9.9:53                         0        0        0        0        0");
    stage.ok(&format!("up {WIRE}"))?;
    assert_eq!(shown()?, [0; 5].map(Some));
    // A destination that comes back to its service has the counters that it had, and a service that comes back has none.
    connect(&stage, 10)?;
    settled(&stage, 34)?;
    stage.ok("dest del -t 10.9.9.9:80 -r 10.2.0.11")?;
    stage.ok("dest add -t 10.9.9.9:80 -r 10.2.0.11")?;
    assert_eq!(shown()?, [10, 5, 2, 1, 12].map(Some));
    stage.ok("service del -t 10.9.9.9:80")?;
    stage.ok("service add -t 10.9.9.9:80 -s rr")?;
    assert_eq!((shown()?[0], shown()?[4]), (Some(0), Some(12)));
    for words in ["zero -t 10.9.9.9:81", "zero -u 10.9.9.9:80"] {
        assert_eq!(stage.say(words)?.code, Some(1), "{words}");
    }
    let refused = Said { out: String::new(), err: "No such service\n".into(), code: Some(255) };
    assert_eq!(stage.say("ipvsadm -Z -t 10.9.9.9:81")?, refused);
    assert_eq!(stage.say("ipvsadm -Z -f 7")?, refused);
    Ok(())
}

/// 200 connections within one estimation, two seconds, are 25 a second in that, 19 in the next, and so on.
#[test]
fn rates_are_estimated_by_the_timer() -> Result<()> {
    let stage = Stage::with_director()?;
    stage.ok("service add -u 10.9.9.9:53 -s rr --ops")?;
    stage.ok("dest add -u 10.9.9.9:53 -r 10.2.0.12")?;
    let ask = |pointer: &str| -> Result<Option<u64>> {
        let stats = stage.ask("stats --rate")?;
        Ok(stats.pointer(pointer).and_then(|rates| rates["cps"].as_u64()))
    };
    const DEST: &str = "/services/0/destinations/0";
    send(&stage, 200)?;
    let mut seen = Vec::new();
    for _ in 0..200 {
        let cps = ask(DEST)?.unwrap_or_default();
        if seen.last() != Some(&cps) {
            seen.push(cps);
        }
        if cps == 14 {
            break;
        }
        thread::sleep(Duration::from_millis(50));
    }
    seen.retain(|cps| *cps != 0);
    assert!(seen.ends_with(&[19, 14]), "{seen:?}");
    assert!(ask("/services/0")?.is_some_and(|cps| cps > 0) && ask("/total")?.is_some_and(|cps| cps > 0));
    let list = stage.ok("ipvsadm -Ln --rate")?;
    assert!(list.lines().any(|line| line.starts_with("UDP  10.9.9.9:53       ")), "{list}");
    // New programs go on; and then nothing is estimated, and all stays as it is.
    stage.ok(&format!("up {WIRE}"))?;
    stage.ok("set run_estimation 0")?;
    let frozen = ask(DEST)?;
    assert!(frozen.is_some_and(|cps| cps > 0));
    thread::sleep(Duration::from_millis(2500));
    assert_eq!(ask(DEST)?, frozen);
    stage.ok("zero")?;
    assert_eq!([ask(DEST)?, ask("/services/0")?, ask("/total")?], [Some(0); 3]);
    stage.ok("set run_estimation 1")?;
    thread::sleep(Duration::from_millis(2500));
    assert_eq!(ask(DEST)?, Some(0));
    Ok(())
}

/// Sends so many datagrams to the UDP service.
fn send(stage: &Stage, count: u32) -> Result<()> {
    stage.client.enter(|| -> Result<()> {
        let socket = UdpSocket::bind((CLIENT, 20_000))?;
        for _ in 0..count {
            socket.send_to(b"question", (cast::VIP, 53))?;
        }
        Ok(())
    })?
}
