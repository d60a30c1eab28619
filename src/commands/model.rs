//! `muster model`: model folders from elsewhere, as Hugging Face folders that runs start from.

mod import;
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

/// Refuses a folder that holds a model, which would otherwise be half of one and half of another if this ends early.
fn refuse_model(folder: &std::path::Path) -> Result<()> {
    for name in [
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
    ] {
        if folder.join(name).try_exists().unwrap_or(false) {
            anyhow::bail!(
                "{} holds a model already: name a new folder",
                folder.display()
            );
        }
    }
    Ok(())
}
