//! Everything at once, on all CPUs, in the kernel: packets that open, continue and end connections, the timer, jumps of the
//! clock, flushes, changes of the configuration, and new programs. No packet of a connection goes to another server than
//! its connection's, and whenever the packets rest, every counter equals a recount.

use std::{
    hint,
    net::{IpAddr, Ipv4Addr},
    num::NonZero,
    sync::{
        RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use lb_common::{
    proto::{Method, Scheduler},
    reason::Reason,
};
use lb_userspace::{
    control::{
        change::Change,
        model::{Netmask, Persistence, ServiceSpec, Transport},
    },
    datapath::{load, open, pace::Pace},
};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use xdpvs_tests::{
    audit, cast,
    executor::{Executor, Kernel, Site, Verdict, Wire},
    family::{self, Family},
    frames::{ETHERNET, Frame},
    world::{dest, scheduled},
};

/// Environment variable that sets how long this goes on, in seconds.
const VARIABLE: &str = "XDPVS_STRESS_S";
const SECONDS: u64 = 25;
/// Buckets of the table: so many that none is ever full, for then packets may go on without a connection.
const BUCKETS: u32 = 8_192;
/// Services by TCP and UDP, IPv4 and IPv6, one for each method, from this port on.
const PORT: u16 = 80;
/// The same that are persistent, from this port on.
const PERSISTENT: u16 = 443;
/// How long they remember clients, in seconds: often less than their connections live.
const TIMEOUT_S: u32 = 20;
const METHODS: [Method; 3] = [Method::Masq, Method::Route, Method::Tunnel];
/// Real servers of each service.
const SERVERS: u8 = 4;
/// Connections that only one thread sends packets of.
const OWN: u32 = 300;
/// Clients that all threads send packets of.
const COMMON: u32 = 20;
/// Clients that come once in a while.
const STRANGERS: u32 = 30_000;
/// Clients that threads come with at the same moment.
const RACERS: u32 = 16_384;
/// From one such moment to the next.
const SLOT: Duration = Duration::from_micros(64);
/// Turns, each with a change of the configuration, that are taken at least, however slow the machine is: in these,
/// everything happens once.
const TURNS: u32 = 30;
/// Between two ticks of a timer that is to rest: an hour.
const REST_NS: u64 = 3_600_000_000_000;
/// Packets that a thread sends before it opens the programs anew.
const CHUNK: u32 = 2_000;

/// A service: everything but its protocol follows from a number.
#[derive(Clone, Copy)]
struct Kind {
    family: Family,
    method: Method,
    persistent: bool,
    port: u16,
}

impl Kind {
    /// Those with a number divisible by three are masqueraded.
    const fn of(number: u32) -> Self {
        let persistent = number / 3 % 2 == 1;
        let family = if number / 6 % 2 == 1 { Family::Six } else { Family::Four };
        let first = if persistent { PERSISTENT } else { PORT };
        Self { family, method: METHODS[number as usize % 3], persistent, port: first + (number % 3) as u16 }
    }

    fn all() -> impl Iterator<Item = Self> {
        (0..12).map(Self::of)
    }

    /// How it is set. Sixteen clients are one if it is persistent.
    fn spec(self, scheduler: Scheduler) -> ServiceSpec {
        let netmask = match self.family {
            Family::Four => Netmask::V4(Ipv4Addr::new(255, 255, 255, 240)),
            // The fifth byte of their addresses is the first that differs.
            Family::Six => Netmask::V6(36),
        };
        let persistence = self.persistent.then_some(Persistence { timeout: TIMEOUT_S, netmask });
        ServiceSpec { persistence, ..scheduled(scheduler) }
    }

    fn request(self, client: (Ipv4Addr, u16)) -> Frame {
        let macs = (cast::CLIENT_MAC, cast::DIRECTOR_OUTSIDE_MAC);
        Frame { family: self.family, ..Frame::new(macs, client, (cast::VIP, self.port)) }
    }
}

fn services(change: &mut Change<'_>) {
    for protocol in [Transport::Tcp, Transport::Udp] {
        for kind in Kind::all() {
            let key = kind.family.service(protocol, kind.port);
            change.add_service(key, kind.spec(Scheduler::Wlc)).expect("new");
            for index in 0..SERVERS {
                change.add_dest(key, kind.family.at(index, kind.port), dest(kind.method, 1)).expect("new");
            }
        }
    }
}

/// A generator of numbers that look random (xorshift64).
struct Random(u64);

impl Random {
    fn below(&mut self, end: u32) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (((self.0 >> 32) * u64::from(end)) >> 32) as u32
    }
}

/// What has happened, to see that it has.
#[derive(Default)]
struct Tally {
    opened: AtomicU64,
    continued: AtomicU64,
    lost: AtomicU64,
    translated: AtomicU64,
    raced: AtomicU64,
    templates: AtomicU64,
    changes: AtomicU64,
    flushes: AtomicU64,
    replacements: AtomicU64,
}

impl Tally {
    fn all(&self) -> [(&'static str, u64); 9] {
        [
            ("opened", &self.opened),
            ("continued", &self.continued),
            ("found to have ended", &self.lost),
            ("replies translated", &self.translated),
            ("sent at a moment agreed upon", &self.raced),
            ("a template when all was counted", &self.templates),
            ("changes", &self.changes),
            ("flushes", &self.flushes),
            ("new programs", &self.replacements),
        ]
        .map(|(what, count)| (what, count.load(Ordering::Relaxed)))
    }
}

fn add(count: &AtomicU64) {
    count.fetch_add(1, Ordering::Relaxed);
}

/// The addresses in a frame of either family, as members of the cast: from whom, and to whom.
fn ends(frame: &[u8]) -> (Ipv4Addr, Ipv4Addr) {
    let address = |first: usize, len: usize| {
        let bytes = &frame[ETHERNET + first..][..len];
        let four: Result<[u8; 4], _> = bytes.try_into();
        let six = || <[u8; 16]>::try_from(bytes).expect("four or sixteen bytes");
        family::member(four.map_or_else(|_| six().into(), IpAddr::from))
    };
    match Family::of(frame).expect("an IP frame") {
        Family::Four => (address(12, 4), address(16, 4)),
        Family::Six => (address(8, 16), address(24, 16)),
    }
}

/// The real server that a forwarded packet of a client goes to.
fn server_of(frame: &[u8]) -> Ipv4Addr {
    let (_, destination) = ends(frame);
    if destination != cast::VIP {
        // Masqueraded, or the tunnel's.
        return destination;
    }
    let index = (0..SERVERS).find(|index| frame[..6] == cast::server_mac(*index));
    cast::server(index.unwrap_or_else(|| panic!("to nobody: {frame:02x?}")))
}

/// One thread that sends, and where the packets of its own connections go, as far as they have been opened.
struct Sender<'t> {
    cpu: usize,
    random: Random,
    begun: Instant,
    own: Vec<Option<Ipv4Addr>>,
    tally: &'t Tally,
}

impl Sender<'_> {
    /// Sends a number of packets.
    fn send(&mut self, kernel: &mut Kernel<'_>) {
        let mut cpus = CpuSet::new();
        cpus.set(self.cpu).expect("a CPU of this machine");
        sched_setaffinity(Pid::from_raw(0), &cpus).expect("a thread may choose its CPU");
        for _ in 0..CHUNK {
            match self.random.below(10) {
                0 => self.stranger(kernel),
                1 | 2 => self.common(kernel),
                3 => self.reply(kernel),
                4 => self.race(kernel),
                _ => self.own(kernel),
            }
        }
    }

    fn own_request(&self, number: usize) -> Frame {
        let client = Ipv4Addr::new(10, 1, self.cpu as u8, (number & 0x7f) as u8 + 1);
        Kind::of(number as u32).request((client, 20_000 + (number >> 7) as u16))
    }

    /// A packet of a connection that nobody else sends packets of: it goes where the one went that opened it.
    fn own(&mut self, kernel: &mut Kernel<'_>) {
        let number = self.random.below(OWN) as usize;
        let frame = self.own_request(number);
        let Some(server) = self.own[number] else {
            let outcome = kernel.arrive(Wire::Outside, &frame.tcp("S", b""));
            if outcome.verdict == Verdict::Redirect(None) {
                self.own[number] = Some(server_of(&outcome.frame));
                add(&self.tally.opened);
            }
            return;
        };
        let closes = self.random.below(200) == 0;
        let outcome = kernel.arrive(Wire::Outside, &frame.tcp(if closes { "FA" } else { "A" }, b"data"));
        match outcome.verdict {
            Verdict::Redirect(_) => {
                assert_eq!(server_of(&outcome.frame), server, "the server of connection {number} of CPU {}", self.cpu);
                add(&self.tally.continued);
            }
            // Its time is over, or it has been flushed.
            Verdict::Pass => {
                self.own[number] = None;
                add(&self.tally.lost);
            }
            // The server has been removed.
            Verdict::Drop => {}
            other => panic!("{other:?}"),
        }
    }

    /// What a masqueraded server sends comes from the service, and goes to its client.
    fn reply(&mut self, kernel: &mut Kernel<'_>) {
        let number = self.random.below(OWN / 3) as usize * 3;
        let (request, Some(server)) = (self.own_request(number), self.own[number]) else { return };
        let macs = (cast::server_mac(0), cast::DIRECTOR_INSIDE_MAC);
        let reply = Frame { family: request.family, ..Frame::new(macs, (server, request.to.1), request.from) };
        let outcome = kernel.arrive(Wire::Inside, &reply.tcp("A", b"data"));
        if let Verdict::Redirect(_) = outcome.verdict {
            assert_eq!(ends(&outcome.frame), (cast::VIP, request.from.0));
            add(&self.tally.translated);
        }
    }

    /// A packet of a few connections that all threads are at.
    fn common(&mut self, kernel: &mut Kernel<'_>) {
        let number = self.random.below(COMMON);
        let client = Ipv4Addr::new(10, 1, 0x7f, number as u8 + 1);
        let frame = Kind::of(number).request((client, 40_000));
        let flags = ["S", "S", "A", "A", "FA", "R"][self.random.below(6) as usize];
        let udp = self.random.below(4) == 0;
        let outcome = kernel.arrive(Wire::Outside, &if udp { frame.udp(b"x") } else { frame.tcp(flags, b"") });
        if let Verdict::Redirect(_) = outcome.verdict {
            let server = server_of(&outcome.frame);
            assert!((0..SERVERS).any(|index| cast::server(index) == server), "to {server}");
        }
    }

    /// The first packet of a connection at the moment at which any other thread that does this sends it, too. It stays
    /// long enough to be seen if there are two of it.
    fn race(&mut self, kernel: &mut Kernel<'_>) {
        let slot = (self.begun.elapsed().as_micros() / SLOT.as_micros()) as u32 + 1;
        let number = slot % RACERS;
        let client = Ipv4Addr::new(10, 1, 0x80 | (number >> 8) as u8, number as u8);
        let frame = Kind::of(number).request((client, 50_001)).udp(b"x");
        while self.begun.elapsed() < SLOT * slot {
            hint::spin_loop();
        }
        kernel.arrive(Wire::Outside, &frame);
        add(&self.tally.raced);
    }

    /// A new connection of one of many clients.
    fn stranger(&mut self, kernel: &mut Kernel<'_>) {
        let number = self.random.below(STRANGERS);
        let client = Ipv4Addr::new(10, 1, 0x80 | (number >> 8) as u8, number as u8);
        let frame = Kind::of(number).request((client, 50_000));
        kernel.arrive(Wire::Outside, &if number.is_multiple_of(5) { frame.udp(b"x") } else { frame.tcp("S", b"") });
    }
}

/// Stops the senders at its end, also when a check has failed.
struct Stop<'s>(&'s AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Lets time pass and changes the configuration.
fn disturb(kernel: &mut Kernel<'_>, random: &mut Random, tally: &Tally) {
    kernel.pass(random.below(12));
    let kind = Kind::of(random.below(12));
    let Kind { family, method, port, .. } = kind;
    let key = family.service([Transport::Tcp, Transport::Udp][random.below(2) as usize], port);
    let server = family.at(random.below(SERVERS.into()) as u8, port);
    let weight = random.below(4);
    let scheduler = [Scheduler::Rr, Scheduler::Wrr, Scheduler::Wlc, Scheduler::Sh][random.below(4) as usize];
    kernel.change(&|change| change.edit_service(key, kind.spec(scheduler)).expect("there"));
    kernel.change(&|change| change.edit_dest(key, server, dest(method, weight)).expect("there"));
    kernel.change(&|change| change.delete_dest(key, server).expect("there"));
    thread::sleep(Duration::from_millis(2));
    kernel.change(&|change| change.add_dest(key, server, dest(method, 1)).expect("new"));
    add(&tally.changes);
    thread::sleep(Duration::from_millis(20));
}

/// Gives the director new programs. The old ones go on until their senders have stopped: `quiet` is held while any sends.
fn replace(site: &Site, quiet: &RwLock<()>, tally: &Tally) {
    let place = site.place();
    let work = |kernel: &mut Kernel<'_>| {
        let lock = place.lock().expect("the lock can be taken");
        load::replace(place, &lock, kernel.maps()).expect("the kernel takes the programs again");
        kernel.start_ageing().expect("the timer goes on");
    };
    site.enter(work).expect("the pins open");
    let _quiet = quiet.write().expect("no sender has failed");
    let lock = place.lock().expect("the lock can be taken");
    load::retire(place, &lock).expect("the pins can be removed");
    add(&tally.replacements);
}

/// How many templates there are.
fn templates(kernel: &Kernel<'_>) -> u64 {
    kernel.maps().dest_loads.iter().map(|load| u64::from(load.templates.load())).sum()
}

/// Waits until the timer has looked at the whole table once more, from begin to end.
fn sweep(site: &Site) {
    let sweeps = || open::ageing(site.place()).expect("the map is pinned").record.sweeps;
    let (before, begun) = (sweeps(), Instant::now());
    while sweeps() < before + 2 {
        assert!(begun.elapsed() < Duration::from_secs(60), "the timer does not run");
        thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn the_table_stays_exact_whatever_happens_at_once() {
    let seconds = match std::env::var(VARIABLE) {
        Ok(value) => value.parse().unwrap_or_else(|_| panic!("{VARIABLE}={value} is not a number of seconds")),
        Err(_) => SECONDS,
    };
    let site = Site::new("stress-all", BUCKETS).expect("a director in the kernel");
    site.enter(|kernel| {
        kernel.start_ageing().expect("the timer starts");
        kernel.change(&services);
    })
    .expect("the pins open");
    let begun = Instant::now();
    let end = begun + Duration::from_secs(seconds);
    let (tally, quiet, over) = (Tally::default(), RwLock::new(()), AtomicBool::new(false));
    let check = || {
        let _quiet = quiet.write().expect("no sender has failed");
        site.enter(|kernel| {
            let set_pace =
                |pace| load::start_ageing(site.place(), kernel.maps(), Some(pace)).expect("the timer goes on");
            let pace = Pace::usual(kernel.maps().instance().flow_buckets);
            // There is always a connection that the timer could end while the table is counted.
            set_pace(Pace { interval_ns: REST_NS, ..pace });
            audit::check_instance(kernel.maps()).expect("exact counters");
            tally.templates.fetch_add(templates(kernel), Ordering::Relaxed);
            set_pace(pace);
        })
        .expect("the pins open");
    };
    thread::scope(|scope| {
        for cpu in 0..thread::available_parallelism().map_or(1, NonZero::get) {
            let (site, tally, quiet, over) = (&site, &tally, &quiet, &over);
            scope.spawn(move || {
                let random = Random(0x9e37_79b9 + cpu as u64);
                let mut sender = Sender { cpu, random, begun, own: vec![None; OWN as usize], tally };
                while !over.load(Ordering::Relaxed) {
                    let _sends = quiet.read().expect("nobody has failed");
                    site.enter(|kernel| sender.send(kernel)).expect("the pins open");
                }
            });
        }
        let _stop = Stop(&over);
        let (mut random, mut turn) = (Random(0x517c_c1b7), 0);
        while turn < TURNS || Instant::now() < end {
            turn += 1;
            site.enter(|kernel| disturb(kernel, &mut random, &tally)).expect("the pins open");
            match turn % TURNS {
                10 => {
                    site.enter(|kernel| kernel.end_connections()).expect("the pins open");
                    add(&tally.flushes);
                }
                20 => replace(&site, &quiet, &tally),
                0 => check(),
                _ => {}
            }
        }
    });
    check();
    println!("{:?}", tally.all());
    for (what, count) in tally.all() {
        assert!(count > 0, "nothing was {what}");
    }
    // And when all time is over, nothing is left.
    site.enter(|kernel| {
        kernel.pass(2_000);
        assert_eq!(kernel.counts().reasons[Reason::Impossible.as_str()], 0, "packets that met what cannot be");
    })
    .expect("the pins open");
    sweep(&site);
    // A template stays for another minute if its time is over before that of the last connection that it controls.
    site.enter(|kernel| kernel.pass(62)).expect("the pins open");
    sweep(&site);
    site.enter(|kernel| {
        let left = audit::check_instance(kernel.maps()).expect("exact counters");
        assert!(left.is_empty(), "{left:?}");
        assert_eq!(templates(kernel), 0, "templates are left");
    })
    .expect("the pins open");
    let ended = open::ageing(site.place()).expect("the map is pinned").record.ended;
    assert!(ended > 0, "the timer has ended nothing");
}
