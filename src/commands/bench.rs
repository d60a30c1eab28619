//! `muster bench`: what is measured, one file each.

mod adoption;
mod broadcast;
mod codec;
mod figures;
mod policy;
mod quickstart;
mod shape;
mod spread;

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
    /// Weights to many hosts over home links: time against the physical bound, beside an HTTP star and BitTorrent
    Broadcast(broadcast::BroadcastArgs),
    /// New weights to a worker that goes on answering: its tokens per second meanwhile, and the longest pause
    Adoption(adoption::AdoptionArgs),
    /// One host of `bench broadcast`
    #[command(hide = true)]
    BroadcastHost(broadcast::host::HostArgs),
    /// The path between the hosts of `bench broadcast`
    #[command(hide = true)]
    BroadcastPath(broadcast::path::PathArgs),
}

/// Measures.
pub async fn run(args: BenchArgs) -> Result<()> {
    match args.what {
        What::Quickstart(args) => quickstart::run(args).await,
        What::Adoption(args) => adoption::run(args).await,
        What::Broadcast(args) => broadcast::run(args).await,
        What::BroadcastHost(args) => broadcast::host::run(args).await,
        What::BroadcastPath(args) => {
            tokio::task::spawn_blocking(move || broadcast::path::run(&args)).await?
        }
        What::Codec(args) => tokio::task::spawn_blocking(move || codec::run(&args)).await?,
        What::Policy(args) => tokio::task::spawn_blocking(move || policy::run(&args)).await?,
    }
}
