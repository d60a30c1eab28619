//! The public face of the broadcaster: one peer that offers what it has, fetches what it lacks, and serves both.
//!
//! A [`Swarm`] is a cheap handle; its server runs on the caller's task tracker until the shutdown. Who the other peers are
//! is told from outside ([`Swarm::meet`]), from records that those peers have signed. What is fetched is verified shard by
//! shard against its description; whether the description leads to a version that the learner signed is for
//! [`crate::state`] to say.

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

use crate::squash::SquashConfig;
use crate::store::{Store, StoreConfig, StoreError};
use crate::swarm::metrics::{FalseDescription, Stats};
use crate::swarm::node::{Node, NodeParts, on_blocking_thread};
use crate::swarm::server::Server;
use crate::swarm::survey::{Holdings, survey};
use crate::swarm::uploads::{Sharing, Uploads};
use crate::transport::Transports;
use crate::transport::interface::Transport;
use crate::transport::nat::{self, NatConfig, NatError};
use crate::transport::tcp::Tcp;
use crate::transport::wire::Chooser;

pub use crate::swarm::fetch::FetchError;
pub use crate::swarm::source::ObjectSource;

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

/// How a peer takes part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SwarmConfig {
    /// Where to listen. Loopback and any free port by default: to be reached from elsewhere is a decision.
    pub listen: SocketAddr,
    /// `host:port` under which others reach this peer. By default what it listens on, unless that is every interface.
    pub advertise: Vec<String>,
    /// Most bytes of shards uploaded per second, of all connections; no limit by default.
    pub upload_bytes_per_second: Option<NonZeroU64>,
    /// How freely shards are given; on demand by default.
    pub sharing: Sharing,
    /// Most connections accepted at once. 256: each costs a socket and the kernel's buffers, about 100 MB in all.
    pub connections_max: NonZeroU32,
    /// A fetch fails when nothing arrived for this long. 60 s: longer than any peer may make others wait.
    pub stall_ms: NonZeroU64,
    /// How long one request may take, besides the time that its bytes need. 10 s: some round trips of the worst link.
    pub request_ms: NonZeroU64,
    /// How it is reached behind a home router; not at all by default. Needs a build with the feature `nat`.
    pub nat: Option<NatConfig>,
    /// How much is kept, and where.
    pub store: StoreConfig,
    /// How much is lent to squashed deltas.
    pub squash: SquashConfig,
}

impl Default for SwarmConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            advertise: Vec::new(),
            upload_bytes_per_second: None,
            sharing: Sharing::default(),
            connections_max: NonZeroU32::MIN.saturating_add(255),
            stall_ms: NonZeroU64::MIN.saturating_add(59_999),
            request_ms: NonZeroU64::MIN.saturating_add(9_999),
            nat: None,
            store: StoreConfig::default(),
            squash: SquashConfig::default(),
        }
    }
}

/// Why a peer could not be started.
#[derive(Debug, thiserror::Error)]
pub enum SwarmError {
    /// The address is taken or not ours.
    #[error(
        "cannot listen on {address} ({source}): choose another address, or port 0 for any free one"
    )]
    Listen {
        /// Which.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// The way through routers could not be opened.
    #[error("{0}")]
    Nat(#[from] NatError),
    /// What others would be told about us breaks a rule.
    #[error("own peer record is not valid ({0}): change `advertise`")]
    Record(#[from] Invalid),
    /// The store could not be opened.
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
        // TCP first: the system sends and paces it, and nobody relays it. Who is behind a router announces no TCP address.
        let mut ways: Vec<Arc<dyn Transport>> = vec![Arc::new(tcp)];
        if let Some(config) = &config.nat {
            ways.push(nat::transport(config, &identity).await?);
        }
        let transports = Transports::new(ways);
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
        for way in transports.iter() {
            tracker.spawn(Arc::clone(&server).run(Arc::clone(way), tracker.clone()));
        }
        let swarm = Self { node, address };
        swarm.peer_record().validate()?;
        Ok(swarm)
    }

    /// Where this peer listens, the port chosen.
    pub fn local_address(&self) -> SocketAddr {
        self.address
    }

    /// What to sign and tell others, so that they can reach this peer. Without an address when it listens on every
    /// interface and was not told under which name it is known: it can fetch then, and nobody can dial it.
    pub fn peer_record(&self) -> PeerRecord {
        let addresses = self.node.transports.iter().map(|way| way.addresses());
        PeerRecord {
            handshake: self.node.identity.handshake_id(),
            addresses: addresses.flatten().collect(),
            issued: self.node.clock.now(),
        }
    }

    /// Offers a whole object to the swarm. Verifies it first, on a thread that may block.
    ///
    /// # Errors
    /// When the bytes are not the object, there is no room, or the disk fails.
    pub async fn offer(&self, object: &Object, bytes: Bytes) -> Result<ObjectId, StoreError> {
        let object = object.clone();
        let offered = self
            .node
            .blocking(move |store| store.offer(&object, bytes))
            .await;
        self.forget_dropped();
        offered
    }

    /// Learns where a peer can be reached. `peer` has signed `record`. A newer record replaces an older one; a fetch in
    /// progress uses it at once. When the book is full the record said longest ago goes.
    pub fn meet(&self, peer: PeerId, record: PeerRecord) {
        self.node.book.send_if_modified(|book| {
            let known = book.get(&peer);
            if known.is_some_and(|known| known.issued >= record.issued) {
                return false;
            }
            if known.is_none() && book.len() >= PEERS_MAX {
                let oldest = book.iter().min_by_key(|(_, record)| record.issued);
                oldest.map(|(peer, _)| *peer).map(|peer| book.remove(&peer));
            }
            book.insert(peer, record);
            true
        });
    }

    /// Returns when a fetch finds that nobody within reach holds its object: it is time to look for other peers.
    ///
    /// # Cancel safety
    /// A cancelled call misses nothing.
    pub async fn peers_wanted(&self) {
        self.node.peers_wanted.notified().await;
    }

    /// Forgets where a peer can be reached.
    pub fn part(&self, peer: &PeerId) {
        self.node
            .book
            .send_if_modified(|book| book.remove(peer).is_some());
    }

    /// Fetches an object from the peers that are known, or become known meanwhile. The caller has checked that its version
    /// is one that the learner signed. Two fetches of one object share the work.
    ///
    /// # Cancel safety
    /// Safe: what arrived is in the store, and the next fetch goes on with it.
    ///
    /// # Errors
    /// When nothing arrives any more, or what arrives cannot be kept.
    pub async fn fetch(&self, object: &Object) -> Result<Bytes, FetchError> {
        let fetched = Box::pin(fetch::fetch(&self.node, object)).await;
        self.forget_dropped();
        fetched
    }

    /// Asks `peers`, all at once, which shards of `objects` they hold. Whoever does not answer holds nothing.
    pub async fn survey(&self, peers: Vec<PeerRecord>, objects: &[Object]) -> Holdings {
        survey(&self.node, peers, objects).await
    }

    /// A whole object, if it is here.
    pub fn held(&self, object: &ObjectId) -> Option<Bytes> {
        self.node.store.whole(object)
    }

    /// Says that `version` needs an object, which is then kept as long as that version is. False when it is not here.
    pub fn keep_for(&self, object: &ObjectId, version: PolicyVersion) -> bool {
        self.node.store.keep_for(object, version)
    }

    /// Keeps an object whatever comes, until [`Self::unpin`]. False when it is not here.
    pub fn pin(&self, object: &ObjectId) -> bool {
        self.node.store.pin(object)
    }

    /// Lets an object go when room is needed.
    pub fn unpin(&self, object: &ObjectId) {
        self.node.store.unpin(object);
    }

    /// The members whose addresses are known.
    pub fn known(&self) -> Vec<PeerId> {
        self.node.book.borrow().keys().copied().collect()
    }

    /// What went in and out, and who was banned.
    pub fn stats(&self) -> Stats {
        self.node.meter.stats()
    }

    /// What was sent of objects that are gone is of no more use.
    fn forget_dropped(&self) {
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

    fn is_unreachable(&self, object: &Object) -> bool {
        self.node.is_unreachable(&object.id())
    }

    fn distrust(&self, maker: PeerId, object: &Object, reason: &str) {
        let strike = FalseDescription {
            object: object.id(),
            reason: reason.to_owned(),
            at: self.node.clock.now(),
        };
        tracing::warn!(maker = %maker.short(), %strike, "member struck");
        self.node.meter.distrust(maker, strike);
    }

    fn is_distrusted(&self, maker: &PeerId) -> bool {
        self.node.meter.is_distrusted(maker)
    }
}

#[cfg(test)]
mod tests;
