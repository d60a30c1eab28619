//! `muster critic`: runs a critic, which computes rewards and audits answers.

use std::num::NonZeroU32;

use anyhow::{Context, Result};
use clap::Args;

use muster_broadcaster::follower::Follow;
use muster_protocol::subject::Role;
use muster_rewards::critic::scorer::PolicyScorer;
use muster_rewards::critic::{Critic, CriticParts};

use super::kernels::Kernels;
use super::member_args::MemberArgs;
use crate::member::Member;

/// Versions kept beyond the async level, for groups that arrive while newer versions are announced.
const VERSIONS_BEYOND: usize = 3;

#[derive(Debug, Args)]
pub struct CriticArgs {
    #[command(flatten)]
    member: MemberArgs,
    /// Most groups critiqued together
    #[arg(long, default_value = "16")]
    groups_max: NonZeroU32,
    /// Device: `cpu` or `cuda:N`
    #[arg(long, default_value = "cpu")]
    device: String,
}

/// Critiques until the run is over or a signal stops it.
pub async fn run(args: CriticArgs) -> Result<()> {
    let device = muster_policy::device(&args.device)?;
    let member = Member::join(
        &args.member.creds,
        Role::Critic,
        args.member.nats.as_deref(),
        args.member.swarm(),
    )
    .await?;
    let joined = async {
        let (config, tokenizer, _) = member.model().await?;
        let descriptor = member.client.descriptor().await?;
        let kept = descriptor.body.async_level as usize + VERSIONS_BEYOND;
        let kernels = Kernels::for_device(&device);
        let class = kernels.class(&device)?;
        let scorer = PolicyScorer::new(config, kernels.set(), device, tokenizer, kept)
            .for_classes(&descriptor.body.classes);
        let critic = Critic::start(CriticParts {
            client: member.client.clone(),
            scorer: Box::new(scorer),
            follower: member.follow(Follow::Every).await?,
            class,
            groups_max: args.groups_max.get(),
        });
        critic.await.context("critic")
    };
    let critic = tokio::select! {
        critic = joined => critic?,
        () = member.shutdown.cancelled() => return Ok(()),
    };
    critic
        .run(member.shutdown.clone())
        .await
        .context("critic")?;
    member.leave().await;
    Ok(())
}
