//! Requests to the control program, which the kernel runs on behalf of this process.
//!
//! What it does to the flow table is done by the same code that packets run, and is done to its end even when this
//! process is killed meanwhile.

use aya::programs::{TestRun as _, TestRunOptions, Xdp};
use aya_obj::programs::XdpAttachType;
use bytemuck::Zeroable as _;
use lb_common::{
    abi::{ControlRequest, control},
    jiffies::Jiffies,
};

use crate::{
    datapath::{object::program, place::Place},
    error::Error,
};

/// Buckets that one run looks at: about a millisecond's worth.
const FLUSH_SLICE: u32 = 16_384;

/// What the control program returns when it has done what it was asked.
const XDP_PASS: u32 = 2;

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
        let mut answer = ControlRequest::zeroed();
        let options = TestRunOptions {
            data_in: Some(bytemuck::bytes_of(&request)),
            data_out: Some(bytemuck::bytes_of_mut(&mut answer)),
            ..TestRunOptions::new()
        };
        let result =
            self.program.test_run(options).map_err(|source| Error::program("run", program::CONTROL, source))?;
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

    /// Starts the ageing timer, or lets one that runs go on under this program: `slice` buckets every `interval_ns`
    /// nanoseconds, below 2^32.
    ///
    /// # Errors
    ///
    /// When the kernel does not run the program.
    pub fn start_ageing(&self, slice: u32, interval_ns: u32) -> Result<(), Error> {
        let request = ControlRequest {
            operation: control::START_AGEING,
            count: slice,
            interval_ns: u64::from(interval_ns),
            ..ControlRequest::zeroed()
        };
        self.request(request).map(|_| ())
    }

    /// Ends all connections, or those to one destination, in a table of `buckets` buckets. Returns their number.
    ///
    /// # Errors
    ///
    /// When the kernel does not run the program.
    pub fn flush(&self, buckets: u32, dest: Option<u32>) -> Result<u64, Error> {
        let mut ended = 0;
        for first in (0..buckets).step_by(FLUSH_SLICE as usize) {
            ended += self.request(ControlRequest {
                operation: control::FLUSH,
                first,
                count: FLUSH_SLICE.min(buckets - first),
                dest: dest.unwrap_or(control::ANY),
                ..ControlRequest::zeroed()
            })?;
        }
        Ok(ended)
    }
}
