//! `muster model import`: converts a GGUF file, quantised or not, to a Hugging Face folder.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};

use muster_policy::{Storage, import_gguf};

use super::out_folder::refuse_model;
use muster_monitor::output::say;
use muster_monitor::text::count;

#[derive(Debug, Args)]
pub struct ImportArgs {
    /// A GGUF file: llama, qwen2, qwen3 or gemma3, in F32, F16, BF16, Q4_0 to Q8_0 or Q2_K to Q6_K
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// The folder to make
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Type of the stored weights; f32 keeps the exact values of quantised blocks
    #[arg(long, value_name = "DTYPE", value_enum, default_value = "bf16")]
    dtype: Dtype,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Dtype {
    Bf16,
    F32,
}

pub fn run(args: &ImportArgs) -> Result<()> {
    refuse_model(&args.out)?;
    let storage = match args.dtype {
        Dtype::Bf16 => Storage::Bf16,
        Dtype::F32 => Storage::F32,
    };
    let import = import_gguf(&args.file, &args.out, storage)
        .with_context(|| format!("{} was not imported", args.file.display()))?;
    let types = import
        .types
        .iter()
        .map(|(name, tensors)| format!("{tensors} {name}"));
    say(&format!(
        "{}: {}, {} parameters from {} tensors",
        args.out.display(),
        import.config.architecture,
        count(import.elements as u64),
        types.collect::<Vec<_>>().join(", ")
    ))
}
