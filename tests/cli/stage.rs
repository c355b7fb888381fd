//! Where the tests play: a namespace for the director with a cable to one for clients.

use std::{
    fs,
    path::Path,
    process::{Command, Output, Stdio},
    sync::{
        Once,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use lb_userspace::datapath::{lifecycle, place::Place};
use serde_json::Value;
use xdpvs_tests::{
    cast,
    lab::{self, End, NetNs, mac},
    program,
};

/// What the names of the instances of these tests begin with; the process's number and a number of the test follow.
const PREFIX: &str = "cli-";

/// The director's interface.
pub(crate) const WIRE: &str = "wire";

/// What a command has said, and how it has ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Said {
    pub(crate) out: String,
    pub(crate) err: String,
    /// `None` when a signal has ended it.
    pub(crate) code: Option<i32>,
}

impl From<Output> for Said {
    fn from(output: Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Self { out: text(&output.stdout), err: text(&output.stderr), code: output.status.code() }
    }
}

/// A network for an instance of its own, which need not run. Both are gone when it is dropped.
pub(crate) struct Stage {
    pub(crate) director: NetNs,
    pub(crate) client: NetNs,
    pub(crate) instance: String,
}

impl Stage {
    /// A cable from the client, 10.0.0.2, to the director's interface [`WIRE`], 10.0.0.1 and 10.2.0.1, which knows the
    /// link-layer addresses of real servers on it that do not exist.
    pub(crate) fn new() -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        static SWEPT: Once = Once::new();
        lab::require_root()?;
        SWEPT.call_once(sweep);
        let instance = format!("{PREFIX}{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let stage = Self { director: NetNs::new("director")?, client: NetNs::new("client")?, instance };
        let Self { director, client, .. } = &stage;
        let end = |namespace, name, mac, address| End { namespace, name, mac, address: Some(address) };
        lab::cable(
            end(director, WIRE, cast::DIRECTOR_OUTSIDE_MAC, "10.0.0.1/24"),
            end(client, "eth0", cast::CLIENT_MAC, "10.0.0.2/24"),
        )?;
        director.ip(&format!("address add 10.2.0.1/24 dev {WIRE}"))?;
        for index in 0..4 {
            let (server, address) = (cast::server(index), mac(cast::server_mac(index)));
            director.ip(&format!("neigh add {server} lladdr {address} dev {WIRE} nud permanent"))?;
        }
        client.ip(&format!("neigh add 10.0.0.1 lladdr {} dev eth0 nud permanent", mac(cast::DIRECTOR_OUTSIDE_MAC)))?;
        client.ip(&format!("route add {}/32 via 10.0.0.1", cast::VIP))?;
        Ok(stage)
    }

    /// A stage with a director that runs on [`WIRE`].
    pub(crate) fn with_director() -> Result<Self> {
        let stage = Self::new()?;
        stage.ok(&format!("up {WIRE} --max-flows 10000 --max-services 64 --max-dests 256"))?;
        Ok(stage)
    }

    /// A command of the program for this stage's instance.
    pub(crate) fn command(&self, words: &[&str]) -> Result<Command> {
        let mut command = program::command(&self.director, &program::path()?, words);
        command.env("XDPVS_INSTANCE", &self.instance).stdin(Stdio::null());
        Ok(command)
    }

    /// Runs a command whose words are separated by spaces.
    pub(crate) fn say(&self, words: &str) -> Result<Said> {
        let words: Vec<&str> = words.split_whitespace().collect();
        Ok(self.command(&words)?.output().context("run xdpvs")?.into())
    }

    /// Runs a command that must succeed and have nothing to complain about. Returns what it says.
    pub(crate) fn ok(&self, words: &str) -> Result<String> {
        let Said { out, err, code } = self.say(words)?;
        anyhow::ensure!((err.as_str(), code) == ("", Some(0)), "xdpvs {words}: {code:?} {err}");
        Ok(out)
    }

    /// What a reading command answers in JSON.
    pub(crate) fn ask(&self, words: &str) -> Result<Value> {
        let answer = self.ok(&format!("{words} --json"))?;
        serde_json::from_str(&answer).with_context(|| answer)
    }

    /// Whether no interface of the director has a program, at the latest after a moment: the kernel takes one off some
    /// time after the last reference to it has gone.
    pub(crate) fn is_bare(&self) -> Result<bool> {
        for _ in 0..50 {
            if !self.director.ip("link show")?.contains("prog/xdp") {
                return Ok(true);
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(false)
    }

    /// Where the instance is.
    pub(crate) fn place(&self) -> Place {
        Place::find(&self.instance).expect("a BPF file system is mounted")
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // What cannot be removed now is removed by the next run. It is no failure that nothing runs.
        let _ = self.say("down");
    }
}

/// Ends the instances of processes that are no more.
fn sweep() {
    let Ok(any) = Place::find("any") else { return };
    let Some(root) = any.directory().parent().map(Path::to_owned) else { return };
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().trim_end_matches('~').to_owned();
        let owner = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next()).map(str::to_owned);
        let gone = owner.is_some_and(|owner| !Path::new("/proc").join(owner).exists());
        if gone && let Ok(place) = Place::find(&name) {
            let _ = lifecycle::down(&place);
        }
    }
}
