//! Checks the source, builds, and runs every test.

use std::{
    env,
    io::{BufRead as _, BufReader, IsTerminal as _, Write as _, pipe, stdout},
    process::Stdio,
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    build, machine, step,
    toolchain::{Tools, host_cargo},
    vm,
};

/// Runs all of it. The tests run to their end even if some fail; the checks before them do not.
pub(crate) fn run(tools: &Tools) -> Result<()> {
    step::headed("format", || {
        let colour = if stdout().is_terminal() { "auto" } else { "never" };
        step::show(host_cargo("fmt")?.args(["--all", "--check", "--", "--color", colour]))
            .context("run `cargo fmt --all`")
    })?;
    step::headed("eBPF programs", || build::objects(tools))?;
    step::headed("lints of the eBPF programs", || {
        step::show(tools.cargo("clippy")?.args(["--lib", "--bins", "--", "--deny", "warnings"]))
    })?;
    step::headed("lints", || {
        step::show(host_cargo("clippy")?.args(["--workspace", "--all-targets", "--", "--deny", "warnings"]))
    })?;
    step::headed("target/release/xdpvs", build::program)?;
    let tally = step::headed("tests", tests)?;
    println!("{tally}");
    let on_others = others();
    ensure!(tally.is_good(), "tests failed: {}", tally.failures.join(", "));
    on_others
}

/// Tests on other kernels, if those can be had: without a network, all else is tested. Not so in continuous integration,
/// which tests for everybody.
fn others() -> Result<()> {
    match step::headed("other kernels", || vm::kernel::fetch(vm::KERNELS.into_iter())) {
        Ok(kernels) => vm::check(&kernels, &vm::Selection::usual()),
        Err(error) if env::var_os("CI").is_some() => Err(error),
        Err(error) => {
            eprintln!("\nNOT TESTED on Linux {}: {error:#}", vm::KERNELS.join(" and "));
            Ok(())
        }
    }
}

/// What is tested together. The tests of the data plane's library want every access to memory that is shared looked at, which
/// makes it many times slower: so in programs of their own.
const TOGETHER: [&[&str]; 2] = [&["--package", "lb-ebpf"], &["--workspace", "--exclude", "lb-ebpf"]];

/// Runs the tests of the workspace and shows what they say.
fn tests() -> Result<Tally> {
    let mut tally = Tally::default();
    for packages in TOGETHER {
        tests_of(packages, &mut tally)?;
    }
    Ok(tally)
}

fn tests_of(packages: &[&str], tally: &mut Tally) -> Result<()> {
    let mut command = host_cargo("test")?;
    // What is tested is what people use.
    command.env("XDPVS", machine::root()?.join("target/release/xdpvs"));
    // One pipe for both, so that the name of a test program stays before its results.
    let (reader, writer) = pipe().context("make a pipe")?;
    command.args(packages).arg("--no-fail-fast").stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
    let mut child = command.spawn().context("start cargo")?;
    // The command holds the pipe's other end, which must close when the tests end.
    drop(command);
    for line in BufReader::new(reader).split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        writeln!(stdout(), "{line}")?;
        tally.take(&line);
    }
    tally.finish(child.wait()?.success());
    Ok(())
}

/// What the tests came to, by what their runner says.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: u32,
    failed: u32,
    skipped: u32,
    pub(crate) failures: Vec<String>,
    /// The test program that runs.
    program: Option<String>,
    /// Whether the names of failed tests follow.
    names_follow: bool,
}

impl Tally {
    pub(crate) fn is_good(&self) -> bool {
        self.failures.is_empty()
    }

    pub(crate) fn take(&mut self, line: &str) {
        let words = line.trim();
        if let Some(program) = words.strip_prefix("Running ").or_else(|| words.strip_prefix("Doc-tests ")) {
            self.end_program();
            self.program = Some(program_name(program).to_owned());
        } else if let Some(counts) = words.strip_prefix("test result: ") {
            self.names_follow = false;
            self.program = None;
            for count in counts.split(['.', ';']) {
                let mut words = count.split_whitespace();
                let (number, what) = (words.next().and_then(|number| number.parse::<u32>().ok()), words.next());
                match (number, what) {
                    (Some(number), Some("passed")) => self.passed += number,
                    (Some(number), Some("failed")) => self.failed += number,
                    (Some(number), Some("ignored")) => self.skipped += number,
                    _ => {}
                }
            }
        } else if line == "failures:" {
            // It stands twice: before what the failed tests said, and before their names. Only names are indented.
            self.names_follow = true;
        } else if self.names_follow && line.starts_with("    ") && !words.contains(' ') {
            let name = match &self.program {
                Some(program) => format!("{words} in {program}"),
                None => words.to_owned(),
            };
            if !self.failures.contains(&name) {
                self.failures.push(name);
            }
        } else if !words.is_empty() {
            self.names_follow = false;
        }
    }

    /// Counts a test program that came to no result: it crashed.
    fn end_program(&mut self) {
        if let Some(program) = self.program.take() {
            self.failures.push(program);
        }
    }

    pub(crate) fn finish(&mut self, success: bool) {
        self.end_program();
        if !success && self.failures.is_empty() {
            self.failures.push("the tests did not build".to_owned());
        }
    }
}

/// The crate of a test program, or the name of its file of tests: what cargo made its file's name from.
fn program_name(running: &str) -> &str {
    let file = running.rsplit('/').next().unwrap_or(running).trim_end_matches(')');
    file.rsplit_once('-').map_or(file, |(name, _)| name)
}

impl std::fmt::Display for Tally {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{} tests passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

#[cfg(test)]
mod tests {
    use super::Tally;

    const SAID: &str = "\
   Compiling pack v0.1.0
     Running unittests src/lib.rs (target/debug/deps/pack-0123)

running 2 tests
test a::adds ... ok
test a::wraps ... FAILED

failures:

---- a::wraps stdout ----
thread 'a::wraps' panicked at src/lib.rs:1:1:
    indented

failures:
    a::wraps

test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s

error: test failed, to rerun pass `-p pack --lib`
     Running tests/crash.rs (target/debug/deps/crash-4567)

running 1 test
error: test failed, to rerun pass `-p pack --test crash`

Caused by:
  process didn't exit successfully: `crash-4567` (signal: 6, SIGABRT: process abort signal)
     Running tests/fine.rs (target/debug/deps/fine-89ab)

running 3 tests
test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.02s
";

    #[test]
    fn failed_tests_and_crashed_programs_are_named() {
        let mut tally = Tally::default();
        SAID.lines().for_each(|line| tally.take(line));
        tally.finish(false);
        assert_eq!(tally.to_string(), "3 tests passed, 1 failed, 1 skipped");
        assert_eq!(tally.failures, ["a::wraps in pack", "crash"]);
    }

    #[test]
    fn tests_that_do_not_build_are_a_failure() {
        let mut tally = Tally::default();
        tally.take("error[E0425]: cannot find value");
        tally.finish(false);
        assert!(!tally.is_good());
    }

    #[test]
    fn nothing_failed_when_the_runner_says_so() {
        let mut tally = Tally::default();
        tally.take("     Running tests/fine.rs (target/debug/deps/fine-89ab)");
        tally.take("test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.02s");
        tally.finish(true);
        assert!(tally.is_good());
    }
}
