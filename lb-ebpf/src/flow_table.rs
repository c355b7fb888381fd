//! The flow table: finding, creating and ending connections. This module is the only writer of flow entries, with
//! [`crate::template`], which has what is peculiar to persistence templates.
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
    event::Event,
    flow::{
        Bucket, Candidate, ENTRIES_PER_BUCKET, Endpoint, Entry, Key as _, PAIRS, Place, Status, Word, control, flag,
        nonzero,
    },
    jiffies::Jiffies,
    sync::opaque,
};

use crate::{
    ageing::{self, What},
    env::Clock,
    tables::Tables,
    template,
};

/// Used entries up to which a connection goes to its first bucket without a look at the other.
///
/// Most connections then stand in the bucket that is searched first, and the two buckets still balance each other
/// before either is full.
const FIRST_BUCKET_FILL: u64 = 5;
/// How often an insert looks for another entry after losing one to another CPU.
const CLAIM_ATTEMPTS: usize = 2;

/// `count`, as a number of turns that no compiler unrolls: unrolled, a search keeps an address for every entry, on a stack
/// that has room for few.
#[inline(always)]
fn turns(count: usize) -> u64 {
    opaque(count as u64)
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
    /// How many buckets there are: an even number.
    fn buckets(&self) -> u32;
    /// The bucket with this index.
    fn bucket(&self, index: u32) -> Option<&Bucket<E>>;

    /// [`candidate`].
    fn candidate(&self, place: Place, clock: Clock, idle: u32) -> Candidate
    where
        Self: Sized,
    {
        candidate(self, place, clock, idle)
    }

    /// [`clear_way`].
    fn clear_way(&self, place: Place, clock: Clock, idle: u32) -> u64
    where
        Self: Sized,
    {
        clear_way(self, place, clock, idle)
    }

    /// [`template::let_go`].
    fn let_go(&self, number: u32, how: u64) -> u64
    where
        Self: Sized,
    {
        template::let_go(self, number, how)
    }

    /// [`template::word_of`].
    fn template_word(&self, number: u32) -> u64
    where
        Self: Sized,
    {
        template::word_of(self, number)
    }

    /// [`template::assure`].
    fn assure(&self, number: u32, word: u64) -> u64
    where
        Self: Sized,
    {
        template::assure(self, number, word)
    }

    /// [`ageing::end`].
    fn end(&self, number: u32, what: What) -> u64
    where
        Self: Sized,
    {
        ageing::end(self, number, what)
    }
}

/// The connection in `entry`, with this word, if it is the one wanted, and if all that has been read of it is of one connection:
/// the word is read again after everything else.
#[inline(always)]
fn believe<E: Entry>(entry: &E, word: Word, wanted: bool) -> Option<Found<'_, E>> {
    if !wanted {
        return None;
    }
    let dest = entry.dest().load();
    Word(entry.word().load()).same_life(word).then_some(Found { entry, word, dest })
}

/// The result of [`search`] when it has found nothing.
const NOTHING: u64 = u64::MAX;

/// The first pair in which `look` finds something, of those where a connection may stand: its bucket in the high half, its
/// index in the low half; or [`NOTHING`].
///
/// Verifier: where a bucket's search begins is hidden from it anew each time, or it would remember what each turn says about
/// it; and so is the result, or it would follow the rest of the program once for every pair.
#[inline(always)]
fn search<'t, E: Entry>(tables: &'t impl Buckets<E>, place: Place, look: impl Fn(&'t [E; 2]) -> bool) -> u64 {
    let buckets = tables.buckets();
    for number in [place.first(buckets), place.second(buckets)] {
        let Some(bucket) = tables.bucket(number) else { break };
        for turn in 0..turns(PAIRS) {
            let index = pair_index(tables.hide(place.start()), turn);
            if bucket.pairs.get(opaque(index) as usize).is_some_and(&look) {
                return tables.hide(u64::from(number) << 32 | index);
            }
        }
    }
    NOTHING
}

/// The pair of a bucket that a search beginning at `start` looks at in turn number `turn`, from 0.
#[inline(always)]
fn pair_index(start: u64, turn: u64) -> u64 {
    let index = start + turn;
    if index < PAIRS as u64 { index } else { index - PAIRS as u64 }
}

/// The pair that [`search`] has found.
#[inline(always)]
fn pair_at<E: Entry>(tables: &impl Buckets<E>, found: u64) -> Option<&[E; 2]> {
    if found == NOTHING {
        return None;
    }
    tables.bucket((found >> 32) as u32)?.pairs.get(opaque(found & 0xffff_ffff) as usize)
}

/// The pair that a search begins with. Nearly always the connection is in it: one cache line.
#[inline(always)]
fn first_pair<E: Entry>(tables: &impl Buckets<E>, place: Place) -> Option<&[E; 2]> {
    tables.bucket(place.first(tables.buckets()))?.pairs.get(opaque(place.start()) as usize)
}

/// The connection `key`, if there is one; it may be past its time.
#[inline(always)]
pub fn find<'t, E: Entry>(tables: &'t impl Buckets<E>, key: &E::Key, place: Place) -> Option<Found<'t, E>> {
    let pair = first_pair(tables, place)?;
    match believe_it(&pair[pair[0].is_other(key) & 1], key) {
        None => {
            let found = search_requests(tables, *key, place);
            if found == NOTHING {
                return None;
            }
            believe_it(tables.bucket((found >> 32) as u32)?.entry(found & 0xffff_ffff)?, key)
        }
        found => found,
    }
}

#[inline(always)]
fn believe_it<'t, E: Entry>(entry: &'t E, key: &E::Key) -> Option<Found<'t, E>> {
    let word = Word(entry.word().load());
    believe(entry, word, entry.is(key, word))
}

/// The number of the entry that has `key`, plus one; 0 when none has.
#[inline(always)]
pub fn find_number<E: Entry>(tables: &impl Buckets<E>, key: &E::Key, place: Place) -> u32 {
    let found = search_requests(tables, *key, place);
    if found == NOTHING {
        return 0;
    }
    (found >> 32) as u32 * ENTRIES_PER_BUCKET as u32 + found as u32 + 1
}

/// The entry that has the connection `key`: its bucket in the high half, its index in the low half; or [`NOTHING`].
///
/// The entries of a bucket are compared without a branch, because the processor would guess wrong where the connection
/// is, which costs more than looking at all of them.
///
/// A function of its own: inlined, it would cost every packet stack.
#[inline(never)]
fn search_requests<E: Entry>(tables: &impl Buckets<E>, key: E::Key, place: Place) -> u64 {
    let buckets = tables.buckets();
    for number in [place.first(buckets), place.second(buckets)] {
        let Some(bucket) = tables.bucket(number) else { break };
        // The index, plus one.
        let mut found = 0;
        for index in 0..turns(ENTRIES_PER_BUCKET) {
            let Some(entry) = bucket.entry(index) else { break };
            // All ones when it is the connection.
            let same = nonzero(entry.difference(&key, Word(entry.word().load()))).wrapping_sub(1);
            found = tables.hide(found | (index + 1) & same);
        }
        if found != 0 {
            return tables.hide(u64::from(number) << 32 | (found - 1));
        }
    }
    NOTHING
}

/// The masqueraded connection between the client in `key` and `server`, and its whole key.
#[inline(always)]
pub fn find_reply<'t, E: Entry>(
    tables: &'t impl Buckets<E>,
    key: &E::Key,
    place: Place,
    server: Endpoint<E>,
) -> Option<(Found<'t, E>, E::Key)> {
    match reply_in_pair(tables, first_pair(tables, place)?, key, server) {
        None => reply_in_pair(tables, pair_at(tables, search_replies(tables, key, place, server))?, key, server),
        found => found,
    }
}

#[inline(always)]
fn reply_in_pair<'t, E: Entry>(
    tables: &impl Tables,
    pair: &'t [E; 2],
    key: &E::Key,
    server: Endpoint<E>,
) -> Option<(Found<'t, E>, E::Key)> {
    let likely = pair[0].is_of_other_client(key) & 1;
    match believe_reply(tables, &pair[likely], key, server) {
        // The client may have two connections, to different services.
        None if likely == 0 => believe_reply(tables, &pair[1], key, server),
        found => found,
    }
}

#[inline(always)]
fn believe_reply<'t, E: Entry>(
    tables: &impl Tables,
    entry: &'t E,
    key: &E::Key,
    server: Endpoint<E>,
) -> Option<(Found<'t, E>, E::Key)> {
    let word = Word(entry.word().load());
    if !entry.is_of_client(key, word) || !is_served_by(tables, entry, word, server) {
        return None;
    }
    let key = entry.key(word);
    Some((believe(entry, word, true)?, key))
}

/// The pair that has the connection of [`find_reply`]. A function of its own, like [`search_requests`].
#[inline(never)]
fn search_replies<E: Entry>(tables: &impl Buckets<E>, key: &E::Key, place: Place, server: Endpoint<E>) -> u64 {
    search(tables, place, |pair| reply_in_pair(tables, pair, key, server).is_some())
}

/// Whether the connection in `entry`, of the protocol of `server` and with this word, is masqueraded and to that.
#[inline(always)]
fn is_served_by<E: Entry>(tables: &impl Tables, entry: &E, word: Word, server: Endpoint<E>) -> bool {
    let dest = tables.dest(entry.dest().load());
    dest.is_some_and(|dest| E::is_served_by(entry.key(word).vport(), word, dest, server))
}

/// Ends a connection, unless another CPU changed it since `word` was read. Returns whether it did.
#[inline(always)]
pub fn release<E: Entry>(tables: &impl Buckets<E>, entry: &E, word: Word, dest: u32) -> bool {
    release_as(tables, entry, word, dest, 0)
}

/// [`release`], with what its template is told: see [`template::let_go`].
#[inline(always)]
pub fn release_as<E: Entry>(tables: &impl Buckets<E>, entry: &E, word: Word, dest: u32, how: u64) -> bool {
    let control = entry.control().load();
    let done = entry.word().compare_exchange(word.0, word.freed().0).is_ok();
    if done && word.has(flag::CONTROLLED) {
        tables.let_go(control, how);
    }
    if done {
        settle(tables, word, dest);
    }
    done
}

/// Takes an ended connection off its destination's counters.
#[inline(always)]
fn settle(tables: &impl Tables, word: Word, dest: u32) {
    tables.add_connections(dest, share(word).wrapping_neg());
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
pub struct Insert<'k, E: Entry> {
    /// Who speaks to whom.
    pub key: &'k E::Key,
    /// Where the connection may stand.
    pub place: Place,
    /// The number of its destination.
    pub dest: u32,
    /// What it is to be: the word of a live entry, but for the version.
    pub birth: Word,
    /// What controls it: see [`lb_common::flow::control`].
    pub control: u32,
    /// When.
    pub clock: Clock,
}

/// What an entry is to be.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Connection,
    Template,
}

/// Creates the connection, which [`find`] did not find.
#[inline(always)]
pub fn insert<E: Entry>(tables: &impl Buckets<E>, insert: &Insert<'_, E>) -> Inserted {
    if is_large::<E>() { insert_apart(tables, insert) } else { insert_here(tables, insert) }
}

/// Whether connections have keys that take up so much stack that creating one has to have a stack of its own.
#[inline(always)]
const fn is_large<E: Entry>() -> bool {
    size_of::<E::Key>() > size_of::<[u64; 2]>()
}

#[inline(never)]
fn insert_apart<E: Entry>(tables: &impl Buckets<E>, insert: &Insert<'_, E>) -> Inserted {
    insert_here(tables, insert)
}

#[inline(always)]
fn insert_here<E: Entry>(tables: &impl Buckets<E>, insert: &Insert<'_, E>) -> Inserted {
    match claim(tables, insert) {
        Ok(claim) => publish(tables, insert, claim, Kind::Connection),
        Err(result) => result,
    }
}

/// Creates the template that `insert` says. Returns the number of its entry, plus one.
///
/// # Errors
///
/// Those of [`insert`] that are not [`Inserted::New`].
#[inline(always)]
pub fn insert_template<E: Entry>(tables: &impl Buckets<E>, insert: &Insert<'_, E>) -> Result<u32, Inserted> {
    let claim = claim(tables, insert)?;
    match publish(tables, insert, claim, Kind::Template) {
        Inserted::New => Ok(claim.number(tables, insert.place)),
        other => Err(other),
    }
}

/// Creates the connection in an entry that has been claimed for it.
#[inline(always)]
fn publish<E: Entry>(tables: &impl Buckets<E>, insert: &Insert<'_, E>, claim: Claim, kind: Kind) -> Inserted {
    let Some(entry) = claim.entry(tables, insert.place) else { return Inserted::Contended };
    let busy = Word(entry.word().load());
    if busy.status() != Status::Busy || rivalled(tables, insert, claim, kind) {
        give_up(entry, busy);
        return Inserted::Contended;
    }
    entry.fill(insert.key, insert.dest, insert.control);
    let live = busy.live(insert.birth);
    if entry.word().compare_exchange(busy.0, live.0).is_err() {
        give_up(entry, busy);
        return Inserted::Contended;
    }
    match kind {
        Kind::Connection => tables.add_connections(insert.dest, share(live)),
        Kind::Template => template::count(tables, insert.dest, 1),
    }
    Inserted::New
}

/// Gives a claimed entry back. Only its owner does, so no exchange is needed: a rival can at most have marked it.
#[inline(always)]
fn give_up<E: Entry>(entry: &E, busy: Word) {
    entry.word().store(busy.freed().0);
}

/// 1 when the entry with this word cannot be claimed, 0 when it is free or its connection is over. A template cannot be,
/// for it may control connections.
///
/// Arithmetic, not branches: neither the processor can guess which entries of a bucket are used, nor need the verifier
/// follow every combination.
#[inline(always)]
fn is_used(word: Word, clock: Clock) -> u64 {
    // Opaque, or the compiler makes branches of it.
    let (low, high) = (word.0, opaque(word.0 >> 1));
    let past = clock.now.since(word.expires().after(clock.hz));
    let over = u64::from((!past).cast_unsigned() >> 31) & !(word.0 >> 2 & word.0 >> 3);
    (low | high) & !(low & high & opaque(over)) & 1
}

/// What a bucket has room for.
struct Room {
    /// Entries that cannot be claimed.
    used: u64,
    /// The first that can be, in the order of search; anything when none can.
    usable: u64,
}

#[inline(always)]
fn room<E: Entry>(tables: &impl Buckets<E>, number: u32, start: u64, clock: Clock) -> Option<Room> {
    let bucket = tables.bucket(number)?;
    let mut room = Room { used: 0, usable: 0 };
    // Backwards, so that the first comes last.
    let mut index = 2 * start;
    for _ in 0..turns(ENTRIES_PER_BUCKET) {
        index = if index == 0 { ENTRIES_PER_BUCKET as u64 - 1 } else { index - 1 };
        let used = is_used(Word(bucket.entry(index)?.word().load()), clock);
        room.used += used;
        // All ones when it is usable.
        let usable = opaque(used.wrapping_sub(1));
        room.usable = index & usable | room.usable & !usable;
        index = tables.hide(index);
    }
    Some(room)
}

/// A claimed entry: which bucket of its [`Place`] it is in, and its index there; in the order of claims.
///
/// Verifier: one word.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Claim(u64);

impl Claim {
    const fn new(second: bool, index: u64) -> Self {
        Self(if second { ENTRIES_PER_BUCKET as u64 + index } else { index })
    }

    const fn is_second(self) -> bool {
        self.0 >= ENTRIES_PER_BUCKET as u64
    }

    /// The number of its bucket, and its index there.
    #[inline(always)]
    fn position(self, buckets: u32, place: Place) -> (u32, u64) {
        if self.is_second() {
            (place.second(buckets), self.0 - ENTRIES_PER_BUCKET as u64)
        } else {
            (place.first(buckets), self.0)
        }
    }

    #[inline(always)]
    fn entry<E: Entry>(self, tables: &impl Buckets<E>, place: Place) -> Option<&E> {
        let (number, index) = self.position(tables.buckets(), place);
        tables.bucket(number)?.entry(index)
    }

    /// The number of the entry in the table, plus one.
    #[inline(always)]
    fn number<E: Entry>(self, tables: &impl Buckets<E>, place: Place) -> u32 {
        let (number, index) = self.position(tables.buckets(), place);
        number * ENTRIES_PER_BUCKET as u32 + index as u32 + 1
    }
}

/// Claims an entry for the connection: one that is free or whose connection is over.
///
/// # Errors
///
/// [`Inserted::Full`], or [`Inserted::Contended`] when other CPUs were quicker each time.
#[inline(always)]
fn claim<E: Entry>(tables: &impl Buckets<E>, insert: &Insert<'_, E>) -> Result<Claim, Inserted> {
    let clock = insert.clock;
    let place = insert.place;
    let buckets = tables.buckets();
    let tag = E::tag(insert.key, place.hash());
    for _ in 0..CLAIM_ATTEMPTS {
        let first = room(tables, place.first(buckets), place.start(), clock).ok_or(Inserted::Full)?;
        let mut claim = Claim::new(false, first.usable);
        let mut used = first.used;
        if first.used > FIRST_BUCKET_FILL {
            let second = room(tables, place.second(buckets), place.start(), clock).ok_or(Inserted::Full)?;
            if second.used < first.used {
                claim = Claim::new(true, second.usable);
                used = second.used;
            }
        }
        if used >= ENTRIES_PER_BUCKET as u64 {
            return Err(Inserted::Full);
        }
        let claim = Claim(tables.hide(claim.0));
        let entry = claim.entry(tables, place).ok_or(Inserted::Full)?;
        let word = Word(entry.word().load());
        let (dest, control) = (entry.dest().load(), entry.control().load());
        if is_used(word, clock) == 0 && entry.word().compare_exchange(word.0, word.claimed(tag).0).is_ok() {
            if word.has(flag::CONTROLLED) {
                tables.let_go(control, 0);
            }
            if word.is_live() {
                settle(tables, word, dest);
            }
            return Ok(claim);
        }
    }
    Err(Inserted::Contended)
}

/// Whether there is room for a connection with this place without another having to go.
#[inline(always)]
pub fn has_room<E: Entry>(tables: &impl Buckets<E>, place: Place, clock: Clock) -> bool {
    // How long UDP connections have been idle is of no importance here.
    !tables.candidate(place, clock, 0).evicts()
}

/// Ends the connection or template that shall make room first for another with this place. UDP connections make room when they
/// have no more than `idle` ticks left. Returns 1 when there is room then, else 0.
///
/// The exchange that ends a connection fails when a packet of it has moved it meanwhile, so that none is ended that has just
/// been established.
#[inline(always)]
pub fn clear_way<E: Entry>(tables: &impl Buckets<E>, place: Place, clock: Clock, idle: u32) -> u64 {
    for _ in 0..turns(CLAIM_ATTEMPTS) {
        let candidate = tables.candidate(place, clock, idle);
        if candidate == Candidate::NONE {
            break;
        }
        let Some(entry) = Claim(candidate.index()).entry(tables, place) else { break };
        let word = Word(entry.word().load());
        let dest = entry.dest().load();
        let now = consider(entry, candidate.index(), word, clock, idle);
        if now == Candidate::NONE {
            continue;
        }
        if !now.evicts() {
            return 1;
        }
        let ended = if word.is_template() {
            template::end(tables, entry, word)
        } else {
            release_as(tables, entry, word, dest, template::FORCED)
        };
        if ended {
            tables.count_event(Event::Evicted);
            return 1;
        }
    }
    0
}

/// The entry to be used for a connection with this place.
#[inline(always)]
pub fn candidate<E: Entry>(tables: &impl Buckets<E>, place: Place, clock: Clock, idle: u32) -> Candidate {
    let buckets = tables.buckets();
    let of_bucket = |number| candidate_of_bucket(tables, number, clock.now.0, clock.hz, idle);
    let (first, second) = (of_bucket(place.first(buckets)), of_bucket(place.second(buckets)));
    if second == Candidate::NONE { first } else { first.min(Candidate(second.0 + Claim::new(true, 0).0)) }
}

/// The entry to be used of the bucket with this number, with its index in the bucket.
///
/// A function of its own, of one bucket, so that it takes up little stack.
#[inline(never)]
fn candidate_of_bucket<E: Entry>(tables: &impl Buckets<E>, number: u32, now: u32, hz: u32, idle: u32) -> Candidate {
    let clock = Clock { now: Jiffies(now), hz };
    let mut best = Candidate::NONE;
    let Some(bucket) = tables.bucket(number) else { return best };
    for index in 0..turns(ENTRIES_PER_BUCKET) {
        let Some(entry) = bucket.entry(index) else { break };
        let this = consider(entry, index, Word(entry.word().load()), clock, idle);
        // Verifier: hidden, or it would follow the loop once for every combination of comparisons.
        best = Candidate(tables.hide(best.min(this).0));
    }
    best
}

/// Whether the entry with this index and word may be used for a new connection, and how much sooner than others.
#[inline(always)]
fn consider<E: Entry>(entry: &E, index: u64, word: Word, clock: Clock, idle: u32) -> Candidate {
    if is_used(word, clock) == 0 {
        Candidate::unused(index)
    } else if word.is_template() && word.is_live() {
        match control::holders(entry.control().load()) {
            Some(0) => Candidate::template(index, word, clock.now),
            _ => Candidate::NONE,
        }
    } else {
        Candidate::used(index, word, clock.now, clock.hz, idle)
    }
}

/// Whether another entry has the connection that is being inserted: an earlier claim, or a published connection. Kills
/// later claims.
#[inline(always)]
fn rivalled<E: Entry>(tables: &impl Buckets<E>, insert: &Insert<'_, E>, own: Claim, kind: Kind) -> bool {
    let tag = E::tag(insert.key, insert.place.hash());
    let buckets = tables.buckets();
    for second in [false, true] {
        let number = if second { insert.place.second(buckets) } else { insert.place.first(buckets) };
        let Some(bucket) = tables.bucket(number) else { return true };
        for index in 0..turns(ENTRIES_PER_BUCKET) {
            let Some(entry) = bucket.entry(index) else { break };
            // Verifier: hidden anew each time, or it would remember what each comparison says about it.
            let own = Claim(tables.hide(own.0));
            let claim = Claim::new(second, index);
            let word = Word(entry.word().load());
            if concerns(entry, word, insert.key)
                && claim != own
                && has_it(tables, insert, entry, word, (tag, claim < own), kind)
            {
                return true;
            }
        }
    }
    false
}

/// Whether `entry` may have the connection `key`, or be about to: one branch that is nearly never taken, where a look at
/// the status first would be as good as random.
#[inline(always)]
fn concerns<E: Entry>(entry: &E, word: Word, key: &E::Key) -> bool {
    let busy = word.0 & !opaque(word.0 >> 1) & 1;
    let same = entry.is_other(key) as u64 ^ 1;
    busy | same != 0
}

/// Whether `entry` stands in the way of the connection that is being inserted.
#[inline(always)]
fn has_it<E: Entry>(
    tables: &impl Buckets<E>,
    insert: &Insert<'_, E>,
    entry: &E,
    word: Word,
    claim: (u32, bool),
    kind: Kind,
) -> bool {
    let (tag, earlier) = claim;
    match word.status() {
        Status::Busy if word.tag() == tag => {
            // A later claim that was published instead of being killed stands in the way like an earlier one. One that was
            // given up does not: if both gave up, there would be none.
            let killed = |word: Word| entry.word().compare_exchange(word.0, word.killed().0);
            earlier || killed(word).is_err_and(|found| Word(found).is_live())
        }
        Status::Live if entry.is(insert.key, word) => {
            // A template ends in its own way.
            let over = kind == Kind::Connection && word.expired(insert.clock.now, insert.clock.hz);
            !(over && release(tables, entry, word, entry.dest().load()))
        }
        _ => false,
    }
}
