//! Persistence: section 6.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::{
    mark::bits,
    spec::{DestId, Director, Fate, HZ, Packet, Protocol, ServiceKey, nobody},
};

/// How the connections of a client go to one destination.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Persistence {
    /// In seconds.
    pub(crate) timeout: u64,
    /// In how many of the first bits the addresses agree that are taken for one client.
    pub(crate) bits: u8,
}

/// What tells templates apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct TemplateKey {
    /// 0 for all.
    pub(crate) protocol: Protocol,
    /// The network of clients.
    pub(crate) clients: IpAddr,
    /// The service's address, or the mark in place of it; and the port, or 0 for all.
    pub(crate) service: SocketAddr,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Template {
    pub(crate) key: TemplateKey,
    pub(crate) dest: DestId,
    /// The port of the destination, or 0.
    pub(crate) port: u16,
    /// No packet finds it any more.
    pub(crate) retired: bool,
    pub(crate) assured: bool,
    /// In ticks.
    timeout: u64,
    /// The tick at which its timer fires.
    pub(crate) expires: u64,
    /// What tells it from all others that there have been.
    pub(crate) id: TemplateId,
}

pub(crate) type TemplateId = u64;

/// After how many seconds a template is looked at again that is over but controls connections: section 4.10.
const RETRY_S: u64 = 60;

/// The first bits of an address.
fn network(address: IpAddr, length: u8) -> IpAddr {
    let bits = bits(address);
    let kept = |at: usize| u8::from(at < length.into() && bits[at]);
    let octet = |at: usize| (0..8).fold(0, |octet, bit| octet << 1 | kept(8 * at + bit));
    match address {
        IpAddr::V4(_) => Ipv4Addr::from(std::array::from_fn::<u8, 4, _>(octet)).into(),
        IpAddr::V6(_) => Ipv6Addr::from(std::array::from_fn::<u8, 16, _>(octet)).into(),
    }
}

/// A mark as templates have it: its four bytes at the beginning of an address.
fn address_of_mark(mark: u32, six: bool) -> IpAddr {
    let [a, b, c, d] = mark.to_be_bytes();
    if six { Ipv6Addr::from([a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).into() } else { [a, b, c, d].into() }
}

/// The port that has no service of its own for data connections.
pub(crate) const FTP: u16 = 21;

impl Director {
    /// Section 6.1. Also whether the template is for one port.
    fn template_key(&self, key: ServiceKey, packet: &Packet, bits: u8) -> (TemplateKey, bool) {
        let clients = network(packet.from.ip(), bits);
        match key {
            ServiceKey::Mark { mark, six } => {
                let service = SocketAddr::new(address_of_mark(mark, six), 0);
                (TemplateKey { protocol: 0, clients, service }, false)
            }
            ServiceKey::At(protocol, address) => {
                let of_one_port = address.port() == packet.to.port() && address.port() != FTP;
                let port = if of_one_port { packet.to.port() } else { 0 };
                let service = SocketAddr::new(packet.to.ip(), port);
                (TemplateKey { protocol, clients, service }, of_one_port)
            }
        }
    }

    /// Section 6.2: the destination for a packet that begins a connection with a persistent service, and the template that
    /// says so.
    pub(crate) fn persist(
        &mut self,
        key: ServiceKey,
        packet: &Packet,
        persistence: Persistence,
    ) -> Result<(DestId, TemplateId), Fate> {
        let (template_key, of_one_port) = self.template_key(key, packet, persistence.bits);
        let is_it = |template: &Template| !template.retired && template.key == template_key;
        if let Some(at) = self.templates.iter().position(is_it) {
            let dest = &self.dests[self.templates[at].dest];
            let quiescent = self.settings.expire_quiescent_template != 0 && dest.spec.weight == 0;
            if dest.available && !quiescent {
                let template = &mut self.templates[at];
                template.expires = self.now + template.timeout;
                return Ok((template.dest, template.id));
            }
            self.templates[at].retired = true;
        }
        let Some(dest) = self.schedule(key, packet) else { return Err(nobody(key, packet)) };
        self.template_ids += 1;
        let (id, timeout) = (self.template_ids, persistence.timeout * HZ);
        self.dests[dest].templates += 1;
        self.templates.push(Template {
            key: template_key,
            dest,
            port: if of_one_port { self.dests[dest].server.port() } else { 0 },
            retired: false,
            assured: false,
            timeout,
            expires: self.now + timeout,
            id,
        });
        Ok((dest, id))
    }

    /// The port of a destination for a packet for a persistent service.
    pub(crate) fn persistent_port(&self, key: ServiceKey, packet: &Packet, dest: DestId) -> u16 {
        let port = self.dests[dest].server.port();
        match key {
            ServiceKey::At(_, address) if address.port() == packet.to.port() && port != 0 => port,
            _ => packet.to.port(),
        }
    }

    /// Section 6.4: a connection has been established, or answered.
    pub(crate) fn assure(&mut self, template: Option<TemplateId>) {
        if let Some(template) = self.templates.iter_mut().find(|other| Some(other.id) == template) {
            template.assured = true;
        }
    }

    fn controls(&self, template: &Template) -> bool {
        self.connections.iter().any(|connection| connection.template == Some(template.id))
    }

    fn end_template(&mut self, at: usize) {
        let template = self.templates.remove(at);
        self.dests[template.dest].templates -= 1;
    }

    /// Section 4.10: the timers of templates.
    pub(crate) fn age_templates(&mut self) {
        for at in (0..self.templates.len()).rev() {
            if self.templates[at].expires > self.now {
                continue;
            }
            if self.controls(&self.templates[at]) {
                let template = &mut self.templates[at];
                template.timeout = RETRY_S * HZ;
                template.expires = self.now + template.timeout;
            } else {
                self.end_template(at);
            }
        }
    }

    /// Section 4.8: templates of removed destinations end, once they control nothing.
    pub(crate) fn expire_removed_templates(&mut self) {
        for at in (0..self.templates.len()).rev() {
            if !self.dests[self.templates[at].dest].available && !self.controls(&self.templates[at]) {
                self.end_template(at);
            }
        }
    }
}
