//! `muster learner`: runs dispatch and the trainer as two processes, the lab's side of a run.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use tokio_util::sync::CancellationToken;

use crate::config::RunConfig;
use crate::run_dir::RunDir;
use crate::start_model::prepare;
use crate::supervisor::{Supervised, stop};
use muster_monitor::screen::{Screen, ScreenMode, Status};
use muster_protocol::subject::Role;

/// Interval between checks of children and files.
const LOOK_EVERY: Duration = Duration::from_millis(500);

#[derive(Debug, Args)]
pub struct LearnerArgs {
    /// The run's configuration
    config: PathBuf,
    /// Address of the NATS server
    #[arg(long, value_name = "URL")]
    nats: String,
    /// The run directory, with the roster and the credentials of dispatch and the trainer
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
}

pub fn run(args: LearnerArgs) -> Result<()> {
    let mut config = RunConfig::load(&args.config)?;
    config.resolve_paths(args.config.parent().unwrap_or_else(|| Path::new(".")))?;
    let dir = RunDir::at(&args.dir);
    let _lock = dir.lock()?;
    dir.open(&config)?;
    for name in ["dispatch", "trainer"] {
        if !dir.credentials(name).try_exists().unwrap_or(false) {
            bail!(
                "{} is missing: `muster local` with this configuration and --dir enrols the members",
                dir.credentials(name).display()
            );
        }
    }
    let screen = Screen::new(dir.root(), ScreenMode::of_stderr())?;
    super::logging::to_screen(&screen);
    super::runtime::start()?.block_on(tend(args, config, dir, screen))
}

async fn tend(args: LearnerArgs, config: RunConfig, dir: RunDir, mut screen: Screen) -> Result<()> {
    let shutdown = CancellationToken::new();
    crate::signals::cancel_on_signal(&shutdown);
    let prepared = config.rewards().prepare(dir.root())?;
    prepare(
        &config,
        &prepared.task,
        &prepared.reward,
        &dir.model(),
        &mut |_| {},
    )?;
    let mut children = Vec::new();
    for role in [Role::Dispatch, Role::Trainer] {
        let name = role.to_string();
        let creds = dir.credentials(&name).display().to_string();
        let run = dir.root().display().to_string();
        let words = [
            &name, "--creds", &creds, "--run", &run, "--nats", &args.nats,
        ];
        let arguments = words.iter().map(|word| (*word).to_owned()).collect();
        children.push(Supervised::start(&name, role, arguments, dir.log(&name)).await?);
    }
    let steps_total = config.run.steps.get();
    let mut told = false;
    let outcome = loop {
        tokio::select! {
            () = shutdown.cancelled() => break Ok(()),
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
        let mut failed = None;
        for child in &mut children {
            failed = child.tend().await.err().or(failed);
        }
        if let Some(error) = failed {
            break Err(error).context("the learner cannot go on");
        }
        let processes = children.iter().map(Supervised::shown).collect();
        screen.tick(
            Instant::now(),
            &Status {
                steps_total: Some(steps_total),
                phase: String::new(),
                processes,
            },
        )?;
        if !told && screen.newest_step() >= steps_total {
            screen.note("the run is finished; members can still take its last version until you stop this (Ctrl-C)");
            told = true;
        }
    };
    stop(&children).await;
    screen.finish();
    outcome
}
