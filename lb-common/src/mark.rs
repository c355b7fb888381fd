//! Mark rules: which packets have which firewall mark.
//!
//! XDP programs run before netfilter, which gives packets marks for ip_vs. So the director has rules of its own. Of all rules
//! that are true of a packet, the one that was added first says its mark.
//!
//! There are two *banks* of rules, of which one is in force. A change writes the other one, and one store puts that in force:
//! see [`Marks`]. In a bank the rules stand in the order in which they were added, from index 1 on. Their destination prefixes
//! cut the addresses into pieces. A [`Start`] says where a piece begins, and which rule is the first of a chain of all those
//! whose destination prefix holds the piece. So the rules for an address are found by a binary search, and no others are
//! looked at.

use bytemuck::{Pod, Zeroable};

use crate::{
    abi::{Record, Word, record},
    addr::{Address, Port},
    proto::Protocol,
    sync::opaque,
};

/// Rules in a bank, of which the first is none: index 0 stands for no rule.
pub const RULES: u32 = 4096;
/// Starts of pieces of one address family in a bank: a rule makes two more at most, beside the one that begins at 0.
pub const STARTS: u32 = 2 * RULES;
/// Banks.
pub const BANKS: u32 = 2;
/// Address families.
pub const FAMILIES: u32 = 2;

record! {
    /// Which rules are in force.
    Marks, MarksRecord, 64 {
        /// How often rules have been put in force. The bank in force is the one with this number, modulo [`BANKS`].
        in_force: u32,
        /// What `in_force` was to be after the change that was last begun. A packet that finds it more than one ahead of what
        /// `in_force` was when it began may have read rules of two changes.
        begun: u32,
        /// Zero.
        reserved: [u32; 14],
    }
}

record! {
    /// A rule: what must be true of a packet for it to have the mark. The destination prefix is the business of the chain that
    /// the rule is in.
    Rule, RuleRecord, 128 {
        /// The source address without the bits that do not matter, as [`Address::halves`].
        source: [u64; 2],
        /// Which bits of the source address matter.
        source_mask: [u64; 2],
        /// The index of the next rule of the chain, counted over both banks; 0 when this is the last.
        next: u32,
        /// The mark; 0 in a slot without a rule.
        mark: u32,
        /// Number of the protocol; 0 for any.
        protocol: u32,
        /// The destination ports: the lowest in the low half, the highest in the high half, in host byte order.
        ports: u32,
        /// Index of the interface that packets come in by; 0 for any.
        ifindex: u32,
        /// Address family of the prefixes: 2 (IPv4) or 10 (IPv6).
        family: u32,
        /// Length of the destination prefix in bits 0-7, of the source prefix in bits 8-15.
        lengths: u32,
        /// Zero.
        reserved: u32,
        /// The destination prefix, as [`Address::halves`].
        destination: [u64; 2],
        /// The name of the interface when the rule was added, with zeros behind it.
        interface: [u64; 2],
        /// Zero.
        padding: [u64; 4],
    }
}

record! {
    /// Where a piece of the addresses begins that are covered by the same destination prefixes.
    Start, StartRecord, 32 {
        /// The first address, as [`Address::halves`].
        address: [u64; 2],
        /// The index of the first rule of its chain, counted over both banks; 0 when there is none.
        first: u32,
        /// Zero.
        reserved: [u32; 3],
    }
}

/// The index of the first rule of a bank.
#[inline(always)]
pub const fn first_rule(in_force: u32) -> u32 {
    in_force % BANKS * RULES
}

/// The index of the first start of an address family in a bank.
#[inline(always)]
pub const fn first_start(in_force: u32, family: u32) -> u32 {
    let second = if family == 10 { 1 } else { 0 };
    (in_force % BANKS * FAMILIES + second) * STARTS
}

/// What rules ask about a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Subject {
    /// The source address, as [`Address::halves`].
    source: [u64; 2],
    /// The destination port in host byte order in bits 0-15, the number of the protocol in bits 16-23.
    port_protocol: u32,
    /// Index of the interface that it came in by.
    ifindex: u32,
}

impl Subject {
    /// A packet of `protocol` from `source` to `port`, which came in by the interface with index `ifindex`.
    #[inline(always)]
    pub fn new(source: impl Address, port: Port, protocol: Protocol, ifindex: u32) -> Self {
        let port_protocol = u32::from(port.number()) | (protocol as u32) << 16;
        Self { source: source.halves(), port_protocol, ifindex }
    }
}

impl Rule {
    /// Whether the rule is true of a packet that its chain is for.
    ///
    /// Found out without a branch: what holds of which rule is as good as random, and the verifier would follow every case.
    #[inline(always)]
    pub fn is_true_of(&self, subject: &Subject) -> bool {
        let [high, low] =
            [0, 1].map(|half: usize| (subject.source[half] ^ self.source[half].load()) & self.source_mask[half].load());
        let only = |wanted: u32, found: u32| u64::from((wanted ^ found) & any_but_zero(wanted));
        let ports = self.ports.load();
        let port = u64::from(subject.port_protocol & 0xffff);
        // Negative, so that high bits are set, when the port is outside.
        let below = port.wrapping_sub(u64::from(ports & 0xffff)) >> 32;
        let above = u64::from(ports >> 16).wrapping_sub(port) >> 32;
        let differs = high
            | low
            | only(self.protocol.load(), subject.port_protocol >> 16)
            | only(self.ifindex.load(), subject.ifindex)
            | below
            | above;
        opaque(differs) == 0
    }
}

/// All ones, or 0 for 0.
#[inline(always)]
fn any_but_zero(value: u32) -> u32 {
    let spread = opaque(u64::from(value) | u64::from(value).wrapping_neg());
    (spread.cast_signed() >> 63) as u32
}

impl Start {
    /// 1 when the piece begins at `address` or before it, else 0.
    #[inline(always)]
    pub fn is_at_or_before(&self, address: [u64; 2]) -> u64 {
        let [high, low] = [0, 1].map(|half: usize| self.address[half].load());
        u64::from(opaque(high) < address[0]) | u64::from(high == address[0]) & u64::from(low <= address[1])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Ip4;

    fn rule(record: RuleRecord) -> Rule {
        let rule = Rule::zeroed();
        rule.store(&record);
        rule
    }

    #[test]
    fn a_rule_is_true_if_all_of_it_is() {
        let subject = Subject::new(Ip4::new([10, 1, 2, 3]), Port::new(80), Protocol::Tcp, 4);
        let any = RuleRecord { ports: 0xffff_0000, ..RuleRecord::zeroed() };
        let holds = |record| rule(record).is_true_of(&subject);
        assert!(holds(any));
        let exact = RuleRecord {
            source: [0, 0x0a01_0000],
            source_mask: [u64::MAX, 0xffff_ffff_ffff_0000],
            protocol: 6,
            ports: 80 << 16 | 80,
            ifindex: 4,
            ..any
        };
        assert!(holds(exact));
        assert!(holds(RuleRecord { ports: 90 << 16 | 70, ..exact }));
        for other in [
            RuleRecord { source: [0, 0x0a02_0000], ..exact },
            RuleRecord { source: [1, 0x0a01_0000], ..exact },
            RuleRecord { protocol: 17, ..exact },
            RuleRecord { ports: 79 << 16, ..exact },
            RuleRecord { ports: 0xffff_0000 | 81, ..exact },
            RuleRecord { ifindex: 5, ..exact },
        ] {
            assert!(!holds(other), "{other:?}");
        }
        let ends = |port| rule(any).is_true_of(&Subject::new(Ip4::new([0; 4]), Port::new(port), Protocol::Udp, 1));
        assert!(ends(0) && ends(0xffff));
    }

    #[test]
    fn pieces_are_in_the_order_of_addresses() {
        let start = Start::zeroed();
        start.store(&StartRecord { address: [5, 7], ..StartRecord::zeroed() });
        for (address, expected) in
            [([5, 7], 1), ([5, 6], 0), ([5, 8], 1), ([6, 0], 1), ([4, u64::MAX], 0), ([u64::MAX; 2], 1)]
        {
            assert_eq!(start.is_at_or_before(address), expected, "{address:?}");
        }
    }
}
