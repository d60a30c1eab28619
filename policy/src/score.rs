//! Teacher-forced scoring: what a policy thinks of finished answers, every position in one forward pass.
//!
//! This is how a critic tells whether an answer was sampled as its lease prescribed. Knows no seeds and no thresholds:
//! tokens in, probabilities out.

use std::rc::Rc;

use crate::decoder;
use crate::kernels::candle::Candle;
use crate::kernels::fused::{Fused, Threads};
use crate::kernels::{Batch, Kernels, Text};
use crate::policy::{Policy, PolicyError, Prepared, check_temperature};
use crate::sampling::Distribution;

/// Tokens of one forward pass; more rows are scored in several, over the same memory. Enough that reading the weights costs
/// little, few enough that what is computed of them stays near the processor.
const TOKENS_MAX: usize = 1 << 10;

/// Elements of logits held at once. Fewer rows together would be bound by reading the head's weights.
const LOGITS_MAX: usize = 1 << 22;

/// A finished answer after its prompt.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ScoreRow<'a> {
    /// Prompt and answer.
    pub tokens: &'a [u32],
    /// Index of the first token to score: the length of the prompt, at least 1.
    pub first: usize,
    /// Divides the logits.
    pub temperature: f32,
}

/// What the policy thinks of one token.
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

/// Scores the tokens of every row from its `first` on.
///
/// # Errors
/// When a row cannot be scored (no prompt, unknown token, too long, bad temperature), or the logits are not finite.
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
    match policy.prepared() {
        Prepared::Fused(weights) => score_parts(Fused::inference(weights), policy, rows),
        Prepared::Candle(weights) => score_parts(Candle::inference(weights), policy, rows),
    }
}

fn score_parts<K: Kernels>(
    mut kernels: K,
    policy: &Policy,
    rows: &[ScoreRow<'_>],
) -> Result<Vec<Vec<TokenScore>>, PolicyError> {
    let (mut scores, mut logits) = (Vec::with_capacity(rows.len()), Vec::new());
    while scores.len() < rows.len() {
        let first = scores.len();
        let rest = &rows[first..];
        let (mut tokens, mut before) = (0, None);
        let fitting = rest.iter().map(text).take_while(|text| {
            let shared = before.is_some_and(|before| text.shares_with(before));
            tokens += text.tokens.len() - if shared { text.shareable } else { 0 };
            before = Some(*text);
            tokens <= TOKENS_MAX
        });
        let part = &rest[..fitting.count().max(1)];
        let room = (&mut kernels, &mut logits);
        score_part(room, policy, part, first, &mut scores)?;
    }
    Ok(scores)
}

/// Log-probabilities of the tokens of every row from its `first` on, in nats.
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

/// What is computed of a row. Its last token predicts nothing that is asked for; but a row of one token needs it, since no
/// kernel takes none.
fn text<'a>(row: &ScoreRow<'a>) -> Text<'a> {
    Text {
        tokens: &row.tokens[..(row.tokens.len() - 1).max(1)],
        shareable: (row.first - 1).min(row.tokens.len().saturating_sub(2)),
    }
}

fn score_part<K: Kernels>(
    (kernels, logits): (&mut K, &mut Vec<f32>),
    policy: &Policy,
    rows: &[ScoreRow<'_>],
    first_row: usize,
    scores: &mut Vec<Vec<TokenScore>>,
) -> Result<(), PolicyError> {
    let (batch, ends) = Batch::packed(rows.iter().map(text));
    let mut positions = Vec::new();
    let mut targets = Vec::new();
    for (index, (row, end)) in rows.iter().zip(&ends).enumerate() {
        scores.push(Vec::with_capacity(row.tokens.len() - row.first));
        for (offset, &token) in row.tokens[row.first..].iter().enumerate() {
            positions.push(end.place(row.first - 1 + offset));
            targets.push((index, token));
        }
    }
    if targets.is_empty() {
        return Ok(());
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
            let row = first_row + index;
            scores[row].push(score.ok_or(PolicyError::NotFinite { row })?);
        }
    }
    Ok(())
}

/// Scores of the targets (row, token), `logits` `[targets, V]`; none where logits are no distribution.
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
