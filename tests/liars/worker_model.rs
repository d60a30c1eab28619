//! The model of an honest or lying worker. It also computes the honest answer to each lease, so that the test knows which
//! groups are bad. Most lies are covered: the submitted log-probs are those that the leased version gives to the submitted
//! tokens, so that only the draws reveal the lie.

use std::sync::Arc;

use async_trait::async_trait;

use muster_broadcaster::follower::Held;
use muster_policy::{
    Config, Device, EngineConfig, Image, KernelSet, Policy, ScoreRow, logprobs, score, uniform,
};
use muster_protocol::message::group::{FinishReason, Rollout};
use muster_protocol::message::lease::{Lease, NumericClass};
use muster_rollout::answerer::{AnswerError, Answerer};
use muster_rollout::engine::{PolicyAnswerer, Task};

use super::in_turn::BatchAnswerer;
use super::submissions::{Submissions, difference};

/// How a worker lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lie {
    /// Draws at another temperature, which makes answers better while the policy is unsure.
    Temperature,
    /// Changes one token of one rollout.
    EditedToken,
    /// Draws under four seeds and submits the group that the policy likes best.
    BestOfSeeds,
    /// Draws under up to four versions, the leased one included, and submits the group that the policy likes best.
    BestOfVersions,
    /// Draws with its first weights and claims the version of the lease.
    StaleWeights,
    /// Submits the answers of its first group again and again.
    Replay,
    /// Cuts an answer short, every second time with a stop id at the cut.
    Truncated,
    /// Draws honestly and reports other log-probs.
    ShiftedLogprobs,
    /// Draws with other kernels than those of the numeric class that it claims.
    OtherKernels,
}

impl Lie {
    pub const ALL: [Lie; 9] = [
        Lie::Temperature,
        Lie::EditedToken,
        Lie::BestOfSeeds,
        Lie::BestOfVersions,
        Lie::StaleWeights,
        Lie::Replay,
        Lie::Truncated,
        Lie::ShiftedLogprobs,
        Lie::OtherKernels,
    ];
}

/// Versions that a liar keeps in addition to the first.
const VERSIONS_KEPT: usize = 4;
/// Groups of which a liar chooses the best.
const ATTEMPTS: u8 = 4;
/// Shift of reported log-probs, in nats: ten times the tolerance for rounding.
const SHIFT: f32 = 0.01;

struct HeldVersion {
    policy: Policy,
    answerer: PolicyAnswerer,
    /// The same weights with other kernels, for [`Lie::OtherKernels`].
    other: Option<PolicyAnswerer>,
}

/// How a worker answers leases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Behaviour {
    pub lie: Option<Lie>,
    /// The numeric class that it claims.
    pub class: NumericClass,
}

/// The kernels of a class, then other kernels.
fn kernels(class: NumericClass) -> [KernelSet; 2] {
    match class {
        NumericClass::Int8Cpu => [KernelSet::Int8, KernelSet::Fused],
        _ => [KernelSet::Fused, KernelSet::Int8],
    }
}

/// The model of one worker.
pub struct WorkerModel {
    behaviour: Behaviour,
    config: Config,
    engine: EngineConfig,
    task: Task,
    submissions: Submissions,
    /// Oldest first; a liar's first version stays.
    versions: Vec<HeldVersion>,
    /// The first group that was submitted.
    first_submitted: Option<Vec<Rollout>>,
    lies: u64,
}

impl WorkerModel {
    pub fn new(
        behaviour: Behaviour,
        config: Config,
        engine: EngineConfig,
        task: Task,
        submissions: Submissions,
    ) -> Self {
        Self {
            behaviour,
            config,
            engine,
            task,
            submissions,
            versions: Vec::new(),
            first_submitted: None,
            lies: 0,
        }
    }

    async fn answerer(&self, kernels: KernelSet, held: &Held) -> PolicyAnswerer {
        let (config, engine, task) = (self.config.clone(), self.engine.clone(), self.task.clone());
        let mut answerer = PolicyAnswerer::new(config, kernels, Device::Cpu, engine, task);
        answerer.adopt(&Arc::new(held.clone())).await.unwrap();
        answerer
    }

    async fn honest(&mut self, leases: &[Lease]) -> Result<Vec<Vec<Rollout>>, AnswerError> {
        let newest = self.versions.last_mut().expect("weights are adopted first");
        newest.answerer.answer(leases).await
    }

    /// The log-probs that the newest version gives to the tokens of `rollouts`, in place of those that came with them.
    fn cover(&self, lease: &Lease, rollouts: Vec<Rollout>) -> Vec<Rollout> {
        let policy = &self
            .versions
            .last()
            .expect("weights are adopted first")
            .policy;
        let first = lease.ticket.prompt.len();
        let texts: Vec<Vec<u32>> = rollouts.iter().map(Rollout::tokens).collect();
        let rows: Vec<ScoreRow<'_>> = texts
            .iter()
            .map(|tokens| ScoreRow {
                tokens,
                first,
                temperature: lease.ticket.sampling.temperature,
            })
            .collect();
        let scored = logprobs(policy, &rows).unwrap();
        let rewritten = rollouts.into_iter().zip(scored);
        rewritten
            .map(|(rollout, logprobs)| {
                rollout_with(lease, rollout.drawn().0, logprobs, rollout.finish)
            })
            .collect()
    }

    /// How far the prescribed draw at `position` of rollout `number` lies from the interval of the token submitted there.
    fn draw_error(
        &self,
        lease: &Lease,
        submitted: &[Rollout],
        number: usize,
        position: usize,
    ) -> f64 {
        let policy = &self
            .versions
            .last()
            .expect("weights are adopted first")
            .policy;
        let row = ScoreRow {
            tokens: &submitted[number].tokens(),
            first: lease.ticket.prompt.len(),
            temperature: lease.ticket.sampling.temperature,
        };
        let scored = score(policy, &[row]).unwrap().remove(0);
        let rollout = lease.rollouts.first + number as u32;
        scored[position].error(uniform(&lease.seed, rollout, position as u64))
    }

    async fn answer_with(
        &mut self,
        lie: Lie,
        lease: &Lease,
        honest: Vec<Rollout>,
    ) -> Result<Vec<Rollout>, AnswerError> {
        self.lies += 1;
        Ok(match lie {
            Lie::Temperature => {
                let mut colder = lease.clone();
                colder.ticket.sampling.temperature *= 0.7;
                let drawn = self.honest(&[colder]).await?.remove(0);
                self.cover(lease, drawn)
            }
            Lie::EditedToken => {
                let edited = edit_one_token(lease, honest, self.config.vocab_size as u32 - 1);
                self.cover(lease, edited)
            }
            Lie::BestOfSeeds => {
                let mut best = honest;
                for attempt in 1..ATTEMPTS {
                    let mut other = lease.clone();
                    other.seed[0] ^= attempt;
                    best = likelier(best, self.honest(&[other]).await?.remove(0));
                }
                best
            }
            Lie::BestOfVersions => {
                let mut best = honest;
                let older = self.versions.len() - 1;
                for version in older.saturating_sub(usize::from(ATTEMPTS) - 1)..older {
                    let leases = std::slice::from_ref(lease);
                    let drawn = self.versions[version]
                        .answerer
                        .answer(leases)
                        .await?
                        .remove(0);
                    best = likelier(best, self.cover(lease, drawn));
                }
                best
            }
            Lie::StaleWeights => {
                let leases = std::slice::from_ref(lease);
                let drawn = self.versions[0].answerer.answer(leases).await?.remove(0);
                let claimed = drawn.iter().map(|rollout| {
                    let (tokens, logprobs) = rollout.drawn();
                    rollout_with(lease, tokens, logprobs, rollout.finish)
                });
                claimed.collect()
            }
            Lie::Replay => match self.first_submitted.clone() {
                None => self.first_submitted.insert(honest).clone(),
                Some(first) => {
                    let again = first
                        .iter()
                        .map(|r| rollout_with(lease, r.drawn().0, r.drawn().1, r.finish));
                    self.cover(lease, again.collect())
                }
            },
            Lie::Truncated => {
                let cut = truncate_one(lease, honest, self.lies.is_multiple_of(2));
                self.cover(lease, cut)
            }
            Lie::ShiftedLogprobs => {
                let shifted = honest.into_iter().map(|rollout| {
                    let (tokens, logprobs) = rollout.drawn();
                    let logprobs = logprobs
                        .into_iter()
                        .map(|logprob| logprob - SHIFT)
                        .collect();
                    rollout_with(lease, tokens, logprobs, rollout.finish)
                });
                shifted.collect()
            }
            Lie::OtherKernels => {
                let newest = self.versions.last_mut().expect("weights are adopted first");
                let other = newest
                    .other
                    .as_mut()
                    .expect("a liar with other kernels loads them");
                other.answer(std::slice::from_ref(lease)).await?.remove(0)
            }
        })
    }
}

#[async_trait]
impl BatchAnswerer for WorkerModel {
    async fn adopt(&mut self, held: &Held) -> Result<(), AnswerError> {
        let image = Image::parse(&self.config, &held.image).unwrap();
        let [own, other] = kernels(self.behaviour.class);
        let policy = Policy::from_image(&self.config, &image, own, &Device::Cpu).unwrap();
        let answerer = self.answerer(own, held).await;
        let other = match self.behaviour.lie {
            Some(Lie::OtherKernels) => Some(self.answerer(other, held).await),
            _ => None,
        };
        self.versions.push(HeldVersion {
            policy,
            answerer,
            other,
        });
        if self.versions.len() > VERSIONS_KEPT + 1 {
            self.versions.remove(1);
        }
        Ok(())
    }

    async fn answer(&mut self, leases: &[Lease]) -> Result<Vec<Vec<Rollout>>, AnswerError> {
        let honest = self.honest(leases).await?;
        let mut groups = Vec::with_capacity(honest.len());
        for (lease, honest) in leases.iter().zip(honest) {
            let submitted = match self.behaviour.lie {
                None => honest.clone(),
                Some(lie) => self.answer_with(lie, lease, honest.clone()).await?,
            };
            let draw_error =
                |number, position| self.draw_error(lease, &submitted, number, position);
            let difference = difference(&honest, &submitted, draw_error);
            self.submissions.note(lease, difference);
            groups.push(submitted);
        }
        Ok(groups)
    }
}

fn rollout_with(
    lease: &Lease,
    tokens: Vec<u32>,
    logprobs: Vec<f32>,
    finish: FinishReason,
) -> Rollout {
    let (prompt, version) = (lease.ticket.prompt.clone(), lease.version.version);
    Rollout::single_turn(prompt, tokens, version, logprobs, finish)
}

/// The likelier of two groups.
fn likelier(one: Vec<Rollout>, other: Vec<Rollout>) -> Vec<Rollout> {
    let log_likelihood =
        |group: &[Rollout]| -> f32 { group.iter().flat_map(|r| r.drawn().1).sum() };
    if log_likelihood(&other) > log_likelihood(&one) {
        other
    } else {
        one
    }
}

/// Replaces the first token of a rollout by one from the other end of the distribution than the prescribed draw.
fn edit_one_token(lease: &Lease, mut rollouts: Vec<Rollout>, highest: u32) -> Vec<Rollout> {
    let long_enough = rollouts.iter().position(|r| r.drawn().0.len() > 1);
    let Some(number) = long_enough else {
        return rollouts;
    };
    let (mut tokens, logprobs) = rollouts[number].drawn();
    let draw = uniform(&lease.seed, lease.rollouts.first + number as u32, 0);
    tokens[0] = if draw < 0.5 { highest } else { 0 };
    rollouts[number] = rollout_with(lease, tokens, logprobs, rollouts[number].finish);
    rollouts
}

/// Cuts the last two tokens from an answer; if `covered`, a stop id replaces them.
fn truncate_one(lease: &Lease, mut rollouts: Vec<Rollout>, covered: bool) -> Vec<Rollout> {
    let long_enough = rollouts.iter().position(|r| r.drawn().0.len() > 2);
    let Some(number) = long_enough else {
        return rollouts;
    };
    let (mut tokens, mut logprobs) = rollouts[number].drawn();
    tokens.truncate(tokens.len() - 2);
    if covered {
        tokens.push(lease.ticket.sampling.stop_ids[0]);
    }
    logprobs.truncate(tokens.len());
    let finish = FinishReason::Stop;
    rollouts[number] = rollout_with(lease, tokens, logprobs, finish);
    rollouts
}
