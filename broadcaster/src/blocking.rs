//! Long work outside the async loop.

use tokio::task::{JoinError, spawn_blocking};

/// Work on at most this many bytes stays on the caller's thread: another thread costs more than hashing them does (BLAKE3:
/// about 4 GB/s, so 60 µs).
pub(crate) const INLINE_BYTES_MAX: usize = 256 << 10;

/// Runs `work` on a thread that may block, and waits for it.
pub(crate) async fn on_blocking_thread<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    match spawn_blocking(work)
        .await
        .map_err(JoinError::try_into_panic)
    {
        Ok(done) => done,
        // A panic in `work` continues here, as if `work` had run on this thread.
        Err(Ok(panic)) => std::panic::resume_unwind(panic),
        // The runtime is shutting down, and this task with it.
        Err(Err(_)) => std::future::pending().await,
    }
}

/// Runs `work` over `bytes` bytes: on this thread if they are few, else on a thread that may block.
///
/// # Errors
/// When the work panicked on its thread.
pub async fn off_loop_if_large<T: Send + 'static>(
    bytes: usize,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, JoinError> {
    if bytes <= INLINE_BYTES_MAX {
        return Ok(work());
    }
    spawn_blocking(work).await
}
