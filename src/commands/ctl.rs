//! `muster ctl`: pauses, resumes or stops a run. Pausing and resuming are records of the control log, written under the
//! credentials of dispatch, so they hold across restarts. Stopping is a signal to the process that runs the directory, which
//! then ends as at Ctrl-C.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};

use muster_protocol::bus::nats::{NatsBus, NatsConfig};
use muster_protocol::credentials::Credentials;
use muster_protocol::dispatch_client::DispatchClient;
use muster_protocol::message::control::{ControlEvent, Phase};
use muster_protocol::subject::Log;

use crate::machine::interrupt;
use crate::run_dir::RunDir;
use muster_monitor::output::say;

/// Longest time for dispatch to follow an order, and for the run to end.
const PATIENCE: Duration = Duration::from_secs(20);
const LOOK_EVERY: Duration = Duration::from_millis(100);

#[derive(Debug, Args)]
pub struct CtlArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Args)]
struct Which {
    /// The run directory; the only one under runs/ by default
    #[arg(long, value_name = "DIR")]
    run: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Give no new leases; groups under way are finished
    Pause(Which),
    /// Give leases again
    Resume(Which),
    /// Finish the work under way and end the processes; the same `muster local` resumes the run
    Stop(Which),
}

pub async fn run(args: CtlArgs) -> Result<()> {
    match args.what {
        What::Pause(which) => switch(&which, Phase::Paused, ControlEvent::Paused).await,
        What::Resume(which) => switch(&which, Phase::Running, ControlEvent::Resumed).await,
        What::Stop(which) => stop(&which).await,
    }
}

fn name(phase: Phase) -> &'static str {
    match phase {
        Phase::Running => "running",
        Phase::Paused => "paused",
        Phase::Finished => "finished",
    }
}

async fn switch(which: &Which, wanted: Phase, event: ControlEvent) -> Result<()> {
    let dir = RunDir::named(which.run.as_deref())?;
    dir.load_config()?;
    let client = client(&dir).await?;
    let switched = tokio::time::timeout(PATIENCE, order(&client, wanted, event)).await;
    client.bus().close().await;
    let news = switched.with_context(|| {
        let seconds = PATIENCE.as_secs();
        format!(
            "dispatch did not follow within {seconds} s: check with `muster status` whether it runs"
        )
    })??;
    say(&format!("the run in {} {news}", dir.root().display()))
}

/// Connects under dispatch's credentials, since only the lab may write the control log.
async fn client(dir: &RunDir) -> Result<DispatchClient> {
    let credentials = Credentials::load(&dir.credentials("dispatch"))?;
    let identity = credentials.identity();
    let login_seed = identity
        .login_seed()
        .context("the login key cannot be used")?;
    let mut config = NatsConfig::new("", &credentials.run, &login_seed, "ctl");
    config.urls.clone_from(&credentials.nats);
    let bus = NatsBus::connect(config)
        .await
        .with_context(|| format!("the run in {} does not answer", dir.root().display()))?;
    Ok(DispatchClient::new(
        bus,
        identity,
        credentials.run,
        credentials.learner,
    ))
}

async fn order(client: &DispatchClient, wanted: Phase, event: ControlEvent) -> Result<String> {
    let before = client.control().await?.phase;
    if before == wanted {
        return Ok(format!("is {} already", name(wanted)));
    }
    if before == Phase::Finished {
        bail!("the run is finished: raise `run.steps` in a new run to go further");
    }
    let record = client.sign(event)?.bytes;
    // Each order has its own key, since the log ignores a repeated key.
    let key = format!("ctl-{:016x}", rand::random::<u64>());
    client
        .bus()
        .append(Log::Control, &key, None, record.clone())
        .await?;
    client
        .bus()
        .publish(&client.subjects().news(Log::Control), record)
        .await?;
    while client.control().await?.phase != wanted {
        tokio::time::sleep(LOOK_EVERY).await;
    }
    Ok(format!("is {}", name(wanted)))
}

async fn stop(which: &Which) -> Result<()> {
    let dir = RunDir::named(which.run.as_deref())?;
    dir.load_config()?;
    let root = dir.root().display();
    let Some(pid) = dir.runner()? else {
        bail!("no process of this machine runs {root}: there is nothing to stop");
    };
    interrupt(pid).with_context(|| format!("process {pid} cannot be told to stop"))?;
    let asked = Instant::now();
    while dir.runner()? == Some(pid) {
        if asked.elapsed() > PATIENCE {
            let seconds = PATIENCE.as_secs();
            bail!(
                "process {pid} still drains after {seconds} s: look into {root}/logs, or ask again to end it at once"
            );
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    say(&format!(
        "the run in {root} has stopped; the same `muster local` goes on with it"
    ))
}
