//! What is asked of the kernel's network configuration: interfaces, the addresses on them, and those they answer for.

use std::net::IpAddr;

use futures_util::TryStreamExt as _;
use rtnetlink::{
    Handle,
    packet_route::{
        AddressFamily,
        address::{AddressAttribute, AddressFlags, CacheInfo},
        link::{LinkAttribute, LinkFlags, LinkLayerType, LinkXdp, XdpAttached},
        neighbour::{NeighbourAddress, NeighbourAttribute},
    },
};

use crate::error::Error;

/// How a program runs on an interface.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// In the driver, before the kernel has made a packet of the frame.
    Native,
    /// In the kernel's receive path, for drivers that cannot. Slower by an order of magnitude.
    Generic,
    /// On the network card.
    Offloaded,
}

impl std::fmt::Display for Mode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Native => "native",
            Self::Generic => "generic",
            Self::Offloaded => "offloaded",
        })
    }
}

/// An XDP program on an interface.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Attached {
    /// The program's id.
    pub program: u32,
    /// How it runs.
    pub mode: Mode,
}

/// A network interface.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Interface {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// The XDP program on it.
    pub xdp: Option<Attached>,
    /// Whether its frames have Ethernet headers.
    pub ethernet: bool,
    /// Whether it is up.
    pub up: bool,
    /// The largest packet it takes, in bytes; 0 when the kernel does not say.
    pub mtu: u32,
}

/// An address on an interface.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Address {
    /// Index of the interface.
    pub index: u32,
    /// The address.
    pub address: IpAddr,
    /// Length of its prefix.
    pub prefix: u8,
    /// Whether the host takes another as the source of what it sends, if it has one (RFC 6724 section 5). IPv6 only.
    pub deprecated: bool,
}

/// An address that an interface answers neighbour solicitations for in the name of another host.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Proxied {
    /// Index of the interface.
    pub index: u32,
    /// The address.
    pub address: IpAddr,
}

/// The lifetime of an address that does not end.
const FOREVER: u32 = u32::MAX;

/// Runs one exchange with the kernel to its end.
fn talk<T>(
    action: &'static str,
    exchange: impl AsyncFnOnce(Handle) -> Result<T, rtnetlink::Error>,
) -> Result<T, Error> {
    let failed = |source: rtnetlink::Error| Error::Netlink { action, source: Box::new(source) };
    let socket = |source| Error::NetlinkSocket { action, source };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().map_err(socket)?;
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(socket)?;
        let connection = tokio::spawn(connection);
        let result = exchange(handle).await.map_err(failed);
        connection.abort();
        result
    })
}

/// Every interface of this network namespace.
///
/// # Errors
///
/// When the kernel does not answer.
pub fn interfaces() -> Result<Vec<Interface>, Error> {
    talk("list the interfaces", async |handle| {
        let mut links = handle.link().get().execute();
        let mut found = Vec::new();
        while let Some(link) = links.try_next().await? {
            let name = link.attributes.iter().find_map(|attribute| match attribute {
                LinkAttribute::IfName(name) => Some(name.clone()),
                _ => None,
            });
            let xdp = link.attributes.iter().find_map(|attribute| match attribute {
                LinkAttribute::Xdp(xdp) => attached(xdp),
                _ => None,
            });
            let mtu = link.attributes.iter().find_map(|attribute| match attribute {
                LinkAttribute::Mtu(mtu) => Some(*mtu),
                _ => None,
            });
            found.extend(name.map(|name| Interface {
                index: link.header.index,
                name,
                xdp,
                ethernet: link.header.link_layer_type == LinkLayerType::Ether,
                up: link.header.flags.contains(LinkFlags::Up),
                mtu: mtu.unwrap_or(0),
            }));
        }
        Ok(found)
    })
}

fn attached(xdp: &[LinkXdp]) -> Option<Attached> {
    let mode = xdp.iter().find_map(|attribute| match attribute {
        LinkXdp::Attached(XdpAttached::Driver | XdpAttached::Multiple) => Some(Mode::Native),
        LinkXdp::Attached(XdpAttached::SocketBuffer) => Some(Mode::Generic),
        LinkXdp::Attached(XdpAttached::Hardware) => Some(Mode::Offloaded),
        _ => None,
    })?;
    let program = xdp.iter().find_map(|attribute| match attribute {
        LinkXdp::ProgId(id) | LinkXdp::DrvProgId(id) | LinkXdp::SkbProgId(id) => Some(*id),
        _ => None,
    });
    Some(Attached { program: program.unwrap_or(0), mode })
}

/// The interface called `name`.
///
/// # Errors
///
/// [`Error::NoInterface`] when there is none.
pub fn interface(name: &str) -> Result<Interface, Error> {
    let found = interfaces()?.into_iter().find(|interface| interface.name == name);
    found.ok_or_else(|| Error::NoInterface { name: name.to_owned() })
}

/// Every address of this network namespace.
///
/// # Errors
///
/// When the kernel does not answer.
pub fn addresses() -> Result<Vec<Address>, Error> {
    talk("list the addresses", async |handle| {
        let mut messages = handle.address().get().execute();
        let mut found = Vec::new();
        while let Some(message) = messages.try_next().await? {
            // Of a point-to-point address ADDRESS is the peer; LOCAL is always this host's.
            let local = message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Local(address) => Some(*address),
                _ => None,
            });
            let any = message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Address(address) => Some(*address),
                _ => None,
            });
            found.extend(local.or(any).map(|address| Address {
                index: message.header.index,
                address,
                prefix: message.header.prefix_len,
                deprecated: message.attributes.iter().any(|attribute| match attribute {
                    AddressAttribute::Flags(flags) => flags.contains(AddressFlags::Deprecated),
                    _ => false,
                }),
            }));
        }
        Ok(found)
    })
}

/// Puts an address on an interface.
///
/// # Errors
///
/// The kernel's refusal.
pub fn add_address(address: &Address) -> Result<(), Error> {
    talk("add an address", async |handle| {
        let mut request = handle.address().add(address.index, address.address, address.prefix);
        if address.deprecated {
            let mut lifetime = CacheInfo::default();
            (lifetime.ifa_preferred, lifetime.ifa_valid) = (0, FOREVER);
            request.message_mut().attributes.push(AddressAttribute::CacheInfo(lifetime));
        }
        request.execute().await
    })
}

/// Every address that an interface of this network namespace answers neighbour solicitations for in the name of another
/// host, if it is told to forward and to do so.
///
/// # Errors
///
/// When the kernel does not answer.
pub fn proxied() -> Result<Vec<Proxied>, Error> {
    talk("list the proxied neighbours", async |handle| {
        let mut messages = handle.neighbours().get().proxies().set_address_family(AddressFamily::Inet6).execute();
        let mut found = Vec::new();
        while let Some(message) = messages.try_next().await? {
            let address = message.attributes.iter().find_map(|attribute| match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => Some(*address),
                _ => None,
            });
            found.extend(address.map(|address| Proxied { index: message.header.ifindex, address: address.into() }));
        }
        Ok(found)
    })
}

/// Takes an address off an interface. One that is not there is no error.
///
/// # Errors
///
/// The kernel's refusal.
pub fn remove_address(address: &Address) -> Result<(), Error> {
    talk("remove an address", async |handle| {
        let mut messages = handle
            .address()
            .get()
            .set_link_index_filter(address.index)
            .set_prefix_length_filter(address.prefix)
            .set_address_filter(address.address)
            .execute();
        while let Some(message) = messages.try_next().await? {
            handle.address().del(message).execute().await?;
        }
        Ok(())
    })
}
