//! An upload cap: how long each piece of an upload must wait so that all uploads together stay below a rate.
//!
//! A token bucket that may go into debt: each caller is told how long to wait before it sends, so callers are served in the
//! order of their calls. Pure: the caller hands in the time.

use std::num::NonZeroU64;

/// Bytes written per call of [`TokenBucket::take`]; small, so that many uploads share the rate evenly.
pub(crate) const PIECE_BYTES: usize = 16 << 10;

/// The largest burst, in seconds of the rate: too short for other users of a home link to notice.
const BURST_SHARE: f64 = 0.05;

/// A rate, and the tokens left of it.
#[derive(Debug, Clone)]
pub(crate) struct TokenBucket {
    bytes_per_ms: f64,
    burst_bytes: f64,
    tokens: f64,
    filled_at_ms: u64,
}

impl TokenBucket {
    /// A bucket with the rate `bytes_per_second`, full at `now_ms`.
    pub(crate) fn new(bytes_per_second: NonZeroU64, now_ms: u64) -> Self {
        let rate = bytes_per_second.get() as f64;
        let burst_bytes = rate * BURST_SHARE;
        Self {
            bytes_per_ms: rate / 1_000.0,
            burst_bytes,
            tokens: burst_bytes,
            filled_at_ms: now_ms,
        }
    }

    /// Takes `bytes`, and returns the milliseconds to wait before they may be sent.
    pub(crate) fn take(&mut self, bytes: usize, now_ms: u64) -> u64 {
        let passed_ms = now_ms.saturating_sub(self.filled_at_ms) as f64;
        self.filled_at_ms = self.filled_at_ms.max(now_ms);
        self.tokens = (self.tokens + passed_ms * self.bytes_per_ms).min(self.burst_bytes);
        self.tokens -= bytes as f64;
        if self.tokens >= 0.0 {
            0
        } else {
            (-self.tokens / self.bytes_per_ms).ceil() as u64
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_more_passes_than_the_rate_and_one_burst(
            rate in 1_000u64..100_000_000,
            takes in proptest::collection::vec((1usize..PIECE_BYTES, 0u64..50), 1..200),
        ) {
            let mut bucket = TokenBucket::new(NonZeroU64::new(rate).unwrap(), 1_000);
            let (mut now_ms, mut passed, mut latest_ms) = (1_000, 0, 1_000);
            for (bytes, later_ms) in takes {
                now_ms += later_ms;
                latest_ms = latest_ms.max(now_ms + bucket.take(bytes, now_ms));
                passed += bytes;
                let allowed = rate as f64 * (BURST_SHARE + (latest_ms - 1_000) as f64 / 1_000.0);
                prop_assert!(passed as f64 <= allowed * 1.001 + 1.0);
            }
        }
    }

    #[test]
    fn a_steady_taker_gets_the_whole_rate() {
        let mut bucket = TokenBucket::new(NonZeroU64::new(1_000_000).unwrap(), 0);
        let mut now_ms = 0;
        for _ in 0..1_000 {
            now_ms += bucket.take(PIECE_BYTES, now_ms);
        }
        let seconds = (1_000 * PIECE_BYTES) as f64 / 1e6;
        assert!((now_ms as f64 / 1_000.0 - seconds).abs() < 0.2, "{now_ms}");
    }
}
