//! A peer that a plan may ask, and what it has shown of itself so far.

use crate::store::bitmap::Bitmap;
use crate::transport::wire::Chooser;

/// How often a peer that lacks something is asked what it has by now: at once after news, ever less without.
pub(super) const POLL_MS_MIN: u64 = 20;
pub(super) const POLL_MS_MAX: u64 = 500;
/// Who had news will have more, and what it had lasts a while. Simulated, 64 peers with 4 Mbit/s that know one another ask
/// 5.6 times for each shard that arrives, against 16.9 times if they never waited for longer than half a second, and the last
/// is done at 1.08 of the bound either way.
pub(super) const POLL_MS_MAX_WITH_NEWS: u64 = 2_000;
/// Without news each is asked about this often for each that is known, so that few are asked often: where a shard comes a
/// long way, it is not to wait at each.
pub(super) const POLL_MS_EACH: u64 = 8;
/// Longest wait that a busy peer may ask for: beyond it the peer is of no use anyway.
pub(super) const BUSY_MS_MAX: u64 = 30_000;

/// Longest wait that a peer which chooses may ask for. It waits for others to pass on what it gave them, and cannot know
/// that they are gone: who lost them asks again.
pub(super) const CHOOSER_MS_MAX: u64 = 2_000;

/// A connected peer.
#[derive(Debug)]
pub(super) struct PeerState {
    pub(super) held: Bitmap,
    pub(super) chooser: Option<Chooser>,
    /// Shards asked for and not yet answered.
    pub(super) pending: usize,
    pub(super) is_polled: bool,
    pub(super) poll_at_ms: u64,
    pub(super) poll_ms: u64,
    pub(super) busy_until_ms: u64,
    /// Good shards since it last refused one.
    pub(super) delivered: usize,
    /// Refusals since its last good shard.
    pub(super) refusals: u32,
    /// Usual time from a request to its shard: an average that forgets.
    pub(super) usual_ms: Option<u64>,
}

impl PeerState {
    /// A peer that has said nothing yet.
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

    /// It refused a shard that it said it holds. It is asked ever less until it delivers again: a peer that refuses at once
    /// whatever it is asked would otherwise keep shards in flight, and so from being asked of others, for ever.
    pub(super) fn refuse(&mut self, now_ms: u64) {
        self.delivered = 0;
        let wait_ms = POLL_MS_MIN << self.refusals.min(16);
        self.refusals += 1;
        self.busy_until_ms = now_ms + wait_ms.min(BUSY_MS_MAX);
    }
}
