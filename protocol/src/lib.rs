//! The messages between Muster's processes, and the bus that carries them.
//!
//! * [`id`] names things, [`identity`] holds a machine's keys, [`message`] holds the messages, [`envelope`] signs and bounds
//!   them, [`limits`] holds the bounds.
//! * [`span`] names ids in logs alike in every process.
//! * [`bus`] carries messages: [`bus::nats`] over NATS JetStream, [`bus::memory`] seeded and in memory for simulation.
//! * [`dispatch_client`] sends a member's requests to dispatch.
//! * [`record`] is the form of a run directory's logs, which the learner writes and the report reads.
//! * [`clock`] is the only source of time, so that a simulator can own it.
//!
//! It knows nothing of models, tasks or weights, and imports no other crate of the project.
//!
//! To change the form of a message: change its type in [`message`], its fixture in [`testing`] or `tests/golden/cases.rs`, raise
//! [`limits::PROTOCOL_VERSION`], and rewrite the golden bytes with
//! `GOLDEN=rewrite cargo test --release -p muster-protocol --test golden`.
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
pub mod span;
pub mod subject;
#[doc(hidden)]
pub mod testing;
