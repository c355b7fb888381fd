//! Persistence templates: who holds one, and how it ends (`docs/ipvs.md`, section 6).
//!
//! A template is an entry of the flow table like a connection, and comes into it by the same protocol. It differs in how it
//! ends. Connections that it controls refer to its entry, so nobody may end it while there are any. They are counted in
//! [`Entry::control`], together with packets that look at the template, all of which *hold* it:
//!
//! * Who holds a template has added one to the count, and has then seen that the word is still of the life it knows. So it holds
//!   either that very template, or another one that it lets go at once.
//! * Who ends a template first exchanges a count of 0 for [`control::CLOSED`], which nobody adds to. It then ends the entry
//!   as it would a connection.
//! * A template is closed from the claim of its entry until it has been published, and when it has ended. So a count is only ever
//!   that of a live one.

use lb_common::{
    abi::{Config, Dest, switch},
    flow::{ENTRIES_PER_BUCKET, Entry, Place, Word, control, template},
    jiffies::Jiffies,
};

use crate::{
    env::Clock,
    flow_table::{self, Buckets, Insert, Inserted},
    tables::Tables,
};

/// How often something is tried again after another CPU has changed a template.
const ATTEMPTS: usize = 3;

/// For [`let_go`]: the connection that lets go has not come to its end by itself. A template that is not assured ends with the
/// last of them (`docs/ipvs.md`, section 4.10).
pub const FORCED: u64 = 1;

/// The template with this number, which is that of its entry plus one.
#[inline(always)]
pub fn entry_of<E: Entry>(tables: &impl Buckets<E>, number: u32) -> Option<&E> {
    let number = u64::from(number.checked_sub(1)?);
    tables.bucket((number / ENTRIES_PER_BUCKET as u64) as u32)?.entry(number % ENTRIES_PER_BUCKET as u64)
}

/// Adds one to those who hold a template, unless it is closed. Returns how many there were.
#[inline(always)]
fn join<E: Entry>(entry: &E) -> Option<u32> {
    for _ in 0..ATTEMPTS {
        let old = entry.control().load();
        let holders = control::holders(old)?;
        if entry.control().compare_exchange(old, old + 1).is_ok() {
            return Some(holders);
        }
    }
    None
}

/// Keeps everybody from holding a template, if nobody does. Returns whether it did.
#[inline(always)]
pub fn close<E: Entry>(entry: &E) -> bool {
    entry.control().compare_exchange(control::TEMPLATE, control::CLOSED).is_ok()
}

/// Lets a template be held again that was closed, and has not ended.
#[inline(always)]
pub fn reopen<E: Entry>(entry: &E) {
    entry.control().store(control::TEMPLATE);
}

/// Takes an ended template off its destination's counter.
#[inline(always)]
pub fn settle(tables: &impl Tables, dest: u32) {
    count(tables, dest, 1u32.wrapping_neg());
}

/// Adds to the number of a destination's templates.
#[inline(always)]
pub fn count(tables: &impl Tables, dest: u32, number: u32) {
    if let Some(load) = tables.dest_load(dest) {
        load.templates.fetch_add(number);
    }
}

/// Ends a template, unless somebody holds it or has changed it since `word` was read. Returns whether it did.
#[inline(always)]
pub fn end<E: Entry>(tables: &impl Tables, entry: &E, word: Word) -> bool {
    close(entry) && end_closed(tables, entry, word)
}

/// [`end`] of a template that the caller has closed. One that is doomed ends whatever has changed: its last holder may have tried
/// that while it was closed, and leaves it to whoever has closed it.
#[inline(always)]
fn end_closed<E: Entry>(tables: &impl Tables, entry: &E, mut word: Word) -> bool {
    let dest = entry.dest().load();
    for _ in 0..ATTEMPTS {
        match entry.word().compare_exchange(word.0, word.freed().0) {
            Ok(_) => {
                settle(tables, dest);
                return true;
            }
            Err(found) if Word(found).has(template::DOOMED) => word = Word(tables.hide(found)),
            Err(_) => break,
        }
    }
    reopen(entry);
    false
}

/// Lets go of the template with this number: a connection that it controlled has ended, or a packet has seen enough of it. `how`
/// is 0, or [`FORCED`]. Returns whether the template has ended.
#[inline(always)]
pub fn let_go<E: Entry>(tables: &impl Buckets<E>, number: u32, how: u64) -> u64 {
    let Some(entry) = entry_of(tables, number) else { return 0 };
    // What is there from the moment on at which it is let go may be another.
    let held = Word(entry.word().load());
    // Nobody closes what is held, so this needs no exchange.
    let last = entry.control().fetch_add(u32::MAX) == control::TEMPLATE + 1;
    let ends = last && {
        let word = Word(entry.word().load());
        word.same_life(held)
            && (word.has(template::DOOMED) || how & FORCED != 0 && !word.has(template::ASSURED))
            && end(tables, entry, word)
    };
    ends.into()
}

/// The word of the template with this number, for [`assure`].
#[inline(always)]
pub fn word_of<E: Entry>(tables: &impl Buckets<E>, number: u32) -> u64 {
    entry_of(tables, number).map_or(0, |entry| entry.word().load())
}

/// Notes that a connection which the template with this number controls has been established, or answered. `word` is one that
/// the template had while it controlled the connection: by now, its entry may be another's.
#[inline(always)]
pub fn assure<E: Entry>(tables: &impl Buckets<E>, number: u32, word: u64) -> u64 {
    let Some(entry) = entry_of(tables, number) else { return 0 };
    change_word(entry, Word(word), |word| word.with(template::ASSURED))
}

/// Changes the word of a template by exchange, if it is of the same life as `life`. Returns whether it is.
#[inline(always)]
fn change_word<E: Entry>(entry: &E, life: Word, change: impl Fn(Word) -> Word) -> u64 {
    for _ in 0..ATTEMPTS {
        let word = Word(entry.word().load());
        if !word.same_life(life) {
            return 0;
        }
        let after = change(word);
        if after == word || entry.word().compare_exchange(word.0, after.0).is_ok() {
            return 1;
        }
    }
    0
}

/// A template that a packet holds: the number of its destination in bits 0-31, and its own in bits 32-63, which is not 0.
///
/// Verifier: one word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Held(u64);

impl Held {
    /// There is no template.
    pub const NONE: Self = Self(0);
    /// There is one that is being made or ended at this moment.
    pub const CONTENDED: Self = Self(1);

    const fn new(number: u32, dest: u32) -> Self {
        Self(dest as u64 | (number as u64) << 32)
    }

    /// The template with these bits.
    #[inline(always)]
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The template as bits.
    #[inline(always)]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Whether there is a template, which is held.
    #[inline(always)]
    pub const fn is_some(self) -> bool {
        self.0 >> 32 != 0
    }

    /// Its number.
    #[inline(always)]
    pub const fn number(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// Its destination.
    #[inline(always)]
    pub const fn dest(self) -> u32 {
        self.0 as u32
    }
}

/// Whether new connections may go to the destination of a template, which may well have weight 0 or enough connections.
#[inline(always)]
fn is_valid(config: &Config, dest: &Dest) -> bool {
    let expires_quiescent = config.switches.load() & switch::EXPIRE_QUIESCENT_TEMPLATE != 0;
    dest.available() && !(expires_quiescent && dest.weight.load() == 0)
}

/// Holds the template with this key and notes that it is used once more, at `now`. One whose time is over ends; one whose
/// destination takes no connections is retired, and counts as none.
///
/// A function of its own: it would else take up stack of its caller.
#[inline(never)]
pub fn hold<E: Entry>(tables: &impl Buckets<E>, key: &E::Key, now: u32, hz: u32) -> Held {
    let clock = Clock { now: Jiffies(now), hz };
    let found = flow_table::find_number(tables, key, E::template_place(key, &tables.seed()));
    let Some(entry) = entry_of(tables, found) else { return Held::NONE };
    let Some(others) = join(entry) else { return Held::CONTENDED };
    let others = tables.hide(others.into());
    let word = Word(tables.hide(entry.word().load()));
    if !entry.is(key, word) {
        tables.let_go(found, 0);
        return Held::CONTENDED;
    }
    let dest = entry.dest().load();
    let Some(current) = word.template_at(clock.now, hz, others != 0) else {
        if entry.control().compare_exchange(control::TEMPLATE + 1, control::CLOSED).is_ok() {
            return if end_closed(tables, entry, word) { Held::NONE } else { Held::CONTENDED };
        }
        // Somebody else holds it, too, by now.
        tables.let_go(found, 0);
        return Held::CONTENDED;
    };
    let valid = tables.config().zip(tables.dest(dest)).is_some_and(|(config, dest)| is_valid(config, dest));
    if !valid {
        entry.retire();
        tables.let_go(found, 0);
        return Held::NONE;
    }
    let retried = current.0 & template::RETRIED;
    let timeout = entry.hint().load();
    change_word(entry, word, |word| {
        let word = word.with(retried);
        word.expiring(clock.now.after(word.template_timeout(timeout, hz)))
    });
    Held::new(found, dest)
}

/// Makes a template, as `made` says.
#[inline(never)]
pub fn make<E: Entry>(tables: &impl Buckets<E>, key: &E::Key, made: &Made, clock: Clock) -> Inserted {
    let place: Place = E::template_place(key, &tables.seed());
    let birth = made.word.expiring(clock.now.after(made.timeout));
    let insert = Insert { key, place, dest: made.dest, birth, clock, control: control::CLOSED };
    match flow_table::insert_template(tables, &insert) {
        Ok(number) => {
            if let Some(entry) = entry_of(tables, number) {
                // Closed until then, so it is still there.
                entry.hint().store(made.timeout);
                entry.control().store(control::TEMPLATE);
            }
            Inserted::New
        }
        Err(other) => other,
    }
}

/// What a new template is to be.
#[derive(Clone, Copy)]
pub struct Made {
    /// Its word, but for the version and the time: see [`Word::template`].
    pub word: Word,
    /// How long it stays from each use on, in ticks.
    pub timeout: u32,
    /// The number of its destination.
    pub dest: u32,
}

/// What [`crate::ageing`] does about a template whose time is over: ends it, or looks at it again later. Returns whether it has
/// ended.
#[inline(always)]
pub fn age<E: Entry>(tables: &impl Tables, entry: &E, word: Word, clock: Clock) -> bool {
    if !clock.now.reached(word.expires()) {
        return false;
    }
    if end(tables, entry, word) {
        return true;
    }
    let held = control::holders(entry.control().load()).is_some_and(|holders| holders != 0);
    if let Some(again) = word.template_at(clock.now, clock.hz, held) {
        // When that fails, it has been used meanwhile.
        let _ = entry.word().compare_exchange(word.0, again.0);
    }
    false
}

/// Ends a template, at once or as soon as nobody holds it any more; no packet finds it from now on. Returns whether it has
/// ended.
#[inline(always)]
pub fn doom<E: Entry>(tables: &impl Buckets<E>, entry: &E, word: Word, number: u32) -> bool {
    if end(tables, entry, word) {
        return true;
    }
    if join(entry).is_none() {
        return false;
    }
    if Word(entry.word().load()).same_life(word) {
        entry.retire();
        change_word(entry, word, |word| word.with(template::DOOMED));
    }
    tables.let_go(number, 0) != 0
}
