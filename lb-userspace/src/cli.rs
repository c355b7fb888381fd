//! The command line: what can be said, and what is done about it.
//!
//! Every command opens the instance, reads or changes it, and ends. What goes wrong is one line on standard error that
//! names the thing and the remedy; then nothing has changed.

mod config;
mod connections;
mod failure;
mod instance;
mod ipvsadm;
mod lines;
mod marks;
mod output;
mod realserver;
mod settings;
mod stats;
mod timeouts;
mod words;

use std::{ffi::OsString, process::ExitCode};

use clap::{Parser, Subcommand, error::ErrorKind};
use lb_userspace::{
    datapath::{lifecycle, place::Place},
    error::Error,
};

use failure::Failure;

/// Exit code of a command that could not be carried out.
const FAILED: u8 = 1;
/// Exit code of a command that was not understood.
const MISUSED: u8 = 2;

/// Layer-4 load balancing in XDP, with the services, schedulers and forwarding methods of Linux Virtual Server.
#[derive(Parser, Debug)]
#[command(name = "xdpvs", version, max_term_width = 100)]
struct Arguments {
    /// Name of the instance: 1 to 64 letters, digits, `-` or `_`
    #[arg(long, global = true, env = "XDPVS_INSTANCE", default_value = "default", value_name = "NAME")]
    instance: String,

    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Start the director on interfaces, or give a running one this version's programs and more interfaces
    Up(instance::Up),
    /// End the director: detach its programs, forget services and connections
    Down,
    /// Show whether the director runs, on which interfaces, and how full it is
    Status(output::Form),
    /// Add, change or remove virtual services
    #[command(subcommand)]
    Service(config::ServiceCommand),
    /// Add, change or remove the destinations (real servers) of a service
    #[command(subcommand)]
    Dest(config::DestCommand),
    /// Say which packets have which mark, for services of marks (`service add -f N`)
    #[command(subcommand)]
    Mark(marks::MarkCommand),
    /// Show services and destinations with weights and connections
    List(output::Form),
    /// Show or end connections
    #[command(subcommand)]
    Conn(connections::ConnCommand),
    /// Show what services and destinations have carried, and why packets were not forwarded
    Stats(stats::Stats),
    /// Let the counters of everything, or of a service and its destinations, begin at zero, and their rates
    Zero(stats::Zero),
    /// Show or set how long idle connections live
    #[command(subcommand)]
    Timeout(timeouts::TimeoutCommand),
    /// Show ip_vs's settings (sysctls), or set one
    Set(settings::Set),
    /// Make this host a real server of a director that forwards by DR or tunnel, or undo that
    #[command(subcommand)]
    Realserver(realserver::RealServerCommand),
    /// Speak ipvsadm: the same options, output and exit codes, as also under the name `ipvsadm`
    #[command(disable_help_flag = true)]
    Ipvsadm {
        /// What would stand behind `ipvsadm`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "WORDS")]
        words: Vec<OsString>,
    },
}

/// Does what the words of a command line say.
pub(crate) fn main(words: impl IntoIterator<Item = OsString>) -> ExitCode {
    let mut words = words.into_iter().peekable();
    if words.peek().is_some_and(|program| ipvsadm::is_called(program)) {
        return ipvsadm::main(words);
    }
    let arguments = match Arguments::try_parse_from(words) {
        Ok(arguments) => arguments,
        Err(error) if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => {
            return output::written(error.print()).map_or_else(fail, |()| ExitCode::SUCCESS);
        }
        Err(error) => {
            complain(&output::one_line(&error));
            return ExitCode::from(MISUSED);
        }
    };
    run(&arguments.instance, arguments.command).unwrap_or_else(fail)
}

fn fail(failure: Failure) -> ExitCode {
    complain(&failure.line());
    ExitCode::from(FAILED)
}

/// Tells the user something that is not what was asked for.
fn complain(line: &str) {
    output::complain(&format!("xdpvs: {line}"));
}

fn run(instance: &str, command: Command) -> Result<ExitCode, Failure> {
    let root = || if nix::unistd::geteuid().is_root() { Ok(()) } else { Err(Error::NotRoot) };
    let place = || root().and_then(|()| Place::find(instance));
    match command {
        Command::Up(up) => up.run(&place()?)?,
        Command::Down => lifecycle::down(&place()?)?,
        Command::Status(form) => instance::status(&place()?, form)?,
        Command::Service(command) => command.run(&place()?)?,
        Command::Dest(command) => command.run(&place()?)?,
        Command::Mark(command) => command.run(&place()?)?,
        Command::List(form) => config::list(&place()?, form)?,
        Command::Conn(command) => command.run(&place()?)?,
        Command::Stats(stats) => stats.run(&place()?)?,
        Command::Zero(zero) => zero.run(&place()?)?,
        Command::Timeout(command) => command.run(&place()?)?,
        Command::Set(set) => set.run(&place()?)?,
        Command::Realserver(command) => {
            root()?;
            command.run()?;
        }
        Command::Ipvsadm { words } => return Ok(ipvsadm::as_subcommand(instance, words)),
    }
    Ok(ExitCode::SUCCESS)
}
