//! Dispatch on the bus: opens what comes in, asks the decisions of [`crate::state`], makes their consequences durable, answers.
//!
//! One task owns all state. The order in every handler is: make durable, then acknowledge what it replaces, then answer.
//! So a kill at any instant loses nothing: whatever was not acknowledged is handed out again and decided again, and
//! everything stored is stored under a key.

mod flush;
mod logs;
mod lookups;
mod outgoing;
mod queues;
mod requests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use muster_protocol::bus::{BusError, Delivery, Request, Requests, SharedBus, Subscription};
use muster_protocol::clock::SharedClock;
use muster_protocol::credentials::Roster;
use muster_protocol::envelope::{EnvelopeError, Signed, Statement, open, seal};
use muster_protocol::id::{
    ContentHash, DescriptorHash, GroupHash, LeaseId, PeerId, RunId, TicketId, UnixMillis,
};
use muster_protocol::identity::Identity;
use muster_protocol::message::control::{ControlEvent, ControlState};
use muster_protocol::message::descriptor::{Descriptor, descriptor_hash};
use muster_protocol::message::group::Group;
use muster_protocol::message::lease::Lease;
use muster_protocol::message::ticket::Ticket;
use muster_protocol::message::version::{Announcement, VersionRef};
use muster_protocol::subject::{Log, Queue, Role, Subjects};

use crate::metrics::Metrics;
use crate::prompts::PromptSource;
use crate::squashed::SquashedDeltas;
use crate::state::{Dispatch, DispatchConfig};
use outgoing::Outgoing;

/// How often dispatch looks for leases that ran out, tickets to issue and new records of logs.
const TICK: Duration = Duration::from_millis(100);
/// Held messages are renewed this often, well within the queues' wait.
const RENEW: Duration = Duration::from_secs(60);
/// Messages taken from a queue or read from a log at once.
const CHUNK: usize = 256;
/// Requests decided together: time and news are looked at in between.
const BURST_MAX: usize = 64;
/// Receipts and accepted leases remembered: the newest ones.
const REMEMBERED_MAX: usize = 65_536;
/// A peer that has not asked for this long is no longer named to others.
const PEER_MS: u64 = 60_000;
/// Announcements kept for members that join late or ask for one by number.
const ANNOUNCEMENTS_KEPT: usize = 64;

/// Why dispatch ended.
#[derive(Debug, thiserror::Error)]
pub enum DispatchError {
    /// The bus failed in a way that waiting does not mend.
    #[error("dispatch lost its bus: {0}")]
    Bus(#[from] BusError),
    /// A message of its own could not be made.
    #[error("dispatch could not write a message: {0}")]
    Envelope(#[from] EnvelopeError),
    /// A later start has taken over.
    #[error("another dispatch has started for this run, so this one stops")]
    Replaced,
    /// The run's descriptor is not this learner's or this dispatch's.
    #[error("the run's descriptor {0}")]
    Descriptor(String),
}

/// What dispatch needs to start.
pub struct DispatchParts {
    /// Connection under dispatch's credentials.
    pub bus: SharedBus,
    pub identity: Identity,
    pub run: RunId,
    /// The key that signs descriptors and versions.
    pub learner: PeerId,
    /// The lab's members.
    pub roster: Roster,
    pub prompts: Arc<dyn PromptSource>,
    pub clock: SharedClock,
    /// Steps, bounds, audits.
    pub settings: DispatchSettings,
    /// Secret randomness, from which nonces and audits are drawn.
    pub secret: [u8; 32],
}

/// The part of the configuration that dispatch reads; the rest is in the run's descriptor.
#[derive(Debug, Clone, Copy)]
pub struct DispatchSettings {
    /// Groups per batch.
    pub batch_groups: u64,
    pub steps: u64,
    /// How long a ticket may stay unanswered, in milliseconds.
    pub ticket_ms: u64,
    /// How long a worker may take over a lease, in milliseconds.
    pub lease_ms: u64,
    /// How often groups are re-checked.
    pub audit: crate::audit::AuditConfig,
    /// How groups are judged.
    pub critique: crate::reviews::CritiqueConfig,
    /// When members are paused.
    pub conduct: crate::conduct::ConductConfig,
}

/// A group with the lease that it answers, opened.
struct Submission {
    lease: Signed<Lease>,
    group: Signed<Group>,
    /// Whether the group was drawn for an audit.
    audit: bool,
}

struct KnownPeer {
    record: Bytes,
    seen: UnixMillis,
}

/// Values by lease; the oldest entries are forgotten.
struct RecentLeases<V> {
    order: VecDeque<LeaseId>,
    entries: BTreeMap<LeaseId, V>,
}

impl<V> RecentLeases<V> {
    fn new() -> Self {
        Self {
            order: VecDeque::new(),
            entries: BTreeMap::new(),
        }
    }

    fn insert(&mut self, lease: LeaseId, value: V) {
        if self.entries.insert(lease, value).is_none() {
            self.order.push_back(lease);
        }
        if self.order.len() > REMEMBERED_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.entries.remove(&oldest);
        }
    }
}

/// Dispatch with its connections to the bus; [`Self::run`] serves requests.
pub struct DispatchService {
    bus: SharedBus,
    identity: Identity,
    run: RunId,
    learner: PeerId,
    roster: Roster,
    prompts: Arc<dyn PromptSource>,
    clock: SharedClock,
    settings: DispatchSettings,
    subjects: Subjects,
    descriptor: Signed<Descriptor>,
    core: Dispatch,
    control: ControlState,
    generation: u64,
    nonces: NonceSource,
    metrics: Metrics,
    sequence: u64,
    tickets: BTreeMap<TicketId, Delivery>,
    intake: BTreeMap<TicketId, (GroupHash, Delivery)>,
    /// Taken from the intake queue and not looked at yet: at most one chunk.
    arrived: VecDeque<Delivery>,
    /// Groups of the current burst, opened when they were submitted, by the hash of their message in the intake queue. At
    /// most [`BURST_MAX`].
    opened: BTreeMap<ContentHash, Submission>,
    /// Tickets that were issued and not taken from their queue yet, by the hash of their message. Emptied once the queue was
    /// read.
    issued: BTreeMap<ContentHash, Ticket>,
    /// At most one entry for every ticket that has not ended, and one for every group that came too late meanwhile.
    outgoing: VecDeque<Outgoing>,
    accepted: RecentLeases<GroupHash>,
    receipts: RecentLeases<Bytes>,
    announcements: VecDeque<(VersionRef, Announcement)>,
    peers: BTreeMap<PeerId, KnownPeer>,
    squashed: SquashedDeltas,
    fated: BTreeSet<TicketId>,
    read: BTreeMap<Log, u64>,
    renewed: UnixMillis,
}

/// Unpredictable nonces from dispatch's secret: BLAKE3 in extendable-output mode.
struct NonceSource {
    output: blake3::OutputReader,
}

impl NonceSource {
    fn new(secret: &[u8; 32], generation: u64) -> Self {
        let mut hasher = blake3::Hasher::new_keyed(secret);
        hasher.update(b"muster-nonce-v1\0");
        hasher.update(&generation.to_le_bytes());
        Self {
            output: hasher.finalize_xof(),
        }
    }

    fn next(&mut self) -> [u8; 32] {
        let mut nonce = [0; 32];
        self.output.fill(&mut nonce);
        nonce
    }
}

/// Waits until the run has been opened, and returns its state with the descriptor.
async fn opened(bus: &SharedBus, run: &RunId) -> Result<ControlState, DispatchError> {
    loop {
        let mut state = ControlState::default();
        let mut after = 0;
        loop {
            let records = bus.read(Log::Control, after, CHUNK).await?;
            let Some(last) = records.last() else { break };
            after = last.sequence;
            for record in records {
                if let Ok(event) = open::<ControlEvent>(record.payload, run) {
                    state.apply(record.sequence, event.body);
                }
            }
        }
        if !state.descriptor.is_empty() {
            return Ok(state);
        }
        tokio::time::sleep(TICK).await;
    }
}

impl DispatchService {
    /// Starts dispatch: takes its generation, waits for the run's descriptor, and restores what an earlier dispatch left.
    ///
    /// # Errors
    /// When the bus refuses, or the descriptor is not one to serve.
    pub async fn start(parts: DispatchParts) -> Result<Self, DispatchError> {
        let DispatchParts {
            bus,
            identity,
            run,
            learner,
            roster,
            prompts,
            clock,
            settings,
            secret,
        } = parts;
        bus.create_streams().await?;
        let started = seal(
            &identity,
            &run,
            0,
            ControlEvent::Started {
                role: Role::Dispatch,
            },
        )?;
        let key = format!("s-{}-{}", identity.peer_id().short(), clock.now());
        let generation = bus
            .append(Log::Control, &key, None, started.bytes)
            .await?
            .sequence();
        let control = opened(&bus, &run).await?;
        let descriptor = open::<Descriptor>(control.descriptor.clone().into(), &run)?;
        if descriptor.author != learner || descriptor.body.dispatch != identity.peer_id() {
            let problem = "is signed by another learner or names another dispatch".to_owned();
            return Err(DispatchError::Descriptor(problem));
        }
        let core = Dispatch::new(
            core_config(&run, &settings, &descriptor.body),
            generation,
            secret,
        );
        let subjects = Subjects::of(&run);
        let nonces = NonceSource::new(&secret, generation);
        let renewed = clock.now();
        let mut service = Self {
            bus,
            identity,
            run,
            learner,
            roster,
            prompts,
            clock,
            settings,
            subjects,
            descriptor,
            core,
            control: ControlState::default(),
            generation,
            nonces,
            metrics: Metrics::default(),
            sequence: 0,
            tickets: BTreeMap::new(),
            intake: BTreeMap::new(),
            arrived: VecDeque::new(),
            opened: BTreeMap::new(),
            issued: BTreeMap::new(),
            outgoing: VecDeque::new(),
            accepted: RecentLeases::new(),
            receipts: RecentLeases::new(),
            announcements: VecDeque::new(),
            peers: BTreeMap::new(),
            squashed: SquashedDeltas::default(),
            fated: BTreeSet::new(),
            read: BTreeMap::new(),
            renewed,
        };
        service.restore().await?;
        Ok(service)
    }

    async fn restore(&mut self) -> Result<(), DispatchError> {
        self.bus.reclaim(Queue::Tickets).await?;
        self.bus.reclaim(Queue::Intake).await?;
        self.core
            .restore_issued(self.bus.queue_state(Queue::Tickets).await?.last_sequence);
        self.read_logs().await?;
        while self.take_intake().await? > 0 {}
        self.take_tickets().await?;
        let (open, in_review) = (self.core.tickets().len(), self.core.reviews().len());
        info!(
            generation = self.generation,
            open, in_review, "dispatch started"
        );
        Ok(())
    }

    /// Lets these workers change weights in mid-answer: see [`Dispatch::trust`].
    #[must_use]
    pub fn trusting(mut self, workers: BTreeSet<PeerId>) -> Self {
        self.core.trust(workers);
        self
    }

    /// Serves until `shutdown`, or until a later dispatch takes over.
    ///
    /// # Errors
    /// When the bus is gone for good, or another dispatch has started.
    pub async fn run(mut self, shutdown: CancellationToken) -> Result<(), DispatchError> {
        let mut requests = self.bus.serve(&self.subjects.all_asks()).await?;
        let mut news = self.bus.subscribe(&self.subjects.all_news()).await?;
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let done = match next_event(&shutdown, &mut requests, &mut news, &mut ticks).await {
                Event::Shutdown => {
                    info!(metrics = ?self.metrics, "dispatch stops");
                    return Ok(());
                }
                Event::Request(first) => self.on_requests(burst(first, &mut requests)).await,
                Event::Tick => self.on_tick().await,
            };
            match done {
                Ok(()) => {}
                Err(DispatchError::Bus(error)) if error.is_transient() => {
                    warn!(%error, "the bus did not answer: trying again");
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn on_tick(&mut self) -> Result<(), DispatchError> {
        self.read_logs().await?;
        let now = self.clock.now();
        for record in self.core.tick(now) {
            self.end_ticket(record)?;
        }
        for record in self.core.superseded() {
            self.end_ticket(record)?;
        }
        for record in self.core.overdue_reviews(now) {
            self.end_ticket(record)?;
        }
        self.flush().await?;
        self.take_intake().await?;
        self.issue_tickets().await?;
        self.peers.retain(|_, peer| peer.seen.0 + PEER_MS > now.0);
        if now.0 >= self.renewed.0 + RENEW.as_millis() as u64 {
            self.renewed = now;
            info!(metrics = ?self.metrics, "dispatch counted");
            self.renew().await?;
        }
        Ok(())
    }

    /// Renews what is held, and lets go of what is not needed any more where an earlier attempt was not confirmed.
    async fn renew(&mut self) -> Result<(), DispatchError> {
        let held = self.tickets.keys().chain(self.intake.keys()).copied();
        let settled: Vec<TicketId> = held
            .filter(|ticket| self.core.is_settled(*ticket))
            .collect();
        self.release(&settled).await;
        let intake = self.intake.values().map(|(_, delivery)| delivery);
        for delivery in self.tickets.values().chain(intake) {
            delivery.renew().await?;
        }
        Ok(())
    }

    fn descriptor_hash(&self) -> DescriptorHash {
        descriptor_hash(&self.descriptor.bytes)
    }

    fn seal<T: Statement>(&mut self, body: T) -> Result<Signed<T>, EnvelopeError> {
        self.sequence += 1;
        seal(&self.identity, &self.run, self.sequence, body)
    }
}

/// The requests that are here already, this one first.
fn burst(first: Request, requests: &mut Requests) -> Vec<Request> {
    let mut burst = vec![first];
    while burst.len() < BURST_MAX
        && let Some(request) = requests.try_next()
    {
        burst.push(request);
    }
    burst
}

enum Event {
    Shutdown,
    Request(Request),
    Tick,
}

/// What comes next. News and ticks are both a reason to look at the logs.
///
/// # Cancel safety
/// Nothing is lost: each source keeps what it has.
async fn next_event(
    shutdown: &CancellationToken,
    requests: &mut Requests,
    news: &mut Subscription,
    ticks: &mut tokio::time::Interval,
) -> Event {
    tokio::select! {
        biased; // shutdown first; ticks before requests, so that a flood of requests cannot stop time
        () = shutdown.cancelled() => Event::Shutdown,
        _ = ticks.tick() => Event::Tick,
        Some(_) = news.next() => Event::Tick,
        Some(request) = requests.next() => Event::Request(request),
        else => Event::Shutdown,
    }
}

fn core_config(
    run: &RunId,
    settings: &DispatchSettings,
    descriptor: &Descriptor,
) -> DispatchConfig {
    DispatchConfig {
        run: run.clone(),
        budget: crate::tickets::Budget {
            batch_groups: settings.batch_groups,
            async_level: descriptor.async_level,
            steps: settings.steps,
        },
        lease_ms: settings.lease_ms,
        vocabulary: descriptor.vocabulary,
        classes: descriptor.classes.clone(),
        audit: settings.audit,
        critique: settings.critique,
        conduct: settings.conduct,
    }
}

#[cfg(test)]
mod tests;
