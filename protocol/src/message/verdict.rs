//! A verdict: one critic's signed judgement of a group.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{at_most, finite, short_text, some_of};
use crate::envelope::{Invalid, Kind, Statement};
use crate::id::{GroupHash, LeaseId, TicketId};
use crate::limits::{FINDINGS_MAX, GROUP_SIZE_MAX, REWARD_COMPONENTS_MAX, STATEMENT_BYTES_MAX};

/// A rollout's reward and what it is made of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RolloutReward {
    /// The weighted sum, within the range that the run's configuration declares.
    pub total: f32,
    /// Each function's own score, unweighted, by its name.
    pub components: Vec<(String, f32)>,
}

/// What a check found, with its numbers. The first finding of a rejected group is in its receipt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finding {
    /// Tokens do not cover the draws that the lease prescribes (`research/verification-incentives.md` §1.9).
    Draws {
        /// Which rollout of the group.
        rollout: u32,
        /// Mean distance of u(g, t) from the token's interval of the cumulative distribution.
        mean: f64,
        /// Largest distance.
        max: f64,
        /// Position in the answer of the largest distance.
        position: u32,
        /// The bound on the largest.
        limit: f64,
    },
    /// The log-probs sent are not those of the tokens.
    Logprobs {
        /// Which rollout of the group.
        rollout: u32,
        /// Largest |difference| in nats.
        max: f64,
        /// Position in the answer.
        position: u32,
        /// The bound.
        limit: f64,
    },
    /// An answer did not end where it says it did.
    Termination {
        /// Which rollout of the group.
        rollout: u32,
        /// What is wrong.
        problem: String,
    },
    /// Two rollouts, or an earlier group, hold the same draws where chance does not.
    Duplicate {
        /// Which rollout of the group.
        rollout: u32,
        /// Of what.
        of: String,
    },
    /// The group does not answer its lease.
    Mismatch {
        /// What differs.
        problem: String,
    },
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

/// What a critic concludes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Decision {
    /// Nothing speaks against it.
    Accept,
    /// Between the bounds of two numeric classes: ask others.
    Grey,
    /// A finding is beyond its bound.
    Reject,
}

/// One critic's judgement of a group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// The group as signed.
    pub group: GroupHash,
    /// Its lease.
    pub lease: LeaseId,
    /// Its ticket.
    pub ticket: TicketId,
    /// Whether every position was re-checked by a forward pass.
    pub audited: bool,
    /// One per rollout, in order.
    pub rewards: Vec<RolloutReward>,
    /// What was found; empty for an accepted group.
    pub findings: Vec<Finding>,
    /// The conclusion.
    pub decision: Decision,
}

impl Verdict {
    /// Whether another critic's verdict says the same: decision and every total, bit for bit. Reward functions are
    /// deterministic, so honest critics never differ.
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
