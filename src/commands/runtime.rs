//! The async runtime of a process.

use anyhow::{Context, Result};

/// A runtime with one thread, which only talks: tensor work runs on its own threads.
pub(super) fn start() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .context("the runtime cannot be started")
}
