//! Who gets the next connection, where the records of ip_vs do not say it: thresholds, and schedulers that draw lots. And how
//! much there is to do for that.

use std::collections::BTreeMap;

use lb_common::{
    overload::Thresholds,
    proto::{Method, Scheduler},
};
use lb_userspace::control::model::{DestSpec, ServiceKey, Transport};
use xdpvs_tests::{
    cast,
    executor::{Executor, Host, Kernel, Verdict, Wire},
    frames::Frame,
    world::{at, dest, scheduled, service},
};

const PORT: u16 = 80;
/// Buckets of the flow tables.
const TABLE: u32 = 64;

fn key() -> ServiceKey {
    service(Transport::Tcp, PORT)
}

/// Sends a segment of client number `client`. Returns the number of the server that it went to.
fn send(executor: &mut impl Executor, client: u16, flags: &'static str) -> Option<u8> {
    let macs = (cast::CLIENT_MAC, cast::DIRECTOR_OUTSIDE_MAC);
    let frame = Frame::new(macs, (cast::CLIENT, 10_000 + client), (cast::VIP, PORT));
    let outcome = executor.arrive(Wire::Outside, &frame.tcp(flags, &[]));
    if !Verdict::redirect(Wire::Inside).is_met_by(outcome.verdict) {
        return None;
    }
    (0..16).find(|index| outcome.frame[30..34] == cast::server(*index).octets())
}

fn limited(upper: u32, lower: u32) -> DestSpec {
    DestSpec { thresholds: Thresholds { upper, lower }, ..dest(Method::Masq, 100) }
}

/// Connections of one destination with thresholds.
struct Limited<'e, E> {
    executor: &'e mut E,
    /// Clients that have a connection, in SYN_RECV.
    open: Vec<u16>,
    /// The next client.
    next: u16,
}

impl<'e, E: Executor> Limited<'e, E> {
    fn new(executor: &'e mut E, scheduler: Scheduler, spec: DestSpec) -> Self {
        executor.reset();
        executor.change(&|change| {
            change.add_service(key(), scheduled(scheduler)).expect("new");
            change.add_dest(key(), at(0, PORT), spec).expect("new");
        });
        Self { executor, open: Vec::new(), next: 0 }
    }

    /// Opens a connection, if it is let.
    fn open(&mut self) -> bool {
        self.next += 1;
        let opened = send(self.executor, self.next, "S").is_some();
        if opened {
            self.open.push(self.next);
        }
        opened
    }

    /// Opens connections until one is refused. Returns how many there are then.
    fn fill(&mut self) -> usize {
        while self.open() {}
        self.open.len()
    }

    /// Ends connections until another is let, and then all. Returns how many were left.
    fn drain(&mut self) -> usize {
        // Those of the earlier turns are over: a packet that meets one ends it.
        self.executor.pass(100);
        loop {
            let client = self.open.pop().expect("a connection");
            assert_eq!(send(self.executor, client, "A"), None);
            let left = self.open.len();
            if self.open() {
                // What is over and still in the table would make room for others.
                self.executor.end_connections();
                self.open.clear();
                return left;
            }
        }
    }

    fn edit(&mut self, spec: DestSpec) {
        self.executor.change(&|change| change.edit_dest(key(), at(0, PORT), spec).expect("there"));
    }
}

/// docs/ipvs.md, section 1.3.
fn thresholds_hold(executor: &mut impl Executor) {
    // What lblc has once chosen for an address it keeps: see below.
    for &scheduler in Scheduler::ALL.iter().filter(|scheduler| **scheduler != Scheduler::Lblc) {
        for (upper, lower, left) in [(1, 0, 0), (4, 0, 2), (4, 4, 3), (3, 1, 0), (8, 5, 4)] {
            let about = format!("{scheduler}, -x {upper} -y {lower}, {}", executor.name());
            let mut dest = Limited::new(executor, scheduler, limited(upper, lower));
            for _ in 0..2 {
                assert_eq!(dest.fill(), upper as usize, "connections when the first is refused: {about}");
                assert_eq!(dest.drain(), left, "connections when one is taken again: {about}");
            }
        }
    }
}

/// lblc asks for thresholds when it chooses, and not when it has chosen before (docs/ipvs.md, section 3.13).
fn lblc_keeps_what_it_has_chosen(executor: &mut impl Executor) {
    let mut dest = Limited::new(executor, Scheduler::Lblc, limited(2, 0));
    (0..5).for_each(|_| assert!(dest.open()));
    // Another scheduler and back: it has to choose again.
    for scheduler in [Scheduler::Rr, Scheduler::Lblc] {
        dest.executor.change(&|change| change.edit_service(key(), scheduled(scheduler)).expect("there"));
        assert!(!dest.open());
    }
}

/// Other thresholds for a destination that has connections: the rows of docs/ipvs.md, section 1.3, for an edit.
fn edits_of_thresholds_hold(executor: &mut impl Executor) {
    let mut dest = Limited::new(executor, Scheduler::Wlc, limited(0, 0));
    (0..6).for_each(|_| assert!(dest.open()));
    dest.edit(limited(6, 3));
    assert!(!dest.open(), "as many as the upper threshold says");
    dest.edit(limited(10, 4));
    assert!(!dest.open(), "between the thresholds, and overloaded before");
    dest.edit(limited(10, 7));
    assert!(dest.open(), "fewer than the lower threshold says");
    dest.edit(limited(10, 4));
    assert!(dest.open(), "between the thresholds, and not overloaded before");
    dest.edit(limited(2, 0));
    assert!(!dest.open(), "more than the upper threshold says");
    dest.edit(limited(0, 0));
    assert!(dest.open(), "no threshold");
    dest.edit(limited(20, 20));
    assert_eq!(dest.fill(), 20);
    // What is removed and added again has its connections, and new thresholds.
    dest.executor.change(&|change| {
        change.delete_dest(key(), at(0, PORT)).expect("there");
        change.add_dest(key(), at(0, PORT), limited(21, 0)).expect("new");
    });
    assert!(!dest.open(), "between the thresholds, and overloaded before");
    dest.edit(limited(40, 0));
    assert_eq!(dest.fill(), 40);
}

/// Who has had too many connections is passed over, and gets his share again when he has fewer.
fn others_take_over(executor: &mut impl Executor) {
    executor.reset();
    executor.change(&|change| {
        change.add_service(key(), scheduled(Scheduler::Rr)).expect("new");
        change.add_dest(key(), at(0, PORT), limited(2, 0)).expect("new");
        change.add_dest(key(), at(1, PORT), limited(0, 0)).expect("new");
    });
    let picks: Vec<_> = (0..8).map(|client| send(executor, client, "S")).collect();
    assert_eq!(picks, [1, 0, 1, 0, 1, 1, 1, 1].map(Some));
    executor.end_connections();
    let picks: Vec<_> = (0..4).map(|client| send(executor, client, "S")).collect();
    assert_eq!(picks, [0, 1, 0, 1].map(Some));
}

fn thresholds(executor: &mut impl Executor) {
    thresholds_hold(executor);
    lblc_keeps_what_it_has_chosen(executor);
    edits_of_thresholds_hold(executor);
    others_take_over(executor);
}

#[test]
fn thresholds_keep_connections_away_on_the_host() {
    thresholds(&mut Host::new(TABLE));
}

#[test]
fn thresholds_keep_connections_away_in_the_kernel() {
    Kernel::with("thresholds", TABLE, |kernel| thresholds(kernel)).expect("a director in the kernel");
}

/// Sends as many SYNs. Returns how many each server got.
fn spread(executor: &mut impl Executor, connections: u16) -> BTreeMap<u8, u32> {
    let mut spread = BTreeMap::new();
    for client in 0..connections {
        let server = send(executor, client, "S").expect("a server");
        *spread.entry(server).or_default() += 1;
        if client % 64 == 63 {
            // The table is small.
            executor.end_connections();
        }
    }
    spread
}

/// Configures a service whose servers have these weights, from number 0 on.
fn weighted(executor: &mut impl Executor, scheduler: Scheduler, weights: &[u32]) {
    executor.reset();
    executor.change(&|change| {
        change.add_service(key(), scheduled(scheduler)).expect("new");
        for (index, weight) in (0..).zip(weights) {
            change.add_dest(key(), at(index, PORT), dest(Method::Masq, *weight)).expect("new");
        }
    });
}

/// Compares with probabilities, by the chi-squared statistic.
fn is_as_likely_as(spread: &BTreeMap<u8, u32>, probabilities: &[(u8, f64)], about: &str) {
    let connections: u32 = spread.values().sum();
    let of = |server| f64::from(spread.get(&server).copied().unwrap_or_default());
    let deviation = |(server, probability): &(u8, f64)| {
        let expected = probability * f64::from(connections);
        (of(*server) - expected).powi(2) / expected
    };
    let statistic: f64 = probabilities.iter().map(deviation).sum();
    // With at most four degrees of freedom it is more in one of a million runs.
    assert!(statistic < 33.4, "{about}: {spread:?} for {probabilities:?}, a statistic of {statistic}");
    assert!(spread.keys().all(|server| probabilities.iter().any(|(known, _)| known == server)), "{about}: {spread:?}");
}

fn drawing_has_its_distribution(executor: &mut impl Executor) {
    const CONNECTIONS: u16 = 4096;
    let weights = [5, 0, 3, 1, 1];
    weighted(executor, Scheduler::Random, &weights);
    let uniform = [0, 2, 3, 4].map(|server| (server, 0.25));
    is_as_likely_as(&spread(executor, CONNECTIONS), &uniform, "random");
    weighted(executor, Scheduler::Wrandom, &weights);
    is_as_likely_as(&spread(executor, CONNECTIONS), &[(0, 0.5), (2, 0.3), (3, 0.1), (4, 0.1)], "wrandom");
    // Whose thresholds are reached loses its share to the others, in proportion.
    for (scheduler, others) in [
        (Scheduler::Random, [(2, 1.0 / 3.0), (3, 1.0 / 3.0), (4, 1.0 / 3.0)]),
        (Scheduler::Wrandom, [(2, 0.6), (3, 0.2), (4, 0.2)]),
    ] {
        weighted(executor, scheduler, &weights);
        executor.change(&|change| {
            let spec = DestSpec { thresholds: Thresholds { upper: 1, lower: 0 }, ..dest(Method::Masq, 1_000_000) };
            change.edit_dest(key(), at(0, PORT), spec).expect("there");
        });
        let mut spread = BTreeMap::new();
        for client in 0..CONNECTIONS {
            let server = send(executor, client, "S").expect("a server");
            // As long as it has a connection the first is overloaded, and it soon has one.
            let full = executor.counts().dests.get(&cast::server(0)).is_some_and(|counts| counts.active > 0);
            if full && server != 0 {
                *spread.entry(server).or_default() += 1;
            }
            if client % 64 == 63 {
                executor.end_connections();
            }
        }
        is_as_likely_as(&spread, &others, &format!("{scheduler} with one overloaded"));
    }
    // Nobody is usable.
    for scheduler in [Scheduler::Random, Scheduler::Wrandom, Scheduler::Twos, Scheduler::Wdh] {
        for weights in [&[][..], &[0, 0]] {
            weighted(executor, scheduler, weights);
            assert_eq!(send(executor, 1, "S"), None, "{scheduler}");
        }
    }
}

/// docs/ipvs.md, section 3.12: with the first in the list, which is the last added, a little more likely than its weight.
fn twos_has_its_distribution(executor: &mut impl Executor) {
    weighted(executor, Scheduler::Twos, &[3, 0, 1]);
    // Of 0..=4, the lots 0 and 1 fall on the first in the list, number 2. With equal overheads, none, the first lot wins.
    let mut spread = BTreeMap::new();
    for client in 0..2048 {
        *spread.entry(send(executor, client, "S").expect("a server")).or_default() += 1;
        executor.end_connections();
    }
    is_as_likely_as(&spread, &[(2, 0.4), (0, 0.6)], "twos without connections");
    // With a connection that is not ended one is worse off, as long as the other has none: he wins only if both lots fall on
    // him.
    for (busy, probabilities) in [(2, [(2, 0.16), (0, 0.84)]), (0, [(2, 0.64), (0, 0.36)])] {
        let mut spread = BTreeMap::new();
        for client in 0..2048 {
            executor.end_connections();
            while send(executor, 3000 + client, "S") != Some(busy) {
                executor.end_connections();
            }
            *spread.entry(send(executor, client, "S").expect("a server")).or_default() += 1;
        }
        is_as_likely_as(&spread, &probabilities, &format!("twos with number {busy} busy"));
    }
}

/// Every virtual address has one server, and each server as many of them as its weight says.
fn wdh_goes_by_the_service_s_address(executor: &mut impl Executor) {
    weighted(executor, Scheduler::Wdh, &[1, 1, 2]);
    let picks: Vec<_> = (0..16).map(|client| send(executor, client, "S")).collect();
    assert!(picks[0].is_some() && picks.iter().all(|pick| *pick == picks[0]), "{picks:?}");
    let server = picks[0].expect("a server");
    // Of weight 0 it gets none, and with its weight its own again.
    let weigh = |executor: &mut _, weight| {
        Executor::change(executor, &|change| {
            change.edit_dest(key(), at(server, PORT), dest(Method::Masq, weight)).expect("there");
        });
    };
    weigh(executor, 0);
    let other = send(executor, 100, "S");
    assert!(other.is_some() && other != Some(server), "{other:?}");
    weigh(executor, [1, 1, 2][usize::from(server)]);
    assert_eq!(send(executor, 101, "S"), Some(server));
}

fn lots(executor: &mut impl Executor) {
    drawing_has_its_distribution(executor);
    twos_has_its_distribution(executor);
    wdh_goes_by_the_service_s_address(executor);
}

#[test]
fn lots_fall_as_often_as_weights_say_on_the_host() {
    lots(&mut Host::new(TABLE));
}

#[test]
fn lots_fall_as_often_as_weights_say_in_the_kernel() {
    Kernel::with("lots", TABLE, |kernel| lots(kernel)).expect("a director in the kernel");
}

/// The most steps of scans that a new connection takes among so many destinations, while each gets three, or as many as it may.
fn most_steps(scheduler: Scheduler, dests: u16) -> u32 {
    let mut host = Host::new(4 * TABLE);
    host.change(&|change| {
        change.add_service(key(), scheduled(scheduler)).expect("new");
        (0..dests).for_each(|index| {
            change.add_dest(key(), at(0, 1000 + index), dest(Method::Masq, 1)).expect("new");
        });
    });
    let steps = |client| {
        let before = host.scanned();
        let opened = send(&mut host, client, "S").is_some();
        assert!(opened || client >= dests, "{scheduler}, connection {client}");
        host.scanned() - before
    };
    (0..3 * dests).map(steps).max().expect("a connection")
}

/// A step looks at the eight destinations of a line; twos goes along them once to add up weights and once more to draw.
#[test]
fn a_new_connection_takes_no_more_steps_than_its_scheduler_needs() {
    const DESTS: u16 = 240;
    for &scheduler in Scheduler::ALL {
        let scans = match scheduler {
            Scheduler::Rr | Scheduler::Wrr | Scheduler::Random | Scheduler::Wrandom => 0,
            Scheduler::Sh | Scheduler::Dh | Scheduler::Mh | Scheduler::Wdh => 0,
            Scheduler::Twos => 2,
            _ => 1,
        };
        let (few, many) = (most_steps(scheduler, 8), most_steps(scheduler, DESTS));
        let more = scans * u32::from(DESTS / 8 - 1);
        assert!(many <= few + more, "{scheduler}: {few} steps among 8 destinations, {many} among {DESTS}");
    }
}
