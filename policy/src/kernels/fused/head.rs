//! The head: log-probabilities of chosen tokens from hidden states, with one chunk of logits in memory.

use super::elementwise::soft_cap;
use crate::kernels::Selected;
use crate::kernels::matmul::{Matrix, Onto, multiply};
use crate::kernels::simd::{dot, exp_shifted, largest, vectorised};

/// Transformation of logits before the softmax.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Shaping {
    /// Logits l become `cap·tanh(l/cap)`.
    pub(crate) cap: Option<f32>,
    /// Divides the capped logits.
    pub(crate) temperature: f32,
}

/// Rows of logits held at once.
const CHUNK_ROWS: usize = 256;

/// Log-probability of `targets` and entropy of each row under `softmax(cap(x wᵀ) / temperature)`.
///
/// * `x` — `[M, width]` hidden states
/// * `w` — `[V, width]`
/// * `targets` — `[M]`, each below V
pub(crate) fn forward(x: &[f32], w: &[f32], targets: &[u32], shaping: Shaping) -> Selected {
    let width = x.len() / targets.len().max(1);
    let vocab = w.len() / width.max(1);
    let mut logits = vec![0.0; CHUNK_ROWS.min(targets.len()) * vocab];
    let mut scaled = vec![0.0; vocab];
    let mut selected = Selected {
        logprobs: Vec::with_capacity(targets.len()),
        entropies: Vec::with_capacity(targets.len()),
    };
    for (x, targets) in x.chunks(CHUNK_ROWS * width).zip(targets.chunks(CHUNK_ROWS)) {
        let logits = &mut logits[..targets.len() * vocab];
        chunk_logits(logits, x, w, targets.len(), shaping.cap);
        for (row, &target) in logits.chunks_exact_mut(vocab).zip(targets) {
            let (logprob, entropy) =
                row_statistics(row, &mut scaled, target as usize, 1.0 / shaping.temperature);
            selected.logprobs.push(logprob);
            selected.entropies.push(entropy);
        }
    }
    selected
}

/// Adds to `dx` `[M, width]` and `dw` `[V, width]` the derivative of `Σ coefficients·logprobs`; logits are computed again.
pub(crate) fn backward(
    (dx, dw): (&mut [f32], &mut [f32]),
    (x, w): (&[f32], &[f32]),
    targets: &[u32],
    shaping: Shaping,
    coefficients: &[f32],
) {
    let width = x.len() / targets.len().max(1);
    let vocab = w.len() / width.max(1);
    let mut logits = vec![0.0; CHUNK_ROWS.min(targets.len()) * vocab];
    let mut capped = vec![0.0; shaping.cap.map_or(0, |_| vocab)];
    let chunks = x
        .chunks(CHUNK_ROWS * width)
        .zip(dx.chunks_mut(CHUNK_ROWS * width))
        .zip(targets.chunks(CHUNK_ROWS))
        .zip(coefficients.chunks(CHUNK_ROWS));
    for (((x, dx), targets), coefficients) in chunks {
        let rows = targets.len();
        let logits = &mut logits[..rows * vocab];
        chunk_logits(logits, x, w, rows, shaping.cap);
        for ((row, &target), &coefficient) in logits
            .chunks_exact_mut(vocab)
            .zip(targets)
            .zip(coefficients)
        {
            if shaping.cap.is_some() {
                capped.copy_from_slice(row);
            }
            row_derivative(row, target as usize, 1.0 / shaping.temperature, coefficient);
            if let Some(cap) = shaping.cap {
                cap_derivative(row, &capped, cap);
            }
        }
        let g = Matrix::new(logits, rows, vocab);
        multiply(dx, g, Matrix::new(w, vocab, width), Onto::Sum);
        multiply(dw, g.transposed(), Matrix::new(x, rows, width), Onto::Sum);
    }
}

/// `logits = cap(x wᵀ)`
fn chunk_logits(logits: &mut [f32], x: &[f32], w: &[f32], rows: usize, cap: Option<f32>) {
    let width = x.len() / rows.max(1);
    let vocab = logits.len() / rows.max(1);
    let w = Matrix::new(w, vocab, width).transposed();
    multiply(logits, Matrix::new(x, rows, width), w, Onto::Nothing);
    if let Some(cap) = cap {
        soft_cap(logits, cap);
    }
}

vectorised! {
/// Derivatives by capped logits `[V]` to those by the logits: times `1 − (c/cap)²`.
fn cap_derivative(row: &mut [f32], capped: &[f32], cap: f32) {
    let inverse = 1.0 / (cap * cap);
    for (slope, c) in row.iter_mut().zip(capped) {
        *slope *= 1.0 - c * c * inverse;
    }
}
}

vectorised! {
/// (log-probability of `target`, entropy). With `z = (l − max)/T` and `Z = Σ eᶻ`: `log p = z − ln Z`,
/// `H = ln Z − Σ z·eᶻ / Z`. `scaled` is room for z.
fn row_statistics(row: &mut [f32], scaled: &mut [f32], target: usize, inverse_temperature: f32) -> (f32, f32) {
    let max = largest(row);
    for (z, logit) in scaled.iter_mut().zip(row.iter()) {
        *z = (logit - max) * inverse_temperature;
    }
    let sum = exp_shifted(row, max, inverse_temperature);
    let log_sum = sum.ln();
    // A masked token (−∞) has probability 0 and adds nothing; 0·∞ would be NaN.
    for z in scaled.iter_mut() {
        *z = z.max(-1e30);
    }
    (scaled[target] - log_sum, log_sum - dot(scaled, row) / sum)
}
}

vectorised! {
/// Replaces logits by `∂(coefficient·log p(target))/∂logits = coefficient/T·(1[target] − p)`.
fn row_derivative(row: &mut [f32], target: usize, inverse_temperature: f32, coefficient: f32) {
    let max = largest(row);
    let sum = exp_shifted(row, max, inverse_temperature);
    let scaled = coefficient * inverse_temperature;
    let factor = -scaled / sum;
    for value in row.iter_mut() {
        *value *= factor;
    }
    row[target] += scaled;
}
}
