//! `muster model`: model folders from elsewhere, as Hugging Face folders that runs start from.

mod import;
mod out_folder;
mod pull;

use anyhow::Result;
use clap::{Args, Subcommand};

/// What `model` takes.
#[derive(Debug, Args)]
pub struct ModelArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// A GGUF file as a Hugging Face folder
    Import(import::ImportArgs),
    /// A model of a hub, by its id
    Pull(pull::PullArgs),
}

/// Does it.
pub fn run(args: &ModelArgs) -> Result<()> {
    match &args.what {
        What::Import(args) => import::run(args),
        What::Pull(args) => pull::run(args),
    }
}
