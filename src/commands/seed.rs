//! `muster seed`: a peer that only passes weights on.

use anyhow::Result;
use clap::Args;

use muster_broadcaster::follower::Follow;
use muster_protocol::subject::Role;

use super::member_args::MemberArgs;
use crate::seat::Seat;

/// What `seed` takes.
#[derive(Debug, Args)]
pub struct SeedArgs {
    #[command(flatten)]
    member: MemberArgs,
}

/// Fetches every version and serves it until told to stop.
pub async fn run(args: SeedArgs) -> Result<()> {
    let seat = Seat::take(
        &args.member.creds,
        Role::Seeder,
        args.member.nats.as_deref(),
        args.member.swarm(),
    )
    .await?;
    let mut follower = seat.follow(Follow::Newest).await?;
    loop {
        tokio::select! {
            () = seat.shutdown.cancelled() => break,
            () = follower.changed() => {
                if let Some(held) = follower.latest() {
                    let uploaded = seat.swarm.metrics().total.bytes_uploaded;
                    tracing::info!(version = %held.version.body.version, uploaded, "serving");
                }
            }
        }
    }
    seat.leave().await;
    Ok(())
}
