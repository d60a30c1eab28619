//! Stands in for the model: a table of pseudo-logits, with the shipped sampling rule and the shipped scoring. A version's
//! root determines the table, so that stale weights give other answers. A step hashes its training data into the next
//! image, so that any difference between two runs changes every later message.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use muster_broadcaster::follower::Held;
use muster_learner::stepper::{StepError, StepInput, StepOutput, StepStats, Stepper};
use muster_policy::{Distribution, StopAt, TokenScore, uniform};
use muster_protocol::id::{ContentHash, PolicyVersion, StateRoot};
use muster_protocol::message::group::{FinishReason, Rollout};
use muster_protocol::message::lease::Lease;
use muster_protocol::message::version::VersionRef;
use muster_rewards::critic::scorer::{ScoreRequest, Scorer, ScorerError};
use muster_rollout::answerer::AnswerError;

use crate::in_turn::BatchAnswerer;
use crate::observer::Observer;

/// Size of the table's vocabulary.
pub const VOCABULARY: u32 = 16;
/// The id that ends an answer.
pub const STOP: u32 = 0;
/// Longest answer.
pub const TOKENS_MAX: u32 = 6;

/// A seeded source of rng for one purpose.
pub fn seeded_rng(seed: u64, purpose: &str, number: u64) -> StdRng {
    let mut bytes = seed.to_le_bytes().to_vec();
    bytes.extend_from_slice(&number.to_le_bytes());
    bytes.extend_from_slice(purpose.as_bytes());
    StdRng::from_seed(ContentHash::of(&bytes).0)
}

/// Logits in [−2, 2], from a hash of the version and all tokens before.
fn logits(root: &StateRoot, context: &[u32]) -> [f32; VOCABULARY as usize] {
    let mut bytes = root.0.to_vec();
    bytes.extend(context.iter().flat_map(|token| token.to_le_bytes()));
    let hash = ContentHash::of(&bytes).0;
    std::array::from_fn(|id| {
        let drawn = u16::from_le_bytes([hash[2 * id], hash[2 * id + 1]]);
        f32::from(drawn) / f32::from(u16::MAX) * 4.0 - 2.0
    })
}

fn row(root: &StateRoot, context: &[u32], temperature: f32) -> Distribution {
    let mut distribution = Distribution::default();
    assert!(
        distribution.load(&logits(root, context), temperature),
        "the table is finite"
    );
    distribution
}

/// How a rollout is drawn: as prescribed, or changed by a liar.
pub struct Draw<'a> {
    pub root: &'a StateRoot,
    pub temperature: f32,
    /// Position whose token is replaced by its neighbour.
    pub edited: Option<usize>,
}

/// Draws rollout `number` of a lease.
pub fn rollout(lease: &Lease, number: u32, draw: &Draw<'_>) -> Rollout {
    let prompt = &lease.ticket.prompt;
    let mut context = prompt.clone();
    let mut logprobs = Vec::new();
    let mut finish = FinishReason::Length;
    for position in 0..lease.ticket.sampling.tokens_max as usize {
        let row = row(draw.root, &context, draw.temperature);
        let mut token = row.draw(uniform(&lease.seed, number, position as u64));
        if draw.edited == Some(position) {
            token = 1 + (token + 1) % (VOCABULARY - 1); // never the stop id
        }
        context.push(token);
        logprobs.push(row.logprob(token));
        if token == STOP {
            finish = FinishReason::Stop;
            break;
        }
    }
    let tokens = context.split_off(prompt.len());
    Rollout::single_turn(context, tokens, lease.version.version, logprobs, finish)
}

/// The rollouts that the lease prescribes.
pub fn honest(lease: &Lease) -> Vec<Rollout> {
    let draw = Draw {
        root: &lease.version.root,
        temperature: lease.ticket.sampling.temperature,
        edited: None,
    };
    let numbers = lease.rollouts.first..lease.rollouts.first + lease.rollouts.count;
    numbers
        .map(|number| rollout(lease, number, &draw))
        .collect()
}

/// An honest worker's model.
pub struct TableAnswerer {
    pub rng: StdRng,
    pub observer: Observer,
}

/// Sleeps for as long as a worker takes to answer; one time in fifty so long that its leases expire.
pub async fn spend_answer_time(rng: &mut StdRng) {
    let slow = rng.random::<f64>() < 0.02;
    let millis = if slow {
        15_000
    } else {
        rng.random_range(300..2_000)
    };
    tokio::time::sleep(Duration::from_millis(millis)).await;
}

#[async_trait]
impl BatchAnswerer for TableAnswerer {
    async fn adopt(&mut self, _held: &Held) -> Result<(), AnswerError> {
        Ok(())
    }

    async fn answer(&mut self, leases: &[Lease]) -> Result<Vec<Vec<Rollout>>, AnswerError> {
        self.observer.leased(leases);
        spend_answer_time(&mut self.rng).await;
        let groups: Vec<Vec<Rollout>> = leases.iter().map(honest).collect();
        self.observer.answered(leases, &groups);
        Ok(groups)
    }
}

/// A critic's model.
pub struct TableScorer {
    pub rng: StdRng,
    pub versions_kept: usize,
    pub held: BTreeMap<PolicyVersion, VersionRef>,
}

#[async_trait]
impl Scorer for TableScorer {
    async fn adopt(&mut self, held: &Held) -> Result<(), ScorerError> {
        let version = held.version.body.reference();
        self.held.insert(version.version, version);
        while self.held.len() > self.versions_kept {
            self.held.pop_first();
        }
        Ok(())
    }

    fn held(&self) -> Vec<VersionRef> {
        self.held.values().copied().collect()
    }

    async fn score(
        &mut self,
        requests: Vec<ScoreRequest>,
    ) -> Result<Vec<Vec<TokenScore>>, ScorerError> {
        let millis = self.rng.random_range(10..80);
        tokio::time::sleep(Duration::from_millis(millis)).await;
        let held: Vec<VersionRef> = self.held();
        let scored = requests.iter().map(|request| {
            if !held.contains(&request.version) {
                return Err(ScorerError(format!(
                    "version {} is not held",
                    request.version.version
                )));
            }
            let positions = request.first..request.tokens.len();
            let score = |position: usize| {
                let row = row(
                    &request.version.root,
                    &request.tokens[..position],
                    request.temperature,
                );
                let token = request.tokens[position];
                let (cdf_below, cdf_through) = row.interval(token);
                TokenScore {
                    logprob: row.logprob(token),
                    cdf_below,
                    cdf_through,
                }
            };
            Ok(positions.map(score).collect())
        });
        scored.collect()
    }

    fn text(&self, tokens: &[u32]) -> Result<String, ScorerError> {
        let letters = tokens.iter().filter(|token| **token != STOP);
        Ok(letters
            .filter_map(|token| char::from_u32('a' as u32 + token))
            .collect())
    }

    fn stopped(&mut self, _tokens: &[u32], _strings: &[String]) -> Option<StopAt> {
        None // answers of the table end with a stop id
    }
}

/// The model in training: its image is a hash of all data that it was trained on.
pub struct TableStepper {
    pub seed: u64,
    image: Bytes,
}

impl TableStepper {
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            image: image(&ContentHash::of(&seed.to_le_bytes())),
        }
    }
}

/// A safetensors file of one tensor.
fn image(hash: &ContentHash) -> Bytes {
    let mut header = br#"{"table":{"dtype":"F32","shape":[8],"data_offsets":[0,32]}}"#.to_vec();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(&header);
    file.extend_from_slice(&hash.0);
    file.into()
}

#[async_trait]
impl Stepper for TableStepper {
    fn image(&self) -> Bytes {
        self.image.clone()
    }

    async fn step(&mut self, input: StepInput) -> Result<StepOutput, StepError> {
        let millis = seeded_rng(self.seed, "step", input.step.0).random_range(200..700);
        tokio::time::sleep(Duration::from_millis(millis)).await;
        let mut bytes = self.image.to_vec();
        for rollout in input.groups.iter().flatten() {
            bytes.extend(rollout.tokens.iter().flat_map(|token| token.to_le_bytes()));
            bytes.extend(
                rollout
                    .rollout_logprobs
                    .iter()
                    .flat_map(|p| p.to_le_bytes()),
            );
            bytes.extend(rollout.advantage.to_le_bytes());
        }
        self.image = image(&ContentHash::of(&bytes));
        Ok(StepOutput {
            image: self.image.clone(),
            stats: StepStats::default(),
        })
    }

    async fn save(&mut self, path: &Path) -> Result<(), StepError> {
        std::fs::write(path, &self.image).map_err(|error| StepError(error.to_string()))
    }

    async fn restore(
        &mut self,
        path: &Path,
        _version: PolicyVersion,
        _images: Vec<(PolicyVersion, Bytes)>,
    ) -> Result<(), StepError> {
        let read = std::fs::read(path).map_err(|error| StepError(error.to_string()))?;
        self.image = read.into();
        Ok(())
    }
}
