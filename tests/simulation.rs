//! A simulated swarm: a thousand workers on the bus in memory, under virtual time. Messages are lost, members die and
//! restart, and some members lie. The services are the shipped ones (dispatch, trainer, worker, critic, follower); only the
//! model is a table and the clock is simulated. A seed determines the whole run.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    unreachable_pub
)]

#[path = "simulation/checks.rs"]
mod checks;
#[path = "harness/in_turn.rs"]
mod in_turn;
#[path = "simulation/liar.rs"]
mod liar;
#[path = "simulation/members.rs"]
mod members;
#[path = "harness/memory_objects.rs"]
mod memory_objects;
#[path = "simulation/objects.rs"]
mod objects;
#[path = "simulation/observed_bus.rs"]
mod observed_bus;
#[path = "simulation/observer.rs"]
mod observer;
#[path = "simulation/processes.rs"]
mod processes;
#[path = "simulation/run.rs"]
mod run;
#[path = "simulation/schedule.rs"]
mod schedule;
#[path = "simulation/swarm.rs"]
mod swarm;
#[path = "simulation/table.rs"]
mod table;
#[path = "simulation/task.rs"]
mod task;

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Instant;

use run::{Report, Scenario, simulate};

/// Seeds of every test run.
const SEEDS: std::ops::Range<u64> = 0..10;
/// Seeds of the long form: `cargo test --release --test simulation -- --ignored a_hundred_seeds --nocapture`.
const SEEDS_LONG: std::ops::Range<u64> = 0..100;
/// Seeds simulated at once, each with its own thread and runtime.
const THREADS: usize = 2;

/// Simulates every seed, then fails with the rules that were broken, by seed.
fn simulate_all(seeds: std::ops::Range<u64>) {
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
                    let report = simulate(Scenario::of_seed(seed));
                    println!("{}", report.line());
                    failed.lock().unwrap().extend(violations(seed, &report));
                }
            });
        }
    });
    println!("{seeds:?} took {:.1} s", began.elapsed().as_secs_f64());
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// The first violation of each rule, with the number of violations.
fn violations(seed: u64, report: &Report) -> Vec<String> {
    let mut rules: BTreeMap<&str, (&str, usize)> = BTreeMap::new();
    for violation in &report.violations {
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
    simulate_all(SEEDS);
}

#[test]
#[ignore = "the long form of a_thousand_workers_close_fifty_steps_whatever_the_seed: minutes"]
fn a_hundred_seeds() {
    simulate_all(SEEDS_LONG);
}

#[test]
fn equal_seeds_give_equal_runs_and_different_seeds_different_runs() {
    let small = |seed| Scenario {
        workers: 200,
        steps: 20,
        ..Scenario::of_seed(seed)
    };
    let traces = std::thread::scope(|scope| {
        let threads = [7, 7, 8].map(|seed| scope.spawn(move || simulate(small(seed))));
        threads.map(|thread| thread.join().unwrap())
    });
    let [one, again, other]: [Report; 3] = traces;
    assert_eq!(
        one.trace, again.trace,
        "two runs of seed 7 sent different messages"
    );
    assert_ne!(one.trace, other.trace);
}
