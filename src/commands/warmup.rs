//! `muster warmup`: trains a small starting policy from scratch.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use crate::config::RunConfig;
use crate::start_model::warm_up;

#[derive(Debug, Args)]
pub struct WarmupArgs {
    /// The run's configuration
    config: PathBuf,
    /// The model folder to write
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Seed that replaces the configuration's
    #[arg(long)]
    seed: Option<u64>,
}

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
                updates = progress.check.updates,
                loss = format!("{:.3}", progress.check.loss),
                accuracy = format!("{:.3}", progress.check.accuracy),
                seconds = format!("{:.1}", progress.elapsed.as_secs_f64()),
                "warm-up"
            );
        },
    )?;
    eprintln!("wrote {}", args.out.display());
    Ok(())
}
