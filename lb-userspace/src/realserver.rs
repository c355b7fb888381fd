//! The other side of a service: this host as one of its real servers, for the forwarding methods that leave the virtual
//! address in the packet (`docs/ipvs.md`, sections 5.4 and 5.5).
//!
//! Such a server has the virtual address, on the loopback interface, and must not tell so by ARP or neighbour discovery:
//! only the director answers for it. Packets from a tunnel are taken out of it by an XDP program, so no tunnel device is needed.
//!
//! What is changed is written down before it is changed, so that [`down`] can undo it whenever [`up`] ended; see
//! [`record`]. Every function is about the network namespace of the calling thread.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use serde::{Deserialize, Serialize};

use crate::{
    error,
    netlink::{self, Address, Interface},
    realserver::{
        record::{Home, Record, Server, Setting, Site},
        setting::Name,
        tunnel::Tunnel,
    },
};

pub mod record;
mod setting;
mod six;
mod status;
mod tunnel;

pub use status::{ServerStatus, Status, TunnelStatus, status};

/// The loopback interface.
const LOOPBACK: &str = "lo";

/// How packets reach this host with the virtual address in them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Direct routing: the director only changes the link-layer address.
    Dr,
    /// IP-in-IP: the director puts the packet into another.
    Tun,
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Dr => "dr",
            Self::Tun => "tun",
        })
    }
}

/// Why this host cannot be made a real server, or be one no longer. Nothing has been changed then, unless the variant
/// says so.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the fields are what the messages name")]
pub enum Error {
    /// What can happen to every command.
    #[error(transparent)]
    Common(#[from] error::Error),

    /// An address that no host can have.
    #[error("{given}: not an address that a service can have: give one like 192.0.2.10 or 2001:db8::10")]
    NotUnicast { given: String },

    /// The interface is the loopback.
    #[error("{name} receives nothing from a director: name the interface that the packets arrive by, see `ip link`")]
    Loopback { name: String },

    /// The loopback interface does not work.
    #[error("{LOOPBACK} is down, so no address on it is answered: run `ip link set {LOOPBACK} up`")]
    LoopbackDown,

    /// The program could not find its way in the interface's frames.
    #[error(
        "{name} has no Ethernet frames, which the tunnel program needs: name an interface that has, or use `--method dr`"
    )]
    NotEthernet { name: String },

    /// The address is where it is told to others.
    #[error(
        "{vip} is on {name}, where every {} for it is answered: run `ip address del {vip}/{prefix} dev {name}`",
        question(vip)
    )]
    AddressElsewhere { vip: IpAddr, name: String, prefix: u8 },

    /// The interface answers in the name of others.
    #[error(
        "{name} answers neighbour solicitations for {vip} in the name of another host: run `ip neighbour del proxy {vip} dev \
         {name}`"
    )]
    Proxied { vip: IpAddr, name: String },

    /// The interface takes no part in IPv6.
    #[error("IPv6 is off on {name}: {remedy}")]
    NoIpv6 { name: String, remedy: String },

    /// A setting for all interfaces wins over the one for this.
    #[error(
        "net.ipv4.conf.all.arp_ignore is {all}, with which {name} answers ARP requests for {vip}: set it to 0, 1 or 2 with \
         `sysctl -w net.ipv4.conf.all.arp_ignore=0`"
    )]
    ArpIgnore { all: i32, name: String, vip: IpAddr },

    /// The address is set up already.
    #[error(
        "{vip} is already set up on {name} ({method}): run `xdpvs realserver down {name} --vip {vip}` first to change it"
    )]
    AlreadyUp { vip: IpAddr, name: String, method: Method },

    /// The address is half set up.
    #[error(
        "an earlier `xdpvs realserver up` for {vip} on {name} was killed: run `xdpvs realserver down {name} --vip {vip}` first"
    )]
    HalfUp { vip: IpAddr, name: String },

    /// The interface has been made anew.
    #[error(
        "{name} is not the interface it was when {vip} was set up on it: run `xdpvs realserver down {name} --vip {vip}` first"
    )]
    InterfaceReplaced { name: String, vip: IpAddr },

    /// The tunnel program has no room for another address.
    #[error(
        "{name} already serves {} tunnelled addresses of this family, the most it can: take one down first",
        tunnel::VIPS_MAX
    )]
    Full { name: String },

    /// There is nothing to undo.
    #[error("{vip} has not been set up on {name}: see `xdpvs realserver status`")]
    NotUp { vip: IpAddr, name: String },

    /// The program that runs is not this version's.
    #[error(
        "the tunnel program on {name} was put there by another version of xdpvs: take down every address that \
         `xdpvs realserver status` shows on {name} first"
    )]
    OtherVersion { name: String },

    /// The record cannot be understood.
    #[error(
        "{path} cannot be understood ({source}): it was written by another version of xdpvs, use that one to undo it"
    )]
    Record { path: String, source: serde_json::Error },

    /// A change failed, and undoing the ones before it did, too.
    #[error(
        "{0}; and what had been changed could not be undone: {1}; run `xdpvs realserver down` when that is repaired"
    )]
    NotUndone(Box<Error>, Box<Error>),
}

/// How others ask for the link-layer address of `vip`.
const fn question(vip: &IpAddr) -> &'static str {
    if vip.is_ipv6() { "neighbour solicitation" } else { "ARP request" }
}

/// The address written as `text`.
///
/// # Errors
///
/// [`Error::NotUnicast`] when it is not an address, or not one that a service can have.
pub fn parse_vip(text: &str) -> Result<IpAddr, Error> {
    let refusal = || Error::NotUnicast { given: text.to_owned() };
    check_vip(text.parse().map_err(|_| refusal())?)
}

fn check_vip(vip: IpAddr) -> Result<IpAddr, Error> {
    let usable = match vip {
        IpAddr::V4(vip) => is_usable4(vip),
        IpAddr::V6(vip) => is_usable6(vip),
    };
    if usable { Ok(vip) } else { Err(Error::NotUnicast { given: vip.to_string() }) }
}

const fn is_usable4(vip: Ipv4Addr) -> bool {
    matches!(vip.octets()[0], 1..=223) && !vip.is_loopback()
}

/// A link-local address means nothing without a link, and one with an IPv4 address in it is none of IPv6 on the wire.
const fn is_usable6(vip: Ipv6Addr) -> bool {
    !vip.is_unspecified()
        && !vip.is_loopback()
        && !vip.is_multicast()
        && !vip.is_unicast_link_local()
        && vip.to_ipv4_mapped().is_none()
}

/// A change that makes this host a real server.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    /// Gives a setting of the interface the value that the record has for it.
    Set(Name),
    /// Puts the virtual address on the loopback interface.
    Address,
    /// Lets packets for the virtual address out of the tunnel.
    Tunnel,
}

/// This host on its way to being a real server.
///
/// Dropped before [`Up::finish`], it leaves what a killed process leaves: the changes made so far, and the record of all.
pub struct Up {
    home: Home,
    record: Record,
    interface: Interface,
    vip: IpAddr,
    steps: Vec<Step>,
    notes: Vec<String>,
}

/// Makes this host a real server for `vip`, whose packets arrive by the interface called `name`.
///
/// Returns what the operator should know about it.
///
/// # Errors
///
/// What stands in the way, or the kernel's refusal.
pub fn up(name: &str, vip: IpAddr, method: Method) -> Result<Vec<String>, Error> {
    let mut up = Up::begin(name, vip, method)?;
    while up.remaining() > 0 {
        if let Err(error) = up.step() {
            return Err(match up.undo() {
                Ok(()) => error,
                Err(undo) => Error::NotUndone(Box::new(error), Box::new(undo)),
            });
        }
    }
    up.finish()
}

impl Up {
    /// Checks that nothing stands in the way, and writes down what is going to be changed.
    ///
    /// # Errors
    ///
    /// What stands in the way.
    pub fn begin(name: &str, vip: IpAddr, method: Method) -> Result<Self, Error> {
        if !nix::unistd::geteuid().is_root() {
            return Err(error::Error::NotRoot.into());
        }
        let vip = check_vip(vip)?;
        if name == LOOPBACK {
            return Err(Error::Loopback { name: name.to_owned() });
        }
        let interfaces = netlink::interfaces()?;
        let interface = find(&interfaces, name)?.clone();
        let loopback = find(&interfaces, LOOPBACK)?;
        if !loopback.up {
            return Err(Error::LoopbackDown);
        }
        let home = Home::lock()?;
        let mut record = home.load()?;
        let site = record.site(name);
        check_record(site, &interface, vip)?;
        let address_is_there = check_addresses(&interfaces, vip)?;
        if vip.is_ipv6() {
            six::check(&interface, loopback, vip)?;
        }
        let mut steps = Vec::new();
        let mut settings = setting::silence(name, vip)?;
        if method == Method::Tun {
            settings.extend(setting::accept_tunnelled(name, vip)?);
            check_tunnel(&home, site, &interface, vip)?;
        }
        steps.extend(settings.iter().map(|setting| Step::Set(setting.name)));
        if !address_is_there {
            steps.push(Step::Address);
        }
        if method == Method::Tun {
            steps.push(Step::Tunnel);
        }

        let site = record.site_mut(&interface);
        site.settings.retain(|old| settings.iter().all(|new| new.name != old.name));
        site.settings.extend(settings);
        site.servers.push(Server { vip, method, complete: false });
        home.sweep();
        if !address_is_there {
            record.addresses.push(vip);
        }
        home.save(&record)?;
        Ok(Self { home, record, interface, vip, steps, notes: Vec::new() })
    }

    /// How many changes are left.
    pub fn remaining(&self) -> usize {
        self.steps.len()
    }

    /// Makes the next change.
    ///
    /// # Errors
    ///
    /// The kernel's refusal.
    pub fn step(&mut self) -> Result<(), Error> {
        if self.steps.is_empty() {
            return Ok(());
        }
        match self.steps.remove(0) {
            Step::Set(name) => {
                let settings = self.record.site(&self.interface.name).map(|site| site.settings.as_slice());
                let setting = settings.unwrap_or_default().iter().find(|setting| setting.name == name);
                setting.map_or(Ok(()), |setting| setting::write(&self.interface.name, name, setting.set))?;
            }
            Step::Address => netlink::add_address(&on_loopback(self.vip)?)?,
            Step::Tunnel => self.open_tunnel()?,
        }
        Ok(())
    }

    fn open_tunnel(&mut self) -> Result<(), Error> {
        let name = &self.interface.name;
        let tunnel = Tunnel::find(&self.home, name)?;
        if tunnel.is_attached(&self.interface) {
            return Ok(tunnel.add(self.vip)?);
        }
        let vips: Vec<IpAddr> = self.record.site(name).map(|site| site.tunnelled().collect()).unwrap_or_default();
        if let Some(refusal) = tunnel.attach(&self.interface, &vips)? {
            self.notes.push(format!(
                "the driver of {name} does not run XDP programs ({refusal}): the tunnel program runs in generic mode, which \
                 is slower"
            ));
        }
        Ok(())
    }

    /// Writes down that all is done. Returns what the operator should know.
    ///
    /// # Errors
    ///
    /// When the record cannot be written.
    pub fn finish(mut self) -> Result<Vec<String>, Error> {
        if let Some(server) = self.record.site_mut(&self.interface).server_mut(self.vip) {
            server.complete = true;
        }
        self.home.save(&self.record)?;
        Ok(self.notes)
    }

    /// Undoes the changes made so far.
    ///
    /// # Errors
    ///
    /// The kernel's refusal; [`down`] can be tried then.
    pub fn undo(mut self) -> Result<(), Error> {
        undo(&self.home, &mut self.record, &self.interface.name, self.vip).map(|_| ())
    }
}

/// Undoes what [`up`] did for `vip` on the interface called `name`, and nothing else.
///
/// Returns what was left as it is because somebody else has changed it since.
///
/// # Errors
///
/// [`Error::NotUp`], or the kernel's refusal; what has been undone until then stays so, and the command can be repeated.
pub fn down(name: &str, vip: IpAddr) -> Result<Vec<String>, Error> {
    if !nix::unistd::geteuid().is_root() {
        return Err(error::Error::NotRoot.into());
    }
    let home = Home::lock()?;
    let mut record = home.load()?;
    if record.site(name).and_then(|site| site.server(vip)).is_none() {
        return Err(Error::NotUp { vip, name: name.to_owned() });
    }
    undo(&home, &mut record, name, vip)
}

/// Undoes everything in the opposite order, so that the address is never told to others meanwhile.
fn undo(home: &Home, record: &mut Record, name: &str, vip: IpAddr) -> Result<Vec<String>, Error> {
    let interfaces = netlink::interfaces()?;
    let Some(site) = record.site_mut_by_name(name) else { return Ok(Vec::new()) };
    let Some(server) = site.server(vip).cloned() else { return Ok(Vec::new()) };
    site.servers.retain(|other| other.vip != vip);
    if server.method == Method::Tun {
        match Tunnel::find(home, name) {
            Ok(tunnel) if site.tunnelled().next().is_some() => tunnel.remove(vip)?,
            Ok(tunnel) => tunnel.detach()?,
            // The pins are gone with the file system they were on, and the program with them.
            Err(error::Error::NoBpffs { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let mut notes = Vec::new();
    let left = || site.servers.iter().filter(|server| server.vip.is_ipv4());
    let needed = |setting: &Setting| match setting.name {
        Name::RpFilter => left().any(|server| server.method == Method::Tun),
        Name::ArpIgnore | Name::ArpAnnounce => left().next().is_some(),
    };
    let (keep, restore): (Vec<_>, Vec<_>) = site.settings.iter().cloned().partition(needed);
    site.settings = keep;
    // It may have another name by now, or be gone with its settings.
    let now = interfaces.iter().find(|interface| interface.index == site.index).map(|interface| interface.name.clone());

    let used = record.sites.iter().any(|site| site.server(vip).is_some());
    if !used && record.addresses.contains(&vip) {
        netlink::remove_address(&on_loopback(vip)?)?;
        record.addresses.retain(|address| *address != vip);
    }
    if let Some(now) = now {
        for setting in restore {
            notes.extend(setting::restore(&now, &setting)?);
        }
    }
    record.sites.retain(|site| !site.servers.is_empty());
    home.save(record)?;
    Ok(notes)
}

fn find<'a>(interfaces: &'a [Interface], name: &str) -> Result<&'a Interface, error::Error> {
    let found = interfaces.iter().find(|interface| interface.name == name);
    found.ok_or_else(|| error::Error::NoInterface { name: name.to_owned() })
}

/// The virtual address as it stands on the loopback interface: no network of its own.
fn on_loopback(vip: IpAddr) -> Result<Address, error::Error> {
    Ok(Address {
        index: netlink::interface(LOOPBACK)?.index,
        address: vip,
        prefix: if vip.is_ipv6() { 128 } else { 32 },
        // Over IPv6 the host chooses the source of what it sends among the addresses of all its interfaces. Over IPv4 it
        // chooses among those of the interface that it sends by, and knows nothing of this.
        deprecated: vip.is_ipv6(),
    })
}

fn check_record(site: Option<&Site>, interface: &Interface, vip: IpAddr) -> Result<(), Error> {
    let Some(site) = site else { return Ok(()) };
    let name = interface.name.clone();
    match site.server(vip) {
        Some(Server { complete: false, .. }) => return Err(Error::HalfUp { vip, name }),
        Some(server) => return Err(Error::AlreadyUp { vip, name, method: server.method }),
        None => {}
    }
    match site.servers.first() {
        Some(server) if site.index != interface.index => Err(Error::InterfaceReplaced { name, vip: server.vip }),
        _ => Ok(()),
    }
}

/// Returns whether the address is on the loopback interface.
fn check_addresses(interfaces: &[Interface], vip: IpAddr) -> Result<bool, Error> {
    let loopback = find(interfaces, LOOPBACK)?.index;
    let found = netlink::addresses()?.into_iter().filter(|address| address.address == vip);
    let (here, elsewhere): (Vec<_>, Vec<_>) = found.partition(|address| address.index == loopback);
    let Some(address) = elsewhere.first() else { return Ok(!here.is_empty()) };
    let name = interfaces.iter().find(|interface| interface.index == address.index);
    let name = name.map_or_else(|| format!("interface {}", address.index), |interface| interface.name.clone());
    Err(Error::AddressElsewhere { vip, name, prefix: address.prefix })
}

fn check_tunnel(home: &Home, site: Option<&Site>, interface: &Interface, vip: IpAddr) -> Result<(), Error> {
    let name = &interface.name;
    if !interface.ethernet {
        return Err(Error::NotEthernet { name: name.clone() });
    }
    let tunnel = Tunnel::find(home, name)?;
    match interface.xdp {
        Some(xdp) if tunnel.program_on(interface) != Some(xdp.program) => {
            return Err(error::Error::InterfaceTaken { name: name.clone(), id: xdp.program }.into());
        }
        Some(_) if !tunnel.is_current() => return Err(Error::OtherVersion { name: name.clone() }),
        _ => {}
    }
    let of_family = |site: &Site| site.tunnelled().filter(|other| other.is_ipv6() == vip.is_ipv6()).count();
    if site.is_some_and(|site| of_family(site) >= tunnel::VIPS_MAX) {
        return Err(Error::Full { name: name.clone() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_no_service_has_are_refused() {
        for text in ["", "10.9.9", "10.9.9.9/32", "0.0.0.0", "0.1.2.3", "127.0.0.1", "224.0.0.1", "255.255.255.255"] {
            assert!(matches!(parse_vip(text), Err(Error::NotUnicast { .. })), "{text}");
        }
        for text in [
            "::",
            "::1",
            "ff02::1",
            "ff0e::1",
            "fe80::1",
            "::ffff:10.9.9.9",
            "[fd00:9::9]",
            "fd00:9::9/128",
            "fd00:9::9%eth0",
        ] {
            assert!(matches!(parse_vip(text), Err(Error::NotUnicast { .. })), "{text}");
        }
        for text in ["10.9.9.9", "192.0.2.10", "169.254.1.1", "223.255.255.255", "fd00:9::9", "2001:db8::10"] {
            assert_eq!(parse_vip(text).expect(text).to_string(), text);
        }
    }
}
