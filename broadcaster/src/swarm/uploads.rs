//! The upload scheduler: which shard to send to which peer, and when to refer a peer to others. Pure decisions.
//!
//! The sender chooses the shard that it has sent least often, so that about one pass over the object puts every shard into the
//! swarm (the super-seeding of BitTorrent). A learner goes further ([`Sharing::FirstCopies`]): it sends a shard a second time
//! only after the peers had time to exchange the first copy. Two clocks bound that time, so that a swarm finishes even if all
//! other peers are dead or lie:
//!
//! * A peer gets a second copy once it has received nothing from other peers for a while. As long as it makes progress, however
//!   slow its machine is, it needs none.
//! * Round r lets each shard be sent r times. A round opens only after the shards of the round before could have been passed on,
//!   so that many peers which claim to be stuck cannot drain the learner's uplink.
//!
//! A peer's claim about what it received from other peers can delay only that peer, and can prove that the peers which were
//! sent those shards passed them on. A peer that passes nothing on, while other peers do, waits for them; otherwise three liars
//! of ten peers would draw a third of every round. Knows nothing of sockets; the caller hands in the time.
//! Invariant: in round r no shard was sent more than r times, shards that no peer passes on excepted.

use std::collections::BTreeMap;

use muster_protocol::id::{ObjectId, PeerId};
use serde::{Deserialize, Serialize};

use crate::store::bitmap::Bitmap;
use crate::swarm::bounded::make_room;
use crate::transport::wire::HOLDERS_MAX;

/// Shortest time that peers get to exchange a round's shards, and that a peer must be without progress to count as stuck: many
/// polls and a transfer on a local network, on a busy machine.
pub(crate) const GRACE_MS_MIN: u64 = 1_000;
/// Longest such time: a peer whose other peers are all gone waits this long for the next round.
pub(crate) const GRACE_MS_MAX: u64 = 30_000;
/// The time between two rounds doubles with each round, up to this factor.
const GRACE_FACTOR_MAX: u64 = 8;
/// A peer that requests a shard which it was sent before waits this long, and twice as long for each further pass, so that a
/// peer which only drains the uplink comes last. A peer that restarted without its shards waits once.
const REPEAT_MS: u64 = 2_400;
/// The wait doubles at most this often, to about ten minutes.
const REPEAT_DOUBLINGS_MAX: u32 = 8;
/// Longest pause between two shards that counts for the length of the first pass: in a longer one no peer asked.
const PAUSE_MS_MAX: u64 = 4_000;
/// A peer counts as stuck after the time in which this many shards were sent in the first pass.
const SHARDS_OF_PATIENCE: u64 = 8;
/// A peer that makes slow progress is left to other peers for this many times the longer of the first pass and the time after
/// which a peer is stuck: the other peers may be slow on purpose.
const PATIENCES_MAX: u64 = 8;
/// A peer may keep this many shards to itself, plus `KEPT_FOR_EACH` for each one that it passed on, before other peers come first.
/// Its uplink may be several times slower than this one, and the latest shards are still on their way to other peers.
const KEPT_MAX: u32 = 8;
const KEPT_FOR_EACH: u32 = 16;
/// A peer that asked within this many times [`ObjectUploads::patience_ms`] still wants shards: it was told to wait for about one.
const ASKING_PATIENCES: u64 = 4;
/// Shortest wait in a busy reply.
const RETRY_MS_MIN: u64 = 10;
/// Most peers remembered per object; the one served longest ago is forgotten first.
const PEERS_MAX: usize = 1_024;

/// How freely shards are given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sharing {
    /// To every peer that asks: workers and seeders.
    #[default]
    OnDemand,
    /// Each shard once, and again only if the peers do not pass it on: the learner, whose uplink feeds the whole swarm.
    FirstCopies,
}

/// The shard that a peer requests.
#[derive(Debug, Clone, Copy)]
pub enum WantedShard<'a> {
    /// The shard with this number.
    Shard(u32),
    /// Any shard except these.
    AnyBut(&'a Bitmap),
}

/// The reply to a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UploadDecision {
    /// Send this shard. A call of [`Uploads::finish`] must follow.
    Send { shard: u32 },
    /// Do not send it now.
    Busy {
        /// When to ask again, from now.
        retry_ms: u64,
        /// Peers that were sent the shard.
        holders: Vec<PeerId>,
    },
    /// No requested shard is held.
    Missing,
}

/// How sending a shard ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SendOutcome {
    /// The whole shard was written.
    Sent,
    /// The connection broke, so the shard counts as not sent.
    Failed,
}

/// What one peer was sent.
#[derive(Debug)]
struct Served {
    /// Shards sent since the peer last started over.
    shards: Bitmap,
    at_ms: u64,
    /// How often it started over.
    repeats: u32,
    /// Shards that only this peer was sent and another peer has.
    passed_on: u32,
    /// Shards that had to be sent to other peers too, because no peer had them from this one.
    withheld: u32,
}

/// What a peer receives from other peers.
#[derive(Debug, Clone, Copy)]
struct Progress {
    /// Most shards that it had and was not sent from here.
    elsewhere: u32,
    /// When `elsewhere` last grew.
    grew_at_ms: u64,
    /// When it first asked.
    since_ms: u64,
    /// When it last asked.
    asked_at_ms: u64,
}

#[derive(Debug)]
struct ObjectUploads {
    /// How often each shard was sent, sends in progress included.
    copies: Vec<u16>,
    /// Shards that some peer has without having been sent them from here.
    spread: Bitmap,
    peers: BTreeMap<PeerId, Served>,
    progress: BTreeMap<PeerId, Progress>,
    /// Time spent so far on sending every shard once.
    first_pass_ms: u64,
    /// When the round was opened; for the first round, when its last shard was sent.
    opened_at_ms: u64,
    round: u16,
}

/// The upload schedulers of all objects.
#[derive(Debug)]
pub struct Uploads {
    sharing: Sharing,
    objects: BTreeMap<ObjectId, ObjectUploads>,
}

impl Uploads {
    pub fn new(sharing: Sharing) -> Self {
        Self {
            sharing,
            objects: BTreeMap::new(),
        }
    }

    /// Decides the reply to one request of `peer`; `held` are the shards that can be sent.
    pub fn decide(
        &mut self,
        now_ms: u64,
        peer: PeerId,
        object: ObjectId,
        held: &Bitmap,
        wanted: WantedShard<'_>,
    ) -> UploadDecision {
        let uploads = self
            .objects
            .entry(object)
            .or_insert_with(|| ObjectUploads::new(held.length(), now_ms));
        debug_assert_eq!(
            uploads.copies.len(),
            held.length() as usize,
            "an object has one number of shards"
        );
        let Some(shard) = uploads.least_sent(&peer, held, wanted) else {
            return UploadDecision::Missing;
        };
        let wait_ms = match self.sharing {
            Sharing::OnDemand => None,
            Sharing::FirstCopies => {
                uploads.note_progress(now_ms, peer, wanted);
                uploads.note_spread(&peer, wanted);
                uploads.wait_ms(now_ms, &peer, shard)
            }
        };
        if let Some(wait_ms) = wait_ms {
            let retry_ms = wait_ms.max(RETRY_MS_MIN);
            return UploadDecision::Busy {
                retry_ms,
                holders: uploads.holders(&peer, shard),
            };
        }
        uploads.begin(now_ms, peer, shard);
        UploadDecision::Send { shard }
    }

    /// Records how sending a shard ended.
    pub fn finish(
        &mut self,
        now_ms: u64,
        peer: &PeerId,
        object: &ObjectId,
        shard: u32,
        outcome: SendOutcome,
    ) {
        let Some(uploads) = self.objects.get_mut(object) else {
            return;
        };
        match outcome {
            SendOutcome::Sent if uploads.round == 1 => uploads.note_pass(now_ms),
            SendOutcome::Sent => {}
            SendOutcome::Failed => uploads.undo(peer, shard),
        }
    }

    /// Forgets the objects for which `is_held` is false.
    pub fn retain(&mut self, mut is_held: impl FnMut(&ObjectId) -> bool) {
        self.objects.retain(|object, _| is_held(object));
    }
}

impl ObjectUploads {
    fn new(shards: u32, now_ms: u64) -> Self {
        Self {
            copies: vec![0; shards as usize],
            spread: Bitmap::empty(shards),
            peers: BTreeMap::new(),
            progress: BTreeMap::new(),
            first_pass_ms: 0,
            opened_at_ms: now_ms,
            round: 1,
        }
    }

    fn was_sent(&self, peer: &PeerId, shard: u32) -> bool {
        self.peers
            .get(peer)
            .is_some_and(|served| served.shards.contains(shard))
    }

    /// Of the shards that are wanted and held, the one sent least often; those that this peer was sent before come last.
    fn least_sent(&self, peer: &PeerId, held: &Bitmap, wanted: WantedShard<'_>) -> Option<u32> {
        match wanted {
            WantedShard::Shard(shard) => held.contains(shard).then_some(shard),
            WantedShard::AnyBut(except) => held
                .iter()
                .filter(|shard| !except.contains(*shard))
                .min_by_key(|shard| (self.was_sent(peer, *shard), self.copies[*shard as usize])),
        }
    }

    /// How long this peer must wait for this shard; `None` if it may have it now. Opens the next round when that is due.
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
        if let Some(wait_ms) = self.selfish_wait_ms(now_ms, peer) {
            return Some(wait_ms);
        }
        if self.copies[shard as usize] == 0 || self.is_kept_back(now_ms, shard) {
            return None;
        }
        let stuck_ms = self.stuck_at_ms(now_ms, peer);
        if now_ms < stuck_ms {
            return Some(stuck_ms - now_ms);
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

    /// How long a peer that passes nothing on waits while peers that do pass on are asking. The wait is bounded: the peer may be
    /// one that no other peer can reach.
    fn selfish_wait_ms(&self, now_ms: u64, peer: &PeerId) -> Option<u64> {
        if !self.is_selfish(now_ms, peer, self.peers.get(peer)?) {
            return None;
        }
        let patience_ms = self.patience_ms();
        let passes_on = |(other, served): (&PeerId, &Served)| {
            let asked = self.progress.get(other).map(|seen| seen.asked_at_ms);
            other != peer
                && served.passed_on > 0
                && asked.is_some_and(|at_ms| now_ms <= at_ms + ASKING_PATIENCES * patience_ms)
        };
        let longest_ms = self.longest_wait_ms(self.progress.get(peer)?);
        (now_ms < longest_ms && self.peers.iter().any(passes_on)).then_some(patience_ms)
    }

    /// Whether a peer keeps more shards to itself than its record allows. Never true of a peer that has not been here long enough to
    /// pass them on.
    fn is_selfish(&self, now_ms: u64, peer: &PeerId, served: &Served) -> bool {
        let is_new = |seen: &Progress| now_ms < seen.since_ms + self.patience_ms();
        if self.progress.get(peer).is_none_or(is_new) {
            return false;
        }
        let is_kept = |shard: &u32| !self.spread.contains(*shard);
        let kept = served.shards.iter().filter(is_kept).count() + served.withheld as usize;
        kept > (KEPT_MAX + KEPT_FOR_EACH.saturating_mul(served.passed_on)) as usize
    }

    /// Whether a shard was sent only to peers that pass nothing on, while other peers do.
    fn is_kept_back(&self, now_ms: u64, shard: u32) -> bool {
        let mut sent = self
            .peers
            .iter()
            .filter(|(_, served)| served.shards.contains(shard));
        !self.spread.contains(shard)
            && self.peers.values().any(|served| served.passed_on > 0)
            && sent.all(|(peer, served)| self.is_selfish(now_ms, peer, served))
    }

    /// Records which shards were passed on: those that a peer has and was not sent from here.
    fn note_spread(&mut self, peer: &PeerId, wanted: WantedShard<'_>) {
        let WantedShard::AnyBut(except) = wanted else {
            return;
        };
        let news = except
            .iter()
            .filter(|shard| self.copies[*shard as usize] > 0)
            .filter(|shard| !self.spread.contains(*shard) && !self.was_sent(peer, *shard));
        for shard in news.collect::<Vec<_>>() {
            self.spread.insert(shard);
            let mut sent = self
                .peers
                .values_mut()
                .filter(|served| served.shards.contains(shard));
            // If two peers were sent the shard, either may have passed it on.
            if let (Some(only), None) = (sent.next(), sent.next()) {
                only.passed_on += 1;
            }
        }
    }

    /// Records how many shards a peer has received from other peers: those that it does not want and was not sent from here.
    fn note_progress(&mut self, now_ms: u64, peer: PeerId, wanted: WantedShard<'_>) {
        let elsewhere = match wanted {
            WantedShard::Shard(_) => 0,
            WantedShard::AnyBut(except) => {
                let not_ours = |shard: &u32| !self.was_sent(&peer, *shard);
                u32::try_from(except.iter().filter(not_ours).count()).unwrap_or(u32::MAX)
            }
        };
        make_room(&mut self.progress, &peer, PEERS_MAX, |seen| seen.grew_at_ms);
        let progress = self.progress.entry(peer).or_insert(Progress {
            elsewhere,
            grew_at_ms: now_ms,
            since_ms: now_ms,
            asked_at_ms: now_ms,
        });
        progress.asked_at_ms = now_ms;
        if elsewhere > progress.elsewhere {
            progress.elsewhere = elsewhere;
            progress.grew_at_ms = now_ms;
        }
    }

    /// When a peer counts as stuck. It is then sent shards that other peers were sent.
    fn stuck_at_ms(&self, now_ms: u64, peer: &PeerId) -> u64 {
        let Some(progress) = self.progress.get(peer) else {
            return now_ms;
        };
        let stuck_ms = progress.grew_at_ms.saturating_add(self.patience_ms());
        stuck_ms.min(self.longest_wait_ms(progress))
    }

    /// When a peer has been left to other peers for the longest time allowed.
    fn longest_wait_ms(&self, progress: &Progress) -> u64 {
        let longest_ms = PATIENCES_MAX * self.patience_ms().max(self.first_pass_ms);
        progress.since_ms.saturating_add(longest_ms)
    }

    /// How long a peer may go without a shard from other peers. Assumes that they send about as fast as the first pass did.
    fn patience_ms(&self) -> u64 {
        let shards = self.copies.len().max(1) as u64;
        let several_ms = self.first_pass_ms.saturating_mul(SHARDS_OF_PATIENCE) / shards;
        let patience_ms = several_ms.min(self.first_pass_ms);
        patience_ms.clamp(GRACE_MS_MIN, GRACE_MS_MAX)
    }

    /// The time from one round to the next; it grows with each round.
    fn grace_ms(&self) -> u64 {
        let doubled = GRACE_FACTOR_MAX.min(1 << (self.round - 1).min(16));
        let grace_ms = self.patience_ms().max(GRACE_MS_MIN * doubled);
        grace_ms.min(GRACE_MS_MAX)
    }

    /// Peers that were sent a shard, in the order of keys from the asker's on, so that not all askers get the same ones.
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

    fn note_pass(&mut self, now_ms: u64) {
        self.first_pass_ms += now_ms.saturating_sub(self.opened_at_ms).min(PAUSE_MS_MAX);
        self.opened_at_ms = now_ms;
    }

    fn begin(&mut self, now_ms: u64, peer: PeerId, shard: u32) {
        if self.copies.iter().all(|copies| *copies == 0) {
            self.opened_at_ms = now_ms;
        }
        if self.round == 1 {
            self.note_pass(now_ms);
        }
        if !self.spread.contains(shard) {
            let sent = self.peers.values_mut();
            sent.filter(|served| served.shards.contains(shard))
                .for_each(|served| served.withheld += 1);
        }
        let copies = &mut self.copies[shard as usize];
        *copies = copies.saturating_add(1);
        make_room(&mut self.peers, &peer, PEERS_MAX, |served| served.at_ms);
        let shards = self.copies.len() as u32;
        let served = self.peers.entry(peer).or_insert_with(|| Served {
            shards: Bitmap::empty(shards),
            at_ms: now_ms,
            repeats: 0,
            passed_on: 0,
            withheld: 0,
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
