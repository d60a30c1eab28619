//! What Muster's processes say to one another, and how it is carried.
//!
//! * [`id`] names things, [`identity`] proves who speaks, [`envelope`] signs and bounds every message, [`message`]
//!   holds what can be said, [`limits`] the bounds.
//! * [`bus`] carries it: [`bus::nats`] over NATS JetStream, [`bus::memory`] seeded and in memory for simulation.
//! * [`record`] is the form of a run directory's logs, which the learner writes and the report reads.
//! * [`clock`] is the only source of time, so that a simulator can own it.
//!
//! Knows nothing of models, tasks or files of weights. Imports no other crate of the project.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod bus;
pub mod child;
pub mod clock;
pub mod credentials;
pub mod dispatch_client;
pub mod envelope;
pub mod id;
pub mod identity;
pub mod life;
pub mod limits;
pub mod message;
pub mod nats_server;
mod os;
pub mod record;
pub mod seed;
pub mod subject;
