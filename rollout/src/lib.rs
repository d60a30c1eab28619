//! ANSWER: a worker. It leases tickets, generates groups under exactly the version that each lease names, signs and
//! submits them, and adopts new weights between groups.
//!
//! [`worker`] is the loop, [`answerer`] what it needs of a model, [`engine`] the model itself. Knows no rewards and no gold
//! answers.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod answerer;
pub mod engine;
pub mod worker;
