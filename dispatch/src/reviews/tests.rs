use super::*;
use muster_protocol::envelope::seal;
use muster_protocol::id::{LeaseId, RunId, StateRoot};
use muster_protocol::identity::{Identity, MachineSeed};
use muster_protocol::message::verdict::{Finding, RolloutReward};

const TICKET: TicketId = TicketId(1);
const NOW: UnixMillis = UnixMillis(0);

fn critic(n: u8) -> Identity {
    Identity::from_seed(&MachineSeed::from_bytes([n; 32]))
}

fn version() -> VersionRef {
    VersionRef {
        version: PolicyVersion(2),
        root: StateRoot([2; 32]),
    }
}

fn lease() -> Signed<Lease> {
    let author = critic(9).peer_id();
    let lease = crate::admission::tests::lease_of(TICKET, author, 1);
    seal(&critic(8), &"r".parse().unwrap(), 0, lease).unwrap()
}

fn queue(verdicts: u32, audit: bool) -> ReviewQueue {
    let mut queue = ReviewQueue::new(CritiqueConfig {
        verdicts,
        ..Default::default()
    });
    let group = GroupHash([1; 32]);
    queue.open(PendingReview::new(
        group,
        Bytes::new(),
        lease(),
        vec![version()],
        audit,
    ));
    queue
}

fn verdict(n: u8, reward: f32, decision: Decision) -> Signed<Verdict> {
    let findings = match decision {
        Decision::Accept => Vec::new(),
        Decision::Grey | Decision::Reject => {
            vec![Finding::Mismatch {
                problem: "bad".to_owned(),
            }]
        }
    };
    let body = Verdict {
        group: GroupHash([1; 32]),
        lease: LeaseId([2; 16]),
        ticket: TICKET,
        audited: true,
        rewards: vec![RolloutReward {
            total: reward,
            components: Vec::new(),
        }],
        findings,
        decision,
    };
    let run: RunId = "r".parse().unwrap();
    seal(&critic(n), &run, 0, body).unwrap()
}

fn judge(queue: &mut ReviewQueue, n: u8, reward: f32, decision: Decision) -> ReviewOutcome {
    assert!(
        queue
            .assign(critic(n).peer_id(), &[version()], NOW)
            .is_some(),
        "critic {n}"
    );
    queue.record(verdict(n, reward, decision)).unwrap()
}

#[test]
fn one_verdict_settles_a_review_where_one_is_asked_for() {
    let outcome = judge(&mut queue(1, false), 1, 1.0, Decision::Accept);
    assert!(matches!(
        outcome,
        ReviewOutcome::Settled {
            decision: Decision::Accept,
            ..
        }
    ));
}

#[test]
fn an_inflated_reward_is_outvoted_and_its_critic_named() {
    let mut queue = queue(2, false);
    assert!(matches!(
        judge(&mut queue, 1, 5.0, Decision::Accept),
        ReviewOutcome::Pending
    ));
    assert!(matches!(
        judge(&mut queue, 2, 1.0, Decision::Accept),
        ReviewOutcome::Pending
    ));
    let ReviewOutcome::Settled {
        verdicts,
        dissenters,
        ..
    } = judge(&mut queue, 3, 1.0, Decision::Accept)
    else {
        panic!("not settled")
    };
    assert_eq!(dissenters, [critic(1).peer_id()]);
    assert!(
        verdicts
            .iter()
            .all(|verdict| verdict.body.rewards[0].total == 1.0)
    );
}

#[test]
fn critics_that_never_agree_leave_a_group_undecided() {
    let mut queue = queue(2, false);
    for n in 1..5 {
        assert!(matches!(
            judge(&mut queue, n, f32::from(n), Decision::Accept),
            ReviewOutcome::Pending
        ));
    }
    let outcome = judge(&mut queue, 5, 5.0, Decision::Accept);
    assert!(matches!(outcome, ReviewOutcome::Undecided(_)));
}

#[test]
fn an_author_never_judges_its_own_group_and_no_critic_judges_twice() {
    let mut queue = queue(2, false);
    assert!(
        queue
            .assign(critic(9).peer_id(), &[version()], NOW)
            .is_none()
    );
    judge(&mut queue, 1, 1.0, Decision::Accept);
    assert!(
        queue
            .assign(critic(1).peer_id(), &[version()], NOW)
            .is_none()
    );
}

#[test]
fn an_audit_goes_to_a_critic_that_holds_the_version_and_must_be_made() {
    let mut queue = queue(1, true);
    assert!(queue.assign(critic(1).peer_id(), &[], NOW).is_none());
    assert!(
        queue
            .assign(critic(1).peer_id(), &[version()], NOW)
            .is_some()
    );
    let mut lazy = verdict(1, 1.0, Decision::Accept);
    lazy.body.audited = false;
    assert!(matches!(
        queue.record(lazy),
        Err(VerdictRefusal::NotAudited(_))
    ));
}

#[test]
fn a_verdict_with_a_wrong_number_of_rewards_or_another_lease_is_refused_and_another_critic_asked() {
    let mut few = verdict(1, 1.0, Decision::Accept);
    few.body.rewards.clear();
    let mut strange = verdict(1, 1.0, Decision::Accept);
    strange.body.lease = LeaseId([7; 16]);
    for misfit in [few, strange] {
        let mut queue = queue(1, false);
        let one = critic(1).peer_id();
        assert!(queue.assign(one, &[], NOW).is_some());
        let refused = queue.record(misfit);
        assert!(matches!(refused, Err(VerdictRefusal::Misfit { .. })));
        assert!(queue.assign(one, &[], NOW).is_none());
        let settled = judge(&mut queue, 2, 1.0, Decision::Accept);
        assert!(matches!(settled, ReviewOutcome::Settled { .. }));
    }
}

#[test]
fn a_verdict_that_was_not_asked_for_is_refused() {
    let refused = queue(1, false).record(verdict(1, 1.0, Decision::Accept));
    assert!(matches!(refused, Err(VerdictRefusal::NotAsked(_))));
}

#[test]
fn a_critic_that_take_back_is_given_what_it_lost() {
    let mut queue = queue(1, false);
    let one = critic(1).peer_id();
    assert!(queue.assign(one, &[], NOW).is_some());
    assert!(
        queue.assign(one, &[], NOW).is_none(),
        "not twice in one answer"
    );
    queue.take_back(&one);
    assert!(queue.assign(one, &[], NOW).is_some());
}

#[test]
fn a_critic_that_does_not_answer_is_replaced_after_its_time() {
    let mut queue = queue(1, false);
    assert!(queue.assign(critic(1).peer_id(), &[], NOW).is_some());
    assert!(queue.assign(critic(2).peer_id(), &[], NOW).is_none());
    assert!(
        queue
            .assign(critic(2).peer_id(), &[], UnixMillis(30_000))
            .is_some()
    );
}
