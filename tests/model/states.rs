//! The states of TCP connections: section 4.4.

/// In the order of their numbers. A UDP connection has the first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum State {
    No,
    Es,
    Ss,
    Sr,
    Fw,
    Tw,
    Cl,
    Cw,
    La,
    Li,
    Sa,
}

use State::{Cl, Cw, Es, Fw, La, Li, No, Sa, Sr, Ss, Tw};

type Table = [(State, [State; 12]); 11];

/// Rows are states; columns are SYN, FIN, ACK, RST of the client, of the server, and of the client alone.
const NORMAL: Table = [
    (No, [Sr, Cl, Es, Cl, Ss, Tw, Es, Cl, Sr, Cl, Es, Cl]),
    (Es, [Es, Cw, Es, Cl, Es, Fw, Es, Cl, Es, Fw, Es, Cl]),
    (Ss, [Es, Ss, Ss, Cl, Ss, Ss, Ss, Ss, Es, Ss, Ss, Cl]),
    (Sr, [Sr, Tw, Es, Sr, Sr, Tw, Es, Cl, Sr, Tw, Es, Sr]),
    (Fw, [Sr, Tw, Fw, Cl, Ss, Fw, Fw, Cl, Sr, Fw, Fw, Cl]),
    (Tw, [Sr, Tw, Tw, Cl, Ss, Tw, Tw, Tw, Sr, Tw, Tw, Cl]),
    (Cl, [Sr, Cl, Cl, Cl, Ss, Cl, Cl, Cl, Sr, Cl, Cl, Cl]),
    (Cw, [Sr, Cw, Cw, Cl, Ss, Tw, Cw, Cl, Sr, Cw, Cw, Cl]),
    (La, [Sr, La, Cl, La, Ss, La, La, Cl, Sr, La, Cl, La]),
    (Li, [Sr, Li, Li, Li, Li, Li, Es, Cl, Sr, Li, Li, Li]),
    (Sa, [Sr, Tw, Es, Sr, Sr, Tw, Es, Cl, Sr, Tw, Es, Cl]),
];

/// The same while `secure_tcp` is on: section 4.11.
const SECURE: Table = [
    (No, [Sr, Cl, Es, Cl, Ss, Tw, Es, Cl, Sa, Cl, Es, Cl]),
    (Es, [Es, Cw, Es, Cl, Es, Fw, Es, Cl, Es, Fw, Es, Cl]),
    (Ss, [Es, Ss, Ss, Cl, Ss, Ss, Ss, Ss, Es, Ss, Ss, Cl]),
    (Sr, [Sr, Tw, Sr, Sr, Sa, Tw, Es, Cl, Sr, Tw, Es, Sr]),
    (Fw, [Sr, Tw, Fw, Cl, Ss, Fw, Fw, Cl, Sa, Fw, Fw, Cl]),
    (Tw, [Sr, Tw, Tw, Cl, Ss, Tw, Tw, Tw, Sa, Tw, Tw, Cl]),
    (Cl, [Sr, Cl, Cl, Cl, Ss, Cl, Cl, Cl, Sa, Cl, Cl, Cl]),
    (Cw, [Sr, Cw, Cw, Cl, Ss, Tw, Cw, Cl, Sa, Cw, Cw, Cl]),
    (La, [Sr, La, Cl, La, Ss, La, La, Cl, Sa, La, Cl, La]),
    (Li, [Sr, Li, Li, Li, Li, Li, Es, Cl, Sr, Li, Li, Li]),
    (Sa, [Sa, Sa, Sa, Cl, Sa, Tw, Es, Cl, Sa, Tw, Es, Cl]),
];

/// Seconds.
pub(crate) const TIMEOUTS: [(State, u64); 11] =
    [(No, 2), (Es, 900), (Ss, 120), (Sr, 60), (Fw, 120), (Tw, 120), (Cl, 10), (Cw, 60), (La, 30), (Li, 120), (Sa, 120)];

/// The flags of a segment that matter.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Flags {
    pub(crate) syn: bool,
    pub(crate) ack: bool,
    pub(crate) fin: bool,
    pub(crate) rst: bool,
}

/// Whose packet it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Direction {
    /// The client's, of a connection whose server has been seen or would be.
    Input,
    /// The server's.
    Output,
    /// The client's, of a connection whose server has not been seen.
    InputOnly,
}

impl State {
    pub(crate) fn is_active(self) -> bool {
        matches!(self, Es | Ss | Sr | Sa)
    }

    /// The state after a segment.
    pub(crate) fn after(self, flags: Flags, direction: Direction, secure: bool) -> Self {
        let event = match flags {
            Flags { rst: true, .. } => 3,
            Flags { syn: true, .. } => 0,
            Flags { fin: true, .. } => 1,
            Flags { ack: true, .. } => 2,
            _ => return Cl,
        };
        let column = match direction {
            Direction::Input => event,
            Direction::Output => 4 + event,
            Direction::InputOnly => 8 + event,
        };
        let table = if secure { SECURE } else { NORMAL };
        table.iter().find(|(state, _)| *state == self).map_or(Cl, |(_, row)| row[column])
    }
}
