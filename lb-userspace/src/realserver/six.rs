//! What a real server needs to know of IPv6.
//!
//! The kernel answers neighbour solicitations only for addresses of the interface that they arrive by, whatever else the
//! host has, and solicits from no other either. So an address on the loopback interface is told to nobody, and there is
//! nothing to set; what could still answer for it is an entry that makes the interface a proxy.

use std::{fs, io::ErrorKind, net::IpAddr, path::Path};

use crate::{
    error,
    netlink::{self, Interface},
    realserver::Error,
};

/// The settings of all interfaces.
const SETTINGS: &str = "/proc/sys/net/ipv6/conf";
/// The least MTU with which the kernel runs IPv6 on an interface (RFC 8200 section 5).
const MTU_MIN: u32 = 1280;

/// What to do for an interface to send and receive IPv6 packets. `None` when it does.
pub(super) fn missing(interface: &Interface) -> Result<Option<String>, error::Error> {
    let name = &interface.name;
    let path = Path::new(SETTINGS).join(name).join("disable_ipv6");
    match fs::read_to_string(&path) {
        Ok(text) if text.trim() == "0" => Ok(None),
        Ok(_) => Ok(Some(format!("run `sysctl -w net.ipv6.conf.{name}.disable_ipv6=0`"))),
        Err(source) if source.kind() != ErrorKind::NotFound => Err(error::Error::file("read", &path, source)),
        Err(_) if !Path::new(SETTINGS).exists() => Ok(Some("boot the kernel without `ipv6.disable=1`".to_owned())),
        Err(_) => Ok(Some(format!("it needs an MTU of {MTU_MIN}, run `ip link set {name} mtu {MTU_MIN}`"))),
    }
}

/// Whether the interface answers neighbour solicitations for an address that is not its own.
pub(super) fn answers(interface: &Interface, vip: IpAddr) -> Result<bool, error::Error> {
    Ok(netlink::proxied()?.iter().any(|proxied| proxied.index == interface.index && proxied.address == vip))
}

/// Checks that nothing stands in the way of `vip`, whose packets arrive by `interface`.
pub(super) fn check(interface: &Interface, loopback: &Interface, vip: IpAddr) -> Result<(), Error> {
    for interface in [loopback, interface] {
        if let Some(remedy) = missing(interface)? {
            return Err(Error::NoIpv6 { name: interface.name.clone(), remedy });
        }
    }
    if answers(interface, vip)? {
        return Err(Error::Proxied { vip, name: interface.name.clone() });
    }
    Ok(())
}
