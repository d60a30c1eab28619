//! `muster warmup`: a small starting policy from scratch.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use crate::config::RunConfig;
use crate::start_model::warm_up;

/// What `warmup` takes.
#[derive(Debug, Args)]
pub struct WarmupArgs {
    /// The run's configuration
    config: PathBuf,
    /// Where to write the model folder
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Seed, instead of the configuration's
    #[arg(long)]
    seed: Option<u64>,
}

/// Warms up and writes the folder.
pub fn run(args: &WarmupArgs) -> Result<()> {
    let mut config = RunConfig::load(&args.config)?;
    config.run.seed = args.seed.unwrap_or(config.run.seed);
    let base = args.config.parent().unwrap_or_else(|| ".".as_ref());
    let prepared = config.rewards().prepare(base)?;
    warm_up(
        &config,
        &prepared.task,
        &prepared.reward,
        &args.out,
        &mut |progress| {
            tracing::info!(
                updates = progress.updates,
                loss = format!("{:.3}", progress.loss),
                accuracy = format!("{:.3}", progress.accuracy),
                seconds = format!("{:.1}", progress.seconds),
                "warm-up"
            );
        },
    )?;
    eprintln!("wrote {}", args.out.display());
    Ok(())
}
