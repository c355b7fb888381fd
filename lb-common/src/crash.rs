//! Stopping a thread right before one of its stores to shared words, as if its process had been killed there. For tests.

use std::{
    cell::Cell,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
};

thread_local! {
    /// Stores that the thread may still make; `None` when nobody counts.
    static LEFT: Cell<Option<u64>> = const { Cell::new(None) };
}

/// What a thread is stopped with.
struct Stopped;

/// Counts one store. Other steps that a process may be killed before, like calls of the kernel, may count as well.
///
/// # Panics
///
/// Unwinds, without a message, when the thread may make no more of them.
pub fn step() {
    match LEFT.get() {
        Some(0) => resume_unwind(Box::new(Stopped)),
        Some(count) => LEFT.set(Some(count - 1)),
        None => {}
    }
}

/// Lets `work` make as many stores, and stops it before the next. Returns what it returned, or `None` if it was stopped.
///
/// # Panics
///
/// When `work` does.
pub fn after<T>(stores: u64, work: impl FnOnce() -> T) -> Option<T> {
    LEFT.set(Some(stores));
    let result = catch_unwind(AssertUnwindSafe(work));
    LEFT.set(None);
    match result {
        Ok(value) => Some(value),
        Err(payload) if payload.is::<Stopped>() => None,
        Err(payload) => resume_unwind(payload),
    }
}

/// How many stores `work` makes, and what else counts as one.
///
/// # Panics
///
/// When `work` does.
pub fn count(work: impl FnOnce()) -> u64 {
    LEFT.set(Some(u64::MAX));
    work();
    u64::MAX - LEFT.take().unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable as _;

    use super::*;
    use crate::sync::Shared32;

    #[test]
    fn a_thread_stops_before_the_store_that_is_one_too_many() {
        let words: [Shared32; 3] = bytemuck::Zeroable::zeroed();
        let work = || words.iter().for_each(|word| word.store(1));
        assert_eq!(after(2, work), None);
        assert_eq!(words.each_ref().map(Shared32::load), [1, 1, 0]);
        assert_eq!(after(3, work), Some(()));
        assert_eq!(words.each_ref().map(Shared32::load), [1, 1, 1]);
        assert_eq!(count(work), 3);
        Shared32::zeroed().store(1);
    }
}
