//! The swarm as the announcer and the adopters of versions use it: a trait, so that a simulation can take its place.

use async_trait::async_trait;
use bytes::Bytes;
use muster_protocol::id::{PeerId, PolicyVersion};
use muster_protocol::message::version::Object;

use crate::store::StoreError;
use crate::swarm::fetch::FetchError;
use crate::version::adoptions::Adoptions;

/// A place to fetch objects from and to offer them at: the swarm, or a simulation of it.
#[async_trait]
pub trait ObjectSource: Send + Sync + std::fmt::Debug {
    /// Fetches a whole object.
    ///
    /// # Errors
    /// When it cannot be had. Shards that arrived are kept for the next attempt.
    async fn fetch(&self, object: &Object) -> Result<Bytes, FetchError>;

    /// Offers a whole object that this peer put together itself, so that other peers can fetch it here.
    ///
    /// # Errors
    /// When the store cannot hold it.
    async fn offer(&self, object: &Object, bytes: Bytes) -> Result<(), StoreError> {
        tracing::trace!(object = %object.id().short(), bytes = bytes.len(), "not offered");
        Ok(())
    }

    /// Keeps an object, if it is here, for as long as the store keeps `version`.
    fn keep_for(&self, object: &Object, version: PolicyVersion) {
        tracing::trace!(object = %object.id().short(), %version, "needed");
    }

    /// Whether the object is being fetched and no reachable peer holds the missing shards.
    fn is_unreachable(&self, object: &Object) -> bool {
        tracing::trace!(object = %object.id().short(), "assumed to be reachable");
        false
    }

    /// Bytes uploaded to peers so far.
    fn uploaded_bytes(&self) -> u64 {
        0
    }

    /// The counter of adoptions from this source.
    fn adoptions(&self) -> Adoptions {
        Adoptions::default()
    }

    /// Records that `maker` described an object falsely. Its descriptions are ignored from then on.
    fn distrust(&self, maker: PeerId, object: &Object, reason: &str) {
        let object = object.id();
        tracing::warn!(maker = %maker.short(), object = %object.short(), reason, "a peer described an object falsely");
    }

    /// Whether [`Self::distrust`] was called for a peer.
    fn is_distrusted(&self, maker: &PeerId) -> bool {
        tracing::trace!(maker = %maker.short(), "trusted");
        false
    }
}
