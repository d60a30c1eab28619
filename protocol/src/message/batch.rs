//! A batch manifest: the groups that one step trains on, by hash, in order. It is durable before any of its groups is
//! acknowledged, so that a learner that restarts replays the same steps.

use serde::{Deserialize, Serialize};

use super::some_of;
use crate::envelope::{Invalid, Kind, Statement};
use crate::id::{
    DescriptorHash, Generation, GroupHash, PeerId, PolicyVersion, StateRoot, TicketId,
};
use crate::limits::MANIFEST_BYTES_MAX;

/// Most groups of a batch.
pub(crate) const BATCH_GROUPS_MAX: usize = 4_096;

/// A group of a batch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BatchEntry {
    /// A batch holds at most one group of a ticket.
    pub ticket: TicketId,
    /// Names the file that holds the signed group.
    pub group: GroupHash,
    pub worker: PeerId,
    pub version: PolicyVersion,
    /// Whether a critic checked every position with a forward pass. If not, the learner recomputes μ.
    pub audited: bool,
    /// The reward of each rollout, from the agreeing verdicts.
    pub rewards: Vec<f32>,
}

/// The groups that one step trains on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Batch {
    pub descriptor: DescriptorHash,
    /// The learner's fencing token.
    pub generation: Generation,
    /// The version that the step makes.
    pub step: PolicyVersion,
    /// The weights that the step starts from.
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
