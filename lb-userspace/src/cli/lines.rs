//! Lines of lists that may be long: put together in one buffer for all, and written in large pieces.

use std::{
    io::{self, Write},
    net::SocketAddr,
};

/// Bytes that are written at once.
const PIECE: usize = 256 * 1024;
/// More than a line has, so that the buffer never grows.
const LINE: usize = 1024;

/// Lines on their way to `out`.
pub(crate) struct Lines<W> {
    out: W,
    buffer: Vec<u8>,
    /// Where the cell that is being made begins.
    cell: usize,
}

impl<W: Write> Lines<W> {
    /// No lines yet.
    pub(crate) fn new(out: W) -> Self {
        Self { out, buffer: Vec::with_capacity(PIECE + LINE), cell: 0 }
    }

    /// Adds a word.
    pub(crate) fn text(&mut self, text: &str) -> &mut Self {
        self.buffer.extend_from_slice(text.as_bytes());
        self
    }

    /// Adds a number.
    pub(crate) fn number(&mut self, number: u64) -> &mut Self {
        self.buffer.extend_from_slice(itoa::Buffer::new().format(number).as_bytes());
        self
    }

    /// Adds an address and port.
    pub(crate) fn socket(&mut self, address: SocketAddr) -> &mut Self {
        match address {
            SocketAddr::V4(address) => {
                for (octet, end) in address.ip().octets().into_iter().zip([".", ".", ".", ":"]) {
                    self.number(octet.into()).text(end);
                }
                self.number(address.port().into())
            }
            SocketAddr::V6(address) => {
                // Writing to memory does not fail.
                let _ = write!(self.buffer, "{address}");
                self
            }
        }
    }

    /// Adds a time in milliseconds as minutes and seconds, of two digits at least.
    pub(crate) fn clock(&mut self, ms: u64) -> &mut Self {
        let (minutes, seconds) = (ms / 60_000, ms / 1000 % 60);
        for (number, end) in [(minutes, ":"), (seconds, "")] {
            self.text(if number < 10 { "0" } else { "" }).number(number).text(end);
        }
        self
    }

    /// Ends a cell: what the line has had since the last one is as wide as `width` and followed by `gap`.
    pub(crate) fn cell(&mut self, width: usize, gap: &str) -> &mut Self {
        let end = self.buffer.len().max(self.cell + width);
        self.buffer.resize(end, b' ');
        self.text(gap);
        self.cell = self.buffer.len();
        self
    }

    /// Ends a line.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub(crate) fn end(&mut self) -> io::Result<()> {
        self.buffer.push(b'\n');
        if self.buffer.len() >= PIECE {
            self.out.write_all(&self.buffer)?;
            self.buffer.clear();
        }
        self.cell = self.buffer.len();
        Ok(())
    }

    /// Writes what has not been written.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub(crate) fn finish(mut self) -> io::Result<W> {
        self.out.write_all(&self.buffer)?;
        self.out.flush()?;
        Ok(self.out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_are_wide_and_lines_are_whole() -> io::Result<()> {
        let mut lines = Lines::new(Vec::new());
        lines.text("tcp").cell(4, "  ").clock(59_999).cell(7, "").clock(6_000_000).cell(3, "|").number(0).end()?;
        lines.socket(([10, 0, 255, 1], 80).into()).cell(0, " ");
        lines.socket("[fd00::1]:65535".parse().expect("an address")).end()?;
        assert_eq!(lines.finish()?, b"tcp   00:59  100:00|0\n10.0.255.1:80 [fd00::1]:65535\n");
        Ok(())
    }

    /// What is written to, and how often.
    #[derive(Default)]
    struct Counted(Vec<u8>, usize);

    impl Write for Counted {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.1 += 1;
            self.0.write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn long_lists_are_written_in_large_pieces() -> io::Result<()> {
        let mut lines = Lines::new(Counted::default());
        for number in 0..100_000 {
            lines.number(number).cell(20, "").end()?;
        }
        assert!(lines.buffer.capacity() <= PIECE + LINE);
        let Counted(written, times) = lines.finish()?;
        assert_eq!((written.len(), times), (2_100_000, 2_100_000 / PIECE + 1));
        assert!(written.chunks(21).zip(0..).all(|(line, number)| *line == *format!("{number:<20}\n").as_bytes()));
        Ok(())
    }
}
