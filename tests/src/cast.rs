//! Who is who in the tests: one fixed cast of addresses, the one of the records taken from ip_vs.
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
