//! The fetch of one object: connects to the peers in the address book, does what the download scheduler decides, and returns
//! the whole object.
//!
//! The decisions are in [`crate::swarm::plan`]; this file has the connections and timers. Shards are stored and served to other
//! peers as soon as they are verified; a fetch that fails leaves them in the store for the next one.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use muster_protocol::id::{ContentHash, ObjectId, PeerId};
use muster_protocol::message::peer::PeerRecord;
use muster_protocol::message::version::{Content, Object};
use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, JoinSet};
use tracing::{Instrument, debug_span};

use crate::store::StoreError;
use crate::store::bitmap::Bitmap;
use crate::swarm::link::{Link, LinkError, LinkEvent, LinkId};
use crate::swarm::metrics::Ban;
use crate::swarm::node::{AddressBook, Node};
use crate::swarm::plan::{
    Action, Availability, BYTES_PER_MS_MIN, Fault, FetchPlan, Patience, PeerReply, PeerRequest,
    ShardVerdict,
};
use crate::transport::wire::{Message, RequestId};

/// Reports of all links waiting to be processed. When the queue is full, the links wait and so do their peers.
const EVENTS_MAX: usize = 256;
/// Bounds of the wait before a failed peer is dialled again; it doubles with each failure in a row.
const REDIAL_MS_MIN: u64 = 100;
const REDIAL_MS_MAX: u64 = 10_000;
/// How long no reachable peer may hold, or receive, a missing shard before the object counts as unreachable: longer than a
/// handshake and a reply take.
const UNREACHABLE_MS: u64 = 1_500;
/// Longest sleep of the loop, so that a fetch without peers notices that it has stalled.
const SLEEP_MS_MAX: u64 = 1_000;

/// Why an object was not fetched. What arrived stays in the store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FetchError {
    /// The store cannot hold the object.
    #[error("{0}")]
    Store(#[from] StoreError),
    /// No shard arrives.
    #[error("object {} has {held} of {shards} shards and none arrived for {waited_ms} ms from {peers} known peers ({last}): check that a peer which holds it can be reached", object.short())]
    Stalled {
        object: ObjectId,
        held: u32,
        shards: u32,
        waited_ms: u64,
        peers: usize,
        /// The last problem with a peer.
        last: String,
    },
    /// All shards are right, but the file's hash is not the described one.
    #[error("file object {} is intact but its content is not {expected}: its description is wrong, fetch one described by another peer", object.short())]
    WrongContent {
        object: ObjectId,
        expected: ContentHash,
    },
    /// The process is shutting down.
    #[error("fetch was stopped: start it again to go on")]
    Stopped,
}

/// Unpins a fetch's object when the fetch ends or is cancelled.
struct Pin<'a> {
    node: &'a Node,
    id: ObjectId,
}

impl Drop for Pin<'_> {
    fn drop(&mut self) {
        self.node.store.unpin(&self.id);
        self.node.mark_reachable(&self.id);
    }
}

/// Fetches the shards of an object that are not here yet, and returns the whole object.
pub(crate) async fn fetch(node: &Arc<Node>, object: &Object) -> Result<Bytes, FetchError> {
    let object = Arc::new(object.clone());
    let admitted = Arc::clone(&object);
    let id = node
        .blocking(move |store| store.admit_pinned(&admitted))
        .await?;
    let _pinned = Pin { node, id };
    let permits = node.fetch_permits(id);
    let _permit = tokio::select! {
        biased;
        () = node.shutdown.cancelled() => return Err(FetchError::Stopped),
        permit = permits.acquire() => permit,
    };
    let held = node
        .store
        .held(&id)
        .ok_or(StoreError::Unknown { object: id })?;
    if !held.is_full() {
        let span = debug_span!("fetch", object = %id.short(), version = %object.version);
        Fetch::new(node, &object, id, held)
            .run()
            .instrument(span)
            .await?;
    }
    let whole = node.blocking(move |store| store.whole(&id)).await;
    let whole = whole.ok_or(StoreError::Unknown { object: id })?;
    check_content(&object, id, &whole)?;
    Ok(whole)
}

/// Checks the hash of a whole file, which the shards' hashes do not bind.
fn check_content(object: &Object, id: ObjectId, whole: &Bytes) -> Result<(), FetchError> {
    match object.content {
        Content::File { hash } if ContentHash::of(whole) != hash => Err(FetchError::WrongContent {
            object: id,
            expected: hash,
        }),
        Content::File { .. } | Content::Anchor { .. } | Content::Delta { .. } => Ok(()),
    }
}

/// The state of dialling one entry of the address book.
#[derive(Debug, Default)]
struct Dial {
    record: Option<PeerRecord>,
    link: Option<LinkId>,
    failures: u32,
    again_at_ms: u64,
}

/// A connected peer.
struct ConnectedPeer {
    link: LinkId,
    requests: mpsc::Sender<Message>,
}

struct Fetch<'a> {
    node: &'a Arc<Node>,
    object: &'a Arc<Object>,
    id: ObjectId,
    plan: FetchPlan,
    book: watch::Receiver<AddressBook>,
    dials: BTreeMap<PeerId, Dial>,
    links: BTreeMap<LinkId, AbortHandle>,
    connected: BTreeMap<PeerId, ConnectedPeer>,
    next_link: u64,
    /// Links end with the fetch: dropping the set aborts them.
    tasks: JoinSet<()>,
    reports: mpsc::Sender<(LinkId, LinkEvent)>,
    inbox: mpsc::Receiver<(LinkId, LinkEvent)>,
    progress_at_ms: u64,
    /// When some connected peer last held, or was fetching, a missing shard.
    available_at_ms: u64,
    last_problem: String,
}

impl<'a> Fetch<'a> {
    fn new(node: &'a Arc<Node>, object: &'a Arc<Object>, id: ObjectId, held: Bitmap) -> Self {
        let (reports, inbox) = mpsc::channel(EVENTS_MAX);
        let patience = Patience {
            request_ms: node.request_ms,
        };
        Self {
            plan: FetchPlan::new(object.shard_bytes, held, patience, rand::random()),
            book: node.address_book.subscribe(),
            dials: BTreeMap::new(),
            links: BTreeMap::new(),
            connected: BTreeMap::new(),
            next_link: 0,
            tasks: JoinSet::new(),
            reports,
            inbox,
            progress_at_ms: node.now_ms(),
            available_at_ms: node.now_ms(),
            last_problem: "no peer is known".to_owned(),
            node,
            object,
            id,
        }
    }

    async fn run(mut self) -> Result<(), FetchError> {
        let shutdown = self.node.shutdown.clone();
        self.read_address_book();
        loop {
            let now_ms = self.node.now_ms();
            self.dial(now_ms);
            self.act(now_ms);
            if self.plan.is_finished() {
                return Ok(());
            }
            self.check_availability(now_ms);
            self.check_progress(now_ms)?;
            let wake_at = self.node.instant(self.wake_at_ms(now_ms));
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return Err(FetchError::Stopped),
                Ok(()) = self.book.changed() => self.read_address_book(),
                Some((link, event)) = self.inbox.recv() => self.on_event(link, event)?,
                () = tokio::time::sleep_until(wake_at) => {}
            }
            // All reports that have arrived come before the next decision.
            while let Ok((link, event)) = self.inbox.try_recv() {
                self.on_event(link, event)?;
            }
        }
    }

    fn wake_at_ms(&self, now_ms: u64) -> u64 {
        let dials = self.dials.values().filter(|dial| dial.link.is_none());
        dials
            .map(|dial| dial.again_at_ms)
            .chain(self.plan.wake_at_ms(now_ms))
            .filter(|at_ms| *at_ms > now_ms)
            .min()
            .unwrap_or(u64::MAX)
            .min(now_ms + SLEEP_MS_MAX)
    }

    /// Marks the object as unreachable if no reachable peer will bring the missing shards, so that the caller can fetch something
    /// else. A peer that claims to hold shards is believed for as long as any request may take, and a peer that is fetching too
    /// for as long as it makes progress.
    fn check_availability(&mut self, now_ms: u64) {
        let availability = self.plan.availability();
        if availability != Availability::Nowhere {
            self.available_at_ms = now_ms;
        }
        let (since_ms, patience_ms) = match availability {
            Availability::Holders => (
                self.progress_at_ms,
                self.node.request_ms + self.slowest_ms(),
            ),
            Availability::Fetchers => {
                let news_at_ms = self.plan.news_at_ms().max(self.progress_at_ms);
                (news_at_ms, UNREACHABLE_MS + self.plan.next_shard_ms())
            }
            Availability::Nowhere => (self.available_at_ms, UNREACHABLE_MS),
        };
        if now_ms.saturating_sub(since_ms) < patience_ms {
            self.node.mark_reachable(&self.id);
        } else {
            self.node.mark_unreachable(self.id);
        }
    }

    /// The time of a shard at the slowest accepted rate.
    fn slowest_ms(&self) -> u64 {
        u64::from(self.object.shard_bytes) / BYTES_PER_MS_MIN
    }

    fn check_progress(&self, now_ms: u64) -> Result<(), FetchError> {
        let waited_ms = now_ms.saturating_sub(self.progress_at_ms);
        if waited_ms < self.node.stall_ms {
            return Ok(());
        }
        Err(FetchError::Stalled {
            object: self.id,
            held: self.plan.held_count(),
            shards: crate::store::object::shard_count(self.object),
            waited_ms,
            peers: self.dials.len(),
            last: self.last_problem.clone(),
        })
    }

    /// Takes over new entries of the address book.
    fn read_address_book(&mut self) {
        let book = self.book.borrow_and_update();
        for (peer, record) in book.iter() {
            if record.handshake == self.node.identity.handshake_id() {
                continue;
            }
            let dial = self.dials.entry(*peer).or_default();
            if dial.record.as_ref() != Some(record) {
                *dial = Dial {
                    link: dial.link,
                    record: Some(record.clone()),
                    ..Dial::default()
                };
            }
        }
    }

    /// Starts links to the peers that are not connected and may be dialled now.
    fn dial(&mut self, now_ms: u64) {
        while self.tasks.try_join_next().is_some() {}
        let book = self.book.borrow();
        self.dials
            .retain(|peer, dial| dial.link.is_some() || book.contains_key(peer));
        drop(book);
        let mut due = Vec::new();
        for dial in self.dials.values_mut() {
            let is_due = dial.link.is_none() && dial.again_at_ms <= now_ms;
            let Some(record) = dial.record.as_ref().filter(|_| is_due) else {
                continue;
            };
            if self.node.counters.is_banned(&record.handshake) {
                // A ban lasts until the process ends.
                dial.again_at_ms = u64::MAX;
                continue;
            }
            let id = LinkId(self.next_link);
            self.next_link += 1;
            dial.link = Some(id);
            due.push((id, record.clone()));
        }
        for (id, record) in due {
            self.start_link(id, record);
        }
    }

    fn start_link(&mut self, id: LinkId, record: PeerRecord) {
        let link = Link {
            id,
            node: Arc::clone(self.node),
            object: Arc::clone(self.object),
            object_id: self.id,
            record,
            events: self.reports.clone(),
        };
        self.links
            .insert(id, self.tasks.spawn(link.run().in_current_span()));
    }

    fn act(&mut self, now_ms: u64) {
        for action in self.plan.decide(now_ms) {
            match action {
                Action::Send { peer, id, request } => self.send(&peer, id, request),
                Action::Disconnect { peer, fault } => self.disconnect(peer, &fault),
            }
        }
    }

    fn send(&self, peer: &PeerId, id: RequestId, request: PeerRequest) {
        let object = self.id;
        let message = match request {
            PeerRequest::Have => Message::Have {
                request: id,
                object,
            },
            PeerRequest::Shard(shard) => Message::Want {
                request: id,
                object,
                shard,
            },
            PeerRequest::AnyBut(except) => Message::WantAny {
                request: id,
                object,
                except: except.as_bytes().to_vec(),
            },
        };
        let connected = self.connected.get(peer);
        debug_assert!(connected.is_some(), "requests go to connected peers");
        // The queue is full or closed only if the link has ended, which its last report will say.
        if connected.is_some_and(|connected| connected.requests.try_send(message).is_err()) {
            tracing::trace!(peer = %peer.short(), "request not sent: the link has ended");
        }
    }

    fn disconnect(&mut self, peer: PeerId, fault: &Fault) {
        tracing::debug!(peer = %peer.short(), %fault, "peer disconnected");
        if let Fault::BadShard { shard } = fault {
            let ban = Ban {
                object: self.id,
                shard: *shard,
                at: self.node.clock.now(),
            };
            tracing::warn!(peer = %peer.short(), %ban, "peer banned");
            self.node.counters.ban(peer, ban);
        }
        let Some(connected) = self.connected.remove(&peer) else {
            return;
        };
        self.end_link(connected.link, format!("peer {} {fault}", peer.short()));
    }

    fn on_event(&mut self, link: LinkId, event: LinkEvent) -> Result<(), FetchError> {
        let now_ms = self.node.now_ms();
        match event {
            LinkEvent::NotStored(error) => return Err(error.into()),
            _ if !self.links.contains_key(&link) => {}
            LinkEvent::Up { peer, requests } => {
                self.on_up(peer, ConnectedPeer { link, requests }, now_ms);
            }
            LinkEvent::Reply(reply) => self.on_reply(link, reply, now_ms),
            LinkEvent::Down(error) => self.on_down(link, &error),
        }
        Ok(())
    }

    fn on_up(&mut self, peer: PeerId, connected: ConnectedPeer, now_ms: u64) {
        // Two entries of the address book may lead to one peer: one connection is enough.
        if self.plan.add_source(peer, now_ms) {
            self.connected.insert(peer, connected);
        } else {
            let problem = format!("peer {} is connected already", peer.short());
            self.end_link(connected.link, problem);
        }
    }

    fn on_reply(&mut self, link: LinkId, reply: PeerReply, now_ms: u64) {
        let Some(peer) = self.peer_of(link) else {
            return;
        };
        if let PeerReply::Shard {
            verdict: ShardVerdict::Good,
            ..
        } = reply
        {
            self.progress_at_ms = now_ms;
            let dials = self.dials.values_mut();
            dials
                .filter(|dial| dial.link == Some(link))
                .for_each(|dial| dial.failures = 0);
        }
        self.plan.on_reply(peer, reply, now_ms);
    }

    fn on_down(&mut self, link: LinkId, error: &LinkError) {
        if let Some(peer) = self.peer_of(link) {
            self.connected.remove(&peer);
            self.plan.remove_source(&peer);
        }
        self.end_link(link, format!("peer {error}"));
    }

    fn peer_of(&self, link: LinkId) -> Option<PeerId> {
        let mut connected = self.connected.iter();
        let (peer, _) = connected.find(|(_, connected)| connected.link == link)?;
        Some(*peer)
    }

    fn end_link(&mut self, link: LinkId, problem: String) {
        if let Some(task) = self.links.remove(&link) {
            task.abort();
        }
        let now_ms = self.node.now_ms();
        for dial in self
            .dials
            .values_mut()
            .filter(|dial| dial.link == Some(link))
        {
            dial.link = None;
            let wait_ms = REDIAL_MS_MIN << dial.failures.min(16);
            dial.failures += 1;
            dial.again_at_ms = now_ms + wait_ms.min(REDIAL_MS_MAX);
        }
        self.last_problem = problem;
    }
}
