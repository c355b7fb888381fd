//! Mark rules: what they say of packets, how many of them are looked at, and what a killed process leaves of a change.

use std::{
    cell::Cell,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    num::NonZeroU32,
};

use lb_common::{
    abi::NextHop,
    addr::{Address, Ip4, Ip6, Port},
    crash,
    jiffies::Jiffies,
    mark::Subject,
    proto::Protocol,
    reason::Reason,
};
use lb_ebpf::{
    env::{Env, Scan},
    host::HostEnv,
    mark,
};
use lb_userspace::control::{
    marks,
    model::{ANY_PORT, Match, Prefix, Refusal, Rule, RuleInterface, RuleProtocol},
};
use proptest::{prelude::*, sample::select};
use xdpvs_tests::world::{HZ, World};

/// What rules are asked about.
#[derive(Clone, Copy, Debug)]
struct Packet {
    protocol: Protocol,
    source: IpAddr,
    destination: IpAddr,
    port: u16,
    ifindex: u32,
}

/// A kernel that counts the steps of scans.
struct Counting {
    kernel: HostEnv,
    steps: Cell<u32>,
}

impl Counting {
    fn new() -> Self {
        Self { kernel: HostEnv::new(HZ), steps: Cell::new(0) }
    }
}

struct Counted<'a, S>(&'a mut S, &'a Cell<u32>);

impl<S: Scan> Scan for Counted<'_, S> {
    fn hide(&mut self, hide: impl Fn(u64) -> u64) {
        self.0.hide(hide);
    }

    fn visit(&mut self, index: u32) -> bool {
        self.1.set(self.1.get() + 1);
        self.0.visit(index)
    }
}

impl Env for Counting {
    fn jiffies(&self) -> Jiffies {
        self.kernel.jiffies()
    }

    fn hz(&self) -> u32 {
        self.kernel.hz()
    }

    fn ingress(&self) -> u32 {
        self.kernel.ingress()
    }

    fn random(&self) -> u32 {
        self.kernel.random()
    }

    fn route<A: Address>(&self, destination: A, source: A, hop: &NextHop) -> Result<(), Reason> {
        self.kernel.route(destination, source, hop)
    }

    fn scan<S: Scan>(&self, count: u32, scan: &mut S) {
        self.kernel.scan(count, &mut Counted(scan, &self.steps));
    }
}

/// The mark that the data plane gives a packet, 0 for none.
fn found(world: &World, env: &impl Env, packet: Packet) -> u32 {
    fn of<A: Address>(world: &World, env: &impl Env, source: A, destination: A, packet: Packet) -> u32 {
        let subject = Subject::new(source, Port::new(packet.port), packet.protocol, packet.ifindex);
        mark::classify(&world.tables, env, destination, subject).expect("nobody changes the rules")
    }
    match (packet.source, packet.destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            of(world, env, Ip4::new(source.octets()), Ip4::new(destination.octets()), packet)
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            of(world, env, Ip6::new(source.octets()), Ip6::new(destination.octets()), packet)
        }
        _ => panic!("a packet of two families"),
    }
}

/// The mark that a packet has by the rules in their order, 0 for none.
fn expected(rules: &[Rule], packet: Packet) -> u32 {
    let is_for = |Match { protocol, destination, ports: (low, high), source, interface }: &Match| {
        protocol.is_none_or(|protocol| protocol as u8 == packet.protocol as u8)
            && destination.contains(packet.destination)
            && (*low..=*high).contains(&packet.port)
            && source.is_none_or(|source| source.contains(packet.source))
            && interface.as_ref().is_none_or(|interface| interface.index == packet.ifindex)
    };
    rules.iter().find(|rule| is_for(&rule.matches)).map_or(0, |rule| rule.mark.get())
}

/// Addresses that often share a prefix, at both ends of all there are, too.
fn address(six: bool) -> BoxedStrategy<IpAddr> {
    let octet = || select(vec![0u8, 1, 2, 127, 128, 254, 255]);
    if six {
        let ends = [octet(), octet(), octet(), octet()];
        let address =
            |[a, b, c, d]: [u8; 4]| IpAddr::V6(Ipv6Addr::from_octets([a, a, a, b, b, b, b, b, c, c, c, c, c, d, d, d]));
        ends.prop_map(address).boxed()
    } else {
        [octet(), octet(), octet(), octet()].prop_map(|octets| Ipv4Addr::from_octets(octets).into()).boxed()
    }
}

fn prefix(six: bool) -> BoxedStrategy<Prefix> {
    let longest = if six { 128 } else { 32u8 };
    let length = prop_oneof![Just(0), Just(longest), 0..=longest];
    (address(six), length).prop_map(|(address, length)| Prefix::new(address, length).expect("a length")).boxed()
}

fn port() -> impl Strategy<Value = u16> {
    select(vec![0, 1, 79, 80, 81, 443, 8000, 65_534, 65_535])
}

fn rule() -> impl Strategy<Value = Rule> {
    let protocol = select(vec![None, Some(RuleProtocol::Tcp), Some(RuleProtocol::Udp), Some(RuleProtocol::Sctp)]);
    let interface = prop::option::weighted(0.2, 1..4u32);
    let ports = prop_oneof![Just(ANY_PORT), (port(), port()).prop_map(|(a, b)| (a.min(b), a.max(b)))];
    let ends = any::<bool>().prop_flat_map(|six| {
        // Every address begins like one of which no bit counts: such a prefix is none.
        let source = prop::option::weighted(0.3, prefix(six).prop_filter("all", |source| source.length() != 0));
        (prefix(six), source)
    });
    (1..100u32, protocol, ports, ends, interface).prop_map(
        |(mark, protocol, ports, (destination, source), interface)| {
            let interface = interface.map(|index| RuleInterface { index, name: format!("eth{index}") });
            let mark = NonZeroU32::new(mark).expect("not 0");
            Rule { mark, matches: Match { protocol, destination, ports, source, interface } }
        },
    )
}

fn packet() -> impl Strategy<Value = Packet> {
    let ends = any::<bool>().prop_flat_map(|six| (address(six), address(six)));
    let protocol = select(vec![Protocol::Tcp, Protocol::Udp]);
    (protocol, ends, port(), 1..4u32).prop_map(|(protocol, (source, destination), port, ifindex)| Packet {
        protocol,
        source,
        destination,
        port,
        ifindex,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// The data plane finds what a look at one rule after the other finds, and what was put in force is read back.
    #[test]
    fn packets_have_the_mark_of_the_first_rule_that_is_true(
        changes in prop::collection::vec(prop::collection::vec(rule(), 0..40), 1..4),
        packets in prop::collection::vec(packet(), 100),
    ) {
        let world = World::default();
        for rules in &changes {
            marks::put_in_force(&world.shared(), rules).expect("there is room");
            prop_assert_eq!(&marks::load(&world.shared()), rules);
            for packet in &packets {
                prop_assert_eq!(found(&world, &world.env, *packet), expected(rules, *packet), "{:?}", packet);
            }
        }
    }
}

/// A rule for all packets that begin like `address` in `length` bits.
fn for_prefix(mark: u32, address: impl Into<IpAddr>, length: u8) -> Rule {
    let destination = Prefix::new(address.into(), length).expect("a length");
    let matches = Match { protocol: None, destination, ports: ANY_PORT, source: None, interface: None };
    Rule { mark: NonZeroU32::new(mark).expect("not 0"), matches }
}

fn to(destination: impl Into<IpAddr>, port: u16) -> Packet {
    let (destination, source) = (destination.into(), Ipv4Addr::new(10, 1, 0, 1));
    let source = if destination.is_ipv4() { source.into() } else { IpAddr::V6(source.to_ipv6_mapped()) };
    Packet { protocol: Protocol::Tcp, source, destination, port, ifindex: 1 }
}

/// As many rules as there can be, of which a packet only meets those whose destination prefix it is in.
#[test]
fn only_rules_for_the_address_are_looked_at() {
    let world = World::default();
    let host = |number: u32| Ipv4Addr::from_bits(0x0a00_0000 + number);
    let six = |number: u32| Ipv6Addr::from_bits((0xfd00 << 112) + u128::from(number));
    let hosts = (marks::RULES_MAX as u32 - 3) / 2;
    let mut rules: Vec<Rule> = (0..hosts).map(|number| for_prefix(number + 1, host(number), 32)).collect();
    rules.extend((0..hosts).map(|number| for_prefix(number + 1, six(number), 128)));
    rules.extend([for_prefix(9000, host(0), 8), for_prefix(9001, Ipv4Addr::UNSPECIFIED, 0)]);
    rules.push(for_prefix(9002, Ipv6Addr::UNSPECIFIED, 0));
    assert!(rules.len() > 4_000 && rules.len() <= marks::RULES_MAX);
    marks::put_in_force(&world.shared(), &rules).expect("there is room");
    let meets = |destination: IpAddr| {
        let env = Counting::new();
        (found(&world, &env, to(destination, 80)), env.steps.get())
    };
    for number in [0, 1, 1000, hosts - 1] {
        assert_eq!(meets(host(number).into()), (number + 1, 3));
        assert_eq!(meets(six(number).into()), (number + 1, 2));
    }
    assert_eq!(meets(host(hosts).into()), (9000, 2));
    assert_eq!(meets(Ipv4Addr::BROADCAST.into()), (9001, 1));
    assert_eq!(meets(Ipv6Addr::from_bits(u128::MAX).into()), (9002, 1));
    // The worst there can be: all of them are for one address.
    let port = |number: usize| number as u16 + 1;
    let rules: Vec<Rule> = (0..marks::RULES_MAX)
        .map(|number| {
            let mut rule = for_prefix(number as u32 + 1, host(0), 32);
            rule.matches.ports = (port(number), port(number));
            rule
        })
        .collect();
    marks::put_in_force(&world.shared(), &rules).expect("there is room");
    for number in [0, marks::RULES_MAX - 1] {
        let env = Counting::new();
        assert_eq!(found(&world, &env, to(host(0), port(number))), number as u32 + 1);
        assert_eq!(env.steps.get() as usize, marks::RULES_MAX);
    }
}

#[test]
fn rules_that_cannot_be_are_refused_and_change_nothing() {
    let world = World::default();
    let rules = vec![for_prefix(1, Ipv4Addr::LOCALHOST, 8)];
    marks::put_in_force(&world.shared(), &rules).expect("there is room");
    let many: Vec<Rule> =
        (0..=marks::RULES_MAX as u32).map(|number| for_prefix(1, Ipv4Addr::from_bits(number), 32)).collect();
    assert_eq!(marks::put_in_force(&world.shared(), &many), Err(Refusal::RulesFull(marks::RULES_MAX)));
    let mut mixed = for_prefix(2, Ipv6Addr::LOCALHOST, 128);
    mixed.matches.source = Prefix::new(Ipv4Addr::LOCALHOST.into(), 8);
    let refusal = Refusal::RuleFamilies(mixed.matches.clone().into());
    assert_eq!(marks::put_in_force(&world.shared(), &[mixed]), Err(refusal));
    assert_eq!(marks::load(&world.shared()), rules);
    let mut changed = rules.clone();
    let same = Rule { mark: NonZeroU32::new(5).expect("not 0"), ..rules[0].clone() };
    assert!(matches!(marks::add(&mut changed, same.clone()), Err(Refusal::RuleExists(_, mark)) if mark.get() == 1));
    assert!(matches!(marks::remove(&mut changed, &same), Err(Refusal::NoRule(_, mark)) if mark.get() == 5));
    assert_eq!(marks::remove(&mut changed, &rules[0]), Ok(()));
    assert_eq!(changed, []);
}

/// A process that is killed anywhere in a change leaves the rules of before or those of after, whole, for packets and for the
/// next command; and the next change is made as if nothing had been.
#[test]
fn a_killed_process_leaves_all_or_nothing() {
    let host = |last| Ipv4Addr::new(10, 9, 9, last);
    let before: Vec<Rule> = (0..20).map(|last| for_prefix(1, host(last), 32)).collect();
    let after: Vec<Rule> = (10..40).map(|last| for_prefix(2, host(last), 31)).collect();
    let packets: Vec<Packet> = (0..50).map(|last| to(host(last), 80)).collect();
    let attempt = |stores| {
        let world = World::default();
        marks::put_in_force(&world.shared(), &before).expect("there is room");
        let done = crash::after(stores, || marks::put_in_force(&world.shared(), &after).expect("there is room"));
        (world, done.is_some())
    };
    let (mut fewest, mut most) = (0, 1 << 20);
    assert!(attempt(most).1);
    while fewest < most {
        let middle = u64::midpoint(fewest, most);
        if attempt(middle).1 { most = middle } else { fewest = middle + 1 }
    }
    let stores = fewest;
    let strides = (0..stores).step_by(stores as usize / 40);
    for left in (0..5).chain(strides).chain(stores - 5..=stores) {
        let (world, done) = attempt(left);
        let rules = if done { &after } else { &before };
        assert_eq!(&marks::load(&world.shared()), rules, "{left} of {stores} stores");
        for packet in &packets {
            assert_eq!(found(&world, &world.env, *packet), expected(rules, *packet), "{left} of {stores} stores");
        }
        marks::put_in_force(&world.shared(), &before[..7]).expect("there is room");
        assert_eq!(marks::load(&world.shared()), before[..7]);
        assert_eq!(found(&world, &world.env, packets[6]), 1);
        assert_eq!(found(&world, &world.env, packets[7]), 0);
    }
}
