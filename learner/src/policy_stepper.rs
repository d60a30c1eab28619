//! The model in training: the optimizer holds f32 master weights, while forward passes use only the published image, as
//! rollout and critique do. Every update of a step runs on the image of the update before it.

use std::collections::BTreeMap;
use std::num::{NonZeroU64, NonZeroUsize};
use std::path::Path;
use std::sync::Mutex;

use async_trait::async_trait;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use muster_policy::{
    AdamW, Config, Device, Image, KernelSet, Master, Policy, ScoreRow, Storage, TrainRow,
    gradients, logprobs,
};
use muster_protocol::id::PolicyVersion;
use muster_protocol::message::lease::NumericClass;

use crate::objective::{ObjectiveConfig, ObjectiveStats, RolloutTokens};
use crate::schedule::ScheduleConfig;
use crate::stepper::{StepError, StepInput, StepOutput, StepStats, Stepper, TrainRollout};

const GRADIENT_SHARDS: NonZeroUsize = NonZeroUsize::new(2).unwrap();

/// How the policy is trained.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    pub objective: ObjectiveConfig,
    /// The learning rate over the run.
    pub schedule: ScheduleConfig,
    /// The optimizer; its learning rate is the schedule's.
    pub optimizer: AdamW,
    /// Optimizer updates per step: each trains an equal share of the batch's groups.
    pub updates_per_step: NonZeroUsize,
    /// Shards of a gradient. The bits of a gradient depend on this number, so it is never the number of cores.
    pub gradient_shards: NonZeroUsize,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            objective: ObjectiveConfig::default(),
            schedule: ScheduleConfig::default(),
            optimizer: AdamW::default(),
            updates_per_step: NonZeroUsize::MIN,
            gradient_shards: GRADIENT_SHARDS,
        }
    }
}

/// How weights are stored and computed.
#[derive(Debug, Clone)]
pub struct ModelConfig {
    pub config: Config,
    /// Storage of the published image.
    pub storage: Storage,
    pub kernels: KernelSet,
    pub device: Device,
}

/// A model in training.
#[derive(Debug)]
pub struct PolicyStepper {
    /// None while a step runs on its own thread.
    model: Option<Box<Model>>,
    image: Bytes,
}

#[derive(Debug)]
struct Model {
    parts: ModelConfig,
    train: TrainConfig,
    steps: u64,
    versions_kept: usize,
    master: Master,
    image: Image,
    policy: Policy,
    /// Versions that groups may still come from.
    known: BTreeMap<PolicyVersion, Known>,
}

/// A version that groups may still come from, in every arithmetic that one came in.
#[derive(Debug)]
struct Known {
    image: Image,
    policy: Policy,
    /// The int8 weights; None before a group of an int8 worker is recomputed.
    rounded: Option<Policy>,
}

impl Known {
    fn new(image: &Image, policy: &Policy) -> Self {
        Self {
            image: image.clone(),
            policy: policy.clone(),
            rounded: None,
        }
    }

    /// The policy that a group of this class was drawn with. Groups of GPU classes are recomputed in this trainer's class;
    /// the tolerance between classes covers the difference.
    fn drawn_with(&mut self, class: NumericClass, config: &Config) -> Result<&Policy, StepError> {
        if class != NumericClass::Int8Cpu {
            return Ok(&self.policy);
        }
        let rounded = match self.rounded.take() {
            Some(rounded) => rounded,
            None => Policy::from_image(config, &self.image, KernelSet::Int8, &Device::Cpu)
                .map_err(failed)?,
        };
        Ok(self.rounded.insert(rounded))
    }
}

fn failed(error: impl std::fmt::Display) -> StepError {
    StepError(error.to_string())
}

impl PolicyStepper {
    /// Starts from published weights as version 0, for a run of `steps` steps whose groups may be `async_level` steps old.
    ///
    /// # Errors
    /// When the image does not belong to the configuration.
    pub fn new(
        parts: ModelConfig,
        train: TrainConfig,
        image: &Image,
        steps: u64,
        async_level: u64,
    ) -> Result<Self, StepError> {
        let master = Master::from_image(&parts.config, image).map_err(failed)?;
        let image = master.image(parts.storage).map_err(failed)?;
        let policy = build(&parts, &image)?;
        let known = BTreeMap::from([(PolicyVersion(0), Known::new(&image, &policy))]);
        let versions_kept = async_level as usize + 1;
        let published = Bytes::from_owner(image.shared_bytes());
        let model = Model {
            parts,
            train,
            steps,
            versions_kept,
            master,
            image,
            policy,
            known,
        };
        Ok(Self {
            model: Some(Box::new(model)),
            image: published,
        })
    }

    /// Runs `work` on its own thread.
    async fn on_thread<R: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut Model) -> Result<R, StepError> + Send + 'static,
    ) -> Result<R, StepError> {
        let lost = || StepError("an earlier step did not end: restart the trainer".to_owned());
        let mut model = self.model.take().ok_or_else(lost)?;
        let (model, result) = tokio::task::spawn_blocking(move || {
            let result = work(&mut model);
            (model, result)
        })
        .await
        .map_err(failed)?;
        self.image = Bytes::from_owner(model.image.shared_bytes());
        self.model = Some(model);
        result
    }
}

#[async_trait]
impl Stepper for PolicyStepper {
    fn image(&self) -> Bytes {
        self.image.clone()
    }

    async fn step(&mut self, input: StepInput) -> Result<StepOutput, StepError> {
        let stats = self.on_thread(move |model| model.step(input)).await?;
        Ok(StepOutput {
            image: self.image.clone(),
            stats,
        })
    }

    async fn save(&mut self, path: &Path) -> Result<(), StepError> {
        let path = path.to_owned();
        self.on_thread(move |model| model.master.save(&path).map_err(failed))
            .await
    }

    async fn restore(
        &mut self,
        path: &Path,
        version: PolicyVersion,
        images: Vec<(PolicyVersion, Bytes)>,
    ) -> Result<(), StepError> {
        let path = path.to_owned();
        self.on_thread(move |model| model.restore(&path, version, &images))
            .await
    }
}

fn build(parts: &ModelConfig, image: &Image) -> Result<Policy, StepError> {
    Policy::from_image(&parts.config, image, parts.kernels, &parts.device).map_err(failed)
}

impl Model {
    fn step(&mut self, mut input: StepInput) -> Result<StepStats, StepError> {
        let recomputed = self.recompute(&mut input)?;
        let before = self.image.clone();
        let mut stats = StepStats {
            recomputed,
            ..StepStats::default()
        };
        let per_update = input
            .groups
            .len()
            .div_ceil(self.train.updates_per_step.get())
            .max(1);
        let learning_rate = self
            .train
            .schedule
            .lr(input.step.0.saturating_sub(1), self.steps);
        for groups in input.groups.chunks(per_update) {
            let rollouts: Vec<&TrainRollout> = groups.iter().flatten().collect();
            self.update(&rollouts, input.temperature, learning_rate, &mut stats)?;
        }
        let updates = stats.updates.max(1) as f64;
        stats.loss /= updates;
        stats.entropy /= updates;
        stats.clip_fraction /= updates;
        stats.gradient_norm /= updates;
        stats.learning_rate = learning_rate;
        stats.changed_fraction = changed_fraction(&before, &self.image);
        let made = Known::new(&self.image, &self.policy);
        self.known.insert(input.step, made);
        while self.known.len() > self.versions_kept {
            self.known.pop_first();
        }
        Ok(stats)
    }

    /// Replaces the recorded log-probs of unaudited rollouts by those of their version's image in their own class, so that
    /// the importance ratio measures only the policy's change. Returns how many rollouts were recomputed.
    fn recompute(&mut self, input: &mut StepInput) -> Result<u64, StepError> {
        let mut by_weights: BTreeMap<(PolicyVersion, NumericClass), Vec<&mut TrainRollout>> =
            BTreeMap::new();
        for rollout in input
            .groups
            .iter_mut()
            .flatten()
            .filter(|rollout| !rollout.audited)
        {
            let drawn_with = (rollout.version, rollout.class);
            by_weights.entry(drawn_with).or_default().push(rollout);
        }
        let mut recomputed = 0;
        for ((version, class), rollouts) in by_weights {
            let known = self.known.get_mut(&version).ok_or_else(|| {
                failed(format!(
                    "version {version} is no longer held to recompute its log-probs"
                ))
            })?;
            let policy = known.drawn_with(class, &self.parts.config)?;
            let first_drawn = |r: &TrainRollout| r.targets.first().map_or(1, |range| range.start);
            let rows: Vec<ScoreRow<'_>> = rollouts
                .iter()
                .map(|r| ScoreRow {
                    tokens: &r.tokens,
                    first: first_drawn(r),
                    temperature: input.temperature,
                })
                .collect();
            let scores = logprobs(policy, &rows).map_err(failed)?;
            recomputed += scores.len() as u64;
            for (rollout, scored) in rollouts.into_iter().zip(scores) {
                let first = first_drawn(rollout);
                let drawn = rollout
                    .targets
                    .iter()
                    .cloned()
                    .flatten()
                    .map(|at| scored[at - first]);
                rollout.rollout_logprobs = drawn.collect();
            }
        }
        Ok(recomputed)
    }

    fn update(
        &mut self,
        rollouts: &[&TrainRollout],
        temperature: f32,
        learning_rate: f64,
        stats: &mut StepStats,
    ) -> Result<(), StepError> {
        let rows: Vec<TrainRow> = rollouts
            .iter()
            .map(|r| TrainRow {
                tokens: r.tokens.clone(),
                targets: r.targets.clone(),
            })
            .collect();
        let tokens: usize = rows.iter().map(TrainRow::target_count).sum();
        let trained = NonZeroU64::new(tokens as u64)
            .ok_or_else(|| failed("an update has no token to train on"))?;
        let objective = self.train.objective;
        let evaluations: Mutex<BTreeMap<usize, ObjectiveStats>> = Mutex::new(BTreeMap::new());
        let first_error: Mutex<Option<StepError>> = Mutex::new(None);
        let coefficients = |row: usize, learner_logprobs: &[f32]| {
            let rollout = RolloutTokens {
                learner_logprobs,
                rollout_logprobs: &rollouts[row].rollout_logprobs,
                advantage: rollouts[row].advantage,
            };
            match objective.evaluate(&rollout, trained) {
                Ok(evaluation) => {
                    locked(&evaluations).insert(row, evaluation.stats);
                    evaluation.derivatives
                }
                Err(error) => {
                    locked(&first_error).get_or_insert(failed(error));
                    vec![0.0; learner_logprobs.len()]
                }
            }
        };
        let shards = self.train.gradient_shards;
        let pass =
            gradients(&self.policy, &rows, temperature, shards, &coefficients).map_err(failed)?;
        if let Some(error) = locked(&first_error).take() {
            return Err(error);
        }
        let mut sums = ObjectiveStats::default();
        for row_stats in locked(&evaluations).values() {
            sums.add(row_stats); // in row order, so that equal runs report equal numbers
        }
        let settings = AdamW {
            learning_rate: learning_rate as f32,
            ..self.train.optimizer
        };
        let update = self
            .master
            .step(&pass.gradients, &settings)
            .map_err(failed)?;
        self.image = self.master.image(self.parts.storage).map_err(failed)?;
        self.policy = build(&self.parts, &self.image)?;
        let entropy: f64 = pass.entropies.iter().flatten().map(|h| f64::from(*h)).sum();
        if stats.updates == 0 {
            stats.mismatch_kl = sums.mismatch_kl();
        }
        stats.loss += sums.loss;
        stats.entropy += entropy / tokens as f64;
        stats.clip_fraction += sums.clip_fraction();
        stats.gradient_norm += f64::from(update.gradient_norm);
        stats.tokens += pass.tokens as u64;
        stats.updates += 1;
        Ok(())
    }

    fn restore(
        &mut self,
        path: &Path,
        version: PolicyVersion,
        images: &[(PolicyVersion, Bytes)],
    ) -> Result<(), StepError> {
        self.master = Master::load(path).map_err(failed)?;
        self.image = self.master.image(self.parts.storage).map_err(failed)?;
        self.policy = build(&self.parts, &self.image)?;
        self.known.clear();
        for (earlier, bytes) in images {
            let image = Image::parse(&self.parts.config, bytes).map_err(failed)?;
            let policy = build(&self.parts, &image)?;
            self.known.insert(*earlier, Known::new(&image, &policy));
        }
        let newest = Known::new(&self.image, &self.policy);
        self.known.insert(version, newest);
        Ok(())
    }
}

/// Locks a mutex. After a panic the data is still usable, since each entry is written whole.
fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Share of the parameters whose stored bits differ.
fn changed_fraction(before: &Image, after: &Image) -> f64 {
    let mut changed = 0usize;
    let mut total = 0usize;
    for (old, new) in before.tensors().iter().zip(after.tensors()) {
        let width = old.storage.width();
        let (old, new) = (
            &before.bytes()[old.bytes.clone()],
            &after.bytes()[new.bytes.clone()],
        );
        total += old.len() / width;
        changed += old
            .chunks_exact(width)
            .zip(new.chunks_exact(width))
            .filter(|(a, b)| a != b)
            .count();
    }
    changed as f64 / total.max(1) as f64
}

#[cfg(test)]
mod tests;
