//! Dispatch: hands out tickets as leases, admits groups, gives them to critics, and passes judged groups on to the trainer.
//!
//! `state` and the files that it uses decide: values, the time and randomness in, values out. [`service`] acts: it talks
//! to the bus and makes decisions durable. The crate never imports the policy: here a group is tokens and numbers. A ticket
//! belongs to dispatch until its group is in the ready queue, and to the trainer from then on; its owner decides its fate.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

mod admission;
pub mod audit;
pub mod conduct;
mod metrics;
pub mod overlay;
pub mod prompts;
pub mod reviews;
pub mod service;
mod squashed;
mod state;
mod tickets;
mod waiting;
