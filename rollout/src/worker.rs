//! The worker's loop: adopt, lease, answer, submit.
//!
//! Weights change between groups only: a group has exactly one version. A group that was answered is submitted until
//! dispatch has said what became of it or its lease ran out; nothing else is kept, so a worker may be killed at any
//! instant.

use std::sync::Arc;
use std::time::Duration;

use serde_bytes::ByteBuf;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use muster_broadcaster::follower::{Follower, Held};
use muster_protocol::bus::{BusError, Subscription};
use muster_protocol::clock::SharedClock;
use muster_protocol::desk::{Desk, DeskError};
use muster_protocol::envelope::{EnvelopeError, Signed, open};
use muster_protocol::id::{DescriptorHash, PeerId};
use muster_protocol::message::ask::{Answer, Ask, WaitReason};
use muster_protocol::message::descriptor::{Descriptor, descriptor_hash};
use muster_protocol::message::fate::{Fate, FateRecord};
use muster_protocol::message::group::{Group, Rollout};
use muster_protocol::message::lease::{Lease, NumericClass};

use crate::answerer::{AnswerError, Answerer};

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
    Desk(#[from] DeskError),
    /// The bus is gone.
    #[error("the worker lost its bus: {0}")]
    Bus(#[from] BusError),
    /// The model failed.
    #[error("the model failed: {0}")]
    Answer(#[from] AnswerError),
    /// A group could not be signed.
    #[error("a group could not be written: {0}")]
    Envelope(#[from] EnvelopeError),
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
    pub desk: Desk,
    /// Time.
    pub clock: SharedClock,
    /// Its model.
    pub answerer: Box<dyn Answerer>,
    /// Where weights come from.
    pub follower: Follower,
    /// The arithmetic of its model.
    pub class: NumericClass,
    /// Most rollouts at once.
    pub rollouts_max: u32,
}

/// A worker, connected.
pub struct Worker {
    parts: WorkerParts,
    descriptor: DescriptorHash,
    dispatch: PeerId,
    adopted: Option<Arc<Held>>,
    notes: Subscription,
    credit: Credit,
    /// Pause after the next ask that nobody answers.
    ask_retry_ms: u64,
}

enum Next {
    Answer(Vec<Signed<Lease>>),
    /// Until there is a lease for it, perhaps.
    Wait(Duration),
    /// Until newer weights are here, at most.
    WaitForWeights(Duration),
    Finished,
}

/// What ends a pause early.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wake {
    AtNewWeights,
    AtItsEnd,
}

impl Worker {
    /// Joins the run: reads its descriptor, signed by the learner whom the credentials trust.
    ///
    /// # Errors
    /// When dispatch cannot be asked or the descriptor is not to be trusted.
    pub async fn start(parts: WorkerParts) -> Result<Self, WorkerError> {
        let descriptor: Signed<Descriptor> = parts.desk.descriptor().await?;
        let note = parts.desk.subjects().note(parts.desk.bus().user());
        let notes = parts.desk.bus().subscribe(&note).await?;
        Ok(Self {
            descriptor: descriptor_hash(&descriptor.bytes),
            dispatch: descriptor.body.dispatch,
            adopted: None,
            notes,
            credit: Credit::default(),
            ask_retry_ms: ASK_RETRY_MS.0,
            parts,
        })
    }

    /// Works until the run is over or `shutdown`.
    ///
    /// # Errors
    /// When the model fails, the bus is gone for good, or dispatch refuses this worker.
    pub async fn run(mut self, shutdown: CancellationToken) -> Result<Credit, WorkerError> {
        info!("waiting for the first weights");
        loop {
            let next = tokio::select! {
                biased;
                () = shutdown.cancelled() => return Ok(self.credit),
                next = self.next() => next?,
            };
            match next {
                Next::Finished => {
                    info!(credit = ?self.credit, "the run is over");
                    return Ok(self.credit);
                }
                Next::Answer(leases) => {
                    let overdue = async {
                        shutdown.cancelled().await;
                        tokio::time::sleep(GRACE).await;
                    };
                    tokio::select! {
                        biased; // what was answered is submitted first, if dispatch is there to take it
                        answered = self.answer(&leases) => answered?,
                        () = overdue => return Ok(self.credit),
                    }
                }
                Next::Wait(pause) if pause > CROWD_WAIT => {
                    self.pause(pause, Wake::AtItsEnd, &shutdown).await;
                }
                Next::Wait(pause) | Next::WaitForWeights(pause) => {
                    self.pause(pause, Wake::AtNewWeights, &shutdown).await;
                }
            }
        }
    }

    /// Adopts the newest weights and asks for leases.
    ///
    /// # Cancel safety
    /// A lease whose answer is lost is given to somebody else after its time.
    async fn next(&mut self) -> Result<Next, WorkerError> {
        self.adopt_newest().await?;
        let Some(held) = &self.adopted else {
            return Ok(Next::WaitForWeights(Duration::from_millis(ASK_RETRY_MS.1)));
        };
        let ask = Ask::Lease {
            held: held.version.body.reference(),
            class: self.parts.class,
            rollouts_max: self.parts.rollouts_max,
        };
        let asked = self.parts.desk.ask(ask).await;
        self.ask_retry_ms = match &asked {
            Err(_) => (self.ask_retry_ms * 2).min(ASK_RETRY_MS.1),
            Ok(_) => ASK_RETRY_MS.0,
        };
        match asked {
            Ok(Answer::Leases(leases)) => Ok(Next::Answer(self.open_leases(leases))),
            Ok(Answer::Wait { retry_ms, reason }) => {
                if reason == WaitReason::CoolDown {
                    warn!(
                        retry_ms,
                        "dispatch pauses this worker: it dropped leases or failed audits"
                    );
                }
                let pause = Duration::from_millis(retry_ms);
                Ok(match reason {
                    WaitReason::VersionTooOld => Next::WaitForWeights(pause),
                    _ => Next::Wait(pause),
                })
            }
            Ok(Answer::Finished) => Ok(Next::Finished),
            Ok(_) => Err(DeskError::Unexpected.into()),
            Err(error) if error.is_transient() => {
                debug!(%error, "no lease");
                Ok(Next::Wait(Duration::from_millis(self.ask_retry_ms)))
            }
            Err(error) => Err(error.into()),
        }
    }

    async fn adopt_newest(&mut self) -> Result<(), WorkerError> {
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
        }
        Ok(())
    }

    /// Opens leases that are this worker's own, of this run's dispatch, descriptor and rule for seeds.
    fn open_leases(&self, leases: Vec<ByteBuf>) -> Vec<Signed<Lease>> {
        let run = self.parts.desk.run();
        let me = self.parts.desk.identity().peer_id();
        let opened = leases.into_iter().filter_map(|bytes| {
            let lease = open::<Lease>(bytes.into_vec().into(), run)
                .inspect_err(|error| warn!(%error, "a lease cannot be used"))
                .ok()?;
            let mine = lease.author == self.dispatch
                && lease.body.worker == me
                && lease.body.ticket.descriptor == self.descriptor
                && lease.body.seed_is_prescribed(run);
            if !mine {
                warn!(lease = %lease.body.id, "a lease does not follow the run's rules");
            }
            mine.then_some(lease)
        });
        opened.collect()
    }

    async fn answer(&mut self, leases: &[Signed<Lease>]) -> Result<(), WorkerError> {
        if leases.is_empty() {
            return Ok(());
        }
        let bodies: Vec<Lease> = leases.iter().map(|lease| lease.body.clone()).collect();
        let groups = self.parts.answerer.answer(&bodies).await?;
        debug!(leases = leases.len(), "answered");
        let submissions = leases
            .iter()
            .zip(groups)
            .map(|(lease, rollouts)| self.submit(lease, rollouts));
        for submitted in futures_util::future::join_all(submissions).await {
            let tokens = submitted?;
            self.credit.submitted += u64::from(tokens > 0);
            self.credit.tokens += tokens;
        }
        Ok(())
    }

    /// Submits until dispatch has answered or the lease has run out. Returns the tokens that were taken.
    async fn submit(
        &self,
        signed_lease: &Signed<Lease>,
        rollouts: Vec<Rollout>,
    ) -> Result<u64, WorkerError> {
        let lease = &signed_lease.body;
        let tokens = rollouts
            .iter()
            .map(|rollout| rollout.drawn().0.len() as u64)
            .sum();
        let group = Group {
            lease: lease.id,
            ticket: lease.ticket.id,
            version: lease.version,
            class: lease.class,
            rollouts,
            commitments: Vec::new(),
        };
        let signed = self.parts.desk.sign(group)?;
        let mut pause_ms = SUBMIT_RETRY_MS.0;
        while self.parts.clock.now() < lease.deadline {
            let ask = Ask::Submit {
                lease: ByteBuf::from(signed_lease.bytes.to_vec()),
                group: ByteBuf::from(signed.bytes.to_vec()),
            };
            match self.parts.desk.ask(ask).await {
                Ok(Answer::Accepted { .. }) => return Ok(tokens),
                Ok(Answer::Wait { .. }) => {}
                Ok(_) => return Err(DeskError::Unexpected.into()),
                Err(DeskError::Refused(reason)) => {
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

    /// Waits for the end of the pause, or for new weights if these are what it is about. Reads notes meanwhile.
    async fn pause(&mut self, pause: Duration, wake: Wake, shutdown: &CancellationToken) {
        let end = Instant::now() + pause;
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep_until(end) => return,
                () = self.parts.follower.changed(), if wake == Wake::AtNewWeights => return,
                Some(note) = self.notes.next() => self.on_note(note.payload),
            }
        }
    }

    fn on_note(&mut self, bytes: bytes::Bytes) {
        let Ok(record) = open::<FateRecord>(bytes, self.parts.desk.run()) else {
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
