//! The model behind the audit: scores finished answers under any version that it holds, and decodes them to text.

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

/// Why a model could not score.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct ScorerError(pub String);

/// A finished answer to score.
#[derive(Debug, Clone, PartialEq)]
pub struct ScoreRequest {
    pub version: VersionRef,
    /// The prompt and the answer up to its last token to score.
    pub tokens: Vec<u32>,
    /// Index of the first token to score.
    pub first: usize,
    pub temperature: f32,
    /// The arithmetic that the worker says it used.
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
    /// Adds the weights of a version and drops the oldest ones from which no group can still come.
    async fn adopt(&mut self, held: &Held) -> Result<(), ScorerError>;

    /// The versions that answers can be scored with, oldest first.
    fn held(&self) -> Vec<VersionRef>;

    /// Runs one forward pass over every answer: in int8 for answers of [`NumericClass::Int8Cpu`], which every machine can
    /// compute, and in the critic's own arithmetic for all others. Returns one list per request, with a score for each
    /// token from `first`, or an empty list if the version is not held.
    async fn score(
        &mut self,
        requests: Vec<ScoreRequest>,
    ) -> Result<Vec<Vec<TokenScore>>, ScorerError>;

    /// Decodes an answer's drawn tokens, without end markers.
    ///
    /// # Errors
    /// A token is not in the vocabulary.
    fn text(&self, tokens: &[u32]) -> Result<String, ScorerError>;

    /// The first stop string that an answer's drawn tokens complete.
    fn stopped(&mut self, tokens: &[u32], strings: &[String]) -> Option<StopAt>;
}

/// A scorer that keeps the policy in several versions.
pub struct PolicyScorer {
    config: Config,
    kernels: KernelSet,
    device: Device,
    tokenizer: Tokenizer,
    /// Built for the first answer with stop strings.
    bytes: Option<Arc<TokenBytes>>,
    versions_kept: usize,
    int8: Int8,
    held: BTreeMap<u64, Weights>,
}

/// Whether the run accepts answers of workers with int8 weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Int8 {
    Wanted,
    /// No image is kept to round weights from.
    NotWanted,
}

#[derive(Debug, Clone)]
struct Weights {
    version: VersionRef,
    /// In the critic's own arithmetic.
    policy: Policy,
    rounded: Rounded,
}

/// Weights rounded to eight bits, made from the image when the first answer needs them; they replace the image.
#[derive(Debug, Clone)]
enum Rounded {
    No,
    From(Bytes),
    Made(Policy),
}

impl Weights {
    /// The weights that score answers of a class.
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
            // Dispatch leases only the classes that the run lists. A worker that claims another is scored in this critic's.
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
        self.held = held; // with the weights that were rounded for these answers
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

/// Scores requests, batched by version and class. A request for a version that is not held gets no scores.
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
            debug_assert_eq!(scored.len(), rows.len(), "one list of scores per request");
            for (number, row) in numbers.into_iter().zip(scored) {
                scores[number] = row;
            }
        }
    }
    Ok(scores)
}

#[cfg(test)]
mod tests;
