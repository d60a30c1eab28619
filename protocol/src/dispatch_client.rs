//! A member's way to ask dispatch: signs the question, checks who answers, and gives the answer as a value.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use serde_bytes::ByteBuf;

use crate::bus::{BusError, SharedBus};
use crate::envelope::{EnvelopeError, Signed, Statement, open, seal};
use crate::id::{PeerId, PolicyVersion, RunId};
use crate::identity::Identity;
use crate::message::ask::{Ask, Reply};
use crate::message::control::ControlState;
use crate::message::descriptor::Descriptor;
use crate::message::version::Announcement;
use crate::subject::Subjects;

/// How long an answer may take: dispatch makes a submission durable before it answers.
const ANSWER_WAIT: Duration = Duration::from_secs(5);
/// First and longest pause between attempts that failed for a reason that passes.
const RETRY_MS: (u64, u64) = (50, 2_000);

/// Why asking did not give an answer.
#[derive(Debug, thiserror::Error)]
pub enum DispatchClientError {
    /// The bus did not carry it.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The answer is not an answer.
    #[error("the answer of dispatch cannot be used: {0}")]
    Envelope(#[from] EnvelopeError),
    /// Somebody else answered.
    #[error("the answer is signed by {found}, not by the run's dispatch {expected}")]
    Impostor {
        /// Who signed.
        found: PeerId,
        /// Who should have.
        expected: PeerId,
    },
    /// The descriptor is not signed by the learner that these credentials name.
    #[error("the run's descriptor is signed by {found}, these credentials trust {expected}")]
    WrongLearner {
        /// Who signed.
        found: PeerId,
        /// Who should have.
        expected: PeerId,
    },
    /// Dispatch said no.
    #[error("dispatch refused: {0}")]
    Refused(String),
    /// Dispatch speaks another version.
    #[error(
        "this build speaks none of the protocol versions {0:?} that the run serves: upgrade muster"
    )]
    UpgradeRequired(Vec<u16>),
    /// An answer to another question.
    #[error("dispatch answered another question than was asked")]
    Unexpected,
}

impl DispatchClientError {
    /// Whether asking again later may help.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Bus(error) if error.is_transient())
    }
}

struct Inner {
    bus: SharedBus,
    identity: Identity,
    run: RunId,
    subjects: Subjects,
    learner: PeerId,
    dispatch: OnceLock<PeerId>,
    sequence: AtomicU64,
}

/// A cheap handle by which one member asks.
#[derive(Clone)]
pub struct DispatchClient {
    inner: Arc<Inner>,
}

impl std::fmt::Debug for DispatchClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "DispatchClient({:?} in {})",
            self.inner.identity, self.inner.run
        )
    }
}

impl DispatchClient {
    /// A member's client. `learner` is whom the member's credentials trust.
    pub fn new(bus: SharedBus, identity: Identity, run: RunId, learner: PeerId) -> Self {
        let subjects = Subjects::of(&run);
        let (dispatch, sequence) = (OnceLock::new(), AtomicU64::new(0));
        Self {
            inner: Arc::new(Inner {
                bus,
                identity,
                run,
                subjects,
                learner,
                dispatch,
                sequence,
            }),
        }
    }

    /// The member's connection.
    pub fn bus(&self) -> &SharedBus {
        &self.inner.bus
    }

    /// The member's keys.
    pub fn identity(&self) -> &Identity {
        &self.inner.identity
    }

    /// The run.
    pub fn run(&self) -> &RunId {
        &self.inner.run
    }

    /// The run's subjects.
    pub fn subjects(&self) -> &Subjects {
        &self.inner.subjects
    }

    /// Whom the member trusts.
    pub fn learner(&self) -> PeerId {
        self.inner.learner
    }

    /// Signs a statement of this member under its next sequence number.
    ///
    /// # Errors
    /// When the statement breaks its own rules.
    pub fn sign<T: Statement>(&self, body: T) -> Result<Signed<T>, EnvelopeError> {
        let sequence = self.inner.sequence.fetch_add(1, Ordering::Relaxed) + 1;
        seal(&self.inner.identity, &self.inner.run, sequence, body)
    }

    /// Asks once.
    ///
    /// # Errors
    /// When no usable answer came, or dispatch refused.
    pub async fn ask(&self, ask: Ask) -> Result<Reply, DispatchClientError> {
        let subject = self.inner.subjects.ask(ask.verb(), self.inner.bus.user());
        let question = self.sign(ask)?;
        let bytes = self
            .inner
            .bus
            .request(&subject, question.bytes, ANSWER_WAIT)
            .await?;
        let answer = open::<Reply>(bytes, &self.inner.run)?;
        if let Some(expected) = self.inner.dispatch.get()
            && answer.author != *expected
        {
            return Err(DispatchClientError::Impostor {
                found: answer.author,
                expected: *expected,
            });
        }
        match answer.body {
            Reply::Refused { reason } => Err(DispatchClientError::Refused(reason)),
            Reply::UpgradeRequired { served } => Err(DispatchClientError::UpgradeRequired(served)),
            answer => Ok(answer),
        }
    }

    /// Asks until an answer comes, with growing pauses, as long as the reason passes by itself.
    ///
    /// # Errors
    /// When asking again cannot help.
    pub async fn ask_until_answered(&self, ask: Ask) -> Result<Reply, DispatchClientError> {
        let mut pause_ms = RETRY_MS.0;
        loop {
            match self.ask(ask.clone()).await {
                Err(error) if error.is_transient() => {
                    tracing::debug!(%error, "asking again");
                    tokio::time::sleep(Duration::from_millis(pause_ms)).await;
                    pause_ms = (pause_ms * 2).min(RETRY_MS.1);
                }
                answered => return answered,
            }
        }
    }

    /// The run's descriptor, signed by the learner that this member trusts. From then on only the dispatch that it names
    /// is believed.
    ///
    /// # Errors
    /// When it is signed by another, or asking again cannot help.
    pub async fn descriptor(&self) -> Result<Signed<Descriptor>, DispatchClientError> {
        let Reply::Descriptor(bytes) = self.ask_until_answered(Ask::Descriptor).await? else {
            return Err(DispatchClientError::Unexpected);
        };
        let descriptor = open::<Descriptor>(bytes.into_vec().into(), &self.inner.run)?;
        if descriptor.author != self.inner.learner {
            let (found, expected) = (descriptor.author, self.inner.learner);
            return Err(DispatchClientError::WrongLearner { found, expected });
        }
        let dispatch = *self.inner.dispatch.get_or_init(|| descriptor.body.dispatch);
        if dispatch != descriptor.body.dispatch {
            let found = descriptor.body.dispatch;
            return Err(DispatchClientError::Impostor {
                found,
                expected: dispatch,
            });
        }
        Ok(descriptor)
    }

    /// The newest announced version, if any.
    ///
    /// # Errors
    /// When no usable answer came.
    pub async fn latest(&self) -> Result<Option<Announcement>, DispatchClientError> {
        match self.ask(Ask::Latest { version: None }).await? {
            Reply::Version(announcement) => Ok(announcement),
            _ => Err(DispatchClientError::Unexpected),
        }
    }

    /// What the run is doing.
    ///
    /// # Errors
    /// When no usable answer came.
    pub async fn control(&self) -> Result<ControlState, DispatchClientError> {
        match self.ask(Ask::Control).await? {
            Reply::Control(state) => Ok(state),
            _ => Err(DispatchClientError::Unexpected),
        }
    }

    /// Squashed deltas from `version` or a later one, as signed by whoever made them; tells dispatch of one of this member's own
    /// at the same time.
    ///
    /// # Errors
    /// When no usable answer came, or dispatch does not take this member's.
    pub async fn deltas(
        &self,
        from: PolicyVersion,
        mine: Option<&[u8]>,
    ) -> Result<Vec<bytes::Bytes>, DispatchClientError> {
        let mine = mine.map(|bytes| ByteBuf::from(bytes.to_vec()));
        match self.ask(Ask::Deltas { from, mine }).await? {
            Reply::Deltas(deltas) => Ok(deltas.into_iter().map(|d| d.into_vec().into()).collect()),
            _ => Err(DispatchClientError::Unexpected),
        }
    }

    /// Who serves shards; tells dispatch of this member's own record at the same time.
    ///
    /// # Errors
    /// When no usable answer came.
    pub async fn peers(
        &self,
        mine: Option<&[u8]>,
    ) -> Result<Vec<bytes::Bytes>, DispatchClientError> {
        let mine = mine.map(|bytes| ByteBuf::from(bytes.to_vec()));
        match self.ask(Ask::Peers { mine }).await? {
            Reply::Peers(peers) => Ok(peers.into_iter().map(|p| p.into_vec().into()).collect()),
            _ => Err(DispatchClientError::Unexpected),
        }
    }
}
