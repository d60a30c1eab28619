//! Teacher-forced scoring: the probabilities that a policy gives to finished answers, every position in one forward pass.
//!
//! Critics use it to tell whether an answer was sampled as its lease prescribed. Knows no seeds and no thresholds: tokens
//! in, probabilities out.

use std::ops::Range;
use std::rc::Rc;

use crate::decoder;
use crate::error::PolicyError;
use crate::kernels::candle::Candle;
use crate::kernels::fused::Fused;
use crate::kernels::threads::Threads;
use crate::kernels::{Batch, Kernels, Text};
use crate::policy::{Policy, Prepared, check_temperature};
use crate::sampling::Distribution;

/// Most tokens of one forward pass; further rows are scored in further passes over the same memory. Enough to spread the cost
/// of reading the weights, few enough that activations stay in cache.
const TOKENS_MAX: usize = 1 << 10;

/// Fewest tokens of a thread that computes rows of its own.
const TOKENS_MIN: usize = 64;

/// Elements of logits held at once. With fewer, reading the head's weights would dominate.
const LOGITS_MAX: usize = 1 << 22;

/// A prompt and its finished answer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ScoreRow<'a> {
    /// Prompt, then answer.
    pub tokens: &'a [u32],
    /// Index of the first token to score: the length of the prompt, at least 1.
    pub first: usize,
    /// Divides the logits.
    pub temperature: f32,
}

/// Probabilities that the policy gives to one token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenScore {
    /// Log-probability, in nats.
    pub logprob: f32,
    /// Cumulative probability of all lower ids.
    pub cdf_below: f64,
    /// Cumulative probability of all lower ids and the token.
    pub cdf_through: f64,
}

impl TokenScore {
    /// How far `u` lies outside the interval that prescribes this token: `max(0, below − u, u − through)`.
    pub fn error(&self, u: f64) -> f64 {
        (self.cdf_below - u).max(u - self.cdf_through).max(0.0)
    }
}

/// Scores the tokens of every row, starting at its `first`.
///
/// # Errors
/// If a row cannot be scored (no prompt, unknown token, too long, bad temperature), or the logits are not finite.
pub fn score(policy: &Policy, rows: &[ScoreRow<'_>]) -> Result<Vec<Vec<TokenScore>>, PolicyError> {
    for (row, score_row) in rows.iter().enumerate() {
        let ScoreRow {
            tokens,
            first,
            temperature,
        } = *score_row;
        if first == 0 || first > tokens.len() {
            return Err(PolicyError::Empty { row });
        }
        policy.check_row(row, tokens, tokens.len())?;
        check_temperature(temperature)?;
    }
    let scored = match policy.prepared() {
        Prepared::Fused(weights) if weights.is_cached() => {
            score_dealt(|| Fused::inference(weights), policy, rows)
        }
        Prepared::Fused(weights) => score_parts(Fused::inference(weights), policy, rows),
        Prepared::Candle(weights) => score_parts(Candle::inference(weights), policy, rows),
    }?;
    Ok(scored.into_iter().flatten().collect())
}

/// The scores of some rows.
type Scores = Vec<Vec<TokenScore>>;

/// Scores one part after another over the same memory; each operation runs on all threads.
fn score_parts<K: Kernels>(
    mut kernels: K,
    policy: &Policy,
    rows: &[ScoreRow<'_>],
) -> Result<Vec<Scores>, PolicyError> {
    let mut logits = Vec::new();
    let parts = parts(rows, TOKENS_MAX).into_iter();
    let scored = parts.map(|part| score_part((&mut kernels, &mut logits), policy, rows, part));
    scored.collect()
}

/// Scores every part on a thread of its own: for a small model a barrier after each operation takes as long as the operation.
fn score_dealt<K: Kernels>(
    kernels: impl Fn() -> K + Sync,
    policy: &Policy,
    rows: &[ScoreRow<'_>],
) -> Result<Vec<Scores>, PolicyError> {
    let threads = policy.threads();
    let all: usize = rows.iter().map(|row| row.tokens.len()).sum();
    let each = all.div_ceil(threads.count().get());
    let parts = parts(rows, each.clamp(TOKENS_MIN, TOKENS_MAX));
    let mut scored: Vec<_> = parts.iter().map(|_| Ok(Scores::new())).collect();
    threads.share_rows(&mut scored, 1, 1, |first, scored| {
        let (mut kernels, mut logits) = (kernels(), Vec::new());
        for (scored, part) in scored.iter_mut().zip(&parts[first..]) {
            let memory = (&mut kernels, &mut logits);
            *scored = score_part(memory, policy, rows, part.clone());
        }
    });
    scored.into_iter().collect()
}

/// Cuts rows into consecutive parts of at most `tokens_max` tokens; a shared prefix counts once, and a longer row is a part
/// by itself.
fn parts(rows: &[ScoreRow<'_>], tokens_max: usize) -> Vec<Range<usize>> {
    let (mut parts, mut first) = (Vec::new(), 0);
    while first < rows.len() {
        let (mut tokens, mut before) = (0, None);
        let fitting = rows[first..].iter().map(text).take_while(|text| {
            let shared = before.is_some_and(|before| text.shares_with(before));
            tokens += text.tokens.len() - if shared { text.shareable } else { 0 };
            before = Some(*text);
            tokens <= tokens_max
        });
        let end = first + fitting.count().max(1);
        parts.push(first..end);
        first = end;
    }
    parts
}

/// Log-probabilities of the tokens of every row, starting at its `first`, in nats.
///
/// # Errors
/// As [`score`].
pub fn logprobs(policy: &Policy, rows: &[ScoreRow<'_>]) -> Result<Vec<Vec<f32>>, PolicyError> {
    let scores = score(policy, rows)?;
    Ok(scores
        .iter()
        .map(|row| row.iter().map(|token| token.logprob).collect())
        .collect())
}

/// The tokens of a row that the decoder reads: all but the last, whose prediction is not needed. A row of one token keeps it,
/// since kernels take at least one token.
fn text<'a>(row: &ScoreRow<'a>) -> Text<'a> {
    Text {
        tokens: &row.tokens[..(row.tokens.len() - 1).max(1)],
        shareable: (row.first - 1).min(row.tokens.len().saturating_sub(2)),
    }
}

fn score_part<K: Kernels>(
    (kernels, logits): (&mut K, &mut Vec<f32>),
    policy: &Policy,
    all: &[ScoreRow<'_>],
    part: Range<usize>,
) -> Result<Scores, PolicyError> {
    let rows = &all[part.clone()];
    let (batch, ends) = Batch::packed(rows.iter().map(text));
    let mut positions = Vec::new();
    let mut targets = Vec::new();
    let mut scores = Scores::with_capacity(rows.len());
    for (index, (row, end)) in rows.iter().zip(&ends).enumerate() {
        scores.push(Vec::with_capacity(row.tokens.len() - row.first));
        for (offset, &token) in row.tokens[row.first..].iter().enumerate() {
            positions.push(end.place(row.first - 1 + offset));
            targets.push((index, token));
        }
    }
    if targets.is_empty() {
        return Ok(scores);
    }
    let layout = policy.layout();
    let wanted: Rc<[usize]> = positions.into();
    let hidden = decoder::hidden(kernels, layout, &batch, &wanted, None)?;
    let vocab = layout.head.rows;
    let rows_at_once = (LOGITS_MAX / vocab).max(1);
    for (chunk, targets) in targets.chunks(rows_at_once).enumerate() {
        let start = chunk * rows_at_once;
        let range = start..start + targets.len();
        kernels.logits(&hidden, &layout.head, range, logits)?;
        let temperature = |index: usize| rows[index].temperature;
        let found = token_scores(policy.threads(), logits, targets, temperature);
        for (score, &(index, _)) in found.into_iter().zip(targets) {
            let row = part.start + index;
            scores[index].push(score.ok_or(PolicyError::NotFinite { row })?);
        }
    }
    Ok(scores)
}

/// Scores of the targets (row, token); `logits` `[targets, V]`. None if a row of logits is not a distribution.
fn token_scores(
    threads: &Threads,
    logits: &[f32],
    targets: &[(usize, u32)],
    temperature: impl Fn(usize) -> f32 + Sync,
) -> Vec<Option<TokenScore>> {
    let mut scores = vec![None; targets.len()];
    let vocab = logits.len() / targets.len().max(1);
    let together = targets.len().div_ceil(2 * threads.count().get());
    threads.share_rows(&mut scores, 1, together, |first, scores| {
        let mut distribution = Distribution::default();
        let logits = logits[first * vocab..].chunks_exact(vocab);
        for ((score, logits), &(row, token)) in scores.iter_mut().zip(logits).zip(&targets[first..])
        {
            if !distribution.load(logits, temperature(row)) {
                continue;
            }
            let (cdf_below, cdf_through) = distribution.interval(token);
            *score = Some(TokenScore {
                logprob: distribution.logprob(token),
                cdf_below,
                cdf_through,
            });
        }
    });
    scores
}

#[cfg(test)]
mod oracle;
#[cfg(test)]
mod tests;
