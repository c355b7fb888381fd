//! Breaks the flow table's protocol, one way at a time, and sees whether a test notices.
//!
//! Each break is made in a copy of the sources below the build directory. So what is in the repository stays as it is
//! whenever this ends.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{machine, toolchain::host_cargo};

mod mutations;

use mutations::{MUTATIONS, Mutation};

/// Where copies are made, below the build directory.
const DIRECTORY: &str = "mutants";
/// What the tests of the flow table are made from.
const CRATES: [&str; 2] = ["lb-common", "lb-ebpf"];
/// A broken table may let a test go on forever. As it is, all take a fraction of this.
const PATIENCE: Duration = Duration::from_secs(300);

/// Runs the tests of the flow table on the protocol as it is, and on every broken one; or on those with one of these words in
/// what they are called, if there are words.
pub(crate) fn run(words: &[String]) -> Result<()> {
    let is_wanted = |mutation: &&Mutation| words.is_empty() || words.iter().any(|word| mutation.what.contains(word));
    let wanted: Vec<&Mutation> = MUTATIONS.iter().filter(is_wanted).collect();
    ensure!(!wanted.is_empty(), "none is called anything with {}", words.join(" or "));
    let root = machine::root()?;
    let copy = root.join("target").join(DIRECTORY).join("source");
    copy_sources(&root, &copy)?;
    println!("{} ways to break the flow table", wanted.len());
    if let Outcome::Caught(test) = test(&copy)? {
        bail!("{test} fails without any of them");
    }
    let mut missed = 0;
    for mutation in &wanted {
        let start = Instant::now();
        let file = copy.join(mutation.file);
        let whole = read(&file)?;
        write(&file, &mutation.apply(&copy)?)?;
        let outcome = test(&copy);
        write(&file, &whole)?;
        let words = match outcome.with_context(|| mutation.what.to_owned())? {
            Outcome::Caught(test) => format!("caught by {test}"),
            Outcome::Missed => {
                missed += 1;
                "MISSED".to_owned()
            }
        };
        println!("{:4.0} s  {}: {words}", start.elapsed().as_secs_f64(), mutation.what);
    }
    ensure!(missed == 0, "{missed} of {} were missed", wanted.len());
    Ok(())
}

impl Mutation {
    /// The broken file.
    fn apply(&self, sources: &Path) -> Result<String> {
        let whole = read(&sources.join(self.file))?;
        let places = whole.matches(self.from).count();
        ensure!(places == 1, "{}: what it replaces is in {} {places} times", self.what, self.file);
        Ok(whole.replacen(self.from, self.to, 1))
    }
}

/// What came of a run of the tests.
enum Outcome {
    /// One failed: its name.
    Caught(String),
    /// None did.
    Missed,
}

/// Runs the tests until one fails.
fn test(sources: &Path) -> Result<Outcome> {
    let build = machine::root()?.join("target").join(DIRECTORY).join("build");
    let mut command = host_cargo("test")?;
    command.args(["--package", "lb-ebpf", "--test", "flow_table", "--no-run", "--message-format", "json"]);
    command.current_dir(sources).env("CARGO_TARGET_DIR", build).stdin(Stdio::null());
    let compiled = command.output().context("start cargo")?;
    ensure!(compiled.status.success(), "it does not compile: {}", String::from_utf8_lossy(&compiled.stderr));
    let words = String::from_utf8_lossy(&compiled.stdout);
    let program = words.rsplit("\"executable\":\"").next().and_then(|rest| rest.split('"').next());
    let mut command = Command::new(program.context("cargo names no test program")?);
    // Nobody looks at what a test has found, so it need not look for less that fails, too.
    command.env("PROPTEST_MAX_SHRINK_ITERS", "0");
    command.env("RUST_BACKTRACE", "0").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().context("start the tests")?;
    let output = child.stdout.take().context("the tests have an output")?;
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || BufReader::new(output).lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
    let end = Instant::now() + PATIENCE;
    let failed = loop {
        match lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                if let Some(test) = line.strip_suffix(" ... FAILED").and_then(|line| line.strip_prefix("test ")) {
                    break Some(test.to_owned());
                }
            }
            Err(RecvTimeoutError::Timeout) => break Some("the time limit".to_owned()),
            Err(RecvTimeoutError::Disconnected) => break None,
        }
    };
    if failed.is_some() {
        child.kill().context("stop the tests")?;
    }
    let status = child.wait().context("wait for the tests")?;
    Ok(match failed {
        Some(test) => Outcome::Caught(test),
        None if status.success() => Outcome::Missed,
        None => Outcome::Caught(format!("a crash of the tests ({status})")),
    })
}

fn copy_sources(from: &Path, to: &Path) -> Result<()> {
    if to.exists() {
        fs::remove_dir_all(to).with_context(|| format!("remove {}", to.display()))?;
    }
    fs::create_dir_all(to).with_context(|| format!("make {}", to.display()))?;
    for name in CRATES {
        copy_tree(&from.join(name), &to.join(name))?;
    }
    write(&to.join("Cargo.lock"), &read(&from.join("Cargo.lock"))?)?;
    let manifest = read(&from.join("Cargo.toml"))?;
    let lines = manifest.lines().map(|line| match line.split_once(" = ") {
        Some(("members", _)) => format!("members = {CRATES:?}"),
        Some(("default-members", _)) => String::new(),
        _ => line.to_owned(),
    });
    write(&to.join("Cargo.toml"), &lines.collect::<Vec<_>>().join("\n"))
}

fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("make {}", to.display()))?;
    for entry in fs::read_dir(from).with_context(|| format!("read {}", from.display()))? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_tree(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), &target).with_context(|| format!("copy {}", entry.path().display()))?;
        }
    }
    Ok(())
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("read {}", path.display()))
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mutation_changes_the_source_as_it_is() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the repository");
        for mutation in MUTATIONS {
            let broken = mutation.apply(root).expect("one place");
            assert_ne!(broken, read(&root.join(mutation.file)).expect("a file"), "{}", mutation.what);
        }
    }
}
