//! What an instance's tables are hashed with is drawn when it is created, and nobody is told.

use anyhow::{Context as _, Result};
use lb_common::hash::Seed;
use lb_userspace::datapath::{
    memory::Access,
    open::{self, Maps},
};

use crate::stage::{Stage, WIRE};

/// Every command that reads, in words that have an answer.
const READING: [&str; 12] = [
    "status",
    "list",
    "stats",
    "conn list",
    "timeout get",
    "ipvsadm -Ln",
    "ipvsadm -Lnc",
    "ipvsadm -Ln --stats",
    "ipvsadm -Ln --rate",
    "ipvsadm -Sn",
    "ipvsadm -L --timeout",
    "ipvsadm -Ln --exact",
];

fn seed(stage: &Stage) -> Result<Seed> {
    let maps = Maps::open(&stage.place(), Access::Read)?;
    Ok(maps.instance().seed)
}

/// The ways in which somebody might print a word.
fn spellings(word: u64) -> [String; 5] {
    let bytes = word.to_le_bytes();
    let list = |format: fn(&u8) -> String| bytes.iter().map(format).collect::<Vec<_>>();
    [
        word.to_string(),
        word.cast_signed().to_string(),
        format!("{word:x}"),
        list(|byte| format!("{byte:02x}")).concat(),
        list(u8::to_string).join(","),
    ]
}

#[test]
fn every_instance_has_a_secret_of_its_own_and_keeps_it() -> Result<()> {
    let (stage, other) = (Stage::with_director()?, Stage::with_director()?);
    let (seed, another) = (seed(&stage)?, self::seed(&other)?);
    for (word, other) in seed.words().into_iter().zip(another.words()) {
        // Sixty-four random bits, of which the lowest may be set for good.
        assert!(word > 1 && word != other, "a secret that can be guessed");
    }

    stage.ok("service add -t 10.9.9.9:80 -s rr")?;
    stage.ok("dest add -t 10.9.9.9:80 -r 10.2.0.11")?;
    // New programs go on with the old secret, or connections would be lost.
    stage.ok(&format!("up {WIRE}"))?;
    assert!(self::seed(&stage)? == seed, "new programs, another secret");
    let mut said = String::new();
    for words in READING {
        said += &stage.say(words)?.out;
        said += &stage.say(&format!("{words} --json"))?.out;
    }
    // Also what goes wrong, and what a program of ours may print of it.
    let refused = stage.say("service add -t 10.9.9.9:80 -s rr")?;
    said += &refused.err;
    let maps = Maps::open(&stage.place(), Access::Read).context("open the maps")?;
    said += &format!("{:?} {seed:?} {:?}", maps.instance(), open::ageing(&stage.place())?);
    assert!(said.contains("10.9.9.9:80") && said.contains("Seed(..)"), "{said}");
    let said: String = said.to_lowercase().split_whitespace().collect();
    for word in seed.words() {
        for spelling in spellings(word) {
            assert!(!said.contains(&spelling), "the secret is told");
        }
    }
    Ok(())
}
