use muster_policy::{
    EngineConfig, GenerationRequest, Image, Layout, Master, Sampling, Storage, generate,
};
use muster_protocol::envelope::seal;
use muster_protocol::id::{
    ContentHash, DescriptorHash, Generation, LeaseId, PeerId, PolicyVersion, StateRoot, TicketId,
    UnixMillis,
};
use muster_protocol::identity::{Identity, MachineSeed};
use muster_protocol::message::descriptor::Thresholds;
use muster_protocol::message::group::{FinishReason, Group, Rollout, Segment};
use muster_protocol::message::lease::{Lease, RolloutRange, WeightsRule};
use muster_protocol::message::ticket::{SamplingRules, Ticket};
use muster_protocol::message::verdict::Decision;
use muster_protocol::message::version::{Dtype, Parameter, Part, PartKind, Version, state_root};

use super::*;
use crate::critic::findings::audit;
use crate::critic::{score_requests, scores_of};

const SHAPE: &str = r#"{"architectures":["LlamaForCausalLM"],"model_type":"llama","vocab_size":40,"hidden_size":64,
    "intermediate_size":96,"num_hidden_layers":2,"num_attention_heads":4,"num_key_value_heads":2,
    "max_position_embeddings":64,"rope_theta":10000.0,"rms_norm_eps":1e-6,"tie_word_embeddings":true}"#;
/// Weights of a fresh model say next to nothing: these are larger, as trained ones are.
const SCALE: f32 = 8.0;
const TOKENS: u32 = 12;
const BOTH: [NumericClass; 2] = [NumericClass::F32Cpu, NumericClass::Int8Cpu];

fn config() -> Config {
    Config::parse(SHAPE).unwrap()
}

/// The weights of a version, as they are published.
fn held(number: u64) -> Held {
    let master = Master::init(&config(), number).unwrap();
    let values: Vec<f32> = master.values().iter().map(|value| value * SCALE).collect();
    let image = Image::from_values(&Layout::new(&config()), &values, Storage::Bf16).unwrap();
    let parts = vec![Part {
        kind: PartKind::Base,
        root: ContentHash([number as u8; 32]),
    }];
    let parameter = Parameter {
        name: "weights".to_owned(),
        shape: vec![1],
        dtype: Dtype::Bf16,
        stage: 0,
    };
    let version = Version {
        descriptor: DescriptorHash([0; 32]),
        generation: Generation(1),
        version: PolicyVersion(number),
        parent: None,
        parameters: vec![parameter],
        root: state_root(&parts),
        parts,
        files: Vec::new(),
    };
    let learner = Identity::from_seed(&MachineSeed::from_bytes([1; 32]));
    Held {
        version: seal(&learner, &"r".parse().unwrap(), 1, version).unwrap(),
        anchor: None,
        objects: Vec::new(),
        files: Vec::new(),
        image: Bytes::from_owner(image.shared_bytes()),
    }
}

async fn scorer(versions: u64, classes: &[NumericClass]) -> PolicyScorer {
    let tokenizer = Tokenizer::characters("abcdefghijklmnopqrstuvwxyz").unwrap();
    let scorer = PolicyScorer::new(config(), KernelSet::Fused, Device::Cpu, tokenizer, 2);
    let mut scorer = scorer.for_classes(classes);
    for number in 1..=versions {
        scorer.adopt(&held(number)).await.unwrap();
    }
    scorer
}

fn lease(held: &Held, class: NumericClass) -> Lease {
    let ticket = Ticket {
        id: TicketId(1),
        descriptor: DescriptorHash([0; 32]),
        item: 0,
        prompt: vec![3, 1, 4, 1, 5],
        group_size: 4,
        sampling: SamplingRules {
            temperature: 1.0,
            tokens_max: TOKENS,
            stop_ids: vec![39],
            stop_strings: Vec::new(),
        },
        oldest_version: PolicyVersion(0),
        deadline: UnixMillis(0),
    };
    Lease {
        id: LeaseId([0; 16]),
        ticket,
        worker: PeerId([0; 32]),
        version: held.version.body.reference(),
        weights: WeightsRule::Drain,
        class,
        rollouts: RolloutRange { first: 0, count: 4 },
        epoch: 0,
        submission: 0,
        nonce: [0; 32],
        seed: [5; 32],
        deadline: UnixMillis(0),
    }
}

/// What a worker with these kernels answers to the lease, under the class that the lease names.
fn answered(held: &Held, lease: &Lease, kernels: KernelSet) -> Group {
    let threads = Threads::one();
    let policy =
        Policy::for_inference(&config(), &held.image, kernels, &Device::Cpu, &threads).unwrap();
    let prompt: Arc<[u32]> = lease.ticket.prompt.as_slice().into();
    let requests = (0..lease.rollouts.count).map(|rollout| {
        let sampling = Sampling::Prescribed {
            seed: lease.seed,
            rollout,
            temperature: lease.ticket.sampling.temperature,
        };
        GenerationRequest::new(prompt.clone(), TOKENS as usize, [].into(), sampling)
    });
    let done = generate(&policy, &EngineConfig::default(), requests.collect()).unwrap();
    let rollout = |done: &muster_policy::Completion| {
        let (prompt, version) = (lease.ticket.prompt.clone(), lease.version.version);
        let (tokens, logprobs) = (done.tokens.clone(), done.logprobs.clone());
        Rollout::single_turn(prompt, tokens, version, logprobs, FinishReason::Length)
    };
    Group {
        lease: lease.id,
        ticket: lease.ticket.id,
        version: lease.version,
        class: lease.class,
        rollouts: done.iter().map(rollout).collect(),
        commitments: Vec::new(),
    }
}

async fn judged(scorer: &mut PolicyScorer, lease: &Lease, group: &Group) -> Decision {
    let requests = score_requests(lease, group, &scorer.held());
    let scored = scorer.score(requests).await.unwrap();
    let scores = scores_of(group, &mut scored.into_iter());
    audit(lease, group, &scores, &Thresholds::SAME_CLASS).0
}

fn drawn_mut(group: &mut Group) -> (&mut Vec<u32>, &mut Vec<f32>) {
    match &mut group.rollouts[2].segments[1] {
        Segment::Policy {
            tokens,
            rollout_logprobs,
            ..
        } => (tokens, rollout_logprobs),
        Segment::Prompt { .. } | Segment::Environment { .. } => panic!("no policy segment"),
    }
}

#[tokio::test]
async fn an_answer_holds_in_the_class_that_drew_it_and_in_no_other() {
    let (mut scorer, held) = (scorer(1, &BOTH).await, held(1));
    for claimed in BOTH {
        for (drawn_in, kernels) in BOTH.into_iter().zip([KernelSet::Fused, KernelSet::Int8]) {
            let lease = lease(&held, claimed);
            let group = answered(&held, &lease, kernels);
            let expected = match claimed == drawn_in {
                true => Decision::Accept,
                false => Decision::Reject,
            };
            let found = judged(&mut scorer, &lease, &group).await;
            assert_eq!(found, expected, "{claimed} drawn with {kernels:?}");
        }
    }
}

#[tokio::test]
async fn one_edited_token_and_one_shifted_log_prob_of_int8_are_rejected() {
    let (mut scorer, held) = (scorer(1, &BOTH).await, held(1));
    let lease = lease(&held, NumericClass::Int8Cpu);
    let honest = answered(&held, &lease, KernelSet::Int8);
    assert_eq!(judged(&mut scorer, &lease, &honest).await, Decision::Accept);
    let mut edited = honest.clone();
    let token = &mut drawn_mut(&mut edited).0[TOKENS as usize - 1];
    *token = (*token + 1) % 39;
    assert_eq!(judged(&mut scorer, &lease, &edited).await, Decision::Reject);
    let mut shifted = honest;
    drawn_mut(&mut shifted).1[7] -= 2e-3;
    assert_eq!(
        judged(&mut scorer, &lease, &shifted).await,
        Decision::Reject
    );
}

#[tokio::test]
async fn only_versions_that_were_answered_in_int8_are_kept_in_it_and_no_more_than_are_held() {
    let mut scorer = scorer(3, &BOTH).await;
    let of = |scorer: &PolicyScorer| -> Vec<(u64, bool)> {
        let made = |weights: &Weights| matches!(weights.rounded, Rounded::Made(_));
        let held = scorer.held.iter();
        held.map(|(number, weights)| (*number, made(weights)))
            .collect()
    };
    assert_eq!(of(&scorer), [(2, false), (3, false)]);
    let newest = held(3);
    for (class, made) in [(NumericClass::F32Cpu, false), (NumericClass::Int8Cpu, true)] {
        let lease = lease(&newest, class);
        let group = answered(&newest, &lease, KernelSet::Fused);
        judged(&mut scorer, &lease, &group).await;
        assert_eq!(of(&scorer), [(2, false), (3, made)], "{class}");
    }
    scorer.adopt(&held(4)).await.unwrap();
    assert_eq!(of(&scorer), [(3, true), (4, false)]);
}

#[tokio::test]
async fn a_run_without_int8_keeps_no_weights_for_it_and_accepts_none() {
    let (mut scorer, held) = (scorer(1, &BOTH[..1]).await, held(1));
    let lease = lease(&held, NumericClass::Int8Cpu);
    let group = answered(&held, &lease, KernelSet::Int8);
    assert_eq!(judged(&mut scorer, &lease, &group).await, Decision::Reject);
    let kept = scorer.held.values().map(|weights| &weights.rounded);
    assert!(
        kept.into_iter()
            .all(|rounded| matches!(rounded, Rounded::No))
    );
}

#[tokio::test]
async fn weights_under_a_known_number_with_another_root_score_nothing() {
    let (mut scorer, held) = (scorer(1, &BOTH).await, held(1));
    let mut lease = lease(&held, NumericClass::Int8Cpu);
    let group = answered(&held, &lease, KernelSet::Int8);
    lease.version.root = StateRoot([9; 32]);
    assert_eq!(judged(&mut scorer, &lease, &group).await, Decision::Reject);
}
