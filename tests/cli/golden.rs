//! Replay of what the real ipvsadm said to the same commands, as far as xdpvs has what they are about.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Write as _,
    process::Stdio,
};

use anyhow::{Context as _, Result};

use crate::stage::{Said, Stage, WIRE};

const RECORDS: &str = include_str!("../golden/cli.txt");
/// Commands drawn by lot, good ones and bad ones, which need nothing that xdpvs lacks.
const RANDOM: &str = include_str!("../golden/commands.txt");

/// A command of the records and what it said.
#[derive(Debug)]
struct Record {
    line: usize,
    command: &'static str,
    stdin: Vec<&'static str>,
    out: Vec<&'static str>,
    err: Vec<&'static str>,
    code: i32,
}

impl Record {
    /// The words after the program's name, if the program is ipvsadm.
    fn words(&self) -> Option<Vec<&'static str>> {
        self.command.strip_prefix("ipvsadm").map(|words| words.split_whitespace().collect())
    }

    fn said(&self) -> Said {
        Said { out: lines(&self.out), err: lines(&self.err), code: Some(self.code) }
    }
}

fn records(text: &'static str) -> Vec<Record> {
    let mut records: Vec<Record> = Vec::new();
    for (line, text) in (1..).zip(text.lines()) {
        if let Some(command) = text.strip_prefix("$ ") {
            records.push(Record { line, command, stdin: vec![], out: vec![], err: vec![], code: -1 });
            continue;
        }
        let Some(record) = records.last_mut() else { continue };
        if let Some(code) = text.strip_prefix("= rc ") {
            record.code = code.parse().expect("an exit code");
        } else if record.code != -1 {
            assert!(text.is_empty() || text.starts_with("### "), "line {line} belongs to no command: {text}");
        } else if let Some(err) = text.strip_prefix("! ") {
            record.err.push(err);
        } else if let Some(input) = text.strip_prefix("< ") {
            record.stdin.push(input);
        } else {
            record.out.push(text);
        }
    }
    records
}

/// What xdpvs does not do yet, by the option that asks for it: a command that needs it is left out, and what the
/// records list of a service or destination made by such a command is not expected.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Lacking {
    /// `cat`: files of the kernel.
    ProcFile,
    /// A destination of another address family than the service.
    MixedFamilies,
    /// `--pe`.
    Engine,
    /// `--tun-type gue` and `gre`.
    TunnelType,
    /// A service that was made by a command left out, and so does not exist.
    MissingService,
}

/// The services and destinations that the records have and the replay has not.
#[derive(Default)]
struct Missing {
    services: BTreeSet<String>,
    dests: BTreeSet<(String, String)>,
}

/// The word after one of `options`.
fn after<'w>(words: &[&'w str], options: &[&str]) -> Option<&'w str> {
    let at = words.iter().position(|word| options.contains(word))?;
    words.get(at + 1).copied()
}

/// The service in the words of a command, as lists name it.
fn service(words: &[&str]) -> Option<String> {
    let named = |prefix: &str, options: &[&str]| after(words, options).map(|word| format!("{prefix} {word}"));
    named("TCP", &["-t"])
        .or_else(|| named("UDP", &["-u"]))
        .or_else(|| named("SCTP", &["--sctp-service"]))
        .or_else(|| named("FWM", &["-f"]))
}

/// The destination in the words of a command, as lists name it: at the service's port unless it is masqueraded.
fn dest(words: &[&str], service: &str) -> Option<String> {
    let server = after(words, &["-r"])?;
    let (_, port) = service.rsplit_once(':')?;
    let bare = if server.ends_with(']') { server } else { server.rsplit_once(':').map_or(server, |(host, _)| host) };
    let has_port = bare != server;
    Some(if words.contains(&"-m") && has_port { server.to_owned() } else { format!("{bare}:{port}") })
}

/// Whether the service in the words of a command and the destination are of different address families.
fn is_mixed(words: &[&str]) -> bool {
    let is_ipv6 = |word: &str| word.starts_with('[');
    let ends = after(words, &["-t", "-u"]).zip(after(words, &["-r"]));
    ends.is_some_and(|(service, server)| is_ipv6(service) != is_ipv6(server))
}

impl Missing {
    /// What the command needs that xdpvs has not.
    fn lacking(&self, words: &[&str]) -> Option<Lacking> {
        let has = |option| words.contains(&option);
        let service = service(words);
        let found = match () {
            () if is_mixed(words) => Lacking::MixedFamilies,
            () if has("--pe") => Lacking::Engine,
            () if matches!(after(words, &["--tun-type"]), Some("gue" | "gre")) => Lacking::TunnelType,
            () if service.is_some_and(|service| self.services.contains(&service)) => Lacking::MissingService,
            () => return None,
        };
        Some(found)
    }

    /// Notes what the records have from now on, and the replay has not.
    fn note(&mut self, words: &[&str], left_out: bool) {
        let Some(service) = service(words) else {
            if words.first() == Some(&"-C") {
                *self = Self::default();
            }
            return;
        };
        match words.first() {
            Some(&"-A") if left_out => {
                self.services.insert(service);
            }
            Some(&"-a") if left_out => self.dests.extend(dest(words, &service).map(|dest| (service, dest))),
            _ => {}
        }
    }

    /// What is left of a list, or of what `-S` prints.
    fn shown<'l>(&self, lines: &[&'l str]) -> Vec<&'l str> {
        let mut of = String::new();
        let mut shown = lines.to_vec();
        shown.retain(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words.as_slice() {
                ["TCP" | "UDP" | "SCTP" | "FWM", name, ..] => {
                    of = format!("{} {name}", words[0]);
                    !self.services.contains(&of)
                }
                ["->", dest, ..] => {
                    !self.services.contains(&of) && !self.dests.contains(&(of.clone(), (*dest).to_owned()))
                }
                ["-A" | "-a", ..] => {
                    let of = service(&words).unwrap_or_default();
                    let dest = after(&words, &["-r"]).unwrap_or_default();
                    !self.services.contains(&of) && !self.dests.contains(&(of, dest.to_owned()))
                }
                _ => true,
            }
        });
        shown
    }
}

/// Whether what ipvsadm said is about the words alone, so that it does not matter what they ask for.
fn is_about_words(record: &Record) -> bool {
    let popt = |line: &&str| line.ends_with(": unknown option") || line.ends_with(": missing argument");
    record.code == 2 || record.code == 255 && record.err.iter().any(popt)
}

/// Runs a command of the records. The machine they were taken on knew no names of hosts and services.
fn run(stage: &Stage, words: &[&str], stdin: &[&str]) -> Result<Said> {
    const WITHOUT_NAMES: &str = "for name in hosts services resolv.conf; do \
                                     [ ! -e /etc/$name ] || mount --bind /dev/null /etc/$name || exit 125; \
                                 done; exec \"$@\"";
    let xdpvs = stage.command(&[&["ipvsadm"], words].concat())?;
    let mut command = std::process::Command::new("unshare");
    command.args(["--mount", "sh", "-c", WITHOUT_NAMES, "sh"]).arg(xdpvs.get_program()).args(xdpvs.get_args());
    command.env("XDPVS_INSTANCE", &stage.instance);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().context("start unshare")?;
    let mut input = child.stdin.take().context("standard input")?;
    for line in stdin {
        // A command that has seen enough does not read the rest.
        let _ = writeln!(input, "{line}");
    }
    drop(input);
    Ok(child.wait_with_output()?.into())
}

fn lines(lines: &[&str]) -> String {
    lines.iter().map(|line| format!("{line}\n")).collect()
}

/// A list with its services in an order of their own, each with its destinations as they are.
fn by_service(list: &str) -> String {
    let mut blocks: Vec<String> = Vec::new();
    for line in list.lines() {
        match blocks.last_mut() {
            Some(block) if line.starts_with("  -> ") => *block += &format!("{line}\n"),
            _ => blocks.push(format!("{line}\n")),
        }
    }
    blocks.sort();
    blocks.concat()
}

#[test]
fn ipvsadm_says_what_it_says_to_ip_vs() -> Result<()> {
    let stage = Stage::new()?;
    stage.ok(&format!("up {WIRE} --max-flows 1000"))?;
    let mut missing = Missing::default();
    let mut left_out: BTreeMap<Lacking, usize> = BTreeMap::new();
    let (mut replayed, mut saved) = (0, Vec::new());
    for record in records(RECORDS) {
        let Some(words) = record.words() else {
            *left_out.entry(Lacking::ProcFile).or_default() += 1;
            if record.command == "cat /tmp/saved" {
                saved.clone_from(&record.out);
            }
            continue;
        };
        let mut expected = record.said();
        let (words, stdin) = if words.starts_with(&["-R", "<"]) {
            // Lines that ask for what is missing are left out, with what was said about each where they all failed.
            let mut kept = Vec::new();
            let mut said = Vec::new();
            for (index, line) in saved.iter().enumerate() {
                let words: Vec<&str> = line.split(' ').collect();
                let lacking = missing.lacking(&words);
                missing.note(&words, lacking.is_some());
                match lacking {
                    Some(lacking) => *left_out.entry(lacking).or_default() += 1,
                    None => {
                        kept.push(*line);
                        said.extend(record.err.get(index));
                    }
                }
            }
            assert!(record.err.is_empty() || record.err.len() == saved.len(), "line {}", record.line);
            expected.err = lines(&said);
            (vec!["-R"], kept)
        } else {
            let lacking = missing.lacking(&words).filter(|_| !is_about_words(&record));
            missing.note(&words, lacking.is_some());
            if let Some(lacking) = lacking {
                *left_out.entry(lacking).or_default() += 1;
                continue;
            }
            if record.stdin.first() == Some(&"# comment") {
                // What cleared the table here is not among the records, but the list behind shows that something did.
                assert_eq!(run(&stage, &["-C"], &[])?.code, Some(0));
                missing = Missing::default();
            }
            for line in &record.stdin {
                missing.note(&line.split(' ').collect::<Vec<_>>(), false);
            }
            (words, record.stdin.clone())
        };
        expected.out = lines(&missing.shown(&record.out));
        let mut said = run(&stage, &words, &stdin)?;
        if words.contains(&"--nosort") {
            // ip_vs lists services in the order of a hash table that is different on every boot.
            said.out = by_service(&said.out);
            expected.out = by_service(&expected.out);
        }
        assert_eq!(said, expected, "line {}: {}", record.line, record.command);
        replayed += 1;
    }
    let left_out: Vec<(Lacking, usize)> = left_out.into_iter().collect();
    assert_eq!(
        left_out,
        [(Lacking::ProcFile, 6), (Lacking::MixedFamilies, 4), (Lacking::Engine, 4), (Lacking::TunnelType, 6)]
    );
    assert_eq!(replayed, 141);
    Ok(())
}

#[test]
fn ipvsadm_says_the_same_to_random_commands() -> Result<()> {
    let stage = Stage::new()?;
    stage.ok(&format!("up {WIRE} --max-flows 1000"))?;
    let records = records(RANDOM);
    assert_eq!(records.len(), 873);
    for record in records {
        let words = record.words().context("a command of ipvsadm")?;
        assert_eq!(run(&stage, &words, &record.stdin)?, record.said(), "line {}: {}", record.line, record.command);
    }
    Ok(())
}
