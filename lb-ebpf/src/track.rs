//! Moving a connection through its states: what a packet changes about it (`docs/ipvs.md`, sections 4.4 and 4.5).

use lb_common::{
    abi::{Config, ONE_ACTIVE},
    flow::{Entry, Word, flag},
    jiffies::Jiffies,
    proto::{Method, Protocol},
    tcp::{self, Direction, Event},
};

use crate::{env::Clock, flow_table::Found, tables::Tables};

/// How often a step is tried again after another CPU has changed the connection.
const STEP_ATTEMPTS: usize = 3;

/// The connection ended, or its entry became another, while its packet was being handled.
pub struct Gone;

/// Time to live of a connection in the state numbered `state`, in ticks.
#[inline(always)]
fn timeout(config: &Config, protocol: Protocol, state: u8) -> u32 {
    match protocol {
        Protocol::Tcp => config.tcp_timeouts.get(usize::from(state & 0xf)).map_or(0, |timeout| timeout.load()),
        Protocol::Udp => config.udp_timeout.load(),
    }
}

/// What a connection is after its first packet, which came from the client.
#[inline(always)]
pub fn birth(config: &Config, protocol: Protocol, event: Event, method: u8, flags: u64, now: Jiffies) -> Word {
    let masquerade = method == Method::Masq as u8;
    let (state, active) = match protocol {
        Protocol::Tcp => {
            let direction = if masquerade { Direction::Input } else { Direction::InputOnly };
            let state = tcp::step(tcp::State::None as u8, event, direction);
            (state, tcp::is_active(state))
        }
        Protocol::Udp => (0, false),
    };
    let inactive = if active { 0 } else { flag::INACTIVE };
    let no_output = if masquerade { 0 } else { flag::NO_OUTPUT };
    let expires = now.after(timeout(config, protocol, state));
    Word::born(protocol, state, method, flags | inactive | no_output, expires)
}

/// The word after a packet. `from_server` tells whose packet it is.
#[inline(always)]
fn next(config: &Config, word: Word, event: Event, from_server: bool, clock: Clock) -> Word {
    let moved = match word.protocol() {
        Protocol::Udp if from_server => word.moved(0, flag::NO_OUTPUT, 0),
        Protocol::Udp => word,
        Protocol::Tcp => {
            let direction = if from_server {
                Direction::Output
            } else if word.has(flag::NO_OUTPUT) {
                Direction::InputOnly
            } else {
                Direction::Input
            };
            let state = tcp::step(word.state(), event, direction);
            let seen = if from_server { flag::NO_OUTPUT } else { 0 };
            if tcp::is_active(state) {
                word.moved(state, flag::INACTIVE | seen, 0)
            } else {
                word.moved(state, seen, flag::INACTIVE)
            }
        }
    };
    let expires = clock.now.after(timeout(config, word.protocol(), moved.state()));
    // An entry that is written on every packet would bounce between caches: see `Word::expired`.
    let drift = expires.since(word.expires()).unsigned_abs();
    if moved == word && drift <= clock.hz { word } else { moved.expiring(expires) }
}

/// Lets a packet change the connection, and returns the word after it.
///
/// # Errors
///
/// [`Gone`] when the connection ended meanwhile: the packet belongs to none.
#[inline(always)]
pub fn step<E: Entry>(
    tables: &impl Tables,
    config: &Config,
    found: &Found<'_, E>,
    event: Event,
    from_server: bool,
    clock: Clock,
) -> Result<Word, Gone> {
    let mut word = found.word;
    for _ in 0..STEP_ATTEMPTS {
        let after = Word(tables.hide(next(config, word, event, from_server, clock).0));
        if after == word {
            return Ok(word);
        }
        match found.entry.word().compare_exchange(word.0, after.0) {
            Ok(_) => {
                let was = word.has(flag::INACTIVE);
                let is = after.has(flag::INACTIVE);
                if was != is
                    && let Some(load) = tables.dest_load(found.dest)
                {
                    load.connections.fetch_add(if is { ONE_ACTIVE.wrapping_neg() } else { ONE_ACTIVE });
                }
                return Ok(after);
            }
            Err(current) if Word(current).same_life(word) => word = Word(current),
            Err(_) => return Err(Gone),
        }
    }
    // Other CPUs keep changing the connection, each with a packet as fresh as this one.
    Ok(word)
}
