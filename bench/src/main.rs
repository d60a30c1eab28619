//! `muster-bench`: measures Muster beside its rivals, one file per subject. The shipped `muster` contains none of it.
#![allow(unreachable_pub)] // a binary has no outside: `pub` here means "for the other modules"
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

mod adoption;
mod broadcast;
mod codec;
mod figures;
mod kernels;
mod policy;
mod program;
mod quickstart;
mod shape;
mod spread;

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

/// The allocator of the shipped binary, so that both measure the same.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Measure Muster on this machine, beside its rivals.
#[derive(Debug, Parser)]
#[command(name = "muster-bench", version, about)]
struct Cli {
    #[command(subcommand)]
    subject: Subject,
}

#[derive(Debug, Subcommand)]
enum Subject {
    /// Measure whole quickstart runs: the time until held-out accuracy reaches 90 %, warm-up included
    Quickstart(quickstart::QuickstartArgs),
    /// Measure the policy engine: tokens per second of decoding, prefill, scoring and training
    Policy(policy::PolicyArgs),
    /// Measure deltas between versions: sizes and speeds, beside PULSE's patch, XOR planes and memcpy
    Codec(codec::CodecArgs),
    /// Measure a broadcast to many hosts over home links: time against the physical bound, an HTTP star and BitTorrent
    Broadcast(broadcast::BroadcastArgs),
    /// Measure a worker while new weights arrive: its tokens per second, and its longest pause
    Adoption(adoption::AdoptionArgs),
    /// One host of `broadcast`
    #[command(hide = true)]
    BroadcastHost(broadcast::host::HostArgs),
    /// The path between the hosts of `broadcast`
    #[command(hide = true)]
    BroadcastPath(broadcast::path::PathArgs),
}

fn main() -> ExitCode {
    muster_monitor::machine::small_pages();
    match measure(Cli::parse().subject) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("muster-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure(subject: Subject) -> Result<()> {
    let filter = EnvFilter::try_from_env("MUSTER_LOG")
        .unwrap_or_else(|_| EnvFilter::new("warn,muster_bench=info"));
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false);
    subscriber
        .try_init()
        .map_err(|error| anyhow::anyhow!("logs cannot be set up: {error}"))?;
    match subject {
        Subject::Codec(args) => codec::run(&args),
        Subject::Policy(args) => policy::run(&args),
        Subject::BroadcastPath(args) => broadcast::path::run(&args),
        Subject::Quickstart(args) => block_on(quickstart::run(args)),
        Subject::Adoption(args) => block_on(adoption::run(args)),
        Subject::Broadcast(args) => block_on(broadcast::run(args)),
        Subject::BroadcastHost(args) => block_on(broadcast::host::run(args)),
    }
}

/// Runs on a runtime with one thread, as the roles of `muster` do.
fn block_on(measurement: impl Future<Output = Result<()>>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .context("the runtime cannot be started")?;
    runtime.block_on(measurement)
}
