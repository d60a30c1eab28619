//! `muster snapshot serve`: serves versions over HTTP, from a run directory, pulled folders, or a live run.

use std::net::{Ipv4Addr, SocketAddr};
use std::num::NonZeroUsize;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

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

/// The default address. Other machines cannot reach it: that is for the user to decide.
const LISTEN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 8090);

#[derive(Debug, Args)]
pub(super) struct ServeArgs {
    /// Pulled folders; --learner or --run gives the key that signed them
    #[arg(value_name = "FOLDER", conflicts_with_all = ["creds", "nat"])]
    folders: Vec<PathBuf>,
    /// The run directory, for its checkpoints; the only one under runs/ by default
    #[arg(long, value_name = "DIR", conflicts_with_all = ["creds", "nat"])]
    run: Option<PathBuf>,
    /// The key of the run's learner, 64 hexadecimal digits
    #[arg(long, value_name = "KEY", conflicts_with_all = ["run", "creds"], requires = "folders")]
    learner: Option<PeerId>,
    /// An evaluator's credentials, for the versions of a live run
    #[arg(long, value_name = "FILE")]
    creds: Option<PathBuf>,
    /// Address of the NATS server, instead of the one in the credentials
    #[arg(long, value_name = "URL", requires = "creds")]
    nats: Option<String>,
    #[command(flatten)]
    nat: NatArgs,
    /// Folder for the versions of a live run
    #[arg(long, value_name = "DIR", default_value = "snapshots")]
    cache: PathBuf,
    /// Most versions kept in that folder
    #[arg(long, value_name = "N", default_value = "4")]
    keep: NonZeroUsize,
    /// Most bytes of one file of weights in pulled versions; weights beyond it go to further files, with an index [default: 5000000000]
    #[arg(long, value_name = "N", requires = "creds", value_parser = file_bytes::parse)]
    file_bytes_max: Option<u64>,
    /// Address to listen on, `host:port`; port 0 takes any free port
    #[arg(long, value_name = "ADDRESS", default_value_t = LISTEN)]
    listen: SocketAddr,
    /// Most connections at once; others wait
    #[arg(long, value_name = "N", default_value = "64", value_parser = parse_connections)]
    connections: NonZeroUsize,
}

/// Most systems allow about twice as many open files.
const CONNECTIONS_MAX: usize = 512;

fn parse_connections(text: &str) -> Result<NonZeroUsize, String> {
    let number = text.parse::<NonZeroUsize>().ok();
    let number = number.filter(|number| number.get() <= CONNECTIONS_MAX);
    number.ok_or_else(|| format!("give a number from 1 to {CONNECTIONS_MAX}"))
}

/// Serves until a signal stops it.
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

/// The source of versions, the learner that signed them, and the shutdown signal.
async fn open(args: &ServeArgs) -> Result<(Box<dyn VersionSource>, Trust, CancellationToken)> {
    if let Some(creds) = &args.creds {
        let run = LiveRun::join(creds, args.nats.as_deref(), args.nat.config()).await?;
        let trust = Trust {
            learner: run.member.credentials.learner,
            run: run.member.credentials.run.clone(),
        };
        let shutdown = run.member.shutdown.clone();
        let live = LiveVersions {
            run,
            cache: args.cache.clone(),
            keep: args.keep.get(),
            file_bytes_max: args.file_bytes_max.unwrap_or(FILE_BYTES_MAX),
        };
        return Ok((Box::new(live), trust, shutdown));
    }
    let shutdown = CancellationToken::new();
    cancel_on_signal(&shutdown);
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
