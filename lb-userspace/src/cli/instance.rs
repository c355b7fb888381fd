//! `up`, `status`: the instance as a whole.

use lb_common::{
    abi::{AgeingRecord, InstanceRecord, active_and_total, slot},
    addr::{Address as _, Ip4, Ip6},
    jiffies::Jiffies,
};
use lb_userspace::{
    control::{session::Session, state::dest_family},
    datapath::{
        attach::{self, Attachment, Wish},
        ipv6,
        lifecycle::{self, Request},
        open,
        pace::Pace,
        place::Place,
        run::Control,
        sizes::Capacity,
    },
    error::Error,
};
use serde::Serialize;

use crate::cli::{
    complain,
    failure::Failure,
    output::{self, Form},
};

/// What `up` is told.
#[derive(clap::Args, Debug)]
pub(crate) struct Up {
    /// Interfaces to attach to, those to the clients and those to the real servers
    #[arg(required = true, value_name = "IFACE")]
    interfaces: Vec<String>,
    /// How to run on them: in the driver (native), in the kernel's receive path (generic, much slower), or in the driver
    /// if it can
    #[arg(long, value_enum, default_value = "auto")]
    mode: ModeWord,
    /// IPv4 connections to make room for, 1000 to 16777216 (1048576 unless given; about 54 bytes each)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(Capacity::FLOWS_MIN as i64..=Capacity::FLOWS_MAX as i64))]
    max_flows: Option<u32>,
    /// IPv6 connections to make room for, 1000 to 16777216 (a quarter of --max-flows unless given, 1000 at the least; about
    /// 107 bytes each)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(Capacity::FLOWS_MIN as i64..=Capacity::FLOWS_MAX as i64))]
    max_flows6: Option<u32>,
    /// Services to make room for, 1 to 65536 (4096 unless given)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=Capacity::SERVICES_MAX as i64))]
    max_services: Option<u32>,
    /// Destinations of all services to make room for, 1 to 262144 (16384 unless given)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=Capacity::DESTS_MAX as i64))]
    max_dests: Option<u32>,
    /// Milliseconds in which all connections are looked at once for those whose time is over, 10 to 60000 (1000 unless
    /// given, or as few as the size of the table allows). Stays as it is when the director runs and this is not given
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(Pace::SWEEP_MIN_MS as i64..=Pace::SWEEP_MAX_MS as i64))]
    sweep_ms: Option<u32>,
}

#[derive(clap::ValueEnum, Clone, Copy, Debug)]
enum ModeWord {
    Auto,
    Native,
    Generic,
}

impl Up {
    /// Starts the instance, or renews it.
    pub(crate) fn run(self, place: &Place) -> Result<(), Failure> {
        let wish = match self.mode {
            ModeWord::Auto => Wish::Auto,
            ModeWord::Native => Wish::Native,
            ModeWord::Generic => Wish::Generic,
        };
        let request = Request {
            interfaces: self.interfaces,
            wish,
            flows: self.max_flows,
            flows6: self.max_flows6,
            services: self.max_services,
            dests: self.max_dests,
            sweep_ms: self.sweep_ms,
        };
        for notice in lifecycle::up(place, &request)? {
            complain(&notice.to_string());
        }
        Ok(())
    }
}

#[derive(Serialize)]
struct NotRunning<'a> {
    instance: &'a str,
    running: bool,
}

#[derive(Serialize)]
struct Status<'a> {
    instance: &'a str,
    running: bool,
    version: &'static str,
    attachments: Vec<Attachment>,
    /// IPv4 connections that there is room for.
    max_flows: u32,
    /// IPv4 connections.
    flows: u32,
    max_flows6: u32,
    flows6: u32,
    /// Whether an interface of the director takes IPv6 packets.
    ipv6: bool,
    services: usize,
    destinations: usize,
    ageing: Ageing,
}

#[derive(Serialize)]
struct Ageing {
    /// Time in which the flow table is to be looked at once.
    sweep_ms: u64,
    /// Time between two ticks, each of which looks at a part of it.
    interval_ms: u64,
    /// Whole passes over the flow table.
    sweeps: u64,
    /// How long the last one took; none before the first has ended.
    last_sweep_ms: Option<u64>,
    /// How long ago it ended.
    last_sweep_ago_ms: Option<u64>,
    /// Connections ended because their time was over.
    ended: u64,
}

impl Ageing {
    /// Where ageing stands at `now`, in a flow table of an instance like this.
    fn new(record: &AgeingRecord, instance: &InstanceRecord, now: Jiffies) -> Self {
        let AgeingRecord { slice, interval_ns, share, sweeps, last_began, last_ended, ended, .. } = *record;
        let ms = |from: u32, to: u32| {
            let ticks = Jiffies(to).since(Jiffies(from)).max(0).cast_unsigned();
            (sweeps > 0).then_some(u64::from(ticks) * 1000 / u64::from(instance.hz.max(1)))
        };
        Self {
            sweep_ms: Pace { slice, interval_ns, share }.sweep_ms(instance.buckets()),
            interval_ms: interval_ns / 1_000_000,
            sweeps,
            last_sweep_ms: ms(last_began, last_ended),
            last_sweep_ago_ms: ms(last_ended, now.0),
            ended,
        }
    }
}

/// Prints what the instance is and how full.
pub(crate) fn status(place: &Place, form: Form) -> Result<(), Failure> {
    let mut session = match Session::open(place) {
        Err(error @ Error::NotRunning { .. }) => {
            if form.json {
                form.print(&NotRunning { instance: place.name(), running: false }, |_| String::new())?;
            }
            return Err(error.into());
        }
        opened => opened?,
    };
    let state = session.state()?;
    let maps = session.maps();
    let instance = maps.instance();
    let ageing = open::ageing(place)?.record;
    let now = Control::open(place)?.clock()?;
    // A destination is remembered for as long as it has connections.
    let flows = |family: u32| {
        let dests = state.dests.iter().filter(|(_, record)| dest_family(record) == family);
        let loads = dests.filter_map(|(number, _)| maps.dest_loads.get(*number as usize));
        loads.map(|load| active_and_total(load.connections.load()).1).sum()
    };
    let attachments = attach::attachments(place)?;
    let interfaces = attachments.iter().map(|attachment| attachment.interface.as_str());
    let used = |state: u32| state == slot::USED;
    let status = Status {
        instance: place.name(),
        running: true,
        version: env!("CARGO_PKG_VERSION"),
        max_flows: instance.max_flows,
        flows: flows(Ip4::FAMILY),
        max_flows6: instance.max_flows6,
        flows6: flows(Ip6::FAMILY),
        ipv6: ipv6::is_taken(interfaces),
        attachments,
        services: state.services.values().filter(|record| used(record.state)).count(),
        destinations: state.dests.values().filter(|record| used(record.state)).count(),
        ageing: Ageing::new(&ageing, &instance, now),
    };
    form.print(&status, text)
}

fn text(status: &Status<'_>) -> String {
    let Status { instance, version, max_flows, flows, max_flows6, flows6, services, destinations, ageing, .. } = status;
    let row = |name: &str, value: String| vec![name.to_owned(), value];
    let mut rows = vec![row("instance", format!("{instance}, running (xdpvs {version})"))];
    for Attachment { interface, mode } in &status.attachments {
        rows.push(row("interface", format!("{interface} ({})", mode_word(*mode))));
    }
    if !status.ipv6 {
        rows.push(row("IPv6", format!("none: {}", ipv6::why_not())));
    }
    rows.push(row("connections", format!("IPv4: {flows} of {max_flows}, IPv6: {flows6} of {max_flows6}")));
    rows.push(row("services", services.to_string()));
    rows.push(row("destinations", destinations.to_string()));
    let Ageing { sweep_ms, sweeps, last_sweep_ms, last_sweep_ago_ms, ended, .. } = ageing;
    let last = match (last_sweep_ms, last_sweep_ago_ms) {
        (Some(took), Some(ago)) => format!("the last took {took} ms and ended {ago} ms ago"),
        _ => "none has ended yet".to_owned(),
    };
    rows.push(row(
        "ageing",
        format!("a sweep every {sweep_ms} ms, {sweeps} so far, {last}; {ended} connections ended"),
    ));
    output::table(&rows, &[])
}

/// How programs run on an interface, for people.
pub(crate) fn mode_word(mode: Option<lb_userspace::netlink::Mode>) -> String {
    mode.map_or_else(|| "not attached: run `xdpvs up` again".into(), |mode| mode.to_string())
}
