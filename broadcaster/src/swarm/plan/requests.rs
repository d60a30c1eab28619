//! The requests in flight of one fetch.
//!
//! Invariant: `copies` counts, for each shard, the requests in flight that name it.

use std::collections::BTreeMap;

use muster_protocol::id::PeerId;

use crate::transport::wire::RequestId;

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asked {
    Have,
    Shard(u32),
    Any,
}

/// A request in flight.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pending {
    pub(super) source: PeerId,
    pub(super) asked: Asked,
    pub(super) asked_at_ms: u64,
}

impl Pending {
    /// Whether it was sent at least `limit_ms` ago.
    pub(super) fn is_older_than(&self, limit_ms: u64, now_ms: u64) -> bool {
        self.asked_at_ms.saturating_add(limit_ms) <= now_ms
    }
}

/// The requests in flight of one fetch.
#[derive(Debug)]
pub(super) struct Requests {
    by_id: BTreeMap<RequestId, Pending>,
    copies: Vec<u8>,
    next: u32,
}

impl Requests {
    pub(super) fn new(shards: usize) -> Self {
        Self {
            by_id: BTreeMap::new(),
            copies: vec![0; shards],
            next: 0,
        }
    }

    /// How many requests in flight name this shard.
    pub(super) fn copies(&self, shard: u32) -> u8 {
        self.copies[shard as usize]
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Pending> {
        self.by_id.values()
    }

    /// Adds a request and gives it a number.
    pub(super) fn add(&mut self, pending: Pending) -> RequestId {
        let request = RequestId(self.next);
        self.next = self.next.wrapping_add(1);
        if let Asked::Shard(shard) = pending.asked {
            self.copies[shard as usize] += 1;
        }
        self.by_id.insert(request, pending);
        request
    }

    /// Removes a request; `None` if this peer has no such request.
    pub(super) fn take(&mut self, source: &PeerId, request: RequestId) -> Option<Pending> {
        let pending = *self
            .by_id
            .get(&request)
            .filter(|pending| pending.source == *source)?;
        self.by_id.remove(&request);
        self.uncount(&pending);
        Some(pending)
    }

    /// Removes and returns all requests to a peer.
    pub(super) fn take_all(&mut self, source: &PeerId) -> Vec<Pending> {
        let is_to_peer = |pending: &Pending| pending.source == *source;
        let taken: Vec<Pending> = self.by_id.values().copied().filter(is_to_peer).collect();
        self.by_id.retain(|_, pending| !is_to_peer(pending));
        taken.iter().for_each(|pending| self.uncount(pending));
        taken
    }

    fn uncount(&mut self, pending: &Pending) {
        if let Asked::Shard(shard) = pending.asked {
            debug_assert!(
                self.copies[shard as usize] > 0,
                "copies count the requests in flight"
            );
            self.copies[shard as usize] -= 1;
        }
    }
}
