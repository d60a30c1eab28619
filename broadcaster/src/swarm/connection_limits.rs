//! Places for connections, in all and per peer. Invariant: no peer has more than [`CONNECTIONS_PER_PEER_MAX`].

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, PoisonError};

use muster_protocol::id::PeerId;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Most connections of one peer: one for each object that it fetches, an anchor and the files beside it.
pub(crate) const CONNECTIONS_PER_PEER_MAX: usize = 16;

/// Places for connections.
#[derive(Debug)]
pub(crate) struct ConnectionLimits {
    pub(crate) places: Arc<Semaphore>,
    pub(crate) connections_max: u32,
    by_peer: Mutex<BTreeMap<PeerId, usize>>,
}

/// A connection's place; it is free again when this is dropped.
#[derive(Debug)]
pub(crate) struct ConnectionPermit {
    pub(crate) peer: PeerId,
    limits: Arc<ConnectionLimits>,
    _place: OwnedSemaphorePermit,
}

impl ConnectionLimits {
    pub(crate) fn new(connections_max: NonZeroU32) -> Self {
        let connections_max = connections_max.get();
        Self {
            places: Arc::new(Semaphore::new(connections_max as usize)),
            connections_max,
            by_peer: Mutex::new(BTreeMap::new()),
        }
    }

    /// ConnectionLimits a peer, if it has not taken all that are for one.
    pub(crate) fn take(
        limits: &Arc<Self>,
        peer: PeerId,
        place: OwnedSemaphorePermit,
    ) -> Option<ConnectionPermit> {
        let mut by_peer = limits
            .by_peer
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let taken = by_peer.entry(peer).or_default();
        if *taken >= CONNECTIONS_PER_PEER_MAX {
            return None;
        }
        *taken += 1;
        Some(ConnectionPermit {
            peer,
            limits: Arc::clone(limits),
            _place: place,
        })
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        let mut by_peer = self
            .limits
            .by_peer
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(taken) = by_peer.get_mut(&self.peer) {
            *taken -= 1;
            if *taken == 0 {
                by_peer.remove(&self.peer);
            }
        }
    }
}
