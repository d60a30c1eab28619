//! `kill -9` of any process of a run, at a moment drawn from a seed: the run finishes by itself (after the parent's death,
//! with the same command), every ticket has exactly one fate, and no group is trained twice. The tests run the real binary
//! over a real NATS server, with each role in its own process. `MUSTER_KILL_SEED` draws other moments.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    unreachable_pub
)]

mod harness;
#[path = "kills/processes.rs"]
mod processes;
#[path = "kills/record.rs"]
mod record;
#[path = "kills/run.rs"]
mod run;

use std::time::Duration;

use nix::sys::signal::Signal;

use self::record::assert_complete;
use self::run::{ASYNC_LEVEL, BATCH_GROUPS, Run, STEPS, one_at_a_time};

/// Kills a process once, and lets the run finish by itself.
fn survives_the_death_of(role: &str) {
    let _alone = one_at_a_time();
    let mut run = Run::start(role);
    run.wait_until_the_chosen_moment();
    let victim = run.process(role);
    victim.signal(Signal::SIGKILL);
    run.finish();
    assert_complete(&run);
}

#[test]
fn a_run_survives_the_death_of_a_worker() {
    survives_the_death_of("worker-1");
}

#[test]
fn a_run_survives_the_death_of_its_only_critic() {
    survives_the_death_of("critic-1");
}

#[test]
fn a_run_survives_the_death_of_its_evaluator() {
    survives_the_death_of("evaluator");
}

#[test]
fn a_run_survives_the_death_of_dispatch() {
    survives_the_death_of("dispatch");
}

#[test]
fn a_run_survives_the_death_of_the_trainer() {
    survives_the_death_of("trainer");
}

#[test]
fn a_run_survives_the_death_of_the_nats_server() {
    survives_the_death_of("nats-server");
}

#[test]
fn a_run_survives_the_death_of_all_processes_but_the_parent() {
    let _alone = one_at_a_time();
    let mut run = Run::start("all-children");
    run.wait_until_the_chosen_moment();
    for child in run.children() {
        child.signal(Signal::SIGKILL);
    }
    run.finish();
    assert_complete(&run);
}

#[test]
fn the_children_of_a_killed_parent_end_and_the_same_command_resumes() {
    let _alone = one_at_a_time();
    let mut run = Run::start("parent");
    run.wait_until_the_chosen_moment();
    let children = run.children();
    assert!(
        children.len() >= 7,
        "only {children:?} run under the parent"
    );
    run.signal(Signal::SIGKILL);
    run.wait_for_end(Duration::from_secs(5));
    processes::wait_until_gone(&children, Duration::from_secs(5));
    run.start_again();
    run.finish();
    assert_complete(&run);
}

#[test]
fn an_interrupted_run_drains_and_the_same_command_resumes() {
    let _alone = one_at_a_time();
    let mut run = Run::start("interrupt");
    run.wait_until_the_chosen_moment();
    let children = run.children();
    run.signal(Signal::SIGINT);
    let ended = run.wait_for_end(Duration::from_secs(15));
    assert!(!ended.success(), "an interrupted run is not a finished one");
    let said = run.stderr();
    assert!(
        said.contains("the same command goes on with the run"),
        "it said {said:?}"
    );
    processes::wait_until_gone(&children, Duration::from_secs(1));
    assert_eq!(
        run.newest_full_state(),
        run.steps_taken(),
        "a trainer that drains keeps its newest state, so that nothing is trained again"
    );
    run.start_again();
    run.finish();
    assert_complete(&run);
    let log = run.log("trainer");
    assert!(
        !log.contains("made other bits"),
        "the state that was kept is not the one of its version: {log}"
    );
}

/// The workers are stopped until the trainer has nothing left to train and a seeder holds its newest version. The parent is
/// stopped so that it does not restart the trainer during the test.
#[test]
fn without_a_trainer_leases_and_verdicts_go_on_up_to_the_bound() {
    let _alone = one_at_a_time();
    let mut run = Run::start("bound");
    run.wait_until_the_chosen_moment();
    let workers = [run.process("worker-1"), run.process("worker-2")];
    for worker in &workers {
        worker.signal(Signal::SIGSTOP);
    }
    run.wait_until_the_trainer_starves();
    run.signal(Signal::SIGSTOP);
    run.process("trainer").signal(Signal::SIGKILL);
    let (version, freed) = (run.steps_taken(), run.tickets_freed());
    let bound = (version + ASYNC_LEVEL + 1).min(STEPS) * BATCH_GROUPS + freed;
    let before = run.tickets_in_log("ready for the trainer");
    for worker in &workers {
        worker.signal(Signal::SIGCONT);
    }
    // Groups that were too stale for the critics before the trainer died have a fate already. Dispatch ends others when the
    // workers go on, and issues a ticket for each of them.
    let ended = run.tickets_ended();
    let all = |run: &Run| {
        let freed_since = run
            .tickets_in_log("ended by dispatch")
            .difference(&ended)
            .count() as u64;
        (1..=bound + freed_since).collect::<std::collections::BTreeSet<u64>>()
    };
    run.wait_for("every ticket up to the bound to be judged", |run| {
        let by_dispatch = run.tickets_in_log("ended by dispatch");
        let judged = run.tickets_in_log("ready for the trainer");
        &(&judged | &by_dispatch) | &ended == all(run)
    });
    let all = all(&run);
    assert!(
        (&before | &ended) != all,
        "every ticket was judged before the trainer died"
    );
    assert_eq!(
        run.tickets_in_log("leased"),
        all,
        "tickets leased without a trainer at version {version}, {freed} freed"
    );
    run.signal(Signal::SIGCONT);
    run.finish();
    assert_complete(&run);
}

#[test]
fn no_process_holds_a_secret_that_is_not_its_own() {
    let _alone = one_at_a_time();
    let mut run = Run::start("secrets");
    run.wait_until_the_chosen_moment();
    let secrets = run.secrets();
    assert!(secrets.len() >= 6, "credentials of {:?}", secrets.keys());
    // Every process is stopped, the parent first. The parent is not searched: it generated all the secrets.
    run.signal(Signal::SIGSTOP);
    let children = run.children();
    for child in &children {
        child.signal(Signal::SIGSTOP);
    }
    let mut own = 0;
    for name in secrets.keys() {
        let mut held = run.process(name).secrets_held(&secrets);
        let all = held.len();
        held.retain(|held| held != name);
        assert!(held.is_empty(), "{name} holds the secrets of {held:?}");
        own += all - held.len();
    }
    assert!(
        own > 0,
        "no process holds its own secret: the search does not work"
    );
    let server = run.process("nats-server").secrets_held(&secrets);
    assert!(
        server.is_empty(),
        "the NATS server holds the secrets of {server:?}"
    );
    for child in &children {
        child.signal(Signal::SIGCONT);
    }
    run.signal(Signal::SIGCONT);
    run.finish();
    assert_complete(&run);
}
