//! What was asked of whom and is not answered yet.
//!
//! Invariant: `copies` counts, for each shard, the requests in flight that name it.

use std::collections::BTreeMap;

use muster_protocol::id::PeerId;

use crate::transport::wire::RequestId;

/// What a request is about.
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
    /// Whether it was asked at least `limit_ms` ago.
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

    /// Notes a request and numbers it.
    pub(super) fn add(&mut self, pending: Pending) -> RequestId {
        let request = RequestId(self.next);
        self.next = self.next.wrapping_add(1);
        if let Asked::Shard(shard) = pending.asked {
            self.copies[shard as usize] += 1;
        }
        self.by_id.insert(request, pending);
        request
    }

    /// Takes a request out of flight, if this peer was asked it.
    pub(super) fn take(&mut self, source: &PeerId, request: RequestId) -> Option<Pending> {
        let pending = *self
            .by_id
            .get(&request)
            .filter(|pending| pending.source == *source)?;
        self.by_id.remove(&request);
        self.land(&pending);
        Some(pending)
    }

    /// Takes everything that this peer was asked out of flight, and returns it.
    pub(super) fn forget(&mut self, source: &PeerId) -> Vec<Pending> {
        let is_theirs = |pending: &Pending| pending.source == *source;
        let gone: Vec<Pending> = self.by_id.values().copied().filter(is_theirs).collect();
        self.by_id.retain(|_, pending| !is_theirs(pending));
        gone.iter().for_each(|pending| self.land(pending));
        gone
    }

    fn land(&mut self, pending: &Pending) {
        if let Asked::Shard(shard) = pending.asked {
            self.copies[shard as usize] -= 1;
        }
    }
}
