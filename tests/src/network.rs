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
//! The way from the router to the switch is for the replies of DR and tunnel servers, which do not pass the director.

use anyhow::Result;
use lb_common::proto::Method;

use crate::{
    cast,
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

fn end<'n>(namespace: &'n NetNs, name: &'n str, mac: [u8; 6], address: &'n str) -> End<'n> {
    End { namespace, name, mac, address: Some(address) }
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
        network.director.ip(&format!("address add {}/32 dev lo", cast::VIP))?;
        for (index, server) in (0..).zip(&network.servers) {
            let address = format!("{}/24", cast::server(index));
            plug(&network.switch, end(server, "eth0", cast::server_mac(index), &address))?;
            network.set_up_server(server, method)?;
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
            plug(switch, end(client, "eth0", cast::CLIENT_MAC, "10.0.0.2/24"))?;
            let port = plug(switch, end(director, "eth0", cast::DIRECTOR_OUTSIDE_MAC, "10.0.0.1/24"))?;
            self.passing.attach(switch, &port)?;
            director.ip("address add 10.2.0.1/24 dev eth0")?;
            client.ip("route add default via 10.0.0.1")?;
            return Ok(());
        };
        router.sysctl("net.ipv4.ip_forward", "1")?;
        lab::cable(end(client, "eth0", mac(0), "10.1.0.1/24"), end(router, "eth0", mac(1), "10.1.0.254/24"))?;
        lab::cable(
            end(router, "eth1", cast::CLIENT_MAC, "10.0.0.2/24"),
            end(director, "eth0", cast::DIRECTOR_OUTSIDE_MAC, "10.0.0.1/24"),
        )?;
        self.passing.attach(router, "eth1")?;
        let port = plug(switch, end(director, "eth1", cast::DIRECTOR_INSIDE_MAC, "10.2.0.1/24"))?;
        self.passing.attach(switch, &port)?;
        plug(switch, end(router, "eth2", mac(2), "10.2.0.254/24"))?;
        client.ip("route add default via 10.1.0.254")?;
        director.ip("route add default via 10.0.0.2")?;
        router.ip(&format!("route add {} via 10.0.0.1", cast::VIP))?;
        Ok(())
    }

    fn set_up_server(&self, server: &NetNs, method: Method) -> Result<()> {
        let role = match method {
            Method::Masq => {
                server.ip("route add default via 10.2.0.1")?;
                return Ok(());
            }
            Method::Route => "dr",
            Method::Tunnel => "tun",
        };
        match self.shape {
            Shape::OneArmed => server.ip("route add 10.0.0.0/24 dev eth0")?,
            Shape::TwoArmed => server.ip("route add default via 10.2.0.254")?,
        };
        let vip = cast::VIP.to_string();
        let words = ["realserver", "up", "eth0", "--vip", &vip, "--method", role];
        program::output(&mut program::command(server, &program::path()?, &words))?;
        Ok(())
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let vip = cast::VIP.to_string();
        for server in &self.servers {
            // A masqueraded server has nothing to take down. What cannot be taken down is gone with the namespace.
            if let Ok(path) = program::path() {
                let _ = program::command(server, &path, &["realserver", "down", "eth0", "--vip", &vip]).output();
            }
        }
    }
}
