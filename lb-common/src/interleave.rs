//! Seeing every access of a thread to a shared word right before it is made. For tests, which change threads there.

use std::cell::Cell;

/// What is called before an access: with the address of the word, and whether the access may write.
pub type Watcher = fn(word: usize, writes: bool);

thread_local! {
    static WATCHER: Cell<Option<Watcher>> = const { Cell::new(None) };
}

/// Calls the watcher of this thread of the system, if it has one.
#[inline]
pub(crate) fn before<T>(word: &T, writes: bool) {
    if let Some(watcher) = WATCHER.get() {
        watcher(std::ptr::from_ref(word).addr(), writes);
    }
}

/// Has this thread of the system watched by `watcher` while it does `work`.
pub fn watched<T>(watcher: Watcher, work: impl FnOnce() -> T) -> T {
    /// Also when the work panics.
    struct End;
    impl Drop for End {
        fn drop(&mut self) {
            WATCHER.set(None);
        }
    }
    WATCHER.set(Some(watcher));
    let _end = End;
    work()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::{Shared32, Shared64};

    thread_local! {
        static SEEN: Cell<(u32, u32)> = const { Cell::new((0, 0)) };
    }

    fn count(_: usize, writes: bool) {
        let (reads, changes) = SEEN.get();
        SEEN.set(if writes { (reads, changes + 1) } else { (reads + 1, changes) });
    }

    #[test]
    fn every_access_is_seen_while_it_is_watched() {
        let (word, half) = (Shared64::ZERO, Shared32::ZERO);
        let access = || {
            word.store(1);
            let _ = word.compare_exchange(1, 2);
            half.fetch_add(1);
            (word.load(), half.load())
        };
        access();
        assert_eq!(watched(count, access), (2, 2));
        access();
        assert_eq!(SEEN.get(), (2, 3));
    }
}
