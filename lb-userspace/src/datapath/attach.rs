//! Putting the programs on interfaces and taking them off again.
//!
//! A program on an interface is a pinned link: it stays when this process ends, and the program it runs can be exchanged
//! without a packet noticing.

use std::{fs, path::PathBuf};

use aya::{
    programs::{
        SchedClassifier, TcAttachType, Xdp, XdpMode,
        links::{FdLink, LinkError, PinnedLink},
        tc::{self, SchedClassifierLink, TcAttachOptions},
        xdp::XdpLink,
    },
    util::KernelVersion,
};

use crate::{
    datapath::{load::Programs, object::program, place::Place},
    error::Error,
    netlink::{self, Interface, Mode},
};

/// Directory of an instance's link pins.
const LINKS: &str = "links";

/// How the user wants programs to run.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Wish {
    /// In the driver if it can, else in the kernel's receive path.
    #[default]
    Auto,
    /// In the driver.
    Native,
    /// In the kernel's receive path.
    Generic,
}

/// An interface that an instance is attached to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Attachment {
    /// The interface's name.
    pub interface: String,
    /// How the program runs there; `None` when the interface is gone, or something else has taken the program off.
    pub mode: Option<Mode>,
}

/// A file name that is both a link's kind and its interface. Interface names hold no `:`, but may hold a `.`, which the
/// BPF file system does not take.
fn pin_name(kind: &str, interface: &str) -> String {
    format!("{kind}:{}", interface.replace('.', ":"))
}

fn links(place: &Place) -> PathBuf {
    place.directory().join(LINKS)
}

/// The interfaces an instance has links to, by name.
fn linked(place: &Place) -> Result<Vec<String>, Error> {
    let directory = links(place);
    let entries = match fs::read_dir(&directory) {
        Err(source) if source.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(Error::file("list", &directory, source)),
        Ok(entries) => entries,
    };
    let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut interfaces: Vec<String> =
        names.filter_map(|name| name.strip_prefix("xdp:").map(|name| name.replace(':', "."))).collect();
    interfaces.sort();
    Ok(interfaces)
}

/// The interfaces the instance at `place` is attached to.
///
/// # Errors
///
/// When the kernel does not answer.
pub fn attachments(place: &Place) -> Result<Vec<Attachment>, Error> {
    let interfaces = netlink::interfaces()?;
    let names = linked(place)?;
    let mut found = Vec::with_capacity(names.len());
    for name in names {
        let ours = PinnedLink::from_pin(links(place).join(pin_name("xdp", &name))).ok().and_then(|link| {
            let info = FdLink::from(link).info().ok()?;
            Some(info.program_id())
        });
        let xdp = interfaces.iter().find(|interface| interface.name == name).and_then(|interface| interface.xdp);
        let mode = xdp.filter(|xdp| Some(xdp.program) == ours).map(|xdp| xdp.mode);
        found.push(Attachment { interface: name, mode });
    }
    Ok(found)
}

/// What is needed to attach to one interface, checked.
pub struct Plan {
    interface: Interface,
}

/// Checks that programs can be put on the interfaces called `names`.
///
/// # Errors
///
/// [`Error::NoInterface`], or [`Error::InterfaceTaken`] when a program of somebody else is there.
pub fn plan(place: &Place, names: &[String]) -> Result<Vec<Plan>, Error> {
    let interfaces = netlink::interfaces()?;
    let linked = linked(place)?;
    names
        .iter()
        .map(|name| {
            let found = interfaces.iter().find(|interface| &interface.name == name);
            let interface = found.ok_or_else(|| Error::NoInterface { name: name.clone() })?;
            match interface.xdp {
                Some(xdp) if !linked.contains(name) => {
                    Err(Error::InterfaceTaken { name: name.clone(), id: xdp.program })
                }
                _ => Ok(Plan { interface: interface.clone() }),
            }
        })
        .collect()
}

/// Puts the programs on an interface, or exchanges those that the instance has there.
///
/// # Errors
///
/// The kernel's refusal; the interface is as it was before then.
pub fn attach(place: &Place, programs: &mut Programs, plan: &Plan, wish: Wish) -> Result<(), Error> {
    let directory = links(place);
    fs::create_dir_all(&directory).map_err(|source| Error::file("create", &directory, source))?;
    // The program behind first, so that no packet is handed to nobody.
    attach_neighbour(place, programs.neighbour()?, &plan.interface.name)?;
    attach_xdp(place, programs.xdpvs()?, &plan.interface, wish)
}

fn attach_xdp(place: &Place, xdp: &mut Xdp, interface: &Interface, wish: Wish) -> Result<(), Error> {
    let name = &interface.name;
    let pin = links(place).join(pin_name("xdp", name));
    let failed = |action| move |source| Error::Link { action, name: name.clone(), source };
    if let Ok(pinned) = PinnedLink::from_pin(&pin) {
        let link = XdpLink::try_from(FdLink::from(pinned)).map_err(failed("open"))?;
        if interface.xdp.is_some() {
            xdp.attach_to_link(link).map_err(|source| Error::program("exchange", program::XDPVS, source))?;
            return Ok(());
        }
        // The interface has been made anew since: its link is dead.
        fs::remove_file(&pin).map_err(|source| Error::file("remove", &pin, source))?;
    }
    let attach = |xdp: &mut Xdp, mode| {
        xdp.attach_to_if_index(interface.index, mode).map_err(|source| Error::NoDriverMode { name: name.clone(), source })
    };
    let id = match wish {
        Wish::Native => attach(xdp, XdpMode::Driver)?,
        Wish::Generic => attach(xdp, XdpMode::Skb)?,
        Wish::Auto => attach(xdp, XdpMode::Driver).or_else(|_| attach(xdp, XdpMode::Skb))?,
    };
    let link = xdp.take_link(id).map_err(|source| Error::program("attach", program::XDPVS, source))?;
    let link = FdLink::try_from(link).map_err(failed("keep"))?;
    link.pin(&pin).map_err(|source| Error::Pin { path: pin.clone(), source })?;
    Ok(())
}

/// Whether the kernel has TCX links; before, TC programs are filters of a clsact queueing discipline.
fn has_tcx() -> bool {
    KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(6, 6, 0))
}

fn attach_neighbour(place: &Place, classifier: &mut SchedClassifier, name: &str) -> Result<(), Error> {
    let failed = |source| Error::program("attach", program::NEIGHBOUR, source);
    if !has_tcx() {
        // An error means that the queueing discipline exists.
        let _ = tc::qdisc_add_clsact(name);
        let _ = tc::qdisc_detach_program(name, TcAttachType::Ingress, program::NEIGHBOUR);
        let options = TcAttachOptions::Netlink(tc::NlOptions::default());
        let id = classifier.attach_with_options(name, TcAttachType::Ingress, options).map_err(failed)?;
        // A filter stays until it is removed; dropping the link would remove it.
        std::mem::forget(classifier.take_link(id).map_err(failed)?);
        return Ok(());
    }
    let pin = links(place).join(pin_name("tc", name));
    if let Ok(pinned) = PinnedLink::from_pin(&pin) {
        if let Ok(link) = SchedClassifierLink::try_from(FdLink::from(pinned))
            && classifier.attach_to_link(link).is_ok()
        {
            return Ok(());
        }
        fs::remove_file(&pin).map_err(|source| Error::file("remove", &pin, source))?;
    }
    let options = TcAttachOptions::TcxOrder(Default::default());
    let id = classifier.attach_with_options(name, TcAttachType::Ingress, options).map_err(failed)?;
    let link = classifier.take_link(id).map_err(failed)?;
    let link: FdLink = link.try_into().map_err(|source: LinkError| Error::Link {
        action: "keep",
        name: name.to_owned(),
        source,
    })?;
    link.pin(&pin).map_err(|source| Error::Pin { path: pin.clone(), source })?;
    Ok(())
}

/// Takes the programs off an interface. What is already gone is no error.
///
/// # Errors
///
/// When a pin cannot be removed.
pub fn detach(place: &Place, name: &str) -> Result<(), Error> {
    for kind in ["xdp", "tc"] {
        let pin = links(place).join(pin_name(kind, name));
        match fs::remove_file(&pin) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::file("remove", &pin, source));
            }
            _ => {}
        }
    }
    if !has_tcx() {
        let _ = tc::qdisc_detach_program(name, TcAttachType::Ingress, program::NEIGHBOUR);
    }
    Ok(())
}
