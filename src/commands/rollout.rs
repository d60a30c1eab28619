//! `muster rollout`: a worker.

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
use crate::seat::Seat;

const MIB: NonZeroU64 = NonZeroU64::MIN.saturating_add((1 << 20) - 1);

/// What `rollout` takes.
#[derive(Debug, Args)]
pub struct RolloutArgs {
    #[command(flatten)]
    member: MemberArgs,
    /// Most rollouts decoded together; the worker measures itself and takes no more than pay and end in time
    #[arg(long, default_value = "64")]
    rollouts_max: NonZeroU32,
    /// Memory for keys and values in MiB; half of what the device has free by default
    #[arg(long, value_name = "MIB")]
    kv_mib: Option<NonZeroU64>,
    /// Where to compute: `cpu` or `cuda:N`
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Which operations answer; `fused` on a cpu and `candle` elsewhere by default. `int8` keeps weights in about half the memory
    /// of bf16; a run takes such answers if its `dispatch.classes` list "int8-cpu"
    #[arg(long, value_enum)]
    kernels: Option<Kernels>,
}

/// Works until the run is over or told to stop.
pub async fn run(args: RolloutArgs) -> Result<()> {
    let device = muster_policy::device(&args.device)?;
    let kernels = args.kernels.unwrap_or_else(|| Kernels::for_device(&device));
    let class = kernels.class(&device)?;
    let seat = Seat::take(
        &args.member.creds,
        Role::Worker,
        args.member.nats.as_deref(),
        args.member.swarm(),
    )
    .await?;
    let joined = async {
        let (config, tokenizer, _) = seat.model().await?;
        let sampling = seat.client.descriptor().await?.body.sampling;
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
            client: seat.client.clone(),
            clock: seat.clock.clone(),
            answerer: Box::new(answerer),
            follower: seat.follow(Follow::Newest).await?,
            class,
        });
        worker.await.context("worker")
    };
    let worker = tokio::select! {
        worker = joined => worker?,
        () = seat.shutdown.cancelled() => return Ok(()),
    };
    let metrics = worker.run(seat.shutdown.clone()).await.context("worker")?;
    tracing::info!(?metrics, "done");
    seat.leave().await;
    Ok(())
}
