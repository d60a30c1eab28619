//! What a critic needs of a model: scores of finished answers under any version that it holds, and the answers as text.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;

use muster_broadcaster::follower::Held;
use muster_policy::{
    Config, Device, KernelSet, Policy, ScoreRow, StopAt, StopStrings, Threads, TokenBytes,
    TokenScore, Tokenizer, score,
};
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
}

/// A model that scores.
#[async_trait]
pub trait Scorer: Send {
    /// Takes over the weights of one more version, and drops the oldest beyond what a group may still come from.
    async fn adopt(&mut self, held: &Held) -> Result<(), ScorerError>;

    /// The versions held.
    fn held(&self) -> Vec<VersionRef>;

    /// One forward pass over every answer.
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
    policies: BTreeMap<u64, (VersionRef, Policy)>,
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
            policies: BTreeMap::new(),
        }
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
        self.policies.insert(version.version.0, (version, policy));
        while self.policies.len() > self.versions_kept {
            self.policies.pop_first();
        }
        Ok(())
    }

    fn held(&self) -> Vec<VersionRef> {
        self.policies
            .values()
            .map(|(version, _)| *version)
            .collect()
    }

    async fn score(
        &mut self,
        requests: Vec<ScoreRequest>,
    ) -> Result<Vec<Vec<TokenScore>>, ScorerError> {
        let policies: BTreeMap<u64, (VersionRef, Policy)> = self.policies.clone();
        let scored = tokio::task::spawn_blocking(move || score_all(&policies, &requests));
        scored.await.map_err(failed)?
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

/// Scores requests version by version, in their order.
fn score_all(
    policies: &BTreeMap<u64, (VersionRef, Policy)>,
    requests: &[ScoreRequest],
) -> Result<Vec<Vec<TokenScore>>, ScorerError> {
    let mut scores = vec![Vec::new(); requests.len()];
    for (version, policy) in policies.values() {
        let numbers: Vec<usize> = (0..requests.len())
            .filter(|n| requests[*n].version == *version)
            .collect();
        let rows: Vec<ScoreRow<'_>> = numbers
            .iter()
            .map(|n| ScoreRow {
                tokens: &requests[*n].tokens,
                first: requests[*n].first,
                temperature: requests[*n].temperature,
            })
            .collect();
        if rows.is_empty() {
            continue;
        }
        let scored = score(policy, &rows).map_err(failed)?;
        for (n, row) in numbers.into_iter().zip(scored) {
            scores[n] = row;
        }
    }
    Ok(scores)
}
