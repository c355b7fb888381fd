//! What holds of templates, whatever the order in which CPUs get at them.
//!
//! * While somebody holds a template, it is of one client and goes to one destination.
//! * No holder is lost, and none is counted twice: at rest, a template is held by the connections that it controls.
//! * A template ends once, and at rest every destination's number of templates equals a recount. One that controls
//!   connections does not end.
//! * A client has one template, apart from retired ones.
//! * The template of a connection is its own: of its client, to its destination. So its packets assure no other, and its end is
//!   no other's.
//! * A template that a packet has used does not end before its time; one that is doomed ends with its last holder.
//!
//! [`Table::audit`] checks what holds at rest.

use std::sync::Arc;

use lb_common::{
    flow::{Entry4, Place, template},
    proto::Protocol,
};
use lb_ebpf::{ageing::What, flow_table::Inserted, template::FORCED, track::From};

use crate::{
    scheduler::{Work, explore},
    table::{ACK, Fate, HZ, Opening, Packet, SYN, Table, clock, key},
};

/// When everything begins.
const BEGIN: u32 = 0;
/// How long templates stay from each use on.
const TIMEOUT: u32 = 10 * HZ;
/// When connections are over that were opened by a SYN at [`BEGIN`].
const END: u32 = 61 * HZ;
/// Clients from here on fill the table up; destinations alike.
const OTHERS: u8 = 20;
/// Entries of a table of two buckets.
const ENTRIES: u8 = 20;

/// A connection of the client, one of several, whose template is for this destination if it has to be made.
fn opening(client: u8, connection: u8, dest: u32) -> Opening {
    let place = Place::of(u64::from(client) << 24 | u64::from(connection) << 16);
    Opening { key: key::<Entry4>(Protocol::Tcp, client, connection), place, dest, tcp_flags: SYN }
}

fn persistent(opening: Opening, ticks: u32) -> Work<Option<Packet>> {
    Arc::new(move |table| Some(table.persistent(&opening, Fate::new(TIMEOUT), clock(ticks))))
}

fn sweep(what: What) -> Work<Option<Packet>> {
    Arc::new(move |table| {
        table.sweep(what);
        None
    })
}

/// Opens a connection by its client's template, for both of which there must be room.
fn open(table: &Table, opening: &Opening) {
    assert_eq!(table.persistent(opening, Fate::new(TIMEOUT), clock(BEGIN)), Packet::Opened(opening.dest));
}

/// Lets the client acknowledge, which establishes its connection.
fn acknowledge(table: &Table, opening: &Opening, ticks: u32) -> Option<Packet> {
    let found = table.find(&opening.key, opening.place)?;
    table.step(&found, ACK, From::Client, clock(ticks)).ok().map(|_| Packet::To(found.dest))
}

/// Establishes so many connections that have nothing to do with templates, and that do not make room.
fn occupy(table: &Table, connections: u8) {
    for client in OTHERS..OTHERS + connections {
        let opening = opening(client, 0, client.into());
        assert_eq!(table.insert(&opening, clock(BEGIN)), Inserted::New);
        acknowledge(table, &opening, BEGIN).expect("opened");
    }
}

/// Whether the connection is in the table.
fn is_there(table: &Table, opening: &Opening) -> bool {
    table.find(&opening.key, opening.place).is_some()
}

/// Ends everything, and checks that nothing was held back.
fn flush(table: &Table) {
    table.sweep(What::dest(lb_common::abi::control::ANY));
    assert_eq!((table.audit(), table.templates()), ([].into(), vec![]));
}

/// Holds the client's template for a while, in which it stays what it is.
fn look(client: u8, dests: &'static [u32], ticks: u32) -> Work<Option<Packet>> {
    Arc::new(move |table| {
        let held = table.hold(client, clock(ticks));
        if !held.is_some() {
            return None;
        }
        let before = table.template(held.number()).expect("a template that is held");
        let after = table.template(held.number()).expect("a template that is held");
        for template in [before, after] {
            assert_eq!((template.client, template.dest), (client, held.dest()));
        }
        assert!(before.word.same_life(after.word) && dests.contains(&held.dest()), "{before:?}, then {after:?}");
        table.let_go(held, 0);
        Some(Packet::To(held.dest()))
    })
}

#[test]
fn packets_of_one_client_make_one_template() {
    for occupied in [0, 6] {
        explore(
            Table::new(2),
            2,
            move |table| occupy(table, occupied),
            vec![persistent(opening(1, 0, 1), BEGIN), persistent(opening(1, 1, 2), BEGIN)],
            |table, said| {
                let template = table.template_of(1).expect("one of them makes it");
                let opened = Some(Packet::Opened(template.dest));
                let lost = Some(Packet::Lost(Inserted::Contended));
                assert!(said.contains(&opened), "{said:?}");
                assert!(said.iter().all(|said| [opened, lost].contains(said)), "{said:?}");
                assert_eq!(table.templates().len(), 1);
                table.audit();
                flush(table);
            },
        );
    }
}

#[test]
fn packets_of_one_connection_open_it_once() {
    explore(
        Table::new(2),
        2,
        |table| assert_eq!(table.make(1, 1, TIMEOUT, clock(BEGIN)), Inserted::New),
        vec![persistent(opening(1, 0, 1), BEGIN), persistent(opening(1, 0, 2), BEGIN)],
        |table, said| {
            assert_eq!(said.iter().filter(|said| **said == Some(Packet::Opened(1))).count(), 1, "{said:?}");
            assert_eq!(table.audit(), [(1, (1, 1))].into());
            flush(table);
        },
    );
}

/// The entry of a template that is looked at becomes another client's, or the same one's to another server.
#[test]
fn a_template_that_is_held_stays_what_it_is() {
    for client in [1, 2] {
        for (threads, preemptions) in [(1, 3), (2, 1)] {
            let replace: Work<Option<Packet>> = Arc::new(move |table| {
                table.sweep(What::dest(1));
                table.make(client, 2, TIMEOUT, clock(BEGIN));
                None
            });
            let mut works = vec![replace];
            works.resize(threads + 1, look(1, &[1, 2], BEGIN));
            explore(
                Table::new(2),
                preemptions,
                |table| {
                    occupy(table, ENTRIES - 1);
                    assert_eq!(table.make(1, 1, TIMEOUT, clock(BEGIN)), Inserted::New);
                },
                works,
                |table, _| {
                    table.audit();
                    flush(table);
                },
            );
        }
    }
}

/// A client comes at the very end of its template's time, and the timer does.
#[test]
fn a_template_that_is_used_does_not_end_before_its_time() {
    let late: Work<Option<Packet>> = Arc::new(|table| {
        let held = table.hold(1, clock(TIMEOUT));
        table.let_go(held, 0);
        None
    });
    for other in [sweep(What::over(clock(TIMEOUT))), late] {
        explore(
            Table::new(2),
            3,
            |table| assert_eq!(table.make(1, 1, TIMEOUT, clock(BEGIN)), Inserted::New),
            vec![look(1, &[1], TIMEOUT - 1), other],
            |table, said| {
                assert_eq!(table.templates().len(), usize::from(said[0].is_some()), "{said:?}");
                table.audit();
                flush(table);
            },
        );
    }
}

/// The same for one that is over, which a connection is about to be opened by.
#[test]
fn a_template_ends_or_controls_connections_but_not_both() {
    explore(
        Table::new(2),
        1,
        |table| assert_eq!(table.make(1, 1, TIMEOUT, clock(BEGIN)), Inserted::New),
        vec![
            persistent(opening(1, 0, 2), TIMEOUT - 1),
            persistent(opening(1, 1, 3), TIMEOUT),
            sweep(What::over(clock(TIMEOUT))),
        ],
        |table, said| {
            assert!(table.templates().len() <= 1, "{said:?}");
            let opened = said.iter().filter(|said| matches!(said, Some(Packet::Opened(_)))).count();
            assert_eq!(table.audit().values().map(|(_, all)| *all as usize).sum::<usize>(), opened, "{said:?}");
            flush(table);
        },
    );
}

/// One connection ends by itself, and everything of its destination is flushed, while the client opens another.
#[test]
fn no_holder_is_lost_nor_counted_twice() {
    let both = [opening(1, 0, 1), opening(1, 1, 1)];
    for what in [What::over(clock(END)), What::dest(1)] {
        explore(
            Table::new(2),
            1,
            move |table| both.iter().for_each(|opening| open(table, opening)),
            vec![sweep(what), sweep(What::dest(1)), persistent(opening(1, 2, 2), END)],
            |table, said| {
                let found = table.audit();
                match said[2] {
                    // It came before the flush, or after it.
                    Some(Packet::Opened(dest)) => assert!(found.is_empty() || found.contains_key(&dest), "{found:?}"),
                    Some(Packet::Lost(Inserted::Contended)) => assert!(found.is_empty(), "{found:?}"),
                    _ => panic!("{said:?}"),
                }
                flush(table);
            },
        );
    }
}

/// A template is doomed, and its time is over, while its only connection ends.
#[test]
fn a_doomed_template_ends_with_its_last_holder() {
    explore(
        Table::new(2),
        2,
        |table| open(table, &opening(1, 0, 1)),
        vec![sweep(What::over(clock(END - HZ))), sweep(What::dest(1)), look(1, &[1], END - HZ)],
        |table, _| {
            assert_eq!((table.audit(), table.templates()), ([].into(), vec![]));
        },
    );
}

/// A connection makes room, with the template that was there for it alone; or it becomes established, and both stay.
#[test]
fn who_makes_room_takes_its_own_template_along() {
    let displace: Work<Option<Packet>> =
        Arc::new(|table| Some(table.persistent(&opening(2, 0, 2), Fate::new(TIMEOUT).displace(), clock(BEGIN))));
    let establish: Work<Option<Packet>> = Arc::new(|table| acknowledge(table, &opening(1, 0, 1), BEGIN));
    explore(
        Table::new(2),
        1,
        |table| {
            occupy(table, ENTRIES - 2);
            open(table, &opening(1, 0, 1));
        },
        vec![displace, establish, look(1, &[1], BEGIN)],
        |table, said| {
            table.audit();
            let own = table.template_of(1);
            assert_eq!(is_there(table, &opening(1, 0, 1)), said[1].is_some(), "{said:?}");
            if said[1].is_some() {
                assert!(own.is_some_and(|own| own.word.has(template::ASSURED)), "{own:?}");
                assert_eq!(said[0], Some(Packet::Lost(Inserted::Full)));
            }
            flush(table);
        },
    );
}

/// A packet establishes a connection that ends at the same time, with its template, in the entry of which there is another
/// client's then.
#[test]
fn a_packet_assures_no_template_but_its_own() {
    let establish: Work<Option<Packet>> = Arc::new(|table| acknowledge(table, &opening(1, 0, 1), BEGIN));
    let replace: Work<Option<Packet>> = Arc::new(|table| {
        table.sweep(What::dest(1));
        Some(table.persistent(&opening(2, 0, 2), Fate::new(TIMEOUT), clock(BEGIN)))
    });
    explore(
        Table::new(2),
        2,
        |table| {
            occupy(table, ENTRIES - 2);
            open(table, &opening(1, 0, 1));
        },
        vec![establish, replace],
        |table, said| {
            if said[1] == Some(Packet::Opened(2)) {
                let other = table.template_of(2).expect("it controls a connection");
                assert!(!other.word.has(template::ASSURED), "{other:?} was assured by another's packet");
            }
            table.audit();
            flush(table);
        },
    );
}

/// A connection that was made to end lets go of its template, which ends meanwhile; another's is there then.
#[test]
fn an_end_is_of_no_template_but_its_own() {
    let replace: Work<bool> = Arc::new(|table| {
        table.sweep(What::dest(1));
        table.make(2, 2, TIMEOUT, clock(BEGIN)) == Inserted::New
    });
    // It is held from the beginning.
    let end: Work<bool> = Arc::new(|table| {
        let only = table.templates()[0];
        let held = table.held(only);
        table.let_go(held, FORCED)
    });
    explore(
        Table::new(2),
        3,
        |table| {
            occupy(table, ENTRIES - 1);
            assert_eq!(table.make(1, 1, TIMEOUT, clock(BEGIN)), Inserted::New);
            assert!(table.hold(1, clock(BEGIN)).is_some());
        },
        vec![end, replace],
        |table, said| {
            assert_eq!(table.template_of(2).is_some(), said[1], "{said:?}");
            table.audit();
            flush(table);
        },
    );
}

/// Several packets notice at once that a template's destination takes no new connections.
#[test]
fn a_retired_template_has_one_successor() {
    explore(
        Table::new(2),
        2,
        |table| {
            open(table, &opening(1, 0, 1));
            table.quiesce(1);
        },
        vec![persistent(opening(1, 1, 2), BEGIN), persistent(opening(1, 2, 3), BEGIN)],
        |table, said| {
            let valid = table.template_of(1).expect("one of them makes it");
            assert_ne!(valid.dest, 1);
            assert!(said.contains(&Some(Packet::Opened(valid.dest))), "{said:?}");
            let retired: Vec<_> = table.templates().into_iter().filter(|template| template.retired).collect();
            assert!(matches!(retired.as_slice(), [retired] if retired.dest == 1), "{retired:?}");
            table.audit();
            flush(table);
        },
    );
}
