//! The model as a worker sees it: leases go in at any time, answers come out when they are complete, under the weights that
//! each lease names. A simulation replaces the model by a table, and nothing else.

use std::sync::Arc;

use async_trait::async_trait;

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
