//! A verdict: one critic's signed judgement of a group.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{at_most, finite, short_text, some_of};
use crate::envelope::{Invalid, Kind, Statement};
use crate::id::{GroupHash, LeaseId, TicketId};
use crate::limits::{FINDINGS_MAX, GROUP_SIZE_MAX, REWARD_COMPONENTS_MAX, STATEMENT_BYTES_MAX};

/// A rollout's reward and its components.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RolloutReward {
    /// The weighted sum, within the range that the run's configuration declares.
    pub total: f32,
    /// The unweighted score of each reward function, by its name.
    pub components: Vec<(String, f32)>,
}

/// A failed check, with its numbers. The first finding of a rejected group is in its receipt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finding {
    /// The tokens are not those that the lease's seed prescribes.
    Draws {
        /// Index in the group.
        rollout: u32,
        /// Mean distance of u(g, t) from the token's interval of the cumulative distribution.
        mean: f64,
        /// Largest such distance.
        max: f64,
        /// Position in the answer of the largest distance.
        position: u32,
        /// The bound of `max`.
        limit: f64,
    },
    /// The reported log-probs are not those of the tokens.
    Logprobs {
        /// Index in the group.
        rollout: u32,
        /// Largest |difference| in nats.
        max: f64,
        /// Position in the answer.
        position: u32,
        /// The bound of `max`.
        limit: f64,
    },
    /// The answer does not end as its finish reason says.
    Termination {
        /// Index in the group.
        rollout: u32,
        /// Continues the sentence "rollout 2 ...".
        problem: String,
    },
    /// The rollout repeats another one, which chance would not.
    Duplicate {
        /// Index in the group.
        rollout: u32,
        /// What it repeats.
        of: String,
    },
    /// The group does not answer its lease.
    Mismatch { problem: String },
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Finding::Draws {
                rollout,
                mean,
                max,
                position,
                limit,
            } => write!(
                f,
                "rollout {rollout} was not drawn as prescribed: cumulative-distribution error {max:.6} at token \
                 {position} (mean {mean:.6}, limit {limit:.6})"
            ),
            Finding::Logprobs {
                rollout,
                max,
                position,
                limit,
            } => write!(
                f,
                "rollout {rollout} reports a log-prob off by {max:.6} nats at token {position} (limit {limit:.6})"
            ),
            Finding::Termination { rollout, problem } => write!(f, "rollout {rollout} {problem}"),
            Finding::Duplicate { rollout, of } => write!(f, "rollout {rollout} repeats {of}"),
            Finding::Mismatch { problem } => f.write_str(problem),
        }
    }
}

/// A critic's conclusion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Decision {
    /// No check failed.
    Accept,
    /// An error lies between the bounds of two numeric classes: dispatch asks other critics.
    Grey,
    /// A check failed.
    Reject,
}

/// One critic's judgement of a group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    pub group: GroupHash,
    pub lease: LeaseId,
    pub ticket: TicketId,
    /// Whether the critic checked every position with a forward pass.
    pub audited: bool,
    /// One per rollout, in order.
    pub rewards: Vec<RolloutReward>,
    /// Empty for an accepted group.
    pub findings: Vec<Finding>,
    pub decision: Decision,
}

impl Verdict {
    /// Whether two verdicts agree: the decision and every total, bit for bit. Reward functions are deterministic, so honest
    /// critics never differ.
    pub fn agrees_with(&self, other: &Verdict) -> bool {
        let totals = |verdict: &Verdict| -> Vec<u32> {
            verdict
                .rewards
                .iter()
                .map(|reward| reward.total.to_bits())
                .collect()
        };
        self.decision == other.decision
            && (self.decision == Decision::Reject || totals(self) == totals(other))
    }
}

impl Statement for Verdict {
    const KIND: Kind = Kind::Verdict;
    const BYTES_MAX: usize = STATEMENT_BYTES_MAX;

    fn validate(&self) -> Result<(), Invalid> {
        some_of("rewards", self.rewards.len(), GROUP_SIZE_MAX as usize)?;
        at_most("findings", self.findings.len(), FINDINGS_MAX)?;
        for reward in &self.rewards {
            finite("reward", reward.total)?;
            at_most("components", reward.components.len(), REWARD_COMPONENTS_MAX)?;
            for (name, value) in &reward.components {
                short_text("component", name)?;
                finite("component", *value)?;
            }
        }
        if self.decision == Decision::Reject && self.findings.is_empty() {
            return Err(Invalid::new("findings", "are empty in a rejection"));
        }
        Ok(())
    }
}
