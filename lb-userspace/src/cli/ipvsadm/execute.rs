//! Carrying out what an ipvsadm command line says.

use std::{
    io::{self, BufRead as _, stdin, stdout},
    num::NonZeroU32,
};

use lb_common::{
    abi::active_and_total,
    overload::Thresholds,
    proto::{Scheduler, service_flag},
};
use lb_userspace::{
    control::{
        change::{Change, Commit},
        model::{self, DestSpec, Family, MarkKey, Netmask, Persistence, Refusal, Service, ServiceKey, ServiceSpec},
        session::Session,
        settings::Timeouts,
        shared::Object,
        traffic::{Rates, Traffic},
    },
    datapath::{ipv6, place::Place},
};

use super::{
    super::{connections, failure::Failure, lines::Lines, output, stats, timeouts},
    NAME, NOT_LISTED, Stop,
    names::{Names, System},
    options::{Command, Kind, Tunnel},
    parse::{self, Identity, Parsed, Request},
    print::{self, DestRow, Format, ServiceRow},
};

/// Carries out a command line, on the instance that `place` finds.
pub(super) fn execute(place: &dyn Fn() -> Result<Place, Stop>, program: &str, parsed: Parsed) -> Result<(), Stop> {
    let request = match parsed {
        Parsed::Help => return Ok(output::print(&print::help())?),
        Parsed::Version => return Ok(output::print(&print::version())?),
        Parsed::Unreadable(text) => return Err(Stop::refusal(text)),
        Parsed::Run(request) => *request,
    };
    let place = place()?;
    if request.command == Command::Restore { restore(&place, program) } else { run(&place, &request) }
}

fn run(place: &Place, request: &Request) -> Result<(), Stop> {
    if let Some(what) = lacking(request) {
        return Err(Stop::refusal(format!("{what} not supported by xdpvs yet")));
    }
    match request.command {
        Command::List => list(place, request),
        Command::Save => save(place, request),
        Command::Timeouts => {
            let [tcp, tcpfin, udp] = request.timeouts;
            Ok(timeouts::set(place, Timeouts { tcp, tcpfin, udp })?)
        }
        Command::Zero => zero(place, request),
        Command::StopDaemon => Err(Stop::refusal("No daemon is running")),
        _ => change(place, request),
    }
}

/// What is asked for and cannot be had. What asks about such a thing learns that there is none of it.
fn lacking(request: &Request) -> Option<String> {
    let kinds = request.kinds;
    let service = matches!(request.command, Command::Add | Command::Edit);
    let dest = matches!(request.command, Command::AddDest | Command::EditDest);
    let what = match request.command {
        Command::StartDaemon => "connection synchronisation (--start-daemon) is",
        _ if service && kinds.has(Kind::Engine) => "persistence engines (--pe) are",
        _ if dest && request.tunnel != Tunnel::Ipip => "tunnels other than ipip (--tun-type) are",
        _ => return None,
    };
    Some(what.to_owned())
}

/// The service as xdpvs knows services; `None` for what it has none of.
fn key(request: &Request) -> Option<model::Identity> {
    match request.service? {
        Identity::Address(protocol, address) => Some(ServiceKey { protocol, address }.into()),
        Identity::Mark(mark) => {
            let family = if request.ipv6 { Family::Ipv6 } else { Family::Ipv4 };
            NonZeroU32::new(mark).map(|mark| MarkKey { mark, family }.into())
        }
    }
}

/// Why a change was not made, in ipvsadm's words where it has some.
fn refusal(command: Command, refusal: &Refusal) -> Stop {
    let dest = matches!(command, Command::AddDest | Command::EditDest | Command::DeleteDest);
    Stop::refusal(match refusal {
        Refusal::ServiceExists(_) => "Service already exists".to_owned(),
        Refusal::NoService(_) if dest => "Service not defined".to_owned(),
        Refusal::NoService(_) => "No such service".to_owned(),
        Refusal::DestExists(..) => "Destination already exists".to_owned(),
        Refusal::NoDest(..) => "No such destination".to_owned(),
        Refusal::NotUnicast(_) | Refusal::NotServed(_) => {
            "Invalid operation.  Possibly wrong module version, address not unicast, ...".to_owned()
        }
        Refusal::LowerThreshold(_) => "Numerical result out of range".to_owned(),
        other => other.to_string(),
    })
}

impl From<Commit> for Stop {
    fn from(commit: Commit) -> Self {
        Failure::from(commit).into()
    }
}

fn change(place: &Place, request: &Request) -> Result<(), Stop> {
    check(request)?;
    let lock = place.lock()?;
    Session::open(place)?.change_under(&lock, |change| plan(change, request))
}

/// Whether the kernel has what a service needs that is added.
fn check(request: &Request) -> Result<(), Stop> {
    match key(request).filter(|_| request.command == Command::Add) {
        Some(key) => Ok(ipv6::check(key)?),
        None => Ok(()),
    }
}

fn plan(change: &mut Change<'_>, request: &Request) -> Result<(), Stop> {
    let command = request.command;
    let refused = |why| refusal(command, &why);
    if command == Command::Flush {
        change.flush();
        return Ok(());
    }
    let known = key(request).filter(|key| command == Command::Add || change.state().by_key.contains_key(key));
    let Some(key) = known else {
        let dest = matches!(command, Command::AddDest | Command::EditDest | Command::DeleteDest);
        return Err(Stop::refusal(if dest { "Service not defined" } else { "No such service" }));
    };
    match command {
        Command::Add if change.state().by_key.contains_key(&key) => Err(refused(Refusal::ServiceExists(key))),
        Command::Add => change.add_service(key, service_spec(key, request)?).map_err(refused),
        Command::Edit => change.edit_service(key, service_spec(key, request)?).map_err(refused),
        Command::Delete => change.delete_service(key).map_err(refused),
        _ => {
            let Some(server) = request.server else { return Ok(()) };
            let Request { method, weight, thresholds: [upper, lower], .. } = *request;
            let spec = DestSpec { method, weight, thresholds: Thresholds { upper, lower } };
            match command {
                Command::AddDest => change.add_dest(key, server, spec),
                Command::EditDest => change.edit_dest(key, server, spec),
                _ => change.delete_dest(key, server),
            }
            .map_err(refused)
        }
    }
}

fn zero(place: &Place, request: &Request) -> Result<(), Stop> {
    let wanted = key(request);
    if request.service.is_some() && wanted.is_none() {
        return Err(Stop::refusal("No such service"));
    }
    stats::zero(place, wanted).map_err(|failure| match failure {
        Failure::Commit(Commit::Refused(why)) => refusal(request.command, &why),
        other => other.into(),
    })
}

fn service_spec(key: model::Identity, request: &Request) -> Result<ServiceSpec, Stop> {
    let name = request.scheduler.as_str();
    let scheduler =
        Scheduler::from_name(name).ok_or_else(|| Stop::refusal("Scheduler or persistence engine not found"))?;
    let ops = if request.kinds.has(Kind::Ops) { service_flag::ONE_PACKET } else { 0 };
    let netmask = request.netmask.unwrap_or(Netmask::whole(key.family()));
    let persistence = request.persistence.map(|timeout| Persistence { timeout, netmask });
    Ok(ServiceSpec { scheduler, flags: request.sched_flags | ops, persistence })
}

/// The name service, unless digits are wanted.
fn names(request: &Request) -> Option<&'static dyn Names> {
    if request.kinds.has(Kind::Numeric) { None } else { Some(&System) }
}

fn list(place: &Place, request: &Request) -> Result<(), Stop> {
    let kinds = request.kinds;
    if kinds.has(Kind::Connection) {
        return list_connections(place, request);
    }
    if kinds.has(Kind::Timeout) {
        return Ok(output::print(&print::timeouts(timeouts::get(&Session::open(place)?)))?);
    }
    if kinds.has(Kind::Daemon) {
        // No synchronisation daemon runs.
        return Ok(());
    }
    let format = match () {
        () if kinds.has(Kind::Stats) => Format::Stats { exact: kinds.has(Kind::Exact) },
        () if kinds.has(Kind::Rate) => Format::Rate { exact: kinds.has(Kind::Exact) },
        () if kinds.has(Kind::Thresholds) => Format::Thresholds,
        () if kinds.has(Kind::PersistentConn) => Format::PersistentConn,
        () if kinds.has(Kind::TunInfo) => Format::TunInfo,
        () => Format::Default,
    };
    let rows = rows(place, request)?;
    if request.service.is_some() && rows.is_empty() {
        return Err(Stop { text: "No such service".into(), code: NOT_LISTED });
    }
    Ok(output::print(&print::services(&rows, format, request.service.is_none()))?)
}

fn save(place: &Place, request: &Request) -> Result<(), Stop> {
    Ok(output::print(&print::saved(&rows(place, request)?))?)
}

/// The services that are asked for, as they are shown.
fn rows(place: &Place, request: &Request) -> Result<Vec<ServiceRow>, Stop> {
    let mut session = Session::open(place)?;
    let state = session.state()?;
    let mut services = state.configured();
    if request.service.is_some() {
        let wanted = key(request);
        services.retain(|service| Some(service.key) == wanted);
    }
    if !request.kinds.has(Kind::NoSort) {
        print::sort(&mut services);
    }
    let (names, counters, shared) = (names(request), session.counters(), session.maps().shared());
    let row = |service: &Service| -> Result<ServiceRow, Stop> {
        let (protocol, address) = match service.key {
            model::Identity::Address(ServiceKey { protocol, address }) => {
                (Some(protocol), print::address(address, Some(protocol), names))
            }
            model::Identity::Mark(MarkKey { mark, .. }) => (None, mark.to_string()),
        };
        let mut dests = Vec::with_capacity(service.dests.len());
        for dest in &service.dests {
            let load = session.maps().dest_loads.get(dest.number as usize);
            let (active, total) = active_and_total(load.map_or(0, |load| load.connections.load()));
            dests.push(DestRow {
                address: print::address(dest.address, protocol, names),
                method: dest.spec.method,
                weight: dest.spec.weight,
                thresholds: dest.spec.thresholds,
                connections: [active, total.saturating_sub(active)],
                templates: load.map_or(0, |load| load.templates.load()),
                traffic: Traffic::of(&shared, &state, counters, Object::Dest(dest.number))?,
                rates: Rates::of(&shared, Object::Dest(dest.number)),
            });
        }
        Ok(ServiceRow {
            identity: service.key,
            address,
            spec: service.spec,
            traffic: Traffic::of(&shared, &state, counters, Object::Service(service.slot))?,
            rates: Rates::of(&shared, Object::Service(service.slot)),
            dests,
        })
    };
    services.iter().map(row).collect()
}

fn list_connections(place: &Place, request: &Request) -> Result<(), Stop> {
    let session = Session::open(place)?;
    let reader = connections::reader(place, session.maps())?;
    let names = names(request);
    let mut lines = Lines::new(stdout().lock());
    let write = || -> io::Result<()> {
        lines.text(&print::connection_titles(request.kinds.has(Kind::PersistentConn))).cell(0, "");
        for connection in reader.connections() {
            print::connection(&mut lines, &connection, names)?;
        }
        lines.finish().map(drop)
    };
    Ok(output::written(write())?)
}

/// Carries out the commands on standard input, one a line. One that makes no sense ends it, and so does a list of a service that
/// is not there; one that is refused, or whose options are none, does not. What becomes of the last is what becomes of the whole.
fn restore(place: &Place, program: &str) -> Result<(), Stop> {
    let mut last = Ok(());
    let mut changes = Vec::new();
    for line in stdin().lock().lines() {
        let line = line.map_err(|error| Err(Stop::refusal(format!("read standard input: {error}"))));
        let request = match line.and_then(|line| request_of(place, program, &line)) {
            Ok(None) => continue,
            Ok(Some(Ok(request))) if is_change(&request) => {
                changes.push(request);
                continue;
            }
            Ok(Some(request)) => request,
            Err(ended) => {
                follow(&mut last, change_all(place, &changes));
                follow(&mut last, [ended]);
                return last;
            }
        };
        follow(&mut last, change_all(place, &std::mem::take(&mut changes)));
        follow(&mut last, [request.and_then(|request| run(place, &request))]);
        if matches!(last, Err(Stop { code: NOT_LISTED, .. })) {
            return last;
        }
    }
    follow(&mut last, change_all(place, &changes));
    last
}

/// What a line asks for, if it asks for anything, or why that cannot be read.
///
/// # Errors
///
/// What becomes of a line that ends everything.
fn request_of(place: &Place, program: &str, line: &str) -> Result<Option<Result<Request, Stop>>, Result<(), Stop>> {
    let words: Vec<String> = line.split_ascii_whitespace().filter(|word| *word != NAME).map(str::to_owned).collect();
    if words.is_empty() {
        return Ok(None);
    }
    match parse::parse(program, &words, &System).map_err(Err)? {
        Parsed::Run(request) if request.command != Command::Restore => Ok(Some(Ok(*request))),
        Parsed::Unreadable(text) => Ok(Some(Err(Stop::refusal(text)))),
        Parsed::Run(_) => Err(Err(parse::try_help(program))),
        about => Err(execute(&|| Ok(place.clone()), program, about)),
    }
}

/// Complains about everything that has failed but the last.
fn follow(last: &mut Result<(), Stop>, outcomes: impl IntoIterator<Item = Result<(), Stop>>) {
    for outcome in outcomes {
        if let Err(Stop { text, .. }) = std::mem::replace(last, outcome) {
            output::complain(&text);
        }
    }
}

/// Whether services and destinations are changed.
fn is_change(request: &Request) -> bool {
    use Command::{Add, AddDest, Delete, DeleteDest, Edit, EditDest, Flush};
    let Request { command, .. } = request;
    matches!(command, Add | Edit | Delete | Flush | AddDest | EditDest | DeleteDest) && lacking(request).is_none()
}

/// Makes changes, each of which is as if it were alone, but that all are put in force at once if that can be.
fn change_all(place: &Place, requests: &[Request]) -> Vec<Result<(), Stop>> {
    match requests {
        [] => Vec::new(),
        [request] => vec![change(place, request)],
        _ => match change_at_once(place, requests) {
            Ok(outcomes) => outcomes,
            // Nothing has changed. One after the other shows which of them cannot be.
            Err(Failure::Refused(_) | Failure::Commit(Commit::Refused(_))) => {
                requests.iter().map(|request| change(place, request)).collect()
            }
            Err(failure) => vec![Err(failure.into()); requests.len()],
        },
    }
}

fn change_at_once(place: &Place, requests: &[Request]) -> Result<Vec<Result<(), Stop>>, Failure> {
    let lock = place.lock()?;
    Session::open(place)?.change_under(&lock, |change| {
        let one = |request: &Request| check(request).and_then(|()| plan(change, request));
        let outcomes = requests.iter().map(one).collect();
        // One by one, what comes later may have the slots of what is removed before.
        change.lack().map_or(Ok(outcomes), |lack| Err(Failure::Refused(lack.clone())))
    })
}
