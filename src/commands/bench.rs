//! `muster bench`: what is measured, one file each.

mod codec;
mod figures;
mod policy;
mod quickstart;
mod shape;

use anyhow::Result;
use clap::{Args, Subcommand};

/// What `bench` takes.
#[derive(Debug, Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// The quickstart: how fast held-out accuracy reaches 90 %, warm-up and all
    Quickstart(quickstart::QuickstartArgs),
    /// The policy alone: tokens per second that it decodes, reads, scores and trains on this machine
    Policy(policy::PolicyArgs),
    /// Deltas between versions: sizes and speeds, beside PULSE's patch, XOR planes and memcpy
    Codec(codec::CodecArgs),
}

/// Measures.
pub async fn run(args: BenchArgs) -> Result<()> {
    match args.what {
        What::Quickstart(args) => quickstart::run(args).await,
        What::Codec(args) => tokio::task::spawn_blocking(move || codec::run(&args)).await?,
        What::Policy(args) => tokio::task::spawn_blocking(move || policy::run(&args)).await?,
    }
}
