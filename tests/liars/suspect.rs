//! A worker's model, honest or lying. Either way it also computes the honest answer to each lease, so that the ledger can
//! say which groups are bad. Most lies cover their tracks: the log-probs submitted are those that the leased version gives
//! to the tokens submitted, so that only the draws betray them.

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
use super::ledger::{Ledger, difference};

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
    /// Never fetches new weights and says that it did.
    StaleWeights,
    /// Gives the answers of its first group again and again.
    Replay,
    /// Cuts an answer short: openly, or with a stop id put where it was cut.
    Truncated,
    /// Draws honestly and reports other log-probs.
    ShiftedLogprobs,
    /// Draws honestly with other kernels than those of the class that it answers in.
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

/// Versions that a liar keeps besides the first.
const VERSIONS_KEPT: usize = 4;
/// Attempts of a liar that chooses the best.
const ATTEMPTS: u8 = 4;
/// By how much reported log-probs are shifted, in nats: ten times what rounding may explain.
const SHIFT: f32 = 0.01;

struct Known {
    policy: Policy,
    answerer: PolicyAnswerer,
    /// With other kernels.
    other: Option<PolicyAnswerer>,
}

/// How a worker answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conduct {
    pub lie: Option<Lie>,
    /// The class that it answers in.
    pub class: NumericClass,
}

/// The kernels of a class, and those of the other.
fn kernels(class: NumericClass) -> [KernelSet; 2] {
    match class {
        NumericClass::Int8Cpu => [KernelSet::Int8, KernelSet::Fused],
        _ => [KernelSet::Fused, KernelSet::Int8],
    }
}

/// A worker's model.
pub struct Suspect {
    conduct: Conduct,
    config: Config,
    engine: EngineConfig,
    task: Task,
    ledger: Ledger,
    /// Oldest first; a liar's first version stays.
    known: Vec<Known>,
    /// What was submitted first.
    first_said: Option<Vec<Rollout>>,
    told: u64,
}

impl Suspect {
    pub fn new(
        conduct: Conduct,
        config: Config,
        engine: EngineConfig,
        task: Task,
        ledger: Ledger,
    ) -> Self {
        Self {
            conduct,
            config,
            engine,
            task,
            ledger,
            known: Vec::new(),
            first_said: None,
            told: 0,
        }
    }

    async fn answerer(&self, kernels: KernelSet, held: &Held) -> PolicyAnswerer {
        let (config, engine, task) = (self.config.clone(), self.engine.clone(), self.task.clone());
        let mut answerer = PolicyAnswerer::new(config, kernels, Device::Cpu, engine, task);
        answerer.adopt(&Arc::new(held.clone())).await.unwrap();
        answerer
    }

    async fn honest(&mut self, leases: &[Lease]) -> Result<Vec<Vec<Rollout>>, AnswerError> {
        let newest = self.known.last_mut().expect("weights are adopted first");
        newest.answerer.answer(leases).await
    }

    /// The log-probs that the newest version gives to the tokens of `rollouts`, in place of those that came with them.
    fn cover(&self, lease: &Lease, rollouts: Vec<Rollout>) -> Vec<Rollout> {
        let policy = &self.known.last().expect("weights are adopted first").policy;
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

    /// How far the prescribed draw at `position` of rollout `number` lies from the interval of the token told there.
    fn draw_error(&self, lease: &Lease, told: &[Rollout], number: usize, position: usize) -> f64 {
        let policy = &self.known.last().expect("weights are adopted first").policy;
        let row = ScoreRow {
            tokens: &told[number].tokens(),
            first: lease.ticket.prompt.len(),
            temperature: lease.ticket.sampling.temperature,
        };
        let scored = score(policy, &[row]).unwrap().remove(0);
        let rollout = lease.rollouts.first + number as u32;
        scored[position].error(uniform(&lease.seed, rollout, position as u64))
    }

    async fn tell(
        &mut self,
        lie: Lie,
        lease: &Lease,
        honest: Vec<Rollout>,
    ) -> Result<Vec<Rollout>, AnswerError> {
        self.told += 1;
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
                    best = liked_better(best, self.honest(&[other]).await?.remove(0));
                }
                best
            }
            Lie::BestOfVersions => {
                let mut best = honest;
                let older = self.known.len() - 1;
                for version in older.saturating_sub(usize::from(ATTEMPTS) - 1)..older {
                    let leases = std::slice::from_ref(lease);
                    let drawn = self.known[version].answerer.answer(leases).await?.remove(0);
                    best = liked_better(best, self.cover(lease, drawn));
                }
                best
            }
            Lie::StaleWeights => {
                let leases = std::slice::from_ref(lease);
                let drawn = self.known[0].answerer.answer(leases).await?.remove(0);
                let claimed = drawn.iter().map(|rollout| {
                    let (tokens, logprobs) = rollout.drawn();
                    rollout_with(lease, tokens, logprobs, rollout.finish)
                });
                claimed.collect()
            }
            Lie::Replay => match self.first_said.clone() {
                None => self.first_said.insert(honest).clone(),
                Some(said) => {
                    let again = said
                        .iter()
                        .map(|r| rollout_with(lease, r.drawn().0, r.drawn().1, r.finish));
                    self.cover(lease, again.collect())
                }
            },
            Lie::Truncated => {
                let cut = truncate_one(lease, honest, self.told.is_multiple_of(2));
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
                let newest = self.known.last_mut().expect("weights are adopted first");
                let other = newest.other.as_mut().expect("this liar has them");
                other.answer(std::slice::from_ref(lease)).await?.remove(0)
            }
        })
    }
}

#[async_trait]
impl BatchAnswerer for Suspect {
    async fn adopt(&mut self, held: &Held) -> Result<(), AnswerError> {
        let image = Image::parse(&self.config, &held.image).unwrap();
        let [own, other] = kernels(self.conduct.class);
        let policy = Policy::from_image(&self.config, &image, own, &Device::Cpu).unwrap();
        let answerer = self.answerer(own, held).await;
        let other = match self.conduct.lie {
            Some(Lie::OtherKernels) => Some(self.answerer(other, held).await),
            _ => None,
        };
        self.known.push(Known {
            policy,
            answerer,
            other,
        });
        if self.known.len() > VERSIONS_KEPT + 1 {
            self.known.remove(1);
        }
        Ok(())
    }

    async fn answer(&mut self, leases: &[Lease]) -> Result<Vec<Vec<Rollout>>, AnswerError> {
        let honest = self.honest(leases).await?;
        let mut told = Vec::with_capacity(honest.len());
        for (lease, honest) in leases.iter().zip(honest) {
            let said = match self.conduct.lie {
                None => honest.clone(),
                Some(lie) => self.tell(lie, lease, honest.clone()).await?,
            };
            let draw_error = |number, position| self.draw_error(lease, &said, number, position);
            let difference = difference(&honest, &said, draw_error);
            self.ledger.note(lease, difference);
            told.push(said);
        }
        Ok(told)
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

/// Of two groups the likelier one.
fn liked_better(one: Vec<Rollout>, other: Vec<Rollout>) -> Vec<Rollout> {
    let liking = |group: &[Rollout]| -> f32 { group.iter().flat_map(|r| r.drawn().1).sum() };
    if liking(&other) > liking(&one) {
        other
    } else {
        one
    }
}

/// Puts a token at the far end of the distribution from the prescribed draw in the place of the first one.
fn edit_one_token(lease: &Lease, mut rollouts: Vec<Rollout>, highest: u32) -> Vec<Rollout> {
    let long = rollouts.iter().position(|r| r.drawn().0.len() > 1);
    let Some(number) = long else { return rollouts };
    let (mut tokens, logprobs) = rollouts[number].drawn();
    let draw = uniform(&lease.seed, lease.rollouts.first + number as u32, 0);
    tokens[0] = if draw < 0.5 { highest } else { 0 };
    rollouts[number] = rollout_with(lease, tokens, logprobs, rollouts[number].finish);
    rollouts
}

/// Takes the last two tokens from an answer; `covered`, a stop id stands where they were.
fn truncate_one(lease: &Lease, mut rollouts: Vec<Rollout>, covered: bool) -> Vec<Rollout> {
    let long = rollouts.iter().position(|r| r.drawn().0.len() > 2);
    let Some(number) = long else { return rollouts };
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
