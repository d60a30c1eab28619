//! Counters: bytes and shards per object and per peer, refused connections, and banned peers.
//!
//! Counts bytes of shards, not of frames. Bounded: the least recently counted objects and peers are dropped first; the totals
//! stay.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use muster_protocol::id::{ObjectId, PeerId, UnixMillis};

use crate::swarm::bounded::make_room;

/// Most objects with counters of their own: those of the last hundreds of versions.
const OBJECTS_MAX: usize = 1_024;
/// Most peers with counters of their own.
const PEERS_MAX: usize = 1_024;
/// Most bans remembered. A new key costs an attacker nothing, so a longer list would only fill with them.
const BANS_MAX: usize = 4_096;

/// Bytes of shards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traffic {
    /// Received for the first time, and verified.
    pub bytes_downloaded: u64,
    /// Sent in full.
    pub bytes_uploaded: u64,
    /// Received again: the price of asking a second peer when the first is slow.
    pub bytes_duplicate: u64,
    /// Number of the latest transfer counted here; the smallest is dropped first.
    last_transfer: u64,
}

/// Why this peer does not connect to another peer any more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("served a bad shard {shard} of object {}", object.short())]
pub struct Ban {
    pub object: ObjectId,
    pub shard: u32,
    pub at: UnixMillis,
}

/// Why a peer's descriptions of objects are ignored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("described object {} falsely: {reason}", object.short())]
pub struct FalseDescription {
    pub object: ObjectId,
    pub reason: String,
    pub at: UnixMillis,
}

/// The crate's counters since the start of the process.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Metrics {
    /// Bytes of shards, all objects and peers together.
    pub total: Traffic,
    /// Bytes of shards by object.
    pub objects: BTreeMap<ObjectId, Traffic>,
    /// Bytes of shards by the peer's handshake key.
    pub peers: BTreeMap<PeerId, Traffic>,
    /// Shards received that match their hash, duplicates included.
    pub shards_verified: u64,
    /// Shards received that do not match their hash. Each bans its sender.
    pub shards_refused: u64,
    /// Requests for a shard answered with `Busy`: ask other peers first.
    pub busy_replies: u64,
    /// Incoming connections that ended in a refusal, a broken protocol or a failed handshake.
    pub connections_refused: u64,
    /// Banned peers, by handshake key.
    pub bans: BTreeMap<PeerId, Ban>,
    /// Peers that described an object falsely, by the key that signs their statements.
    pub false_descriptions: BTreeMap<PeerId, FalseDescription>,
}

/// A finished transfer of one shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transfer {
    /// Received for the first time, and verified.
    Download,
    /// Received and verified though it was held already.
    Duplicate,
    /// Sent in full.
    Upload,
}

/// The counters that all connections share.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    metrics: Mutex<Metrics>,
}

impl Counters {
    pub(crate) fn snapshot(&self) -> Metrics {
        self.lock().clone()
    }

    pub(crate) fn count(&self, object: &ObjectId, peer: &PeerId, transfer: Transfer, bytes: usize) {
        let mut metrics = self.lock();
        if transfer != Transfer::Upload {
            metrics.shards_verified += 1;
        }
        let number = metrics.total.last_transfer + 1;
        metrics.total.add(transfer, bytes, number);
        add_to(&mut metrics.objects, object, OBJECTS_MAX).add(transfer, bytes, number);
        add_to(&mut metrics.peers, peer, PEERS_MAX).add(transfer, bytes, number);
    }

    pub(crate) fn ban(&self, peer: PeerId, ban: Ban) {
        let mut metrics = self.lock();
        metrics.shards_refused += 1;
        make_room(&mut metrics.bans, &peer, BANS_MAX, |ban| ban.at);
        metrics.bans.insert(peer, ban);
    }

    pub(crate) fn is_banned(&self, peer: &PeerId) -> bool {
        self.lock().bans.contains_key(peer)
    }

    pub(crate) fn distrust(&self, peer: PeerId, reason: FalseDescription) {
        let known = &mut self.lock().false_descriptions;
        make_room(known, &peer, BANS_MAX, |known| known.at);
        known.insert(peer, reason);
    }

    pub(crate) fn is_distrusted(&self, peer: &PeerId) -> bool {
        self.lock().false_descriptions.contains_key(peer)
    }

    pub(crate) fn count_refused_connection(&self) {
        self.lock().connections_refused += 1;
    }

    pub(crate) fn count_busy_reply(&self) {
        self.lock().busy_replies += 1;
    }

    fn lock(&self) -> MutexGuard<'_, Metrics> {
        // The counters are consistent after every statement, so a panic elsewhere leaves nothing half done.
        self.metrics.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Traffic {
    fn add(&mut self, transfer: Transfer, bytes: usize, number: u64) {
        debug_assert!(
            self.last_transfer < number,
            "transfers are numbered in order"
        );
        let counter = match transfer {
            Transfer::Download => &mut self.bytes_downloaded,
            Transfer::Duplicate => &mut self.bytes_duplicate,
            Transfer::Upload => &mut self.bytes_uploaded,
        };
        *counter += bytes as u64;
        self.last_transfer = number;
    }
}

fn add_to<'a, K: Ord + Copy>(
    counts: &'a mut BTreeMap<K, Traffic>,
    key: &K,
    limit: usize,
) -> &'a mut Traffic {
    make_room(counts, key, limit, |traffic| traffic.last_transfer);
    counts.entry(*key).or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_counted_by_object_peer_and_direction() {
        let counters = Counters::default();
        let (object, peer) = (ObjectId([1; 32]), PeerId([2; 32]));
        counters.count(&object, &peer, Transfer::Upload, 10);
        counters.count(&object, &peer, Transfer::Download, 5);
        counters.count(&ObjectId([3; 32]), &peer, Transfer::Upload, 1);
        let metrics = counters.snapshot();
        assert_eq!(
            (
                metrics.objects[&object].bytes_uploaded,
                metrics.objects[&object].bytes_downloaded
            ),
            (10, 5)
        );
        assert_eq!(
            (
                metrics.peers[&peer].bytes_uploaded,
                metrics.total.bytes_uploaded
            ),
            (11, 11)
        );
    }

    #[test]
    fn the_least_recently_counted_peer_is_dropped_first() {
        let counters = Counters::default();
        let object = ObjectId([1; 32]);
        let peer = |number: usize| {
            let mut key = [0; 32];
            key[..8].copy_from_slice(&number.to_le_bytes());
            PeerId(key)
        };
        for number in 0..PEERS_MAX + 10 {
            counters.count(&object, &peer(0), Transfer::Upload, 1);
            counters.count(&object, &peer(number), Transfer::Upload, 1);
        }
        let peers = counters.snapshot().peers;
        assert_eq!(peers.len(), PEERS_MAX);
        assert!(peers.contains_key(&peer(0)) && !peers.contains_key(&peer(1)));
    }
}
