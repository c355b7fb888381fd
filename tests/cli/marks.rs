//! Mark rules and services of marks, as they are said and shown.

use std::{io::Write as _, process::Stdio};

use anyhow::{Context as _, Result};
use serde_json::json;

use crate::stage::{Said, Stage, WIRE};

/// Restores what `lines` say.
fn restore(stage: &Stage, lines: &str) -> Result<Said> {
    let mut command = stage.command(&["mark", "restore"])?;
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let mut input = child.stdin.take().context("standard input")?;
    // What has seen enough does not read the rest.
    let _ = input.write_all(lines.as_bytes());
    drop(input);
    Ok(child.wait_with_output()?.into())
}

#[test]
fn rules_are_listed_saved_and_restored() -> Result<()> {
    let stage = Stage::with_director()?;
    for words in [
        "mark add 7 --proto tcp --dst 10.9.9.0/24 --dport 80-89 --src 10.1.2.3/16",
        &format!("mark add 8 --proto any --dst 10.9.9.9 --iface {WIRE}"),
        "mark add 7 --proto sctp --dst fd00::/8 --dport 0",
    ] {
        assert_eq!(stage.ok(words)?, "", "{words}");
    }
    let rule = |mark: u32, protocol, destination, ports: [u16; 2], source: Option<&str>, interface: Option<&str>| {
        json!({
            "mark": mark, "protocol": protocol, "destination": destination, "ports": ports, "source": source,
            "interface": interface,
        })
    };
    let first = rule(7, "tcp", "10.9.9.0/24", [80, 89], Some("10.1.0.0/16"), None);
    let second = rule(8, "any", "10.9.9.9/32", [0, 65535], None, Some(WIRE));
    let third = rule(7, "sctp", "fd00::/8", [0, 0], None, None);
    assert_eq!(stage.ask("mark list")?, json!({"rules": [first, second, third]}));
    let shown = stage.ok("mark list")?;
    assert_eq!(shown.lines().count(), 4);
    assert!(shown.starts_with("Mark  Protocol  Destination"), "{shown}");
    let saved = stage.ok("mark save")?;
    assert_eq!(
        saved,
        format!(
            "mark add 7 --proto tcp --dst 10.9.9.0/24 --dport 80-89 --src 10.1.0.0/16\n\
             mark add 8 --proto any --dst 10.9.9.9/32 --dport 0-65535 --iface {WIRE}\n\
             mark add 7 --proto sctp --dst fd00::/8 --dport 0\n"
        )
    );
    stage.ok(&format!("mark del 8 --dst 10.9.9.9 --iface {WIRE}"))?;
    assert_eq!(stage.ask("mark list")?, json!({"rules": [first, third]}));
    stage.ok("mark flush")?;
    assert_eq!(stage.ask("mark list")?, json!({"rules": []}));
    assert_eq!(restore(&stage, &saved)?, Said { out: String::new(), err: String::new(), code: Some(0) });
    assert_eq!(stage.ok("mark save")?, saved);
    // The programs of the next version go on with the rules.
    stage.ok(&format!("up {WIRE}"))?;
    assert_eq!(stage.ok("mark save")?, saved);
    Ok(())
}

#[test]
fn what_is_wrong_with_a_rule_is_said_in_one_line_and_changes_nothing() -> Result<()> {
    let stage = Stage::with_director()?;
    stage.ok("mark add 7 --dst 10.9.9.9 --dport 80")?;
    let saved = stage.ok("mark save")?;
    for (words, line, code) in [
        (
            "mark add 8 --dst 10.9.9.9/32 --dport 80-80",
            "mark rule --proto any --dst 10.9.9.9/32 --dport 80 exists already, for mark 7: `xdpvs mark del` it first",
            1,
        ),
        (
            "mark del 8 --dst 10.9.9.9 --dport 80",
            "no mark rule --proto any --dst 10.9.9.9/32 --dport 80 for mark 8: see `xdpvs mark list`",
            1,
        ),
        (
            "mark add 8 --dst 10.9.9.9 --src fd00::1",
            "mark rule --proto any --dst 10.9.9.9/32 --dport 0-65535 --src fd00::1/128: source and destination are of one address \
             family",
            1,
        ),
        ("mark add 0 --dst 10.9.9.9", "invalid value '0' for '<N>': use a number from 1 to 4294967295", 2),
        (
            "mark add 8 --dst 10.9.9.9 --dport 90-80",
            "invalid value '90-80' for '--dport <PORT[-PORT]>': write 80-90, the lowest port first",
            2,
        ),
        (
            "mark add 8 --proto icmp --dst 10.9.9.9",
            "invalid value 'icmp' for '--proto <PROTO>': use tcp, udp, sctp or any",
            2,
        ),
        (
            "service add -t 10.9.9.9:80 -6",
            "the argument '--tcp-service <VIP:PORT>' cannot be used with '--ipv6': see `xdpvs --help`",
            2,
        ),
    ] {
        let Said { out, err, code: found } = stage.say(words)?;
        assert_eq!((out.as_str(), err, found), ("", format!("xdpvs: {line}\n"), Some(code)), "{words}");
    }
    let gone = stage.say("mark add 8 --dst 10.9.9.9 --iface nowhere")?;
    assert!(gone.code == Some(1) && gone.err.lines().count() == 1 && gone.err.contains("nowhere"), "{gone:?}");
    let wrong = restore(&stage, "mark add 9 --dst 10.0.0.0/8\nmark add 9 --dst 10.0.0.0/33\n")?;
    let line = "xdpvs: line 2: invalid value '10.0.0.0/33' for '--dst <ADDR[/LENGTH]>': use a length from 0 to 32\n";
    assert_eq!(wrong, Said { out: String::new(), err: line.to_owned(), code: Some(1) });
    assert_eq!(stage.ok("mark save")?, saved);
    Ok(())
}

/// As many rules as there is room for; one more is refused.
#[test]
fn there_is_room_for_thousands_of_rules() -> Result<()> {
    let stage = Stage::with_director()?;
    let line = |number: u32| {
        format!("mark add {} --proto tcp --dst 10.{}.{}.0/24 --dport 80\n", number + 1, number / 256, number % 256)
    };
    let saved: String = (0..4095).map(line).collect();
    assert_eq!(restore(&stage, &saved)?.code, Some(0));
    assert_eq!(stage.ok("mark save")?, saved);
    let full = stage.say("mark add 7 --dst 10.99.0.0/16")?;
    assert_eq!(
        (full.err.as_str(), full.code),
        (
            "xdpvs: an instance has room for 4095 mark rules: give one rule a wider prefix or port range instead of several\n",
            Some(1)
        )
    );
    assert_eq!(stage.ok("mark save")?, saved);
    Ok(())
}

#[test]
fn services_of_marks_are_shown_by_their_marks() -> Result<()> {
    let stage = Stage::with_director()?;
    for words in [
        "service add -f 7 -s rr",
        "service add --mark 8 -6 --ops",
        "dest add -f 7 -r 10.2.0.12:99 -m -w 2",
        "dest add -f 7 -r 10.2.0.11",
        "dest add -f 8 -6 -r fd00::11 -g",
        "service edit -f 7 -s wrr",
        "dest edit -f 7 -r 10.2.0.11 -w 3",
    ] {
        assert_eq!(stage.ok(words)?, "", "{words}");
    }
    let list = stage.ask("list")?;
    let names = |key: &str| [0, 1].map(|index| list["services"][index][key].clone());
    assert_eq!(names("mark"), [json!(7), json!(8)]);
    assert_eq!(names("family"), [json!("ipv4"), json!("ipv6")]);
    assert_eq!(list["services"][0]["destinations"][0]["address"], "10.2.0.11:0");
    assert_eq!(stage.ask("stats")?["services"][1]["mark"], 8);
    assert!(stage.ok("list")?.contains("mark 8 IPv6"));
    assert_eq!(
        stage.ok("ipvsadm -S -n")?,
        "-A -f 7 -s wrr\n\
         -a -f 7 -r 10.2.0.11:0 -g -w 3\n\
         -a -f 7 -r 10.2.0.12:99 -m -w 2\n\
         -A -f 8 -6 -s wlc -o\n\
         -a -f 8 -6 -r [fd00::11]:0 -g -w 1\n"
    );
    stage.ok("dest del -f 7 -r 10.2.0.11")?;
    stage.ok("zero -f 7")?;
    stage.ok("service del -f 8 -6")?;
    let again = stage.say("service add -f 7")?;
    assert_eq!(again.err, "xdpvs: service mark 7 exists already: use `xdpvs service edit` to change it\n");
    let other = stage.say("dest add -f 7 -r fd00::1")?;
    assert_eq!(other.err, "xdpvs: destination [fd00::1]:0: service mark 7 is IPv4, and so must its destinations be\n");
    Ok(())
}
