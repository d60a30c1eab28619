//! The whole swarm in one process, honest and not. The shells are the shipped ones (dispatch, trainer, workers, critics,
//! seeders, over the bus in memory or a real NATS server); a liar is a member whose answers or verdicts are built here.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    unreachable_pub,
    dead_code
)]

#[path = "../src/config.rs"]
mod config;

#[path = "liars/critic.rs"]
mod critic;
#[path = "harness/in_turn.rs"]
mod in_turn;
#[path = "liars/ledger.rs"]
mod ledger;
#[path = "liars/shelf.rs"]
mod shelf;
#[path = "liars/start.rs"]
mod start;
#[path = "liars/suspect.rs"]
mod suspect;
#[path = "liars/swarm.rs"]
mod swarm;

#[path = "liars/hostile_submissions.rs"]
mod hostile_submissions;
#[path = "liars/int8_workers.rs"]
mod int8_workers;
#[path = "liars/loops.rs"]
mod loops;
#[path = "liars/lying_critics.rs"]
mod lying_critics;
#[path = "liars/lying_workers.rs"]
mod lying_workers;
#[path = "liars/published.rs"]
mod published;
#[path = "liars/quickstart.rs"]
mod quickstart;
#[path = "liars/uploads.rs"]
mod uploads;
