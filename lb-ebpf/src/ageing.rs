//! Ageing and other ends of connections that no packet brings about, a slice of the table at a time.

use lb_common::{
    abi::control,
    flow::{ENTRIES_PER_BUCKET, Entry, Entry4, Entry6, Word},
};

use crate::{
    env::{Clock, Scan},
    flow_table::{self, Buckets},
    tables::Tables,
    template,
};

/// How often the end of a connection is tried again after a packet has changed it.
const END_ATTEMPTS: usize = 3;

/// Ends connections in a range of buckets.
pub struct Sweep<'t, T> {
    /// The tables.
    pub tables: &'t T,
    /// The first bucket; the scan's index is added to it. The buckets of the IPv6 table come after those of the IPv4 one.
    pub first: u32,
    /// Which connections end.
    pub what: What,
    /// How many have ended.
    pub ended: u64,
}

/// Which connections a [`Sweep`] ends.
#[derive(Clone, Copy)]
pub enum What {
    /// Those whose time is over.
    Over(Clock),
    /// Those of destinations that are, or belong to, what has this number.
    ///
    /// Verifier: a number says which, so that it can be hidden.
    Of {
        /// One of [`of`].
        kind: u64,
        /// The number.
        number: u64,
    },
}

/// What of a destination [`What::Of`] looks at.
pub mod of {
    /// Its number, which is any for [`control::ANY`](lb_common::abi::control::ANY).
    pub const DEST: u64 = 0;
    /// The slot of its service.
    pub const SERVICE: u64 = 1;
    /// Its state.
    pub const STATE: u64 = 2;
}

impl What {
    /// Those of the destination with this number, or of any for [`control::ANY`].
    pub const fn dest(number: u32) -> Self {
        Self::Of { kind: of::DEST, number: number as u64 }
    }
}

impl<T: Tables> Sweep<'_, T> {
    /// Ends the connections of the bucket with this index in its own table.
    #[inline(always)]
    pub fn bucket<E: Entry>(&mut self, index: u32)
    where
        T: Buckets<E>,
    {
        let Some(bucket) = self.tables.bucket(index) else { return };
        let first = index * ENTRIES_PER_BUCKET as u32 + 1;
        for (number, entry) in (first..).zip(bucket.entries()) {
            for _ in 0..END_ATTEMPTS {
                let word = Word(entry.word().load());
                let dest = entry.dest().load();
                if !word.is_live() {
                    break;
                }
                if word.is_template() {
                    self.ended += u64::from(self.end_template(entry, word, number));
                    break;
                }
                if !self.ends(word, dest) {
                    break;
                }
                if flow_table::release(self.tables, entry, word, dest) {
                    self.ended += 1;
                    break;
                }
            }
        }
    }

    /// Ends a template that is to end, at once or as soon as it controls no connection. Returns whether it has ended.
    #[inline(always)]
    fn end_template<E: Entry>(&self, entry: &E, word: Word, number: u32) -> bool
    where
        T: Buckets<E>,
    {
        match self.what {
            What::Over(clock) => template::age(self.tables, entry, word, clock),
            _ => self.ends(word, entry.dest().load()) && template::doom(self.tables, entry, word, number),
        }
    }

    #[inline(always)]
    fn ends(&self, word: Word, dest: u32) -> bool {
        match self.what {
            What::Over(clock) => word.expired(clock.now, clock.hz),
            What::Of { kind: of::DEST, number } => number == u64::from(control::ANY) || number == u64::from(dest),
            What::Of { kind, number } => self.tables.dest(dest).is_some_and(|dest| {
                let said = if kind == of::SERVICE { dest.service.load() } else { dest.state.load() };
                u64::from(said) == number
            }),
        }
    }
}

/// How many buckets both tables have.
#[inline(always)]
pub fn buckets<T: Buckets<Entry4> + Buckets<Entry6>>(tables: &T) -> u32 {
    Buckets::<Entry4>::buckets(tables) + Buckets::<Entry6>::buckets(tables)
}

impl<T: Buckets<Entry4> + Buckets<Entry6>> Scan for Sweep<'_, T> {
    #[inline(always)]
    fn hide(&mut self, hide: impl Fn(u64) -> u64) {
        if let What::Of { kind, number } = &mut self.what {
            (*kind, *number) = (hide(*kind), hide(*number));
        }
    }

    #[inline(always)]
    fn visit(&mut self, index: u32) -> bool {
        let index = self.first + index;
        match index.checked_sub(Buckets::<Entry4>::buckets(self.tables)) {
            None => self.bucket::<Entry4>(index),
            Some(index) => self.bucket::<Entry6>(index),
        }
        true
    }
}
