//! Addresses and ports in network byte order.
//!
//! Byte order is a type here, not a naming convention: a [`Port`], an [`Ip4`] or an [`Ip6`] holds the bytes as they stand in
//! a packet, and host order exists only in the return value of the functions that say so.

use bytemuck::{Pod, Zeroable};

use crate::{
    abi::{EndpointKey, EndpointKey4, EndpointKey6},
    flow::{Entry, Entry4, Entry6},
};

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

/// An address of some family, in network byte order.
pub trait Address: Copy + Eq + core::hash::Hash + Default + core::fmt::Debug + 'static {
    /// The kernel's number of the family: 2 (IPv4) or 10 (IPv6).
    const FAMILY: u32;
    /// The least that is believed of what an ICMP error says of the size of packets, in bytes.
    const PATH_MTU_MIN: u16;
    /// Connections between such addresses.
    type Entry: Entry<Addr = Self>;
    /// Such an address with a port and a protocol.
    type Endpoint: EndpointKey<Addr = Self>;

    /// The address in these words, as loaded from a packet; IPv4 in the first.
    fn from_words(words: [u32; 4]) -> Self;

    /// The address as words, as loaded from a packet; IPv4 in the first, the others 0.
    fn words(self) -> [u32; 4];

    /// The address as an unsigned number in host byte order, as ip_vs folds it for hashing (`docs/ipvs.md`, section 3.0).
    fn number(self) -> u32;

    /// The address as a number of 128 bits in host byte order, the higher half first. IPv4 addresses are below 2^32.
    fn halves(self) -> [u64; 2];

    /// Whether the address is one of the host's own that is never sent over a link.
    fn is_loopback(self) -> bool;

    /// Whether the address may be that of one host.
    fn is_host(self) -> bool;

    /// The network that the address is in, by the netmask of a service: of IPv4 the bits that count, as loaded from a packet, and
    /// of IPv6 how many do, at most 128 (`docs/ipvs.md`, section 1.1).
    fn network(self, netmask: u32) -> Self;
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
}

impl Address for Ip4 {
    const FAMILY: u32 = 2;
    /// The kernel's default, `net.ipv4.route.min_pmtu`.
    const PATH_MTU_MIN: u16 = 552;
    type Entry = Entry4;
    type Endpoint = EndpointKey4;

    #[inline(always)]
    fn from_words(words: [u32; 4]) -> Self {
        Self(words[0])
    }

    #[inline(always)]
    fn words(self) -> [u32; 4] {
        [self.0, 0, 0, 0]
    }

    #[inline(always)]
    fn number(self) -> u32 {
        u32::from_be(self.0)
    }

    #[inline(always)]
    fn halves(self) -> [u64; 2] {
        [0, self.number().into()]
    }

    /// Whether the address lies in 127.0.0.0/8.
    #[inline(always)]
    fn is_loopback(self) -> bool {
        self.octets()[0] == 127
    }

    /// Whether the address is not in 0.0.0.0/8, of no group, and not the limited broadcast (RFC 1122 section 3.2.1.3). As for
    /// the kernel, 240.0.0.0/4 is as good as any.
    #[inline(always)]
    fn is_host(self) -> bool {
        let first = self.octets()[0];
        first != 0 && first & 0xf0 != 0xe0 && self.raw() != u32::MAX
    }

    #[inline(always)]
    fn network(self, netmask: u32) -> Self {
        Self(self.0 & netmask)
    }
}

/// An IPv6 address, in network byte order.
///
/// Two words of 64 bits, so that no halves of it are ever copied on their own.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Pod, Zeroable)]
#[repr(C)]
pub struct Ip6 {
    high: u64,
    low: u64,
}

impl Ip6 {
    /// The address with these sixteen octets, first octet first.
    pub const fn new(octets: [u8; 16]) -> Self {
        let bits = u128::from_ne_bytes(octets);
        Self { high: bits as u64, low: (bits >> 64) as u64 }
    }

    /// The address whose first and last eight bytes in the packet, read as native integers, are these.
    #[inline(always)]
    pub const fn from_raw([high, low]: [u64; 2]) -> Self {
        Self { high, low }
    }

    /// The sixteen octets, first octet first.
    pub const fn octets(self) -> [u8; 16] {
        (self.high as u128 | (self.low as u128) << 64).to_ne_bytes()
    }

    /// The first and last eight bytes as they stand in a packet, as native integers.
    #[inline(always)]
    pub const fn raw(self) -> [u64; 2] {
        [self.high, self.low]
    }
}

impl Address for Ip6 {
    const FAMILY: u32 = 10;
    /// What every link carries (RFC 8201 section 4).
    const PATH_MTU_MIN: u16 = 1280;
    type Entry = Entry6;
    type Endpoint = EndpointKey6;

    #[inline(always)]
    fn from_words(words: [u32; 4]) -> Self {
        let pair = |first: u32, second: u32| first as u64 | (second as u64) << 32;
        Self { high: pair(words[0], words[1]), low: pair(words[2], words[3]) }
    }

    #[inline(always)]
    fn words(self) -> [u32; 4] {
        [self.high as u32, (self.high >> 32) as u32, self.low as u32, (self.low >> 32) as u32]
    }

    #[inline(always)]
    fn number(self) -> u32 {
        let folded = self.high ^ self.low;
        u32::from_be(folded as u32 ^ (folded >> 32) as u32)
    }

    #[inline(always)]
    fn halves(self) -> [u64; 2] {
        [u64::from_be(self.high), u64::from_be(self.low)]
    }

    /// Whether the address is ::1.
    #[inline(always)]
    fn is_loopback(self) -> bool {
        self.high == 0 && self.low == 1u64.to_be()
    }

    /// Whether the address is neither :: nor of a group (RFC 4291 section 2.7).
    #[inline(always)]
    fn is_host(self) -> bool {
        self.high & 0xff != 0xff && self.high | self.low != 0
    }

    #[inline(always)]
    fn network(self, netmask: u32) -> Self {
        let (high, low) = (netmask.min(64), netmask.saturating_sub(64).min(64));
        Self { high: self.high & leading_bits(high), low: self.low & leading_bits(low) }
    }
}

/// The first `count` bits of eight bytes of an address, as they are loaded from a packet; `count` is at most 64.
#[inline(always)]
const fn leading_bits(count: u32) -> u64 {
    if count == 0 { 0 } else { (u64::MAX << (64 - count)).to_be() }
}

impl core::fmt::Debug for Ip6 {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{}", core::net::Ipv6Addr::from(self.octets()))
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
        let address = Ip6::new(core::array::from_fn(|index| index as u8));
        assert_eq!(address.raw()[0].to_ne_bytes(), [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(address.words()[3].to_ne_bytes(), [12, 13, 14, 15]);
        assert_eq!(Ip6::from_words(address.words()), address);
        assert_eq!(address.octets()[15], 15);
    }

    #[test]
    fn hosts_are_told_from_groups_and_from_nobody() {
        let six = |text: &str| Ip6::new(text.parse::<core::net::Ipv6Addr>().expect("an address").octets());
        assert!(six("2001:db8::1").is_host() && six("::1").is_host() && six("fe80::1").is_host());
        assert!(!six("::").is_host() && !six("ff02::1").is_host());
        assert!(six("::1").is_loopback() && !six("::").is_loopback() && !six("1::1").is_loopback());
        assert_eq!(six("2001:db8::1").number(), 0x2001_0db8 ^ 1);
        assert_eq!(six("2001:db8::1").halves(), [0x2001_0db8 << 32, 1]);
        assert_eq!(Ip4::new([10, 0, 0, 1]).halves(), [0, 0x0a00_0001]);
        for (length, network) in
            [(128, "2001:db8::1"), (127, "2001:db8::"), (32, "2001:db8::"), (30, "2001:db8::"), (29, "2001:db8::")]
        {
            assert_eq!(six("2001:db8::1").network(length), six(network), "{length}");
        }
        assert_eq!(six("2001:dbf:1:2:ffff::").network(64), six("2001:dbf:1:2::"));
        assert_eq!(six("2001:dbf:1:2:ffff::").network(68), six("2001:dbf:1:2:f000::"));
        assert_eq!(six("2001:dbf::").network(29), six("2001:db8::"));
        assert_eq!(Ip4::new([10, 1, 7, 9]).network(Ip4::new([255, 0, 255, 0]).raw()), Ip4::new([10, 0, 7, 0]));
        assert!(Ip4::new([127, 1, 2, 3]).is_loopback() && !Ip4::new([224, 0, 0, 1]).is_host());
    }
}
