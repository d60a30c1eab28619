//! RESOLVE: dispatch and the trainer.
#![cfg_attr(
    test,
    allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)
)]

pub mod dispatch;
pub mod advantage;
pub mod metrics;
pub mod objective;
pub mod schedule;
