//! A program that is killed leaves the old configuration or the new one, and the next goes on from there.

use std::{
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use serde_json::Value;

use crate::stage::{Stage, WIRE};

/// Numbers that look random and are the same in every run.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

/// Runs a command and kills it after some time. Returns whether it was still running.
fn killed(stage: &Stage, words: &str, after: Duration) -> Result<bool> {
    let words: Vec<&str> = words.split(' ').collect();
    // `nsenter` becomes the program, so the process killed is the program's.
    let mut child = stage.command(&words)?.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    thread::sleep(after);
    child.kill()?;
    Ok(child.wait()?.code().is_none())
}

/// How long a command takes.
fn duration(stage: &Stage, words: &str) -> Result<Duration> {
    let begun = Instant::now();
    stage.say(words)?;
    Ok(begun.elapsed())
}

/// What the configuration is after a change, seen by a director that nobody kills.
fn configuration(stage: &Stage) -> Result<Value> {
    Ok(stage.ask("list")?["services"].take())
}

#[test]
fn a_change_that_is_killed_has_happened_or_has_not() -> Result<()> {
    let (stage, witness) = (Stage::with_director()?, Stage::with_director()?);
    for stage in [&stage, &witness] {
        stage.ok("service add -t 10.9.9.9:80 -s wrr")?;
        stage.ok("service add -u 10.9.9.9:53 -s sh")?;
    }
    let usual = duration(&stage, "service edit -u 10.9.9.9:53 -s sh")?.as_micros() as u64;
    let mut numbers = Numbers(1);
    let (mut survived, mut happened, mut not) = (0, 0, 0);
    for round in 0..110 {
        let server = format!("10.2.0.{}", 1 + numbers.below(6));
        let service = ["-t 10.9.9.9:80", "-u 10.9.9.9:53"][numbers.below(2) as usize];
        let weight = numbers.below(50);
        let words = match numbers.below(8) {
            0 => format!("dest del {service} -r {server}"),
            1 => format!("dest edit {service} -r {server} -m -w {weight}"),
            2 => format!("service del {service}"),
            3 => format!("service add {service}"),
            4 => "service flush".to_owned(),
            _ => format!("dest add {service} -r {server} -w {weight}"),
        };
        let old = configuration(&witness)?;
        // What is refused changes nothing, killed or not.
        let accepted = witness.say(&words)?.code == Some(0);
        let new = configuration(&witness)?;
        let was_killed = killed(&stage, &words, Duration::from_micros(numbers.below(usual * 3 / 2)))?;
        let found = configuration(&stage)?;
        ensure!(found == old || found == new, "round {round}: `{words}` left {found}\nof {old}\nand {new}");
        ensure!(was_killed || found == new, "round {round}: `{words}` ended and was not carried out");
        survived += usize::from(!was_killed);
        if was_killed && accepted && old != new {
            if found == new { happened += 1 } else { not += 1 }
        }
        // The next command works, and both go on from the same configuration.
        if found != new {
            stage.ok(&words)?;
            ensure!(configuration(&stage)? == new, "round {round}: `{words}` cannot be carried out any more");
        }
    }
    ensure!(not > 0, "{survived} commands survived, {happened} had happened: none was killed before it counted");
    Ok(())
}

/// When to kill an `up` that usually takes `usual` microseconds. Nearly all of its time the kernel verifies programs; what
/// may leave something behind comes after that, so every other one is killed late.
fn up_time(numbers: &mut Numbers, round: u32, usual: u64) -> Duration {
    let micros = if round.is_multiple_of(2) { numbers.below(usual) } else { usual * 3 / 4 + numbers.below(usual / 2) };
    Duration::from_micros(micros)
}

#[test]
fn an_up_or_down_that_is_killed_leaves_all_of_an_instance_or_nothing() -> Result<()> {
    let stage = Stage::new()?;
    let up = format!("up {WIRE} --max-flows 1000 --max-services 16 --max-dests 64");
    let usual = duration(&stage, &up)?.as_micros() as u64;
    let usual_down = duration(&stage, "down")?.as_micros() as u64;
    let mut numbers = Numbers(2);
    let mut seen = [0; 2];
    for round in 0..14 {
        killed(&stage, &up, up_time(&mut numbers, round, usual))?;
        let exists = stage.place().exists();
        seen[usize::from(exists)] += 1;
        if exists {
            // Whole: it can be looked at, changed, and completed.
            ensure!(stage.ask("status")?["running"] == true, "round {round}");
            stage.ok("service add -t 10.9.9.9:80")?;
        } else {
            ensure!(stage.say("status")?.code == Some(1), "round {round}");
        }
        stage.ok(&up)?;
        ensure!(stage.ask("list")?["mode"][0]["mode"] == "native", "round {round}");
        ensure!(exists != stage.ask("list")?["services"].as_array().is_some_and(Vec::is_empty), "round {round}");
        killed(&stage, "down", Duration::from_micros(numbers.below(usual_down * 5 / 4)))?;
        if stage.place().exists() {
            ensure!(stage.ask("status")?["running"] == true, "round {round}");
            stage.ok("down")?;
        }
        ensure!(!stage.place().exists(), "round {round}");
        ensure!(stage.is_bare()?, "round {round}: still attached");
    }
    ensure!(seen[0] > 0, "no `up` was killed before the instance was there: {seen:?}");
    Ok(())
}

#[test]
fn an_up_that_is_killed_while_it_renews_leaves_a_director_that_works() -> Result<()> {
    let stage = Stage::with_director()?;
    stage.ok("service add -t 10.9.9.9:80")?;
    let before = stage.ask("list")?;
    let up = format!("up {WIRE}");
    let usual = duration(&stage, &up)?.as_micros() as u64;
    let mut numbers = Numbers(3);
    for round in 0..14 {
        killed(&stage, &up, up_time(&mut numbers, round, usual))?;
        ensure!(stage.ask("list")? == before, "round {round}");
        stage.ok("conn flush")?;
    }
    stage.ok(&up)?;
    ensure!(stage.ask("list")? == before);
    ensure!(std::fs::read_dir(stage.place().generations())?.count() == 1, "old programs are left");
    Ok(())
}
