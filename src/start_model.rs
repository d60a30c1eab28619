//! The policy that a run starts from: a folder that the configuration names, or a small one trained from scratch by
//! supervision on the task's demonstrations until it is sometimes right. Made once and kept.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use muster_policy::{
    AdamW, Architecture, Config, Device, Image, KernelSet, Master, ModelFolder, Policy, Storage,
    Tokenizer, TrainRow, supervised,
};
use muster_protocol::id::ContentHash;
use muster_rewards::{Item, Reward, Split, Task};

use crate::config::{RunConfig, WarmupSection};
use crate::evaluate::{Ends, Examination};
use crate::prompts::PromptForm;

/// Development prompts that a check answers: enough to tell 50 % from 55 %.
const CHECK_ITEMS: usize = 500;
/// Shards of a warm-up gradient: as many as the machine that it was tuned on had cores.
const SHARDS: NonZeroUsize = NonZeroUsize::MIN.saturating_add(1);
/// Second decay of the optimizer: supervision's gradients change slowly enough for a longer memory than RL's.
const BETA2: f32 = 0.95;

/// How a warm-up goes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Progress {
    /// Updates taken.
    pub updates: u64,
    /// Loss of the newest update, in nats per token.
    pub loss: f32,
    /// Greedy accuracy on the development split.
    pub accuracy: f64,
    /// Wall time so far.
    pub seconds: f64,
}

/// Where a warm-up of this configuration is kept, so that runs with equal starts share it.
///
/// # Errors
/// When the configuration cannot be written out.
pub fn kept_at(config: &RunConfig) -> Result<PathBuf> {
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

/// Trains a starting policy and writes it to `folder`. `tell` hears how it goes.
///
/// # Errors
/// When the task has no demonstrations, the accuracy is not reached, or the folder cannot be written.
pub fn warm_up(
    config: &RunConfig,
    task: &Task,
    reward: &Reward,
    folder: &Path,
    tell: &mut dyn FnMut(Progress),
) -> Result<ModelFolder> {
    let alphabet: String = task.alphabet().collect();
    let tokenizer = Tokenizer::characters(&alphabet)?;
    let model = decoder(&config.warmup, &tokenizer, config)?;
    let mut trainee = Trainee {
        rows: demonstrations(task, &tokenizer)?,
        random: StdRng::seed_from_u64(config.run.seed),
        master: Master::init(&model, config.run.seed)?,
        section: &config.warmup,
    };
    let exam = Examination {
        tokenizer: &tokenizer,
        form: PromptForm::Plain,
        reward,
        ends: Ends::of(
            &crate::descriptor::sampling_rules(config, &model, &tokenizer)?,
            &tokenizer,
        ),
    };
    let items = task.items(Split::Development);
    let items = &items[..items.len().min(CHECK_ITEMS)];
    let image = trainee.train(&exam, items, tell)?;
    let image = Image::from_values(
        trainee.master.layout(),
        &image.values(),
        config.model.storage,
    )?;
    let made = ModelFolder {
        config: model,
        image,
        tokenizer,
    };
    made.write(folder)?;
    Ok(made)
}

fn decoder(section: &WarmupSection, tokenizer: &Tokenizer, config: &RunConfig) -> Result<Config> {
    let mut model = Config {
        vocab_size: section.vocabulary.get(),
        hidden_size: section.hidden.get(),
        intermediate_size: section.intermediate.get(),
        num_hidden_layers: section.layers.get(),
        num_attention_heads: section.heads.get(),
        num_key_value_heads: section.kv_heads.get(),
        max_position_embeddings: section.positions.get(),
        tie_word_embeddings: true,
        eos_token_ids: tokenizer.eos().into_iter().collect(),
        pad_token_id: tokenizer.pad(),
        ..Architecture::Qwen2.defaults()
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

struct Trainee<'a> {
    rows: Vec<TrainRow>,
    random: StdRng,
    master: Master,
    section: &'a WarmupSection,
}

impl Trainee<'_> {
    fn train(
        &mut self,
        exam: &Examination<'_>,
        items: &[Item],
        tell: &mut dyn FnMut(Progress),
    ) -> Result<Image> {
        let start = Instant::now();
        let mut image = self.master.image(Storage::F32)?;
        for updates in 1..=self.section.updates_max {
            let loss = self.update(&image, updates)?;
            image = self.master.image(Storage::F32)?;
            if updates % self.section.check_every.get() != 0 {
                continue;
            }
            let policy = self.policy(&image)?;
            let accuracy = exam.run(&policy, items, 1, 0)?.accuracy;
            tell(Progress {
                updates,
                loss,
                accuracy,
                seconds: start.elapsed().as_secs_f64(),
            });
            if accuracy >= self.section.stop_accuracy {
                return Ok(image);
            }
        }
        bail!(
            "warm-up did not reach {} on the development split in {} updates: raise `warmup.updates_max` or lower \
             `warmup.stop_accuracy`",
            self.section.stop_accuracy,
            self.section.updates_max
        )
    }

    fn policy(&self, image: &Image) -> Result<Policy> {
        Ok(Policy::from_image(
            self.master.config(),
            image,
            KernelSet::Fused,
            &Device::Cpu,
        )?)
    }

    fn update(&mut self, image: &Image, number: u64) -> Result<f32> {
        let policy = self.policy(image)?;
        let count = self.rows.len();
        let batch: Vec<TrainRow> = (0..self.section.batch.get())
            .map(|_| self.rows[self.random.random_range(0..count)].clone())
            .collect();
        let found = supervised(&policy, &batch, SHARDS)?;
        let rise = (number as f32 / self.section.warmup_updates.max(1) as f32).min(1.0);
        let settings = AdamW {
            learning_rate: self.section.learning_rate * rise,
            beta2: BETA2,
            ..AdamW::default()
        };
        self.master.step(&found.pass.gradients, &settings)?;
        Ok(found.loss)
    }
}

/// The starting policy of a run: copied into `folder` once, from where the configuration says or from a warm-up that is
/// made when there is none.
///
/// # Errors
/// When it cannot be read, made or written.
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
        // Now, and not with the first prompt.
        model.tokenizer.chat_template()?;
    }
    model.write(folder)?;
    Ok(model)
}
