//! The kernel's settings of an interface that a real server depends on.
//!
//! They are for IPv4; IPv6 has no such settings, and needs none: see [`super::six`].

use std::{fs, net::IpAddr, path::PathBuf};

use serde::{Deserialize, Serialize};

use crate::{
    error,
    realserver::{Error, record::Setting},
};

/// A setting of an interface, under `net.ipv4.conf`. The kernel uses the greater of its value and of the one of `all`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Name {
    /// Which ARP requests are answered.
    ArpIgnore,
    /// Which address ARP requests of this host are sent from.
    ArpAnnounce,
    /// Whether packets are dropped whose sender would not be answered by the way they came.
    RpFilter,
}

/// `arp_ignore`: an address is told only where it is.
const ONLY_OWN: i32 = 1;
/// `arp_announce`: with the best address of the interface itself, never with one of another.
const BEST_LOCAL: i32 = 2;
/// `rp_filter`: the sender must be reached by this way.
const STRICT: i32 = 1;
/// `rp_filter`: the sender must be reached by some way.
const LOOSE: i32 = 2;

impl Name {
    const fn as_str(self) -> &'static str {
        match self {
            Self::ArpIgnore => "arp_ignore",
            Self::ArpAnnounce => "arp_announce",
            Self::RpFilter => "rp_filter",
        }
    }

    fn path(self, interface: &str) -> PathBuf {
        PathBuf::from("/proc/sys/net/ipv4/conf").join(interface).join(self.as_str())
    }
}

fn read(interface: &str, name: Name) -> Result<i32, error::Error> {
    let path = name.path(interface);
    let text = fs::read_to_string(&path).map_err(|source| error::Error::file("read", &path, source))?;
    text.trim().parse().map_err(|_| error::Error::file("read", &path, std::io::ErrorKind::InvalidData.into()))
}

/// Gives a setting of an interface a value.
pub(super) fn write(interface: &str, name: Name, value: i32) -> Result<(), error::Error> {
    let path = name.path(interface);
    fs::write(&path, value.to_string()).map_err(|source| error::Error::file("write", &path, source))
}

/// Gives a setting back the value it had before, unless somebody else has changed it since: then says so.
pub(super) fn restore(interface: &str, setting: &Setting) -> Result<Option<String>, error::Error> {
    let now = read(interface, setting.name)?;
    if now == setting.set {
        write(interface, setting.name, setting.before)?;
    } else if now != setting.before {
        let (name, set) = (setting.name.as_str(), setting.set);
        return Ok(Some(format!(
            "net.ipv4.conf.{interface}.{name} is {now} and no longer the {set} that was set: left as it is"
        )));
    }
    Ok(None)
}

/// The values of a setting for all interfaces and for this one.
fn both(interface: &str, name: Name) -> Result<(i32, i32), error::Error> {
    Ok((read("all", name)?, read(interface, name)?))
}

/// Whether ARP requests for an address of the loopback interface go unanswered.
const fn is_silent(arp_ignore: i32) -> bool {
    // 1 and 2 tell only the addresses of the interface that was asked on, 8 tells none. 3 tells those that are good for
    // more than this host, as a virtual address is, and the others mean nothing.
    matches!(arp_ignore, 1 | 2 | 8)
}

/// Whether the interface answers ARP requests for addresses of the loopback interface.
pub(super) fn answers(interface: &str) -> Result<bool, error::Error> {
    let (all, own) = both(interface, Name::ArpIgnore)?;
    Ok(!is_silent(all.max(own)))
}

/// What must be changed so that nobody learns from the interface that the host has `vip`.
pub(super) fn silence(interface: &str, vip: IpAddr) -> Result<Vec<Setting>, Error> {
    if vip.is_ipv6() {
        return Ok(Vec::new());
    }
    let mut settings = Vec::new();
    let (all, own) = both(interface, Name::ArpIgnore)?;
    if !is_silent(all.max(own)) {
        if !is_silent(all.max(ONLY_OWN)) {
            return Err(Error::ArpIgnore { all, name: interface.to_owned(), vip });
        }
        settings.push(Setting { name: Name::ArpIgnore, before: own, set: ONLY_OWN });
    }
    let (all, own) = both(interface, Name::ArpAnnounce)?;
    if all.max(own) < BEST_LOCAL {
        settings.push(Setting { name: Name::ArpAnnounce, before: own, set: BEST_LOCAL });
    }
    Ok(settings)
}

/// What must be changed so that packets out of the tunnel are accepted: the client is seldom reached by the way to the
/// director.
pub(super) fn accept_tunnelled(interface: &str, vip: IpAddr) -> Result<Option<Setting>, error::Error> {
    if vip.is_ipv6() {
        return Ok(None);
    }
    let (all, own) = both(interface, Name::RpFilter)?;
    Ok((all.max(own) == STRICT).then_some(Setting { name: Name::RpFilter, before: own, set: LOOSE }))
}
