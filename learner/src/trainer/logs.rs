//! Writes the run directory's logs: a line per step, per trained rollout and per fate.
//!
//! `selections.jsonl` is a projection of the fates log: a trainer that restarts writes it anew from there. Invariant: a
//! ticket has one line with its fate, whatever the fates log repeats.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use muster_protocol::id::{GroupHash, PolicyVersion, TicketId};
use muster_protocol::message::fate::{Fate, FateRecord};
use muster_protocol::message::group::{FinishReason, Group};
use muster_protocol::record::{
    JsonLines, JsonLinesError, Line as _, RolloutLine, SelectionLine, StepMetrics,
};

use crate::resolver::Selected;
use crate::stepper::StepOutput;

/// The open logs of a run directory.
#[derive(Debug)]
pub(super) struct RunLogs {
    rollouts: PathBuf,
    metrics: JsonLines<StepMetrics>,
    selections: JsonLines<SelectionLine>,
    ended: BTreeSet<TicketId>,
    duplicates: BTreeSet<(TicketId, Option<GroupHash>)>,
    /// Fates since the newest step's line.
    fates: BTreeMap<Fate, u64>,
}

/// What a step's line is computed from, besides the fates since the line before.
#[derive(Debug)]
pub(super) struct StepRecord<'a> {
    /// The version that the step made.
    pub(super) step: PolicyVersion,
    pub(super) batch: &'a [Selected<Group>],
    pub(super) output: &'a StepOutput,
    /// Bytes that take a holder of the version before to this one.
    pub(super) broadcast_bytes: u64,
    /// Completion tokens that arrived since the line before.
    pub(super) tokens_arrived: u64,
    pub(super) times: StepTimes,
}

/// How long the parts of a step took.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct StepTimes {
    /// Since the line before.
    pub(super) whole: Duration,
    pub(super) wait_for_batch: Duration,
    pub(super) training: Duration,
    pub(super) broadcast: Duration,
}

impl RunLogs {
    /// Opens the logs of a run that stands at `version`. Lines of later steps are cut off, since the run takes those
    /// steps again.
    pub(super) fn open(dir: &Path, version: PolicyVersion) -> Result<Self, JsonLinesError> {
        let taken = |line: &StepMetrics| line.step <= version.0;
        Ok(Self {
            rollouts: dir.join(RolloutLine::FILE),
            metrics: JsonLines::open(&dir.join(StepMetrics::FILE), taken)?,
            selections: JsonLines::open(&dir.join(SelectionLine::FILE), |_| false)?,
            ended: BTreeSet::new(),
            duplicates: BTreeSet::new(),
            fates: BTreeMap::new(),
        })
    }

    /// Tickets that have ended.
    pub(super) fn ended(&self) -> &BTreeSet<TicketId> {
        &self.ended
    }

    /// Counts and writes a record of the fates log. A record that repeats an earlier one (a crash between two writes) is
    /// ignored.
    pub(super) fn fate(&mut self, record: &FateRecord) -> Result<(), JsonLinesError> {
        let new = match record.fate {
            Fate::Duplicate => self.duplicates.insert((record.ticket, record.group)),
            _ => self.ended.insert(record.ticket),
        };
        if !new {
            return Ok(());
        }
        *self.fates.entry(record.fate).or_default() += 1;
        self.selections.append(&record.into())
    }

    /// Forgets the counts of a replay: its fates were counted before.
    pub(super) fn forget_counts(&mut self) {
        self.fates.clear();
    }

    /// Writes a step's lines: its rollouts, then its metrics with the fates since the line before.
    pub(super) fn step(
        &mut self,
        record: &StepRecord<'_>,
        temperature: f32,
    ) -> Result<StepMetrics, JsonLinesError> {
        self.rollouts(record.step, record.batch, temperature)?;
        let line = step_metrics(record, &std::mem::take(&mut self.fates));
        self.metrics.append(&line)?;
        Ok(line)
    }

    /// Writes the rollouts that a step was trained on, one file per step.
    fn rollouts(
        &self,
        step: PolicyVersion,
        batch: &[Selected<Group>],
        temperature: f32,
    ) -> Result<(), JsonLinesError> {
        let path = self.rollouts.join(format!("step-{:08}.jsonl", step.0));
        let mut lines = JsonLines::open(&path, |_: &RolloutLine| false)?;
        for Selected {
            candidate,
            advantages,
        } in batch
        {
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
                    advantage: advantages[number],
                    finish_reason: rollout.finish,
                })?;
            }
        }
        Ok(())
    }
}

/// A step's line. Every field is named here, so that a new metric without a value does not compile.
fn step_metrics(record: &StepRecord<'_>, fates: &BTreeMap<Fate, u64>) -> StepMetrics {
    let (batch, stats) = (record.batch, record.output.stats);
    let count = |fate| fates.get(&fate).copied().unwrap_or(0);
    let per_second = |tokens: u64, time: Duration| tokens as f64 / time.as_secs_f64().max(1e-9);
    let before = PolicyVersion(record.step.0.saturating_sub(1));
    let ages: Vec<u64> = batch
        .iter()
        .map(|s| before.steps_since(s.candidate.version))
        .collect();
    let rewards = || {
        let rewards = batch.iter().flat_map(|s| &s.candidate.rewards);
        rewards.map(|reward| f64::from(*reward))
    };
    let rollouts = || batch.iter().flat_map(|s| &s.candidate.carried.rollouts);
    let tokens: u64 = rollouts().map(|rollout| rollout.drawn_tokens()).sum();
    let is_truncated = |finish| f64::from(u8::from(finish == FinishReason::Length));
    let reward_mean = mean(rewards());
    let times = record.times;
    StepMetrics {
        step: record.step.0,
        policy_version: record.step,
        reward_mean,
        reward_std: mean(rewards().map(|reward| (reward - reward_mean).powi(2))).sqrt(),
        loss: stats.loss,
        entropy_mean: stats.entropy,
        mismatch_kl_mean: stats.mismatch_kl,
        clip_fraction_mean: stats.clip_fraction,
        grad_norm: stats.gradient_norm,
        lr: stats.learning_rate,
        updates: stats.updates,
        staleness_mean: mean(ages.iter().map(|age| *age as f64)),
        staleness_max: ages.iter().copied().max().unwrap_or(0),
        groups_trained: batch.len() as u64,
        groups_rejected: count(Fate::Rejected),
        groups_stale: count(Fate::Stale),
        groups_no_signal: count(Fate::NoSignal),
        groups_expired: count(Fate::Expired),
        groups_superseded: count(Fate::Superseded),
        groups_duplicate: count(Fate::Duplicate),
        seq_len_mean: mean(rollouts().map(|rollout| rollout.drawn_tokens() as f64)),
        is_truncated_mean: mean(rollouts().map(|rollout| is_truncated(rollout.finish))),
        tokens_trained: tokens,
        rollout_tokens_per_second: per_second(record.tokens_arrived, times.whole),
        learner_tokens_per_second: per_second(stats.tokens, times.training),
        broadcast_bytes: record.broadcast_bytes,
        broadcast_full_bytes: record.output.image.len() as u64,
        broadcast_changed_fraction: stats.changed_fraction,
        time_step: times.whole.as_secs_f64(),
        time_wait_for_batch: times.wait_for_batch.as_secs_f64(),
        time_broadcast: times.broadcast.as_secs_f64(),
    }
}

/// 0 for no values.
fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0u64), |(sum, count), value| (sum + value, count + 1));
    sum / count.max(1) as f64
}
