//! `muster model`: makes Hugging Face folders of GGUF files and of models on a hub, for runs to start from.

mod import;
mod out_folder;
mod pull;

use anyhow::Result;
use clap::{Args, Subcommand};

#[derive(Debug, Args)]
pub struct ModelArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Convert a GGUF file to a Hugging Face folder
    Import(import::ImportArgs),
    /// Download a model from a hub
    Pull(pull::PullArgs),
}

pub fn run(args: &ModelArgs) -> Result<()> {
    match &args.what {
        What::Import(args) => import::run(args),
        What::Pull(args) => pull::run(args),
    }
}
