//! Protocols, forwarding methods and schedulers, by ip_vs's own numbers where it has them.

/// A number in a map or a packet that names no variant of the enum it stands for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Unknown(pub u8);

macro_rules! numbered {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $value:literal, $word:literal;)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        #[repr(u8)]
        pub enum $name {
            $($(#[$vdoc])* $variant = $value,)+
        }

        impl $name {
            /// Every variant, in order of its number.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The variant's name as command lines and listings write it.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }
        }

        impl TryFrom<u8> for $name {
            type Error = Unknown;

            #[inline(always)]
            fn try_from(value: u8) -> Result<Self, Unknown> {
                match value { $($value => Ok(Self::$variant),)+ other => Err(Unknown(other)) }
            }
        }

        impl core::fmt::Display for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                f.pad(self.as_str())
            }
        }
    };
}

numbered! {
    /// A transport protocol that can be load-balanced; the value is its IP protocol number.
    Protocol {
        /// RFC 9293.
        Tcp = 6, "tcp";
        /// RFC 768.
        Udp = 17, "udp";
        /// RFC 9260.
        Sctp = 132, "sctp";
    }
}

numbered! {
    /// How a packet reaches its destination (`docs/ipvs.md`, section 1.2).
    Method {
        /// NAT: the destination address and port are rewritten, and the replies translated back.
        Masq = 0, "nat";
        /// IP-in-IP encapsulation.
        Tunnel = 2, "ipip";
        /// Direct routing: only the link-layer addresses change.
        Route = 3, "dr";
    }
}

impl Method {
    /// The word ipvsadm prints in its "Forward" column.
    pub const fn column(self) -> &'static str {
        match self {
            Self::Masq => "Masq",
            Self::Tunnel => "Tunnel",
            Self::Route => "Route",
        }
    }
}

numbered! {
    /// A scheduling algorithm (`docs/ipvs.md`, section 3). The numbers are ours: ip_vs knows schedulers by name.
    Scheduler {
        /// Round robin.
        Rr = 1, "rr";
        /// Weighted round robin.
        Wrr = 2, "wrr";
        /// Weighted least connection.
        Wlc = 3, "wlc";
        /// Source hashing.
        Sh = 4, "sh";
        /// Least connection.
        Lc = 5, "lc";
        /// Shortest expected delay.
        Sed = 6, "sed";
        /// Never queue.
        Nq = 7, "nq";
        /// Destination hashing.
        Dh = 8, "dh";
        /// Weighted fail-over.
        Fo = 9, "fo";
        /// Weighted overflow.
        Ovf = 10, "ovf";
        /// Maglev hashing.
        Mh = 11, "mh";
        /// Locality-based least connection.
        Lblc = 12, "lblc";
        /// Locality-based least connection with replication.
        Lblcr = 13, "lblcr";
        /// The better of two at random.
        Twos = 14, "twos";
        /// At random. Ours: ip_vs has no such scheduler.
        Random = 15, "random";
        /// At random by weight. Ours.
        Wrandom = 16, "wrandom";
        /// Destination hashing by weight. Ours.
        Wdh = 17, "wdh";
    }
}

impl Scheduler {
    /// The scheduler with this ip_vs name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|scheduler| scheduler.as_str() == name)
    }
}

/// Flags of a service, beside those of its scheduler, by ip_vs's numbers (`docs/ipvs.md`, section 1.1).
pub mod service_flag {
    /// The connections of a client go to one destination.
    pub const PERSISTENT: u32 = 1 << 0;
    /// Every UDP packet is scheduled by itself, and no connection is kept.
    pub const ONE_PACKET: u32 = 1 << 2;
}

/// Flags of a service's scheduler, by ip_vs's numbers (`docs/ipvs.md`, section 1.1).
pub mod sched_flag {
    use super::Scheduler;

    /// sh and mh: look on when the destination that the hash names is not usable.
    pub const FALLBACK: u32 = 1 << 3;
    /// sh and mh: hash the client's port, too.
    pub const PORT: u32 = 1 << 4;
    /// Means nothing to any scheduler.
    pub const THIRD: u32 = 1 << 5;
    /// All of them.
    pub const ALL: u32 = FALLBACK | PORT | THIRD;

    /// The flags of `scheduler` with their names as ipvsadm shows them.
    pub const fn names(scheduler: Scheduler) -> &'static [(&'static str, u32)] {
        match scheduler {
            Scheduler::Sh => &[("sh-fallback", FALLBACK), ("sh-port", PORT)],
            Scheduler::Mh => &[("mh-fallback", FALLBACK), ("mh-port", PORT)],
            _ => GENERIC,
        }
    }

    /// Names that the flags have for every scheduler.
    pub const GENERIC: &[(&str, u32)] = &[("flag-1", FALLBACK), ("flag-2", PORT), ("flag-3", THIRD)];
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_names_round_trip() {
        for &scheduler in Scheduler::ALL {
            assert_eq!(Scheduler::from_name(scheduler.as_str()), Some(scheduler));
            assert_eq!(Scheduler::try_from(scheduler as u8), Ok(scheduler));
        }
        assert_eq!(Scheduler::from_name("nope"), None);
        assert_eq!(Method::try_from(7), Err(Unknown(7)));
        assert_eq!(Protocol::try_from(17), Ok(Protocol::Udp));
    }
}
