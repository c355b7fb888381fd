//! The packet as the pipeline sees it: bytes behind bounds checks, with room to grow at the head.

use crate::wire::Wire;

/// A frame, from its Ethernet header on.
///
/// Offsets are in bytes from the start of the frame. Growing or shrinking the head moves the start, so offsets found
/// before no longer hold.
pub trait Packet {
    /// Length of the frame in bytes.
    fn len(&self) -> usize;

    /// Whether the frame has no bytes, which no frame of a driver has.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads a `T` at `offset`, or `None` when the frame ends before it does.
    fn read<T: Wire>(&self, offset: usize) -> Option<T>;

    /// Writes a `T` at `offset`, or `None`, with nothing written, when the frame ends before it does.
    fn write<T: Wire>(&mut self, offset: usize, value: T) -> Option<()>;

    /// Writes words one after the other from `offset` on, or `None`, with nothing written, when the frame ends before
    /// they do.
    fn write_words<const N: usize>(&mut self, offset: usize, words: [u32; N]) -> Option<()>;

    /// Adds `by` bytes of any content at the start, or `None`, with nothing changed, when there is no room.
    fn grow_head(&mut self, by: u16) -> Option<()>;

    /// Removes `by` bytes from the start, or `None`, with nothing changed, when no Ethernet header's worth would be left.
    fn shrink_head(&mut self, by: u16) -> Option<()>;

    /// Cuts the frame to `len` bytes, or `None`, with nothing changed, when it is shorter or cannot be cut.
    fn truncate(&mut self, len: usize) -> Option<()>;

    /// The unfolded one's complement sum of the `len` bytes from `offset` on (see [`lb_common::checksum`]), or `None`
    /// when the frame ends before.
    fn sum(&self, offset: usize, len: usize) -> Option<u64>;

    /// `value`, in a way that the verifier cannot see through: see [`crate::tables::Tables::hide`].
    #[inline(always)]
    fn hide(&self, value: u64) -> u64 {
        value
    }
}
