//! The training loop, end to end: real weights, answers and verdicts over the bus in memory, and a user's own task with
//! `muster local` over a real NATS server.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use muster_policy::{Device, Image, KernelSet, Policy, ScoreRow, logprobs};
use muster_protocol::message::fate::Fate;
use muster_protocol::record::StepMetrics;

use super::harness::{lines, muster, succeed, text};
use super::plan::{Plan, WeightTransfer};
use super::results::FinishedRun;
use super::start::{small, start};
use super::swarm::Running;

fn assert_every_ticket_has_one_fate(run: &FinishedRun) {
    let mut ended = BTreeSet::new();
    for record in &run.progress.fates {
        if record.fate != Fate::Duplicate {
            assert!(ended.insert(record.ticket), "{record:?} is a second fate");
        }
    }
    let issued: BTreeSet<u64> = (1..=run.progress.issued).collect();
    let ended: BTreeSet<u64> = ended.into_iter().map(|ticket| ticket.0).collect();
    assert_eq!(issued, ended);
    let trained = run.rollouts();
    let groups: BTreeSet<_> = trained
        .iter()
        .map(|line| (line.ticket, line.group))
        .collect();
    let tickets: BTreeSet<_> = groups.iter().map(|(ticket, _)| ticket).collect();
    assert_eq!(groups.len(), tickets.len(), "a ticket was trained twice");
}

/// Largest absolute difference between the recorded log-probs and those of a new forward pass under the recorded version.
fn largest_rescoring_error(run: &FinishedRun) -> f32 {
    let config = &run.start.model.config;
    let anchors = run.offered.anchors();
    let mut policies = BTreeMap::new();
    let mut largest = 0f32;
    for line in run.rollouts() {
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
        weights: WeightTransfer::BetweenPeers,
        ..Plan::new(config.clone(), start())
    };
    let run = Running::start(plan).await.finish().await;
    assert_every_ticket_has_one_fate(&run);
    let steps = config.run.steps.get();
    let text = std::fs::read_to_string(run.dir.path().join("metrics.jsonl")).unwrap();
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
    let metrics = run.steps();
    let first = metrics[0].mismatch_kl_mean;
    assert!(
        first.abs() < 1e-6,
        "mismatch_kl of the first step is {first:e}"
    );
    let off = largest_rescoring_error(&run);
    assert!(off < 1e-3, "log-probs on record are off by {off}");
    let trained = run.rollouts();
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
        run.seconds,
        stale / steps as f64
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_an_async_level_every_group_is_drawn_from_the_version_that_it_trains() {
    let mut config = small();
    config.run.async_level = 0;
    let plan = Plan::new(config, start());
    let run = Running::start(plan).await.finish().await;
    assert_every_ticket_has_one_fate(&run);
    assert!(run.steps().iter().all(|line| line.staleness_max == 0));
    let stale = run.progress.fates.iter().any(|f| f.fate == Fate::Stale);
    assert!(!stale, "a synchronous run drops nothing as stale");
}

/// The configuration of a user: an own task, a reward, and a model to start from.
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
    let arguments = ["local", "--quiet", "--dir", text(&run), text(&config)];
    succeed(&mut muster(&arguments));
    assert_eq!(lines(&run.join("metrics.jsonl")), 2);
    assert!(run.join("checkpoints/2/model.safetensors").exists());
}
