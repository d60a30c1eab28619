//! `muster rewards`: checks a task and a reward before a run trains on them.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};

use muster_rewards::{Prepared, RewardConfig, ScoreLines, ScoreSummary, check};

use crate::config::RunConfig;
use muster_monitor::output::say;
use muster_monitor::text::plural;

#[derive(Debug, Args)]
pub struct RewardsArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Explain a reward and try cheap hacks on it; exits with 1 if a hack pays
    Check(CheckArgs),
    /// Score the answers in a file, line by line
    Score(ScoreArgs),
}

#[derive(Debug, Args)]
struct CheckArgs {
    /// A TOML file with [task] and [[reward]], or a run's whole configuration
    config: PathBuf,
    /// Print one JSON line
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct ScoreArgs {
    /// A TOML file with [task] and [[reward]], or a run's whole configuration
    config: PathBuf,
    /// Lines {"completion" or "text", "gold"}, with "prompt", "finished" and "tokens" where a reward looks at them
    answers: PathBuf,
    /// Print JSON lines: one for each answer, then the means
    #[arg(long)]
    json: bool,
}

pub fn run(args: &RewardsArgs) -> Result<()> {
    match &args.what {
        What::Check(args) => check_reward(args),
        What::Score(args) => score(args),
    }
}

fn prepare(path: &Path) -> Result<Prepared> {
    let config = if is_run_configuration(path) {
        RunConfig::load(path)?.rewards()
    } else {
        RewardConfig::load(path).with_context(|| path.display().to_string())?
    };
    let base = path.parent().unwrap_or_else(|| Path::new(""));
    config
        .prepare(base)
        .with_context(|| path.display().to_string())
}

/// Whether a file has a section of a run's configuration besides `[task]` and `[[reward]]`. False for a file that is not TOML, so
/// that the reader of rewards reports the error.
fn is_run_configuration(path: &Path) -> bool {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let sections = text.parse::<toml::Table>().unwrap_or_default();
    sections
        .keys()
        .any(|key| RunConfig::SECTIONS.contains(&key.as_str()))
}

fn check_reward(args: &CheckArgs) -> Result<()> {
    let prepared = prepare(&args.config)?;
    let report = check(&prepared.task, &prepared.reward)?;
    if args.json {
        say(&serde_json::to_string(&report)?)?;
    } else {
        say(report.to_string().trim_end())?;
    }
    let paying: Vec<String> = report
        .flagged()
        .map(|probe| probe.hack.to_string())
        .collect();
    if paying.is_empty() {
        return Ok(());
    }
    bail!(
        "{} of {}: {}; change the reward until none of them pays",
        if paying.len() == 1 {
            "a cheap hack pays under the reward"
        } else {
            "cheap hacks pay under the reward"
        },
        args.config.display(),
        paying.join(", ")
    )
}

fn score(args: &ScoreArgs) -> Result<()> {
    let prepared = prepare(&args.config)?;
    let name = args.answers.display().to_string();
    let file = File::open(&args.answers)
        .with_context(|| format!("{name} cannot be read: give a file of JSON lines"))?;
    let mut summary = ScoreSummary::default();
    for scored in ScoreLines::new(&prepared.reward, BufReader::new(file), &name) {
        let scored = scored?;
        summary.add(&scored.score);
        if args.json {
            say(&serde_json::to_string(&scored)?)?;
            continue;
        }
        let components = scored.score.components.iter();
        let parts = components.map(|part| format!("{} {:.3}", part.name, part.value));
        let (line, total) = (scored.line, scored.score.total);
        let parts = parts.collect::<Vec<_>>().join("  ");
        say(&format!("line {line:<7} {total:>8.3}   {parts}"))?;
    }
    if args.json {
        return say(&serde_json::to_string(&summary)?);
    }
    let components = summary.components.iter();
    let parts = components.map(|part| format!("{} {:.3}", part.name, part.value));
    let parts = parts.collect::<Vec<_>>().join("  ");
    let lines = plural(summary.lines, "line");
    say(&format!("mean of {lines} {:.3}   {parts}", summary.total))
}
