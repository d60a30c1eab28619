//! `muster critic`: rewards and audits.

use std::num::NonZeroU32;

use anyhow::{Context, Result};
use clap::Args;

use muster_broadcaster::follower::Follow;
use muster_protocol::subject::Role;
use muster_rewards::critic::scorer::PolicyScorer;
use muster_rewards::critic::{Critic, CriticParts};

use super::kernels::Kernels;
use super::member_args::MemberArgs;
use crate::seat::Seat;

/// Versions that a critic keeps beyond the async level: groups may come while the next version is on its way.
const VERSIONS_BEYOND: usize = 3;

/// What `critic` takes.
#[derive(Debug, Args)]
pub struct CriticArgs {
    #[command(flatten)]
    member: MemberArgs,
    /// Groups judged together
    #[arg(long, default_value = "16")]
    groups_max: NonZeroU32,
    /// Where to compute: `cpu` or `cuda:N`
    #[arg(long, default_value = "cpu")]
    device: String,
}

/// Judges until the run is over or told to stop.
pub async fn run(args: CriticArgs) -> Result<()> {
    let device = muster_policy::device(&args.device)?;
    let seat = Seat::take(
        &args.member.creds,
        Role::Critic,
        args.member.nats.as_deref(),
        args.member.swarm(),
    )
    .await?;
    let joined = async {
        let (config, tokenizer, _) = seat.model().await?;
        let descriptor = seat.client.descriptor().await?;
        let kept = descriptor.body.async_level as usize + VERSIONS_BEYOND;
        let kernels = Kernels::for_device(&device);
        let class = kernels.class(&device)?;
        let scorer = PolicyScorer::new(config, kernels.set(), device, tokenizer, kept)
            .for_classes(&descriptor.body.classes);
        let critic = Critic::start(CriticParts {
            client: seat.client.clone(),
            scorer: Box::new(scorer),
            follower: seat.follow(Follow::Every).await?,
            class,
            groups_max: args.groups_max.get(),
        });
        critic.await.context("critic")
    };
    let critic = tokio::select! {
        critic = joined => critic?,
        () = seat.shutdown.cancelled() => return Ok(()),
    };
    critic.run(seat.shutdown.clone()).await.context("critic")?;
    seat.leave().await;
    Ok(())
}
