//! Address families. What means the same in both is tested in both, with one cast: each of its addresses stands for one of
//! each family.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use etherparse::EtherType;
use lb_userspace::control::model::{ServiceKey, Transport};

use crate::{cast, frames::ETHERNET};

/// An address family.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Family {
    /// IPv4.
    #[default]
    Four,
    /// IPv6.
    Six,
}

/// The address of IPv6 that `address` stands for: the same numbers, at several places, so that addresses of different hosts
/// differ in every word but the first, and hosts that share an IPv4 network of 8, 16 or 24 bits share one of 8 bits more.
pub const fn six(address: Ipv4Addr) -> Ipv6Addr {
    let [a, b, c, d] = address.octets();
    match a {
        0 => Ipv6Addr::UNSPECIFIED,
        127 => Ipv6Addr::LOCALHOST,
        224..=239 => Ipv6Addr::from_octets([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, a, b, c, d]),
        _ => Ipv6Addr::from_octets([0xfd, a, b, c, d, 6, d, b, 6, c, d, a, a, b, c, d]),
    }
}

/// The address of the cast that stands for `address`.
pub fn member(address: IpAddr) -> Ipv4Addr {
    match address {
        IpAddr::V4(address) => address,
        IpAddr::V6(Ipv6Addr::LOCALHOST) => Ipv4Addr::LOCALHOST,
        IpAddr::V6(address) => {
            let [.., a, b, c, d] = address.octets();
            Ipv4Addr::new(a, b, c, d)
        }
    }
}

/// The address or network of the cast that stands for `address`, which is of no more than four octets of IPv6 if it is one.
pub fn network_member(address: IpAddr) -> Ipv4Addr {
    match address {
        IpAddr::V6(network) if network.octets()[4..] == [0; 12] => {
            let [_, a, b, c, ..] = network.octets();
            Ipv4Addr::new(a, b, c, 0)
        }
        address => member(address),
    }
}

/// The first `kept` octets, and zeros.
fn begin<const N: usize>(octets: [u8; N], kept: usize) -> [u8; N] {
    std::array::from_fn(|index| if index < kept { octets[index] } else { 0 })
}

impl Family {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Four, Self::Six];

    /// The address of this family that `address` stands for.
    pub const fn address(self, address: Ipv4Addr) -> IpAddr {
        match self {
            Self::Four => IpAddr::V4(address),
            Self::Six => IpAddr::V6(six(address)),
        }
    }

    /// The network of this family that the IPv4 network of the first `octets` of `address` stands for, as people write it.
    pub fn network(self, address: Ipv4Addr, octets: usize) -> String {
        match self {
            Self::Four => {
                let first = begin(address.octets(), octets);
                format!("{}/{}", Ipv4Addr::from_octets(first), 8 * octets)
            }
            Self::Six => {
                let first = begin(six(address).octets(), octets + 1);
                format!("{}/{}", Ipv6Addr::from_octets(first), 8 * (octets + 1))
            }
        }
    }

    /// The family of the packet that a frame says it carries.
    pub fn of(frame: &[u8]) -> Option<Self> {
        let ether_type = frame.get(ETHERNET - 2..ETHERNET)?;
        Self::ALL.into_iter().find(|family| family.ether_type().0.to_be_bytes() == ether_type)
    }

    /// What the kernel's settings call it.
    pub const fn sysctl(self) -> &'static str {
        match self {
            Self::Four => "ipv4",
            Self::Six => "ipv6",
        }
    }

    /// The type of frames that carry its packets.
    pub const fn ether_type(self) -> EtherType {
        match self {
            Self::Four => EtherType::IPV4,
            Self::Six => EtherType::IPV6,
        }
    }

    /// Length of a header without options or extensions, in bytes.
    pub const fn header(self) -> usize {
        match self {
            Self::Four => 20,
            Self::Six => 40,
        }
    }

    /// The protocol number of its ICMP.
    pub const fn icmp(self) -> u8 {
        match self {
            Self::Four => 1,
            Self::Six => 58,
        }
    }

    /// The protocol number of one of its packets in another packet.
    pub const fn in_ip(self) -> u8 {
        match self {
            Self::Four => 4,
            Self::Six => 41,
        }
    }

    /// The largest packet that an ICMP error of its is, in bytes.
    pub const fn error_max(self) -> usize {
        match self {
            Self::Four => 576,
            Self::Six => 1280,
        }
    }

    /// A service at a port of the [`cast::VIP`].
    pub const fn service(self, protocol: Transport, port: u16) -> ServiceKey {
        ServiceKey { protocol, address: SocketAddr::new(self.address(cast::VIP), port) }
    }

    /// Port `port` of real server number `index`.
    pub const fn at(self, index: u8, port: u16) -> SocketAddr {
        SocketAddr::new(self.address(cast::server(index)), port)
    }
}
