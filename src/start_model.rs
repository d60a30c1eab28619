//! The policy that a run starts from: a folder that the configuration names, or a small model that warm-up trains on the
//! task's demonstrations. A warm-up is made once and kept.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use muster_learner::warmup::{self, WarmupCheck, WarmupConfig};
use muster_policy::{Config, Image, Layout, ModelFolder, Tokenizer, TrainRow};
use muster_protocol::id::ContentHash;
use muster_rewards::{Reward, Split, Task};

use crate::config::RunConfig;
use crate::evaluate::{Ends, Examination};
use crate::prompts::PromptForm;

/// Most development prompts of a check: enough to tell 50 % from 55 %.
const CHECK_ITEMS: usize = 500;

/// A measurement of a warm-up, and the time since its start.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    pub check: WarmupCheck,
    pub elapsed: Duration,
}

/// The folder of this configuration's warm-up. Runs with equal starts share it.
fn kept_at(config: &RunConfig) -> Result<PathBuf> {
    let text = serde_json::to_string(&(
        &config.warmup,
        config.run.seed,
        &config.model.storage,
        config.rewards().canonical_json()?,
        &config.sampling.stop,
        config.sampling.tokens_max,
    ))?;
    let name = ContentHash::of(text.as_bytes()).short();
    Ok(Path::new("runs")
        .join(".warmup")
        .join(format!("{}-{name}", config.run.seed)))
}

/// Trains a starting policy and writes it to `folder`. `tell` receives each measurement of its accuracy.
///
/// # Errors
/// The task has no demonstrations, the accuracy is not reached, or the folder cannot be written.
pub fn warm_up(
    config: &RunConfig,
    task: &Task,
    reward: &Reward,
    folder: &Path,
    tell: &mut dyn FnMut(Progress),
) -> Result<ModelFolder> {
    let alphabet: String = task.alphabet().collect();
    let tokenizer = Tokenizer::characters(&alphabet)?;
    let model = decoder(config, &tokenizer)?;
    let rules = crate::descriptor::sampling_rules(config, &model, &tokenizer)?;
    let exam = Examination {
        tokenizer: &tokenizer,
        form: PromptForm::Plain,
        reward,
        ends: Ends::of(&rules, &tokenizer),
    };
    let items = task.items(Split::Development);
    let items = &items[..items.len().min(CHECK_ITEMS)];
    let (rows, start) = (demonstrations(task, &tokenizer)?, Instant::now());
    let image = warmup::warm_up(
        &settings(config),
        &model,
        &rows,
        |policy| Ok(exam.run(policy, items, 1, 0)?.accuracy),
        |check| {
            tell(Progress {
                check,
                elapsed: start.elapsed(),
            });
        },
    )?;
    let image = Image::from_values(&Layout::new(&model), &image.values(), config.model.storage)?;
    let made = ModelFolder {
        config: model,
        image,
        tokenizer,
    };
    made.write(folder)?;
    Ok(made)
}

fn settings(config: &RunConfig) -> WarmupConfig {
    let section = &config.warmup;
    WarmupConfig {
        seed: config.run.seed,
        batch: section.batch,
        learning_rate: section.learning_rate,
        rise_updates: section.warmup_updates,
        updates_max: section.updates_max,
        check_every: section.check_every,
        stop_accuracy: section.stop_accuracy,
    }
}

fn decoder(config: &RunConfig, tokenizer: &Tokenizer) -> Result<Config> {
    let mut model = Config {
        eos_token_ids: tokenizer.eos().into_iter().collect(),
        pad_token_id: tokenizer.pad(),
        ..config.warmup.shape()
    };
    model.eos_token_ids = crate::descriptor::stop_ids(config, &model, tokenizer)?;
    model.validate()?;
    tokenizer.check(&model)?;
    Ok(model)
}

fn demonstrations(task: &Task, tokenizer: &Tokenizer) -> Result<Vec<TrainRow>> {
    let mut rows = Vec::with_capacity(task.len(Split::Train));
    for item in task.items(Split::Train) {
        let Some(answer) = &item.demonstration else {
            bail!(
                "the task has no demonstrations to warm up on: name a model in `model.path`, or add a demonstration \
                 column to the task's file"
            );
        };
        let mut tokens = tokenizer.encode_prompt(&item.prompt)?;
        let first = tokens.len();
        tokens.extend(tokenizer.encode(answer)?);
        let end = tokens.len();
        rows.push(TrainRow {
            tokens,
            targets: std::iter::once(first..end).collect(),
        });
    }
    Ok(rows)
}

/// Reads the run's starting policy from `folder`. If `folder` has none, copies it there from the folder that the configuration
/// names, or from a warm-up, which is trained first if it is missing.
///
/// # Errors
/// The policy cannot be read, trained or written.
pub fn prepare(
    config: &RunConfig,
    task: &Task,
    reward: &Reward,
    folder: &Path,
    tell: &mut dyn FnMut(Progress),
) -> Result<ModelFolder> {
    if folder
        .join("model.safetensors")
        .try_exists()
        .unwrap_or(false)
    {
        return Ok(ModelFolder::read(folder)?);
    }
    let from = match &config.model.path {
        Some(path) => path.clone(),
        None => {
            let kept = kept_at(config)?;
            if !kept.join("model.safetensors").try_exists().unwrap_or(false) {
                warm_up(config, task, reward, &kept, tell)?;
            }
            kept
        }
    };
    let model = ModelFolder::read(&from)
        .with_context(|| format!("the starting policy in {} cannot be used", from.display()))?;
    if config.model.chat {
        // A missing template fails here and not at the first prompt.
        model.tokenizer.chat_template()?;
    }
    model.write(folder)?;
    Ok(model)
}
