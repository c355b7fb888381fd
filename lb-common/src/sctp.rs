//! The SCTP states of a connection and their transitions, as ip_vs has them (`docs/ipvs.md`, section 4.6).
//!
//! What moves a state is the type of a packet's first chunk, and whether an ABORT follows it (RFC 9260 section 3.2).

use crate::{
    proto::Unknown,
    sync::opaque,
    tcp::{Direction, Transition, flag},
};

/// What the director believes about an SCTP association. The numbers are ip_vs's, also on its synchronisation wire.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
#[expect(missing_docs, reason = "the names are ip_vs's for what the two sides have sent")]
pub enum State {
    None = 0,
    Init1 = 1,
    Init = 2,
    CookieSent = 3,
    CookieReplied = 4,
    CookieWait = 5,
    Cookie = 6,
    CookieEchoed = 7,
    Established = 8,
    ShutdownSent = 9,
    ShutdownReceived = 10,
    ShutdownAckSent = 11,
    Rejected = 12,
    Closed = 13,
}

/// Number of SCTP states.
pub const STATES: usize = 14;

/// What a packet tells of an association, by its first chunks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Event {
    /// DATA, or any chunk that moves no state.
    Data = 0,
    /// INIT.
    Init = 1,
    /// INIT ACK.
    InitAck = 2,
    /// COOKIE ECHO.
    CookieEcho = 3,
    /// COOKIE ACK.
    CookieAck = 4,
    /// SHUTDOWN.
    Shutdown = 5,
    /// SHUTDOWN ACK.
    ShutdownAck = 6,
    /// SHUTDOWN COMPLETE.
    ShutdownComplete = 7,
    /// ERROR.
    Error = 8,
    /// ABORT, first or behind a COOKIE ECHO or COOKIE ACK.
    Abort = 9,
}

/// Number of events.
const EVENTS: usize = 10;

/// Types of chunks, RFC 9260 section 3.2.
pub mod chunk {
    /// User data.
    pub const DATA: u8 = 0;
    /// Opens an association.
    pub const INIT: u8 = 1;
    /// Answers INIT.
    pub const INIT_ACK: u8 = 2;
    /// Acknowledges user data.
    pub const SACK: u8 = 3;
    /// Asks whether the other side is there.
    pub const HEARTBEAT: u8 = 4;
    /// Ends an association at once.
    pub const ABORT: u8 = 6;
    /// Begins to end an association.
    pub const SHUTDOWN: u8 = 7;
    /// Answers SHUTDOWN.
    pub const SHUTDOWN_ACK: u8 = 8;
    /// Tells of an error.
    pub const ERROR: u8 = 9;
    /// Brings back the cookie of INIT ACK.
    pub const COOKIE_ECHO: u8 = 10;
    /// Answers COOKIE ECHO.
    pub const COOKIE_ACK: u8 = 11;
    /// Ends an association.
    pub const SHUTDOWN_COMPLETE: u8 = 14;
}

/// What a packet's chunks say, in one byte that takes the place of a TCP segment's flags: its [`Event`] in bits 4-7, SYN if the
/// packet begins an association, and RST if its first chunk is ABORT. So what TCP's flags say of opening and taking over
/// connections they say of SCTP, too.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Chunks(u8);

/// Where [`Chunks`] have their [`Event`].
const EVENT_SHIFT: u32 = 4;

impl Chunks {
    /// What a first chunk of this type says.
    #[inline(always)]
    pub const fn of(first: u8) -> Self {
        /// Four bits for each type, from the lowest.
        const EVENTS: u64 = {
            use chunk::*;
            let types = [
                (INIT, Event::Init),
                (INIT_ACK, Event::InitAck),
                (ABORT, Event::Abort),
                (SHUTDOWN, Event::Shutdown),
                (SHUTDOWN_ACK, Event::ShutdownAck),
                (ERROR, Event::Error),
                (COOKIE_ECHO, Event::CookieEcho),
                (COOKIE_ACK, Event::CookieAck),
                (SHUTDOWN_COMPLETE, Event::ShutdownComplete),
            ];
            let (mut events, mut index) = (0, 0);
            while index < types.len() {
                events |= (types[index].1 as u64) << (4 * types[index].0);
                index += 1;
            }
            events
        };
        const _: () = assert!(flag::SYN == 1 << 1 && flag::RST == 1 << 2);
        if first > 15 {
            return Self::saying(Event::Data);
        }
        // Verifier: without a branch for either flag, which it would follow both ways.
        let (begins, aborts) = (equal(first, chunk::INIT) << 1, equal(first, chunk::ABORT) << 2);
        Self(((EVENTS >> (4 * first) & 0xf) << EVENT_SHIFT) as u8 | begins | aborts)
    }

    const fn saying(event: Event) -> Self {
        Self((event as u8) << EVENT_SHIFT)
    }

    /// This, with an ABORT behind the first chunk.
    #[inline(always)]
    pub const fn before_abort(self) -> Self {
        Self::saying(Event::Abort)
    }

    /// The byte.
    #[inline(always)]
    pub const fn bits(self) -> u8 {
        self.0
    }

    /// What is in this byte.
    #[inline(always)]
    pub const fn from_bits(bits: u8) -> Self {
        Self(bits)
    }

    /// Whether an ABORT behind the first chunk counts as one that comes first.
    #[inline(always)]
    pub const fn may_precede_abort(self) -> bool {
        self.0 == Self::saying(Event::CookieEcho).0 || self.0 == Self::saying(Event::CookieAck).0
    }
}

/// 1 if the bytes are the same, else 0, found out without a branch.
#[inline(always)]
const fn equal(a: u8, b: u8) -> u8 {
    ((((a ^ b) as u16).wrapping_sub(1)) >> 15) as u8
}

use State::{
    Closed as CL, Cookie as CO, CookieEchoed as CE, CookieReplied as CR, CookieSent as CS, CookieWait as CW,
    Established as ES, Init as IN, Init1 as I1, None as NO, Rejected as RJ, ShutdownAckSent as SA,
    ShutdownReceived as SR, ShutdownSent as SS,
};

/// Next states by direction ([`Direction`]), current state (row) and [`Event`] (column).
#[rustfmt::skip]
const NEXT: [[[State; EVENTS]; STATES]; 3] = [
    //      d   i   ia  ce  ca  s   sa  sc  er  ab      Input
    [
        /* NO */ [ES, I1, CW, CR, ES, SR, CL, CL, CL, CL],
        /* I1 */ [I1, IN, CW, IN, I1, I1, IN, CL, I1, CL],
        /* IN */ [IN, IN, CW, IN, IN, IN, IN, CL, IN, CL],
        /* CS */ [CS, CS, CS, CR, CS, CS, CS, CS, CS, CL],
        /* CR */ [CR, CR, CR, CR, CR, CR, CR, CR, CR, CL],
        /* CW */ [CW, CW, CO, CW, CW, CW, CW, CW, CW, RJ],
        /* CO */ [CO, CO, CO, CO, CO, CO, CO, CO, CO, CL],
        /* CE */ [CE, CE, CE, CE, ES, CE, CE, CE, CL, CL],
        /* ES */ [ES, ES, ES, ES, ES, SR, ES, ES, ES, CL],
        /* SS */ [SS, SS, SS, SS, SS, SS, CL, SS, SS, CL],
        /* SR */ [SR, SR, SR, SR, SR, SR, SR, SR, SR, CL],
        /* SA */ [SA, SA, SA, SA, SA, SA, CL, CL, SA, CL],
        /* RJ */ [RJ, IN, RJ, RJ, RJ, RJ, RJ, RJ, RJ, CL],
        /* CL */ [CL, IN, CL, CL, CL, CL, CL, CL, CL, CL],
    ],
    //      d   i   ia  ce  ca  s   sa  sc  er  ab      Output
    [
        /* NO */ [ES, CW, CS, CE, ES, SS, SA, CL, CL, CL],
        /* I1 */ [I1, CW, CS, CE, ES, SS, SA, I1, CL, RJ],
        /* IN */ [IN, CW, CS, CE, ES, SS, SA, IN, CL, CL],
        /* CS */ [CS, CW, CS, CE, ES, SS, SA, CS, CL, CL],
        /* CR */ [CR, CW, CR, CE, ES, SS, SA, CR, CL, CL],
        /* CW */ [CW, CW, CW, CE, ES, SS, CW, CW, CW, CL],
        /* CO */ [CO, CW, CO, CE, ES, SS, CO, CO, CO, CL],
        /* CE */ [CE, CW, CE, CE, ES, SS, CE, CE, CE, CL],
        /* ES */ [ES, ES, ES, ES, ES, SS, ES, ES, ES, CL],
        /* SS */ [SS, CW, SS, SS, SS, SS, SA, SS, SS, CL],
        /* SR */ [SR, CW, SR, SR, SR, SR, SA, SR, SR, CL],
        /* SA */ [SA, CW, SA, SA, SA, SA, SA, SA, SA, CL],
        /* RJ */ [RJ, CW, RJ, RJ, RJ, RJ, RJ, RJ, RJ, CL],
        /* CL */ [CL, CW, CL, CL, CL, CL, CL, CL, CL, CL],
    ],
    //      d   i   ia  ce  ca  s   sa  sc  er  ab      InputOnly
    [
        /* NO */ [ES, I1, CE, ES, ES, SR, CL, CL, CL, CL],
        /* I1 */ [I1, IN, CE, ES, I1, I1, IN, CL, I1, CL],
        /* IN */ [IN, IN, CE, ES, IN, IN, IN, CL, IN, CL],
        /* CS */ [CS, IN, CE, ES, ES, CS, CS, CL, CS, CL],
        /* CR */ [CR, IN, CE, ES, ES, CR, CR, CL, CR, CL],
        /* CW */ [ES, IN, CE, ES, CW, CW, CW, CW, CW, RJ],
        /* CO */ [CO, CO, CO, CO, ES, CO, CO, CO, CO, CL],
        /* CE */ [CE, CE, CE, CE, ES, CE, CE, CE, CE, CL],
        /* ES */ [ES, ES, ES, ES, ES, SR, CL, ES, ES, CL],
        /* SS */ [SS, SS, SS, SS, SS, SS, CL, SS, SS, CL],
        /* SR */ [SR, SR, SR, SR, SR, SR, SR, CL, SR, CL],
        /* SA */ [SA, SA, SA, SA, SA, SA, CL, CL, SA, CL],
        /* RJ */ [RJ, IN, RJ, RJ, RJ, RJ, RJ, RJ, RJ, CL],
        /* CL */ [CL, IN, CL, CL, CL, CL, CL, CL, CL, CL],
    ],
];

/// Index into [`TRANSITIONS`]: direction in bits 8-9, event in bits 4-7, state in bits 0-3.
const fn cell(direction: usize, event: usize, state: usize) -> usize {
    direction << 8 | event << 4 | state
}

/// [`NEXT`], laid out for a masked index, so that a look-up is one load. Cells of no state hold CLOSED.
static TRANSITIONS: [Transition; 1024] = {
    let mut table = [Transition::to(CL as u8, false); 1024];
    let mut index = 0;
    while index < table.len() {
        let (direction, event, state) = (index >> 8, index >> 4 & 0xf, index & 0xf);
        if direction < 3 && event < EVENTS && state < STATES {
            let next = NEXT[direction][state][event] as u8;
            table[index] = Transition::to(next, is_active(next));
        }
        index += 1;
    }
    table
};

impl State {
    /// Every state, in order of its number.
    pub const ALL: [Self; STATES] = [NO, I1, IN, CS, CR, CW, CO, CE, ES, SS, SR, SA, RJ, CL];

    /// The state's name in listings.
    pub const fn as_str(self) -> &'static str {
        match self {
            NO => "NONE",
            I1 => "INIT1",
            IN => "INIT",
            CS => "C-SENT",
            CR => "C-REPLIED",
            CW => "C-WAIT",
            CO => "COOKIE",
            CE => "C-ECHOED",
            ES => "ESTABLISHED",
            SS => "S-SENT",
            SR => "S-RECEIVED",
            SA => "S-ACK-SENT",
            RJ => "REJECTED",
            CL => "CLOSED",
        }
    }

    /// ip_vs's time to live of a connection in this state, in seconds, which cannot be set.
    pub const fn timeout_s(self) -> u32 {
        match self {
            NO => 2,
            I1 | RJ => 4,
            ES => 900,
            IN | CS | CR | CW | CO | CE | SS | SR | SA | CL => 61,
        }
    }
}

impl TryFrom<u8> for State {
    type Error = Unknown;

    fn try_from(value: u8) -> Result<Self, Unknown> {
        Self::ALL.get(usize::from(value)).copied().ok_or(Unknown(value))
    }
}

/// What a packet with these chunks makes of a connection in the state numbered `state`. A number that is no state goes to
/// CLOSED.
#[inline(always)]
pub fn transition(state: u8, chunks: Chunks, direction: Direction) -> Transition {
    const _: () = assert!(cell(0, 1, 0) == 1 << EVENT_SHIFT);
    let index = cell(direction as usize, 0, usize::from(state & 0xf)) | usize::from(chunks.bits() & 0xf0);
    // The mask changes nothing, for every index is below 1024; but the verifier has to see it.
    TRANSITIONS[opaque(index as u64) as usize & 0x3ff]
}

/// Whether a connection in the state numbered `state` counts as active.
#[inline(always)]
pub const fn is_active(state: u8) -> bool {
    state == ES as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIRECTIONS: [Direction; 3] = [Direction::Input, Direction::Output, Direction::InputOnly];
    /// A type of chunk for every event, in their order.
    const TYPES: [u8; EVENTS] = {
        use chunk::*;
        [DATA, INIT, INIT_ACK, COOKIE_ECHO, COOKIE_ACK, SHUTDOWN, SHUTDOWN_ACK, SHUTDOWN_COMPLETE, ERROR, ABORT]
    };

    #[test]
    fn every_cell_of_the_table_is_reached() {
        for (direction, states) in DIRECTIONS.into_iter().zip(&NEXT) {
            for (state, events) in State::ALL.into_iter().zip(states) {
                for (first, next) in TYPES.into_iter().zip(events) {
                    let transition = transition(state as u8, Chunks::of(first), direction);
                    assert_eq!(transition.state(), *next as u8, "{state:?} {direction:?} {first}");
                    assert_eq!(transition.is_active(), *next == State::Established);
                }
            }
        }
    }

    #[test]
    fn a_number_that_is_no_state_closes() {
        for direction in DIRECTIONS {
            for state in STATES as u8..=15 {
                let transition = transition(state, Chunks::of(chunk::DATA), direction);
                assert_eq!((transition.state(), transition.is_active()), (State::Closed as u8, false));
            }
        }
    }

    #[test]
    fn chunks_that_move_nothing_are_alike() {
        for first in [chunk::SACK, chunk::HEARTBEAT, 5, 12, 13, 15, 16, 0x80, 0xc1, u8::MAX] {
            assert_eq!(Chunks::of(first), Chunks::of(chunk::DATA), "{first}");
        }
    }

    #[test]
    fn an_abort_counts_behind_a_cookie_only() {
        for first in 0..=u8::MAX {
            let cookie = first == chunk::COOKIE_ECHO || first == chunk::COOKIE_ACK;
            assert_eq!(Chunks::of(first).may_precede_abort(), cookie, "{first}");
        }
        let both = Chunks::of(chunk::COOKIE_ECHO).before_abort();
        let closed = transition(State::Init1 as u8, both, Direction::Input);
        assert_eq!(closed.state(), State::Closed as u8);
        assert_eq!(both.bits() & (flag::SYN | flag::RST), 0);
    }

    #[test]
    fn what_begins_an_association_has_syn_and_what_aborts_one_has_rst() {
        for first in 0..=u8::MAX {
            let flags = Chunks::of(first).bits();
            assert_eq!(flags & flag::SYN != 0, first == chunk::INIT, "{first}");
            assert_eq!(flags & flag::RST != 0, first == chunk::ABORT, "{first}");
        }
    }
}
