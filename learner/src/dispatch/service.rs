//! Dispatch on the bus: opens what comes in, asks the decisions of [`super`], makes their consequences durable, answers.
//!
//! One task owns all state. The order in every handler is: make durable, then acknowledge what it replaces, then answer.
//! So a kill at any instant loses nothing: whatever was not acknowledged is handed out again and decided again, and
//! everything stored is stored under a key.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde_bytes::ByteBuf;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use muster_protocol::bus::{BusError, Delivery, Request, Requests, SharedBus, Subscription};
use muster_protocol::clock::SharedClock;
use muster_protocol::credentials::{Member, Roster};
use muster_protocol::envelope::{EnvelopeError, Signed, Statement, open, seal};
use muster_protocol::id::{
    DescriptorHash, GroupHash, LeaseId, PeerId, PolicyVersion, RunId, TicketId, UnixMillis,
};
use muster_protocol::identity::Identity;
use muster_protocol::limits::{GROUP_BYTES_MAX, PEERS_MAX, TEXT_BYTES_MAX};
use muster_protocol::message::ask::{Answer, Ask, LEASES_MAX, WaitReason};
use muster_protocol::message::control::{ControlEvent, ControlState, Phase};
use muster_protocol::message::critique::{Admitted, CritiqueLease, Joined};
use muster_protocol::message::descriptor::{Descriptor, descriptor_hash};
use muster_protocol::message::fate::{Fate, FateRecord};
use muster_protocol::message::group::Group;
use muster_protocol::message::lease::{Lease, NumericClass};
use muster_protocol::message::peer::PeerRecord;
use muster_protocol::message::ticket::Ticket;
use muster_protocol::message::verdict::{Decision, Verdict};
use muster_protocol::message::version::{Announcement, Version, VersionRef};
use muster_protocol::subject::{Log, Queue, Role, Subjects};

use super::judging::{Case, Outcome};
use super::prompts::PromptSource;
use super::waiting::Wait;
use super::{Admission, Dispatch, DispatchConfig, fate_of};

/// How often time alone is looked at: leases that ran out, tickets to issue, logs to read.
const TICK: Duration = Duration::from_millis(100);
/// Held messages are renewed this often, well within the queues' wait.
const RENEW: Duration = Duration::from_secs(60);
/// Messages taken from a queue or read from a log at once.
const CHUNK: usize = 256;
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
    #[error("another dispatch has started for this run: this one stops")]
    Replaced,
    /// The run's descriptor is not this learner's or this dispatch's.
    #[error("the run's descriptor {0}")]
    Descriptor(String),
}

/// What dispatch needs to start.
pub struct DispatchParts {
    /// Connection under dispatch's credentials.
    pub bus: SharedBus,
    /// Dispatch's keys.
    pub identity: Identity,
    /// The run.
    pub run: RunId,
    /// Who signs descriptors and versions.
    pub learner: PeerId,
    /// The lab's members.
    pub roster: Roster,
    /// Training prompts.
    pub prompts: Arc<dyn PromptSource>,
    /// Time.
    pub clock: SharedClock,
    /// Steps, bounds, audits.
    pub settings: DispatchSettings,
    /// Randomness that nobody else can know: seeds nonces and audits.
    pub secret: [u8; 32],
}

/// The part of the configuration that dispatch reads; the rest is in the run's descriptor.
#[derive(Debug, Clone, Copy)]
pub struct DispatchSettings {
    /// Groups per batch.
    pub batch_groups: u64,
    /// Steps of the run.
    pub steps: u64,
    /// How long a ticket may stay unanswered, in milliseconds.
    pub ticket_ms: u64,
    /// How long a worker may take over a lease, in milliseconds.
    pub lease_ms: u64,
    /// How often groups are re-checked.
    pub audit: super::audit::AuditConfig,
    /// How groups are judged.
    pub critique: super::judging::CritiqueConfig,
    /// When members are paused.
    pub conduct: super::workers::ConductConfig,
}

/// Something decided that is not durable yet. Kept until it is, so that a bus that does not answer for a while loses no
/// decision; a dispatch that is killed decides it again from the queues.
enum Outgoing {
    /// A judged group goes to the trainer.
    Ready { ticket: TicketId, joined: Bytes },
    /// A fate goes to the log.
    Fate { key: String, record: Bytes },
}

struct KnownPeer {
    record: Bytes,
    seen: UnixMillis,
}

/// A map that forgets its oldest entries.
struct Remembered<V> {
    order: VecDeque<LeaseId>,
    entries: BTreeMap<LeaseId, V>,
}

impl<V> Remembered<V> {
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

/// Dispatch, connected.
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
    sequence: u64,
    tickets: BTreeMap<TicketId, Delivery>,
    intake: BTreeMap<TicketId, (GroupHash, Delivery)>,
    /// Taken from the intake queue and not looked at yet: at most one chunk.
    arrived: VecDeque<Delivery>,
    /// At most one entry for every ticket that has not ended, and one for every group that came too late meanwhile.
    outgoing: VecDeque<Outgoing>,
    accepted: Remembered<GroupHash>,
    receipts: Remembered<Bytes>,
    announcements: VecDeque<(VersionRef, Announcement)>,
    peers: BTreeMap<PeerId, KnownPeer>,
    fated: std::collections::BTreeSet<TicketId>,
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

/// Waits until the run has been opened, and returns its state and descriptor.
async fn opened(bus: &SharedBus, run: &RunId) -> Result<(ControlState, u64), DispatchError> {
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
            return Ok((state, after));
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
        let (control, control_read) = opened(&bus, &run).await?;
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
            control,
            generation,
            nonces,
            sequence: 0,
            tickets: BTreeMap::new(),
            intake: BTreeMap::new(),
            arrived: VecDeque::new(),
            outgoing: VecDeque::new(),
            accepted: Remembered::new(),
            receipts: Remembered::new(),
            announcements: VecDeque::new(),
            peers: BTreeMap::new(),
            fated: std::collections::BTreeSet::new(),
            read: BTreeMap::from([(Log::Control, control_read)]),
            renewed,
        };
        service.restore().await?;
        Ok(service)
    }

    async fn restore(&mut self) -> Result<(), DispatchError> {
        self.core.set_phase(self.control.phase);
        self.bus.reclaim(Queue::Tickets).await?;
        self.bus.reclaim(Queue::Intake).await?;
        self.core
            .restore_issued(self.bus.queue_state(Queue::Tickets).await?.last_sequence);
        self.read_logs().await?;
        self.take_intake().await?;
        self.take_tickets().await?;
        let (open, judging) = (self.core.tickets().len(), self.core.court().len());
        info!(
            generation = self.generation,
            open, judging, "dispatch started"
        );
        Ok(())
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
                Event::Shutdown => return Ok(()),
                Event::Request(request) => self.on_request(request).await,
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
        self.flush().await?;
        self.read_logs().await?;
        let now = self.clock.now();
        let mut ended = self.core.tick(now);
        ended.extend(self.core.superseded());
        for record in ended {
            self.end_ticket(record).await?;
        }
        for (ticket, fate, reason) in self.core.unjudged(now) {
            self.end_unjudged(ticket, fate, reason).await?;
        }
        self.take_intake().await?;
        self.issue_tickets().await?;
        self.peers.retain(|_, peer| peer.seen.0 + PEER_MS > now.0);
        if now.0 >= self.renewed.0 + RENEW.as_millis() as u64 {
            self.renewed = now;
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
        for ticket in settled {
            self.release(ticket).await;
        }
        let intake = self.intake.values().map(|(_, delivery)| delivery);
        for delivery in self.tickets.values().chain(intake) {
            delivery.renew().await?;
        }
        Ok(())
    }

    async fn end_unjudged(
        &mut self,
        ticket: TicketId,
        fate: Fate,
        reason: String,
    ) -> Result<(), DispatchError> {
        let Some(case) = self.core.court().case_of(ticket) else {
            return Ok(());
        };
        let lease = open::<Lease>(case.lease.clone(), &self.run)?;
        self.end_ticket(fate_of(&lease.body, Some(case.group), fate, reason))
            .await
    }

    /// Reads what was appended to the logs since.
    async fn read_logs(&mut self) -> Result<(), DispatchError> {
        for log in [Log::Control, Log::Versions, Log::Fates] {
            loop {
                let after = self.read.get(&log).copied().unwrap_or(0);
                let records = self.bus.read(log, after, CHUNK).await?;
                if records.is_empty() {
                    break;
                }
                for record in records {
                    self.on_record(log, record.sequence, record.payload).await?;
                    self.read.insert(log, record.sequence);
                }
            }
        }
        Ok(())
    }

    async fn on_record(
        &mut self,
        log: Log,
        sequence: u64,
        bytes: Bytes,
    ) -> Result<(), DispatchError> {
        match log {
            Log::Control => {
                let event = open::<ControlEvent>(bytes, &self.run)?;
                self.control.apply(sequence, event.body);
                self.core.set_phase(self.control.phase);
                if self.control.dispatch.0 > self.generation {
                    return Err(DispatchError::Replaced);
                }
            }
            Log::Versions => self.on_version(&bytes)?,
            Log::Fates => self.on_fate(bytes).await?,
            Log::Batches => {}
        }
        Ok(())
    }

    fn on_version(&mut self, bytes: &[u8]) -> Result<(), DispatchError> {
        let announcement = Announcement::decode(bytes).map_err(EnvelopeError::from)?;
        let version = open::<Version>(announcement.version.clone().into(), &self.run)?;
        if version.author != self.learner {
            warn!(author = %version.author, "a version that the learner did not sign was ignored");
            return Ok(());
        }
        let reference = version.body.reference();
        self.core.version_made(reference);
        self.announcements
            .retain(|(known, _)| known.version < reference.version);
        self.announcements.push_back((reference, announcement));
        if self.announcements.len() > ANNOUNCEMENTS_KEPT {
            self.announcements.pop_front();
        }
        Ok(())
    }

    async fn on_fate(&mut self, bytes: Bytes) -> Result<(), DispatchError> {
        let record = open::<FateRecord>(bytes.clone(), &self.run)?.body;
        if record.fate != Fate::Duplicate && self.fated.insert(record.ticket) {
            self.core.ended(&record);
            self.release(record.ticket).await;
        }
        if let (Some(lease), Some(group)) = (record.lease, record.group) {
            self.accepted.insert(lease, group);
            self.receipts.insert(lease, bytes.clone());
        }
        let member = record
            .worker
            .and_then(|worker| self.roster.by_peer(&worker));
        if let Some(member) = member {
            let note = self.subjects.note(&member.user);
            if let Err(error) = self.bus.publish(&note, bytes).await {
                debug!(%error, "a receipt was not sent: it can be asked for");
            }
        }
        Ok(())
    }

    /// Decides a ticket's fate: writes it to the log, from where [`Self::on_fate`] takes it in.
    async fn end_ticket(&mut self, record: FateRecord) -> Result<(), DispatchError> {
        let key = match record.fate {
            Fate::Duplicate => format!("d-{}-{}", record.ticket, short(record.group)),
            _ => format!("f-{}", record.ticket),
        };
        if record.fate != Fate::Duplicate {
            self.core.ending(record.ticket);
        }
        let record = self.seal(record)?.bytes;
        self.outgoing.push_back(Outgoing::Fate { key, record });
        self.flush().await
    }

    /// Makes durable what was decided. What the bus does not take now is tried again at the next tick.
    async fn flush(&mut self) -> Result<(), DispatchError> {
        while let Some(first) = self.outgoing.front() {
            let written = match first {
                Outgoing::Ready { ticket, joined } => {
                    let key = format!("r-{ticket}");
                    self.bus.enqueue(Queue::Ready, &key, joined.clone()).await
                }
                Outgoing::Fate { key, record } => {
                    self.bus.append(Log::Fates, key, None, record.clone()).await
                }
            };
            match written {
                Ok(_) => {}
                Err(error) if error.is_transient() => {
                    warn!(%error, "a decision is not durable yet: trying again");
                    return Ok(());
                }
                Err(error) => return Err(error.into()),
            }
            if let Some(Outgoing::Ready { ticket, .. }) = self.outgoing.pop_front() {
                debug!(%ticket, "handed on");
                self.core.handed_on(ticket);
                self.release(ticket).await;
            }
        }
        Ok(())
    }

    /// Lets go of the messages that held a ticket. One whose acknowledgement is not confirmed is kept and tried again
    /// with the renewals.
    async fn release(&mut self, ticket: TicketId) {
        if let Some(delivery) = self.tickets.get(&ticket)
            && acknowledged(delivery).await
        {
            self.tickets.remove(&ticket);
        }
        if let Some((_, delivery)) = self.intake.get(&ticket)
            && acknowledged(delivery).await
        {
            self.intake.remove(&ticket);
        }
    }

    async fn issue_tickets(&mut self) -> Result<(), DispatchError> {
        let deadline = self.clock.now().plus(self.settings.ticket_ms);
        for number in self.core.tickets_wanted() {
            let id = TicketId(number);
            let prompt = self.prompts.prompt(id);
            let ticket = Ticket {
                id,
                descriptor: self.descriptor_hash(),
                item: prompt.item,
                prompt: prompt.tokens,
                group_size: self.descriptor.body.group_size,
                sampling: self.descriptor.body.sampling.clone(),
                oldest_version: self.core.oldest_version(),
                deadline,
            };
            let signed = self.seal(ticket)?;
            match self
                .bus
                .enqueue(Queue::Tickets, &format!("t-{id}"), signed.bytes)
                .await
            {
                Ok(_) | Err(BusError::Full { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.take_tickets().await
    }

    async fn take_tickets(&mut self) -> Result<(), DispatchError> {
        loop {
            let deliveries = self.bus.take(Queue::Tickets, CHUNK, Duration::ZERO).await?;
            if deliveries.is_empty() {
                return Ok(());
            }
            for delivery in deliveries {
                let ticket = open::<Ticket>(delivery.payload.clone(), &self.run)?.body;
                if self.fated.contains(&ticket.id) || self.intake.contains_key(&ticket.id) {
                    acknowledged(&delivery).await;
                    self.core.restore_issued(ticket.id.0);
                    continue;
                }
                self.tickets.insert(ticket.id, delivery);
                self.core.ticket_issued(ticket);
            }
        }
    }

    async fn take_intake(&mut self) -> Result<(), DispatchError> {
        loop {
            while let Some(delivery) = self.arrived.pop_front() {
                self.on_intake(delivery).await?;
            }
            let taken = self.bus.take(Queue::Intake, CHUNK, Duration::ZERO).await?;
            self.arrived.extend(taken);
            if self.arrived.is_empty() {
                return Ok(());
            }
        }
    }

    async fn on_intake(&mut self, delivery: Delivery) -> Result<(), DispatchError> {
        let admitted = open::<Admitted>(delivery.payload.clone(), &self.run)?.body;
        let lease = open::<Lease>(admitted.lease.into(), &self.run)?;
        let group = Bytes::from(admitted.group);
        let ticket = lease.body.ticket.id;
        let hash = GroupHash::of(&group);
        if self.fated.contains(&ticket) {
            acknowledged(&delivery).await;
            return Ok(());
        }
        if let Some((held, _)) = self.intake.get(&ticket) {
            if *held == hash {
                self.intake.insert(ticket, (hash, delivery)); // its hold ran out before it was renewed
                return Ok(());
            }
            return self.on_second_group(&lease.body, hash, &delivery).await;
        }
        if self.core.tickets().stage(ticket).is_some() && self.core.is_settled(ticket) {
            if self.accepted.entries.get(&lease.body.id) == Some(&hash) {
                acknowledged(&delivery).await; // handed on already: the server forgot our acknowledgement
                return Ok(());
            }
            return self.on_second_group(&lease.body, hash, &delivery).await;
        }
        self.accepted.insert(lease.body.id, hash);
        self.core.admitted(&lease, &group, admitted.audit);
        self.intake.insert(ticket, (hash, delivery));
        if let Some(delivery) = self.tickets.get(&ticket)
            && acknowledged(delivery).await
        {
            self.tickets.remove(&ticket);
        }
        Ok(())
    }

    async fn on_second_group(
        &mut self,
        lease: &Lease,
        group: GroupHash,
        delivery: &Delivery,
    ) -> Result<(), DispatchError> {
        let reason = format!("ticket {} has a group already", lease.ticket.id);
        acknowledged(delivery).await;
        self.end_ticket(fate_of(lease, Some(group), Fate::Duplicate, reason))
            .await
    }

    async fn on_request(&mut self, request: Request) -> Result<(), DispatchError> {
        let answer = match self.answer(&request).await {
            Ok(answer) => answer,
            Err(DispatchError::Bus(error)) if error.is_transient() => {
                debug!(%error, "an answer waits for the bus");
                Answer::Wait {
                    retry_ms: 500,
                    reason: WaitReason::Starting,
                }
            }
            Err(error) => return Err(error),
        };
        let signed = self.seal(answer)?;
        request.reply(signed.bytes).await;
        Ok(())
    }

    async fn answer(&mut self, request: &Request) -> Result<Answer, DispatchError> {
        let ask = match open::<Ask>(request.payload.clone(), &self.run) {
            Ok(ask) => ask,
            Err(EnvelopeError::UpgradeRequired { served, .. }) => {
                return Ok(Answer::UpgradeRequired {
                    served: served.to_vec(),
                });
            }
            Err(error) => return Ok(refused(error)),
        };
        let verb = ask.body.verb();
        let Some(member) = self.roster.by_user(request.user()).cloned() else {
            return Ok(refused("this user is not a member of the run"));
        };
        if member.peer != ask.author {
            return Ok(refused(
                "the message is signed by another key than the member's",
            ));
        }
        let expected = self.subjects.ask(verb, request.user());
        if expected != request.subject || !member.role.verbs().contains(&verb) {
            return Ok(refused(format!(
                "a {} may not ask for {}",
                member.role,
                verb.token()
            )));
        }
        match ask.body {
            Ask::Lease {
                held,
                class,
                rollouts_max,
            } => self.on_lease(&member, held, class, rollouts_max),
            Ask::Submit { lease, group } => self.on_submit(&member, lease, group).await,
            Ask::Critique {
                held, groups_max, ..
            } => self.on_critique(&member, &held, groups_max),
            Ask::Verdict { verdicts } => self.on_verdicts(&member, verdicts).await,
            Ask::Latest { version } => Ok(self.on_latest(version)),
            Ask::Peers { mine } => Ok(self.on_peers(&member, mine)),
            Ask::Receipt { leases } => Ok(self.on_receipt(&leases)),
            Ask::Control => Ok(Answer::Control(self.control.clone())),
            Ask::Descriptor => Ok(Answer::Descriptor(ByteBuf::from(
                self.descriptor.bytes.to_vec(),
            ))),
        }
    }

    fn on_lease(
        &mut self,
        member: &Member,
        held: VersionRef,
        class: NumericClass,
        rollouts_max: u32,
    ) -> Result<Answer, DispatchError> {
        if self.control.phase == Phase::Finished {
            return Ok(Answer::Finished);
        }
        let groups_max = (rollouts_max / self.descriptor.body.group_size.max(1)).max(1) as usize;
        let mut leases = Vec::new();
        while leases.len() < groups_max.min(LEASES_MAX) {
            let nonce = self.nonces.next();
            match self
                .core
                .lease(member.peer, held, class, self.clock.now(), nonce)
            {
                Ok(lease) => {
                    debug!(ticket = %lease.ticket.id, worker = member.name, "leased");
                    leases.push(ByteBuf::from(self.seal(lease)?.bytes.to_vec()));
                }
                Err(wait) if leases.is_empty() => return Ok(waiting(wait)),
                Err(_) => break,
            }
        }
        Ok(Answer::Leases(leases))
    }

    async fn on_submit(
        &mut self,
        member: &Member,
        lease: ByteBuf,
        group: ByteBuf,
    ) -> Result<Answer, DispatchError> {
        let lease = match open::<Lease>(lease.into_vec().into(), &self.run) {
            Ok(lease) if lease.author == self.identity.peer_id() => lease,
            Ok(_) => return Ok(refused("the lease is not signed by this run's dispatch")),
            Err(error) => return Ok(refused(error)),
        };
        let group = match open::<Group>(group.into_vec().into(), &self.run) {
            Ok(group) => group,
            Err(error) => return Ok(refused(error)),
        };
        let hash = GroupHash::of(&group.bytes);
        if self.accepted.entries.get(&lease.body.id) == Some(&hash) {
            return Ok(Answer::Accepted { group: hash });
        }
        match self.core.admit(&lease.body, &group) {
            Admission::Admit { audit } => {
                self.store_group(&lease, &group, audit).await?;
                debug!(ticket = %lease.body.ticket.id, worker = member.name, audit, "admitted");
                Ok(Answer::Accepted { group: hash })
            }
            Admission::Repeated => Ok(Answer::Accepted { group: hash }),
            Admission::Reject(record) => {
                let reason = record.reason.clone();
                info!(worker = member.name, %reason, "group rejected at admission");
                self.core.submission_rejected(&lease.body);
                self.end_ticket(record).await?;
                Ok(refused(reason))
            }
            Admission::TooLate(record) => {
                let reason = record.reason.clone();
                self.end_ticket(record).await?;
                Ok(refused(reason))
            }
            Admission::Refuse(mismatch) => Ok(refused(mismatch)),
        }
    }

    async fn store_group(
        &mut self,
        lease: &Signed<Lease>,
        group: &Signed<Group>,
        audit: bool,
    ) -> Result<(), DispatchError> {
        let admitted = Admitted {
            lease: lease.bytes.to_vec(),
            group: group.bytes.to_vec(),
            audit,
            admitted: self.clock.now(),
        };
        let signed = self.seal(admitted)?;
        let key = format!("i-{}", lease.body.id);
        self.bus.enqueue(Queue::Intake, &key, signed.bytes).await?;
        self.take_intake().await
    }

    fn on_critique(
        &mut self,
        member: &Member,
        held: &[VersionRef],
        groups_max: u32,
    ) -> Result<Answer, DispatchError> {
        if self.control.phase == Phase::Finished && self.core.court().is_empty() {
            return Ok(Answer::Finished);
        }
        self.core.critic_asks(&member.peer);
        let mut leases = Vec::new();
        let mut bytes = 0;
        while leases.len() < (groups_max.max(1) as usize).min(LEASES_MAX) && bytes < GROUP_BYTES_MAX
        {
            let now = self.clock.now();
            let (ticket, deadline) = match self.core.assign(member.peer, held, now) {
                Ok(assigned) => assigned,
                Err(wait) if leases.is_empty() => return Ok(waiting(wait)),
                Err(_) => break,
            };
            let Some(lease) = self.critique_lease(ticket, member.peer, deadline) else {
                warn!(%ticket, "no gold answer for the ticket's item");
                break;
            };
            let signed = self.seal(lease)?;
            bytes += signed.bytes.len();
            if bytes > GROUP_BYTES_MAX && !leases.is_empty() {
                break; // it is given again when this critic's time is over
            }
            leases.push(ByteBuf::from(signed.bytes.to_vec()));
        }
        Ok(Answer::CritiqueLeases(leases))
    }

    fn critique_lease(
        &self,
        ticket: TicketId,
        critic: PeerId,
        deadline: UnixMillis,
    ) -> Option<CritiqueLease> {
        let case = self.core.court().case_of(ticket)?;
        let reference = self.prompts.reference(case.item)?;
        Some(CritiqueLease {
            lease: case.lease.to_vec(),
            group: case.body.to_vec(),
            critic,
            prompt: reference.prompt,
            gold: reference.gold,
            audit: case.audit,
            deadline,
        })
    }

    async fn on_verdicts(
        &mut self,
        member: &Member,
        verdicts: Vec<ByteBuf>,
    ) -> Result<Answer, DispatchError> {
        let mut refused = Vec::new();
        for bytes in verdicts {
            match open::<Verdict>(bytes.into_vec().into(), &self.run) {
                Ok(verdict) if verdict.author == member.peer => {
                    refused.extend(self.on_verdict(verdict).await?);
                }
                Ok(_) => refused
                    .push("the verdict is signed by another key than the critic's".to_owned()),
                Err(error) => refused.push(error.to_string()),
            }
        }
        Ok(Answer::Recorded { refused })
    }

    /// Takes in one verdict; returns why it was refused, if it was.
    async fn on_verdict(
        &mut self,
        verdict: Signed<Verdict>,
    ) -> Result<Option<String>, DispatchError> {
        match self.core.judged(verdict) {
            Ok(Outcome::Pending) => {}
            Ok(Outcome::Settled {
                case,
                decision,
                verdicts,
                ..
            }) => {
                self.on_settled(&case, decision, &verdicts).await?;
            }
            Ok(Outcome::Undecided(case)) => {
                let reason = "the critics asked did not agree".to_owned();
                self.end_case(&case, reason).await?;
            }
            Err(refusal) => return Ok(Some(refusal.to_string())),
        }
        Ok(None)
    }

    async fn on_settled(
        &mut self,
        case: &Case,
        decision: Decision,
        verdicts: &[Signed<Verdict>],
    ) -> Result<(), DispatchError> {
        if decision == Decision::Reject {
            let finding = verdicts
                .iter()
                .find_map(|verdict| verdict.body.findings.first());
            let reason = finding.map_or_else(|| "rejected".to_owned(), ToString::to_string);
            return self.end_case(case, reason).await;
        }
        let joined = Joined {
            lease: case.lease.to_vec(),
            group: case.body.to_vec(),
            verdicts: verdicts
                .iter()
                .map(|v| ByteBuf::from(v.bytes.to_vec()))
                .collect(),
            audited: verdicts.iter().all(|verdict| verdict.body.audited),
        };
        let ticket = open::<Lease>(case.lease.clone(), &self.run)?.body.ticket.id;
        let joined = self.seal(joined)?.bytes;
        self.core.ending(ticket);
        self.outgoing.push_back(Outgoing::Ready { ticket, joined });
        self.flush().await
    }

    async fn end_case(&mut self, case: &Case, reason: String) -> Result<(), DispatchError> {
        let lease = open::<Lease>(case.lease.clone(), &self.run)?;
        let shown: String = reason.chars().take(TEXT_BYTES_MAX / 4).collect();
        info!(worker = %case.author.short(), reason = %shown, "group rejected");
        let mut record = fate_of(&lease.body, Some(case.group), Fate::Rejected, shown);
        record.audited = case.audit;
        self.end_ticket(record).await
    }

    fn on_latest(&self, version: Option<PolicyVersion>) -> Answer {
        let wanted = |known: &VersionRef| version.is_none_or(|wanted| known.version == wanted);
        let found = self
            .announcements
            .iter()
            .rev()
            .find(|(known, _)| wanted(known));
        Answer::Version(found.map(|(_, announcement)| announcement.clone()))
    }

    fn on_peers(&mut self, member: &Member, mine: Option<ByteBuf>) -> Answer {
        if let Some(bytes) = mine {
            let bytes = Bytes::from(bytes.into_vec());
            match open::<PeerRecord>(bytes.clone(), &self.run) {
                Ok(record)
                    if record.author == member.peer
                        && record.body.handshake == member.handshake =>
                {
                    let known = KnownPeer {
                        record: bytes,
                        seen: self.clock.now(),
                    };
                    self.peers.insert(member.peer, known);
                }
                Ok(_) => return refused("the peer record is not the asker's own"),
                Err(error) => return refused(error),
            }
        }
        let others = self.peers.iter().filter(|(peer, _)| **peer != member.peer);
        let records = others
            .take(PEERS_MAX)
            .map(|(_, known)| ByteBuf::from(known.record.to_vec()));
        Answer::Peers(records.collect())
    }

    fn on_receipt(&self, leases: &[LeaseId]) -> Answer {
        let known = leases
            .iter()
            .filter_map(|lease| self.receipts.entries.get(lease));
        Answer::Receipts(known.map(|bytes| ByteBuf::from(bytes.to_vec())).collect())
    }

    fn descriptor_hash(&self) -> DescriptorHash {
        descriptor_hash(&self.descriptor.bytes)
    }

    fn seal<T: Statement>(&mut self, body: T) -> Result<Signed<T>, EnvelopeError> {
        self.sequence += 1;
        seal(&self.identity, &self.run, self.sequence, body)
    }
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

/// Acknowledges; what is not confirmed comes again, and is recognised then.
async fn acknowledged(delivery: &Delivery) -> bool {
    match delivery.ack().await {
        Ok(()) => true,
        Err(error) => {
            debug!(%error, "an acknowledgement was not confirmed");
            false
        }
    }
}

fn core_config(
    run: &RunId,
    settings: &DispatchSettings,
    descriptor: &Descriptor,
) -> DispatchConfig {
    DispatchConfig {
        run: run.clone(),
        budget: super::tickets::Budget {
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

fn waiting(wait: Wait) -> Answer {
    Answer::Wait {
        retry_ms: wait.retry_ms,
        reason: wait.reason,
    }
}

fn refused(reason: impl ToString) -> Answer {
    Answer::Refused {
        reason: reason
            .to_string()
            .chars()
            .take(TEXT_BYTES_MAX / 4)
            .collect(),
    }
}

fn short(group: Option<GroupHash>) -> String {
    group.map_or_else(|| "none".to_owned(), |group| group.short())
}
