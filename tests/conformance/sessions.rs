//! Whole sessions drawn by lot: commands, settings and packets in any order, and what there is after each.
//!
//! A line that begins with `$` is a command of ipvsadm, with its exit code behind `#` if that is not 0; `set` is a setting, and
//! `mark` a rule that marks all packets to an address. `c` and `s` are IP packets from a client or a server, `>` one that
//! comes out, to the client or to a server by its number, or goes to the host itself. Of connections and destinations, only
//! those that have changed are listed, with `+`, or are gone, with `-`.

use std::{
    collections::BTreeMap,
    iter::Peekable,
    net::{IpAddr, Ipv4Addr},
    num::NonZeroU32,
};

use lb_common::abi::active_and_total;
use lb_userspace::control::{
    connections::Connection,
    marks,
    model::{ANY_PORT, Match, Prefix, Rule},
    settings::Setting,
    state::State,
};
use xdpvs_tests::{
    cast,
    executor::{Executor, Host, Kernel, Outcome, Verdict, Wire},
    frames::ETHERNET,
};

use crate::command::Command;

const RECORDS: &str = include_str!("../golden/sessions.txt");
/// Buckets of the flow tables.
const TABLE: u32 = 64;
/// How far the time until a connection expires may be from the recorded one, in seconds: timers are shown rounded down, and a
/// connection that has not changed is not listed again.
const SLACK_S: i64 = 5;

/// What there is, by what tells one from another.
#[derive(Clone, Debug, Default)]
struct Listed {
    connections: BTreeMap<String, Held>,
    dests: BTreeMap<String, String>,
}

/// What is said of a connection.
#[derive(Clone, Debug)]
struct Held {
    /// Its destination and state.
    said: String,
    /// Seconds until it expires.
    expires_s: i64,
}

impl Listed {
    fn of(executor: &impl Executor) -> Self {
        let mut listed = Self::default();
        for Connection { protocol, client, service, destination, state, expires, .. } in executor.reader().connections()
        {
            let protocol = protocol.map_or_else(|| "IP".to_owned(), |protocol| protocol.to_string().to_uppercase());
            let held = Held { said: format!("{destination} {state}"), expires_s: expires as i64 / 1000 };
            listed.connections.insert(format!("{protocol} {client} {service}"), held);
        }
        let shared = executor.shared();
        for dest in State::load(&shared).configured().iter().flat_map(|service| &service.dests) {
            let load = &shared.dest_loads[dest.number as usize];
            let (active, total) = active_and_total(load.connections.load());
            let said = format!("{:?} {} {active} {}", dest.spec.method, dest.spec.weight, total - active);
            listed.dests.insert(dest.address.to_string(), said);
        }
        listed
    }

    /// Takes a line that begins with `+` or `-`.
    fn take(&mut self, line: &str) {
        let (sign, rest) = line.split_at(2);
        let words: Vec<&str> = rest.split(' ').collect();
        match (sign, words.as_slice()) {
            ("+ ", [protocol, client, service, destination, state, expires]) => {
                let held =
                    Held { said: format!("{destination} {state}"), expires_s: expires.parse().expect("seconds") };
                self.connections.insert(format!("{protocol} {client} {service}"), held);
            }
            ("- ", [_, _, _]) => drop(self.connections.remove(rest)),
            ("+ ", [address, ..]) => {
                let said = rest[address.len() + 1..].to_owned();
                self.dests.insert((*address).to_owned(), said);
            }
            ("- ", [_]) => drop(self.dests.remove(rest)),
            _ => panic!("no line begins so: {line}"),
        }
    }

    fn is_like(&self, other: &Self) -> bool {
        let alike = |a: &Held, b: &Held| a.said == b.said && (a.expires_s - b.expires_s).abs() <= SLACK_S;
        self.dests == other.dests
            && self.connections.keys().eq(other.connections.keys())
            && self.connections.values().zip(other.connections.values()).all(|(a, b)| alike(a, b))
    }
}

/// A packet that comes out, or goes to the host.
fn shown(outcome: &Outcome) -> Option<String> {
    let Outcome { verdict, frame } = outcome;
    let packet = &frame[ETHERNET..];
    // The frame may be padded.
    let len = usize::from(u16::from_be_bytes([packet[2], packet[3]]));
    let mut packet = packet[..len].to_vec();
    hide_id(&mut packet);
    let to_server = (0..16).find(|index| frame[..6] == cast::server_mac(*index));
    let whom = match (verdict, to_server) {
        (Verdict::Drop, _) => return None,
        (Verdict::Pass, _) => return Some("host".to_owned()),
        (_, Some(index)) => format!("s{index}"),
        _ if frame[..6] == cast::CLIENT_MAC => "c".to_owned(),
        _ => panic!("{outcome:?}"),
    };
    Some(format!("{whom} {}", hex(&packet)))
}

/// Overwrites the identification, and with it the checksum, of a packet that the director has made: nobody knows it before.
fn hide_id(packet: &mut [u8]) {
    const MADE: [u8; 2] = [1, 4];
    if MADE.contains(&packet[9]) {
        packet[4..6].fill(0);
        packet[10..12].fill(0);
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn bytes(hex: &str) -> Vec<u8> {
    let digits = |at| u8::from_str_radix(&hex[at..at + 2], 16).expect("two digits");
    (0..hex.len()).step_by(2).map(digits).collect()
}

/// Lets a packet arrive from the wire that a word names.
fn arrive(executor: &mut impl Executor, from: &str, packet: &[u8]) -> Option<String> {
    let (wire, macs) = match from {
        "c" => (Wire::Outside, [cast::DIRECTOR_OUTSIDE_MAC, cast::CLIENT_MAC]),
        _ => (Wire::Inside, [cast::DIRECTOR_INSIDE_MAC, cast::server_mac(packet[15] - cast::server(0).octets()[3])]),
    };
    let frame = [macs.concat(), vec![8, 0], packet.to_vec()].concat();
    shown(&executor.arrive(wire, &frame))
}

/// Does what a line says. Returns whether what there is afterwards is recorded behind it.
fn act<'l>(
    executor: &mut impl Executor,
    line: &str,
    rest: &mut Peekable<impl Iterator<Item = (usize, &'l str)>>,
) -> bool {
    let (word, said) = line.split_once(' ').expect("words");
    match word {
        "$" => {
            let (command, code) =
                said.split_once(" # ").map_or((said, 0), |(command, code)| (command, code.parse().expect("a code")));
            let refused = std::cell::Cell::new(false);
            executor.change(&|change| refused.set(Command(command).apply(change, None).is_err()));
            assert_eq!(refused.get(), code != 0, "{command}");
        }
        "set" => {
            let (name, value) = said.split_once(' ').expect("a name and a value");
            Setting::named(name).and_then(|setting| setting.set(&executor.shared(), value)).expect("a setting");
            return false;
        }
        "mark" => {
            let (mark, address) = said.split_once(' ').expect("a mark and an address");
            let mark: NonZeroU32 = mark.parse().expect("a mark");
            let address: Ipv4Addr = address.parse().expect("an address");
            let destination = Prefix::new(IpAddr::V4(address), 32).expect("a prefix");
            let matches = Match { protocol: None, destination, ports: ANY_PORT, source: None, interface: None };
            marks::put_in_force(&executor.shared(), &[Rule { mark, matches }]).expect("room for a rule");
            return false;
        }
        from => {
            let found = arrive(executor, from, &bytes(said));
            let next = rest.next_if(|(_, line)| line.starts_with("> ")).map(|(_, line)| &line[2..]);
            let expected = next.map(|line| match line.split_once(' ') {
                Some((whom, packet)) => {
                    let mut packet = bytes(packet);
                    hide_id(&mut packet);
                    format!("{whom} {}", hex(&packet))
                }
                None => line.to_owned(),
            });
            // The host may have nothing to say.
            if expected.is_some() || found.as_deref() != Some("host") {
                assert_eq!(found, expected, "{line}");
            }
        }
    }
    true
}

fn replay_all(executor: &mut impl Executor) {
    let (mut sessions, mut steps) = (0, 0);
    let mut expected = Listed::default();
    let mut lines = (1..).zip(RECORDS.lines()).peekable();
    while let Some((number, line)) = lines.next() {
        if line.starts_with("=== ") {
            executor.reset();
            expected = Listed::default();
            sessions += 1;
            continue;
        }
        steps += 1;
        let compare = act(executor, line, &mut lines);
        while let Some((_, line)) = lines.next_if(|(_, line)| line.starts_with("+ ") || line.starts_with("- ")) {
            expected.take(line);
        }
        if compare {
            let found = Listed::of(executor);
            assert!(found.is_like(&expected), "line {number}: {line}\nfound {found:#?}\nexpected {expected:#?}");
        }
    }
    assert_eq!((sessions, steps), (42, 1662), "sessions and steps replayed");
}

#[test]
fn sessions_go_as_they_went_with_ip_vs_on_the_host() {
    replay_all(&mut Host::new(TABLE));
}

#[test]
fn sessions_go_as_they_went_with_ip_vs_in_the_kernel() {
    Kernel::with("sessions", TABLE, |kernel| replay_all(kernel)).expect("a director in the kernel");
}
