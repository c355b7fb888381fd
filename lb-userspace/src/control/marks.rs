//! The mark rules: reading those in force, and putting others in force (see [`lb_common::mark`]).
//!
//! Rules are no part of the journal. All of them are written anew into the bank that is not in force, and one store puts that
//! in force: a process killed before has changed nothing, one killed after has changed everything.

use std::{collections::BTreeMap, num::NonZeroU32};

use bytemuck::Zeroable as _;
use lb_common::{
    abi::Record as _,
    addr::{Address, Ip4, Ip6},
    mark::{RULES, RuleRecord, STARTS, StartRecord, first_rule, first_start},
};

use crate::control::{
    model::{Family, Match, Prefix, Refusal, Rule, RuleInterface, RuleProtocol},
    shared::Shared,
};

/// Most rules of an instance.
pub const RULES_MAX: usize = RULES as usize - 1;

/// The rules in force, in the order in which they were added: those of one change, never a mixture.
pub fn load(shared: &Shared<'_>) -> Vec<Rule> {
    loop {
        let in_force = shared.marks.in_force.load();
        let bank = shared.mark_rules.iter().skip(first_rule(in_force) as usize).take(RULES as usize);
        let rules = bank.skip(1).map_while(|rule| read(&rule.load())).collect();
        if shared.marks.begun.load().wrapping_sub(in_force) <= 1 {
            return rules;
        }
    }
}

/// Puts `rules` in force, all of them or none. The caller holds the instance's lock.
///
/// # Errors
///
/// When there are too many, or one of them cannot be.
pub fn put_in_force(shared: &Shared<'_>, rules: &[Rule]) -> Result<(), Refusal> {
    if rules.len() > RULES_MAX {
        return Err(Refusal::RulesFull(RULES_MAX));
    }
    if let Some(Rule { matches, .. }) = rules.iter().find(|rule| !is_of_one_family(&rule.matches)) {
        return Err(Refusal::RuleFamilies(matches.clone().into()));
    }
    let next = shared.marks.in_force.load().wrapping_add(1);
    let first = first_rule(next);
    let mut records: Vec<RuleRecord> = rules.iter().map(record).collect();
    let starts = [Family::Ipv4, Family::Ipv6].map(|family| chain(&mut records, family, first));
    shared.marks.begun.store(next);
    let free = RuleRecord::zeroed();
    let slots = shared.mark_rules.iter().skip(first as usize).take(RULES as usize).skip(1);
    for (slot, record) in slots.zip(records.iter().chain(std::iter::repeat(&free))) {
        slot.store(record);
    }
    for (family, starts) in [Family::Ipv4, Family::Ipv6].into_iter().zip(starts) {
        let slots = shared.mark_starts.iter().skip(first_start(next, family.number()) as usize).take(STARTS as usize);
        // What is left over is behind every address.
        let last = starts.last().map_or(0, |start| start.first);
        let rest = StartRecord { address: [u64::MAX; 2], first: last, reserved: [0; 3] };
        for (slot, start) in slots.zip(starts.iter().chain(std::iter::repeat(&rest))) {
            slot.store(start);
        }
    }
    shared.marks.in_force.store(next);
    Ok(())
}

/// Adds a rule behind all others.
///
/// # Errors
///
/// When there is one for the same packets: this one would never say anything.
pub fn add(rules: &mut Vec<Rule>, rule: Rule) -> Result<(), Refusal> {
    if let Some(Rule { mark, matches }) = rules.iter().find(|known| known.matches == rule.matches) {
        return Err(Refusal::RuleExists(matches.clone().into(), *mark));
    }
    rules.push(rule);
    Ok(())
}

/// Removes a rule.
///
/// # Errors
///
/// When there is none like it.
pub fn remove(rules: &mut Vec<Rule>, rule: &Rule) -> Result<(), Refusal> {
    let Some(position) = rules.iter().position(|known| known == rule) else {
        return Err(Refusal::NoRule(rule.matches.clone().into(), rule.mark));
    };
    rules.remove(position);
    Ok(())
}

fn is_of_one_family(matches: &Match) -> bool {
    matches.source.is_none_or(|source| source.family() == matches.destination.family())
}

/// The first address of a prefix, as [`Address::halves`].
fn first_address(prefix: Prefix) -> [u64; 2] {
    match prefix.address() {
        std::net::IpAddr::V4(address) => Ip4::new(address.octets()).halves(),
        std::net::IpAddr::V6(address) => Ip6::new(address.octets()).halves(),
    }
}

/// Addresses of a family have this many bits.
const fn bits(family: Family) -> u8 {
    match family {
        Family::Ipv4 => 32,
        Family::Ipv6 => 128,
    }
}

const fn number([high, low]: [u64; 2]) -> u128 {
    (high as u128) << 64 | low as u128
}

const fn halves(number: u128) -> [u64; 2] {
    [(number >> 64) as u64, number as u64]
}

/// How many addresses of `family` follow the first with a prefix of this length.
const fn others(family: Family, length: u8) -> u128 {
    match 1u128.checked_shl((bits(family) - length) as u32) {
        Some(count) => count - 1,
        None => u128::MAX,
    }
}

fn record(rule: &Rule) -> RuleRecord {
    let Rule { mark, matches: Match { protocol, destination, ports: (low, high), source, interface } } = rule;
    let family = destination.family();
    let mask = |source: &Prefix| halves(!others(family, source.length()));
    let mut name = [0; 16];
    if let Some(RuleInterface { name: known, .. }) = interface {
        // Names of interfaces have fifteen bytes at most.
        name.iter_mut().zip(known.bytes()).for_each(|(kept, byte)| *kept = byte);
    }
    RuleRecord {
        source: source.map_or([0; 2], first_address),
        source_mask: source.as_ref().map_or([0; 2], mask),
        mark: mark.get(),
        protocol: protocol.map_or(0, |protocol| protocol as u32),
        ports: u32::from(*low) | u32::from(*high) << 16,
        ifindex: interface.as_ref().map_or(0, |interface| interface.index),
        family: family.number(),
        lengths: u32::from(destination.length()) | source.map_or(0, |source| u32::from(source.length())) << 8,
        destination: first_address(*destination),
        interface: bytemuck::cast(name),
        ..RuleRecord::zeroed()
    }
}

/// The rule in a slot, if it holds one.
fn read(record: &RuleRecord) -> Option<Rule> {
    let mark = NonZeroU32::new(record.mark)?;
    let address = |halves: [u64; 2]| match Family::from_number(record.family) {
        Family::Ipv4 => std::net::Ipv4Addr::from_bits(halves[1] as u32).into(),
        Family::Ipv6 => std::net::Ipv6Addr::from_bits(number(halves)).into(),
    };
    let name: [u8; 16] = bytemuck::cast(record.interface);
    let name = String::from_utf8_lossy(&name).trim_end_matches('\0').to_owned();
    let source = Prefix::new(address(record.source), (record.lengths >> 8) as u8);
    Some(Rule {
        mark,
        matches: Match {
            protocol: RuleProtocol::ALL.into_iter().find(|protocol| *protocol as u32 == record.protocol),
            destination: Prefix::new(address(record.destination), record.lengths as u8)?,
            ports: (record.ports as u16, (record.ports >> 16) as u16),
            source: source.filter(|_| record.source_mask != [0; 2]),
            interface: (record.ifindex != 0).then_some(RuleInterface { index: record.ifindex, name }),
        },
    })
}

/// Chains the rules of `family` together, of records that are to stand from index `first` + 1 on. Returns where the pieces of
/// the addresses begin, in order.
fn chain(records: &mut [RuleRecord], family: Family, first: u32) -> Vec<StartRecord> {
    // The rules of each destination prefix: a shorter one before those in it.
    let mut prefixes: BTreeMap<(u128, u8), Vec<usize>> = BTreeMap::new();
    for (index, record) in records.iter().enumerate().filter(|(_, record)| record.family == family.number()) {
        prefixes.entry((number(record.destination), record.lengths as u8)).or_default().push(index);
    }
    let mut starts: Vec<StartRecord> = Vec::new();
    let mut begin = |address: u128, first: u32| {
        let start = StartRecord { address: halves(address), first, reserved: [0; 3] };
        match starts.last_mut() {
            Some(last) if last.address == start.address => *last = start,
            Some(last) if last.first == first => {}
            _ => starts.push(start),
        }
    };
    begin(0, 0);
    // The prefixes that the address is in which the walk has come to, the shortest first: where each ends, and its chain.
    let mut open: Vec<(u128, u32)> = Vec::new();
    let enclosing = |open: &[(u128, u32)]| open.last().map_or(0, |(_, chain)| *chain);
    for ((address, length), rules) in prefixes {
        while let Some((end, _)) = open.pop_if(|(end, _)| *end < address) {
            begin(end + 1, enclosing(&open));
        }
        let mut next = enclosing(&open);
        for index in rules.into_iter().rev() {
            if let Some(record) = records.get_mut(index) {
                record.next = next;
                next = first + index as u32 + 1;
            }
        }
        begin(address, next);
        open.push((address + others(family, length), next));
    }
    while let Some((end, _)) = open.pop() {
        // Behind the last address there is nothing.
        if let Some(address) = end.checked_add(1) {
            begin(address, enclosing(&open));
        }
    }
    starts
}
