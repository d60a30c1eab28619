//! Models and snapshots in the forms of a model hub: [`pull`] fetches a model from a hub into a folder, [`gateway`] serves a
//! run's versions to a hub's clients.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod gateway;
pub mod pull;
