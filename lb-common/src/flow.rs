//! A connection in the flow table: its layout, its state word and where the table may hold it.
//!
//! # One entry
//!
//! An entry is half a cache line (IPv4) or one (IPv6). Its `word` is the only field that changes while the entry is live, always by
//! compare-exchange, and it says everything that a packet may change: the time it expires, its TCP state, its flags.
//! The other fields are written by the one CPU that has claimed the entry and are constant until the entry is free
//! again. So a reader that finds the same version in the word before and after it has read the other fields has read
//! fields of one connection.
//!
//! ```text
//! FREE --claim--> BUSY --publish--> LIVE --release--> FREE
//!                   |                 ^ |
//!                   | kill            +-+ step
//!                   v
//!                KILLED --release--> FREE
//! ```
//!
//! Every arrow is one compare-exchange of the word, and only the CPU whose exchange succeeds acts on it (adds the
//! connection to its destination's counters, takes it off again). Claiming increments the version. A LIVE entry is claimed
//! like a FREE one when its connection is over, or makes room ([`Yield`]): that exchange is its release, too.
//!
//! # Where an entry may stand
//!
//! A connection is hashed by protocol, client address and client port: what a packet of the client and a reply of a
//! masqueraded server have in common, so that one entry is found from both sides. The hash names two buckets of ten
//! entries and the pair of entries in each where its search begins. With two buckets of ten, fewer than one insert in
//! 10,000 finds both full when three quarters of the table are in use (see `ARCHITECTURE.md`, "Measurements").
//! At most twenty connections with the same client address and port, to different services, can be held at a time.
//!
//! # Persistence templates
//!
//! A template says which destination the connections of a client, or of a network of clients, go to (`docs/ipvs.md`, section
//! 6). It stands in the table like a connection, with 3 for a protocol and the number of the one that it is for in place of the
//! client's port, and it is hashed whole, for no reply looks for it. It must stay as long as it controls connections: each of
//! them has the number of its template's entry, and the template counts them; see [`control`].

use bytemuck::Zeroable;

use crate::{
    abi::{ADJACENCIES, Dest, EndpointKey as _},
    addr::{Address, Ip4, Ip6, Port},
    hash::{Seed, mix, scale},
    jiffies::Jiffies,
    proto::{Method, Protocol},
    sctp,
    sync::{Shared32, Shared64, opaque},
    tcp::{self, State, Transition},
    timeout,
};

/// The status of an entry: bits 0-1 of its word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Status {
    /// Nobody uses the entry; its other fields are left over.
    Free,
    /// One CPU is filling the entry in.
    Busy,
    /// Another CPU has decided that the one filling the entry in shall give it up.
    Killed,
    /// The entry is a connection.
    Live,
}

/// The state word of an entry.
///
/// | bits | live | busy, killed | free |
/// |---|---|---|---|
/// | 0-1 | status | status | status |
/// | 2-3 | protocol (TCP 0, UDP 1, SCTP 2), or 3 for a template | 0 | 0 |
/// | 4-7 | TCP or SCTP state, or [`template`] flags | 0 | 0 |
/// | 8-10 | forwarding method | 0 | 0 |
/// | 11-15 | flags | 0 | 0 |
/// | 16-31 | version | version | version |
/// | 32-63 | expires, jiffies | tag of the connection | 0 |
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Word(pub u64);

/// Flags of a live connection, as bits of its [`Word`].
pub mod flag {
    /// Not counted among the active connections of its destination.
    pub const INACTIVE: u64 = 1 << 11;
    /// No packet of the server has been seen: state transitions are those of one direction only.
    pub const NO_OUTPUT: u64 = 1 << 12;
    /// The destination is reached at the service's port, not at the port of the destination's own record.
    pub const SERVICE_PORT: u64 = 1 << 13;
    /// No more than [`super::FEW`] packets of the client have come, as far as they have been counted: see [`super::Hint`].
    pub const FEW: u64 = 1 << 14;
    /// A template controls the connection: see [`super::control`].
    pub const CONTROLLED: u64 = 1 << 15;
}

/// Flags of a live template, as bits of its [`Word`].
pub mod template {
    /// A connection that it controls has been established, or answered.
    pub const ASSURED: u64 = 1 << 4;
    /// Its time was over while it controlled connections: from then on its timeout is [`RETRY_S`].
    pub const RETRIED: u64 = 1 << 5;
    /// It ends as soon as it controls no connection.
    pub const DOOMED: u64 = 1 << 6;
    /// Of a service whose packets are scheduled one by one.
    pub const ONE_PACKET: u64 = 1 << 7;

    /// How long a template stays whose time is over while it controls connections, in seconds.
    pub const RETRY_S: u32 = 60;
}

/// Packets of a client that are few to `drop_entry` (`docs/ipvs.md`, section 4.11).
pub const FEW: u32 = 8;

/// Values of [`Entry::control`].
///
/// For a connection: the number of its template's entry in the table, plus one. It counts if the connection's word has
/// [`flag::CONTROLLED`].
///
/// For a template: [`control::TEMPLATE`] and how many hold it, connections that it controls and packets that look at it. Who
/// wants to end it first makes that [`control::CLOSED`], which only succeeds when nobody holds it; from then on nobody else may. So a
/// template that is held stays what it is.
pub mod control {
    /// The bit that tells templates from connections.
    pub const TEMPLATE: u32 = 1 << 31;
    /// The template is being made, or being ended.
    pub const CLOSED: u32 = u32::MAX;

    /// How many hold a template with this value; `None` when it is closed, or none.
    #[inline(always)]
    pub const fn holders(control: u32) -> Option<u32> {
        if control & TEMPLATE == 0 || control == CLOSED { None } else { Some(control & !TEMPLATE) }
    }
}

const STATUS_MASK: u64 = 0b11;
const VERSION_SHIFT: u32 = 16;
const VERSION_MASK: u64 = 0xffff << VERSION_SHIFT;
const EXPIRES_SHIFT: u32 = 32;

impl Word {
    /// The entry's status.
    #[inline(always)]
    pub const fn status(self) -> Status {
        match self.0 & STATUS_MASK {
            0 => Status::Free,
            1 => Status::Busy,
            2 => Status::Killed,
            _ => Status::Live,
        }
    }

    /// Whether the entry is a connection.
    #[inline(always)]
    pub const fn is_live(self) -> bool {
        self.0 & STATUS_MASK == 3
    }

    /// The word after this one when the entry is claimed for the connection with this tag: the next version, BUSY.
    #[inline(always)]
    pub const fn claimed(self, tag: u32) -> Self {
        let version = (self.0 & VERSION_MASK).wrapping_add(1 << VERSION_SHIFT) & VERSION_MASK;
        Self(version | (tag as u64) << EXPIRES_SHIFT | 1)
    }

    /// The word after a BUSY one when another CPU takes the claim away.
    #[inline(always)]
    pub const fn killed(self) -> Self {
        Self(self.0 & !STATUS_MASK | 2)
    }

    /// The word of a new connection, but for its version; see [`Word::live`].
    ///
    /// `state` and `method` by their numbers, `flags` any of [`flag`].
    #[inline(always)]
    pub const fn born(protocol: Protocol, state: u8, method: u8, flags: u64, expires: Jiffies) -> Self {
        Self(
            Live::of(protocol).0
                | (state as u64 & 0xf) << 4
                | (method as u64 & 0x7) << 8
                | flags
                | (expires.0 as u64) << EXPIRES_SHIFT,
        )
    }

    /// [`Word::born`] in state number 0.
    #[inline(always)]
    pub const fn new_born(live: Live, method: u8, flags: u64, expires: Jiffies) -> Self {
        Self(live.0 | (method as u64 & 0x7) << 8 | flags | (expires.0 as u64) << EXPIRES_SHIFT)
    }

    /// The word of a new template, but for its version. `method` is its destination's; of `flags`, only
    /// [`flag::SERVICE_PORT`] and [`template::ONE_PACKET`] mean anything.
    #[inline(always)]
    pub const fn template(method: u8, flags: u64, expires: Jiffies) -> Self {
        Self(TEMPLATE_LIVE | (method as u64 & 0x7) << 8 | flags | flag::INACTIVE | (expires.0 as u64) << EXPIRES_SHIFT)
    }

    /// Whether a live entry is a template, and not a connection.
    #[inline(always)]
    pub const fn is_template(self) -> bool {
        self.0 & 0b1100 == 0b1100
    }

    /// The word after a BUSY one when the entry becomes the connection `born`.
    #[inline(always)]
    pub const fn live(self, born: Self) -> Self {
        Self(self.0 & VERSION_MASK | born.0)
    }

    /// The word after any other when the entry is given back.
    #[inline(always)]
    pub const fn freed(self) -> Self {
        Self(self.0 & VERSION_MASK)
    }

    /// Whether both words are of the same life of the entry.
    #[inline(always)]
    pub const fn same_life(self, other: Self) -> bool {
        (self.0 ^ other.0) & (VERSION_MASK | STATUS_MASK) == 0
    }

    /// The tag of the connection that a BUSY entry is being filled in for.
    #[inline(always)]
    pub const fn tag(self) -> u32 {
        (self.0 >> EXPIRES_SHIFT) as u32
    }

    /// When a live entry expires.
    #[inline(always)]
    pub const fn expires(self) -> Jiffies {
        Jiffies((self.0 >> EXPIRES_SHIFT) as u32)
    }

    /// The transport protocol of a live connection.
    #[inline(always)]
    pub const fn protocol(self) -> Protocol {
        match self.0 >> 2 & 0b11 {
            0 => Protocol::Tcp,
            2 => Protocol::Sctp,
            _ => Protocol::Udp,
        }
    }

    /// Where [`crate::abi::Config::timeouts`] has the time to live of a live entry: protocol and state, below 64.
    #[inline(always)]
    pub const fn timeout_index(self) -> usize {
        (self.0 >> 4 & 0xf | (self.0 & 0b1100) << 2) as usize
    }

    /// The number of a live entry's TCP or SCTP state.
    #[inline(always)]
    pub const fn state(self) -> u8 {
        (self.0 >> 4 & 0xf) as u8
    }

    /// The number of a live entry's forwarding method.
    #[inline(always)]
    pub const fn method(self) -> u8 {
        (self.0 >> 8 & 0x7) as u8
    }

    /// Whether all of `flags` are set.
    #[inline(always)]
    pub const fn has(self, flags: u64) -> bool {
        self.0 & flags == flags
    }

    /// The port a live entry's destination is reached at, of that of the destination and that of the service.
    #[inline(always)]
    pub const fn port(self, dest: Port, service: Port) -> Port {
        if self.has(flag::SERVICE_PORT) { service } else { dest }
    }

    /// This word in the state that `transition` leads to, counted accordingly.
    #[inline(always)]
    pub const fn moved(self, transition: Transition) -> Self {
        // Bit 7 of the transition is the flag INACTIVE, shifted like the state.
        const _: () = assert!(1 << 7 << 4 == flag::INACTIVE);
        Self(self.0 & !(0xf << 4 | flag::INACTIVE) | (transition.bits() as u64) << 4)
    }

    /// This word with `flags`.
    #[inline(always)]
    pub const fn with(self, flags: u64) -> Self {
        Self(self.0 | flags)
    }

    /// This word without `flags`.
    #[inline(always)]
    pub const fn without(self, flags: u64) -> Self {
        Self(self.0 & !flags)
    }

    /// This word with another expiry.
    #[inline(always)]
    pub const fn expiring(self, expires: Jiffies) -> Self {
        Self(self.0 & 0xffff_ffff | (expires.0 as u64) << EXPIRES_SHIFT)
    }

    /// How long `expires` may stay behind before a packet writes it, in ticks: one second. A connection lives that much
    /// longer than its word says, so that it never goes before its time.
    ///
    /// Returns whether a live connection is over at `now`.
    #[inline(always)]
    pub const fn expired(self, now: Jiffies, hz: u32) -> bool {
        now.reached(self.expires().after(hz))
    }

    /// The word of a live template at `now`, which controls connections if `held`; `None` when it is over.
    ///
    /// ip_vs looks at a template when its time is over, and again every [`template::RETRY_S`] seconds as long as it controls
    /// connections (`docs/ipvs.md`, section 4.10).
    #[inline(always)]
    pub const fn template_at(self, now: Jiffies, hz: u32, held: bool) -> Option<Self> {
        if !now.reached(self.expires()) {
            return Some(self);
        }
        if !held {
            return None;
        }
        let late = now.0.wrapping_sub(self.expires().0);
        let retry = template::RETRY_S * hz;
        let Some(turns) = late.checked_div(retry) else { return Some(self) };
        Some(self.with(template::RETRIED).expiring(self.expires().after((turns + 1) * retry)))
    }

    /// How long a live template stays from its next use on, in ticks, if it was made to stay for `timeout` ticks.
    #[inline(always)]
    pub const fn template_timeout(self, timeout: u32, hz: u32) -> u32 {
        if self.has(template::RETRIED) { template::RETRY_S * hz } else { timeout }
    }
}

/// What bits 0-3 of the word of a live template are.
const TEMPLATE_LIVE: u64 = 0b1111;

/// Which connections make room for others when both buckets of a new one are full, and in which order.
///
/// A connection that has been established is none of them, nor is a UDP one whose last packet is not long ago: whoever
/// floods the director with opening packets ends only connections that nobody has answered, and those that are over but
/// for a wait.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(u8)]
pub enum Yield {
    /// Never.
    Never = 0,
    /// First: TCP and SCTP connections that have not been established yet.
    HalfOpen = 1,
    /// Then: TCP and SCTP connections that were reset, or closed by both sides.
    Closed = 2,
    /// Then: TCP and SCTP connections that one side has closed, as far as the director sees.
    Closing = 3,
    /// Last: UDP connections of which no packet has been seen for long.
    Idle = 4,
}

/// When connections make room, by [`Word::timeout_index`]: their [`Yield`]s.
///
/// Verifier: a look-up, where it would follow the search for the first of them once for each protocol and each state.
static YIELDS: [u8; 64] = {
    let mut yields = [Yield::Never as u8; 64];
    let mut index = 0;
    while index < tcp::STATES {
        let state = State::ALL[index];
        yields[timeout::index(Protocol::Tcp, state as u8)] = Yield::of_tcp(state) as u8;
        index += 1;
    }
    index = 0;
    while index < sctp::STATES {
        let state = sctp::State::ALL[index];
        yields[timeout::index(Protocol::Sctp, state as u8)] = Yield::of_sctp(state) as u8;
        index += 1;
    }
    yields[timeout::index(Protocol::Udp, 0)] = Yield::Idle as u8;
    yields
};

impl Yield {
    const fn of_tcp(state: State) -> Self {
        match state {
            State::Established => Self::Never,
            State::None | State::SynSent | State::SynRecv | State::Listen | State::SynAck => Self::HalfOpen,
            State::TimeWait | State::Close | State::LastAck => Self::Closed,
            State::FinWait | State::CloseWait => Self::Closing,
        }
    }

    const fn of_sctp(state: sctp::State) -> Self {
        use sctp::State;
        match state {
            State::Established => Self::Never,
            State::None | State::Init1 | State::Init | State::CookieSent | State::CookieReplied => Self::HalfOpen,
            State::CookieWait | State::Cookie | State::CookieEchoed => Self::HalfOpen,
            State::Rejected | State::Closed => Self::Closed,
            State::ShutdownSent | State::ShutdownReceived | State::ShutdownAckSent => Self::Closing,
        }
    }
}

/// Which entry of a place is to be used for a new connection: the least one.
///
/// One word, for the verifier: the index of the entry in bits 0-7, counted on from the first bucket to the second; what is
/// left of the time of the connection, in ticks, in bits 8-39; when it makes room, a [`Yield`], in bits 40-47, 0 if the
/// entry is free or its connection is over.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Candidate(pub u64);

impl Candidate {
    /// There is none.
    pub const NONE: Self = Self(u64::MAX);

    /// An entry that nobody has to make room in.
    #[inline(always)]
    pub const fn unused(index: u64) -> Self {
        Self(index)
    }

    /// The entry with this index, which is used.
    #[inline(always)]
    pub fn used(index: u64, word: Word, now: Jiffies, hz: u32, idle: u32) -> Self {
        // Not over: so this is not negative, with the second that connections live longer.
        let left = word.expires().after(hz).since(now).cast_unsigned();
        let yields = YIELDS[opaque(word.timeout_index() as u64) as usize & 0x3f];
        let in_use = yields == Yield::Idle as u8 && left > idle;
        if yields == Yield::Never as u8 || in_use || !word.is_live() {
            return Self::NONE;
        }
        Self((yields as u64) << 40 | (left as u64) << 8 | index)
    }

    /// The entry with this index, which is a template that nobody holds. It makes room as soon as half-open connections do,
    /// if it is not assured or its time is over.
    #[inline(always)]
    pub const fn template(index: u64, word: Word, now: Jiffies) -> Self {
        let left = word.expires().since(now);
        let left = if left < 0 { 0 } else { left.cast_unsigned() };
        if word.has(template::ASSURED) && left != 0 {
            return Self::NONE;
        }
        Self((Yield::HalfOpen as u64) << 40 | (left as u64) << 8 | index)
    }

    /// The index of the entry.
    #[inline(always)]
    pub const fn index(self) -> u64 {
        self.0 & 0xff
    }

    /// Whether a connection has to make room.
    #[inline(always)]
    pub const fn evicts(self) -> bool {
        self.0 >> 40 != 0
    }
}

impl core::fmt::Debug for Word {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(
            f,
            "{:?} v{} state {} flags {:#x} expires {}",
            self.status(),
            (self.0 & VERSION_MASK) >> VERSION_SHIFT,
            self.state(),
            self.0 & 0xf800,
            self.expires().0
        )
    }
}

/// Who speaks to whom: what makes a packet of the client belong to a connection.
pub trait Key: Copy + PartialEq + core::fmt::Debug {
    /// The addresses of both.
    type Addr: Address;

    /// The connections of `protocol` from `caddr` to `vaddr`, with both ports as loaded from the client's packet at once.
    fn from_raw(protocol: impl Into<Live>, caddr: Self::Addr, ports: u32, vaddr: Self::Addr) -> Self;

    /// The connections of `protocol` between a client and a service.
    #[inline(always)]
    fn new(protocol: impl Into<Live>, client: (Self::Addr, Port), service: (Self::Addr, Port)) -> Self {
        Self::from_raw(protocol, client.0, client.1.raw() as u32 | (service.1.raw() as u32) << 16, service.0)
    }

    /// The template of `clients`, a network or one of them, at the port `vport` of `vaddr`, for the protocol with the number
    /// `protocol` of IP. One for a firewall mark has the protocol 0, port 0, and the mark for an address.
    fn template(protocol: u8, clients: Self::Addr, vaddr: Self::Addr, vport: Port) -> Self;

    /// The client's address.
    fn caddr(&self) -> Self::Addr;
    /// The service's address.
    fn vaddr(&self) -> Self::Addr;
    /// Both ports as in a packet of the client: the client's in the low half.
    fn ports(&self) -> u32;
    /// The transport protocol.
    fn protocol(&self) -> Protocol;

    /// The client's port.
    #[inline(always)]
    fn cport(&self) -> Port {
        Port::from_raw(self.ports() as u16)
    }

    /// The service's port.
    #[inline(always)]
    fn vport(&self) -> Port {
        Port::from_raw((self.ports() >> 16) as u16)
    }
}

/// Who speaks to whom by IPv4.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Key4 {
    /// Client address in bits 0-31, client port in bits 32-47, service port in bits 48-63, each as loaded from a packet.
    peer: u64,
    /// Service address as loaded from a packet in bits 0-31; in bits 32-35 what bits 0-3 of the word of such a connection
    /// are: its protocol, and that it is live.
    ///
    /// Verifier: two words are passed to a function in registers, three would need stack.
    rest: u64,
}

impl Key4 {
    /// What bits 0-3 of the word of such a connection are.
    #[inline(always)]
    const fn live(&self) -> u64 {
        self.rest >> 32
    }
}

impl Key for Key4 {
    type Addr = Ip4;

    #[inline(always)]
    fn template(protocol: u8, clients: Ip4, vaddr: Ip4, vport: Port) -> Self {
        let ports = protocol as u64 | (vport.raw() as u64) << 16;
        Self { peer: clients.raw() as u64 | ports << 32, rest: vaddr.raw() as u64 | TEMPLATE_LIVE << 32 }
    }

    #[inline(always)]
    fn from_raw(protocol: impl Into<Live>, caddr: Ip4, ports: u32, vaddr: Ip4) -> Self {
        let Live(live) = protocol.into();
        Self { peer: caddr.raw() as u64 | (ports as u64) << 32, rest: vaddr.raw() as u64 | live << 32 }
    }

    #[inline(always)]
    fn caddr(&self) -> Ip4 {
        Ip4::from_raw(self.peer as u32)
    }

    #[inline(always)]
    fn vaddr(&self) -> Ip4 {
        Ip4::from_raw(self.rest as u32)
    }

    #[inline(always)]
    fn ports(&self) -> u32 {
        (self.peer >> 32) as u32
    }

    #[inline(always)]
    fn protocol(&self) -> Protocol {
        Word(self.live()).protocol()
    }
}

/// Who speaks to whom by IPv6.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Key6 {
    caddr: Ip6,
    vaddr: Ip6,
    /// Both ports, the client's in bits 0-15, the service's in bits 16-31, as loaded from a packet; in bits 32-35 what bits
    /// 0-3 of the word of such a connection are.
    rest: u64,
}

impl Key6 {
    /// What bits 0-3 of the word of such a connection are.
    #[inline(always)]
    const fn live(&self) -> u64 {
        self.rest >> 32
    }
}

impl Key for Key6 {
    type Addr = Ip6;

    #[inline(always)]
    fn template(protocol: u8, clients: Ip6, vaddr: Ip6, vport: Port) -> Self {
        let ports = protocol as u64 | (vport.raw() as u64) << 16;
        Self { caddr: clients, vaddr, rest: ports | TEMPLATE_LIVE << 32 }
    }

    #[inline(always)]
    fn from_raw(protocol: impl Into<Live>, caddr: Ip6, ports: u32, vaddr: Ip6) -> Self {
        let Live(live) = protocol.into();
        Self { caddr, vaddr, rest: ports as u64 | live << 32 }
    }

    #[inline(always)]
    fn caddr(&self) -> Ip6 {
        self.caddr
    }

    #[inline(always)]
    fn vaddr(&self) -> Ip6 {
        self.vaddr
    }

    #[inline(always)]
    fn ports(&self) -> u32 {
        self.rest as u32
    }

    #[inline(always)]
    fn protocol(&self) -> Protocol {
        Word(self.live()).protocol()
    }
}

fn show<K: Key>(key: &K, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
    let (caddr, cport, vaddr, vport) = (key.caddr(), key.cport(), key.vaddr(), key.vport());
    write!(f, "{} {caddr:?} {cport:?} -> {vaddr:?} {vport:?}", key.protocol())
}

impl core::fmt::Debug for Key4 {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        show(self, f)
    }
}

impl core::fmt::Debug for Key6 {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        show(self, f)
    }
}

/// What bits 0-3 of the word of a live connection of a protocol are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Live(u64);

impl Live {
    /// Those of this protocol.
    #[inline(always)]
    pub const fn of(protocol: Protocol) -> Self {
        match protocol {
            Protocol::Tcp => Self(3),
            Protocol::Udp => Self(3 | 1 << 2),
            Protocol::Sctp => Self(3 | 2 << 2),
        }
    }

    /// [`Live::of`], found out without a branch: the verifier would follow all that comes after once for each protocol.
    #[inline(always)]
    pub const fn of_any(protocol: Protocol) -> Self {
        // Bits 4 and 7 of the number tell it.
        let number = protocol as u64;
        Self(3 | number >> 2 & 1 << 2 | number >> 4 & 1 << 3)
    }
}

impl From<Protocol> for Live {
    #[inline(always)]
    fn from(protocol: Protocol) -> Self {
        Self::of(protocol)
    }
}

/// What stands in place of the client's port of a template.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Purpose(u16);

/// The bit of [`Purpose`] that says that a template is retired.
const RETIRED: u16 = 1 << 8;

impl Purpose {
    /// What `key`, that of a template, says.
    #[inline(always)]
    pub fn of(key: &impl Key) -> Self {
        Self(key.cport().raw())
    }

    /// The number of the protocol that a template is for; 0 for all of a firewall mark.
    pub const fn protocol(self) -> u8 {
        self.0 as u8
    }

    /// Whether no client finds the template any more.
    pub const fn is_retired(self) -> bool {
        self.0 & RETIRED != 0
    }
}

/// An IPv4 connection: 32 bytes, two to a cache line.
#[derive(Zeroable)]
#[repr(C)]
pub struct Entry4 {
    /// See [`Word`].
    pub word: Shared64,
    /// Client address (bits 0-31), client port (32-47) and service port (48-63), each as loaded from a packet.
    peer: Shared64,
    /// Service address as loaded from a packet.
    vaddr: Shared32,
    /// Number of the destination.
    pub dest: Shared32,
    /// Where the client was last reached: a hint with the version it belongs to, see [`Hint`]. Of a template, how long it stays
    /// from each use on, in ticks.
    pub hint: Shared32,
    /// See [`control`].
    pub control: Shared32,
}

/// 1 when `value` is not 0, found out without a branch.
#[inline(always)]
pub fn nonzero(value: u64) -> u64 {
    opaque(value | value.wrapping_neg()) >> 63
}

impl Entry4 {
    /// What [`Key4::rest`] is for this connection, with `word` as its word.
    #[inline(always)]
    fn rest(&self, word: Word) -> u64 {
        u64::from(self.vaddr.load()) | (word.0 & 0xf) << 32
    }
}

/// An IPv6 connection: a cache line.
#[derive(Zeroable)]
#[repr(C)]
pub struct Entry6 {
    /// See [`Word`].
    pub word: Shared64,
    /// Client address as loaded from a packet.
    caddr: [Shared64; 2],
    /// Client port (bits 0-15) and service port (16-31), each as loaded from a packet.
    ports: Shared32,
    /// Number of the destination.
    pub dest: Shared32,
    /// Service address as loaded from a packet.
    vaddr: [Shared64; 2],
    /// Where the client was last reached: see [`Hint`]. Of a template, how long it stays from each use on, in ticks.
    pub hint: Shared32,
    /// See [`control`].
    pub control: Shared32,
    reserved: [Shared32; 2],
}

impl Entry6 {
    #[inline(always)]
    fn caddr(&self) -> Ip6 {
        Ip6::from_raw([self.caddr[0].load(), self.caddr[1].load()])
    }

    #[inline(always)]
    fn vaddr(&self) -> Ip6 {
        Ip6::from_raw([self.vaddr[0].load(), self.vaddr[1].load()])
    }
}

/// 0 when both are the same address.
#[inline(always)]
const fn difference6(a: Ip6, b: Ip6) -> u64 {
    let ([a, b], [c, d]) = (a.raw(), b.raw());
    (a ^ c) | (b ^ d)
}

/// Entries in a bucket.
pub const ENTRIES_PER_BUCKET: usize = 10;
/// Pairs of entries in a bucket. An IPv4 pair is a cache line, an IPv6 pair is two.
pub const PAIRS: usize = ENTRIES_PER_BUCKET / 2;

/// A bucket of a flow table. An IPv4 bucket is five cache lines, an IPv6 bucket is ten.
#[derive(Zeroable)]
#[repr(C)]
pub struct Bucket<E> {
    /// The entries in pairs, searched from the pair that the hash names.
    pub pairs: [[E; 2]; PAIRS],
}

impl<E: Zeroable> Bucket<E> {
    /// The entry with this index, below [`ENTRIES_PER_BUCKET`].
    #[inline(always)]
    pub fn entry(&self, index: u64) -> Option<&E> {
        self.pairs.as_flattened().get(opaque(index) as usize)
    }

    /// Every entry.
    #[inline(always)]
    pub fn entries(&self) -> &[E] {
        self.pairs.as_flattened()
    }
}

/// A bucket of the IPv4 flow table.
pub type Bucket4 = Bucket<Entry4>;

/// A bucket of the IPv6 flow table.
pub type Bucket6 = Bucket<Entry6>;

const _: () = assert!(size_of::<Entry4>() == 32 && size_of::<Bucket4>() == 320);
const _: () = assert!(size_of::<Entry6>() == 64 && size_of::<Bucket6>() == 640);

/// A flow-table entry of some address family.
pub trait Entry: Zeroable + 'static {
    /// The addresses of its ends.
    type Addr: Address<Entry = Self>;
    /// What tells connections apart.
    type Key: Key<Addr = Self::Addr>;

    /// The state word.
    fn word(&self) -> &Shared64;
    /// The number of the destination.
    fn dest(&self) -> &Shared32;
    /// The client's next-hop hint; of a template, its timeout in ticks.
    fn hint(&self) -> &Shared32;
    /// Who controls the connection, or how many hold the template: see [`control`].
    fn control(&self) -> &Shared32;
    /// Makes a template one that no client's packet finds, nor takes for its own. Only who holds it may call this.
    fn retire(&self);
    /// 0 when this is the connection `key`, with `word` as its word, and anything else when it is not.
    fn difference(&self, key: &Self::Key, word: Word) -> u64;
    /// Whether this is the connection `key`, with `word` as its word.
    #[inline(always)]
    fn is(&self, key: &Self::Key, word: Word) -> bool {
        self.difference(key, word) == 0
    }
    /// 0 when this may well be the connection `key`, 1 when it is another.
    ///
    /// Found out without a branch, which the processor would guess wrong half the time: which of two entries a
    /// connection has is as good as random.
    fn is_other(&self, key: &Self::Key) -> usize;
    /// 0 when this may well be a connection with the client address and client port of `key`, 1 when it is another.
    fn is_of_other_client(&self, key: &Self::Key) -> usize;
    /// Whether this is a connection with the protocol, client address and client port of `key`.
    fn is_of_client(&self, key: &Self::Key, word: Word) -> bool;
    /// Whether a masqueraded connection of the protocol of `server`, with `word` as its word and to the service port `vport`,
    /// to `dest` is to the server at this endpoint.
    #[inline(always)]
    fn is_served_by(vport: Port, word: Word, dest: &Dest, server: Endpoint<Self>) -> bool {
        let endpoint = server.elsewhere(dest.addr(), word.port(dest.port(), vport));
        word.method() == Method::Masq as u8 && endpoint.is(&server)
    }
    /// Writes addresses and ports, the number of the destination, and [`Entry::control`]. Only the CPU that has claimed the
    /// entry may call this.
    fn fill(&self, key: &Self::Key, dest: u32, control: u32);
    /// Addresses and ports as they stand, with the protocol of `word`.
    fn key(&self, word: Word) -> Self::Key;
    /// Hashes what both sides of a connection have in common.
    fn hash(key: &Self::Key, seed: &Seed) -> u64;
    /// Where the template with this key may stand: by all of it, or those of one client for many services would all stand in the
    /// same two buckets.
    #[inline(always)]
    fn template_place(key: &Self::Key, seed: &Seed) -> Place {
        let service = u64::from(key.vaddr().number()) | u64::from(key.vport().raw()) << 32;
        Place::of(seed.hash(Self::hash(key, seed) ^ service))
    }
    /// A number that tells the connections with one hash apart, nearly always.
    fn tag(key: &Self::Key, hash: u64) -> u32;
    /// Hashes all of a connection without a secret: alike on every director.
    fn common_hash(key: &Self::Key) -> u64;
}

/// An address, port and protocol of the family of an entry.
pub type Endpoint<E> = <<E as Entry>::Addr as Address>::Endpoint;

impl Entry for Entry4 {
    type Addr = Ip4;
    type Key = Key4;

    #[inline(always)]
    fn word(&self) -> &Shared64 {
        &self.word
    }

    #[inline(always)]
    fn dest(&self) -> &Shared32 {
        &self.dest
    }

    #[inline(always)]
    fn hint(&self) -> &Shared32 {
        &self.hint
    }

    #[inline(always)]
    fn difference(&self, key: &Key4, word: Word) -> u64 {
        (self.peer.load() ^ key.peer) | (self.rest(word) ^ key.rest)
    }

    #[inline(always)]
    fn is_other(&self, key: &Key4) -> usize {
        nonzero(self.peer.load() ^ key.peer) as usize
    }

    #[inline(always)]
    fn is_of_other_client(&self, key: &Key4) -> usize {
        nonzero((self.peer.load() ^ key.peer) << 16) as usize
    }

    #[inline(always)]
    fn is_of_client(&self, key: &Key4, word: Word) -> bool {
        (self.peer.load() ^ key.peer) << 16 == 0 && word.0 & 0xf == key.live()
    }

    #[inline(always)]
    fn control(&self) -> &Shared32 {
        &self.control
    }

    #[inline(always)]
    fn retire(&self) {
        self.peer.store(self.peer.load() | u64::from(RETIRED) << 32);
    }

    #[inline(always)]
    fn fill(&self, key: &Key4, dest: u32, control: u32) {
        self.peer.store(key.peer);
        self.vaddr.store(key.rest as u32);
        self.dest.store(dest);
        self.hint.store(0);
        self.control.store(control);
    }

    #[inline(always)]
    fn key(&self, word: Word) -> Key4 {
        Key4 { peer: self.peer.load(), rest: self.rest(word) }
    }

    #[inline(always)]
    fn hash(key: &Key4, seed: &Seed) -> u64 {
        seed.hash(key.peer & 0xffff_ffff_ffff | key.live() << 48)
    }

    #[inline(always)]
    fn tag(key: &Key4, hash: u64) -> u32 {
        (hash >> 16) as u32 ^ key.rest as u32 ^ (key.peer >> 48) as u32
    }

    #[inline(always)]
    fn common_hash(key: &Key4) -> u64 {
        mix(mix(key.peer) ^ key.rest)
    }
}

impl Entry for Entry6 {
    type Addr = Ip6;
    type Key = Key6;

    #[inline(always)]
    fn word(&self) -> &Shared64 {
        &self.word
    }

    #[inline(always)]
    fn dest(&self) -> &Shared32 {
        &self.dest
    }

    #[inline(always)]
    fn hint(&self) -> &Shared32 {
        &self.hint
    }

    #[inline(always)]
    fn difference(&self, key: &Key6, word: Word) -> u64 {
        let rest = u64::from(self.ports.load()) | (word.0 & 0xf) << 32;
        difference6(self.caddr(), key.caddr) | difference6(self.vaddr(), key.vaddr) | (rest ^ key.rest)
    }

    #[inline(always)]
    fn is_other(&self, key: &Key6) -> usize {
        nonzero((self.caddr[1].load() ^ key.caddr.raw()[1]) | u64::from(self.ports.load() ^ key.ports())) as usize
    }

    #[inline(always)]
    fn is_of_other_client(&self, key: &Key6) -> usize {
        let ports = u64::from((self.ports.load() ^ key.ports()) & 0xffff);
        nonzero((self.caddr[1].load() ^ key.caddr.raw()[1]) | ports) as usize
    }

    #[inline(always)]
    fn is_of_client(&self, key: &Key6, word: Word) -> bool {
        let ports = u64::from((self.ports.load() ^ key.ports()) & 0xffff);
        difference6(self.caddr(), key.caddr) | ports == 0 && word.0 & 0xf == key.live()
    }

    #[inline(always)]
    fn control(&self) -> &Shared32 {
        &self.control
    }

    #[inline(always)]
    fn retire(&self) {
        self.ports.store(self.ports.load() | u32::from(RETIRED));
    }

    #[inline(always)]
    fn fill(&self, key: &Key6, dest: u32, control: u32) {
        for (word, value) in self.caddr.iter().zip(key.caddr.raw()) {
            word.store(value);
        }
        for (word, value) in self.vaddr.iter().zip(key.vaddr.raw()) {
            word.store(value);
        }
        self.ports.store(key.ports());
        self.dest.store(dest);
        self.hint.store(0);
        self.control.store(control);
    }

    #[inline(always)]
    fn key(&self, word: Word) -> Key6 {
        Key6 { caddr: self.caddr(), vaddr: self.vaddr(), rest: u64::from(self.ports.load()) | (word.0 & 0xf) << 32 }
    }

    #[inline(always)]
    fn hash(key: &Key6, seed: &Seed) -> u64 {
        let [high, low] = key.caddr.raw();
        // One round for each word: whoever chooses the words can then no more make two of them cancel out than guess the seed.
        let network = seed.hash(high);
        let client = seed.hash(network ^ low);
        seed.hash(client ^ u64::from(key.cport().raw()) ^ key.live() << 48)
    }

    #[inline(always)]
    fn tag(key: &Key6, hash: u64) -> u32 {
        let [high, low] = key.vaddr.raw();
        let vaddr = high ^ low.rotate_left(17);
        (hash >> 16) as u32 ^ (vaddr >> 32) as u32 ^ vaddr as u32 ^ u32::from(key.vport().raw())
    }

    #[inline(always)]
    fn common_hash(key: &Key6) -> u64 {
        let ([a, b], [c, d]) = (key.caddr.raw(), key.vaddr.raw());
        mix(mix(mix(mix(mix(a) ^ b) ^ c) ^ d) ^ key.rest)
    }
}

/// Where a connection may stand in a table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    hash: u64,
}

impl Place {
    /// The place of a connection with this hash.
    #[inline(always)]
    pub const fn of(hash: u64) -> Self {
        Self { hash }
    }

    /// The hash.
    #[inline(always)]
    pub const fn hash(self) -> u64 {
        self.hash
    }

    /// The bucket searched first, in a table of `buckets` buckets.
    #[inline(always)]
    pub const fn first(self, buckets: u32) -> u32 {
        scale(self.hash as u32, buckets)
    }

    /// The bucket searched next, never the first, in a table of `buckets` buckets, an even number.
    #[inline(always)]
    pub const fn second(self, buckets: u32) -> u32 {
        let (first, second) = (self.first(buckets), scale((self.hash >> 32) as u32, buckets));
        // An even number of buckets: the neighbour of the last one exists.
        if second == first { first ^ 1 } else { second }
    }

    /// The index of the pair at which the search of a bucket begins.
    #[inline(always)]
    pub const fn start(self) -> u64 {
        // The lowest ten bits of the hash, scaled to the number of pairs. What tells the buckets of a table apart are the
        // highest bits of either half, so the two are independent up to four million buckets.
        ((self.hash & 0x3ff) * PAIRS as u64) >> 10
    }
}

/// A hint kept beside a connection: 16 bits that count only for the life of the entry they were written in. Twelve are the number
/// of the next hop to the client, or 0; the others how many packets of the client have been counted, as long as those are few.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Hint(u32);

const NEXT_HOP: u32 = ADJACENCIES - 1;
const COUNTED_SHIFT: u32 = ADJACENCIES.ilog2();
const _: () = assert!(NEXT_HOP + (FEW << COUNTED_SHIFT) < 1 << 16);

impl Hint {
    /// What was stored as `raw`, with another number of the next hop, for the life of the entry with this word.
    #[inline(always)]
    pub const fn with_next_hop(raw: u32, word: Word, number: u16) -> Self {
        Self((word.0 & VERSION_MASK) as u32 | Self::counted(raw, word) << COUNTED_SHIFT | number as u32 & NEXT_HOP)
    }

    /// What was stored as `raw`, with another number of packets, at most [`FEW`], for the life of the entry with this word.
    #[inline(always)]
    pub const fn with_counted(raw: u32, word: Word, packets: u32) -> Self {
        Self((word.0 & VERSION_MASK) as u32 | packets << COUNTED_SHIFT | Self::next_hop(raw, word) as u32)
    }

    /// The hint as stored.
    #[inline(always)]
    pub const fn raw(self) -> u32 {
        self.0
    }

    /// The bits of the stored hint `raw`, or 0 when it was written in another life of the entry.
    #[inline(always)]
    const fn value(raw: u32, word: Word) -> u32 {
        if (raw as u64 ^ word.0) & VERSION_MASK == 0 { raw & 0xffff } else { 0 }
    }

    /// The number of the next hop, or 0.
    #[inline(always)]
    pub const fn next_hop(raw: u32, word: Word) -> u16 {
        (Self::value(raw, word) & NEXT_HOP) as u16
    }

    /// How many packets of the client have been counted since the one that opened the connection.
    #[inline(always)]
    pub const fn counted(raw: u32, word: Word) -> u32 {
        Self::value(raw, word) >> COUNTED_SHIFT
    }

    /// How many packets have come for the connection with this word, whose hint is stored as `raw`, if those are counted and few.
    #[inline(always)]
    pub const fn packets(raw: u32, word: Word) -> Option<u32> {
        if !word.has(flag::FEW) {
            return None;
        }
        Some(Self::counted(raw, word) + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tcp::{self, Direction};

    const BIRTH: Word = Word::born(Protocol::Udp, 3, 3, flag::INACTIVE, Jiffies(0xdead_beef));

    #[test]
    fn a_word_keeps_its_fields_apart() {
        let word = Word(0).claimed(0xffff_ffff).live(BIRTH);
        assert!(word.is_live());
        assert_eq!(word.protocol(), Protocol::Udp);
        for (protocol, bits) in [(Protocol::Tcp, 0), (Protocol::Udp, 1), (Protocol::Sctp, 2)] {
            let word = Word::born(protocol, 1, 0, 0, Jiffies(0));
            assert_eq!((word.protocol(), word.timeout_index()), (protocol, bits << 4 | 1));
            assert_eq!(Live::of_any(protocol), Live::of(protocol));
        }
        assert_eq!((word.state(), word.method()), (3, 3));
        assert!(word.has(flag::INACTIVE) && !word.has(flag::NO_OUTPUT));
        assert_eq!(word.expires(), Jiffies(0xdead_beef));

        // From TIME_WAIT, say: a SYN of the client opens it again.
        let moved = word.moved(Transition::of(0, 5, tcp::flag::SYN, Direction::Input)).expiring(Jiffies(7));
        assert_eq!((moved.state(), moved.method(), moved.expires()), (3, 3, Jiffies(7)));
        assert!(!moved.has(flag::INACTIVE));
        let moved = moved.moved(Transition::of(0, 3, tcp::flag::FIN, Direction::Input));
        assert_eq!(moved.state(), 5);
        assert!(moved.has(flag::INACTIVE) && moved.same_life(word));
        assert_eq!(moved.timeout_index(), 16 + 5);
    }

    #[test]
    fn every_claim_is_a_new_life() {
        let mut word = Word(0);
        for _ in 0..0x1_0001 {
            let live = word.claimed(1).live(BIRTH);
            assert!(!live.same_life(word.claimed(1)));
            let next = live.freed().claimed(1).live(BIRTH);
            assert!(!next.same_life(live));
            word = live.freed();
            assert_eq!(word.status(), Status::Free);
        }
    }

    #[test]
    fn a_claim_shows_its_tag_until_it_is_published() {
        let busy = Word(0).claimed(0x1234_5678);
        assert_eq!((busy.status(), busy.tag()), (Status::Busy, 0x1234_5678));
        assert_eq!((busy.killed().status(), busy.killed().tag()), (Status::Killed, 0x1234_5678));
        assert!(!busy.killed().same_life(busy));
    }

    #[test]
    fn a_connection_lives_one_second_longer_than_written() {
        let word = Word(0).claimed(1).live(BIRTH.expiring(Jiffies(1000)));
        assert!(!word.expired(Jiffies(1249), 250));
        assert!(word.expired(Jiffies(1250), 250));
    }

    const NOW: Jiffies = Jiffies(u32::MAX - 5);
    const IDLE: u32 = 1000;

    fn candidate(protocol: Protocol, state: u8, left: u32) -> Candidate {
        let word = Word(0).claimed(1).live(Word::born(protocol, state, 1, 0, NOW.after(left)));
        Candidate::used(7, word, NOW, 250, IDLE)
    }

    #[test]
    fn connections_make_room_in_their_order() {
        use State::*;
        let tcp = |state: State, left| candidate(Protocol::Tcp, state as u8, left);
        assert_eq!(tcp(Established, 0), Candidate::NONE);
        let classes =
            [&[None, SynSent, SynRecv, Listen, SynAck][..], &[TimeWait, Close, LastAck], &[FinWait, CloseWait]];
        // What is left of its time counts only among connections of one class.
        for (earlier, later) in classes.iter().zip(&classes[1..]) {
            for (earlier, later) in earlier.iter().flat_map(|&state| later.iter().map(move |&other| (state, other))) {
                assert!(tcp(earlier, 1 << 20) < tcp(later, 0), "{earlier:?} before {later:?}");
            }
        }
        for state in classes.concat() {
            assert!(tcp(state, 0) < tcp(state, 1) && tcp(state, 1 << 20) < Candidate::NONE);
            assert!(tcp(state, 5).evicts() && Candidate::unused(19) < tcp(state, 0));
            assert_eq!(tcp(state, 5).index(), 7);
        }
        // A number that is no state is nobody's to end.
        assert_eq!(candidate(Protocol::Tcp, 11, 0), Candidate::NONE);
    }

    #[test]
    fn udp_connections_make_room_when_they_have_been_idle_for_long() {
        let udp = |left| candidate(Protocol::Udp, 0, left);
        // Written down is a second less.
        assert_eq!(udp(IDLE - 249), Candidate::NONE);
        assert!(udp(IDLE - 250).evicts());
        assert!(udp(0) < udp(1) && udp(0) > candidate(Protocol::Tcp, State::CloseWait as u8, 1 << 20));
    }

    #[test]
    fn an_entry_that_is_being_filled_in_makes_no_room() {
        for word in [Word(0).claimed(0), Word(0).claimed(0).killed()] {
            assert_eq!(Candidate::used(0, word, NOW, 250, u32::MAX), Candidate::NONE);
        }
    }

    #[test]
    fn a_template_is_looked_at_again_every_minute_while_it_controls_connections() {
        let made = Jiffies(u32::MAX - 100);
        let word = Word(0).claimed(1).live(Word::template(3, flag::SERVICE_PORT, made.after(1250)));
        assert!(word.is_template() && word.is_live() && word.has(flag::SERVICE_PORT) && word.method() == 3);
        assert!(!Word(0).claimed(1).live(BIRTH).is_template());
        let at = |word: Word, ticks, held| word.template_at(made.after(ticks), 250, held);
        assert_eq!(at(word, 1249, false), Some(word));
        assert_eq!((at(word, 1250, false), word.template_timeout(1250, 250)), (None, 1250));
        for (ticks, expires) in [(1250, 16_250), (16_249, 16_250), (16_250, 31_250), (160_000, 166_250)] {
            let again = at(word, ticks, true).expect("held");
            assert_eq!(again.expires(), made.after(expires), "after {ticks} ticks");
            assert!(again.same_life(word) && again.template_timeout(1250, 250) == 15_000);
        }
    }

    #[test]
    fn a_template_is_found_by_its_key_until_it_is_retired() {
        let key = Key4::template(Protocol::Tcp as u8, CLIENT.0, SERVICE.0, SERVICE.1);
        let entry = Entry4::zeroed();
        entry.fill(&key, 17, control::CLOSED);
        let word = Word(0).claimed(1).live(Word::template(3, 0, Jiffies(0)));
        assert!(entry.is(&key, word) && entry.key(word) == key);
        assert_eq!(entry.control.load(), control::CLOSED);
        // Neither the connection of a client at the port with that number, nor the template of another protocol.
        assert!(!entry.is(&Key4::new(Protocol::Tcp, (CLIENT.0, Port::from_raw(6)), SERVICE), word));
        assert!(!entry.is(&Key4::template(Protocol::Udp as u8, CLIENT.0, SERVICE.0, SERVICE.1), word));
        assert_eq!((Purpose::of(&key).protocol(), Purpose::of(&key).is_retired()), (Protocol::Tcp as u8, false));
        entry.retire();
        let purpose = Purpose::of(&entry.key(word));
        assert!(!entry.is(&key, word) && purpose.is_retired() && purpose.protocol() == Protocol::Tcp as u8);
    }

    #[test]
    fn templates_make_room_until_they_are_assured() {
        let at = |flags, left| Candidate::template(7, Word::template(3, 0, NOW.after(left)).with(flags), NOW);
        assert!(at(0, 5).evicts() && at(0, 5) < at(0, 6) && at(0, 5).index() == 7);
        assert_eq!(at(template::ASSURED, 5), Candidate::NONE);
        assert!(at(template::ASSURED, 0).evicts());
        assert_eq!(control::holders(control::TEMPLATE | 3), Some(3));
        assert_eq!((control::holders(control::CLOSED), control::holders(4)), (None, None));
    }

    const CLIENT: (Ip4, Port) = (Ip4::new([198, 51, 100, 7]), Port::new(54_321));
    const SERVICE: (Ip4, Port) = (Ip4::new([203, 0, 113, 1]), Port::new(443));

    #[test]
    fn an_entry_returns_the_key_it_was_filled_with() {
        let entry = Entry4::zeroed();
        let key = Key4::new(Protocol::Udp, CLIENT, SERVICE);
        entry.fill(&key, 17, 0);
        let word = Word(0).claimed(1).live(BIRTH);
        assert_eq!(entry.key(word), key);
        assert_eq!((key.caddr(), key.cport(), key.vaddr(), key.vport()), (CLIENT.0, CLIENT.1, SERVICE.0, SERVICE.1));
        assert!(entry.is(&key, word) && entry.is_of_client(&key, word));
        assert!(!entry.is(&key, word.freed()));
        for other in [
            Key4::new(Protocol::Tcp, CLIENT, SERVICE),
            Key4::new(Protocol::Udp, (Ip4::new([198, 51, 100, 8]), CLIENT.1), SERVICE),
            Key4::new(Protocol::Udp, (CLIENT.0, Port::new(1)), SERVICE),
            Key4::new(Protocol::Udp, CLIENT, (Ip4::new([203, 0, 113, 2]), SERVICE.1)),
            Key4::new(Protocol::Udp, CLIENT, (SERVICE.0, Port::new(80))),
        ] {
            assert!(!entry.is(&other, word));
        }
        let elsewhere = (Ip4::new([1, 2, 3, 4]), Port::new(80));
        assert!(entry.is_of_client(&Key4::new(Protocol::Udp, CLIENT, elsewhere), word));
        assert!(!entry.is_of_client(&Key4::new(Protocol::Udp, (CLIENT.0, Port::new(1)), SERVICE), word));
    }

    #[test]
    fn both_sides_of_a_connection_hash_alike() {
        let seed = Seed::new([1, 2, 3]);
        let hash = |key: Key4| Entry4::hash(&key, &seed);
        let key = Key4::new(Protocol::Tcp, CLIENT, SERVICE);
        let server = (Ip4::new([10, 0, 0, 5]), Port::new(8080));
        assert_eq!(hash(key), hash(Key4::new(Protocol::Tcp, CLIENT, server)));
        assert_ne!(hash(key), hash(Key4::new(Protocol::Udp, CLIENT, SERVICE)));
        for other in [
            Key4::new(Protocol::Udp, CLIENT, SERVICE),
            Key4::new(Protocol::Tcp, CLIENT, server),
            Key4::new(Protocol::Tcp, CLIENT, (SERVICE.0, Port::new(8443))),
            Key4::new(Protocol::Tcp, (CLIENT.0, Port::new(1)), SERVICE),
        ] {
            assert_ne!(Entry4::common_hash(&key), Entry4::common_hash(&other));
        }
        assert_ne!(Entry4::tag(&key, 0), Entry4::tag(&Key4::new(Protocol::Tcp, CLIENT, server), 0));
    }

    #[test]
    fn the_two_buckets_differ_and_exist() {
        for buckets in [2, 4, 1022] {
            for i in 0..10_000u64 {
                let place = Place::of(i.wrapping_mul(0x9e37_79b9_7f4a_7c15));
                let (first, second) = (place.first(buckets), place.second(buckets));
                assert!(first < buckets && second < buckets && first != second);
                assert!((place.start() as usize) < PAIRS);
            }
        }
    }

    /// A bucket's connections begin at all its pairs alike, or most would stand beside the first pair that is searched.
    #[test]
    fn the_connections_of_a_bucket_begin_at_all_its_pairs() {
        const BUCKETS: u32 = 21_846;
        let seed = Seed::new([0x243f_6a88_85a3_08d3, 0x1319_8a2e_0370_7344, 0xa409_3822_299f_31d0]);
        let mut in_pair = vec![[0u32; PAIRS]; BUCKETS as usize];
        for number in 0..3 * BUCKETS {
            let client =
                (Ip4::new((0x0a01_0001 + (number >> 6)).to_be_bytes()), Port::new(1024 + ((number & 63) << 4) as u16));
            let place = Place::of(Entry4::hash(&Key4::new(Protocol::Tcp, client, SERVICE), &seed));
            in_pair[place.first(BUCKETS) as usize][place.start() as usize] += 1;
        }
        // With three connections to a bucket and 0.6 to a pair, one in twenty-two finds its pair full by chance.
        let crowded: u32 = in_pair.as_flattened().iter().map(|connections| connections.saturating_sub(2)).sum();
        assert!(crowded < 3 * BUCKETS / 20, "{crowded} of {} find their pair full", 3 * BUCKETS);
    }

    #[test]
    fn a_hint_of_an_earlier_life_does_not_count() {
        let word = Word(0).claimed(1).live(BIRTH);
        let next = word.freed().claimed(1).live(BIRTH.with(flag::FEW));
        let hint = Hint::with_next_hop(0, word, 42).raw();
        assert_eq!((Hint::next_hop(hint, word), Hint::counted(hint, word)), (42, 0));
        let hint = Hint::with_counted(hint, word, FEW).raw();
        assert_eq!((Hint::next_hop(hint, word), Hint::counted(hint, word)), (42, FEW));
        let hint = Hint::with_next_hop(hint, word, 4095).raw();
        assert_eq!((Hint::next_hop(hint, word), Hint::counted(hint, word)), (4095, FEW));
        assert_eq!((Hint::next_hop(hint, next), Hint::counted(hint, next)), (0, 0));
        assert_eq!((Hint::next_hop(0, word), Hint::packets(hint, word), Hint::packets(hint, next)), (0, None, Some(1)));
        let hint = Hint::with_counted(hint, next, 3).raw();
        assert_eq!((Hint::next_hop(hint, next), Hint::packets(hint, next)), (0, Some(4)));
    }
}
