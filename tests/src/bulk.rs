//! Millions of packets of many clients, made in the kernel: a wrapper makes the frame of a test run what it is to be before
//! every run, and goes on to a program by tail call.
//!
//! The kernel does not restore a frame between the runs of one `BPF_PROG_TEST_RUN`, so the wrapper does, with the address
//! and port of one of many clients.

use std::net::Ipv4Addr;

use anyhow::{Context as _, Result};
use aya::{
    Ebpf, EbpfLoader, include_bytes_aligned,
    maps::{MapData, ProgramArray},
    programs::{ProgramFd, TestRun as _, TestRunOptions, Xdp},
};
use lb_common::{
    abi::{
        Record as _,
        bench::{Setup, SetupRecord},
    },
    checksum,
};
use lb_userspace::datapath::memory::{Access, Mapped};

use crate::family::Family;

/// The object with the wrapper and other programs that measure.
pub static OBJECT: &[u8] = include_bytes_aligned!(env!("XDPVS_BENCH_OBJECT"));

/// The wrapper's name, for frames of a family.
const fn reset(family: Family) -> &'static str {
    match family {
        Family::Four => "reset",
        Family::Six => "reset6",
    }
}

/// The family of a frame, which has to be IP.
fn family_of(frame: &[u8]) -> Family {
    Family::of(frame).expect("an IP frame")
}

/// Clients that frames are from. Sixty-four of them have the same address.
#[derive(Clone, Copy, Debug)]
pub struct Clients {
    /// The first address. Of IPv6, addresses differ from the frame's own in their last four bytes, which are these.
    pub first: Ipv4Addr,
    /// Their number.
    pub number: u32,
    /// In which order they send: one of [`lb_common::abi::bench::pick`].
    pub order: u32,
    /// Whether frames are to them instead.
    pub reply: bool,
}

impl Clients {
    /// The address and port of the client with this number.
    pub fn client(&self, number: u32) -> (Ipv4Addr, u16) {
        (Ipv4Addr::from_bits(self.first.to_bits() + (number >> 6)), 1024 + ((number & 63) << 4) as u16)
    }
}

/// What the kernel says of a number of runs.
#[derive(Clone, Debug)]
pub struct Ran {
    /// Nanoseconds of each, in the mean.
    pub nanoseconds: u64,
    /// What the last one returned.
    pub action: u32,
    /// The frame that it left.
    pub frame: Vec<u8>,
}

/// The wrapper, and a program behind it.
pub struct Bulk {
    ebpf: Ebpf,
    setup: Mapped<Setup>,
    behind: ProgramArray<MapData>,
    /// Index of the interface that frames come in by.
    wire: u32,
    /// Cache lines in the table of the program that looks at one.
    lines: u32,
}

impl Bulk {
    /// Loads the wrapper and, besides, the programs of its object with these names. Frames come in by the interface with
    /// index `wire`; the table of the program that looks at a cache line has this many `lines`, at least one.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn new(wire: u32, lines: u32, programs: &[&str]) -> Result<Self> {
        let mut ebpf = EbpfLoader::new().map_max_entries("LINES", lines).load(OBJECT)?;
        for program in Family::ALL.map(reset).iter().chain(programs) {
            xdp(&mut ebpf, program)?.load()?;
        }
        let setup = ebpf.take_map("SETUP").context("map SETUP")?;
        let aya::maps::Map::Array(setup) = setup else { anyhow::bail!("SETUP is no array") };
        let setup = Mapped::new(&setup, "SETUP", Access::Write)?;
        let behind = ProgramArray::try_from(ebpf.take_map("MEASURED").context("map MEASURED")?)?;
        Ok(Self { ebpf, setup, behind, wire, lines })
    }

    /// Puts `program` behind the wrapper.
    ///
    /// # Errors
    ///
    /// When it is no XDP program.
    pub fn put(&mut self, program: &ProgramFd) -> Result<()> {
        Ok(self.behind.set(0, program, 0)?)
    }

    /// Puts the program with this name, of the wrapper's own object, behind it.
    ///
    /// # Errors
    ///
    /// When it was not loaded.
    pub fn put_own(&mut self, name: &str) -> Result<()> {
        let program = xdp(&mut self.ebpf, name)?.fd()?.try_clone()?;
        self.put(&program)
    }

    /// Lets runs begin with `frame`, from or to `clients`. The order goes on where it was.
    pub fn set_up(&self, frame: &[u8], clients: Clients) {
        let mut header: [u8; 20] = frame[14..34].try_into().expect("twenty bytes");
        if family_of(frame) == Family::Four {
            header[10..12].fill(0);
            header[if clients.reply { 16..20 } else { 12..16 }].fill(0);
        }
        let next_flow = self.setup[0].next_flow.load();
        self.setup[0].store(&SetupRecord {
            len: frame.len() as u32,
            order: clients.order,
            flows: clients.number,
            next_flow,
            first_addr: clients.first.into(),
            reply: clients.reply.into(),
            header_sum: u32::from(checksum::fold(checksum::sum(&header))),
            head: head(frame),
            frame_type: u32::from(u16::from_ne_bytes([frame[12], frame[13]])),
            lines: self.lines,
        });
    }

    /// Lets the order begin with the client with this number.
    pub fn begin_with(&self, client: u32) {
        self.setup[0].next_flow.store(client);
    }

    /// Runs the program behind the wrapper so many times.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn repeat(&mut self, frame: &[u8], runs: u32) -> Result<Ran> {
        let mut out = vec![0; 2048];
        // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
        let context = [0, frame.len() as u32, 0, self.wire, 0, 0].map(u32::to_ne_bytes).concat();
        let result = xdp(&mut self.ebpf, reset(family_of(frame)))?.test_run(TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ctx_in: Some(&context),
            repeat: runs,
            ..TestRunOptions::new()
        })?;
        out.truncate(result.data_size_out as usize);
        // The kernel answers with the mean of all runs, in whole nanoseconds.
        let nanoseconds = result.duration.as_nanos() as u64;
        Ok(Ran { nanoseconds, action: result.return_value, frame: out })
    }
}

fn xdp<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Xdp> {
    Ok(ebpf.program_mut(name).with_context(|| format!("program {name}"))?.try_into()?)
}

/// The first words of a frame, less its type.
fn head(frame: &[u8]) -> [u32; 18] {
    let mut head = [0; 18];
    let words = frame[..12].chunks_exact(4).chain(frame[14..].chunks_exact(4));
    for (head, word) in head.iter_mut().zip(words) {
        *head = u32::from_ne_bytes(word.try_into().expect("four bytes"));
    }
    head
}
