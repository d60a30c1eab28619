//! The lines of a run directory's logs. Keys follow the names that other RL systems use.
//!
//! This module does not know how a number is measured or shown. Invariant: every number is finite; the writer refuses a
//! NaN, so a reader never meets one. A field added later needs `serde(default)`, so that lines of an older build stay
//! readable.

mod json_lines;

use crate::id::{GroupHash, PeerId, PolicyVersion, TicketId};
use crate::message::fate::{Fate, FateRecord};
use crate::message::group::FinishReason;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

pub use json_lines::{JsonLines, JsonLinesError, JsonLinesReader, Read, read_all};

/// A kind of line.
pub trait Line: Serialize + DeserializeOwned {
    /// Name of the file in the run directory; for rollouts, of the folder of such files.
    const FILE: &'static str;
    /// Keys that may hold null. Under any other key, a null stands for a number that is not finite.
    const NULLABLE: &'static [&'static str];
}

/// A line of `metrics.jsonl`: one step. Counts are since the line before, rates and seconds are of this step.
///
/// A line may lack keys that were added later; they read as 0.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
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
    /// k3 between the log-probs recorded at sampling and those that the learner computes before the step's first
    /// update, in nats.
    #[serde(rename = "mismatch_kl/all/mean")]
    pub mismatch_kl_mean: f64,
    /// Share of the trained tokens that the objective masked, clipped or capped, mean over the step's updates.
    #[serde(rename = "clip_fraction/all/mean")]
    pub clip_fraction_mean: f64,
    /// Global norm of the gradient before it is clipped, mean over the step's updates.
    #[serde(rename = "optim/grad_norm")]
    pub grad_norm: f64,
    #[serde(rename = "optim/lr")]
    pub lr: f64,
    /// Optimizer updates taken in this step.
    #[serde(rename = "optim/updates")]
    pub updates: u64,
    /// Mean age of the batch's groups, in steps.
    #[serde(rename = "staleness/mean")]
    pub staleness_mean: f64,
    /// Age of the batch's oldest group, in steps.
    #[serde(rename = "staleness/max")]
    pub staleness_max: u64,
    /// Groups in the batch.
    #[serde(rename = "groups/trained")]
    pub groups_trained: u64,
    /// Groups that failed a check.
    #[serde(rename = "groups/rejected")]
    pub groups_rejected: u64,
    /// Groups older than the async level when they could have been trained.
    #[serde(rename = "groups/stale")]
    pub groups_stale: u64,
    /// Groups whose rewards were all equal.
    #[serde(rename = "groups/no_signal")]
    pub groups_no_signal: u64,
    /// Tickets that no worker answered in time.
    #[serde(rename = "groups/expired")]
    pub groups_expired: u64,
    /// Tickets that were no longer needed.
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

impl Line for StepMetrics {
    const FILE: &'static str = "metrics.jsonl";
    const NULLABLE: &'static [&'static str] = &[];
}

/// A line of `eval.jsonl`: one pass over the held-out set. The first is of version 0, before any step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalLine {
    pub policy_version: PolicyVersion,
    /// Share of the held-out prompts that greedy decoding answered correctly.
    pub accuracy: f64,
    /// Number of prompts.
    pub samples: u64,
    /// Wall time of the evaluation.
    pub seconds: f64,
}

impl Line for EvalLine {
    const FILE: &'static str = "eval.jsonl";
    const NULLABLE: &'static [&'static str] = &[];
}

/// A line of `rollouts/*.jsonl`: one rollout that was trained on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RolloutLine {
    pub ticket: TicketId,
    pub group: GroupHash,
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
    pub reward: f32,
    /// Its advantage within its group.
    pub advantage: f32,
    pub finish_reason: FinishReason,
}

impl Line for RolloutLine {
    const FILE: &'static str = "rollouts";
    const NULLABLE: &'static [&'static str] = &[];
}

/// A line of `selections.jsonl`: how a ticket, or a surplus group of one, ended. The optional keys are null for a ticket
/// without a group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SelectionLine {
    pub ticket: TicketId,
    pub group: Option<GroupHash>,
    pub worker: Option<PeerId>,
    /// The version that sampled the group.
    pub policy_version: Option<PolicyVersion>,
    pub fate: Fate,
    /// One sentence with the numbers. A peer may have written a part of it.
    pub reason: String,
    /// Whether a forward pass checked the group.
    pub audited: bool,
    /// The step that trained the group.
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

    /// A line of every file as a run wrote it on 30 November 2026.
    const STEP: &str = include_str!("../testdata/record/metrics.jsonl");
    const EVAL: &str = include_str!("../testdata/record/eval.jsonl");
    const ROLLOUT: &str = include_str!("../testdata/record/rollouts.jsonl");
    const SELECTION: &str = include_str!("../testdata/record/selections.jsonl");

    /// Reads the line of an older build and writes it again: no key may be lost or change its value.
    #[track_caller]
    fn assert_every_key_is_kept<L: Line>(old: &str) {
        let line: L = serde_json::from_str(old).unwrap();
        let parse = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
        let (old, new) = (parse(old), parse(&serde_json::to_string(&line).unwrap()));
        for (key, value) in old.as_object().unwrap() {
            assert_eq!(new.get(key), Some(value), "`{key}` of {}", L::FILE);
        }
    }

    #[test]
    fn every_key_that_a_run_has_written_is_still_read_and_written() {
        assert_every_key_is_kept::<StepMetrics>(STEP);
        assert_every_key_is_kept::<EvalLine>(EVAL);
        assert_every_key_is_kept::<RolloutLine>(ROLLOUT);
        assert_every_key_is_kept::<SelectionLine>(SELECTION);
    }

    #[test]
    fn a_step_of_an_older_build_that_lacks_a_key_is_still_read() {
        let mut line: serde_json::Value = serde_json::from_str(STEP).unwrap();
        line.as_object_mut().unwrap().remove("optim/updates");
        let read: StepMetrics = serde_json::from_value(line).unwrap();
        assert_eq!((read.step, read.updates), (7, 0));
    }

    #[test]
    fn log_probs_are_written_as_plain_numbers() {
        let line: RolloutLine = serde_json::from_str(ROLLOUT).unwrap();
        let written = serde_json::to_string(&line).unwrap();
        let list = r#""rollout_logprobs":[-0.1,-0.7]"#;
        assert!(written.contains(list), "{written}");
    }

    #[test]
    fn every_fate_has_a_key_of_its_own() {
        let value = serde_json::to_value(StepMetrics::default()).unwrap();
        for fate in Fate::ALL {
            let key = format!("groups/{fate}");
            assert!(value.get(&key).is_some(), "{key} is missing");
        }
    }

    #[test]
    fn a_selection_copies_the_record_of_its_fate() {
        let record = FateRecord {
            ticket: TicketId(8),
            group: Some(GroupHash([1; 32])),
            lease: None,
            worker: Some(PeerId([2; 32])),
            policy_version: Some(PolicyVersion(3)),
            fate: Fate::Trained,
            reason: "trained in step 4".to_owned(),
            audited: true,
            step: Some(PolicyVersion(4)),
        };
        let line = SelectionLine::from(&record);
        assert_eq!((line.ticket, line.group), (record.ticket, record.group));
        assert_eq!(line.worker, record.worker);
        assert_eq!(line.policy_version, record.policy_version);
        assert_eq!((line.fate, line.step), (record.fate, record.step));
        assert_eq!((line.reason, line.audited), (record.reason, true));
    }
}
