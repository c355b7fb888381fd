//! Tests in virtual machines that run Debian's kernels, for verifier and helpers differ from kernel to kernel.
//!
//! The processor is emulated: this needs no virtualisation by the one below, and takes about 15 times as long.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    build, machine, step,
    test::Tally,
    toolchain::{Tools, host_cargo},
    vm::{guest::Guest, kernel::Kernel},
};

mod guest;
pub(crate) mod kernel;

/// The kernels that every change is tested on, besides the one that runs.
pub(crate) const KERNELS: [&str; 2] = ["6.1", "6.12"];

/// Those, and the newest there is.
pub(crate) fn all() -> Vec<String> {
    KERNELS.iter().chain(&[kernel::NEWEST]).map(|kernel| (*kernel).to_owned()).collect()
}

/// The programs that it takes, the packages they are in, and what they are for.
pub(crate) const PROGRAMS: [(&str, &str, &str); 8] = [
    ("qemu-system-x86_64", "qemu-system-x86", "runs other kernels"),
    ("busybox", "busybox-static", "is the shell of virtual machines"),
    ("cpio", "cpio", "makes their file systems"),
    ("strip", "binutils", "makes the tests small enough for them"),
    ("xz", "xz-utils", "unpacks their kernels' modules"),
    ("ldd", "libc-bin", "finds the libraries they need"),
    ("timeout", "coreutils", "ends machines that hang"),
    ("setpriv", "util-linux", "ends machines that nobody waits for"),
];

/// Tests of one test program: all, or those with a word in their names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Selection {
    program: String,
    word: Option<String>,
}

impl Selection {
    /// What is said as `PROGRAM` or `PROGRAM:WORD`.
    fn parse(text: &str) -> Self {
        match text.split_once(':') {
            Some((program, word)) => Self { program: program.to_owned(), word: Some(word.to_owned()) },
            None => Self { program: text.to_owned(), word: None },
        }
    }

    /// What is run when nothing is said: every program of all objects is loaded, every packet case is run in the kernel,
    /// and clients speak to servers by every method. The first packet has a way of its own, which kernels before 6.6 have
    /// only in an older form.
    pub(crate) fn usual() -> Vec<Self> {
        ["loading", "cases:kernel", "traffic:smoke", "traffic:the_first_packet"].map(Self::parse).to_vec()
    }

    /// What is said, if anything is.
    pub(crate) fn of(texts: &[String]) -> Vec<Self> {
        if texts.is_empty() { Self::usual() } else { texts.iter().map(|text| Self::parse(text)).collect() }
    }
}

impl std::fmt::Display for Selection {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.word {
            Some(word) => write!(formatter, "{}:{word}", self.program),
            None => formatter.write_str(&self.program),
        }
    }
}

/// What a machine came to.
struct Outcome {
    release: String,
    /// By name of the program, how many instructions the verifier went through.
    verified: BTreeMap<String, u32>,
    /// How many packet cases held in the kernel, if they were asked for.
    cases: Option<u32>,
    tallies: Vec<Tally>,
    /// Everything that was said.
    log: PathBuf,
}

impl Outcome {
    /// Reads what a machine said.
    fn of(release: &str, said: &str, selections: &[Selection], log: &Path) -> Self {
        let mut verified = BTreeMap::new();
        let mut cases = None;
        for line in said.lines() {
            // The test runner begins the line with the name of the test.
            let line = line.rsplit(" ... ").next().unwrap_or(line);
            let words: Vec<&str> = line.split_whitespace().collect();
            match *words.as_slice() {
                [program, count, "instructions", "verified"] => {
                    if let (Some(program), Ok(count)) = (program.strip_suffix(':'), count.parse()) {
                        verified.insert(program.to_owned(), count);
                    }
                }
                [count, "cases", "hold", "in", "the", "kernel"] => cases = count.parse().ok(),
                _ => {}
            }
        }
        let tallies = (0..selections.len()).map(|index| tally(said, index)).collect();
        Self { release: release.to_owned(), verified, cases, tallies, log: log.to_owned() }
    }

    fn is_good(&self) -> bool {
        self.tallies.iter().all(|tally| tally.is_good() && tally.passed > 0)
    }

    /// What became of a selection, in a word or two.
    fn verdict(&self, index: usize) -> String {
        match &self.tallies[index] {
            tally if !tally.is_good() => "FAILED".to_owned(),
            tally if tally.passed == 0 => "NONE RUN".to_owned(),
            tally => format!("{} passed", tally.passed),
        }
    }
}

/// What tests a selection came to, by the words between its marks. Without a mark at the end the machine hung or crashed.
fn tally(said: &str, index: usize) -> Tally {
    let (begin, end) = (guest::begin_mark(index), guest::end_mark(index));
    let mut tally = Tally::default();
    let mut within = false;
    let mut success = false;
    for line in said.lines().map(str::trim_end) {
        if line == begin {
            within = true;
        } else if let Some(status) = line.strip_prefix(&end) {
            success = status.trim() == "0";
            break;
        } else if within {
            tally.take(line);
        }
    }
    tally.finish(success);
    tally
}

/// Builds everything, runs the tests on each kernel and prints a table.
pub(crate) fn run(tools: &Tools, kernels: &[String], selections: &[Selection]) -> Result<()> {
    let kernels = kernel::fetch(kernels.iter().map(String::as_str))?;
    build::everything(tools)?;
    check(&kernels, selections)
}

/// Runs the tests on each kernel and prints a table. All kernels are tried, even if some fail.
pub(crate) fn check(kernels: &[Kernel], selections: &[Selection]) -> Result<()> {
    let programs = test_programs(selections)?;
    let mut outcomes = Vec::new();
    for kernel in kernels {
        let heading = format!("Linux {}", kernel.release);
        outcomes.push(step::headed(&heading, || boot(kernel, &programs, selections))?);
    }
    print!("\n{}", table(&outcomes, selections));
    let bad: Vec<_> = outcomes.iter().filter(|outcome| !outcome.is_good()).collect();
    let described: Vec<_> =
        bad.iter().map(|outcome| format!("Linux {} (see {})", outcome.release, outcome.log.display())).collect();
    ensure!(bad.is_empty(), "tests failed on {}", described.join(", "));
    Ok(())
}

fn boot(kernel: &Kernel, programs: &BTreeMap<String, PathBuf>, selections: &[Selection]) -> Result<Outcome> {
    let directory = machine::root()?.join("target/vm");
    fs::create_dir_all(&directory).with_context(|| format!("make {}", directory.display()))?;
    // One machine at a time: two would use the same files, and make each other slow.
    let lock = File::create(directory.join("lock")).context("make a lock")?;
    lock.lock().context("wait for another machine")?;
    let log = directory.join(format!("{}.log", kernel.release));
    let file = File::create(&log).with_context(|| format!("write {}", log.display()))?;
    let guest = Guest::make(kernel, programs, selections, &directory)?;
    if let Some(trouble) = guest.run(file)? {
        println!("{trouble}");
    }
    let said = fs::read(&log).with_context(|| format!("read {}", log.display()))?;
    let outcome = Outcome::of(&kernel.release, &String::from_utf8_lossy(&said), selections, &log);
    for tally in &outcome.tallies {
        tally.failures.iter().for_each(|failure| println!("failed: {failure}"));
    }
    Ok(outcome)
}

/// Builds the test programs. Returns where they are.
fn test_programs(selections: &[Selection]) -> Result<BTreeMap<String, PathBuf>> {
    let mut command = host_cargo("test")?;
    command.args(["--no-run", "--package", "xdpvs-tests"]);
    for selection in selections {
        command.args(["--test", &selection.program]);
    }
    let output = command.stdin(Stdio::null()).output().context("start cargo")?;
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        std::io::stderr().write_all(&output.stderr)?;
    }
    ensure!(output.status.success(), "the tests did not build");
    let root = machine::root()?;
    Ok(said.lines().filter_map(executable).map(|(name, path)| (name.to_owned(), root.join(path))).collect())
}

/// The name and path of a test program, by what cargo says of it: `Executable tests/a.rs (target/debug/deps/a-0123)`.
fn executable(line: &str) -> Option<(&str, &str)> {
    let path = line.trim().strip_prefix("Executable ")?.split_once('(')?.1.strip_suffix(')')?;
    let (name, _) = path.rsplit('/').next()?.rsplit_once('-')?;
    Some((name, path))
}

/// A table with a column for each kernel.
fn table(outcomes: &[Outcome], selections: &[Selection]) -> String {
    let programs: BTreeMap<&str, ()> =
        outcomes.iter().flat_map(|outcome| outcome.verified.keys()).map(|program| (program.as_str(), ())).collect();
    let mut rows: Vec<Vec<String>> = Vec::new();
    let mut row = |head: &str, cell: &dyn Fn(&Outcome) -> String| {
        rows.push(std::iter::once(head.to_owned()).chain(outcomes.iter().map(cell)).collect());
    };
    row("kernel", &|outcome| outcome.release.clone());
    if !programs.is_empty() {
        row("programs loaded", &|outcome| format!("{} of {}", outcome.verified.len(), programs.len()));
    }
    for program in programs.keys() {
        row(&format!("  {program}, instructions verified"), &|outcome| {
            outcome.verified.get(*program).map_or_else(|| "NOT LOADED".to_owned(), u32::to_string)
        });
    }
    if outcomes.iter().any(|outcome| outcome.cases.is_some()) {
        row("packet cases that hold", &|outcome| {
            outcome.cases.map_or_else(|| "NOT ALL".to_owned(), |cases| cases.to_string())
        });
    }
    for (index, selection) in selections.iter().enumerate() {
        row(&format!("tests {selection}"), &|outcome| outcome.verdict(index));
    }
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..=outcomes.len()).map(width).collect();
    let line = |row: &Vec<String>| {
        let mut line = format!("{:<width$}", row[0], width = widths[0]);
        for (cell, width) in row.iter().zip(&widths).skip(1) {
            line += &format!("  {cell:>width$}");
        }
        line + "\n"
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{Outcome, Selection, executable, table};

    const SAID: &str = "\
Booting from ROM..\r
@@ begin 0\r
running 1 test\r
test the_programs_load ... xdpvs: 24053 instructions verified\r
observe: 4785 instructions verified\r
ok\r
test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.02s\r
@@ end 0 0\r
@@ begin 1\r
test every_case ... 118 cases hold in the kernel\r
ok\r
test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.02s\r
@@ end 1 0\r
@@ begin 2\r
running 1 test\r
Kernel panic - not syncing\r
";

    #[test]
    fn a_machine_that_crashes_has_failed_in_what_it_did_last() {
        let selections = ["loading", "cases", "traffic:smoke"].map(Selection::parse);
        let outcome = Outcome::of("6.1.0", SAID, &selections, Path::new("log"));
        assert!(!outcome.is_good());
        let expected = "\
kernel                               6.1.0
programs loaded                     2 of 2
  observe, instructions verified      4785
  xdpvs, instructions verified       24053
packet cases that hold                 118
tests loading                     1 passed
tests cases                       1 passed
tests traffic:smoke                 FAILED
";
        assert_eq!(table(&[outcome], &selections), expected);
    }

    #[test]
    fn tests_that_do_not_exist_have_not_passed() {
        let said =
            "@@ begin 0\ntest result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 9 filtered out;\n@@ end 0 0\n";
        let selections = [Selection::parse("traffic:smock")];
        let outcome = Outcome::of("6.1.0", said, &selections, Path::new("log"));
        assert_eq!((outcome.is_good(), outcome.verdict(0)), (false, "NONE RUN".to_owned()));
    }

    #[test]
    fn cargo_says_where_test_programs_are() {
        let line = "  Executable tests/cases.rs (target/debug/deps/cases-882e3a9feb5df62f)";
        assert_eq!(executable(line), Some(("cases", "target/debug/deps/cases-882e3a9feb5df62f")));
        assert_eq!(executable("   Compiling xdpvs v0.1.0 (/a/b-c)"), None);
    }
}
