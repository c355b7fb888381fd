//! Frames to send.

use std::net::Ipv4Addr;

use etherparse::{IpNumber, Ipv4Header, PacketBuilder, PacketBuilderStep};

/// TCP header flags by their usual letters: S, A, F, R, P.
pub type Flags = &'static str;

/// A frame to be built: who to whom, over IPv4.
#[derive(Clone, Copy, Debug)]
pub struct Frame {
    /// Source and destination link-layer address.
    pub macs: ([u8; 6], [u8; 6]),
    /// Source address and port.
    pub from: (Ipv4Addr, u16),
    /// Destination address and port.
    pub to: (Ipv4Addr, u16),
    /// Time to live.
    pub ttl: u8,
    /// Whether fragmentation is forbidden.
    pub dont_fragment: bool,
    /// Identification.
    pub id: u16,
    /// Type of service, by its DSCP.
    pub dscp: u8,
}

impl Frame {
    /// A frame between these ends, with TTL 64 and DF set.
    pub const fn new(macs: ([u8; 6], [u8; 6]), from: (Ipv4Addr, u16), to: (Ipv4Addr, u16)) -> Self {
        Self { macs, from, to, ttl: 64, dont_fragment: true, id: 0x1234, dscp: 0 }
    }

    fn ip(&self) -> PacketBuilderStep<etherparse::IpHeaders> {
        let mut header = Ipv4Header::new(0, self.ttl, IpNumber(0), self.from.0.octets(), self.to.0.octets())
            .unwrap_or_default();
        header.dont_fragment = self.dont_fragment;
        header.identification = self.id;
        header.dscp = self.dscp.try_into().unwrap_or_default();
        PacketBuilder::ethernet2(self.macs.0, self.macs.1).ip(etherparse::IpHeaders::Ipv4(header, Default::default()))
    }

    /// A TCP segment.
    pub fn tcp(&self, flags: Flags, payload: &[u8]) -> Vec<u8> {
        let mut step = self.ip().tcp(self.from.1, self.to.1, 1000, 64_240);
        for flag in flags.chars() {
            step = match flag {
                'S' => step.syn(),
                'A' => step.ack(1),
                'F' => step.fin(),
                'R' => step.rst(),
                'P' => step.psh(),
                other => panic!("no TCP flag is written `{other}`"),
            };
        }
        let mut frame = Vec::new();
        step.write(&mut frame, payload).expect("a vector takes every byte");
        frame
    }

    /// A UDP datagram.
    pub fn udp(&self, payload: &[u8]) -> Vec<u8> {
        let mut frame = Vec::new();
        self.ip().udp(self.from.1, self.to.1).write(&mut frame, payload).expect("a vector takes every byte");
        frame
    }
}
