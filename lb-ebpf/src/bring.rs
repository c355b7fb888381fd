//! Creating connections that no packet opens, because another director has had them.
//!
//! They come into the table by the protocol of [`crate::flow_table`], like any other, so packets may pass meanwhile.

use lb_common::{
    abi::{Brought, ConnectionRecord},
    addr::Ip4,
    flow::{Entry as _, Entry4, Key4, Place, Word, flag},
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
    match flow_table::insert(tables, &Insert { key, place, dest: record.dest, birth, clock }) {
        Inserted::New => Brought::New,
        Inserted::Full => Brought::Full,
        // Another CPU has just created it.
        Inserted::Contended => Brought::Known,
    }
}
