//! `muster snapshot serve`: versions of a run over HTTP, from its directory, from folders that were pulled, or from the live run.

use std::net::{Ipv4Addr, SocketAddr};
use std::num::NonZeroUsize;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use muster_broadcaster::snapshot::{FILE_BYTES_MAX, run_named};
use muster_protocol::id::PeerId;

use super::file_bytes;
use super::live::LiveRun;
use super::live_versions::LiveVersions;
use crate::commands::member_args::NatArgs;
use crate::run_dir::RunDir;
use crate::signals::cancel_on_signal;
use muster_hub::gateway::Gateway;
use muster_hub::gateway::edition::Trust;
use muster_hub::gateway::source::{Folders, VersionSource};
use muster_hub::gateway::version_cache::Preparer;
use muster_monitor::output::say;

/// Where to listen by default: to be reached from elsewhere is a decision.
const LISTEN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 8090);

/// What `snapshot serve` takes.
#[derive(Debug, Args)]
pub(super) struct ServeArgs {
    /// Folders that were pulled; with --learner or --run, which know the key
    #[arg(value_name = "FOLDER", conflicts_with_all = ["creds", "nat"])]
    folders: Vec<PathBuf>,
    /// The run directory, for its checkpoints; the only one under runs/ by default
    #[arg(long, value_name = "DIR", conflicts_with_all = ["creds", "nat"])]
    run: Option<PathBuf>,
    /// The key of the run's learner, 64 hexadecimal digits
    #[arg(long, value_name = "KEY", conflicts_with_all = ["run", "creds"], requires = "folders")]
    learner: Option<PeerId>,
    /// An evaluator's credentials, for every version of a live run that can be had
    #[arg(long, value_name = "FILE")]
    creds: Option<PathBuf>,
    /// Where the bus is, instead of what the credentials say
    #[arg(long, value_name = "URL", requires = "creds")]
    nats: Option<String>,
    #[command(flatten)]
    nat: NatArgs,
    /// Where versions of a live run are kept
    #[arg(long, value_name = "DIR", default_value = "snapshots")]
    cache: PathBuf,
    /// How many versions are kept there
    #[arg(long, value_name = "N", default_value = "4")]
    keep: NonZeroUsize,
    /// Most bytes of one file of weights in the versions that it pulls; larger ones are split, with an index [default: 5000000000]
    #[arg(long, value_name = "N", requires = "creds", value_parser = file_bytes::parse)]
    file_bytes_max: Option<u64>,
    /// Where to listen, `host:port`; port 0 for any free one
    #[arg(long, value_name = "ADDRESS", default_value_t = LISTEN)]
    listen: SocketAddr,
    /// Most connections at once; others wait
    #[arg(long, value_name = "N", default_value = "64", value_parser = parse_connections)]
    connections: NonZeroUsize,
}

/// More connections than this would need more open files than most systems give.
const CONNECTIONS_MAX: usize = 512;

fn parse_connections(text: &str) -> Result<NonZeroUsize, String> {
    let number = text.parse::<NonZeroUsize>().ok();
    let number = number.filter(|number| number.get() <= CONNECTIONS_MAX);
    number.ok_or_else(|| format!("give a number from 1 to {CONNECTIONS_MAX}"))
}

/// Serves until told to stop.
pub(super) async fn run(args: ServeArgs) -> Result<()> {
    let (source, trust, shutdown) = open(&args).await?;
    let run = trust.run.clone();
    let listener = TcpListener::bind(args.listen).await.with_context(|| {
        format!(
            "cannot listen on {}: choose another address with --listen, or port 0 for any free one",
            args.listen
        )
    })?;
    let address = listener.local_addr().context("the address is not known")?;
    let started = tokio::select! {
        started = Preparer::start(source, trust) => started?,
        () = shutdown.cancelled() => return Ok(()),
    };
    let (preparer, versions) = started;
    let newest = versions
        .inventory()
        .listed
        .last()
        .map(|listed| listed.version);
    let newest = newest.context("there is no version to serve")?;
    say(&format!(
        "run {run} on http://{address}, newest version {newest}: for example HF_ENDPOINT=http://{address} hf download {run}"
    ))?;
    let preparing = tokio::spawn(preparer.run(shutdown.clone()));
    let gateway = Gateway { run, versions };
    gateway
        .serve(listener, args.connections.get(), shutdown)
        .await;
    preparing
        .await
        .context("the task that prepares versions failed")
}

/// Where versions come from, whose they are, and what tells the process to end.
async fn open(args: &ServeArgs) -> Result<(Box<dyn VersionSource>, Trust, CancellationToken)> {
    if let Some(creds) = &args.creds {
        let run = LiveRun::join(creds, args.nats.as_deref(), args.nat.config()).await?;
        let trust = Trust {
            learner: run.seat.credentials.learner,
            run: run.seat.credentials.run.clone(),
        };
        let shutdown = run.seat.shutdown.clone();
        let live = LiveVersions {
            run,
            cache: args.cache.clone(),
            keep: args.keep.get(),
            file_bytes_max: args.file_bytes_max.unwrap_or(FILE_BYTES_MAX),
        };
        return Ok((Box::new(live), trust, shutdown));
    }
    let shutdown = CancellationToken::new();
    cancel_on_signal(&TaskTracker::new(), &shutdown);
    let folders = args.folders.clone();
    let pulled = move || Folders::new(move || Ok(folders.clone()));
    let (source, trust) = match (args.learner, args.folders.first()) {
        (Some(learner), Some(first)) => {
            let run = run_named(first).with_context(|| first.display().to_string())?;
            (pulled(), Trust { learner, run })
        }
        (_, folder) => {
            let dir = RunDir::named(args.run.as_deref())?;
            let (learner, run) = (dir.learner()?, dir.load_config()?.run.name);
            let source = match folder {
                Some(_) => pulled(),
                None => Folders::new(move || checkpoints(&dir)),
            };
            (source, Trust { learner, run })
        }
    };
    Ok((Box::new(source), trust, shutdown))
}

/// The checkpoint folders of a run, oldest first.
fn checkpoints(dir: &RunDir) -> Result<Vec<PathBuf>> {
    let versions = dir.checkpoint_versions()?;
    if versions.is_empty() {
        bail!(
            "{} has no checkpoint yet: wait for the first, or serve the live run with --creds",
            dir.root().display()
        );
    }
    Ok(versions.into_iter().map(|v| dir.checkpoint(v)).collect())
}
