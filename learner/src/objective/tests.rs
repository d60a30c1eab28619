//! Each objective against numbers worked out by hand, and its derivative against finite differences of its loss.

use super::*;
use proptest::prelude::*;

fn dppo() -> ObjectiveConfig {
    ObjectiveConfig::Dppo(Dppo::default())
}

fn ppo_clip() -> ObjectiveConfig {
    ObjectiveConfig::PpoClip(PpoClip::default())
}

fn reinforce() -> ObjectiveConfig {
    ObjectiveConfig::Reinforce(Reinforce::default())
}

/// One token with probability `pi` now and `mu` when sampled, in an update of `n` trained tokens.
fn one_token(objective: ObjectiveConfig, pi: f32, mu: f32, advantage: f32, n: u64) -> Evaluation {
    let rollout = RolloutTokens {
        learner_logprobs: &[pi.ln()],
        rollout_logprobs: &[mu.ln()],
        advantage,
    };
    objective
        .evaluate(&rollout, NonZeroU64::new(n).unwrap())
        .unwrap()
}

#[track_caller]
fn assert_token(found: &Evaluation, loss: f64, derivative: f64, clipped: bool) {
    assert!(
        (found.losses[0] - loss).abs() < 1e-6,
        "loss {} is not {loss}",
        found.losses[0]
    );
    let difference = f64::from(found.derivatives[0]) - derivative;
    assert!(
        difference.abs() < 1e-6,
        "derivative {} is not {derivative}",
        found.derivatives[0]
    );
    assert_eq!(found.clipped, [clipped]);
}

#[test]
fn dppo_of_a_likelier_good_token_by_hand() {
    // r = 0.5/0.4 = 1.25, ln r = 0.223143551, (ln r)² = 0.049793044, π − μ = 0.1 < 0.2: kept.
    // L = (−2·1.25 + 0.001·0.049793044)/4; dL = (−2·1.25 + 0.002·0.223143551)/4.
    let found = one_token(dppo(), 0.5, 0.4, 2.0, 4);
    assert_token(&found, -0.624_987_552, -0.624_888_428, false);
}

#[test]
fn dppo_masks_by_the_change_of_probability_and_only_the_way_the_advantage_pushes() {
    // π − μ = 0.4: r = 1.8, ln r = 0.587786665, squared 0.345493163.
    // A = 1: masked, only the squared log-ratio is left.
    assert_token(
        &one_token(dppo(), 0.9, 0.5, 1.0, 1),
        0.000_345_493,
        0.001_175_573,
        true,
    );
    // A = −1: kept, 1.8 + 0.000345493 and 1.8 + 0.001175573.
    assert_token(
        &one_token(dppo(), 0.9, 0.5, -1.0, 1),
        1.800_345_493,
        1.801_175_573,
        false,
    );
    // π − μ = −0.4: r = 0.2, ln r = −1.609437912, squared 2.590290394.
    assert_token(
        &one_token(dppo(), 0.1, 0.5, -1.0, 1),
        0.002_590_290,
        -0.003_218_876,
        true,
    );
    assert_token(
        &one_token(dppo(), 0.1, 0.5, 1.0, 1),
        -0.197_409_710,
        -0.203_218_876,
        false,
    );
    // A rare token ten times as likely as before: PPO would clip it, its probability changed by 0.009.
    assert!(!one_token(dppo(), 0.01, 0.001, 1.0, 1).clipped[0]);
    assert!(one_token(ppo_clip(), 0.01, 0.001, 1.0, 1).clipped[0]);
}

#[test]
fn ppo_clip_by_hand() {
    // r = 1.25 < 1.28: L = −1.25·2/5, dL the same.
    assert_token(&one_token(ppo_clip(), 0.5, 0.4, 2.0, 5), -0.5, -0.5, false);
    // r = 1.5 > 1.28 and A > 0: clipped, L = −1.28.
    assert_token(&one_token(ppo_clip(), 0.6, 0.4, 1.0, 1), -1.28, 0.0, true);
    // r = 1.5 and A < 0: the plain side is the larger and pushes back, L = 1.5·3.
    assert_token(&one_token(ppo_clip(), 0.6, 0.4, -3.0, 1), 4.5, 4.5, false);
    // r = 0.5 < 0.8 and A < 0: clipped, L = 0.8.
    assert_token(&one_token(ppo_clip(), 0.2, 0.4, -1.0, 1), 0.8, 0.0, true);
    // r = 0.5 and A > 0: L = −0.5.
    assert_token(&one_token(ppo_clip(), 0.2, 0.4, 1.0, 1), -0.5, -0.5, false);
}

#[test]
fn reinforce_by_hand() {
    // r = 1.25, w = 1.02, ln 0.5 = −0.693147181: L = 1.02·2·0.693147181/2, dL = −1.02·2/2.
    assert_token(
        &one_token(reinforce(), 0.5, 0.4, 2.0, 2),
        0.707_010_124,
        -1.02,
        true,
    );
    // r = 0.5: w = 0.5, ln 0.2 = −1.609437912.
    assert_token(
        &one_token(reinforce(), 0.2, 0.4, -1.0, 1),
        -0.804_718_956,
        0.5,
        false,
    );
}

#[test]
fn the_sums_of_two_rollouts_give_the_means_of_the_update() {
    // k3 of r = 1.25: 0.25 − 0.223143551 = 0.026856449; of r = 0.5: −0.5 + 0.693147181 = 0.193147181.
    let n = NonZeroU64::new(3).unwrap();
    let logs = |values: [f32; 3]| values.map(f32::ln);
    let (learner, sampled) = (logs([0.5, 0.4, 0.3]), logs([0.4, 0.8, 0.3]));
    let part = |range: std::ops::Range<usize>, advantage| RolloutTokens {
        learner_logprobs: &learner[range.clone()],
        rollout_logprobs: &sampled[range],
        advantage,
    };
    let mut stats = ObjectiveStats::default();
    stats.add(&ppo_clip().evaluate(&part(0..1, 1.0), n).unwrap().stats);
    stats.add(&ppo_clip().evaluate(&part(1..3, -1.0), n).unwrap().stats);
    // Losses −1.25, 0.8 (clipped at 0.8, r = 0.5), 1.
    assert!((stats.loss - 0.55 / 3.0).abs() < 1e-6, "{stats:?}");
    assert!((stats.clip_fraction() - 1.0 / 3.0).abs() < 1e-12);
    assert!(
        (stats.mismatch_kl() - 0.220_003_630 / 3.0).abs() < 1e-6,
        "{stats:?}"
    );
    assert_eq!(ObjectiveStats::default().mismatch_kl(), 0.0);
}

#[test]
fn on_policy_all_objectives_agree_and_nothing_is_clipped() {
    for (objective, kl) in [(dppo(), 0.0), (ppo_clip(), 0.0), (reinforce(), 0.0)] {
        let found = one_token(objective, 0.3, 0.3, 1.5, 1);
        assert_eq!((found.derivatives[0], found.clipped[0]), (-1.5, false));
        assert_eq!(found.stats.mismatch_kl_sum, kl);
    }
}

#[test]
fn log_probs_that_no_honest_sampler_reports_stay_finite_and_small() {
    for objective in [dppo(), ppo_clip(), reinforce()] {
        for (learner, sampled) in [(0.0, f32::MIN), (f32::MIN, 0.0), (-1e4, -1e-30)] {
            for advantage in [-3.0, 0.0, 3.0] {
                let rollout = RolloutTokens {
                    learner_logprobs: &[learner],
                    rollout_logprobs: &[sampled],
                    advantage,
                };
                let found = objective.evaluate(&rollout, NonZeroU64::MIN).unwrap();
                assert!(found.losses[0].is_finite() && found.stats.mismatch_kl().is_finite());
                assert!(found.derivatives[0].abs() < 4.0, "{objective:?} {found:?}");
            }
        }
    }
}

#[test]
fn a_token_whose_ratio_was_cut_is_still_pulled_back_by_the_default() {
    let far = RolloutTokens {
        learner_logprobs: &[-1.0],
        rollout_logprobs: &[-90.0],
        advantage: -1.0,
    };
    let found = dppo().evaluate(&far, NonZeroU64::MIN).unwrap();
    assert!(found.clipped[0]);
    assert!((found.derivatives[0] - 0.02).abs() < 1e-7, "2 · 0.001 · 10");
}

#[test]
fn inputs_that_do_not_fit_are_refused_with_their_place() {
    let refuse = |learner: &[f32], sampled: &[f32], advantage| {
        let rollout = RolloutTokens {
            learner_logprobs: learner,
            rollout_logprobs: sampled,
            advantage,
        };
        dppo()
            .evaluate(&rollout, NonZeroU64::MIN)
            .unwrap_err()
            .to_string()
    };
    assert_eq!(
        refuse(&[-1.0], &[], 1.0),
        "1 learner log-probs for 0 rollout log-probs"
    );
    assert_eq!(
        refuse(&[-1.0, -1.0], &[-1.0, f32::NAN], 1.0),
        "the rollout log-prob at position 1 is NaN, not a finite number"
    );
    assert!(refuse(&[f32::NEG_INFINITY], &[-1.0], 1.0).starts_with("the learner log-prob"));
    assert!(refuse(&[-1.0], &[-1.0], f32::INFINITY).starts_with("the advantage"));
}

#[test]
fn the_type_alone_gives_the_published_setting() {
    let parse = |text: &str| serde_json::from_str::<ObjectiveConfig>(text);
    assert_eq!(
        parse(r#"{"type": "dppo"}"#).unwrap(),
        ObjectiveConfig::default()
    );
    assert_eq!(parse(r#"{"type": "ppo_clip"}"#).unwrap(), ppo_clip());
    assert_eq!(parse(r#"{"type": "reinforce"}"#).unwrap(), reinforce());
    let narrow = parse(r#"{"type": "ppo_clip", "clip_high": 0.2}"#).unwrap();
    assert_eq!(
        narrow,
        ObjectiveConfig::PpoClip(PpoClip {
            clip_low: 0.2,
            clip_high: 0.2
        })
    );
    for objective in [dppo(), ppo_clip(), reinforce()] {
        objective.validate().unwrap();
        let written = serde_json::to_string(&objective).unwrap();
        assert_eq!(parse(&written).unwrap(), objective, "{written}");
    }
    assert!(parse(r#"{"type": "dppo", "clip_high": 0.2}"#).is_err());
    assert!(parse(r#"{"type": "grpo"}"#).is_err());
}

#[test]
fn a_setting_outside_its_limits_is_refused_by_name() {
    let refused = ObjectiveConfig::Dppo(Dppo {
        mask_low: -0.1,
        ..Dppo::default()
    })
    .validate();
    assert_eq!(
        refused.unwrap_err().to_string(),
        "objective `dppo`: `mask_low` is -0.1, must be a change of probability, from 0 to 1"
    );
    let not_a_number = ObjectiveConfig::Reinforce(Reinforce {
        clip_high: f64::NAN,
    });
    assert!(not_a_number.validate().is_err());
    let clip_low = ObjectiveConfig::PpoClip(PpoClip {
        clip_low: 1.5,
        clip_high: 0.2,
    });
    assert!(clip_low.validate().is_err());
}

/// Central difference of a token's loss in ln π.
fn slope(token: Token, loss: impl Fn(&Token) -> f64) -> f64 {
    let h = 1e-5;
    let moved = |by: f64| {
        loss(&Token {
            learner_logprob: token.learner_logprob + by,
            ..token
        })
    };
    (moved(h) - moved(-h)) / (2.0 * h)
}

/// Whether a small step of ln π crosses a mask, a clip or the cut, where the loss has no derivative.
fn is_near_a_kink(token: &Token) -> bool {
    let near = |value: f64, kink: f64| (value - kink).abs() < 1e-3;
    let ratio = token.importance_ratio();
    near(token.probability_change().abs(), 0.2)
        || near(ratio, 0.8)
        || near(ratio, 1.28)
        || near(token.log_ratio_uncut().abs(), LOG_RATIO_MAX)
}

proptest! {
    #[test]
    fn the_derivative_is_that_of_the_loss(
        learner_logprob in -14.0f64..-0.01,
        rollout_logprob in -14.0f64..-0.01,
        advantage in -4.0f64..4.0,
    ) {
        let token = Token { learner_logprob, rollout_logprob, advantage };
        prop_assume!(!is_near_a_kink(&token));
        let Reinforce { clip_high } = Reinforce::default();
        // REINFORCE differentiates ln π alone: its weight is held while ln π moves.
        let weight = token.importance_ratio().min(1.0 + clip_high);
        let slopes = [
            (dppo(), slope(token, |moved| dppo().cost(moved).loss)),
            (ppo_clip(), slope(token, |moved| ppo_clip().cost(moved).loss)),
            (reinforce(), slope(token, |moved| -weight * advantage * moved.learner_logprob)),
        ];
        for (objective, expected) in slopes {
            let found = objective.cost(&token).derivative;
            let tolerance = 1e-6 * (1.0 + expected.abs());
            prop_assert!((found - expected).abs() < tolerance, "{objective:?}: {found}, {expected}");
        }
    }
}
