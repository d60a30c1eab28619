//! What the runs of these tests start from: a configuration, its task and reward, and a starting policy that `muster warmup`
//! makes once per process, in a few seconds.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;

use muster_dispatch::prompts::{Prompt, PromptSource, Reference};
use muster_learner::trainer::announce::RunFile;
use muster_policy::ModelFolder;
use muster_protocol::credentials::Roster;
use muster_protocol::id::{ContentHash, PolicyVersion, TicketId};
use muster_protocol::message::descriptor::Descriptor;
use muster_protocol::message::group::FinishReason;
use muster_protocol::message::ticket::SamplingRules;
use muster_protocol::subject::Role;
use muster_rewards::{Answer, Prepared, Split};

use super::config::RunConfig;
use super::harness::{muster, succeed, text};

const SMALL: &str = include_str!("small.toml");

/// A configuration with its model, task and reward.
pub struct Start {
    pub model: ModelFolder,
    pub folder: PathBuf,
    pub prepared: Arc<Prepared>,
    /// Gold answers by prompt.
    golds: BTreeMap<String, String>,
}

/// The configuration of the small runs.
pub fn small() -> RunConfig {
    RunConfig::parse(SMALL, Path::new("tests/liars/small.toml")).unwrap()
}

/// The starting policy of the small runs, made once.
pub fn start() -> Arc<Start> {
    static START: OnceLock<Arc<Start>> = OnceLock::new();
    START
        .get_or_init(|| {
            let scratch = Path::new(env!("CARGO_TARGET_TMPDIR"));
            let folder = scratch.join(format!("liars-{}", std::process::id()));
            let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/liars/small.toml");
            let start = Start::warm_up(&small(), &config, &folder);
            std::fs::remove_dir_all(&folder).unwrap(); // the model is in memory
            Arc::new(start)
        })
        .clone()
}

impl Start {
    /// Makes the starting policy of the configuration in `file` with `muster warmup`.
    pub fn warm_up(config: &RunConfig, file: &Path, folder: &Path) -> Self {
        succeed(&mut muster(&["warmup", text(file), "--out", text(folder)]));
        Self::read(config, folder)
    }

    /// Reads an existing starting policy.
    pub fn read(config: &RunConfig, folder: &Path) -> Self {
        let prepared = config.rewards().prepare(Path::new(".")).unwrap();
        let items = prepared.task.items(Split::Train).iter();
        let golds = items.map(|item| (item.prompt.clone(), item.gold.clone()));
        Self {
            model: ModelFolder::read(folder).unwrap(),
            folder: folder.to_owned(),
            golds: golds.collect(),
            prepared: Arc::new(prepared),
        }
    }

    /// The files that travel with every version.
    pub fn files(&self, config: &RunConfig) -> Vec<RunFile> {
        let file = |name: &str, text: String| RunFile {
            name: name.to_owned(),
            bytes: Bytes::from(text),
        };
        let storage = config.model.storage.torch_name();
        vec![
            file("config.json", self.model.config.to_json(storage)),
            file("tokenizer.json", self.model.tokenizer.json().to_owned()),
        ]
    }

    pub fn describe(&self, config: &RunConfig, roster: &Roster) -> Descriptor {
        let files = self.files(config);
        let named = config.sampling.stop.iter();
        let named: Vec<u32> = named
            .map(|text| self.model.tokenizer.id(text).unwrap())
            .collect();
        let stop_ids = match named.is_empty() {
            true => self.model.config.eos_token_ids.clone(),
            false => named,
        };
        Descriptor {
            architecture: ContentHash::of(&files[0].bytes),
            tokenizer: ContentHash::of(&files[1].bytes),
            chat_template: None,
            task: ContentHash(self.prepared.task.digest()),
            rewards: config.rewards().canonical_json().unwrap(),
            sampling: SamplingRules {
                temperature: config.sampling.temperature,
                tokens_max: config.sampling.tokens_max.get(),
                stop_ids,
                stop_strings: config.sampling.stop_strings.clone(),
            },
            group_size: config.sampling.group_size.get(),
            async_level: config.run.async_level,
            same_class: config.dispatch.same_class,
            cross_class: config.dispatch.cross_class,
            vocabulary: self.model.config.vocab_size as u32,
            classes: config.dispatch.classes.clone(),
            learner: roster.first(Role::Trainer).unwrap().peer,
            dispatch: roster.first(Role::Dispatch).unwrap().peer,
            from_step: PolicyVersion(0),
            labels: BTreeMap::new(),
        }
    }

    /// The reward of an answer, computed from the reward functions and the task of the run alone.
    pub fn reward(&self, prompt: &[u32], completion: &[u32], finish: FinishReason) -> f32 {
        let prompt = self.model.tokenizer.decode(prompt).unwrap();
        let gold = &self.golds[&prompt];
        let answer = Answer {
            prompt: &prompt,
            text: &self.model.tokenizer.decode(completion).unwrap(),
            finished: finish == FinishReason::Stop,
            tokens: completion.len(),
        };
        self.prepared.reward.score(&answer, gold).unwrap().total as f32
    }
}

/// The training prompts in order.
impl PromptSource for Start {
    fn prompt(&self, ticket: TicketId) -> Prompt {
        let items = self.prepared.task.items(Split::Train);
        let item = (ticket.0 - 1) as usize % items.len();
        let tokens = self.model.tokenizer.encode_prompt(&items[item].prompt);
        Prompt {
            item: item as u64,
            tokens: tokens.unwrap(),
        }
    }

    fn reference(&self, item: u64) -> Option<Reference> {
        let item = self.prepared.task.item(Split::Train, item as usize)?;
        Some(Reference {
            prompt: item.prompt.clone(),
            gold: item.gold.clone(),
        })
    }
}
