//! `muster seed`: runs a seeder, a peer that only passes weights on.

use anyhow::Result;
use clap::Args;

use muster_broadcaster::follower::Follow;
use muster_protocol::subject::Role;

use super::member_args::MemberArgs;
use crate::member::Member;

#[derive(Debug, Args)]
pub struct SeedArgs {
    #[command(flatten)]
    member: MemberArgs,
}

/// Fetches every version and serves it until a signal stops it.
pub async fn run(args: SeedArgs) -> Result<()> {
    let member = Member::join(
        &args.member.creds,
        Role::Seeder,
        args.member.nats.as_deref(),
        args.member.swarm(),
    )
    .await?;
    let mut follower = member.follow(Follow::Newest).await?;
    loop {
        tokio::select! {
            () = member.shutdown.cancelled() => break,
            () = follower.changed() => {
                if let Some(held) = follower.latest() {
                    let uploaded = member.swarm.metrics().total.bytes_uploaded;
                    tracing::info!(version = %held.version.body.version, uploaded, "serving");
                }
            }
        }
    }
    member.leave().await;
    Ok(())
}
