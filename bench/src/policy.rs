//! `muster-bench policy`: measures tokens per second of one model on this machine, in the functions of workers, critics and the
//! trainer (`generate`, `score`, `gradients`), beside the machine's roofline.
//!
//! Each figure is the median of rounds. A round makes each measurement once, so that a disturbance of the machine affects all of
//! them. Each row has its own prompt, since equal ones would be read once.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use serde::Serialize;

use muster_policy::{
    Device, EngineConfig, GenerationRequest, ModelFolder, Policy, Roofline, Sampling, ScoreRow,
    Threads, TokenCost, TrainRow, generate, gradients, score,
};

use crate::kernels::Kernels;
use crate::program;
use crate::shape::{Shape, Stored};
use crate::spread::Spread;
use muster_monitor::machine::{CpuTime, load_average, memory_available, peak_memory};
use muster_monitor::output::say;
use muster_monitor::text::percent;

/// Shortest measurement; short calls are repeated.
const SECONDS_MIN: f64 = 0.2;

/// Rows that are read, scored and trained together.
const ROWS: usize = 8;

/// Memory read to measure its bandwidth: several times the largest caches, unless the machine has little memory.
const SWEEP_BYTES: u64 = 1 << 30;

#[derive(Debug, Args)]
pub(super) struct PolicyArgs {
    /// A Hugging Face folder
    #[arg(long, value_name = "DIR", conflicts_with = "shape")]
    model: Option<PathBuf>,
    /// Shape of a model with random weights, if no model is named
    #[arg(long, value_enum, default_value = "quickstart")]
    shape: Shape,
    /// Type of that model's stored weights
    #[arg(long, value_enum, default_value = "bf16")]
    storage: Stored,
    /// Operations to measure; `int8` does not train
    #[arg(long, value_enum, default_value = "fused")]
    kernels: Kernels,
    /// Threads of inference, and shards of a training pass; all processors by default
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// Numbers of rows that decode together
    #[arg(
        long,
        value_name = "N,…",
        value_delimiter = ',',
        default_value = "1,8,32,64"
    )]
    batch: Vec<NonZeroUsize>,
    /// Tokens of each prompt; the default depends on the shape
    #[arg(long, value_name = "N")]
    prompt_tokens: Option<NonZeroUsize>,
    /// Tokens of each answer; the default depends on the shape
    #[arg(long, value_name = "N")]
    answer_tokens: Option<NonZeroUsize>,
    /// Measurements to make
    #[arg(
        long,
        value_name = "WHAT,…",
        value_delimiter = ',',
        default_value = "roofline,decode,prefill,score,train,first"
    )]
    measure: Vec<What>,
    /// Number of rounds; medians count
    #[arg(long, value_name = "N", default_value = "5")]
    rounds: NonZeroUsize,
    /// Print one JSON line
    #[arg(long)]
    json: bool,
    /// Folder of the models that the bench makes
    #[arg(long, value_name = "DIR", default_value = "runs/bench/models")]
    dir: PathBuf,
    /// The `muster` program to start; the one beside this program by default
    #[arg(long, value_name = "FILE")]
    muster: Option<PathBuf>,
    /// Only write that model
    #[arg(long)]
    write_only: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum What {
    /// The machine's memory bandwidth and matrix throughput
    Roofline,
    /// Decoding of answers
    Decode,
    /// Reading of prompts
    Prefill,
    /// Teacher-forced scores of finished answers
    Score,
    /// Forward and backward passes
    Train,
    /// Time from the start of `muster generate` to its first token
    First,
}

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    parameters: usize,
    threads: usize,
    prompt_tokens: usize,
    answer_tokens: usize,
    rounds: usize,
    /// Bytes of weights that inference reads for a token.
    weight_bytes: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    roofline: Option<Machine>,
    figures: Vec<Figure>,
    #[serde(skip_serializing_if = "Option::is_none")]
    first_token_seconds: Option<Spread>,
    /// Largest memory of the process until the end of inference.
    peak_bytes: Option<u64>,
    /// Largest memory of the process until the end of training.
    peak_bytes_trained: Option<u64>,
    load_average: Option<f64>,
    /// Share of the machine's time that a hypervisor gave to other machines.
    steal: Option<f64>,
}

#[derive(Debug, Clone, Copy, Serialize)]
struct Machine {
    read_bytes_per_second: f64,
    multiply_adds_per_second: f64,
}

#[derive(Debug, Serialize)]
struct Figure {
    name: &'static str,
    rows: usize,
    tokens_per_second: Spread,
    /// Share of the bandwidth that reading the weights once a step takes, at the median.
    #[serde(skip_serializing_if = "Option::is_none")]
    bandwidth_share: Option<f64>,
    /// Share of the matrix throughput that the products take, at the median.
    #[serde(skip_serializing_if = "Option::is_none")]
    matrix_share: Option<f64>,
}

pub(super) fn run(args: &PolicyArgs) -> Result<()> {
    let folder = match &args.model {
        Some(folder) => folder.clone(),
        None if args.write_only => {
            let folder = args.shape.folder(args.storage, &args.dir);
            if !folder.join("model.safetensors").try_exists()? {
                args.shape.write(args.storage, &folder)?;
            }
            folder
        }
        None => known(args.shape, args.storage, &args.dir)?,
    };
    if args.write_only {
        return say(&folder.display().to_string());
    }
    let bench = Bench::new(args, folder)?;
    let report = bench.measure()?;
    if args.json {
        return say(&serde_json::to_string(&report)?);
    }
    print(&report)
}

/// The folder of the shape's model, which another process writes if it is missing. The memory of writing it does not count as
/// this process's.
pub(super) fn known(shape: Shape, storage: Stored, models: &Path) -> Result<PathBuf> {
    let folder = shape.folder(storage, models);
    if folder.join("model.safetensors").try_exists()? {
        return Ok(folder);
    }
    let mut command = Command::new(program::own()?);
    command.args(["policy", "--write-only"]);
    for (flag, value) in [
        ("--shape", shape.to_possible_value()),
        ("--storage", storage.to_possible_value()),
    ] {
        let value = value.context("a choice of the command line has a name")?;
        command.arg(flag).arg(value.get_name());
    }
    command.arg("--dir").arg(models).stdout(Stdio::null());
    let status = command.status().context("this program cannot be started")?;
    if !status.success() {
        bail!("the model was not written: {status}");
    }
    Ok(folder)
}

/// A model under measurement.
struct Bench<'a> {
    args: &'a PolicyArgs,
    folder: PathBuf,
    policy: Policy,
    threads: Threads,
    prompt: usize,
    answer: usize,
}

/// The tokens per second of a measurement, by round.
struct Series {
    name: &'static str,
    rows: usize,
    rates: Vec<f64>,
}

impl<'a> Bench<'a> {
    fn new(args: &'a PolicyArgs, folder: PathBuf) -> Result<Self> {
        let threads = args.threads.map_or_else(Threads::all, Threads::new);
        let policy = Policy::load(&folder, args.kernels.set(), &Device::Cpu, &threads)
            .with_context(|| folder.display().to_string())?;
        // A named model has the lengths of the larger shape.
        let lengths = match args.model {
            Some(_) => Shape::Smol135m.lengths(),
            None => args.shape.lengths(),
        };
        let (prompt, answer) = (
            args.prompt_tokens.map_or(lengths.0, NonZeroUsize::get),
            args.answer_tokens.map_or(lengths.1, NonZeroUsize::get),
        );
        Ok(Self {
            args,
            folder,
            policy,
            threads,
            prompt,
            answer,
        })
    }

    fn wants(&self, what: What) -> bool {
        let possible = match self.args.kernels {
            Kernels::Fused => true,
            Kernels::Int8 => what != What::Train,
            // `muster generate` runs the fused kernels.
            Kernels::Candle => what != What::First,
        };
        possible && self.args.measure.contains(&what)
    }

    fn measure(&self) -> Result<Report> {
        let (load, before) = (load_average(), CpuTime::now());
        let (mut series, mut first) = (self.inference()?, Vec::new());
        if self.wants(What::First) {
            for _ in 0..self.args.rounds.get() {
                first.push(self.first_token()?);
            }
        }
        let peak_bytes = peak_memory();
        if self.wants(What::Train) {
            series.push(self.training()?);
        }
        let peak_bytes_trained = peak_memory().filter(|_| self.wants(What::Train));
        // Measured last, so that its memory is not part of the peaks.
        let roofline = self.wants(What::Roofline).then(|| self.machine());
        let cost = self.policy.token_cost();
        let figures = series.into_iter();
        Ok(Report {
            model: self.folder.display().to_string(),
            parameters: self.policy.layout().len(),
            threads: self.threads.count().get(),
            prompt_tokens: self.prompt,
            answer_tokens: self.answer,
            rounds: self.args.rounds.get(),
            weight_bytes: cost.weight_bytes,
            roofline,
            figures: figures
                .map(|series| series.figure(roofline, cost))
                .collect(),
            first_token_seconds: (!first.is_empty()).then(|| Spread::of(first)),
            peak_bytes,
            peak_bytes_trained,
            load_average: load,
            steal: before.and_then(|before| Some(CpuTime::now()?.steal_since(&before))),
        })
    }

    fn machine(&self) -> Machine {
        let sweep = memory_available().map_or(SWEEP_BYTES, |bytes| SWEEP_BYTES.min(bytes / 4));
        let found = Roofline::measure(&self.threads, sweep as usize);
        Machine {
            read_bytes_per_second: found.read_bytes_per_second,
            multiply_adds_per_second: found.multiply_adds_per_second,
        }
    }

    fn inference(&self) -> Result<Vec<Series>> {
        let batches = if self.wants(What::Decode) {
            &self.args.batch[..]
        } else {
            &[]
        };
        let mut decode: Vec<(Series, Series)> = batches
            .iter()
            .map(|batch| {
                (
                    Series::new("decode", batch.get()),
                    Series::new("rollout", batch.get()),
                )
            })
            .collect();
        let (mut prefill, mut scored) = (Series::new("prefill", ROWS), Series::new("score", ROWS));
        for _ in 0..self.args.rounds.get() {
            for (decode, rollout) in &mut decode {
                let rows = decode.rows;
                let prompts = self.generate(rows, 1)?;
                let whole = self.generate(rows, self.answer)?;
                let answers = (rows * self.answer.saturating_sub(1)) as f64;
                decode.rates.push(answers / (whole - prompts).max(1e-9));
                rollout.rates.push((rows * self.answer) as f64 / whole);
            }
            if self.wants(What::Prefill) {
                let seconds = self.generate(ROWS, 1)?;
                prefill.rates.push((ROWS * self.prompt) as f64 / seconds);
            }
            if self.wants(What::Score) {
                scored.rates.push(self.score()?);
            }
        }
        let decode = decode.into_iter().flat_map(<[Series; 2]>::from);
        let all = decode.chain([prefill, scored]);
        Ok(all.filter(|series| !series.rates.is_empty()).collect())
    }

    /// Tokens of the text of a row, none of them special.
    fn text(&self, row: usize, len: usize) -> Vec<u32> {
        let ids = self.policy.config().vocab_size.saturating_sub(3).max(1);
        let token = |place: usize| (row * 7_919 + place * 104_729) % ids;
        (0..len)
            .map(|place| (token(place) + self.policy.config().vocab_size.min(3)) as u32)
            .collect()
    }

    /// Seconds to answer `rows` prompts with `answer` tokens each.
    fn generate(&self, rows: usize, answer: usize) -> Result<f64> {
        let engine = EngineConfig {
            slots: NonZeroUsize::new(rows).context("no rows")?,
            ..EngineConfig::default()
        };
        let requests: Vec<GenerationRequest> = (0..rows)
            .map(|row| {
                let sampling = Sampling::Prescribed {
                    seed: [3; 32],
                    rollout: row as u32,
                    temperature: 1.0,
                };
                let prompt = self.text(row, self.prompt).into();
                GenerationRequest::new(prompt, answer, Arc::from([]), sampling)
            })
            .collect();
        seconds(|| {
            generate(&self.policy, &engine, requests.clone())?;
            Ok(())
        })
    }

    /// Tokens per second of prompts and scored answers.
    fn score(&self) -> Result<f64> {
        let texts: Vec<Vec<u32>> = (0..ROWS)
            .map(|row| self.text(row, self.prompt + self.answer))
            .collect();
        let rows: Vec<ScoreRow<'_>> = texts
            .iter()
            .map(|tokens| ScoreRow {
                tokens,
                first: self.prompt,
                temperature: 1.0,
            })
            .collect();
        let seconds = seconds(|| {
            score(&self.policy, &rows)?;
            Ok(())
        })?;
        Ok((ROWS * (self.prompt + self.answer)) as f64 / seconds)
    }

    fn training(&self) -> Result<Series> {
        let rows: Vec<TrainRow> = (0..ROWS)
            .map(|row| TrainRow {
                tokens: self.text(row, self.prompt + self.answer),
                targets: std::iter::once(self.prompt..self.prompt + self.answer).collect(),
            })
            .collect();
        // Loaded after inference, so that its memory is not part of inference's peak.
        let (config, image) = {
            let model = ModelFolder::read(&self.folder)?;
            (model.config, model.image)
        };
        let policy = Policy::from_image(&config, &image, self.args.kernels.set(), &Device::Cpu)?;
        let mut series = Series::new("train", ROWS);
        for _ in 0..self.args.rounds.get() {
            let seconds = seconds(|| {
                gradients(&policy, &rows, 1.0, self.threads.count(), &|_, found| {
                    vec![-1.0; found.len()]
                })?;
                Ok(())
            })?;
            series
                .rates
                .push((ROWS * (self.prompt + self.answer)) as f64 / seconds);
        }
        Ok(series)
    }

    /// Seconds of `muster generate` for one token, with the model's files in the system's cache.
    fn first_token(&self) -> Result<f64> {
        let mut command = Command::new(program::muster(self.args.muster.as_deref())?);
        command.arg("generate").arg("--model").arg(&self.folder);
        command.args(["--prompt", "1", "--max-tokens", "1", "--threads"]);
        command
            .arg(self.threads.count().to_string())
            .stdout(Stdio::null());
        if self.args.kernels == Kernels::Int8 {
            command.arg("--int8");
        }
        let start = Instant::now();
        let status = command.status().context("muster cannot be started")?;
        if !status.success() {
            bail!(
                "`muster generate` on {} failed: {status}",
                self.folder.display()
            );
        }
        Ok(start.elapsed().as_secs_f64())
    }
}

/// Mean seconds of one call.
fn seconds(mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    let (start, mut calls) = (Instant::now(), 0);
    loop {
        work()?;
        calls += 1;
        let elapsed = start.elapsed().as_secs_f64();
        if elapsed >= SECONDS_MIN {
            return Ok(elapsed / f64::from(calls));
        }
    }
}

impl Series {
    fn new(name: &'static str, rows: usize) -> Self {
        Self {
            name,
            rows,
            rates: Vec::new(),
        }
    }

    fn figure(self, machine: Option<Machine>, cost: TokenCost) -> Figure {
        let (name, rows) = (self.name, self.rows);
        let tokens_per_second = Spread::of(self.rates);
        let rate = tokens_per_second.median;
        let (bytes, work) = (cost.weight_bytes as f64, cost.multiply_adds as f64);
        // Only decoding reads all weights in each step and multiplies with all weights for each token.
        let machine = machine.filter(|_| name == "decode");
        Figure {
            name,
            rows,
            tokens_per_second,
            bandwidth_share: machine
                .map(|machine| rate / rows as f64 * bytes / machine.read_bytes_per_second),
            matrix_share: machine.map(|machine| rate * work / machine.multiply_adds_per_second),
        }
    }
}

fn print(report: &Report) -> Result<()> {
    say(&format!(
        "{}: {} parameters, {} threads, prompts of {} and answers of {} tokens, medians of {} rounds",
        report.model,
        report.parameters,
        report.threads,
        report.prompt_tokens,
        report.answer_tokens,
        report.rounds
    ))?;
    if let Some(machine) = report.roofline {
        say(&format!(
            "this machine reads {:.1} GB/s and does {:.0} billion multiply-adds a second",
            machine.read_bytes_per_second / 1e9,
            machine.multiply_adds_per_second / 1e9
        ))?;
    }
    say(&format!(
        "{:<9}{:>5}{:>12}{:>24}{:>11}{:>10}",
        "", "rows", "tokens/s", "smallest – largest", "bandwidth", "products"
    ))?;
    for figure in &report.figures {
        let Spread { median, min, max } = figure.tokens_per_second;
        let share = |share: Option<f64>| share.map_or_else(String::new, percent);
        say(&format!(
            "{:<9}{:>5}{median:>12.0}{:>24}{:>11}{:>10}",
            figure.name,
            figure.rows,
            format!("{min:.0} – {max:.0}"),
            share(figure.bandwidth_share),
            share(figure.matrix_share)
        ))?;
    }
    if let Some(Spread { median, min, max }) = report.first_token_seconds {
        say(&format!(
            "first token {median:.2} s after the start ({min:.2} – {max:.2})"
        ))?;
    }
    let mebibytes = |bytes: u64| bytes >> 20;
    if let Some(peak) = report.peak_bytes {
        let weights = mebibytes(report.weight_bytes as u64);
        let trained = report.peak_bytes_trained.map(mebibytes);
        let trained = trained.map_or_else(String::new, |peak| format!(", {peak} with training"));
        let peak = mebibytes(peak);
        say(&format!(
            "peak memory {peak} MiB{trained}; weights as inference reads them {weights} MiB"
        ))?;
    }
    let unknown = || "unknown".to_owned();
    let load = report
        .load_average
        .map_or_else(unknown, |load| format!("{load:.1}"));
    let steal = report.steal.map_or_else(unknown, percent);
    say(&format!("load average before {load}, stolen time {steal}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_of_one_step_for_bytes_and_of_every_row_for_products() {
        let series = Series {
            name: "decode",
            rows: 8,
            rates: vec![80.0],
        };
        let machine = Machine {
            read_bytes_per_second: 1000.0,
            multiply_adds_per_second: 1000.0,
        };
        let cost = TokenCost {
            weight_bytes: 50,
            multiply_adds: 5,
        };
        let figure = series.figure(Some(machine), cost);
        assert_eq!(figure.bandwidth_share, Some(0.5));
        assert_eq!(figure.matrix_share, Some(0.4));
    }
}
