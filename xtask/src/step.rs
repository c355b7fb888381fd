//! Running commands: in view under a heading, or out of view with their words in a log.
//!
//! What setup says goes to standard error: standard output is for what was asked for.

use std::{
    fs::{self, File, OpenOptions},
    io::{IsTerminal as _, Write as _, stderr},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::machine;

/// How often a command out of view is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// Runs a command to its end and returns what it wrote to its standard output.
///
/// Fails when it cannot be started or fails.
pub(crate) fn read(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("start {}", name(command)))?;
    ensure!(output.status.success(), "{}: {}", name(command), reason(&String::from_utf8_lossy(&output.stderr)));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a command in view to its end. Fails when it does.
pub(crate) fn show(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("start {}", name(command)))?;
    ensure!(status.success(), "{} failed ({status})", name(command));
    Ok(())
}

/// Does a piece of work under a heading and says how long it took.
pub(crate) fn headed<T>(heading: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    println!("\n== {heading}");
    let start = Instant::now();
    let result = work();
    let verdict = if result.is_ok() { "done" } else { "failed" };
    println!("== {heading}: {verdict} in {}", seconds(start));
    result
}

/// What commands out of view write.
pub(crate) struct Log {
    path: PathBuf,
    file: File,
}

impl Log {
    /// Begins a new log in the build directory.
    pub(crate) fn new() -> Result<Self> {
        let directory = machine::root()?.join("target");
        fs::create_dir_all(&directory).with_context(|| format!("make {}", directory.display()))?;
        let path = directory.join("setup.log");
        File::create(&path).with_context(|| format!("write {}", path.display()))?;
        let file = OpenOptions::new().append(true).open(&path).with_context(|| format!("write {}", path.display()))?;
        Ok(Self { path, file })
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Runs a command out of view. A line says what is done and how long it took; the log has the command's own words.
    ///
    /// Fails when the command does: `remedy` says what a person can do about it.
    pub(crate) fn run(&mut self, what: &str, command: &mut Command, remedy: &str) -> Result<()> {
        let start = Instant::now();
        let terminal = stderr().is_terminal();
        eprint!("setup: {what} ...");
        stderr().flush()?;
        writeln!(self.file, "\n$ {command:?}")?;
        let begin = fs::metadata(&self.path)?.len();
        let mut child = command
            .stdin(Stdio::null())
            .stdout(self.file.try_clone()?)
            .stderr(self.file.try_clone()?)
            .spawn()
            .with_context(|| format!("start {}", name(command)))?;
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if terminal {
                eprint!("\rsetup: {what} ... {}", seconds(start));
                stderr().flush()?;
            }
            sleep(LOOK);
        };
        let verdict = if status.success() { "done" } else { "failed" };
        let erase = if terminal { "\r" } else { "" };
        let again = if terminal { format!("setup: {what} ...") } else { String::new() };
        eprintln!("{erase}{again} {verdict} in {}", seconds(start));
        if !status.success() {
            let log = fs::read(&self.path).unwrap_or_default();
            let words = log.get(begin as usize..).unwrap_or_default();
            let reason = reason(&String::from_utf8_lossy(words));
            bail!("{what}: {reason}: {remedy} (everything it said is in {})", self.path.display());
        }
        Ok(())
    }
}

/// The one line of a command's words that says why it failed.
fn reason(words: &str) -> String {
    let lines = || words.lines().map(str::trim).filter(|line| !line.is_empty());
    let error = |line: &&str| line.starts_with("E: ") || line.starts_with("error");
    let line = lines().find(error).or_else(|| lines().next_back()).unwrap_or("it does not say why");
    line.trim_end_matches('.').to_owned()
}

fn name(command: &Command) -> String {
    let program = PathBuf::from(command.get_program());
    program.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn seconds(start: Instant) -> String {
    let elapsed = start.elapsed();
    match elapsed.as_secs() {
        seconds @ 60.. => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{:.1} s", elapsed.as_secs_f64()),
    }
}

#[cfg(test)]
mod tests {
    use super::reason;

    #[test]
    fn the_reason_is_the_line_with_the_error() {
        for (words, expected) in [
            ("Reading...\nE: Unable to locate package x\n", "E: Unable to locate package x"),
            ("   Compiling a\nerror: no network\n\nCaused by:\n  timeout\n", "error: no network"),
            ("mount: permission denied.\n", "mount: permission denied"),
            ("", "it does not say why"),
        ] {
            assert_eq!(reason(words), expected);
        }
    }
}
