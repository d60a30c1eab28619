//! RESOLVE: the trainer takes judged groups and makes new versions of the policy of them.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod advantage;
pub mod objective;
pub mod policy_stepper;
pub mod resolver;
pub mod schedule;
pub mod stepper;
pub mod trainer;
pub mod warmup;
