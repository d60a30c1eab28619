//! Tokens per second of the quickstart's shape: decoding at several batch sizes, and a training pass.
//!
//! Run with `cargo run --release -p muster-policy --example speed`; an argument picks the kernel set (`fused`, `candle`).
#![allow(clippy::print_stdout)]

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Instant;

use muster_policy::{
    AdamW, Architecture, Config, Device, EngineConfig, GenerationRequest, KernelSet, Master,
    Policy, Sampling, ScoreRow, Storage, TrainRow, generate, gradients, score,
};

// As in the binary: page faults of a training pass would otherwise take a third of it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const PROMPT: usize = 8;
const ANSWER: usize = 8;

fn config() -> Config {
    Config {
        vocab_size: 32,
        hidden_size: 96,
        intermediate_size: 256,
        num_hidden_layers: 3,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        max_position_embeddings: 64,
        tie_word_embeddings: true,
        eos_token_ids: vec![1],
        pad_token_id: Some(0),
        ..Architecture::Qwen2.defaults()
    }
}

/// Best of `repeats`, in seconds.
fn best(
    repeats: usize,
    mut work: impl FnMut() -> Result<(), Box<dyn std::error::Error>>,
) -> Result<f64, Box<dyn std::error::Error>> {
    let mut best = f64::INFINITY;
    for _ in 0..repeats {
        let start = Instant::now();
        work()?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(best)
}

fn tokens(row: usize, len: usize) -> Vec<u32> {
    (0..len)
        .map(|t| ((row * 31 + t * 17 + 5) % 30 + 2) as u32)
        .collect()
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let kernels = match std::env::args().nth(1).as_deref() {
        None | Some("fused") => KernelSet::Fused,
        Some("candle") => KernelSet::Candle,
        Some(other) => {
            return Err(format!("kernel set `{other}` is neither fused nor candle").into());
        }
    };
    let config = config();
    let mut master = Master::init(&config, 1)?;
    let policy = Policy::from_image(
        &config,
        &master.image(Storage::Bf16)?,
        kernels,
        &Device::Cpu,
    )?;
    println!("{kernels:?}, {} parameters", policy.layout().len());
    decode(&policy)?;
    train(&policy, &mut master)?;
    scoring(&policy)
}

fn decode(policy: &Policy) -> Result<(), Box<dyn std::error::Error>> {
    for slots in [1, 8, 64, 256] {
        let requests: Vec<GenerationRequest> = (0..slots * 4)
            .map(|index| {
                let sampling = Sampling::Prescribed {
                    seed: [3; 32],
                    rollout: index as u32,
                    temperature: 1.0,
                };
                let prompt = Arc::from(tokens(index / 8, PROMPT));
                GenerationRequest::new(prompt, ANSWER + index % 5, Arc::from([]), sampling)
            })
            .collect();
        let engine = EngineConfig {
            slots: NonZeroUsize::new(slots).unwrap_or(NonZeroUsize::MIN),
            ..EngineConfig::default()
        };
        let mut generated = 0;
        let seconds = best(20, || {
            let completions = generate(policy, &engine, requests.clone())?;
            generated = completions
                .iter()
                .map(|completion| completion.tokens.len())
                .sum();
            Ok(())
        })?;
        println!(
            "decode, {slots:3} slots: {:8.0} tokens/s",
            generated as f64 / seconds
        );
    }
    Ok(())
}

fn train(policy: &Policy, master: &mut Master) -> Result<(), Box<dyn std::error::Error>> {
    let rows: Vec<TrainRow> = (0..64)
        .map(|index| {
            let tokens = tokens(index, PROMPT + ANSWER);
            let targets = std::iter::once(PROMPT..tokens.len()).collect();
            TrainRow { tokens, targets }
        })
        .collect();
    let settings = AdamW {
        learning_rate: 0.0,
        ..AdamW::default()
    };
    for shards in [1, 2] {
        let shards = NonZeroUsize::new(shards).unwrap_or(NonZeroUsize::MIN);
        let mut step = 0.0;
        let seconds = best(50, || {
            let pass = gradients(policy, &rows, 1.0, shards, &|_, logprobs| {
                logprobs.iter().map(|_| -0.01).collect()
            })?;
            let start = Instant::now();
            master.step(&pass.gradients, &settings)?;
            step = start.elapsed().as_secs_f64();
            Ok(())
        })?;
        let read: usize = rows.iter().map(|row| row.tokens.len() - 1).sum();
        println!(
            "train, {shards} shards, 64 rows of 16 ({read} read): {:6.2} ms, of which update {:.2} ms",
            seconds * 1e3,
            step * 1e3
        );
    }
    Ok(())
}

fn scoring(policy: &Policy) -> Result<(), Box<dyn std::error::Error>> {
    let texts: Vec<Vec<u32>> = (0..64)
        .map(|index| tokens(index, PROMPT + ANSWER))
        .collect();
    let rows: Vec<ScoreRow<'_>> = texts
        .iter()
        .map(|tokens| ScoreRow {
            tokens,
            first: PROMPT,
            temperature: 1.0,
        })
        .collect();
    let seconds = best(50, || {
        score(policy, &rows)?;
        Ok(())
    })?;
    println!("score, 64 rows of 16: {:6.2} ms", seconds * 1e3);
    Ok(())
}
