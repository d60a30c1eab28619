//! The worker's loop: adopt weights, take leases, answer, submit, all concurrently.
//!
//! The worker takes leases as soon as the model has room, submits each answer when it is complete, and adopts new weights
//! meanwhile; the lease's rule says what new weights change for answers in progress. The worker repeats a submission until
//! dispatch answers or the lease runs out. It keeps no other state, so a kill at any instant costs only its leases.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use serde_bytes::ByteBuf;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use muster_broadcaster::follower::{Follower, Held};
use muster_protocol::bus::{BusError, Subscription};
use muster_protocol::clock::SharedClock;
use muster_protocol::dispatch_client::{DispatchClient, DispatchClientError};
use muster_protocol::envelope::{EnvelopeError, Signed, open};
use muster_protocol::id::{DescriptorHash, LeaseId, PeerId};
use muster_protocol::life;
use muster_protocol::message::ask::{Ask, Reply, WaitReason};
use muster_protocol::message::descriptor::{Descriptor, descriptor_hash};
use muster_protocol::message::fate::{Fate, FateRecord};
use muster_protocol::message::group::{Group, Rollout};
use muster_protocol::message::lease::{Lease, NumericClass, class_names};

use crate::answerer::{AnswerError, AnsweredLease, Answerer};

/// How long an answer that has begun may take after the shutdown signal.
const GRACE: Duration = Duration::from_secs(3);
/// Pauses between attempts to submit: first and longest.
const SUBMIT_RETRY_MS: (u64, u64) = (50, 2_000);
/// Pauses after requests that timed out: first and longest. They grow, so that a thousand workers do not overload a
/// dispatch that has just restarted.
const ASK_RETRY_MS: (u64, u64) = (250, 4_000);
/// A longer wait means that many workers wait: then new weights are no reason to ask earlier.
const CROWDED_WAIT: Duration = Duration::from_millis(250);

/// Why a worker ended.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// Dispatch cannot be asked, or refuses this worker.
    #[error("the worker cannot go on: {0}")]
    Dispatch(#[from] DispatchClientError),
    /// The bus is gone.
    #[error("the worker lost its bus: {0}")]
    Bus(#[from] BusError),
    /// The model failed.
    #[error("the model failed: {0}")]
    Answer(#[from] AnswerError),
    /// A group could not be signed.
    #[error("a group could not be written: {0}")]
    Envelope(#[from] EnvelopeError),
    /// The run accepts no answers in this worker's arithmetic.
    #[error(
        "this run takes answers of class {taken}, and this worker's are of class {class}: choose other `--kernels` or \
         another `--device`, or list the class in the run's `dispatch.classes`"
    )]
    Class {
        /// The worker's class.
        class: NumericClass,
        /// The classes that the run lists.
        taken: String,
    },
}

/// A worker's counters since its start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Metrics {
    /// Groups that dispatch accepted.
    pub submitted: u64,
    /// Tokens drawn for accepted groups.
    pub tokens: u64,
    /// Groups that dispatch refused.
    pub refused: u64,
    /// Groups whose lease ran out before dispatch answered.
    pub late: u64,
    /// Groups that the learner trained on.
    pub trained: u64,
    /// Groups that a critic or the learner rejected.
    pub rejected: u64,
}

/// What a worker needs to start.
pub struct WorkerParts {
    pub client: DispatchClient,
    pub clock: SharedClock,
    pub answerer: Box<dyn Answerer>,
    /// The source of weights.
    pub follower: Follower,
    /// The arithmetic of the answerer.
    pub class: NumericClass,
}

/// A worker, connected.
pub struct Worker {
    parts: WorkerParts,
    descriptor: DescriptorHash,
    dispatch: PeerId,
    adopted: Option<Arc<Held>>,
    notes: Subscription,
    metrics: Metrics,
    /// Leases that are being answered.
    underway: BTreeMap<LeaseId, Signed<Lease>>,
    /// At most one request for leases, and a submission for every answered lease.
    requests: FuturesUnordered<BoxFuture<'static, Finished>>,
    asking: bool,
    pause: Option<Pause>,
    /// Pause after the next request for leases that times out.
    ask_retry_ms: u64,
}

/// How a request to dispatch ended.
enum Finished {
    Asked(Result<Reply, DispatchClientError>),
    Submitted(Result<Submitted, WorkerError>),
}

/// How the submission of a group ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Submitted {
    Accepted {
        tokens: u64,
    },
    Refused,
    /// The lease ran out before dispatch answered.
    Late,
}

/// The worker asks for no leases before the end of a pause.
#[derive(Debug, Clone, Copy)]
struct Pause {
    end: Instant,
    wake: Wake,
}

/// What ends a pause early.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wake {
    AtNewWeights,
    AtItsEnd,
}

enum Event {
    Shutdown,
    Finished(Finished),
    Answered(Vec<AnsweredLease>),
    Note(bytes::Bytes),
    NewWeights,
    PauseOver,
}

impl Worker {
    /// Joins the run: reads its descriptor, signed by the learner that the credentials name.
    ///
    /// # Errors
    /// When dispatch cannot be asked or the descriptor is not to be trusted.
    pub async fn start(parts: WorkerParts) -> Result<Self, WorkerError> {
        let descriptor: Signed<Descriptor> = parts.client.descriptor().await?;
        let (class, classes) = (parts.class, &descriptor.body.classes);
        if !classes.contains(&class) {
            let taken = class_names(classes);
            return Err(WorkerError::Class { class, taken });
        }
        let note = parts.client.subjects().note(parts.client.bus().user());
        let notes = parts.client.bus().subscribe(&note).await?;
        Ok(Self {
            descriptor: descriptor_hash(&descriptor.bytes),
            dispatch: descriptor.body.dispatch,
            adopted: None,
            notes,
            metrics: Metrics::default(),
            underway: BTreeMap::new(),
            requests: FuturesUnordered::new(),
            asking: false,
            pause: None,
            ask_retry_ms: ASK_RETRY_MS.0,
            parts,
        })
    }

    /// Works until the run is over or `shutdown`. After `shutdown`, answers that complete within a moment are submitted.
    ///
    /// # Errors
    /// When the model fails, the bus is gone for good, or dispatch refuses this worker.
    pub async fn run(mut self, shutdown: CancellationToken) -> Result<Metrics, WorkerError> {
        info!("waiting for the first weights");
        loop {
            self.adopt_newest().await?;
            self.ask_if_there_is_room();
            match self.event(&shutdown).await? {
                Event::Shutdown => return self.finish_what_is_underway().await,
                Event::Finished(finished) => {
                    if self.on_finished(finished).await? {
                        info!(metrics = ?self.metrics, "the run is over");
                        return Ok(self.metrics);
                    }
                }
                Event::Answered(answers) => self.submit_all(answers)?,
                Event::Note(bytes) => self.on_note(bytes),
                Event::NewWeights | Event::PauseOver => {}
            }
        }
    }

    /// Waits for the next event.
    ///
    /// # Cancel safety
    /// A cancelled call may lose an answer; dispatch gives its lease to another worker after the deadline.
    async fn event(&mut self, shutdown: &CancellationToken) -> Result<Event, WorkerError> {
        let pause_over = match self.pause {
            Some(pause) => tokio::time::sleep_until(pause.end).left_future(),
            None => std::future::pending().right_future(),
        };
        Ok(tokio::select! {
            biased; // answers go out before new leases come in
            () = shutdown.cancelled() => Event::Shutdown,
            Some(finished) = self.requests.next() => Event::Finished(finished),
            answers = self.parts.answerer.answered() => Event::Answered(answers?),
            () = self.parts.follower.changed() => Event::NewWeights,
            () = pause_over => {
                self.pause = None;
                Event::PauseOver
            }
            Some(note) = self.notes.next() => Event::Note(note.payload),
        })
    }

    /// Submits the answers that complete within [`GRACE`] and takes no new leases.
    async fn finish_what_is_underway(mut self) -> Result<Metrics, WorkerError> {
        let overdue = CancellationToken::new();
        let end = Instant::now() + GRACE;
        while !self.underway.is_empty() || !self.requests.is_empty() {
            let next = tokio::time::timeout_at(end, self.event(&overdue));
            match next.await {
                Err(_) => break,
                Ok(Ok(Event::Finished(Finished::Submitted(submitted)))) => {
                    self.on_submitted(submitted)?
                }
                Ok(Ok(Event::Answered(answers))) => self.submit_all(answers)?,
                Ok(Ok(_)) => {}
                Ok(Err(error)) => return Err(error),
            }
        }
        Ok(self.metrics)
    }

    /// Adopts the newest weights, unless the model cannot now, or a request for leases under the held ones is in flight.
    async fn adopt_newest(&mut self) -> Result<(), WorkerError> {
        if self.asking || !self.parts.answerer.adopts() {
            return Ok(());
        }
        let Some(newest) = self.parts.follower.latest() else {
            return Ok(());
        };
        let adopted = self
            .adopted
            .as_ref()
            .map(|held| held.version.body.reference());
        if adopted != Some(newest.version.body.reference()) {
            self.parts.answerer.adopt(&newest).await?;
            debug!(version = %newest.version.body.version, "adopted");
            self.adopted = Some(newest);
            if self
                .pause
                .is_some_and(|pause| pause.wake == Wake::AtNewWeights)
            {
                self.pause = None;
            }
        }
        Ok(())
    }

    fn ask_if_there_is_room(&mut self) {
        let (room, paused) = (self.parts.answerer.room(), self.pause.is_some());
        let Some(held) = self.adopted.as_ref().filter(|_| room > 0 && !paused) else {
            return;
        };
        if self.asking {
            return;
        }
        let ask = Ask::Lease {
            held: held.version.body.reference(),
            class: self.parts.class,
            rollouts_max: room,
        };
        let client = self.parts.client.clone();
        self.asking = true;
        let asked = async move { Finished::Asked(client.ask(ask).await) };
        self.requests.push(asked.boxed());
    }

    /// True when the run is over.
    async fn on_finished(&mut self, finished: Finished) -> Result<bool, WorkerError> {
        let asked = match finished {
            Finished::Submitted(submitted) => return self.on_submitted(submitted).map(|()| false),
            Finished::Asked(asked) => asked,
        };
        self.asking = false;
        self.ask_retry_ms = match &asked {
            Err(_) => (self.ask_retry_ms * 2).min(ASK_RETRY_MS.1),
            Ok(_) => ASK_RETRY_MS.0,
        };
        match asked {
            Ok(Reply::Leases(leases)) => self.take(leases).await?,
            Ok(Reply::Wait { retry_ms, reason }) => self.wait(retry_ms, reason),
            Ok(Reply::Finished) => return Ok(true),
            Ok(_) => return Err(DispatchClientError::Unexpected.into()),
            Err(error) if error.is_transient() => {
                debug!(%error, "no lease");
                self.pause(self.ask_retry_ms, Wake::AtNewWeights);
            }
            Err(error) => return Err(error.into()),
        }
        Ok(false)
    }

    fn wait(&mut self, retry_ms: u64, reason: WaitReason) {
        if reason == WaitReason::CoolDown {
            warn!(
                retry_ms,
                "dispatch pauses this worker: it dropped leases or failed audits"
            );
        }
        let crowded =
            reason != WaitReason::VersionTooOld && Duration::from_millis(retry_ms) > CROWDED_WAIT;
        let wake = if crowded {
            Wake::AtItsEnd
        } else {
            Wake::AtNewWeights
        };
        self.pause(retry_ms, wake);
    }

    fn pause(&mut self, pause_ms: u64, wake: Wake) {
        let end = Instant::now() + Duration::from_millis(pause_ms);
        self.pause = Some(Pause { end, wake });
    }

    async fn take(&mut self, leases: Vec<ByteBuf>) -> Result<(), WorkerError> {
        let leases = self.open_leases(leases);
        if leases.is_empty() {
            return Ok(());
        }
        let bodies = leases.iter().map(|lease| lease.body.clone()).collect();
        self.parts.answerer.take(bodies).await?;
        for lease in leases {
            debug!(
                target: life::TARGET,
                ticket = %lease.body.ticket.id,
                lease = %lease.body.id,
                worker = %lease.body.worker.short(),
                version = %lease.body.version.version,
                "lease taken"
            );
            let taken_twice = self.underway.insert(lease.body.id, lease);
            debug_assert!(taken_twice.is_none(), "a lease is taken once");
        }
        Ok(())
    }

    fn submit_all(&mut self, answers: Vec<AnsweredLease>) -> Result<(), WorkerError> {
        debug!(leases = answers.len(), "answered");
        for (lease, rollouts) in answers {
            if let Some(lease) = self.underway.remove(&lease) {
                let submission = Submission::new(&self.parts, lease, rollouts)?;
                let submitted = async move { Finished::Submitted(submission.submit().await) };
                self.requests.push(submitted.boxed());
            }
        }
        Ok(())
    }

    fn on_submitted(
        &mut self,
        submitted: Result<Submitted, WorkerError>,
    ) -> Result<(), WorkerError> {
        match submitted? {
            Submitted::Accepted { tokens } => {
                self.metrics.submitted += 1;
                self.metrics.tokens += tokens;
            }
            Submitted::Refused => self.metrics.refused += 1,
            Submitted::Late => self.metrics.late += 1,
        }
        Ok(())
    }

    /// Opens leases and refuses those that break a rule: signed by this run's dispatch, for this worker, its adopted
    /// version and this descriptor, with the prescribed seed.
    fn open_leases(&self, leases: Vec<ByteBuf>) -> Vec<Signed<Lease>> {
        let run = self.parts.client.run();
        let me = self.parts.client.identity().peer_id();
        let adopted = self.adopted.as_ref();
        let adopted = adopted.map(|held| held.version.body.reference());
        let opened = leases.into_iter().filter_map(|bytes| {
            let lease = open::<Lease>(bytes.into_vec().into(), run)
                .inspect_err(|error| warn!(%error, "a lease cannot be used"))
                .ok()?;
            let mine = lease.author == self.dispatch
                && lease.body.worker == me
                && Some(lease.body.version) == adopted
                && lease.body.ticket.descriptor == self.descriptor
                && lease.body.seed_is_prescribed(run);
            if !mine {
                warn!(lease = %lease.body.id, "a lease does not follow the run's rules");
            }
            mine.then_some(lease)
        });
        opened.collect()
    }

    fn on_note(&mut self, bytes: bytes::Bytes) {
        let Ok(record) = open::<FateRecord>(bytes, self.parts.client.run()) else {
            return;
        };
        match record.body.fate {
            Fate::Trained => self.metrics.trained += 1,
            Fate::Rejected => {
                self.metrics.rejected += 1;
                warn!(ticket = %record.body.ticket, reason = %record.body.reason, "a group was rejected");
            }
            fate => debug!(ticket = %record.body.ticket, %fate, "receipt"),
        }
    }
}

/// A signed group that dispatch has not accepted yet.
struct Submission {
    client: DispatchClient,
    clock: SharedClock,
    lease: Signed<Lease>,
    group: Signed<Group>,
    tokens: u64,
}

impl Submission {
    fn new(
        parts: &WorkerParts,
        lease: Signed<Lease>,
        rollouts: Vec<Rollout>,
    ) -> Result<Self, WorkerError> {
        let tokens = rollouts.iter().map(Rollout::drawn_tokens).sum();
        let group = Group {
            lease: lease.body.id,
            ticket: lease.body.ticket.id,
            version: lease.body.version,
            class: lease.body.class,
            rollouts,
            commitments: Vec::new(),
        };
        Ok(Self {
            client: parts.client.clone(),
            clock: parts.clock.clone(),
            group: parts.client.sign(group)?,
            lease,
            tokens,
        })
    }

    /// Repeats the submission until dispatch answers or the lease runs out.
    async fn submit(self) -> Result<Submitted, WorkerError> {
        let lease = &self.lease.body;
        let mut pause_ms = SUBMIT_RETRY_MS.0;
        while self.clock.now() < lease.deadline {
            let ask = Ask::Submit {
                lease: ByteBuf::from(self.lease.bytes.to_vec()),
                group: ByteBuf::from(self.group.bytes.to_vec()),
            };
            match self.client.ask(ask).await {
                Ok(Reply::Accepted { group }) => {
                    debug!(
                        target: life::TARGET,
                        ticket = %lease.ticket.id,
                        lease = %lease.id,
                        group = %group.short(),
                        worker = %lease.worker.short(),
                        "submitted"
                    );
                    return Ok(Submitted::Accepted {
                        tokens: self.tokens,
                    });
                }
                Ok(Reply::Wait { .. }) => {}
                Ok(_) => return Err(DispatchClientError::Unexpected.into()),
                Err(DispatchClientError::Refused(reason)) => {
                    warn!(ticket = %lease.ticket.id, %reason, "a group was refused");
                    return Ok(Submitted::Refused);
                }
                Err(error) if error.is_transient() => debug!(%error, "submitting again"),
                Err(error) => return Err(error.into()),
            }
            tokio::time::sleep(Duration::from_millis(pause_ms)).await;
            pause_ms = (pause_ms * 2).min(SUBMIT_RETRY_MS.1);
        }
        warn!(ticket = %lease.ticket.id, "a group was not taken before its lease ran out");
        Ok(Submitted::Late)
    }
}

#[cfg(test)]
mod tests;
