//! `muster rollout`: runs a worker.

use std::num::{NonZeroU32, NonZeroU64, NonZeroUsize};

use anyhow::{Context, Result};
use clap::Args;

use muster_broadcaster::follower::Follow;
use muster_policy::EngineConfig;
use muster_protocol::subject::Role;
use muster_rollout::engine::{PolicyAnswerer, Task};
use muster_rollout::worker::{Worker, WorkerParts};

use super::kernels::Kernels;
use super::member_args::MemberArgs;
use crate::member::Member;

const MIB: NonZeroU64 = NonZeroU64::new(1 << 20).unwrap();

#[derive(Debug, Args)]
pub struct RolloutArgs {
    #[command(flatten)]
    member: MemberArgs,
    /// Most rollouts decoded together; the worker measures its speed and takes fewer if more would be late
    #[arg(long, default_value = "64")]
    rollouts_max: NonZeroU32,
    /// Memory for keys and values in MiB; half of the device's free memory by default
    #[arg(long, value_name = "MIB")]
    kv_mib: Option<NonZeroU64>,
    /// Device: `cpu` or `cuda:N`
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Operations that decode; `fused` on a CPU and `candle` elsewhere by default. `int8` takes about half the memory of bf16,
    /// and a run accepts its answers if its `dispatch.classes` has "int8-cpu"
    #[arg(long, value_enum)]
    kernels: Option<Kernels>,
}

/// Answers until the run is over or a signal stops it.
pub async fn run(args: RolloutArgs) -> Result<()> {
    let device = muster_policy::device(&args.device)?;
    let kernels = args.kernels.unwrap_or_else(|| Kernels::for_device(&device));
    let class = kernels.class(&device)?;
    let member = Member::join(
        &args.member.creds,
        Role::Worker,
        args.member.nats.as_deref(),
        args.member.swarm(),
    )
    .await?;
    let joined = async {
        let (config, tokenizer, _) = member.model().await?;
        let sampling = member.client.descriptor().await?.body.sampling;
        let task = Task {
            tokens_max: sampling.tokens_max,
            tokenizer,
        };
        let slots =
            NonZeroUsize::try_from(args.rollouts_max).context("too many rollouts at once")?;
        let engine = EngineConfig {
            slots,
            kv_bytes: args.kv_mib.map(|mib| mib.saturating_mul(MIB)),
            ..EngineConfig::default()
        };
        let answerer = PolicyAnswerer::new(config, kernels.set(), device, engine, task);
        let worker = Worker::start(WorkerParts {
            client: member.client.clone(),
            clock: member.clock.clone(),
            answerer: Box::new(answerer),
            follower: member.follow(Follow::Newest).await?,
            class,
        });
        worker.await.context("worker")
    };
    let worker = tokio::select! {
        worker = joined => worker?,
        () = member.shutdown.cancelled() => return Ok(()),
    };
    let metrics = worker
        .run(member.shutdown.clone())
        .await
        .context("worker")?;
    tracing::info!(?metrics, "done");
    member.leave().await;
    Ok(())
}
