//! The audit of real models: answers over swapped weights, and over stale keys and values.

use muster_policy::{
    Completion, Config, Device, Engine, EngineConfig, GenerationRequest, Image, KernelSet, Layout,
    Master, Policy, Sampling, ScoreRow, Storage, WeightsRule as Rule, score,
};
use muster_protocol::id::{DescriptorHash, PeerId, StateRoot, TicketId, UnixMillis};
use muster_protocol::message::group::FinishReason;
use muster_protocol::message::lease::{RolloutRange, WeightsRule};
use muster_protocol::message::ticket::{SamplingRules, Ticket};
use serde_json::Value;

use super::*;

mod over_bus;

/// Inputs, and answers that a dishonest engine made of them over stale keys and values.
fn recorded() -> Value {
    serde_json::from_str(include_str!("../../../policy/testdata/stale_kv.json")).unwrap()
}

fn number(value: &Value) -> usize {
    usize::try_from(value.as_u64().unwrap()).unwrap()
}

/// The old policy and the new.
fn policies(case: &Value) -> [Policy; 2] {
    let config = Config::parse(&case["config"].to_string()).unwrap();
    let scale = case["scale"].as_f64().unwrap() as f32;
    [0, 1].map(|version: usize| {
        let seed = case["weights_seeds"][version].as_u64().unwrap();
        let master = Master::init(&config, seed).unwrap();
        let values: Vec<f32> = master.values().iter().map(|value| value * scale).collect();
        let image = Image::from_values(&Layout::new(&config), &values, Storage::F32).unwrap();
        Policy::from_image(&config, &image, KernelSet::Fused, &Device::Cpu).unwrap()
    })
}

fn version(number: u64) -> VersionRef {
    VersionRef {
        version: PolicyVersion(number),
        root: StateRoot([number as u8; 32]),
    }
}

fn lease(case: &Value) -> Lease {
    let prompt = case["prompt"].as_array().unwrap();
    let ticket = Ticket {
        id: TicketId(1),
        descriptor: DescriptorHash([0; 32]),
        item: 0,
        prompt: prompt.iter().map(|token| number(token) as u32).collect(),
        group_size: 4,
        sampling: SamplingRules {
            temperature: 1.0,
            tokens_max: number(&case["tokens_max"]) as u32,
            stop_ids: vec![36],
            stop_strings: Vec::new(),
        },
        oldest_version: PolicyVersion(0),
        deadline: UnixMillis(0),
    };
    Lease {
        id: LeaseId([0; 16]),
        ticket,
        worker: PeerId([0; 32]),
        version: version(0),
        weights: WeightsRule::InFlight,
        class: NumericClass::F32Cpu,
        rollouts: RolloutRange { first: 0, count: 4 },
        epoch: 0,
        submission: 0,
        nonce: [0; 32],
        seed: [number(&case["seed"]) as u8; 32],
        deadline: UnixMillis(0),
    }
}

fn group_of(lease: &Lease, rollouts: Vec<Rollout>) -> Group {
    Group {
        lease: lease.id,
        ticket: lease.ticket.id,
        version: lease.version,
        class: lease.class,
        rollouts,
        commitments: Vec::new(),
    }
}

/// What the critic concludes from one forward pass for each segment.
fn judged(case: &Value, group: &Group) -> Decision {
    let (lease, policies) = (lease(case), policies(case));
    let held = [version(0), version(1)];
    let requests = score_requests(&lease, group, &held);
    let scored: Vec<Vec<TokenScore>> = requests
        .iter()
        .map(|request| {
            let row = ScoreRow {
                tokens: &request.tokens,
                first: request.first,
                temperature: request.temperature,
            };
            let policy = &policies[request.version.version.0 as usize];
            score(policy, &[row]).unwrap().remove(0)
        })
        .collect();
    let scores = scores_of(group, &mut scored.into_iter());
    audit(&lease, group, &scores, &Thresholds::SAME_CLASS).0
}

fn rollout_of(lease: &Lease, done: &Completion) -> Rollout {
    let span = |span: &muster_policy::Span| (PolicyVersion(span.version), span.tokens);
    let spans: Vec<(PolicyVersion, usize)> = done.spans.iter().map(span).collect();
    let (prompt, finish) = (lease.ticket.prompt.clone(), FinishReason::Length);
    Rollout::of_versions(prompt, &done.tokens, &done.logprobs, &spans, finish)
}

/// The honest engine on the recorded inputs, in memory so small that rows give way, with new weights in mid-answer.
fn honest(case: &Value) -> Group {
    let [old, new] = policies(case);
    let lease = lease(case);
    let prompt: std::sync::Arc<[u32]> = lease.ticket.prompt.as_slice().into();
    let requests = (0..4)
        .map(|rollout| {
            let sampling = Sampling::Prescribed {
                seed: lease.seed,
                rollout,
                temperature: 1.0,
            };
            let tokens_max = lease.ticket.sampling.tokens_max as usize;
            let request = GenerationRequest::new(prompt.clone(), tokens_max, [].into(), sampling);
            GenerationRequest {
                weights: Rule::InFlight,
                ..request
            }
        })
        .collect();
    // Two layers, keys and values of 12 numbers each, blocks of 32 positions: five blocks for four rows of two.
    let config = EngineConfig {
        kv_bytes: std::num::NonZeroU64::new(5 * 2 * 2 * 12 * 32 * 4),
        ..EngineConfig::default()
    };
    let mut engine = Engine::new(old, 0, &config).unwrap();
    engine.submit(requests).unwrap();
    for _ in 0..number(&case["swap_after"]) {
        engine.step().unwrap();
    }
    engine.swap(new, 1).unwrap();
    let mut answered = Vec::new();
    while !engine.is_idle() {
        answered.extend(engine.step().unwrap());
    }
    assert!(engine.stats().preemptions > 0, "{:?}", engine.stats());
    let done = &answered[0].completions;
    assert!(done.iter().any(|done| done.spans.len() == 2));
    group_of(
        &lease,
        done.iter().map(|done| rollout_of(&lease, done)).collect(),
    )
}

#[test]
fn an_answer_with_a_swap_and_a_preemption_in_its_middle_is_accepted() {
    let case = recorded();
    assert_eq!(judged(&case, &honest(&case)), Decision::Accept);
}

#[test]
fn the_same_answer_over_stale_keys_and_values_is_rejected() {
    let case = recorded();
    let lease = lease(&case);
    let numbers = |value: &Value| value.as_array().unwrap().clone();
    let recorded = numbers(&case["rollouts"]);
    let rollouts = recorded.iter().map(|rollout| {
        let spans = numbers(&rollout["spans"]);
        let spans = spans
            .iter()
            .map(|span| (PolicyVersion(number(&span[0]) as u64), number(&span[1])));
        let tokens: Vec<u32> = numbers(&rollout["tokens"])
            .iter()
            .map(|token| number(token) as u32)
            .collect();
        let logprobs: Vec<f32> = numbers(&rollout["logprobs"])
            .iter()
            .map(|logprob| logprob.as_f64().unwrap() as f32)
            .collect();
        let spans: Vec<(PolicyVersion, usize)> = spans.collect();
        let (prompt, finish) = (lease.ticket.prompt.clone(), FinishReason::Length);
        Rollout::of_versions(prompt, &tokens, &logprobs, &spans, finish)
    });
    let stale = group_of(&lease, rollouts.collect());
    assert_eq!(stale.versions().len(), 2);
    assert_eq!(judged(&case, &stale), Decision::Reject);
}

#[test]
fn a_segment_that_names_another_version_than_drew_it_is_rejected() {
    let case = recorded();
    let mut group = honest(&case);
    let moved = group
        .rollouts
        .iter_mut()
        .find(|r| r.segments.len() == 3)
        .unwrap();
    if let Segment::Policy { version, .. } = &mut moved.segments[2] {
        *version = PolicyVersion(0);
    }
    assert_eq!(judged(&case, &group), Decision::Reject);
}
