//! Which shard to send to whom, and when to say that others have it: the seeder's side of the swarm, as pure decisions.
//!
//! Whoever holds an object chooses the shard that it has sent least, so that about one pass over the object puts every
//! shard into the swarm ("super-seeding"; 1.13 to 1.15 of the object measured in `research/p2p-broadcast.md` §3.4). A
//! learner goes further ([`Sharing::FirstCopies`]): what it has sent once it does not send again until the peers had time
//! to exchange it among themselves. Two clocks bound that time, so that a swarm finishes even when every other peer is dead
//! or lying. A peer gets a second copy once it has had nothing from others for a while: as long as it gets on, however slow
//! its machine is, it needs none. And round r lets each shard go out r times, and opens no sooner than the round before it
//! could have been passed on, so that many who claim to be stuck cannot drain the learner. A peer's own word about what it
//! has from others can make nobody wait but itself, and can vouch for those that it was sent. Who keeps what it is sent to
//! itself, while others pass on what they are sent, waits for them: else three liars of ten peers would draw a third of
//! every round. Knows nothing of sockets; the time is handed in. Invariant: in round r no shard was sent more than r times.

use std::collections::BTreeMap;

use muster_protocol::id::{ObjectId, PeerId};
use serde::{Deserialize, Serialize};

use crate::store::bitmap::Bitmap;
use crate::transport::wire::HOLDERS_MAX;

/// Shortest time that peers get to exchange a round's shards, and that a peer has to be stuck: many polls of one another and
/// a transfer on a local net, on a machine whose processors have other work.
pub const GRACE_MS_MIN: u64 = 1_000;
/// Longest time: a peer whose partners are all gone waits no longer than this for the next round.
pub const GRACE_MS_MAX: u64 = 30_000;
/// The grace doubles from round to round up to this factor: each round without need makes the next less likely to be one.
const GRACE_FACTOR_MAX: u64 = 8;
/// A peer that was sent a shard and asks for it again waits this long, and twice as long for each further pass, so that
/// one that only drains us comes last and ever more rarely. One that restarted empty-handed waits once.
const REPEAT_MS: u64 = 2_400;
/// The wait doubles at most this often, to about ten minutes.
const REPEAT_DOUBLINGS_MAX: u32 = 8;
/// Longest part of a pass in which nothing is sent that counts for its length: nobody asked then.
const PAUSE_MS_MAX: u64 = 4_000;
/// A peer that gets nothing from others is given up on after the time in which we sent this many shards.
const SHARDS_OF_PATIENCE: u64 = 8;
/// One that gets on, but slowly, is left to the others for this many times as long as the first pass took, or as a stuck
/// one: those it gets on with may be dripping on purpose.
const PATIENCES_MAX: u64 = 8;
/// A peer may keep so many shards to itself, and this many more for each that it passed on, before others come first. Its
/// uplink may be several times as slow as ours, and what it was just sent is still on its way to others.
const KEPT_MAX: u32 = 8;
const KEPT_FOR_EACH: u32 = 16;
/// A peer that asked so many patiences ago still wants something: it was told to wait for about one.
const ASKING_PATIENCES: u64 = 4;
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
pub enum WantedShard<'a> {
    /// This shard.
    Shard(u32),
    /// Any but these.
    AnyBut(&'a Bitmap),
}

/// What is done about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UploadDecision {
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
pub enum SendOutcome {
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
    /// Shards that it alone was sent and somebody else has.
    passed_on: u32,
    /// Shards that had to be sent to others too, since nobody had them from it.
    withheld: u32,
}

/// How a peer gets on with the others.
#[derive(Debug, Clone, Copy)]
struct Progress {
    /// Most shards that it did not need from us and was not sent by us.
    elsewhere: u32,
    /// When that grew last.
    grew_at_ms: u64,
    /// When it began to be left to the others.
    since_ms: u64,
    /// When it asked last.
    asked_at_ms: u64,
}

#[derive(Debug)]
struct ObjectUploads {
    /// How often each shard was sent, those on their way included.
    copies: Vec<u16>,
    /// Shards that somebody has who was not sent them.
    spread: Bitmap,
    peers: BTreeMap<PeerId, Served>,
    progress: BTreeMap<PeerId, Progress>,
    /// How long it took to send every shard once, so far.
    first_pass_ms: u64,
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
        wanted: WantedShard<'_>,
    ) -> UploadDecision {
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

    /// Notes how sending a shard ended.
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

    /// Forgets objects that are no longer held.
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

    /// The shard that is wanted, held and sent least; one that this peer was sent before comes last.
    fn least_sent(&self, peer: &PeerId, held: &Bitmap, wanted: WantedShard<'_>) -> Option<u32> {
        match wanted {
            WantedShard::Shard(shard) => held.contains(shard).then_some(shard),
            WantedShard::AnyBut(except) => held
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
        if let Some(wait_ms) = self.keeper_wait_ms(now_ms, peer) {
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

    /// How long a peer that keeps what it is sent to itself waits for those who pass it on, while they ask. Not for ever: it
    /// may be one that nobody can reach.
    fn keeper_wait_ms(&self, now_ms: u64, peer: &PeerId) -> Option<u64> {
        if !self.is_keeper(now_ms, peer, self.peers.get(peer)?) {
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

    /// Whether a peer was sent more shards that nobody has from it by now than its record allows. Not before it has been here
    /// for long enough to pass them on.
    fn is_keeper(&self, now_ms: u64, peer: &PeerId, served: &Served) -> bool {
        let is_new = |seen: &Progress| now_ms < seen.since_ms + self.patience_ms();
        if self.progress.get(peer).is_none_or(is_new) {
            return false;
        }
        let is_kept = |shard: &u32| !self.spread.contains(*shard);
        let kept = served.shards.iter().filter(is_kept).count() + served.withheld as usize;
        kept > (KEPT_MAX + KEPT_FOR_EACH.saturating_mul(served.passed_on)) as usize
    }

    /// Whether a shard that everybody could have by now went only to peers who keep what they are sent.
    fn is_kept_back(&self, now_ms: u64, shard: u32) -> bool {
        let mut sent = self
            .peers
            .iter()
            .filter(|(_, served)| served.shards.contains(shard));
        !self.spread.contains(shard)
            && self.peers.values().any(|served| served.passed_on > 0)
            && sent.all(|(peer, served)| self.is_keeper(now_ms, peer, served))
    }

    /// Notes which shards were passed on, by what a peer does not want and was not sent.
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
            // Of two who were sent it, either may have kept it.
            if let (Some(only), None) = (sent.next(), sent.next()) {
                only.passed_on += 1;
            }
        }
    }

    /// Notes what a peer has from others by now: what it does not want, less what it was sent from here.
    fn note_progress(&mut self, now_ms: u64, peer: PeerId, wanted: WantedShard<'_>) {
        let elsewhere = match wanted {
            WantedShard::Shard(_) => 0,
            WantedShard::AnyBut(except) => {
                let not_ours = |shard: &u32| !self.was_sent(&peer, *shard);
                u32::try_from(except.iter().filter(not_ours).count()).unwrap_or(u32::MAX)
            }
        };
        if self.progress.len() >= PEERS_MAX && !self.progress.contains_key(&peer) {
            let oldest = self.progress.iter().min_by_key(|(_, seen)| seen.grew_at_ms);
            if let Some(oldest) = oldest.map(|(peer, _)| *peer) {
                self.progress.remove(&oldest);
            }
        }
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

    /// When a peer that gets nothing from others any more counts as stuck, and is sent what others were sent.
    fn stuck_at_ms(&self, now_ms: u64, peer: &PeerId) -> u64 {
        let Some(progress) = self.progress.get(peer) else {
            return now_ms;
        };
        let stuck_ms = progress.grew_at_ms.saturating_add(self.patience_ms());
        stuck_ms.min(self.longest_wait_ms(progress))
    }

    /// When a peer has been left to the others for long enough, whatever they do.
    fn longest_wait_ms(&self, progress: &Progress) -> u64 {
        let longest_ms = PATIENCES_MAX * self.patience_ms().max(self.first_pass_ms);
        progress.since_ms.saturating_add(longest_ms)
    }

    /// How long a peer may be without a shard from others while they have some that it lacks: they send about as fast as the
    /// first pass did, with some luck.
    fn patience_ms(&self) -> u64 {
        let shards = self.copies.len().max(1) as u64;
        let several_ms = self.first_pass_ms.saturating_mul(SHARDS_OF_PATIENCE) / shards;
        let patience_ms = several_ms.min(self.first_pass_ms);
        patience_ms.clamp(GRACE_MS_MIN, GRACE_MS_MAX)
    }

    /// Longer from round to round.
    fn grace_ms(&self) -> u64 {
        let doubled = GRACE_FACTOR_MAX.min(1 << (self.round - 1).min(16));
        let grace_ms = self.patience_ms().max(GRACE_MS_MIN * doubled);
        grace_ms.min(GRACE_MS_MAX)
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
