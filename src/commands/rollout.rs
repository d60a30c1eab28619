//! `muster rollout`: a worker.

use std::num::{NonZeroU32, NonZeroUsize};

use anyhow::{Context, Result};
use clap::Args;

use muster_broadcaster::follower::Follow;
use muster_policy::{EngineConfig, KernelSet};
use muster_protocol::message::lease::NumericClass;
use muster_protocol::subject::Role;
use muster_rollout::engine::PolicyAnswerer;
use muster_rollout::worker::{Worker, WorkerParts};

use super::MemberArgs;
use crate::seat::Seat;

/// What `rollout` takes.
#[derive(Debug, Args)]
pub struct RolloutArgs {
    #[command(flatten)]
    member: MemberArgs,
    /// Rollouts leased and decoded together
    #[arg(long, default_value = "64")]
    rollouts_max: NonZeroU32,
    /// Where to compute: `cpu` or `cuda:N`
    #[arg(long, default_value = "cpu")]
    device: String,
}

/// Works until the run is over or told to stop.
pub async fn run(args: RolloutArgs) -> Result<()> {
    let device = muster_policy::device(&args.device)?;
    let seat = Seat::take(
        &args.member.creds,
        Role::Worker,
        args.member.nats.as_deref(),
        args.member.swarm(),
    )
    .await?;
    let joined = async {
        let (config, _, _) = seat.model().await?;
        let (kernels, class) = match device.is_cpu() {
            true => (KernelSet::Fused, NumericClass::F32Cpu),
            false => (KernelSet::Candle, NumericClass::F32Cuda),
        };
        let slots =
            NonZeroUsize::try_from(args.rollouts_max).context("too many rollouts at once")?;
        let engine = EngineConfig {
            slots,
            ..EngineConfig::default()
        };
        let answerer = PolicyAnswerer::new(config, kernels, device, engine);
        let worker = Worker::start(WorkerParts {
            desk: seat.desk.clone(),
            clock: seat.clock.clone(),
            answerer: Box::new(answerer),
            follower: seat.follow(Follow::Newest).await?,
            class,
            rollouts_max: args.rollouts_max.get(),
        });
        worker.await.context("worker")
    };
    let worker = tokio::select! {
        worker = joined => worker?,
        () = seat.shutdown.cancelled() => return Ok(()),
    };
    let credit = worker.run(seat.shutdown.clone()).await.context("worker")?;
    tracing::info!(?credit, "done");
    seat.leave().await;
    Ok(())
}
