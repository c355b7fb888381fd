//! Large configurations: as many services and destinations as there may be, and many commands at once.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    io::Write as _,
    net::{Ipv4Addr, UdpSocket},
    process::Stdio,
};

use anyhow::{Context as _, Result, ensure};
use lb_userspace::{
    control::state::State,
    datapath::{memory::Access, open::Maps},
};
use serde_json::Value;

use crate::stage::{Said, Stage, WIRE};

/// Services of the large configuration, and destinations of all of them.
const SERVICES: u16 = 4096;
const DESTS: usize = 65_536;
/// Destinations of its larger services.
const MANY: u16 = 1024;
/// Their schedulers. Of equal destinations, all but the last take one after the other.
const SCHEDULERS: [&str; 4] = ["rr", "wrr", "wlc", "mh"];

/// Runs `ipvsadm -R` with these lines.
fn restore(stage: &Stage, lines: &str) -> Result<Said> {
    let mut command = stage.command(&["ipvsadm", "-R"])?;
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    child.stdin.take().context("a pipe")?.write_all(lines.as_bytes())?;
    Ok(child.wait_with_output()?.into())
}

/// How many changes the instance has seen.
fn changes(stage: &Stage) -> Result<u64> {
    Ok(Maps::open(&stage.place(), Access::Read)?.instance().generation / 2)
}

/// The address of a service.
fn service(number: u16) -> Ipv4Addr {
    let [high, low] = number.to_be_bytes();
    Ipv4Addr::new(10, 9, high, low)
}

/// The address of a destination, behind a real server that is known.
fn dest(number: u16) -> Ipv4Addr {
    let [high, low] = number.to_be_bytes();
    Ipv4Addr::new(10, 20, high, low)
}

/// The large configuration as commands.
fn large() -> Result<String> {
    let mut lines = String::new();
    let mut left = DESTS;
    for number in 0..SERVICES {
        let scheduler = SCHEDULERS.get(usize::from(number)).copied().unwrap_or("sh");
        writeln!(lines, "-A -u {}:53 -s {scheduler}", service(number))?;
        let dests =
            if usize::from(number) < SCHEDULERS.len() { MANY.into() } else { left / usize::from(SERVICES - number) };
        for index in 0..dests as u16 {
            writeln!(lines, "-a -u {}:53 -r {}:53 -g -w 1", service(number), dest(index))?;
        }
        left -= dests;
    }
    Ok(lines)
}

/// Lets `count` new clients send a datagram to a service.
fn send(stage: &Stage, number: u16, count: usize) -> Result<()> {
    stage.client.enter(|| -> Result<()> {
        // All at once, or one would have the port of another.
        let sockets = (0..count).map(|_| UdpSocket::bind("10.0.0.2:0")).collect::<std::io::Result<Vec<_>>>()?;
        for socket in &sockets {
            socket.send_to(b"?", (service(number), 53))?;
        }
        Ok(())
    })?
}

/// How many connections each destination of a service has.
fn connections(list: &Value, number: u16) -> Result<BTreeMap<String, u64>> {
    let address = format!("{}:53", service(number));
    let services = list["services"].as_array().context("services")?;
    let found = services.iter().find(|service| service["address"] == *address).context(address)?;
    let dests = found["destinations"].as_array().context("destinations")?;
    let of = |dest: &Value| Some((dest["address"].as_str()?.to_owned(), dest["inactive"].as_u64()?));
    dests.iter().map(|dest| of(dest).context("a destination")).collect()
}

#[test]
fn an_instance_has_room_for_4096_services_and_65536_destinations() -> Result<()> {
    let stage = Stage::new()?;
    stage.ok(&format!("up {WIRE} --max-flows 20000 --max-services {SERVICES} --max-dests {DESTS}"))?;
    stage.director.ip("route add 10.20.0.0/16 via 10.2.0.11")?;
    stage.client.ip("route add 10.9.0.0/16 via 10.0.0.1")?;
    let before = changes(&stage)?;
    let said = restore(&stage, &large()?)?;
    assert_eq!((said.err.as_str(), said.code), ("", Some(0)));
    // One change, however many lines.
    assert_eq!(changes(&stage)?, before + 1);
    let status = stage.ask("status")?;
    assert_eq!([&status["services"], &status["destinations"]], [&Value::from(SERVICES), &Value::from(DESTS)]);
    for (words, what) in
        [("service add -u 10.9.99.99:53", "services"), ("dest add -u 10.9.0.0:53 -r 10.21.0.1:53", "destinations")]
    {
        let Said { err, code, .. } = stage.say(words)?;
        ensure!(code == Some(1) && err.contains(what), "`{words}`: {code:?} {err}");
    }
    for number in 0..SCHEDULERS.len() as u16 {
        send(&stage, number, 2 * usize::from(MANY))?;
    }
    let smaller = [4, 1000, 2000, SERVICES - 1];
    for number in smaller {
        send(&stage, number, 3)?;
    }
    let list = stage.ask("list")?;
    for (number, scheduler) in (0..).zip(SCHEDULERS) {
        let found = connections(&list, number)?;
        assert_eq!(found.len(), usize::from(MANY));
        assert_eq!(found.values().sum::<u64>(), 2 * u64::from(MANY), "{scheduler}");
        let alike = found.values().all(|connections| *connections == 2);
        assert_eq!(alike, scheduler != "mh", "{scheduler}: {found:?}");
    }
    for number in smaller {
        assert_eq!(connections(&list, number)?.values().sum::<u64>(), 3, "service {number}");
    }
    // What a large service's destinations are is changed like those of a small one.
    stage.ok("ipvsadm -d -u 10.9.0.0:53 -r 10.20.0.7:53")?;
    stage.ok("ipvsadm -a -u 10.9.0.0:53 -r 10.20.0.7:53 -g")?;
    assert_eq!(connections(&stage.ask("list")?, 0)?["10.20.0.7:53"], 2);
    Ok(())
}

/// Commands, some of which are refused. Nothing is to be told from what they leave.
const COMMANDS: &str = "\
-A -t 10.9.9.9:80 -s wrr
-a -t 10.9.9.9:80 -r 10.2.0.11 -g -w 4
-a -t 10.9.9.9:80 -r 10.2.0.12 -g -w 6
-a -t 10.9.9.9:80 -r 10.2.0.12 -g -w 7
-A -t 10.9.9.9:80 -s rr
-A -t 10.9.9.9:81 -s nothing
-a -t 10.9.9.9:82 -r 10.2.0.11 -g
-a -t 10.9.9.9:80 -r 10.2.0.13 -g -w 9
-e -t 10.9.9.9:80 -r 10.2.0.12 -g -w 8
-d -t 10.9.9.9:80 -r 10.2.0.11
-d -t 10.9.9.9:80 -r 10.2.0.11
-A -u 10.9.9.9:53 -s rr
-a -u 10.9.9.9:53 -r 10.2.0.11:53 -m
-a -u 10.9.9.9:53 -r 10.2.0.12:53 -m -x 9 -y 10
-a -u 10.9.9.9:53 -r 10.2.0.13:5353 -m -x 9 -y 3
-E -u 10.9.9.9:53 -s sh -b sh-port
-D -u 10.9.9.9:53
-A -u 10.9.9.9:53 -s wrr
-a -u 10.9.9.9:53 -r 10.2.0.13:5353 -m -w 3
-a -u 10.9.9.9:53 -r 10.2.0.14:53 -m -w 12
-a -t 10.9.9.9:80 -r 10.2.0.11 -g -w 12
-D -t 10.9.9.9:83
";

/// Everything about the services and destinations that is kept, but for what stands for a time or a place.
fn kept(stage: &Stage) -> Result<(String, Vec<[u32; 4]>)> {
    let maps = Maps::open(&stage.place(), Access::Read)?;
    let mut services: Vec<_> = State::load(&maps.shared()).services.into_values().collect();
    services.sort_by_key(|service| service.order);
    let of = services.iter().map(|service| [service.scheduler, service.flags, service.pointer, service.threshold]);
    Ok((stage.ok("ipvsadm -Sn")?, of.collect()))
}

#[test]
fn many_commands_at_once_do_what_they_do_one_by_one() -> Result<()> {
    let (together, alone) = (Stage::with_director()?, Stage::with_director()?);
    let before = changes(&together)?;
    let said = restore(&together, COMMANDS)?;
    assert_eq!(changes(&together)?, before + 1);
    let mut last = Said { out: String::new(), err: String::new(), code: None };
    let mut complaints = String::new();
    for line in COMMANDS.lines() {
        last = alone.say(&format!("ipvsadm {line}"))?;
        complaints += &last.err;
    }
    assert_eq!((said.err, said.code), (complaints, last.code));
    assert_eq!(kept(&together)?, kept(&alone)?);
    Ok(())
}

#[test]
fn a_line_that_makes_no_sense_ends_what_comes_after_it() -> Result<()> {
    let stage = Stage::with_director()?;
    let said = restore(&stage, "-A -t 10.9.9.9:80\n-a -t 10.9.9.9:81 -r 10.2.0.11\nnonsense\n-A -t 10.9.9.9:82\n")?;
    assert_eq!(said.code, Some(255));
    assert_eq!(said.err.lines().next(), Some("Service not defined"));
    assert_eq!(stage.ok("ipvsadm -Sn")?, "-A -t 10.9.9.9:80 -s wlc\n");
    // Options that are none do not.
    let said = restore(&stage, "-A -t 10.9.9.9:81 --none\n-A -t 10.9.9.9:82 -s\n-A -t 10.9.9.9:83\n")?;
    assert_eq!((said.err.as_str(), said.code), ("--none: unknown option\n-s: missing argument\n", Some(0)));
    // What is not there to be listed does.
    let said = restore(&stage, "-A -t 10.9.9.9:84\n-Ln -t 10.9.9.9:85\n-A -t 10.9.9.9:86\n")?;
    assert_eq!((said.err.as_str(), said.code), ("No such service\n", Some(1)));
    let kept = stage.ok("ipvsadm -Sn")?;
    assert_eq!(kept, ["80", "83", "84"].map(|port| format!("-A -t 10.9.9.9:{port} -s wlc\n")).concat());
    Ok(())
}

/// One by one, the slots of what was removed are free again when the next comes.
#[test]
fn where_there_is_no_room_for_all_there_is_for_one_after_the_other() -> Result<()> {
    let stage = Stage::with_director()?;
    let services = (0..66).map(|number| format!("-A -t {}:80 -s rr\n", service(number))).collect::<String>();
    let said = restore(&stage, &services)?;
    assert_eq!(said.err.lines().count(), 2, "{}", said.err);
    assert_eq!(stage.ok("ipvsadm -Sn")?.lines().count(), 64);
    let others = (100..164).map(|number| format!("-A -t {}:80 -s rr\n", service(number))).collect::<String>();
    let said = restore(&stage, &format!("-C\n{others}"))?;
    assert_eq!((said.err.as_str(), said.code), ("", Some(0)));
    assert_eq!(stage.ok("ipvsadm -Sn")?, others);
    Ok(())
}
