//! A batch manifest: what one step was trained on, by hash, in order. Durable before anything of it is acknowledged, so
//! that a learner that restarts replays the same steps.

use serde::{Deserialize, Serialize};

use super::some_of;
use crate::envelope::{Invalid, Kind, Statement};
use crate::id::{
    DescriptorHash, Generation, GroupHash, PeerId, PolicyVersion, StateRoot, TicketId,
};
use crate::limits::MANIFEST_BYTES_MAX;

/// Most groups of a batch.
pub const BATCH_GROUPS_MAX: usize = 4_096;

/// A group of a batch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BatchEntry {
    /// Its ticket: at most one group per ticket.
    pub ticket: TicketId,
    /// The group as signed; its body is kept under this name.
    pub group: GroupHash,
    /// Who answered.
    pub worker: PeerId,
    /// Under which version.
    pub version: PolicyVersion,
    /// Whether a forward pass checked it; if not, the learner recomputes μ.
    pub audited: bool,
    /// Each rollout's reward, as the agreeing verdicts have it.
    pub rewards: Vec<f32>,
}

/// What one step was trained on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Batch {
    /// The run's descriptor.
    pub descriptor: DescriptorHash,
    /// The learner's fencing token.
    pub generation: Generation,
    /// The version that the step makes.
    pub step: PolicyVersion,
    /// The weights that it starts from.
    pub parent: StateRoot,
    /// In training order.
    pub groups: Vec<BatchEntry>,
}

impl Statement for Batch {
    const KIND: Kind = Kind::Batch;
    const BYTES_MAX: usize = MANIFEST_BYTES_MAX;

    fn validate(&self) -> Result<(), Invalid> {
        some_of("groups", self.groups.len(), BATCH_GROUPS_MAX)?;
        for entry in &self.groups {
            entry
                .rewards
                .iter()
                .try_for_each(|reward| super::finite("rewards", *reward))?;
        }
        Ok(())
    }
}
