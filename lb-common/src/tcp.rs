//! The TCP states of a connection and their transitions, as ip_vs has them (`docs/ipvs.md`, section 4.4).
//!
//! The director sees packets, not endpoints: a state is what can be concluded from the flags that passed, from whichever
//! side passes through it.

use crate::{proto::Unknown, sync::opaque};

/// What the director believes about a TCP connection. The numbers are ip_vs's, also on its synchronisation wire.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
#[expect(missing_docs, reason = "the names are those of RFC 9293, seen from the middle")]
pub enum State {
    None = 0,
    Established = 1,
    SynSent = 2,
    SynRecv = 3,
    FinWait = 4,
    TimeWait = 5,
    Close = 6,
    CloseWait = 7,
    LastAck = 8,
    Listen = 9,
    SynAck = 10,
}

/// Number of TCP states.
pub const STATES: usize = 11;

/// The part of the flags that moves the state, by priority: a packet with RST counts as RST whatever else it carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// SYN, with or without ACK.
    Syn,
    /// FIN without SYN.
    Fin,
    /// ACK alone.
    Ack,
    /// RST, whatever else is set.
    Rst,
    /// None of the four flags; closes the connection.
    None,
}

/// From which side the packet came, and what is known of the other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Direction {
    /// From the client, and the server's packets pass the director too.
    Input = 0,
    /// From the server.
    Output = 1,
    /// From the client, and no packet of the server has been seen.
    InputOnly = 2,
}

/// TCP header flag bits, RFC 9293 section 3.1.
pub mod flag {
    /// Finish.
    pub const FIN: u8 = 0x01;
    /// Synchronise.
    pub const SYN: u8 = 0x02;
    /// Reset.
    pub const RST: u8 = 0x04;
    /// Acknowledgement.
    pub const ACK: u8 = 0x10;
}

impl Event {
    /// The event of a segment with these flag bits (byte 13 of the header).
    #[inline(always)]
    pub const fn of(flags: u8) -> Self {
        if flags & flag::RST != 0 {
            Self::Rst
        } else if flags & flag::SYN != 0 {
            Self::Syn
        } else if flags & flag::FIN != 0 {
            Self::Fin
        } else if flags & flag::ACK != 0 {
            Self::Ack
        } else {
            Self::None
        }
    }
}

use State::{
    Close as CL, CloseWait as CW, Established as ES, FinWait as FW, LastAck as LA, Listen as LI, None as NO,
    SynAck as SA, SynRecv as SR, SynSent as SS, TimeWait as TW,
};

/// Next states by current state (row) and by direction and event (column: SYN, FIN, ACK, RST of each direction).
#[rustfmt::skip]
const NORMAL: [[State; 12]; STATES] = [
    //      Input           Output          InputOnly
    /* NO */ [SR, CL, ES, CL, SS, TW, ES, CL, SR, CL, ES, CL],
    /* ES */ [ES, CW, ES, CL, ES, FW, ES, CL, ES, FW, ES, CL],
    /* SS */ [ES, SS, SS, CL, SS, SS, SS, SS, ES, SS, SS, CL],
    /* SR */ [SR, TW, ES, SR, SR, TW, ES, CL, SR, TW, ES, SR],
    /* FW */ [SR, TW, FW, CL, SS, FW, FW, CL, SR, FW, FW, CL],
    /* TW */ [SR, TW, TW, CL, SS, TW, TW, TW, SR, TW, TW, CL],
    /* CL */ [SR, CL, CL, CL, SS, CL, CL, CL, SR, CL, CL, CL],
    /* CW */ [SR, CW, CW, CL, SS, TW, CW, CL, SR, CW, CW, CL],
    /* LA */ [SR, LA, CL, LA, SS, LA, LA, CL, SR, LA, CL, LA],
    /* LI */ [SR, LI, LI, LI, LI, LI, ES, CL, SR, LI, LI, LI],
    /* SA */ [SR, TW, ES, SR, SR, TW, ES, CL, SR, TW, ES, CL],
];

/// [`NORMAL`], while `secure_tcp` is in force.
#[rustfmt::skip]
const SECURE: [[State; 12]; STATES] = [
    //      Input           Output          InputOnly
    /* NO */ [SR, CL, ES, CL, SS, TW, ES, CL, SA, CL, ES, CL],
    /* ES */ [ES, CW, ES, CL, ES, FW, ES, CL, ES, FW, ES, CL],
    /* SS */ [ES, SS, SS, CL, SS, SS, SS, SS, ES, SS, SS, CL],
    /* SR */ [SR, TW, SR, SR, SA, TW, ES, CL, SR, TW, ES, SR],
    /* FW */ [SR, TW, FW, CL, SS, FW, FW, CL, SA, FW, FW, CL],
    /* TW */ [SR, TW, TW, CL, SS, TW, TW, TW, SA, TW, TW, CL],
    /* CL */ [SR, CL, CL, CL, SS, CL, CL, CL, SA, CL, CL, CL],
    /* CW */ [SR, CW, CW, CL, SS, TW, CW, CL, SA, CW, CW, CL],
    /* LA */ [SR, LA, CL, LA, SS, LA, LA, CL, SA, LA, CL, LA],
    /* LI */ [SR, LI, LI, LI, LI, LI, ES, CL, SA, LI, LI, LI],
    /* SA */ [SA, SA, SA, CL, SA, TW, ES, CL, SA, TW, ES, CL],
];

/// Bits of the flags that matter, and one between them that does not.
const FLAGS: u8 = 0x1f;

/// Index into [`TRANSITIONS`]: number of the table in bit 11, direction in bits 9-10, flags in bits 4-8, state in bits 0-3.
const fn cell(table: usize, direction: usize, flags: usize, state: usize) -> usize {
    table << 11 | direction << 9 | flags << 4 | state
}

/// Set in a [`Transition`] to a state that does not count as active.
const INACTIVE: u8 = 1 << 7;

/// [`NORMAL`] and [`SECURE`] by flags instead of events, laid out for a masked index, so that a look-up is one load: number
/// of the next state in bits 0-3 and [`INACTIVE`]. Cells of no state hold CLOSE.
static TRANSITIONS: [u8; 4096] = {
    let mut table = [CL as u8 | INACTIVE; 4096];
    let mut index = 0;
    while index < table.len() {
        let (direction, flags, state) = (index >> 9 & 3, index >> 4 & FLAGS as usize, index & 0xf);
        let column = match Event::of(flags as u8) {
            Event::Syn => 0,
            Event::Fin => 1,
            Event::Ack => 2,
            Event::Rst => 3,
            Event::None => 4,
        };
        if direction < 3 && state < STATES && column < 4 {
            let states = if index >> 11 == 0 { &NORMAL } else { &SECURE };
            let next = states[state][4 * direction + column] as u8;
            table[index] = Transition::to(next, is_active(next)).bits();
        }
        index += 1;
    }
    table
};

impl State {
    /// Every state, in order of its number.
    pub const ALL: [Self; STATES] = [NO, ES, SS, SR, FW, TW, CL, CW, LA, LI, SA];

    /// The state's name in listings.
    pub const fn as_str(self) -> &'static str {
        match self {
            NO => "NONE",
            ES => "ESTABLISHED",
            SS => "SYN_SENT",
            SR => "SYN_RECV",
            FW => "FIN_WAIT",
            TW => "TIME_WAIT",
            CL => "CLOSE",
            CW => "CLOSE_WAIT",
            LA => "LAST_ACK",
            LI => "LISTEN",
            SA => "SYNACK",
        }
    }

    /// ip_vs's default time to live of a connection in this state, in seconds.
    pub const fn default_timeout_s(self) -> u32 {
        match self {
            NO => 2,
            ES => 900,
            SS | FW | TW | LI | SA => 120,
            SR | CW => 60,
            CL => 10,
            LA => 30,
        }
    }
}

impl TryFrom<u8> for State {
    type Error = Unknown;

    fn try_from(value: u8) -> Result<Self, Unknown> {
        Self::ALL.get(usize::from(value)).copied().ok_or(Unknown(value))
    }
}

/// What a packet makes of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Transition(u8);

impl Transition {
    /// To the state with this number, which counts as active or not.
    pub(crate) const fn to(state: u8, is_active: bool) -> Self {
        Self(if is_active { state } else { state | INACTIVE })
    }

    /// What a segment with these flags (byte 13 of its header) makes of a connection in the state numbered `state`, by the
    /// table with this number, 0 or 1 ([`crate::abi::Config::tcp_table`]).
    ///
    /// Works on numbers because that is what a flow entry holds; a number that is no state goes to CLOSE.
    #[inline(always)]
    pub fn of(table: u32, state: u8, flags: u8, direction: Direction) -> Self {
        let (table, flags, state) = (table as usize & 1, usize::from(flags & FLAGS), usize::from(state & 0xf));
        let index = cell(table, direction as usize, flags, state) as u64;
        // The mask changes nothing, for every index is below 4096; but the verifier has to see it.
        Self(TRANSITIONS[opaque(index) as usize & 0xfff])
    }

    /// The number of the next state in bits 0-3, and bit 7 if it does not count as active.
    #[inline(always)]
    pub const fn bits(self) -> u8 {
        self.0
    }

    /// The number of the next state.
    #[inline(always)]
    pub const fn state(self) -> u8 {
        self.0 & 0xf
    }

    /// Whether the next state counts as active.
    #[inline(always)]
    pub const fn is_active(self) -> bool {
        self.0 & INACTIVE == 0
    }
}

/// Whether a connection in the state numbered `state` counts as active.
#[inline(always)]
pub const fn is_active(state: u8) -> bool {
    const ACTIVE: u16 = 1 << ES as u8 | 1 << SS as u8 | 1 << SR as u8 | 1 << SA as u8;
    ACTIVE >> (state & 0xf) & 1 != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_chosen_by_priority() {
        use flag::*;
        assert_eq!(Event::of(RST | SYN | FIN | ACK), Event::Rst);
        assert_eq!(Event::of(SYN | ACK), Event::Syn);
        assert_eq!(Event::of(FIN | ACK), Event::Fin);
        assert_eq!(Event::of(ACK | 0x08), Event::Ack);
        assert_eq!(Event::of(0x08), Event::None);
    }

    #[test]
    fn every_cell_of_the_table_is_reached() {
        use flag::*;
        for (table, states) in [(0, &NORMAL), (1, &SECURE)] {
            for state in State::ALL {
                for (column, next) in states[state as usize].iter().enumerate() {
                    let direction = [Direction::Input, Direction::Output, Direction::InputOnly][column / 4];
                    for flags in [[SYN, FIN, ACK, RST], [SYN | ACK, FIN | ACK, ACK | 0x08, RST | ACK]] {
                        let flags = flags[column % 4];
                        let transition = Transition::of(table, state as u8, flags, direction);
                        assert_eq!(transition.state(), *next as u8, "{state:?} {direction:?} {flags:#x}");
                        assert_eq!(transition.is_active(), is_active(*next as u8));
                    }
                }
                assert_eq!(Transition::of(table, state as u8, 0x08, Direction::Input), Transition(CL as u8 | INACTIVE));
            }
        }
    }

    /// What [`crate::tcp`] takes for granted elsewhere: an ACK leaves an established connection as it is.
    #[test]
    fn an_acknowledgement_does_not_move_what_is_established() {
        for (table, direction) in [0, 1]
            .into_iter()
            .flat_map(|table| [Direction::Input, Direction::Output, Direction::InputOnly].map(|d| (table, d)))
        {
            assert_eq!(Transition::of(table, ES as u8, flag::ACK, direction), Transition(ES as u8));
        }
    }

    #[test]
    fn a_number_that_is_no_state_closes() {
        for state in STATES as u8..=15 {
            assert_eq!(Transition::of(0, state, flag::ACK, Direction::Output).state(), CL as u8);
        }
    }

    #[test]
    fn four_states_are_active() {
        let active: Vec<_> = State::ALL.into_iter().filter(|s| is_active(*s as u8)).collect();
        assert_eq!(active, [ES, SS, SR, SA]);
    }
}
