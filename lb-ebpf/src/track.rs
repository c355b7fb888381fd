//! Moving a connection through its states: what a packet changes about it (`docs/ipvs.md`, sections 4.4 to 4.6).

use lb_common::{
    abi::{Config, Dest, ONE_ACTIVE, switch},
    defence::{self, which},
    flow::{self, Entry, Hint, Live, Word, flag},
    jiffies::Jiffies,
    proto::{Method, Protocol},
    sctp, tcp,
};

use crate::{
    flow_table::{self, Buckets, Found},
    pipeline::Now,
    protocols::Protocols,
    tables::Tables,
};

/// How often a step is tried again after another CPU has changed the connection.
const STEP_ATTEMPTS: usize = 3;

/// A packet belongs to no connection: the one it would belong to is over, or has just ended, or may be taken over by a new
/// one.
pub struct Gone;

/// Whose packet it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum From {
    /// The client's.
    Client,
    /// The server's.
    Server,
}

/// When a connection with this word expires if no packet follows the one of now.
#[inline(always)]
fn expiry(now: &Now<'_>, word: Word) -> Jiffies {
    now.clock.now.after(now.config.timeouts.get(word.timeout_index()).map_or(0, |timeout| timeout.load()))
}

/// The word of a connection after its first packet, which came from the client, but for the version.
#[inline(always)]
pub fn birth<S: Protocols>(now: &Now<'_>, live: Live, segment_flags: u8, method: u8, flags: u64) -> Word {
    let masquerade = method == Method::Masq as u8;
    let no_output = if masquerade { 0 } else { flag::NO_OUTPUT };
    // Packets are counted as long as it may matter.
    let few = u64::from(defence::is_wanted(now.config.defences[which::DROP_ENTRY].load())) * flag::FEW;
    let word = Word::new_born(live, method, flags | no_output | flag::INACTIVE, now.clock.now);
    let word = next::<S>(now.config, word, segment_flags, From::Client);
    word.with(few).expiring(expiry(now, word))
}

/// The word after a packet, but for the time it expires, and for [`flag::FEW`]: without, so that every packet changes the word as
/// long as packets are counted.
#[inline(always)]
fn next<S: Protocols>(config: &Config, word: Word, flags: u8, from: From) -> Word {
    let moved = S::moved(config, word, flags, from);
    match from {
        From::Server => moved.without(flag::NO_OUTPUT),
        From::Client => moved.without(flag::FEW),
    }
}

/// Counts a packet of the client, of a connection with the word `before` whose packets are few so far. Returns [`flag::FEW`] if they
/// still are.
#[inline(always)]
fn count_packet<E: Entry>(entry: &E, before: Word) -> u64 {
    let hint = entry.hint();
    let kept = hint.load();
    let Some(packets) = Hint::packets(kept, before) else { return 0 };
    if packets >= flow::FEW {
        return 0;
    }
    // When that fails, the entry is another's by now, or another CPU has counted one.
    let counted = Hint::with_counted(kept, before, Hint::counted(kept, before) + 1);
    let _ = hint.compare_exchange(kept, counted.raw());
    flag::FEW
}

/// Lets a packet change the connection, and returns the word after it.
///
/// A connection whose destination is not available is left as it is.
///
/// # Errors
///
/// [`Gone`] when the packet does not belong to the connection, which has ended then.
#[inline(always)]
pub fn step<S: Protocols, E: Entry>(
    tables: &impl Buckets<E>,
    found: &Found<'_, E>,
    packet: (u8, From),
    now: &Now<'_>,
) -> Result<Word, Gone> {
    let (flags, from) = packet;
    let Now { config, clock } = now;
    let mut word = found.word;
    for _ in 0..STEP_ATTEMPTS {
        let moved = next::<S>(config, word, flags, from);
        let moved = if S::HIDES { Word(tables.hide(moved.0)) } else { moved };
        let expires = expiry(now, moved);
        // An entry that is written on every packet would bounce between caches: see `Word::expired`. As an unsigned
        // number: a connection that is over, or whose timeout has been lowered, is far from this.
        let drift = expires.0.wrapping_sub(word.expires().0);
        if moved == word && drift <= clock.hz && !begins(flags) {
            return Ok(word);
        }
        if word.expired(clock.now, clock.hz) || from == From::Client && may_be_taken_over::<S>(config, word, flags) {
            flow_table::release(tables, found.entry, word, found.dest);
            return Err(Gone);
        }
        if tables.dest(found.dest).is_none_or(|dest| !dest.available()) && from == From::Client {
            return Ok(word);
        }
        let few = if from == From::Client && word.has(flag::FEW) { count_packet(found.entry, word) } else { 0 };
        // Verifier: hidden by itself, too, or it would follow what comes between once for each way to it.
        let after = Word(tables.hide(moved.expiring(expires).with(tables.hide(few)).0));
        match found.entry.word().compare_exchange(word.0, after.0) {
            Ok(_) => {
                count(tables, found.dest, word, after);
                if assures(word, after) {
                    assure(tables, found.entry, after);
                }
                return Ok(after);
            }
            Err(current) if Word(current).same_life(word) => word = Word(tables.hide(current)),
            Err(_) => return Err(Gone),
        }
    }
    // Other CPUs keep changing the connection, each with a packet as fresh as this one.
    Ok(word)
}

/// Whether the destination of a connection makes its client's packet one of no connection, under ip_vs's
/// `expire_nodest_conn` (`docs/ipvs.md`, section 4.8): it has been removed; or it has weight 0, and the packet opens a
/// connection.
///
/// Looked at only off the path of established packets, which those of such destinations do not take: see
/// [`crate::forward::find_out`].
#[inline(always)]
pub fn is_left(config: &Config, dest: &Dest, flags: u8) -> bool {
    config.switches.load() & switch::EXPIRE_NODEST_CONN != 0
        && (!dest.available() || dest.weight.load() == 0 && begins(flags))
}

/// Whether a segment begins a connection where there may have been another before. As in ip_vs, one of TCP with RST counts, too,
/// although it opens none.
#[inline(always)]
const fn begins(flags: u8) -> bool {
    flags & tcp::flag::SYN != 0
}

/// Counts a connection that has become active, or is so no longer.
#[inline(always)]
fn count(tables: &impl Tables, dest: u32, before: Word, after: Word) {
    let (was, is) = (before.has(flag::INACTIVE), after.has(flag::INACTIVE));
    if was != is
        && let Some(load) = tables.dest_load(dest)
    {
        load.connections.fetch_add(if is { ONE_ACTIVE.wrapping_neg() } else { ONE_ACTIVE });
    }
}

/// Whether what has become of a connection assures the template that controls it, if any does (`docs/ipvs.md`, section 6.4).
#[inline(always)]
fn assures(before: Word, after: Word) -> bool {
    after.has(flag::CONTROLLED)
        && if after.protocol() == Protocol::Udp {
            before.has(flag::NO_OUTPUT) && !after.has(flag::NO_OUTPUT)
        } else {
            is_established(after) && !is_established(before)
        }
}

/// Whether a connection with this word is established, and not by UDP. It may begin so, under `sloppy_tcp` and `sloppy_sctp`.
#[inline(always)]
pub fn is_established(word: Word) -> bool {
    match word.protocol() {
        Protocol::Tcp => word.state() == tcp::State::Established as u8,
        Protocol::Sctp => word.state() == sctp::State::Established as u8,
        Protocol::Udp => false,
    }
}

/// Assures the template of a connection that has become `after`, unless the connection has ended since. While it has not, what it
/// says of its template is true, and the template's word is of its own.
#[inline(always)]
fn assure<E: Entry>(tables: &impl Buckets<E>, entry: &E, after: Word) {
    let number = entry.control().load();
    let template = tables.template_word(number);
    if Word(entry.word().load()).same_life(after) {
        tables.assure(number, template);
    }
}

/// Whether a packet may take over the addresses and ports of this connection for a new one (`docs/ipvs.md`, section 4.8): never
/// those of one that a template controls.
#[inline(always)]
fn may_be_taken_over<S: Protocols>(config: &Config, word: Word, flags: u8) -> bool {
    let mode = config.conn_reuse_mode.load();
    begins(flags) && mode != 0 && !word.has(flag::CONTROLLED) && S::is_free(mode, word)
}
