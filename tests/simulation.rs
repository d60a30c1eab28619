//! The simulated swarm: a thousand workers on the bus in memory, under virtual time, with messages lost, members that die
//! and come back, and liars among them. The shells and their decisions are the shipped ones (dispatch, trainer, worker,
//! critic, follower); only the model is a table and the clock is the simulator's. One seed fixes everything.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    unreachable_pub
)]

#[path = "simulation/cast.rs"]
mod cast;
#[path = "simulation/checks.rs"]
mod checks;
#[path = "support/in_turn.rs"]
mod in_turn;
#[path = "simulation/ledger.rs"]
mod ledger;
#[path = "simulation/liar.rs"]
mod liar;
#[path = "simulation/shelf.rs"]
mod shelf;
#[path = "simulation/stage.rs"]
mod stage;
#[path = "simulation/table.rs"]
mod table;
#[path = "simulation/watched.rs"]
mod watched;

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Instant;

use stage::{Outcome, Play, play};

/// Seeds that every test run plays.
const SEEDS: std::ops::Range<u64> = 0..10;
/// Seeds of the long form: `cargo test --release --test simulation -- --ignored a_hundred_seeds --nocapture`.
const SEEDS_LONG: std::ops::Range<u64> = 0..100;
/// Played at once: each seed has a thread and a runtime of its own.
const THREADS: usize = 2;

/// Plays every seed and fails with the first that breaks a rule, naming it.
fn play_all(seeds: std::ops::Range<u64>) {
    let began = Instant::now();
    let queue = Mutex::new(seeds.clone());
    let failed: Mutex<Vec<String>> = Mutex::default();
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    let Some(seed) = queue.lock().unwrap().next() else {
                        return;
                    };
                    let outcome = play(Play::of_seed(seed));
                    println!("{}", outcome.line());
                    failed.lock().unwrap().extend(told(seed, &outcome));
                }
            });
        }
    });
    println!("{seeds:?} took {:.1} s", began.elapsed().as_secs_f64());
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// What a run broke: of each rule the first case, and how many there are.
fn told(seed: u64, outcome: &Outcome) -> Vec<String> {
    let mut rules: BTreeMap<&str, (&str, usize)> = BTreeMap::new();
    for violation in &outcome.violations {
        let rule = violation.split(':').next().unwrap_or_default();
        rules.entry(rule).or_insert((violation, 0)).1 += 1;
    }
    let lines = rules.values();
    lines
        .map(|(first, count)| format!("seed {seed}: {first} ({count} in all)"))
        .collect()
}

#[test]
fn a_thousand_workers_close_fifty_steps_whatever_the_seed() {
    play_all(SEEDS);
}

#[test]
#[ignore = "the long form of a_thousand_workers_close_fifty_steps_whatever_the_seed: minutes"]
fn a_hundred_seeds() {
    play_all(SEEDS_LONG);
}

#[test]
fn equal_seeds_give_equal_runs_and_others_do_not() {
    let small = |seed| Play {
        workers: 200,
        steps: 20,
        ..Play::of_seed(seed)
    };
    let traces = std::thread::scope(|scope| {
        let threads = [7, 7, 8].map(|seed| scope.spawn(move || play(small(seed))));
        threads.map(|thread| thread.join().unwrap())
    });
    let [one, again, other]: [Outcome; 3] = traces;
    assert_eq!(
        one.trace, again.trace,
        "seed 7 was played twice and moved other messages"
    );
    assert_ne!(one.trace, other.trace);
}
