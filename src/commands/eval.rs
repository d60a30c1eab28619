//! `muster eval`: measures accuracy on the held-out set, of a model folder or of a run's versions as they are announced.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use clap::Args;

use muster_broadcaster::follower::Follow;
use muster_policy::{
    Config, Device, Image, KernelSet, Layout, ModelFolder, Policy, RunningModel, Storage, Threads,
    Tokenizer,
};
use muster_protocol::id::PolicyVersion;
use muster_protocol::message::control::Phase;
use muster_protocol::record::{EvalLine, JsonLines};
use muster_protocol::subject::Role;
use muster_rewards::{Split, Task};

use crate::config::RunConfig;
use crate::descriptor::sampling_rules;
use crate::evaluate::{Ends, Examination, Outcome};
use crate::member::Member;
use crate::prompts::PromptForm;
use crate::run_dir::RunDir;

/// Interval between checks whether the run is over.
const LOOK_EVERY: Duration = Duration::from_millis(500);

#[derive(Debug, Args)]
pub struct EvalArgs {
    /// A configuration with the task and the reward
    config: Option<PathBuf>,
    /// The model folder to evaluate
    #[arg(long, value_name = "DIR", conflicts_with = "follow")]
    model: Option<PathBuf>,
    /// Answers per prompt: 1 is greedy, more are drawn at temperature 1
    #[arg(long, default_value = "1", value_name = "N")]
    samples: std::num::NonZeroUsize,
    /// Print one JSON line
    #[arg(long)]
    json: bool,
    /// Evaluate a run's versions as they are announced, and append to its eval.jsonl
    #[arg(long, requires = "run", requires = "creds")]
    follow: bool,
    /// The run directory
    #[arg(long, value_name = "DIR")]
    run: Option<PathBuf>,
    /// Address of the NATS server, instead of the one in the credentials
    #[arg(long, value_name = "URL", requires = "follow")]
    nats: Option<String>,
    /// An evaluator's credentials
    #[arg(long, value_name = "FILE")]
    creds: Option<PathBuf>,
}

pub async fn run(args: EvalArgs) -> Result<()> {
    match (&args.run, &args.creds, &args.model) {
        (Some(run), Some(creds), None) if args.follow => {
            follow(run, creds, args.nats.as_deref()).await
        }
        (None, None, Some(model)) => folder(&args, model),
        _ => bail!(
            "name a model folder with --model and a configuration, or a run with --follow --run --creds"
        ),
    }
}

fn folder(args: &EvalArgs, folder: &Path) -> Result<()> {
    let path = args
        .config
        .as_ref()
        .context("name the configuration that holds the task: muster eval CONFIG --model DIR")?;
    let config = RunConfig::load(path)?;
    let base = path.parent().unwrap_or_else(|| ".".as_ref());
    let prepared = config.rewards().prepare(base)?;
    let (kernels, threads) = (config.model.kernels, Threads::one());
    let model = RunningModel::read(folder, kernels, &Device::Cpu, &threads)?;
    let exam = Examination {
        tokenizer: &model.tokenizer,
        form: PromptForm::of(&config),
        reward: &prepared.reward,
        ends: Ends::of(
            &sampling_rules(&config, model.policy.config(), &model.tokenizer)?,
            &model.tokenizer,
        ),
    };
    let items = prepared.task.items(Split::HeldOut);
    let outcome = exam.run(&model.policy, items, args.samples.get(), config.run.seed)?;
    print(&outcome, args.json);
    Ok(())
}

#[allow(clippy::print_stdout)]
fn print(outcome: &Outcome, json: bool) {
    let Outcome {
        accuracy,
        samples,
        seconds,
        reward,
    } = outcome;
    if json {
        let line =
            serde_json::json!({"accuracy": accuracy, "samples": samples, "seconds": seconds});
        println!("{line}");
    } else {
        println!(
            "accuracy {:.1} % (mean reward {reward:.3}) on {samples} answers in {seconds:.1} s",
            100.0 * accuracy
        );
    }
}

/// Evaluates version 0, every `eval.every`-th version after it, and the last.
async fn follow(run: &Path, creds: &Path, nats: Option<&str>) -> Result<()> {
    let dir = RunDir::at(run);
    let config = dir.load_config()?;
    let prepared = config.rewards().prepare(dir.root())?;
    let member = Member::join(creds, Role::Evaluator, nats, Default::default()).await?;
    let joined = async {
        let (model, tokenizer, _) = member.model().await?;
        let descriptor = member.client.descriptor().await?;
        let ends = Ends::of(&descriptor.body.sampling, &tokenizer);
        Ok::<_, anyhow::Error>((model, tokenizer, ends))
    };
    let (model, tokenizer, ends) = tokio::select! {
        joined = joined => joined?,
        () = member.shutdown.cancelled() => return Ok(()),
    };
    let mut follower = member.follow(Follow::Every).await?;
    let lines = JsonLines::<EvalLine>::open(&dir.root().join("eval.jsonl"), |_| true)?;
    let mut evaluator = Evaluator {
        done: evaluated(dir.root())?,
        every: config.eval.every.get(),
        steps: config.run.steps.get(),
        samples: config.eval.samples,
        lines,
        model,
        tokenizer,
        form: PromptForm::of(&config),
        task: prepared.task,
        reward: prepared.reward,
        ends,
    };
    // Version 0 is read from the run directory: dispatch may have forgotten it.
    if evaluator.is_due(PolicyVersion(0)) {
        let image = starting_image(&dir, config.model.storage)?;
        evaluator = evaluator.on_version(PolicyVersion(0), image).await?;
    }
    loop {
        tokio::select! {
            biased;
            () = member.shutdown.cancelled() => break,
            () = follower.changed() => { follower.latest(); }
            () = tokio::time::sleep(LOOK_EVERY) => {
                let finished = matches!(member.client.control().await, Ok(state) if state.phase == Phase::Finished);
                if finished && evaluator.done.contains(&evaluator.steps) {
                    break;
                }
            }
        }
        while let Some(held) = follower.take_next() {
            let version = held.version.body.version;
            evaluator = evaluator.on_version(version, held.image.clone()).await?;
        }
    }
    member.leave().await;
    Ok(())
}

/// The weights of version 0, as the trainer publishes them.
fn starting_image(dir: &RunDir, storage: Storage) -> Result<Bytes> {
    let model = ModelFolder::read(&dir.model())?;
    let layout = Layout::new(&model.config);
    let image = Image::from_values(&layout, &model.image.values(), storage)?;
    Ok(Bytes::from_owner(image.shared_bytes()))
}

fn evaluated(dir: &Path) -> Result<std::collections::BTreeSet<u64>> {
    let lines = muster_protocol::record::read_all::<EvalLine>(&dir.join("eval.jsonl"))?;
    Ok(lines
        .into_iter()
        .map(|line| line.policy_version.0)
        .collect())
}

struct Evaluator {
    done: std::collections::BTreeSet<u64>,
    every: u64,
    steps: u64,
    samples: usize,
    lines: JsonLines<EvalLine>,
    model: Config,
    tokenizer: Tokenizer,
    form: PromptForm,
    task: Task,
    reward: muster_rewards::Reward,
    ends: Ends,
}

impl Evaluator {
    fn is_due(&self, version: PolicyVersion) -> bool {
        let number = version.0;
        !self.done.contains(&number) && (number.is_multiple_of(self.every) || number >= self.steps)
    }

    /// Evaluates a version on a blocking thread, if it is due.
    async fn on_version(self, version: PolicyVersion, image: Bytes) -> Result<Self> {
        if !self.is_due(version) {
            return Ok(self);
        }
        let evaluated = tokio::task::spawn_blocking(move || {
            let outcome = self.examine(&image);
            (self, outcome)
        });
        let (mut evaluator, outcome) = evaluated.await.context("the evaluation ended early")?;
        let Outcome {
            accuracy,
            samples,
            seconds,
            ..
        } = outcome?;
        evaluator.lines.append(&EvalLine {
            policy_version: version,
            accuracy,
            samples,
            seconds,
        })?;
        evaluator.done.insert(version.0);
        tracing::info!(%version, accuracy = format!("{accuracy:.4}"), "evaluated");
        Ok(evaluator)
    }

    fn examine(&self, image: &[u8]) -> Result<Outcome> {
        let (config, threads) = (&self.model, Threads::one());
        let policy =
            Policy::for_inference(config, image, KernelSet::Fused, &Device::Cpu, &threads)?;
        let exam = Examination {
            tokenizer: &self.tokenizer,
            form: self.form,
            reward: &self.reward,
            ends: self.ends.clone(),
        };
        let items = self.task.items(Split::HeldOut);
        let count = if self.samples == 0 {
            items.len()
        } else {
            self.samples.min(items.len())
        };
        exam.run(&policy, &items[..count], 1, 0)
    }
}
