//! Creating connections that no packet opens, because another director has had them.
//!
//! They come into the table by the protocol of [`crate::flow_table`], like any other, so packets may pass meanwhile.

use lb_common::{
    abi::{Brought, ConnectionDetails},
    addr::Address,
    flow::{Entry, Key as _, Place, Word, flag},
    proto::{Method, Protocol},
    sctp, tcp,
};

use crate::{
    env::Clock,
    flow_table::{self, Buckets, Insert, Inserted},
};

/// The longest time that instants of the data plane can be told apart over, halved.
const REMAINING_MAX: u32 = 1 << 30;

/// What tells connections between such addresses apart.
type KeyOf<A> = <<A as Address>::Entry as Entry>::Key;

/// Creates a connection between these two addresses.
///
/// What its details do not say is as ip_vs has it for connections that it is told of (`docs/ipvs.md`, section 1.3): the
/// method is the destination's, and of DR and tunnel servers no packet has been seen.
#[inline(always)]
pub fn bring<A: Address>(
    tables: &impl Buckets<A::Entry>,
    clock: Clock,
    (client, service): (A, A),
    details: &ConnectionDetails,
) -> Brought {
    let state = (details.protocol_state >> 8) as u8;
    let (protocol, known, active) = match Protocol::try_from(details.protocol_state as u8) {
        Ok(Protocol::Tcp) => (Protocol::Tcp, usize::from(state) < tcp::STATES, tcp::is_active(state)),
        Ok(Protocol::Udp) => (Protocol::Udp, state == 0, false),
        Ok(Protocol::Sctp) => (Protocol::Sctp, usize::from(state) < sctp::STATES, sctp::is_active(state)),
        Err(_) => return Brought::Refused,
    };
    let Some(dest) = tables.dest(details.dest) else { return Brought::Refused };
    if !known || details.remaining >= REMAINING_MAX || !dest.available() || dest.family() != A::FAMILY {
        return Brought::Refused;
    }
    let key = KeyOf::<A>::from_raw(protocol, client, details.ports, service);
    let place = Place::of(A::Entry::hash(&key, &tables.seed()));
    if flow_table::find(tables, &key, place).is_some_and(|found| !found.word.expired(clock.now, clock.hz)) {
        return Brought::Known;
    }
    let method = dest.method();
    let masquerade = method == Method::Masq as u8;
    let flags = if active { 0 } else { flag::INACTIVE }
        | if masquerade { 0 } else { flag::NO_OUTPUT }
        | if dest.port().raw() == 0 { flag::SERVICE_PORT } else { 0 };
    // Verifier: hidden, or it would follow the insert once for every combination of flags.
    let birth = Word(tables.hide(Word::born(protocol, state, method, flags, clock.now.after(details.remaining)).0));
    match flow_table::insert(tables, &Insert { key: &key, place, dest: details.dest, birth, clock, control: 0 }) {
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
        addr::{Ip4, Ip6, Port},
        flow::ENTRIES_PER_BUCKET,
        hash::Seed,
        jiffies::Jiffies,
    };

    use super::*;
    use crate::host::{HostSizes, HostTables};

    const CLOCK: Clock = Clock { now: Jiffies(u32::MAX - 5), hz: 250 };
    const ESTABLISHED: u32 = tcp::State::Established as u32;

    /// Tables of which those of flows have as many buckets, with a destination of the family of `A`.
    fn tables<A: Address>(buckets: u32) -> HostTables {
        let sizes = HostSizes {
            services: 1,
            dests: 2,
            slots: 1,
            endpoint_buckets: 1,
            flow_buckets: buckets,
            flow_buckets6: buckets,
        };
        let seed = Seed::new([0x243f_6a88_85a3_08d3, 0x1319_8a2e_0370_7344, 0xa409_3822_299f_31d0]);
        let tables = HostTables::new(sizes, seed, CLOCK.hz);
        let method = u32::from(Method::Route as u8) << 16 | A::FAMILY << 24;
        tables.dests[1].store(&DestRecord { state: slot::USED, port_method: method, ..tables.dests[1].load() });
        tables
    }

    /// Addresses of client number `number` and of the service, and the rest of a connection between them: sixty-four clients
    /// have the same address.
    fn connection<A: Address>(number: u32) -> ((A, A), ConnectionDetails) {
        let host = (0x0a40_0001 + (number >> 6)).to_be_bytes();
        let address = |host| match A::FAMILY {
            Ip4::FAMILY => A::from_words(Ip4::new(host).words()),
            _ => {
                let mut octets = [0; 16];
                octets[..2].copy_from_slice(&[0xfd, 0]);
                octets[12..].copy_from_slice(&host);
                A::from_words(Ip6::new(octets).words())
            }
        };
        let details = ConnectionDetails {
            ports: u32::from(Port::new(1024 + ((number & 63) << 4) as u16).raw()),
            dest: 1,
            protocol_state: Protocol::Tcp as u32 | ESTABLISHED << 8,
            remaining: 1000,
        };
        ((address(host), address([203, 0, 113, 1])), details)
    }

    fn is_created_once_and_only_if_it_can_be<A: Address>(other_family: u32)
    where
        HostTables: Buckets<A::Entry>,
    {
        let tables = tables::<A>(4);
        let bring_one = |clock, number, change: &dyn Fn(ConnectionDetails) -> ConnectionDetails| {
            let (ends, details) = connection::<A>(number);
            bring(&tables, clock, ends, &change(details))
        };
        let same = |details| details;
        assert_eq!(bring_one(CLOCK, 7, &same), Brought::New);
        assert_eq!(bring_one(CLOCK, 7, &same), Brought::Known);
        assert_eq!(active_and_total(tables.dest_loads[1].connections.load()), (1, 1));
        let (_, details) = connection::<A>(8);
        for impossible in [
            ConnectionDetails { dest: 0, ..details },
            ConnectionDetails { dest: 2, ..details },
            ConnectionDetails { protocol_state: 1 | ESTABLISHED << 8, ..details },
            ConnectionDetails { protocol_state: Protocol::Tcp as u32 | (tcp::STATES as u32) << 8, ..details },
            ConnectionDetails { protocol_state: Protocol::Udp as u32 | ESTABLISHED << 8, ..details },
            ConnectionDetails { remaining: REMAINING_MAX, ..details },
        ] {
            assert_eq!(bring_one(CLOCK, 8, &|_| impossible), Brought::Refused, "{impossible:?}");
        }
        // Once its time is over, it may come again.
        let later = Clock { now: CLOCK.now.after(1250), ..CLOCK };
        assert_eq!(bring_one(later, 7, &same), Brought::New);
        let udp = |details| ConnectionDetails { protocol_state: Protocol::Udp as u32, ..details };
        assert_eq!(bring_one(later, 7, &udp), Brought::New);
        assert_eq!(active_and_total(tables.dest_loads[1].connections.load()), (1, 2));

        let dest = &tables.dests[1].port_method;
        dest.store(dest.load() & 0xff_ffff | other_family << 24);
        assert_eq!(bring_one(later, 8, &same), Brought::Refused, "to a destination of the other family");
    }

    #[test]
    fn a_connection_is_created_once_and_only_if_it_can_be() {
        is_created_once_and_only_if_it_can_be::<Ip4>(Ip6::FAMILY);
        is_created_once_and_only_if_it_can_be::<Ip6>(Ip4::FAMILY);
    }

    /// With three quarters of the entries in use, one new connection in ten thousand may find both of its buckets full.
    fn is_hardly_ever_found_full<A: Address>()
    where
        HostTables: Buckets<A::Entry>,
    {
        const BUCKETS: u32 = 50_000;
        const ENTRIES: u32 = BUCKETS * ENTRIES_PER_BUCKET as u32;
        let tables = tables::<A>(BUCKETS);
        let (mut created, mut full) = (0, [0; 76]);
        for number in 0.. {
            if created == ENTRIES / 100 * 76 {
                break;
            }
            let (ends, details) = connection::<A>(number);
            match bring(&tables, CLOCK, ends, &details) {
                Brought::New => created += 1,
                Brought::Full => full[(created * 100 / ENTRIES) as usize] += 1,
                other => panic!("connection {number} is {other:?}"),
            }
        }
        assert_eq!(full[..60].iter().sum::<u32>(), 0, "{full:?}");
        // From 70 to 76 percent.
        assert!(full[70..76].iter().sum::<u32>() <= 6 * ENTRIES / 100 / 10_000, "{full:?}");
    }
    #[test]
    fn hardly_any_connection_finds_a_table_full_that_is_not() {
        is_hardly_ever_found_full::<Ip4>();
        is_hardly_ever_found_full::<Ip6>();
    }
}
