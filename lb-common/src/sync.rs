//! Words in memory that several CPUs, the kernel and the loader read and write at the same time.
//!
//! The bpf target has no `AtomicU64::compare_exchange`, and its code generator cannot select a plain atomic load or
//! store. So a [`Shared32`] or [`Shared64`] loads and stores by volatile access, and updates by the kernel's
//! read-modify-write instructions, which order like `SeqCst` (a fully ordered atomic in
//! <https://docs.kernel.org/core-api/wrappers/atomic_t.html>). On the host the same type is a `core::sync::atomic`.
//!
//! A volatile load orders like an acquire and a volatile store like a release because the BPF JIT emits them as they
//! stand and the supported machines are x86-64, whose memory model (TSO) never reorders loads with loads or stores with
//! stores. A port to a weaker machine has to change this module and nothing else.

macro_rules! shared {
    ($(#[$doc:meta])* $name:ident, $int:ty, $atomic:ty) => {
        $(#[$doc])*
        #[repr(transparent)]
        pub struct $name {
            #[cfg(target_arch = "bpf")]
            cell: core::cell::UnsafeCell<$int>,
            #[cfg(not(target_arch = "bpf"))]
            cell: $atomic,
        }

        impl $name {
            /// A word that holds 0.
            #[cfg(target_arch = "bpf")]
            #[expect(clippy::declare_interior_mutable_const, reason = "every use makes a new word")]
            pub const ZERO: Self = Self { cell: core::cell::UnsafeCell::new(0) };
            /// A word that holds 0.
            #[cfg(not(target_arch = "bpf"))]
            #[expect(clippy::declare_interior_mutable_const, reason = "every use makes a new word")]
            pub const ZERO: Self = Self { cell: <$atomic>::new(0) };
        }

        // SAFETY: every access goes through volatile or atomic instructions on an aligned word.
        #[cfg(target_arch = "bpf")]
        unsafe impl Sync for $name {}

        #[cfg(target_arch = "bpf")]
        impl $name {
            /// Reads the word; later reads see at least what its writer had written before it.
            #[inline(always)]
            pub fn load(&self) -> $int {
                // SAFETY: `cell` is valid and aligned for as long as `self` is borrowed.
                unsafe { self.cell.get().read_volatile() }
            }

            /// Writes the word after all earlier writes.
            #[inline(always)]
            pub fn store(&self, value: $int) {
                // SAFETY: as in `load`; concurrent readers read the whole word at once.
                unsafe { self.cell.get().write_volatile(value) }
            }

            /// Adds, wrapping, and returns the value before.
            #[inline(always)]
            pub fn fetch_add(&self, value: $int) -> $int {
                use core::intrinsics::{AtomicOrdering, atomic_xadd};
                // SAFETY: as in `load`.
                unsafe { atomic_xadd::<_, _, { AtomicOrdering::SeqCst }>(self.cell.get(), value) }
            }

            /// Replaces `current` by `new`.
            ///
            /// # Errors
            ///
            /// The value found, when it was not `current`; nothing is written then.
            #[inline(always)]
            pub fn compare_exchange(&self, current: $int, new: $int) -> Result<$int, $int> {
                use core::intrinsics::{AtomicOrdering, atomic_cxchg};
                // SAFETY: as in `load`.
                let (found, done) = unsafe {
                    atomic_cxchg::<_, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(self.cell.get(), current, new)
                };
                if done { Ok(found) } else { Err(found) }
            }
        }

        #[cfg(not(target_arch = "bpf"))]
        impl $name {
            /// Lets a test's scheduler change threads before an access.
            #[inline(always)]
            fn announce(&self, _writes: bool) {
                #[cfg(feature = "interleave")]
                crate::interleave::before(self, _writes);
            }

            /// Reads the word; later reads see at least what its writer had written before it.
            #[inline(always)]
            pub fn load(&self) -> $int {
                self.announce(false);
                self.cell.load(core::sync::atomic::Ordering::Acquire)
            }

            /// Writes the word after all earlier writes.
            #[inline(always)]
            pub fn store(&self, value: $int) {
                #[cfg(feature = "crash")]
                crate::crash::step();
                self.announce(true);
                self.cell.store(value, core::sync::atomic::Ordering::Release);
            }

            /// Adds, wrapping, and returns the value before.
            #[inline(always)]
            pub fn fetch_add(&self, value: $int) -> $int {
                self.announce(true);
                self.cell.fetch_add(value, core::sync::atomic::Ordering::SeqCst)
            }

            /// Replaces `current` by `new`.
            ///
            /// # Errors
            ///
            /// The value found, when it was not `current`; nothing is written then.
            #[inline(always)]
            pub fn compare_exchange(&self, current: $int, new: $int) -> Result<$int, $int> {
                use core::sync::atomic::Ordering::SeqCst;
                self.announce(true);
                self.cell.compare_exchange(current, new, SeqCst, SeqCst)
            }
        }

        // SAFETY: an all-zero word is a valid value.
        unsafe impl bytemuck::Zeroable for $name {}
    };
}

shared!(
    /// A 32-bit word shared between CPUs, aligned to 4 bytes.
    Shared32,
    u32,
    core::sync::atomic::AtomicU32
);

shared!(
    /// A 64-bit word shared between CPUs, aligned to 8 bytes.
    Shared64,
    u64,
    core::sync::atomic::AtomicU64
);

/// Returns `value`, of which the compiler may then assume nothing.
///
/// Verifier: a bounds check that the compiler can prove needless is one that the verifier misses, for it knows less of
/// where an index comes from.
#[inline(always)]
pub fn opaque(value: u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    {
        let mut value = value;
        // An instruction, though it does nothing: line information of an empty one would fall on its neighbour's, which
        // the kernel refuses.
        // SAFETY: moves a register to itself.
        unsafe { core::arch::asm!("{0} = {0}", inout(reg) value, options(pure, nomem, nostack)) };
        value
    }
    #[cfg(not(target_arch = "bpf"))]
    value
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable as _;

    use super::*;

    #[test]
    fn exchange_reports_what_it_found() {
        let word = Shared64::zeroed();
        word.store(7);
        assert_eq!(word.compare_exchange(7, 9), Ok(7));
        assert_eq!(word.compare_exchange(7, 11), Err(9));
        assert_eq!(word.load(), 9);
    }

    #[test]
    fn add_wraps_and_returns_the_value_before() {
        let word = Shared32::zeroed();
        assert_eq!(word.fetch_add(u32::MAX), 0);
        assert_eq!(word.fetch_add(2), u32::MAX);
        assert_eq!(word.load(), 1);
    }

    #[test]
    fn a_shared_word_has_the_layout_of_its_integer() {
        assert_eq!((size_of::<Shared32>(), align_of::<Shared32>()), (4, 4));
        assert_eq!((size_of::<Shared64>(), align_of::<Shared64>()), (8, 8));
    }
}
