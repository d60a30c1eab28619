//! `muster dispatch`: runs dispatch, which gives out tickets and leases and admits groups.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::Args;

use super::member_args::MemberArgs;
use crate::config::RunConfig;
use crate::member::Member;
use crate::prompts::{PromptForm, TaskPrompts};
use crate::run_dir::RunDir;
use muster_dispatch::service::{DispatchParts, DispatchService, DispatchSettings};
use muster_policy::ModelFolder;
use muster_protocol::credentials::Roster;
use muster_protocol::id::PeerId;
use muster_protocol::subject::Role;

/// Context from which dispatch derives the secret that draws nonces and audits.
const SECRET_CONTEXT: &str = "muster 2026-11 dispatch draws v1";

#[derive(Debug, Args)]
pub struct DispatchArgs {
    #[command(flatten)]
    member: MemberArgs,
    /// The run directory: configuration, roster, starting policy's tokenizer
    #[arg(long, value_name = "DIR")]
    run: PathBuf,
}

/// Serves until a signal stops it.
pub async fn run(args: DispatchArgs) -> Result<()> {
    let dir = RunDir::at(&args.run);
    let config = dir.load_config()?;
    let (shape, tokenizer) = ModelFolder::read_text(&dir.model())?;
    let prepared = config.rewards().prepare(dir.root())?;
    let tokens_max = config.sampling.tokens_max.get() as usize;
    let room = shape.max_position_embeddings.saturating_sub(tokens_max);
    let prompts = TaskPrompts::new(
        prepared.task,
        &tokenizer,
        PromptForm::of(&config),
        config.run.seed,
        room,
    )?;
    let roster = Roster::load(&dir.roster())?;
    let trusted = trusted(&config, &roster)?;
    let member = Member::join(
        &args.member.creds,
        Role::Dispatch,
        args.member.nats.as_deref(),
        args.member.swarm(),
    )
    .await?;
    let secret = blake3_derive(member.credentials.seed.secret_bytes());
    let service = DispatchService::start(DispatchParts {
        bus: member.client.bus().clone(),
        identity: member.identity.clone(),
        run: member.credentials.run.clone(),
        learner: member.credentials.learner,
        roster,
        prompts: Arc::new(prompts),
        clock: member.clock.clone(),
        settings: settings(&config),
        secret,
    });
    let service = tokio::select! {
        started = service => started?,
        () = member.shutdown.cancelled() => return Ok(()),
    };
    service
        .trusting(trusted)
        .run(member.shutdown.clone())
        .await
        .context("dispatch")?;
    member.leave().await;
    Ok(())
}

/// The workers that the configuration allows to change weights within an answer.
fn trusted(config: &RunConfig, roster: &Roster) -> Result<BTreeSet<PeerId>> {
    let peer = |name: &String| {
        let worker = roster
            .members
            .iter()
            .find(|member| member.role == Role::Worker && member.name == *name);
        worker.map(|worker| worker.peer).with_context(|| {
            format!("`dispatch.in_flight` names {name:?}, which is not a worker of this run: correct or remove the name")
        })
    };
    config.dispatch.in_flight.iter().map(peer).collect()
}

fn settings(config: &RunConfig) -> DispatchSettings {
    DispatchSettings {
        batch_groups: config.learner.batch_groups.get() as u64,
        steps: config.run.steps.get(),
        ticket_ms: config.dispatch.ticket_ms.get(),
        lease_ms: config.dispatch.lease_ms.get(),
        audit: config.dispatch.audit,
        critique: config.dispatch.critique,
        conduct: config.dispatch.conduct,
    }
}

fn blake3_derive(seed: &[u8; 32]) -> [u8; 32] {
    muster_protocol::identity::derive_secret(SECRET_CONTEXT, seed)
}
