//! The way out: next hops and what is kept of them, link-layer addresses, and the verdict.

use core::hint::cold_path;

use lb_common::{
    abi::{ADJACENCIES, Adjacency, Config, Dest, DestCpu, DestLoad, NextHop, PathMtu, Stage, hop, switch},
    addr::{Address, Ip4},
    flow::{Entry, Hint},
    reason::Reason,
};

use crate::{
    env::{Clock, Env, HandOver},
    flow_table::Found,
    icmp::Complaint,
    packet::Packet,
    tables::Tables,
};

/// Why a packet is not forwarded, and what its sender is told: an ICMP error or nothing. Or that its path goes on in
/// another stage.
///
/// Verifier: one word, for the compiler may copy the unset part of an enum, which the verifier takes for a read of
/// uninitialised memory. `Result<Exit, Halt>` has none. Reason number in bits 0-7, complaint in bits 8-39, stage number
/// plus one in bits 40-47.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Halt(u64);

impl Halt {
    /// Nobody is told.
    #[inline(always)]
    pub const fn silent(reason: Reason) -> Self {
        cold_path();
        Self(reason as u64)
    }

    /// The sender is told.
    #[inline(always)]
    pub const fn tell(reason: Reason, complaint: Complaint) -> Self {
        Self(reason as u64 | complaint.bits() << 8)
    }

    /// The path goes on.
    #[inline(always)]
    pub const fn go_on(stage: Stage) -> Self {
        cold_path();
        Self((stage as u64 + 1) << 40)
    }

    /// Where the path goes on, if it does.
    #[inline(always)]
    pub const fn stage(self) -> Option<Stage> {
        match (self.0 >> 40) as u8 {
            1 => Some(Stage::Request),
            2 => Some(Stage::Reply),
            3 => Some(Stage::Observe),
            4 => Some(Stage::Icmp),
            5 => Some(Stage::Unusual),
            6 => Some(Stage::Open),
            7 => Some(Stage::Overflow),
            8 => Some(Stage::Six),
            9 => Some(Stage::Mark),
            10 => Some(Stage::Persist),
            11 => Some(Stage::PersistOverflow),
            12 => Some(Stage::PersistAlike),
            13 => Some(Stage::Astray),
            14 => Some(Stage::Related),
            15 => Some(Stage::RelatedOpen),
            16 => Some(Stage::Opened),
            17 => Some(Stage::Sctp),
            _ => None,
        }
    }

    /// The number of the reason.
    #[inline(always)]
    pub const fn reason(self) -> u8 {
        self.0 as u8
    }

    /// What the sender is to be told, if anything.
    #[inline(always)]
    pub const fn complaint(self) -> Option<Complaint> {
        Complaint::from_bits(self.0 >> 8 & 0xffff_ffff)
    }
}

impl From<Reason> for Halt {
    #[inline(always)]
    fn from(reason: Reason) -> Self {
        Self::silent(reason)
    }
}

/// How a packet leaves the pipeline, and under which reason it counts if it is not forwarded.
///
/// One word, for the same reason as [`Halt`]: the XDP action in bits 0-7, reason number plus one in bits 8-15, interface
/// in bits 32-62.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Exit(u64);

/// The ways of an [`Exit`]; the values are those of XDP's actions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Leave {
    /// Nowhere.
    Drop = 1,
    /// Up into the host's own stack, as it now stands.
    Host = 2,
    /// Out of the interface it came in by.
    Transmit = 3,
    /// Out of the interface with this index.
    Redirect(u32) = 4,
}

const DROP: u64 = 1;
const HOST: u64 = 2;
const TRANSMIT: u64 = 3;
const REDIRECT: u64 = 4;

impl Exit {
    /// Out of the interface it came in by.
    pub const TRANSMIT: Self = Self(TRANSMIT);

    /// Out of the interface with this index, below 2^31 as every index is.
    #[inline(always)]
    pub const fn redirect(ifindex: u32) -> Self {
        Self(REDIRECT | (ifindex as u64 & 0x7fff_ffff) << 32)
    }

    /// Up into the host's own stack, for this reason.
    #[inline(always)]
    pub const fn host(reason: Reason) -> Self {
        Self(HOST | (reason as u64 + 1) << 8)
    }

    /// Wherever the reason with this number sends a packet.
    #[inline(always)]
    pub const fn stop(reason: u8) -> Self {
        let way = if Reason::passes(reason) { HOST } else { DROP };
        Self(way | (reason as u64 + 1) << 8)
    }

    /// This exit, for an answer to a packet that is itself not forwarded for the reason with this number.
    #[inline(always)]
    pub const fn instead_of(self, reason: u8) -> Self {
        Self(self.0 & !0xff00 | (reason as u64 + 1) << 8)
    }

    /// The exit as a word, with bit 63 clear.
    #[inline(always)]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// The exit with these bits.
    #[inline(always)]
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The XDP action, but for the interface of a redirect.
    #[inline(always)]
    pub const fn action(self) -> u32 {
        self.0 as u32 & 0xff
    }

    /// The interface of a redirect.
    #[inline(always)]
    pub const fn interface(self) -> Option<u32> {
        if self.action() == REDIRECT as u32 { Some((self.0 >> 32) as u32) } else { None }
    }

    /// Where to.
    pub const fn leave(self) -> Leave {
        match self.0 & 0xff {
            DROP => Leave::Drop,
            HOST => Leave::Host,
            TRANSMIT => Leave::Transmit,
            _ => Leave::Redirect((self.0 >> 32) as u32),
        }
    }

    /// The number of the reason under which the packet counts; `None` when it is forwarded.
    #[inline(always)]
    pub const fn reason(self) -> Option<u8> {
        if self.0 & 0xff00 == 0 { None } else { Some((self.0 >> 8) as u8 - 1) }
    }
}

impl core::fmt::Debug for Exit {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let reason = self.reason().and_then(|number| Reason::ALL.get(usize::from(number)));
        f.debug_tuple("Exit").field(&self.leave()).field(&reason).finish()
    }
}

/// Whether `hop` is this host.
#[inline(always)]
pub fn is_local(hop: &NextHop) -> bool {
    hop.kind.get() == hop::LOCAL
}

/// Whether what `hop` says is no more than a second old.
#[inline(always)]
fn is_recent(hop: &NextHop, clock: Clock) -> bool {
    // As unsigned numbers: an instant in the future, which only a test's clock makes, is not recent.
    clock.now.0.wrapping_sub(hop.asked.get()) <= clock.hz
}

/// Whether all that this CPU keeps about a destination still holds, its availability included. Nearly always it does.
#[inline(always)]
pub fn is_known(config: &Config, cpu: &DestCpu, clock: Clock) -> bool {
    cpu.epoch.get() == config.epoch.load() && is_recent(&cpu.next_hop, clock)
}

/// Finds out what there is to know about an available destination.
///
/// # Errors
///
/// Why there is no way to it.
#[inline(always)]
pub fn find_out<A: Address>(
    env: &impl Env,
    config: &Config,
    dest: &Dest,
    load: &DestLoad,
    cpu: &DestCpu,
    clock: Clock,
) -> Result<(), Halt> {
    cpu.epoch.set(0);
    // Before the destination is looked at: what changes meanwhile is then found out with the next packet.
    let epoch = config.epoch.load();
    for (kept, word) in cpu.addr.iter().zip(&dest.addr) {
        kept.set(word.load());
    }
    cpu.port.set(dest.port().raw().into());
    let hop = &cpu.next_hop;
    match env.route(dest.addr(), A::default(), hop) {
        Ok(()) => {
            hop.asked.set(clock.now.0);
            hop.mtu.set(PathMtu(load.path_mtu.load()).limit(hop.mtu.get(), dest.addr::<A>(), clock.now));
            // A new client of a destination that shall lose its own may be one of those: see `track::is_left`.
            let keeps = dest.weight.load() != 0 || config.switches.load() & switch::EXPIRE_NODEST_CONN == 0;
            if dest.available() && keeps && hop.kind.get() == hop::VIA {
                cpu.epoch.set(epoch);
            }
            Ok(())
        }
        // The sender learns that the host is unreachable, as from ip_vs.
        Err(Reason::NoRoute) => Err(Halt::tell(Reason::NoRoute, Complaint::HOST_UNREACHABLE)),
        Err(reason) => Err(reason.into()),
    }
}

/// The way to the client of a connection, of which the connection remembers the number, if this CPU knows it.
#[inline(always)]
pub fn known_way<'t, E: Entry>(tables: &'t impl Tables, found: &Found<'_, E>, clock: Clock) -> Option<&'t NextHop> {
    let number = Hint::next_hop(found.entry.hint().load(), found.word);
    let hop = tables.adjacency_cpu(u32::from(number))?;
    (number != 0 && hop.kind.get() == hop::VIA && is_recent(hop, clock)).then_some(hop)
}

/// The address that a translated reply to `service`'s client is routed as a packet of: the service's, or, as ip_vs's `snat_reroute`
/// may have it, that of the server that has sent it (`docs/ipvs.md`, section 5.2).
#[inline(always)]
pub fn routed_as<A: Address>(config: &Config, service: A, server: A) -> A {
    if config.switches.load() & switch::SNAT_REROUTE != 0 { service } else { server }
}

/// Finds out the way to the client of a connection, for a packet from the second of `addresses`, see [`routed_as`], and lets the
/// connection remember its number.
///
/// # Errors
///
/// Why there is none.
#[inline(always)]
pub fn find_way<'t, E: Entry>(
    tables: &'t impl Tables,
    env: &impl Env,
    found: &Found<'_, E>,
    addresses: (E::Addr, E::Addr),
    clock: Clock,
) -> Result<&'t NextHop, Halt> {
    let (client, source) = addresses;
    let once = tables.adjacency_cpu(0).ok_or(Reason::Impossible)?;
    env.route(client, source, once)?;
    if once.kind.get() != hop::VIA {
        return Ok(once);
    }
    let number = adjacency_number(tables, once);
    if number == 0 {
        return Ok(once);
    }
    let hop = tables.adjacency_cpu(number.into()).ok_or(Reason::Impossible)?;
    hop.copy_from(once);
    hop.asked.set(clock.now.0);
    let kept = found.entry.hint().load();
    let hint = Hint::with_next_hop(kept, found.word, number).raw();
    if kept != hint {
        found.entry.hint().store(hint);
    }
    Ok(hop)
}

/// Slots looked at for the number of a next hop.
const ADJACENCY_PROBES: u32 = 8;

/// The number of a next hop, which it is given if it has none; 0 when no more numbers are to be had.
#[inline(always)]
fn adjacency_number(tables: &impl Tables, hop: &NextHop) -> u16 {
    let seed = tables.seed();
    let [a, b, c, d] = hop.gateway.get().map(u64::from);
    // The seeded hash is a bijection of 64 bits, so two IPv4 next hops never share a key. That two IPv6 ones do is as likely
    // as that their 64 bits are alike by chance.
    let network = if hop.gateway_family.get() == Ip4::FAMILY { 0 } else { seed.hash(seed.hash(b | c << 32) ^ d) };
    let key = seed.hash(network ^ (a | u64::from(hop.ifindex.get()) << 32)).max(1);
    let mut index = key as u32;
    for _ in 0..ADJACENCY_PROBES {
        index = (index & (ADJACENCIES - 1)).max(1);
        let Some(Adjacency(slot)) = tables.adjacency(index) else { return 0 };
        let held = match slot.load() {
            0 => slot.compare_exchange(0, key).map_or_else(|found| found, |_| key),
            held => held,
        };
        if held == key {
            return index as u16;
        }
        index += 1;
    }
    0
}

/// Sends a packet, whose network layer is as it shall be, to a neighbour whose link-layer address is known.
///
/// # Errors
///
/// [`Reason::Impossible`] when the frame is shorter than it was.
#[inline(always)]
pub fn transmit(packet: &mut impl Packet, env: &impl Env, hop: &NextHop) -> Result<Exit, Halt> {
    let [a, b, c] = &hop.macs;
    packet.write_words(0, [a.get(), b.get(), c.get()]).ok_or(Reason::Impossible)?;
    let ifindex = hop.ifindex.get();
    Ok(if ifindex == env.ingress() { Exit::TRANSMIT } else { Exit::redirect(ifindex) })
}

/// Sends a packet, whose network layer is as it shall be, on its way out.
///
/// # Errors
///
/// [`Reason::MetadataUnsupported`] when the next hop is unresolved and the host cannot be asked to resolve it.
#[inline(always)]
pub fn send<P: Packet + HandOver>(packet: &mut P, env: &impl Env, hop: &NextHop) -> Result<Exit, Halt> {
    match hop.kind.get() {
        hop::VIA => transmit(packet, env, hop),
        hop::UNRESOLVED => {
            // Where the head has grown, anything may stand for addresses. The host writes its own, but sends on nothing
            // that seems to be for a group.
            packet.write_words(0, [0; 3]).ok_or(Reason::Impossible)?;
            packet.hand_over(hop).ok_or(Reason::MetadataUnsupported)?;
            Ok(Exit::host(Reason::NeighbourUnknown))
        }
        _ => Ok(Exit::host(Reason::LocalDelivery)),
    }
}
