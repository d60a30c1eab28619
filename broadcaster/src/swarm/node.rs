//! The state that the server and the fetches of one peer share.
//!
//! Every field may be used from any task; no lock is held across an await.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use muster_protocol::clock::SharedClock;
use muster_protocol::id::{ObjectId, PeerId};
use muster_protocol::identity::Identity;
use muster_protocol::message::peer::PeerRecord;
use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::blocking::{INLINE_BYTES_MAX, on_blocking_thread};
use crate::store::{Inserted, Store, StoreError};
use crate::swarm::metrics::Counters;
use crate::swarm::rate::TokenBucket;
use crate::swarm::uploads::Uploads;
use crate::transport::Transports;
use crate::version::adoptions::Adoptions;

/// The known peers: the newest record that each has signed, by the key that signed it.
pub(crate) type AddressBook = BTreeMap<PeerId, PeerRecord>;

#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) identity: Identity,
    pub(crate) clock: SharedClock,
    pub(crate) store: Arc<Store>,
    pub(crate) transports: Transports,
    pub(crate) counters: Counters,
    pub(crate) adoptions: Adoptions,
    pub(crate) address_book: watch::Sender<AddressBook>,
    pub(crate) shutdown: CancellationToken,
    pub(crate) stall_ms: u64,
    pub(crate) request_ms: u64,
    uploads: Mutex<Uploads>,
    upload_cap: Option<Mutex<TokenBucket>>,
    /// One permit per object being fetched: a second fetch of an object waits for the first and then finds the object here.
    fetches: Mutex<BTreeMap<ObjectId, Arc<Semaphore>>>,
    /// Objects being fetched that no reachable peer holds.
    unreachable: Mutex<BTreeSet<ObjectId>>,
    /// Notified when a fetch wants more peers than the address book has.
    pub(crate) peers_wanted: Notify,
    started: Instant,
}

/// The arguments of [`Node::new`].
pub(crate) struct NodeParts {
    pub(crate) identity: Identity,
    pub(crate) clock: SharedClock,
    pub(crate) store: Store,
    pub(crate) transports: Transports,
    pub(crate) uploads: Uploads,
    pub(crate) upload_bytes_per_second: Option<NonZeroU64>,
    pub(crate) stall_ms: u64,
    pub(crate) request_ms: u64,
    pub(crate) shutdown: CancellationToken,
}

impl Node {
    pub(crate) fn new(parts: NodeParts) -> Self {
        let rate = parts.upload_bytes_per_second;
        Self {
            identity: parts.identity,
            clock: parts.clock,
            store: Arc::new(parts.store),
            transports: parts.transports,
            counters: Counters::default(),
            adoptions: Adoptions::default(),
            address_book: watch::Sender::new(AddressBook::new()),
            shutdown: parts.shutdown,
            stall_ms: parts.stall_ms,
            request_ms: parts.request_ms,
            uploads: Mutex::new(parts.uploads),
            upload_cap: rate.map(|rate| Mutex::new(TokenBucket::new(rate, 0))),
            fetches: Mutex::default(),
            unreachable: Mutex::default(),
            peers_wanted: Notify::new(),
            started: Instant::now(),
        }
    }

    /// Milliseconds since the start, by tokio's clock: the time of day may jump.
    pub(crate) fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    /// The instant at which [`Self::now_ms`] reads `at_ms`.
    pub(crate) fn instant(&self, at_ms: u64) -> Instant {
        self.started + Duration::from_millis(at_ms)
    }

    pub(crate) fn uploads(&self) -> MutexGuard<'_, Uploads> {
        self.uploads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn has_upload_cap(&self) -> bool {
        self.upload_cap.is_some()
    }

    /// Takes bytes from the upload cap. Returns the milliseconds to wait before they may leave.
    pub(crate) fn take_from_upload_cap(&self, bytes: usize) -> u64 {
        self.upload_cap.as_ref().map_or(0, |cap| {
            let mut cap = cap.lock().unwrap_or_else(PoisonError::into_inner);
            cap.take(bytes, self.now_ms())
        })
    }

    fn unreachable(&self) -> MutexGuard<'_, BTreeSet<ObjectId>> {
        let unreachable = self.unreachable.lock();
        unreachable.unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether an object is being fetched and no reachable peer holds the missing shards.
    pub(crate) fn is_unreachable(&self, object: &ObjectId) -> bool {
        self.unreachable().contains(object)
    }

    /// Records that some peer may hold the object, or that its fetch has ended.
    pub(crate) fn mark_reachable(&self, object: &ObjectId) {
        self.unreachable().remove(object);
    }

    /// Records that no reachable peer holds the object, and asks for more peers.
    pub(crate) fn mark_unreachable(&self, object: ObjectId) {
        if self.unreachable().insert(object) {
            self.peers_wanted.notify_one();
        }
    }

    /// The semaphore that admits one fetch of an object at a time.
    pub(crate) fn fetch_permits(&self, object: ObjectId) -> Arc<Semaphore> {
        let mut fetches = self.fetches.lock().unwrap_or_else(PoisonError::into_inner);
        // Only the map still refers to the semaphore of a fetch that has ended.
        fetches.retain(|_, permits| Arc::strong_count(permits) > 1);
        let permits = fetches.entry(object);
        Arc::clone(permits.or_insert_with(|| Arc::new(Semaphore::new(1))))
    }

    /// Verifies a shard and keeps it. Large shards, and all shards that go to a disk, use a thread that may block.
    pub(crate) async fn insert(
        &self,
        object: ObjectId,
        shard: u32,
        bytes: Bytes,
    ) -> Result<Inserted, StoreError> {
        if bytes.len() <= INLINE_BYTES_MAX && !self.store.is_persistent() {
            return self.store.insert(&object, shard, bytes);
        }
        self.blocking(move |store| store.insert(&object, shard, bytes))
            .await
    }

    /// Runs `work` on a thread that may block.
    pub(crate) async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Store) -> T + Send + 'static,
    ) -> T {
        let store = Arc::clone(&self.store);
        on_blocking_thread(move || work(&store)).await
    }
}
