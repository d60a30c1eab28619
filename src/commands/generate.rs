//! `muster generate`: answers one prompt with a model folder.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde::Serialize;

use muster_policy::{
    Device, EngineConfig, Finish, GenerationRequest, KernelSet, Message, Rendering, RunningModel,
    Sampling, Threads, Tokenizer, generate,
};
use muster_protocol::message::group::FinishReason;

use muster_monitor::output::say;

#[derive(Debug, Args)]
pub struct GenerateArgs {
    /// A Hugging Face folder
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// The prompt to answer
    #[arg(long, value_name = "TEXT")]
    prompt: String,
    /// Put the prompt as a user's message into the model's chat template
    #[arg(long)]
    chat: bool,
    /// Longest answer in tokens; by default the rest of the model's context
    #[arg(long, value_name = "N")]
    max_tokens: Option<NonZeroUsize>,
    /// Sampling temperature; 0 takes the likeliest token each time
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    temperature: f32,
    /// Seed of the draws; equal seeds give equal answers
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// Threads to compute with; all processors by default
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// Round the weights to eight bits: about half the memory of bf16
    #[arg(long)]
    int8: bool,
    /// Print one JSON line
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Answer {
    text: String,
    tokens: Vec<u32>,
    logprobs: Vec<f32>,
    finish_reason: FinishReason,
}

pub fn run(args: &GenerateArgs) -> Result<()> {
    let kernels = if args.int8 {
        KernelSet::Int8
    } else {
        KernelSet::Fused
    };
    let threads = args.threads.map_or_else(Threads::all, Threads::new);
    let model = RunningModel::read(&args.model, kernels, &Device::Cpu, &threads)
        .with_context(|| args.model.display().to_string())?;
    let (policy, config) = (&model.policy, model.policy.config());
    let prompt = prompt(args, &model.tokenizer)?;
    if prompt.is_empty() {
        bail!("the prompt has no token: give --prompt a text");
    }
    let context = config.max_position_embeddings;
    let room = context.saturating_sub(prompt.len());
    let max_tokens = args.max_tokens.map_or(room, NonZeroUsize::get);
    if room == 0 || max_tokens > room {
        bail!(
            "the prompt has {} of the {context} tokens that the model reads, which leaves {room} for the answer: shorten \
             the prompt or lower --max-tokens",
            prompt.len()
        );
    }
    let stop_ids = config.eos_token_ids.as_slice().into();
    let request = GenerationRequest::new(prompt.into(), max_tokens, stop_ids, sampling(args));
    let answered = generate(policy, &EngineConfig::default(), vec![request])?;
    let completion = answered.into_iter().next().context("no answer came")?;
    let answer = Answer {
        text: model.tokenizer.decode(&completion.tokens)?,
        tokens: completion.tokens,
        logprobs: completion.logprobs,
        finish_reason: match completion.finish {
            Finish::Stop(_) | Finish::StopString(_) => FinishReason::Stop,
            Finish::Length => FinishReason::Length,
        },
    };
    if args.json {
        return say(&serde_json::to_string(&answer)?);
    }
    say(&answer.text)
}

/// Tokens of the prompt. A chat template may write today's date, as in transformers.
fn prompt(args: &GenerateArgs, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    if !args.chat {
        return Ok(tokenizer.encode_prompt(&args.prompt)?);
    }
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let seconds = since.map_or(0, |since| since.as_secs());
    let rendering = Rendering {
        unix_seconds: i64::try_from(seconds).ok(),
        ..Rendering::PROMPT
    };
    Ok(tokenizer.encode_chat(&[Message::user(&args.prompt)], rendering)?)
}

fn sampling(args: &GenerateArgs) -> Sampling {
    if args.temperature == 0.0 {
        return Sampling::Greedy;
    }
    let mut seed = [0u8; 32];
    seed[..8].copy_from_slice(&args.seed.to_le_bytes());
    Sampling::Prescribed {
        seed,
        rollout: 0,
        temperature: args.temperature,
    }
}
