//! What commands print.

use std::io::{self, ErrorKind, Write as _, stderr, stdout};

use crate::cli::failure::Failure;

/// In which form a command answers.
#[derive(clap::Args, Clone, Copy, Debug)]
pub(crate) struct Form {
    /// Answer with one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

impl Form {
    /// Prints `answer` as JSON, or as `text` writes it.
    pub(crate) fn print<T: serde::Serialize>(self, answer: &T, text: impl FnOnce(&T) -> String) -> Result<(), Failure> {
        let written = if self.json {
            let json = serde_json::to_string_pretty(answer).map_err(|error| Failure::Output(error.into()))?;
            json + "\n"
        } else {
            text(answer)
        };
        print(&written)
    }
}

/// Writes `text` to standard output.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut out = stdout().lock();
    written(out.write_all(text.as_bytes()).and_then(|()| out.flush()))
}

/// What it means that standard output has been written to with this result. A reader that has seen enough is no failure.
pub(crate) fn written(result: io::Result<()>) -> Result<(), Failure> {
    match result {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(Failure::Output(error)),
        _ => Ok(()),
    }
}

/// Writes a line to standard error.
pub(crate) fn complain(line: &str) {
    // With standard error gone there is nobody to tell.
    let _ = writeln!(stderr(), "{line}");
}

/// What clap complains about, in one line.
pub(crate) fn one_line(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let mut paragraphs = text.split("\n\n");
    let joined = |paragraph: &str| paragraph.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut line = joined(paragraphs.next().unwrap_or_default().trim_start_matches("error: "));
    for tip in paragraphs.filter(|paragraph| paragraph.trim_start().starts_with("tip: ")) {
        line = format!("{line} ({})", joined(tip));
    }
    // A value's own complaint names the remedy.
    let complete = matches!(error.kind(), clap::error::ErrorKind::ValueValidation);
    if complete { line } else { format!("{line}: see `xdpvs --help`") }
}

/// Rows of cells as lines, each column as wide as its widest cell. The columns numbered in `right` are set to the right.
pub(crate) fn table(rows: &[Vec<String>], right: &[usize]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(String::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, (cell, &width)) in row.iter().zip(&widths).enumerate() {
            let gap = if column == 0 { "" } else { "  " };
            let cell = if right.contains(&column) { format!("{cell:>width$}") } else { format!("{cell:<width$}") };
            line = format!("{line}{gap}{cell}");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}
