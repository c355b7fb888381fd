//! Real web servers.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpStream},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use tempfile::TempDir;
use xdpvs_tests::lab::NetNs;

use crate::child::Child;

/// How long an nginx may take to start.
const PATIENCE: Duration = Duration::from_secs(10);

/// An nginx with one page. It ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Web {
    _child: Child,
    _files: TempDir,
}

impl Web {
    /// Starts it at this port of a namespace, for IPv4 and IPv6, and waits until it answers.
    pub(crate) fn start(namespace: &NetNs, port: u16, page: &str) -> Result<Self> {
        let files = TempDir::with_prefix("xdpvs-demo-").context("make a directory for nginx")?;
        let directory = files.path().display().to_string();
        // One process, in the foreground: ending it leaves nothing. Every connection is closed after its request, so
        // that every request is a connection to be scheduled.
        let configuration = format!(
            "daemon off; master_process off; pid {directory}/pid; error_log {directory}/error.log;
             events {{}}
             http {{
                 access_log off; keepalive_timeout 0; default_type text/plain;
                 server {{ listen {port}; listen [::]:{port}; root {directory}; index page; }}
             }}"
        );
        let log = files.path().join("error.log");
        let configured = files.path().join("nginx.conf");
        fs::write(&configured, configuration).context("configure nginx")?;
        fs::write(files.path().join("page"), format!("{page}\n")).context("write the page")?;
        // It dies with the demo, however that ends.
        let mut command = namespace.command("setpriv");
        command.args(["--pdeathsig", "KILL", "nginx", "-e"]).arg(&log).arg("-c").arg(&configured);
        let mut child = Child::spawn(&mut command)?;
        let begun = Instant::now();
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        while namespace.enter(|| TcpStream::connect(address))?.is_err() {
            if child.status()?.is_some() || begun.elapsed() > PATIENCE {
                let said = fs::read_to_string(&log).unwrap_or_default();
                bail!("nginx does not answer at port {port}: {}", said.lines().last().unwrap_or("it does not say why"));
            }
            sleep(Duration::from_millis(10));
        }
        Ok(Self { _child: child, _files: files })
    }
}
