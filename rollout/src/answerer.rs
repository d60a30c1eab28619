//! The model as a worker sees it: leases go in at any time, answers come out when they are complete, under the weights that
//! each lease names. A simulation replaces the model by a table, and nothing else.

use std::sync::Arc;

use async_trait::async_trait;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;

use muster_broadcaster::follower::Held;
use muster_protocol::id::LeaseId;
use muster_protocol::message::group::Rollout;
use muster_protocol::message::lease::Lease;

/// Why a model gave no answer.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct AnswerError(pub String);

impl AnswerError {
    pub(crate) fn new(reason: impl std::fmt::Display) -> Self {
        Self(reason.to_string())
    }
}

/// An answered lease: one rollout per number of its range, in order, drawn as its seed prescribes.
pub type AnsweredLease = (LeaseId, Vec<Rollout>);

/// A model that answers.
#[async_trait]
pub trait Answerer: Send {
    /// Adopts the weights of a verified version. Leases taken later are answered under them.
    async fn adopt(&mut self, held: &Arc<Held>) -> Result<(), AnswerError>;

    /// Whether [`Answerer::adopt`] is possible now.
    fn adopts(&self) -> bool;

    /// Number of rollouts that it can take now.
    fn room(&self) -> u32;

    /// Takes leases under the weights adopted last.
    async fn take(&mut self, leases: Vec<Lease>) -> Result<(), AnswerError>;

    /// Waits until leases are answered; for ever if no lease is in progress.
    ///
    /// # Cancel safety
    /// A cancelled call loses no answer and delays none.
    async fn answered(&mut self) -> Result<Vec<AnsweredLease>, AnswerError>;
}

/// A model that answers all its leases together and takes no others meanwhile.
#[async_trait]
pub trait BatchAnswerer: Send {
    /// Takes over the weights of a version whose root was verified.
    async fn adopt(&mut self, held: &Held) -> Result<(), AnswerError>;

    /// Answers every lease.
    async fn answer(&mut self, leases: &[Lease]) -> Result<Vec<Vec<Rollout>>, AnswerError>;
}

/// What a batch comes to: the answerer again, its leases, and their answers.
type Batch<B> = (B, Vec<Lease>, Result<Vec<Vec<Rollout>>, AnswerError>);

/// A batch answerer as an answerer: one batch after another.
pub struct InTurn<B> {
    idle: Option<B>,
    busy: Option<BoxFuture<'static, Batch<B>>>,
    rollouts_max: u32,
}

impl<B: BatchAnswerer + 'static> InTurn<B> {
    /// An answerer that takes at most `rollouts_max` rollouts in a batch.
    pub fn new(inner: B, rollouts_max: u32) -> Self {
        Self {
            idle: Some(inner),
            busy: None,
            rollouts_max,
        }
    }
}

fn in_a_batch() -> AnswerError {
    AnswerError("a batch is being answered: wait for it".to_owned())
}

#[async_trait]
impl<B: BatchAnswerer + 'static> Answerer for InTurn<B> {
    async fn adopt(&mut self, held: &Arc<Held>) -> Result<(), AnswerError> {
        self.idle.as_mut().ok_or_else(in_a_batch)?.adopt(held).await
    }

    fn adopts(&self) -> bool {
        self.idle.is_some()
    }

    fn room(&self) -> u32 {
        match self.idle {
            Some(_) => self.rollouts_max,
            None => 0,
        }
    }

    async fn take(&mut self, leases: Vec<Lease>) -> Result<(), AnswerError> {
        let mut inner = self.idle.take().ok_or_else(in_a_batch)?;
        let batch = async move {
            let groups = inner.answer(&leases).await;
            (inner, leases, groups)
        };
        self.busy = Some(batch.boxed());
        Ok(())
    }

    async fn answered(&mut self) -> Result<Vec<AnsweredLease>, AnswerError> {
        let Some(busy) = &mut self.busy else {
            return std::future::pending().await;
        };
        let (inner, leases, groups) = busy.await;
        self.busy = None;
        self.idle = Some(inner);
        let leases = leases.into_iter().map(|lease| lease.id);
        Ok(leases.zip(groups?).collect())
    }
}
