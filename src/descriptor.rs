//! Makes the run's descriptor, the rules that all machines of the run share, from its configuration and starting policy.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use bytes::Bytes;

use muster_learner::trainer::announce::RunFile;
use muster_policy::{Config, ModelFolder, Storage, Tokenizer};
use muster_protocol::credentials::Roster;
use muster_protocol::id::{ContentHash, PolicyVersion};
use muster_protocol::message::descriptor::Descriptor;
use muster_protocol::message::ticket::SamplingRules;
use muster_protocol::subject::Role;
use muster_rewards::Task;

use crate::config::RunConfig;

/// The file of the chat template.
pub const CHAT_FILE: &str = "chat_template.jinja";

/// Files that other libraries need to load a checkpoint. Those that the starting policy has are copied.
const OPTIONAL_FILES: [&str; 4] = [
    CHAT_FILE,
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
];

/// The files published with every version.
///
/// # Errors
/// A file cannot be read.
pub fn run_files(folder: &Path, model: &ModelFolder, storage: Storage) -> Result<Vec<RunFile>> {
    let file = |name: &str, bytes: Vec<u8>| RunFile {
        name: name.to_owned(),
        bytes: Bytes::from(bytes),
    };
    let config = model.config.to_json(storage.torch_name()).into_bytes();
    let tokenizer = model.tokenizer.json().as_bytes().to_vec();
    let mut files = vec![
        file("config.json", config),
        file("tokenizer.json", tokenizer),
    ];
    for name in OPTIONAL_FILES {
        let path = folder.join(name);
        if path.try_exists().unwrap_or(false) {
            let bytes = std::fs::read(&path)
                .with_context(|| format!("{} cannot be read", path.display()))?;
            files.push(file(name, bytes));
        }
    }
    Ok(files)
}

/// The token ids that end an answer: those of the configuration's stop texts, else the model's own.
///
/// # Errors
/// A stop text is not one token, or there is no stop token.
pub fn stop_ids(config: &RunConfig, model: &Config, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    let named = &config.sampling.stop;
    if named.is_empty() {
        if model.eos_token_ids.is_empty() && config.sampling.stop_strings.is_empty() {
            bail!(
                "the model names no end token: name one in `sampling.stop`, or a text in `sampling.stop_strings`"
            );
        }
        return Ok(model.eos_token_ids.clone());
    }
    let id = |text: &String| {
        let missing = || {
            format!(
                "`sampling.stop` names {text:?}, which is not a token of this model: use `sampling.stop_strings`"
            )
        };
        tokenizer.id(text).with_context(missing)
    };
    named.iter().map(id).collect()
}

/// The run's sampling rules.
///
/// # Errors
/// As [`stop_ids`], or an answer may be longer than the model's context.
pub fn sampling_rules(
    config: &RunConfig,
    model: &Config,
    tokenizer: &Tokenizer,
) -> Result<SamplingRules> {
    let tokens_max = config.sampling.tokens_max.get();
    if tokens_max as usize >= model.max_position_embeddings {
        let most = model.max_position_embeddings;
        bail!(
            "`sampling.tokens_max` is {tokens_max}, the model reads {most} tokens with the prompt: lower it"
        );
    }
    let stop_ids = stop_ids(config, model, tokenizer)?;
    Ok(SamplingRules {
        temperature: config.sampling.temperature,
        tokens_max,
        stop_ids,
        stop_strings: config.sampling.stop_strings.clone(),
    })
}

/// The descriptor of a run.
///
/// # Errors
/// The configuration does not fit the model.
pub fn describe(
    config: &RunConfig,
    model: &ModelFolder,
    files: &[RunFile],
    task: &Task,
    roster: &Roster,
) -> Result<Descriptor> {
    let hash = |name: &str| {
        let file = files.iter().find(|file| file.name == name);
        file.map(|file| ContentHash::of(&file.bytes))
            .with_context(|| format!("no {name}"))
    };
    let key = |role: Role| {
        let member = roster.first(role);
        member
            .map(|member| member.peer)
            .with_context(|| format!("the roster has no {role}"))
    };
    let labels = BTreeMap::from([
        ("run".to_owned(), config.run.name.to_string()),
        (
            "architecture".to_owned(),
            format!("{:?}", model.config.architecture),
        ),
    ]);
    Ok(Descriptor {
        architecture: hash("config.json")?,
        tokenizer: hash("tokenizer.json")?,
        // Without `model.chat` no prompt uses the template.
        chat_template: config.model.chat.then(|| hash(CHAT_FILE)).transpose()?,
        task: ContentHash(task.digest()),
        rewards: config.rewards().canonical_json()?,
        sampling: sampling_rules(config, &model.config, &model.tokenizer)?,
        group_size: config.sampling.group_size.get(),
        async_level: config.run.async_level,
        same_class: config.dispatch.same_class,
        cross_class: config.dispatch.cross_class,
        vocabulary: u32::try_from(model.config.vocab_size)
            .context("the vocabulary is too large")?,
        classes: config.dispatch.classes.clone(),
        learner: key(Role::Trainer)?,
        dispatch: key(Role::Dispatch)?,
        from_step: PolicyVersion(0),
        labels,
    })
}
