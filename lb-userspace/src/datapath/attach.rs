//! Putting the programs on interfaces and taking them off again.
//!
//! A program on an interface is a pinned link: it stays when this process ends, and the program it runs can be exchanged
//! without a packet noticing.

use std::{
    fs,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use aya::{
    programs::{
        ProgramError, SchedClassifier, TcAttachType, Xdp, XdpMode,
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

impl Wish {
    /// Whether programs that run in `mode` run as wished.
    fn allows(self, mode: Mode) -> bool {
        match self {
            Self::Auto => true,
            Self::Native => mode != Mode::Generic,
            Self::Generic => mode == Mode::Generic,
        }
    }
}

/// An interface that an instance is attached to.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
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

/// The id of the program that the instance's link to the interface `name` runs, or ran before the interface went away.
fn linked_program(place: &Place, name: &str) -> Option<u32> {
    let link = PinnedLink::from_pin(links(place).join(pin_name("xdp", name))).ok()?;
    FdLink::from(link).info().ok().map(|info| info.program_id())
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
        let ours = linked_program(place, &name);
        let xdp = interfaces.iter().find(|interface| interface.name == name).and_then(|interface| interface.xdp);
        let mode = xdp.filter(|xdp| Some(xdp.program) == ours).map(|xdp| xdp.mode);
        found.push(Attachment { interface: name, mode });
    }
    Ok(found)
}

/// What is needed to attach to one interface, checked.
pub struct Plan {
    name: String,
    /// The interface, if it is in this network namespace and nobody else's program is on it.
    interface: Option<Interface>,
    /// Whether the instance has a link to it that may work.
    linked: bool,
}

impl Plan {
    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the instance is attached to the interface already, so that [`attach`] exchanges its programs.
    pub fn is_linked(&self) -> bool {
        self.linked
    }
}

/// Checks that programs can be put on the interfaces called `names`, and finds all others that the instance is attached
/// to.
///
/// # Errors
///
/// [`Error::NoInterface`], [`Error::InterfaceTaken`] when a program of somebody else is there, or [`Error::ModeFixed`]
/// when the instance's runs there otherwise than `wish` says.
pub fn plan(place: &Place, names: &[String], wish: Wish) -> Result<Vec<Plan>, Error> {
    let interfaces = netlink::interfaces()?;
    let linked = linked(place)?;
    let mut plans: Vec<Plan> = Vec::new();
    for name in names.iter().chain(&linked) {
        if plans.iter().any(|plan| &plan.name == name) {
            continue;
        }
        let named = names.contains(name);
        let found = interfaces.iter().find(|interface| &interface.name == name).cloned();
        let ours = linked_program(place, name);
        let xdp = found.as_ref().and_then(|interface| interface.xdp);
        let plan = |interface, linked| Plan { name: name.clone(), interface, linked };
        plans.push(match xdp {
            _ if found.is_none() && named => return Err(Error::NoInterface { name: name.clone() }),
            Some(xdp) if ours == Some(xdp.program) && (!named || wish.allows(xdp.mode)) => plan(found, true),
            Some(xdp) if ours == Some(xdp.program) => {
                return Err(Error::ModeFixed { name: name.clone(), mode: xdp.mode });
            }
            Some(xdp) if named => return Err(Error::InterfaceTaken { name: name.clone(), id: xdp.program }),
            // Somebody else's program is where ours was.
            Some(_) => plan(None, false),
            // A link to an interface that is not here may be one into another network namespace.
            None => plan(found.clone(), found.is_none()),
        });
    }
    Ok(plans)
}

/// What [`attach`] has done.
#[derive(Debug)]
pub enum Outcome {
    /// The programs run on the interface.
    Attached,
    /// They run in the kernel's receive path, because the driver did not take them for this reason.
    FellBack(ProgramError),
    /// The interface is gone or has another program: the instance's link to it was dead and has been removed.
    Gone,
}

/// Puts the programs on an interface, or exchanges those that the instance has there.
///
/// # Errors
///
/// The kernel's refusal; the interface is as it was before then.
pub fn attach(place: &Place, programs: &mut Programs, plan: &Plan, wish: Wish) -> Result<Outcome, Error> {
    let directory = links(place);
    fs::create_dir_all(&directory).map_err(|source| Error::file("create", &directory, source))?;
    if plan.linked {
        return exchange(place, programs, plan);
    }
    // What a link of that name led to is gone.
    detach(place, &plan.name)?;
    let Some(interface) = &plan.interface else { return Ok(Outcome::Gone) };
    // The program behind first, so that no packet is handed to nobody.
    let attached = attach_neighbour(place, programs.neighbour()?, &plan.name)
        .and_then(|()| attach_xdp(place, programs.xdpvs()?, interface, wish));
    if attached.is_err() {
        detach(place, &plan.name)?;
    }
    attached
}

/// Exchanges the programs behind the links to an interface, one store each: no packet meets none.
fn exchange(place: &Place, programs: &mut Programs, plan: &Plan) -> Result<Outcome, Error> {
    let Plan { name, interface, .. } = plan;
    let failed = |action| move |source| Error::Link { action, name: name.clone(), source };
    let pinned = PinnedLink::from_pin(links(place).join(pin_name("xdp", name))).map_err(failed("open"))?;
    let link = XdpLink::try_from(FdLink::from(pinned)).map_err(failed("open"))?;
    match (attach_neighbour(place, programs.neighbour()?, name), interface) {
        (Err(error), Some(_)) => return Err(error),
        (Err(_), None) => return detach(place, name).map(|()| Outcome::Gone),
        (Ok(()), _) => {}
    }
    match (programs.xdpvs()?.attach_to_link(link), interface) {
        (Ok(_), _) => Ok(Outcome::Attached),
        (Err(source), Some(_)) => Err(Error::program("exchange", program::XDPVS, source)),
        (Err(_), None) => detach(place, name).map(|()| Outcome::Gone),
    }
}

fn attach_xdp(place: &Place, xdp: &mut Xdp, interface: &Interface, wish: Wish) -> Result<Outcome, Error> {
    let name = &interface.name;
    let pin = links(place).join(pin_name("xdp", name));
    let in_driver = |xdp: &mut Xdp| xdp.attach_to_if_index(interface.index, XdpMode::Driver);
    let generic = |xdp: &mut Xdp| {
        let attached = xdp.attach_to_if_index(interface.index, XdpMode::Skb);
        attached.map_err(|source| Error::Attach { name: name.clone(), source })
    };
    let (id, outcome) = match wish {
        Wish::Native => {
            let attached = in_driver(xdp).map_err(|source| Error::NoDriverMode { name: name.clone(), source })?;
            (attached, Outcome::Attached)
        }
        Wish::Generic => (generic(xdp)?, Outcome::Attached),
        Wish::Auto => match in_driver(xdp) {
            Ok(id) => (id, Outcome::Attached),
            Err(why) => (generic(xdp)?, Outcome::FellBack(why)),
        },
    };
    let link = xdp.take_link(id).map_err(|source| Error::program("attach", program::XDPVS, source))?;
    let link = FdLink::try_from(link).map_err(|source| Error::Link { action: "keep", name: name.clone(), source })?;
    link.pin(&pin).map_err(|source| Error::Pin { path: pin.clone(), source })?;
    Ok(outcome)
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
    let link: FdLink =
        link.try_into().map_err(|source: LinkError| Error::Link { action: "keep", name: name.to_owned(), source })?;
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

/// How long programs may stay on their interfaces after the last pin of their links is gone, which the kernel sees to in
/// its own time.
const DETACHING: Duration = Duration::from_secs(2);

/// Takes the programs off all interfaces. When it returns, they are off.
///
/// # Errors
///
/// When a pin cannot be removed.
pub fn detach_all(place: &Place) -> Result<(), Error> {
    let names = linked(place)?;
    let programs: Vec<u32> = names.iter().filter_map(|name| linked_program(place, name)).collect();
    names.iter().try_for_each(|name| detach(place, name))?;
    let begun = Instant::now();
    let is_on = |interface: &Interface| interface.xdp.is_some_and(|xdp| programs.contains(&xdp.program));
    while begun.elapsed() < DETACHING && netlink::interfaces()?.iter().any(is_on) {
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
