use std::ops::Range;

use muster_policy::Layout;

use super::*;

const SHAPE: &str = r#"{"architectures":["LlamaForCausalLM"],"model_type":"llama","vocab_size":40,"hidden_size":64,
    "intermediate_size":96,"num_hidden_layers":2,"num_attention_heads":4,"num_key_value_heads":2,
    "max_position_embeddings":64,"rope_theta":10000.0,"rms_norm_eps":1e-6,"tie_word_embeddings":true}"#;
/// Weights of a fresh model say next to nothing: these are larger, as trained ones are.
const SCALE: f32 = 3.0;
/// A prompt of four tokens and an answer of eight.
const TEXT: [u32; 12] = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8];
const DRAWN: Range<usize> = 4..12;

fn model() -> (ModelConfig, Image) {
    let config = Config::parse(SHAPE).unwrap();
    let master = Master::init(&config, 1).unwrap();
    let values: Vec<f32> = master.values().iter().map(|value| value * SCALE).collect();
    let image = Image::from_values(&Layout::new(&config), &values, Storage::Bf16).unwrap();
    let parts = ModelConfig {
        config,
        storage: Storage::Bf16,
        kernels: KernelSet::Fused,
        device: Device::Cpu,
    };
    (parts, image)
}

fn stepper() -> PolicyStepper {
    let (parts, image) = model();
    PolicyStepper::new(parts, TrainConfig::default(), &image, 10, 1).unwrap()
}

/// A rollout of version 0 whose author claims that nothing it drew was unlikely.
fn claimed(class: NumericClass, audited: bool) -> TrainRollout {
    TrainRollout {
        tokens: TEXT.to_vec(),
        targets: std::iter::once(DRAWN).collect(),
        rollout_logprobs: vec![0.0; DRAWN.len()],
        advantage: 1.0,
        version: PolicyVersion(0),
        class,
        audited,
    }
}

fn input(rollouts: Vec<TrainRollout>) -> StepInput {
    StepInput {
        step: PolicyVersion(1),
        groups: vec![rollouts],
        temperature: 1.0,
    }
}

/// The log-probs of the drawn tokens with these kernels.
fn computed(kernels: KernelSet) -> Vec<f32> {
    let (parts, image) = model();
    let policy = Policy::from_image(&parts.config, &image, kernels, &Device::Cpu).unwrap();
    let row = ScoreRow {
        tokens: &TEXT,
        first: DRAWN.start,
        temperature: 1.0,
    };
    logprobs(&policy, &[row]).unwrap().remove(0)
}

#[test]
fn log_probs_that_no_critic_confirmed_are_recomputed_in_the_arithmetic_of_their_class() {
    let mut stepper = stepper();
    let model = stepper.model.as_mut().unwrap();
    let mut input = input(vec![
        claimed(NumericClass::F32Cpu, false),
        claimed(NumericClass::Int8Cpu, false),
        claimed(NumericClass::Int8Cpu, true),
    ]);
    assert_eq!(model.recompute(&mut input).unwrap(), 2);
    let [whole, rounded, confirmed] = &input.groups[0][..] else {
        panic!("three rollouts");
    };
    let (in_f32, in_int8) = (computed(KernelSet::Fused), computed(KernelSet::Int8));
    assert_eq!(whole.rollout_logprobs, in_f32);
    assert_eq!(rounded.rollout_logprobs, in_int8);
    assert_eq!(confirmed.rollout_logprobs, [0.0; DRAWN.end - DRAWN.start]);
    let apart = in_f32
        .iter()
        .zip(&in_int8)
        .map(|(one, other)| (one - other).abs());
    let apart = apart.fold(0.0, f32::max);
    assert!(apart > 2e-4, "the two are {apart} nats apart at most");
}

#[tokio::test]
async fn the_mismatch_of_a_step_says_how_far_int8_is_from_the_policy() {
    let mut mismatch = [0.0; 2];
    for (class, found) in [NumericClass::F32Cpu, NumericClass::Int8Cpu]
        .into_iter()
        .zip(&mut mismatch)
    {
        let input = input(vec![claimed(class, false)]);
        *found = stepper().step(input).await.unwrap().stats.mismatch_kl;
    }
    let [whole, rounded] = mismatch;
    assert!(whole < 1e-9, "{whole}");
    assert!((1e-8..0.1).contains(&rounded), "{rounded}");
}

#[test]
fn weights_in_int8_go_with_the_version_that_they_are_of() {
    let mut stepper = stepper();
    let model = stepper.model.as_mut().unwrap();
    model.versions_kept = 1;
    for step in 1..=3 {
        let mut input = input(vec![claimed(NumericClass::Int8Cpu, false)]);
        input.step = PolicyVersion(step);
        input.groups[0][0].version = PolicyVersion(step - 1);
        model.step(input).unwrap();
        let made = model.known.values().filter(|known| known.rounded.is_some());
        assert_eq!((model.known.len(), made.count()), (1, 0));
    }
    let mut stale = input(vec![claimed(NumericClass::Int8Cpu, false)]);
    let error = model.recompute(&mut stale).unwrap_err();
    assert!(error.to_string().contains("no longer held"), "{error}");
}
