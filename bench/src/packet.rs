//! Nanoseconds per packet by `BPF_PROG_TEST_RUN`, above the floor of the method.
//!
//! Before every run a wrapper ([`xdpvs_tests::bulk`]) makes the packet that of one of many clients, and tail-calls the
//! program that is measured; what the wrapper costs with a program that does nothing behind it is the floor. Floor and case
//! are measured in turn, and a case is quoted above its floor.
//!
//! How much of a figure is the memory's is shown by a program that only looks at one cache line, picked by the client, of
//! a table as large as the flow table.
//!
//! The flow table is made for twice as many connections as the case has, and for no fewer than a small director would.
//! In a fuller one more connections stand beside their first place, and more cache lines are looked at; in a larger one
//! they lie further apart, which costs more misses of the processor's address translation.

use std::{fmt::Write as _, io::Write as _};

use anyhow::{Context as _, Result, ensure};
use aya::programs::{ProgramFd, loaded_programs};
use lb_common::{
    abi::bench::pick,
    checksum,
    flow::Bucket4,
    proto::{Method, Scheduler},
};
use lb_userspace::{
    control::session::Session,
    datapath::run::{Control, Ending},
};
use serde::Serialize;
use xdpvs_tests::{
    bulk::{Bulk, Clients},
    cast,
    family::Family,
    frames::{ETHERNET, Frame},
};

use crate::site::{MANY, SINGLE, Site, port, port_of_many};

/// Runs of one measurement.
pub(crate) const RUNS: u32 = 1_000_000;
/// Connections that are opened by one measurement of new ones, before the table is emptied again.
pub(crate) const NEW: u32 = 1 << 16;
/// Fewest connections a table is made for here.
const TABLE_MIN: u32 = 1 << 14;

/// The program that only looks at one cache line.
pub(crate) const TOUCH: &str = "touch";
/// Bytes of a cache line.
const CACHE_LINE: usize = 64;

const XDP_PASS: u32 = 2;
pub(crate) const XDP_TX: u32 = 3;

/// What to measure.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Measurements of each case; the least and the median are quoted
    #[arg(long, default_value_t = 15)]
    rounds: usize,
    /// One object a line instead of a table
    #[arg(long)]
    json: bool,
    /// Only cases whose name holds this
    #[arg(long, default_value = "")]
    only: String,
    /// Only cases with this number of flows
    #[arg(long)]
    flows: Option<u32>,
}

/// What a case is measured above.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Floor {
    Transmit,
    Push,
    Push6,
    Pass,
}

impl Floor {
    /// The program that does nothing else.
    pub(crate) const fn program(self) -> &'static str {
        match self {
            Self::Transmit => "floor_transmit",
            Self::Push => "floor_push",
            Self::Push6 => "floor_push6",
            Self::Pass => "floor_pass",
        }
    }
}

/// What is measured.
struct Case {
    name: String,
    /// Number of flows.
    flows: u32,
    frame: Vec<u8>,
    /// Whether clients are told by the destination of the frame: it is a reply.
    reply: bool,
    kind: Kind,
    floor: Floor,
    /// What leaves: return value and length.
    result: u32,
    len: usize,
}

/// Whose packets are measured.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Connections that are established, in no order.
    Established,
    /// Connections that begin, one after the other.
    New,
    /// Nobody's.
    Foreign,
    /// Of clients in no order, for the program that only looks at one cache line of a table as large as the flow table.
    Line,
}

impl Case {
    fn clients(&self) -> Clients {
        let order = match self.kind {
            Kind::New => pick::SEQUENTIAL,
            _ if self.flows == 1 => pick::SAME,
            _ => pick::RANDOM,
        };
        Clients { first: cast::CLIENT, number: self.flows, order, reply: self.reply }
    }

    fn runs(&self) -> u32 {
        if self.kind == Kind::New { self.flows } else { RUNS }
    }
}

#[derive(Serialize)]
struct Figure {
    case: String,
    flows: u32,
    floor_min: f64,
    min: f64,
    median: f64,
    above_floor_min: f64,
    above_floor_median: f64,
}

/// The director's program behind the one that makes packets.
pub(crate) struct Bench {
    /// What makes packets.
    pub(crate) bulk: Bulk,
    director: ProgramFd,
}

/// Measures and prints.
///
/// # Errors
///
/// When the kernel refuses, or when a program does not do what it is measured for.
pub(crate) fn run(options: &Options) -> Result<()> {
    if !options.json {
        println!(
            "{:<28} {:>8} {:>9} {:>9} {:>9} {:>12} {:>12}",
            "case (ns per packet)", "flows", "floor", "min", "median", "above, min", "above, med."
        );
    }
    for flows in [1, 1 << 10, NEW, 1 << 19] {
        let wanted =
            |case: &Case| case.name.contains(&options.only) && options.flows.is_none_or(|flows| case.flows == flows);
        let cases: Vec<Case> = cases(flows).into_iter().filter(wanted).collect();
        if !cases.is_empty() {
            let site = Site::new((2 * flows).max(TABLE_MIN))?;
            site.namespace.enter(|| measure(&site, &cases, options))??;
        }
    }
    Ok(())
}

fn measure(site: &Site, cases: &[Case], options: &Options) -> Result<()> {
    let control = Control::open(&site.place)?;
    let session = Session::open(&site.place)?;
    let instance = session.maps().instance();
    let mut bench = Bench::new(site, instance.flow_buckets)?;
    let buckets = instance.buckets();
    let mut stdout = std::io::stdout().lock();
    for case in cases {
        control.flush(buckets, Ending::All)?;
        let figure = bench.case(case, options.rounds, &control, buckets).with_context(|| case.name.clone())?;
        let line = if options.json { serde_json::to_string(&figure)? } else { row(&figure) };
        writeln!(stdout, "{line}")?;
        stdout.flush()?;
    }
    Ok(())
}

fn row(figure: &Figure) -> String {
    let mut row = format!("{:<28} {:>8}", figure.case, figure.flows);
    for value in [figure.floor_min, figure.min, figure.median] {
        let _ = write!(row, " {value:>9.1}");
    }
    for value in [figure.above_floor_min, figure.above_floor_median] {
        let _ = write!(row, " {value:>12.1}");
    }
    row
}

impl Bench {
    /// For the director of `site`, with a flow table of `buckets` buckets.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub(crate) fn new(site: &Site, buckets: u32) -> Result<Self> {
        let lines = buckets * (size_of::<Bucket4>() / CACHE_LINE) as u32;
        let programs = ["floor_transmit", "floor_push", "floor_push6", "floor_pass", TOUCH];
        let bulk = Bulk::new(site.wire, lines, &programs)?;
        let pinned = aya::programs::ProgramInfo::from_pin(site.place.programs()?.join("xdpvs"))?;
        let director =
            loaded_programs().flatten().find(|program| program.id() == pinned.id()).context("the director")?;
        Ok(Self { bulk, director: director.fd()? })
    }

    /// Has this program measured, or the director's.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub(crate) fn put(&mut self, program: Option<&'static str>) -> Result<()> {
        match program {
            Some(name) => self.bulk.put_own(name),
            None => self.bulk.put(&self.director),
        }
    }

    fn case(&mut self, case: &Case, rounds: usize, control: &Control, buckets: u32) -> Result<Figure> {
        if case.kind == Kind::Established {
            self.establish(case)?;
        }
        let (mut floors, mut figures) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            self.bulk.set_up(&case.frame, case.clients());
            self.put(Some(case.floor.program()))?;
            floors.push(self.bulk.repeat(&case.frame, case.runs())?.nanoseconds as f64);
            if case.kind == Kind::New {
                control.flush(buckets, Ending::All)?;
            }
            self.put((case.kind == Kind::Line).then_some(TOUCH))?;
            let ran = self.bulk.repeat(&case.frame, case.runs())?;
            check(case, ran.action, &ran.frame)?;
            figures.push(ran.nanoseconds as f64);
        }
        let [floor_min, _] = least_and_median(&mut floors);
        let [min, median] = least_and_median(&mut figures);
        Ok(Figure {
            case: case.name.clone(),
            flows: case.flows,
            floor_min,
            min,
            median,
            above_floor_min: min - floor_min,
            above_floor_median: median - floor_min,
        })
    }

    /// Opens every flow of a case, and visits each once more so that it is established and in the cache as far as it
    /// fits.
    fn establish(&mut self, case: &Case) -> Result<()> {
        self.put(None)?;
        let family = Family::of(&case.frame).context("no IP")?;
        let ports = ETHERNET + family.header();
        let port = ports + if case.reply { 0 } else { 2 };
        let port = u16::from_be_bytes([case.frame[port], case.frame[port + 1]]);
        for flags in ["S", "A", "A"] {
            let frame = request_frame(family, port, flags);
            self.bulk.begin_with(0);
            self.bulk.set_up(&frame, Clients { order: pick::SEQUENTIAL, reply: false, ..case.clients() });
            self.bulk.repeat(&frame, case.flows)?;
        }
        Ok(())
    }
}

/// The least value and the median.
pub(crate) fn least_and_median(values: &mut [f64]) -> [f64; 2] {
    values.sort_by(f64::total_cmp);
    [values.first().copied().unwrap_or(0.0), values.get(values.len() / 2).copied().unwrap_or(0.0)]
}

/// Checks the return value and the frame of the last run.
fn check(case: &Case, result: u32, frame: &[u8]) -> Result<()> {
    ensure!(result == case.result, "returned {result} instead of {}", case.result);
    ensure!(frame.len() == case.len, "left {} bytes instead of {}", frame.len(), case.len);
    if case.result == XDP_TX && case.kind != Kind::Line {
        let ttl = match Family::of(frame) {
            Some(Family::Six) => frame[21],
            _ => {
                ensure!(checksum::fold(checksum::sum(&frame[14..34])) == 0xffff, "has a wrong IP checksum");
                frame[22]
            }
        };
        ensure!(ttl == 63, "has TTL {ttl} instead of 63");
    }
    Ok(())
}

const CLIENT_MACS: ([u8; 6], [u8; 6]) = (cast::CLIENT_MAC, cast::DIRECTOR_OUTSIDE_MAC);

/// A segment of a client to a port of the service address.
pub(crate) fn request_frame(family: Family, port: u16, flags: &'static str) -> Vec<u8> {
    let frame = Frame::new(CLIENT_MACS, (cast::CLIENT, 1024), (cast::VIP, port));
    Frame { family, ..frame }.tcp(flags, b"GET / ")
}

/// The cases that are measured with this number of flows.
fn cases(flows: u32) -> Vec<Case> {
    let to_client = (cast::server_mac(0), cast::DIRECTOR_INSIDE_MAC);
    let case = |name: &str, kind: Kind, frame: Vec<u8>| Case {
        name: name.to_owned(),
        flows,
        len: frame.len(),
        frame,
        reply: false,
        kind,
        floor: Floor::Transmit,
        result: XDP_TX,
    };
    let mut cases = Vec::new();
    for (family, tunnel, floor) in [(Family::Four, "ipip/v4", Floor::Push), (Family::Six, "ip6ip6/v6", Floor::Push6)] {
        // The IPv6 table is made for no more.
        if family == Family::Six && flows > NEW {
            break;
        }
        let version = &tunnel[tunnel.len() - 2..];
        let established = |name: String, method: Method| {
            case(&name, Kind::Established, request_frame(family, port(method, Scheduler::Sh), "A"))
        };
        let reply = Frame::new(to_client, (cast::server(0), SINGLE), (cast::CLIENT, 1024));
        let reply = Frame { family, ..reply }.tcp("A", b"HTTP/1");
        let name = format!("nat-out/{version}/tcp/established");
        cases.extend([
            established(format!("dr/{version}/tcp/established"), Method::Route),
            established(format!("nat-in/{version}/tcp/established"), Method::Masq),
            Case { reply: true, ..case(&name, Kind::Established, reply) },
        ]);
        let tunnel = established(format!("{tunnel}/tcp/established"), Method::Tunnel);
        cases.push(Case { floor, len: tunnel.len + family.header(), ..tunnel });
    }
    if flows == NEW {
        for &scheduler in Scheduler::ALL {
            let frame = request_frame(Family::Four, port(Method::Route, scheduler), "S");
            cases.push(case(&format!("dr/v4/tcp/new/{scheduler}"), Kind::New, frame));
            for (index, servers) in (0..).zip(MANY) {
                let frame = request_frame(Family::Four, port_of_many(scheduler, index), "S");
                cases.push(case(&format!("dr/v4/tcp/new/{scheduler}/{servers}"), Kind::New, frame));
            }
        }
    }
    let line = request_frame(Family::Four, port(Method::Route, Scheduler::Sh), "A");
    cases.push(case("one-cache-line", Kind::Line, line));
    if flows == 1 {
        let frame = request_frame(Family::Four, 9, "A");
        cases.push(Case { floor: Floor::Pass, result: XDP_PASS, ..case("not-service/v4/tcp", Kind::Foreign, frame) });
    }
    cases
}
