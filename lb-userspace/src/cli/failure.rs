//! Why a command was not carried out.

use lb_userspace::{
    control::{change::Commit, model::Refusal},
    error::{Error, with_causes},
    realserver,
};

/// Why a command was not carried out.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// It asks for what cannot be.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// It could not be put in force.
    #[error(transparent)]
    Commit(#[from] Commit),
    /// The instance or the kernel did not do it.
    #[error(transparent)]
    Kernel(#[from] Error),
    /// This host could not be made a real server, or be one no longer.
    #[error(transparent)]
    RealServer(#[from] realserver::Error),
    /// What it is to read cannot be read.
    #[error("read standard input: {0}")]
    Input(std::io::Error),
    /// What it has read makes no sense.
    #[error("line {number}: {why}")]
    Line {
        /// The number of the line, from 1.
        number: usize,
        /// What is wrong.
        why: String,
    },
    /// Its answer could not be written.
    #[error("write to standard output: {0}")]
    Output(std::io::Error),
}

impl Failure {
    /// What went wrong, in one line.
    pub(crate) fn line(&self) -> String {
        with_causes(self)
    }
}
