//! What this host serves as a real server, and what stands in its way.

use std::{collections::BTreeMap, fmt, net::IpAddr};

use serde::Serialize;

use crate::{
    netlink::{self, Interface, Mode},
    realserver::{
        Error, LOOPBACK, Method,
        record::{Home, Server, Site},
        setting, six,
        tunnel::Tunnel,
    },
};

/// What a tunnel adds to a packet for `vip`, in bytes.
const fn tunnel_overhead(vip: IpAddr) -> u32 {
    if vip.is_ipv6() { 40 } else { 20 }
}

/// The largest packet that senders usually send, in bytes.
const USUAL_MTU: u32 = 1500;

/// This host as a real server.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Status {
    /// The virtual addresses.
    pub servers: Vec<ServerStatus>,
    /// The interfaces whose packets are taken out of tunnels.
    pub tunnels: Vec<TunnelStatus>,
}

/// A virtual address.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct ServerStatus {
    /// The interface that its packets arrive by.
    pub interface: String,
    /// The address.
    pub address: IpAddr,
    /// How its packets arrive.
    pub method: Method,
    /// What keeps it from working, and what makes it work worse than it could, one sentence each.
    pub advice: Vec<String>,
}

/// An interface whose packets are taken out of tunnels.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct TunnelStatus {
    /// Its name.
    pub interface: String,
    /// How the program runs there; `None` when it does not.
    pub mode: Option<Mode>,
    /// Packets since the program was put there, by what became of them.
    pub outcomes: BTreeMap<&'static str, u64>,
}

/// What this host serves as a real server.
///
/// # Errors
///
/// When the record or the kernel cannot be read.
pub fn status() -> Result<Status, Error> {
    let home = Home::look()?;
    let record = home.load()?;
    let interfaces = netlink::interfaces()?;
    let mut status = Status::default();
    for site in &record.sites {
        let interface = interfaces.iter().find(|interface| interface.index == site.index);
        let mut mode = None;
        if site.tunnelled().next().is_some() {
            let tunnel = Tunnel::find(&home, &site.name)?;
            let runs = |interface: &Interface| tunnel.program_on(interface).and(interface.xdp).map(|xdp| xdp.mode);
            mode = interface.and_then(runs);
            let counted = if mode.is_some() { tunnel.outcomes()? } else { Vec::new() };
            let outcomes = counted.into_iter().map(|(outcome, count)| (outcome.as_str(), count)).collect();
            status.tunnels.push(TunnelStatus { interface: site.name.clone(), mode, outcomes });
        }
        for server in &site.servers {
            status.servers.push(ServerStatus {
                interface: site.name.clone(),
                address: server.vip,
                method: server.method,
                advice: advice(&interfaces, site, interface, server, mode)?,
            });
        }
    }
    Ok(status)
}

fn advice(
    interfaces: &[Interface],
    site: &Site,
    interface: Option<&Interface>,
    server: &Server,
    mode: Option<Mode>,
) -> Result<Vec<String>, Error> {
    let (name, vip) = (&site.name, server.vip);
    let again = format!("run `xdpvs realserver down {name} --vip {vip}`, then `up` again");
    let mut advice = Vec::new();
    if !server.complete {
        advice.push(format!("`xdpvs realserver up` was killed: {again}"));
    }
    let Some(interface) = interface else {
        advice.push(format!("{name} is gone: {again}"));
        return Ok(advice);
    };
    let loopback = interfaces.iter().find(|interface| interface.name == LOOPBACK).map(|interface| interface.index);
    let is_there = netlink::addresses()?.iter().any(|held| Some(held.index) == loopback && held.address == vip);
    if !is_there {
        advice.push(format!("{vip} is no longer on {LOOPBACK}: {again}"));
    }
    if vip.is_ipv6()
        && let Some(remedy) = six::missing(interface)?
    {
        advice.push(format!("IPv6 is off on {}: {remedy}", interface.name));
    }
    for other in interfaces.iter().filter(|other| other.ethernet && other.up) {
        advice.extend(told_by(other, vip)?);
    }
    if server.method == Method::Tun {
        match mode {
            None => advice.push(format!("the tunnel program is no longer on {name}: {again}")),
            Some(Mode::Generic) => {
                advice.push(format!("the tunnel program runs in generic mode on {name}, which is slower"))
            }
            Some(Mode::Native | Mode::Offloaded) => {}
        }
        let overhead = tunnel_overhead(vip);
        if interface.mtu < USUAL_MTU + overhead {
            advice.push(format!(
                "the MTU of {name} leaves {} bytes for packets in the tunnel: with {} on the way from the director, clients \
                 need not send smaller ones",
                interface.mtu.saturating_sub(overhead),
                USUAL_MTU + overhead
            ));
        }
    }
    Ok(advice)
}

/// What to do when others on the link of this interface learn that the host has `vip`.
fn told_by(interface: &Interface, vip: IpAddr) -> Result<Option<String>, Error> {
    let name = &interface.name;
    Ok(if vip.is_ipv6() {
        six::answers(interface, vip)?.then(|| {
            format!(
                "{name} answers neighbour solicitations for {vip} in the name of another host: if the director is reached by \
                 it, run `ip neighbour del proxy {vip} dev {name}`"
            )
        })
    } else {
        setting::answers(name)?.then(|| {
            format!(
                "{name} answers ARP requests for {vip}: if the director is reached by it, run `sysctl -w \
                 net.ipv4.conf.{name}.arp_ignore=1 net.ipv4.conf.{name}.arp_announce=2`"
            )
        })
    })
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for server in &self.servers {
            writeln!(f, "{} on {} ({})", server.address, server.interface, server.method)?;
            for line in &server.advice {
                writeln!(f, "  {line}")?;
            }
        }
        for tunnel in &self.tunnels {
            let mode = tunnel.mode.map_or_else(|| "not attached".to_owned(), |mode| mode.to_string());
            writeln!(f, "tunnel program on {} ({mode})", tunnel.interface)?;
            for (outcome, count) in tunnel.outcomes.iter().filter(|(_, count)| **count > 0) {
                writeln!(f, "  {outcome:<20} {count}")?;
            }
        }
        Ok(())
    }
}
