//! Creating connections that no packet opens, because another director has had them.
//!
//! They come into the table by the protocol of [`crate::flow_table`], like any other, so packets may pass meanwhile.

use lb_common::{
    abi::{Brought, ConnectionRecord},
    addr::Ip4,
    flow::{Entry as _, Entry4, Key as _, Key4, Place, Word, flag},
    proto::{Method, Protocol},
    tcp,
};

use crate::{
    env::Clock,
    flow_table::{self, Buckets, Insert, Inserted},
};

/// The longest time that instants of the data plane can be told apart over, halved.
const REMAINING_MAX: u32 = 1 << 30;

/// Creates a connection.
///
/// What a record does not say is as ip_vs has it for connections that it is told of (`docs/ipvs.md`, section 1.3): the
/// method is the destination's, and of DR and tunnel servers no packet has been seen.
#[inline(always)]
pub fn bring(tables: &impl Buckets<Entry4>, clock: Clock, record: &ConnectionRecord) -> Brought {
    let state = (record.protocol_state >> 8) as u8;
    let (protocol, known, active) = match Protocol::try_from(record.protocol_state as u8) {
        Ok(Protocol::Tcp) => (Protocol::Tcp, usize::from(state) < tcp::STATES, tcp::is_active(state)),
        Ok(Protocol::Udp) => (Protocol::Udp, state == 0, false),
        Err(_) => return Brought::Refused,
    };
    let Some(dest) = tables.dest(record.dest) else { return Brought::Refused };
    if !known || record.remaining >= REMAINING_MAX || !dest.available() {
        return Brought::Refused;
    }
    let key = Key4::from_raw(protocol, Ip4::from_raw(record.client), record.ports, Ip4::from_raw(record.service));
    let place = Place::of(Entry4::hash(&key, &tables.seed()));
    if flow_table::find(tables, &key, place).is_some_and(|found| !found.word.expired(clock.now, clock.hz)) {
        return Brought::Known;
    }
    let method = dest.method();
    let masquerade = method == Method::Masq as u8;
    let flags = if active { 0 } else { flag::INACTIVE }
        | if masquerade { 0 } else { flag::NO_OUTPUT }
        | if dest.port().raw() == 0 { flag::SERVICE_PORT } else { 0 };
    // Verifier: hidden, or it would follow the insert once for every combination of flags.
    let birth = Word(tables.hide(Word::born(protocol, state, method, flags, clock.now.after(record.remaining)).0));
    match flow_table::insert(tables, &Insert { key: &key, place, dest: record.dest, birth, clock }) {
        Inserted::New => Brought::New,
        Inserted::Full => Brought::Full,
        // Another CPU has just created it.
        Inserted::Contended => Brought::Known,
    }
}

#[cfg(test)]
mod tests {
    use lb_common::{
        abi::{DestRecord, Record as _, active_and_total, slot},
        addr::Port,
        flow::ENTRIES_PER_BUCKET,
        hash::Seed,
        jiffies::Jiffies,
    };

    use super::*;
    use crate::host::{HostSizes, HostTables};

    const CLOCK: Clock = Clock { now: Jiffies(u32::MAX - 5), hz: 250 };
    const ESTABLISHED: u32 = tcp::State::Established as u32;

    fn tables(flow_buckets: u32) -> HostTables {
        let sizes = HostSizes { services: 1, dests: 2, slots: 1, endpoint_buckets: 1, flow_buckets, flow_buckets6: 2 };
        let seed = Seed::new([0x243f_6a88_85a3_08d3, 0x1319_8a2e_0370_7344, 0xa409_3822_299f_31d0]);
        let tables = HostTables::new(sizes, seed, CLOCK.hz);
        let method = u32::from(Method::Route as u8) << 16;
        tables.dests[1].store(&DestRecord { state: slot::USED, port_method: method, ..tables.dests[1].load() });
        tables
    }

    /// A connection of client number `number`: sixty-four have the same address.
    fn record(number: u32) -> ConnectionRecord {
        ConnectionRecord {
            client: Ip4::new((0x0a40_0001 + (number >> 6)).to_be_bytes()).raw(),
            service: Ip4::new([203, 0, 113, 1]).raw(),
            ports: u32::from(Port::new(1024 + ((number & 63) << 4) as u16).raw()),
            dest: 1,
            protocol_state: Protocol::Tcp as u32 | ESTABLISHED << 8,
            remaining: 1000,
        }
    }

    #[test]
    fn a_connection_is_created_once_and_only_if_it_can_be() {
        let tables = tables(4);
        assert_eq!(bring(&tables, CLOCK, &record(7)), Brought::New);
        assert_eq!(bring(&tables, CLOCK, &record(7)), Brought::Known);
        assert_eq!(active_and_total(tables.dest_loads[1].connections.load()), (1, 1));
        for impossible in [
            ConnectionRecord { dest: 0, ..record(8) },
            ConnectionRecord { dest: 2, ..record(8) },
            ConnectionRecord { protocol_state: 1 | ESTABLISHED << 8, ..record(8) },
            ConnectionRecord { protocol_state: Protocol::Tcp as u32 | (tcp::STATES as u32) << 8, ..record(8) },
            ConnectionRecord { protocol_state: Protocol::Udp as u32 | ESTABLISHED << 8, ..record(8) },
            ConnectionRecord { remaining: REMAINING_MAX, ..record(8) },
        ] {
            assert_eq!(bring(&tables, CLOCK, &impossible), Brought::Refused, "{impossible:?}");
        }
        // Once its time is over, it may come again.
        let later = Clock { now: CLOCK.now.after(1250), ..CLOCK };
        assert_eq!(bring(&tables, later, &record(7)), Brought::New);
        let udp = ConnectionRecord { protocol_state: Protocol::Udp as u32, ..record(7) };
        assert_eq!(bring(&tables, later, &udp), Brought::New);
        assert_eq!(active_and_total(tables.dest_loads[1].connections.load()), (1, 2));
    }

    /// With three quarters of the entries in use, one new connection in ten thousand may find both of its buckets full.
    #[test]
    fn hardly_any_connection_finds_a_table_full_that_is_not() {
        const BUCKETS: u32 = 50_000;
        const ENTRIES: u32 = BUCKETS * ENTRIES_PER_BUCKET as u32;
        let tables = tables(BUCKETS);
        let (mut created, mut full) = (0, [0; 76]);
        for number in 0.. {
            if created == ENTRIES / 100 * 76 {
                break;
            }
            match bring(&tables, CLOCK, &record(number)) {
                Brought::New => created += 1,
                Brought::Full => full[(created * 100 / ENTRIES) as usize] += 1,
                other => panic!("connection {number} is {other:?}"),
            }
        }
        assert_eq!(full[..60].iter().sum::<u32>(), 0, "{full:?}");
        // From 70 to 76 percent.
        assert!(full[70..76].iter().sum::<u32>() <= 6 * ENTRIES / 100 / 10_000, "{full:?}");
    }
}
