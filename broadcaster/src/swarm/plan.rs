//! Which shard to ask from whom next, when to stop waiting and whom to drop: the fetcher's side of the swarm, as a pure
//! machine. Answers and the time go in, requests come out.
//!
//! Peers that let the asker choose are asked for the rarest shard that they hold and nobody was asked for yet. A peer that
//! chooses itself (the learner) is asked for any shard but those that are held, on their way, or to be had from peers that
//! have proved quick. A request that takes much longer than the quickest peer's is doubled elsewhere; one that is not
//! answered at all costs the peer its place. A bad shard costs it its place for good. Knows nothing of bytes, sockets or
//! hashes. Invariants: a banned peer is never asked; requests in flight are bounded, per peer and in all.

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

/// Shards asked of a new peer at once; one more for each that it delivers.
const WINDOW_MIN: usize = 1;
/// Shards asked of a proven peer at once: hides a round trip without letting one peer hold many shards back.
const WINDOW_MAX: usize = 8;
/// Shards asked of all peers at once, those that are overdue left out. Each waits as long in their queues as all peers ask
/// for more than this, and was chosen by what was rare before; with fewer, some uplinks have nothing to do. Simulated, last
/// peer in times of the bound: 16 peers that know one another, 8: 1.57, 12: 1.07, 16: 1.05, 24 and at least 2 each: 1.09;
/// 1,000 that know 8: 12: 1.16, 16: 1.23.
const WINDOWS_SUM: usize = 12;
/// Bytes of shards asked for at once, of all peers: what a fetch may hold in memory beyond its object.
const BYTES_IN_FLIGHT_MAX: u64 = 64 << 20;
/// Requests for shards in flight at once, those that are overdue included, however small or large shards are.
const REQUESTS_MAX: usize = 64;
const REQUESTS_MIN: usize = 4;
/// Slowest peer that is waited for, about 16 KiB/s: below it a peer holds back more than it brings.
pub const BYTES_PER_MS_MIN: u64 = 16;
/// A request is doubled elsewhere once it takes this many times as long as is usual, by the median of the proven peers.
const HEDGE_FACTOR: u64 = 4;
/// For the last few shards, when nothing else is left to ask for, waiting longer than usual is enough.
const ENDGAME_SHARDS: u32 = 3;
const ENDGAME_FACTOR: u64 = 2;
/// Bounds of that time.
const HEDGE_MS: std::ops::RangeInclusive<u64> = 250..=30_000;
/// Its value before anything was delivered, besides the time that a shard needs on a slow link of this rate.
const HEDGE_MS_AT_FIRST: u64 = 1_000;
const HEDGE_BYTES_PER_MS: u64 = 32;
/// Peers that fetch too are hoped on for the time in which so many shards usually arrive.
const SHARDS_OF_HOPE: u64 = 8;
/// Most slow peers remembered, many times those known at once: the list only makes a returning peer wait its turn.
const SLOW_PEERS_MAX: usize = 1_024;

/// How patient a plan is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// How long any request may take, besides the time that its bytes need at the slowest rate.
    pub request_ms: u64,
}

impl Default for Patience {
    /// 10 s: several round trips of the worst link, and shorter than a person waits before asking what is wrong.
    fn default() -> Self {
        Self { request_ms: 10_000 }
    }
}

/// What is the same for every peer that is looked at in one go.
#[derive(Debug)]
struct Turn {
    now_ms: u64,
    hedge_ms: u64,
    /// Requests for shards in flight that are not overdue.
    fresh: usize,
    is_any_overdue: bool,
}

/// The fetch of one object.
#[derive(Debug)]
pub struct FetchPlan {
    shard_bytes: u64,
    patience: Patience,
    held: Bitmap,
    /// Shards that are neither here nor asked for by number.
    open: Bitmap,
    /// How many sources hold each shard.
    holders: Vec<u16>,
    sources: BTreeMap<PeerId, PeerState>,
    requests: Requests,
    /// Requests for shards in flight, of all sources.
    pending: usize,
    /// Peers that served a bad shard, for the length of this fetch; the swarm remembers them for longer.
    banned: BTreeSet<PeerId>,
    /// Peers that were dropped as slow; they are asked for one shard at a time.
    slow: BTreeSet<PeerId>,
    dropped: Vec<Action>,
    /// When a shard arrived last, and the usual time between two: an average that forgets.
    arrived_at_ms: Option<u64>,
    gap_us: u64,
    news_at_ms: u64,
    rng: ChaCha12Rng,
}

impl FetchPlan {
    /// The fetch of an object with shards of `shard_bytes`, of which `held` are here.
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
    pub fn held_count(&self) -> u32 {
        self.held.count()
    }

    /// From whom the missing shards may come, by the peers' own word.
    pub fn hope(&self) -> Availability {
        let lacks = |shard| !self.held.contains(shard);
        let mut hope = Availability::Nobody;
        for source in self.sources.values() {
            if source.pending > 0 || source.held.iter().any(lacks) {
                return Availability::Holders;
            }
            if source.chooser.is_some() {
                hope = Availability::Fetchers;
            }
        }
        hope
    }

    /// When a peer last had something new that is missing here.
    pub fn news_at_ms(&self) -> u64 {
        self.news_at_ms
    }

    /// How long a peer that is fetching too may take to come by its next shard: some times as long as is usual, or as a slow
    /// link needs while nothing is known.
    pub fn next_shard_ms(&self) -> u64 {
        match self.gap_us {
            0 => self.shard_bytes / HEDGE_BYTES_PER_MS,
            usual_us => SHARDS_OF_HOPE * usual_us / 1_000,
        }
    }

    /// Requests for shards in flight.
    pub fn requests_in_flight(&self) -> usize {
        self.pending
    }

    /// Most requests for shards in flight at once.
    pub fn requests_max(&self) -> usize {
        let by_bytes = BYTES_IN_FLIGHT_MAX / self.shard_bytes;
        (by_bytes as usize).clamp(REQUESTS_MIN, REQUESTS_MAX)
    }

    /// A peer is connected. False when it is banned or known already: it is then not asked.
    pub fn add_source(&mut self, peer: PeerId, now_ms: u64) -> bool {
        if self.banned.contains(&peer) || self.sources.contains_key(&peer) {
            return false;
        }
        self.sources
            .insert(peer, PeerState::new(self.held.length(), now_ms));
        true
    }

    /// A peer is gone: what it was asked for may be asked elsewhere.
    pub fn remove_source(&mut self, peer: &PeerId) {
        let Some(source) = self.sources.remove(peer) else {
            return;
        };
        forget_held(&mut self.holders, &source.held);
        self.pending -= source.pending;
        for pending in self.requests.forget(peer) {
            self.reopen(&pending);
        }
    }

    /// A request is not in flight any more: its shard may be asked for again.
    fn reopen(&mut self, pending: &Pending) {
        if let Asked::Shard(shard) = pending.asked
            && self.requests.copies(shard) == 0
            && !self.held.contains(shard)
        {
            self.open.insert(shard);
        }
    }

    /// Takes an answer in.
    pub fn on_answer(&mut self, peer: PeerId, answer: PeerReply, now_ms: u64) {
        if let PeerReply::Shard {
            shard,
            verdict: ShardVerdict::Bad,
            ..
        } = answer
        {
            self.banned.insert(peer);
            return self.drop_source(peer, Fault::BadShard { shard });
        }
        // A good shard counts even when it comes from a peer that was given up a moment ago.
        if let PeerReply::Shard { shard, .. } = answer {
            self.held.insert(shard);
            self.open.remove(shard);
        }
        if !self.sources.contains_key(&peer) {
            return;
        }
        let Some(pending) = self.release(peer, answer.request()) else {
            return self.drop_source(
                peer,
                Fault::Protocol {
                    problem: "an answer to no request",
                },
            );
        };
        match (answer, pending.asked) {
            (
                PeerReply::Held {
                    shards, chooser, ..
                },
                Asked::Have,
            ) => {
                self.on_held(peer, &shards, chooser, now_ms);
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
                    problem: "an answer to another request",
                },
            ),
        }
    }

    /// What to do now.
    pub fn decide(&mut self, now_ms: u64) -> Vec<Action> {
        self.expire(now_ms);
        let mut actions = std::mem::take(&mut self.dropped);
        if self.is_finished() {
            return actions;
        }
        let mut peers: Vec<PeerId> = self.sources.keys().copied().collect();
        // Whoever comes first in the order of keys is not to be asked most by everybody.
        let first = self.rng.random_range(0..peers.len().max(1));
        peers.rotate_left(first);
        let mut turn = self.turn(now_ms);
        // One request each and turn, so that the first peer does not take every shard.
        loop {
            let before = actions.len();
            for peer in &peers {
                if let Some(ask) = self.next_ask(peer, &turn) {
                    turn.fresh += usize::from(ask != PeerRequest::Have);
                    let request = self.record(*peer, &ask, now_ms);
                    actions.push(Action::PeerRequest {
                        source: *peer,
                        request,
                        ask,
                    });
                }
            }
            if actions.len() == before {
                break;
            }
        }
        debug_assert!(self.requests_in_flight() <= self.requests_max());
        actions
    }

    /// When [`Self::decide`] may have something to do though nothing was answered.
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

    fn next_ask(&mut self, peer: &PeerId, turn: &Turn) -> Option<PeerRequest> {
        let now_ms = turn.now_ms;
        let source = self.sources.get(peer)?;
        if !source.is_polled && !source.held.is_full() && source.poll_at_ms <= now_ms {
            return Some(PeerRequest::Have);
        }
        let chooser = source.chooser?;
        let no_room = source.pending >= self.window(peer, source)
            || turn.fresh >= WINDOWS_SUM
            || self.requests_in_flight() >= self.requests_max();
        if no_room || source.busy_until_ms > now_ms {
            return None;
        }
        match chooser {
            Chooser::Asker => self
                .rarest(peer)
                .or_else(|| turn.is_any_overdue.then(|| self.overdue(peer, turn))?)
                .map(PeerRequest::Shard),
            Chooser::Holder => self.any_but(turn).map(PeerRequest::AnyBut),
        }
    }

    fn window(&self, peer: &PeerId, source: &PeerState) -> usize {
        match self.slow.contains(peer) {
            true => 1,
            false => {
                let share = (WINDOWS_SUM / self.sources.len().max(1)).clamp(WINDOW_MIN, WINDOW_MAX);
                (WINDOW_MIN + source.delivered).min(share)
            }
        }
    }

    /// Of the shards that this peer holds and nobody was asked for, the one that fewest hold; which of several is drawn,
    /// so that peers which start together do not all fetch the same.
    fn rarest(&mut self, peer: &PeerId) -> Option<u32> {
        let source = self.sources.get(peer)?;
        let (mut best, mut fewest, mut ties) = (None, u16::MAX, 0u32);
        for shard in source.held.iter_both(&self.open) {
            let holders = self.holders[shard as usize];
            if holders > fewest {
                continue;
            }
            ties = if holders < fewest { 1 } else { ties + 1 };
            fewest = holders;
            if self.rng.random_range(0..ties) == 0 {
                best = Some(shard);
            }
        }
        best
    }

    /// A shard that another peer is overdue with, asked once and held by this one.
    fn overdue(&self, peer: &PeerId, turn: &Turn) -> Option<u32> {
        let source = self.sources.get(peer)?;
        let overdue = self
            .requests
            .iter()
            .filter_map(|pending| match pending.asked {
                Asked::Shard(shard)
                    if pending.source != *peer
                        && pending.is_older_than(turn.hedge_ms, turn.now_ms)
                        && self.requests.copies(shard) == 1
                        && !self.held.contains(shard)
                        && source.held.contains(shard) =>
                {
                    Some((pending.asked_at_ms, shard))
                }
                _ => None,
            });
        overdue.min().map(|(_, shard)| shard)
    }

    /// What is not needed from a peer that chooses; `None` when that is everything.
    fn any_but(&self, turn: &Turn) -> Option<Bitmap> {
        let overdue: BTreeSet<PeerId> = self
            .requests
            .iter()
            .filter(|pending| pending.is_older_than(turn.hedge_ms, turn.now_ms))
            .map(|pending| pending.source)
            .collect();
        let mut except = self.held.clone();
        let quick = self.sources.iter().filter(|(peer, source)| {
            let is_proven = source.delivered > 0 && source.chooser == Some(Chooser::Asker);
            is_proven && !overdue.contains(peer) && !self.slow.contains(peer)
        });
        quick.for_each(|(_, source)| except.insert_all(&source.held));
        let mut asked_any = 0;
        for pending in self
            .requests
            .iter()
            .filter(|pending| !overdue.contains(&pending.source))
        {
            match pending.asked {
                Asked::Shard(shard) => {
                    except.insert(shard);
                }
                Asked::Any => asked_any += 1,
                Asked::Have => {}
            }
        }
        // Each request in flight for any shard will bring one of the rest.
        (except.length() - except.count() > asked_any).then_some(except)
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

    fn record(&mut self, peer: PeerId, ask: &PeerRequest, now_ms: u64) -> RequestId {
        let asked = match ask {
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

    /// Takes a request out of flight, if this peer was asked it.
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

    fn on_held(&mut self, peer: PeerId, shards: &[u8], chooser: Chooser, now_ms: u64) {
        let Some(held) = Bitmap::from_bytes(shards, self.held.length()) else {
            let problem = "a bitmap of another length";
            return self.drop_source(peer, Fault::Protocol { problem });
        };
        // While shards keep coming, each peer is asked about once while each of the others brings one: what it has by then
        // is enough to go on with, and asking more often would take a tenth of a home link.
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
                source.refuse(now_ms);
                if source.held.remove(shard) {
                    self.holders[shard as usize] -= 1;
                }
            }
            // It holds nothing of the object, or nothing that is missing here: what it said before is out of date. It is
            // asked for shards again when it says something else.
            Asked::Have | Asked::Any => {
                if asked == Asked::Any {
                    source.refuse(now_ms);
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
                    source.refuse(now_ms);
                    BUSY_MS_MAX
                }
            };
            let wait_ms = u64::from(retry_ms).clamp(POLL_MS_MIN, longest_ms);
            source.busy_until_ms = source.busy_until_ms.max(now_ms + wait_ms);
        }
        // They were sent it a moment ago: what they said they hold is out of date.
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
        self.dropped.push(Action::Drop {
            source: peer,
            fault,
        });
    }
}

/// Takes what a peer held out of the counts.
fn forget_held(holders: &mut [u16], held: &Bitmap) {
    held.iter().for_each(|shard| holders[shard as usize] -= 1);
}

#[cfg(test)]
mod tests;
