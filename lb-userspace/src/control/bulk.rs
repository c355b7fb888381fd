//! Many connections at once: ending those of a service or destination, and creating those that another director has had.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use lb_common::{
    abi::{ConnectionDetails, ConnectionRecord, ConnectionRecord6},
    addr::{Ip4, Ip6, Port},
    proto::Protocol,
    sctp, tcp,
};

use crate::{
    control::{
        model::{Identity, Refusal, ServiceKey},
        session::Session,
        state::{State, dest_address, service_key},
    },
    datapath::{
        place::Lock,
        run::{Control, Ending, Insertions, NewRecord},
    },
    error::Error,
};

/// Which connections are to be ended: those of all that is given.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Selection {
    /// Only those to this service.
    pub service: Option<Identity>,
    /// Only those to the destination with this address, at this port or at any.
    pub dest: Option<(IpAddr, Option<u16>)>,
}

impl Selection {
    /// What of the flow table that is. Services and destinations that have been removed and have connections left count.
    ///
    /// # Errors
    ///
    /// [`Refusal::NoService`], [`Refusal::NoSuchDest`].
    pub fn endings(&self, state: &State) -> Result<Vec<Ending>, Refusal> {
        let is_wanted = |slot: u32| match self.service {
            None => true,
            Some(key) => state.services.get(&slot).is_some_and(|record| service_key(record) == key),
        };
        if let Some(key) = self.service
            && !state.services.keys().any(|slot| is_wanted(*slot))
        {
            return Err(Refusal::NoService(key));
        }
        let Some((address, port)) = self.dest else {
            if self.service.is_none() {
                return Ok(vec![Ending::All]);
            }
            return Ok(state.services.keys().copied().filter(|slot| is_wanted(*slot)).map(Ending::Service).collect());
        };
        let dests = state.dests.iter().filter(|(_, record)| {
            let found = dest_address(record);
            is_wanted(record.service) && found.ip() == address && port.is_none_or(|port| port == found.port())
        });
        let endings: Vec<Ending> = dests.map(|(number, _)| Ending::Dest(*number)).collect();
        if endings.is_empty() { Err(Refusal::NoSuchDest(address, port)) } else { Ok(endings) }
    }
}

/// The state of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ProtocolState {
    /// By TCP.
    Tcp(tcp::State),
    /// By UDP, which has one state.
    Udp,
    /// By SCTP.
    Sctp(sctp::State),
}

impl ProtocolState {
    const fn protocol(self) -> Protocol {
        match self {
            Self::Tcp(_) => Protocol::Tcp,
            Self::Udp => Protocol::Udp,
            Self::Sctp(_) => Protocol::Sctp,
        }
    }

    const fn number(self) -> u32 {
        match self {
            Self::Tcp(state) => state as u32,
            Self::Udp => 0,
            Self::Sctp(state) => state as u32,
        }
    }
}

/// A connection that another director has had.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NewConnection {
    /// Whom the client speaks to.
    pub service: ServiceKey,
    /// The client's address and port.
    pub client: SocketAddr,
    /// The destination's address and port.
    pub destination: SocketAddr,
    /// Its state, of the service's protocol.
    pub state: ProtocolState,
    /// How long it lives if no packet comes, up to 2^30 ticks.
    pub remaining: Duration,
}

/// Creates connections in the running instance `session`, beside those that it has. Returns what came of them. One to a
/// service or destination that is not configured, of a client of another address family, or in a state of another protocol
/// is refused, and the others are created.
///
/// Those that have been created when this process is killed stay, and the counters count them.
///
/// # Errors
///
/// When the instance or the kernel fails.
pub fn insert(
    session: &mut Session,
    lock: &Lock,
    connections: impl IntoIterator<Item = NewConnection>,
) -> Result<Insertions, Error> {
    session.recover(lock)?;
    let state = session.state()?;
    let services = state.configured();
    let dests: HashMap<(Identity, SocketAddr), u32> = services
        .iter()
        .flat_map(|service| service.dests.iter().map(|dest| ((service.key, dest.address), dest.number)))
        .collect();
    let hz = session.maps().instance().hz;
    let mut unknown = 0;
    let records = connections.into_iter().filter_map(|connection| {
        let dest = dests.get(&(connection.service.into(), connection.destination)).copied();
        let record = dest.and_then(|dest| record(&connection, dest, hz));
        unknown += u64::from(record.is_none());
        record
    });
    let mut insertions = Control::open(session.place())?.insert(records)?;
    insertions.refused += unknown;
    Ok(insertions)
}

/// A connection to destination number `dest` as the control program takes it; `None` when the client's address is of
/// another family, or the state of another protocol.
fn record(connection: &NewConnection, dest: u32, hz: u32) -> Option<NewRecord> {
    let NewConnection { service: ServiceKey { protocol, address }, client, state, remaining, .. } = *connection;
    let port = |address: SocketAddr| u32::from(Port::new(address.port()).raw());
    if state.protocol() != protocol.protocol() {
        return None;
    }
    let ticks = remaining.as_millis() * u128::from(hz) / 1000;
    let details = ConnectionDetails {
        ports: port(client) | port(address) << 16,
        dest,
        protocol_state: protocol.protocol() as u32 | state.number() << 8,
        remaining: u32::try_from(ticks).unwrap_or(u32::MAX),
    };
    match (client.ip(), address.ip()) {
        (IpAddr::V4(client), IpAddr::V4(service)) => {
            let [client, service] = [client, service].map(|address| Ip4::new(address.octets()));
            Some(NewRecord::Four(ConnectionRecord { client, service, details }))
        }
        (IpAddr::V6(client), IpAddr::V6(service)) => {
            let [client, service] = [client, service].map(|address| Ip6::new(address.octets()));
            Some(NewRecord::Six(ConnectionRecord6 { client, service, details }))
        }
        _ => None,
    }
}
