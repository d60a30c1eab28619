//! What a critic needs of a model: scores of finished answers under any version that it holds, and the answers as text.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

use muster_broadcaster::follower::Held;
use muster_policy::{
    Config, Device, KernelSet, Policy, ScoreRow, StopAt, StopStrings, Threads, TokenBytes,
    TokenScore, Tokenizer, score,
};
use muster_protocol::message::lease::NumericClass;
use muster_protocol::message::version::VersionRef;

/// Why a model gave no scores.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct ScorerError(pub String);

/// A finished answer to score.
#[derive(Debug, Clone, PartialEq)]
pub struct ScoreRequest {
    /// Under which weights.
    pub version: VersionRef,
    /// Prompt and answer.
    pub tokens: Vec<u32>,
    /// Where the answer begins.
    pub first: usize,
    /// What the logits are divided by.
    pub temperature: f32,
    /// The arithmetic that the answer claims to be drawn in.
    pub class: NumericClass,
}

impl ScoreRequest {
    fn row(&self) -> ScoreRow<'_> {
        ScoreRow {
            tokens: &self.tokens,
            first: self.first,
            temperature: self.temperature,
        }
    }
}

/// A model that scores.
#[async_trait]
pub trait Scorer: Send {
    /// Takes over the weights of one more version, and drops the oldest beyond what a group may still come from.
    async fn adopt(&mut self, held: &Held) -> Result<(), ScorerError>;

    /// The versions held.
    fn held(&self) -> Vec<VersionRef>;

    /// One forward pass over every answer: in the arithmetic that it claims for [`NumericClass::Int8Cpu`], which every
    /// machine can compute in, and in the critic's own for all others.
    async fn score(
        &mut self,
        requests: Vec<ScoreRequest>,
    ) -> Result<Vec<Vec<TokenScore>>, ScorerError>;

    /// An answer's drawn tokens as text, without end markers.
    ///
    /// # Errors
    /// When a token is not of the vocabulary.
    fn text(&self, tokens: &[u32]) -> Result<String, ScorerError>;

    /// Where the first of the stop strings is complete in an answer's drawn tokens.
    fn stopped(&mut self, tokens: &[u32], strings: &[String]) -> Option<StopAt>;
}

/// The policy as a scorer.
pub struct PolicyScorer {
    config: Config,
    kernels: KernelSet,
    device: Device,
    tokenizer: Tokenizer,
    /// Made when a stop string is first looked for.
    bytes: Option<Arc<TokenBytes>>,
    versions_kept: usize,
    /// Whether the run takes answers of workers with int8 weights.
    int8: Int8,
    held: BTreeMap<u64, Weights>,
}

/// Whether weights are also wanted rounded to eight bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Int8 {
    Wanted,
    /// Then nothing is kept to make them of.
    NotWanted,
}

/// A version's weights.
#[derive(Debug, Clone)]
struct Weights {
    version: VersionRef,
    /// In the critic's own arithmetic.
    policy: Policy,
    /// For answers in int8.
    rounded: Rounded,
}

/// Weights rounded to eight bits: made when an answer first needs them, of what they then take the place of.
#[derive(Debug, Clone)]
enum Rounded {
    No,
    From(Bytes),
    Made(Policy),
}

impl Weights {
    /// The weights by which answers of a class are scored.
    fn of(&mut self, class: NumericClass) -> Result<&Policy, ScorerError> {
        if class != NumericClass::Int8Cpu {
            return Ok(&self.policy);
        }
        if let Rounded::From(image) = &self.rounded {
            let (config, threads) = (self.policy.config(), Threads::one());
            let made =
                Policy::for_inference(config, image, KernelSet::Int8, &Device::Cpu, &threads);
            self.rounded = Rounded::Made(made.map_err(failed)?);
        }
        match &self.rounded {
            Rounded::Made(policy) => Ok(policy),
            // Dispatch leases no class that the run does not list: whoever claims one is held to this critic's own.
            Rounded::No | Rounded::From(_) => Ok(&self.policy),
        }
    }
}

impl PolicyScorer {
    /// A scorer that keeps the newest `versions_kept` versions.
    pub fn new(
        config: Config,
        kernels: KernelSet,
        device: Device,
        tokenizer: Tokenizer,
        versions_kept: usize,
    ) -> Self {
        Self {
            config,
            kernels,
            device,
            tokenizer,
            bytes: None,
            versions_kept,
            int8: Int8::NotWanted,
            held: BTreeMap::new(),
        }
    }

    /// The same scorer for a run that takes answers of these classes.
    #[must_use]
    pub fn for_classes(mut self, classes: &[NumericClass]) -> Self {
        self.int8 = match classes.contains(&NumericClass::Int8Cpu) {
            true => Int8::Wanted,
            false => Int8::NotWanted,
        };
        self
    }
}

fn failed(error: impl std::fmt::Display) -> ScorerError {
    ScorerError(error.to_string())
}

#[async_trait]
impl Scorer for PolicyScorer {
    async fn adopt(&mut self, held: &Held) -> Result<(), ScorerError> {
        let (config, kernels) = (self.config.clone(), self.kernels);
        let (device, image) = (self.device.clone(), held.image.clone());
        let built = tokio::task::spawn_blocking(move || {
            Policy::for_inference(&config, &image, kernels, &device, &Threads::one())
                .map_err(failed)
        });
        let policy = built.await.map_err(failed)??;
        let version = held.version.body.reference();
        let rounded = match self.int8 {
            Int8::Wanted => Rounded::From(held.image.clone()),
            Int8::NotWanted => Rounded::No,
        };
        let weights = Weights {
            version,
            policy,
            rounded,
        };
        self.held.insert(version.version.0, weights);
        while self.held.len() > self.versions_kept {
            self.held.pop_first();
        }
        Ok(())
    }

    fn held(&self) -> Vec<VersionRef> {
        self.held.values().map(|weights| weights.version).collect()
    }

    async fn score(
        &mut self,
        requests: Vec<ScoreRequest>,
    ) -> Result<Vec<Vec<TokenScore>>, ScorerError> {
        let mut held = self.held.clone(); // policies are shared, not copied
        let scored = tokio::task::spawn_blocking(move || {
            score_all(&mut held, &requests).map(|scores| (held, scores))
        });
        let (held, scores) = scored.await.map_err(failed)??;
        self.held = held; // with what was made for these answers
        Ok(scores)
    }

    fn text(&self, tokens: &[u32]) -> Result<String, ScorerError> {
        self.tokenizer.decode(tokens).map_err(failed)
    }

    fn stopped(&mut self, tokens: &[u32], strings: &[String]) -> Option<StopAt> {
        if strings.is_empty() {
            return None;
        }
        let made = || Arc::new(TokenBytes::new(&self.tokenizer));
        let bytes = Arc::clone(self.bytes.get_or_insert_with(made));
        StopStrings::new(strings, bytes).first(tokens)
    }
}

/// Scores requests, those of one version and class together. There are no scores under a version that is not held.
fn score_all(
    held: &mut BTreeMap<u64, Weights>,
    requests: &[ScoreRequest],
) -> Result<Vec<Vec<TokenScore>>, ScorerError> {
    let mut scores = vec![Vec::new(); requests.len()];
    for weights in held.values_mut() {
        let mut by_class: BTreeMap<NumericClass, Vec<usize>> = BTreeMap::new();
        for (number, request) in requests.iter().enumerate() {
            if request.version == weights.version {
                by_class.entry(request.class).or_default().push(number);
            }
        }
        for (class, numbers) in by_class {
            let rows: Vec<ScoreRow<'_>> = numbers.iter().map(|n| requests[*n].row()).collect();
            let scored = score(weights.of(class)?, &rows).map_err(failed)?;
            for (number, row) in numbers.into_iter().zip(scored) {
                scores[number] = row;
            }
        }
    }
    Ok(scores)
}

#[cfg(test)]
mod tests;
