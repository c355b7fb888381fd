//! Why a packet was not forwarded. Every packet that the director does not forward counts under exactly one reason.
//!
//! The numbers are indices of a counter map and labels of metrics, so the list is append-only: a reason that is no
//! longer given keeps its number.

/// What happens to a packet that is not forwarded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    /// The host's own network stack gets it, unchanged.
    Passed,
    /// It goes no further.
    Dropped,
}

macro_rules! reasons {
    ($($fate:ident $variant:ident = $number:literal, $word:literal, $doc:literal;)+) => {
        /// Why a packet was not forwarded.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        #[repr(u8)]
        pub enum Reason {
            $(#[doc = concat!("A packet that ", $doc, ".")] $variant = $number,)+
        }

        impl Reason {
            /// Every reason, in order of its number.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The reason's name in listings and metrics.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }

            /// One sentence for people: "A packet that …".
            pub const fn describe(self) -> &'static str {
                match self { $(Self::$variant => concat!("A packet that ", $doc, ".")),+ }
            }

            /// Whether the host gets a packet that stops for the reason with this number.
            ///
            /// A mask and no table: the data plane asks this for most packets it sees.
            #[inline(always)]
            pub const fn passes(number: u8) -> bool {
                const PASSED: u64 = 0 $(| (matches!(Fate::$fate, Fate::Passed) as u64) << $number)+;
                PASSED >> (number & 63) & 1 != 0
            }

            /// What happens to the packet.
            pub const fn fate(self) -> Fate {
                match self { $(Self::$variant => Fate::$fate),+ }
            }
        }
    };
}

reasons! {
    Passed NotIp = 0, "not-ip", "is neither IPv4 nor IPv6: ARP, a VLAN tag, another protocol";
    Passed NotUnicast = 1, "not-unicast", "was sent to a link-layer group address";
    Passed NotService = 2, "not-service", "belongs to no service and is no reply of a real server";
    Passed NoConnection = 3, "no-connection", "is a TCP segment or an SCTP packet to a service, opens no connection and belongs to none";
    Passed FtpDataSource = 4, "ftp-data-source", "comes from source port 20, which ip_vs never schedules";
    Passed Icmp = 5, "icmp", "is an ICMP query, or an ICMP error about no connection of ours";
    Passed OtherProtocol = 6, "other-protocol", "is of a transport protocol that is not balanced";
    Passed IpTruncated = 7, "ip-truncated", "is shorter than its IP header says";
    Passed IpVersion = 8, "ip-version", "has an IP version that its frame type contradicts";
    Passed IpHeaderLength = 9, "ip-header-length", "has an IP header length below the minimum";
    Passed IpTotalLength = 10, "ip-total-length", "has an IP total length that its header or its frame contradicts";
    Passed LocalDelivery = 11, "local-delivery",
        "belongs to a connection whose other end is on the director itself, and was delivered there";
    Passed NeighbourUnknown = 12, "neighbour-unknown",
        "was handed to the host to be sent once the link-layer address of its next hop is known";
    Passed ReplyObserved = 13, "reply-observed", "is a reply of a DR or tunnel server on its way through the director";
    Dropped IpChecksum = 14, "ip-checksum", "is for a service and has a wrong IP header checksum";
    Dropped TransportTruncated = 15, "transport-truncated", "is for a service address and ends inside its transport header";
    Dropped Fragment = 16, "fragment", "is a fragment for a service address";
    Dropped NoDestination = 17, "no-destination", "opens a connection for which the service has no usable destination";
    Dropped DestinationRemoved = 18, "destination-removed", "belongs to a connection whose destination has been removed";
    Dropped TtlExpired = 19, "ttl-expired", "cannot be forwarded because its TTL is used up";
    Dropped TooBig = 20, "too-big", "is larger than the path to its next hop and must not be fragmented";
    Dropped NeedsFragmentation = 21, "needs-fragmentation",
        "is larger than the path to its next hop and would have to be fragmented";
    Dropped NoRoute = 22, "no-route", "has no route to its next hop";
    Dropped RouteUnsupported = 23, "route-unsupported", "has a route that an XDP program cannot follow";
    Dropped ForwardingOff = 24, "forwarding-off", "could not be routed because net.ipv4.conf.lo.forwarding or net.ipv6.conf.lo.forwarding is off";
    Dropped MetadataUnsupported = 25, "metadata-unsupported",
        "needs a link-layer address that is unknown, on an interface whose driver cannot hand it to the host";
    Dropped HeadroomExhausted = 26, "headroom-exhausted", "could not be encapsulated for want of room before it";
    Dropped TableFull = 27, "table-full", "opens a connection to a masqueraded server that the flow table has no room for";
    Dropped LoopbackDestination = 28, "loopback-destination", "came from outside and would go to a loopback address";
    Dropped LocalMasquerade = 29, "local-masquerade",
        "came from outside for a masqueraded server on the director itself, whose replies XDP does not see";
    Dropped ConfigurationChanged = 30, "configuration-changed",
        "opened a connection while its service was changed twice over";
    Dropped FlowContended = 31, "flow-contended", "lost a race for its connection's entry too many times";
    Dropped Impossible = 32, "impossible", "met a table index out of range, which is a defect of xdpvs";
    Dropped IcmpChecksum = 33, "icmp-checksum", "is an ICMP error about a masqueraded connection with a wrong checksum";
    Passed ReplyRefused = 34, "reply-refused",
        "is a reply that cannot be forwarded, left untranslated to the host, which tells the real server why";
    Dropped SourceAddress = 35, "source-address",
        "opens a connection from an address that no packet may come from: none, a group's, or a loopback one from outside";
    Dropped TunnelError = 36, "tunnel-error",
        "is an ICMP error about a packet in a tunnel that the client is not told of: it may be fragmented, or there have been too many";
    Dropped ExtensionHeader = 37, "extension-header", "is for a service address and has an IPv6 extension header";
    Dropped DropPacket = 38, "drop-packet", "would open a connection and is one of those that `drop_packet` drops";
    Passed CacheBypass = 39, "cache-bypass",
        "is for the service of a mark without a usable destination, and goes where it is addressed to by `cache_bypass`";
    Dropped StrayReply = 40, "stray-reply",
        "comes from a masqueraded server, which `nat_icmp_send` tells that it belongs to no connection";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_dense_and_names_unique() {
        for (index, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, index);
            assert_eq!(Reason::passes(index as u8), reason.fate() == Fate::Passed);
        }
        let names: std::collections::HashSet<_> = Reason::ALL.iter().map(|reason| reason.as_str()).collect();
        assert_eq!(names.len(), Reason::ALL.len());
    }
}
