//! Addresses and ports in network byte order.
//!
//! Byte order is a type here, not a naming convention: a [`Port`] or an [`Ip4`] holds the bytes as they stand in a
//! packet, and host order exists only in the return value of the functions that say so.

use bytemuck::{Pod, Zeroable};

/// A transport port, in network byte order.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Pod, Zeroable)]
#[repr(transparent)]
pub struct Port(u16);

impl Port {
    /// The port with this number in host byte order, 0 to 65535.
    pub const fn new(host: u16) -> Self {
        Self(host.to_be())
    }

    /// The port whose two bytes in the packet, read as a native integer, are `raw`.
    pub const fn from_raw(raw: u16) -> Self {
        Self(raw)
    }

    /// The port number in host byte order.
    pub const fn number(self) -> u16 {
        u16::from_be(self.0)
    }

    /// The two bytes as they stand in a packet, as a native integer.
    pub const fn raw(self) -> u16 {
        self.0
    }
}

impl core::fmt::Debug for Port {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{}", self.number())
    }
}

/// An IPv4 address, in network byte order.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Pod, Zeroable)]
#[repr(transparent)]
pub struct Ip4(u32);

impl Ip4 {
    /// The address with these four octets, first octet first.
    pub const fn new(octets: [u8; 4]) -> Self {
        Self(u32::from_ne_bytes(octets))
    }

    /// The address whose four bytes in the packet, read as a native integer, are `raw`.
    pub const fn from_raw(raw: u32) -> Self {
        Self(raw)
    }

    /// The four octets, first octet first.
    pub const fn octets(self) -> [u8; 4] {
        self.0.to_ne_bytes()
    }

    /// The four bytes as they stand in a packet, as a native integer.
    pub const fn raw(self) -> u32 {
        self.0
    }

    /// The address as an unsigned number in host byte order, as ip_vs folds it for hashing.
    pub const fn number(self) -> u32 {
        u32::from_be(self.0)
    }

    /// Whether the address lies in 127.0.0.0/8.
    pub const fn is_loopback(self) -> bool {
        self.octets()[0] == 127
    }

    /// Whether the address may be that of one host: not in 0.0.0.0/8, of no group, and not the limited broadcast (RFC 1122
    /// section 3.2.1.3). As for the kernel, 240.0.0.0/4 is as good as any.
    pub const fn is_host(self) -> bool {
        let first = self.octets()[0];
        first != 0 && first & 0xf0 != 0xe0 && self.raw() != u32::MAX
    }
}

impl core::fmt::Debug for Ip4 {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let [a, b, c, d] = self.octets();
        write!(f, "{a}.{b}.{c}.{d}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_stay_in_packet_order() {
        assert_eq!(Port::new(80).raw().to_ne_bytes(), [0, 80]);
        assert_eq!(Port::from_raw(u16::from_ne_bytes([0x1f, 0x90])).number(), 8080);
        assert_eq!(Ip4::new([10, 0, 0, 1]).raw().to_ne_bytes(), [10, 0, 0, 1]);
        assert_eq!(Ip4::new([10, 0, 0, 1]).number(), 0x0a00_0001);
    }
}
