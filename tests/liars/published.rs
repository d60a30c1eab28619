//! The control of `configs/gemma.toml`: RL on a published model whose rewards no longer tell which answer earned them must not
//! raise them. Ignored by default: it takes minutes, some gigabytes and the model, imported as that file says.
//!
//! `cargo test --release --test liars -- --ignored --nocapture published_model`

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::config::RunConfig;
use super::plan::{CriticKind, Plan, WorkerKind};
use super::start::Start;
use super::swarm::Running;

const FILE: &str = "configs/gemma.toml";
/// Steps at each end of the run that are compared.
const ENDS: usize = 5;
/// Standard errors by which the mean reward of the last steps may exceed that of the first.
const RISE: f64 = 3.0;
/// Time limit of a run on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(7_200);

fn plan() -> Plan {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(FILE);
    let mut config = RunConfig::load(&file).unwrap();
    config.resolve_paths(file.parent().unwrap()).unwrap();
    let folder = config.model.path.clone().unwrap();
    let import = format!("import the model as the head of {FILE} says");
    assert!(folder.join("config.json").exists(), "{import}");
    let start = Arc::new(Start::read(&config, &folder));
    Plan {
        workers: vec![WorkerKind::Honest],
        critics: vec![CriticKind::Permutes],
        timeout: TIMEOUT,
        ..Plan::new(config, start)
    }
}

/// Mean and sample variance of the mean rewards of some steps.
fn moments(rewards: &[f64]) -> (f64, f64) {
    let count = rewards.len() as f64;
    let mean = rewards.iter().sum::<f64>() / count;
    let squares: f64 = rewards.iter().map(|r| (r - mean).powi(2)).sum();
    (mean, squares / (count - 1.0))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes and a published model: run with --ignored"]
async fn a_published_model_gains_nothing_when_rewards_are_permuted_within_each_group() {
    let run = Running::start(plan()).await.finish().await;
    let rewards: Vec<f64> = run.steps().iter().map(|s| s.reward_mean).collect();
    let (first, before) = moments(&rewards[..ENDS]);
    let (last, after) = moments(&rewards[rewards.len() - ENDS..]);
    let error = ((before + after) / ENDS as f64).sqrt();
    let rise = (last - first) / error;
    println!(
        "permuted rewards, {} steps, {:.0} s: {rewards:.3?}; first {first:.3}, last {last:.3}, {rise:+.1} standard errors",
        rewards.len(),
        run.seconds
    );
    assert!(run.critic_counts.inflated > 0, "nothing was permuted");
    assert!(rise < RISE, "rewards rose by {rise:.1} standard errors");
}
