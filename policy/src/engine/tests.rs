use super::*;
use crate::config::Config;
use crate::kernels::KernelSet;
use crate::score::{ScoreRow, score};
use crate::testing::{BOTH, families, policy, texts, tiny};

mod stale_kv;

const SEED: [u8; 32] = [7; 32];

fn slots(slots: usize) -> EngineConfig {
    EngineConfig {
        slots: NonZeroUsize::new(slots).unwrap(),
        ..EngineConfig::default()
    }
}

/// Prompts of different lengths, some shared by several requests; answers of different lengths.
fn requests(config: &Config, temperature: f32) -> Vec<GenerationRequest> {
    let prompts = texts(config, 11, &[5, 1, 13, 8, 2]);
    (0..20)
        .map(|index| {
            let sampling = Sampling::Prescribed {
                seed: SEED,
                rollout: index as u32,
                temperature,
            };
            let prompt = Arc::clone(&prompts[index / 3 % prompts.len()]);
            GenerationRequest::new(prompt, 4 + index * 7 % 23, [1, 30].into(), sampling)
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
            Finish::StopString(string) => panic!("no stop string {string} was asked for"),
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

/// A budget of `blocks` blocks of the tiny model.
fn budget(config: &Config, slots: usize, blocks: u64) -> EngineConfig {
    EngineConfig {
        slots: NonZeroUsize::new(slots).unwrap(),
        kv_bytes: NonZeroU64::new(blocks * block_bytes(config)),
        ..EngineConfig::default()
    }
}

fn answer_all(engine: &mut Engine, requests: Vec<GenerationRequest>) -> Vec<Completion> {
    let group = engine.submit(requests).unwrap();
    while !engine.is_idle() {
        if let Some(answered) = engine.step().unwrap().pop() {
            assert_eq!(answered.group, group);
            return answered.completions;
        }
    }
    panic!("the group was not answered");
}

#[test]
fn answers_are_the_same_whatever_the_budget_and_the_chunk() {
    let config = tiny();
    for kernels in BOTH {
        let policy = policy(&config, 2, kernels);
        let requests = requests(&config, 1.0);
        let expected = generate(&policy, &slots(64), requests.clone()).unwrap();
        for (blocks, chunk) in [(2, 512), (3, 1), (7, 5), (40, 3)] {
            let tight = EngineConfig {
                chunk_tokens: NonZeroUsize::new(chunk).unwrap(),
                ..budget(&config, 16, blocks)
            };
            let mut engine = Engine::new(policy.clone(), 0, &tight).unwrap();
            assert_eq!(engine.kv_bytes(), blocks * block_bytes(&config));
            let found = answer_all(&mut engine, requests.clone());
            assert_same(&expected, &found);
            let stats = engine.stats();
            assert!(stats.blocks_peak <= blocks, "{stats:?}");
        }
    }
}

#[test]
fn rows_preempted_in_mid_answer_still_give_the_prescribed_answer() {
    let config = tiny();
    let policy = policy(&config, 2, KernelSet::Fused);
    let prompts = texts(&config, 5, &[20, 24, 28, 25]);
    let requests: Vec<GenerationRequest> = (0..8)
        .map(|index| {
            let sampling = Sampling::Prescribed {
                seed: SEED,
                rollout: index as u32,
                temperature: 1.0,
            };
            GenerationRequest::new(prompts[index / 2].clone(), 30, [].into(), sampling)
        })
        .collect();
    let mut engine = Engine::new(policy.clone(), 0, &budget(&config, 8, 9)).unwrap();
    let completions = answer_all(&mut engine, requests.clone());
    assert!(engine.stats().preemptions > 0, "{:?}", engine.stats());
    let (logprob_error, cdf_error) = disagreement(&policy, &requests, &completions);
    assert!(logprob_error < 2e-5 && cdf_error < 1e-5);
}

#[test]
fn a_request_that_can_never_fit_is_refused_with_its_need_and_the_budget() {
    let config = tiny();
    let policy = policy(&config, 2, KernelSet::Fused);
    let mut engine = Engine::new(policy.clone(), 0, &budget(&config, 4, 1)).unwrap();
    let mut long = requests(&config, 1.0);
    long[3].max_tokens = 40;
    let error = engine.submit(long).unwrap_err();
    let (needed, held) = (2 * block_bytes(&config), block_bytes(&config));
    assert!(
        matches!(error, PolicyError::NeverFits { row: 3, needed_bytes, budget_bytes }
            if needed_bytes == needed && budget_bytes == held),
        "{error}"
    );
    assert!(engine.is_idle(), "all of a group or none");
    let nothing = EngineConfig {
        kv_bytes: NonZeroU64::new(100),
        ..EngineConfig::default()
    };
    let refused = Engine::new(policy, 0, &nothing);
    assert!(matches!(refused, Err(PolicyError::NoKvMemory { .. })));
}

#[test]
fn groups_are_returned_as_they_finish_and_requests_are_taken_at_any_time() {
    let config = tiny();
    let policy = policy(&config, 2, KernelSet::Fused);
    let all = requests(&config, 1.0);
    let expected = generate(&policy, &slots(64), all.clone()).unwrap();
    let mut engine = Engine::new(policy, 0, &slots(5)).unwrap();
    let mut groups = BTreeMap::new();
    let mut found = vec![None; all.len()];
    let mut waiting = all.chunks(4).enumerate();
    loop {
        if let Some((number, requests)) = waiting.next() {
            let id = engine.submit(requests.to_vec()).unwrap();
            groups.insert(id, number * 4);
        }
        for answered in engine.step().unwrap() {
            let first = groups.remove(&answered.group).unwrap();
            for (at, completion) in answered.completions.into_iter().enumerate() {
                found[first + at] = Some(completion);
            }
        }
        if engine.is_idle() && groups.is_empty() {
            break;
        }
    }
    let found: Vec<Completion> = found.into_iter().flatten().collect();
    assert_eq!(found.len(), all.len());
    assert_same(&expected, &found);
}

fn with_rule(mut requests: Vec<GenerationRequest>, rule: WeightsRule) -> Vec<GenerationRequest> {
    for request in &mut requests {
        request.weights = rule;
        request.stop_ids = [].into();
    }
    requests
}

/// Largest errors as [`disagreement`], every span scored under the version that it names.
fn disagreement_by_span(
    policies: &BTreeMap<u64, Policy>,
    requests: &[GenerationRequest],
    completions: &[Completion],
) -> (f32, f64) {
    let (mut logprob_error, mut cdf_error) = (0.0f32, 0.0f64);
    for (request, completion) in requests.iter().zip(completions) {
        let tokens = joined(request, completion);
        let Sampling::Prescribed {
            seed,
            rollout,
            temperature,
        } = request.sampling
        else {
            panic!("greedy answers have no seed");
        };
        let total: usize = completion.spans.iter().map(|span| span.tokens).sum();
        assert_eq!(total, completion.tokens.len());
        let mut at = 0;
        for span in &completion.spans {
            let first = request.prompt.len() + at;
            let row = ScoreRow {
                tokens: &tokens[..first + span.tokens],
                first,
                temperature,
            };
            for score in &score(&policies[&span.version], &[row]).unwrap()[0] {
                logprob_error = logprob_error.max((score.logprob - completion.logprobs[at]).abs());
                cdf_error = cdf_error.max(score.error(uniform(&seed, rollout, at as u64)));
                at += 1;
            }
        }
    }
    (logprob_error, cdf_error)
}

#[test]
fn drained_answers_end_under_their_own_weights_while_new_ones_begin_under_the_new() {
    let config = tiny();
    for kernels in BOTH {
        let [old, new] = [2, 3].map(|seed| policy(&config, seed, kernels));
        let requests = with_rule(requests(&config, 1.0), WeightsRule::Drain);
        let expected =
            [&old, &new].map(|policy| generate(policy, &slots(64), requests.clone()).unwrap());
        let mut engine = Engine::new(old, 0, &slots(6)).unwrap();
        engine.submit(requests.clone()).unwrap();
        for _ in 0..4 {
            engine.step().unwrap();
        }
        engine.swap(new, 1).unwrap();
        engine.submit(requests.clone()).unwrap();
        let mut found = Vec::new();
        while !engine.is_idle() {
            found.extend(engine.step().unwrap());
        }
        assert_eq!(engine.live.len(), 1, "weights without rows are let go");
        for (version, (expected, found)) in expected.iter().zip(&found).enumerate() {
            assert_same(expected, &found.completions);
            let spans = found.completions.iter().flat_map(|done| &done.spans);
            assert!(spans.into_iter().all(|span| span.version == version as u64));
        }
    }
}

#[test]
fn weights_that_change_in_mid_answer_leave_spans_that_agree_with_each_version() {
    let config = tiny();
    for kernels in BOTH {
        let [old, new] = [2, 3].map(|seed| policy(&config, seed, kernels));
        let policies = BTreeMap::from([(7, old.clone()), (8, new.clone())]);
        let requests = with_rule(requests(&config, 1.0), WeightsRule::InFlight);
        // With a preemption in the middle as well.
        let mut engine = Engine::new(old, 7, &budget(&config, 12, 9)).unwrap();
        engine.submit(requests.clone()).unwrap();
        for _ in 0..6 {
            assert!(engine.step().unwrap().is_empty());
        }
        engine.swap(new, 8).unwrap();
        let mut found = Vec::new();
        while !engine.is_idle() {
            found.extend(engine.step().unwrap());
        }
        let completions = &found[0].completions;
        let mixed = completions.iter().filter(|done| done.spans.len() == 2);
        assert!(mixed.count() > 4);
        let (logprob_error, cdf_error) = disagreement_by_span(&policies, &requests, completions);
        assert!(
            logprob_error < 2e-5 && cdf_error < 1e-5,
            "{logprob_error:e} {cdf_error:e}"
        );
    }
}

#[test]
fn an_answer_that_continues_over_stale_keys_and_values_stands_out() {
    let config = tiny();
    let [old, new] = [2, 3].map(|seed| policy(&config, seed, KernelSet::Fused));
    let policies = BTreeMap::from([(7, old.clone()), (8, new.clone())]);
    let requests = with_rule(requests(&config, 1.0), WeightsRule::InFlight);
    let mut engine = Engine::new(old, 7, &slots(64)).unwrap();
    engine.submit(requests.clone()).unwrap();
    for _ in 0..3 {
        engine.step().unwrap();
    }
    // The dishonest swap: new weights under the old id, so that no text is read again.
    engine.executor.adopt(0, &new);
    engine.live.insert(
        0,
        Live {
            policy: new,
            version: 8,
        },
    );
    let mut found = Vec::new();
    while !engine.is_idle() {
        found.extend(engine.step().unwrap());
    }
    let errors = disagreement_by_span(&policies, &requests, &found[0].completions);
    // The critic's bounds within one numeric class are 1e-3 nats and 1e-4.
    assert!(errors.0 > 0.05 && errors.1 > 0.01, "{errors:?}");
}

#[test]
fn weights_of_another_shape_are_refused() {
    let policy_of = |config: &Config| policy(config, 2, KernelSet::Fused);
    let mut engine = Engine::new(policy_of(&tiny()), 0, &slots(2)).unwrap();
    let refused = engine.swap(policy_of(&crate::testing::untied()), 1);
    assert!(matches!(
        refused,
        Err(PolicyError::OtherShape { version: 1 })
    ));
    assert_eq!(engine.version(), 0);
}

#[test]
fn an_answer_ends_with_the_token_that_completes_a_stop_string() {
    let config = tiny();
    let policy = policy(&config, 2, KernelSet::Fused);
    let alphabet: String = ('a'..='z').chain('0'..='8').collect();
    let tokenizer = crate::text::Tokenizer::characters(&alphabet).unwrap();
    let bytes = Arc::new(crate::text::TokenBytes::new(&tokenizer));
    let plain = with_rule(requests(&config, 1.0), WeightsRule::Drain);
    let free = generate(&policy, &slots(8), plain.clone()).unwrap();
    // Strings that the free answers hold: each two characters from the middle of one.
    let texts: Vec<String> = free
        .iter()
        .map(|done| tokenizer.decode(&done.tokens).unwrap())
        .collect();
    let strings: Vec<String> = (0..3).map(|n| texts[4 + n][2..4].to_owned()).collect();
    let stops = StopStrings::new(&strings, bytes);
    let mut stopped = plain;
    for request in &mut stopped {
        request.stop_strings = Some(stops.clone());
    }
    let found = generate(&policy, &slots(8), stopped).unwrap();
    let mut ended = 0;
    for (free, found) in free.iter().zip(&found) {
        match stops.first(&free.tokens) {
            Some(at) => {
                assert_eq!(found.finish, Finish::StopString(at.string));
                assert_eq!(found.tokens, free.tokens[..=at.token]);
                ended += 1;
            }
            None => assert_eq!(found, free),
        }
    }
    assert!(ended >= 3);
}
