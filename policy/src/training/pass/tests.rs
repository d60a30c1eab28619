// One range of targets is the usual case here.
#![allow(clippy::single_range_in_vec_init)]

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::config::Config;
use crate::kernels::KernelSet;
use crate::kernels::candle::CandleWeights;
use crate::layout::{Block, Layout};
use crate::testing::{BOTH, families, gemma3, image, policy, texts, tiny};

const TEMPERATURE: f32 = 0.8;

/// Rows of their own, then a family: three that begin with the same six tokens and are trained from the seventh on.
fn rows(config: &Config) -> Vec<TrainRow> {
    let texts = texts(config, 5, &[9, 3, 17, 2, 12, 1, 8, 12, 10]);
    let targets: [Vec<Range<usize>>; 9] = [
        vec![4..9],
        vec![1..3],
        vec![2..5, 9..12, 16..17],
        vec![1..2],
        vec![6..6, 7..11],
        vec![],
        vec![6..8],
        vec![6..8, 10..12],
        vec![6..10],
    ];
    let rows = texts.iter().zip(targets);
    let mut rows: Vec<TrainRow> = rows
        .map(|(text, targets)| TrainRow {
            tokens: text.to_vec(),
            targets,
        })
        .collect();
    let prompt = rows[6].tokens[..6].to_vec();
    for row in &mut rows[7..] {
        row.tokens[..6].copy_from_slice(&prompt);
    }
    rows
}

fn slope(row: usize, target: usize) -> f32 {
    ((row * 7 + target * 3) % 5) as f32 / 3.0 - 0.6
}

fn slopes(row: usize, logprobs: &[f32]) -> Vec<f32> {
    (0..logprobs.len())
        .map(|target| slope(row, target))
        .collect()
}

fn pass(policy: &Policy, rows: &[TrainRow], shards: usize) -> Pass {
    gradients(
        policy,
        rows,
        TEMPERATURE,
        NonZeroUsize::new(shards).unwrap(),
        &slopes,
    )
    .unwrap()
}

/// Every form, and one whose head is its own though its embeddings are scaled.
fn forms() -> Vec<Config> {
    let own_head = Config {
        tie_word_embeddings: false,
        attention_bias: true,
        ..gemma3()
    };
    families().into_iter().chain([own_head]).collect()
}

/// The composite kernels in f64: the same decoder, and precise enough for differences.
struct Reference {
    layout: Arc<Layout>,
    weights: Arc<CandleWeights>,
    rows: Vec<TrainRow>,
}

impl Reference {
    fn new(config: &Config, rows: &[TrainRow]) -> Self {
        let layout = Arc::new(Layout::new(config));
        let values = image(config, 1).values();
        let weights = CandleWeights::new(
            config,
            Arc::clone(&layout),
            &values,
            &Device::Cpu,
            DType::F64,
        );
        Self {
            layout,
            weights: Arc::new(weights.unwrap()),
            rows: rows.to_vec(),
        }
    }

    /// `Σ slopes · logprobs`, and the pass it came from.
    fn loss(&self) -> (f64, Candle, Vec<f32>) {
        let mut kernels = Candle::training(&self.weights);
        let texts = self.rows.iter().map(|row| Text {
            tokens: &row.tokens,
            ..row.text()
        });
        let (batch, ends) = Batch::packed(texts);
        let (mut wanted, mut targets, mut coefficients) = (Vec::new(), Vec::new(), Vec::new());
        for (index, (row, end)) in self.rows.iter().zip(&ends).enumerate() {
            for (place, target) in row.targets.iter().cloned().flatten().enumerate() {
                wanted.push(end.place(target - 1));
                targets.push(row.tokens[target]);
                coefficients.push(slope(index, place));
            }
        }
        let wanted: Rc<[usize]> = wanted.into();
        let hidden = decoder::hidden(&mut kernels, &self.layout, &batch, &wanted, None).unwrap();
        kernels
            .selected(&hidden, &self.layout.head, targets, TEMPERATURE)
            .unwrap();
        let logprobs: Vec<f64> = kernels.logprobs.as_ref().unwrap().to_vec1().unwrap();
        let loss = logprobs
            .iter()
            .zip(&coefficients)
            .map(|(l, &c)| l * f64::from(c))
            .sum();
        (loss, kernels, coefficients)
    }

    fn gradients(&self) -> Gradients {
        let (_, mut kernels, coefficients) = self.loss();
        kernels.backward(&coefficients).unwrap()
    }

    /// Central difference by one element of a block.
    fn difference(&self, block: &Block, element: usize) -> f64 {
        const STEP: f64 = 1e-5;
        let variable = self.weights.variable(block.index);
        let original: Vec<f64> = variable.flatten_all().unwrap().to_vec1().unwrap();
        let loss_at = |value: f64| {
            let mut moved = original.clone();
            moved[element] = value;
            let moved = Tensor::from_vec(moved, variable.shape(), &Device::Cpu).unwrap();
            variable.set(&moved).unwrap();
            self.loss().0
        };
        let (above, below) = (
            loss_at(original[element] + STEP),
            loss_at(original[element] - STEP),
        );
        loss_at(original[element]);
        (above - below) / (2.0 * STEP)
    }
}

fn largest(values: &[f32]) -> f64 {
    f64::from(
        values
            .iter()
            .fold(0.0f32, |max, value| max.max(value.abs())),
    )
}

#[test]
fn differentiation_agrees_with_finite_differences_in_every_parameter() {
    for config in forms() {
        let reference = Reference::new(&config, &rows(&config));
        let found = reference.gradients();
        let mut generator = ChaCha8Rng::seed_from_u64(3);
        for block in reference.layout.blocks() {
            let values = &found.values()[block.range()];
            // One random element of each parameter of the block, and the largest of all.
            let mut elements: Vec<usize> = block
                .parameters
                .clone()
                .map(|index| {
                    let range = reference.layout.parameters()[index].range();
                    generator.random_range(range) - block.offset
                })
                .collect();
            elements.push(
                (0..values.len())
                    .max_by(|&a, &b| values[a].abs().total_cmp(&values[b].abs()))
                    .unwrap(),
            );
            for element in elements {
                let error =
                    (reference.difference(block, element) - f64::from(values[element])).abs();
                assert!(
                    error <= 1e-6 * largest(values),
                    "{:?}[{element}]: {error:e}",
                    block
                );
            }
        }
    }
}

#[test]
fn both_kernel_sets_give_every_parameter_the_gradient_of_the_f64_reference() {
    for config in forms() {
        let rows = rows(&config);
        let reference = Reference::new(&config, &rows).gradients();
        for kernels in BOTH {
            let found = pass(&policy(&config, 1, kernels), &rows, 2).gradients;
            for ((parameter, expected), (_, found)) in reference.iter().zip(found.iter()) {
                let (expected, found) = (expected.unwrap(), found.unwrap());
                let scale = largest(expected);
                assert!(scale > 0.0 && found.iter().all(|value| value.is_finite()));
                for (expected, found) in expected.iter().zip(found) {
                    let error = f64::from((expected - found).abs()) / scale;
                    assert!(error < 1e-5, "{kernels:?} {}: {error:e}", parameter.name);
                }
            }
        }
    }
}

#[test]
fn logprobs_and_entropies_are_those_of_the_distribution() {
    let config = tiny();
    let rows = rows(&config);
    let fused = pass(&policy(&config, 1, KernelSet::Fused), &rows, 1);
    let candle = pass(&policy(&config, 1, KernelSet::Candle), &rows, 1);
    let pairs = [
        (&fused.logprobs, &candle.logprobs),
        (&fused.entropies, &candle.entropies),
    ];
    for (a, b) in pairs {
        assert_eq!(
            a.iter().map(Vec::len).collect::<Vec<_>>(),
            [5, 2, 7, 1, 4, 0, 2, 4, 4]
        );
        for (a, b) in a.iter().flatten().zip(b.iter().flatten()) {
            assert!((a - b).abs() < 2e-5, "{a} {b}");
        }
    }
    assert!(
        fused
            .entropies
            .iter()
            .flatten()
            .all(|&entropy| entropy > 0.0)
    );
    let most = (config.vocab_size as f32).ln();
    assert!(
        fused
            .entropies
            .iter()
            .flatten()
            .all(|&entropy| entropy <= most)
    );
}

#[test]
fn the_number_of_shards_fixes_every_bit_and_changes_only_rounding() {
    let config = tiny();
    let rows = rows(&config);
    for kernels in BOTH {
        let policy = policy(&config, 1, kernels);
        let once = pass(&policy, &rows, 3);
        let again = pass(&policy, &rows, 3);
        assert_eq!(once.gradients, again.gradients);
        assert_eq!(once.logprobs, again.logprobs);
        let scale = largest(once.gradients.values());
        // More shards than rows leave some without work.
        for shards in [1, 2, 20] {
            let other = pass(&policy, &rows, shards);
            for (a, b) in once.gradients.values().iter().zip(other.gradients.values()) {
                assert!(f64::from((a - b).abs()) <= 1e-5 * scale);
            }
        }
    }
}

#[test]
fn shards_are_balanced_by_tokens_and_hold_every_row_with_targets_once() {
    let config = tiny();
    let rows = rows(&config);
    let dealt = deal(&rows, NonZeroUsize::new(2).unwrap());
    let mut members = dealt.concat();
    members.sort_unstable();
    assert_eq!(members, [0, 1, 2, 3, 4, 6, 7, 8]);
    let family = |members: &&Vec<usize>| members.ends_with(&[6, 7, 8]);
    assert_eq!(dealt.iter().filter(family).count(), 1, "{dealt:?}");
    let tokens = |members: &Vec<usize>| {
        let shared = if family(&members) { 2 * 5 } else { 0 };
        let texts = members.iter().map(|&row| rows[row].text().tokens.len());
        texts.sum::<usize>() - shared
    };
    assert!(
        tokens(&dealt[0]).abs_diff(tokens(&dealt[1])) <= 4,
        "{dealt:?}"
    );
}

/// What a family shares is computed once; every rollout's log-probs and the sum of the gradients stay what they are alone.
#[test]
fn rows_that_share_a_prompt_train_as_they_would_alone() {
    for config in forms() {
        let rows = rows(&config);
        for kernels in BOTH {
            let policy = policy(&config, 1, kernels);
            let together = pass(&policy, &rows, 1);
            let mut sum = Gradients::zeros(policy.layout());
            for (index, row) in rows
                .iter()
                .enumerate()
                .filter(|(_, row)| row.target_count() > 0)
            {
                let slopes = |_: usize, logprobs: &[f32]| slopes(index, logprobs);
                let row = std::slice::from_ref(row);
                let alone = gradients(&policy, row, TEMPERATURE, NonZeroUsize::MIN, &slopes);
                let alone = alone.unwrap();
                for (a, b) in alone.logprobs[0].iter().zip(&together.logprobs[index]) {
                    assert!((a - b).abs() < 1e-5, "{kernels:?} row {index}: {a} {b}");
                }
                sum.add(&alone.gradients);
            }
            let scale = largest(sum.values());
            for (a, b) in sum.values().iter().zip(together.gradients.values()) {
                assert!(
                    f64::from((a - b).abs()) <= 1e-5 * scale,
                    "{kernels:?}: {a} {b}"
                );
            }
        }
    }
}

#[test]
fn a_loss_that_answers_wrongly_is_refused_by_row() {
    let config = tiny();
    let rows = rows(&config);
    let policy = policy(&config, 1, KernelSet::Fused);
    type Answer = fn(usize, &[f32]) -> Vec<f32>;
    let answers: [Answer; 3] = [
        |_, logprobs| vec![0.0; logprobs.len() - 1],
        |_, logprobs| vec![0.0; logprobs.len() + 1],
        |_, logprobs| vec![f32::NAN; logprobs.len()],
    ];
    for answer in answers {
        let refused = gradients(&policy, &rows, 1.0, NonZeroUsize::MIN, &answer);
        assert!(matches!(refused, Err(PolicyError::Coefficients { .. })));
    }
}

#[test]
fn rows_that_cannot_be_trained_are_refused() {
    let config = tiny();
    let policy = policy(&config, 1, KernelSet::Fused);
    let row = |tokens: Vec<u32>, targets| TrainRow { tokens, targets };
    let bad = [
        row(vec![1, 2, 3], vec![0..2]),
        row(vec![1, 2, 3], vec![2..4]),
        row(vec![1, 2, 3], vec![2..3, 1..2]),
        row(vec![1, 37, 3], vec![1..2]),
        row(vec![1; 65], vec![1..2]),
        row(vec![1, 2, 3], vec![]),
        row(vec![], vec![]),
    ];
    for row in bad {
        assert!(gradients(&policy, &[row], 1.0, NonZeroUsize::MIN, &slopes).is_err());
    }
    for temperature in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let refused = gradients(
            &policy,
            &rows(&config),
            temperature,
            NonZeroUsize::MIN,
            &slopes,
        );
        assert!(matches!(refused, Err(PolicyError::Temperature(_))));
    }
}

#[test]
fn cross_entropy_falls_when_its_gradient_is_followed() {
    let settings = crate::AdamW {
        learning_rate: 1e-3,
        ..Default::default()
    };
    for config in families() {
        let rows = rows(&config);
        let image = image(&config, 1);
        let mut master = crate::Master::from_image(&config, &image).unwrap();
        let mut losses = Vec::new();
        for _ in 0..8 {
            let image = master.image(crate::Storage::F32).unwrap();
            let policy = Policy::from_image(&config, &image, KernelSet::Fused, &Device::Cpu);
            let supervised =
                crate::training::supervised::supervised(&policy.unwrap(), &rows, NonZeroUsize::MIN)
                    .unwrap();
            losses.push(supervised.loss);
            master.step(&supervised.pass.gradients, &settings).unwrap();
        }
        assert!(losses.is_sorted_by(|a, b| a > b), "{losses:?}");
    }
}
