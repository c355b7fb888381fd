//! `timeout`: how long idle connections live.

use clap::Subcommand;
use lb_userspace::{
    control::{session::Session, settings::Timeouts},
    datapath::place::Place,
};

use crate::cli::{failure::Failure, output::Form};

/// What can be done to timeouts.
#[derive(Subcommand, Debug)]
pub(crate) enum TimeoutCommand {
    /// Show the timeouts of established TCP, closing TCP (FIN_WAIT) and UDP connections, in seconds
    Get(Form),
    /// Set them, each for connections from their next packet on
    Set {
        /// Seconds for an established TCP connection, up to 2678400; 0 leaves it as it is
        tcp: u32,
        /// Seconds for a TCP connection in FIN_WAIT, up to 2678400; 0 leaves it as it is
        tcpfin: u32,
        /// Seconds for a UDP connection, up to 2678400; 0 leaves it as it is
        udp: u32,
    },
}

impl TimeoutCommand {
    /// Shows the timeouts or sets them.
    pub(crate) fn run(self, place: &Place) -> Result<(), Failure> {
        match self {
            Self::Get(form) => {
                let timeouts = get(&Session::open(place)?);
                form.print(&timeouts, |Timeouts { tcp, tcpfin, udp }| {
                    format!("tcp {tcp} s, tcpfin {tcpfin} s, udp {udp} s\n")
                })
            }
            Self::Set { tcp, tcpfin, udp } => set(place, Timeouts { tcp, tcpfin, udp }),
        }
    }
}

/// The timeouts in force.
pub(crate) fn get(session: &Session) -> Timeouts {
    let maps = session.maps();
    Timeouts::of(&maps.config[0], maps.instance().hz)
}

/// Sets those that are not 0.
pub(crate) fn set(place: &Place, timeouts: Timeouts) -> Result<(), Failure> {
    let _lock = place.lock()?;
    let session = Session::open(place)?;
    let maps = session.maps();
    Ok(timeouts.set(&maps.config[0], maps.instance().hz)?)
}
