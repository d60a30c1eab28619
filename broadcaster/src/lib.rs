//! How weights travel: versions described and verified, cut in shards, passed from peer to peer, kept as folders.
//!
//! * [`state`] says what a version's root covers; [`object`] cuts bytes in shards; [`store`] keeps them.
//! * [`codec`] makes and applies lossless deltas between versions; pure.
//! * [`plan`] and [`uploads`] decide who asks whom for what, and who is sent what; both are pure. [`rate`] caps uploads.
//! * [`wire`] and [`connection`] are what peers say, and how they prove who they are; `transport` carries it.
//! * [`route`] decides by which objects a state is reached with the fewest bytes; pure.
//! * [`squash`] decides who makes which delta over several versions, pure; [`squasher`] makes them.
//! * [`adopt`] takes over one version: open, fetch, apply, check. [`follower`] follows a run, version after version.
//! * [`swarm`] is the handle: offer, fetch, meet. [`meter`] counts. [`survey`] asks who holds what.
//! * [`nat`] is how a peer behind a home router is reached.
//! * [`snapshot`] writes and verifies a Hugging Face folder.
//!
//! Moves bytes, never tensors: what a tensor means is not known here.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod adopt;
pub mod bitmap;
pub mod codec;
pub mod connection;
pub mod disk;
mod fetch;
pub mod follower;
mod link;
pub mod meter;
pub mod nat;
mod node;
pub mod object;
pub mod overlay;
pub mod plan;
pub mod presence;
pub mod rate;
pub mod route;
mod seats;
mod server;
mod slots;
pub mod snapshot;
pub mod squash;
pub mod squasher;
pub mod state;
pub mod store;
pub mod survey;
pub mod swarm;
mod transport;
pub mod uploads;
pub mod wire;

pub use swarm::{FetchError, Source, Swarm, SwarmConfig, SwarmError};
