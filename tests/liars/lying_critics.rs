//! One critic of three inflates rewards. Two critics must agree, so that no inflated reward enters a batch, and a critic
//! that is contradicted three times gets no more groups.

use super::plan::{CriticKind, Plan};
use super::results::FinishedRun;
use super::start::{small, start};
use super::swarm::Running;

/// Rollouts whose recorded reward differs from that of the reward functions.
pub fn falsified_rewards(run: &FinishedRun) -> Vec<String> {
    let lines = run.rollouts().into_iter();
    let falsified = lines.filter_map(|line| {
        let reward = &run.start;
        let honest = reward.reward(
            &line.prompt_tokens,
            &line.completion_tokens,
            line.finish_reason,
        );
        let found = line.reward;
        (honest.to_bits() != found.to_bits())
            .then(|| format!("ticket {} has {found} for {honest}", line.ticket))
    });
    falsified.collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_inflated_reward_enters_a_batch_and_the_dissenter_gets_no_more_groups() {
    let mut config = small();
    config.dispatch.critique.verdicts = 2;
    let plan = Plan {
        critics: vec![CriticKind::Inflates, CriticKind::Honest, CriticKind::Honest],
        ..Plan::new(config, start())
    };
    let run = Running::start(plan).await.finish().await;
    assert_eq!(falsified_rewards(&run), Vec::<String>::new());
    let critic_counts = run.critic_counts;
    assert!(
        critic_counts.inflated > 0,
        "the critic never had a reward to raise: {critic_counts:?}"
    );
    assert!(
        critic_counts.refusals > 0,
        "the critic was never refused: {critic_counts:?}"
    );
    assert_eq!(critic_counts.groups_after_refusal, 0, "{critic_counts:?}");
    println!(
        "inflating critic: {} rollouts of {} groups inflated, none trained, then refused; {} steps in {:.1} s",
        critic_counts.inflated, critic_counts.groups, run.progress.steps, run.seconds
    );
}
