//! How weights travel: versions are described and signed, cut into shards, passed from peer to peer, and stored as folders.
//!
//! * [`state`] defines what a version's root covers; [`object`] cuts bytes into shards; [`store`] holds shards.
//! * [`codec`] makes and applies lossless deltas between versions. Pure.
//! * [`swarm`] exchanges objects with other peers; [`swarm::plan`] (download) and [`swarm::uploads`] decide, both pure.
//! * [`transport`] connects two peers: frames, handshake, TCP, and QUIC through home routers.
//! * [`route`] chooses the objects that lead to a version with the fewest bytes. Pure.
//! * [`squash`] decides which peer makes which delta over several versions, pure; [`squasher`] makes them.
//! * [`adopt`] fetches and verifies one version; [`follower`] does so for each new version of a run.
//! * [`snapshot`] writes and verifies a Hugging Face folder.
//!
//! Moves bytes, never tensors: this crate does not know what a tensor means.
#![allow(
    missing_docs,
    reason = "a field or variant whose name says all needs no comment"
)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod adopt;
pub mod bitmap;
pub mod codec;
pub mod disk;
pub mod follower;
pub mod object;
pub mod route;
pub mod snapshot;
pub mod squash;
pub mod squasher;
pub mod state;
pub mod store;
pub mod swarm;
pub mod transport;

pub use swarm::{FetchError, ObjectSource, Swarm, SwarmConfig, SwarmError};
