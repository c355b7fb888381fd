//! The data plane and its control plane do what a plain model of `docs/ipvs.md` does, whatever happens.

use proptest::{
    prelude::*,
    test_runner::{Config, RngSeed},
};

mod action;
mod mark;
mod pair;
mod persistence;
mod schedule;
mod spec;
mod states;

/// Most steps of a sequence, and sequences: with half of the most on average, more than 100,000 steps in all.
const STEPS: usize = 900;
const SEQUENCES: u32 = 250;

proptest! {
    #![proptest_config(Config {
        failure_persistence: None,
        // What this notices, it notices every time.
        rng_seed: RngSeed::Fixed(0x1234),
        max_shrink_iters: 3000,
        ..Config::with_cases(SEQUENCES)
    })]

    #[test]
    fn the_product_does_what_the_model_does(actions in action::any_actions(STEPS)) {
        let mut pair = pair::Pair::new();
        for action in actions {
            pair.act(action)?;
        }
    }
}
