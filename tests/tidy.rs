//! What documents say about the code.

use lb_common::{
    event::Event,
    reason::{Fate, Reason},
};

/// The table of README has every reason, in the order of their numbers, with what becomes of the packet.
#[test]
fn readme_explains_every_reason() {
    let readme = include_str!("../README.md");
    let row = |reason: &Reason| {
        let fate = match reason.fate() {
            Fate::Passed => "left to the host",
            Fate::Dropped => "dropped",
        };
        let meaning = reason.describe().trim_start_matches("A packet that ").trim_end_matches('.');
        format!("| `{}` | {fate} | {meaning} |\n", reason.as_str())
    };
    let table: String = Reason::ALL.iter().map(row).collect();
    assert!(readme.contains(&table), "the table in README should be:\n{table}");
}

/// README has every event, too.
#[test]
fn readme_explains_every_event() {
    let readme = include_str!("../README.md");
    let row = |event: &Event| format!("| `{}` | {} |\n", event.as_str(), event.describe());
    let table: String = Event::ALL.iter().map(row).collect();
    assert!(readme.contains(&table), "the table in README should be:\n{table}");
}
