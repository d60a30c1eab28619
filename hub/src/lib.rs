//! The protocol of a model hub: [`pull`] downloads a model from a hub, and [`gateway`] serves a run's versions to the clients of
//! hubs.
//!
//! The gateway's paths are routes of axum. `gateway::edition` opens a folder's files, verifies every byte against the
//! learner's key, and keeps the files open: a file that replaces one later is not sent, and a file changed in place is
//! refused and verified again. Contents are named by SHA-256, as hubs' clients expect, and a version by a commit, the first
//! 40 digits of the hash of what the learner signed. `gateway::version_cache` is one task that prepares versions, one at a
//! time; `gateway::source` gets them from folders, or from a live run through its peers. The server runs hyper over each
//! connection with bounds on connections, heads and idle time, and a slow client holds one piece of 256 KiB.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod gateway;
pub mod pull;
