//! The run directory's lines: what each step was, what it was trained on, what became of every group. `selections.jsonl`
//! is a projection of the fates log: a trainer that restarts writes it anew from there.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use muster_protocol::id::{GroupHash, PolicyVersion, TicketId};
use muster_protocol::message::fate::{Fate, FateRecord};
use muster_protocol::message::group::{FinishReason, Group};
use muster_protocol::record::{JsonLines, JsonLinesError, RolloutLine, SelectionLine, StepMetrics};

use crate::resolver::Selected;

/// The open logs of a run directory.
#[derive(Debug)]
pub struct RunRecord {
    rollouts: PathBuf,
    metrics: JsonLines<StepMetrics>,
    selections: JsonLines<SelectionLine>,
    ended: BTreeSet<TicketId>,
    duplicates: BTreeSet<(TicketId, Option<GroupHash>)>,
    /// Fates since the newest step's line.
    since: StepMetrics,
}

impl RunRecord {
    /// Opens the logs of a run that stands at `version`: later steps' lines are cut off, since they are taken again.
    ///
    /// # Errors
    /// When a log cannot be opened.
    pub fn open(dir: &Path, version: PolicyVersion) -> Result<Self, JsonLinesError> {
        Ok(Self {
            rollouts: dir.join("rollouts"),
            metrics: JsonLines::open(&dir.join("metrics.jsonl"), |line: &StepMetrics| {
                line.step <= version.0
            })?,
            selections: JsonLines::open(&dir.join("selections.jsonl"), |_| false)?,
            ended: BTreeSet::new(),
            duplicates: BTreeSet::new(),
            since: StepMetrics::default(),
        })
    }

    /// Tickets that have ended.
    pub fn ended(&self) -> &BTreeSet<TicketId> {
        &self.ended
    }

    /// Takes in a record of the fates log. One that repeats an earlier one (a crash between two writes) is ignored.
    ///
    /// # Errors
    /// When the line cannot be written.
    pub fn fate(&mut self, record: &FateRecord) -> Result<(), JsonLinesError> {
        let new = match record.fate {
            Fate::Duplicate => self.duplicates.insert((record.ticket, record.group)),
            _ => self.ended.insert(record.ticket),
        };
        if !new {
            return Ok(());
        }
        self.since.count(record.fate);
        self.selections.append(&SelectionLine {
            ticket: record.ticket,
            group: record.group,
            worker: record.worker,
            policy_version: record.policy_version,
            fate: record.fate,
            reason: record.reason.clone(),
            audited: record.audited,
            step: record.step,
        })
    }

    /// Forgets the counts of a replay: its fates were counted before.
    pub fn forget_counts(&mut self) {
        self.since = StepMetrics::default();
    }

    /// Writes a step's line, with the fates since the line before.
    ///
    /// # Errors
    /// When the line cannot be written.
    pub fn step(&mut self, mut line: StepMetrics) -> Result<(), JsonLinesError> {
        let since = std::mem::take(&mut self.since);
        line.groups_rejected = since.groups_rejected;
        line.groups_stale = since.groups_stale;
        line.groups_no_signal = since.groups_no_signal;
        line.groups_expired = since.groups_expired;
        line.groups_superseded = since.groups_superseded;
        line.groups_duplicate = since.groups_duplicate;
        self.metrics.append(&line)
    }

    /// Writes the rollouts that a step was trained on, one file per step.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn rollouts(
        &self,
        step: PolicyVersion,
        batch: &[Selected<Group>],
        temperature: f32,
    ) -> Result<(), JsonLinesError> {
        let path = self.rollouts.join(format!("step-{:08}.jsonl", step.0));
        let mut lines = JsonLines::open(&path, |_: &RolloutLine| false)?;
        for selected in batch {
            let candidate = &selected.candidate;
            for (number, rollout) in candidate.carried.rollouts.iter().enumerate() {
                let (completion_tokens, rollout_logprobs) = rollout.drawn();
                let prompt = rollout.segments.first().map(|s| s.tokens().to_vec());
                lines.append(&RolloutLine {
                    ticket: candidate.ticket,
                    group: candidate.group,
                    worker: candidate.worker,
                    step: step.0,
                    policy_version: candidate.version,
                    temperature,
                    prompt_tokens: prompt.unwrap_or_default(),
                    completion_tokens,
                    rollout_logprobs,
                    reward: candidate.rewards[number],
                    advantage: selected.advantages[number],
                    finish_reason: rollout.finish,
                })?;
            }
        }
        Ok(())
    }
}

/// The part of a step's line that follows from its batch alone.
pub fn batch_metrics(
    step: PolicyVersion,
    learner: PolicyVersion,
    batch: &[Selected<Group>],
) -> StepMetrics {
    let rewards: Vec<f64> = batch
        .iter()
        .flat_map(|s| s.candidate.rewards.iter().map(|r| f64::from(*r)))
        .collect();
    let ages: Vec<u64> = batch
        .iter()
        .map(|s| learner.steps_since(s.candidate.version))
        .collect();
    let rollouts = || batch.iter().flat_map(|s| &s.candidate.carried.rollouts);
    let tokens: usize = rollouts().map(|rollout| rollout.drawn().0.len()).sum();
    let truncated = rollouts()
        .filter(|rollout| rollout.finish == FinishReason::Length)
        .count();
    let count = rollouts().count().max(1) as f64;
    let reward_mean = mean(&rewards);
    let variance = mean(
        &rewards
            .iter()
            .map(|r| (r - reward_mean).powi(2))
            .collect::<Vec<_>>(),
    );
    StepMetrics {
        step: step.0,
        policy_version: step,
        reward_mean,
        reward_std: variance.sqrt(),
        staleness_mean: mean(&ages.iter().map(|age| *age as f64).collect::<Vec<_>>()),
        staleness_max: ages.iter().copied().max().unwrap_or(0),
        groups_trained: batch.len() as u64,
        seq_len_mean: tokens as f64 / count,
        is_truncated_mean: truncated as f64 / count,
        tokens_trained: tokens as u64,
        ..StepMetrics::default()
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}
