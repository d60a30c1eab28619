//! What the serving and the fetching half of one peer share.
//!
//! Everything in here may be used from any task at once; no lock is held across a wait.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use muster_protocol::clock::SharedClock;
use muster_protocol::id::{ObjectId, PeerId};
use muster_protocol::identity::Identity;
use muster_protocol::message::peer::PeerRecord;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinError;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::store::{Inserted, Store, StoreError};
use crate::swarm::metrics::Meter;
use crate::swarm::rate::TokenBucket;
use crate::swarm::uploads::Uploads;
use crate::transport::Transports;

/// Hashing more than this takes longer than a task should keep a thread of the runtime (BLAKE3: about 4 GB/s).
const HASHED_INLINE_BYTES_MAX: usize = 256 << 10;

/// The peers that are known: whose statement it is, and what it says.
pub(crate) type Book = BTreeMap<PeerId, PeerRecord>;

#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) identity: Identity,
    pub(crate) clock: SharedClock,
    pub(crate) store: Arc<Store>,
    pub(crate) transports: Transports,
    pub(crate) meter: Meter,
    pub(crate) book: watch::Sender<Book>,
    pub(crate) shutdown: CancellationToken,
    pub(crate) stall_ms: u64,
    pub(crate) request_ms: u64,
    uploads: Mutex<Uploads>,
    bucket: Option<Mutex<TokenBucket>>,
    /// One fetch of an object at a time: the second waits and then finds it here.
    fetches: Mutex<BTreeMap<ObjectId, Arc<Semaphore>>>,
    /// Objects being fetched that no peer within reach holds.
    unreachable: Mutex<BTreeSet<ObjectId>>,
    /// Told when a fetch wants other peers than those that are known.
    pub(crate) peers_wanted: tokio::sync::Notify,
    started: Instant,
}

/// What a node is made of.
pub(crate) struct NodeParts {
    pub(crate) identity: Identity,
    pub(crate) clock: SharedClock,
    pub(crate) store: Store,
    pub(crate) transports: Transports,
    pub(crate) uploads: Uploads,
    pub(crate) upload_bytes_per_second: Option<std::num::NonZeroU64>,
    pub(crate) stall_ms: u64,
    pub(crate) request_ms: u64,
    pub(crate) shutdown: CancellationToken,
}

impl Node {
    pub(crate) fn new(parts: NodeParts) -> Self {
        Self {
            identity: parts.identity,
            clock: parts.clock,
            store: Arc::new(parts.store),
            transports: parts.transports,
            meter: Meter::default(),
            book: watch::Sender::new(Book::new()),
            shutdown: parts.shutdown,
            stall_ms: parts.stall_ms,
            request_ms: parts.request_ms,
            uploads: Mutex::new(parts.uploads),
            bucket: parts
                .upload_bytes_per_second
                .map(|rate| Mutex::new(TokenBucket::new(rate, 0))),
            fetches: Mutex::new(BTreeMap::new()),
            unreachable: Mutex::new(BTreeSet::new()),
            peers_wanted: tokio::sync::Notify::new(),
            started: Instant::now(),
        }
    }

    /// Milliseconds since the start. Waits are measured with tokio's clock and not with the time of day, which may jump.
    pub(crate) fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    /// The instant at which [`Self::now_ms`] reads `at_ms`.
    pub(crate) fn instant(&self, at_ms: u64) -> Instant {
        self.started + std::time::Duration::from_millis(at_ms)
    }

    pub(crate) fn uploads(&self) -> MutexGuard<'_, Uploads> {
        self.uploads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether uploads have a cap.
    pub(crate) fn is_capped(&self) -> bool {
        self.bucket.is_some()
    }

    /// Takes bytes from the upload cap, and says how many milliseconds to wait before they may leave.
    pub(crate) fn take_upload(&self, bytes: usize) -> u64 {
        self.bucket.as_ref().map_or(0, |bucket| {
            let mut bucket = bucket.lock().unwrap_or_else(PoisonError::into_inner);
            bucket.take(bytes, self.now_ms())
        })
    }

    fn unreachable(&self) -> MutexGuard<'_, BTreeSet<ObjectId>> {
        self.unreachable
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether an object is being fetched that no peer within reach holds.
    pub(crate) fn is_unreachable(&self, object: &ObjectId) -> bool {
        self.unreachable().contains(object)
    }

    /// Somebody may hold the object, or it is not fetched any more.
    pub(crate) fn mark_reachable(&self, object: &ObjectId) {
        self.unreachable().remove(object);
    }

    /// Nobody within reach holds the object: perhaps there are peers that are not known yet.
    pub(crate) fn mark_unreachable(&self, object: ObjectId) {
        if self.unreachable().insert(object) {
            self.peers_wanted.notify_one();
        }
    }

    /// The gate of an object's fetch.
    pub(crate) fn gate(&self, object: ObjectId) -> Arc<Semaphore> {
        let mut fetches = self.fetches.lock().unwrap_or_else(PoisonError::into_inner);
        // Gates that nobody else holds are of no more use.
        fetches.retain(|_, gate| Arc::strong_count(gate) > 1);
        Arc::clone(
            fetches
                .entry(object)
                .or_insert_with(|| Arc::new(Semaphore::new(1))),
        )
    }

    /// Verifies a shard and keeps it, on a thread that may block when that takes long or goes to a disk.
    pub(crate) async fn insert(
        &self,
        object: ObjectId,
        shard: u32,
        bytes: Bytes,
    ) -> Result<Inserted, StoreError> {
        if bytes.len() <= HASHED_INLINE_BYTES_MAX && !self.store.is_persistent() {
            return self.store.insert(&object, shard, bytes);
        }
        self.blocking(move |store| store.insert(&object, shard, bytes))
            .await
    }

    /// Does something with the store on a thread that may block.
    pub(crate) async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Store) -> T + Send + 'static,
    ) -> T {
        let store = Arc::clone(&self.store);
        on_blocking_thread(move || work(&store)).await
    }
}

/// Does something on a thread that may block, and waits for it.
pub(crate) async fn on_blocking_thread<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    match tokio::task::spawn_blocking(work)
        .await
        .map_err(JoinError::try_into_panic)
    {
        Ok(done) => done,
        // A mistake of ours goes on upwards as if there had been no other thread.
        Err(Ok(panic)) => std::panic::resume_unwind(panic),
        // The runtime is ending and with it whoever waits here.
        Err(Err(_)) => std::future::pending().await,
    }
}
