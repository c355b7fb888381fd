//! `mark`: the rules that give packets marks.

use std::{
    io::{BufRead, stdin},
    num::NonZeroU32,
};

use clap::{Args, Parser, Subcommand};
use lb_userspace::{
    control::{
        marks,
        model::{Match, Prefix, Rule, RuleInterface, RuleProtocol},
        session::Session,
    },
    datapath::place::Place,
    netlink,
};
use serde::Serialize;

use crate::cli::{
    failure::Failure,
    output::{self, Form},
    words::{self, AnyOr},
};

/// What a saved rule begins with.
const ADD: &str = "mark add ";

/// What can be done to the rules. Of all that are true of a packet, the one that was added first says its mark.
#[derive(Subcommand, Debug)]
pub(crate) enum MarkCommand {
    /// Give packets a mark, unless an earlier rule does: those that all of this is true of
    Add(RuleWords),
    /// Remove the rule that these words added
    Del(RuleWords),
    /// Remove all rules
    Flush,
    /// Show the rules, in the order in which they were added
    List(Form),
    /// Print the rules in the form that `restore` takes
    Save,
    /// Put the rules on standard input in the place of all that there are
    Restore,
}

/// A rule.
#[derive(Args, Clone, Debug)]
pub(crate) struct RuleWords {
    /// The mark, 1 to 4294967295
    #[arg(value_name = "N", value_parser = words::mark)]
    mark: NonZeroU32,
    /// The protocol: tcp, udp, sctp or any
    #[arg(long = "proto", value_name = "PROTO", default_value = "any", value_parser = words::rule_protocol)]
    protocol: AnyOr,
    /// What the destination address is or begins like
    #[arg(long = "dst", value_name = "ADDR[/LENGTH]", value_parser = words::prefix)]
    destination: Prefix,
    /// The destination port, or the lowest and the highest
    #[arg(long = "dport", value_name = "PORT[-PORT]", default_value = "0-65535", value_parser = words::ports)]
    ports: (u16, u16),
    /// What the source address is or begins like
    #[arg(long = "src", value_name = "ADDR[/LENGTH]", value_parser = words::prefix)]
    source: Option<Prefix>,
    /// The interface that packets come in by
    #[arg(long = "iface", value_name = "IFACE")]
    interface: Option<String>,
}

/// A line of what is restored.
#[derive(Parser, Debug)]
#[command(no_binary_name = true)]
struct Line {
    #[command(flatten)]
    rule: RuleWords,
}

impl RuleWords {
    /// The rule; `known` are the rules that there are, whose interfaces may be gone.
    fn rule(self, known: &[Rule]) -> Result<Rule, Failure> {
        let Self { mark, protocol: AnyOr(protocol), destination, ports, source, interface } = self;
        let of_known = |name: &str| {
            let mut interfaces = known.iter().filter_map(|rule| rule.matches.interface.as_ref());
            interfaces.find(|interface| interface.name == name).cloned()
        };
        let interface = interface.map(|name| match netlink::interface(&name) {
            Ok(found) => Ok(RuleInterface { index: found.index, name }),
            Err(error) => of_known(&name).ok_or(error),
        });
        // Every address begins like one of which no bit counts.
        let source = source.filter(|source| source.length() != 0 || source.family() != destination.family());
        Ok(Rule { mark, matches: Match { protocol, destination, ports, source, interface: interface.transpose()? } })
    }
}

impl MarkCommand {
    /// Changes the rules, or shows them.
    pub(crate) fn run(self, place: &Place) -> Result<(), Failure> {
        match self {
            Self::Add(words) => {
                let rule = words.rule(&[])?;
                change(place, |rules| Ok(marks::add(rules, rule)?))
            }
            Self::Del(words) => change(place, |rules| {
                let rule = words.rule(rules)?;
                Ok(marks::remove(rules, &rule)?)
            }),
            Self::Flush => change(place, |rules| {
                rules.clear();
                Ok(())
            }),
            Self::List(form) => list(place, form),
            Self::Save => {
                let line = |rule: &Rule| format!("{ADD}{} {}\n", rule.mark, rule.matches);
                output::print(&in_force(place)?.iter().map(line).collect::<String>())
            }
            Self::Restore => {
                let restored = restored(stdin().lock())?;
                change(place, |rules| {
                    *rules = restored;
                    Ok(())
                })
            }
        }
    }
}

fn change(place: &Place, plan: impl FnOnce(&mut Vec<Rule>) -> Result<(), Failure>) -> Result<(), Failure> {
    let lock = place.lock()?;
    Session::open(place)?.change_marks(&lock, plan)
}

fn in_force(place: &Place) -> Result<Vec<Rule>, Failure> {
    Ok(marks::load(&Session::open(place)?.maps().shared()))
}

/// The rules in lines that `save` has written. Empty lines, and those that begin with `#`, say nothing.
fn restored(lines: impl BufRead) -> Result<Vec<Rule>, Failure> {
    let mut rules = Vec::new();
    for (number, line) in (1..).zip(lines.lines()) {
        let line = line.map_err(Failure::Input)?;
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let wrong = |why: String| Failure::Line { number, why };
        let words =
            line.strip_prefix(ADD).ok_or_else(|| wrong(format!("`{line}` does not begin with `{}`", ADD.trim())))?;
        let words = Line::try_parse_from(words.split_whitespace()).map_err(|error| wrong(output::one_line(&error)))?;
        let rule = words.rule.rule(&[]).map_err(|failure| wrong(failure.line()))?;
        marks::add(&mut rules, rule).map_err(|refusal| wrong(refusal.to_string()))?;
    }
    Ok(rules)
}

#[derive(Serialize)]
struct List {
    rules: Vec<Listed>,
}

#[derive(Serialize)]
struct Listed {
    mark: NonZeroU32,
    protocol: &'static str,
    destination: String,
    ports: [u16; 2],
    source: Option<String>,
    interface: Option<String>,
}

impl From<Rule> for Listed {
    fn from(Rule { mark, matches }: Rule) -> Self {
        let Match { protocol, destination, ports: (low, high), source, interface } = matches;
        Self {
            mark,
            protocol: protocol.map_or("any", RuleProtocol::as_str),
            destination: destination.to_string(),
            ports: [low, high],
            source: source.map(|source| source.to_string()),
            interface: interface.map(|interface| interface.name),
        }
    }
}

fn list(place: &Place, form: Form) -> Result<(), Failure> {
    form.print(&List { rules: in_force(place)?.into_iter().map(Listed::from).collect() }, text)
}

fn text(list: &List) -> String {
    let mut rows =
        vec![["Mark", "Protocol", "Destination", "Ports", "Source", "Interface"].map(str::to_owned).to_vec()];
    let or_any = |word: &Option<String>| word.clone().unwrap_or_else(|| "any".into());
    for Listed { mark, protocol, destination, ports: [low, high], source, interface } in &list.rules {
        let ports = match (low, high) {
            (0, &u16::MAX) => "any".to_owned(),
            _ if low == high => low.to_string(),
            _ => format!("{low}-{high}"),
        };
        let (source, interface) = (or_any(source), or_any(interface));
        rows.push(vec![mark.to_string(), (*protocol).to_owned(), destination.clone(), ports, source, interface]);
    }
    output::table(&rows, &[0])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_saved_is_restored() {
        let saved = "mark add 7 --proto tcp --dst 10.9.0.0/16 --dport 80-90 --src 10.1.0.0/16\n\
                     # and by IPv6\n\n\
                     mark add 4294967295 --proto any --dst fd00::/8 --dport 0-65535\n";
        let rules = restored(saved.as_bytes()).expect("rules");
        let written: Vec<String> = rules.iter().map(|rule| format!("{ADD}{} {}", rule.mark, rule.matches)).collect();
        let expected: Vec<&str> = saved.lines().filter(|line| line.starts_with(ADD)).collect();
        assert_eq!(written, expected);
        assert_eq!(restored(written.join("\n").as_bytes()).expect("rules"), rules);
    }

    #[test]
    fn what_is_no_rule_is_named_with_its_line() {
        for (lines, wrong) in [
            ("\nmark del 7", "line 2: `mark del 7` does not begin with `mark add`"),
            ("mark add 0 --dst 10.0.0.0/8", "line 1: invalid value '0' for '<N>': use a number from 1 to 4294967295"),
            (
                "mark add 7 --dst 10.0.0.1\nmark add 8 --dst 10.0.0.1",
                "line 2: mark rule --proto any --dst 10.0.0.1/32 --dport 0-65535 exists already, for mark 7: \
                 `xdpvs mark del` it first",
            ),
        ] {
            assert_eq!(restored(lines.as_bytes()).err().map(|failure| failure.line()), Some(wrong.to_owned()));
        }
    }
}
