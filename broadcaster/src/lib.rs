//! broadcaster
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod bitmap;
pub mod connection;
pub mod disk;
pub mod object;
pub mod plan;
pub mod rate;
pub mod state;
pub mod store;
pub mod uploads;
pub mod wire;
