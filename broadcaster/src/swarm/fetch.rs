//! The fetch of one object: connects to the peers that are known, as they become known, does what the plan decides, and
//! hands out the whole.
//!
//! The decisions are in [`crate::swarm::plan`]; here are sockets, timers and the book of peers. Shards are kept and served to
//! others from the moment they are verified; a fetch that fails leaves them in the store for the next one.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use muster_protocol::id::{ContentHash, ObjectId, PeerId};
use muster_protocol::message::peer::PeerRecord;
use muster_protocol::message::version::{Content, Object};
use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, JoinSet};

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

/// Reports of all links waiting to be looked at; a link waits when there is no room, and its peer with it.
const EVENTS_MAX: usize = 256;
/// Wait before a peer that could not be reached is tried again; doubles with each failure in a row.
const REDIAL_MS_MIN: u64 = 100;
const REDIAL_MS_MAX: u64 = 10_000;
/// How long nobody within reach may hold what is missing, or come by it, before the object counts as unreachable: longer than
/// a handshake and an answer take.
const UNREACHABLE_MS: u64 = 1_500;
/// Longest sleep of the loop: a fetch without peers looks at its own patience this often.
const SLEEP_MS_MAX: u64 = 1_000;

/// Why an object was not fetched. What arrived stays in the store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FetchError {
    /// The object cannot be kept.
    #[error("{0}")]
    Store(#[from] StoreError),
    /// Nothing arrives.
    #[error("object {} has {held} of {shards} shards and none arrived for {waited_ms} ms from {peers} known peers ({last}): check that a peer which holds it can be reached", object.short())]
    Stalled {
        /// Which object.
        object: ObjectId,
        /// Shards that are here.
        held: u32,
        /// Shards in all.
        shards: u32,
        /// How long nothing came.
        waited_ms: u64,
        /// Peers known.
        peers: usize,
        /// What went wrong last.
        last: String,
    },
    /// It arrived, and it is not what its description says that it holds.
    #[error("file object {} is intact but its content is not {expected}: its description is wrong, fetch one described by another peer", object.short())]
    WrongContent {
        /// Which object.
        object: ObjectId,
        /// What the description promised.
        expected: ContentHash,
    },
    /// The process is ending.
    #[error("fetch was stopped: start it again to go on")]
    Stopped,
}

/// Takes a fetch's pin off its object when the fetch ends, however it ends.
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

/// Fetches an object, or what of it is not here yet.
pub(crate) async fn fetch(node: &Arc<Node>, object: &Object) -> Result<Bytes, FetchError> {
    let object = Arc::new(object.clone());
    let admitted = Arc::clone(&object);
    let id = node
        .blocking(move |store| store.admit_pinned(&admitted))
        .await?;
    let _pinned = Pin { node, id };
    let gate = node.fetch_permits(id);
    let _turn = tokio::select! {
        biased;
        () = node.shutdown.cancelled() => return Err(FetchError::Stopped),
        turn = gate.acquire() => turn,
    };
    let held = node
        .store
        .held(&id)
        .ok_or(StoreError::Unknown { object: id })?;
    if !held.is_full() {
        Fetch::new(node, &object, id, held).run().await?;
    }
    let whole = node.blocking(move |store| store.whole(&id)).await;
    let whole = whole.ok_or(StoreError::Unknown { object: id })?;
    check_content(&object, id, &whole)?;
    Ok(whole)
}

/// A file's description promises a hash of the whole, which its shards do not bind.
fn check_content(object: &Object, id: ObjectId, whole: &Bytes) -> Result<(), FetchError> {
    match object.content {
        Content::File { hash } if ContentHash::of(whole) != hash => Err(FetchError::WrongContent {
            object: id,
            expected: hash,
        }),
        Content::File { .. } | Content::Anchor { .. } | Content::Delta { .. } => Ok(()),
    }
}

/// What is known about reaching one entry of the book.
#[derive(Debug, Default)]
struct Dial {
    record: Option<PeerRecord>,
    link: Option<LinkId>,
    failures: u32,
    again_at_ms: u64,
}

/// A peer that can be asked.
struct Partner {
    link: LinkId,
    asks: mpsc::Sender<Message>,
}

struct Fetch<'a> {
    node: &'a Arc<Node>,
    object: &'a Arc<Object>,
    id: ObjectId,
    plan: FetchPlan,
    book: watch::Receiver<AddressBook>,
    dials: BTreeMap<PeerId, Dial>,
    links: BTreeMap<LinkId, AbortHandle>,
    partners: BTreeMap<PeerId, Partner>,
    next_link: u64,
    /// Links end with the fetch: dropping the set aborts them.
    tasks: JoinSet<()>,
    reports: mpsc::Sender<(LinkId, LinkEvent)>,
    inbox: mpsc::Receiver<(LinkId, LinkEvent)>,
    progress_at_ms: u64,
    /// When some peer last had, or was fetching, what is missing.
    hope_at_ms: u64,
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
            partners: BTreeMap::new(),
            next_link: 0,
            tasks: JoinSet::new(),
            reports,
            inbox,
            progress_at_ms: node.now_ms(),
            hope_at_ms: node.now_ms(),
            last_problem: "no peer is known".to_owned(),
            node,
            object,
            id,
        }
    }

    async fn run(mut self) -> Result<(), FetchError> {
        let shutdown = self.node.shutdown.clone();
        self.read_book();
        loop {
            let now_ms = self.node.now_ms();
            self.dial(now_ms);
            self.act(now_ms);
            if self.plan.is_finished() {
                return Ok(());
            }
            self.check_hope(now_ms);
            self.check_progress(now_ms)?;
            let wake_at = self.node.instant(self.wake_at_ms(now_ms));
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return Err(FetchError::Stopped),
                Ok(()) = self.book.changed() => self.read_book(),
                Some((link, event)) = self.inbox.recv() => self.on_event(link, event)?,
                () = tokio::time::sleep_until(wake_at) => {}
            }
            // What else has arrived is taken in before the next decision.
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

    /// Says so when nobody within reach will bring what is missing: whoever waits may have something better to fetch. Peers
    /// that only promise are believed as long as any request may take, and peers that fetch too while they get on.
    fn check_hope(&mut self, now_ms: u64) {
        let hope = self.plan.hope();
        if hope != Availability::Nobody {
            self.hope_at_ms = now_ms;
        }
        let (since_ms, patience_ms) = match hope {
            Availability::Holders => (
                self.progress_at_ms,
                self.node.request_ms + self.slowest_ms(),
            ),
            Availability::Fetchers => {
                let news_at_ms = self.plan.news_at_ms().max(self.progress_at_ms);
                (news_at_ms, UNREACHABLE_MS + self.plan.next_shard_ms())
            }
            Availability::Nobody => (self.hope_at_ms, UNREACHABLE_MS),
        };
        if now_ms.saturating_sub(since_ms) < patience_ms {
            self.node.mark_reachable(&self.id);
        } else {
            self.node.mark_unreachable(self.id);
        }
    }

    /// How long a shard takes on the slowest link that is waited for.
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

    /// Takes over what is new in the book.
    fn read_book(&mut self) {
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

    /// Connects to whoever is in the book and not connected.
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
                // A ban lasts as long as the process.
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
        self.links.insert(id, self.tasks.spawn(link.run()));
    }

    fn act(&mut self, now_ms: u64) {
        for action in self.plan.decide(now_ms) {
            match action {
                Action::PeerRequest {
                    source,
                    request,
                    ask,
                } => self.ask(source, request, ask),
                Action::Drop { source, fault } => self.drop_partner(source, &fault),
            }
        }
    }

    fn ask(&mut self, source: PeerId, request: RequestId, ask: PeerRequest) {
        let object = self.id;
        let message = match ask {
            PeerRequest::Have => Message::Have { request, object },
            PeerRequest::Shard(shard) => Message::Want {
                request,
                object,
                shard,
            },
            PeerRequest::AnyBut(except) => Message::WantAny {
                request,
                object,
                except: except.as_bytes().to_vec(),
            },
        };
        let Some(partner) = self.partners.get(&source) else {
            return;
        };
        // A link that takes no more requests than a plan has in flight has ended, or is about to say so.
        if partner.asks.try_send(message).is_err() {
            tracing::trace!(source = %source.short(), "request not taken");
        }
    }

    fn drop_partner(&mut self, source: PeerId, fault: &Fault) {
        tracing::debug!(source = %source.short(), object = %self.id.short(), %fault, "peer dropped");
        if let Fault::BadShard { shard } = fault {
            let ban = Ban {
                object: self.id,
                shard: *shard,
                at: self.node.clock.now(),
            };
            tracing::warn!(source = %source.short(), %ban, "peer banned");
            self.node.counters.ban(source, ban);
        }
        let Some(partner) = self.partners.remove(&source) else {
            return;
        };
        self.end_link(partner.link, format!("peer {} {fault}", source.short()));
    }

    fn on_event(&mut self, link: LinkId, event: LinkEvent) -> Result<(), FetchError> {
        let now_ms = self.node.now_ms();
        match event {
            LinkEvent::Unkept(error) => return Err(error.into()),
            _ if !self.links.contains_key(&link) => {}
            LinkEvent::Up { source, asks } => self.on_up(link, source, asks, now_ms),
            LinkEvent::PeerReply(answer) => self.on_answer(link, answer, now_ms),
            LinkEvent::Down(error) => self.on_down(link, &error),
        }
        Ok(())
    }

    fn on_up(&mut self, link: LinkId, source: PeerId, asks: mpsc::Sender<Message>, now_ms: u64) {
        // Two entries of the book may lead to one peer: one connection is enough.
        if self.plan.add_source(source, now_ms) {
            self.partners.insert(source, Partner { link, asks });
        } else {
            self.end_link(
                link,
                format!("peer {} is connected already", source.short()),
            );
        }
    }

    fn on_answer(&mut self, link: LinkId, answer: PeerReply, now_ms: u64) {
        let source = self
            .partners
            .iter()
            .find(|(_, partner)| partner.link == link);
        let Some(source) = source.map(|(source, _)| *source) else {
            return;
        };
        if let PeerReply::Shard {
            verdict: ShardVerdict::Good,
            ..
        } = answer
        {
            self.progress_at_ms = now_ms;
            for dial in self
                .dials
                .values_mut()
                .filter(|dial| dial.link == Some(link))
            {
                dial.failures = 0;
            }
        }
        self.plan.on_answer(source, answer, now_ms);
    }

    fn on_down(&mut self, link: LinkId, error: &LinkError) {
        let source = self
            .partners
            .iter()
            .find(|(_, partner)| partner.link == link);
        if let Some(source) = source.map(|(source, _)| *source) {
            self.partners.remove(&source);
            self.plan.remove_source(&source);
        }
        self.end_link(link, format!("peer {error}"));
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
