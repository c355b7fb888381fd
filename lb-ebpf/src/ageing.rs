//! Ageing and other ends of connections that no packet brings about, a slice of the table at a time.

use core::ops::ControlFlow;

use lb_common::{
    abi::control as operation,
    event::Event,
    flow::{self, ENTRIES_PER_BUCKET, Entry, Entry4, Entry6, Hint, Word, control, template as templates},
    hash::mix,
    jiffies::Jiffies,
    proto::Protocol,
    sctp,
    sync::opaque,
    tcp::State,
};

use crate::{
    env::{Clock, Scan},
    flow_table::{self, Buckets},
    tables::Tables,
    template,
};

/// How often the end of a connection is tried again after a packet has changed it.
const END_ATTEMPTS: usize = 3;

/// How long a connection has to be idle to be one of those that `drop_entry` ends although they are established, in seconds.
const IDLE_S: u32 = 60;

/// Ends connections in a range of buckets.
pub struct Sweep<'t, T> {
    /// The tables.
    pub tables: &'t T,
    /// The first bucket; the scan's index is added to it. The buckets of the IPv6 table come after those of the IPv4 one.
    pub first: u32,
    /// Which connections end.
    pub what: What,
    /// Which buckets are thinned out besides.
    pub thinning: Thinning,
    /// How many have ended, but for those that have been thinned out.
    pub ended: u64,
}

/// Which connections a [`Sweep`] ends.
///
/// Verifier: numbers, so that they can be hidden.
#[derive(Clone, Copy)]
pub struct What {
    /// One of [`of`].
    pub kind: u64,
    /// The number that it is about.
    pub number: u64,
}

/// What [`What`] is about.
pub mod of {
    /// The number of a destination, which is any for [`control::ANY`](lb_common::abi::control::ANY).
    pub const DEST: u64 = 0;
    /// The slot of a service.
    pub const SERVICE: u64 = 1;
    /// The state of a destination.
    pub const STATE: u64 = 2;
    /// The time, in ticks, and in the high half how many of them are a second: connections whose time is over end.
    pub const OVER: u64 = 3;
    /// As [`OVER`], and others end that ip_vs's `drop_entry` would end.
    pub const THINNED: u64 = 4;
}

impl What {
    /// Those of the destination with this number, or of any for [`operation::ANY`].
    pub const fn dest(number: u32) -> Self {
        Self { kind: of::DEST, number: number as u64 }
    }

    /// Those whose time is over.
    pub const fn over(clock: Clock) -> Self {
        Self { kind: of::OVER, number: clock.now.0 as u64 | (clock.hz as u64) << 32 }
    }

    /// The time, of kinds that go by it.
    #[inline(always)]
    const fn clock(self) -> Clock {
        Clock { now: Jiffies(self.number as u32), hz: (self.number >> 32) as u32 }
    }

    #[inline(always)]
    const fn goes_by_time(self) -> bool {
        self.kind >= of::OVER
    }

    /// Whether a live entry with this word and destination ends.
    #[inline(always)]
    fn ends(self, tables: &impl Tables, word: Word, dest: u32) -> bool {
        let Self { kind, number } = self;
        if self.goes_by_time() {
            let Clock { now, hz } = self.clock();
            return if word.is_template() { now.reached(word.expires()) } else { word.expired(now, hz) };
        }
        if kind == of::DEST {
            return number == u64::from(operation::ANY) || number == u64::from(dest);
        }
        tables.dest(dest).is_some_and(|dest| {
            let said = if kind == of::SERVICE { dest.service.load() } else { dest.state.load() };
            u64::from(said) == number
        })
    }
}

/// Which buckets are thinned out, as ip_vs does it with one of 32 in a second, drawn by lot (`docs/ipvs.md`, section 4.11).
#[derive(Clone, Copy)]
pub struct Thinning {
    /// Of 2^32 buckets, how many; none are if it is 0.
    pub share: u64,
    /// The lot.
    pub lot: u32,
}

impl Thinning {
    /// None.
    pub const NONE: Self = Self { share: 0, lot: 0 };
    /// Every bucket.
    pub const ALL: Self = Self { share: 1 << 32, lot: 0 };

    #[inline(always)]
    const fn is_of(self, bucket: u32) -> bool {
        mix(bucket as u64 | (self.lot as u64) << 32) >> 32 < self.share
    }
}

impl<T: Tables> Sweep<'_, T> {
    /// Ends the connections of the bucket with this index in its own table.
    #[inline(always)]
    pub fn bucket<E: Entry>(&mut self, index: u32, what: What)
    where
        T: Buckets<E>,
    {
        let Some(bucket) = self.tables.bucket(index) else { return };
        for position in 0..opaque(ENTRIES_PER_BUCKET as u64) {
            let Some(entry) = bucket.entry(position) else { break };
            let word = Word(entry.word().load());
            if word.is_live() && (what.kind == of::THINNED || what.ends(self.tables, word, entry.dest().load())) {
                let number = index * ENTRIES_PER_BUCKET as u32 + position as u32 + 1;
                // Verifier: hidden, or it would follow the loop once for every number of ends.
                self.ended = self.tables.hide(self.ended + self.tables.end(number, what));
            }
        }
    }
}

/// Ends the connection or template of the entry with this number, less one, if that is what it is for. Returns 1 if it has ended,
/// and 0 if it has not, or has been thinned out, which is an event.
#[inline(always)]
pub fn end<E: Entry>(tables: &impl Buckets<E>, number: u32, what: What) -> u64 {
    let Some(entry) = template::entry_of(tables, number) else { return 0 };
    for _ in 0..opaque(END_ATTEMPTS as u64) {
        let word = Word(tables.hide(entry.word().load()));
        if !word.is_live() {
            break;
        }
        let done = if word.is_template() {
            end_template(tables, entry, word, number, what)
        } else {
            end_connection(tables, entry, word, what)
        };
        if let ControlFlow::Break(ended) = done {
            return ended;
        }
    }
    0
}

/// Ends a connection that is to end. Goes on when a packet has changed it.
#[inline(always)]
fn end_connection<E: Entry>(tables: &impl Buckets<E>, entry: &E, word: Word, what: What) -> ControlFlow<u64> {
    let dest = entry.dest().load();
    if what.ends(tables, word, dest) {
        let ended = flow_table::release(tables, entry, word, dest);
        return if ended { ControlFlow::Break(1) } else { ControlFlow::Continue(()) };
    }
    // One that a packet changes at this moment is not idle.
    if what.kind == of::THINNED
        && is_thinned(tables, entry, word, what.clock())
        && flow_table::release_as(tables, entry, word, dest, template::FORCED)
    {
        tables.count_event(Event::Thinned);
    }
    ControlFlow::Break(0)
}

/// Ends a template that is to end, at once or as soon as it controls no connection.
#[inline(always)]
fn end_template<E: Entry>(
    tables: &impl Buckets<E>,
    entry: &E,
    word: Word,
    number: u32,
    what: What,
) -> ControlFlow<u64> {
    let dest = entry.dest().load();
    if what.goes_by_time() {
        if template::age(tables, entry, word, what.clock()) {
            return ControlFlow::Break(1);
        }
        if what.kind == of::THINNED
            && is_thinned_template(tables, entry, word, what.clock())
            && template::end(tables, entry, word)
        {
            tables.count_event(Event::Thinned);
        }
        return ControlFlow::Break(0);
    }
    ControlFlow::Break(u64::from(what.ends(tables, word, dest) && template::doom(tables, entry, word, number)))
}

/// Whether ip_vs's `drop_entry` would end a connection before its time (`docs/ipvs.md`, section 4.11).
#[inline(always)]
fn is_thinned<E: Entry>(tables: &impl Tables, entry: &E, word: Word, clock: Clock) -> bool {
    const SYN_RECV: u8 = State::SynRecv as u8;
    const SYN_ACK: u8 = State::SynAck as u8;
    const ESTABLISHED: u8 = State::Established as u8;
    const INIT1: u8 = sctp::State::Init1 as u8;
    const INIT: u8 = sctp::State::Init as u8;
    const SCTP_ESTABLISHED: u8 = sctp::State::Established as u8;
    let may_be_in_use = match word.protocol() {
        Protocol::Tcp => match word.state() {
            SYN_RECV | SYN_ACK => return true,
            state => state == ESTABLISHED,
        },
        Protocol::Sctp => match word.state() {
            INIT1 | INIT => return true,
            state => state == SCTP_ESTABLISHED,
        },
        Protocol::Udp => true,
    };
    let timeout = tables.config().and_then(|config| config.timeouts.get(word.timeout_index()));
    let packets = Hint::packets(entry.hint().load(), word);
    // `expires` may be written a second late.
    may_be_in_use
        && timeout.is_some_and(|timeout| is_idle(word, timeout.load(), clock, IDLE_S + 1))
        && packets.is_some_and(|packets| is_next(tables, packets))
}

/// Whether it would end a template, which it does not if that controls connections.
#[inline(always)]
fn is_thinned_template<E: Entry>(tables: &impl Tables, entry: &E, word: Word, clock: Clock) -> bool {
    if control::holders(entry.control().load()) != Some(0) {
        return false;
    }
    if word.has(templates::ONE_PACKET) {
        let timeout = word.template_timeout(entry.hint().load(), clock.hz);
        // How many packets it has been used for is not counted: as if they were as many as are few.
        return is_idle(word, timeout, clock, IDLE_S) && is_next(tables, flow::FEW);
    }
    !word.has(templates::ASSURED)
}

/// Whether no packet has come for what has this word for so many seconds, if it expires `timeout` ticks after one.
#[inline(always)]
const fn is_idle(word: Word, timeout: u32, clock: Clock, seconds: u32) -> bool {
    clock.now.reached(Jiffies(word.expires().0.wrapping_sub(timeout)).after(seconds * clock.hz))
}

/// Whether this is the one to be ended of as many as `packets` have come for each, at least one. Only the timer asks.
#[inline(always)]
fn is_next(tables: &impl Tables, packets: u32) -> bool {
    let Some(limiter) = tables.limiter() else { return false };
    let Some(passed) = limiter.thinning.get(opaque(u64::from(packets.wrapping_sub(1))) as usize) else { return false };
    let left = passed.load().wrapping_sub(1);
    let is_next = left.cast_signed() <= 0;
    passed.store(if is_next { packets } else { left });
    is_next
}

/// How many buckets both tables have.
#[inline(always)]
pub fn buckets<T: Buckets<Entry4> + Buckets<Entry6>>(tables: &T) -> u32 {
    Buckets::<Entry4>::buckets(tables) + Buckets::<Entry6>::buckets(tables)
}

impl<T: Buckets<Entry4> + Buckets<Entry6>> Scan for Sweep<'_, T> {
    #[inline(always)]
    fn hide(&mut self, hide: impl Fn(u64) -> u64) {
        (self.what.kind, self.what.number) = (hide(self.what.kind), hide(self.what.number));
        self.thinning.share = hide(self.thinning.share);
    }

    #[inline(always)]
    fn visit(&mut self, index: u32) -> bool {
        let index = self.first + index;
        let kind = if self.thinning.is_of(index) { of::THINNED } else { self.what.kind };
        let what = What { kind: self.tables.hide(kind), ..self.what };
        match index.checked_sub(Buckets::<Entry4>::buckets(self.tables)) {
            None => self.bucket::<Entry4>(index, what),
            Some(index) => self.bucket::<Entry6>(index, what),
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use lb_common::hash::Seed;

    use super::*;
    use crate::host::{HostSizes, HostTables};

    #[test]
    fn one_of_so_many_ends_as_packets_have_come_for_each() {
        let sizes =
            HostSizes { services: 1, dests: 1, slots: 1, endpoint_buckets: 1, flow_buckets: 2, flow_buckets6: 2 };
        let tables = HostTables::new(sizes, Seed::new([1, 2, 3]), 250);
        for packets in 1..=flow::FEW {
            let ended: Vec<u32> = (0..40).filter(|_| is_next(&tables, packets)).collect();
            assert_eq!(ended, (0..40).step_by(packets as usize).collect::<Vec<_>>(), "of {packets} packets each");
        }
        assert!((0..40).all(|_| !is_next(&tables, 0) && !is_next(&tables, flow::FEW + 1)));
    }

    #[test]
    fn buckets_are_drawn_anew_each_time() {
        const BUCKETS: u32 = 100_000;
        let drawn = |share, lot| (0..BUCKETS).filter(move |bucket| Thinning { share, lot }.is_of(*bucket));
        for lot in 0..50 {
            // One of 32, give or take five standard deviations.
            let count = drawn(1 << 27, lot).count() as u32;
            assert!(count.abs_diff(BUCKETS / 32) < 280, "{count} of {BUCKETS}");
        }
        let again = drawn(1 << 27, 1).filter(|bucket| Thinning { share: 1 << 27, lot: 2 }.is_of(*bucket)).count();
        assert!((40..180).contains(&again), "{again} are drawn twice");
        assert_eq!((drawn(0, 1).count(), drawn(1 << 32, 1).count()), (0, BUCKETS as usize));
    }
}
