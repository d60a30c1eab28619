//! What the engine makes of its slots and its memory: the share of slots that are busy on answers of very different
//! lengths, what sharing a group's prompt saves, what memory it takes beside weights, keys and values, and whether that grows
//! over ten thousand groups.
//!
//! Run with `cargo run --release -p muster-policy --example batching`. It fails where slots, prompts or memory miss their bound.
//! Memory is measured in a process of its own, all of it: what is private and what is mapped.
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::num::{NonZeroU64, NonZeroUsize};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use muster_policy::{
    Config, Device, Engine, EngineConfig, GenerationRequest, KernelSet, Master, Policy, Sampling,
    Storage, Threads, write_atomically,
};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, LogNormal};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Small pages, as `muster` asks for.
#[cfg(target_os = "linux")]
fn small_pages() -> nix::Result<()> {
    nix::sys::prctl::set_thp_disable(true)
}

#[cfg(not(target_os = "linux"))]
fn small_pages() -> nix::Result<()> {
    Ok(())
}

const SLOTS: usize = 64;
const GROUP: usize = 8;

/// A decoder of a million parameters that reads 2,048 tokens.
const SHAPE: &str = r#"{"architectures":["Qwen2ForCausalLM"],"model_type":"qwen2","vocab_size":512,"hidden_size":128,
"intermediate_size":352,"num_hidden_layers":4,"num_attention_heads":4,"num_key_value_heads":2,"hidden_act":"silu",
"max_position_embeddings":2048,"rope_theta":10000.0,"rms_norm_eps":1e-6,"tie_word_embeddings":true}"#;

/// One of 37 million.
const LARGE: &str = r#"{"architectures":["LlamaForCausalLM"],"model_type":"llama","vocab_size":16384,"hidden_size":512,
"intermediate_size":1408,"num_hidden_layers":10,"num_attention_heads":8,"num_key_value_heads":2,"head_dim":64,
"hidden_act":"silu","max_position_embeddings":2048,"rope_theta":10000.0,"rms_norm_eps":1e-6,"tie_word_embeddings":true}"#;

/// Memory for its keys and values.
const LARGE_KV: u64 = 192 << 20;

fn main() -> Result<(), Box<dyn Error>> {
    small_pages()?;
    if let Some(folder) = std::env::args().nth(1) {
        return peak(folder.as_ref());
    }
    let config = Config::parse(SHAPE)?;
    let image = Master::init(&config, 1)?.image(Storage::F32)?;
    let policy = Policy::from_image(&config, &image, KernelSet::Fused, &Device::Cpu)?;
    println!("{} parameters", policy.layout().len());
    slots_busy(&policy)?;
    prompts_shared(&policy)?;
    memory(&policy)?;
    let folder = tempfile::tempdir()?;
    let image = Master::init(&Config::parse(LARGE)?, 1)?.image(Storage::Bf16)?;
    let files = [
        ("config.json", LARGE.as_bytes()),
        ("model.safetensors", image.bytes()),
    ];
    for (name, bytes) in files {
        write_atomically(&folder.path().join(name), |file| file.write_all(bytes))?;
    }
    let mut alone = Command::new(std::env::current_exe()?);
    let status = alone.arg(folder.path()).status()?;
    bounded(
        status.success(),
        "a process of its own keeps its bound of memory",
    )
}

/// Most memory that answers of a model take from its load on.
fn peak(folder: &Path) -> Result<(), Box<dyn Error>> {
    let bytes = std::fs::metadata(folder.join("model.safetensors"))?.len();
    let threads = Threads::one();
    let policy = Policy::load(folder, KernelSet::Fused, &Device::Cpu, &threads)?;
    let loaded = memory_of("VmHWM:")?;
    let mut engine = engine(&policy, Some(LARGE_KV))?;
    for number in 0..80 {
        let prompt = prompt(number, 250);
        let group = (0..GROUP).map(|at| request(&prompt, 12, number * GROUP + at));
        engine.submit(group.collect())?;
    }
    run(&mut engine)?;
    let budget = engine.kv_bytes();
    let (private, most) = (memory_of("RssAnon:")?, memory_of("VmHWM:")?);
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let share = most as f64 / (bytes + budget) as f64 - 1.0;
    println!(
        "memory of {:.1} MiB of weights: {:.1} MiB at most while they are read, {:.1} MiB while rows decode ({:.1} MiB private) \
         with a budget of {:.1} MiB for keys and values, {:.1} % above both",
        mib(bytes),
        mib(loaded),
        mib(most),
        mib(private),
        mib(budget),
        share * 100.0
    );
    bounded(
        share <= 0.15,
        "memory is at most 15 % above weights and budget",
    )
}

fn bounded(bound: bool, what: &str) -> Result<(), Box<dyn Error>> {
    match bound {
        true => Ok(()),
        false => Err(format!("a bound is not kept: {what}").into()),
    }
}

fn engine(policy: &Policy, kv_bytes: Option<u64>) -> Result<Engine, Box<dyn Error>> {
    let config = EngineConfig {
        slots: NonZeroUsize::new(SLOTS).unwrap_or(NonZeroUsize::MIN),
        kv_bytes: kv_bytes.and_then(NonZeroU64::new),
        ..EngineConfig::default()
    };
    Ok(Engine::new(policy.clone(), 0, &config)?)
}

fn request(prompt: &Arc<[u32]>, tokens: usize, number: usize) -> GenerationRequest {
    let sampling = Sampling::Prescribed {
        seed: [3; 32],
        rollout: number as u32,
        temperature: 1.0,
    };
    GenerationRequest::new(prompt.clone(), tokens, Arc::from([]), sampling)
}

fn prompt(number: usize, len: usize) -> Arc<[u32]> {
    (0..len)
        .map(|t| ((number * 131 + t * 17 + 5) % 509) as u32)
        .collect()
}

fn run(engine: &mut Engine) -> Result<f64, Box<dyn Error>> {
    let start = Instant::now();
    while !engine.is_idle() {
        engine.step()?;
    }
    Ok(start.elapsed().as_secs_f64())
}

/// Answers whose lengths are log-normal: half below 60 tokens, one in forty above 400.
fn slots_busy(policy: &Policy) -> Result<(), Box<dyn Error>> {
    let mut random = ChaCha8Rng::seed_from_u64(5);
    let lengths = LogNormal::new(60f64.ln(), 1.0)?;
    let lengths: Vec<usize> = (0..1024)
        .map(|_| (lengths.sample(&mut random) as usize).clamp(1, 1024))
        .collect();
    let mut engine = engine(policy, None)?;
    for (number, lengths) in lengths.chunks(GROUP).enumerate() {
        let prompt = prompt(number, 32);
        let group = lengths.iter().enumerate();
        let group = group.map(|(at, tokens)| request(&prompt, *tokens, number * GROUP + at));
        engine.submit(group.collect())?;
    }
    // While there is something to refill slots with; the last answers of a worker never end, since leases go on coming.
    let start = Instant::now();
    while engine.queued() > 0 {
        engine.step()?;
    }
    let stats = engine.stats();
    let busy = stats.busy_slots as f64 / (stats.steps * SLOTS as u64) as f64;
    let seconds = start.elapsed().as_secs_f64() + run(&mut engine)?;
    let tokens: usize = lengths.iter().sum();
    let longest = lengths.chunks(SLOTS).map(|batch| batch.iter().max());
    let batches: usize = longest.flatten().sum();
    let fixed = tokens as f64 / (batches * SLOTS) as f64;
    println!(
        "slots busy on a log-normal mix: {:.1} %; a static batch of {SLOTS} keeps {:.1} %; {:.0} tokens/s",
        busy * 100.0,
        fixed * 100.0,
        tokens as f64 / seconds
    );
    bounded(busy >= 0.9, "nine slots of ten are busy")
}

/// Time to the first token of every rollout of a group, its prompt shared or not.
fn prompts_shared(policy: &Policy) -> Result<(), Box<dyn Error>> {
    let (mut shared, mut apart, mut tokens) = (Vec::new(), Vec::new(), (0, 0));
    for round in 0..7 {
        for distinct in [false, true] {
            let mut engine = engine(policy, None)?;
            let group = (0..GROUP).map(|at| {
                let number = round * GROUP + if distinct { at } else { 0 };
                request(&prompt(number, 512), 1, at)
            });
            engine.submit(group.collect())?;
            let seconds = run(&mut engine)?;
            let read = engine.stats().read_tokens;
            match distinct {
                false => {
                    shared.push(seconds);
                    tokens.0 = read;
                }
                true => {
                    apart.push(seconds);
                    tokens.1 = read;
                }
            }
        }
    }
    let median = |times: &mut Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    let ratio = median(&mut apart) / median(&mut shared);
    println!(
        "prefill of a group of {GROUP} that shares its prompt of 512: {} tokens instead of {}, {ratio:.2} times faster",
        tokens.0, tokens.1
    );
    bounded(
        ratio >= 0.8 * GROUP as f64,
        "a shared prompt is 0.8 G times cheaper",
    )
}

/// A line of `/proc/self/status` in bytes.
fn memory_of(key: &str) -> Result<u64, Box<dyn Error>> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix(key));
    let number = line.and_then(|line| line.trim().strip_suffix("kB"));
    Ok(number.ok_or("no such line")?.trim().parse::<u64>()? << 10)
}

/// Ten thousand groups through one engine. Printed, not judged: beside so small a model, what a process takes anyway counts.
fn memory(policy: &Policy) -> Result<(), Box<dyn Error>> {
    let before = memory_of("VmRSS:")?;
    let mut engine = engine(policy, Some(24 << 20))?;
    let budget = engine.kv_bytes();
    let (mut submitted, mut done, mut early) = (0, 0, 0);
    let start = Instant::now();
    while done < 10_000 {
        while submitted < 10_000 && engine.queued() < GROUP {
            let prompt = prompt(submitted, 16 + submitted % 97);
            let group = (0..GROUP).map(|at| {
                let number = submitted * GROUP + at;
                request(&prompt, 1 + number * 7 % 23, number)
            });
            engine.submit(group.collect())?;
            submitted += 1;
        }
        done += engine.step()?.len();
        if early == 0 && done >= 1_000 {
            early = memory_of("VmRSS:")?;
        }
    }
    let (late, stats) = (memory_of("VmRSS:")?, engine.stats());
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    println!(
        "10,000 groups in {:.0} s: {:.1} MiB with the weights before, {:.1} MiB after 1,000 groups, {:.1} MiB after all; \
         budget for keys and values {:.1} MiB, {} rows gave way",
        start.elapsed().as_secs_f64(),
        mib(before),
        mib(early),
        mib(late),
        mib(budget),
        stats.preemptions
    );
    Ok(())
}
