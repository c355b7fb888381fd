//! Packet cases: what a director is set to, which frames arrive, and what is to become of each of them and of every
//! counter.
//!
//! One table for all executors. Frames that shall leave are built like those that arrive, from scratch; nothing here
//! calls the code under test. A counter that a case does not name must not move.

use std::{
    fmt::{Display, Write as _},
    net::{Ipv4Addr, SocketAddr},
    ops::Range,
};

use lb_common::{
    abi::Config,
    proto::{Method, Scheduler},
    reason::Reason,
};
use lb_userspace::control::{
    change::Change,
    connections::Connection,
    model::{Rule, ServiceKey, Transport},
    settings as settings_of_ip_vs,
};

use crate::{
    cast,
    executor::{Counts, DestCounts, Executor, Verdict, Wire},
    family::{self, Family},
    frames::{ETHERNET, Frame, packet_of, with_id},
    world::{dest, scheduled},
};

mod errors;
mod foreign;
mod forwarding;
mod life;
mod marks;
mod persistence;
mod related;
mod sctp;
mod settings;
mod way;

/// Every case.
pub fn all() -> Vec<Case> {
    Family::ALL.into_iter().flat_map(of).collect()
}

/// Every case of a family.
fn of(family: Family) -> Vec<Case> {
    [
        forwarding::cases,
        way::cases,
        life::cases,
        errors::cases,
        foreign::cases,
        marks::cases,
        settings::cases,
        persistence::cases,
        related::cases,
        sctp::cases,
    ]
    .into_iter()
    .flat_map(|cases| cases(family))
    .collect()
}

/// A case.
pub struct Case {
    family: Family,
    name: String,
    steps: Vec<Step>,
}

/// What is done to the configuration.
type Plan = Box<dyn Fn(&mut Change<'_>) + Send>;
/// What is done to the settings; the second argument is the number of ticks per second.
type Setting = Box<dyn Fn(&Config, u32) + Send>;

enum Step {
    Change(Plan),
    Set(Setting),
    Setting(&'static str, String),
    Rules(Vec<Rule>),
    Forwarding(bool),
    Pass(u32),
    YoungSecond,
    /// What the timer does.
    Age,
    /// The timer ends so many connections and templates before their time.
    Thin(i64),
    /// The templates that there are then; or one of them.
    Templates(Vec<String>, Listed),
    /// Frames of which nothing is known but that they leave for one and the same destination, which is any.
    Together(Vec<Vec<u8>>),
    /// A frame of which nothing is known but that it leaves for a destination.
    Leaves(Vec<u8>),
    Arrive(Arrival),
}

/// How much of a list is known.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Listed {
    All,
    Among,
}

struct Arrival {
    wire: Wire,
    frame: Vec<u8>,
    verdict: Verdict,
    /// The frame as it leaves.
    out: Vec<u8>,
    /// Whether the identification of the frame that leaves is anything.
    any_id: bool,
    counts: Counts,
}

impl Step {
    /// Does what is to be done before the next frame arrives.
    fn prepare(&self, executor: &mut impl Executor) {
        match self {
            Self::Change(plan) => executor.change(plan.as_ref()),
            Self::Set(set) => {
                let shared = executor.shared();
                set(shared.config, shared.instance.hz.load());
            }
            Self::Setting(name, value) => {
                let setting = settings_of_ip_vs::Setting::named(name).expect("a setting");
                setting.set(&executor.shared(), value).expect("a value");
            }
            Self::Rules(rules) => {
                let mut rules = rules.clone();
                for interface in rules.iter_mut().filter_map(|rule| rule.matches.interface.as_mut()) {
                    let wire = Wire::ALL.into_iter().find(|wire| format!("{wire:?}") == interface.name);
                    interface.index = executor.ifindex(wire.expect("an interface of the director"));
                }
                lb_userspace::control::marks::put_in_force(&executor.shared(), &rules).expect("there is room");
            }
            Self::Forwarding(on) => executor.set_forwarding(*on),
            Self::Pass(seconds) => executor.pass(*seconds),
            Self::YoungSecond => executor.wait_for_a_young_second(),
            Self::Age | Self::Thin(_) => executor.age(),
            Self::Arrive(_) | Self::Templates(..) | Self::Together(_) | Self::Leaves(_) => {}
        }
    }
}

impl Case {
    /// A case in which nothing is configured yet.
    fn new(family: Family, name: impl Display) -> Self {
        Self { family, name: format!("{family:?}, {name}"), steps: Vec::new() }
    }

    /// The case's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The names of the reasons for which frames stop in the case.
    pub fn reasons(&self) -> impl Iterator<Item = &'static str> {
        let arrivals = self.steps.iter().filter_map(|step| match step {
            Step::Arrive(arrival) => Some(arrival),
            _ => None,
        });
        arrivals.flat_map(|arrival| arrival.counts.reasons.keys().copied())
    }

    /// The frames that arrive in the case.
    pub fn frames(&self) -> impl Iterator<Item = (Wire, &[u8])> {
        self.steps.iter().filter_map(|step| match step {
            Step::Arrive(arrival) => Some((arrival.wire, arrival.frame.as_slice())),
            _ => None,
        })
    }

    fn change(mut self, plan: impl Fn(&mut Change<'_>) + Send + 'static) -> Self {
        self.steps.push(Step::Change(Box::new(plan)));
        self
    }

    /// Adds a service at a port of [`cast::VIP`] by rr, and its destinations: number of the real server, port, method and
    /// weight.
    fn service(self, protocol: Transport, port: u16, dests: &[(u8, u16, Method, u32)]) -> Self {
        let (family, dests) = (self.family, dests.to_vec());
        self.change(move |change| {
            let key = family.service(protocol, port);
            change.add_service(key, scheduled(Scheduler::Rr)).expect("new");
            for &(index, port, method, weight) in &dests {
                change.add_dest(key, family.at(index, port), dest(method, weight)).expect("new");
            }
        })
    }

    /// Changes a setting; the second argument is the number of ticks per second.
    fn set(mut self, set: impl Fn(&Config, u32) + Send + 'static) -> Self {
        self.steps.push(Step::Set(Box::new(set)));
        self
    }

    /// Sets one of ip_vs's settings.
    fn setting(mut self, name: &'static str, value: impl ToString) -> Self {
        self.steps.push(Step::Setting(name, value.to_string()));
        self
    }

    /// Puts mark rules in the place of all that there are.
    fn rules(mut self, rules: Vec<Rule>) -> Self {
        self.steps.push(Step::Rules(rules));
        self
    }

    /// Sets whether the host forwards what comes from its loopback interface.
    fn forwarding(mut self, on: bool) -> Self {
        self.steps.push(Step::Forwarding(on));
        self
    }

    /// Lets time pass.
    fn pass(mut self, seconds: u32) -> Self {
        self.steps.push(Step::Pass(seconds));
        self
    }

    /// Waits until the limit of ICMP errors will not be renewed for a while.
    fn in_a_young_second(mut self) -> Self {
        self.steps.push(Step::YoungSecond);
        self
    }

    /// Lets the ageing timer go over the tables.
    fn age(mut self) -> Self {
        self.steps.push(Step::Age);
        self
    }

    /// Lets the ageing timer go over the tables, and thin out every bucket by `drop_entry`, which ends so many before their time.
    fn thins(mut self, ended: i64) -> Self {
        self.steps.push(Step::Thin(ended));
        self
    }

    /// The templates that there are, in the order of their lines: protocol, state, client, service and destination.
    fn shows<const N: usize>(mut self, templates: [&str; N]) -> Self {
        self.steps.push(Step::Templates(templates.map(str::to_owned).to_vec(), Listed::All));
        self
    }

    /// A template that is among those that there are.
    fn shows_one(mut self, template: &str) -> Self {
        self.steps.push(Step::Templates(vec![template.to_owned()], Listed::Among));
        self
    }

    /// Lets frames of clients arrive, which all go to the same destination without being stored.
    fn together(mut self, frames: Vec<Vec<u8>>) -> Self {
        self.steps.push(Step::Together(frames));
        self
    }

    /// Lets a frame of a client arrive, which goes to a destination.
    fn leaves(mut self, frame: Vec<u8>) -> Self {
        self.steps.push(Step::Leaves(frame));
        self
    }

    /// Lets a frame arrive by `wire`, of which becomes what the other arguments say.
    fn arrives(mut self, wire: Wire, frame: Vec<u8>, verdict: Verdict, out: Vec<u8>, counts: Counts) -> Self {
        self.steps.push(Step::Arrive(Arrival { wire, frame, verdict, out, any_id: false, counts }));
        self
    }

    /// Lets a frame arrive that is answered by an error, whose identification may be anything.
    fn answers(mut self, wire: Wire, frame: Vec<u8>, verdict: Verdict, out: Vec<u8>, counts: Counts) -> Self {
        self.steps.push(Step::Arrive(Arrival { wire, frame, verdict, out, any_id: true, counts }));
        self
    }

    /// Lets a frame arrive that stops where it is and as it is, for this reason.
    fn stops(self, wire: Wire, frame: Vec<u8>, reason: Reason) -> Self {
        let verdict = if Reason::passes(reason as u8) { Verdict::Pass } else { Verdict::Drop };
        let out = frame.clone();
        self.arrives(wire, frame, verdict, out, Counts::of(reason))
    }
}

impl Counts {
    /// Nothing.
    pub fn none() -> Self {
        Self::default()
    }

    /// One packet that is not forwarded for this reason.
    pub fn of(reason: Reason) -> Self {
        Self { reasons: [(reason.as_str(), 1)].into(), ..Self::default() }
    }

    /// One packet that is not forwarded for this reason, and an error for its sender.
    pub fn answered(reason: Reason) -> Self {
        Self { icmp_sent: 1, ..Self::of(reason) }
    }

    /// And this for real server number `index`.
    pub fn at(mut self, index: u8, counts: DestCounts) -> Self {
        self.dests.insert(cast::server(index), counts);
        self
    }
}

impl DestCounts {
    /// A packet of this frame from a client.
    fn input(frame: &[u8]) -> Self {
        Self { packets_in: 1, bytes_in: ip_len(frame), ..Self::default() }
    }

    /// A packet of this frame to a client.
    fn output(frame: &[u8]) -> Self {
        Self { packets_out: 1, bytes_out: ip_len(frame), ..Self::default() }
    }

    /// And a new connection that counts as active.
    fn opening_active(self) -> Self {
        Self { connections: 1, active: 1, ..self }
    }

    /// And a new connection that does not count as active.
    fn opening_inactive(self) -> Self {
        Self { connections: 1, inactive: 1, ..self }
    }

    /// And a connection that has become inactive.
    fn calming(self) -> Self {
        Self { active: self.active - 1, inactive: self.inactive + 1, ..self }
    }

    /// And an inactive connection that has ended.
    fn ending_inactive(self) -> Self {
        Self { inactive: self.inactive - 1, ..self }
    }

    /// And an active connection that has ended.
    fn ending_active(self) -> Self {
        Self { active: self.active - 1, ..self }
    }
}

/// Length of the IP packet in a frame.
fn ip_len(frame: &[u8]) -> i64 {
    let word = |offset| i64::from(u16::from_be_bytes([frame[ETHERNET + offset], frame[ETHERNET + offset + 1]]));
    match Family::of(frame) {
        Some(Family::Six) => Family::Six.header() as i64 + word(4),
        _ => word(2),
    }
}

/// Runs a case. What differs from what it expects is described in the error.
///
/// # Errors
///
/// When anything is not as it shall be.
pub fn run(case: &Case, executor: &mut impl Executor) -> Result<(), String> {
    executor.reset();
    let mut frames = 0;
    for step in &case.steps {
        let result = match step {
            Step::Arrive(arrival) => {
                frames += 1;
                arrive(arrival, executor)
            }
            Step::Templates(expected, listed) => list(expected, *listed, executor),
            Step::Together(frames) => together(frames, executor),
            Step::Leaves(frame) => leave(frame, executor).map(drop),
            Step::Thin(ended) => {
                let before = executor.counts().thinned;
                step.prepare(executor);
                let thinned = executor.counts().thinned - before;
                if thinned == *ended { Ok(()) } else { Err(format!("  {thinned} thinned out, expected {ended}")) }
            }
            _ => {
                step.prepare(executor);
                Ok(())
            }
        };
        result.map_err(|difference| format!("{}, {}, frame {frames}:\n{difference}", case.name, executor.name()))?;
        executor.audit().map_err(|error| format!("{}, {}: {error}", case.name, executor.name()))?;
    }
    Ok(())
}

/// Goes through a case without looking at what becomes of its frames, and calls `visit` before each of them arrives.
pub fn rehearse<E: Executor>(case: &Case, executor: &mut E, visit: &mut impl FnMut(&mut E, Wire, &[u8])) {
    executor.reset();
    for step in &case.steps {
        match step {
            Step::Arrive(arrival) => {
                visit(executor, arrival.wire, &arrival.frame);
                executor.arrive(arrival.wire, &arrival.frame);
            }
            Step::Together(frames) => {
                for frame in frames {
                    visit(executor, Wire::Outside, frame);
                    executor.arrive(Wire::Outside, frame);
                }
            }
            Step::Leaves(frame) => {
                visit(executor, Wire::Outside, frame);
                executor.arrive(Wire::Outside, frame);
            }
            _ => step.prepare(executor),
        }
    }
}

/// Compares the templates that there are with lines.
fn list(expected: &[String], listed: Listed, executor: &impl Executor) -> Result<(), String> {
    let connections = executor.reader().connections();
    let templates = connections.filter(|connection| connection.client.port() == 0);
    let mut found: Vec<String> = templates
        .map(|Connection { protocol, client, service, destination, state, .. }| {
            let protocol = protocol.map_or_else(|| "ip".to_owned(), |protocol| protocol.to_string());
            let end = |end: SocketAddr| format!("{}:{}", family::network_member(end.ip()), end.port());
            format!("{protocol} {state} {} {} {}", end(client), end(service), end(destination))
        })
        .collect();
    found.sort();
    let met = match listed {
        Listed::All => found == expected,
        Listed::Among => expected.iter().all(|line| found.contains(line)),
    };
    if met { Ok(()) } else { Err(format!("  templates {found:#?}, expected {expected:#?}")) }
}

/// Lets a frame of a client arrive. Returns the link-layer address that it leaves for.
fn leave(frame: &[u8], executor: &mut impl Executor) -> Result<Vec<u8>, String> {
    let outcome = executor.arrive(Wire::Outside, frame);
    if !INSIDE.is_met_by(outcome.verdict) {
        return Err(format!("  verdict {:?}", outcome.verdict));
    }
    Ok(outcome.frame[..6].to_vec())
}

fn together(frames: &[Vec<u8>], executor: &mut impl Executor) -> Result<(), String> {
    let before = executor.counts();
    let to = frames.iter().map(|frame| leave(frame, executor)).collect::<Result<Vec<_>, _>>()?;
    let counts = executor.counts().since(&before);
    if to.iter().any(|address| *address != to[0]) {
        return Err(format!("  left for {to:02x?}"));
    }
    let stateless = counts.stateless == frames.len() as i64;
    let stored = counts.dests.values().any(|dest| dest.connections != 0 || dest.templates != 0);
    if stateless && !stored { Ok(()) } else { Err(format!("  counted {counts:?}")) }
}

fn arrive(arrival: &Arrival, executor: &mut impl Executor) -> Result<(), String> {
    let before = executor.counts();
    let outcome = executor.arrive(arrival.wire, &arrival.frame);
    let counts = executor.counts().since(&before);
    let mut difference = String::new();
    if !arrival.verdict.is_met_by(outcome.verdict) {
        let _ = writeln!(difference, "  verdict {:?}, expected {:?}", outcome.verdict, arrival.verdict);
    }
    if counts != arrival.counts {
        let _ = writeln!(difference, "  counted {counts:?}\n expected {:?}", arrival.counts);
    }
    if matches!(outcome.verdict, Verdict::HandOver(..)) && outcome.frame[0] & 1 != 0 {
        let _ = writeln!(difference, "  handed over as if for a group, which the host does not send on");
    }
    let anonymous = |frame: &[u8]| {
        let mut frame = if arrival.any_id { with_id(frame, [0; 2]) } else { frame.to_vec() };
        if matches!(arrival.verdict, Verdict::HandOver(..)) {
            // The host writes the link-layer addresses.
            frame[..2 * 6].fill(0);
        }
        frame
    };
    if difference.is_empty() && anonymous(&outcome.frame) != anonymous(&arrival.out) {
        let _ = writeln!(difference, "     left {:02x?}\n expected {:02x?}", outcome.frame, arrival.out);
    }
    if difference.is_empty() { Ok(()) } else { Err(difference) }
}

const TCP: Transport = Transport::Tcp;
const UDP: Transport = Transport::Udp;
const SCTP: Transport = Transport::Sctp;
const METHODS: [Method; 3] = [Method::Masq, Method::Route, Method::Tunnel];

/// The service of most cases.
const PORT: u16 = 80;
/// The client's port in most cases.
const CLIENT_PORT: u16 = 40_000;

/// Link-layer addresses of what comes from and goes to the clients' router.
const FROM_CLIENT: ([u8; 6], [u8; 6]) = (cast::CLIENT_MAC, cast::DIRECTOR_OUTSIDE_MAC);
const TO_CLIENT: ([u8; 6], [u8; 6]) = (cast::DIRECTOR_OUTSIDE_MAC, cast::CLIENT_MAC);

/// Link-layer addresses of what goes to real server number `index`.
const fn to_server(index: u8) -> ([u8; 6], [u8; 6]) {
    (cast::DIRECTOR_INSIDE_MAC, cast::server_mac(index))
}

/// Link-layer addresses of what comes from real server number `index`.
const fn from_server(index: u8) -> ([u8; 6], [u8; 6]) {
    (cast::server_mac(index), cast::DIRECTOR_INSIDE_MAC)
}

impl Family {
    /// A frame of this family between these ends, as by [`Frame::new`].
    const fn frame(self, macs: ([u8; 6], [u8; 6]), from: (Ipv4Addr, u16), to: (Ipv4Addr, u16)) -> Frame {
        Frame { family: self, ..Frame::new(macs, from, to) }
    }

    /// What the client sends to the service.
    const fn request(self) -> Frame {
        self.frame(FROM_CLIENT, (cast::CLIENT, CLIENT_PORT), (cast::VIP, PORT))
    }

    /// What real server number 0 answers a client that it knows the address of.
    const fn reply(self) -> Frame {
        self.frame(from_server(0), (cast::server(0), PORT), (cast::CLIENT, CLIENT_PORT))
    }

    /// What the client is to get of [`Self::reply`].
    const fn translated_reply(self) -> Frame {
        Frame { ttl: 63, ..self.frame(TO_CLIENT, (cast::VIP, PORT), (cast::CLIENT, CLIENT_PORT)) }
    }

    /// The service of most cases.
    const fn key(self, protocol: Transport) -> ServiceKey {
        self.service(protocol, PORT)
    }
}

/// What `build` makes of a request when it is to leave for port `port` of real server number `index`.
fn forwarded(method: Method, index: u8, port: u16, request: Frame, build: impl Fn(Frame) -> Vec<u8>) -> Vec<u8> {
    let routed = Frame { macs: to_server(index), ttl: request.ttl - 1, ..request };
    match method {
        Method::Route => build(routed),
        Method::Masq => build(Frame { to: (cast::server(index), port), ..routed }),
        Method::Tunnel => {
            let inner = build(routed);
            let outer = Frame {
                from: (cast::DIRECTOR_INSIDE, 0),
                to: (cast::server(index), 0),
                // One that may be fragmented has the identification of the packet within.
                id: if request.dont_fragment || request.family == Family::Six { 0 } else { request.id },
                // Congestion is not copied out: RFC 6040, section 4.1, calls it the compatibility mode of 3168.
                ecn: if request.ecn == 3 { 2 } else { request.ecn },
                options: &[],
                ..routed
            };
            outer.packet(request.family.in_ip(), &inner[ETHERNET..])
        }
    }
}

/// To the real servers' side.
const INSIDE: Verdict = Verdict::redirect(Wire::Inside);
/// To the clients' side.
const OUTSIDE: Verdict = Verdict::redirect(Wire::Outside);

/// A case with one service, at [`PORT`], of real server number 0.
fn one(family: Family, name: impl Display, protocol: Transport, method: Method) -> Case {
    Case::new(family, name).service(protocol, PORT, &[(0, PORT, method, 1)])
}

/// What `build` makes of a request reaches real server number 0.
fn passes(case: Case, method: Method, request: Frame, build: impl Fn(Frame) -> Vec<u8>, counts: DestCounts) -> Case {
    let out = forwarded(method, 0, PORT, request, &build);
    case.arrives(Wire::Outside, build(request), INSIDE, out, Counts::none().at(0, counts))
}

/// A reply of real server number 0 reaches the client as `out`.
fn replies(case: Case, frame: Vec<u8>, out: Vec<u8>) -> Case {
    let counts = Counts::none().at(0, DestCounts::output(&frame));
    case.arrives(Wire::Inside, frame, OUTSIDE, out, counts)
}

/// What an ICMP error says.
#[derive(Clone, Copy)]
enum Says {
    /// There is no way to the host.
    HostUnreachable,
    /// Nobody serves the port.
    PortUnreachable,
    /// The TTL ran out in transit.
    TtlExpired,
    /// It ran out before all fragments were there.
    FragmentsMissing,
    /// The packet is larger than this many bytes.
    TooBig(u16),
}

impl Says {
    /// Type, code and the rest of the header (RFC 792, RFC 4443).
    fn header(self, family: Family) -> (u8, u8, [u8; 4]) {
        let (kind, code) = match (self, family) {
            (Self::HostUnreachable, Family::Four) => (3, 1),
            (Self::PortUnreachable, Family::Four) => (3, 3),
            (Self::TooBig(_), Family::Four) => (3, 4),
            (Self::TtlExpired, Family::Four) => (11, 0),
            (Self::FragmentsMissing, Family::Four) => (11, 1),
            (Self::HostUnreachable, Family::Six) => (1, 3),
            (Self::PortUnreachable, Family::Six) => (1, 4),
            (Self::TooBig(_), Family::Six) => (2, 0),
            (Self::TtlExpired, Family::Six) => (3, 0),
            (Self::FragmentsMissing, Family::Six) => (3, 1),
        };
        let rest = if let Self::TooBig(mtu) = self { u32::from(mtu) } else { 0 };
        (kind, code, rest.to_be_bytes())
    }
}

impl Frame {
    /// An error of the kernel's own about a frame has four bits of its type of service.
    fn of_the_class_of(self, about: &[u8]) -> Self {
        match self.family {
            Family::Four => {
                let kept = about[ETHERNET + 1] & 0x1e;
                Self { dscp: self.dscp | kept >> 2, ecn: self.ecn | kept & 3, ..self }
            }
            Family::Six => self,
        }
    }

    /// An ICMP error about `about`, an IP packet or its start.
    fn error(&self, says: Says, about: &[u8]) -> Vec<u8> {
        let (kind, code, rest) = says.header(self.family);
        self.icmp(kind, code, rest, about)
    }
}

/// The error that the director sends the client about a frame.
fn error_for_client(family: Family, says: Says, about: &[u8]) -> Vec<u8> {
    let quote = ip_len(about).min((family.error_max() - family.header() - 8) as i64) as usize;
    director_error(family).of_the_class_of(about).error(says, &about[ETHERNET..ETHERNET + quote])
}

/// The header of the errors that the director sends the client.
fn director_error(family: Family) -> Frame {
    let frame = family.frame(TO_CLIENT, (cast::VIP, 0), (cast::CLIENT, 0));
    // Internetwork control, as the host's own errors of IPv4.
    let dscp = if family == Family::Four { 0xc0 >> 2 } else { 0 };
    Frame { id: 0, dont_fragment: false, dscp, ..frame }
}

/// Where the checksum of a segment stands in a frame.
const fn checksum_place(family: Family, protocol: Transport) -> Range<usize> {
    let (offset, len) = match protocol {
        TCP => (16, 2),
        UDP => (6, 2),
        SCTP => (8, 4),
    };
    let start = ETHERNET + family.header() + offset;
    start..start + len
}

/// A frame with the checksum that another segment has. What is quoted of a segment that has been translated keeps its own.
fn with_checksum_of(mut frame: Vec<u8>, family: Family, protocol: Transport, other: &[u8]) -> Vec<u8> {
    let checksum = checksum_place(family, protocol);
    frame[checksum.clone()].copy_from_slice(&other[checksum]);
    frame
}
