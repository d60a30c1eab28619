//! `muster local`: runs the whole swarm on one machine. Each role is a process of this binary with its own credentials, as it
//! would be on another machine.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use tokio_util::sync::CancellationToken;

use crate::config::{QUICKSTART, RunConfig};
use crate::machine::project;
use crate::run_dir::RunDir;
use crate::start_model::{Progress, prepare};
use crate::supervisor::{Supervised, stop};
use muster_monitor::record::{RunRecord, newest_checkpoint};
use muster_monitor::screen::{Screen, ScreenMode, Status};
use muster_monitor::{report, summary};
use muster_protocol::nats_server::{self, Member as ServerMember, NatsServer, ServerConfig};
use muster_protocol::subject::Role;

/// Interval between checks of children and files.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// Longest wait for children to end by themselves after the run has finished.
const GOODBYE: Duration = Duration::from_secs(3);

#[derive(Debug, Args)]
pub struct LocalArgs {
    /// The run's configuration; the quickstart's by default
    config: Option<PathBuf>,
    /// Number of workers
    #[arg(long)]
    workers: Option<usize>,
    /// Number of critics
    #[arg(long)]
    critics: Option<usize>,
    /// Steps to take
    #[arg(long)]
    steps: Option<std::num::NonZeroU64>,
    /// The run directory; runs/NAME by default
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Seed of the starting policy and of the order of prompts
    #[arg(long)]
    seed: Option<u64>,
    /// Print only the summary
    #[arg(long)]
    quiet: bool,
    /// The nats-server program to use instead of the one on the PATH or in .venv
    #[arg(long, value_name = "FILE")]
    nats_server: Option<PathBuf>,
}

/// Names and roles of the run's members on this machine.
fn members(config: &RunConfig) -> Vec<(String, Role)> {
    let mut members = vec![
        ("dispatch".to_owned(), Role::Dispatch),
        ("trainer".to_owned(), Role::Trainer),
    ];
    let numbered = |name: &str, role: Role, count: usize| -> Vec<(String, Role)> {
        (1..=count).map(|n| (format!("{name}-{n}"), role)).collect()
    };
    members.extend(numbered("worker", Role::Worker, config.local.workers));
    members.extend(numbered("critic", Role::Critic, config.local.critics));
    members.extend(numbered("seeder", Role::Seeder, config.local.seeders));
    members.push(("evaluator".to_owned(), Role::Evaluator));
    members
}

/// The command line of a member.
fn arguments(config: &RunConfig, dir: &RunDir, name: &str, role: Role) -> Vec<String> {
    let creds = dir.credentials(name).display().to_string();
    let run = dir.root().display().to_string();
    let text = |words: &[&str]| {
        words
            .iter()
            .map(|word| (*word).to_owned())
            .collect::<Vec<_>>()
    };
    match role {
        Role::Dispatch => text(&["dispatch", "--creds", &creds, "--run", &run]),
        Role::Trainer => text(&["trainer", "--creds", &creds, "--run", &run]),
        Role::Worker => {
            let rows = config.worker.rollouts_max.to_string();
            let mut words = text(&["rollout", "--creds", &creds, "--rollouts-max", &rows]);
            if config.local.int8_workers.iter().any(|named| named == name) {
                words.extend(text(&["--kernels", "int8"]));
            }
            words
        }
        Role::Critic => {
            let groups = config.critic.groups_max.to_string();
            text(&["critic", "--creds", &creds, "--groups-max", &groups])
        }
        Role::Seeder => text(&["seed", "--creds", &creds]),
        Role::Evaluator => text(&["eval", "--follow", "--creds", &creds, "--run", &run]),
    }
}

/// Reads the configuration and applies the flags.
fn resolve(args: &LocalArgs) -> Result<RunConfig> {
    let (mut config, base) = match &args.config {
        Some(path) => (RunConfig::load(path)?, path.parent().map(Path::to_owned)),
        None => (
            RunConfig::parse(QUICKSTART, Path::new("configs/quickstart.toml"))?,
            None,
        ),
    };
    config.resolve_paths(&base.unwrap_or_default())?;
    config.local.workers = args.workers.unwrap_or(config.local.workers);
    config.local.critics = args.critics.unwrap_or(config.local.critics);
    config.run.steps = args.steps.unwrap_or(config.run.steps);
    config.run.seed = args.seed.unwrap_or(config.run.seed);
    if let Err(problem) = config.validate().and_then(|()| config.validate_local()) {
        bail!("{problem}");
    }
    Ok(config)
}

pub fn run(args: LocalArgs) -> Result<()> {
    let config = resolve(&args)?;
    let root = args
        .dir
        .clone()
        .unwrap_or_else(|| Path::new("runs").join(config.run.name.as_str()));
    let dir = RunDir::at(&root);
    let _lock = dir.lock()?;
    dir.open(&config)?;
    let dir = RunDir::at(
        &root
            .canonicalize()
            .with_context(|| format!("{} cannot be used", root.display()))?,
    );
    let mode = if args.quiet {
        ScreenMode::Quiet
    } else {
        ScreenMode::of_stderr()
    };
    let screen = Screen::new(dir.root(), mode)?;
    super::logging::to_screen(&screen);
    super::runtime::start()?.block_on(swarm(args, config, dir, screen))
}

async fn swarm(args: LocalArgs, config: RunConfig, dir: RunDir, mut screen: Screen) -> Result<()> {
    let shutdown = CancellationToken::new();
    crate::signals::cancel_on_signal(&shutdown);
    if is_complete(&config, &dir)? {
        screen.note(&format!(
            "the run in {} is finished already",
            dir.root().display()
        ));
        return conclude(&dir, screen);
    }
    nats_server::program(args.nats_server.as_deref(), &project())?; // a missing program fails here and not after the warm-up
    start_policy(&config, &dir, &mut screen)?;
    let mut server = start_server(&args, &config, &dir).await?;
    let mut children = Vec::new();
    let outcome = tokio::select! {
        outcome = tend(&args, &config, &dir, &mut screen, &mut server, &mut children) => outcome,
        () = shutdown.cancelled() => Err(anyhow::anyhow!(
            "stopped; the same command goes on with the run in {}", dir.root().display()
        )),
    };
    stop(&children).await;
    server.stop().await;
    outcome?;
    conclude(&dir, screen)
}

/// Makes the starting policy if the run has none.
fn start_policy(config: &RunConfig, dir: &RunDir, screen: &mut Screen) -> Result<()> {
    let prepared = config.rewards().prepare(dir.root())?;
    let mut tell = |progress: Progress| {
        let phase = format!(
            "warm-up: {} updates, {:.0} % right on the development split, {:.0} s",
            progress.check.updates,
            100.0 * progress.check.accuracy,
            progress.elapsed.as_secs_f64()
        );
        if let Err(error) = screen.tick(
            Instant::now(),
            &Status {
                phase,
                ..Status::default()
            },
        ) {
            tracing::debug!(%error, "the display");
        }
    };
    prepare(
        config,
        &prepared.task,
        &prepared.reward,
        &dir.model(),
        &mut tell,
    )?;
    Ok(())
}

async fn start_server(args: &LocalArgs, config: &RunConfig, dir: &RunDir) -> Result<NatsServer> {
    let members = members(config);
    let roster = dir.enrol(config, &members, "nats://127.0.0.1:0")?;
    let users = roster.members.iter();
    let users = users
        .map(|m| ServerMember {
            user: m.user.clone(),
            role: m.role,
        })
        .collect();
    let mut server = ServerConfig::new(&config.run.name, &dir.nats(), users);
    server.binary.clone_from(&args.nats_server);
    server.project = project();
    server.port = Some(config.local.port).filter(|port| *port != 0);
    let server = NatsServer::start(&server).await?;
    dir.enrol(config, &members, &server.url())?;
    Ok(server)
}

/// Starts the members and restarts those that fail, until the run is complete.
async fn tend(
    args: &LocalArgs,
    config: &RunConfig,
    dir: &RunDir,
    screen: &mut Screen,
    server: &mut NatsServer,
    children: &mut Vec<Supervised>,
) -> Result<()> {
    for (name, role) in members(config) {
        let arguments = arguments(config, dir, &name, role);
        children.push(Supervised::start(&name, role, arguments, dir.log(&name)).await?);
    }
    let mut goodbye = None;
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        if server.pid().is_none() {
            tracing::warn!(
                words = server.ended().await,
                "the NATS server ended: it is started again"
            );
            *server = start_server(args, config, dir).await?;
        }
        if let Some(trouble) = server.disk_trouble() {
            return Err(trouble).context("the run stops so that nothing is lost");
        }
        for child in children.iter_mut() {
            child.tend().await?;
        }
        let processes = children.iter().map(Supervised::shown).collect();
        screen.tick(
            Instant::now(),
            &Status {
                steps_total: Some(config.run.steps.get()),
                phase: String::new(),
                processes,
            },
        )?;
        if is_complete(config, dir)? {
            let since = *goodbye.get_or_insert_with(Instant::now);
            // Dispatch and the trainer serve until they are stopped; the others end with the run.
            let mut volunteers = children.iter().filter(|child| !child.role().is_lab());
            if volunteers.all(Supervised::is_done) || since.elapsed() > GOODBYE {
                return Ok(());
            }
        }
    }
}

/// Whether the last version is written and evaluated.
fn is_complete(config: &RunConfig, dir: &RunDir) -> Result<bool> {
    let steps = config.run.steps.get();
    if !dir
        .checkpoint(steps)
        .join("manifest.json")
        .try_exists()
        .unwrap_or(false)
    {
        return Ok(false);
    }
    let lines = muster_protocol::record::read_all::<muster_protocol::record::EvalLine>(
        &dir.root().join("eval.jsonl"),
    )?;
    Ok(lines.iter().any(|line| line.policy_version.0 == steps))
}

/// Writes the report and prints the summary.
#[allow(clippy::print_stdout)]
fn conclude(dir: &RunDir, screen: Screen) -> Result<()> {
    screen.finish();
    let path = report::write(dir.root())?;
    let record = RunRecord::load(dir.root())?;
    let checkpoint = newest_checkpoint(dir.root())?;
    println!(
        "{}",
        summary::summary(&record, Some(&path), checkpoint.as_deref())
    );
    Ok(())
}
