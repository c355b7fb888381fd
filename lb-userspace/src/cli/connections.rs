//! `conn`: the connections.

use std::io::{self, Write, stdout};

use clap::Subcommand;
use lb_userspace::{
    control::{
        bulk::Selection,
        connections::{Connection, Filter, Reader},
        model::Transport,
        session::Session,
    },
    datapath::{open::Maps, place::Place, run::Control},
};
use serde::Serialize;

use crate::cli::{
    failure::Failure,
    lines::Lines,
    output::{self, Form},
    words::{ClientWords, SelectionWords},
};

/// What can be done to connections.
#[derive(Subcommand, Debug)]
pub(crate) enum ConnCommand {
    /// Show connections, with state and time left (minutes:seconds): all, or those that all options given are true of
    List {
        #[command(flatten)]
        selection: SelectionWords,
        #[command(flatten)]
        client: ClientWords,
        /// Only show how many there are
        #[arg(long)]
        count: bool,
        #[command(flatten)]
        form: Form,
    },
    /// End all connections, or those to a service or destination: clients have to connect anew
    Flush {
        #[command(flatten)]
        selection: SelectionWords,
    },
}

impl ConnCommand {
    /// Shows connections or ends them.
    pub(crate) fn run(self, place: &Place) -> Result<(), Failure> {
        match self {
            Self::List { selection, client, count, form } => {
                let filter = Filter { selection: selection.selection(), client: client.client, state: client.state };
                list(place, &filter, count, form)
            }
            Self::Flush { selection } => flush(place, &selection.selection()),
        }
    }
}

fn flush(place: &Place, selection: &Selection) -> Result<(), Failure> {
    let lock = place.lock()?;
    let mut session = Session::open(place)?;
    session.recover(&lock)?;
    let endings = selection.endings(&session.state()?)?;
    let (control, buckets) = (Control::open(place)?, session.maps().instance().buckets());
    let mut ended = 0;
    for ending in endings {
        ended += control.flush(buckets, ending)?;
    }
    output::print(&format!("{ended} connections ended\n"))
}

/// What the flow tables of a running instance are read with.
pub(crate) fn reader<'a>(place: &Place, maps: &'a Maps) -> Result<Reader<'a>, Failure> {
    let now = Control::open(place)?.clock()?;
    Ok(Reader::new(&maps.shared(), (&maps.flows4, &maps.flows6), now))
}

#[derive(Serialize)]
struct Count {
    count: usize,
}

fn list(place: &Place, filter: &Filter, count: bool, form: Form) -> Result<(), Failure> {
    let session = Session::open(place)?;
    let reader = reader(place, session.maps())?;
    let connections = reader.connections().filter(|connection| filter.takes(connection));
    if count {
        return form.print(&Count { count: connections.count() }, |Count { count }| format!("{count}\n"));
    }
    let out = Lines::new(stdout().lock());
    output::written(if form.json { json(out, connections) } else { text(out, connections) }.map(drop))
}

/// A protocol by its name.
fn name(protocol: Option<Transport>) -> &'static str {
    protocol.map_or("ip", |protocol| protocol.protocol().as_str())
}

/// One JSON object, each connection on a line of its own.
fn json<W: Write>(mut out: Lines<W>, connections: impl Iterator<Item = Connection>) -> io::Result<W> {
    out.text("{\"connections\":[");
    let mut comma = "";
    for connection in connections {
        out.text(comma).end()?;
        comma = ",";
        let Connection { protocol, client, service, destination, state, expires, method, mark } = connection;
        // No word or address has anything that JSON escapes.
        out.text("{\"protocol\":\"").text(name(protocol));
        out.text("\",\"client\":\"").socket(client);
        out.text("\",\"service\":\"").socket(service);
        out.text("\",\"destination\":\"").socket(destination);
        out.text("\",\"state\":\"").text(state);
        out.text("\",\"expires_ms\":").number(expires);
        out.text(",\"method\":\"").text(method.as_str()).text("\"");
        if let Some(mark) = mark {
            out.text(",\"mark\":").number(mark.get().into());
        }
        out.text("}");
    }
    out.end()?;
    out.text("]}").end()?;
    out.finish()
}

/// A table, its columns as wide as IPv4 addresses with ports.
fn text<W: Write>(mut out: Lines<W>, connections: impl Iterator<Item = Connection>) -> io::Result<W> {
    const WIDTHS: [usize; 6] = [4, 7, 11, 21, 21, 21];
    const GAP: &str = "  ";
    let [protocol_width, expires_width, state_width, client_width, service_width, destination_width] = WIDTHS;
    for (word, width) in ["Prot", "Expires", "State", "Client", "Service", "Destination"].into_iter().zip(WIDTHS) {
        out.text(word).cell(width, GAP);
    }
    out.text("Method").end()?;
    for connection in connections {
        let Connection { protocol, client, service, destination, state, expires, method, .. } = connection;
        out.text(name(protocol)).cell(protocol_width, GAP);
        out.clock(expires).cell(expires_width, GAP);
        out.text(state).cell(state_width, GAP);
        out.socket(client).cell(client_width, GAP);
        out.socket(service).cell(service_width, GAP);
        out.socket(destination).cell(destination_width, GAP);
        out.text(method.as_str()).end()?;
    }
    out.finish()
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use lb_common::proto::Method;
    use serde_json::{Value, json};

    use super::*;

    fn connections() -> impl Iterator<Item = Connection> {
        [1, 2].into_iter().map(|last| Connection {
            protocol: Some(Transport::Tcp),
            client: ([10, 1, 0, last], 54_321).into(),
            service: ([10, 9, 9, 9], 80).into(),
            destination: ([10, 2, 0, 11], 8080).into(),
            state: "ESTABLISHED",
            expires: 899_900,
            method: Method::Masq,
            mark: NonZeroU32::new(last.into()).filter(|mark| mark.get() > 1),
        })
    }

    #[test]
    fn a_list_is_one_json_object_with_a_line_for_each_connection() -> io::Result<()> {
        let connection = |client: &str| {
            json!({
                "protocol": "tcp", "client": client, "service": "10.9.9.9:80", "destination": "10.2.0.11:8080",
                "state": "ESTABLISHED", "expires_ms": 899_900, "method": "nat",
            })
        };
        let written = json(Lines::new(Vec::new()), connections())?;
        let found: Value = serde_json::from_slice(&written)?;
        let mut marked = connection("10.1.0.2:54321");
        marked["mark"] = 2.into();
        assert_eq!(found, json!({"connections": [connection("10.1.0.1:54321"), marked]}));
        assert_eq!(written.iter().filter(|byte| **byte == b'\n').count(), 4);
        let none: Value = serde_json::from_slice(&json(Lines::new(Vec::new()), std::iter::empty())?)?;
        assert_eq!(none, json!({"connections": []}));
        Ok(())
    }

    #[test]
    fn a_list_is_a_table() -> io::Result<()> {
        let written = text(Lines::new(Vec::new()), connections().take(1))?;
        assert_eq!(
            String::from_utf8_lossy(&written),
            "Prot  Expires  State        Client                 Service                Destination            Method\n\
             tcp   14:59    ESTABLISHED  10.1.0.1:54321         10.9.9.9:80            10.2.0.11:8080         nat\n"
        );
        Ok(())
    }
}
