//! What `docs/ipvs.md` says, as plainly as it can be written: lists, loops and divisions. Nothing of the product is used here.

use std::collections::BTreeMap;

/// Ticks per second.
pub(crate) const HZ: u64 = 250;

/// A protocol: 6 or 17.
pub(crate) type Protocol = u8;
pub(crate) const TCP: Protocol = 6;
pub(crate) const UDP: Protocol = 17;

/// Forwarding methods.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Method {
    Nat,
    Direct,
    Tunnel,
}

/// States of section 4.4, in the order of their numbers. A UDP connection has the first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum State {
    No,
    Es,
    Ss,
    Sr,
    Fw,
    Tw,
    Cl,
    Cw,
    La,
    Li,
    Sa,
}

use State::{Cl, Cw, Es, Fw, La, Li, No, Sa, Sr, Ss, Tw};

/// Rows are states; columns are SYN, FIN, ACK, RST of the client, of the server, and of the client alone.
const TABLE: [(State, [State; 12]); 11] = [
    (No, [Sr, Cl, Es, Cl, Ss, Tw, Es, Cl, Sr, Cl, Es, Cl]),
    (Es, [Es, Cw, Es, Cl, Es, Fw, Es, Cl, Es, Fw, Es, Cl]),
    (Ss, [Es, Ss, Ss, Cl, Ss, Ss, Ss, Ss, Es, Ss, Ss, Cl]),
    (Sr, [Sr, Tw, Es, Sr, Sr, Tw, Es, Cl, Sr, Tw, Es, Sr]),
    (Fw, [Sr, Tw, Fw, Cl, Ss, Fw, Fw, Cl, Sr, Fw, Fw, Cl]),
    (Tw, [Sr, Tw, Tw, Cl, Ss, Tw, Tw, Tw, Sr, Tw, Tw, Cl]),
    (Cl, [Sr, Cl, Cl, Cl, Ss, Cl, Cl, Cl, Sr, Cl, Cl, Cl]),
    (Cw, [Sr, Cw, Cw, Cl, Ss, Tw, Cw, Cl, Sr, Cw, Cw, Cl]),
    (La, [Sr, La, Cl, La, Ss, La, La, Cl, Sr, La, Cl, La]),
    (Li, [Sr, Li, Li, Li, Li, Li, Es, Cl, Sr, Li, Li, Li]),
    (Sa, [Sr, Tw, Es, Sr, Sr, Tw, Es, Cl, Sr, Tw, Es, Cl]),
];

impl State {
    fn is_active(self) -> bool {
        matches!(self, Es | Ss | Sr | Sa)
    }
}

/// The flags of a segment that matter.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Flags {
    pub(crate) syn: bool,
    pub(crate) ack: bool,
    pub(crate) fin: bool,
    pub(crate) rst: bool,
}

/// What tells services apart, all at one address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct ServiceKey {
    pub(crate) protocol: Protocol,
    pub(crate) port: u16,
}

/// What tells the destinations of a service apart: number of the server, and port.
pub(crate) type Server = (u8, u16);

/// A client: number, and port.
pub(crate) type Client = (u8, u16);

/// A destination, linked to its service or removed from it.
#[derive(Clone, Debug)]
pub(crate) struct Dest {
    pub(crate) service: ServiceKey,
    /// Which of the services that have had this key.
    incarnation: u64,
    pub(crate) server: Server,
    pub(crate) method: Method,
    pub(crate) weight: u32,
    last_weight: u32,
    pub(crate) available: bool,
    pub(crate) active: u32,
    pub(crate) total: u32,
    /// Connections, packets and bytes in, packets and bytes out.
    pub(crate) counters: [u64; 5],
}

type DestId = usize;

#[derive(Clone, Debug)]
pub(crate) struct Service {
    incarnation: u64,
    pub(crate) scheduler: &'static str,
    pub(crate) fallback: bool,
    pub(crate) with_port: bool,
    /// The newest first.
    pub(crate) dests: Vec<DestId>,
    rr: Option<DestId>,
    wrr: Wrr,
    buckets: Vec<Option<DestId>>,
}

#[derive(Clone, Debug, Default)]
struct Wrr {
    current: Option<DestId>,
    threshold: u32,
    step: u32,
    top: u32,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Connection {
    pub(crate) service: ServiceKey,
    pub(crate) client: Client,
    pub(crate) dest: DestId,
    pub(crate) method: Method,
    pub(crate) port: u16,
    pub(crate) state: State,
    pub(crate) inactive: bool,
    no_output: bool,
    /// The tick at which its timer fires.
    pub(crate) expires: u64,
}

/// What becomes of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fate {
    /// It goes to this server.
    To(u8, Method, u16),
    /// Back to the client, from the service.
    ToClient,
    /// Left to the host.
    Host,
    Dropped,
    /// Dropped, and the client is told that the port is unreachable.
    Refused,
}

/// The whole director.
#[derive(Debug)]
pub(crate) struct Director {
    pub(crate) now: u64,
    pub(crate) services: BTreeMap<ServiceKey, Service>,
    /// All that there have ever been.
    pub(crate) dests: Vec<Dest>,
    pub(crate) connections: Vec<Connection>,
    timeouts: BTreeMap<State, u64>,
    udp_timeout: u64,
    pub(crate) reuse_mode: u32,
    incarnations: u64,
    /// The number that a server's address is, as a host-order word, and that of the service.
    pub(crate) address_of_server: fn(u8) -> u32,
    pub(crate) address_of_client: fn(u8) -> u32,
    pub(crate) address_of_service: u32,
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Section 3.0.
fn hash32(value: u32, bits: u32) -> usize {
    (value.wrapping_mul(0x61c8_8647) >> (32 - bits)) as usize
}

/// Section 3.11: SipHash-1-3 of a number, with both halves of the key alike.
fn sip(key: u64, x: u32) -> u64 {
    let mut v0 = 0x736f_6d65_7073_6575 ^ key;
    let mut v1 = 0x646f_7261_6e64_6f6d ^ key;
    let mut v2 = 0x6c79_6765_6e65_7261 ^ key;
    let mut v3 = 0x7465_6462_7974_6573 ^ key;
    let b = 4 << 56 | u64::from(x);
    v3 ^= b;
    for round in 0..4 {
        if round == 1 {
            v0 ^= b;
            v2 ^= 0xff;
        }
        v0 = v0.wrapping_add(v1);
        v1 = v1.rotate_left(13) ^ v0;
        v0 = v0.rotate_left(32);
        v2 = v2.wrapping_add(v3);
        v3 = v3.rotate_left(16) ^ v2;
        v0 = v0.wrapping_add(v3);
        v3 = v3.rotate_left(21) ^ v0;
        v2 = v2.wrapping_add(v1);
        v1 = v1.rotate_left(17) ^ v2;
        v2 = v2.rotate_left(32);
    }
    u64::from((v0 ^ v1 ^ v2 ^ v3) as u32)
}

const KEY_1: u64 = 2_654_435_761;
const KEY_2: u64 = 2_654_446_892;
/// Slots of a Maglev table.
const SLOTS: usize = 4093;

impl Director {
    /// With the numbers that the addresses of servers, of clients and of the services are.
    pub(crate) fn new(server: fn(u8) -> u32, client: fn(u8) -> u32, service: u32) -> Self {
        let seconds = [
            (No, 2),
            (Es, 900),
            (Ss, 120),
            (Sr, 60),
            (Fw, 120),
            (Tw, 120),
            (Cl, 10),
            (Cw, 60),
            (La, 30),
            (Li, 120),
            (Sa, 120),
        ];
        Self {
            now: 0,
            services: BTreeMap::new(),
            dests: Vec::new(),
            connections: Vec::new(),
            timeouts: seconds.map(|(state, seconds)| (state, seconds * HZ)).into(),
            udp_timeout: 300 * HZ,
            reuse_mode: 1,
            incarnations: 0,
            address_of_server: server,
            address_of_client: client,
            address_of_service: service,
        }
    }

    /// Section 4.7; 0 leaves one as it is.
    pub(crate) fn set_timeouts(&mut self, tcp: u64, tcpfin: u64, udp: u64) {
        if tcp != 0 {
            self.timeouts.insert(Es, tcp * HZ);
        }
        if tcpfin != 0 {
            self.timeouts.insert(Fw, tcpfin * HZ);
        }
        if udp != 0 {
            self.udp_timeout = udp * HZ;
        }
    }

    // The configuration, section 1. Each of these returns whether it is done.

    pub(crate) fn add_service(&mut self, key: ServiceKey, scheduler: &'static str, flags: (bool, bool)) -> bool {
        if self.services.contains_key(&key) {
            return false;
        }
        self.incarnations += 1;
        let service = Service {
            incarnation: self.incarnations,
            scheduler,
            fallback: flags.0,
            with_port: flags.1,
            dests: Vec::new(),
            rr: None,
            wrr: Wrr::default(),
            buckets: Vec::new(),
        };
        self.services.insert(key, service);
        self.init_scheduler(key);
        true
    }

    pub(crate) fn edit_service(&mut self, key: ServiceKey, scheduler: &'static str, flags: (bool, bool)) -> bool {
        let Some(service) = self.services.get_mut(&key) else { return false };
        (service.fallback, service.with_port) = flags;
        if service.scheduler != scheduler {
            service.scheduler = scheduler;
            self.init_scheduler(key);
        }
        true
    }

    pub(crate) fn delete_service(&mut self, key: ServiceKey) -> bool {
        let Some(service) = self.services.remove(&key) else { return false };
        for dest in service.dests {
            self.dests[dest].available = false;
        }
        true
    }

    fn linked(&self, key: ServiceKey, server: Server) -> Option<DestId> {
        self.services.get(&key)?.dests.iter().copied().find(|dest| self.dests[*dest].server == server)
    }

    /// Whether a destination that is not linked may have been forgotten, and may not: for as long as its trash is swept now and
    /// then, nobody can tell.
    pub(crate) fn may_be_forgotten(&self, key: ServiceKey, server: Server) -> bool {
        self.linked(key, server).is_none()
            && self.trashed(key, server).is_some_and(|dest| {
                let is_its = |connection: &Connection| connection.dest == dest;
                !self.connections.iter().any(is_its)
            })
    }

    fn trashed(&self, key: ServiceKey, server: Server) -> Option<DestId> {
        self.dests.iter().rposition(|dest| !dest.available && dest.service == key && dest.server == server)
    }

    pub(crate) fn add_dest(&mut self, key: ServiceKey, server: Server, method: Method, weight: u32) -> bool {
        let Some(incarnation) = self.services.get(&key).map(|service| service.incarnation) else { return false };
        if self.linked(key, server).is_some() {
            return false;
        }
        let forgotten = self.may_be_forgotten(key, server);
        let old = self.trashed(key, server).filter(|_| !forgotten);
        let dest = old.unwrap_or(self.dests.len());
        let kept = old.map(|old| self.dests[old].clone());
        let counters = kept.as_ref().filter(|old| old.incarnation == incarnation).map_or([0; 5], |old| old.counters);
        let added = Dest {
            service: key,
            incarnation,
            server,
            method,
            weight,
            last_weight: weight,
            available: true,
            active: kept.as_ref().map_or(0, |old| old.active),
            total: kept.as_ref().map_or(0, |old| old.total),
            counters,
        };
        if dest == self.dests.len() {
            self.dests.push(added);
        } else {
            self.dests[dest] = added;
        }
        if let Some(service) = self.services.get_mut(&key) {
            service.dests.insert(0, dest);
        }
        self.dests_changed(key, Change::Added);
        true
    }

    pub(crate) fn edit_dest(&mut self, key: ServiceKey, server: Server, method: Method, weight: u32) -> bool {
        let Some(dest) = self.linked(key, server) else { return false };
        let dest = &mut self.dests[dest];
        dest.method = method;
        dest.weight = weight;
        if weight != 0 {
            dest.last_weight = weight;
        }
        self.dests_changed(key, Change::Edited);
        true
    }

    pub(crate) fn delete_dest(&mut self, key: ServiceKey, server: Server) -> bool {
        let Some(dest) = self.linked(key, server) else { return false };
        self.dests[dest].available = false;
        let Some(service) = self.services.get_mut(&key) else { return false };
        let position = service.dests.iter().position(|other| *other == dest).unwrap_or(0);
        if service.rr == Some(dest) {
            service.rr = position.checked_sub(1).map(|before| service.dests[before]);
        }
        service.dests.remove(position);
        self.dests_changed(key, Change::Deleted);
        true
    }

    // The schedulers, section 3.

    fn init_scheduler(&mut self, key: ServiceKey) {
        let Some(service) = self.services.get_mut(&key) else { return };
        service.rr = None;
        service.buckets = Vec::new();
        let (step, top) = self.step_and_top(key);
        let wrr = Wrr { current: None, threshold: top, step, top };
        let buckets = self.fill(key);
        if let Some(service) = self.services.get_mut(&key) {
            (service.wrr, service.buckets) = (wrr, buckets);
        }
    }

    fn weights(&self, key: ServiceKey) -> Vec<u32> {
        let dests = self.services.get(&key).map_or(&[][..], |service| &service.dests);
        dests.iter().map(|dest| self.dests[*dest].weight).collect()
    }

    fn step_and_top(&self, key: ServiceKey) -> (u32, u32) {
        let weights = self.weights(key);
        let step = weights.iter().copied().fold(0, gcd).max(1);
        (step, weights.iter().copied().max().unwrap_or(0).saturating_sub(step - 1))
    }

    fn dests_changed(&mut self, key: ServiceKey, change: Change) {
        let (step, top) = self.step_and_top(key);
        let refill = match self.services.get(&key).map_or("", |service| service.scheduler) {
            "dh" => change != Change::Edited,
            "sh" | "mh" => true,
            _ => false,
        };
        let buckets = if refill { Some(self.fill(key)) } else { None };
        let Some(service) = self.services.get_mut(&key) else { return };
        if let Some(buckets) = buckets {
            service.buckets = buckets;
        }
        if service.scheduler == "wrr" {
            let wrr = &mut service.wrr;
            (wrr.current, wrr.step, wrr.top) = (None, step, top);
            if wrr.threshold > top || wrr.threshold == 0 {
                wrr.threshold = top;
            } else if step > 1 {
                wrr.threshold = wrr.threshold / step * step + 1;
            }
        }
    }

    fn fill(&self, key: ServiceKey) -> Vec<Option<DestId>> {
        let Some(service) = self.services.get(&key) else { return Vec::new() };
        let list = &service.dests;
        let turns: Vec<DestId> = match service.scheduler {
            "dh" => list.clone(),
            "sh" => {
                let times = |dest: &DestId| vec![*dest; self.dests[*dest].weight.clamp(1, 256) as usize];
                list.iter().flat_map(times).collect()
            }
            "mh" => return self.maglev(list),
            _ => return Vec::new(),
        };
        turns.iter().copied().cycle().take(if turns.is_empty() { 0 } else { 256 }).map(Some).collect()
    }

    fn maglev(&self, list: &[DestId]) -> Vec<Option<DestId>> {
        let common = list.iter().map(|dest| self.dests[*dest].last_weight).fold(0, gcd);
        if common == 0 {
            return Vec::new();
        }
        let greatest = list.iter().map(|dest| self.dests[*dest].last_weight).max().unwrap_or(0) / common;
        let shift = (32 - greatest.leading_zeros()).saturating_sub(6);
        let mut slots = vec![None; SLOTS];
        let mut positions: Vec<(usize, usize, u32)> = list
            .iter()
            .map(|dest| {
                let dest = &self.dests[*dest];
                let x = (self.address_of_server)(dest.server.0).wrapping_add(dest.server.1.into());
                let offset = sip(KEY_1, x) as usize % SLOTS;
                let skip = sip(KEY_2, x) as usize % (SLOTS - 1) + 1;
                let turns = if dest.last_weight == 0 { 0 } else { ((dest.last_weight / common) >> shift).max(1) };
                (offset, skip, turns)
            })
            .collect();
        let mut filled = 0;
        loop {
            for (dest, (position, skip, turns)) in list.iter().zip(&mut positions) {
                for _ in 0..*turns {
                    while slots[*position].is_some() {
                        *position = (*position + *skip) % SLOTS;
                    }
                    slots[*position] = Some(*dest);
                    filled += 1;
                    if filled == SLOTS {
                        return slots;
                    }
                }
            }
        }
    }

    fn usable(&self, dest: DestId) -> bool {
        self.dests[dest].weight > 0 && self.dests[dest].available
    }

    /// Connections of a destination as lc and wlc count them.
    fn overhead(&self, dest: DestId) -> u64 {
        let dest = &self.dests[dest];
        256 * u64::from(dest.active) + u64::from(dest.total)
    }

    fn schedule(&mut self, key: ServiceKey, client: Client) -> Option<DestId> {
        let service = self.services.get(&key)?.clone();
        let list = &service.dests;
        let usable: Vec<DestId> = list.iter().copied().filter(|dest| self.usable(*dest)).collect();
        let least = |overhead: &dyn Fn(DestId) -> u64, weighted: bool| {
            let mut best = *usable.first()?;
            for &dest in &usable {
                let weight = |dest: DestId| if weighted { u64::from(self.dests[dest].weight) } else { 1 };
                if overhead(best) * weight(dest) > overhead(dest) * weight(best) {
                    best = dest;
                }
            }
            Some(best)
        };
        let heaviest = |dests: &[DestId]| {
            let most = dests.iter().map(|dest| self.dests[*dest].weight).max()?;
            dests.iter().copied().find(|dest| self.dests[*dest].weight == most)
        };
        let active = |dest: DestId| u64::from(self.dests[dest].active);
        let picked = match service.scheduler {
            "rr" => {
                let start =
                    service.rr.and_then(|last| list.iter().position(|dest| *dest == last)).map_or(0, |at| at + 1);
                let picked =
                    (0..list.len()).map(|turn| list[(start + turn) % list.len()]).find(|dest| self.usable(*dest));
                if picked.is_some() {
                    self.services.get_mut(&key)?.rr = picked;
                }
                picked
            }
            "wrr" => {
                let (picked, wrr) = self.wrr(list, service.wrr);
                self.services.get_mut(&key)?.wrr = wrr;
                picked
            }
            "lc" => least(&|dest| self.overhead(dest), false),
            "wlc" => least(&|dest| self.overhead(dest), true),
            "sed" => least(&|dest| active(dest) + 1, true),
            "nq" => {
                let idle = usable.iter().copied().find(|dest| active(*dest) == 0);
                idle.or_else(|| least(&|dest| active(dest) + 1, true))
            }
            "fo" => heaviest(&usable),
            "ovf" => {
                let free = |dest: &DestId| self.dests[*dest].active <= self.dests[*dest].weight;
                heaviest(&usable.iter().copied().filter(free).collect::<Vec<_>>())
            }
            "dh" => service.buckets.get(hash32(self.address_of_service, 8)).copied().flatten(),
            "sh" | "mh" => self.hashed(&service, client),
            other => panic!("no scheduler {other}"),
        };
        picked.filter(|dest| self.usable(*dest))
    }

    fn wrr(&self, list: &[DestId], mut wrr: Wrr) -> (Option<DestId>, Wrr) {
        if wrr.top == 0 {
            return (None, wrr);
        }
        let last = wrr.current;
        let mut after = last.and_then(|last| list.iter().position(|dest| *dest == last)).map_or(0, |at| at + 1);
        let (mut stop, mut last_pass, mut restarted) = (None, false, false);
        loop {
            for &dest in &list[after..] {
                if self.dests[dest].weight >= wrr.threshold {
                    wrr.current = Some(dest);
                    return (Some(dest), wrr);
                }
                if Some(dest) == stop {
                    wrr.current = Some(dest);
                    return (None, wrr);
                }
            }
            after = 0;
            if wrr.threshold > wrr.step {
                wrr.threshold -= wrr.step;
            } else {
                wrr.threshold = wrr.top;
                if last_pass || last.is_none() {
                    wrr.current = None;
                    return (None, wrr);
                }
                restarted = true;
            }
            last_pass = wrr.threshold <= wrr.step;
            if last_pass && restarted && last.is_some() {
                stop = last;
            }
        }
    }

    fn hashed(&self, service: &Service, client: Client) -> Option<DestId> {
        let port = if service.with_port { u32::from(client.1) } else { 0 };
        let x = (self.address_of_client)(client.0).wrapping_add(port);
        let buckets = &service.buckets;
        if buckets.is_empty() {
            return None;
        }
        let probes: Vec<usize> = if service.scheduler == "sh" {
            let first = hash32(x, 8);
            [first].into_iter().chain((0..256).map(|k| (2 * first + k) % 256)).collect()
        } else {
            let slot = |off: u32| sip(KEY_1, x.wrapping_add(off)) as usize % SLOTS;
            let first = slot(0);
            [first].into_iter().chain((0..SLOTS).map(|k| slot(((k + first) % SLOTS) as u32))).collect()
        };
        let probes = if service.fallback { &probes[..] } else { &probes[..1] };
        probes.iter().map(|probe| buckets[*probe]).find_map(|dest| dest.filter(|dest| self.usable(*dest)))
    }

    // Packets, section 4.

    /// A packet of a client, of `len` bytes.
    pub(crate) fn request(&mut self, key: ServiceKey, client: Client, flags: Flags, len: u64) -> Fate {
        let is_it = |connection: &Connection| (connection.service, connection.client) == (key, client);
        if let Some(at) = self.connections.iter().position(is_it) {
            let connection = self.connections[at].clone();
            let mode = self.reuse_mode;
            let ends = connection.state == Tw
                || connection.state == Cl
                || mode & 2 != 0 && connection.state == Fw && connection.no_output;
            if key.protocol == TCP && flags.syn && mode != 0 && ends {
                self.end(at);
            } else {
                let dest = connection.dest;
                if !self.dests[dest].available {
                    return Fate::Dropped;
                }
                self.count(dest, 1, len);
                let fate = Fate::To(self.dests[dest].server.0, connection.method, connection.port);
                self.step(at, flags, false);
                return fate;
            }
        }
        if !self.services.contains_key(&key) || key.protocol == TCP && (flags.rst || !flags.syn) || client.1 == 20 {
            return Fate::Host;
        }
        let Some(dest) = self.schedule(key, client) else { return Fate::Refused };
        let Dest { method, server, .. } = self.dests[dest];
        let connection = Connection {
            service: key,
            client,
            dest,
            method,
            port: if server.1 == 0 { key.port } else { server.1 },
            state: No,
            inactive: true,
            no_output: method != Method::Nat,
            expires: self.now,
        };
        let fate = Fate::To(server.0, method, connection.port);
        self.connections.push(connection);
        self.dests[dest].total += 1;
        self.dests[dest].counters[0] += 1;
        self.count(dest, 1, len);
        self.step(self.connections.len() - 1, flags, false);
        fate
    }

    /// A packet of a server to a client, of a connection that is masqueraded.
    pub(crate) fn reply(&mut self, protocol: Protocol, server: Server, client: Client, flags: Flags, len: u64) -> Fate {
        let at = self.connections.iter().position(|connection| {
            let of = (connection.service.protocol, self.dests[connection.dest].server.0, connection.port);
            of == (protocol, server.0, server.1) && connection.client == client && connection.method == Method::Nat
        });
        let Some(at) = at else { return Fate::Host };
        let dest = self.connections[at].dest;
        if self.dests[dest].available {
            self.count(dest, 3, len);
        }
        self.step(at, flags, true);
        Fate::ToClient
    }

    fn count(&mut self, dest: DestId, first: usize, len: u64) {
        self.dests[dest].counters[first] += 1;
        self.dests[dest].counters[first + 1] += len;
    }

    fn step(&mut self, at: usize, flags: Flags, output: bool) {
        let connection = &mut self.connections[at];
        if connection.service.protocol == UDP {
            connection.expires = self.now + self.udp_timeout;
        } else {
            let event = match flags {
                Flags { rst: true, .. } => Some(3),
                Flags { syn: true, .. } => Some(0),
                Flags { fin: true, .. } => Some(1),
                Flags { ack: true, .. } => Some(2),
                _ => None,
            };
            let direction = if output { 4 } else { 8 * usize::from(connection.no_output) };
            let row = TABLE.iter().find(|(state, _)| *state == connection.state).map(|(_, row)| row);
            let next = event.and_then(|event| row.map(|row| row[direction + event])).unwrap_or(Cl);
            let dest = &mut self.dests[connection.dest];
            if next != connection.state && connection.inactive == next.is_active() {
                connection.inactive = !next.is_active();
                dest.active = if next.is_active() { dest.active + 1 } else { dest.active - 1 };
            }
            connection.state = next;
            connection.expires = self.now + self.timeouts[&next];
        }
        if output {
            connection.no_output = false;
        }
    }

    fn end(&mut self, at: usize) {
        let connection = self.connections.remove(at);
        let dest = &mut self.dests[connection.dest];
        dest.total -= 1;
        if !connection.inactive {
            dest.active -= 1;
        }
    }

    /// Lets time pass.
    pub(crate) fn pass(&mut self, ticks: u64) {
        self.now += ticks;
        while let Some(at) = self.connections.iter().position(|connection| connection.expires <= self.now) {
            self.end(at);
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Change {
    Added,
    Edited,
    Deleted,
}
