//! `muster doctor --speed`: the memory, arithmetic and decoding speed of this machine.
//!
//! Decoding is measured with a model of the quickstart's shape. Its weights are random, since speed depends on their number
//! alone.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde::Serialize;

use muster_monitor::machine::memory_available;
use muster_policy::{
    Device, EngineConfig, GenerationRequest, KernelSet, Master, Policy, Roofline, Sampling,
    Storage, Threads, generate,
};

use crate::config::WarmupSection;

/// Bytes read to measure the memory: several times the largest caches, unless the machine has little memory.
const SWEEP_BYTES: u64 = 1 << 30;
/// Answers that decode together, as in a worker with default settings.
const ROWS: NonZeroUsize = NonZeroUsize::new(64).unwrap();
/// Tokens of each prompt and of each answer, about those of the quickstart's task.
const PROMPT_TOKENS: usize = 8;
const ANSWER_TOKENS: usize = 12;
/// Decoding is repeated for at least this long.
const DECODE_MIN: Duration = Duration::from_millis(500);

#[derive(Debug, Serialize)]
pub(super) struct Speed {
    what: &'static str,
    threads: NonZeroUsize,
    read_bytes_per_second: f64,
    multiply_adds_per_second: f64,
    /// Answer tokens of the quickstart's model, of [`ROWS`] answers together.
    decode_tokens_per_second: f64,
}

impl Speed {
    pub(super) fn measure() -> Result<Self> {
        let threads = Threads::all();
        let decode_tokens_per_second = decode(&threads)?;
        let sweep = memory_available().map_or(SWEEP_BYTES, |bytes| SWEEP_BYTES.min(bytes / 4));
        let roofline = Roofline::measure(&threads, sweep as usize);
        Ok(Self {
            what: "speed",
            threads: threads.count(),
            read_bytes_per_second: roofline.read_bytes_per_second,
            multiply_adds_per_second: roofline.multiply_adds_per_second,
            decode_tokens_per_second,
        })
    }

    pub(super) fn line(&self) -> String {
        format!(
            "ok   {:<12} {} threads read {:.1} GB/s of memory, do {:.0} billion multiply-adds/s, and decode {:.0} tokens/s \
             of the quickstart's model",
            self.what,
            self.threads,
            self.read_bytes_per_second / 1e9,
            self.multiply_adds_per_second / 1e9,
            self.decode_tokens_per_second
        )
    }
}

fn decode(threads: &Threads) -> Result<f64> {
    let config = WarmupSection::default().shape();
    let image = Master::init(&config, 1)?.image(Storage::Bf16)?;
    let (kernels, device) = (KernelSet::Fused, Device::Cpu);
    let policy = Policy::for_inference(&config, image.bytes(), kernels, &device, threads)?;
    let engine = EngineConfig {
        slots: ROWS,
        ..EngineConfig::default()
    };
    let vocabulary = config.vocab_size as u32;
    let requests = (0..ROWS.get() as u32).map(|row| {
        let sampling = Sampling::Prescribed {
            seed: [3; 32],
            rollout: row,
            temperature: 1.0,
        };
        // Equal prompts would be read once, so each row has its own.
        let prompt = (0..PROMPT_TOKENS as u32).map(|place| (row * 7 + place * 5) % vocabulary);
        GenerationRequest::new(prompt.collect(), ANSWER_TOKENS, Arc::from([]), sampling)
    });
    let requests: Vec<GenerationRequest> = requests.collect();
    let (start, mut tokens) = (Instant::now(), 0);
    while start.elapsed() < DECODE_MIN {
        generate(&policy, &engine, requests.clone())?;
        tokens += requests.len() * ANSWER_TOKENS;
    }
    Ok(tokens as f64 / start.elapsed().as_secs_f64())
}
