//! The public face of the broadcaster: a peer that offers objects, fetches objects, and serves them to other peers.
//!
//! A [`Swarm`] is a cheap handle; its server runs on the caller's task tracker until the shutdown. The caller adds the other
//! peers ([`Swarm::add_peer`]) from records that those peers have signed. Each fetched shard is checked against the object's
//! description; whether that description belongs to a version signed by the learner is checked by [`crate::version::adopt`].

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::num::{NonZeroU32, NonZeroU64};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use muster_protocol::clock::SharedClock;
use muster_protocol::envelope::{Invalid, Statement};
use muster_protocol::id::{ObjectId, PeerId, PolicyVersion};
use muster_protocol::identity::Identity;
use muster_protocol::limits::PEERS_MAX;
use muster_protocol::message::peer::PeerRecord;
use muster_protocol::message::version::Object;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::blocking::on_blocking_thread;
use crate::store::{Store, StoreConfig, StoreError};
use crate::swarm::bounded::make_room;
use crate::swarm::metrics::{FalseDescription, Metrics};
use crate::swarm::node::{Node, NodeParts};
use crate::swarm::server::Server;
use crate::swarm::survey::{Holdings, survey};
use crate::swarm::uploads::{Sharing, Uploads};
use crate::transport::Transports;
use crate::transport::interface::Transport;
use crate::transport::nat::{self, NatConfig, NatError};
use crate::transport::tcp::Tcp;
use crate::transport::wire::Chooser;
use crate::version::adoptions::Adoptions;
use crate::version::squash::SquashConfig;

pub use crate::swarm::fetch::FetchError;
pub use crate::swarm::source::ObjectSource;

mod bounded;
mod connection_limits;
mod fetch;
mod link;
pub mod metrics;
mod node;
pub mod plan;
pub mod presence;
mod rate;
mod server;
mod slots;
mod source;
pub mod survey;
pub mod uploads;

const CONNECTIONS: NonZeroU32 = NonZeroU32::new(256).unwrap();
const STALL_MS: NonZeroU64 = NonZeroU64::new(60_000).unwrap();
const REQUEST_MS: NonZeroU64 = NonZeroU64::new(10_000).unwrap();

/// How a peer takes part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SwarmConfig {
    /// Where to listen. Default: loopback and any free port, so that other machines reach this one only if told to.
    pub listen: SocketAddr,
    /// `host:port` under which other peers reach this one. Default: the listening address, unless it is every interface.
    pub advertise: Vec<String>,
    /// Upload cap over all connections, in bytes of shards per second. Default: none.
    pub upload_bytes_per_second: Option<NonZeroU64>,
    /// How freely shards are given. Default: on demand.
    pub sharing: Sharing,
    /// Most incoming connections at once. Default: 256; each costs a socket and its buffers, about 100 MB in all.
    pub connections_max: NonZeroU32,
    /// A fetch fails when no shard has arrived for this long. Default: 60 s, longer than a busy peer may ask others to wait.
    pub stall_ms: NonZeroU64,
    /// How long one request may take, besides the time that its bytes need. Default: 10 s, several round trips of a slow link.
    pub request_ms: NonZeroU64,
    /// How this peer is reached behind a home router. Default: not at all. Needs a build with the feature `nat`.
    pub nat: Option<NatConfig>,
    /// How many shards are kept, and where.
    pub store: StoreConfig,
    /// The resources for making squashed deltas.
    pub squash: SquashConfig,
}

impl Default for SwarmConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            advertise: Vec::new(),
            upload_bytes_per_second: None,
            sharing: Sharing::default(),
            connections_max: CONNECTIONS,
            stall_ms: STALL_MS,
            request_ms: REQUEST_MS,
            nat: None,
            store: StoreConfig::default(),
            squash: SquashConfig::default(),
        }
    }
}

/// Why a peer could not be started.
#[derive(Debug, thiserror::Error)]
pub enum SwarmError {
    #[error(
        "cannot listen on {address} ({source}): choose another address, or port 0 for any free one"
    )]
    Listen {
        address: SocketAddr,
        source: io::Error,
    },
    #[error("{0}")]
    Nat(#[from] NatError),
    #[error("own peer record is not valid ({0}): change `advertise`")]
    Record(#[from] Invalid),
    #[error("{0}")]
    Store(#[from] StoreError),
}

/// A peer of the swarm.
#[derive(Debug, Clone)]
pub struct Swarm {
    node: Arc<Node>,
    address: SocketAddr,
}

impl Swarm {
    /// Opens the store, listens, and serves on `tracker` until `shutdown`.
    ///
    /// # Errors
    /// When the address is taken, or the store's directory cannot be used.
    pub async fn start(
        config: SwarmConfig,
        identity: Identity,
        clock: SharedClock,
        tracker: &TaskTracker,
        shutdown: CancellationToken,
    ) -> Result<Self, SwarmError> {
        let failed = |source| SwarmError::Listen {
            address: config.listen,
            source,
        };
        let tcp = Tcp::listen(config.listen, config.advertise).await;
        let tcp = tcp.map_err(failed)?;
        let address = tcp.local_address();
        // TCP first: the system paces it and no relay carries it. A peer behind a router announces no TCP address.
        let mut transports: Vec<Arc<dyn Transport>> = vec![Arc::new(tcp)];
        if let Some(config) = &config.nat {
            transports.push(nat::transport(config, &identity).await?);
        }
        let transports = Transports::new(transports);
        let store = on_blocking_thread(|| Store::open(config.store)).await?;
        let node = Arc::new(Node::new(NodeParts {
            identity,
            clock,
            store,
            transports: transports.clone(),
            uploads: Uploads::new(config.sharing),
            upload_bytes_per_second: config.upload_bytes_per_second,
            stall_ms: config.stall_ms.get(),
            request_ms: config.request_ms.get(),
            shutdown,
        }));
        let chooser = match config.sharing {
            Sharing::OnDemand => Chooser::Asker,
            Sharing::FirstCopies => Chooser::Holder,
        };
        let server = Server::new(Arc::clone(&node), chooser, config.connections_max);
        let server = Arc::new(server);
        for transport in transports.iter() {
            tracker.spawn(Arc::clone(&server).run(Arc::clone(transport), tracker.clone()));
        }
        let swarm = Self { node, address };
        swarm.peer_record().validate()?;
        Ok(swarm)
    }

    /// The TCP address on which this peer listens, with the port that the system chose.
    pub fn local_address(&self) -> SocketAddr {
        self.address
    }

    /// The record that tells other peers how to reach this one; the caller signs it. It has no address if this peer listens on
    /// every interface and `advertise` is empty: such a peer can fetch, and no peer can dial it.
    pub fn peer_record(&self) -> PeerRecord {
        let transports = self.node.transports.iter();
        PeerRecord {
            handshake: self.node.identity.handshake_id(),
            addresses: transports
                .flat_map(|transport| transport.addresses())
                .collect(),
            issued: self.node.clock.now(),
        }
    }

    /// Verifies a whole object on a thread that may block, and offers it to the swarm.
    ///
    /// # Errors
    /// When the bytes do not match the description, there is no room, or the disk fails.
    pub async fn offer(&self, object: &Object, bytes: Bytes) -> Result<ObjectId, StoreError> {
        let object = object.clone();
        let offering = self.node.blocking(move |store| store.offer(&object, bytes));
        let offered = offering.await;
        self.forget_dropped_uploads();
        offered
    }

    /// Adds a peer to the address book; `peer` has signed `record`. A newer record replaces an older one, and a fetch in
    /// progress uses it at once. When the book is full, the oldest record goes.
    pub fn add_peer(&self, peer: PeerId, record: PeerRecord) {
        self.node.address_book.send_if_modified(|book| {
            let known = book.get(&peer);
            if known.is_some_and(|known| known.issued >= record.issued) {
                return false;
            }
            make_room(book, &peer, PEERS_MAX, |record| record.issued);
            book.insert(peer, record);
            true
        });
    }

    /// Waits until a fetch finds that no reachable peer holds its object, so that more peers are wanted.
    ///
    /// # Cancel safety
    /// A cancelled call misses nothing.
    pub(crate) async fn wait_until_peers_wanted(&self) {
        self.node.peers_wanted.notified().await;
    }

    /// Fetches an object from the peers in the address book, including those added meanwhile. The caller has checked that the
    /// object belongs to a version signed by the learner. Two fetches of one object share the work.
    ///
    /// # Cancel safety
    /// Safe: shards that arrived stay in the store, and the next fetch continues from them.
    ///
    /// # Errors
    /// When no shard arrives any more, or a shard cannot be stored.
    pub async fn fetch(&self, object: &Object) -> Result<Bytes, FetchError> {
        let fetched = Box::pin(fetch::fetch(&self.node, object)).await;
        self.forget_dropped_uploads();
        fetched
    }

    /// Asks `peers`, all at once, which shards of `objects` they hold. A peer that does not answer counts as holding nothing.
    pub async fn survey(&self, peers: Vec<PeerRecord>, objects: &[Object]) -> Holdings {
        survey(&self.node, peers, objects).await
    }

    /// A whole object, if it is here.
    pub fn held(&self, object: &ObjectId) -> Option<Bytes> {
        self.node.store.whole(object)
    }

    /// Keeps an object for as long as the store keeps `version`. False if the object is not here.
    pub fn keep_for(&self, object: &ObjectId, version: PolicyVersion) -> bool {
        self.node.store.keep_for(object, version)
    }

    /// Keeps an object for ever. False if it is not here.
    #[cfg(test)]
    pub(crate) fn pin(&self, object: &ObjectId) -> bool {
        self.node.store.pin(object)
    }

    /// The peers in the address book.
    pub(crate) fn known_peers(&self) -> Vec<PeerId> {
        self.node.address_book.borrow().keys().copied().collect()
    }

    /// The counters since the start.
    pub fn metrics(&self) -> Metrics {
        self.node.counters.snapshot()
    }

    /// Forgets the upload records of objects that the store has dropped.
    fn forget_dropped_uploads(&self) {
        self.node
            .uploads()
            .retain(|object| self.node.store.contains(object));
    }
}

#[async_trait]
impl ObjectSource for Swarm {
    async fn fetch(&self, object: &Object) -> Result<Bytes, FetchError> {
        Swarm::fetch(self, object).await
    }

    async fn offer(&self, object: &Object, bytes: Bytes) -> Result<(), StoreError> {
        Swarm::offer(self, object, bytes).await.map(drop)
    }

    fn keep_for(&self, object: &Object, version: PolicyVersion) {
        Swarm::keep_for(self, &object.id(), version);
    }

    fn uploaded_bytes(&self) -> u64 {
        self.metrics().total.bytes_uploaded
    }

    fn is_unreachable(&self, object: &Object) -> bool {
        self.node.is_unreachable(&object.id())
    }

    fn adoptions(&self) -> Adoptions {
        self.node.adoptions.clone()
    }

    fn distrust(&self, maker: PeerId, object: &Object, reason: &str) {
        let description = FalseDescription {
            object: object.id(),
            reason: reason.to_owned(),
            at: self.node.clock.now(),
        };
        tracing::warn!(maker = %maker.short(), %description, "a peer's descriptions are ignored from now on");
        self.node.counters.distrust(maker, description);
    }

    fn is_distrusted(&self, maker: &PeerId) -> bool {
        self.node.counters.is_distrusted(maker)
    }
}

#[cfg(test)]
mod tests;
