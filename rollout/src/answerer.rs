//! What a worker needs of a model: answers to leases, under the weights that it was given last. A simulation puts a table
//! in the model's place, and nothing else.

use async_trait::async_trait;

use muster_broadcaster::follower::Held;
use muster_protocol::message::group::Rollout;
use muster_protocol::message::lease::Lease;

/// Why a model gave no answer.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct AnswerError(pub String);

/// A model that answers.
#[async_trait]
pub trait Answerer: Send {
    /// Takes over the weights of a version whose root was verified.
    async fn adopt(&mut self, held: &Held) -> Result<(), AnswerError>;

    /// Answers every lease: for each, one rollout per number of its range, in order, drawn as its seed prescribes.
    async fn answer(&mut self, leases: &[Lease]) -> Result<Vec<Vec<Rollout>>, AnswerError>;
}
