//! ANSWER: a worker. It leases tickets, generates groups under the versions that their leases allow, signs and submits
//! them as they are complete, and adopts new weights meanwhile.
//!
//! [`worker`] is the loop, [`answerer`] what it needs of a model, [`engine`] the model itself, [`capacity`] how much it takes
//! on. Knows no rewards and no gold answers.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod answerer;
pub mod capacity;
pub mod engine;
pub mod worker;
