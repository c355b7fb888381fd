//! A whole network: a client, a director and three real servers, one-armed or two-armed.
//!
//! ```text
//! one-armed:  client 10.0.0.2 --+
//!             director .1 ------+-- switch --- real servers 10.2.0.11 to .13
//!             (10.0.0.1 and 10.2.0.1 on one interface)
//!
//! two-armed:  client 10.1.0.1 --- router 10.0.0.2 --- 10.0.0.1 director 10.2.0.1 --- switch --- real servers
//!                                   |                                                  |
//!                                   +------------------ 10.2.0.254 --------------------+
//! ```
//!
//! Each of these addresses stands for one of IPv6 too, see [`crate::family`].
//!
//! The way from the router to the switch is for the replies of DR and tunnel servers, which do not pass the director.

use std::net::Ipv4Addr;

use anyhow::Result;
use lb_common::proto::Method;

use crate::{
    cast,
    family::Family,
    lab::{self, End, NetNs, Passing},
    program::{self, Director},
};

/// How many real servers there are.
pub const SERVERS: u8 = 3;

/// How the director is connected.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shape {
    /// By one interface, to clients and real servers alike.
    OneArmed,
    /// By one interface to clients and another to real servers.
    TwoArmed,
}

impl Shape {
    /// The director's interfaces.
    pub const fn interfaces(self) -> &'static [&'static str] {
        match self {
            Self::OneArmed => &["eth0"],
            Self::TwoArmed => &["eth0", "eth1"],
        }
    }
}

/// The network. Everything is gone when it is dropped.
#[derive(Debug)]
pub struct Network {
    shape: Shape,
    /// Where clients are.
    pub client: NetNs,
    /// Where the director is, which has the address of the service on its loopback, and no forwarding of its own.
    pub director: NetNs,
    /// Where the real servers are.
    pub servers: Vec<NetNs>,
    switch: NetNs,
    router: Option<NetNs>,
    passing: Passing,
}

/// Link-layer address of what is neither client, director nor real server.
const fn mac(number: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0xff, number]
}

/// The router's addresses: towards the client, the director, and the real servers.
const ROUTER: [Ipv4Addr; 3] = [Ipv4Addr::new(10, 1, 0, 254), cast::CLIENT_GATEWAY, Ipv4Addr::new(10, 2, 0, 254)];

const fn end<'n>(namespace: &'n NetNs, name: &'n str, mac: [u8; 6]) -> End<'n> {
    End { namespace, name, mac, address: None }
}

/// Sends what is for no network of a host's own to `gateway`.
fn route(host: &NetNs, gateway: Ipv4Addr) -> Result<()> {
    let route = |family: Family| host.ip(&format!("route add default via {}", family.address(gateway))).map(drop);
    Family::ALL.into_iter().try_for_each(route)
}

/// Lays a cable from an interface to the switch. Returns the name of its port there.
fn plug(switch: &NetNs, end: End<'_>) -> Result<String> {
    let [.., a, b] = end.mac;
    let port = format!("port-{a:02x}{b:02x}");
    lab::cable(end, End { namespace: switch, name: &port, mac: [2, 0, 0, 1, a, b], address: None })?;
    switch.ip(&format!("link set {port} master hub"))?;
    Ok(port)
}

impl Network {
    /// Makes the network, with real servers that get packets and reply to clients the way `method` wants it.
    ///
    /// # Errors
    ///
    /// When the kernel refuses something.
    pub fn new(shape: Shape, method: Method) -> Result<Self> {
        lab::require_root()?;
        let servers = (0..SERVERS).map(|index| NetNs::new(&format!("server{index}"))).collect::<Result<_>>()?;
        let router = if shape == Shape::TwoArmed { Some(NetNs::new("router")?) } else { None };
        let mut network = Self {
            shape,
            client: NetNs::new("client")?,
            director: NetNs::new("director")?,
            servers,
            switch: NetNs::new("switch")?,
            router,
            passing: Passing::new()?,
        };
        network.switch.ip("link add hub type bridge")?;
        network.switch.ip("link set hub up")?;
        network.connect_director()?;
        network.director.give("lo", cast::VIP, 4)?;
        for (index, server) in (0..).zip(&network.servers) {
            plug(&network.switch, end(server, "eth0", cast::server_mac(index)))?;
            server.give("eth0", cast::server(index), 3)?;
            Family::ALL.into_iter().try_for_each(|family| network.set_up_server(server, family, method))?;
        }
        Ok(network)
    }

    /// The interfaces the director is connected by.
    pub fn interfaces(&self) -> &'static [&'static str] {
        self.shape.interfaces()
    }

    /// Starts a director on all its interfaces.
    ///
    /// # Errors
    ///
    /// When it does not start.
    pub fn start(&self) -> Result<Director<'_>> {
        Director::up(&self.director, self.interfaces(), &["--max-flows", "65536"])
    }

    fn connect_director(&mut self) -> Result<()> {
        let (client, director, switch) = (&self.client, &self.director, &self.switch);
        let Some(router) = &self.router else {
            plug(switch, end(client, "eth0", cast::CLIENT_MAC))?;
            client.give("eth0", cast::CLIENT_GATEWAY, 3)?;
            let port = plug(switch, end(director, "eth0", cast::DIRECTOR_OUTSIDE_MAC))?;
            self.passing.attach(switch, &port)?;
            director.give("eth0", cast::DIRECTOR_OUTSIDE, 3)?;
            director.give("eth0", cast::DIRECTOR_INSIDE, 3)?;
            return route(client, cast::DIRECTOR_OUTSIDE);
        };
        for family in Family::ALL {
            router.sysctl(&format!("net.{}.conf.all.forwarding", family.sysctl()), "1")?;
        }
        lab::cable(end(client, "eth0", mac(0)), end(router, "eth0", mac(1)))?;
        lab::cable(end(router, "eth1", cast::CLIENT_MAC), end(director, "eth0", cast::DIRECTOR_OUTSIDE_MAC))?;
        self.passing.attach(router, "eth1")?;
        let port = plug(switch, end(director, "eth1", cast::DIRECTOR_INSIDE_MAC))?;
        self.passing.attach(switch, &port)?;
        plug(switch, end(router, "eth2", mac(2)))?;
        for (interface, address) in ["eth0", "eth1", "eth2"].into_iter().zip(ROUTER) {
            router.give(interface, address, 3)?;
        }
        client.give("eth0", cast::CLIENT, 3)?;
        director.give("eth0", cast::DIRECTOR_OUTSIDE, 3)?;
        director.give("eth1", cast::DIRECTOR_INSIDE, 3)?;
        route(client, ROUTER[0])?;
        route(director, ROUTER[1])?;
        for family in Family::ALL {
            let [vip, director] = [cast::VIP, cast::DIRECTOR_OUTSIDE].map(|address| family.address(address));
            router.ip(&format!("route add {vip} via {director}"))?;
        }
        Ok(())
    }

    fn set_up_server(&self, server: &NetNs, family: Family, method: Method) -> Result<()> {
        let route = |address| server.ip(&format!("route add default via {}", family.address(address)));
        let role = match method {
            Method::Masq => {
                return route(cast::DIRECTOR_INSIDE).map(drop);
            }
            Method::Route => "dr",
            Method::Tunnel => "tun",
        };
        match self.shape {
            Shape::OneArmed => server.ip(&format!("route add {} dev eth0", family.network(cast::CLIENT_GATEWAY, 3)))?,
            Shape::TwoArmed => route(ROUTER[2])?,
        };
        let vip = family.address(cast::VIP).to_string();
        let words = ["realserver", "up", "eth0", "--vip", &vip, "--method", role];
        program::output(&mut program::command(server, &program::path()?, &words))?;
        Ok(())
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let vips = Family::ALL.map(|family| family.address(cast::VIP).to_string());
        for (server, vip) in self.servers.iter().flat_map(|server| vips.iter().map(move |vip| (server, vip))) {
            // A masqueraded server has nothing to take down. What cannot be taken down is gone with the namespace.
            if let Ok(path) = program::path() {
                let _ = program::command(server, &path, &["realserver", "down", "eth0", "--vip", vip]).output();
            }
        }
    }
}
