//! `muster bench quickstart`: whole runs of `muster local`, one after the other, as a user would start them: each a process
//! of its own in a folder of its own, its warm-up included. Decides nothing; what counts is in `figures.rs`.

use std::io::IsTerminal as _;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Instant, SystemTime};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use muster_learner::objective::ObjectiveConfig;
use muster_learner::schedule::{Constant, ScheduleConfig};
use muster_protocol::child::Child;
use muster_protocol::nats_server;

use super::figures::{Conditions, Figures, header, worst};
use crate::config::{QUICKSTART, RunConfig};
use crate::machine::{CpuTime, load_average, project};
use crate::output::say;
use crate::record::RunRecord;
use crate::run_dir::{RunDir, write_whole};

/// What `bench quickstart` takes.
#[derive(Debug, Args)]
pub(super) struct QuickstartArgs {
    /// One run for each
    #[arg(
        long,
        value_name = "S,…",
        value_delimiter = ',',
        default_value = "1,2,3,4,5"
    )]
    seeds: Vec<u64>,
    /// Steps to take, instead of the configuration's; the bars are then for information
    #[arg(long)]
    steps: Option<NonZeroU64>,
    /// Runs that must learn nothing
    #[arg(long)]
    control: Option<Control>,
    /// Which objective: the configuration's, Muster's default, or one after the other
    #[arg(
        long,
        value_name = "NAME,…",
        value_delimiter = ',',
        default_value = "chosen"
    )]
    objective: Vec<Objective>,
    /// Another configuration in the quickstart's place
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print JSON lines
    #[arg(long)]
    json: bool,
    /// Where the runs go; a new folder under runs/bench by default
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// The nats-server program, instead of the one found
    #[arg(long, value_name = "FILE")]
    nats_server: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Control {
    /// Learning rate 0
    Lr0,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Objective {
    /// The configuration's
    Chosen,
    /// The one used where a configuration names none
    Default,
}

impl Objective {
    fn name(self) -> &'static str {
        match self {
            Self::Chosen => "chosen",
            Self::Default => "default",
        }
    }
}

/// A run to make.
struct Plan {
    objective: Objective,
    seed: u64,
    steps: u64,
    config: PathBuf,
    dir: RunDir,
}

/// Runs them all, then judges.
pub(super) async fn run(args: QuickstartArgs) -> Result<()> {
    let shutdown = CancellationToken::new();
    crate::signals::cancel_on_signal(&TaskTracker::new(), &shutdown);
    let root = folder(&args)?;
    let server = nats_server::program(args.nats_server.as_deref(), &project())?;
    let server = std::path::absolute(server)?;
    let plans = plans(&args, &root)?;
    if !args.json {
        say(&header())?;
    }
    let mut done: Vec<Figures> = Vec::new();
    for plan in &plans {
        let figures = measure(&args, plan, &root, &server, &shutdown).await?;
        say(&if args.json {
            serde_json::to_string(&figures)?
        } else {
            figures.row()
        })?;
        done.push(figures);
    }
    judge(&args, &done)
}

/// A new folder for the runs: what is left of earlier ones would be measured with them.
fn folder(args: &QuickstartArgs) -> Result<PathBuf> {
    let root = match &args.dir {
        Some(dir) => dir.clone(),
        None => {
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
            let now = now.context("the clock is before 1970")?.as_secs();
            Path::new("runs/bench").join(format!("quickstart-{now}"))
        }
    };
    std::fs::create_dir_all(&root).with_context(|| format!("{} cannot be made", root.display()))?;
    if root.read_dir()?.next().is_some() {
        bail!(
            "{} is not empty: name a new folder with --dir",
            root.display()
        );
    }
    Ok(root.canonicalize()?)
}

/// Each objective with each seed, and the configuration files that they are started with.
fn plans(args: &QuickstartArgs, root: &Path) -> Result<Vec<Plan>> {
    let mut plans = Vec::new();
    for &objective in &args.objective {
        let mut config = match &args.config {
            Some(path) => RunConfig::load(path)?,
            None => RunConfig::parse(QUICKSTART, Path::new("configs/quickstart.toml"))?,
        };
        let base = args.config.as_ref().and_then(|path| path.parent());
        config.resolve_paths(base.unwrap_or_else(|| Path::new("")))?;
        if objective == Objective::Default {
            config.learner.train.objective = ObjectiveConfig::default();
        }
        if let Some(Control::Lr0) = args.control {
            let still = Constant {
                lr: 0.0,
                warmup_steps: 0,
            };
            config.learner.train.schedule = ScheduleConfig::Constant(still);
        }
        config.run.steps = args.steps.unwrap_or(config.run.steps);
        let path = root.join(format!("{}.toml", objective.name()));
        write_whole(&path, config.to_toml()?.as_bytes())?;
        for &seed in &args.seeds {
            let name = format!("{}-seed-{seed}", objective.name());
            plans.push(Plan {
                objective,
                seed,
                steps: config.run.steps.get(),
                config: path.clone(),
                dir: RunDir::at(&root.join(name)),
            });
        }
    }
    Ok(plans)
}

/// One run from its command to its end.
async fn measure(
    args: &QuickstartArgs,
    plan: &Plan,
    root: &Path,
    server: &Path,
    shutdown: &CancellationToken,
) -> Result<Figures> {
    let Plan {
        objective, seed, ..
    } = plan;
    let (load_average, before) = (load_average(), CpuTime::now());
    let (started, begin) = (SystemTime::now(), Instant::now());
    tracing::info!(objective = objective.name(), seed, "a run starts");
    let child = Child::start("local", command(plan, root, server)?)
        .await
        .context("muster local cannot be started")?;
    let end = tokio::select! {
        end = child.ended() => end,
        () = shutdown.cancelled() => {
            child.terminate();
            child.ended().await;
            bail!("stopped; the runs so far are in {}", root.display());
        }
    };
    if !end.is_success() {
        bail!(
            "the run of seed {seed} failed, {end}: look into {}",
            plan.dir.root().display()
        );
    }
    let weights = plan.dir.model().join("model.safetensors");
    let made = std::fs::metadata(&weights).and_then(|file| file.modified());
    let made = made.with_context(|| format!("{} cannot be read", weights.display()))?;
    let steal = before.and_then(|before| Some(CpuTime::now()?.steal_since(&before)));
    let conditions = Conditions {
        objective: objective.name().to_owned(),
        control: args.control.map(|Control::Lr0| "lr0".to_owned()),
        seed: *seed,
        steps: plan.steps,
        warmup_seconds: made
            .duration_since(started)
            .unwrap_or_default()
            .as_secs_f64(),
        wall_seconds: begin.elapsed().as_secs_f64(),
        load_average,
        steal,
    };
    let record = RunRecord::load(plan.dir.root())?;
    Figures::of(conditions, &record).with_context(|| {
        let dir = plan.dir.root().display();
        format!("{dir}/eval.jsonl lacks the first or the last version: run the bench again")
    })
}

/// The command that a user would type, in the bench's own folder, so that a warm-up kept from elsewhere is not found.
fn command(plan: &Plan, root: &Path, server: &Path) -> Result<Command> {
    let program = std::env::current_exe().context("this program's own path is not known")?;
    let mut command = Command::new(program);
    command
        .arg("local")
        .arg(&plan.config)
        .arg("--seed")
        .arg(plan.seed.to_string())
        .arg("--dir")
        .arg(plan.dir.root())
        .arg("--nats-server")
        .arg(server)
        .current_dir(root)
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    if !std::io::stderr().is_terminal() {
        command.arg("--quiet");
    }
    Ok(command)
}

/// The worst run beside its bar. Whether the bar was met is the command's outcome, unless the runs were cut short.
fn judge(args: &QuickstartArgs, done: &[Figures]) -> Result<()> {
    let Some(worst) = worst(done) else {
        bail!("no seed was named: give one or more with --seeds");
    };
    let missed: Vec<String> = done
        .iter()
        .flat_map(|run| {
            let (objective, seed) = (&run.conditions.objective, run.conditions.seed);
            run.missed()
                .into_iter()
                .map(move |bar| format!("{objective} seed {seed}: {bar}"))
        })
        .collect();
    if args.json {
        let seed = worst.conditions.seed;
        let objective = &worst.conditions.objective;
        say(
            &serde_json::json!({"worst": {"objective": objective, "seed": seed}, "missed": missed})
                .to_string(),
        )?;
    } else {
        say("")?;
        for run in done {
            let Conditions {
                objective, seed, ..
            } = &run.conditions;
            say(&format!("{objective} seed {seed}: {}", run.curve_line()))?;
        }
        say("")?;
        say(&verdict(worst))?;
    }
    if missed.is_empty() || args.steps.is_some() {
        return Ok(());
    }
    bail!("the bar was missed: {}", missed.join("; "))
}

fn verdict(worst: &Figures) -> String {
    let seed = worst.conditions.seed;
    let missed = worst.missed();
    let outcome = if missed.is_empty() {
        "every bar met".to_owned()
    } else {
        missed.join("; ")
    };
    format!(
        "worst seed {seed}: {outcome} (bars: at most 65 % after a warm-up of at most 90 s, then at least 90 % and 25 points \
         more within 180 s of RL; a control gains less than 5 points)"
    )
}
