//! `muster logprobs`: the log-probabilities that a model gives to tokens, for comparison with other implementations.

use std::fs::File;
use std::io::{BufRead, BufReader, Read as _};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde::{Deserialize, Serialize};

use muster_policy::{Config, Device, KernelSet, Policy, ScoreRow, Threads, logprobs};

use muster_monitor::output::say;

/// Longest line read: a million tokens of seven digits.
const LINE_BYTES_MAX: u64 = 8 << 20;
/// Lines scored together.
const ROWS_AT_ONCE: usize = 64;

#[derive(Debug, Args)]
pub struct LogprobsArgs {
    /// A Hugging Face folder
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// File of lines {"tokens": [ids]}. Each gives a line {"logprobs": […]}, in nats, at temperature 1, without the first token
    #[arg(long, value_name = "FILE")]
    tokens: PathBuf,
}

#[derive(Debug, Deserialize)]
struct Line {
    tokens: Vec<u32>,
}

#[derive(Debug, Serialize)]
struct Scored {
    logprobs: Vec<f32>,
}

/// Scores a file line by line; a bad line ends it after all lines before are printed.
pub fn run(args: &LogprobsArgs) -> Result<()> {
    let policy = Policy::load(&args.model, KernelSet::Fused, &Device::Cpu, &Threads::one())
        .with_context(|| args.model.display().to_string())?;
    let name = args.tokens.display().to_string();
    let file = File::open(&args.tokens)
        .with_context(|| format!("{name} cannot be read: give a file of JSON lines"))?;
    let mut rows = Rows {
        reader: BufReader::new(file),
        name,
        line: 0,
        config: policy.config(),
    };
    loop {
        let mut batch = Vec::with_capacity(ROWS_AT_ONCE);
        let mut ended = Ok(false);
        while batch.len() < ROWS_AT_ONCE && matches!(ended, Ok(false)) {
            match rows.next() {
                Ok(Some(tokens)) => batch.push(tokens),
                Ok(None) => ended = Ok(true),
                Err(error) => ended = Err(error),
            }
        }
        print(&policy, &batch)?;
        if ended? {
            return Ok(());
        }
    }
}

fn print(policy: &Policy, batch: &[Vec<u32>]) -> Result<()> {
    let rows: Vec<ScoreRow<'_>> = batch
        .iter()
        .map(|tokens| ScoreRow {
            tokens,
            first: 1,
            temperature: 1.0,
        })
        .collect();
    for logprobs in logprobs(policy, &rows)? {
        say(&serde_json::to_string(&Scored { logprobs })?)?;
    }
    Ok(())
}

/// The lines of an untrusted file.
struct Rows<'a, R> {
    reader: R,
    name: String,
    line: u64,
    config: &'a Config,
}

impl<R: BufRead> Rows<'_, R> {
    /// The tokens of the next line that is not blank.
    fn next(&mut self) -> Result<Option<Vec<u32>>> {
        loop {
            self.line += 1;
            let mut bytes = Vec::new();
            let place = format!("{}:{}", self.name, self.line);
            let mut bounded = self.reader.by_ref().take(LINE_BYTES_MAX + 1);
            bounded
                .read_until(b'\n', &mut bytes)
                .with_context(|| format!("{place} cannot be read"))?;
            if bytes.is_empty() {
                return Ok(None);
            }
            if bytes.len() as u64 > LINE_BYTES_MAX {
                bail!("{place} is longer than {LINE_BYTES_MAX} bytes: shorten it");
            }
            if !bytes.trim_ascii().is_empty() {
                return self.tokens(&bytes, &place).map(Some);
            }
        }
    }

    fn tokens(&self, bytes: &[u8], place: &str) -> Result<Vec<u32>> {
        let line: Line = serde_json::from_slice(bytes).map_err(|error| {
            // serde's own "at line 1" would contradict the line number.
            let text = error.to_string();
            let reason = text.split(" at line ").next().unwrap_or_default();
            let column = error.column();
            anyhow::anyhow!(
                "{place} is not {{\"tokens\": [ids]}} ({reason}, column {column}): correct it"
            )
        })?;
        let (found, context) = (line.tokens.len(), self.config.max_position_embeddings);
        if found == 0 {
            bail!("{place} has no tokens: give one or more");
        }
        if found > context {
            bail!("{place} has {found} tokens, the model reads {context}: shorten it");
        }
        let size = self.config.vocab_size;
        if let Some(token) = line.tokens.iter().find(|&&token| token as usize >= size) {
            bail!(
                "{place} holds token {token}, the model has {size}: use the tokenizer of this model"
            );
        }
        Ok(line.tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_longer_than_its_bound_is_refused_before_it_is_held() {
        let config = Config::parse(
            r#"{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 8, "hidden_size": 8,
                "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
                "max_position_embeddings": 16, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
                "tie_word_embeddings": true}"#,
        )
        .unwrap();
        let mut rows = Rows {
            reader: BufReader::new(std::io::repeat(b'1')),
            name: "f".to_owned(),
            line: 0,
            config: &config,
        };
        let error = rows.next().unwrap_err().to_string();
        assert!(error.starts_with("f:1 is longer than"), "{error}");
    }
}
