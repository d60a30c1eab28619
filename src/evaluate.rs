//! Measures accuracy on a split of the task: answers every item and scores it with the run's own reward.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;

use muster_policy::{
    EngineConfig, Finish, GenerationRequest, Policy, Sampling, StopStrings, TokenBytes, Tokenizer,
    generate,
};
use muster_protocol::message::ticket::SamplingRules;
use muster_rewards::{Answer, Item, Reward};

use crate::prompts::PromptForm;

/// Rows that an evaluation decodes together.
const SLOTS: NonZeroUsize = NonZeroUsize::new(256).unwrap();

/// An answer counts as right if its reward is this close to the largest one.
const RIGHT_WITHIN: f64 = 1e-9;

/// The parts of an evaluation besides policy and items.
#[derive(Debug, Clone)]
pub struct Examination<'a> {
    pub tokenizer: &'a Tokenizer,
    pub form: PromptForm,
    pub reward: &'a Reward,
    pub ends: Ends,
}

/// The rules that end an answer.
#[derive(Debug, Clone)]
pub struct Ends {
    pub stop_ids: Arc<[u32]>,
    pub stop_strings: Option<StopStrings>,
    pub tokens_max: usize,
}

impl Ends {
    /// The rules of a run's groups.
    pub fn of(rules: &SamplingRules, tokenizer: &Tokenizer) -> Self {
        let strings = &rules.stop_strings;
        let bytes = || Arc::new(TokenBytes::new(tokenizer));
        Self {
            stop_ids: rules.stop_ids.as_slice().into(),
            stop_strings: (!strings.is_empty()).then(|| StopStrings::new(strings, bytes())),
            tokens_max: rules.tokens_max as usize,
        }
    }
}

/// The result of an evaluation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outcome {
    /// Share of the answers with the largest reward.
    pub accuracy: f64,
    pub reward: f64,
    /// Number of answers.
    pub samples: u64,
    /// Wall time.
    pub seconds: f64,
}

impl Examination<'_> {
    /// Answers each item `samples` times: greedily if once, else at temperature 1 with draws from `seed`.
    ///
    /// # Errors
    /// An item does not fit the model, or a gold answer cannot be scored.
    pub fn run(
        &self,
        policy: &Policy,
        items: &[Item],
        samples: usize,
        seed: u64,
    ) -> Result<Outcome> {
        let start = Instant::now();
        let mut requests = Vec::with_capacity(items.len() * samples);
        for (number, item) in items.iter().enumerate() {
            let prompt: Arc<[u32]> = self.form.encode(self.tokenizer, &item.prompt)?.into();
            for sample in 0..samples {
                requests.push(self.request(&prompt, number as u64, sample as u32, samples, seed));
            }
        }
        let engine = EngineConfig {
            slots: SLOTS,
            ..EngineConfig::default()
        };
        let completions = generate(policy, &engine, requests)?;
        let (mut right, mut sum) = (0u64, 0.0);
        let best = self.reward.range().max;
        for (number, completion) in completions.iter().enumerate() {
            let item = &items[number / samples];
            let text = self.tokenizer.decode(&completion.tokens)?;
            let answer = Answer {
                prompt: &item.prompt,
                text: &text,
                finished: completion.finish != Finish::Length,
                tokens: completion.tokens.len(),
            };
            let total = self.reward.score(&answer, &item.gold)?.total;
            sum += total;
            right += u64::from(total >= best - RIGHT_WITHIN);
        }
        let samples = completions.len() as u64;
        Ok(Outcome {
            accuracy: right as f64 / samples.max(1) as f64,
            reward: sum / samples.max(1) as f64,
            samples,
            seconds: start.elapsed().as_secs_f64(),
        })
    }

    fn request(
        &self,
        prompt: &Arc<[u32]>,
        item: u64,
        sample: u32,
        samples: usize,
        seed: u64,
    ) -> GenerationRequest {
        let mut bytes = [0u8; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        bytes[8..16].copy_from_slice(&item.to_le_bytes());
        let sampling = match samples {
            1 => Sampling::Greedy,
            _ => Sampling::Prescribed {
                seed: bytes,
                rollout: sample,
                temperature: 1.0,
            },
        };
        let ends = &self.ends;
        let stop_ids = ends.stop_ids.clone();
        GenerationRequest {
            stop_strings: ends.stop_strings.clone(),
            ..GenerationRequest::new(prompt.clone(), ends.tokens_max, stop_ids, sampling)
        }
    }
}
