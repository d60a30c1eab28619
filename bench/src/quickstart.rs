//! `muster-bench quickstart`: measures whole runs of `muster local`, one after the other, with their warm-up. Each is a process in
//! its own folder, as a user would start it. `figures.rs` computes the figures.

use std::io::IsTerminal as _;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Instant, SystemTime};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use toml::{Table, Value};

use muster_protocol::child::Child;

use crate::figures::{Conditions, Figures, header, worst};
use crate::program;
use muster_monitor::machine::{CpuTime, load_average};
use muster_monitor::output::say;
use muster_monitor::record::RunRecord;

/// The configuration that `muster local` runs by default.
const QUICKSTART: &str = include_str!("../../configs/quickstart.toml");

#[derive(Debug, Args)]
pub(super) struct QuickstartArgs {
    /// Seeds; each gives one run
    #[arg(
        long,
        value_name = "S,…",
        value_delimiter = ',',
        default_value = "1,2,3,4,5"
    )]
    seeds: Vec<u64>,
    /// Number of steps, instead of the configuration's; bars are then not enforced
    #[arg(long)]
    steps: Option<NonZeroU64>,
    /// Runs that must learn nothing
    #[arg(long)]
    control: Option<Control>,
    /// Objective: the configuration's, Muster's default, or both
    #[arg(
        long,
        value_name = "NAME,…",
        value_delimiter = ',',
        default_value = "chosen"
    )]
    objective: Vec<Objective>,
    /// Configuration to run instead of the quickstart's
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print JSON lines
    #[arg(long)]
    json: bool,
    /// Folder of the runs; a new one under runs/bench by default
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// The nats-server program to use instead of the one that `muster local` finds
    #[arg(long, value_name = "FILE")]
    nats_server: Option<PathBuf>,
    /// The `muster` program to measure; the one beside this program by default
    #[arg(long, value_name = "FILE")]
    muster: Option<PathBuf>,
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
    /// The default of a configuration without one
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
    dir: PathBuf,
}

pub(super) async fn run(args: QuickstartArgs) -> Result<()> {
    let root = folder(&args)?;
    let plans = plans(&args, &root)?;
    if !args.json {
        say(&header())?;
    }
    let mut done: Vec<Figures> = Vec::new();
    for plan in &plans {
        let figures = measure(&args, plan, &root).await?;
        say(&if args.json {
            serde_json::to_string(&figures)?
        } else {
            figures.row()
        })?;
        done.push(figures);
    }
    judge(&args, &done)
}

/// A new folder for the runs, so that earlier runs are not measured.
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

/// One plan for each objective and seed, and the configuration files that the runs start with.
fn plans(args: &QuickstartArgs, root: &Path) -> Result<Vec<Plan>> {
    let mut plans = Vec::new();
    for &objective in &args.objective {
        let config = config(args, objective)?;
        let steps = config["run"].get("steps").and_then(Value::as_integer);
        let steps = steps.and_then(|steps| u64::try_from(steps).ok());
        let steps = steps.context("the configuration names no run.steps: give --steps")?;
        let path = root.join(format!("{}.toml", objective.name()));
        std::fs::write(&path, toml::to_string(&config)?)
            .with_context(|| format!("{} cannot be written", path.display()))?;
        for &seed in &args.seeds {
            let name = format!("{}-seed-{seed}", objective.name());
            plans.push(Plan {
                objective,
                seed,
                steps,
                config: path.clone(),
                dir: root.join(name),
            });
        }
    }
    Ok(plans)
}

/// The configuration of one objective's runs. Its paths are absolute, since it is written to another folder.
fn config(args: &QuickstartArgs, objective: Objective) -> Result<Table> {
    let text = match &args.config {
        Some(path) => std::fs::read_to_string(path)
            .with_context(|| format!("{} cannot be read", path.display()))?,
        None => QUICKSTART.to_owned(),
    };
    let mut config: Table = text.parse().context("the configuration is not TOML")?;
    let base = args.config.as_deref().and_then(Path::parent);
    for (section, key) in [("task", "file"), ("model", "path")] {
        let value = config.get_mut(section).and_then(|table| table.get_mut(key));
        if let (Some(Value::String(path)), Some(base)) = (value, base) {
            *path = std::path::absolute(base.join(&path))?.display().to_string();
        }
    }
    if objective == Objective::Default {
        train(&mut config)?.remove("objective");
    }
    if let Some(Control::Lr0) = args.control {
        let still = "type = 'constant'\nlr = 0.0\nwarmup_steps = 0".parse::<Table>()?;
        train(&mut config)?.insert("schedule".to_owned(), Value::Table(still));
    }
    if let Some(steps) = args.steps {
        let steps = Value::Integer(i64::try_from(steps.get())?);
        table(&mut config, "run")?.insert("steps".to_owned(), steps);
    }
    table(&mut config, "run")?;
    Ok(config)
}

/// `learner.train` of a configuration.
fn train(config: &mut Table) -> Result<&mut Table> {
    table(table(config, "learner")?, "train")
}

/// The table under `key`, added if it is missing.
fn table<'a>(parent: &'a mut Table, key: &str) -> Result<&'a mut Table> {
    let entry = parent
        .entry(key)
        .or_insert_with(|| Value::Table(Table::new()));
    entry
        .as_table_mut()
        .with_context(|| format!("`{key}` of the configuration is not a table"))
}

/// Runs one command to its end.
async fn measure(args: &QuickstartArgs, plan: &Plan, root: &Path) -> Result<Figures> {
    let Plan {
        objective, seed, ..
    } = plan;
    let (load_average, before) = (load_average(), CpuTime::now());
    let (started, begin) = (SystemTime::now(), Instant::now());
    tracing::info!(objective = objective.name(), seed, "a run starts");
    let child = Child::start("local", command(args, plan, root)?)
        .await
        .context("muster local cannot be started")?;
    let end = tokio::select! {
        end = child.ended() => end,
        interrupted = tokio::signal::ctrl_c() => {
            interrupted?;
            child.terminate();
            child.ended().await;
            bail!("stopped; the runs so far are in {}", root.display());
        }
    };
    if !end.is_success() {
        bail!(
            "the run of seed {seed} failed, {end}: look into {}",
            plan.dir.display()
        );
    }
    let weights = plan.dir.join("model/model.safetensors");
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
    let record = RunRecord::load(&plan.dir)?;
    Figures::of(conditions, &record).with_context(|| {
        let dir = plan.dir.display();
        format!("{dir}/eval.jsonl lacks the first or the last version: run the bench again")
    })
}

/// The command of a run. It runs in the bench's folder, so that it does not find an earlier warm-up.
fn command(args: &QuickstartArgs, plan: &Plan, root: &Path) -> Result<Command> {
    let mut command = Command::new(program::muster(args.muster.as_deref())?);
    command
        .arg("local")
        .arg(&plan.config)
        .arg("--seed")
        .arg(plan.seed.to_string())
        .arg("--dir")
        .arg(&plan.dir)
        .current_dir(root)
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    if let Some(server) = &args.nats_server {
        command
            .arg("--nats-server")
            .arg(std::path::absolute(server)?);
    }
    if !std::io::stderr().is_terminal() {
        command.arg("--quiet");
    }
    Ok(command)
}

/// Prints the worst run beside its bar. A missed bar fails the command, unless `--steps` was given.
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
