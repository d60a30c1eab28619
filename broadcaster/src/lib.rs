//! How weights travel: versions are described and signed, cut into shards, passed from peer to peer, and stored as folders.
//!
//! * [`version`] defines the root that covers a version, finds the objects that lead to it, and takes it over.
//! * [`codec`] makes and applies lossless deltas between versions. Pure.
//! * [`store`] cuts objects into shards, verifies shards, and holds them in memory and on disk.
//! * [`swarm`] exchanges objects with other peers; [`swarm::plan`] (download) and [`swarm::uploads`] decide, both pure.
//! * [`transport`] connects two peers: frames, handshake, TCP, and QUIC through home routers.
//! * [`follower`] takes over each new version of a run.
//! * [`snapshot`] writes and verifies a Hugging Face folder.
//!
//! Moves bytes, never tensors: this crate does not know what a tensor means.
#![allow(
    missing_docs,
    reason = "a field or variant whose name says all needs no comment"
)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod blocking;
pub mod codec;
pub mod follower;
pub mod snapshot;
pub mod store;
pub mod swarm;
pub mod transport;
pub mod version;

pub use swarm::{FetchError, ObjectSource, Swarm, SwarmConfig, SwarmError};
