use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use candle_transformers::models::qwen2;

use super::*;
use crate::config::Config;
use crate::testing::{BOTH, image, policy, texts, tiny, untied};

/// Hidden states of another implementation of the same family, times its head.
fn oracle_logits(config: &Config, seed: u64, tokens: &[u32]) -> Tensor {
    let (image, layout) = (image(config, seed), crate::Layout::new(config));
    let values = image.values();
    let mut tensors: HashMap<String, Tensor> = HashMap::new();
    for parameter in layout.parameters() {
        let values = &values[parameter.range()];
        let tensor = Tensor::from_slice(values, parameter.shape.clone(), &Device::Cpu).unwrap();
        tensors.insert(parameter.name.clone(), tensor);
    }
    let head = if config.tie_word_embeddings {
        "model.embed_tokens.weight"
    } else {
        "lm_head.weight"
    };
    let head = tensors[head].clone();
    let other = qwen2::Config {
        vocab_size: config.vocab_size,
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        num_hidden_layers: config.num_hidden_layers,
        num_attention_heads: config.num_attention_heads,
        num_key_value_heads: config.num_key_value_heads,
        max_position_embeddings: config.max_position_embeddings,
        sliding_window: config.max_position_embeddings,
        max_window_layers: config.num_hidden_layers,
        tie_word_embeddings: config.tie_word_embeddings,
        rope_theta: config.rope.theta,
        rms_norm_eps: config.rms_norm_eps,
        use_sliding_window: false,
        hidden_act: candle_nn::Activation::Silu,
    };
    let builder = candle_nn::VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let mut model = qwen2::Model::new(&other, builder).unwrap();
    let input = Tensor::from_slice(tokens, (1, tokens.len()), &Device::Cpu).unwrap();
    let hidden = model.forward(&input, 0, None).unwrap().squeeze(0).unwrap();
    hidden.matmul(&head.t().unwrap()).unwrap()
}

#[test]
fn scores_agree_with_an_independent_implementation() {
    for config in [tiny(), untied()] {
        for kernels in BOTH {
            let policy = policy(&config, 4, kernels);
            for text in texts(&config, 9, &[2, 7, 40]) {
                let row = ScoreRow {
                    tokens: &text,
                    first: 1,
                    temperature: 1.0,
                };
                let found = logprobs(&policy, &[row]).unwrap().remove(0);
                let logits = oracle_logits(&config, 4, &text[..text.len() - 1]);
                let expected: Vec<Vec<f32>> = candle_nn::ops::log_softmax(&logits, 1)
                    .unwrap()
                    .to_vec2()
                    .unwrap();
                for (position, logprob) in found.iter().enumerate() {
                    let expected = expected[position][text[position + 1] as usize];
                    assert!(
                        (logprob - expected).abs() < 2e-5,
                        "{kernels:?} {logprob} {expected}"
                    );
                }
            }
        }
    }
}

#[test]
fn rows_are_scored_alike_alone_and_together() {
    let config = tiny();
    for kernels in BOTH {
        let policy = policy(&config, 4, kernels);
        // Enough of them for several forward passes.
        let texts = texts(&config, 9, &[60, 3, 17, 64].repeat(70));
        let rows: Vec<ScoreRow<'_>> = texts
            .iter()
            .enumerate()
            .map(|(index, tokens)| {
                let first = 1 + index % 3;
                ScoreRow {
                    tokens,
                    first,
                    temperature: 0.7 + (index % 4) as f32 * 0.2,
                }
            })
            .collect();
        let together = score(&policy, &rows).unwrap();
        for (row, scores) in rows.iter().zip(&together).step_by(37) {
            let alone = score(&policy, &[*row]).unwrap().remove(0);
            assert_eq!(alone.len(), row.tokens.len() - row.first);
            for (a, b) in alone.iter().zip(scores) {
                assert!((a.logprob - b.logprob).abs() < 2e-5);
                assert!((a.cdf_below - b.cdf_below).abs() < 1e-5);
            }
        }
    }
}

#[test]
fn intervals_have_the_width_of_the_probability() {
    let config = tiny();
    let policy = policy(&config, 4, crate::KernelSet::Fused);
    let text = &texts(&config, 1, &[30])[0];
    let row = ScoreRow {
        tokens: text,
        first: 1,
        temperature: 1.2,
    };
    for token in &score(&policy, &[row]).unwrap()[0] {
        let width = token.cdf_through - token.cdf_below;
        assert!((width - f64::from(token.logprob).exp()).abs() < 1e-6);
        assert!(token.cdf_below >= 0.0 && token.cdf_through <= 1.0 + 1e-12);
    }
}

#[test]
fn rows_that_cannot_be_scored_are_refused() {
    let config = tiny();
    let policy = policy(&config, 4, crate::KernelSet::Fused);
    let long = [0; 65];
    let bad = [
        ScoreRow {
            tokens: &[1, 2],
            first: 0,
            temperature: 1.0,
        },
        ScoreRow {
            tokens: &[1, 2],
            first: 3,
            temperature: 1.0,
        },
        ScoreRow {
            tokens: &[],
            first: 0,
            temperature: 1.0,
        },
        ScoreRow {
            tokens: &[1, 37],
            first: 1,
            temperature: 1.0,
        },
        ScoreRow {
            tokens: &long,
            first: 1,
            temperature: 1.0,
        },
        ScoreRow {
            tokens: &[1, 2],
            first: 1,
            temperature: f32::NAN,
        },
    ];
    for row in bad {
        assert!(score(&policy, &[row]).is_err(), "{row:?}");
    }
    let nothing = ScoreRow {
        tokens: &[1, 2],
        first: 2,
        temperature: 1.0,
    };
    assert_eq!(score(&policy, &[nothing]).unwrap(), [vec![]]);
}

#[test]
fn a_row_of_one_token_has_no_score_and_disturbs_no_other() {
    let config = tiny();
    for kernels in BOTH {
        let policy = policy(&config, 4, kernels);
        let row = |tokens: &'static [u32]| ScoreRow {
            tokens,
            first: 1,
            temperature: 1.0,
        };
        let alone = score(&policy, &[row(&[1, 2, 3])]).unwrap();
        let mixed = score(&policy, &[row(&[4]), row(&[1, 2, 3]), row(&[5])]).unwrap();
        assert_eq!(mixed[0], []);
        assert_eq!(mixed[2], []);
        assert!((mixed[1][1].logprob - alone[0][1].logprob).abs() < 2e-5);
    }
}
