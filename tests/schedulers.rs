//! Who gets the next connection, where the records of ip_vs do not say it: thresholds.

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

    /// Ends connections until another is let. Returns how many were left.
    fn drain(&mut self) -> usize {
        // Those of the earlier turns are over: a packet that meets one ends it.
        self.executor.pass(100);
        loop {
            let client = self.open.pop().expect("a connection");
            assert_eq!(send(self.executor, client, "A"), None);
            let left = self.open.len();
            if self.open() {
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
    for &scheduler in Scheduler::ALL {
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
