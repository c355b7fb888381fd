//! One forwarding method: real requests through a director to three real servers of different weight.

use std::{
    io::{BufRead as _, BufReader, Read as _},
    process::Stdio,
};

use anyhow::{Context as _, Result, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use lb_common::proto::Method;
use lb_userspace::control::model::Transport;
use serde_json::Value;
use xdpvs_tests::{
    cast,
    family::Family,
    lab::NetNs,
    network::{Network, SERVERS, Shape},
    program::Director,
};

use crate::{child::Child, interrupt::Interrupt, title, web::Web};

/// The servers' weights.
const WEIGHTS: [u32; SERVERS as usize] = [3, 2, 1];
/// How many requests are made: so many that the shares come out even.
const REQUESTS: u32 = 300;
/// The port of the service and of its servers.
const PORT: u16 = 80;

const fn expected(index: usize) -> u32 {
    let (mut all, mut other) = (0, 0);
    while other < WEIGHTS.len() {
        all += WEIGHTS[other];
        other += 1;
    }
    assert!(REQUESTS.is_multiple_of(all));
    REQUESTS / all * WEIGHTS[index]
}

/// Shows it.
pub(crate) fn show(method: Method, interrupt: &Interrupt) -> Result<()> {
    let (name, how, option) = match method {
        Method::Masq => ("NAT", "requests and replies both pass the director, which translates them", "-m"),
        Method::Route => ("DR", "requests pass the director, replies go from the real servers to the client", "-g"),
        Method::Tunnel => ("IPIP", "as DR, but real servers may be far away: requests reach them in a tunnel", "-i"),
    };
    title(&format!("{name}: {how}"));
    let network = Network::new(Shape::TwoArmed, method)?;
    let webs = (0..SERVERS).zip(&network.servers).map(|(index, server)| Web::start(server, PORT, &page(index)));
    let _webs: Vec<Web> = webs.collect::<Result<_>>()?;
    if let Some(role) = role(method) {
        for (index, family) in (0..SERVERS).flat_map(|index| Family::ALL.map(|family| (index, family))) {
            let vip = family.address(cast::VIP);
            println!("server{index}$ xdpvs realserver up eth0 --vip {vip} --method {role}");
        }
    }
    println!("director$ xdpvs up {}", network.interfaces().join(" "));
    let director = Director::up(&network.director, network.interfaces(), &[])?;
    for family in Family::ALL {
        let service = format!("-t {}", family.service(Transport::Tcp, PORT).address);
        say(&director, &format!("service add {service} -s wrr"))?;
        for (index, weight) in (0..).zip(WEIGHTS) {
            say(&director, &format!("dest add {service} -r {} {option} -w {weight}", family.at(index, PORT)))?;
        }
    }
    for family in Family::ALL {
        interrupt.check()?;
        println!();
        let served = request(&network.client, family, interrupt)?;
        println!("\n{:<42} {:>6} {:>9} {:>7}", "real server", "weight", "expected", "served");
        for (index, (weight, served)) in WEIGHTS.iter().zip(served).enumerate() {
            let server = family.address(cast::server(index as u8)).to_string();
            println!("{server:<42} {weight:>6} {:>9} {served:>7}", expected(index));
        }
        for (index, served) in served.into_iter().enumerate() {
            let (server, expected) = (family.address(cast::server(index as u8)), expected(index));
            ensure!(served == expected, "{name}: {server} served {served} requests instead of {expected}");
        }
    }
    println!();
    say(&director, "list")?;
    println!();
    say(&director, "stats")?;
    let stats = director.ask("stats")?;
    Family::ALL
        .into_iter()
        .try_for_each(|family| check(&stats, family, method))
        .with_context(|| format!("{name}: what `xdpvs stats` says"))
}

fn page(index: u8) -> String {
    format!("real server {}", cast::server(index))
}

/// What a real server is for this method, in the words of `xdpvs realserver`.
const fn role(method: Method) -> Option<&'static str> {
    match method {
        Method::Masq => None,
        Method::Route => Some("dr"),
        Method::Tunnel => Some("tun"),
    }
}

/// Runs a command of the director, and shows it with what it answers.
fn say(director: &Director<'_>, words: &str) -> Result<()> {
    println!("director$ xdpvs {words}");
    let answer = director.say(words)?;
    if !answer.is_empty() {
        println!("{}", answer.trim_end());
    }
    Ok(())
}

/// Makes the requests, one after the other. Returns how many of them each server answered.
fn request(client: &NetNs, family: Family, interrupt: &Interrupt) -> Result<[u32; SERVERS as usize]> {
    // An IPv6 address is in brackets, which is how curl writes ranges, too; it knows one from the other.
    let url = format!("http://{}/?[1-{REQUESTS}]", family.service(Transport::Tcp, PORT).address);
    println!("client$ curl '{url}'");
    let mut command = client.command("curl");
    command
        .args([
            "--silent",
            "--show-error",
            "--fail",
            "--fail-early",
            "--no-buffer",
            "--noproxy",
            "*",
            "--max-time",
            "10",
        ])
        .arg(&url)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut curl = Child::spawn(&mut command)?;
    let (stdout, mut stderr) = curl.outputs().context("curl has no pipes")?;
    let style = ProgressStyle::with_template("{bar:50} {pos} of {len} requests, {elapsed}")?;
    let progress = ProgressBar::new(REQUESTS.into()).with_style(style);
    let mut served = [0; SERVERS as usize];
    for line in BufReader::new(stdout).lines() {
        let line = line.context("read what curl got")?;
        interrupt.check()?;
        // Between answers, curl writes what it asks for next.
        if line.starts_with("--_curl_--") {
            continue;
        }
        let index =
            (0..SERVERS).find(|index| page(*index) == line).with_context(|| format!("`{line}` was answered"))?;
        served[usize::from(index)] += 1;
        progress.inc(1);
    }
    progress.finish();
    if progress.is_hidden() {
        println!("{} of {REQUESTS} requests answered", progress.position());
    }
    let status = curl.wait()?;
    let mut complaint = String::new();
    stderr.read_to_string(&mut complaint).context("read what curl complains about")?;
    ensure!(status.success(), "requests failed: {}", complaint.trim());
    let answered: u32 = served.iter().sum();
    ensure!(answered == REQUESTS, "{answered} of {REQUESTS} requests were answered");
    Ok(served)
}

/// Compares what the director counted with what was done.
fn check(stats: &Value, family: Family, method: Method) -> Result<()> {
    let service = family.service(Transport::Tcp, PORT).address.to_string();
    let services = stats["services"].as_array().context("there are no services")?;
    let found = services.iter().find(|found| found["address"] == service.as_str());
    let found = found.with_context(|| format!("{service} is missing"))?;
    let destinations = found["destinations"].as_array().context("there are no destinations")?;
    ensure!(destinations.len() == WEIGHTS.len(), "there are {} destinations", destinations.len());
    for (index, _) in WEIGHTS.iter().enumerate() {
        let address = family.at(index as u8, PORT).to_string();
        let found = destinations.iter().find(|destination| destination["address"] == address.as_str());
        let found = found.with_context(|| format!("{address} is missing"))?;
        let count = |field: &str| found[field].as_u64().with_context(|| format!("{address} has no {field}"));
        let connections = count("connections")?;
        ensure!(connections == u64::from(expected(index)), "{address} had {connections} connections");
        ensure!(count("packets_in")? > 0, "{address} was sent no packets");
        let replies_pass = method == Method::Masq;
        ensure!((count("packets_out")? > 0) == replies_pass, "{address} replied in {} packets", count("packets_out")?);
    }
    Ok(())
}
