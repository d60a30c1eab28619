use std::num::NonZeroUsize;
use std::sync::Arc;

use super::*;
use crate::engine::{Completion, EngineConfig, GenerationRequest, generate};
use crate::sampling::Sampling;
use crate::score::{ScoreRow, TokenScore, score};
use crate::testing::{families, image, policy, texts, tiny};
use crate::training::pass::{TrainRow, gradients};
use crate::weights::Storage;

fn threads(count: usize) -> Threads {
    Threads::new(NonZeroUsize::new(count).unwrap())
}

fn answers(policy: &Policy) -> Vec<Completion> {
    let prompts = texts(policy.config(), 5, &[9, 1, 14, 6]);
    let requests = prompts.into_iter().enumerate().map(|(row, prompt)| {
        let sampling = Sampling::Prescribed {
            seed: [7; 32],
            rollout: row as u32,
            temperature: 1.0,
        };
        GenerationRequest::new(prompt, 10, Arc::from([]), sampling)
    });
    let slots = NonZeroUsize::new(3).unwrap();
    let config = EngineConfig {
        slots,
        ..EngineConfig::default()
    };
    generate(policy, &config, requests.collect()).unwrap()
}

fn scores(policy: &Policy, texts: &[Arc<[u32]>]) -> Vec<Vec<TokenScore>> {
    let row = |tokens| ScoreRow {
        tokens,
        first: 1,
        temperature: 0.8,
    };
    let rows: Vec<ScoreRow<'_>> = texts.iter().map(|text| row(text)).collect();
    score(policy, &rows).unwrap()
}

#[test]
fn the_number_of_threads_changes_no_bit_of_an_answer_or_a_score() {
    for config in families() {
        let one = policy(&config, 4, KernelSet::Fused);
        let texts = texts(&config, 6, &[30, 2, 17, 25]);
        let expected = (answers(&one), scores(&one, &texts));
        for count in [2, 5] {
            let several = one.with_threads(&threads(count));
            assert_eq!(answers(&several), expected.0, "{count} threads");
            assert_eq!(scores(&several, &texts), expected.1, "{count} threads");
        }
    }
}

#[test]
fn eight_bits_score_what_they_generated_as_it_was_generated() {
    for config in families() {
        let rounded = policy(&config, 4, KernelSet::Int8);
        let prompts = texts(&config, 5, &[9, 1, 14, 6]);
        for (prompt, answer) in prompts.iter().zip(answers(&rounded)) {
            let tokens: Vec<u32> = prompt.iter().chain(&answer.tokens).copied().collect();
            let row = ScoreRow {
                tokens: &tokens,
                first: prompt.len(),
                temperature: 1.0,
            };
            let scored = &score(&rounded, &[row]).unwrap()[0];
            for (scored, generated) in scored.iter().zip(&answer.logprobs) {
                assert!((scored.logprob - generated).abs() < 1e-4);
            }
        }
    }
}

#[test]
fn eight_bits_are_another_class_than_the_weights_they_are_rounded_from() {
    let config = tiny();
    let texts = texts(&config, 6, &[30, 17]);
    let [whole, rounded] = [KernelSet::Fused, KernelSet::Int8]
        .map(|kernels| scores(&policy(&config, 4, kernels), &texts));
    let pairs = whole.iter().flatten().zip(rounded.iter().flatten());
    let differences: Vec<f32> = pairs
        .map(|(one, other)| (one.logprob - other.logprob).abs())
        .collect();
    let mean = differences.iter().sum::<f32>() / differences.len() as f32;
    assert!(mean > 1e-4 && mean < 0.2, "mean difference {mean} nats");
}

#[test]
fn eight_bits_do_not_train() {
    let rounded = policy(&tiny(), 4, KernelSet::Int8);
    let row = TrainRow {
        tokens: vec![1, 2, 3],
        targets: std::iter::once(1..3).collect(),
    };
    let refused = gradients(&rounded, &[row], 1.0, NonZeroUsize::MIN, &|_, found| {
        vec![1.0; found.len()]
    });
    assert!(matches!(refused, Err(PolicyError::Int8Trains)));
}

#[test]
fn a_token_costs_every_matrix_once_and_fewer_bytes_in_eight_bits() {
    let config = tiny();
    let [whole, rounded] =
        [KernelSet::Fused, KernelSet::Int8].map(|kernels| policy(&config, 4, kernels).token_cost());
    let layout = Layout::new(&config);
    let matrices = layout
        .parameters()
        .iter()
        .filter(|parameter| parameter.is_matrix());
    assert_eq!(
        whole.multiply_adds,
        matrices.map(|parameter| parameter.len()).sum::<usize>()
    );
    assert_eq!(whole.weight_bytes, 4 * whole.multiply_adds);
    assert_eq!(rounded.multiply_adds, whole.multiply_adds);
    assert!(rounded.weight_bytes < whole.weight_bytes);
}

#[test]
fn a_policy_prepared_for_inference_alone_answers_with_the_same_bits() {
    for config in families() {
        for (storage, kernels) in [
            (Storage::F32, KernelSet::Fused),
            (Storage::Bf16, KernelSet::Fused),
            (Storage::Bf16, KernelSet::Int8),
            (Storage::Bf16, KernelSet::Candle),
        ] {
            let values = image(&config, 1).values();
            let image = Image::from_values(&Layout::new(&config), &values, storage).unwrap();
            let cpu = Device::Cpu;
            let whole = Policy::from_image(&config, &image, kernels, &cpu).unwrap();
            let alone =
                Policy::for_inference(&config, image.bytes(), kernels, &cpu, &threads(2)).unwrap();
            assert_eq!(answers(&alone), answers(&whole));
            let texts = texts(&config, 4, &[7, 12]);
            assert_eq!(scores(&alone, &texts), scores(&whole, &texts));
            assert_eq!(alone.token_cost(), whole.token_cost());
        }
    }
}

#[test]
fn a_policy_prepared_for_inference_alone_does_not_train_and_refuses_other_weights() {
    let (config, cpu) = (tiny(), Device::Cpu);
    let bytes = image(&config, 1).bytes().to_vec();
    let prepared = |bytes: &[u8]| {
        Policy::for_inference(&config, bytes, KernelSet::Fused, &cpu, &Threads::one())
    };
    let row = TrainRow {
        tokens: vec![1, 2, 3],
        targets: std::iter::once(1..3).collect(),
    };
    let trained = gradients(
        &prepared(&bytes).unwrap(),
        &[row],
        1.0,
        NonZeroUsize::MIN,
        &|_, found| vec![-1.0; found.len()],
    );
    assert!(matches!(trained, Err(PolicyError::InferenceTrains)));
    let mut damaged = bytes.clone();
    let end = damaged.len();
    damaged[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    let refused = prepared(&damaged).unwrap_err().to_string();
    assert!(refused.contains("not finite"), "{refused}");
    assert!(prepared(&bytes[..end - 1]).is_err());
}
