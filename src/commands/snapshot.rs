//! `muster snapshot`: lists the versions of a run, pulls one as a Hugging Face folder, verifies a folder, and serves folders
//! over HTTP. Versions come from a live run, under an evaluator's credentials, or from the checkpoints of a run directory.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use serde::Serialize;

use muster_broadcaster::follower::Opened;
use muster_broadcaster::snapshot::{
    FILE_BYTES_MAX, Report, SnapshotError, copy, run_named, verify, weights_bytes,
};
use muster_broadcaster::store::disk::Existing;
use muster_protocol::id::{PeerId, PolicyVersion, RunId, StateRoot};
use muster_protocol::record::{EvalLine, Line as _, read_all};

use self::live::LiveRun;
use super::member_args::NatArgs;
use crate::run_dir::RunDir;
use muster_monitor::output::say;
use muster_monitor::record::newest_checkpoint;
use muster_monitor::text::{count, percent, short};

mod file_bytes;
mod live;
mod live_versions;
mod progress;
mod serve;

#[derive(Debug, Args)]
pub struct SnapshotArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// List the versions that can be pulled
    List(ListArgs),
    /// Verify a version and write it as a folder that transformers loads
    Pull(PullArgs),
    /// Check every byte of a folder against the learner's signature
    Verify(VerifyArgs),
    /// Serve versions over HTTP as a model hub does
    Serve(serve::ServeArgs),
}

/// The source of versions: a run directory or a live run.
#[derive(Debug, Args)]
struct From {
    /// The run directory, for its checkpoints; the only one under runs/ by default
    #[arg(long, value_name = "DIR", conflicts_with_all = ["creds", "nat"])]
    run: Option<PathBuf>,
    /// An evaluator's credentials, for the versions of a live run
    #[arg(long, value_name = "FILE")]
    creds: Option<PathBuf>,
    /// Address of the NATS server, instead of the one in the credentials
    #[arg(long, value_name = "URL", requires = "creds")]
    nats: Option<String>,
    #[command(flatten)]
    nat: NatArgs,
}

impl From {
    async fn join(&self, creds: &Path) -> Result<LiveRun> {
        LiveRun::join(creds, self.nats.as_deref(), self.nat.config()).await
    }
}

#[derive(Debug, Args)]
struct ListArgs {
    #[command(flatten)]
    from: From,
    /// Print JSON lines
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct PullArgs {
    /// A version's number, or `latest`
    #[arg(long, value_name = "V", default_value = "latest")]
    version: VersionChoice,
    /// The folder to make
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Most bytes of one file of weights; weights beyond it go to further files, with an index. A larger tensor has a file of its own
    #[arg(long, value_name = "N", default_value_t = FILE_BYTES_MAX, value_parser = file_bytes::parse)]
    file_bytes_max: u64,
    #[command(flatten)]
    from: From,
    /// Print one JSON line
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct VerifyArgs {
    /// The folder to check
    folder: PathBuf,
    /// The key of the run's learner, 64 hexadecimal digits
    #[arg(long, value_name = "KEY", conflicts_with = "run")]
    learner: Option<PeerId>,
    /// The run directory that has the key; the only one under runs/ by default
    #[arg(long, value_name = "DIR")]
    run: Option<PathBuf>,
    /// Print one JSON line
    #[arg(long)]
    json: bool,
}

/// The version that a user names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum VersionChoice {
    Latest,
    Number(u64),
}

impl FromStr for VersionChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "latest" {
            return Ok(Self::Latest);
        }
        let number = text.parse().map(Self::Number);
        number.map_err(|_| "give a number of steps, or `latest`".to_owned())
    }
}

/// A checkpoint on disk.
#[derive(Debug, Serialize)]
struct Checkpoint {
    policy_version: u64,
    path: PathBuf,
    bytes: u64,
    accuracy: Option<f64>,
}

/// A version of a live run.
#[derive(Debug, Serialize)]
struct Announced {
    policy_version: PolicyVersion,
    root: StateRoot,
    bytes: u64,
    /// Whether peers hold the objects to pull it.
    held: bool,
}

impl Announced {
    fn of((opened, held): (&Opened, bool)) -> Self {
        let body = &opened.version.body;
        Self {
            policy_version: body.version,
            root: body.root,
            bytes: body.parameter_bytes(),
            held,
        }
    }
}

pub async fn run(args: SnapshotArgs) -> Result<()> {
    match args.what {
        What::List(args) => match &args.from.creds {
            Some(creds) => list_live(&args, creds).await,
            None => list_checkpoints(&args),
        },
        What::Pull(args) => {
            let report = match &args.from.creds {
                Some(creds) => pull_live(&args, creds).await?,
                None => pull_checkpoint(&args)?,
            };
            tell(&report, &args.out, args.json)
        }
        What::Serve(args) => serve::run(args).await,
        What::Verify(args) => {
            let (learner, run) = match args.learner {
                Some(learner) => (learner, run_named(&args.folder)),
                None => {
                    let dir = RunDir::named(args.run.as_deref())?;
                    (dir.learner()?, Ok(dir.load_config()?.run.name))
                }
            };
            let verified = run.and_then(|run| verify(&args.folder, &learner, &run));
            let report = verified.with_context(|| args.folder.display().to_string())?;
            tell(&report, &args.folder, args.json)
        }
    }
}

fn tell(report: &Report, folder: &Path, json: bool) -> Result<()> {
    if json {
        let line = serde_json::json!({
            "policy_version": report.version.version,
            "root": report.version.root,
            "learner": report.learner,
            "folder": folder,
            "files": report.files,
        });
        return say(&line.to_string());
    }
    let bytes: u64 = report.files.values().sum();
    say(&format!(
        "version {} in {}: {} files of {} bytes, all as signed by {}",
        report.version.version,
        folder.display(),
        report.files.len(),
        count(bytes),
        report.learner
    ))
}

fn list_checkpoints(args: &ListArgs) -> Result<()> {
    let dir = RunDir::named(args.from.run.as_deref())?;
    dir.load_config()?;
    let evals = read_all::<EvalLine>(&dir.root().join(EvalLine::FILE))?;
    for policy_version in dir.checkpoint_versions()? {
        let path = dir.checkpoint(policy_version);
        let bytes = weights_bytes(&path).with_context(|| path.display().to_string())?;
        let accuracy = evals
            .iter()
            .find(|eval| eval.policy_version.0 == policy_version)
            .map(|eval| eval.accuracy);
        if args.json {
            let checkpoint = Checkpoint {
                policy_version,
                path,
                bytes,
                accuracy,
            };
            say(&serde_json::to_string(&checkpoint)?)?;
            continue;
        }
        let accuracy = accuracy.map_or_else(|| "not evaluated".to_owned(), percent);
        let size = short(bytes as f64);
        say(&format!(
            "version {policy_version:<8} {accuracy:>13}  {size:>6} B  {}",
            path.display()
        ))?;
    }
    Ok(())
}

/// Copies a checkpoint without reading it into memory whole, and verifies it before and after.
fn pull_checkpoint(args: &PullArgs) -> Result<Report> {
    let dir = RunDir::named(args.from.run.as_deref())?;
    let (learner, run) = (dir.learner()?, dir.load_config()?.run.name);
    let folder = match args.version {
        VersionChoice::Number(version) => dir.checkpoint(version),
        VersionChoice::Latest => newest_checkpoint(dir.root())?.with_context(|| {
            format!(
                "{} has no checkpoint yet: wait for the first, or pull from the live run with --creds",
                dir.root().display()
            )
        })?,
    };
    if !folder.is_dir() {
        let versions: Vec<String> = dir
            .checkpoint_versions()?
            .iter()
            .map(u64::to_string)
            .collect();
        bail!(
            "{} has no checkpoint of that version: choose one of {}, or pull from the live run with --creds",
            dir.root().display(),
            versions.join(", ")
        );
    }
    let trust = (&learner, &run);
    let copied = copy(
        &folder,
        &args.out,
        trust,
        args.file_bytes_max,
        Existing::Refuse,
    );
    copied.map_err(|error| match error {
        // These errors name their path.
        SnapshotError::Disk(error) => error.into(),
        error => anyhow::Error::new(error).context(folder.display().to_string()),
    })
}

async fn list_live(args: &ListArgs, creds: &Path) -> Result<()> {
    let mut run = args.from.join(creds).await?;
    let shutdown = run.member.shutdown.clone();
    let listed = tokio::select! {
        listed = announced(&mut run) => listed,
        () = shutdown.cancelled() => Err(anyhow::anyhow!("stopped before the run had answered")),
    };
    run.member.leave().await;
    for version in listed? {
        if args.json {
            say(&serde_json::to_string(&version)?)?;
        } else {
            let (number, size) = (version.policy_version, short(version.bytes as f64));
            let held = if version.held { "held" } else { "gone" };
            say(&format!(
                "version {number:<8} {held}  {size:>6} B  {}",
                version.root
            ))?;
        }
    }
    Ok(())
}

async fn announced(run: &mut LiveRun) -> Result<Vec<Announced>> {
    run.refresh().await?;
    let judged = run.held().await?;
    Ok(judged.into_iter().map(Announced::of).collect())
}

async fn pull_live(args: &PullArgs, creds: &Path) -> Result<Report> {
    let mut run = args.from.join(creds).await?;
    let shutdown = run.member.shutdown.clone();
    let pulled = tokio::select! {
        pulled = pull_wanted(&mut run, args) => pulled,
        () = shutdown.cancelled() => {
            Err(anyhow::anyhow!("stopped before the version was whole: {} was not made", args.out.display()))
        }
    };
    let (learner, name): (PeerId, RunId) = (
        run.member.credentials.learner,
        run.member.credentials.run.clone(),
    );
    run.member.leave().await;
    pulled?;
    verify(&args.out, &learner, &name).with_context(|| args.out.display().to_string())
}

async fn pull_wanted(run: &mut LiveRun, args: &PullArgs) -> Result<()> {
    let version = match args.version {
        VersionChoice::Latest => None,
        VersionChoice::Number(number) => Some(PolicyVersion(number)),
    };
    let version = run.hear_of(version).await?;
    run.pull(version, &args.out, args.file_bytes_max).await
}
