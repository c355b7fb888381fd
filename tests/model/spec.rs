//! What `docs/ipvs.md` says, as plainly as it can be written: lists, loops and divisions. Nothing of the product is used here.

use std::{collections::BTreeMap, net::SocketAddr};

use super::{
    mark::{Rule, mark_of},
    persistence::{FTP, Persistence, Template, TemplateId},
    schedule::{Change, Standing},
    states::{Direction, Flags, State, TIMEOUTS},
};

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

/// What tells services apart.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum ServiceKey {
    /// Packets to this address and port.
    At(Protocol, SocketAddr),
    /// Packets with this mark, of IPv6 or of IPv4.
    Mark { mark: u32, six: bool },
}

/// How a service is set.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct ServiceSpec {
    pub(crate) scheduler: &'static str,
    pub(crate) fallback: bool,
    pub(crate) with_port: bool,
    /// Every UDP packet is scheduled by itself.
    pub(crate) one_packet: bool,
    pub(crate) persistence: Option<Persistence>,
}

/// How a destination is set.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct DestSpec {
    pub(crate) method: Method,
    pub(crate) weight: u32,
    /// Thresholds; 0 for none.
    pub(crate) upper: u32,
    pub(crate) lower: u32,
}

impl DestSpec {
    /// The lower threshold that counts.
    fn effective_lower(&self) -> u32 {
        if self.lower != 0 { self.lower } else { self.upper - self.upper / 4 }
    }
}

/// A destination, linked to its service or removed from it.
#[derive(Clone, Debug)]
pub(crate) struct Dest {
    pub(crate) service: ServiceKey,
    /// Which of the services that have had this key.
    incarnation: u64,
    pub(crate) server: SocketAddr,
    pub(crate) spec: DestSpec,
    pub(crate) last_weight: u32,
    pub(crate) available: bool,
    pub(crate) overloaded: bool,
    /// When it was removed.
    removed: u64,
    pub(crate) active: u32,
    pub(crate) total: u32,
    pub(crate) templates: u32,
    /// Connections, packets and bytes in, packets and bytes out.
    pub(crate) counters: [u64; 5],
}

pub(crate) type DestId = usize;

#[derive(Clone, Debug)]
pub(crate) struct Service {
    incarnation: u64,
    pub(crate) spec: ServiceSpec,
    /// The newest first.
    pub(crate) dests: Vec<DestId>,
    pub(crate) standing: Standing,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Connection {
    pub(crate) protocol: Protocol,
    pub(crate) client: SocketAddr,
    /// The service's address and port, as the client knows them.
    pub(crate) service: SocketAddr,
    pub(crate) dest: DestId,
    pub(crate) method: Method,
    /// The port of the server.
    pub(crate) port: u16,
    pub(crate) state: State,
    pub(crate) inactive: bool,
    no_output: bool,
    /// What controls it.
    pub(crate) template: Option<TemplateId>,
    /// The tick at which its timer is to fire.
    pub(crate) expires: u64,
    /// The tick at which it does, which may be later.
    pub(crate) ends: u64,
}

/// A packet, as far as it matters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Packet {
    pub(crate) protocol: Protocol,
    pub(crate) from: SocketAddr,
    pub(crate) to: SocketAddr,
    /// The number of the interface by which it has come in.
    pub(crate) interface: u32,
    pub(crate) flags: Flags,
    /// Length of the IP packet in bytes.
    pub(crate) len: u64,
}

/// What becomes of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fate {
    /// It goes to this address and port by this method.
    To(SocketAddr, Method),
    /// Back to the client, from this address and port.
    ToClient(SocketAddr),
    /// Left to the host, which forwards it: a packet of a server that answers clients itself.
    Observed,
    /// Left to the host.
    Host,
    /// Dropped, because its destination has been removed.
    Removed,
    /// Dropped by `drop_packet`.
    Thinned,
    /// Dropped, and the client is told that the port is unreachable.
    Refused,
}

/// Section 9, as far as it matters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Settings {
    pub(crate) conn_reuse_mode: u32,
    pub(crate) sloppy_tcp: u32,
    pub(crate) expire_nodest_conn: u32,
    pub(crate) expire_quiescent_template: u32,
    /// 0 or 3: the other modes go by the memory that is left.
    pub(crate) secure_tcp: u32,
    /// Like `secure_tcp`.
    pub(crate) drop_packet: u32,
    pub(crate) am_droprate: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            conn_reuse_mode: 1,
            sloppy_tcp: 0,
            expire_nodest_conn: 0,
            expire_quiescent_template: 0,
            secure_tcp: 0,
            drop_packet: 0,
            am_droprate: 10,
        }
    }
}

/// The whole director.
#[derive(Debug)]
pub(crate) struct Director {
    pub(crate) now: u64,
    pub(crate) services: BTreeMap<ServiceKey, Service>,
    /// All that there have ever been.
    pub(crate) dests: Vec<Dest>,
    pub(crate) connections: Vec<Connection>,
    pub(crate) templates: Vec<Template>,
    /// How many there have been.
    pub(crate) template_ids: TemplateId,
    timeouts: BTreeMap<State, u64>,
    udp_timeout: u64,
    pub(crate) rules: Vec<Rule>,
    pub(crate) settings: Settings,
    /// What `drop_packet` counts down.
    until_drop: i64,
    incarnations: u64,
}

/// The first port that a process without privileges may have: `net.ipv4.ip_unprivileged_port_start`.
const UNPRIVILEGED: u16 = 1024;

/// Section 2.5: what becomes of a packet for a service that has no destination for it.
pub(crate) fn nobody(key: ServiceKey, packet: &Packet) -> Fate {
    match key {
        ServiceKey::At(_, address) if address.port() == FTP && packet.to.port() != FTP => Fate::Host,
        _ => Fate::Refused,
    }
}

/// For how long a removed destination is remembered at the least, in seconds: section 1.4.
const TRASH_S: u64 = 120;

/// Whether a service can be set so: one packet at a time is not for TCP, and all ports are for persistent services only.
fn is_possible(key: ServiceKey, spec: ServiceSpec) -> bool {
    match key {
        ServiceKey::At(TCP, _) if spec.one_packet => false,
        ServiceKey::At(_, address) if address.port() == 0 => spec.persistence.is_some(),
        _ => true,
    }
}

impl Director {
    pub(crate) fn new() -> Self {
        Self {
            now: 0,
            services: BTreeMap::new(),
            dests: Vec::new(),
            connections: Vec::new(),
            templates: Vec::new(),
            template_ids: 0,
            timeouts: TIMEOUTS.map(|(state, seconds)| (state, seconds * HZ)).into(),
            udp_timeout: 300 * HZ,
            rules: Vec::new(),
            settings: Settings::default(),
            until_drop: 0,
            incarnations: 0,
        }
    }

    /// Section 4.7; 0 leaves one as it is.
    pub(crate) fn set_timeouts(&mut self, tcp: u64, tcpfin: u64, udp: u64) {
        if tcp != 0 {
            self.timeouts.insert(State::Es, tcp * HZ);
        }
        if tcpfin != 0 {
            self.timeouts.insert(State::Fw, tcpfin * HZ);
        }
        if udp != 0 {
            self.udp_timeout = udp * HZ;
        }
    }

    // The configuration, section 1. Each of these returns whether it is done.

    pub(crate) fn add_service(&mut self, key: ServiceKey, spec: ServiceSpec) -> bool {
        if self.services.contains_key(&key) || !is_possible(key, spec) {
            return false;
        }
        self.incarnations += 1;
        let incarnation = self.incarnations;
        let service = Service { incarnation, spec, dests: Vec::new(), standing: Standing::default() };
        self.services.insert(key, service);
        self.init_scheduler(key);
        true
    }

    pub(crate) fn edit_service(&mut self, key: ServiceKey, spec: ServiceSpec) -> bool {
        let Some(service) = self.services.get_mut(&key).filter(|_| is_possible(key, spec)) else { return false };
        let before = std::mem::replace(&mut service.spec, spec);
        if before.scheduler != spec.scheduler {
            self.init_scheduler(key);
        }
        true
    }

    pub(crate) fn delete_service(&mut self, key: ServiceKey) -> bool {
        let Some(service) = self.services.remove(&key) else { return false };
        for dest in service.dests {
            self.discard(dest);
        }
        self.expire_removed();
        true
    }

    /// Section 1.4.
    fn discard(&mut self, dest: DestId) {
        self.dests[dest].available = false;
        self.dests[dest].removed = self.now;
    }

    pub(crate) fn linked(&self, key: ServiceKey, server: SocketAddr) -> Option<DestId> {
        self.services.get(&key)?.dests.iter().copied().find(|dest| self.dests[*dest].server == server)
    }

    /// The destination that was removed and would be the same if it were added now.
    pub(crate) fn trashed(&self, key: ServiceKey, server: SocketAddr) -> Option<DestId> {
        self.dests.iter().rposition(|dest| !dest.available && dest.service == key && dest.server == server)
    }

    /// Whether a removed destination may have been forgotten. Nobody can tell, for as long as the trash is swept now and then.
    pub(crate) fn may_be_forgotten(&self, dest: DestId) -> bool {
        let is_referred_to = self.connections.iter().any(|connection| connection.dest == dest)
            || self.templates.iter().any(|template| template.dest == dest);
        self.now >= self.dests[dest].removed + TRASH_S * HZ && !is_referred_to
    }

    // Thresholds, section 1.3.

    /// A connection more.
    fn bind(&mut self, dest: DestId) {
        let dest = &mut self.dests[dest];
        dest.total += 1;
        if dest.total == dest.spec.upper {
            dest.overloaded = dest.spec.upper != 0 && dest.total >= dest.spec.effective_lower();
        }
    }

    /// A connection less.
    fn unbind(&mut self, dest: DestId) {
        let dest = &mut self.dests[dest];
        dest.total -= 1;
        if dest.total + 1 == dest.spec.effective_lower() {
            dest.overloaded = dest.spec.upper != 0 && dest.total >= dest.spec.upper;
        }
    }

    /// Sets a destination. Thresholds count only if they are others than before.
    fn set_dest(&mut self, dest: DestId, spec: DestSpec) {
        let dest = &mut self.dests[dest];
        let before = std::mem::replace(&mut dest.spec, spec);
        if (before.upper, before.lower) == (spec.upper, spec.lower) {
            return;
        }
        if spec.upper == 0 || dest.total < spec.effective_lower() {
            dest.overloaded = false;
        } else if dest.total >= spec.upper {
            dest.overloaded = true;
        }
    }

    /// `old` is the destination that it was before, unless that has been forgotten.
    pub(crate) fn add_dest(
        &mut self,
        key: ServiceKey,
        server: SocketAddr,
        spec: DestSpec,
        old: Option<DestId>,
    ) -> Option<DestId> {
        let incarnation = self.services.get(&key)?.incarnation;
        if self.linked(key, server).is_some() || spec.lower > spec.upper {
            return None;
        }
        let dest = old.unwrap_or(self.dests.len());
        if old.is_none() {
            self.dests.push(Dest {
                service: key,
                incarnation,
                server,
                spec: DestSpec { upper: 0, lower: 0, ..spec },
                last_weight: 0,
                available: false,
                overloaded: false,
                removed: 0,
                active: 0,
                total: 0,
                templates: 0,
                counters: [0; 5],
            });
        }
        let added = &mut self.dests[dest];
        (added.available, added.last_weight) = (true, spec.weight);
        if added.incarnation != incarnation {
            (added.incarnation, added.counters) = (incarnation, [0; 5]);
        }
        self.set_dest(dest, spec);
        if let Some(service) = self.services.get_mut(&key) {
            service.dests.insert(0, dest);
        }
        self.dests_changed(key, Change::Added);
        Some(dest)
    }

    pub(crate) fn edit_dest(&mut self, key: ServiceKey, server: SocketAddr, spec: DestSpec) -> bool {
        let Some(dest) = self.linked(key, server).filter(|_| spec.lower <= spec.upper) else { return false };
        self.set_dest(dest, spec);
        if spec.weight != 0 {
            self.dests[dest].last_weight = spec.weight;
        }
        self.dests_changed(key, Change::Edited);
        true
    }

    pub(crate) fn delete_dest(&mut self, key: ServiceKey, server: SocketAddr) -> bool {
        let Some(dest) = self.linked(key, server) else { return false };
        self.discard(dest);
        let Some(service) = self.services.get_mut(&key) else { return false };
        let place = service.dests.iter().position(|other| *other == dest).unwrap_or(0);
        service.dests.remove(place);
        self.dests_changed(key, Change::Deleted(place));
        self.expire_removed();
        true
    }

    /// Section 4.8: what follows for connections when a destination is removed.
    fn expire_removed(&mut self) {
        if self.settings.expire_nodest_conn != 0 {
            for at in (0..self.connections.len()).rev() {
                if !self.dests[self.connections[at].dest].available {
                    self.end(at);
                }
            }
            self.expire_removed_templates();
        }
    }

    // Packets, section 4.

    /// A packet of a client or of a server.
    pub(crate) fn arrives(&mut self, packet: &Packet) -> Fate {
        match self.replies(packet).first() {
            Some(&at) => self.reply(at, packet),
            None => self.request(packet),
        }
    }

    /// A packet of a client.
    fn request(&mut self, packet: &Packet) -> Fate {
        let is_it = |connection: &Connection| {
            (connection.protocol, connection.client, connection.service) == (packet.protocol, packet.from, packet.to)
        };
        if let Some(at) = self.connections.iter().position(is_it) {
            if self.is_over_for(at, packet) {
                self.end(at);
            } else {
                return self.continues(at, packet);
            }
        }
        self.begins(packet)
    }

    /// Section 4.8: whether a packet of a connection is taken for one that begins another.
    fn is_over_for(&self, at: usize, packet: &Packet) -> bool {
        let Connection { state, no_output, dest, template, .. } = self.connections[at];
        let Settings { conn_reuse_mode, expire_nodest_conn, .. } = self.settings;
        let Dest { available, spec: DestSpec { weight, .. }, .. } = self.dests[dest];
        let begins = packet.protocol == TCP && packet.flags.syn;
        let ends = match state {
            State::Tw | State::Cl => conn_reuse_mode != 0,
            State::Fw => conn_reuse_mode & 2 != 0 && no_output,
            _ => false,
        };
        begins && ends && template.is_none() || expire_nodest_conn != 0 && (!available || begins && weight == 0)
    }

    /// A packet of a connection that is known.
    fn continues(&mut self, at: usize, packet: &Packet) -> Fate {
        let Connection { dest, method, port, .. } = self.connections[at];
        if !self.dests[dest].available {
            return Fate::Removed;
        }
        self.count(dest, 1, packet.len);
        self.step(at, packet.flags, false);
        Fate::To(SocketAddr::new(self.dests[dest].server.ip(), port), method)
    }

    /// Section 2.1: the service that a packet is for.
    fn service_of(&self, packet: &Packet) -> Option<ServiceKey> {
        let marked = mark_of(&self.rules, packet).map(|mark| ServiceKey::Mark { mark, six: packet.to.is_ipv6() });
        let at = |port| Some(ServiceKey::At(packet.protocol, SocketAddr::new(packet.to.ip(), port)));
        let may_be_data = packet.protocol == TCP && (packet.to.port() == 20 || packet.to.port() >= UNPRIVILEGED);
        let candidates = [marked, at(packet.to.port()), at(FTP).filter(|_| may_be_data), at(0)];
        candidates.into_iter().flatten().find(|key| self.services.contains_key(key))
    }

    /// Sections 2 and 4.9: a packet of no connection.
    fn begins(&mut self, packet: &Packet) -> Fate {
        if packet.protocol == TCP && (packet.flags.rst || !packet.flags.syn && self.settings.sloppy_tcp == 0) {
            return Fate::Host;
        }
        let Some(key) = self.service_of(packet) else { return Fate::Host };
        if self.is_thinned() {
            return Fate::Thinned;
        }
        if packet.from.port() == 20 {
            return Fate::Host;
        }
        let ServiceSpec { one_packet, persistence, .. } = self.services[&key].spec;
        let (dest, port, template) = match persistence {
            Some(persistence) => match self.persist(key, packet, persistence) {
                Ok((dest, template)) => (dest, self.persistent_port(key, packet, dest), Some(template)),
                Err(fate) => return fate,
            },
            None => {
                let is_other = matches!(key, ServiceKey::At(_, address) if address.port() != packet.to.port());
                let picked = if is_other { None } else { self.schedule(key, packet) };
                let Some(dest) = picked else { return nobody(key, packet) };
                match self.dests[dest].server.port() {
                    0 => (dest, packet.to.port(), None),
                    port => (dest, port, None),
                }
            }
        };
        if one_packet && packet.protocol == UDP {
            return self.pass_through(packet, dest, port);
        }
        self.open(packet, dest, port, template)
    }

    /// Section 4.12: a connection that ends with its first packet.
    fn pass_through(&mut self, packet: &Packet, dest: DestId, port: u16) -> Fate {
        let Dest { spec: DestSpec { method, .. }, server, .. } = self.dests[dest];
        self.bind(dest);
        self.dests[dest].counters[0] += 1;
        self.count(dest, 1, packet.len);
        self.unbind(dest);
        Fate::To(SocketAddr::new(server.ip(), port), method)
    }

    /// Section 4.11: whether a packet that would be scheduled is one of those that `drop_packet` drops.
    fn is_thinned(&mut self) -> bool {
        let Settings { drop_packet, am_droprate, .. } = self.settings;
        if drop_packet == 0 || am_droprate == 0 {
            return false;
        }
        self.until_drop -= 1;
        let is_thinned = self.until_drop <= 0;
        if is_thinned {
            self.until_drop = am_droprate.into();
        }
        is_thinned
    }

    /// Section 4.3: a new connection to a port of a destination.
    fn open(&mut self, packet: &Packet, dest: DestId, port: u16, template: Option<TemplateId>) -> Fate {
        let Dest { spec: DestSpec { method, .. }, server, .. } = self.dests[dest];
        self.connections.push(Connection {
            protocol: packet.protocol,
            client: packet.from,
            service: packet.to,
            dest,
            method,
            port,
            state: State::No,
            inactive: true,
            no_output: method != Method::Nat,
            template,
            expires: self.now,
            ends: self.now,
        });
        self.bind(dest);
        self.dests[dest].counters[0] += 1;
        self.count(dest, 1, packet.len);
        self.step(self.connections.len() - 1, packet.flags, false);
        Fate::To(SocketAddr::new(server.ip(), port), method)
    }

    /// The connections that a packet of a server may be of: section 4.2.
    fn replies(&self, packet: &Packet) -> Vec<usize> {
        let is_its = |connection: &Connection| {
            let sender = match connection.method {
                Method::Nat => SocketAddr::new(self.dests[connection.dest].server.ip(), connection.port),
                Method::Direct | Method::Tunnel => connection.service,
            };
            (connection.protocol, connection.client, sender) == (packet.protocol, packet.to, packet.from)
        };
        (0..self.connections.len()).filter(|at| is_its(&self.connections[*at])).collect()
    }

    /// Whether a packet of a server may be of several connections: which one depends on the order in a table.
    pub(crate) fn is_ambiguous(&self, packet: &Packet) -> bool {
        self.replies(packet).len() > 1
    }

    /// A packet of a server to a client.
    fn reply(&mut self, at: usize, packet: &Packet) -> Fate {
        let Connection { dest, service, method, .. } = self.connections[at];
        if self.dests[dest].available {
            self.count(dest, 3, packet.len);
        }
        self.step(at, packet.flags, true);
        if method == Method::Nat { Fate::ToClient(service) } else { Fate::Observed }
    }

    fn count(&mut self, dest: DestId, first: usize, len: u64) {
        self.dests[dest].counters[first] += 1;
        self.dests[dest].counters[first + 1] += len;
    }

    /// Sections 4.4 and 4.5: what a packet does to its connection.
    fn step(&mut self, at: usize, flags: Flags, output: bool) {
        let connection = &mut self.connections[at];
        let timeout = if connection.protocol == UDP {
            self.udp_timeout
        } else {
            let direction = match (output, connection.no_output) {
                (true, _) => Direction::Output,
                (false, true) => Direction::InputOnly,
                (false, false) => Direction::Input,
            };
            let next = connection.state.after(flags, direction, self.settings.secure_tcp != 0);
            let dest = &mut self.dests[connection.dest];
            if next != connection.state && connection.inactive == next.is_active() {
                connection.inactive = !next.is_active();
                dest.active = if next.is_active() { dest.active + 1 } else { dest.active - 1 };
            }
            connection.state = next;
            self.timeouts[&next]
        };
        let is_good = if connection.protocol == UDP { output } else { connection.state == State::Es };
        connection.expires = self.now + timeout;
        connection.ends = connection.expires;
        if output {
            connection.no_output = false;
        }
        if is_good {
            let template = connection.template;
            self.assure(template);
        }
    }

    fn end(&mut self, at: usize) {
        let connection = self.connections.remove(at);
        if !connection.inactive {
            self.dests[connection.dest].active -= 1;
        }
        self.unbind(connection.dest);
    }

    /// When the next timer fires.
    pub(crate) fn next_end(&self) -> Option<u64> {
        let connections = self.connections.iter().map(|connection| connection.ends);
        connections.chain(self.templates.iter().map(|template| template.expires)).min()
    }

    /// Lets time pass, at most until the next timer fires.
    pub(crate) fn pass(&mut self, until: u64) {
        self.now = until;
        while let Some(at) = self.connections.iter().position(|connection| connection.ends <= self.now) {
            self.end(at);
        }
        self.age_templates();
    }
}
