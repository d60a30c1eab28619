//! Answers of an engine that keeps old keys and values under new weights: critics are tested with the recorded ones.

use super::*;
use crate::layout::Layout;
use crate::training::optimizer::Master;
use crate::weights::{Image, Storage};

/// Answers over stale keys and values that the critics of other crates must refuse: inputs and recorded outputs.
#[derive(serde::Serialize, serde::Deserialize)]
struct StaleCase {
    about: String,
    config: serde_json::Value,
    /// Seeds of the old and the new weights.
    weights_seeds: [u64; 2],
    /// Factor of fresh weights, so that versions differ.
    scale: f32,
    prompt: Vec<u32>,
    /// Every byte of the lease's seed.
    seed: u8,
    tokens_max: usize,
    swap_after: usize,
    rollouts: Vec<StaleRollout>,
}

#[derive(serde::Serialize, serde::Deserialize, PartialEq, Debug)]
struct StaleRollout {
    tokens: Vec<u32>,
    logprobs: Vec<f32>,
    /// Version and tokens.
    spans: Vec<(u64, usize)>,
}

const STALE_FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/stale_kv.json");

impl StaleCase {
    fn read() -> Self {
        serde_json::from_slice(&std::fs::read(STALE_FILE).unwrap()).unwrap()
    }

    fn policies(&self) -> [Policy; 2] {
        let config = Config::parse(&self.config.to_string()).unwrap();
        self.weights_seeds.map(|seed| {
            let master = Master::init(&config, seed).unwrap();
            let values: Vec<f32> = master.values().iter().map(|v| v * self.scale).collect();
            let layout = Layout::new(&config);
            let storage = Storage::F32;
            let image = Image::from_values(&layout, &values, storage).unwrap();
            let device = candle_core::Device::Cpu;
            Policy::from_image(&config, &image, KernelSet::Fused, &device).unwrap()
        })
    }

    fn generated(&self) -> Vec<StaleRollout> {
        let [old, new] = self.policies();
        let prompt: Arc<[u32]> = self.prompt.as_slice().into();
        let requests = (0..4)
            .map(|rollout| {
                let sampling = Sampling::Prescribed {
                    seed: [self.seed; 32],
                    rollout,
                    temperature: 1.0,
                };
                GenerationRequest::new(prompt.clone(), self.tokens_max, [].into(), sampling)
            })
            .collect();
        let mut engine = Engine::new(old, 0, &slots(8)).unwrap();
        engine.submit(requests).unwrap();
        for _ in 0..self.swap_after {
            engine.step().unwrap();
        }
        engine.executor.adopt(0, &new);
        engine.live.insert(
            0,
            Live {
                policy: new,
                version: 1,
            },
        );
        let mut found = Vec::new();
        while !engine.is_idle() {
            found.extend(engine.step().unwrap());
        }
        let rollouts = found.remove(0).completions.into_iter();
        rollouts
            .map(|done| StaleRollout {
                tokens: done.tokens,
                logprobs: done.logprobs,
                spans: done.spans.iter().map(|s| (s.version, s.tokens)).collect(),
            })
            .collect()
    }
}

#[test]
fn the_recorded_stale_answers_are_those_of_a_dishonest_engine() {
    let case = StaleCase::read();
    for (recorded, found) in case.rollouts.iter().zip(&case.generated()) {
        assert_eq!(
            (&recorded.tokens, &recorded.spans),
            (&found.tokens, &found.spans)
        );
    }
    assert_eq!(case.rollouts.len(), 4);
}

#[test]
#[ignore = "writes testdata/stale_kv.json anew"]
fn write_the_stale_answers() {
    let mut case = StaleCase::read();
    case.rollouts = case.generated();
    let text = serde_json::to_string(&case).unwrap();
    std::fs::write(STALE_FILE, text + "\n").unwrap();
}
