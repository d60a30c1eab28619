//! Which shard to send to whom, and when to say that others have it: the seeder's side of the swarm, as pure decisions.
//!
//! Whoever holds an object chooses the shard that it has sent least, so that about one pass over the object puts every
//! shard into the swarm ("super-seeding"; 1.13 to 1.15 of the object measured in `research/p2p-broadcast.md` §3.4). A
//! learner goes further ([`Sharing::FirstCopies`]): what it has sent once it does not send again until the peers had time
//! to exchange it among themselves. That time is bounded, so that a swarm finishes even when every other peer is dead or
//! lying: round r lets each shard go out r times, and rounds open by the clock alone, which nobody can hold back. Knows
//! nothing of sockets; the time is handed in. Invariant: in round r no shard was sent more than r times.

use std::collections::BTreeMap;

use muster_protocol::id::{ObjectId, PeerId};
use serde::{Deserialize, Serialize};

use crate::bitmap::Bitmap;
use crate::wire::HOLDERS_MAX;

/// Shortest time that peers get to exchange a round's shards: a few polls of one another and a transfer on a local net.
pub const GRACE_MS_MIN: u64 = 300;
/// Longest time: a peer whose partners are all gone waits no longer than this for the next round.
pub const GRACE_MS_MAX: u64 = 30_000;
/// The grace doubles from round to round up to this factor: each round without need makes the next less likely to be one.
const GRACE_FACTOR_MAX: u64 = 8;
/// A peer that was sent a shard and asks for it again waits this long, and twice as long for each further pass, so that
/// one that only drains us comes last and ever more rarely. One that restarted empty-handed waits once.
const REPEAT_MS: u64 = 8 * GRACE_MS_MIN;
/// The wait doubles at most this often, to about ten minutes.
const REPEAT_DOUBLINGS_MAX: u32 = 8;
/// Shortest wait asked of anybody.
const RETRY_MS_MIN: u64 = 10;
/// Most peers remembered for an object; the one served longest ago is forgotten first.
const PEERS_MAX: usize = 1_024;

/// How freely shards are given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sharing {
    /// To whoever asks: workers and seeders.
    #[default]
    OnDemand,
    /// Each shard once, and again only when the peers do not pass it on: the learner, whose uplink feeds everybody.
    FirstCopies,
}

/// What a peer asks for.
#[derive(Debug, Clone, Copy)]
pub enum Wanted<'a> {
    /// This shard.
    Shard(u32),
    /// Any but these.
    AnyBut(&'a Bitmap),
}

/// What is done about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Send it. [`Uploads::finish`] must follow.
    Send {
        /// Which.
        shard: u32,
    },
    /// Not now.
    Busy {
        /// When to ask again.
        retry_ms: u64,
        /// Who was sent it.
        holders: Vec<PeerId>,
    },
    /// Nothing that is wanted is held.
    Missing,
}

/// How sending a shard ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All of it left.
    Sent,
    /// The connection broke: it counts as never sent.
    Failed,
}

#[derive(Debug)]
struct Served {
    /// What it was sent since it last began from nothing.
    shards: Bitmap,
    at_ms: u64,
    /// How often it began again.
    repeats: u32,
}

#[derive(Debug)]
struct ObjectUploads {
    /// How often each shard was sent, those on their way included.
    copies: Vec<u16>,
    peers: BTreeMap<PeerId, Served>,
    first_at_ms: u64,
    /// When the round was opened; the first one counts from its last first copy.
    opened_at_ms: u64,
    round: u16,
}

/// What was sent of every object.
#[derive(Debug)]
pub struct Uploads {
    sharing: Sharing,
    objects: BTreeMap<ObjectId, ObjectUploads>,
}

impl Uploads {
    /// Nothing sent yet.
    pub fn new(sharing: Sharing) -> Self {
        Self {
            sharing,
            objects: BTreeMap::new(),
        }
    }

    /// Decides about one request of `peer`, where `held` are the shards that can be sent.
    pub fn decide(
        &mut self,
        now_ms: u64,
        peer: PeerId,
        object: ObjectId,
        held: &Bitmap,
        wanted: Wanted<'_>,
    ) -> Decision {
        let uploads = self
            .objects
            .entry(object)
            .or_insert_with(|| ObjectUploads::new(held.length(), now_ms));
        debug_assert_eq!(
            uploads.copies.len(),
            held.length() as usize,
            "an object has one size"
        );
        let Some(shard) = uploads.least_sent(&peer, held, wanted) else {
            return Decision::Missing;
        };
        let wait_ms = match self.sharing {
            Sharing::OnDemand => None,
            Sharing::FirstCopies => uploads.wait_ms(now_ms, &peer, shard),
        };
        if let Some(wait_ms) = wait_ms {
            let retry_ms = wait_ms.max(RETRY_MS_MIN);
            return Decision::Busy {
                retry_ms,
                holders: uploads.holders(&peer, shard),
            };
        }
        uploads.begin(now_ms, peer, shard);
        Decision::Send { shard }
    }

    /// Notes how sending a shard ended.
    pub fn finish(
        &mut self,
        now_ms: u64,
        peer: &PeerId,
        object: &ObjectId,
        shard: u32,
        outcome: Outcome,
    ) {
        let Some(uploads) = self.objects.get_mut(object) else {
            return;
        };
        match outcome {
            Outcome::Sent if uploads.round == 1 => uploads.opened_at_ms = now_ms,
            Outcome::Sent => {}
            Outcome::Failed => uploads.undo(peer, shard),
        }
    }

    /// Forgets objects that are no longer held.
    pub fn retain(&mut self, mut is_held: impl FnMut(&ObjectId) -> bool) {
        self.objects.retain(|object, _| is_held(object));
    }
}

impl ObjectUploads {
    fn new(shards: u32, now_ms: u64) -> Self {
        Self {
            copies: vec![0; shards as usize],
            peers: BTreeMap::new(),
            first_at_ms: now_ms,
            opened_at_ms: now_ms,
            round: 1,
        }
    }

    fn was_sent(&self, peer: &PeerId, shard: u32) -> bool {
        self.peers
            .get(peer)
            .is_some_and(|served| served.shards.contains(shard))
    }

    /// The shard that is wanted, held and sent least; one that this peer was sent before comes last.
    fn least_sent(&self, peer: &PeerId, held: &Bitmap, wanted: Wanted<'_>) -> Option<u32> {
        match wanted {
            Wanted::Shard(shard) => held.contains(shard).then_some(shard),
            Wanted::AnyBut(except) => held
                .iter()
                .filter(|shard| !except.contains(*shard))
                .min_by_key(|shard| (self.was_sent(peer, *shard), self.copies[*shard as usize])),
        }
    }

    /// How long this peer has to wait for this shard; `None` when it may have it now. Opens the next round when it is due.
    fn wait_ms(&mut self, now_ms: u64, peer: &PeerId, shard: u32) -> Option<u64> {
        if let Some(served) = self
            .peers
            .get(peer)
            .filter(|served| served.shards.contains(shard))
        {
            let repeat_ms = REPEAT_MS << served.repeats.min(REPEAT_DOUBLINGS_MAX);
            let due_ms = served.at_ms.saturating_add(repeat_ms);
            if now_ms < due_ms {
                return Some(due_ms - now_ms);
            }
        }
        if self.copies[shard as usize] < self.round {
            return None;
        }
        let due_ms = self.opened_at_ms.saturating_add(self.grace_ms());
        if now_ms < due_ms {
            return Some(due_ms - now_ms);
        }
        self.round = self.round.saturating_add(1);
        self.opened_at_ms = now_ms;
        None
    }

    /// As long as the first pass took, since peers with links like ours need about that to pass it on; then longer.
    fn grace_ms(&self) -> u64 {
        let first_pass_ms = match self.round {
            1 => self.opened_at_ms.saturating_sub(self.first_at_ms),
            _ => 0,
        };
        let doubled = GRACE_FACTOR_MAX.min(1 << (self.round - 1).min(16));
        first_pass_ms.max(GRACE_MS_MIN * doubled).min(GRACE_MS_MAX)
    }

    /// Peers that were sent a shard, beginning after the asker, so that not all are pointed to the same ones.
    fn holders(&self, asker: &PeerId, shard: u32) -> Vec<PeerId> {
        let after = self.peers.range(asker..);
        let before = self.peers.range(..asker);
        after
            .chain(before)
            .filter(|(peer, served)| *peer != asker && served.shards.contains(shard))
            .map(|(peer, _)| *peer)
            .take(HOLDERS_MAX)
            .collect()
    }

    fn begin(&mut self, now_ms: u64, peer: PeerId, shard: u32) {
        if self.copies.iter().all(|copies| *copies == 0) {
            self.first_at_ms = now_ms;
        }
        if self.round == 1 {
            self.opened_at_ms = now_ms;
        }
        let copies = &mut self.copies[shard as usize];
        *copies = copies.saturating_add(1);
        if self.peers.len() >= PEERS_MAX && !self.peers.contains_key(&peer) {
            let oldest = self.peers.iter().min_by_key(|(_, served)| served.at_ms);
            if let Some(oldest) = oldest.map(|(peer, _)| *peer) {
                self.peers.remove(&oldest);
            }
        }
        let shards = self.copies.len() as u32;
        let served = self.peers.entry(peer).or_insert_with(|| Served {
            shards: Bitmap::empty(shards),
            at_ms: now_ms,
            repeats: 0,
        });
        if !served.shards.insert(shard) {
            served.shards = Bitmap::empty(shards);
            served.shards.insert(shard);
            served.repeats = served.repeats.saturating_add(1);
        }
        served.at_ms = now_ms;
    }

    fn undo(&mut self, peer: &PeerId, shard: u32) {
        if let Some(copies) = self.copies.get_mut(shard as usize) {
            *copies = copies.saturating_sub(1);
        }
        if let Some(served) = self.peers.get_mut(peer) {
            served.shards.remove(shard);
        }
    }
}

#[cfg(test)]
mod tests;
