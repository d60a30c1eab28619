//! The time of day, as a value that a process is given: a simulation supplies its own clock.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::id::UnixMillis;

/// Tells the time of day. A process waits with tokio's timer, which a simulation pauses.
pub trait Clock: Send + Sync + std::fmt::Debug {
    /// Milliseconds since the Unix epoch.
    fn now(&self) -> UnixMillis;
}

/// The machine's clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> UnixMillis {
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or(Duration::ZERO);
        UnixMillis(since.as_millis() as u64)
    }
}

/// A clock that follows tokio's timer from a fixed start, for paused and virtual time.
#[derive(Debug, Clone)]
pub struct TimerClock {
    origin: UnixMillis,
    start: tokio::time::Instant,
}

impl TimerClock {
    /// A clock that reads `origin` now. Must be called inside a tokio runtime with a timer.
    pub fn starting_at(origin: UnixMillis) -> Self {
        Self {
            origin,
            start: tokio::time::Instant::now(),
        }
    }
}

impl Clock for TimerClock {
    fn now(&self) -> UnixMillis {
        self.origin.plus(self.start.elapsed().as_millis() as u64)
    }
}

/// A shared clock.
pub type SharedClock = Arc<dyn Clock>;
