//! Who is who in the tests: one fixed cast of addresses, the one of the records taken from ip_vs. Each of them stands for an
//! address of IPv6 too: see [`crate::family`].
//!
//! ```text
//! client 10.0.0.2, and 10.1.0.0/16 behind it -- director 10.0.0.1 / 10.2.0.1 -- real servers 10.2.0.11, .12, ...
//! ```

use std::net::Ipv4Addr;

/// The address of services.
pub const VIP: Ipv4Addr = Ipv4Addr::new(10, 9, 9, 9);
/// The first of the clients, which are all behind one router.
pub const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 1);
/// The router between director and clients.
pub const CLIENT_GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
/// The director's address towards the clients.
pub const DIRECTOR_OUTSIDE: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
/// The director's address towards the real servers.
pub const DIRECTOR_INSIDE: Ipv4Addr = Ipv4Addr::new(10, 2, 0, 1);

/// Real server number `index`, from 0.
pub const fn server(index: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 2, 0, 11 + index)
}

/// Link-layer address of the router towards the clients.
pub const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 0x0c, 0];
/// Link-layer address of the director towards the clients.
pub const DIRECTOR_OUTSIDE_MAC: [u8; 6] = [2, 0, 0, 0, 0x0d, 0];
/// Link-layer address of the director towards the real servers.
pub const DIRECTOR_INSIDE_MAC: [u8; 6] = [2, 0, 0, 0, 0x0d, 1];

/// Link-layer address of real server number `index`.
pub const fn server_mac(index: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0x5e, 1 + index]
}

/// Index of the director's interface towards the clients.
pub const OUTSIDE: u32 = 2;
/// Index of the director's interface towards the real servers.
pub const INSIDE: u32 = 3;

/// What is special about some of the real servers; all others are neighbours of the director by its inside interface.
pub mod special {
    use crate::family::Family;

    /// Behind a link with an MTU of [`NARROW_MTU`].
    pub const NARROW: u8 = 6;
    /// MTU of the way to [`NARROW`].
    pub const NARROW_MTU: u32 = 1400;
    /// A neighbour whose link-layer address is unknown.
    pub const UNRESOLVED: u8 = 7;
    /// Without a route.
    pub const UNREACHABLE: u8 = 8;
    /// An address of the director itself.
    pub const LOCAL: u8 = 9;
    /// A neighbour by the outside interface: the director has one arm towards it.
    pub const ONE_ARMED: u8 = 10;
    /// Behind a link with an MTU of [`tiny_mtu`].
    pub const TINY: u8 = 11;

    /// MTU of the way to [`TINY`]: one byte less than the least that a tunnel can go through.
    pub const fn tiny_mtu(family: Family) -> u32 {
        match family {
            Family::Four => 87,
            Family::Six => 1319,
        }
    }
}

/// A client whose router's link-layer address is unknown.
pub const FAR_CLIENT: Ipv4Addr = Ipv4Addr::new(10, 3, 0, 1);
/// The router of [`FAR_CLIENT`].
pub const FAR_GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 9);
/// A client without a route.
pub const LOST_CLIENT: Ipv4Addr = Ipv4Addr::new(10, 4, 0, 1);
/// A client for which packets from real server number 0 have no route.
pub const BARRED_CLIENT: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 77);

/// The same cast over IPv6, with the same link-layer addresses.
pub mod six {
    use std::net::Ipv6Addr;

    /// The address of services.
    pub const VIP: Ipv6Addr = Ipv6Addr::new(0xfd00, 9, 0, 0, 0, 0, 0, 9);
    /// The first of the clients.
    pub const CLIENT: Ipv6Addr = Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 1);
    /// The director's address towards the real servers.
    pub const DIRECTOR_INSIDE: Ipv6Addr = Ipv6Addr::new(0xfd00, 2, 0, 0, 0, 0, 0, 1);

    /// Real server number `index`, from 0.
    pub const fn server(index: u8) -> Ipv6Addr {
        Ipv6Addr::new(0xfd00, 2, 0, 0, 0, 0, 0, 0x11 + index as u16)
    }
}
