//! What is done to flow tables beside the usual path.
//!
//! Verifier: global functions, which it looks at once, however often they are called.

use lb_common::{
    flow::{Entry4, Entry6, Place},
    jiffies::Jiffies,
};
use lb_ebpf::{
    ageing::{self, What},
    env::Clock,
    flow_table, template,
};

use crate::maps::Maps;

macro_rules! of_families {
    ($($entry:ty: $candidate:ident, $clear_way:ident, $let_go:ident, $template_word:ident, $assure:ident, $end:ident;)+) => {$(
        /// [`flow_table::candidate`].
        #[unsafe(no_mangle)]
        pub(crate) extern "C" fn $candidate(hash: u64, now: u32, hz: u32, idle: u32) -> u64 {
            flow_table::candidate::<$entry>(&Maps, Place::of(hash), Clock { now: Jiffies(now), hz }, idle).0
        }

        /// [`flow_table::clear_way`].
        #[unsafe(no_mangle)]
        pub(crate) extern "C" fn $clear_way(hash: u64, now: u32, hz: u32, idle: u32) -> u64 {
            flow_table::clear_way::<$entry>(&Maps, Place::of(hash), Clock { now: Jiffies(now), hz }, idle)
        }

        /// [`template::let_go`].
        #[unsafe(no_mangle)]
        pub(crate) extern "C" fn $let_go(number: u32, how: u64) -> u64 {
            template::let_go::<$entry>(&Maps, number, how)
        }

        /// [`template::word_of`].
        #[unsafe(no_mangle)]
        pub(crate) extern "C" fn $template_word(number: u32) -> u64 {
            template::word_of::<$entry>(&Maps, number)
        }

        /// [`template::assure`].
        #[unsafe(no_mangle)]
        pub(crate) extern "C" fn $assure(number: u32, word: u64) -> u64 {
            template::assure::<$entry>(&Maps, number, word)
        }

        /// [`ageing::end`].
        #[unsafe(no_mangle)]
        pub(crate) extern "C" fn $end(number: u32, kind: u64, subject: u64) -> u64 {
            ageing::end::<$entry>(&Maps, number, What { kind, number: subject })
        }
    )+};
}

of_families! {
    Entry4: candidate4, clear_way4, let_go4, template_word4, assure4, end4;
    Entry6: candidate6, clear_way6, let_go6, template_word6, assure6, end6;
}
