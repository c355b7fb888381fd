//! `realserver`: this host as a real server.

use std::net::IpAddr;

use clap::{Args, Subcommand, ValueEnum};
use lb_userspace::realserver::{self, Method};

use crate::cli::{complain, failure::Failure, output::Form};

/// What can be done to this host as a real server.
#[derive(Subcommand, Debug)]
pub(crate) enum RealServerCommand {
    /// Accept packets for the address of a service, without telling others on the link that it is here
    Up {
        #[command(flatten)]
        site: SiteWords,
        /// How the director sends them: dr (it changes the link-layer address) or tun (in IP-in-IP packets of the same family)
        #[arg(long, value_enum)]
        method: MethodWord,
    },
    /// Undo what `up` has done, and nothing else
    Down {
        #[command(flatten)]
        site: SiteWords,
    },
    /// Show which addresses are accepted, and what stands in their way
    Status(Form),
}

/// Where an address is accepted.
#[derive(Args, Debug)]
pub(crate) struct SiteWords {
    /// The interface that the director's packets arrive by
    #[arg(value_name = "IFACE")]
    interface: String,
    /// The address of the service
    #[arg(long, value_name = "ADDR", value_parser = realserver::parse_vip)]
    vip: IpAddr,
}

#[derive(ValueEnum, Clone, Copy, Debug)]
pub(crate) enum MethodWord {
    Dr,
    #[value(alias = "ipip")]
    Tun,
}

impl RealServerCommand {
    /// Changes this host, or shows what was changed.
    pub(crate) fn run(self) -> Result<(), Failure> {
        let notices = match self {
            Self::Up { site: SiteWords { interface, vip }, method } => {
                let method = match method {
                    MethodWord::Dr => Method::Dr,
                    MethodWord::Tun => Method::Tun,
                };
                realserver::up(&interface, vip, method)?
            }
            Self::Down { site: SiteWords { interface, vip } } => realserver::down(&interface, vip)?,
            Self::Status(form) => return form.print(&realserver::status()?, ToString::to_string),
        };
        for notice in notices {
            complain(&notice);
        }
        Ok(())
    }
}
