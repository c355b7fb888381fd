//! The values of an array map, mapped into this process's memory.

use std::{marker::PhantomData, ops::Deref, os::fd::AsFd};

use aya::maps::MapData;
use bytemuck::Zeroable;
use memmap2::{MmapOptions, MmapRaw};

use crate::error::Error;

/// The values of a `BPF_F_MMAPABLE` array map.
///
/// `T` is a type of [`lb_common::abi`] whose words are all `Shared32` or `Shared64`: the kernel and other processes write
/// them at any time.
pub struct Mapped<T> {
    memory: MmapRaw,
    len: usize,
    values: PhantomData<T>,
}

/// Whether this process writes to the memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// It only reads.
    Read,
    /// It reads and writes.
    Write,
}

impl<T: Zeroable> Mapped<T> {
    /// Maps all values of `map`, named `name` in messages.
    ///
    /// # Errors
    ///
    /// When the map holds values of another size than `T`, or the kernel refuses the mapping.
    pub fn new(map: &MapData, name: &'static str, access: Access) -> Result<Self, Error> {
        let info = map.info().map_err(|source| Error::map("inspect", name, source))?;
        if info.value_size() as usize != size_of::<T>() {
            return Err(Error::Layout { map: name, expected: size_of::<T>(), found: info.value_size() as usize });
        }
        let len = info.max_entries() as usize;
        let mut options = MmapOptions::new();
        options.len(len * size_of::<T>());
        let memory = match access {
            Access::Read => options.map_raw_read_only(&map.fd().as_fd()),
            Access::Write => options.map_raw(&map.fd().as_fd()),
        };
        let memory = memory.map_err(|source| Error::MapMemory { map: name, source })?;
        Ok(Self { memory, len, values: PhantomData })
    }
}

impl<T: Zeroable> Deref for Mapped<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the kernel keeps an array map's values page-aligned, next to each other (their size is a multiple of
        // eight) and valid while they are mapped. Every bit pattern is a `T`, whose words tolerate concurrent writers.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr().cast(), self.len) }
    }
}

/// A value that aya may pass to the kernel as bytes.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct Plain<T>(pub(super) T);

// SAFETY: `bytemuck::Pod` promises as much: plain data of a fixed layout, valid for any bits.
unsafe impl<T: bytemuck::Pod> aya::Pod for Plain<T> {}
