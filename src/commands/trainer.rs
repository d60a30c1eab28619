//! `muster trainer`: runs the trainer, which makes versions of batches of groups.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::Args;

use super::member_args::MemberArgs;
use crate::descriptor::{describe, run_files};
use crate::member::Member;
use crate::run_dir::RunDir;
use muster_broadcaster::swarm::uploads::Sharing;
use muster_learner::policy_stepper::{ModelConfig, PolicyStepper};
use muster_learner::trainer::{Trainer, TrainerParts, TrainerSettings};
use muster_policy::ModelFolder;
use muster_protocol::credentials::Roster;
use muster_protocol::subject::Role;

/// Most bytes of old versions that the trainer goes on serving, for critics that reconnect.
const HISTORY_BYTES: usize = 256 << 20;
/// Most such versions: a follower fetches no older ones.
const HISTORY_MAX: usize = 16;

#[derive(Debug, Args)]
pub struct TrainerArgs {
    #[command(flatten)]
    member: MemberArgs,
    /// The run directory: configuration, roster, starting policy; checkpoints and metrics are written here
    #[arg(long, value_name = "DIR")]
    run: PathBuf,
}

/// Trains until the last step, then serves versions until a signal stops it.
pub async fn run(args: TrainerArgs) -> Result<()> {
    let dir = RunDir::at(&args.run);
    let config = dir.load_config()?;
    let model = ModelFolder::read(&dir.model())?;
    let prepared = config.rewards().prepare(dir.root())?;
    let roster = Roster::load(&dir.roster())?;
    let files = run_files(&dir.model(), &model, config.model.storage)?;
    let descriptor = describe(&config, &model, &files, &prepared.task, &roster)?;
    let parts = ModelConfig {
        config: model.config.clone(),
        storage: config.model.storage,
        kernels: config.model.kernels,
        device: muster_policy::device(&config.model.device)?,
    };
    let (steps, async_level) = (config.run.steps.get(), config.run.async_level);
    let train = config.learner.train.clone();
    let stepper = PolicyStepper::new(parts, train, &model.image, steps, async_level)?;
    let mut swarm = args.member.swarm();
    swarm.sharing = Sharing::FirstCopies;
    let history = (HISTORY_BYTES / model.image.bytes().len().max(1)).min(HISTORY_MAX);
    swarm.store.versions_kept = history.max(async_level as usize + 2);
    drop(model); // the stepper has its own copy of the weights
    let member = Member::join(
        &args.member.creds,
        Role::Trainer,
        args.member.nats.as_deref(),
        swarm,
    )
    .await?;
    let trainer = Trainer::start(TrainerParts {
        client: member.client.clone(),
        roster,
        dir: args.run.clone(),
        stepper: Box::new(stepper),
        swarm: Arc::new(member.swarm.clone()),
        descriptor,
        files,
        settings: TrainerSettings {
            batch_groups: config.learner.batch_groups.get(),
            steps,
            checkpoint_every: config.learner.checkpoint_every.get(),
            advantage: config.learner.advantage,
            broadcast: config.learner.broadcast,
        },
    });
    let trainer = tokio::select! {
        started = trainer => started?,
        () = member.shutdown.cancelled() => return Ok(()),
    };
    trainer
        .run(member.shutdown.clone())
        .await
        .context("trainer")?;
    member.leave().await;
    Ok(())
}
