//! The flow table: finding, creating and ending connections. This module is the only writer of flow entries.
//!
//! The protocol and its states are described in [`lb_common::flow`]. Three rules make it safe without a lock:
//!
//! * A word changes only by compare-exchange from a value that was read, and who wins the exchange, and nobody else,
//!   changes the counters that go with it.
//! * Fields other than the word are written only between winning a claim and publishing it.
//! * A reader believes fields only if the word was of the same life before and after it read them.
//!
//! Two CPUs that insert one connection at once both claim an entry, and each then looks for the other's. An exchange is
//! a full barrier, so at least one of them sees the other. The one whose entry comes later in the order of search
//! gives up when it sees the earlier claim; the other kills the later claim, or gives up when that is published
//! already. So one entry is left, and nobody waits.

use lb_common::{
    abi::{ONE_ACTIVE, ONE_CONNECTION},
    flow::{Bucket, ENTRIES_PER_BUCKET, Entry, Place, Status, Word, flag},
    sync::opaque,
};

use crate::{env::Clock, tables::Tables};

/// Used entries up to which a connection goes to its first bucket without a look at the other.
///
/// Most connections then stand in the bucket that is searched first, and the two buckets still balance each other
/// before either is full.
const FIRST_BUCKET_FILL: u32 = 4;
/// How often an insert looks for another entry after losing one to another CPU.
const CLAIM_ATTEMPTS: usize = 2;

/// [`ENTRIES_PER_BUCKET`], as a number of turns that no compiler unrolls: unrolled, a search keeps an address for every
/// entry, on a stack that has room for few.
#[inline(always)]
fn entries_per_bucket() -> u32 {
    opaque(ENTRIES_PER_BUCKET as u64) as u32
}

/// A connection, as it was when it was found.
pub struct Found<'t, E> {
    /// Its entry. Fields other than the word hold only as long as the word is of the same life.
    pub entry: &'t E,
    /// Its word.
    pub word: Word,
    /// The number of its destination.
    pub dest: u32,
}

/// The bucket table of one address family.
pub trait Buckets<E: Entry>: Tables {
    /// The bucket with this index.
    fn bucket(&self, index: u32) -> Option<&Bucket<E>>;
}

/// The index of the entry of a bucket that a search beginning at `start` looks at in turn number `turn`, from 0.
///
/// Verifier: where the search begins is hidden anew each time, or it would remember what each turn says about it.
#[inline(always)]
fn nth(tables: &impl Tables, start: u32, turn: u32) -> usize {
    let index = tables.hide(u64::from(start)) + u64::from(turn);
    opaque(if index < ENTRIES_PER_BUCKET as u64 { index } else { index - ENTRIES_PER_BUCKET as u64 }) as usize
}

/// The result of a search that found nothing.
const NOTHING: u64 = u64::MAX;

/// The place of the first entry that `is_it`: its bucket in the high half, its index in the low half; or [`NOTHING`].
///
/// Verifier: the result is hidden from it, or it would follow the rest of the program once for every entry.
#[inline(always)]
fn search<'t, E: Entry>(
    tables: &'t impl Buckets<E>,
    place: Place,
    mut is_it: impl FnMut(&'t E, Word) -> bool,
) -> u64 {
    let buckets = tables.flow_buckets();
    for number in [place.first(buckets), place.second(buckets)] {
        let Some(bucket) = tables.bucket(number) else { break };
        for turn in 0..entries_per_bucket() {
            let index = nth(tables, place.start(), turn);
            if let Some(entry) = bucket.entries.get(index)
                && is_it(entry, Word(entry.word().load()))
            {
                return tables.hide(u64::from(number) << 32 | index as u64);
            }
        }
    }
    NOTHING
}

/// The entry at a place that [`search`] has found.
#[inline(always)]
fn entry_at<E: Entry>(tables: &impl Buckets<E>, place: u64) -> Option<&E> {
    if place == NOTHING {
        return None;
    }
    tables.bucket((place >> 32) as u32)?.entries.get(place as u32 as usize)
}

/// [`search`] for a connection, apart: few connections are not where their search begins.
#[inline(never)]
fn search_all<E: Entry>(tables: &impl Buckets<E>, key: E::Key, place: Place) -> u64 {
    search(tables, place, |entry, word| entry.is(&key, word))
}

/// The connection in `entry` and its key if it is the one wanted: if `is_it` returns its key.
///
/// The word is read before and after everything else, so that all of it is of one connection.
#[inline(always)]
fn believe<E: Entry>(entry: &E, is_it: impl FnOnce(&E, Word) -> Option<E::Key>) -> Option<(Found<'_, E>, E::Key)> {
    let word = Word(entry.word().load());
    let key = is_it(entry, word)?;
    let dest = entry.dest().load();
    Word(entry.word().load()).same_life(word).then_some((Found { entry, word, dest }, key))
}

/// The connection `key`, if there is one; it may be past its time.
#[inline(always)]
pub fn find<'t, E: Entry>(tables: &'t impl Buckets<E>, key: &E::Key, place: Place) -> Option<Found<'t, E>> {
    let is_it = |entry: &E, word| entry.is(key, word).then_some(*key);
    // Nearly always it is one of the two that the search begins with: one cache line.
    let bucket = tables.bucket(place.first(tables.flow_buckets()))?;
    for turn in 0..2 {
        let entry = bucket.entries.get(opaque(u64::from(place.start() + turn)) as usize)?;
        if let Some((found, _)) = believe(entry, is_it) {
            return Some(found);
        }
    }
    let (found, _) = believe(entry_at(tables, search_all(tables, *key, place))?, is_it)?;
    Some(found)
}

/// The masqueraded connection between the client in `key` and `server`, and its whole key.
#[inline(always)]
pub fn find_reply<'t, E: Entry>(
    tables: &'t impl Buckets<E>,
    key: &E::Key,
    place: Place,
    server: E::Server,
) -> Option<(Found<'t, E>, E::Key)> {
    let is_it = |entry: &E, word| {
        let whole = entry.key(word);
        let is_it = entry.is_of_client(key, word) && is_served_by(tables, entry, word, server);
        is_it.then_some(whole)
    };
    let bucket = tables.bucket(place.first(tables.flow_buckets()))?;
    for turn in 0..2 {
        let entry = bucket.entries.get(opaque(u64::from(place.start() + turn)) as usize)?;
        if let Some(found) = believe(entry, is_it) {
            return Some(found);
        }
    }
    believe(entry_at(tables, search_replies(tables, *key, place, server))?, is_it)
}

/// [`search`] for the connection of a reply.
///
/// Verifier: a function of its own for the sake of the stack.
#[inline(never)]
fn search_replies<E: Entry>(tables: &impl Buckets<E>, key: E::Key, place: Place, server: E::Server) -> u64 {
    search(tables, place, |entry, word| {
        entry.is_of_client(&key, word) && is_served_by(tables, entry, word, server)
    })
}

/// Whether the connection in `entry` is masqueraded and to `server`.
#[inline(always)]
fn is_served_by<E: Entry>(tables: &impl Tables, entry: &E, word: Word, server: E::Server) -> bool {
    let dest = tables.dest(entry.dest().load());
    dest.is_some_and(|dest| E::is_served_by(&entry.key(word), word, dest, server))
}

/// Ends a connection, unless another CPU changed it since `word` was read. Returns whether it did.
#[inline(always)]
pub fn release<E: Entry>(tables: &impl Tables, entry: &E, word: Word, dest: u32) -> bool {
    let done = entry.word().compare_exchange(word.0, word.freed().0).is_ok();
    if done {
        settle(tables, word, dest);
    }
    done
}

/// Takes an ended connection off its destination's counters.
#[inline(always)]
fn settle(tables: &impl Tables, word: Word, dest: u32) {
    let share = share(word);
    if let Some(load) = tables.dest_load(dest) {
        load.connections.fetch_add(share.wrapping_neg());
    }
}

/// What a connection adds to its destination's counters.
#[inline(always)]
fn share(word: Word) -> u64 {
    if word.has(flag::INACTIVE) { ONE_CONNECTION } else { ONE_CONNECTION + ONE_ACTIVE }
}

/// How an insert ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Inserted {
    /// The connection was created.
    New,
    /// Neither bucket has room.
    Full,
    /// Another CPU has created it meanwhile, or is about to.
    Contended,
}

/// A connection to be created.
pub struct Insert<E: Entry> {
    /// Who speaks to whom.
    pub key: E::Key,
    /// Where the connection may stand.
    pub place: Place,
    /// The number of its destination.
    pub dest: u32,
    /// What it is to be: the word of a live entry, but for the version.
    pub birth: Word,
    /// When.
    pub clock: Clock,
}

/// Creates the connection, which [`find`] did not find.
///
/// Verifier: this and its two longest steps are functions of their own for the sake of the stack.
#[inline(never)]
pub fn insert<E: Entry>(tables: &impl Buckets<E>, insert: &Insert<E>) -> Inserted {
    let claim = claim(tables, insert);
    if claim == FULL {
        return Inserted::Full;
    }
    let Some((entry, busy)) = claimed(tables, insert, claim) else { return Inserted::Contended };
    if rivalled(tables, insert, claim) {
        give_up(entry, busy);
        return Inserted::Contended;
    }
    entry.fill(&insert.key, insert.dest);
    let live = busy.live(insert.birth);
    if entry.word().compare_exchange(busy.0, live.0).is_err() {
        give_up(entry, busy);
        return Inserted::Contended;
    }
    if let Some(load) = tables.dest_load(insert.dest) {
        load.connections.fetch_add(share(live));
    }
    Inserted::New
}

/// Gives a claimed entry back. Only its owner does, so no exchange is needed: a rival can at most have marked it.
#[inline(always)]
fn give_up<E: Entry>(entry: &E, busy: Word) {
    entry.word().store(busy.freed().0);
}

/// 1 when the entry with this word cannot be claimed, 0 when it is free or its connection is over.
///
/// Verifier: arithmetic, not branches, or it would follow every combination of used and free entries.
#[inline(always)]
fn is_used(word: Word, clock: Clock) -> u32 {
    let status = (word.0 & 0b11) as u32;
    let some = (status | status >> 1) & 1;
    let live = status & status >> 1 & 1;
    let past = clock.now.since(word.expires().after(clock.hz));
    let over = (!past).cast_unsigned() >> 31;
    some & !(live & over)
}

/// Number of entries of a bucket that cannot be claimed.
#[inline(always)]
fn used<E: Entry>(bucket: &Bucket<E>, clock: Clock) -> u32 {
    let mut used = 0;
    for index in 0..entries_per_bucket() {
        if let Some(entry) = bucket.entries.get(index as usize) {
            used += is_used(Word(entry.word().load()), clock);
        }
    }
    used
}

/// The result of [`claim`] when both buckets are full.
const FULL: u32 = u32::MAX;
/// The result of [`claim`] when other CPUs were quicker each time.
const LOST: u32 = u32::MAX - 1;

/// Whether the connection goes to its first bucket.
#[inline(never)]
fn goes_first<E: Entry>(tables: &impl Buckets<E>, place: Place, clock: &Clock) -> bool {
    let buckets = tables.flow_buckets();
    let Some(first) = tables.bucket(place.first(buckets)) else { return true };
    let in_first = used(first, *clock);
    if in_first <= FIRST_BUCKET_FILL {
        return true;
    }
    let Some(second) = tables.bucket(place.second(buckets)) else { return true };
    in_first <= used(second, *clock)
}

/// Claims an entry for the connection: one that is free or whose connection is over. Returns its place in the order of
/// claims, by bucket and then by index; or [`FULL`] or [`LOST`].
#[inline(never)]
fn claim<E: Entry>(tables: &impl Buckets<E>, insert: &Insert<E>) -> u32 {
    let clock = insert.clock;
    let buckets = tables.flow_buckets();
    for _ in 0..CLAIM_ATTEMPTS {
        let (number, order) = if goes_first(tables, insert.place, &clock) {
            (insert.place.first(buckets), 0)
        } else {
            (insert.place.second(buckets), ENTRIES_PER_BUCKET as u32)
        };
        let Some(bucket) = tables.bucket(number) else { return FULL };
        let mut usable = None;
        for turn in 0..entries_per_bucket() {
            let index = nth(tables, insert.place.start(), turn);
            if let Some(entry) = bucket.entries.get(index)
                && is_used(Word(entry.word().load()), clock) == 0
            {
                usable = Some(index as u64);
                break;
            }
        }
        let Some(index) = usable else { return FULL };
        let index = tables.hide(index) as u32;
        let Some(entry) = bucket.entries.get(opaque(u64::from(index)) as usize) else { return FULL };
        let word = Word(entry.word().load());
        let dest = entry.dest().load();
        let busy = word.claimed(E::tag(&insert.key, insert.place.hash()));
        if is_used(word, clock) == 0 && entry.word().compare_exchange(word.0, busy.0).is_ok() {
            if word.is_live() {
                settle(tables, word, dest);
            }
            return order + index;
        }
    }
    LOST
}

/// The entry that was claimed, and its word. `None` when there was no claim, or when it has been killed already.
#[inline(always)]
fn claimed<'t, E: Entry>(tables: &'t impl Buckets<E>, insert: &Insert<E>, claim: u32) -> Option<(&'t E, Word)> {
    let in_first = claim < ENTRIES_PER_BUCKET as u32;
    let buckets = tables.flow_buckets();
    let number = if in_first { insert.place.first(buckets) } else { insert.place.second(buckets) };
    let index = if in_first { claim } else { claim - ENTRIES_PER_BUCKET as u32 };
    let entry = tables.bucket(number)?.entries.get(opaque(u64::from(index)) as usize)?;
    let word = Word(entry.word().load());
    match word.status() {
        Status::Busy => Some((entry, word)),
        _ => {
            give_up(entry, word);
            None
        }
    }
}

/// Whether another entry has the connection that is being inserted: an earlier claim, or a published connection. Kills
/// later claims.
#[inline(never)]
fn rivalled<E: Entry>(tables: &impl Buckets<E>, insert: &Insert<E>, own: u32) -> bool {
    let tag = E::tag(&insert.key, insert.place.hash());
    let buckets = tables.flow_buckets();
    let mut order = 0;
    for number in [insert.place.first(buckets), insert.place.second(buckets)] {
        let Some(bucket) = tables.bucket(number) else { return true };
        for index in 0..entries_per_bucket() {
            let Some(entry) = bucket.entries.get(index as usize) else { break };
            // Verifier: hidden anew each time, or it would remember what each comparison says about it.
            let own = tables.hide(u64::from(own)) as u32;
            if order != own && has_it(tables, insert, entry, (tag, order < own)) {
                return true;
            }
            order += 1;
        }
    }
    false
}

/// Whether `entry` stands in the way of the connection that is being inserted.
#[inline(always)]
fn has_it<E: Entry>(tables: &impl Buckets<E>, insert: &Insert<E>, entry: &E, claim: (u32, bool)) -> bool {
    let (tag, earlier) = claim;
    let word = Word(entry.word().load());
    match word.status() {
        Status::Busy if word.tag() == tag => {
            // A later claim that was published instead of being killed stands in the way like an earlier one.
            earlier || entry.word().compare_exchange(word.0, word.killed().0).is_err()
        }
        Status::Live if entry.is(&insert.key, word) => {
            let over = word.expired(insert.clock.now, insert.clock.hz);
            !(over && release(tables, entry, word, entry.dest().load()))
        }
        _ => false,
    }
}
