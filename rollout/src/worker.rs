//! The worker's loop: adopt, lease, answer, submit, all at once.
//!
//! Leases are taken as soon as the model has room for them, answers are submitted as they are complete, and new weights
//! are adopted meanwhile: what they change for answers underway is the lease's rule. A group that was answered is
//! submitted until dispatch has said what became of it or its lease ran out; nothing else is kept, so a worker may be
//! killed at any instant.

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
use muster_protocol::message::ask::{Ask, Reply, WaitReason};
use muster_protocol::message::descriptor::{Descriptor, descriptor_hash};
use muster_protocol::message::fate::{Fate, FateRecord};
use muster_protocol::message::group::{Group, Rollout};
use muster_protocol::message::lease::{Lease, NumericClass, class_names};

use crate::answerer::{AnswerError, AnsweredLease, Answerer};

/// How long an answer that has begun may take once the worker is told to stop.
const GRACE: Duration = Duration::from_secs(3);
/// Pauses between attempts to submit: first and longest.
const SUBMIT_RETRY_MS: (u64, u64) = (50, 2_000);
/// Pauses after asks that nobody answered: first and longest. They grow, so that a thousand workers do not drown a
/// dispatch that has just come back.
const ASK_RETRY_MS: (u64, u64) = (250, 4_000);
/// A longer wait says that many others wait too: then new weights are no reason to ask before it is over.
const CROWD_WAIT: Duration = Duration::from_millis(250);

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
    /// The run takes no answers of this worker's arithmetic.
    #[error(
        "this run takes answers of class {taken}, and this worker's are of class {class}: choose other `--kernels` or \
         another `--device`, or list the class in the run's `dispatch.classes`"
    )]
    Class {
        /// What the worker would answer in.
        class: NumericClass,
        /// What the run lists.
        taken: String,
    },
}

/// What became of a worker's groups so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Credit {
    /// Groups that dispatch took.
    pub submitted: u64,
    /// Tokens drawn for them.
    pub tokens: u64,
    /// Groups trained on.
    pub trained: u64,
    /// Groups rejected.
    pub rejected: u64,
}

/// What a worker needs to start.
pub struct WorkerParts {
    /// Its way to dispatch.
    pub client: DispatchClient,
    /// Time.
    pub clock: SharedClock,
    /// Its model.
    pub answerer: Box<dyn Answerer>,
    /// Where weights come from.
    pub follower: Follower,
    /// The arithmetic of its model.
    pub class: NumericClass,
}

/// A worker, connected.
pub struct Worker {
    parts: WorkerParts,
    descriptor: DescriptorHash,
    dispatch: PeerId,
    adopted: Option<Arc<Held>>,
    notes: Subscription,
    credit: Credit,
    /// Leases that are being answered.
    underway: BTreeMap<LeaseId, Signed<Lease>>,
    /// At most one ask, and a submission for every lease that was answered.
    errands: FuturesUnordered<BoxFuture<'static, Errand>>,
    asking: bool,
    pause: Option<Pause>,
    /// Pause after the next ask that nobody answers.
    ask_retry_ms: u64,
}

/// What came of talking to dispatch.
enum Errand {
    Asked(Result<Reply, DispatchClientError>),
    Submitted(Result<u64, WorkerError>),
}

/// No ask before its end, or before new weights come.
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

/// Something happened.
enum Event {
    Shutdown,
    Errand(Errand),
    Answered(Vec<AnsweredLease>),
    Note(bytes::Bytes),
    NewWeights,
    PauseOver,
}

impl Worker {
    /// Joins the run: reads its descriptor, signed by the learner whom the credentials trust.
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
            credit: Credit::default(),
            underway: BTreeMap::new(),
            errands: FuturesUnordered::new(),
            asking: false,
            pause: None,
            ask_retry_ms: ASK_RETRY_MS.0,
            parts,
        })
    }

    /// Works until the run is over or `shutdown`, after which what is nearly answered is still submitted.
    ///
    /// # Errors
    /// When the model fails, the bus is gone for good, or dispatch refuses this worker.
    pub async fn run(mut self, shutdown: CancellationToken) -> Result<Credit, WorkerError> {
        info!("waiting for the first weights");
        loop {
            self.adopt_newest().await?;
            self.ask_if_there_is_room();
            match self.event(&shutdown).await? {
                Event::Shutdown => return self.finish_what_is_underway().await,
                Event::Errand(errand) => {
                    if self.on_errand(errand).await? {
                        info!(credit = ?self.credit, "the run is over");
                        return Ok(self.credit);
                    }
                }
                Event::Answered(answers) => self.submit_all(answers)?,
                Event::Note(bytes) => self.on_note(bytes),
                Event::NewWeights | Event::PauseOver => {}
            }
        }
    }

    /// Waits for whatever is next.
    ///
    /// # Cancel safety
    /// A lease whose answer is lost is given to somebody else after its time.
    async fn event(&mut self, shutdown: &CancellationToken) -> Result<Event, WorkerError> {
        let pause_over = match self.pause {
            Some(pause) => tokio::time::sleep_until(pause.end).left_future(),
            None => std::future::pending().right_future(),
        };
        Ok(tokio::select! {
            biased; // what was answered goes out before anything new comes in
            () = shutdown.cancelled() => Event::Shutdown,
            Some(errand) = self.errands.next() => Event::Errand(errand),
            answers = self.parts.answerer.answered() => Event::Answered(answers?),
            () = self.parts.follower.changed() => Event::NewWeights,
            () = pause_over => {
                self.pause = None;
                Event::PauseOver
            }
            Some(note) = self.notes.next() => Event::Note(note.payload),
        })
    }

    /// Submits what is answered within a moment, and nothing new.
    async fn finish_what_is_underway(mut self) -> Result<Credit, WorkerError> {
        let overdue = CancellationToken::new();
        let end = Instant::now() + GRACE;
        while !self.underway.is_empty() || !self.errands.is_empty() {
            let next = tokio::time::timeout_at(end, self.event(&overdue));
            match next.await {
                Err(_) => break,
                Ok(Ok(Event::Errand(Errand::Submitted(submitted)))) => {
                    self.on_submitted(submitted)?
                }
                Ok(Ok(Event::Answered(answers))) => self.submit_all(answers)?,
                Ok(Ok(_)) => {}
                Ok(Err(error)) => return Err(error),
            }
        }
        Ok(self.credit)
    }

    /// Adopts the newest weights, unless the model wants nothing new now, or leases under those held are on their way.
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
        let asked = async move { Errand::Asked(client.ask(ask).await) };
        self.errands.push(asked.boxed());
    }

    /// True when the run is over.
    async fn on_errand(&mut self, errand: Errand) -> Result<bool, WorkerError> {
        let asked = match errand {
            Errand::Submitted(submitted) => return self.on_submitted(submitted).map(|()| false),
            Errand::Asked(asked) => asked,
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
            reason != WaitReason::VersionTooOld && Duration::from_millis(retry_ms) > CROWD_WAIT;
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
        let by_id = leases.into_iter().map(|lease| (lease.body.id, lease));
        self.underway.extend(by_id);
        Ok(())
    }

    fn submit_all(&mut self, answers: Vec<AnsweredLease>) -> Result<(), WorkerError> {
        debug!(leases = answers.len(), "answered");
        for (lease, rollouts) in answers {
            if let Some(lease) = self.underway.remove(&lease) {
                let submission = Submission::new(&self.parts, lease, rollouts)?;
                let submitted = async move { Errand::Submitted(submission.submit().await) };
                self.errands.push(submitted.boxed());
            }
        }
        Ok(())
    }

    fn on_submitted(&mut self, submitted: Result<u64, WorkerError>) -> Result<(), WorkerError> {
        let tokens = submitted?;
        self.credit.submitted += u64::from(tokens > 0);
        self.credit.tokens += tokens;
        Ok(())
    }

    /// Opens leases that are this worker's own, of this run's dispatch, descriptor and rule for seeds.
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
            Fate::Trained => self.credit.trained += 1,
            Fate::Rejected => {
                self.credit.rejected += 1;
                warn!(ticket = %record.body.ticket, reason = %record.body.reason, "a group was rejected");
            }
            fate => debug!(ticket = %record.body.ticket, %fate, "receipt"),
        }
    }
}

/// A group on its way to dispatch.
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
        let drawn = |rollout: &Rollout| rollout.drawn().0.len() as u64;
        let tokens = rollouts.iter().map(drawn).sum();
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

    /// Submits until dispatch has answered or the lease has run out. Returns the tokens that were taken.
    async fn submit(self) -> Result<u64, WorkerError> {
        let lease = &self.lease.body;
        let mut pause_ms = SUBMIT_RETRY_MS.0;
        while self.clock.now() < lease.deadline {
            let ask = Ask::Submit {
                lease: ByteBuf::from(self.lease.bytes.to_vec()),
                group: ByteBuf::from(self.group.bytes.to_vec()),
            };
            match self.client.ask(ask).await {
                Ok(Reply::Accepted { .. }) => return Ok(self.tokens),
                Ok(Reply::Wait { .. }) => {}
                Ok(_) => return Err(DispatchClientError::Unexpected.into()),
                Err(DispatchClientError::Refused(reason)) => {
                    warn!(ticket = %lease.ticket.id, %reason, "a group was refused");
                    return Ok(0);
                }
                Err(error) if error.is_transient() => debug!(%error, "submitting again"),
                Err(error) => return Err(error.into()),
            }
            tokio::time::sleep(Duration::from_millis(pause_ms)).await;
            pause_ms = (pause_ms * 2).min(SUBMIT_RETRY_MS.1);
        }
        warn!(ticket = %lease.ticket.id, "a group was not taken before its lease ran out");
        Ok(0)
    }
}
