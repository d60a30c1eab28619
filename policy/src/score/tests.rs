use super::*;
use crate::config::{Config, Rope};
use crate::testing::{BOTH, families, gemma3, llama, policy, qwen3, texts, tiny, untied};

/// One of each form that candle-transformers has as well.
fn forms_of_the_oracle() -> Vec<Config> {
    let llama = Config {
        attention_bias: false,
        mlp_bias: false,
        ..llama()
    };
    let qwen3 = Config {
        layer_types: Vec::new(),
        sliding_window: None,
        ..qwen3()
    };
    let gemma3 = Config {
        rope: Rope::plain(1000.0),
        local_rope: Some(Rope::plain(100.0)),
        sliding_window: Some(64),
        query_pre_attn_scalar: Some(12.0),
        ..gemma3()
    };
    let tied = Config {
        tie_word_embeddings: true,
        ..llama.clone()
    };
    vec![tiny(), untied(), llama, tied, qwen3, gemma3]
}

#[test]
fn scores_agree_with_an_independent_implementation() {
    for config in forms_of_the_oracle() {
        for kernels in BOTH {
            let policy = policy(&config, 4, kernels);
            for text in texts(&config, 9, &[2, 7, 40]) {
                let row = ScoreRow {
                    tokens: &text,
                    first: 1,
                    temperature: 1.0,
                };
                let found = logprobs(&policy, &[row]).unwrap().remove(0);
                let logits = oracle::logits(&config, 4, &text[..text.len() - 1]);
                for (position, logprob) in found.iter().enumerate() {
                    let row = &logits[position];
                    let sum: f64 = row.iter().map(|&logit| f64::from(logit).exp()).sum();
                    let expected = f64::from(row[text[position + 1] as usize]) - sum.ln();
                    assert!(
                        (f64::from(*logprob) - expected).abs() < 2e-5,
                        "{kernels:?} {:?} {logprob} {expected}",
                        config.architecture
                    );
                }
            }
        }
    }
}

#[test]
fn rows_are_scored_alike_alone_and_together() {
    for (config, kernels) in families()
        .into_iter()
        .flat_map(|config| BOTH.map(|set| (config.clone(), set)))
    {
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
