//! Programs that run beside the demo and do not outlive it.

use std::{
    os::unix::process::CommandExt as _,
    process::{ChildStderr, ChildStdout, Command, ExitStatus},
};

use anyhow::{Context as _, Result};

/// A program that is ended when this is dropped.
#[derive(Debug)]
pub(crate) struct Child(std::process::Child);

impl Child {
    /// Starts it. Ctrl-C does not reach it, so that the demo alone decides when it ends.
    pub(crate) fn spawn(command: &mut Command) -> Result<Self> {
        let program = command.get_program().to_string_lossy().into_owned();
        let child = command.process_group(0).spawn().with_context(|| format!("start {program}"))?;
        Ok(Self(child))
    }

    /// Waits for its end.
    pub(crate) fn wait(&mut self) -> Result<ExitStatus> {
        self.0.wait().context("wait for a program")
    }

    /// How it ended, if it has.
    pub(crate) fn status(&mut self) -> Result<Option<ExitStatus>> {
        self.0.try_wait().context("look at a program")
    }

    /// What it writes, if it was started with pipes.
    pub(crate) fn outputs(&mut self) -> Option<(ChildStdout, ChildStderr)> {
        self.0.stdout.take().zip(self.0.stderr.take())
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // It may have ended before.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
