//! The program under test: the `xdpvs` that was built beside the test that runs.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

use anyhow::{Context as _, Result, ensure};

use crate::lab::NetNs;

/// Environment variable that names another program to test.
pub const VARIABLE: &str = "XDPVS";

/// Where the program is: what [`VARIABLE`] says, or else in the build directory that this process was started from.
///
/// # Errors
///
/// When it has not been built.
pub fn path() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(VARIABLE) {
        return Ok(path.into());
    }
    let own = std::env::current_exe().context("find out where this program is")?;
    // Tests are in a directory below the one of programs.
    let candidates = own.ancestors().skip(1).take(2).map(|directory| directory.join("xdpvs"));
    let found = candidates.into_iter().find(|path| path.is_file());
    found.with_context(|| format!("no xdpvs beside {}: run `cargo xtask build` first", own.display()))
}

/// A director: an instance of the program in a network namespace, ended when this is dropped.
#[derive(Debug)]
pub struct Director<'n> {
    namespace: &'n NetNs,
    instance: String,
    program: PathBuf,
}

impl<'n> Director<'n> {
    /// Starts a director on these interfaces, with `options` after them.
    ///
    /// # Errors
    ///
    /// When it does not start.
    pub fn up(namespace: &'n NetNs, interfaces: &[&str], options: &[&str]) -> Result<Self> {
        let director = Self { namespace, instance: namespace.name().to_owned(), program: path()? };
        director.run(&[&["up"], interfaces, options].concat())?;
        Ok(director)
    }

    /// A command of the program for this director.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = command(self.namespace, &self.program, words);
        command.env("XDPVS_INSTANCE", &self.instance);
        command
    }

    /// Runs a command of the program to its end and returns what it wrote to its standard output.
    ///
    /// # Errors
    ///
    /// When it fails; the message holds what it wrote to its standard error.
    pub fn run(&self, words: &[&str]) -> Result<String> {
        output(&mut self.command(words))
    }

    /// [`Director::run`] with words separated by spaces.
    ///
    /// # Errors
    ///
    /// When it fails.
    pub fn say(&self, words: &str) -> Result<String> {
        self.run(&words.split_whitespace().collect::<Vec<_>>())
    }

    /// What a reading command answers in JSON.
    ///
    /// # Errors
    ///
    /// When it fails or its answer is no JSON.
    pub fn ask(&self, words: &str) -> Result<serde_json::Value> {
        let answer = self.say(&format!("{words} --json"))?;
        serde_json::from_str(&answer).with_context(|| format!("`xdpvs {words} --json` answers {answer}"))
    }
}

impl Drop for Director<'_> {
    fn drop(&mut self) {
        // What cannot be removed now is of a namespace that is gone soon.
        let _ = self.command(&["down"]).output();
    }
}

/// A command of the program in a namespace.
pub fn command(namespace: &NetNs, program: &Path, words: &[&str]) -> Command {
    let mut command = namespace.command(&program.to_string_lossy());
    command.args(words);
    command
}

/// Runs a command to its end and returns what it wrote to its standard output.
///
/// # Errors
///
/// When it fails; the message holds what it wrote to its standard error.
pub fn output(command: &mut Command) -> Result<String> {
    let Output { status, stdout, stderr } = command.output().context("start it")?;
    ensure!(status.success(), "{command:?} failed: {}", String::from_utf8_lossy(&stderr).trim());
    Ok(String::from_utf8_lossy(&stdout).into_owned())
}
