//! `muster-bench codec`: measures the size of deltas and the speed of making and applying them, beside alternatives, on synthetic
//! training and on the versions of a real run. [`race`] measures, [`training`] makes synthetic versions.

mod pulse;
mod race;
mod squash;
mod training;

use std::num::{NonZeroU64, NonZeroUsize};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde::Serialize;

use self::race::{Outcome, race};
use self::training::{TENSOR_WEIGHTS, Training, pairs};
use muster_monitor::machine::load_average;
use muster_monitor::output::say;
use muster_monitor::text::short;

/// Steps whose deltas are measured: the first, one after warm-up, and one late in training.
const STEPS: [u32; 3] = [1, 8, 16];
/// The step that bars apply to; every weight has changed by then.
const JUDGED_STEP: u32 = 8;
/// Learning rates and autocorrelations of gradients, each with the least ratio of file size to delta size.
const TRAININGS: [(f32, f32, Option<f64>); 4] = [
    (1e-6, 0.0, Some(250.0)),
    (1e-6, 0.9, Some(90.0)),
    (1e-5, 0.0, None),
    (1e-4, 0.0, None),
];
/// Least ratio of the PULSE-style patch's size to the delta's for uncorrelated updates.
const PULSE_RATIO: f64 = 3.3;
/// Least speeds for them, in GB/s and as a share of memcpy.
const ENCODE: (f64, f64) = (1.0, 0.25);
const APPLY: (f64, f64) = (1.5, 0.35);
/// Most bytes that a tensor's delta may exceed the tensor by.
const TENSOR_OVERHEAD: u64 = 64;
/// Most versions of a run that are measured, the newest ones.
const VERSIONS_MAX: usize = 64;

#[derive(Debug, Args)]
pub(super) struct CodecArgs {
    /// Number of weights of the synthetic model, rounded up to tensors of 4 Mi
    #[arg(long, value_name = "N", default_value = "67108864")]
    elements: NonZeroU64,
    /// Measure a real run's versions instead: a folder of numbered safetensors files or checkpoint folders
    #[arg(long, value_name = "DIR")]
    versions: Option<PathBuf>,
    /// Timings of each; the median counts
    #[arg(long, value_name = "N", default_value = "3")]
    rounds: NonZeroUsize,
    /// Only compare the size of deltas over several versions with that of single steps
    #[arg(long)]
    squash: bool,
    /// Print JSON lines
    #[arg(long)]
    json: bool,
}

/// A measured pair of versions.
#[derive(Debug, Serialize)]
struct Row {
    what: String,
    load_average: Option<f64>,
    #[serde(flatten)]
    outcome: Outcome,
}

pub(super) fn run(args: &CodecArgs) -> Result<()> {
    let threads = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    if args.squash {
        return squashed(args, threads);
    }
    if !args.json {
        say(&format!(
            "{threads} threads, median of {} rounds; sizes against the full file, speeds in GB of weights per second",
            args.rounds
        ))?;
        say(&header())?;
    }
    match &args.versions {
        Some(folder) => real(args, folder, threads),
        None => synthetic(args, threads),
    }
}

fn squashed(args: &CodecArgs, threads: NonZeroUsize) -> Result<()> {
    if let Some(folder) = &args.versions {
        return squash::real(&versions_in(folder)?, threads, args.json);
    }
    let trainings = TRAININGS.into_iter().map(|(lr, autocorrelation, _)| {
        let training = Training {
            lr,
            autocorrelation,
        };
        (format!("lr {lr:e} rho {autocorrelation}"), training)
    });
    squash::synthetic(trainings, threads, args.json)
}

fn synthetic(args: &CodecArgs, threads: NonZeroUsize) -> Result<()> {
    let tensors = usize::try_from(args.elements.get()).context("too many elements")?;
    let tensors = tensors.div_ceil(TENSOR_WEIGHTS);
    let mut missed = Vec::new();
    for (lr, autocorrelation, least) in TRAININGS {
        let training = Training {
            lr,
            autocorrelation,
        };
        for pair in pairs(training, tensors, &STEPS, threads.get()) {
            let what = format!("lr {lr:e} rho {autocorrelation} step {}", pair.step);
            let outcome = race(&pair.parent, &pair.child, args.rounds.get(), threads)?;
            if pair.step == JUDGED_STEP {
                missed.extend(
                    bars_missed(&outcome, least, autocorrelation == 0.0)
                        .map(|bar| format!("{what}: {bar}")),
                );
            }
            missed.extend(overhead_missed(&outcome).map(|bar| format!("{what}: {bar}")));
            tell(args, what, outcome)?;
        }
    }
    if missed.is_empty() {
        return Ok(());
    }
    bail!("missed: {}", missed.join("; "))
}

fn real(args: &CodecArgs, folder: &Path, threads: NonZeroUsize) -> Result<()> {
    let versions = versions_in(folder)?;
    if versions.len() < 2 {
        bail!(
            "{} holds {} versions, two or more are needed: name a folder with files like 12.safetensors, or with \
             folders like 12/model.safetensors",
            folder.display(),
            versions.len()
        );
    }
    for pair in versions.windows(2) {
        let [(from, parent), (to, child)] = pair else {
            continue;
        };
        let read = |path: &Path| {
            std::fs::read(path).with_context(|| format!("{} cannot be read", path.display()))
        };
        let outcome = race(&read(parent)?, &read(child)?, args.rounds.get(), threads)?;
        tell(args, format!("version {from} to {to}"), outcome)?;
    }
    Ok(())
}

/// The newest versions in a folder, in order.
fn versions_in(folder: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let unreadable = || format!("{} cannot be read", folder.display());
    let mut versions = Vec::new();
    for entry in folder.read_dir().with_context(unreadable)? {
        let path = entry.with_context(unreadable)?.path();
        let number = path
            .file_stem()
            .and_then(|stem| stem.to_str()?.parse().ok());
        let weights = if path.is_dir() {
            path.join(muster_broadcaster::snapshot::WEIGHTS_FILE)
        } else {
            path
        };
        let is_weights = weights
            .extension()
            .is_some_and(|extension| extension == "safetensors");
        if let Some(number) = number.filter(|_| is_weights && weights.is_file()) {
            versions.push((number, weights));
        }
    }
    versions.sort();
    let skipped = versions.len().saturating_sub(VERSIONS_MAX);
    Ok(versions.split_off(skipped))
}

fn ratio(full: u64, bytes: u64) -> f64 {
    full as f64 / bytes.max(1) as f64
}

/// The bars that an outcome misses.
fn bars_missed(
    outcome: &Outcome,
    least: Option<f64>,
    is_uncorrelated: bool,
) -> impl Iterator<Item = String> {
    let mut missed = Vec::new();
    let mut at_least = |name: &str, found: f64, bar: f64| {
        if found < bar {
            missed.push(format!("{name} {found:.2}, at least {bar}"));
        }
    };
    if let Some(least) = least {
        at_least(
            "times smaller than full",
            ratio(outcome.full_bytes, outcome.ours.bytes),
            least,
        );
        if is_uncorrelated {
            at_least(
                "times smaller than PULSE",
                ratio(outcome.pulse_bytes(), outcome.ours.bytes),
                PULSE_RATIO,
            );
            at_least("encode GB/s", outcome.ours.encode, ENCODE.0);
            at_least(
                "encode as a share of memcpy",
                outcome.ours.encode / outcome.memcpy,
                ENCODE.1,
            );
            at_least("apply GB/s", outcome.ours.apply, APPLY.0);
            at_least(
                "apply as a share of memcpy",
                outcome.ours.apply / outcome.memcpy,
                APPLY.1,
            );
        }
    }
    missed.into_iter()
}

fn overhead_missed(outcome: &Outcome) -> Option<String> {
    let limit = outcome.full_bytes + TENSOR_OVERHEAD * outcome.tensors as u64;
    let bytes = outcome.ours.bytes;
    (bytes > limit).then(|| format!("{bytes} bytes, at most {limit}"))
}

fn header() -> String {
    format!(
        "{:<26} {:>8} {:>8} {:>7} {:>7} {:>7} {:>6}  {:>13} {:>13} {:>13} {:>12} {:>5}",
        "pair",
        "changed",
        "bytes",
        "ours",
        "pulse",
        "planes",
        "/pulse",
        "ours enc/app",
        "pulse enc/app",
        "planes enc/app",
        "memcpy 1/all",
        "load"
    )
}

fn tell(args: &CodecArgs, what: String, outcome: Outcome) -> Result<()> {
    let load_average = load_average();
    if args.json {
        let row = Row {
            what,
            load_average,
            outcome,
        };
        return say(&serde_json::to_string(&row)?);
    }
    let full = outcome.full_bytes;
    let times = |bytes| format!("{:.1}x", ratio(full, bytes));
    let speeds = |first: f64, second: f64| format!("{first:.2}/{second:.2}");
    say(&format!(
        "{what:<26} {:>7.3}% {:>8} {:>7} {:>7} {:>7} {:>6}  {:>13} {:>13} {:>13} {:>12} {:>5.1}",
        outcome.changed * 100.0,
        short(outcome.ours.bytes as f64),
        times(outcome.ours.bytes),
        times(outcome.pulse_bytes()),
        times(outcome.planes.bytes),
        format!("{:.2}x", ratio(outcome.pulse_bytes(), outcome.ours.bytes)),
        speeds(outcome.ours.encode, outcome.ours.apply),
        speeds(outcome.pulse.encode, outcome.pulse.apply),
        speeds(outcome.planes.encode, outcome.planes.apply),
        speeds(outcome.memcpy, outcome.memcpy_all),
        load_average.unwrap_or(f64::NAN),
    ))
}
