//! A run's configuration: one TOML file. The run directory gets a copy with all defaults.
//!
//! Order: defaults, then the file, then flags. Unknown keys are refused. Rules between sections are in
//! [`RunConfig::validate`]; each section checks itself.

use std::num::{NonZeroU32, NonZeroU64, NonZeroUsize};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use muster_dispatch::audit::AuditConfig;
use muster_dispatch::conduct::ConductConfig;
use muster_dispatch::reviews::CritiqueConfig;
use muster_learner::advantage::AdvantageConfig;
use muster_learner::policy_stepper::TrainConfig;
use muster_learner::trainer::objects::BroadcastConfig;
use muster_policy::{Architecture, Config, KernelSet, Storage};
use muster_protocol::id::RunId;
use muster_protocol::limits::{STOP_STRING_BYTES_MAX, STOP_STRINGS_MAX};
use muster_protocol::message::descriptor::Thresholds;
use muster_protocol::message::lease::{NumericClass, class_names};
use muster_rewards::{Reward, RewardConfig, TaskConfig};

/// The configuration of the quickstart, so that `muster local` needs no file.
pub const QUICKSTART: &str = include_str!("../configs/quickstart.toml");

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("configuration {path} cannot be read: {source}; check the path")]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{path}:{line}: {problem}")]
    Malformed {
        path: PathBuf,
        line: usize,
        /// The fault and its remedy.
        problem: String,
    },
    /// A rule between sections is broken.
    #[error("{path}: {problem}")]
    Invalid {
        path: PathBuf,
        /// The fault and its remedy.
        problem: String,
    },
}

/// `[run]`: name, seed and length of the run.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RunSection {
    /// The run's name: a-z, 0-9 and `-`.
    pub name: RunId,
    /// Seed of the starting policy and of the order of prompts.
    pub seed: u64,
    /// Steps to take.
    pub steps: NonZeroU64,
    /// Largest staleness of a group, in steps; 0 waits for every version.
    pub async_level: u64,
}

impl Default for RunSection {
    fn default() -> Self {
        Self {
            name: "run"
                .parse()
                .unwrap_or_else(|_| unreachable!("`run` is a valid name")),
            seed: 1,
            steps: const { NonZeroU64::new(100).unwrap() },
            async_level: 2,
        }
    }
}

/// `[model]`: the model to train.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelSection {
    /// A Hugging Face folder to start from; without one, `[warmup]` makes the starting policy.
    pub path: Option<PathBuf>,
    /// Whether prompts are put into the model's chat template as a user's message. It belongs to the model and not to the task: a
    /// base model gets the same task as plain text. A template's date is the one written in it, so that prompts never change.
    pub chat: bool,
    /// Storage of the published weights.
    pub storage: Storage,
    /// Kernels of workers, critics and trainer.
    pub kernels: KernelSet,
    /// The trainer's device: `cpu` or `cuda:N`.
    pub device: String,
}

impl Default for ModelSection {
    fn default() -> Self {
        let (storage, kernels) = (Storage::Bf16, KernelSet::Fused);
        Self {
            path: None,
            chat: false,
            storage,
            kernels,
            device: "cpu".to_owned(),
        }
    }
}

/// `[warmup]`: a small policy from scratch, by supervision on the task's demonstrations.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WarmupSection {
    /// Width of the residual stream.
    pub hidden: NonZeroUsize,
    /// Width of the gated MLP.
    pub intermediate: NonZeroUsize,
    /// Layers.
    pub layers: NonZeroUsize,
    /// Attention heads.
    pub heads: NonZeroUsize,
    /// Key-value heads.
    pub kv_heads: NonZeroUsize,
    /// Rows of the embedding, at least the tokenizer's vocabulary.
    pub vocabulary: NonZeroUsize,
    /// Longest context, in tokens.
    pub positions: NonZeroUsize,
    /// Demonstrations per update.
    pub batch: NonZeroUsize,
    /// Learning rate after its rise.
    pub learning_rate: f32,
    /// Updates over which the learning rate rises linearly.
    pub warmup_updates: u64,
    /// Most updates.
    pub updates_max: u64,
    /// Updates between two measurements of the accuracy on the development split.
    pub check_every: NonZeroU64,
    /// Greedy accuracy on the development split at which warm-up stops: low enough to leave room, high enough that
    /// sampled groups are sometimes right.
    pub stop_accuracy: f64,
}

impl WarmupSection {
    /// The model that a warm-up trains, without its special tokens.
    pub fn shape(&self) -> Config {
        Config {
            vocab_size: self.vocabulary.get(),
            hidden_size: self.hidden.get(),
            intermediate_size: self.intermediate.get(),
            num_hidden_layers: self.layers.get(),
            num_attention_heads: self.heads.get(),
            num_key_value_heads: self.kv_heads.get(),
            max_position_embeddings: self.positions.get(),
            tie_word_embeddings: true,
            ..Architecture::Qwen2.defaults()
        }
    }
}

impl Default for WarmupSection {
    fn default() -> Self {
        let n = |value: usize| NonZeroUsize::MIN.saturating_add(value - 1);
        Self {
            hidden: n(96),
            intermediate: n(256),
            layers: n(3),
            heads: n(4),
            kv_heads: n(2),
            vocabulary: n(32),
            positions: n(128),
            batch: n(96),
            learning_rate: 2e-3,
            warmup_updates: 50,
            updates_max: 1_000,
            check_every: const { NonZeroU64::new(10).unwrap() },
            stop_accuracy: 0.55,
        }
    }
}

/// `[sampling]`: the sampling of groups.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SamplingSection {
    /// Rollouts per group, G.
    pub group_size: NonZeroU32,
    /// Sampling temperature, by which logits are divided.
    pub temperature: f32,
    /// Longest answer in tokens, the stop token included.
    pub tokens_max: NonZeroU32,
    /// Tokens that end an answer, as text; the model's own end tokens when empty.
    pub stop: Vec<String>,
    /// Texts that end an answer with the token that completes one of them, wherever tokens begin and end.
    pub stop_strings: Vec<String>,
    /// Not supported, and refused with the reason.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_k: Option<u32>,
    /// Not supported, and refused with the reason.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f32>,
}

impl Default for SamplingSection {
    fn default() -> Self {
        Self {
            group_size: const { NonZeroU32::new(8).unwrap() },
            temperature: 1.0,
            tokens_max: const { NonZeroU32::new(256).unwrap() },
            stop: Vec::new(),
            stop_strings: Vec::new(),
            top_k: None,
            top_p: None,
        }
    }
}

/// `[learner]`: batches and training.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LearnerSection {
    /// Groups per batch, B.
    pub batch_groups: NonZeroUsize,
    /// Steps between two checkpoints with full state.
    pub checkpoint_every: NonZeroU64,
    /// The computation of advantages.
    pub advantage: AdvantageConfig,
    /// Objective, schedule, optimizer, updates and shards.
    pub train: TrainConfig,
    /// Anchors and deltas.
    pub broadcast: BroadcastConfig,
}

impl Default for LearnerSection {
    fn default() -> Self {
        Self {
            batch_groups: const { NonZeroUsize::new(32).unwrap() },
            checkpoint_every: const { NonZeroU64::new(20).unwrap() },
            advantage: AdvantageConfig::default(),
            train: TrainConfig::default(),
            broadcast: BroadcastConfig::default(),
        }
    }
}

/// `[dispatch]`: tickets, leases, audits, verdicts.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DispatchSection {
    /// Longest life of an unanswered ticket, in milliseconds.
    pub ticket_ms: NonZeroU64,
    /// Longest time of a worker for a lease, in milliseconds.
    pub lease_ms: NonZeroU64,
    /// The choice of groups that critics check by a forward pass.
    pub audit: AuditConfig,
    /// The number of critics per group.
    pub critique: CritiqueConfig,
    /// The rules that pause members.
    pub conduct: ConductConfig,
    /// Names of workers that may change to newer weights within an answer. Name the lab's own workers only: a worker that chooses
    /// the moment of the change can choose among answers.
    pub in_flight: Vec<String>,
    /// Numeric classes whose answers the run accepts. Workers of class "int8-cpu" round weights to eight bits, so they sample from
    /// a policy that differs from the published one; the importance ratio corrects for it.
    pub classes: Vec<NumericClass>,
    /// Audit bounds if worker and critic have the same numeric class.
    pub same_class: Thresholds,
    /// Audit bounds if their classes differ.
    pub cross_class: Thresholds,
}

impl Default for DispatchSection {
    fn default() -> Self {
        Self {
            ticket_ms: const { NonZeroU64::new(300_000).unwrap() },
            lease_ms: const { NonZeroU64::new(30_000).unwrap() },
            audit: AuditConfig::default(),
            critique: CritiqueConfig::default(),
            conduct: ConductConfig::default(),
            in_flight: Vec::new(),
            classes: vec![NumericClass::F32Cpu, NumericClass::F32Cuda],
            same_class: Thresholds::SAME_CLASS,
            cross_class: Thresholds::CROSS_CLASS,
        }
    }
}

/// `[worker]`: limits of a worker.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WorkerSection {
    /// Most rollouts decoded together; a worker measures its speed and takes fewer if more would be late.
    pub rollouts_max: NonZeroU32,
}

impl Default for WorkerSection {
    fn default() -> Self {
        Self {
            rollouts_max: const { NonZeroU32::new(64).unwrap() },
        }
    }
}

/// `[critic]`: limits of a critic.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CriticSection {
    /// Most groups critiqued together.
    pub groups_max: NonZeroU32,
}

impl Default for CriticSection {
    fn default() -> Self {
        Self {
            groups_max: const { NonZeroU32::new(16).unwrap() },
        }
    }
}

/// `[eval]`: evaluations on the held-out set during a run.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvalSection {
    /// Versions between two evaluations; the last version is always evaluated.
    pub every: NonZeroU64,
    /// Held-out prompts; all of them when 0.
    pub samples: usize,
}

impl Default for EvalSection {
    fn default() -> Self {
        Self {
            every: const { NonZeroU64::new(10).unwrap() },
            samples: 0,
        }
    }
}

/// `[local]`: the members of a run on one machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LocalSection {
    /// Number of workers.
    pub workers: usize,
    /// Names of the workers that answer with weights rounded to eight bits ("worker-2"). Their class, "int8-cpu", must be
    /// among `dispatch.classes`.
    pub int8_workers: Vec<String>,
    /// Number of critics.
    pub critics: usize,
    /// Number of seeders, peers that only pass weights on.
    pub seeders: usize,
    /// The NATS server's port; 0 takes any free port.
    pub port: u16,
}

impl Default for LocalSection {
    fn default() -> Self {
        Self {
            workers: 2,
            int8_workers: Vec::new(),
            critics: 1,
            seeders: 0,
            port: 0,
        }
    }
}

/// A run's whole configuration.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    #[serde(default)]
    pub run: RunSection,
    #[serde(default)]
    pub model: ModelSection,
    #[serde(default)]
    pub warmup: WarmupSection,
    #[serde(default)]
    pub sampling: SamplingSection,
    #[serde(default)]
    pub learner: LearnerSection,
    #[serde(default)]
    pub dispatch: DispatchSection,
    #[serde(default)]
    pub worker: WorkerSection,
    #[serde(default)]
    pub critic: CriticSection,
    #[serde(default)]
    pub eval: EvalSection,
    #[serde(default)]
    pub local: LocalSection,
    pub task: TaskConfig,
    /// Scores answers; compiled and checked when the file is read.
    pub reward: Reward,
}

impl RunConfig {
    /// Sections besides `task` and `reward`.
    pub const SECTIONS: [&'static str; 10] = [
        "run", "model", "warmup", "sampling", "learner", "dispatch", "worker", "critic", "eval",
        "local",
    ];

    /// Reads a configuration file. Paths in it are relative to its folder.
    ///
    /// # Errors
    /// The file is missing or invalid; the error has the line and the remedy.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&text, path)
    }

    /// Reads the text of a configuration file.
    ///
    /// # Errors
    /// As [`RunConfig::load`].
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|error| {
            let offset = error.span().map_or(0, |span| span.start);
            let line = text.get(..offset).unwrap_or(text).matches('\n').count() + 1;
            let problem = error.message().replace('\n', " ");
            let path = path.to_owned();
            ConfigError::Malformed {
                path,
                line,
                problem: with_way_out(&problem),
            }
        })?;
        config.validate().map_err(|problem| ConfigError::Invalid {
            path: path.to_owned(),
            problem,
        })?;
        Ok(config)
    }

    /// The task with its reward; the compiled reward is shared.
    pub fn rewards(&self) -> RewardConfig {
        let (task, reward) = (self.task.clone(), self.reward.clone());
        RewardConfig { task, reward }
    }

    /// The configuration with every default written out.
    ///
    /// # Errors
    /// The configuration has a value that TOML cannot express; one that was read never has.
    pub fn to_toml(&self) -> Result<String, toml::ser::Error> {
        toml::to_string_pretty(self)
    }

    /// Makes its paths absolute, since they are relative to the file's folder and the run directory is elsewhere.
    ///
    /// # Errors
    /// The working directory is not known.
    pub fn resolve_paths(&mut self, base: &Path) -> std::io::Result<()> {
        let base = std::path::absolute(if base.as_os_str().is_empty() {
            Path::new(".")
        } else {
            base
        })?;
        if let Some(path) = &mut self.model.path {
            *path = base.join(&*path);
        }
        if let TaskConfig::Jsonl(jsonl) = &mut self.task {
            jsonl.file = base.join(&jsonl.file).display().to_string();
        }
        Ok(())
    }

    /// Checks the rules between sections.
    ///
    /// # Errors
    /// The first rule broken.
    pub fn validate(&self) -> Result<(), String> {
        let sampling = &self.sampling;
        if sampling.top_k.is_some() || sampling.top_p.is_some() {
            return Err("`sampling.top_k` and `sampling.top_p` are not supported: their masks make honest tokens \
                        impossible under another machine's rounding, so that critics would reject the honest; \
                        take them out and use `temperature` alone"
                .to_owned());
        }
        if !(sampling.temperature > 0.0 && sampling.temperature <= 10.0) {
            let found = sampling.temperature;
            return Err(format!(
                "`sampling.temperature` is {found}, choose one above 0 and at most 10"
            ));
        }
        let strings = &sampling.stop_strings;
        if let Some(string) = strings
            .iter()
            .find(|string| string.is_empty() || string.len() > STOP_STRING_BYTES_MAX)
        {
            return Err(format!(
                "`sampling.stop_strings` holds {string:?}, choose texts of 1 to {STOP_STRING_BYTES_MAX} bytes"
            ));
        }
        if strings.len() > STOP_STRINGS_MAX {
            let found = strings.len();
            return Err(format!(
                "`sampling.stop_strings` holds {found} texts, choose at most {STOP_STRINGS_MAX}"
            ));
        }
        if sampling.group_size.get() < 2 {
            return Err(
                "`sampling.group_size` is 1: a group of one has no advantage; choose 2 or more"
                    .to_owned(),
            );
        }
        if self.model.kernels == KernelSet::Int8 {
            return Err(
                "`model.kernels` is \"int8\", which does not train; choose \"fused\" or \"candle\""
                    .to_owned(),
            );
        }
        if self.model.chat && self.model.path.is_none() {
            return Err(
                "`model.chat` is set, but a policy from a warm-up has no chat template: name a model in `model.path`"
                    .to_owned(),
            );
        }
        if let Err(error) = self.learner.broadcast.validate() {
            return Err(format!("`learner.broadcast`: {error}"));
        }
        if self.run.async_level > 16 {
            let found = self.run.async_level;
            return Err(format!(
                "`run.async_level` is {found}, at most 16: older groups teach nothing"
            ));
        }
        self.learner
            .train
            .objective
            .validate()
            .map_err(|error| error.to_string())?;
        self.learner
            .train
            .schedule
            .validate()
            .map_err(|error| error.to_string())?;
        self.learner
            .advantage
            .validate()
            .map_err(|error| error.to_string())?;
        let classes = &self.dispatch.classes;
        if classes.is_empty() {
            return Err(
                "`dispatch.classes` is empty: nobody could answer; list \"f32-cpu\"".to_owned(),
            );
        }
        let doubled = |(at, class): (usize, &NumericClass)| classes[..at].contains(class);
        if classes.iter().enumerate().any(doubled) {
            let found = class_names(classes);
            return Err(format!(
                "`dispatch.classes` holds {found}: list each class once"
            ));
        }
        let audit = self.dispatch.audit.share_min;
        if !(0.0..=1.0).contains(&audit) {
            return Err(format!(
                "`dispatch.audit.share_min` is {audit}, choose a share from 0 to 1"
            ));
        }
        let verdicts = self.dispatch.critique.verdicts;
        if verdicts == 0 || verdicts > self.dispatch.critique.critics_max {
            let most = self.dispatch.critique.critics_max;
            return Err(format!(
                "`dispatch.critique.verdicts` is {verdicts}, choose 1 to `critics_max` = {most}"
            ));
        }
        Ok(())
    }

    /// Checks the rules for a run on one machine.
    ///
    /// # Errors
    /// The first rule broken.
    pub fn validate_local(&self) -> Result<(), String> {
        let audit = self.dispatch.audit.share_min;
        if self.local.workers == 0 {
            return Err("`local.workers` is 0: nobody would answer; choose 1 or more".to_owned());
        }
        self.validate_int8_workers()?;
        if self.local.critics == 0 && audit > 0.0 {
            return Err(format!(
                "`dispatch.audit.share_min` is {audit} but `local.critics` is 0: nobody could audit; \
                 set `local.critics` to 1 or more"
            ));
        }
        if self.local.critics == 0 {
            return Err(
                "`local.critics` is 0: nobody would compute rewards; choose 1 or more".to_owned(),
            );
        }
        if self.local.critics < self.dispatch.critique.verdicts as usize {
            let (critics, verdicts) = (self.local.critics, self.dispatch.critique.verdicts);
            return Err(format!(
                "`dispatch.critique.verdicts` is {verdicts} but `local.critics` is {critics}: no group could be \
                 settled; raise `local.critics`"
            ));
        }
        Ok(())
    }

    fn validate_int8_workers(&self) -> Result<(), String> {
        let named = &self.local.int8_workers;
        let workers = self.local.workers;
        let is_worker = |name: &String| (1..=workers).any(|n| *name == format!("worker-{n}"));
        if let Some(name) = named.iter().find(|name| !is_worker(name)) {
            return Err(format!(
                "`local.int8_workers` names {name:?}, the workers are worker-1 to worker-{workers}"
            ));
        }
        if !named.is_empty() && !self.dispatch.classes.contains(&NumericClass::Int8Cpu) {
            let found = class_names(&self.dispatch.classes);
            return Err(format!(
                "`local.int8_workers` names workers of class int8-cpu, but `dispatch.classes` lists {found}: add \
                 \"int8-cpu\""
            ));
        }
        Ok(())
    }
}

fn with_way_out(problem: &str) -> String {
    if problem.starts_with("unknown field") {
        format!("{problem}; correct the key or take it out")
    } else if problem.starts_with("missing field") {
        format!("{problem}; add it")
    } else {
        problem.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        RunConfig::parse(text, Path::new("x.toml"))
            .unwrap_err()
            .to_string()
    }

    const LEAST: &str =
        "[task]\ntype = \"running_sums\"\n[[reward]]\ntype = \"exact_match\"\nname = \"right\"\n";

    #[test]
    fn every_configuration_in_the_tree_is_valid_and_survives_being_written_out() {
        for entry in std::fs::read_dir("configs").unwrap() {
            let path = entry.unwrap().path();
            if path
                .extension()
                .is_some_and(|extension| extension == "toml")
            {
                let config = RunConfig::load(&path).unwrap();
                let text = config.to_toml().unwrap();
                RunConfig::parse(&text, &path).unwrap();
            }
        }
    }

    #[test]
    fn a_mistyped_key_is_named_with_its_line() {
        let found = error(&format!("[run]\nsetps = 3\n{LEAST}"));
        assert!(
            found.starts_with("x.toml:2: unknown field `setps`"),
            "{found}"
        );
        assert!(!found.contains('\n'));
    }

    #[test]
    fn a_missing_section_is_named() {
        let found = error("[run]\nsteps = 3\n");
        assert!(
            found.contains("missing field `task`") && found.ends_with("add it"),
            "{found}"
        );
    }

    #[test]
    fn top_p_is_refused_with_the_reason() {
        let found = error(&format!("[sampling]\ntop_p = 0.9\n{LEAST}"));
        assert!(found.contains("critics would reject the honest"), "{found}");
    }

    #[test]
    fn chat_prompts_need_a_model_with_a_template() {
        let found = error(&format!("[model]\nchat = true\n{LEAST}"));
        assert!(
            found.contains("`model.chat`") && found.contains("`model.path`"),
            "{found}"
        );
        let text = format!("[model]\nchat = true\npath = \"m\"\n{LEAST}");
        assert!(
            RunConfig::parse(&text, Path::new("x.toml"))
                .unwrap()
                .model
                .chat
        );
    }

    #[test]
    fn workers_in_int8_need_a_run_that_takes_their_class() {
        let local = |text: &str| {
            let text = format!("{text}\n{LEAST}");
            RunConfig::parse(&text, Path::new("x.toml"))
                .unwrap()
                .validate_local()
        };
        let named = "[local]\nint8_workers = [\"worker-2\"]";
        let found = local(named).unwrap_err();
        assert!(
            found.contains("lists f32-cpu, f32-cuda: add \"int8-cpu\""),
            "{found}"
        );
        let listed = "[dispatch]\nclasses = [\"f32-cpu\", \"int8-cpu\"]";
        assert_eq!(local(&format!("{named}\n{listed}")), Ok(()));
        let found = local(&format!("[local]\nint8_workers = [\"worker-3\"]\n{listed}"));
        assert!(found.unwrap_err().contains("worker-1 to worker-2"));
    }

    #[test]
    fn a_list_of_classes_that_is_empty_or_says_one_twice_is_refused() {
        let found = error(&format!("[dispatch]\nclasses = []\n{LEAST}"));
        assert!(found.contains("`dispatch.classes` is empty"), "{found}");
        let twice = "[\"int8-cpu\", \"int8-cpu\"]";
        let found = error(&format!("[dispatch]\nclasses = {twice}\n{LEAST}"));
        assert!(found.contains("list each class once"), "{found}");
        let found = error(&format!("[dispatch]\nclasses = [\"int4\"]\n{LEAST}"));
        assert!(
            found.contains("int4") && found.contains("int8-cpu"),
            "{found}"
        );
    }

    #[test]
    fn an_audit_rate_without_a_critic_is_refused() {
        let text = format!("[local]\ncritics = 0\n{LEAST}");
        let config = RunConfig::parse(&text, Path::new("x.toml")).unwrap();
        let found = config.validate_local().unwrap_err();
        assert!(
            found.contains("audit") && found.contains("local.critics"),
            "{found}"
        );
    }
}
