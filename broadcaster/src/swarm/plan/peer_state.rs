//! What the download scheduler knows about one connected peer.

use crate::store::bitmap::Bitmap;
use crate::transport::wire::Chooser;

/// Bounds of the time between two polls of a peer that lacks shards. The time doubles while the peer has no news.
pub(super) const POLL_MS_MIN: u64 = 20;
pub(super) const POLL_MS_MAX: u64 = 500;
/// Longest time after news: the peer will have more news, and the last ones suffice for a while. In a simulation of 64 peers
/// with 4 Mbit/s that all know one another, this bound needs 5.6 polls per shard and a bound of 500 ms needs 16.9; the last peer
/// finishes at 1.08 of the lower bound either way.
pub(super) const POLL_MS_MAX_WITH_NEWS: u64 = 2_000;
/// Longest time without news, per known peer. With few peers each is polled often: a shard that travels over many hops must not
/// wait long at each.
pub(super) const POLL_MS_EACH: u64 = 8;
/// Longest wait that a busy peer may ask for.
pub(super) const BUSY_MS_MAX: u64 = 30_000;

/// Longest wait that a busy peer which chooses may ask for. It waits for its receivers to pass shards on and cannot know that
/// they are gone; a fetcher that has lost them must be able to ask again.
pub(super) const CHOOSER_MS_MAX: u64 = 2_000;

/// The state of a connected peer.
#[derive(Debug)]
pub(super) struct PeerState {
    pub(super) held: Bitmap,
    pub(super) chooser: Option<Chooser>,
    /// Requests for shards in flight to this peer.
    pub(super) pending: usize,
    /// Whether a poll is in flight.
    pub(super) is_polled: bool,
    pub(super) poll_at_ms: u64,
    pub(super) poll_ms: u64,
    pub(super) busy_until_ms: u64,
    /// Good shards since its last refusal.
    pub(super) delivered: usize,
    /// Refusals since its last good shard.
    pub(super) refusals: u32,
    /// Usual time from a request to its shard, an exponential average.
    pub(super) usual_ms: Option<u64>,
}

impl PeerState {
    /// The state of a peer that has not replied yet.
    pub(super) fn new(shards: u32, now_ms: u64) -> Self {
        Self {
            held: Bitmap::empty(shards),
            chooser: None,
            pending: 0,
            is_polled: false,
            poll_at_ms: now_ms,
            poll_ms: POLL_MS_MIN,
            busy_until_ms: now_ms,
            delivered: 0,
            refusals: 0,
            usual_ms: None,
        }
    }

    /// Counts a refusal of a shard that the peer claims to hold, and waits twice as long as after the last one. Without the
    /// wait, a peer that refuses every request at once would keep shards in flight for ever, so that no other peer is asked.
    pub(super) fn on_refusal(&mut self, now_ms: u64) {
        self.delivered = 0;
        let wait_ms = POLL_MS_MIN << self.refusals.min(16);
        self.refusals += 1;
        self.busy_until_ms = now_ms + wait_ms.min(BUSY_MS_MAX);
    }
}
