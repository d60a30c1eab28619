//! Checks that the answers of a group were drawn as its lease prescribes. Pure: a group, its lease and the scores of one
//! forward pass in, findings and a decision out.
//!
//! Every position is checked. With F the policy's cumulative distribution, token k is honest if u(g, t) lies in
//! [F(k−1), F(k)); the error is the distance of u(g, t) from that interval. The draw u(g, t) is
//! [`muster_policy::uniform`] of the lease's seed. This one check catches a wrong temperature, wrong weights, edited tokens, and a choice among
//! several answers.

use muster_policy::{StopAt, TokenScore, uniform};
use muster_protocol::message::descriptor::Thresholds;
use muster_protocol::message::group::{FinishReason, Group, Rollout};
use muster_protocol::message::lease::Lease;
use muster_protocol::message::verdict::{Decision, Finding};

/// A repeated group is not a coincidence if its draws together are less likely than this, in nats: e⁻⁴⁰, once in 10¹⁷.
pub(super) const COINCIDENCE_LOGPROB: f64 = -40.0;

/// The scores of one rollout's drawn tokens, one per token.
pub(super) type RolloutScores = Vec<TokenScore>;

/// Checks the draws and the recorded log-probs of a group.
///
/// * `scores` — for each rollout, one score per drawn token, under the lease's version and temperature
pub(super) fn audit(
    lease: &Lease,
    group: &Group,
    scores: &[RolloutScores],
    thresholds: &Thresholds,
) -> (Decision, Vec<Finding>) {
    let mut decision = Decision::Accept;
    let mut findings = Vec::new();
    for (number, (rollout, scored)) in group.rollouts.iter().zip(scores).enumerate() {
        let number = number as u32;
        let draws = draw_errors(lease, number, scored);
        let judged = judge_draws(&draws, thresholds);
        if judged != Decision::Accept {
            findings.push(draws.finding(number, thresholds.draw_error_max));
            decision = worse(decision, judged);
        }
        let (position, max) = largest_logprob_error(rollout, scored);
        if max.is_nan() || max > thresholds.logprob_error_max {
            let (position, limit) = (position as u32, thresholds.logprob_error_max);
            findings.push(Finding::Logprobs {
                rollout: number,
                max,
                position,
                limit,
            });
            decision = worse(decision, Decision::Reject);
        }
    }
    if scores.len() != group.rollouts.len() {
        let problem = format!("{} rollouts, {} scored", group.rollouts.len(), scores.len());
        return (Decision::Reject, vec![Finding::Mismatch { problem }]);
    }
    (decision, findings)
}

struct DrawErrors {
    mean: f64,
    max: f64,
    position: usize,
}

impl DrawErrors {
    fn finding(&self, rollout: u32, limit: f64) -> Finding {
        let position = self.position as u32;
        Finding::Draws {
            rollout,
            mean: self.mean,
            max: self.max,
            position,
            limit,
        }
    }
}

fn draw_errors(lease: &Lease, number: u32, scored: &[TokenScore]) -> DrawErrors {
    let rollout = lease.rollouts.first + number;
    let errors = scored
        .iter()
        .enumerate()
        .map(|(position, score)| score.error(uniform(&lease.seed, rollout, position as u64)));
    let (mut sum, mut max, mut worst) = (0.0, 0.0, 0);
    for (position, error) in errors.enumerate() {
        sum += error;
        if error.is_nan() || error > max {
            (max, worst) = (error, position);
        }
    }
    debug_assert!(max.is_nan() || max >= 0.0, "an error is a distance: {max}");
    DrawErrors {
        mean: sum / scored.len().max(1) as f64,
        max,
        position: worst,
    }
}

fn judge_draws(draws: &DrawErrors, thresholds: &Thresholds) -> Decision {
    if draws.max <= thresholds.draw_error_max && draws.mean <= thresholds.draw_error_mean {
        Decision::Accept
    } else if draws.max <= thresholds.draw_error_reject {
        Decision::Grey
    } else {
        Decision::Reject // also if the errors are NaN
    }
}

fn worse(one: Decision, other: Decision) -> Decision {
    match (one, other) {
        (Decision::Reject, _) | (_, Decision::Reject) => Decision::Reject,
        (Decision::Grey, _) | (_, Decision::Grey) => Decision::Grey,
        (Decision::Accept, Decision::Accept) => Decision::Accept,
    }
}

/// Checks where answers end against the lease's stop strings. Dispatch cannot: it does not know the text of tokens.
///
/// * `stopped` — for each rollout, the first stop string that its drawn tokens complete, and the token that completes it
pub(super) fn audit_endings(
    lease: &Lease,
    group: &Group,
    stopped: &[Option<StopAt>],
) -> Vec<Finding> {
    let stop_ids = &lease.ticket.sampling.stop_ids;
    let mut findings = Vec::new();
    for (number, (rollout, stopped)) in group.rollouts.iter().zip(stopped).enumerate() {
        let (tokens, _) = rollout.drawn();
        // A stop id that also completes a stop string ends the answer by its id.
        let by_id = tokens.last().is_some_and(|last| stop_ids.contains(last));
        let prescribed = stopped.filter(|at| !(by_id && at.token + 1 == tokens.len()));
        let problem = match (rollout.finish, prescribed) {
            (FinishReason::StopString(named), Some(at))
                if at.token + 1 == tokens.len() && at.string == usize::from(named) =>
            {
                continue;
            }
            (FinishReason::Stop | FinishReason::Length, None) => continue,
            (_, Some(StopAt { token, string })) => format!(
                "ends after {} tokens as {:?}, but stop string {string} is complete at token {token}",
                tokens.len(),
                rollout.finish
            ),
            (FinishReason::StopString(named), None) => {
                format!(
                    "claims stop string {named}, which none of its {} tokens completes",
                    tokens.len()
                )
            }
        };
        let rollout = number as u32;
        findings.push(Finding::Termination { rollout, problem });
    }
    findings
}

/// The position of the largest difference between a recorded log-prob and the computed one, and the difference in nats.
fn largest_logprob_error(rollout: &Rollout, scored: &[TokenScore]) -> (usize, f64) {
    let (tokens, recorded) = rollout.drawn();
    if tokens.len() != scored.len() {
        return (0, f64::INFINITY);
    }
    let errors = recorded
        .iter()
        .zip(scored)
        .map(|(recorded, score)| f64::from(recorded - score.logprob).abs());
    errors
        .enumerate()
        .fold((0, 0.0), |largest, (position, error)| {
            if error.is_nan() || error > largest.1 {
                (position, error)
            } else {
                largest
            }
        })
}

/// A digest of a group's drawn tokens alone: groups with equal digests hold the same answers under any lease.
pub(super) fn draws_digest(group: &Group) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"muster-draws-v1\0");
    for rollout in &group.rollouts {
        for token in rollout.tokens() {
            hasher.update(&token.to_le_bytes());
        }
        hasher.update(&u32::MAX.to_le_bytes());
    }
    *hasher.finalize().as_bytes()
}

/// The log-prob of all draws of a group together, in nats, as its author recorded it.
pub(super) fn total_logprob(group: &Group) -> f64 {
    group
        .rollouts
        .iter()
        .flat_map(|rollout| rollout.drawn().1)
        .map(f64::from)
        .sum()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use muster_protocol::id::{
        DescriptorHash, LeaseId, PeerId, PolicyVersion, StateRoot, TicketId, UnixMillis,
    };
    use muster_protocol::message::lease::{NumericClass, RolloutRange, WeightsRule};
    use muster_protocol::message::ticket::{SamplingRules, Ticket};
    use muster_protocol::message::version::VersionRef;

    /// Four tokens, equally likely: token k covers [k/4, (k+1)/4).
    pub(in crate::critic) const P: f64 = 0.25;

    pub(in crate::critic) fn lease() -> Lease {
        let sampling = SamplingRules {
            temperature: 1.0,
            tokens_max: 4,
            stop_ids: vec![9],
            stop_strings: Vec::new(),
        };
        let ticket = Ticket {
            id: TicketId(1),
            descriptor: DescriptorHash([0; 32]),
            item: 0,
            prompt: vec![1],
            group_size: 2,
            sampling,
            oldest_version: PolicyVersion(0),
            deadline: UnixMillis(0),
        };
        Lease {
            id: LeaseId([0; 16]),
            ticket,
            worker: PeerId([0; 32]),
            version: VersionRef {
                version: PolicyVersion(0),
                root: StateRoot([0; 32]),
            },
            weights: WeightsRule::Drain,
            class: NumericClass::F32Cpu,
            rollouts: RolloutRange { first: 0, count: 2 },
            epoch: 0,
            submission: 0,
            nonce: [0; 32],
            seed: [3; 32],
            deadline: UnixMillis(0),
        }
    }

    pub(in crate::critic) fn honest() -> Group {
        let lease = lease();
        let rollouts = (0..2).map(|rollout| {
            let tokens: Vec<u32> = (0..4)
                .map(|t| (uniform(&lease.seed, rollout, t) / P) as u32)
                .collect();
            let logprobs = vec![P.ln() as f32; tokens.len()];
            Rollout::single_turn(
                vec![1],
                tokens,
                PolicyVersion(0),
                logprobs,
                FinishReason::Length,
            )
        });
        Group {
            lease: lease.id,
            ticket: lease.ticket.id,
            version: lease.version,
            class: lease.class,
            rollouts: rollouts.collect(),
            commitments: Vec::new(),
        }
    }

    fn scores(group: &Group) -> Vec<RolloutScores> {
        let score = |token: u32| TokenScore {
            logprob: P.ln() as f32,
            cdf_below: f64::from(token) * P,
            cdf_through: f64::from(token + 1) * P,
        };
        group
            .rollouts
            .iter()
            .map(|r| r.drawn().0.into_iter().map(score).collect())
            .collect()
    }

    fn judge(group: &Group) -> (Decision, Vec<Finding>) {
        audit(&lease(), group, &scores(group), &Thresholds::SAME_CLASS)
    }

    pub(in crate::critic) fn drawn_mut(
        group: &mut Group,
        rollout: usize,
    ) -> (&mut Vec<u32>, &mut Vec<f32>) {
        use muster_protocol::message::group::Segment;
        match &mut group.rollouts[rollout].segments[1] {
            Segment::Policy {
                tokens,
                rollout_logprobs,
                ..
            } => (tokens, rollout_logprobs),
            _ => panic!("no policy segment"),
        }
    }

    #[test]
    fn the_honest_group_has_no_finding() {
        assert_eq!(judge(&honest()), (Decision::Accept, Vec::new()));
    }

    #[test]
    fn one_edited_token_is_rejected_with_its_place() {
        let mut group = honest();
        let (tokens, _) = drawn_mut(&mut group, 1);
        tokens[2] = (tokens[2] + 1) % 4;
        let (decision, findings) = judge(&group);
        assert_eq!(decision, Decision::Reject);
        assert!(
            matches!(
                findings[0],
                Finding::Draws {
                    rollout: 1,
                    position: 2,
                    ..
                }
            ),
            "{findings:?}"
        );
    }

    #[test]
    fn one_log_prob_off_by_more_than_rounding_is_rejected() {
        let mut group = honest();
        drawn_mut(&mut group, 0).1[3] += 0.01;
        let (decision, findings) = judge(&group);
        assert_eq!(decision, Decision::Reject);
        assert!(matches!(
            findings[0],
            Finding::Logprobs {
                rollout: 0,
                position: 3,
                ..
            }
        ));
    }

    #[test]
    fn scores_that_are_not_numbers_never_accept() {
        let group = honest();
        let mut scored = scores(&group);
        scored[0][0].cdf_through = f64::NAN;
        scored[0][0].cdf_below = f64::NAN;
        scored[0][0].logprob = f32::NAN;
        let (decision, _) = audit(&lease(), &group, &scored, &Thresholds::SAME_CLASS);
        assert_eq!(decision, Decision::Reject);
    }

    #[test]
    fn between_two_bounds_a_group_of_another_class_is_grey() {
        let mut group = honest();
        let scored = scores(&group);
        let u = uniform(&lease().seed, 0, 0);
        let mut moved = scored.clone();
        moved[0][0].cdf_below = u + 0.03;
        moved[0][0].cdf_through = u + 0.28;
        let (decision, _) = audit(&lease(), &group, &moved, &Thresholds::CROSS_CLASS);
        assert_eq!(decision, Decision::Grey);
        group.rollouts.pop();
        let (decision, _) = audit(&lease(), &group, &scored, &Thresholds::CROSS_CLASS);
        assert_eq!(
            decision,
            Decision::Reject,
            "a number of scores that does not fit"
        );
    }

    fn endings(finish: FinishReason, stopped: Option<(usize, usize)>) -> Vec<Finding> {
        let mut group = honest();
        group.rollouts.truncate(1);
        group.rollouts[0].finish = finish;
        let stopped = stopped.map(|(token, string)| StopAt { token, string });
        audit_endings(&lease(), &group, &[stopped])
    }

    #[test]
    fn an_answer_that_ends_with_the_token_that_completes_its_stop_string_is_honest() {
        let named = FinishReason::StopString(1);
        assert_eq!(endings(named, Some((3, 1))), []);
        assert_eq!(endings(FinishReason::Length, None), []);
    }

    #[test]
    fn one_token_later_or_earlier_and_another_string_are_found() {
        let named = FinishReason::StopString(1);
        for (finish, stopped) in [
            (named, Some((2, 1))),
            (named, None),
            (named, Some((3, 0))),
            (FinishReason::Length, Some((3, 1))),
            (FinishReason::Stop, Some((1, 0))),
        ] {
            let found = endings(finish, stopped);
            assert!(
                matches!(found[..], [Finding::Termination { rollout: 0, .. }]),
                "{finish:?} {stopped:?}"
            );
        }
    }

    #[test]
    fn a_stop_id_that_also_completes_a_stop_string_ends_the_answer_by_its_id() {
        let stop_id = lease().ticket.sampling.stop_ids[0];
        let found = |finish, (token, string)| {
            let mut group = honest();
            group.rollouts.truncate(1);
            group.rollouts[0].finish = finish;
            drawn_mut(&mut group, 0).0[3] = stop_id;
            audit_endings(&lease(), &group, &[Some(StopAt { token, string })]).len()
        };
        assert_eq!(found(FinishReason::Stop, (3, 0)), 0);
        assert_eq!(found(FinishReason::StopString(0), (3, 0)), 1);
        assert_eq!(
            found(FinishReason::Stop, (2, 0)),
            1,
            "the string is complete before the id"
        );
    }

    #[test]
    fn the_mean_and_the_largest_draw_error_each_have_their_own_bound() {
        let thresholds = Thresholds {
            draw_error_max: 0.1,
            draw_error_mean: 0.01,
            draw_error_reject: 0.2,
            ..Thresholds::SAME_CLASS
        };
        let judged = |mean, max| {
            let position = 0;
            judge_draws(
                &DrawErrors {
                    mean,
                    max,
                    position,
                },
                &thresholds,
            )
        };
        assert_eq!(judged(0.01, 0.1), Decision::Accept);
        assert_eq!(judged(0.011, 0.1), Decision::Grey, "the mean alone");
        assert_eq!(judged(0.01, 0.101), Decision::Grey, "the maximum alone");
        assert_eq!(judged(0.01, 0.2), Decision::Grey);
        assert_eq!(judged(0.01, 0.201), Decision::Reject);
    }

    #[test]
    fn equal_answers_have_equal_digests_under_any_lease() {
        let mut other = honest();
        other.lease = LeaseId([9; 16]);
        assert_eq!(draws_digest(&honest()), draws_digest(&other));
        drawn_mut(&mut other, 0).0[0] ^= 1;
        assert_ne!(draws_digest(&honest()), draws_digest(&other));
    }
}
