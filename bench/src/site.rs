//! A director to measure, in a network namespace of its own, with routes and neighbours but nobody behind them.

use std::net::Ipv4Addr;

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
    family::Family,
    lab::{End, NetNs, cable, mac, sweep_instances},
    world::{dest, scheduled},
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

/// Real servers of services that have many.
pub(crate) const MANY: [u16; 2] = [256, 1024];

/// The port of the service with this scheduler that has many real servers, by DR: as many as [`MANY`] says at this index.
pub(crate) const fn port_of_many(scheduler: Scheduler, index: u16) -> u16 {
    2000 + 100 * index + scheduler as u16
}

/// The address of one of many real servers, all of which are behind the first of the few.
const fn one_of_many(number: u16) -> Ipv4Addr {
    let [high, low] = number.to_be_bytes();
    Ipv4Addr::new(10, 3, high, low)
}

/// The weight of a real server: for ovf, one that all connections fit in.
fn weight(scheduler: Scheduler, number: u16) -> u32 {
    let weight = 1 + u32::from(number % 4);
    if scheduler == Scheduler::Ovf { weight << 16 } else { weight }
}

/// Most connections that the IPv6 table is made for.
const FLOWS6_MAX: u32 = 1 << 17;

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
    /// Makes a director with a flow table for `flows` IPv4 connections, one for as many IPv6 connections or [`FLOWS6_MAX`], a
    /// service for each method, scheduler and family, and [`SINGLE`].
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
        let flows6 = flows.min(FLOWS6_MAX);
        load::create(&place, &lock, &Capacity { flows, flows6, dests: 1 << 15, ..Capacity::default() })?;
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
            for family in Family::ALL {
                let key = family.service(Transport::Tcp, port);
                change.add_service(key, scheduled(scheduler))?;
                for index in 0..SERVERS {
                    change.add_dest(key, family.at(index, port), dest(method, weight(scheduler, index.into())))?;
                }
            }
        }
    }
    for (index, servers) in (0..).zip(MANY) {
        for &scheduler in Scheduler::ALL {
            let port = port_of_many(scheduler, index);
            let key = Family::Four.service(Transport::Tcp, port);
            change.add_service(key, scheduled(scheduler))?;
            for number in 1..=servers {
                let spec = dest(Method::Route, weight(scheduler, number));
                change.add_dest(key, (one_of_many(number), port).into(), spec)?;
            }
        }
    }
    for family in Family::ALL {
        let single = family.service(Transport::Tcp, SINGLE);
        change.add_service(single, scheduled(Scheduler::Rr))?;
        change.add_dest(single, family.at(0, SINGLE), dest(Method::Masq, 1))?;
    }
    Ok(())
}

/// One interface for clients and servers alike, so that packets leave where they came in. Both ends of its cable are in
/// the one namespace: nobody listens, but routes and neighbours are real.
fn lay_cable(namespace: &NetNs) -> Result<()> {
    let end = |name, mac| End { namespace, name, mac, address: None };
    cable(end("wire", cast::DIRECTOR_INSIDE_MAC), end("others", [2, 0, 0, 0, 1, 1]))?;
    namespace.give("wire", cast::DIRECTOR_OUTSIDE, 3)?;
    namespace.give("wire", cast::DIRECTOR_INSIDE, 3)?;
    for family in Family::ALL {
        namespace.sysctl(&format!("net.{}.conf.lo.forwarding", family.sysctl()), "1")?;
        let gateway = family.address(cast::CLIENT_GATEWAY);
        namespace.ip(&format!("neigh add {gateway} lladdr {} dev wire nud permanent", mac(cast::CLIENT_MAC)))?;
        for index in 0..SERVERS {
            let (server, address) = (family.address(cast::server(index)), mac(cast::server_mac(index)));
            namespace.ip(&format!("neigh add {server} lladdr {address} dev wire nud permanent"))?;
        }
        namespace.ip(&format!("route add {} via {gateway}", family.network(cast::CLIENT, 1)))?;
    }
    namespace.ip(&format!("route add {}/16 via {}", one_of_many(0), cast::server(0)))?;
    Ok(())
}
