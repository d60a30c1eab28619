//! A group as submitted: the rollouts of one lease, in one signed message.
//!
//! A rollout is a list of segments. Only policy segments were sampled, so only they are checked and trained. Multi-turn
//! answers and tools need no new message.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::lease::NumericClass;
use super::version::VersionRef;
use super::{at_most, some_of};
use crate::envelope::{Invalid, Kind, Statement};
use crate::id::{LeaseId, PolicyVersion, TicketId};
use crate::limits::{GROUP_BYTES_MAX, GROUP_SIZE_MAX, ROLLOUT_TOKENS_MAX, SEGMENTS_MAX};

/// Most commitments of a group: one per 32 tokens of the largest one.
pub(crate) const COMMITMENTS_MAX: usize = 8_192;

/// Where a segment's tokens come from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Segment {
    /// The ticket's prompt.
    Prompt { tokens: Vec<u32> },
    /// Sampled from the policy.
    Policy {
        tokens: Vec<u32>,
        /// The version that they were sampled from.
        version: PolicyVersion,
        /// ln μ of each token under the sampling temperature, in nats.
        rollout_logprobs: Vec<f32>,
    },
    /// Written by a tool or another speaker.
    Environment { tokens: Vec<u32> },
}

impl Segment {
    pub fn tokens(&self) -> &[u32] {
        match self {
            Segment::Prompt { tokens }
            | Segment::Policy { tokens, .. }
            | Segment::Environment { tokens } => tokens,
        }
    }
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The last token is a stop id.
    Stop,
    /// The answer reached the longest length.
    Length,
    /// The last token completed the lease's stop string of this number, from 0.
    StopString(u8),
}

impl FinishReason {
    /// Whether the answer ended before the longest length.
    pub fn is_stop(self) -> bool {
        self != Self::Length
    }
}

/// A prompt and its completion, over one or more turns.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rollout {
    /// The first is the prompt.
    pub segments: Vec<Segment>,
    pub finish: FinishReason,
}

impl Rollout {
    /// A rollout of one turn.
    pub fn single_turn(
        prompt: Vec<u32>,
        tokens: Vec<u32>,
        version: PolicyVersion,
        rollout_logprobs: Vec<f32>,
        finish: FinishReason,
    ) -> Self {
        let segments = vec![
            Segment::Prompt { tokens: prompt },
            Segment::Policy {
                tokens,
                version,
                rollout_logprobs,
            },
        ];
        Self { segments, finish }
    }

    /// A rollout of one turn whose tokens several versions sampled, one after another.
    ///
    /// * `spans` — each version and the number of its tokens, in order
    pub fn of_versions(
        prompt: Vec<u32>,
        tokens: &[u32],
        rollout_logprobs: &[f32],
        spans: &[(PolicyVersion, usize)],
        finish: FinishReason,
    ) -> Self {
        let mut segments = vec![Segment::Prompt { tokens: prompt }];
        let mut at = 0;
        for &(version, count) in spans {
            let part = at..(at + count).min(tokens.len()).min(rollout_logprobs.len());
            at = part.end;
            segments.push(Segment::Policy {
                tokens: tokens[part.clone()].to_vec(),
                version,
                rollout_logprobs: rollout_logprobs[part].to_vec(),
            });
        }
        Self { segments, finish }
    }

    /// All tokens in order.
    pub fn tokens(&self) -> Vec<u32> {
        self.segments
            .iter()
            .flat_map(|segment| segment.tokens().iter().copied())
            .collect()
    }

    /// Number of tokens sampled from the policy.
    pub fn drawn_tokens(&self) -> u64 {
        let drawn = |segment: &&Segment| matches!(segment, Segment::Policy { .. });
        let segments = self.segments.iter().filter(drawn);
        segments.map(|segment| segment.tokens().len() as u64).sum()
    }

    /// The tokens sampled from the policy and their log-probs, in order.
    pub fn drawn(&self) -> (Vec<u32>, Vec<f32>) {
        let mut drawn = (Vec::new(), Vec::new());
        for segment in &self.segments {
            if let Segment::Policy {
                tokens,
                rollout_logprobs,
                ..
            } = segment
            {
                drawn.0.extend_from_slice(tokens);
                drawn.1.extend_from_slice(rollout_logprobs);
            }
        }
        drawn
    }

    /// The oldest version that a token was sampled from.
    pub fn oldest_version(&self) -> Option<PolicyVersion> {
        let versions = self.segments.iter().filter_map(|segment| match segment {
            Segment::Policy { version, .. } => Some(*version),
            Segment::Prompt { .. } | Segment::Environment { .. } => None,
        });
        versions.min()
    }

    fn validate(&self) -> Result<(), Invalid> {
        some_of("segments", self.segments.len(), SEGMENTS_MAX)?;
        if !matches!(self.segments[0], Segment::Prompt { .. }) {
            return Err(Invalid::new("segments", "do not begin with the prompt"));
        }
        let tokens: usize = self
            .segments
            .iter()
            .map(|segment| segment.tokens().len())
            .sum();
        at_most("tokens", tokens, ROLLOUT_TOKENS_MAX)?;
        let mut drawn = 0;
        for segment in &self.segments {
            let Segment::Policy {
                tokens,
                rollout_logprobs,
                ..
            } = segment
            else {
                continue;
            };
            drawn += tokens.len();
            check_logprobs(tokens.len(), rollout_logprobs)?;
        }
        if drawn == 0 {
            return Err(Invalid::new(
                "segments",
                "hold no token sampled from the policy",
            ));
        }
        Ok(())
    }
}

/// Rounding may lift the log-prob of a certain token this far above zero.
const LOGPROB_MAX: f32 = 1e-3;

fn check_logprobs(tokens: usize, logprobs: &[f32]) -> Result<(), Invalid> {
    if tokens != logprobs.len() {
        let problem = format!("are {} for {tokens} tokens", logprobs.len());
        return Err(Invalid::new("rollout_logprobs", problem));
    }
    match logprobs
        .iter()
        .position(|p| !p.is_finite() || *p > LOGPROB_MAX)
    {
        Some(at) => {
            let problem = format!(
                "hold {} at position {at}, not a log-probability",
                logprobs[at]
            );
            Err(Invalid::new("rollout_logprobs", problem))
        }
        None => Ok(()),
    }
}

/// The rollouts of one lease.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Group {
    pub lease: LeaseId,
    pub ticket: TicketId,
    /// The weights that the worker used.
    pub version: VersionRef,
    /// The arithmetic that the worker used.
    pub class: NumericClass,
    /// In the order of the lease's range.
    pub rollouts: Vec<Rollout>,
    /// Commitments to the computation, for checks that need them. Empty: no check is configured that does.
    pub commitments: Vec<serde_bytes::ByteBuf>,
}

impl Group {
    /// The versions that the group's tokens were sampled from, oldest first, each once.
    pub fn versions(&self) -> BTreeSet<PolicyVersion> {
        let segments = self.rollouts.iter().flat_map(|rollout| &rollout.segments);
        let drawn = segments.filter_map(|segment| match segment {
            Segment::Policy { version, .. } => Some(*version),
            Segment::Prompt { .. } | Segment::Environment { .. } => None,
        });
        drawn.collect()
    }

    /// The oldest version that a token of the group was sampled from.
    pub fn oldest_version(&self) -> PolicyVersion {
        let oldest = self
            .rollouts
            .iter()
            .filter_map(Rollout::oldest_version)
            .min();
        oldest.unwrap_or(self.version.version)
    }
}

impl Statement for Group {
    const KIND: Kind = Kind::Group;
    const BYTES_MAX: usize = GROUP_BYTES_MAX;

    fn validate(&self) -> Result<(), Invalid> {
        some_of("rollouts", self.rollouts.len(), GROUP_SIZE_MAX as usize)?;
        at_most("commitments", self.commitments.len(), COMMITMENTS_MAX)?;
        self.rollouts.iter().try_for_each(Rollout::validate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::StateRoot;

    fn group(tokens: Vec<u32>, logprobs: Vec<f32>) -> Group {
        let version = VersionRef {
            version: PolicyVersion(3),
            root: StateRoot([0; 32]),
        };
        let rollout = Rollout::single_turn(
            vec![1, 2],
            tokens,
            version.version,
            logprobs,
            FinishReason::Stop,
        );
        Group {
            lease: LeaseId([1; 16]),
            ticket: TicketId(1),
            version,
            class: NumericClass::F32Cpu,
            rollouts: vec![rollout],
            commitments: Vec::new(),
        }
    }

    #[test]
    fn an_honest_group_is_valid() {
        assert_eq!(group(vec![5, 6], vec![-0.5, 0.0]).validate(), Ok(()));
    }

    #[test]
    fn a_log_prob_that_is_not_a_number_is_refused_with_its_position() {
        let error = group(vec![5, 6], vec![-0.5, f32::NAN])
            .validate()
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "rollout_logprobs hold NaN at position 1, not a log-probability"
        );
    }

    #[test]
    fn mismatched_lengths_are_refused_with_both() {
        let error = group(vec![5, 6], vec![-0.5]).validate().unwrap_err();
        assert_eq!(error.to_string(), "rollout_logprobs are 1 for 2 tokens");
    }

    #[test]
    fn spans_of_versions_become_segments_that_hold_every_token_once() {
        let (old, new) = (PolicyVersion(3), PolicyVersion(5));
        let spans = [(old, 1), (new, 2)];
        let logprobs = [-1.0, -2.0, -3.0];
        let finish = FinishReason::StopString(0);
        let rollout = Rollout::of_versions(vec![9], &[5, 6, 7], &logprobs, &spans, finish);
        assert_eq!(rollout.segments.len(), 3);
        assert_eq!(rollout.drawn(), (vec![5, 6, 7], logprobs.to_vec()));
        assert_eq!(rollout.drawn_tokens(), 3);
        assert_eq!(rollout.oldest_version(), Some(old));
        let mut group = group(vec![1], vec![0.0]);
        group.rollouts = vec![rollout];
        assert_eq!(group.versions(), [old, new].into());
    }

    #[test]
    fn a_group_without_a_sampled_token_is_refused() {
        assert!(group(Vec::new(), Vec::new()).validate().is_err());
    }
}
