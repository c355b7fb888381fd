//! Requests to the control program, which the kernel runs on behalf of this process.
//!
//! What it does to the flow table is done by the same code that packets run, and is done to its end even when this
//! process is killed meanwhile.

use aya::programs::{TestRun as _, TestRunOptions, Xdp};
use aya_obj::programs::XdpAttachType;
use bytemuck::Zeroable as _;
use lb_common::{
    abi::{Brought, CONNECTIONS_MAX, CONNECTIONS6_MAX, ConnectionRecord, ConnectionRecord6, ControlRequest, control},
    jiffies::Jiffies,
};

use crate::{
    datapath::{object::program, pace::Pace, place::Place},
    error::Error,
};

/// Buckets that one run looks at: about a millisecond's worth.
const FLUSH_SLICE: u32 = 16_384;

/// Bytes of the longest frame that the control program is run with.
const FRAME_MAX: usize = size_of::<ControlRequest>() + CONNECTIONS_MAX * size_of::<ConnectionRecord>();

/// What the control program returns when it has done what it was asked.
const XDP_PASS: u32 = 2;

/// Which connections are ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ending {
    /// All.
    All,
    /// Those to the destination with this number.
    Dest(u32),
    /// Those to any destination of the service in this slot.
    Service(u32),
    /// Those to any destination that has been removed.
    Removed,
}

/// How many connections have come to what.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Insertions {
    /// Created.
    pub created: u64,
    /// Left as they are, because they were there already.
    pub known: u64,
    /// Not created, because neither of their buckets had room.
    pub full: u64,
    /// Not created, because no connection can be as they say.
    pub refused: u64,
}

impl Insertions {
    /// Adds what the control program has answered.
    fn add(&mut self, answer: u64) {
        let count = |brought: Brought| answer >> (16 * brought as u32) & 0xffff;
        self.created += count(Brought::New);
        self.known += count(Brought::Known);
        self.full += count(Brought::Full);
        self.refused += count(Brought::Refused);
    }
}

/// The control program of an instance.
pub struct Control {
    program: Xdp,
}

impl Control {
    /// Opens the control program of the instance at `place`.
    ///
    /// # Errors
    ///
    /// When it is not pinned there.
    pub fn open(place: &Place) -> Result<Self, Error> {
        let path = place.programs()?.join(program::CONTROL);
        let program = Xdp::from_pin(path, XdpAttachType::Interface)
            .map_err(|source| Error::program("open", program::CONTROL, source))?;
        Ok(Self { program })
    }

    fn request(&self, request: ControlRequest) -> Result<u64, Error> {
        self.run(bytemuck::bytes_of(&request))
    }

    /// Runs the program with a frame, which is a request and what follows it.
    fn run(&self, frame: &[u8]) -> Result<u64, Error> {
        let mut out = [0; FRAME_MAX];
        let options =
            TestRunOptions { data_in: Some(frame), data_out: Some(&mut out[..frame.len()]), ..TestRunOptions::new() };
        let result =
            self.program.test_run(options).map_err(|source| Error::program("run", program::CONTROL, source))?;
        let answer: ControlRequest = bytemuck::pod_read_unaligned(&out[..size_of::<ControlRequest>()]);
        if result.return_value == XDP_PASS { Ok(answer.answer) } else { Err(Error::ControlRefused) }
    }

    /// The data plane's clock.
    ///
    /// # Errors
    ///
    /// When the kernel does not run the program.
    pub fn clock(&self) -> Result<Jiffies, Error> {
        let answer = self.request(ControlRequest { operation: control::CLOCK, ..ControlRequest::zeroed() })?;
        Ok(Jiffies(answer as u32))
    }

    /// Starts the ageing timer, or lets one that runs go on under this program, at this pace.
    ///
    /// # Errors
    ///
    /// When the kernel does not run the program.
    pub fn start_ageing(&self, pace: Pace) -> Result<(), Error> {
        let Pace { slice: count, interval_ns, share: subject } = pace;
        let operation = control::START_AGEING;
        let request = ControlRequest { operation, count, interval_ns, subject, ..ControlRequest::zeroed() };
        self.request(request).map(|_| ())
    }

    /// Ends connections in tables of `buckets` buckets together. Returns their number.
    ///
    /// # Errors
    ///
    /// When the kernel does not run the program.
    pub fn flush(&self, buckets: u32, which: Ending) -> Result<u64, Error> {
        let (operation, subject) = match which {
            Ending::All => (control::FLUSH, control::ANY),
            Ending::Dest(number) => (control::FLUSH, number),
            Ending::Service(slot) => (control::FLUSH_SERVICE, slot),
            Ending::Removed => (control::FLUSH_REMOVED, control::ANY),
        };
        let mut ended = 0;
        for first in (0..buckets).step_by(FLUSH_SLICE as usize) {
            let count = FLUSH_SLICE.min(buckets - first);
            ended += self.request(ControlRequest { operation, first, count, subject, ..ControlRequest::zeroed() })?;
        }
        Ok(ended)
    }

    /// Creates connections, by the protocol that packets create theirs by, so that packets may pass meanwhile. Each run of
    /// the program is carried out to its end even when this process is killed.
    ///
    /// The caller holds the instance's lock, so that destinations keep their numbers.
    ///
    /// # Errors
    ///
    /// When the kernel does not run the program; those of earlier runs are there then.
    pub fn insert(&self, connections: impl IntoIterator<Item = NewRecord>) -> Result<Insertions, Error> {
        let mut insertions = Insertions::default();
        let mut four = Batch::new(control::INSERT, CONNECTIONS_MAX);
        let mut six = Batch::new(control::INSERT6, CONNECTIONS6_MAX);
        for connection in connections {
            let batch = match &connection {
                NewRecord::Four(record) => four.add(bytemuck::bytes_of(record)),
                NewRecord::Six(record) => six.add(bytemuck::bytes_of(record)),
            };
            if batch.is_full() {
                insertions.add(self.run(batch.frame())?);
                batch.clear();
            }
        }
        for batch in [&mut four, &mut six].into_iter().filter(|batch| batch.count > 0) {
            insertions.add(self.run(batch.frame())?);
        }
        Ok(insertions)
    }
}

/// A connection that no packet opens.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NewRecord {
    /// By IPv4.
    Four(ConnectionRecord),
    /// By IPv6.
    Six(ConnectionRecord6),
}

/// A request to create connections, and these.
struct Batch {
    operation: u32,
    frame: Vec<u8>,
    count: usize,
    most: usize,
}

impl Batch {
    fn new(operation: u32, most: usize) -> Self {
        let mut frame = Vec::with_capacity(FRAME_MAX);
        frame.resize(size_of::<ControlRequest>(), 0);
        Self { operation, frame, count: 0, most }
    }

    fn add(&mut self, record: &[u8]) -> &mut Self {
        self.frame.extend_from_slice(record);
        self.count += 1;
        self
    }

    fn is_full(&self) -> bool {
        self.count == self.most
    }

    fn frame(&mut self) -> &[u8] {
        let request =
            ControlRequest { operation: self.operation, count: self.count as u32, ..ControlRequest::zeroed() };
        self.frame[..size_of::<ControlRequest>()].copy_from_slice(bytemuck::bytes_of(&request));
        &self.frame
    }

    fn clear(&mut self) {
        self.frame.truncate(size_of::<ControlRequest>());
        self.count = 0;
    }
}
