//! A whole swarm in one process, with honest and lying members. The services are the shipped ones (dispatch, trainer,
//! workers, critics, seeders, over the bus in memory or a real NATS server); only the lies are written here.
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
mod harness;
#[path = "harness/in_turn.rs"]
mod in_turn;
#[path = "harness/memory_objects.rs"]
mod memory_objects;
#[path = "liars/offered_weights.rs"]
mod offered_weights;
#[path = "liars/plan.rs"]
mod plan;
#[path = "liars/results.rs"]
mod results;
#[path = "liars/start.rs"]
mod start;
#[path = "liars/submissions.rs"]
mod submissions;
#[path = "liars/swarm.rs"]
mod swarm;
#[path = "liars/worker_model.rs"]
mod worker_model;

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
