//! What a director counts of its own doings, beside the packets that it does not forward ([`crate::reason`]).

use crate::reason::Reason;

/// Entries of the map that counts reasons, and from its end backwards events.
pub const COUNTERS: u32 = 64;

/// Something that a director does.
///
/// The numbers are indices of the map of counters, so the list is append-only, towards lower numbers.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Event {
    /// It has sent an ICMP error.
    IcmpSent = 63,
    /// It has ended a connection before its time, to make room for another in the flow table.
    Evicted = 62,
    /// It has forwarded a packet by the address of its client alone, for want of room in the flow table.
    Stateless = 61,
    /// `drop_entry` has ended a connection or template before its time.
    Thinned = 60,
}

impl Event {
    /// Every event, from the greatest number down.
    pub const ALL: &'static [Self] = &[Self::IcmpSent, Self::Evicted, Self::Stateless, Self::Thinned];

    /// The event's name in listings and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::IcmpSent => "icmp-sent",
            Self::Evicted => "evicted",
            Self::Stateless => "stateless",
            Self::Thinned => "thinned",
        }
    }

    /// One sentence for people, about what is counted once.
    pub const fn describe(self) -> &'static str {
        match self {
            Self::IcmpSent => "An ICMP error that the director has sent.",
            Self::Evicted => "A connection that has made room for another in the flow table.",
            Self::Stateless => "A packet that was forwarded without a connection, for want of room in the flow table.",
            Self::Thinned => "A connection or template that `drop_entry` has ended.",
        }
    }
}

const _: () = assert!(Reason::ALL.len() + Event::ALL.len() <= COUNTERS as usize);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_counted_behind_all_reasons() {
        for (index, event) in Event::ALL.iter().enumerate() {
            assert_eq!(*event as usize, COUNTERS as usize - 1 - index);
            assert!(Reason::ALL.iter().all(|reason| reason.as_str() != event.as_str()));
        }
    }
}
