//! RESOLVE: the trainer.
#![cfg_attr(
    test,
    allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)
)]

pub mod advantage;
pub mod objective;
pub mod policy_stepper;
pub mod resolver;
pub mod schedule;
pub mod stepper;
pub mod trainer;
