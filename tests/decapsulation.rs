//! Taking packets out of the tunnel: the same frames through the library on this host and through the loaded program.

use std::cell::RefCell;

use aya::{
    Ebpf, EbpfLoader,
    maps::{HashMap, MapData, PerCpuArray},
    programs::{TestRun as _, TestRunOptions, Xdp},
};
use lb_common::{
    addr::{Ip4, Ip6},
    decapsulation::Decapsulation,
    reason::Fate,
};
use lb_ebpf::{
    decapsulate::{self, Serves, VirtualAddresses},
    host::HostPacket,
};
use lb_userspace::datapath::object;
use xdpvs_tests::{
    cast, lab,
    tunnelled::{Expected, cases},
};

/// What became of a frame: what was counted, and the frame if the host gets it.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Outcome {
    counted: Vec<Decapsulation>,
    frame: Option<Vec<u8>>,
}

impl Outcome {
    /// What a case expects of the frame it sends.
    fn expected(expected: Expected, sent: &[u8]) -> Self {
        match expected {
            Expected::Untouched => Self { counted: vec![], frame: Some(sent.to_vec()) },
            Expected::Delivered(frame) => Self { counted: vec![Decapsulation::Delivered], frame: Some(frame) },
            Expected::Dropped(reason) => Self { counted: vec![reason], frame: None },
        }
    }
}

/// The address of services, in both families.
const VIP4: Ip4 = Ip4::new(cast::VIP.octets());
const VIP6: Ip6 = Ip6::new(cast::six::VIP.octets());

/// The library, for these addresses.
#[derive(Default)]
struct Host {
    counted: RefCell<Vec<Decapsulation>>,
}

impl Serves<Ip4> for Host {
    fn contains(&self, address: Ip4) -> bool {
        address == VIP4
    }
}

impl Serves<Ip6> for Host {
    fn contains(&self, address: Ip6) -> bool {
        address == VIP6
    }
}

impl VirtualAddresses for Host {
    fn count(&self, outcome: Decapsulation) {
        self.counted.borrow_mut().push(outcome);
    }
}

fn on_host(frame: &[u8]) -> Outcome {
    let host = Host::default();
    let mut packet = HostPacket::new(frame);
    let fate = decapsulate::decapsulate(&mut packet, &host);
    let frame = (fate == Fate::Passed).then(|| packet.bytes().to_vec());
    Outcome { counted: host.counted.into_inner(), frame }
}

/// The program in the kernel, for these addresses.
struct Kernel {
    ebpf: Ebpf,
}

impl Kernel {
    /// The shortest frame that the kernel runs a program on.
    const SHORTEST: usize = 14;

    fn load() -> Self {
        lab::require_root().unwrap();
        let mut ebpf = EbpfLoader::new().load(object::REALSERVER).unwrap();
        let vips = ebpf.map_mut(object::realserver::VIPS4).unwrap();
        let mut vips: HashMap<&mut MapData, u32, u32> = vips.try_into().unwrap();
        vips.insert(VIP4.raw(), 1, 0).unwrap();
        let vips = ebpf.map_mut(object::realserver::VIPS6).unwrap();
        let mut vips: HashMap<&mut MapData, [u64; 2], u32> = vips.try_into().unwrap();
        vips.insert(VIP6.raw(), 1, 0).unwrap();
        let program: &mut Xdp = ebpf.program_mut(object::realserver::DECAPSULATE).unwrap().try_into().unwrap();
        program.load().unwrap();
        Self { ebpf }
    }

    fn counters(&self) -> Vec<u64> {
        let map = self.ebpf.map(object::realserver::OUTCOMES).unwrap();
        let map: PerCpuArray<&MapData, u64> = map.try_into().unwrap();
        let count = |outcome: &Decapsulation| map.get(&(*outcome as u32), 0).unwrap().iter().sum();
        Decapsulation::ALL.iter().map(count).collect()
    }

    fn run(&mut self, frame: &[u8]) -> Outcome {
        const XDP_DROP: u32 = 1;
        const XDP_PASS: u32 = 2;
        let before = self.counters();
        let mut out = vec![0; frame.len().max(64)];
        let program: &mut Xdp = self.ebpf.program_mut(object::realserver::DECAPSULATE).unwrap().try_into().unwrap();
        let options = TestRunOptions { data_in: Some(frame), data_out: Some(&mut out), ..TestRunOptions::new() };
        let result = program.test_run(options).unwrap();
        let frame = match result.return_value {
            XDP_PASS => {
                out.truncate(result.data_size_out as usize);
                Some(out)
            }
            XDP_DROP => None,
            other => panic!("the program returned {other}"),
        };
        let moved = self.counters().into_iter().zip(before).map(|(after, before)| after - before);
        let counted = Decapsulation::ALL.iter().zip(moved);
        Outcome { counted: counted.flat_map(|(outcome, times)| vec![*outcome; times as usize]).collect(), frame }
    }
}

#[test]
fn every_case_on_this_host() {
    let cases = cases();
    assert!(cases.len() > 500, "only {} cases", cases.len());
    for case in cases {
        assert_eq!(on_host(&case.frame), Outcome::expected(case.expected, &case.frame), "{}", case.name);
    }
}

#[test]
fn every_case_in_the_kernel() {
    let mut kernel = Kernel::load();
    for case in cases().into_iter().filter(|case| case.frame.len() >= Kernel::SHORTEST) {
        assert_eq!(kernel.run(&case.frame), Outcome::expected(case.expected, &case.frame), "{}", case.name);
    }
}

#[test]
fn every_outcome_has_a_case() {
    let seen: Vec<Decapsulation> = cases().iter().flat_map(|case| on_host(&case.frame).counted).collect();
    for outcome in Decapsulation::ALL.iter().filter(|outcome| **outcome != Decapsulation::Impossible) {
        assert!(seen.contains(outcome), "no case ends as {}", outcome.as_str());
    }
}

/// Numbers that look random and are the same in every run (Marsaglia 2003, "Xorshift RNGs").
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}

#[test]
fn host_and_kernel_agree_about_damaged_frames() {
    let mut kernel = Kernel::load();
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let cases = cases();
    let mut outcomes = std::collections::HashSet::new();
    for _ in 0..10_000 {
        let mut frame = cases[random.below(cases.len())].frame.clone();
        if frame.len() < Kernel::SHORTEST {
            continue;
        }
        for _ in 0..=random.below(3) {
            let position = random.below(frame.len().min(100));
            frame[position] = random.below(256) as u8;
        }
        let host = on_host(&frame);
        assert_eq!(kernel.run(&frame), host, "{frame:02x?}");
        assert!(!host.counted.contains(&Decapsulation::Impossible), "{frame:02x?}");
        outcomes.extend(host.counted);
    }
    assert!(outcomes.len() >= 6, "damage led only to {outcomes:?}");
}
