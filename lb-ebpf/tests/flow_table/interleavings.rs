//! What holds whatever the order in which CPUs get at the flow table.
//!
//! * No wrong destination: what a look-up returns is the destination that the connection was given.
//! * No lost counter: at rest, active and all connections of every destination equal a recount.
//! * One entry per connection; at rest, none that is being filled in.
//! * Of packets that open one connection at once, one does, if there is room.
//! * A connection that stands in the table all the time is found all the time.

use std::sync::Arc;

use lb_common::{
    flow::{Entry4, Key as _, Key4, Place},
    proto::Protocol,
};
use lb_ebpf::{
    ageing::What,
    flow_table::Inserted,
    track::{From, Gone},
};

use crate::{
    scheduler::{Work, explore},
    table::{ACK, FIN, HZ, Opening, Packet, SYN, Table, clock, host, key},
};

/// Clients from here on fill the table up; destinations alike.
const OTHERS: u8 = 20;
/// When connections are opened.
const BEGIN: u32 = 0;
/// When connections are over that were opened by a SYN at [`BEGIN`]: a minute, and the second of [`lb_common::flow`].
const END: u32 = 61 * HZ;

/// The place of a client's connections: all entries of a table of two buckets, from the first on. Clients have different
/// hashes, as they always do.
const fn place(client: u8) -> Place {
    Place::of((client as u64) << 16)
}

fn tcp(client: u8) -> Key4 {
    key::<Entry4>(Protocol::Tcp, client, 1)
}

/// The number of the client.
fn number(key: &Key4) -> u8 {
    host(key.caddr())
}

fn opening(client: u8, dest: u32) -> Opening {
    Opening { key: tcp(client), place: place(client), dest, tcp_flags: SYN }
}

/// Opens a connection, for which there must be room.
fn open(table: &Table, opening: &Opening) {
    assert_eq!(table.insert(opening, clock(BEGIN)), Inserted::New, "{opening:?}");
}

/// Opens this many connections that nobody else has to do with.
fn occupy(table: &Table, connections: u8) {
    (OTHERS..OTHERS + connections).for_each(|client| open(table, &opening(client, client.into())));
}

fn packet(opening: Opening, ticks: u32) -> Work<Option<Packet>> {
    Arc::new(move |table| Some(table.packet(&opening, clock(ticks))))
}

/// A later segment, of either side. Whether it belongs to the connection is of no matter.
fn segment(key: Key4, tcp_flags: u8, from: From, ticks: u32) -> Work<Option<Packet>> {
    Arc::new(move |table| {
        let found = table.find(&key, place(number(&key)))?;
        table.step(&found, tcp_flags, from, clock(ticks)).ok().map(|_| Packet::To(found.dest))
    })
}

fn sweep(what: What) -> Work<Option<Packet>> {
    Arc::new(move |table| {
        table.sweep(what);
        None
    })
}

/// The destination that the table has for a connection.
fn destination(table: &Table, key: &Key4) -> Option<u32> {
    table.find(key, place(number(key))).map(|found| found.dest)
}

/// Checks that packets of one connection agree about its destination, which the table has, and that not all were lost.
fn agree(table: &Table, key: &Key4, said: &[Option<Packet>]) {
    let dest = destination(table, key);
    assert!(dest.is_some(), "of all that open the connection, one does: {said:?}");
    for packet in said.iter().flatten() {
        match packet {
            Packet::To(to) | Packet::Opened(to) => assert_eq!(Some(*to), dest, "{said:?}"),
            Packet::Lost(how) => assert_eq!(*how, Inserted::Contended, "{said:?}"),
        }
    }
    let opened = said.iter().flatten().filter(|packet| matches!(packet, Packet::Opened(_))).count();
    assert_eq!(opened, 1, "{said:?}");
}

#[test]
fn two_packets_open_one_connection_once() {
    // With five connections the first claim is in the first bucket and the next one in the other; with six, the other way
    // round; with fifteen, both are nearly full.
    for occupied in [0, 1, 5, 6, 15] {
        explore(
            Table::new(2),
            2,
            move |table| occupy(table, occupied),
            vec![packet(opening(1, 1), BEGIN), packet(opening(1, 2), BEGIN)],
            move |table, said| {
                agree(table, &tcp(1), said);
                assert_eq!(table.audit().len(), usize::from(occupied) + 1);
            },
        );
    }
}

#[test]
fn three_packets_open_one_connection_once() {
    for occupied in [0, 5, 6] {
        explore(
            Table::new(2),
            1,
            move |table| occupy(table, occupied),
            vec![packet(opening(1, 1), BEGIN), packet(opening(1, 2), BEGIN), packet(opening(1, 3), BEGIN)],
            |table, said| {
                agree(table, &tcp(1), said);
                table.audit();
            },
        );
    }
}

#[test]
fn connections_opened_at_once_get_entries_of_their_own() {
    // Also the last two entries, and entries whose connections are over.
    for (occupied, ticks) in [(0, BEGIN), (5, BEGIN), (18, BEGIN), (20, END)] {
        explore(
            Table::new(2),
            2,
            move |table| occupy(table, occupied),
            vec![packet(opening(1, 1), ticks), packet(opening(2, 2), ticks)],
            |table, said| {
                assert_eq!(said, [Some(Packet::Opened(1)), Some(Packet::Opened(2))]);
                assert_eq!((destination(table, &tcp(1)), destination(table, &tcp(2))), (Some(1), Some(2)));
                table.audit();
            },
        );
    }
}

#[test]
fn a_look_up_finds_nothing_or_the_connection_while_it_is_opened() {
    let find = |client| -> Work<Option<Packet>> {
        Arc::new(move |table| table.find(&tcp(client), place(client)).map(|found| Packet::To(found.dest)))
    };
    let reply: Work<Option<Packet>> = Arc::new(|table| {
        let (found, key) = table.find_reply(&tcp(1), place(1), 1)?;
        assert_eq!(key, tcp(1));
        Some(Packet::To(found.dest))
    });
    for occupied in [0, 5, 8] {
        explore(
            Table::new(2),
            2,
            move |table| occupy(table, occupied),
            vec![packet(opening(1, 1), BEGIN), find(1), Arc::clone(&reply)],
            |table, said| {
                assert_eq!(said[0], Some(Packet::Opened(1)));
                assert!(said[1..].iter().flatten().all(|packet| *packet == Packet::To(1)), "{said:?}");
                table.audit();
            },
        );
    }
}

/// The entry of a connection becomes another's, or the same one's to another server, while it is looked at.
#[test]
fn a_look_up_never_mixes_two_connections_of_one_entry() {
    for next in [opening(2, 2), opening(1, 2)] {
        let look: Work<Option<Packet>> = Arc::new(move |table| {
            for key in [tcp(1), tcp(2)] {
                if let Some(found) = table.find(&key, place(number(&key))) {
                    let dests: &[u32] = if key == next.key && key == tcp(1) { &[1, 2] } else { &[number(&key).into()] };
                    assert!(dests.contains(&found.dest), "{key:?} to {}", found.dest);
                    // If the word is of another life than the destination, this moves the wrong counter.
                    drop(table.step(&found, FIN, From::Client, clock(BEGIN)));
                }
            }
            None
        });
        let reply: Work<Option<Packet>> = Arc::new(move |table| {
            for dest in [1, 2] {
                if let Some((found, key)) = table.find_reply(&tcp(1), place(1), dest) {
                    assert_eq!((key, found.dest), (tcp(1), dest));
                    drop(table.step(&found, FIN, From::Server, clock(BEGIN)));
                }
            }
            None
        });
        let replace: Work<Option<Packet>> = Arc::new(move |table| {
            table.sweep(What::dest(1));
            Some(table.packet(&next, clock(BEGIN)))
        });
        for looker in [look, reply] {
            explore(
                Table::new(2),
                2,
                |table| open(table, &opening(1, 1)),
                vec![looker, Arc::clone(&replace)],
                move |table, said| {
                    assert_eq!(said[1], Some(Packet::Opened(2)));
                    assert_eq!(destination(table, &next.key), Some(2));
                    assert_eq!(table.audit().len(), 1);
                },
            );
        }
    }
}

#[test]
fn a_connection_that_stays_is_found_whatever_happens_around_it() {
    // It stands beside the entry that changes, or in its first bucket, or in the second.
    for (occupied, between) in [(0, 0), (0, 3), (5, 8)] {
        let churn: Work<Option<Packet>> = Arc::new(|table| {
            table.sweep(What::dest(2));
            table.packet(&opening(3, 3), clock(BEGIN));
            table.sweep(What::dest(3));
            None
        });
        let look: Work<Option<Packet>> = Arc::new(|table| {
            let found = table.find(&tcp(1), place(1)).expect("it was there all the time");
            assert_eq!(found.dest, 1);
            let (found, key) = table.find_reply(&tcp(1), place(1), 1).expect("it was there all the time");
            assert_eq!((found.dest, key), (1, tcp(1)));
            None
        });
        explore(
            Table::new(2),
            2,
            move |table| {
                open(table, &opening(2, 2));
                occupy(table, occupied);
                (40..40 + between).for_each(|client| open(table, &opening(client, client.into())));
                open(table, &opening(1, 1));
            },
            vec![churn, look],
            |table, _| drop(table.audit()),
        );
    }
}

/// Packets and the timer are at a connection whose time is over for the one and not yet for the other.
#[test]
fn who_moves_a_connection_and_who_ends_it_agree_about_its_counters() {
    explore(
        Table::new(2),
        2,
        |table| open(table, &opening(1, 1)),
        vec![
            segment(tcp(1), ACK, From::Server, END - 1),
            segment(tcp(1), FIN, From::Client, END - 1),
            sweep(What::over(clock(END))),
        ],
        |table, said| {
            assert!(said.iter().flatten().all(|packet| *packet == Packet::To(1)), "{said:?}");
            assert!(table.audit().keys().all(|dest| *dest == 1));
        },
    );
}

/// The same for one that a new connection takes the entry of: it is the only one in a full table that is over.
#[test]
fn a_connection_that_is_over_goes_on_or_makes_room_but_not_both() {
    explore(
        Table::new(2),
        2,
        |table| {
            open(table, &opening(1, 1));
            (OTHERS..OTHERS + 19).for_each(|client| {
                assert_eq!(table.insert(&opening(client, client.into()), clock(END)), Inserted::New);
            });
        },
        vec![packet(opening(2, 2), END), segment(tcp(1), FIN, From::Client, END - 1)],
        |table, said| {
            match said[0] {
                Some(Packet::Opened(2)) => assert_eq!(destination(table, &tcp(1)), None),
                Some(Packet::Lost(Inserted::Full | Inserted::Contended)) => {
                    assert_eq!(said[1], Some(Packet::To(1)), "{said:?}");
                    assert_eq!(destination(table, &tcp(1)), Some(1));
                }
                _ => panic!("{said:?}"),
            }
            assert_eq!(table.audit().len(), 20);
        },
    );
}

/// The table is full, and a connection that is to make room becomes established, or is looked at, meanwhile.
#[test]
fn a_connection_makes_room_or_becomes_established_but_not_both() {
    let displace: Work<Option<Packet>> = Arc::new(|table| {
        Some(match table.displace(&opening(2, 2), clock(BEGIN)) {
            Inserted::New => Packet::Opened(2),
            other => Packet::Lost(other),
        })
    });
    let look: Work<Option<Packet>> = Arc::new(|table| {
        let found = table.find(&tcp(1), place(1))?;
        assert_eq!(found.dest, 1);
        Some(Packet::To(1))
    });
    explore(
        Table::new(2),
        2,
        |table| {
            open(table, &opening(1, 1));
            occupy(table, 19);
        },
        vec![displace, segment(tcp(1), ACK, From::Client, BEGIN), look],
        |table, said| {
            assert_eq!(said[0], Some(Packet::Opened(2)), "{said:?}");
            // The packet was the connection's, so it stays; or it was too late.
            assert_eq!(destination(table, &tcp(1)).map(Packet::To), said[1]);
            assert_eq!(table.audit().values().map(|(_, all)| all).sum::<u32>(), 20);
        },
    );
}

/// A connection is over, and packets of the same client and port open it anew while the timer ends it.
#[test]
fn a_connection_that_is_over_is_opened_again_once() {
    for occupied in [0, 5] {
        explore(
            Table::new(2),
            1,
            move |table| {
                occupy(table, occupied);
                open(table, &opening(1, 9));
            },
            vec![packet(opening(1, 1), END), packet(opening(1, 2), END), sweep(What::over(clock(END)))],
            |table, said| {
                agree(table, &tcp(1), said);
                assert_ne!(destination(table, &tcp(1)), Some(9));
                table.audit();
            },
        );
    }
}

#[test]
fn a_flush_ends_connections_that_are_being_opened_and_moved() {
    explore(
        Table::new(2),
        2,
        |table| open(table, &opening(2, 2)),
        vec![
            packet(opening(1, 1), BEGIN),
            segment(tcp(2), FIN, From::Server, BEGIN),
            sweep(What::dest(lb_common::abi::control::ANY)),
        ],
        |table, said| {
            assert_eq!(said[0], Some(Packet::Opened(1)));
            assert_eq!(destination(table, &tcp(2)), None);
            table.audit();
        },
    );
}

/// What [`lb_ebpf::track::step`] says of a connection whose entry has another life is that it is gone.
#[test]
fn a_step_of_a_former_life_changes_nothing() {
    let table = Table::new(2);
    open(&table, &opening(1, 1));
    let found = table.find(&tcp(1), place(1)).expect("opened");
    table.sweep(What::dest(1));
    open(&table, &opening(1, 2));
    assert!(matches!(table.step(&found, FIN, From::Client, clock(BEGIN)), Err(Gone)));
    assert_eq!(table.audit(), [(2, (1, 1))].into());
}
