//! `stats` and `zero`: what has been carried, and what has not.

use std::net::SocketAddr;

use lb_common::{
    event::Event,
    reason::{Fate, Reason},
};
use lb_userspace::{
    control::{
        model::Identity,
        session::Session,
        shared::Object,
        state::State,
        traffic::{self, Rates, Traffic},
    },
    datapath::{open, place::Place},
    error::Error,
};
use serde::{Serialize, Serializer};

use crate::cli::{
    config::Name,
    failure::Failure,
    output::{self, Form},
    words,
};

/// What `stats` is told.
#[derive(clap::Args, Clone, Copy, Debug)]
pub(crate) struct Stats {
    /// Show how much is carried in a second, as ip_vs estimates it every two seconds
    #[arg(long)]
    rate: bool,
    #[command(flatten)]
    form: Form,
}

/// Which service is zeroed.
#[derive(clap::Args, Clone, Copy, Debug)]
pub(crate) struct Zero {
    /// Only this service and its destinations
    #[command(flatten)]
    service: words::MaybeServiceWords,
}

impl Zero {
    /// Lets counters begin at zero.
    pub(crate) fn run(self, place: &Place) -> Result<(), Failure> {
        zero(place, self.service.key())
    }
}

/// Lets the counters of a service begin at zero, or all.
pub(crate) fn zero(place: &Place, key: Option<Identity>) -> Result<(), Failure> {
    let lock = place.lock()?;
    Ok(Session::open(place)?.zero(&lock, key)?)
}

#[derive(Serialize)]
struct Counted {
    #[serde(flatten)]
    amounts: Amounts<Traffic>,
    #[serde(serialize_with = "by_reason")]
    reasons: Vec<(Reason, u64)>,
    #[serde(serialize_with = "by_event")]
    events: Vec<(Event, u64)>,
}

#[derive(Serialize)]
struct Amounts<T> {
    services: Vec<ServiceAmounts<T>>,
    total: T,
}

#[derive(Serialize)]
struct ServiceAmounts<T> {
    #[serde(flatten)]
    name: Name,
    #[serde(skip)]
    identity: Identity,
    #[serde(flatten)]
    amounts: T,
    destinations: Vec<DestAmounts<T>>,
}

#[derive(Serialize)]
struct DestAmounts<T> {
    address: SocketAddr,
    #[serde(flatten)]
    amounts: T,
}

fn by_reason<S: Serializer>(reasons: &[(Reason, u64)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(reasons.iter().map(|(reason, count)| (reason.as_str(), count)))
}

fn by_event<S: Serializer>(events: &[(Event, u64)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(events.iter().map(|(event, count)| (event.as_str(), count)))
}

impl Stats {
    /// Prints what services and destinations have carried, or carry, in the order of their addresses.
    pub(crate) fn run(self, place: &Place) -> Result<(), Failure> {
        let mut session = Session::open(place)?;
        let state = session.state()?;
        let shared = session.maps().shared();
        if self.rate {
            let rates = Amounts::of(&state, |object| Ok(Rates::of(&shared, object)))?;
            return self.form.print(&rates, |rates| output::table(&rates.rows(RATES, Rates::cells), &[1, 2, 3, 4, 5]));
        }
        let amounts = Amounts::of(&state, |object| Traffic::of(&shared, &state, session.counters(), object))?;
        let counted = open::reasons(place)?;
        let (reasons, events) = (traffic::reasons(&counted)?, traffic::events(&counted)?);
        self.form.print(&Counted { amounts, reasons, events }, text)
    }
}

impl<T> Amounts<T> {
    /// What there is of everything that is configured.
    fn of(state: &State, of: impl Fn(Object) -> Result<T, Error>) -> Result<Self, Failure> {
        let mut configured = state.configured();
        configured.sort_by_key(|service| service.key);
        let mut services = Vec::with_capacity(configured.len());
        for mut service in configured {
            service.dests.sort_by_key(|dest| dest.address);
            let mut destinations = Vec::with_capacity(service.dests.len());
            for dest in &service.dests {
                destinations.push(DestAmounts { address: dest.address, amounts: of(Object::Dest(dest.number))? });
            }
            let identity = service.key;
            let amounts = of(Object::Service(service.slot))?;
            services.push(ServiceAmounts { name: identity.into(), identity, amounts, destinations });
        }
        Ok(Self { services, total: of(Object::All)? })
    }

    /// The cells of a table.
    fn rows(&self, heading: [&str; 6], cells: impl Fn(&T) -> [u64; 5]) -> Vec<Vec<String>> {
        let row = |name: String, amounts: &T| {
            [name].into_iter().chain(cells(amounts).map(|cell| cell.to_string())).collect::<Vec<_>>()
        };
        let mut rows = vec![heading.map(str::to_owned).to_vec()];
        for ServiceAmounts { identity, amounts, destinations, .. } in &self.services {
            rows.push(row(identity.to_string(), amounts));
            rows.extend(destinations.iter().map(|dest| row(format!("  -> {}", dest.address), &dest.amounts)));
        }
        rows.push(row("total".into(), &self.total));
        rows
    }
}

/// The heading of what has been carried.
const AMOUNTS: [&str; 6] = ["", "Connections", "Packets in", "Packets out", "Bytes in", "Bytes out"];
/// The heading of what is carried in a second.
const RATES: [&str; 6] = ["In a second", "Connections", "Packets in", "Packets out", "Bytes in", "Bytes out"];

fn text(stats: &Counted) -> String {
    let met = stats.reasons.iter().filter(|(_, count)| *count > 0);
    let reasons: Vec<Vec<String>> = met
        .map(|(reason, count)| {
            let fate = match reason.fate() {
                Fate::Passed => "passed",
                Fate::Dropped => "dropped",
            };
            vec![reason.as_str().to_owned(), count.to_string(), fate.to_owned(), reason.describe().to_owned()]
        })
        .collect();
    let done = stats.events.iter().filter(|(_, count)| *count > 0);
    let events: Vec<Vec<String>> = done
        .map(|(event, count)| vec![event.as_str().to_owned(), count.to_string(), event.describe().to_owned()])
        .collect();
    let mut text = output::table(&stats.amounts.rows(AMOUNTS, Traffic::cells), &[1, 2, 3, 4, 5]);
    for (heading, rows) in [("Not forwarded:", reasons), ("Besides:", events)] {
        if !rows.is_empty() {
            text.push_str(&format!("\n{heading}\n{}", output::table(&rows, &[1])));
        }
    }
    text
}
