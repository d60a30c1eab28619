use super::*;
use crate::config::Config;
use crate::kernels::KernelSet;
use crate::score::{ScoreRow, score};
use crate::testing::{BOTH, families, policy, texts, tiny};

const SEED: [u8; 32] = [7; 32];

fn slots(slots: usize) -> EngineConfig {
    EngineConfig {
        slots: NonZeroUsize::new(slots).unwrap(),
    }
}

/// Prompts of different lengths, some shared by several requests; answers of different lengths.
fn requests(config: &Config, temperature: f32) -> Vec<GenerationRequest> {
    let prompts = texts(config, 11, &[5, 1, 13, 8, 2]);
    (0..20)
        .map(|index| GenerationRequest {
            prompt: Arc::clone(&prompts[index / 3 % prompts.len()]),
            max_tokens: 4 + index * 7 % 23,
            stop_ids: [1, 30].into(),
            sampling: Sampling::Prescribed {
                seed: SEED,
                rollout: index as u32,
                temperature,
            },
        })
        .collect()
}

fn joined(request: &GenerationRequest, completion: &Completion) -> Vec<u32> {
    request
        .prompt
        .iter()
        .chain(&completion.tokens)
        .copied()
        .collect()
}

/// Largest difference of log-probs between decoding and scoring, and largest error of the cumulative distribution. All
/// rows are scored at once: that takes other products than decoding a few.
fn disagreement(
    policy: &Policy,
    requests: &[GenerationRequest],
    completions: &[Completion],
) -> (f32, f64) {
    let texts: Vec<Vec<u32>> = requests
        .iter()
        .zip(completions)
        .map(|(request, answer)| joined(request, answer))
        .collect();
    let prescribed = |request: &GenerationRequest| match request.sampling {
        Sampling::Prescribed {
            seed,
            rollout,
            temperature,
        } => (seed, rollout, temperature),
        Sampling::Greedy => panic!("greedy answers have no seed"),
    };
    let rows: Vec<ScoreRow<'_>> = requests
        .iter()
        .zip(&texts)
        .map(|(request, tokens)| {
            let temperature = prescribed(request).2;
            ScoreRow {
                tokens,
                first: request.prompt.len(),
                temperature,
            }
        })
        .collect();
    let (mut logprob_error, mut cdf_error) = (0.0f32, 0.0f64);
    let scores = score(policy, &rows).unwrap();
    for ((request, completion), scores) in requests.iter().zip(completions).zip(&scores) {
        let (seed, rollout, _) = prescribed(request);
        assert_eq!(scores.len(), completion.tokens.len());
        for (t, (score, logprob)) in scores.iter().zip(&completion.logprobs).enumerate() {
            logprob_error = logprob_error.max((score.logprob - logprob).abs());
            cdf_error = cdf_error.max(score.error(uniform(&seed, rollout, t as u64)));
        }
    }
    (logprob_error, cdf_error)
}

#[test]
fn decoding_agrees_with_scoring_though_rows_differ_and_slots_are_refilled() {
    for config in families() {
        for kernels in BOTH {
            let policy = policy(&config, 2, kernels);
            let requests = requests(&config, 0.9);
            let completions = generate(&policy, &slots(4), requests.clone()).unwrap();
            let (logprob_error, cdf_error) = disagreement(&policy, &requests, &completions);
            assert!(logprob_error < 2e-5, "{kernels:?} {logprob_error:e}");
            assert!(cdf_error < 1e-5, "{kernels:?} {cdf_error:e}");
        }
    }
}

#[test]
fn both_kernel_sets_are_each_others_critic() {
    let config = tiny();
    let [fused, candle] = BOTH.map(|kernels| policy(&config, 2, kernels));
    let requests = requests(&config, 1.0);
    let completions = generate(&fused, &slots(3), requests.clone()).unwrap();
    let (logprob_error, cdf_error) = disagreement(&candle, &requests, &completions);
    assert!(
        logprob_error < 2e-5 && cdf_error < 1e-5,
        "{logprob_error:e} {cdf_error:e}"
    );
}

#[test]
fn an_answer_does_not_depend_on_slots_or_neighbours() {
    let config = tiny();
    for kernels in BOTH {
        let policy = policy(&config, 2, kernels);
        let requests = requests(&config, 1.0);
        let expected = generate(&policy, &slots(1), requests.clone()).unwrap();
        for count in [2, 7, 64] {
            let found = generate(&policy, &slots(count), requests.clone()).unwrap();
            assert_same(&expected, &found);
        }
        let reversed = requests.into_iter().rev().collect();
        let mut found = generate(&policy, &slots(5), reversed).unwrap();
        found.reverse();
        assert_same(&expected, &found);
    }
}

fn assert_same(expected: &[Completion], found: &[Completion]) {
    for (expected, found) in expected.iter().zip(found) {
        assert_eq!(expected.tokens, found.tokens);
        assert_eq!(expected.finish, found.finish);
        for (a, b) in expected.logprobs.iter().zip(&found.logprobs) {
            assert!((a - b).abs() < 2e-5);
        }
    }
}

#[test]
fn greedy_answers_take_the_likeliest_token_and_record_it_at_temperature_one() {
    let config = tiny();
    let policy = policy(&config, 2, KernelSet::Fused);
    let mut requests = requests(&config, 1.0);
    for request in &mut requests {
        request.sampling = Sampling::Greedy;
    }
    let completions = generate(&policy, &slots(4), requests.clone()).unwrap();
    for (request, completion) in requests.iter().zip(&completions) {
        let tokens = joined(request, completion);
        for (t, &logprob) in completion.logprobs.iter().enumerate() {
            let end = request.prompt.len() + t;
            for other in 0..config.vocab_size as u32 {
                let mut edited = tokens[..=end].to_vec();
                edited[end] = other;
                let row = ScoreRow {
                    tokens: &edited,
                    first: end,
                    temperature: 1.0,
                };
                let score = score(&policy, &[row]).unwrap()[0][0];
                assert!(score.logprob <= logprob + 2e-5);
                assert!(other != tokens[end] || (score.logprob - logprob).abs() < 2e-5);
            }
            if t > 1 {
                break; // enough of each: this is the slow way
            }
        }
    }
}

#[test]
fn answers_end_at_a_stop_token_or_at_their_limit() {
    let config = tiny();
    let policy = policy(&config, 2, KernelSet::Fused);
    let requests = requests(&config, 1.0);
    let completions = generate(&policy, &slots(4), requests.clone()).unwrap();
    let mut stopped = 0;
    for (request, completion) in requests.iter().zip(&completions) {
        let (last, before) = completion.tokens.split_last().unwrap();
        assert!(before.iter().all(|token| !request.stop_ids.contains(token)));
        assert_eq!(completion.tokens.len(), completion.logprobs.len());
        match completion.finish {
            Finish::Stop(id) => {
                assert!(id == *last && request.stop_ids.contains(&id));
                stopped += 1;
            }
            Finish::Length => assert_eq!(completion.tokens.len(), request.max_tokens),
        }
    }
    assert!(stopped > 0 && stopped < completions.len(), "{stopped}");
}

#[test]
fn a_request_for_no_tokens_is_answered_with_none() {
    let config = tiny();
    let policy = policy(&config, 2, KernelSet::Fused);
    let mut requests = requests(&config, 1.0);
    requests[3].max_tokens = 0;
    let completions = generate(&policy, &slots(2), requests).unwrap();
    assert_eq!(completions.len(), 20);
    assert_eq!(completions[3], Completion::empty());
    assert_eq!(generate(&policy, &slots(2), Vec::new()).unwrap(), []);
}

#[test]
fn requests_that_cannot_be_answered_are_refused_by_place() {
    let config = tiny();
    let policy = policy(&config, 2, KernelSet::Fused);
    let breaks: [fn(&mut GenerationRequest); 6] = [
        |request| request.prompt = [].into(),
        |request| request.prompt = [0, 37].into(),
        |request| request.max_tokens = 64,
        |request| request.max_tokens = usize::MAX,
        |request| {
            request.sampling = Sampling::Prescribed {
                seed: SEED,
                rollout: 0,
                temperature: 0.0,
            }
        },
        |request| {
            request.sampling = Sampling::Prescribed {
                seed: SEED,
                rollout: 0,
                temperature: f32::NAN,
            };
        },
    ];
    for break_it in breaks {
        let mut requests = requests(&config, 1.0);
        break_it(&mut requests[2]);
        assert!(generate(&policy, &slots(2), requests).is_err());
    }
}

#[test]
fn an_edited_token_and_a_wrong_temperature_stand_out() {
    let config = tiny();
    let policy = policy(&config, 2, KernelSet::Fused);
    let honest = requests(&config, 1.0);
    let mut edited = generate(&policy, &slots(4), honest.clone()).unwrap();
    for completion in &mut edited {
        let middle = completion.tokens.len() / 2;
        completion.tokens[middle] = (completion.tokens[middle] + 11) % 37;
    }
    assert!(disagreement(&policy, &honest, &edited).1 > 0.05);
    let warm = generate(&policy, &slots(4), requests(&config, 1.3)).unwrap();
    assert!(disagreement(&policy, &honest, &warm).1 > 0.01);
}
