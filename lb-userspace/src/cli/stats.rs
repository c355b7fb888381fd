//! `stats`: what has been carried, and what has not.

use std::net::SocketAddr;

use lb_common::{
    event::Event,
    reason::{Fate, Reason},
};
use lb_userspace::{
    control::{
        model::Transport,
        session::Session,
        traffic::{self, Traffic},
    },
    datapath::{open, place::Place},
};
use serde::{Serialize, Serializer};

use crate::cli::{
    failure::Failure,
    output::{self, Form},
};

#[derive(Serialize)]
struct Stats {
    services: Vec<ServiceTraffic>,
    total: Traffic,
    #[serde(serialize_with = "by_reason")]
    reasons: Vec<(Reason, u64)>,
    #[serde(serialize_with = "by_event")]
    events: Vec<(Event, u64)>,
}

#[derive(Serialize)]
struct ServiceTraffic {
    protocol: Transport,
    address: SocketAddr,
    #[serde(flatten)]
    traffic: Traffic,
    destinations: Vec<DestTraffic>,
}

#[derive(Serialize)]
struct DestTraffic {
    address: SocketAddr,
    #[serde(flatten)]
    traffic: Traffic,
}

fn by_reason<S: Serializer>(reasons: &[(Reason, u64)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(reasons.iter().map(|(reason, count)| (reason.as_str(), count)))
}

fn by_event<S: Serializer>(events: &[(Event, u64)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(events.iter().map(|(event, count)| (event.as_str(), count)))
}

/// Prints what services and destinations have carried, in the order of their addresses.
pub(crate) fn stats(place: &Place, form: Form) -> Result<(), Failure> {
    let mut session = Session::open(place)?;
    let state = session.state()?;
    let counters = session.counters();
    let mut configured = state.configured();
    configured.sort_by_key(|service| service.key);
    let mut services = Vec::with_capacity(configured.len());
    for mut service in configured {
        service.dests.sort_by_key(|dest| dest.address);
        let mut destinations = Vec::with_capacity(service.dests.len());
        for dest in &service.dests {
            destinations.push(DestTraffic { address: dest.address, traffic: Traffic::of_dest(counters, dest.number)? });
        }
        services.push(ServiceTraffic {
            protocol: service.key.protocol,
            address: service.key.address,
            traffic: Traffic::of_service(&state, counters, service.slot)?,
            destinations,
        });
    }
    let mut total = Traffic::default();
    for slot in state.services.keys() {
        total += Traffic::of_service(&state, counters, *slot)?;
    }
    let counted = open::reasons(place)?;
    let (reasons, events) = (traffic::reasons(&counted)?, traffic::events(&counted)?);
    form.print(&Stats { services, total, reasons, events }, text)
}

fn text(stats: &Stats) -> String {
    let heading = ["", "Connections", "Packets in", "Packets out", "Bytes in", "Bytes out"];
    let row = |name: String, traffic: &Traffic| {
        let Traffic { connections, packets_in, packets_out, bytes_in, bytes_out } = traffic;
        let numbers = [connections, packets_in, packets_out, bytes_in, bytes_out].map(u64::to_string);
        [name].into_iter().chain(numbers).collect::<Vec<_>>()
    };
    let mut rows = vec![heading.map(str::to_owned).to_vec()];
    for ServiceTraffic { protocol, address, traffic, destinations } in &stats.services {
        rows.push(row(format!("{protocol} {address}"), traffic));
        rows.extend(destinations.iter().map(|dest| row(format!("  -> {}", dest.address), &dest.traffic)));
    }
    rows.push(row("total".into(), &stats.total));
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
    let mut text = output::table(&rows, &[1, 2, 3, 4, 5]);
    for (heading, rows) in [("Not forwarded:", reasons), ("Besides:", events)] {
        if !rows.is_empty() {
            text.push_str(&format!("\n{heading}\n{}", output::table(&rows, &[1])));
        }
    }
    text
}
