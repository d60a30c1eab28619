//! The answerer of a worker whose model answers one batch of leases after another.

use std::pin::Pin;
use std::sync::Arc;

use async_trait::async_trait;

use muster_broadcaster::follower::Held;
use muster_protocol::message::group::Rollout;
use muster_protocol::message::lease::Lease;
use muster_rollout::answerer::{AnswerError, AnsweredLease, Answerer};

/// A model that answers all its leases together and takes no others meanwhile.
#[async_trait]
pub trait BatchAnswerer: Send {
    /// Adopts the weights of a verified version.
    async fn adopt(&mut self, held: &Held) -> Result<(), AnswerError>;

    /// Answers every lease.
    async fn answer(&mut self, leases: &[Lease]) -> Result<Vec<Vec<Rollout>>, AnswerError>;
}

/// The answerer of a batch, its leases, and their answers.
type Batch<B> = (B, Vec<Lease>, Result<Vec<Vec<Rollout>>, AnswerError>);

/// A batch answerer as an answerer: one batch after another.
pub struct InTurn<B> {
    idle: Option<B>,
    busy: Option<Pin<Box<dyn Future<Output = Batch<B>> + Send>>>,
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
        self.busy = Some(Box::pin(batch));
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
