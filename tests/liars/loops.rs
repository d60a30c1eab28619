//! The loop, end to end: real weights, real answers, real verdicts, over the bus in memory; and a user's own task with the
//! shipped command over a real server.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::Value;

use muster_policy::{Device, Image, KernelSet, Policy, ScoreRow, logprobs};
use muster_protocol::message::fate::Fate;
use muster_protocol::record::StepMetrics;

use super::start::{small, start};
use super::swarm::{Outcome, Plan, Running, Weights};

fn assert_every_ticket_has_one_fate(outcome: &Outcome) {
    let mut ended = BTreeSet::new();
    for record in &outcome.view.fates {
        if record.fate != Fate::Duplicate {
            assert!(ended.insert(record.ticket), "{record:?} is a second fate");
        }
    }
    let issued: BTreeSet<u64> = (1..=outcome.view.issued).collect();
    let ended: BTreeSet<u64> = ended.into_iter().map(|ticket| ticket.0).collect();
    assert_eq!(issued, ended);
    let trained = outcome.rollouts();
    let groups: BTreeSet<_> = trained
        .iter()
        .map(|line| (line.ticket, line.group))
        .collect();
    let tickets: BTreeSet<_> = groups.iter().map(|(ticket, _)| ticket).collect();
    assert_eq!(groups.len(), tickets.len(), "a ticket was trained twice");
}

/// Largest |difference| between the log-probs on record and those of a fresh forward pass under the version recorded.
fn largest_rescoring_error(outcome: &Outcome) -> f32 {
    let config = &outcome.start.model.config;
    let anchors = outcome.shelf.anchors();
    let mut policies = BTreeMap::new();
    let mut largest = 0f32;
    for line in outcome.rollouts() {
        let policy = policies.entry(line.policy_version).or_insert_with(|| {
            let image = Image::parse(config, &anchors[&line.policy_version].1).unwrap();
            Policy::from_image(config, &image, KernelSet::Fused, &Device::Cpu).unwrap()
        });
        let first = line.prompt_tokens.len();
        let tokens = [line.prompt_tokens, line.completion_tokens].concat();
        let row = ScoreRow {
            tokens: &tokens,
            first,
            temperature: line.temperature,
        };
        let scored = logprobs(policy, &[row]).unwrap().remove(0);
        assert_eq!(scored.len(), line.rollout_logprobs.len());
        let errors = scored.iter().zip(&line.rollout_logprobs);
        largest = errors
            .map(|(now, then)| (now - then).abs())
            .fold(largest, f32::max);
    }
    largest
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_loop_runs_over_the_in_memory_bus_with_real_weights() {
    let config = small();
    let plan = Plan {
        weights: Weights::Peers,
        ..Plan::new(config.clone(), start())
    };
    let outcome = Running::start(plan).await.finish().await;
    assert_every_ticket_has_one_fate(&outcome);
    let steps = config.run.steps.get();
    let text = std::fs::read_to_string(outcome.dir.path().join("metrics.jsonl")).unwrap();
    let lines: Vec<Value> = text
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert_eq!(lines.len() as u64, steps);
    let keys = serde_json::to_value(StepMetrics::default()).unwrap();
    for (line, key) in lines
        .iter()
        .flat_map(|line| keys.as_object().unwrap().keys().map(move |key| (line, key)))
    {
        let value = line[key].as_f64();
        assert!(value.is_some_and(f64::is_finite), "{key} is {}", line[key]);
    }
    let metrics = outcome.steps();
    let first = metrics[0].mismatch_kl_mean;
    assert!(
        first.abs() < 1e-6,
        "mismatch_kl of the first step is {first:e}"
    );
    let off = largest_rescoring_error(&outcome);
    assert!(off < 1e-3, "log-probs on record are off by {off}");
    let trained = outcome.rollouts();
    for line in &metrics {
        let batch = trained.iter().filter(|rollout| rollout.step == line.step);
        let ages = batch.map(|rollout| line.step - 1 - rollout.policy_version.0);
        let ages: Vec<u64> = ages.collect();
        let mean = ages.iter().sum::<u64>() as f64 / ages.len() as f64;
        assert!((line.staleness_mean - mean).abs() < 1e-9, "{line:?}");
        assert_eq!(line.staleness_max, ages.into_iter().max().unwrap());
        assert!(line.staleness_max <= config.run.async_level);
    }
    let stale = metrics.iter().map(|line| line.staleness_mean).sum::<f64>();
    assert!(stale > 0.0, "workers never ran ahead of the learner");
    println!(
        "loop: {steps} steps in {:.1} s, mismatch_kl of the first {first:.1e}, re-scored log-probs off by at most {off:.1e}, \
         mean staleness {:.2}",
        outcome.seconds,
        stale / steps as f64
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_an_async_level_every_group_is_of_the_version_that_it_trains() {
    let mut config = small();
    config.run.async_level = 0;
    let plan = Plan::new(config, start());
    let outcome = Running::start(plan).await.finish().await;
    assert_every_ticket_has_one_fate(&outcome);
    assert!(outcome.steps().iter().all(|line| line.staleness_max == 0));
    let stale = outcome.view.fates.iter().any(|f| f.fate == Fate::Stale);
    assert!(!stale, "a synchronous run drops nothing as stale");
}

/// A configuration as a user writes one: a task of their own, a reward, and a model to start from.
const OWN_TASK: &str = r#"
[run]
name = "own-task"
steps = 2

[model]
path = "model"

[sampling]
group_size = 8
tokens_max = 12
stop = ["."]

[learner]
batch_groups = 4

[local]
workers = 1

[task]
type = "jsonl"
file = "sums.jsonl"
prompt = "question"
gold = "sum"

[[reward]]
type = "regex"
name = "running_total"
pattern = "^[0-9]+(,[0-9]+)*[.]$"

[[reward]]
type = "numeric_match"
name = "correct"
extract = { after_last = "," }
terminator = "."
"#;

#[test]
fn a_users_own_task_takes_two_steps() {
    let dir = tempfile::tempdir().unwrap();
    start().model.write(&dir.path().join("model")).unwrap();
    let rows = (0..200).map(|n| {
        let (a, b, c) = (n % 10, n / 10 % 10, (n * 7 + 3) % 10);
        let sum = a + b + c;
        format!("{{\"question\": \"{a}+{b}+{c}=\", \"sum\": {sum}, \"source\": \"by hand\"}}\n")
    });
    std::fs::write(dir.path().join("sums.jsonl"), rows.collect::<String>()).unwrap();
    let config = dir.path().join("own.toml");
    std::fs::write(&config, OWN_TASK).unwrap();
    let run = dir.path().join("run");
    let done = Command::new(env!("CARGO_BIN_EXE_muster"))
        .args(["local", "--quiet", "--dir"])
        .args([&run, &config])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{said}");
    let metrics = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    assert_eq!(metrics.lines().count(), 2, "{said}");
    assert!(run.join("checkpoints/2/model.safetensors").exists());
}
