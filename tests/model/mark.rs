//! Marks: section 2.1, and the rules that stand in for netfilter's, of which the first that is true of a packet says its mark.

use std::net::IpAddr;

use super::spec::{Packet, Protocol};

/// Addresses that begin alike, in so many bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Prefix(pub(crate) IpAddr, pub(crate) u8);

/// Which packets have a mark.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Rule {
    pub(crate) mark: u32,
    pub(crate) protocol: Option<Protocol>,
    pub(crate) destination: Prefix,
    /// The lowest and the highest destination port.
    pub(crate) ports: (u16, u16),
    pub(crate) source: Option<Prefix>,
    /// The number of the interface by which they come in.
    pub(crate) interface: Option<u32>,
}

/// The bits of an address, the first of them first.
pub(crate) fn bits(address: IpAddr) -> Vec<bool> {
    let octets = match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    octets.into_iter().flat_map(|octet| (0..8).rev().map(move |bit| octet >> bit & 1 != 0)).collect()
}

impl Prefix {
    fn contains(self, address: IpAddr) -> bool {
        let Self(network, length) = self;
        network.is_ipv4() == address.is_ipv4() && bits(network)[..length.into()] == bits(address)[..length.into()]
    }
}

impl Rule {
    fn is_true_of(&self, packet: &Packet) -> bool {
        self.protocol.is_none_or(|protocol| protocol == packet.protocol)
            && self.destination.contains(packet.to.ip())
            && (self.ports.0..=self.ports.1).contains(&packet.to.port())
            && self.source.is_none_or(|source| source.contains(packet.from.ip()))
            && self.interface.is_none_or(|interface| interface == packet.interface)
    }
}

/// The mark of a packet.
pub(crate) fn mark_of(rules: &[Rule], packet: &Packet) -> Option<u32> {
    rules.iter().find(|rule| rule.is_true_of(packet)).map(|rule| rule.mark)
}
