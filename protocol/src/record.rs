//! The lines of a run directory's logs: what each file holds, under the names that people coming from other systems look
//! for. Knows nothing about where the numbers come from. Invariant: every number is finite; a NaN is an error where it
//! is written, not a gap where somebody reads it.

mod json_lines;

use crate::id::{GroupHash, PeerId, PolicyVersion, TicketId};
use crate::message::fate::{Fate, FateRecord};
use crate::message::group::FinishReason;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

pub use json_lines::{JsonLines, JsonLinesError, JsonLinesReader, Read, read_all};

/// A kind of line.
pub trait Line: Serialize + DeserializeOwned {
    /// Name of its file in the run directory; rollouts have a folder of such files.
    const FILE: &'static str;
    /// Keys that may hold null; under any other key a null was a number that is not finite.
    const NULLABLE: &'static [&'static str];
}

/// A line of `metrics.jsonl`: one step. Counts are since the line before, rates and seconds are of this step.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct StepMetrics {
    /// Steps taken, this one included: the first line has 1.
    pub step: u64,
    /// The version that the step made.
    pub policy_version: PolicyVersion,
    /// Mean reward over the rollouts of the batch.
    #[serde(rename = "reward/all/mean")]
    pub reward_mean: f64,
    /// Standard deviation of the same rewards.
    #[serde(rename = "reward/all/std")]
    pub reward_std: f64,
    /// The objective, mean over the step's updates.
    pub loss: f64,
    /// Mean entropy of the policy over the trained positions, in nats.
    #[serde(rename = "entropy/all/mean")]
    pub entropy_mean: f64,
    /// k3 between what was recorded when sampling and what the learner computes before the step's first update, in nats.
    #[serde(rename = "mismatch_kl/all/mean")]
    pub mismatch_kl_mean: f64,
    /// Share of the trained tokens that the objective masked, clipped or capped, mean over the step's updates.
    #[serde(rename = "clip_fraction/all/mean")]
    pub clip_fraction_mean: f64,
    /// Global norm of the gradient before it is clipped, mean over the step's updates.
    #[serde(rename = "optim/grad_norm")]
    pub grad_norm: f64,
    /// Learning rate.
    #[serde(rename = "optim/lr")]
    pub lr: f64,
    /// Optimizer updates taken in this step.
    #[serde(rename = "optim/updates")]
    pub updates: u64,
    /// Mean age of the batch's groups, in steps.
    #[serde(rename = "staleness/mean")]
    pub staleness_mean: f64,
    /// Largest of the same.
    #[serde(rename = "staleness/max")]
    pub staleness_max: u64,
    /// Groups in the batch.
    #[serde(rename = "groups/trained")]
    pub groups_trained: u64,
    /// Groups that a check found bad.
    #[serde(rename = "groups/rejected")]
    pub groups_rejected: u64,
    /// Groups older than the async level when their turn came.
    #[serde(rename = "groups/stale")]
    pub groups_stale: u64,
    /// Groups whose rewards were all equal.
    #[serde(rename = "groups/no_signal")]
    pub groups_no_signal: u64,
    /// Tickets that nobody answered in time.
    #[serde(rename = "groups/expired")]
    pub groups_expired: u64,
    /// Tickets that were no longer wanted.
    #[serde(rename = "groups/superseded")]
    pub groups_superseded: u64,
    /// Second groups for a ticket that had one.
    #[serde(rename = "groups/duplicate")]
    pub groups_duplicate: u64,
    /// Mean length of the batch's completions, in tokens.
    #[serde(rename = "seq_len/mean")]
    pub seq_len_mean: f64,
    /// Share of the batch's completions that ended at the longest length.
    #[serde(rename = "is_truncated/mean")]
    pub is_truncated_mean: f64,
    /// Tokens that this step trained, N summed over one pass of the batch.
    #[serde(rename = "tokens/trained")]
    pub tokens_trained: u64,
    /// Completion tokens that workers submitted, per second of the time since the line before.
    #[serde(rename = "perf/rollout_tokens_per_second")]
    pub rollout_tokens_per_second: f64,
    /// Tokens through forward and backward, per second of training.
    #[serde(rename = "perf/learner_tokens_per_second")]
    pub learner_tokens_per_second: f64,
    /// Bytes that a peer fetches to go from the version before to this one.
    #[serde(rename = "broadcast/bytes")]
    pub broadcast_bytes: u64,
    /// Bytes of the whole version.
    #[serde(rename = "broadcast/full_bytes")]
    pub broadcast_full_bytes: u64,
    /// Share of the stored parameters that the step changed.
    #[serde(rename = "broadcast/changed_fraction")]
    pub broadcast_changed_fraction: f64,
    /// Seconds since the line before: the whole step with its waiting.
    #[serde(rename = "time/step")]
    pub time_step: f64,
    /// Of these, seconds without a batch to train.
    #[serde(rename = "time/wait_for_batch")]
    pub time_wait_for_batch: f64,
    /// Of these, seconds from the last update to the announced version.
    #[serde(rename = "time/broadcast")]
    pub time_broadcast: f64,
}

impl StepMetrics {
    /// How many groups or tickets ended this way.
    pub fn groups(&self, fate: Fate) -> u64 {
        match fate {
            Fate::Trained => self.groups_trained,
            Fate::Rejected => self.groups_rejected,
            Fate::Stale => self.groups_stale,
            Fate::NoSignal => self.groups_no_signal,
            Fate::Expired => self.groups_expired,
            Fate::Superseded => self.groups_superseded,
            Fate::Duplicate => self.groups_duplicate,
        }
    }

    /// Counts a group or ticket that ended this way.
    pub fn count(&mut self, fate: Fate) {
        let counter = match fate {
            Fate::Trained => &mut self.groups_trained,
            Fate::Rejected => &mut self.groups_rejected,
            Fate::Stale => &mut self.groups_stale,
            Fate::NoSignal => &mut self.groups_no_signal,
            Fate::Expired => &mut self.groups_expired,
            Fate::Superseded => &mut self.groups_superseded,
            Fate::Duplicate => &mut self.groups_duplicate,
        };
        *counter += 1;
    }
}

impl Line for StepMetrics {
    const FILE: &'static str = "metrics.jsonl";
    const NULLABLE: &'static [&'static str] = &[];
}

/// A line of `eval.jsonl`: one pass over the held-out set. The first is version 0, before any step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalLine {
    /// The version evaluated.
    pub policy_version: PolicyVersion,
    /// Share of the held-out prompts answered rightly, greedy.
    pub accuracy: f64,
    /// How many prompts.
    pub samples: u64,
    /// How long it took.
    pub seconds: f64,
}

impl Line for EvalLine {
    const FILE: &'static str = "eval.jsonl";
    const NULLABLE: &'static [&'static str] = &[];
}

/// A line of `rollouts/*.jsonl`: one rollout that was trained on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RolloutLine {
    /// The ticket that it answers.
    pub ticket: TicketId,
    /// The group that it came in.
    pub group: GroupHash,
    /// Who answered.
    pub worker: PeerId,
    /// The step that trained it.
    pub step: u64,
    /// The version that sampled it.
    pub policy_version: PolicyVersion,
    /// The sampling temperature.
    pub temperature: f32,
    /// `[P]` token ids of the prompt.
    pub prompt_tokens: Vec<u32>,
    /// `[T]` token ids of the completion, the stop id included.
    pub completion_tokens: Vec<u32>,
    /// `[T]` ln μ of each completion token at that temperature, in nats.
    pub rollout_logprobs: Vec<f32>,
    /// Its reward.
    pub reward: f32,
    /// Its advantage within its group.
    pub advantage: f32,
    /// Why it ended.
    pub finish_reason: FinishReason,
}

impl Line for RolloutLine {
    const FILE: &'static str = "rollouts";
    const NULLABLE: &'static [&'static str] = &[];
}

/// A line of `selections.jsonl`: how a ticket, or a surplus group of one, ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SelectionLine {
    /// The ticket.
    pub ticket: TicketId,
    /// The group, where there was one.
    pub group: Option<GroupHash>,
    /// Who answered.
    pub worker: Option<PeerId>,
    /// Under which version.
    pub policy_version: Option<PolicyVersion>,
    /// How it ended.
    pub fate: Fate,
    /// Why, in one sentence with the numbers. A peer may have had a part in its text.
    pub reason: String,
    /// Whether a forward pass checked the group.
    pub audited: bool,
    /// The step that trained it.
    pub step: Option<PolicyVersion>,
}

impl Line for SelectionLine {
    const FILE: &'static str = "selections.jsonl";
    const NULLABLE: &'static [&'static str] = &["group", "worker", "policy_version", "step"];
}

impl From<&FateRecord> for SelectionLine {
    fn from(record: &FateRecord) -> Self {
        Self {
            ticket: record.ticket,
            group: record.group,
            worker: record.worker,
            policy_version: record.policy_version,
            fate: record.fate,
            reason: record.reason.clone(),
            audited: record.audited,
            step: record.step,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(line: &impl Serialize) -> Vec<String> {
        let value = serde_json::to_value(line).unwrap();
        value.as_object().unwrap().keys().cloned().collect()
    }

    #[test]
    fn a_step_has_the_keys_that_people_look_for() {
        let found = keys(&StepMetrics::default());
        let promised = "step policy_version reward/all/mean reward/all/std loss entropy/all/mean \
            mismatch_kl/all/mean optim/grad_norm optim/lr staleness/mean staleness/max \
            groups/trained groups/rejected groups/stale groups/no_signal seq_len/mean \
            is_truncated/mean perf/rollout_tokens_per_second perf/learner_tokens_per_second \
            broadcast/bytes broadcast/full_bytes broadcast/changed_fraction time/step \
            time/wait_for_batch time/broadcast";
        for key in promised.split_whitespace() {
            assert!(found.iter().any(|name| name == key), "{key} is missing");
        }
    }

    #[test]
    fn a_rollout_and_a_selection_have_exactly_the_documented_keys() {
        let rollout = RolloutLine {
            ticket: TicketId(7),
            group: GroupHash([1; 32]),
            worker: PeerId([2; 32]),
            step: 3,
            policy_version: PolicyVersion(2),
            temperature: 1.0,
            prompt_tokens: vec![5],
            completion_tokens: vec![6, 2],
            rollout_logprobs: vec![-0.1, -0.7],
            reward: 1.0,
            advantage: 0.75,
            finish_reason: FinishReason::Stop,
        };
        let mut expected = "ticket group worker step policy_version temperature prompt_tokens \
            completion_tokens rollout_logprobs reward advantage finish_reason"
            .split_whitespace()
            .collect::<Vec<_>>();
        expected.sort_unstable();
        assert_eq!(keys(&rollout), expected);
        let written = serde_json::to_string(&rollout).unwrap();
        assert!(
            written.contains(r#""rollout_logprobs":[-0.1,-0.7]"#),
            "{written}"
        );
        assert_eq!(
            serde_json::from_str::<RolloutLine>(&written).unwrap(),
            rollout
        );

        let expired = FateRecord {
            ticket: TicketId(8),
            group: None,
            lease: None,
            worker: None,
            policy_version: None,
            fate: Fate::Expired,
            reason: "nobody answered within 30000 ms".to_owned(),
            audited: false,
            step: None,
        };
        let line = SelectionLine::from(&expired);
        let mut expected = "ticket group worker policy_version fate reason audited step"
            .split_whitespace()
            .collect::<Vec<_>>();
        expected.sort_unstable();
        assert_eq!(keys(&line), expected);
    }

    #[test]
    fn every_fate_has_a_counter_of_its_own() {
        let mut metrics = StepMetrics::default();
        for (times, fate) in Fate::ALL.into_iter().enumerate() {
            (0..=times).for_each(|_| metrics.count(fate));
        }
        let value = serde_json::to_value(&metrics).unwrap();
        for (times, fate) in Fate::ALL.into_iter().enumerate() {
            assert_eq!(value[format!("groups/{fate}")], times as u64 + 1);
            assert_eq!(metrics.groups(fate), times as u64 + 1);
        }
    }
}
