//! A director to measure, in a network namespace of its own, with routes and neighbours but nobody behind them.

use anyhow::{Context as _, Result};
use lb_common::proto::{Method, Scheduler};
use lb_userspace::{
    control::{
        change::{Change, Commit},
        model::{Refusal, Transport},
        session::Session,
    },
    datapath::{
        load,
        place::{Place, remove_tree},
        sizes::Capacity,
    },
    error::Error,
    netlink::interface,
};
use xdpvs_tests::{
    cast,
    lab::{End, NetNs, cable, mac, sweep_instances},
    world::{at, dest, scheduled, service},
};

/// A director to measure.
pub(crate) struct Site {
    /// Where it lives.
    pub(crate) place: Place,
    /// The namespace it routes in.
    pub(crate) namespace: NetNs,
    /// Index of its one interface.
    pub(crate) wire: u32,
}

/// What the names of the instances that are measured begin with.
const INSTANCES: &str = "bench-";

/// Real servers of most services.
pub(crate) const SERVERS: u8 = 8;

/// The port of the service with this method and scheduler, which has eight real servers.
pub(crate) const fn port(method: Method, scheduler: Scheduler) -> u16 {
    1000 + 100 * method as u16 + scheduler as u16
}

/// The port of the masqueraded service that has one real server, `cast::server(0)`.
pub(crate) const SINGLE: u16 = 1999;

/// Why a change failed.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub(crate) enum Failure {
    /// It cannot be.
    Refused(#[from] Refusal),
    /// It could not be put in force.
    Commit(#[from] Commit),
    /// The kernel refused.
    Kernel(#[from] Error),
}

impl Site {
    /// Makes a director with a flow table for `flows` connections, a service for each method and scheduler, and
    /// [`SINGLE`].
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub(crate) fn new(flows: u32) -> Result<Self> {
        let namespace = NetNs::new("bench")?;
        lay_cable(&namespace)?;
        // A run that was killed has left its tables.
        sweep_instances(INSTANCES)?;
        let place = Place::find(&format!("{INSTANCES}{}", std::process::id()))?;
        let lock = place.lock()?;
        load::create(&place, &lock, &Capacity { flows, ..Capacity::default() })?;
        drop(lock);
        let wire = namespace.enter(|| interface("wire"))??.index;
        let site = Self { place, namespace, wire };
        let mut session = Session::open(&site.place)?;
        session.change(services).context("configure the services")?;
        Ok(site)
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        // What cannot be removed now shows in `xdpvs status`.
        let _ = remove_tree(&self.place.directory());
    }
}

fn services(change: &mut Change<'_>) -> Result<(), Failure> {
    for &method in Method::ALL {
        for &scheduler in Scheduler::ALL {
            let port = port(method, scheduler);
            let key = service(Transport::Tcp, port);
            change.add_service(key, scheduled(scheduler))?;
            for index in 0..SERVERS {
                change.add_dest(key, at(index, port), dest(method, 1 + u32::from(index % 4)))?;
            }
        }
    }
    let single = service(Transport::Tcp, SINGLE);
    change.add_service(single, scheduled(Scheduler::Rr))?;
    change.add_dest(single, at(0, SINGLE), dest(Method::Masq, 1)).map_err(Failure::from)
}

/// One interface for clients and servers alike, so that packets leave where they came in. Both ends of its cable are in
/// the one namespace: nobody listens, but routes and neighbours are real.
fn lay_cable(namespace: &NetNs) -> Result<()> {
    namespace.sysctl("net.ipv4.conf.lo.forwarding", "1")?;
    let end = |name, mac, address| End { namespace, name, mac, address };
    cable(end("wire", cast::DIRECTOR_INSIDE_MAC, Some("10.0.0.1/24")), end("others", [2, 0, 0, 0, 1, 1], None))?;
    namespace.ip("address add 10.2.0.1/24 dev wire")?;
    let gateway = cast::CLIENT_GATEWAY;
    namespace.ip(&format!("neigh add {gateway} lladdr {} dev wire nud permanent", mac(cast::CLIENT_MAC)))?;
    for index in 0..SERVERS {
        let (server, address) = (cast::server(index), mac(cast::server_mac(index)));
        namespace.ip(&format!("neigh add {server} lladdr {address} dev wire nud permanent"))?;
    }
    namespace.ip(&format!("route add 10.0.0.0/8 via {gateway}"))?;
    Ok(())
}
