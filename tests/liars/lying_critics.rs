//! One critic of three lifts rewards. Two must agree, so no lifted reward enters a batch, and who is contradicted three
//! times gets no more groups.

use super::start::{small, start};
use super::swarm::{CriticKind, Outcome, Plan, Running};

/// Rollouts whose recorded reward is not what the reward functions say.
pub fn lifted_rewards(outcome: &Outcome) -> Vec<String> {
    let lines = outcome.rollouts().into_iter();
    let lifted = lines.filter_map(|line| {
        let reward = &outcome.start;
        let honest = reward.reward(
            &line.prompt_tokens,
            &line.completion_tokens,
            line.finish_reason,
        );
        let found = line.reward;
        (honest.to_bits() != found.to_bits())
            .then(|| format!("ticket {} has {found} for {honest}", line.ticket))
    });
    lifted.collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_inflated_reward_enters_a_batch_and_the_dissenter_gets_no_more_groups() {
    let mut config = small();
    config.dispatch.critique.verdicts = 2;
    let plan = Plan {
        critics: vec![CriticKind::Inflates, CriticKind::Honest, CriticKind::Honest],
        ..Plan::new(config, start())
    };
    let outcome = Running::start(plan).await.finish().await;
    assert_eq!(lifted_rewards(&outcome), Vec::<String>::new());
    let deeds = outcome.deeds;
    assert!(
        deeds.inflated > 0,
        "the critic never had anything to lift: {deeds:?}"
    );
    assert!(
        deeds.turned_away > 0,
        "the critic was never turned away: {deeds:?}"
    );
    assert_eq!(deeds.groups_after, 0, "{deeds:?}");
    println!(
        "inflating critic: {} rollouts of {} groups lifted, none trained, then turned away; {} steps in {:.1} s",
        deeds.inflated, deeds.groups, outcome.view.steps, outcome.seconds
    );
}
