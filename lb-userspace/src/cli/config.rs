//! `service`, `dest`, `list`: the configuration.

use std::{net::SocketAddr, num::NonZeroU32};

use clap::Subcommand;
use lb_common::{
    abi::active_and_total,
    overload::Thresholds,
    proto::{Method, Scheduler},
};
use lb_userspace::{
    control::{
        change::Change,
        model::{DestSpec, Family, Identity, MarkKey, Persistence, Refusal, ServiceKey, ServiceSpec, Transport},
        session::Session,
    },
    datapath::{
        attach::{self, Attachment},
        ipv6,
        place::Place,
    },
};
use serde::Serialize;

use crate::cli::{
    complain,
    failure::Failure,
    instance::mode_word,
    output::{self, Form},
    words::{self, DestWords, FlagWords, MethodWords, PersistenceWords, ServiceWords, ThresholdWords},
};

/// The weight of a destination unless another is given.
const DEFAULT_WEIGHT: u32 = 1;

/// What can be changed about a destination.
const CHANGES: [&str; 7] = ["gatewaying", "masquerading", "ipip", "method", "weight", "u_threshold", "l_threshold"];

/// What can be done to services.
#[derive(Subcommand, Debug)]
pub(crate) enum ServiceCommand {
    /// Add a service, without destinations
    Add {
        #[command(flatten)]
        service: ServiceWords,
        /// Who gets the next connection: rr, wrr, lc, wlc, sed, nq, fo, ovf, sh, dh, mh, lblc, lblcr or twos as in ip_vs;
        /// random, wrandom or wdh, which ip_vs has not
        #[arg(short, long, default_value = "wlc", value_name = "SCHED", value_parser = words::scheduler)]
        scheduler: Scheduler,
        #[command(flatten)]
        flags: FlagWords,
        #[command(flatten)]
        persistence: PersistenceWords,
    },
    /// Give a service another scheduler, flags and persistence: those that are not given it has no more. Connections stay where
    /// they are
    Edit {
        #[command(flatten)]
        service: ServiceWords,
        /// Who gets the next connection: rr, wrr, lc, wlc, sed, nq, fo, ovf, sh, dh, mh, lblc, lblcr or twos as in ip_vs;
        /// random, wrandom or wdh, which ip_vs has not
        #[arg(short, long, value_name = "SCHED", value_parser = words::scheduler)]
        scheduler: Scheduler,
        #[command(flatten)]
        flags: FlagWords,
        #[command(flatten)]
        persistence: PersistenceWords,
    },
    /// Remove a service with its destinations; packets of its connections go nowhere from then on
    Del {
        #[command(flatten)]
        service: ServiceWords,
    },
    /// Remove all services
    Flush,
}

/// What can be done to destinations.
#[derive(Subcommand, Debug)]
pub(crate) enum DestCommand {
    /// Add a destination to a service
    Add {
        #[command(flatten)]
        dest: DestWords,
        #[command(flatten)]
        method: MethodWords,
        /// Share of new connections, 0 (none) to 2147483647
        #[arg(short, long, default_value_t = DEFAULT_WEIGHT, value_parser = words::weight, allow_negative_numbers = true)]
        weight: u32,
        #[command(flatten)]
        thresholds: ThresholdWords,
    },
    /// Change a destination's weight, method or thresholds; what is not given stays. Connections keep the method they have
    #[command(group = clap::ArgGroup::new("change").args(CHANGES).required(true).multiple(true))]
    Edit {
        #[command(flatten)]
        dest: DestWords,
        #[command(flatten)]
        method: MethodWords,
        /// Share of new connections, 0 (none) to 2147483647
        #[arg(short, long, value_parser = words::weight, allow_negative_numbers = true)]
        weight: Option<u32>,
        #[command(flatten)]
        thresholds: ThresholdWords,
    },
    /// Remove a destination; packets of its connections go nowhere until it is added again
    Del {
        #[command(flatten)]
        dest: DestWords,
    },
}

/// Opens the instance and changes it, holding its lock from before it is opened.
fn change(place: &Place, plan: impl FnOnce(&mut Change<'_>) -> Result<(), Refusal>) -> Result<(), Failure> {
    let lock = place.lock()?;
    Session::open(place)?.change_under(&lock, |change| Ok(plan(change)?))
}

impl ServiceCommand {
    /// Changes the configuration.
    pub(crate) fn run(self, place: &Place) -> Result<(), Failure> {
        let added = match &self {
            Self::Add { service, .. } => Some(service.key()),
            _ => None,
        };
        if let Some(key) = added {
            ipv6::check(key)?;
        }
        change(place, |change| match self {
            Self::Add { service, scheduler, flags, persistence } => {
                let key = service.key();
                change.add_service(key, ServiceSpec { persistence: persistence.of(key)?, ..flags.of(scheduler)? })
            }
            Self::Edit { service, scheduler, flags, persistence } => {
                let key = service.key();
                change.edit_service(key, ServiceSpec { persistence: persistence.of(key)?, ..flags.of(scheduler)? })
            }
            Self::Del { service } => change.delete_service(service.key()),
            Self::Flush => {
                change.flush();
                Ok(())
            }
        })?;
        if let Some(key) = added.filter(|key| key.family() == Family::Ipv6) {
            let attachments = attach::attachments(place)?;
            if !ipv6::is_taken(attachments.iter().map(|attachment| attachment.interface.as_str())) {
                complain(&format!("service {key}: no packet will come for it: {}", ipv6::why_not()));
            }
        }
        Ok(())
    }
}

impl DestCommand {
    /// Changes the configuration.
    pub(crate) fn run(self, place: &Place) -> Result<(), Failure> {
        change(place, |change| match self {
            Self::Add { dest, method, weight, thresholds } => {
                let (service, address) = dest.keys();
                let method = method.method().unwrap_or(Method::Route);
                let thresholds = thresholds.instead_of(Thresholds::default());
                change.add_dest(service, address, DestSpec { method, weight, thresholds })
            }
            Self::Edit { dest, method, weight, thresholds } => {
                let (service, address) = dest.keys();
                let old = change.dest(service, address)?;
                let spec = DestSpec {
                    method: method.method().unwrap_or(old.method),
                    weight: weight.unwrap_or(old.weight),
                    thresholds: thresholds.instead_of(old.thresholds),
                };
                change.edit_dest(service, address, spec)
            }
            Self::Del { dest } => {
                let (service, address) = dest.keys();
                change.delete_dest(service, address)
            }
        })
    }
}

/// What tells a service apart: protocol and address, or mark and address family.
#[derive(Serialize)]
#[serde(untagged)]
pub(crate) enum Name {
    Address { protocol: Transport, address: SocketAddr },
    Mark { mark: NonZeroU32, family: Family },
}

impl From<Identity> for Name {
    fn from(identity: Identity) -> Self {
        match identity {
            Identity::Address(ServiceKey { protocol, address }) => Self::Address { protocol, address },
            Identity::Mark(MarkKey { mark, family }) => Self::Mark { mark, family },
        }
    }
}

#[derive(Serialize)]
struct List<'a> {
    instance: &'a str,
    mode: Vec<Attachment>,
    services: Vec<ListedService>,
}

#[derive(Serialize)]
struct ListedService {
    #[serde(flatten)]
    name: Name,
    scheduler: &'static str,
    flags: Vec<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    persistence: Option<ListedPersistence>,
    #[serde(skip)]
    schedule: [String; 2],
    destinations: Vec<ListedDest>,
}

#[derive(Serialize)]
struct ListedPersistence {
    timeout: u32,
    netmask: String,
}

#[derive(Serialize)]
struct ListedDest {
    address: SocketAddr,
    method: &'static str,
    weight: u32,
    upper_threshold: u32,
    lower_threshold: u32,
    /// Whether the thresholds keep new connections away.
    overloaded: bool,
    active: u32,
    inactive: u32,
    templates: u32,
}

/// Prints the configuration, services and destinations in the order of their addresses.
pub(crate) fn list(place: &Place, form: Form) -> Result<(), Failure> {
    let mut session = Session::open(place)?;
    let mut services = session.state()?.configured();
    services.sort_by_key(|service| service.key);
    let loads = &session.maps().dest_loads;
    let services = services.into_iter().map(|mut service| {
        service.dests.sort_by_key(|dest| dest.address);
        let dests = service.dests.iter().map(|dest| {
            let load = loads.get(dest.number as usize);
            let (active, total) = active_and_total(load.map_or(0, |load| load.connections.load()));
            let thresholds = dest.spec.thresholds;
            ListedDest {
                address: dest.address,
                method: dest.spec.method.as_str(),
                weight: dest.spec.weight,
                upper_threshold: thresholds.upper,
                lower_threshold: thresholds.lower,
                overloaded: load.is_some_and(|load| load.is_overloaded(thresholds)),
                active,
                inactive: total.saturating_sub(active),
                templates: load.map_or(0, |load| load.templates.load()),
            }
        });
        ListedService {
            name: service.key.into(),
            scheduler: service.spec.scheduler.as_str(),
            flags: [service.spec.flag_names(), service.spec.is_one_packet().then_some("ops").into_iter().collect()]
                .concat(),
            persistence: service
                .spec
                .persistence
                .map(|Persistence { timeout, netmask }| ListedPersistence { timeout, netmask: netmask.to_string() }),
            schedule: [service.key.to_string(), service.spec.describe()],
            destinations: dests.collect(),
        }
    });
    let list = List { instance: place.name(), mode: attach::attachments(place)?, services: services.collect() };
    form.print(&list, text)
}

fn text(list: &List<'_>) -> String {
    let modes: Vec<String> =
        list.mode.iter().map(|Attachment { interface, mode }| format!("{interface} ({})", mode_word(*mode))).collect();
    let modes = if modes.is_empty() { "no interface".to_owned() } else { modes.join(", ") };
    let head = format!("Instance {} on {modes}\n", list.instance);
    let heading = ["Service", "Scheduler", "Destination", "Method", "Weight", "Active", "Inactive", "Limits"];
    let mut rows = vec![heading.map(str::to_owned).to_vec()];
    for ListedService { schedule, destinations, .. } in &list.services {
        rows.push(schedule.to_vec());
        for dest in destinations {
            let ListedDest { address, method, weight, active, inactive, .. } = dest;
            let (address, method) = (address.to_string(), (*method).to_owned());
            let [weight, active, inactive] = [weight, active, inactive].map(u32::to_string);
            rows.push(vec![String::new(), String::new(), address, method, weight, active, inactive, limits(dest)]);
        }
    }
    head + &output::table(&rows, &[4, 5, 6])
}

/// The thresholds of a destination that has some, and whether it is overloaded.
fn limits(dest: &ListedDest) -> String {
    let state = if dest.overloaded { ", overloaded" } else { "" };
    match (dest.upper_threshold, dest.lower_threshold) {
        (0, _) => String::new(),
        (upper, 0) => format!("{upper}{state}"),
        (upper, lower) => format!("{upper} down to {lower}{state}"),
    }
}
