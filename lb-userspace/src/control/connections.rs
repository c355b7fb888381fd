//! The connections in the flow table, as people see them.

use std::{net::SocketAddr, num::NonZeroU32};

use lb_common::{
    abi::{Dest, DestRecord, Record as _, Service},
    addr::{Address, Port},
    flow::{Bucket, Bucket4, Bucket6, Entry, Key as FlowKey, Purpose, Word, control, template},
    jiffies::Jiffies,
    proto::{Method, Protocol},
    sctp, tcp,
};

use crate::control::{
    bulk::Selection,
    model::{Family, Identity, Prefix, Transport},
    shared::Shared,
    state::{dest_family, ip, service_mark},
};

/// How often an entry that is being given to another connection is read again.
const ATTEMPTS: usize = 8;

/// A connection, or a persistence template.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Connection {
    /// Its protocol; `None` for a template of a firewall mark, which is for all.
    pub protocol: Option<Transport>,
    /// The client's address and port. Of a template, the network of clients, and port 0.
    pub client: SocketAddr,
    /// The service's address and port, as the client knows them. Of a template that is for all ports, port 0; of one that is not
    /// used any more, port 65535.
    pub service: SocketAddr,
    /// The destination's address and port.
    pub destination: SocketAddr,
    /// The name that ip_vs has for its state.
    pub state: &'static str,
    /// Milliseconds until it is forgotten if no packet comes.
    pub expires: u64,
    /// How packets reach the destination.
    pub method: Method,
    /// The mark that its service is for, if it is the service of a mark.
    pub mark: Option<NonZeroU32>,
}

/// Which connections are wanted: those that all of this is true of.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Filter {
    /// To which service and destination they are.
    pub selection: Selection,
    /// What their client's address begins like.
    pub client: Option<Prefix>,
    /// The name of their state.
    pub state: Option<&'static str>,
}

impl Filter {
    /// Whether `connection` is one of them.
    pub fn takes(&self, connection: &Connection) -> bool {
        let Self { selection: Selection { service, dest }, client, state } = self;
        let Connection { protocol, service: address, destination, mark, .. } = connection;
        let is_to = |service| match service {
            Identity::Address(key) => (Some(key.protocol), key.address) == (*protocol, *address),
            Identity::Mark(key) => (Some(key.mark), key.family) == (*mark, Family::of(address.ip())),
        };
        service.is_none_or(is_to)
            && dest
                .is_none_or(|(ip, port)| ip == destination.ip() && port.is_none_or(|port| port == destination.port()))
            && client.is_none_or(|client| client.contains(connection.client.ip()))
            && state.is_none_or(|state| state == connection.state)
    }
}

/// What the flow tables are read with.
#[derive(Clone, Copy)]
pub struct Reader<'a> {
    /// The IPv4 flow table.
    pub flows4: &'a [Bucket4],
    /// The IPv6 flow table.
    pub flows6: &'a [Bucket6],
    /// The services.
    pub services: &'a [Service],
    /// The destinations.
    pub dests: &'a [Dest],
    /// The data plane's clock.
    pub now: Jiffies,
    /// Its ticks per second.
    pub hz: u32,
}

impl<'a> Reader<'a> {
    /// What the flow tables of an instance with this configuration are read with.
    pub fn new(shared: &Shared<'a>, flows: (&'a [Bucket4], &'a [Bucket6]), now: Jiffies) -> Self {
        let Shared { services, dests, instance, .. } = *shared;
        Self { flows4: flows.0, flows6: flows.1, services, dests, now, hz: instance.hz.load() }
    }

    /// Every connection, in the order of the tables, IPv4 first. A connection that begins, ends or changes meanwhile is there or not,
    /// but never in parts.
    pub fn connections(self) -> impl Iterator<Item = Connection> + 'a {
        let four = self.flows4.iter().flat_map(Bucket::entries).filter_map(move |entry| self.connection(entry));
        let six = self.flows6.iter().flat_map(Bucket::entries).filter_map(move |entry| self.connection(entry));
        four.chain(six)
    }

    fn connection<E: Entry>(&self, entry: &E) -> Option<Connection> {
        for _ in 0..ATTEMPTS {
            let before = Word(entry.word().load());
            if !before.is_live() {
                return None;
            }
            let key = entry.key(before);
            // A destination keeps its slot as long as it has connections, so this is one more thing to be read before the
            // second look at the word.
            let record = self.dests.get(entry.dest().load() as usize).map(Dest::load);
            let control = entry.control().load();
            // What has been read belongs together if the entry has been one connection all the while; the state is the
            // newest.
            let word = Word(entry.word().load());
            if !word.same_life(before) {
                continue;
            }
            if word.is_template() {
                let held = control::holders(control).is_some_and(|holders| holders != 0);
                return Some(self.template(word.template_at(self.now, self.hz, held)?, &key, &record?));
            }
            if word.expired(self.now, self.hz) {
                return None;
            }
            let record = record?;
            // So does a service as long as it has destinations.
            let service = self.services.get(record.service as usize).map(Service::load);
            let port = word.port(Port::from_raw(record.port_method as u16), key.vport());
            return Some(Connection {
                protocol: Some(word.protocol().into()),
                client: socket(key.caddr(), key.cport()),
                service: socket(key.vaddr(), key.vport()),
                destination: SocketAddr::new(ip(dest_family(&record), record.addr), port.number()),
                state: state_name(word),
                expires: self.remaining_ms(word),
                method: Method::try_from(word.method()).unwrap_or(Method::Route),
                mark: service.as_ref().and_then(service_mark),
            });
        }
        // So short-lived that it is as good as over.
        None
    }

    fn remaining_ms(&self, word: Word) -> u64 {
        u64::from(word.expires().since(self.now).max(0).cast_unsigned()) * 1000 / u64::from(self.hz.max(1))
    }

    /// The template with this word and key, whose destination has this record.
    fn template(&self, word: Word, key: &impl FlowKey, record: &DestRecord) -> Connection {
        let purpose = Purpose::of(key);
        let (service, port) = if purpose.is_retired() {
            (RETIRED, RETIRED)
        } else {
            (key.vport(), word.port(Port::from_raw(record.port_method as u16), key.vport()))
        };
        let of = self.services.get(record.service as usize).map(Service::load);
        Connection {
            protocol: Protocol::try_from(purpose.protocol()).ok().map(Transport::from),
            client: socket(key.caddr(), Port::default()),
            service: socket(key.vaddr(), service),
            destination: SocketAddr::new(ip(dest_family(record), record.addr), port.number()),
            state: if word.has(template::ASSURED) { ASSURED } else { tcp::State::None.as_str() },
            expires: self.remaining_ms(word),
            method: Method::try_from(word.method()).unwrap_or(Method::Route),
            mark: of.as_ref().and_then(service_mark),
        }
    }
}

fn socket<A: Address>(address: A, port: Port) -> SocketAddr {
    SocketAddr::new(ip(A::FAMILY, address.words()), port.number())
}

/// The state of a template that controls, or has controlled, a connection which was established or answered.
pub const ASSURED: &str = "ASSURED";
/// What ip_vs shows for the ports of a template that is not used any more.
const RETIRED: Port = Port::new(65_535);

/// What stands for the state of a UDP connection.
pub const UDP: &str = "UDP";

fn state_name(word: Word) -> &'static str {
    match word.protocol() {
        Protocol::Udp => UDP,
        Protocol::Tcp => tcp::State::try_from(word.state()).map_or("NONE", tcp::State::as_str),
        Protocol::Sctp => sctp::State::try_from(word.state()).map_or("NONE", sctp::State::as_str),
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use bytemuck::Zeroable as _;
    use lb_common::{
        abi::{ServiceRecord, slot},
        addr::Ip4,
        flow::{Key4, flag},
    };

    use super::*;
    use crate::control::model::{MarkKey, ServiceKey};

    const NOW: Jiffies = Jiffies(u32::MAX - 100);

    fn entry(word: Word) -> Bucket4 {
        let bucket = Bucket4::zeroed();
        let client = (Ip4::new([10, 1, 0, 1]), Port::new(10_000));
        let service = (Ip4::new([10, 9, 9, 9]), Port::new(80));
        bucket.entries()[3].fill(&Key4::new(Protocol::Tcp, client, service), 0, 0);
        bucket.entries()[3].word.store(word.0);
        bucket
    }

    fn read(bucket: Bucket4) -> Vec<Connection> {
        read_of(bucket, (Protocol::Tcp as u32) << 16)
    }

    /// The connections in a bucket, with a service that has this for its port and protocol.
    fn read_of(bucket: Bucket4, port_protocol: u32) -> Vec<Connection> {
        let dest = Dest::zeroed();
        let record = DestRecord {
            addr: [Ip4::new([10, 2, 0, 11]).raw(), 0, 0, 0],
            port_method: Port::new(8080).raw().into(),
            state: slot::REMOVED,
            ..DestRecord::zeroed()
        };
        dest.store(&record);
        let service = Service::zeroed();
        service.store(&ServiceRecord { addr: [7, 0, 0, 0], port_protocol, ..ServiceRecord::zeroed() });
        let reader = Reader { flows4: &[bucket], flows6: &[], services: &[service], dests: &[dest], now: NOW, hz: 250 };
        reader.connections().collect()
    }

    fn live(state: tcp::State, flags: u64, expires: Jiffies) -> Word {
        Word(0).claimed(1).live(Word::born(Protocol::Tcp, state as u8, Method::Masq as u8, flags, expires))
    }

    #[test]
    fn a_connection_is_shown_with_the_time_it_has_left() {
        let found = read(entry(live(tcp::State::Established, 0, NOW.after(900 * 250))));
        assert_eq!(
            found,
            [Connection {
                protocol: Some(Transport::Tcp),
                client: ([10, 1, 0, 1], 10_000).into(),
                service: ([10, 9, 9, 9], 80).into(),
                destination: ([10, 2, 0, 11], 8080).into(),
                state: "ESTABLISHED",
                expires: 900_000,
                method: Method::Masq,
                mark: None,
            }]
        );
        let at_service_port = read(entry(live(tcp::State::SynRecv, flag::SERVICE_PORT, NOW)));
        assert_eq!(at_service_port[0].destination, ([10, 2, 0, 11], 80).into());
        assert_eq!(at_service_port[0].expires, 0);
    }

    #[test]
    fn a_template_is_shown_as_ip_vs_shows_it() {
        let mark = Ip4::new([0, 0, 0, 7]);
        let (clients, vip) = (Ip4::new([10, 1, 0, 0]), Ip4::new([10, 9, 9, 9]));
        let shown = |key: Key4, flags: u64, holders: u32, retired: bool| {
            let bucket = Bucket4::zeroed();
            let entry = &bucket.entries()[3];
            entry.fill(&key, 0, control::TEMPLATE | holders);
            if retired {
                entry.retire();
            }
            entry.word.store(Word(0).claimed(1).live(Word::template(3, 0, NOW.after(1250))).with(flags).0);
            let [Connection { protocol, client, service, destination, state, expires, .. }] = read(bucket)[..] else {
                panic!("one template")
            };
            let protocol = protocol.map_or_else(|| "ip".to_owned(), |protocol| protocol.to_string());
            format!("{protocol} {} {state} {client} {service} {destination}", expires / 1000)
        };
        let web = Key4::template(Protocol::Tcp as u8, clients, vip, Port::new(80));
        assert_eq!(shown(web, 0, 0, false), "tcp 5 NONE 10.1.0.0:0 10.9.9.9:80 10.2.0.11:8080");
        assert_eq!(shown(web, template::ASSURED, 1, false), "tcp 5 ASSURED 10.1.0.0:0 10.9.9.9:80 10.2.0.11:8080");
        assert_eq!(shown(web, 0, 1, true), "tcp 5 NONE 10.1.0.0:0 10.9.9.9:65535 10.2.0.11:65535");
        let all = Key4::template(Protocol::Udp as u8, clients, vip, Port::default());
        assert_eq!(shown(all, flag::SERVICE_PORT, 0, false), "udp 5 NONE 10.1.0.0:0 10.9.9.9:0 10.2.0.11:0");
        let of_mark = Key4::template(0, clients, mark, Port::default());
        assert_eq!(shown(of_mark, flag::SERVICE_PORT, 0, false), "ip 5 NONE 10.1.0.0:0 0.0.0.7:0 10.2.0.11:0");
    }

    #[test]
    fn a_connection_is_taken_if_all_is_true_of_it() {
        let [connection] = read(entry(live(tcp::State::Established, 0, NOW)))[..] else { panic!("one connection") };
        let key = |protocol, port| Some(ServiceKey { protocol, address: ([10, 9, 9, 9], port).into() }.into());
        let service = |port| key(Transport::Tcp, port);
        let dest = |last, port| Some((Ipv4Addr::new(10, 2, 0, last).into(), port));
        let client = |length| Prefix::new([10, 1, 255, 255].into(), length);
        let selected = |service, dest| Filter { selection: Selection { service, dest }, ..Filter::default() };
        let whole =
            Filter { client: client(16), state: Some("ESTABLISHED"), ..selected(service(80), dest(11, Some(8080))) };
        let udp = key(Transport::Udp, 80);
        for (filter, taken) in [
            (Filter::default(), true),
            (whole, true),
            (selected(service(81), None), false),
            (selected(udp, None), false),
            (selected(None, dest(11, None)), true),
            (selected(None, dest(12, None)), false),
            (selected(None, dest(11, Some(80))), false),
            (Filter { client: client(17), ..whole }, false),
            (Filter { state: Some("CLOSE"), ..whole }, false),
            (Filter { selection: Selection { service: service(443), ..whole.selection }, ..whole }, false),
        ] {
            assert_eq!(filter.takes(&connection), taken, "{filter:?}");
        }
    }

    #[test]
    fn a_connection_to_the_service_of_a_mark_has_the_mark() {
        let [connection] = read_of(entry(live(tcp::State::Established, 0, NOW)), 0)[..] else {
            panic!("one connection")
        };
        assert_eq!(connection.mark.map(NonZeroU32::get), Some(7));
        let of = |mark, family| {
            let service = NonZeroU32::new(mark).map(|mark| MarkKey { mark, family }.into());
            Filter { selection: Selection { service, dest: None }, ..Filter::default() }
        };
        assert!(of(7, Family::Ipv4).takes(&connection));
        assert!(!of(7, Family::Ipv6).takes(&connection) && !of(8, Family::Ipv4).takes(&connection));
    }

    #[test]
    fn what_is_no_connection_is_not_shown() {
        let word = live(tcp::State::Close, 0, NOW);
        for word in [Word(0), Word(0).claimed(7), Word(0).claimed(7).killed(), word.freed()] {
            assert_eq!(read(entry(word)), []);
        }
        let over = live(tcp::State::Close, 0, Jiffies(NOW.0 - 250));
        assert_eq!(read(entry(over)), [], "its time was over a second ago");
    }
}
