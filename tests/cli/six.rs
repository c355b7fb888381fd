//! IPv6 on the command line: services, destinations and connections beside those of IPv4, and hosts without it.

use std::{
    fs,
    net::{Ipv6Addr, SocketAddr, SocketAddrV6},
    os::fd::AsRawFd as _,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use lb_common::tcp::State;
use lb_userspace::control::{
    bulk::{self, NewConnection, ProtocolState},
    model::{ServiceKey, Transport},
    session::Session,
};
use nix::{
    net::if_::if_nametoindex,
    sys::socket::{
        AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn6, sendto, setsockopt, socket, sockopt,
    },
};
use serde_json::{Value, json};
use xdpvs_tests::program;

use crate::stage::{Said, Stage, WIRE};

/// Configures a service of either family, with two destinations each.
fn configure(stage: &Stage) -> Result<()> {
    for words in [
        "service add -t [fd00::1]:80 -s rr",
        "dest add -t [fd00::1]:80 -r fd00::12 -w 3",
        "dest add --tcp-service [fd00:0::0001]:80 --real-server [fd00::11]:8080 --method nat",
        "service add -t 10.9.9.9:80 -s rr",
        "dest add -t 10.9.9.9:80 -r 10.2.0.11",
        "dest add -t 10.9.9.9:80 -r 10.2.0.12 -m",
    ] {
        assert_eq!(stage.ok(words)?, "", "{words}");
    }
    Ok(())
}

#[test]
fn services_of_both_families_are_listed() -> Result<()> {
    let stage = Stage::with_director()?;
    configure(&stage)?;
    for words in [
        "service add -u [fd00::1]:53",
        "service edit -u [fd00::1]:53 -s mh",
        "dest add -u [fd00::1]:53 -r [fd00::13] -i",
        "dest edit -u [fd00::1]:53 -r fd00::13 -w 7",
        "dest add -u [fd00::1]:53 -r [fd00::14]:53",
        "dest del -u [fd00::1]:53 -r fd00::14",
    ] {
        assert_eq!(stage.ok(words)?, "", "{words}");
    }
    let dest = |address: &str, method: &str, weight: u32| {
        json!({
            "address": address, "method": method, "weight": weight, "active": 0, "inactive": 0,
            "upper_threshold": 0, "lower_threshold": 0, "overloaded": false, "templates": 0,
        })
    };
    let service = |protocol: &str, address: &str, scheduler: &str, destinations: Value| json!({"protocol": protocol, "address": address, "scheduler": scheduler, "flags": [], "destinations": destinations});
    assert_eq!(
        stage.ask("list")?["services"],
        json!([
            service("tcp", "10.9.9.9:80", "rr", json!([dest("10.2.0.11:80", "dr", 1), dest("10.2.0.12:80", "nat", 1)])),
            service(
                "tcp",
                "[fd00::1]:80",
                "rr",
                json!([dest("[fd00::11]:8080", "nat", 1), dest("[fd00::12]:80", "dr", 3)])
            ),
            service("udp", "[fd00::1]:53", "mh", json!([dest("[fd00::13]:53", "ipip", 7)])),
        ])
    );
    let text = stage.ok("list")?;
    assert!(text.contains("\ntcp [fd00::1]:80  rr\n"), "{text}");
    assert_eq!(
        stage.ok("ipvsadm -Ln")?,
        "IP Virtual Server version 1.2.1 (size=4096)\n\
         Prot LocalAddress:Port Scheduler Flags\n  \
           -> RemoteAddress:Port           Forward Weight ActiveConn InActConn\n\
         TCP  10.9.9.9:80 rr\n  \
           -> 10.2.0.11:80                 Route   1      0          0         \n  \
           -> 10.2.0.12:80                 Masq    1      0          0         \n\
         TCP  [fd00::1]:80 rr\n  \
           -> [fd00::11]:8080              Masq    1      0          0         \n  \
           -> [fd00::12]:80                Route   3      0          0         \n\
         UDP  [fd00::1]:53 mh\n  \
           -> [fd00::13]:53                Tunnel  7      0          0         \n"
    );
    let stats = stage.ask("stats")?;
    assert_eq!(stats["services"][1]["address"], json!("[fd00::1]:80"));
    assert_eq!(stats["services"][1]["destinations"][0]["address"], json!("[fd00::11]:8080"));

    // What `-S` prints makes the same again.
    let saved = stage.ok("ipvsadm -Sn")?;
    ensure!(saved.contains("-a -u [fd00::1]:53 -r [fd00::13]:53 -i -w 7 --tun-type ipip\n"), "{saved}");
    let before = stage.ask("list")?;
    stage.ok("service flush")?;
    for line in saved.lines() {
        assert_eq!(stage.ok(&format!("ipvsadm {line}"))?, "", "{line}");
    }
    assert_eq!(stage.ask("list")?, before);
    Ok(())
}

/// Brings connections in: of IPv6 clients fd01::1:0 and on, and of IPv4 clients 10.1.0.0 and on, `count` each, to the first
/// destination of their services and the second in turn, established and closed in turn.
fn connect(stage: &Stage, count: u16) -> Result<()> {
    let socket = |text: &str| text.parse::<SocketAddr>().context("an address and port");
    let ends = [
        (socket("10.9.9.9:80")?, [socket("10.2.0.11:80")?, socket("10.2.0.12:80")?]),
        (socket("[fd00::1]:80")?, [socket("[fd00::11]:8080")?, socket("[fd00::12]:80")?]),
    ];
    let connections = (0..count).flat_map(|number| {
        ends.map(|(address, destinations)| NewConnection {
            service: ServiceKey { protocol: Transport::Tcp, address },
            client: match address {
                SocketAddr::V4(_) => ([10, 1, (number >> 8) as u8, number as u8], 40_000).into(),
                SocketAddr::V6(_) => (Ipv6Addr::new(0xfd01, 0, 0, 0, 0, 0, 1, number), 40_000).into(),
            },
            destination: destinations[usize::from(number % 2)],
            state: ProtocolState::Tcp(if number / 2 % 2 == 0 { State::Established } else { State::Close }),
            remaining: Duration::from_secs(600),
        })
    });
    let lock = stage.place().lock()?;
    let created = bulk::insert(&mut Session::open(&stage.place())?, &lock, connections)?.created;
    ensure!(created == 2 * u64::from(count), "{created} connections created");
    Ok(())
}

#[test]
fn connections_of_both_families_are_listed_counted_and_ended() -> Result<()> {
    let stage = Stage::with_director()?;
    configure(&stage)?;
    connect(&stage, 200)?;
    let status = stage.ask("status")?;
    assert_eq!((&status["flows"], &status["flows6"], &status["ipv6"]), (&json!(200), &json!(200), &json!(true)));
    assert_eq!((&status["max_flows"], &status["max_flows6"]), (&json!(10_000), &json!(2500)));
    assert!(stage.ok("status")?.contains("\nconnections   IPv4: 200 of 10000, IPv6: 200 of 2500\n"));
    let loads = stage.ask("list")?;
    for service in 0..2 {
        for dest in 0..2 {
            let dest = &loads["services"][service]["destinations"][dest];
            assert_eq!((&dest["active"], &dest["inactive"]), (&json!(50), &json!(50)), "{dest}");
        }
    }

    for (filter, count) in [
        ("", 400),
        ("-t [fd00::1]:80", 200),
        ("--service tcp:[fd00::1]:80 --state established", 100),
        ("--service udp:[fd00::1]:80", 0),
        ("--dest fd00::11", 100),
        ("--dest [fd00::11]:8080 --state CLOSE", 50),
        ("--dest [fd00::11]:80", 0),
        ("--client fd01::1:0/124", 16),
        ("--client fd01::1:7", 1),
        ("--client ::/0", 200),
        ("--client 0.0.0.0/0", 200),
        ("--state ESTABLISHED", 200),
    ] {
        assert_eq!(stage.ok(&format!("conn list {filter} --count"))?, format!("{count}\n"), "{filter}");
        let listed = stage.ask(&format!("conn list {filter}"))?;
        assert_eq!(listed["connections"].as_array().map(Vec::len), Some(count), "{filter}");
    }
    let mut one = stage.ask("conn list --client fd01::1:7")?;
    let left = one["connections"][0]["expires_ms"].take().as_u64().context("a time")?;
    ensure!((500_000..=600_000).contains(&left), "{left} ms left");
    let expected = json!({
        "protocol": "tcp", "client": "[fd01::1:7]:40000", "service": "[fd00::1]:80", "destination": "[fd00::12]:80",
        "state": "CLOSE", "expires_ms": null, "method": "dr",
    });
    assert_eq!(one, json!({ "connections": [expected] }));
    let text = stage.ok("conn list --client fd01::1:6")?;
    let words: Vec<&str> = text.lines().nth(1).context("a line")?.split_whitespace().collect();
    let [protocol, _, state, ends @ ..] = words.as_slice() else { panic!("{text}") };
    assert_eq!((*protocol, *state), ("tcp", "CLOSE"));
    assert_eq!(*ends, ["[fd01::1:6]:40000", "[fd00::1]:80", "[fd00::11]:8080", "nat"]);
    let listed = stage.ok("ipvsadm -Lnc")?;
    let line = listed.lines().find(|line| line.contains("[fd01::1:7]:")).context("the connection")?;
    let (begin, end) = line.split_at_checked(4).zip(line.get(10..)).context("columns")?;
    assert_eq!((begin.0, end), ("TCP ", " CLOSE       [fd01::1:7]:40000  [fd00::1]:80       [fd00::12]:80"));
    assert_eq!(listed.lines().count(), 402);

    assert_eq!(stage.ok("conn flush -t [fd00::1]:80 --dest fd00::12")?, "100 connections ended\n");
    assert_eq!(stage.ok("conn flush --service tcp:10.9.9.9:80")?, "200 connections ended\n");
    assert_eq!(stage.ok("conn list --count")?, "100\n");
    connect(&stage, 100).expect_err("some are there already");
    let count: u64 = stage.ok("conn list --count")?.trim().parse()?;
    assert_eq!(stage.ok("conn flush")?, format!("{count} connections ended\n"));
    assert_eq!((stage.ok("conn list --count")?, &stage.ask("status")?["flows6"]), ("0\n".into(), &json!(0)));
    Ok(())
}

#[test]
fn what_cannot_be_by_ipv6_is_refused() -> Result<()> {
    let stage = Stage::with_director()?;
    configure(&stage)?;
    let before = stage.ask("list")?;
    let not_served = |address: &str| format!("service tcp {address}: use a unicast address that is not link-local");
    let no_dest = |address: &str| format!("destination {address}: use a unicast address that is not link-local");
    let mixed = |dest: &str, service: &str, family: &str| {
        format!("destination {dest}: service tcp {service} is {family}, and so must its destinations be")
    };
    let mut refused = vec![
        (
            "service add -t [fd00::1]:0".to_owned(),
            "service tcp [fd00::1]:0: port 0 is for persistent services only: use -p, or another port".to_owned(),
            1,
        ),
        (
            "service add -t fd00::1".to_owned(),
            "invalid value 'fd00::1' for '--tcp-service <VIP:PORT>': a service has a port, write [ADDRESS]:PORT"
                .to_owned(),
            2,
        ),
        (
            "service add -t [fd00::1%lo]:80".to_owned(),
            "invalid value '[fd00::1%lo]:80' for '--tcp-service <VIP:PORT>': `fd00::1%lo` is no IP address".to_owned(),
            2,
        ),
        ("dest add -t 10.9.9.9:80 -r fd00::11 -i".to_owned(), mixed("[fd00::11]:80", "10.9.9.9:80", "IPv4"), 1),
        ("dest add -t [fd00::1]:80 -r 10.2.0.11 -m".to_owned(), mixed("10.2.0.11:80", "[fd00::1]:80", "IPv6"), 1),
        (
            "dest add -t [fd00::1]:80 -r [fd00::13]:81".to_owned(),
            "destination [fd00::13]:81: dr does not change the port, which is 80 for this service: leave it out"
                .to_owned(),
            1,
        ),
        ("conn flush --dest fd00::99".to_owned(), "no destination fd00::99: see `xdpvs conn list`".to_owned(), 1),
        (
            format!("up {WIRE} --max-flows6 999"),
            "invalid value '999' for '--max-flows6 <N>': 999 is not in 1000..=16777216".to_owned(),
            2,
        ),
        (
            format!("up {WIRE} --max-flows6 2000"),
            format!(
                "instance `{}` runs with --max-flows6 2500: `xdpvs down` first, which ends all connections",
                stage.instance
            ),
            1,
        ),
    ];
    for address in ["::", "ff0e::1", "fe80::1", "::ffff:10.9.9.9"] {
        refused.push((format!("service add -t [{address}]:80"), not_served(&format!("[{address}]:80")), 1));
        refused.push((format!("dest add -t [fd00::1]:80 -r {address}"), no_dest(&format!("[{address}]:80")), 1));
    }
    for (words, line, code) in refused {
        let expected = Said { out: String::new(), err: format!("xdpvs: {line}\n"), code: Some(code) };
        assert_eq!(stage.say(&words)?, expected, "{words}");
    }
    let not_unicast = "Invalid operation.  Possibly wrong module version, address not unicast, ...";
    for (words, line, code) in [
        ("-A -t [ff0e::1]:80", not_unicast, 255),
        ("-a -t [fd00::1]:80 -r [fe80::1]:80", not_unicast, 255),
        ("-a -t [fd00::1]:80 -r 10.2.0.11", "Different address family is allowed only for tunneling servers", 2),
        ("-a -t 10.9.9.9:80 -r [fd00::11]:80 -i", &mixed("[fd00::11]:80", "10.9.9.9:80", "IPv4"), 255),
        ("-A -t [fd00::1]:80", "Service already exists", 255),
        ("-d -t [fd00::1]:80 -r [fd00::99]:80", "No such destination", 255),
        ("-D -t [fd00::2]:80", "No such service", 255),
    ] {
        let expected = Said { out: String::new(), err: format!("{line}\n"), code: Some(code) };
        assert_eq!(stage.say(&format!("ipvsadm {words}"))?, expected, "{words}");
    }
    assert_eq!(stage.ask("list")?, before);
    Ok(())
}

/// The value of an IPv6 setting where the director is.
fn setting(stage: &Stage, name: &str) -> Result<String> {
    let path = format!("/proc/sys/net/ipv6/conf/{name}");
    stage
        .director
        .enter(|| fs::read_to_string(&path).with_context(|| path.clone()))?
        .map(|value| value.trim().to_owned())
}

/// Has the client say once that it is a router.
fn advertise(stage: &Stage) -> Result<()> {
    const ADVERTISEMENT: [u8; 16] = [134, 0, 0, 0, 64, 0, 0x07, 0x08, 0, 0, 0, 0, 0, 0, 0, 0];
    stage.client.enter(|| -> Result<()> {
        let out = socket(AddressFamily::Inet6, SockType::Raw, SockFlag::empty(), Some(SockProtocol::IcmpV6))?;
        // Routers are believed only when nobody has forwarded what they say.
        setsockopt(&out, sockopt::Ipv6MulticastHops, &255)?;
        let everybody = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
        let to = SockaddrIn6::from(SocketAddrV6::new(everybody, 0, 0, if_nametoindex("eth0")?));
        // As long as its address is tentative, the client cannot send.
        let _ = sendto(out.as_raw_fd(), &ADVERTISEMENT, &to, MsgFlags::empty());
        Ok(())
    })?
}

#[test]
fn forwarding_of_ipv6_is_put_back_and_routers_are_not_forgotten() -> Result<()> {
    let stage = Stage::new()?;
    let learned = || stage.director.exec("ip -6 route show default proto ra");
    for _ in 0..100 {
        advertise(&stage)?;
        thread::sleep(Duration::from_millis(100));
        if !learned()?.is_empty() {
            break;
        }
    }
    assert!(learned()?.contains("default via fe80::"), "the director has not heard of a router");
    let accepts = format!("{WIRE}/accept_ra");
    assert_eq!((setting(&stage, "lo/forwarding")?, setting(&stage, &accepts)?), ("0".into(), "1".into()));
    stage.ok(&format!("up {WIRE} --max-flows 1000 --max-flows6 2000"))?;
    assert_eq!(stage.ask("status")?["max_flows6"], json!(2000));
    for _ in 0..2 {
        assert_eq!((setting(&stage, "lo/forwarding")?, setting(&stage, &accepts)?), ("1".into(), "1".into()));
        assert!(learned()?.contains("default via fe80::"), "the director has forgotten its router");
        stage.ok(&format!("up {WIRE}"))?;
    }
    stage.ok("down")?;
    assert_eq!((setting(&stage, "lo/forwarding")?, setting(&stage, &accepts)?), ("0".into(), "1".into()));
    assert!(learned()?.contains("default via fe80::"), "the director has forgotten its router");
    Ok(())
}

#[test]
fn a_host_without_ipv6_serves_ipv4() -> Result<()> {
    let stage = Stage::new()?;
    // A kernel without IPv6 has none of these settings.
    let without = |words: &str| -> Result<Said> {
        const HIDDEN: &str = "mount -t tmpfs none /proc/sys/net/ipv6 || exit 125; exec \"$@\"";
        let mut hidden = stage.director.command("unshare");
        hidden.args(["--mount", "sh", "-c", HIDDEN, "sh"]).arg(program::path()?).args(words.split_whitespace());
        Ok(hidden.env("XDPVS_INSTANCE", &stage.instance).output()?.into())
    };
    let fine = |out: &str| Said { out: out.into(), err: String::new(), code: Some(0) };
    assert_eq!(without(&format!("up {WIRE} --max-flows 1000"))?, fine(""));
    assert_eq!(setting(&stage, "lo/forwarding")?, "0");
    assert_eq!(without("service add -t 10.9.9.9:80")?, fine(""));
    let why = "the kernel has no IPv6: boot one with CONFIG_IPV6, and without ipv6.disable=1";
    let refused = Said { out: String::new(), err: format!("xdpvs: service tcp [fd00::1]:80: {why}\n"), code: Some(1) };
    assert_eq!(without("service add -t [fd00::1]:80")?, refused);
    let refused = Said { err: refused.err.replacen("xdpvs: ", "", 1), code: Some(255), ..refused };
    assert_eq!(without("ipvsadm -A -t [fd00::1]:80")?, refused);
    let status = without("status")?;
    ensure!(status.out.contains(&format!("\nIPv6          none: {why}\n")), "{}", status.out);
    assert_eq!(without("down")?, fine(""));

    stage.ok(&format!("up {WIRE} --max-flows 1000"))?;
    let disabled = format!("net.ipv6.conf.{WIRE}.disable_ipv6");
    assert_eq!(stage.ask("status")?["ipv6"], json!(true));
    stage.director.sysctl(&disabled, "1")?;
    assert_eq!(stage.ask("status")?["ipv6"], json!(false));
    let status = stage.ok("status")?;
    ensure!(
        status.contains("none: IPv6 is disabled on the interfaces: set net.ipv6.conf.IFACE.disable_ipv6 to 0\n"),
        "{status}"
    );
    let added = stage.say("service add -t [fd00::1]:80")?;
    let line = "xdpvs: service tcp [fd00::1]:80: no packet will come for it: IPv6 is disabled on the interfaces: set \
                net.ipv6.conf.IFACE.disable_ipv6 to 0\n";
    assert_eq!(added, Said { out: String::new(), err: line.into(), code: Some(0) });
    stage.director.sysctl(&disabled, "0")?;
    assert_eq!(stage.ok("service edit -t [fd00::1]:80 -s rr")?, "");
    assert_eq!(stage.ask("status")?["ipv6"], json!(true));
    Ok(())
}
