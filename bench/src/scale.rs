//! One flow table as it fills up: what a packet of an established connection costs by their number, what a new connection
//! costs by the fill, and how many find neither of their buckets with room.
//!
//! Established connections are created by the control program, thousands at a time, and forwarded by DR. Those that are
//! measured as new are opened by packets, one each, and ended again, so that the table stays as full as it is said to be.
//! Figures are of the same method, and above the same floor, as those of single packets.

use std::{
    io::{Stdout, Write as _},
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use lb_common::{
    abi::bench::pick,
    flow::{Bucket4, ENTRIES_PER_BUCKET},
    proto::{Method, Scheduler},
    tcp,
};
use lb_userspace::{
    control::{
        bulk::{self, NewConnection, ProtocolState},
        connections::Reader,
        model::{ServiceKey, Transport},
        session::Session,
    },
    datapath::{
        run::{Control, Ending},
        sizes::Capacity,
    },
};
use serde::Serialize;
use xdpvs_tests::{
    bulk::Clients,
    family::Family,
    world::{at, service},
};

use crate::{
    packet::{Bench, Floor, NEW, RUNS, TOUCH, XDP_TX, least_and_median, request_frame},
    site::{SERVERS, Site, port},
};

/// Numbers of established connections at which packets are measured, as far as the table is made for them.
const FLOWS: [u32; 6] = [1_000, 1 << 16, 1 << 19, 1 << 20, 1 << 22, 10_000_000];
/// Fills at which new connections are measured, in percent of the entries.
const FILLS: [u32; 4] = [10, 50, 75, 90];
/// The most memory that a table for ten million connections may have.
const MEMORY_MAX: u64 = 512 << 20;
/// The client of the first established connection.
const FIRST: Ipv4Addr = Ipv4Addr::new(10, 64, 0, 1);
/// The client of the first new connection.
const FIRST_NEW: Ipv4Addr = Ipv4Addr::new(10, 128, 0, 1);
/// How long an established connection lives: as long as ip_vs lets it.
const LIVES: Duration = Duration::from_secs(tcp::State::Established.default_timeout_s() as u64);

/// What to measure.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Connections that the table is made for
    #[arg(long, value_name = "N", default_value_t = 10_000_000, value_parser = clap::value_parser!(u32).range(Capacity::FLOWS_MIN as i64..=Capacity::FLOWS_MAX as i64))]
    max_flows: u32,
    /// Measurements of each figure; the least and the median are quoted
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// One object a line instead of tables
    #[arg(long)]
    json: bool,
}

/// One line of what is printed.
#[derive(Serialize)]
#[serde(tag = "what", rename_all = "lowercase")]
enum Line {
    /// The table.
    Table { max_flows: u32, entries: u64, bytes: u64 },
    /// Packets of connections that are established, in no order.
    Established {
        flows: u32,
        /// Connections in the table by its entries.
        fill_percent: f64,
        floor_min: f64,
        min: f64,
        median: f64,
        above_floor_min: f64,
        above_floor_median: f64,
        /// What it costs, above the same floor, to look at one cache line of a table as large.
        cache_line_above_floor_min: f64,
        /// What it takes to read all connections, from the memory that the kernel shares.
        read_ms: f64,
    },
    /// New connections.
    Insert {
        fill_percent: u32,
        /// Connections in the table.
        flows: u32,
        floor_min: f64,
        min: f64,
        median: f64,
        above_floor_min: f64,
        above_floor_median: f64,
        /// New connections tried at this fill.
        tried: u64,
        /// Those of them that found both buckets full.
        overflowed: u64,
        /// Connections tried since the fill before.
        filled: u64,
        /// Those of them that found both buckets full.
        filled_overflowed: u64,
    },
}

/// A step on the way to a full table.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Measure packets of all connections.
    Established,
    /// Measure new connections at this fill, in percent.
    Insert(u32),
}

/// The steps, by the number of connections at which they come.
fn steps(max_flows: u32, entries: u64) -> Vec<(u32, Step)> {
    let flows = FLOWS.into_iter().filter(|flows| *flows <= max_flows).map(|flows| (flows, Step::Established));
    let fills = FILLS.map(|fill| ((entries * u64::from(fill) / 100) as u32, Step::Insert(fill)));
    let mut steps: Vec<_> = flows.chain(fills).collect();
    steps.sort_by_key(|(flows, _)| *flows);
    steps
}

/// Fills a table and prints what is measured on the way.
///
/// # Errors
///
/// When the kernel refuses, when a program does not do what it is measured for, or when the table is too large.
pub(crate) fn run(options: &Options) -> Result<()> {
    let site = Site::new(options.max_flows)?;
    site.namespace.enter(|| measure(&site, options))?
}

fn measure(site: &Site, options: &Options) -> Result<()> {
    let mut scale = Scale::new(site, options)?;
    let (entries, bytes) = (scale.entries, u64::from(scale.buckets) * size_of::<Bucket4>() as u64);
    ensure!(options.max_flows > 10_000_000 || bytes <= MEMORY_MAX, "the table has {bytes} bytes");
    scale.print(&Line::Table { max_flows: options.max_flows, entries, bytes })?;
    for (flows, step) in steps(options.max_flows, entries) {
        scale.fill(flows)?;
        let line = match step {
            Step::Established => scale.established(flows),
            Step::Insert(fill) => scale.insert(flows, fill),
        };
        scale.print(&line.with_context(|| format!("with {flows} connections"))?)?;
    }
    Ok(())
}

struct Scale<'a> {
    site: &'a Site,
    options: &'a Options,
    bench: Bench,
    session: Session,
    control: Control,
    buckets: u32,
    entries: u64,
    /// Slot of the service whose connections are new.
    new_service: u32,
    /// Connections in the table.
    flows: u32,
    /// The next client that has none.
    next: u32,
    /// Since new connections were measured last: those that were tried, and those that found no room.
    filled: (u64, u64),
    /// The kind of the line printed last: a table has a heading.
    heading: &'static str,
    stdout: Stdout,
}

impl<'a> Scale<'a> {
    fn new(site: &'a Site, options: &'a Options) -> Result<Self> {
        let mut session = Session::open(&site.place)?;
        let buckets = session.maps().instance().flow_buckets;
        let new = service(Transport::Tcp, port(Method::Route, Scheduler::Rr));
        let new_service = *session.state()?.by_key.get(&new.into()).context("the service of new connections")?;
        Ok(Self {
            site,
            options,
            bench: Bench::new(site, buckets)?,
            session,
            control: Control::open(&site.place)?,
            buckets,
            entries: u64::from(buckets) * ENTRIES_PER_BUCKET as u64,
            new_service,
            flows: 0,
            next: 0,
            filled: (0, 0),
            heading: "",
            stdout: std::io::stdout(),
        })
    }

    fn clients(&self) -> Clients {
        Clients { first: FIRST, number: self.next, reply: false, order: pick::RANDOM }
    }

    /// Creates established connections until there are `flows`.
    fn fill(&mut self, flows: u32) -> Result<()> {
        let clients = self.clients();
        let port = port(Method::Route, Scheduler::Sh);
        let key: ServiceKey = service(Transport::Tcp, port);
        let lock = self.site.place.lock()?;
        while self.flows < flows {
            let missing = flows - self.flows;
            let connections = (self.next..self.next + missing).map(|flow| NewConnection {
                service: key,
                client: clients.client(flow).into(),
                destination: at((flow % u32::from(SERVERS)) as u8, port),
                state: ProtocolState::Tcp(tcp::State::Established),
                remaining: LIVES,
            });
            let inserted = bulk::insert(&mut self.session, &lock, connections)?;
            ensure!(inserted.created + inserted.full == u64::from(missing), "{inserted:?} of {missing}");
            self.next += missing;
            self.flows += inserted.created as u32;
            self.filled.0 += u64::from(missing);
            self.filled.1 += inserted.full;
        }
        Ok(())
    }

    fn established(&mut self, flows: u32) -> Result<Line> {
        ensure!(self.next == flows, "{} of {} connections found no room", self.next - flows, self.next);
        let frame = request_frame(Family::Four, port(Method::Route, Scheduler::Sh), "A");
        let clients = self.clients();
        let [mut floors, mut figures, mut lines] = [const { Vec::new() }; 3];
        for _ in 0..self.options.rounds {
            self.bench.bulk.set_up(&frame, clients);
            for (program, values) in
                [(Some(Floor::Transmit.program()), &mut floors), (None, &mut figures), (Some(TOUCH), &mut lines)]
            {
                self.bench.put(program)?;
                let ran = self.bench.bulk.repeat(&frame, RUNS)?;
                ensure!(ran.action == XDP_TX, "returned {}", ran.action);
                values.push(ran.nanoseconds as f64);
            }
        }
        let [floor_min, _] = least_and_median(&mut floors);
        let [min, median] = least_and_median(&mut figures);
        let [line, _] = least_and_median(&mut lines);
        Ok(Line::Established {
            flows,
            fill_percent: f64::from(flows) * 100.0 / self.entries as f64,
            floor_min,
            min,
            median,
            above_floor_min: min - floor_min,
            above_floor_median: median - floor_min,
            cache_line_above_floor_min: line - floor_min,
            read_ms: self.read()?,
        })
    }

    /// Reads all connections. Returns the least time it has taken, in milliseconds.
    fn read(&self) -> Result<f64> {
        let maps = self.session.maps();
        let mut least = f64::MAX;
        for _ in 0..3 {
            let begun = Instant::now();
            let now = self.control.clock()?;
            let reader = Reader {
                flows4: &maps.flows4,
                flows6: &maps.flows6,
                services: &maps.services,
                dests: &maps.dests,
                now,
                hz: maps.instance().hz,
            };
            let found = reader.connections().count();
            ensure!(found == self.flows as usize, "{found} of {} connections are read", self.flows);
            least = least.min(begun.elapsed().as_secs_f64() * 1000.0);
        }
        Ok(least)
    }

    fn insert(&mut self, flows: u32, fill_percent: u32) -> Result<Line> {
        let frame = request_frame(Family::Four, port(Method::Route, Scheduler::Rr), "S");
        let [mut floors, mut figures] = [const { Vec::new() }; 2];
        let (mut tried, mut found_room) = (0, 0);
        // Few enough that the table stays as full as it is said to be.
        let new = NEW.min((self.entries / 256) as u32);
        for round in 0..self.options.rounds as u32 {
            // Others each time.
            let first = Ipv4Addr::from_bits(FIRST_NEW.to_bits() + round * NEW / 64);
            let clients = Clients { first, number: new, reply: false, order: pick::SEQUENTIAL };
            self.bench.bulk.set_up(&frame, clients);
            for (program, values) in [(Some(Floor::Transmit.program()), &mut floors), (None, &mut figures)] {
                self.bench.put(program)?;
                values.push(self.bench.bulk.repeat(&frame, new)?.nanoseconds as f64);
            }
            tried += u64::from(new);
            found_room += self.control.flush(self.buckets, Ending::Service(self.new_service))?;
        }
        let [floor_min, _] = least_and_median(&mut floors);
        let [min, median] = least_and_median(&mut figures);
        let (filled, filled_overflowed) = std::mem::take(&mut self.filled);
        Ok(Line::Insert {
            fill_percent,
            flows,
            floor_min,
            min,
            median,
            above_floor_min: min - floor_min,
            above_floor_median: median - floor_min,
            tried,
            overflowed: tried - found_room,
            filled,
            filled_overflowed,
        })
    }

    fn print(&mut self, line: &Line) -> Result<()> {
        let mut out = self.stdout.lock();
        if self.options.json {
            writeln!(out, "{}", serde_json::to_string(line)?)?;
        } else {
            let (heading, row) = line.text();
            if heading != self.heading {
                writeln!(out, "{heading}")?;
                self.heading = heading;
            }
            writeln!(out, "{row}")?;
        }
        Ok(out.flush()?)
    }
}

impl Line {
    /// The heading of its table, and its row.
    fn text(&self) -> (&'static str, String) {
        match self {
            Self::Table { max_flows, entries, bytes } => (
                "",
                format!(
                    "a table for {max_flows} connections: {entries} entries, {:.1} MiB",
                    *bytes as f64 / f64::from(1 << 20)
                ),
            ),
            Self::Established {
                flows,
                fill_percent,
                floor_min,
                min,
                median,
                above_floor_min,
                above_floor_median,
                cache_line_above_floor_min,
                read_ms,
            } => (
                "\nestablished (ns per packet)   fill     floor       min    median   above, min  above, med.  cache line  read (ms)",
                format!(
                    "{flows:>27} {fill_percent:>5.1}% {floor_min:>9.1} {min:>9.1} {median:>9.1} {above_floor_min:>12.1} \
                     {above_floor_median:>12.1} {cache_line_above_floor_min:>11.1} {read_ms:>10.1}"
                ),
            ),
            Self::Insert {
                fill_percent,
                flows,
                floor_min,
                min,
                median,
                above_floor_min,
                above_floor_median,
                tried,
                overflowed,
                filled,
                filled_overflowed,
            } => (
                "\nnew connections (ns each)     fill     floor       min    median   above, min  above, med.  both buckets full",
                format!(
                    "{flows:>27} {fill_percent:>5}% {floor_min:>9.1} {min:>9.1} {median:>9.1} {above_floor_min:>12.1} \
                     {above_floor_median:>12.1}  {overflowed} of {tried} here, {filled_overflowed} of {filled} since the last"
                ),
            ),
        }
    }
}
