//! The command line of ipvsadm: its words, its output, its exit codes (`docs/ipvs.md`, chapter 10).
//!
//! [`parse`] makes a command of words and knows nothing of instances; [`execute`] carries it out; [`print`] makes text of
//! what there is.

mod execute;
mod names;
mod options;
mod parse;
mod popt;
mod print;

use std::{
    ffi::{OsStr, OsString},
    path::Path,
    process::ExitCode,
};

use lb_userspace::datapath::place::Place;

use crate::cli::{failure::Failure, output};

/// The name by which the program behaves as ipvsadm does.
const NAME: &str = "ipvsadm";

/// Exit code of ipvsadm for an option or argument that makes no sense.
const MISUSED: u8 = 2;
/// Exit code of ipvsadm when the kernel refuses, or when an option is unknown.
const REFUSED: u8 = 255;
/// Exit code of ipvsadm when something cannot be listed.
const NOT_LISTED: u8 = 1;

/// Why a command line was not carried out: a line for standard error, and the exit code.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Stop {
    text: String,
    code: u8,
}

impl Stop {
    /// An option or argument makes no sense.
    fn misuse(text: impl Into<String>) -> Self {
        Self { text: text.into(), code: MISUSED }
    }

    /// It cannot be done.
    fn refusal(text: impl Into<String>) -> Self {
        Self { text: text.into(), code: REFUSED }
    }
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Self {
        Self::refusal(failure.line())
    }
}

impl From<lb_userspace::error::Error> for Stop {
    fn from(error: lb_userspace::error::Error) -> Self {
        Failure::from(error).into()
    }
}

/// Whether a program started by this name behaves as ipvsadm does.
pub(crate) fn is_called(program: &OsStr) -> bool {
    Path::new(program).file_name() == Some(OsStr::new(NAME))
}

/// Does what the words of an ipvsadm command line say, the first of which is the program's name.
pub(crate) fn main(mut words: impl Iterator<Item = OsString>) -> ExitCode {
    let program = words.next().map_or_else(|| NAME.to_owned(), |word| word.to_string_lossy().into_owned());
    let instance = std::env::var("XDPVS_INSTANCE").unwrap_or_else(|_| "default".to_owned());
    run(&instance, &program, words)
}

/// Does what words say that would stand behind `ipvsadm`, to the instance called `instance`.
pub(crate) fn as_subcommand(instance: &str, words: Vec<OsString>) -> ExitCode {
    run(instance, NAME, words.into_iter())
}

fn run(instance: &str, program: &str, words: impl Iterator<Item = OsString>) -> ExitCode {
    let words: Vec<String> = words.map(|word| word.to_string_lossy().into_owned()).collect();
    let done = parse::parse(program, &words, &names::System)
        .and_then(|parsed| execute::execute(&|| place(instance), program, parsed));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(Stop { text, code }) => {
            output::complain(&text);
            ExitCode::from(code)
        }
    }
}

/// Where the instance is: what for ipvsadm is the kernel.
fn place(instance: &str) -> Result<Place, Stop> {
    let no_kernel = |reason: String| Stop::misuse(format!("Can't initialize ipvs: {reason}"));
    if !nix::unistd::geteuid().is_root() {
        return Err(no_kernel("Permission denied (you must be root)".into()));
    }
    let place = Place::find(instance).map_err(|error| no_kernel(Failure::from(error).line()))?;
    if place.exists() {
        return Ok(place);
    }
    let error = lb_userspace::error::Error::NotRunning { name: instance.to_owned() };
    Err(no_kernel(Failure::from(error).line()))
}
