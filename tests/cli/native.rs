//! Commands of xdpvs itself: what they answer, and that bad input is refused in one line and changes nothing.

use std::{fs, process::Command};

use anyhow::{Context as _, Result};
use lb_common::abi;
use lb_userspace::{
    datapath::{memory::Access, open::Maps},
    netlink,
};
use serde_json::json;
use xdpvs_tests::{lab, program};

use crate::stage::{Said, Stage, WIRE};

/// Configures a service with two destinations.
fn configure(stage: &Stage) -> Result<()> {
    for words in [
        "service add -t 10.9.9.9:80 -s rr",
        "dest add -t 10.9.9.9:80 -r 10.2.0.12 -w 3",
        "dest add --tcp-service 10.9.9.9:80 --real-server 10.2.0.11:8080 --method nat",
    ] {
        assert_eq!(stage.ok(words)?, "", "{words}");
    }
    Ok(())
}

#[test]
fn what_is_configured_is_listed() -> Result<()> {
    let stage = Stage::with_director()?;
    configure(&stage)?;
    for words in [
        "service add -u 10.9.9.9:53",
        "service edit -u 10.9.9.9:53 -s sh -b sh-port,sh-fallback --ops",
        "dest add -u 10.9.9.9:53 -r 10.2.0.13 -i",
        "dest edit -u 10.9.9.9:53 -r 10.2.0.13 -w 7 -x 20 -y 10",
        "dest edit -u 10.9.9.9:53 -r 10.2.0.13 --u-threshold 30",
        "dest add -u 10.9.9.9:53 -r 10.2.0.14 -x 5",
        "dest edit -u 10.9.9.9:53 -r 10.2.0.14:53 -m",
        "dest add -u 10.9.9.9:53 -r 10.2.0.11",
        "dest del -u 10.9.9.9:53 -r 10.2.0.11",
        "service add -t 10.9.9.9:443 -s wrr",
        "service del -t 10.9.9.9:443",
    ] {
        assert_eq!(stage.ok(words)?, "", "{words}");
    }
    let dest = |address: &str, method: &str, weight: u32, thresholds: [u32; 2]| {
        json!({
            "address": address, "method": method, "weight": weight, "active": 0, "inactive": 0, "templates": 0,
            "upper_threshold": thresholds[0], "lower_threshold": thresholds[1], "overloaded": false,
        })
    };
    assert_eq!(
        stage.ask("list")?,
        json!({
            "instance": stage.instance,
            "mode": [{"interface": WIRE, "mode": "native"}],
            "services": [
                {
                    "protocol": "tcp", "address": "10.9.9.9:80", "scheduler": "rr", "flags": [],
                    "destinations": [dest("10.2.0.11:8080", "nat", 1, [0, 0]), dest("10.2.0.12:80", "dr", 3, [0, 0])],
                },
                {
                    "protocol": "udp", "address": "10.9.9.9:53", "scheduler": "sh",
                    "flags": ["sh-fallback", "sh-port", "ops"],
                    "destinations": [dest("10.2.0.13:53", "ipip", 7, [30, 10]), dest("10.2.0.14:53", "nat", 1, [5, 0])],
                },
            ],
        })
    );
    assert_eq!(
        stage.ok("list")?,
        format!(
            "Instance {} on {WIRE} (native)\n\
             Service          Scheduler                     Destination     Method  Weight  Active  Inactive  Limits\n\
             tcp 10.9.9.9:80  rr\n                                               \
                                         10.2.0.11:8080  nat          1       0         0\n                                               \
                                         10.2.0.12:80    dr           3       0         0\n\
             udp 10.9.9.9:53  sh (sh-fallback,sh-port) ops\n                                               \
                                         10.2.0.13:53    ipip         7       0         0  30 down to 10\n                                               \
                                         10.2.0.14:53    nat          1       0         0  5\n",
            stage.instance
        )
    );
    let status = stage.ask("status")?;
    assert_eq!(status["running"], json!(true));
    assert_eq!(status["attachments"], json!([{"interface": WIRE, "mode": "native"}]));
    assert_eq!((&status["services"], &status["destinations"]), (&json!(2), &json!(4)));
    assert_eq!((&status["max_flows"], &status["flows"]), (&json!(10_000), &json!(0)));
    assert_eq!(status["ageing"]["interval_ms"], json!(10));
    stage.ok("service flush")?;
    assert_eq!(stage.ask("list")?["services"], json!([]));
    Ok(())
}

#[test]
fn timeouts_are_kept() -> Result<()> {
    let stage = Stage::with_director()?;
    assert_eq!(stage.ask("timeout get")?, json!({"tcp": 900, "tcpfin": 120, "udp": 300}));
    stage.ok("timeout set 60 0 7")?;
    assert_eq!(stage.ask("timeout get")?, json!({"tcp": 60, "tcpfin": 120, "udp": 7}));
    assert_eq!(stage.ok("timeout get")?, "tcp 60 s, tcpfin 120 s, udp 7 s\n");
    Ok(())
}

#[test]
fn the_help_names_every_command_and_every_unit() -> Result<()> {
    let stage = Stage::new()?;
    let help = stage.ok("--help")?;
    for command in [
        "up",
        "down",
        "status",
        "service",
        "dest",
        "list",
        "conn",
        "stats",
        "zero",
        "timeout",
        "set",
        "realserver",
        "ipvsadm",
    ] {
        assert!(help.lines().any(|line| line.trim_start().starts_with(command)), "{command} in {help}");
    }
    assert!(stage.ok("timeout set --help")?.contains("Seconds"));
    Ok(())
}

/// A command, the line it must be refused with, and its exit code.
type Refusal<'a> = (String, String, i32);

fn refusal(words: &str, line: &str, code: i32) -> Refusal<'static> {
    (words.to_owned(), line.to_owned(), code)
}

/// Runs the commands. Each must be refused in its one line.
fn all_refused(stage: &Stage, refusals: Vec<Refusal<'_>>) -> Result<()> {
    for (words, line, code) in refusals {
        let expected = Said { out: String::new(), err: format!("xdpvs: {line}\n"), code: Some(code) };
        assert_eq!(stage.say(&words)?, expected, "{words}");
    }
    Ok(())
}

#[test]
fn bad_input_is_refused_in_one_line_and_changes_nothing() -> Result<()> {
    let stage = Stage::with_director()?;
    configure(&stage)?;
    let rival = Stage::new()?;
    rival.director.ip("link add taken type veth peer name other")?;
    rival.ok("up taken --max-flows 1000")?;
    let taken = rival.director.enter(|| netlink::interface("taken"))??.xdp.context("a program")?.program;
    stage.director.ip("link add spare type veth peer name other")?;
    let before = stage.ask("list")?;

    let missing = "the following required arguments were not provided";
    let address = "for '--tcp-service <VIP:PORT>'";
    let server = "for '--real-server <ADDR[:PORT]>'";
    let mut refusals = Vec::new();
    for words in
        ["service del -t 10.9.9.9:81", "service edit -t 10.9.9.9:81 -s rr", "dest add -t 10.9.9.9:81 -r 10.2.0.11"]
    {
        refusals.push(refusal(words, "no service tcp 10.9.9.9:81: see `xdpvs list`", 1));
    }
    for words in ["dest del -t 10.9.9.9:80 -r 10.2.0.99", "dest edit -t 10.9.9.9:80 -r 10.2.0.99 -w 1"] {
        let line = "service tcp 10.9.9.9:80 has no destination 10.2.0.99:80: see `xdpvs list`";
        refusals.push(refusal(words, line, 1));
    }
    for word in ["-1", "2147483648", "many"] {
        let line = format!("invalid value '{word}' for '--weight <WEIGHT>': use a number from 0 to 2147483647");
        refusals.push((format!("dest add -t 10.9.9.9:80 -r 10.2.0.13 -w {word}"), line, 2));
    }
    refusals.extend([
        refusal(
            "service add -t 10.9.9.9:80",
            "service tcp 10.9.9.9:80 exists already: use `xdpvs service edit` to change it",
            1,
        ),
        refusal(
            "dest add -t 10.9.9.9:80 -r 10.2.0.12",
            "service tcp 10.9.9.9:80 has destination 10.2.0.12:80 already: use `xdpvs dest edit` to change it",
            1,
        ),
        refusal("service add -t 10.9.9.9:0", "service tcp 10.9.9.9:0: port 0 is for persistent services only: use -p, or another port", 1),
        refusal(
            "service add -t 10.9.9.300:80",
            &format!("invalid value '10.9.9.300:80' {address}: `10.9.9.300` is no IP address"),
            2,
        ),
        refusal(
            "service add -t 10.9.9.9:65536",
            &format!("invalid value '10.9.9.9:65536' {address}: `65536` is no port, use 1 to 65535"),
            2,
        ),
        refusal(
            "service add -t 10.9.9.9",
            &format!("invalid value '10.9.9.9' {address}: a service has a port, write ADDRESS:PORT"),
            2,
        ),
        refusal(
            "service add -t 10.9.9.9:81 -s rr -b sh-port",
            "scheduler rr has no flag `sh-port`: leave it out",
            1,
        ),
        refusal(
            "service add -t 10.9.9.9:81 --ops",
            "service tcp 10.9.9.9:81: one-packet scheduling is for UDP services only: leave --ops out",
            1,
        ),
        refusal(
            "service edit -t 10.9.9.9:80 -s rr -o",
            "service tcp 10.9.9.9:80: one-packet scheduling is for UDP services only: leave --ops out",
            1,
        ),
        refusal(
            "service add -t 10.9.9.9:81 -s fastest",
            "invalid value 'fastest' for '--scheduler <SCHED>': no such scheduler, use one of rr, wrr, wlc, sh, lc, sed, nq, dh, fo, ovf, mh, lblc, lblcr, twos, random, wrandom, wdh",
            2,
        ),
        refusal(
            "service add",
            &format!("{missing}: <--tcp-service <VIP:PORT>|--udp-service <VIP:PORT>|--sctp-service <VIP:PORT>|--fwmark-service <N>>: see `xdpvs --help`"),
            2,
        ),
        refusal(
            "dest add -t 10.9.9.9:80 -r server",
            &format!("invalid value 'server' {server}: `server` is no IP address"),
            2,
        ),
        refusal(
            "dest add -t 10.9.9.9:80 -r 10.2.0.13:http",
            &format!("invalid value '10.2.0.13:http' {server}: `http` is no port, use 1 to 65535"),
            2,
        ),
        refusal(
            "dest add -t 10.9.9.9:80 -r 10.2.0.13:81 -g",
            "destination 10.2.0.13:81: dr does not change the port, which is 80 for this service: leave it out",
            1,
        ),
        refusal(
            "dest add -t 10.9.9.9:80 -r 10.2.0.13:81 --method ipip",
            "destination 10.2.0.13:81: ipip does not change the port, which is 80 for this service: leave it out",
            1,
        ),
        refusal(
            "dest add -t 10.9.9.9:80 -r 10.2.0.13 -x 5 -y 6",
            "lower threshold 6: use at most the upper one, which is 5",
            1,
        ),
        refusal(
            "dest edit -t 10.9.9.9:80 -r 10.2.0.12 -y 1",
            "lower threshold 1: use at most the upper one, which is 0",
            1,
        ),
        refusal("dest add -t 10.9.9.9:80 -r 224.0.0.1", "destination 224.0.0.1:80: not the address of one host", 1),
        refusal(
            "dest add -t 10.9.9.9:80 -r 10.2.0.13 --method gre",
            "invalid value 'gre' for '--method <METHOD>': no such method, use dr, nat or ipip",
            2,
        ),
        refusal(
            "dest add -t 10.9.9.9:80 -r 10.2.0.13 -g -m",
            "the argument '--gatewaying' cannot be used with '--masquerading': see `xdpvs --help`",
            2,
        ),
        refusal(
            "dest edit -t 10.9.9.9:80 -r 10.2.0.12",
            &format!(
                "{missing}: <--gatewaying|--masquerading|--ipip|--method <METHOD>|--weight <WEIGHT>|\
                 --u-threshold <CONNECTIONS>|--l-threshold <CONNECTIONS>>: see `xdpvs --help`"
            ),
            2,
        ),
        refusal(
            "timeout set 60 60 2678401",
            "timeout 2678401: use 1 to 2678400 seconds, or 0 to leave it as it is",
            1,
        ),
        refusal(
            "timeout set 60 60 long",
            "invalid value 'long' for '<UDP>': invalid digit found in string",
            2,
        ),
        refusal("conn flush -t 10.9.9.9:81", "no service tcp 10.9.9.9:81: see `xdpvs list`", 1),
        refusal("conn flush --dest 10.2.0.99", "no destination 10.2.0.99: see `xdpvs conn list`", 1),
        refusal(
            "conn flush -t 10.9.9.9:80 --dest 10.2.0.12:81",
            "no destination 10.2.0.12:81: see `xdpvs conn list`",
            1,
        ),
        refusal(
            "conn list --service 10.9.9.9:80",
            "invalid value '10.9.9.9:80' for '--service <tcp|udp|sctp:VIP:PORT>': write tcp:ADDRESS:PORT, udp:ADDRESS:PORT or sctp:ADDRESS:PORT",
            2,
        ),
        refusal(
            "conn list --client 10.0.0.0/33",
            "invalid value '10.0.0.0/33' for '--client <ADDR[/LENGTH]>': use a length from 0 to 32",
            2,
        ),
        refusal(
            "conn list -t 10.9.9.9:80 -u 10.9.9.9:80",
            "the argument '--tcp-service <VIP:PORT>' cannot be used with '--udp-service <VIP:PORT>': see `xdpvs --help`",
            2,
        ),
        refusal(
            "conn list --state OPEN",
            "invalid value 'OPEN' for '--state <NAME>': no such state, use one of NONE, ESTABLISHED, SYN_SENT, SYN_RECV, \
             FIN_WAIT, TIME_WAIT, CLOSE, CLOSE_WAIT, LAST_ACK, LISTEN, SYNACK, UDP, ASSURED, INIT1, INIT, C-SENT, C-REPLIED, C-WAIT, COOKIE, C-ECHOED, S-SENT, \
             S-RECEIVED, S-ACK-SENT, REJECTED, CLOSED",
            2,
        ),
        refusal("up nowhere", "no interface `nowhere` in this network namespace: see `ip link`", 1),
        refusal(
            &format!("up {WIRE} nowhere --max-flows 10000"),
            "no interface `nowhere` in this network namespace: see `ip link`",
            1,
        ),
        (
            format!("up {WIRE} --max-flows 20000"),
            format!(
                "instance `{}` runs with --max-flows 10000: `xdpvs down` first, which ends all connections",
                stage.instance
            ),
            1,
        ),
        refusal(
            &format!("up {WIRE} --max-flows 999"),
            "invalid value '999' for '--max-flows <N>': 999 is not in 1000..=16777216",
            2,
        ),
        refusal(
            &format!("up {WIRE} --sweep-ms 9"),
            "invalid value '9' for '--sweep-ms <N>': 9 is not in 10..=60000",
            2,
        ),
        refusal(
            "--instance a/b list",
            "instance name `a/b`: use 1 to 64 letters, digits, `-` or `_`",
            1,
        ),
        refusal("frobnicate", "unrecognized subcommand 'frobnicate': see `xdpvs --help`", 2),
        refusal(
            "list --jsno",
            "unexpected argument '--jsno' found (tip: a similar argument exists: '--json'): see `xdpvs --help`",
            2,
        ),
        refusal(
            "--instance nobody list",
            "instance `nobody` is not running: start it with `xdpvs up IFACE`",
            1,
        ),
    ]);
    all_refused(&stage, refusals)?;
    assert_eq!(stage.ask("list")?, before);
    assert_eq!(stage.ask("timeout get")?["tcp"], json!(900));

    let before = rival.ask("list")?;
    let upstart = Stage::new()?;
    let mut command = program::command(&rival.director, &program::path()?, &["up", WIRE, "taken"]);
    let said: Said = command.env("XDPVS_INSTANCE", &upstart.instance).output()?.into();
    let line = format!(
        "xdpvs: taken already has another XDP program (id {taken}): detach it first, for example with `ip link set taken \
         xdp off`\n"
    );
    assert_eq!(said, Said { out: String::new(), err: line, code: Some(1) });
    assert!(!upstart.place().exists(), "nothing is left of an instance that could not be attached");
    assert_eq!(rival.ask("list")?, before);
    Ok(())
}

#[test]
fn nothing_can_be_asked_of_an_instance_that_does_not_run() -> Result<()> {
    let stage = Stage::new()?;
    let line = format!("instance `{}` is not running: start it with `xdpvs up IFACE`", stage.instance);
    let commands = [
        "down",
        "status",
        "list --json",
        "stats --json",
        "conn list --json",
        "conn flush",
        "timeout get",
        "timeout set 1 1 1",
        "service add -t 10.9.9.9:80",
        "service flush",
        "dest del -t 10.9.9.9:80 -r 10.2.0.11",
    ];
    all_refused(&stage, commands.map(|words| (words.to_owned(), line.clone(), 1)).to_vec())?;
    let status = stage.say("status --json")?;
    assert_eq!((status.err, status.code), (format!("xdpvs: {line}\n"), Some(1)));
    let answer: serde_json::Value = serde_json::from_str(&status.out)?;
    assert_eq!(answer, json!({"instance": stage.instance, "running": false}));
    let said = stage.say("ipvsadm -Ln")?;
    assert_eq!(said, Said { out: String::new(), err: format!("Can't initialize ipvs: {line}\n"), code: Some(2) });
    Ok(())
}

#[test]
fn an_instance_of_another_version_is_left_alone_until_it_is_ended() -> Result<()> {
    let stage = Stage::with_director()?;
    configure(&stage)?;
    let maps = Maps::open(&stage.place(), Access::Write)?;
    maps.instance[0].abi.store(abi::VERSION + 1);
    let line = format!(
        "instance `{}` was created by another version of xdpvs (map layout {}-{layout:08x}, this is {}-{layout:08x}): use \
         that version, or `xdpvs down` and `xdpvs up`, which ends all connections",
        stage.instance,
        abi::VERSION + 1,
        abi::VERSION,
        layout = abi::LAYOUT,
    );
    let up = format!("up {WIRE}");
    let commands = ["list", "status", "service flush", "conn list", "stats", up.as_str()];
    all_refused(&stage, commands.map(|words| (words.to_owned(), line.clone(), 1)).to_vec())?;
    maps.instance[0].abi.store(abi::VERSION);
    assert_eq!(stage.ask("list")?["services"][0]["address"], json!("10.9.9.9:80"));
    maps.instance[0].abi.store(abi::VERSION + 1);
    stage.ok("down")?;
    assert!(!stage.place().exists());
    Ok(())
}

/// A copy of the program where every user may execute it, removed when this is dropped.
struct Copied(std::path::PathBuf);

impl Copied {
    fn new() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("xdpvs-{}", std::process::id()));
        let copied = Self(path);
        // By a process of its own: while this one has the copy open for writing, another test may start a process that
        // has it open too, for a moment, and nobody can execute the copy then.
        let (from, to) = (program::path()?, copied.0.display().to_string());
        lab::run("install", &["--mode=755", &from.to_string_lossy(), &to])?;
        Ok(copied)
    }
}

impl Drop for Copied {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

#[test]
fn who_is_not_root_is_told_so() -> Result<()> {
    let stage = Stage::with_director()?;
    configure(&stage)?;
    let before = stage.ask("list")?;
    let copied = Copied::new()?;
    let nobody = |words: &str| -> Result<Said> {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all", "--"]).arg(&copied.0);
        command.args(words.split_whitespace()).env("XDPVS_INSTANCE", &stage.instance);
        Ok(command.output().context("start setpriv")?.into())
    };
    let line = "xdpvs: permission denied: xdpvs needs root (CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON)\n";
    for words in ["up lo", "down", "status", "list", "service flush", "conn flush", "stats", "timeout get"] {
        assert_eq!(nobody(words)?, Said { out: String::new(), err: line.into(), code: Some(1) }, "{words}");
    }
    let line = "Can't initialize ipvs: Permission denied (you must be root)\n";
    assert_eq!(nobody("ipvsadm -C")?, Said { out: String::new(), err: line.into(), code: Some(2) });
    assert_eq!(nobody("--version")?.code, Some(0));
    assert_eq!(stage.ask("list")?, before);
    Ok(())
}

#[test]
fn a_reader_that_goes_away_is_no_failure() -> Result<()> {
    let stage = Stage::with_director()?;
    for words in ["list", "status", "stats --json", "conn list", "ipvsadm -Ln"] {
        let command = stage.command(&words.split(' ').collect::<Vec<_>>())?;
        let mut pipeline = Command::new("sh");
        // The shell's own file descriptor 3 carries the exit code past the reader, which reads nothing.
        let script = "exec 3>&1; { \"$@\"; echo $? >&3; } | true";
        pipeline.args(["-c", script, "sh"]).arg(command.get_program()).args(command.get_args());
        let said: Said = pipeline.env("XDPVS_INSTANCE", &stage.instance).output()?.into();
        assert_eq!(said, Said { out: "0\n".into(), err: String::new(), code: Some(0) }, "{words}");
    }
    Ok(())
}

#[test]
fn what_xdpvs_does_not_do_yet_is_refused_by_name() -> Result<()> {
    let stage = Stage::with_director()?;
    configure(&stage)?;
    let before = stage.ask("list")?;
    for (words, what) in [
        ("-A -t 10.9.9.9:81 --pe sip", "persistence engines (--pe) are not supported by xdpvs yet"),
        (
            "-a -t 10.9.9.9:80 -r 10.2.0.13 -i --tun-type gre",
            "tunnels other than ipip (--tun-type) are not supported by xdpvs yet",
        ),
        ("--start-daemon master", "connection synchronisation (--start-daemon) is not supported by xdpvs yet"),
    ] {
        let expected = Said { out: String::new(), err: format!("{what}\n"), code: Some(255) };
        assert_eq!(stage.say(&format!("ipvsadm {words}"))?, expected, "{words}");
    }
    // What asks about such a thing learns that there is none.
    for (words, code, err) in [
        ("-D -f 7", 255, "No such service"),
        ("-E -f 7", 255, "No such service"),
        ("-a -f 7 -r 10.2.0.11", 255, "Service not defined"),
        ("-Ln -f 7", 1, "No such service"),
        ("--stop-daemon master", 255, "No daemon is running"),
    ] {
        let expected = Said { out: String::new(), err: format!("{err}\n"), code: Some(code) };
        assert_eq!(stage.say(&format!("ipvsadm {words}"))?, expected, "{words}");
    }
    assert_eq!(stage.ask("list")?, before);
    Ok(())
}

#[test]
fn sctp_services_are_named_and_saved_like_others() -> Result<()> {
    let stage = Stage::with_director()?;
    stage.ok("service add --sctp-service 10.9.9.9:99 -s rr")?;
    stage.ok("dest add --sctp-service 10.9.9.9:99 -r 10.2.0.11:9899 -m")?;
    stage.ok("dest edit --sctp-service 10.9.9.9:99 -r 10.2.0.11:9899 -m -w 3")?;
    let service = &stage.ask("list")?["services"][0];
    assert_eq!((&service["protocol"], &service["address"]), (&json!("sctp"), &json!("10.9.9.9:99")));
    assert_eq!(service["destinations"][0]["weight"], json!(3));
    stage.ok("conn flush --sctp-service 10.9.9.9:99")?;
    stage.ok("conn flush --service sctp:10.9.9.9:99")?;
    let saved = "-A --sctp-service 10.9.9.9:99 -s rr\n-a --sctp-service 10.9.9.9:99 -r 10.2.0.11:9899 -m -w 3\n";
    assert_eq!(stage.ok("ipvsadm -S -n")?, saved);
    stage.ok("service del --sctp-service 10.9.9.9:99")?;
    assert_eq!(stage.ask("list")?["services"], json!([]));
    Ok(())
}

#[test]
fn under_the_name_of_ipvsadm_it_is_ipvsadm() -> Result<()> {
    let stage = Stage::with_director()?;
    configure(&stage)?;
    let directory = std::env::temp_dir().join(format!("xdpvs-names-{}", std::process::id()));
    fs::create_dir_all(&directory)?;
    let link = directory.join("ipvsadm");
    let _ = fs::remove_file(&link);
    std::os::unix::fs::symlink(fs::canonicalize(program::path()?)?, &link)?;
    let run = |words: &[&str]| -> Result<Said> {
        let mut command = program::command(&stage.director, &link, words);
        Ok(command.env("XDPVS_INSTANCE", &stage.instance).output()?.into())
    };
    let (said, misused) = (run(&["-Ln"]), run(&["-n"]));
    fs::remove_dir_all(&directory)?;
    assert_eq!(
        said?.out,
        "IP Virtual Server version 1.2.1 (size=4096)\n\
         Prot LocalAddress:Port Scheduler Flags\n  \
           -> RemoteAddress:Port           Forward Weight ActiveConn InActConn\n\
         TCP  10.9.9.9:80 rr\n  \
           -> 10.2.0.11:8080               Masq    1      0          0         \n  \
           -> 10.2.0.12:80                 Route   3      0          0         \n"
    );
    let path = link.display();
    assert_eq!(misused?.err, format!("Try `{path} -h' or '{path} --help' for more information.\n"));
    Ok(())
}
