//! What went in and out: bytes of shards per object and per peer, and who was banned for what.
//!
//! Counts bytes of shards, not of frames. Bounded: the counts of what was seen longest ago are dropped first; totals stay.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use muster_protocol::id::{ObjectId, PeerId, UnixMillis};

/// Most objects with a count of their own: the last hundreds of versions.
const OBJECTS_MAX: usize = 1_024;
/// Most peers with a count of their own.
const PEERS_MAX: usize = 1_024;
/// Most bans remembered: keys cost nothing, so that a longer list would only be filled.
const BANS_MAX: usize = 4_096;

/// Bytes of shards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traffic {
    /// Received, verified and new.
    pub bytes_down: u64,
    /// Sent.
    pub bytes_up: u64,
    /// Received a second time: the price of doubling slow requests.
    pub bytes_twice: u64,
    /// When it was last counted, in the order of counting.
    order: u64,
}

/// Why a peer is not talked to any more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("served a bad shard {shard} of object {}", object.short())]
pub struct Ban {
    /// Of which object.
    pub object: ObjectId,
    /// Which shard.
    pub shard: u32,
    /// When.
    pub at: UnixMillis,
}

/// Why a member's descriptions are not used any more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("described object {} falsely: {reason}", object.short())]
pub struct FalseDescription {
    /// Of which object.
    pub object: ObjectId,
    /// What was found.
    pub reason: String,
    /// When.
    pub at: UnixMillis,
}

/// What was counted so far.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Stats {
    /// Of all objects and peers.
    pub total: Traffic,
    /// By object.
    pub objects: BTreeMap<ObjectId, Traffic>,
    /// By the handshake key of the peer.
    pub peers: BTreeMap<PeerId, Traffic>,
    /// Banned peers, by handshake key.
    pub bans: BTreeMap<PeerId, Ban>,
    /// Members who described what is not so, by the key of their statements.
    pub strikes: BTreeMap<PeerId, FalseDescription>,
    /// Connections that ended in a refusal, a broken protocol or a failed handshake.
    pub connections_refused: u64,
    /// Requests answered with "ask others first".
    pub answers_busy: u64,
}

/// A count of bytes in one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moved {
    /// Received, verified and new.
    Down,
    /// Received though it was held.
    Twice,
    /// Sent.
    Up,
}

/// The counters that all connections share.
#[derive(Debug, Default)]
pub struct Meter {
    stats: Mutex<Stats>,
}

impl Meter {
    /// What was counted so far.
    pub fn stats(&self) -> Stats {
        self.lock().clone()
    }

    /// Counts bytes of a shard.
    pub fn moved(&self, object: &ObjectId, peer: &PeerId, moved: Moved, bytes: usize) {
        let mut stats = self.lock();
        stats.total.order += 1;
        let order = stats.total.order;
        stats.total.add(moved, bytes, order);
        entry(&mut stats.objects, object, OBJECTS_MAX).add(moved, bytes, order);
        entry(&mut stats.peers, peer, PEERS_MAX).add(moved, bytes, order);
    }

    /// Bans a peer.
    pub fn ban(&self, peer: PeerId, ban: Ban) {
        let mut stats = self.lock();
        if stats.bans.len() >= BANS_MAX {
            let oldest = stats
                .bans
                .iter()
                .min_by_key(|(_, ban)| ban.at)
                .map(|(peer, _)| *peer);
            oldest.map(|peer| stats.bans.remove(&peer));
        }
        stats.bans.insert(peer, ban);
    }

    /// Strikes a member, as many as bans are remembered.
    pub fn distrust(&self, member: PeerId, strike: FalseDescription) {
        let mut stats = self.lock();
        if stats.strikes.len() >= BANS_MAX {
            let oldest = stats.strikes.iter().min_by_key(|(_, strike)| strike.at);
            let oldest = oldest.map(|(member, _)| *member);
            oldest.map(|member| stats.strikes.remove(&member));
        }
        stats.strikes.insert(member, strike);
    }

    /// Whether a member is struck.
    pub fn is_distrusted(&self, member: &PeerId) -> bool {
        self.lock().strikes.contains_key(member)
    }

    /// Whether a peer is banned.
    pub fn is_banned(&self, peer: &PeerId) -> bool {
        self.lock().bans.contains_key(peer)
    }

    /// Counts a connection that came to nothing.
    pub fn connection_refused(&self) {
        self.lock().connections_refused += 1;
    }

    /// Counts an answer "ask others first".
    pub fn answered_busy(&self) {
        self.lock().answers_busy += 1;
    }

    fn lock(&self) -> MutexGuard<'_, Stats> {
        // Counters are whole after every statement, so a panic elsewhere leaves nothing half done.
        self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Traffic {
    fn add(&mut self, moved: Moved, bytes: usize, order: u64) {
        let counter = match moved {
            Moved::Down => &mut self.bytes_down,
            Moved::Twice => &mut self.bytes_twice,
            Moved::Up => &mut self.bytes_up,
        };
        *counter += bytes as u64;
        self.order = order;
    }
}

fn entry<'a, K: Ord + Copy>(
    counts: &'a mut BTreeMap<K, Traffic>,
    key: &K,
    limit: usize,
) -> &'a mut Traffic {
    if counts.len() >= limit && !counts.contains_key(key) {
        let oldest = counts
            .iter()
            .min_by_key(|(_, traffic)| traffic.order)
            .map(|(key, _)| *key);
        oldest.map(|key| counts.remove(&key));
    }
    counts.entry(*key).or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_counted_by_object_peer_and_direction() {
        let meter = Meter::default();
        let (object, peer) = (ObjectId([1; 32]), PeerId([2; 32]));
        meter.moved(&object, &peer, Moved::Up, 10);
        meter.moved(&object, &peer, Moved::Down, 5);
        meter.moved(&ObjectId([3; 32]), &peer, Moved::Up, 1);
        let stats = meter.stats();
        assert_eq!(
            (
                stats.objects[&object].bytes_up,
                stats.objects[&object].bytes_down
            ),
            (10, 5)
        );
        assert_eq!(
            (stats.peers[&peer].bytes_up, stats.total.bytes_up),
            (11, 11)
        );
    }

    #[test]
    fn what_was_seen_longest_ago_is_forgotten_first() {
        let meter = Meter::default();
        let object = ObjectId([1; 32]);
        let peer = |number: usize| {
            let mut key = [0; 32];
            key[..8].copy_from_slice(&number.to_le_bytes());
            PeerId(key)
        };
        for number in 0..PEERS_MAX + 10 {
            meter.moved(&object, &peer(0), Moved::Up, 1);
            meter.moved(&object, &peer(number), Moved::Up, 1);
        }
        let peers = meter.stats().peers;
        assert_eq!(peers.len(), PEERS_MAX);
        assert!(peers.contains_key(&peer(0)) && !peers.contains_key(&peer(1)));
    }
}
