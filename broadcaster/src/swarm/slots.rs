//! Upload slots: how many shards leave at once, over all connections.
//!
//! Two shards at a time keep the uplink busy on short paths: one is written while the last bytes of the other leave. Each then
//! arrives early enough to be passed on; sixteen at a time would all arrive late. A shard that takes several times as long as
//! usual gives its slot back and continues without it. Its path is slower than the uplink, which has room for another shard,
//! or its reader does not read, and must not delay other peers. So as many shards are in flight as fill the uplink. The
//! longest-waiting connection gets the next free slot. Invariant: at most [`SLOTS`] shards hold a slot.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::Instant;

/// Slots of all connections together.
pub(crate) const SLOTS: usize = 2;
/// A shard gives its slot back after this many times the usual time.
const USUAL_TIMES: u64 = 3;
/// Bounds of that time, ms. The shortest covers the scheduler's delays on a busy machine.
const LEASE_MS: std::ops::RangeInclusive<u64> = 50..=2_000;

/// The slots of all connections.
#[derive(Debug)]
pub(crate) struct Slots {
    free: Semaphore,
    /// Usual time that a shard takes to leave, ms, an exponential average; 0 before the first.
    usual_ms: AtomicU64,
}

impl Default for Slots {
    fn default() -> Self {
        Self {
            free: Semaphore::new(SLOTS),
            usual_ms: AtomicU64::new(0),
        }
    }
}

/// A slot, until it is dropped.
#[derive(Debug)]
pub(crate) struct Slot<'a> {
    slots: &'a Slots,
    permit: Option<SemaphorePermit<'a>>,
}

impl Slots {
    /// Waits for a slot.
    ///
    /// # Cancel safety
    /// A cancelled call loses its position in the queue.
    pub(crate) async fn take(&self) -> Slot<'_> {
        // The semaphore is never closed, so this never fails.
        let permit = self.free.acquire().await.ok();
        Slot {
            slots: self,
            permit,
        }
    }

    fn lease_ms(&self) -> u64 {
        match self.usual_ms.load(Ordering::Relaxed) {
            0 => *LEASE_MS.end(),
            usual_ms => usual_ms
                .saturating_mul(USUAL_TIMES)
                .clamp(*LEASE_MS.start(), *LEASE_MS.end()),
        }
    }

    fn record(&self, took_ms: u64) {
        // The clamp leaves out stuck shards, which say nothing about the uplink. Two updates at once may lose one: harmless.
        let usual_ms = self.usual_ms.load(Ordering::Relaxed);
        let took_ms = took_ms.clamp(1, self.lease_ms());
        let average_ms = match usual_ms {
            0 => took_ms,
            _ => (7 * usual_ms + took_ms).div_ceil(8),
        };
        self.usual_ms.store(average_ms, Ordering::Relaxed);
    }
}

impl Slot<'_> {
    /// Whether the slot has not been given back.
    pub(crate) fn is_held(&self) -> bool {
        self.permit.is_some()
    }

    /// Sends a shard in this slot; if that takes long, gives the slot back and continues without it.
    pub(crate) async fn hold<T, E>(
        mut self,
        sending: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        let begun = Instant::now();
        let sent = self.lend(sending).await;
        if sent.is_ok() {
            self.slots.record(begun.elapsed().as_millis() as u64);
        }
        sent
    }

    /// Runs `doing` in this slot, and gives the slot back if that takes long.
    pub(crate) async fn lend<T>(&mut self, doing: impl Future<Output = T>) -> T {
        let lease = Duration::from_millis(self.slots.lease_ms());
        let mut doing = std::pin::pin!(doing);
        tokio::select! {
            biased;
            done = &mut doing => done,
            () = tokio::time::sleep(lease) => {
                self.permit = None;
                doing.await
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use super::*;

    async fn sends_in(slots: &Slots, ms: u64) {
        let slot = slots.take().await;
        let sending = async {
            tokio::time::sleep(Duration::from_millis(ms)).await;
            Ok::<(), ()>(())
        };
        slot.hold(sending).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn shards_leave_two_at_a_time() {
        let slots = Slots::default();
        let begun = Instant::now();
        let four = four_sends(&slots, 100);
        four.await;
        assert_eq!(begun.elapsed().as_millis(), 200);
    }

    async fn four_sends(slots: &Slots, ms: u64) {
        tokio::join!(
            sends_in(slots, ms),
            sends_in(slots, ms),
            sends_in(slots, ms),
            sends_in(slots, ms)
        );
    }

    #[tokio::test(start_paused = true)]
    async fn readers_that_do_not_read_do_not_delay_other_peers_for_long() {
        let slots = Slots::default();
        sends_in(&slots, 20).await;
        let stuck = async {
            let slot = slots.take().await;
            slot.hold(pending::<Result<(), ()>>()).await
        };
        let others = async {
            let begun = Instant::now();
            tokio::task::yield_now().await;
            sends_in(&slots, 20).await;
            begun.elapsed()
        };
        tokio::select! {
            _ = async { tokio::join!(stuck, slots.take().await.hold(pending::<Result<(), ()>>())) } => {
                panic!("a send that never ends has ended")
            }
            waited = others => assert!(waited.as_millis() <= 80, "{waited:?}"),
        }
    }
}
