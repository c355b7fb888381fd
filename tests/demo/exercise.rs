//! The first exercise of everybody who meets `ipvsadm`: two web servers on the loopback, behind one address.

use std::{
    env,
    ffi::OsString,
    os::unix::fs::symlink,
    process::{Command, Output},
};

use anyhow::{Context as _, Result, ensure};
use tempfile::TempDir;
use xdpvs_tests::{lab::NetNs, program};

use crate::{interrupt::Interrupt, title, web::Web};

/// The commands, as they are taught.
const COMMANDS: [&str; 4] = [
    "ipvsadm -A -t 127.0.0.1:8990 -s rr",
    "ipvsadm -a -t 127.0.0.1:8990 -r 127.0.0.1:8998 -m",
    "ipvsadm -a -t 127.0.0.1:8990 -r 127.0.0.1:8999 -m",
    "ipvsadm -Ln",
];

/// A host where `ipvsadm` is xdpvs.
struct Host {
    namespace: NetNs,
    programs: TempDir,
}

impl Host {
    fn new() -> Result<Self> {
        let programs = TempDir::with_prefix("xdpvs-demo-").context("make a directory for ipvsadm")?;
        let program = program::path()?;
        for name in ["xdpvs", "ipvsadm"] {
            symlink(&program, programs.path().join(name)).with_context(|| format!("link {name}"))?;
        }
        Ok(Self { namespace: NetNs::new("exercise")?, programs })
    }

    fn command(&self, words: &str) -> Command {
        let mut words = words.split_whitespace();
        let mut command = self.namespace.command(words.next().unwrap_or_default());
        let mut path: OsString = self.programs.path().into();
        path.push(":");
        path.push(env::var_os("PATH").unwrap_or_default());
        command.args(words).env("PATH", path).env("XDPVS_INSTANCE", self.namespace.name()).env("no_proxy", "*");
        command
    }

    /// Runs a command and shows it with what it says.
    fn run(&self, words: &str) -> Result<String> {
        println!("$ {words}");
        let Output { status, stdout, stderr } =
            self.command(words).output().with_context(|| format!("run `{words}`"))?;
        let [stdout, stderr] = [stdout, stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        print!("{stdout}{stderr}");
        ensure!(status.success(), "`{words}` failed: {}", stderr.trim());
        Ok(stdout)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // If it is not up, there is nothing to take down.
        let _ = self.command("xdpvs down").output();
    }
}

/// Shows it.
pub(crate) fn show(interrupt: &Interrupt) -> Result<()> {
    title("The first exercise: two web servers behind one address, by ipvsadm, on the loopback");
    let host = Host::new()?;
    let _one = Web::start(&host.namespace, 8998, "this is the server at 8998")?;
    let _other = Web::start(&host.namespace, 8999, "this is the server at 8999")?;
    println!("$ ln -s xdpvs ipvsadm");
    host.run("xdpvs up lo --mode generic")?;
    for command in COMMANDS {
        interrupt.check()?;
        host.run(command)?;
    }
    let request = || host.run("curl -s -m 10 http://127.0.0.1:8990/");
    let answers = [request()?, request()?];
    interrupt.check()?;
    ensure!(answers[0] != answers[1], "the same server answered twice");
    ensure!(answers.iter().all(|answer| answer.starts_with("this is the server at ")), "other pages were answered");
    Ok(())
}
