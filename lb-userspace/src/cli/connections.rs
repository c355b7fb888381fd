//! `conn`: the connections.

use std::{
    fmt::Write as _,
    io::{self, BufWriter, Write, stdout},
};

use clap::Subcommand;
use lb_userspace::{
    control::{
        connections::{Connection, Reader},
        session::Session,
    },
    datapath::{
        open::Maps,
        place::Place,
        run::{Control, Ending},
    },
};
use serde::{Serialize, Serializer};

use crate::cli::{
    failure::Failure,
    output::{self, Form},
};

/// What can be done to connections.
#[derive(Subcommand, Debug)]
pub(crate) enum ConnCommand {
    /// Show every connection, with its state and the time it has left (minutes:seconds)
    List(Form),
    /// End all connections: clients have to connect anew
    Flush,
}

impl ConnCommand {
    /// Shows connections or ends them.
    pub(crate) fn run(self, place: &Place) -> Result<(), Failure> {
        match self {
            Self::List(form) => list(place, form),
            Self::Flush => {
                let lock = place.lock()?;
                let mut session = Session::open(place)?;
                session.recover(&lock)?;
                let ended = Control::open(place)?.flush(session.maps().instance().flow_buckets, Ending::All)?;
                output::print(&format!("{ended} connections ended\n"))
            }
        }
    }
}

/// What the flow table of a running instance is read with.
pub(crate) fn reader<'a>(place: &Place, maps: &'a Maps) -> Result<Reader<'a>, Failure> {
    let now = Control::open(place)?.clock()?;
    Ok(Reader { flows: &maps.flows4, dests: &maps.dests, now, hz: maps.instance().hz })
}

#[derive(Serialize)]
struct List<'a> {
    #[serde(serialize_with = "as_sequence")]
    connections: Reader<'a>,
}

fn as_sequence<S: Serializer>(reader: &Reader<'_>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(reader.connections())
}

fn list(place: &Place, form: Form) -> Result<(), Failure> {
    let session = Session::open(place)?;
    let reader = reader(place, session.maps())?;
    // There may be millions: each is written as it is read.
    let mut out = BufWriter::new(stdout().lock());
    let written = if form.json { json(&mut out, reader) } else { text(&mut out, reader) };
    output::written(written.and_then(|()| out.flush()))
}

fn json(out: &mut impl Write, reader: Reader<'_>) -> io::Result<()> {
    serde_json::to_writer(&mut *out, &List { connections: reader })?;
    out.write_all(b"\n")
}

fn text(out: &mut impl Write, reader: Reader<'_>) -> io::Result<()> {
    let heading = ["Prot", "Expires", "State", "Client", "Service", "Destination", "Method"].map(str::to_owned);
    writeln!(out, "{}", line(&heading))?;
    for connection in reader.connections() {
        let Connection { protocol, client, service, destination, state, expires, method } = connection;
        let cells = [
            protocol.to_string(),
            clock(expires),
            state.to_owned(),
            client.to_string(),
            service.to_string(),
            destination.to_string(),
            method.to_string(),
        ];
        writeln!(out, "{}", line(&cells))?;
    }
    Ok(())
}

/// A line of the list, its columns as wide as IPv4 addresses with ports.
fn line(cells: &[String; 7]) -> String {
    const WIDTHS: [usize; 6] = [4, 7, 11, 21, 21, 21];
    let [cells @ .., last] = cells;
    let mut line = String::new();
    for (cell, width) in cells.iter().zip(WIDTHS) {
        // Writing to a string does not fail.
        let _ = write!(line, "{cell:width$}  ");
    }
    line + last
}

/// A time in milliseconds as minutes and seconds.
pub(crate) fn clock(ms: u64) -> String {
    let seconds = ms / 1000;
    format!("{:02}:{:02}", seconds / 60, seconds % 60)
}
