//! Connections end, and are counted, without any process: the kernel's timer does it.

use std::{
    fs,
    net::Ipv4Addr,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use lb_common::{
    abi::AgeingRecord,
    proto::{Method, Protocol, Scheduler},
    tcp::State,
    timeout,
};
use lb_userspace::{
    control::{
        bulk::{self, NewConnection, ProtocolState},
        change::Change,
        model::Transport,
        session::Session,
    },
    datapath::{open, place::Place},
};
use xdpvs_tests::{
    audit, cast,
    executor::{Executor, Kernel, Site, Verdict, Wire},
    frames::{ETHERNET, Frame},
    world::{at, dest, scheduled, service},
};

/// One test at a time: one of them looks at what its process has open.
static ALONE: Mutex<()> = Mutex::new(());

const PORT: u16 = 80;
const METHODS: [Method; 3] = [Method::Masq, Method::Route, Method::Tunnel];

fn services(change: &mut Change<'_>) {
    for protocol in [Transport::Tcp, Transport::Udp] {
        let key = service(protocol, PORT);
        change.add_service(key, scheduled(Scheduler::Rr)).expect("new");
        for (index, method) in (0..).zip(METHODS) {
            change.add_dest(key, at(index, PORT), dest(method, 1)).expect("new");
        }
    }
}

fn client(number: u32) -> Frame {
    let address = Ipv4Addr::new(10, 1, (number >> 8) as u8, number as u8);
    Frame::new((cast::CLIENT_MAC, cast::DIRECTOR_OUTSIDE_MAC), (address, 40_000), (cast::VIP, PORT))
}

fn is_masqueraded(frame: &[u8]) -> bool {
    let destination = &frame[ETHERNET + 16..ETHERNET + 20];
    frame[ETHERNET + 9] != 4 && destination != cast::VIP.octets()
}

/// A connection that was opened: how long it lives, and whether it is active.
struct Opened {
    seconds: u32,
    active: bool,
}

/// Opens a connection and takes it to one of several states.
fn open_one(kernel: &mut Kernel<'_>, number: u32) -> Opened {
    let frame = client(number);
    let send = |kernel: &mut Kernel<'_>, frame: &[u8]| {
        let outcome = kernel.arrive(Wire::Outside, frame);
        assert!(Verdict::redirect(Wire::Inside).is_met_by(outcome.verdict), "{outcome:?}");
        is_masqueraded(&outcome.frame)
    };
    let flags: &[&'static str] = match number % 5 {
        0 => &["S"],
        1 => &["S", "A"],
        2 => &["S", "A", "FA"],
        3 => &["S", "A", "R"],
        _ => {
            send(kernel, &frame.udp(b"hello"));
            return Opened { seconds: timeout::UDP_S, active: false };
        }
    };
    let masqueraded = flags.iter().map(|flags| send(kernel, &frame.tcp(flags, b""))).fold(false, |_, last| last);
    let state = match number % 5 {
        0 => State::SynRecv,
        1 => State::Established,
        2 if masqueraded => State::CloseWait,
        2 => State::FinWait,
        _ => State::Close,
    };
    Opened { seconds: state.default_timeout_s(), active: matches!(state, State::SynRecv | State::Established) }
}

/// Waits until the timer has looked at the whole table once more, from begin to end.
fn sweep(place: &Place) {
    let sweeps = || open::ageing(place).expect("the map is pinned").record.sweeps;
    let (before, begun) = (sweeps(), Instant::now());
    // The sweep that is under way, and another.
    while sweeps() < before + 2 {
        assert!(begun.elapsed() < Duration::from_secs(60), "the timer does not run");
        thread::sleep(Duration::from_millis(100));
    }
}

/// What this process has open of the kernel's BPF: nothing, or the timer would live by it and not by the pins.
fn open_bpf_files() -> Vec<String> {
    let links =
        fs::read_dir("/proc/self/fd").expect("procfs").flatten().filter_map(|entry| fs::read_link(entry.path()).ok());
    let maps = fs::read_to_string("/proc/self/maps").expect("procfs");
    let mapped = maps.lines().filter(|line| line.contains("bpf")).map(str::to_owned);
    links.map(|link| link.display().to_string()).filter(|link| link.contains("bpf")).chain(mapped).collect()
}

#[test]
fn the_kernel_ends_connections_with_no_process_left() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let site = Site::new("ageing", 100).expect("a director in the kernel");
    let place = site.place().clone();
    let begun = Instant::now();
    let opened: Vec<Opened> = site
        .enter(|kernel| {
            kernel.start_ageing().expect("the timer starts");
            kernel.change(&services);
            (0..500).map(|number| open_one(kernel, number)).collect()
        })
        .expect("the pins open");
    // Some are younger than others by this much.
    let opening = begun.elapsed().as_secs() as u32 + 1;

    let mut skew = 0;
    // Around the time of each state. The kernel's own clock goes on as well, so what must be left has two bounds.
    for now in [0, 13, 50, 75, 110, 135, 290, 315, 890, 915] {
        site.enter(|kernel| kernel.pass(now - skew)).expect("the pins open");
        skew = now;
        let oldest_before = now + begun.elapsed().as_secs() as u32;
        assert_eq!(open_bpf_files(), Vec::<String>::new(), "open files");
        sweep(&place);
        let found =
            site.enter(|kernel| audit::check_instance(kernel.maps())).expect("the pins open").expect("exact counters");
        let oldest_after = now + begun.elapsed().as_secs() as u32 + 1;
        let left = |age: u32| {
            let left: Vec<&Opened> = opened.iter().filter(|connection| connection.seconds > age).collect();
            (left.iter().filter(|connection| connection.active).count() as u32, left.len() as u32)
        };
        let (active, all) = found.values().fold((0, 0), |sum, load| (sum.0 + load.0, sum.1 + load.1));
        // None ends early, and none is two seconds late.
        let (least, most) = (left(oldest_after), left(oldest_before.saturating_sub(opening + 2)));
        assert!(
            (least.0..=most.0).contains(&active),
            "{active} active connections after {now} s, not {least:?} to {most:?}"
        );
        assert!((least.1..=most.1).contains(&all), "{all} connections after {now} s, not {least:?} to {most:?}");
    }
    let ended = open::ageing(&place).expect("the map is pinned").record.ended;
    assert_eq!(ended, opened.len() as u64, "connections that the timer has ended");
}

/// The same by the kernel's own clock, with timeouts of a second.
#[test]
fn the_kernel_ends_connections_by_its_own_clock() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let site = Site::new("clock", 10).expect("a director in the kernel");
    let place = site.place().clone();
    let open = |kernel: &mut Kernel<'_>| {
        kernel.start_ageing().expect("the timer starts");
        kernel.change(&services);
        let hz = kernel.maps().instance().hz;
        for index in [timeout::index(Protocol::Udp, 0), timeout::index(Protocol::Tcp, State::SynRecv as u8)] {
            kernel.shared().config.timeouts[index].store(hz);
        }
        for number in 0..10 {
            let frame = client(number);
            kernel.arrive(Wire::Outside, &frame.udp(b"hello"));
            kernel.arrive(Wire::Outside, &frame.tcp("S", b""));
        }
        kernel.audit().expect("exact counters")
    };
    let found = site.enter(open).expect("the pins open");
    assert_eq!(found.values().fold((0, 0), |sum, load| (sum.0 + load.0, sum.1 + load.1)), (10, 20));
    let begun = Instant::now();
    loop {
        sweep(&place);
        let left =
            site.enter(|kernel| audit::check_instance(kernel.maps())).expect("the pins open").expect("exact counters");
        if left.is_empty() {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "still there: {left:?}");
    }
}

/// A large table has bounded ticks, and its connections end within a sweep all the same.
#[test]
fn connections_of_a_large_table_end_within_a_sweep() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    const NUMBER: u32 = 100_000;
    // Eight million entries.
    let site = Site::new("large", 800_000).expect("a director in the kernel");
    let place = site.place();
    site.enter(|kernel| {
        kernel.change(&services);
        kernel.start_ageing().expect("the timer starts");
    })
    .expect("the pins open");
    let AgeingRecord { slice, interval_ns, .. } = open::ageing(place).expect("the map is pinned").record;
    assert!(slice <= 8192 && interval_ns >= 10_000_000, "{slice} buckets every {interval_ns} ns");
    let connections = (0..NUMBER).map(|number| NewConnection {
        service: service(Transport::Udp, PORT),
        client: (Ipv4Addr::from_bits(Ipv4Addr::new(10, 64, 0, 0).to_bits() + number), 1024).into(),
        destination: at((number % 3) as u8, PORT),
        state: ProtocolState::Udp,
        remaining: Duration::from_secs([1000, 2000][number as usize % 2]),
    });
    let mut session = Session::open(place).expect("the pins open");
    let lock = place.lock().expect("the lock can be taken");
    let inserted = bulk::insert(&mut session, &lock, connections).expect("the control program runs");
    drop(lock);
    assert_eq!(inserted.created, u64::from(NUMBER));
    // The kernel's own clock goes on as well, by much less than there is between these.
    for (pass, left) in [(500, NUMBER), (1000, NUMBER / 2), (1000, 0)] {
        site.enter(|kernel| kernel.pass(pass)).expect("the pins open");
        sweep(place);
        let found = audit::check_instance(session.maps()).expect("exact counters");
        assert_eq!(found.values().map(|(_, total)| total).sum::<u32>(), left);
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

/// Packets of some clients and servers, in no order, as fast as one thread can.
fn traffic(kernel: &mut Kernel<'_>, seed: u64, frames: u32) {
    let mut random = Random(seed);
    for _ in 0..frames {
        // Few clients: all threads are at the same connections.
        let request = client(random.below(40));
        let flags = ["S", "S", "A", "A", "FA", "R"][random.below(6) as usize];
        match random.below(6) {
            0 => drop(kernel.arrive(Wire::Outside, &request.udp(b"x"))),
            1 => {
                let macs = (cast::server_mac(0), cast::DIRECTOR_INSIDE_MAC);
                let reply = Frame { macs, from: (cast::server(0), PORT), to: request.from, ..request };
                kernel.arrive(Wire::Inside, &reply.tcp(flags, b""));
            }
            2 => {
                let macs = (cast::server_mac(1), cast::DIRECTOR_INSIDE_MAC);
                let reply = Frame { macs, from: (cast::VIP, PORT), to: request.from, ..request };
                kernel.arrive(Wire::Inside, &reply.tcp(flags, b""));
            }
            _ => drop(kernel.arrive(Wire::Outside, &request.tcp(flags, b""))),
        }
    }
}

/// Several CPUs open, move and end the same few connections, the timer ends others, the clock jumps and the configuration
/// changes under all of it. Whenever that rests, every counter is exact.
#[test]
fn counters_are_exact_after_traffic_on_all_cpus() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    const THREADS: u64 = 4;
    // Forty clients and two services into forty entries: the table is nearly always full.
    let site = Site::new("stress", 4).expect("a director in the kernel");
    site.enter(|kernel| {
        kernel.start_ageing().expect("the timer starts");
        kernel.change(&services);
    })
    .expect("the pins open");
    for round in 0..3 {
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            let senders: Vec<_> = (1..=THREADS)
                .map(|thread| {
                    let site = &site;
                    scope.spawn(move || {
                        site.enter(|kernel| traffic(kernel, 97 * round + thread, 4_000)).expect("the pins open")
                    })
                })
                .collect();
            let disturber = scope.spawn(|| site.enter(|kernel| disturb(kernel, &over)).expect("the pins open"));
            senders.into_iter().for_each(|sender| sender.join().expect("no sender fails"));
            over.store(true, Ordering::Relaxed);
            assert!(disturber.join().expect("the disturber does not fail") > 0, "nothing was changed meanwhile");
        });
        site.enter(|kernel| audit::check_instance(kernel.maps())).expect("the pins open").expect("exact counters");
    }
    // And when all time is over, nothing is left.
    site.enter(|kernel| kernel.pass(2_000)).expect("the pins open");
    sweep(site.place());
    let left =
        site.enter(|kernel| audit::check_instance(kernel.maps())).expect("the pins open").expect("exact counters");
    assert!(left.is_empty(), "{left:?}");
}

/// Lets time pass and changes the configuration until it is `over`. Returns how often.
fn disturb(kernel: &mut Kernel<'_>, over: &AtomicBool) -> u32 {
    let key = service(Transport::Tcp, PORT);
    let mut turns = 0;
    while !over.load(Ordering::Relaxed) {
        kernel.pass(5);
        kernel.change(&|change| change.delete_dest(key, at(1, PORT)).expect("there"));
        kernel.change(&|change| change.edit_dest(key, at(0, PORT), dest(Method::Masq, turns % 3)).expect("there"));
        kernel.change(&|change| change.add_dest(key, at(1, PORT), dest(Method::Route, 1)).expect("new"));
        turns += 1;
    }
    turns
}
