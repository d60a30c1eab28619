//! `muster status`: the state of a run, read from its directory; the run may have ended.

mod life;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use serde::Serialize;

use muster_protocol::message::fate::Fate;

use crate::machine::children_of;
use crate::run_dir::RunDir;
use muster_monitor::output::say;
use muster_monitor::record::{RecordReader, RunRecord};
use muster_monitor::screen::{Process, ProcessState, Status, still};

#[derive(Debug, Args)]
pub struct StatusArgs {
    /// The run directory; the only one under runs/ by default
    #[arg(long, value_name = "DIR")]
    run: Option<PathBuf>,
    /// Print one JSON line
    #[arg(long)]
    json: bool,
    /// Print the life of one group instead: a ticket's number or a group's hash
    #[arg(long, value_name = "ID", conflicts_with = "json")]
    group: Option<String>,
}

/// The line that `--json` prints.
#[derive(Debug, Serialize)]
struct StatusLine<'a> {
    run: &'a str,
    dir: &'a Path,
    running: bool,
    step: u64,
    steps: u64,
    seconds: f64,
    accuracy_first: Option<f64>,
    accuracy: Option<f64>,
    reward_mean: Option<f64>,
    staleness_mean: Option<f64>,
    rollout_tokens_per_second: Option<f64>,
    groups: BTreeMap<String, u64>,
    rejections: Vec<Rejection<'a>>,
    processes: Vec<RunningProcess>,
}

/// A reason of rejections and one group's sentence for it.
#[derive(Debug, Serialize)]
struct Rejection<'a> {
    count: u64,
    example: &'a str,
}

/// A process of the run on this machine.
#[derive(Debug, Serialize)]
struct RunningProcess {
    name: String,
    pid: u32,
}

pub fn run(args: &StatusArgs) -> Result<()> {
    let dir = RunDir::named(args.run.as_deref())?;
    if let Some(id) = &args.group {
        return life::print(&dir, id);
    }
    let config = dir.load_config()?;
    let mut reader = RecordReader::new(dir.root());
    reader.read_new()?;
    let record = reader.into_record();
    let runner = dir.runner()?;
    let processes = runner.map(processes_of).unwrap_or_default();
    let steps = config.run.steps.get();
    if args.json {
        let name = config.run.name.as_str();
        let line = status_line(&record, name, dir.root(), steps, runner, processes);
        return say(&serde_json::to_string(&line)?);
    }
    let phase = match runner {
        Some(pid) => format!("run by process {pid}"),
        None => "not running".to_owned(),
    };
    let shown = |process: RunningProcess| Process {
        name: process.name,
        state: ProcessState::Up,
        restarts: 0,
    };
    let status = Status {
        steps_total: Some(steps),
        phase,
        processes: processes.into_iter().map(shown).collect(),
    };
    let mut lines = still(&record, &status, record.seconds());
    if runner.is_none() {
        // The last line names the processes, and there are none.
        lines.pop();
    }
    say(&lines.join("\n"))
}

fn status_line<'a>(
    record: &'a RunRecord,
    run: &'a str,
    dir: &'a Path,
    steps: u64,
    runner: Option<u32>,
    processes: Vec<RunningProcess>,
) -> StatusLine<'a> {
    let last = record.steps.last();
    let rejections = record.fates.reasons_of(Fate::Rejected);
    StatusLine {
        run,
        dir,
        running: runner.is_some(),
        step: record.steps_taken(),
        steps,
        seconds: record.seconds(),
        accuracy_first: record.evals.first().map(|eval| eval.accuracy),
        accuracy: record.evals.last().map(|eval| eval.accuracy),
        reward_mean: last.map(|line| line.reward_mean),
        staleness_mean: last.map(|line| line.staleness_mean),
        rollout_tokens_per_second: last.map(|line| line.rollout_tokens_per_second),
        groups: Fate::ALL
            .into_iter()
            .map(|fate| (fate.to_string(), record.fates.of(fate)))
            .collect(),
        rejections: rejections
            .into_iter()
            .map(|reason| Rejection {
                count: reason.count,
                example: &reason.example,
            })
            .collect(),
        processes,
    }
}

/// The children of process `pid`: members under the names of their credentials files, the NATS server under its program's.
fn processes_of(pid: u32) -> Vec<RunningProcess> {
    let named = |words: &[String]| {
        let creds = words.iter().position(|word| word == "--creds");
        let path = match creds {
            Some(at) => words.get(at + 1),
            None => words.first(),
        };
        path.and_then(|path| Path::new(path).file_stem())
            .map(|name| name.to_string_lossy().into_owned())
    };
    children_of(pid)
        .into_iter()
        .filter_map(|(pid, words)| {
            Some(RunningProcess {
                name: named(&words)?,
                pid,
            })
        })
        .collect()
}
