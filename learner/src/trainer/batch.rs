//! Resolves a batch: writes its manifest, which binds, then takes the step. Fates and acknowledgements, which can be
//! repeated at any time, go out while the step runs.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::future::{join_all, try_join_all};
use tokio::time::Instant;
use tracing::warn;

use muster_broadcaster::blocking::off_loop_if_large;
use muster_protocol::bus::{BusError, Delivery};
use muster_protocol::envelope::Signed;
use muster_protocol::id::PolicyVersion;
use muster_protocol::message::batch::{Batch, BatchEntry};
use muster_protocol::message::descriptor::descriptor_hash;
use muster_protocol::message::fate::Fate;
use muster_protocol::message::group::{Group, Segment};
use muster_protocol::subject::Log;

use super::error::{TrainerError, lost};
use super::state::{RETRY, Trainer, acknowledge, fate_of};
use crate::resolver::Selected;
use crate::stepper::{StepInput, StepOutput, TrainRollout};

/// How long the trainer waits for groups while a step runs. Short, since a finished step must not wait for groups.
const MEANWHILE_WAIT: Duration = Duration::from_millis(5);

/// Whether groups are taken in while a step runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Intake {
    Open,
    /// During a replay.
    Closed,
}

impl Trainer {
    /// Makes a batch's manifest durable, unless another trainer has started.
    pub(super) async fn commit(
        &mut self,
        step: PolicyVersion,
        batch: &[Selected<Group>],
    ) -> Result<(), TrainerError> {
        debug_assert_eq!(
            batch.len(),
            self.settings.batch_groups,
            "a batch has B groups"
        );
        let entry = |Selected { candidate, .. }: &Selected<Group>| BatchEntry {
            ticket: candidate.ticket,
            group: candidate.group,
            worker: candidate.worker,
            version: candidate.version,
            audited: candidate.audited,
            rewards: candidate.rewards.clone(),
        };
        let manifest = self.client.sign(Batch {
            descriptor: descriptor_hash(&self.descriptor.bytes),
            generation: self.generation,
            step,
            parent: self.root,
            groups: batch.iter().map(entry).collect(),
        })?;
        let key = format!("b-{}-{step}", self.generation);
        loop {
            let expected = Some(self.batches_read);
            match self
                .client
                .bus()
                .append(Log::Batches, &key, expected, manifest.bytes.clone())
                .await
            {
                Ok(stored) => {
                    self.batches_read = stored.sequence();
                    break;
                }
                Err(BusError::Fenced { .. }) => match self.find_stored(&manifest).await {
                    Ok(true) => break,
                    Ok(false) => return Err(TrainerError::Replaced),
                    Err(TrainerError::Bus(error)) if error.is_transient() => {
                        warn!(%error, "the newest manifest is not known; trying again");
                        tokio::time::sleep(RETRY).await;
                    }
                    Err(error) => return Err(error),
                },
                Err(error) if error.is_transient() => {
                    warn!(%error, %step, "a batch manifest is not confirmed; trying again");
                    tokio::time::sleep(RETRY).await;
                }
                Err(error) => return Err(error.into()),
            }
        }
        self.trained.extend(
            batch
                .iter()
                .map(|s| (s.candidate.ticket, s.candidate.group)),
        );
        Ok(())
    }

    /// Looks for a manifest whose confirmation was lost: true if the newest one is this.
    async fn find_stored(&mut self, manifest: &Signed<Batch>) -> Result<bool, TrainerError> {
        let last = self.client.bus().last(Log::Batches).await?;
        let Some(record) = last.filter(|record| record.payload == manifest.bytes) else {
            return Ok(false);
        };
        self.batches_read = record.sequence;
        Ok(true)
    }

    /// Writes the fates of a batch's groups, then acknowledges the groups. Both may be repeated.
    async fn settle(
        &mut self,
        step: PolicyVersion,
        batch: &[Selected<Group>],
    ) -> Result<(), TrainerError> {
        let reason = |s: &Selected<Group>| {
            format!(
                "trained in step {step} with mean reward {:.3}",
                mean(&s.candidate.rewards)
            )
        };
        let fates = batch
            .iter()
            .map(|s| self.append_fate(fate_of(&s.candidate, Fate::Trained, reason(s), Some(step))));
        try_join_all(fates).await?;
        let tickets = batch.iter().map(|s| s.candidate.ticket);
        let held: Vec<Delivery> = tickets
            .filter_map(|ticket| self.held.remove(&ticket))
            .collect();
        join_all(held.iter().map(acknowledge)).await;
        self.assert_held_are_waiting();
        Ok(())
    }

    /// Takes the step and makes its image durable. Meanwhile it settles the batch and, with the intake open, takes in
    /// groups of the next one. Also returns how long the step took.
    pub(super) async fn step(
        &mut self,
        step: PolicyVersion,
        batch: &[Selected<Group>],
        intake: Intake,
    ) -> Result<(StepOutput, Duration), TrainerError> {
        let input = StepInput {
            step,
            groups: batch.iter().map(train_rollouts).collect(),
            temperature: self.descriptor.body.sampling.temperature,
        };
        let began = Instant::now();
        let mut stepper = self.stepper.take().ok_or_else(|| lost(step))?;
        let running = AtomicBool::new(intake == Intake::Open);
        let stepping = async {
            let output = stepper.step(input).await;
            running.store(false, Ordering::Relaxed);
            (output, began.elapsed())
        };
        let ((output, took), met) = tokio::join!(stepping, self.meanwhile(step, batch, &running));
        self.stepper = Some(stepper);
        met?;
        let output = output.map_err(|source| TrainerError::Step { step, source })?;
        let (archive, image) = (self.archive.clone(), output.image.clone());
        off_loop_if_large(image.len(), move || archive.put_image(step, &image)).await??;
        Ok((output, took))
    }

    async fn meanwhile(
        &mut self,
        step: PolicyVersion,
        batch: &[Selected<Group>],
        running: &AtomicBool,
    ) -> Result<(), TrainerError> {
        self.settle(step, batch).await?;
        while running.load(Ordering::Relaxed) {
            match self.take_groups(MEANWHILE_WAIT).await {
                Err(TrainerError::Bus(error)) if error.is_transient() => {
                    warn!(%error, "the bus did not answer; groups are taken in after the step");
                    return Ok(());
                }
                taken => taken?,
            };
        }
        Ok(())
    }
}

/// The rollouts of a group in the stepper's form.
fn train_rollouts(selected: &Selected<Group>) -> Vec<TrainRollout> {
    let Selected {
        candidate,
        advantages,
    } = selected;
    let rollouts = candidate.carried.rollouts.iter().zip(advantages);
    rollouts
        .map(|(rollout, advantage)| {
            let mut targets = Vec::new();
            let mut at = 0;
            for segment in &rollout.segments {
                let end = at + segment.tokens().len();
                if matches!(segment, Segment::Policy { .. }) {
                    targets.push(at..end);
                }
                at = end;
            }
            TrainRollout {
                tokens: rollout.tokens(),
                targets,
                rollout_logprobs: rollout.drawn().1,
                advantage: *advantage,
                version: candidate.version,
                class: candidate.carried.class,
                audited: candidate.audited,
            }
        })
        .collect()
}

fn mean(values: &[f32]) -> f32 {
    values.iter().sum::<f32>() / values.len().max(1) as f32
}
