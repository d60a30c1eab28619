//! The download scheduler of one object: which shard to request from which peer, when to stop waiting, and which peer to
//! drop. A pure state machine: replies and the time go in, requests come out.
//!
//! From a peer that lets the requester choose, it requests the rarest shard that the peer holds and no peer was asked for yet.
//! From a peer that chooses itself (the learner), it requests any shard except those that are held, in flight, or held by
//! peers that have proved to be fast. A request that takes much longer than usual is repeated at another peer. A peer that
//! does not answer at all is dropped; a peer that serves a bad shard is banned. Knows nothing of bytes, sockets or hashes.
//! Invariants: a banned peer is never asked; requests in flight are bounded, per peer and in all.

mod choose;
mod exchange;
mod peer_state;
mod requests;

use std::collections::{BTreeMap, BTreeSet};

use muster_protocol::id::PeerId;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha12Rng;

use self::peer_state::{
    BUSY_MS_MAX, CHOOSER_MS_MAX, POLL_MS_EACH, POLL_MS_MAX, POLL_MS_MAX_WITH_NEWS, POLL_MS_MIN,
    PeerState,
};
use self::requests::{Asked, Pending, Requests};
use crate::store::bitmap::Bitmap;
use crate::transport::wire::{Chooser, RequestId};

pub use exchange::{Action, Availability, Fault, PeerReply, PeerRequest, ShardVerdict};

/// Shards requested from a new peer at once; one more for each that it delivers.
const WINDOW_MIN: usize = 1;
/// Most shards requested from one peer at once: hides a round trip, and lets no peer hold back many shards.
const WINDOW_MAX: usize = 8;
/// Most shards requested from all peers at once, overdue ones left out. With more, requests wait in the peers' queues and
/// were chosen by an outdated rarity; with fewer, some uplinks are idle. Simulated time of the last peer, as a multiple of the
/// lower bound: for 16 peers that all know one another, 8 requests: 1.57, 12: 1.07, 16: 1.05, 24 with at least 2 per peer:
/// 1.09; for 1,000 peers that know 8 each, 12: 1.16, 16: 1.23.
const WINDOWS_SUM: usize = 12;
/// Most bytes requested at once, from all peers: the memory that a fetch may use beyond its object.
const BYTES_IN_FLIGHT_MAX: u64 = 64 << 20;
/// Bounds of the requests for shards in flight, overdue ones included, whatever the size of a shard.
const REQUESTS_MAX: usize = 64;
const REQUESTS_MIN: usize = 4;
/// Slowest rate that a fetch waits for, about 16 KiB/s: a slower peer delays the fetch more than it helps.
pub(crate) const BYTES_PER_MS_MIN: u64 = 16;
/// A request is overdue, and may be repeated at another peer, after this many times the median time of the proven peers.
const HEDGE_FACTOR: u64 = 4;
/// For the last few shards, when nothing else is left to request, a request is overdue sooner.
const ENDGAME_SHARDS: u32 = 3;
const ENDGAME_FACTOR: u64 = 2;
/// Bounds of the time after which a request is overdue.
const HEDGE_MS: std::ops::RangeInclusive<u64> = 250..=30_000;
/// That time before any peer has delivered, plus the time of a shard on a slow link of `HEDGE_BYTES_PER_MS`.
const HEDGE_MS_AT_FIRST: u64 = 1_000;
const HEDGE_BYTES_PER_MS: u64 = 32;
/// How long to wait for peers that are fetching too, in usual times between two shards.
const SHARDS_WAITED: u64 = 8;
/// Most slow peers remembered, many times those known at once. The list only limits a returning peer to one request.
const SLOW_PEERS_MAX: usize = 1_024;

/// How long a fetch waits for its peers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// How long any request may take, besides the time of its bytes at [`BYTES_PER_MS_MIN`].
    pub request_ms: u64,
}

impl Default for Patience {
    /// 10 s: several round trips of a slow link, and less than a person waits before looking for a fault.
    fn default() -> Self {
        Self { request_ms: 10_000 }
    }
}

/// The values that are the same for all peers in one call of [`FetchPlan::decide`].
#[derive(Debug)]
struct Turn {
    now_ms: u64,
    hedge_ms: u64,
    /// Requests for shards in flight that are not overdue.
    fresh: usize,
    is_any_overdue: bool,
}

/// The download scheduler of one object.
#[derive(Debug)]
pub struct FetchPlan {
    shard_bytes: u64,
    patience: Patience,
    held: Bitmap,
    /// Shards that are neither held nor requested by number.
    open: Bitmap,
    /// How many connected peers hold each shard.
    holders: Vec<u16>,
    sources: BTreeMap<PeerId, PeerState>,
    requests: Requests,
    /// Requests for shards in flight, to all peers.
    pending: usize,
    /// Peers that served a bad shard to this fetch; the swarm remembers them for longer.
    banned: BTreeSet<PeerId>,
    /// Peers that were dropped as slow; each gets one request at a time when it returns.
    slow: BTreeSet<PeerId>,
    dropped: Vec<Action>,
    /// When the last shard arrived.
    arrived_at_ms: Option<u64>,
    /// Usual time between two shards, an exponential average; 0 before the second.
    gap_us: u64,
    news_at_ms: u64,
    rng: ChaCha12Rng,
}

impl FetchPlan {
    /// A scheduler for an object with shards of `shard_bytes`, of which `held` are here.
    pub fn new(shard_bytes: u32, held: Bitmap, patience: Patience, seed: u64) -> Self {
        let shards = held.length() as usize;
        let mut open = Bitmap::full(held.length());
        for shard in held.iter() {
            open.remove(shard);
        }
        Self {
            shard_bytes: u64::from(shard_bytes).max(1),
            patience,
            held,
            open,
            pending: 0,
            holders: vec![0; shards],
            sources: BTreeMap::new(),
            requests: Requests::new(shards),
            banned: BTreeSet::new(),
            slow: BTreeSet::new(),
            dropped: Vec::new(),
            arrived_at_ms: None,
            gap_us: 0,
            news_at_ms: 0,
            rng: ChaCha12Rng::seed_from_u64(seed),
        }
    }

    /// Whether every shard is here.
    pub fn is_finished(&self) -> bool {
        self.held.is_full()
    }

    /// How many shards are here.
    pub(crate) fn held_count(&self) -> u32 {
        self.held.count()
    }

    /// Which peers may bring the missing shards, by their own claims.
    pub(crate) fn availability(&self) -> Availability {
        let lacks = |shard| !self.held.contains(shard);
        let mut availability = Availability::Nowhere;
        for source in self.sources.values() {
            if source.pending > 0 || source.held.iter().any(lacks) {
                return Availability::Holders;
            }
            if source.chooser.is_some() {
                availability = Availability::Fetchers;
            }
        }
        availability
    }

    /// When a peer last announced a shard that is missing here.
    pub(crate) fn news_at_ms(&self) -> u64 {
        self.news_at_ms
    }

    /// How long to wait for a peer that is fetching too to receive its next shard.
    pub(crate) fn next_shard_ms(&self) -> u64 {
        match self.gap_us {
            0 => self.shard_bytes / HEDGE_BYTES_PER_MS,
            usual_us => SHARDS_WAITED * usual_us / 1_000,
        }
    }

    /// Requests for shards in flight.
    pub(crate) fn requests_in_flight(&self) -> usize {
        self.pending
    }

    /// Most requests for shards in flight at once.
    pub(crate) fn requests_max(&self) -> usize {
        let by_bytes = BYTES_IN_FLIGHT_MAX / self.shard_bytes;
        (by_bytes as usize).clamp(REQUESTS_MIN, REQUESTS_MAX)
    }

    /// Adds a connected peer. False if it is banned or was added before.
    pub fn add_source(&mut self, peer: PeerId, now_ms: u64) -> bool {
        if self.banned.contains(&peer) || self.sources.contains_key(&peer) {
            return false;
        }
        self.sources
            .insert(peer, PeerState::new(self.held.length(), now_ms));
        true
    }

    /// Removes a peer; the shards requested from it may be requested elsewhere.
    pub(crate) fn remove_source(&mut self, peer: &PeerId) {
        let Some(source) = self.sources.remove(peer) else {
            return;
        };
        forget_held(&mut self.holders, &source.held);
        self.pending -= source.pending;
        for pending in self.requests.take_all(peer) {
            self.reopen(&pending);
        }
    }

    /// Makes the shard of a request that is no longer in flight available for another request.
    fn reopen(&mut self, pending: &Pending) {
        if let Asked::Shard(shard) = pending.asked
            && self.requests.copies(shard) == 0
            && !self.held.contains(shard)
        {
            self.open.insert(shard);
        }
    }

    /// Processes a peer's reply.
    pub fn on_reply(&mut self, peer: PeerId, reply: PeerReply, now_ms: u64) {
        if let PeerReply::Shard {
            shard,
            verdict: ShardVerdict::Bad,
            ..
        } = reply
        {
            self.banned.insert(peer);
            return self.drop_source(peer, Fault::BadShard { shard });
        }
        // A good shard counts even if its peer was dropped a moment ago.
        if let PeerReply::Shard { shard, .. } = reply {
            self.held.insert(shard);
            self.open.remove(shard);
        }
        if !self.sources.contains_key(&peer) {
            return;
        }
        let Some(pending) = self.release(peer, reply.request()) else {
            return self.drop_source(
                peer,
                Fault::Protocol {
                    problem: "a reply to no request",
                },
            );
        };
        match (reply, pending.asked) {
            (
                PeerReply::Held {
                    shards, chooser, ..
                },
                Asked::Have,
            ) => {
                self.on_bitmap(peer, &shards, chooser, now_ms);
            }
            (PeerReply::Shard { shard, .. }, Asked::Shard(asked)) if asked == shard => {
                self.on_shard(peer, pending, now_ms);
            }
            (PeerReply::Shard { .. }, Asked::Any) => self.on_shard(peer, pending, now_ms),
            (PeerReply::Missing { .. }, asked) => self.on_missing(peer, asked, now_ms),
            (
                PeerReply::Busy {
                    retry_ms, holders, ..
                },
                Asked::Shard(_) | Asked::Any,
            ) => {
                self.on_busy(peer, retry_ms, &holders, now_ms);
            }
            _ => self.drop_source(
                peer,
                Fault::Protocol {
                    problem: "a reply to another request",
                },
            ),
        }
    }

    /// The requests to send and the connections to end now.
    pub fn decide(&mut self, now_ms: u64) -> Vec<Action> {
        self.expire(now_ms);
        let mut actions = std::mem::take(&mut self.dropped);
        if self.is_finished() {
            return actions;
        }
        let mut peers: Vec<PeerId> = self.sources.keys().copied().collect();
        // Otherwise all fetchers would send most requests to the peer with the smallest key.
        let first = self.rng.random_range(0..peers.len().max(1));
        peers.rotate_left(first);
        let mut turn = self.turn(now_ms);
        // One request per peer and pass, so that the first peer does not get all of them.
        loop {
            let before = actions.len();
            for peer in &peers {
                if let Some(request) = self.next_request(peer, &turn) {
                    turn.fresh += usize::from(request != PeerRequest::Have);
                    let id = self.record(*peer, &request, now_ms);
                    actions.push(Action::Send {
                        peer: *peer,
                        id,
                        request,
                    });
                }
            }
            if actions.len() == before {
                break;
            }
        }
        debug_assert!(
            self.requests_in_flight() <= self.requests_max(),
            "requests in flight are bounded"
        );
        debug_assert!(
            self.sources.keys().all(|peer| !self.banned.contains(peer)),
            "a banned peer is never asked"
        );
        actions
    }

    /// When to call [`Self::decide`] again if no reply arrives before.
    pub fn wake_at_ms(&self, now_ms: u64) -> Option<u64> {
        let (hedge_ms, timeout_ms) = (self.hedge_ms(), self.timeout_ms());
        let requests = self.requests.iter().flat_map(|pending| {
            [
                pending.asked_at_ms + hedge_ms,
                pending.asked_at_ms + timeout_ms,
            ]
        });
        let sources = self.sources.values().flat_map(|source| {
            let poll = (!source.is_polled && !source.held.is_full()).then_some(source.poll_at_ms);
            [poll, Some(source.busy_until_ms)].into_iter().flatten()
        });
        requests
            .chain(sources)
            .filter(|at_ms| *at_ms > now_ms)
            .min()
    }

    fn turn(&self, now_ms: u64) -> Turn {
        let hedge_ms = self.hedge_ms();
        let is_overdue = |pending: &&Pending| {
            pending.asked != Asked::Have && pending.is_older_than(hedge_ms, now_ms)
        };
        let overdue = self.requests.iter().filter(is_overdue).count();
        Turn {
            now_ms,
            hedge_ms,
            fresh: self.pending.saturating_sub(overdue),
            is_any_overdue: overdue > 0,
        }
    }

    fn hedge_ms(&self) -> u64 {
        let proven = self.sources.values();
        let mut usual: Vec<u64> = proven.filter_map(|source| source.usual_ms).collect();
        let factor = match self.held.length() - self.held.count() {
            0..=ENDGAME_SHARDS => ENDGAME_FACTOR,
            _ => HEDGE_FACTOR,
        };
        let hedge_ms = match usual.len() {
            0 => HEDGE_MS_AT_FIRST + self.shard_bytes / HEDGE_BYTES_PER_MS,
            several => {
                let (_, median_ms, _) = usual.select_nth_unstable(several / 2);
                factor * *median_ms
            }
        };
        hedge_ms.clamp(*HEDGE_MS.start(), *HEDGE_MS.end())
    }

    fn timeout_ms(&self) -> u64 {
        self.patience.request_ms + WINDOW_MAX as u64 * self.shard_bytes / BYTES_PER_MS_MIN
    }

    fn record(&mut self, peer: PeerId, request: &PeerRequest, now_ms: u64) -> RequestId {
        let asked = match request {
            PeerRequest::Have => Asked::Have,
            PeerRequest::Shard(shard) => Asked::Shard(*shard),
            PeerRequest::AnyBut(_) => Asked::Any,
        };
        if let Some(source) = self.sources.get_mut(&peer) {
            match asked {
                Asked::Have => source.is_polled = true,
                Asked::Shard(_) | Asked::Any => {
                    source.pending += 1;
                    self.pending += 1;
                }
            }
        }
        if let Asked::Shard(shard) = asked {
            self.open.remove(shard);
        }
        self.requests.add(Pending {
            source: peer,
            asked,
            asked_at_ms: now_ms,
        })
    }

    /// Removes a request from those in flight; `None` if this peer has no such request.
    fn release(&mut self, peer: PeerId, request: RequestId) -> Option<Pending> {
        let pending = self.requests.take(&peer, request)?;
        let source = self.sources.get_mut(&peer)?;
        match pending.asked {
            Asked::Have => source.is_polled = false,
            Asked::Shard(_) | Asked::Any => {
                source.pending -= 1;
                self.pending -= 1;
            }
        }
        self.reopen(&pending);
        Some(pending)
    }

    fn on_bitmap(&mut self, peer: PeerId, shards: &[u8], chooser: Chooser, now_ms: u64) {
        let Some(held) = Bitmap::from_bytes(shards, self.held.length()) else {
            let problem = "a bitmap of the wrong length";
            return self.drop_source(peer, Fault::Protocol { problem });
        };
        // While shards keep arriving, a peer is polled about once per shard from each of the others. Its news by then are
        // enough to continue with, and polling more often would use a tenth of a home link.
        let (shard_ms, peers) = (self.gap_us / 1_000, self.sources.len() as u64);
        let Some(source) = self.sources.get_mut(&peer) else {
            return;
        };
        let has_news = held
            .iter_both(&self.open)
            .any(|shard| !source.held.contains(shard));
        forget_held(&mut self.holders, &source.held);
        held.iter()
            .for_each(|shard| self.holders[shard as usize] += 1);
        source.held = held;
        source.chooser = Some(chooser);
        if has_news {
            self.news_at_ms = now_ms;
        }
        source.poll_ms = if has_news {
            (shard_ms * peers).clamp(POLL_MS_MIN, POLL_MS_MAX_WITH_NEWS)
        } else {
            let longest_ms = (POLL_MS_EACH * peers).clamp(POLL_MS_MIN, POLL_MS_MAX);
            (2 * source.poll_ms).min(longest_ms)
        };
        source.poll_at_ms = now_ms + source.poll_ms;
    }

    fn note_arrival(&mut self, now_ms: u64) {
        if let Some(before_ms) = self.arrived_at_ms.replace(now_ms) {
            let gap_us = 1_000 * now_ms.saturating_sub(before_ms).min(POLL_MS_MAX);
            self.gap_us = (15 * self.gap_us + gap_us) / 16;
        }
    }

    fn on_shard(&mut self, peer: PeerId, pending: Pending, now_ms: u64) {
        self.note_arrival(now_ms);
        let Some(source) = self.sources.get_mut(&peer) else {
            return;
        };
        let took_ms = now_ms.saturating_sub(pending.asked_at_ms);
        source.usual_ms = Some(
            source
                .usual_ms
                .map_or(took_ms, |usual_ms| (3 * usual_ms + took_ms) / 4),
        );
        source.delivered = source.delivered.saturating_add(1);
        source.refusals = 0;
        self.slow.remove(&peer);
    }

    fn on_missing(&mut self, peer: PeerId, asked: Asked, now_ms: u64) {
        let Some(source) = self.sources.get_mut(&peer) else {
            return;
        };
        match asked {
            Asked::Shard(shard) => {
                source.on_refusal(now_ms);
                if source.held.remove(shard) {
                    self.holders[shard as usize] -= 1;
                }
            }
            // The peer holds nothing of the object, or nothing that is missing here, so its last bitmap is outdated. No shard is
            // requested from it until it sends another.
            Asked::Have | Asked::Any => {
                if asked == Asked::Any {
                    source.on_refusal(now_ms);
                }
                forget_held(&mut self.holders, &source.held);
                source.held = Bitmap::empty(self.held.length());
                source.chooser = None;
            }
        }
        source.poll_ms = (2 * source.poll_ms).min(POLL_MS_MAX);
        source.poll_at_ms = now_ms + source.poll_ms;
    }

    fn on_busy(&mut self, peer: PeerId, retry_ms: u32, holders: &[PeerId], now_ms: u64) {
        if let Some(source) = self.sources.get_mut(&peer) {
            let longest_ms = match source.chooser {
                Some(Chooser::Holder) => CHOOSER_MS_MAX,
                Some(Chooser::Asker) | None => {
                    source.on_refusal(now_ms);
                    BUSY_MS_MAX
                }
            };
            let wait_ms = u64::from(retry_ms).clamp(POLL_MS_MIN, longest_ms);
            source.busy_until_ms = source.busy_until_ms.max(now_ms + wait_ms);
        }
        // These peers were sent the shard a moment ago, so their last bitmaps are outdated.
        for holder in holders {
            if let Some(source) = self.sources.get_mut(holder) {
                source.poll_at_ms = source.poll_at_ms.min(now_ms);
                source.poll_ms = POLL_MS_MIN;
            }
        }
    }

    fn expire(&mut self, now_ms: u64) {
        let timeout_ms = self.timeout_ms();
        let late: BTreeSet<PeerId> = self
            .requests
            .iter()
            .filter(|pending| pending.is_older_than(timeout_ms, now_ms))
            .map(|pending| pending.source)
            .collect();
        for peer in late {
            if self.slow.len() < SLOW_PEERS_MAX {
                self.slow.insert(peer);
            }
            self.drop_source(
                peer,
                Fault::Slow {
                    waited_ms: timeout_ms,
                },
            );
        }
    }

    fn drop_source(&mut self, peer: PeerId, fault: Fault) {
        self.remove_source(&peer);
        self.dropped.push(Action::Disconnect { peer, fault });
    }
}

/// Subtracts a peer's shards from the counts of holders.
fn forget_held(holders: &mut [u16], held: &Bitmap) {
    held.iter().for_each(|shard| holders[shard as usize] -= 1);
}

#[cfg(test)]
mod tests;
