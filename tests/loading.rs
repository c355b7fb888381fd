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
    ("xdpvs", 54_600),
    ("request", 25_300),
    ("open", 120_600),
    ("overflow", 99_300),
    ("reply", 27_000),
    ("observe", 11_000),
    ("icmp", 180_000),
    ("unusual", 59_600),
    ("mark", 36_700),
    ("persist", 217_800),
    ("persist_overflow", 57_000),
    ("persist_alike", 32_000),
    ("astray", 19_200),
    ("related", 281_400),
    ("related_open", 199_800),
    ("opened", 15_200),
    ("six", 96_400),
    ("request6", 25_100),
    ("open6", 183_100),
    ("overflow6", 239_300),
    ("reply6", 128_000),
    ("observe6", 13_000),
    ("icmp6", 85_100),
    ("unusual6", 95_800),
    ("mark6", 58_400),
    ("persist6", 357_200),
    ("persist_overflow6", 97_800),
    ("persist_alike6", 40_600),
    ("astray6", 43_500),
    ("related6", 128_100),
    ("related_open6", 216_100),
    ("control", 319_100),
    ("opened6", 17_200),
    ("sctp", 78_600),
    ("sctp6", 126_000),
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
