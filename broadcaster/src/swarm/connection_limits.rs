//! Limits on incoming connections, in all and per peer.
//! Invariant: no peer holds more than [`CONNECTIONS_PER_PEER_MAX`] permits.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use muster_protocol::id::PeerId;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Most connections of one peer. A peer opens one for each object that it fetches: an anchor and the files beside it.
pub(crate) const CONNECTIONS_PER_PEER_MAX: usize = 16;

/// The connections that may be open at once.
#[derive(Debug)]
pub(crate) struct ConnectionLimits {
    pub(crate) free: Arc<Semaphore>,
    pub(crate) connections_max: u32,
    by_peer: Mutex<BTreeMap<PeerId, usize>>,
}

/// Permission for one connection of a peer, until it is dropped.
#[derive(Debug)]
pub(crate) struct ConnectionPermit {
    pub(crate) peer: PeerId,
    limits: Arc<ConnectionLimits>,
    _permit: OwnedSemaphorePermit,
}

impl ConnectionLimits {
    pub(crate) fn new(connections_max: NonZeroU32) -> Self {
        let connections_max = connections_max.get();
        Self {
            free: Arc::new(Semaphore::new(connections_max as usize)),
            connections_max,
            by_peer: Mutex::new(BTreeMap::new()),
        }
    }

    /// Turns a permit of [`Self::free`] into one for `peer`. `None` if the peer has all the connections that it may have.
    pub(crate) fn admit(
        limits: &Arc<Self>,
        peer: PeerId,
        permit: OwnedSemaphorePermit,
    ) -> Option<ConnectionPermit> {
        let mut by_peer = limits.by_peer();
        let open = by_peer.entry(peer).or_default();
        if *open >= CONNECTIONS_PER_PEER_MAX {
            return None;
        }
        *open += 1;
        Some(ConnectionPermit {
            peer,
            limits: Arc::clone(limits),
            _permit: permit,
        })
    }

    fn by_peer(&self) -> MutexGuard<'_, BTreeMap<PeerId, usize>> {
        self.by_peer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        let mut by_peer = self.limits.by_peer();
        let open = by_peer.get_mut(&self.peer);
        debug_assert!(open.is_some(), "a permit is counted for its peer");
        if let Some(open) = open {
            *open -= 1;
            if *open == 0 {
                by_peer.remove(&self.peer);
            }
        }
    }
}
