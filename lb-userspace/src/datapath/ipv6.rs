//! Whether there is IPv6 where an instance runs. One comes up without it, for IPv4.

use std::{fs, path::Path};

use crate::{
    control::model::{Family, Identity},
    datapath::forwarding,
    error::Error,
};

/// Whether one of the interfaces with these names takes IPv6 packets, as far as the kernel's settings say.
pub fn is_taken<'n>(mut interfaces: impl Iterator<Item = &'n str>) -> bool {
    interfaces.any(|name| {
        let setting = Path::new(forwarding::SETTINGS6).join(name).join("disable_ipv6");
        fs::read_to_string(setting).is_ok_and(|value| value.trim() == "0")
    })
}

/// Why no interface takes IPv6 packets, and what to do about it.
pub fn why_not() -> &'static str {
    if forwarding::has_ipv6() {
        "IPv6 is disabled on the interfaces: set net.ipv6.conf.IFACE.disable_ipv6 to 0"
    } else {
        "the kernel has no IPv6: boot one with CONFIG_IPV6, and without ipv6.disable=1"
    }
}

/// Refuses a service that this kernel has no packets for.
///
/// # Errors
///
/// [`Error::NoIpv6`].
pub fn check(key: Identity) -> Result<(), Error> {
    if key.family() == Family::Ipv4 || forwarding::has_ipv6() {
        return Ok(());
    }
    Err(Error::NoIpv6 { service: key, why: why_not() })
}
