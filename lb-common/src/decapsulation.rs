//! What becomes of a tunnelled packet at the real server it was sent to.
//!
//! The numbers are indices of a counter map, so the list is append-only.

use crate::reason::Fate;

macro_rules! decapsulations {
    ($($variant:ident = $number:literal, $word:literal, $doc:literal;)+) => {
        /// What becomes of a packet that carries another of its address family for a virtual address of this host.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        #[repr(u8)]
        pub enum Decapsulation {
            $(#[doc = concat!("A packet that ", $doc, ".")] $variant = $number,)+
        }

        impl Decapsulation {
            /// All of them, in order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The name in listings and metrics.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }

            /// One sentence for people: "A packet that …".
            pub const fn describe(self) -> &'static str {
                match self { $(Self::$variant => concat!("A packet that ", $doc, ".")),+ }
            }
        }
    };
}

decapsulations! {
    Delivered = 0, "delivered", "was taken out of its tunnel and given to the host";
    OuterTotalLength = 1, "outer_total_length", "has an outer total length that its header or its frame contradicts";
    OuterChecksum = 2, "outer_checksum", "has a wrong checksum in its outer header";
    OuterFragment = 3, "outer_fragment", "was fragmented on its way through the tunnel";
    InnerTruncated = 4, "inner_truncated", "ends inside the header of the packet it carries";
    InnerVersion = 5, "inner_version", "carries a packet of another IP version than its own";
    InnerHeaderLength = 6, "inner_header_length", "carries a packet with a header length below the minimum";
    InnerTotalLength = 7, "inner_total_length", "carries a packet that is longer than itself or than its header says";
    InnerChecksum = 8, "inner_checksum", "carries a packet with a wrong header checksum";
    CongestionUnknown = 9, "congestion_unknown",
        "met congestion in the tunnel and carries a packet whose sender could not be told so";
    Impossible = 10, "impossible", "could not be rewritten, which is a defect of xdpvs";
}

impl Decapsulation {
    /// What happens to the packet.
    pub const fn fate(self) -> Fate {
        match self {
            Self::Delivered => Fate::Passed,
            _ => Fate::Dropped,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_dense_and_names_unique() {
        for (index, outcome) in Decapsulation::ALL.iter().enumerate() {
            assert_eq!(*outcome as usize, index);
        }
        let names: std::collections::HashSet<_> = Decapsulation::ALL.iter().map(|outcome| outcome.as_str()).collect();
        assert_eq!(names.len(), Decapsulation::ALL.len());
    }
}
