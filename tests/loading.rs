//! Loads every program into the running kernel, and watches what the verifier makes of it.
//!
//! The number of instructions that the verifier goes through is not the length of a program, but of all ways through it. It
//! grows by leaps when code is written that it cannot follow cheaply, long before it reaches the limit of a million; and with
//! it grows the time that `xdpvs up` takes. That a program loads also says that its stack frames fit into 512 bytes together.

use std::collections::BTreeMap;

use aya::{
    Ebpf, EbpfLoader,
    programs::{Program, ProgramError, ProgramInfo},
};
use lb_userspace::datapath::object;
use xdpvs_tests::{bulk, lab::require_root};

/// How many instructions the verifier may go through for each program: a fifth more than when this was written, of the
/// kernel whose verifier goes through the most. Kernels differ by as much as four times; `cargo xtask vm` shows it.
const DIRECTOR_BUDGETS: &[(&str, u32)] = &[
    ("xdpvs", 45_400),
    ("request", 20_200),
    ("open", 205_100),
    ("overflow", 156_700),
    ("reply", 43_800),
    ("observe", 6_600),
    ("icmp", 91_500),
    ("unusual", 50_100),
    ("mark", 50_000),
    ("persist", 167_900),
    ("persist_overflow", 128_700),
    ("persist_alike", 32_800),
    ("astray", 15_000),
    ("related", 236_900),
    ("related_open", 194_000),
    ("opened", 10_500),
    ("six", 79_400),
    ("request6", 22_800),
    ("open6", 307_800),
    ("overflow6", 292_000),
    ("reply6", 60_800),
    ("observe6", 10_700),
    ("icmp6", 90_900),
    ("unusual6", 83_300),
    ("mark6", 78_700),
    ("persist6", 244_900),
    ("persist_overflow6", 163_800),
    ("persist_alike6", 43_600),
    ("astray6", 31_600),
    ("related6", 209_600),
    ("related_open6", 248_400),
    ("control", 319_100),
    ("opened6", 12_200),
    ("neighbour", 40),
];
const BENCH_BUDGETS: &[(&str, u32)] = &[
    ("reset", 290),
    ("reset6", 290),
    ("floor_transmit", 3),
    ("floor_push", 235),
    ("floor_push6", 340),
    ("floor_pass", 3),
    ("touch", 130),
];
const REALSERVER_BUDGETS: &[(&str, u32)] = &[("decapsulate", 2_700)];

fn load(program: &mut Program) -> Result<ProgramInfo, ProgramError> {
    match program {
        Program::Xdp(xdp) => xdp.load().and_then(|()| xdp.info()),
        Program::SchedClassifier(classifier) => classifier.load().and_then(|()| classifier.info()),
        _ => panic!("a program of a kind that this test does not know"),
    }
}

/// Loads every program of an object. Nothing of it stays when this returns.
fn check(object: &[u8], budgets: &[(&str, u32)]) {
    require_root().expect("root");
    let mut ebpf: Ebpf = EbpfLoader::new().load(object).expect("the kernel takes the maps");
    let mut counts = BTreeMap::new();
    let mut refused = Vec::new();
    for (name, program) in ebpf.programs_mut() {
        match load(program) {
            Ok(info) => {
                let count = info.verified_instruction_count().expect("kernels since 5.16 count them");
                println!("{name}: {count} instructions verified");
                counts.insert(name.to_owned(), count);
            }
            Err(error) => refused.push(format!("{name}: {error:?}")),
        }
    }
    assert!(refused.is_empty(), "the kernel refuses programs\n{}", refused.join("\n"));
    let known: Vec<&str> = counts.keys().map(String::as_str).collect();
    let mut expected: Vec<&str> = budgets.iter().map(|(name, _)| *name).collect();
    expected.sort_unstable();
    assert_eq!(known, expected, "programs of the object, and programs with a budget");
    for (name, budget) in budgets {
        assert!(counts[*name] <= *budget, "{name}: {} instructions verified, the budget is {budget}", counts[*name]);
    }
}

#[test]
fn the_programs_of_the_director_load() {
    check(object::DIRECTOR, DIRECTOR_BUDGETS);
}

#[test]
fn the_programs_of_the_real_server_load() {
    check(object::REALSERVER, REALSERVER_BUDGETS);
}

#[test]
fn the_programs_that_measure_load() {
    check(bulk::OBJECT, BENCH_BUDGETS);
}
