//! One worker of three lies. With every group audited all bad groups are rejected and no honest one is; with the share of
//! the quickstart the run goes on and the liar is sent away.
//!
//! A group is bad if its tokens, finish, version or log-probs differ from what its lease prescribes, which the harness
//! knows by having the honest answerer answer the same lease.

use std::num::NonZeroU64;

use muster_protocol::message::ask::{Ask, Reply, WaitReason};
use muster_protocol::message::fate::{Fate, FateRecord};
use muster_protocol::message::lease::NumericClass;

use super::hostile_submissions::newest;
use super::ledger::{Difference, Ledger};
use super::start::{small, start};
use super::suspect::Lie;
use super::swarm::{Plan, Running, View, WorkerKind};

/// Who lies: in the middle, so that neither the first nor the last worker is special.
const LIAR: &str = "worker-2";
/// Bad groups that a test wants to see rejected.
const BAD_GROUPS: usize = 12;
/// Failed audits that a worker may have where a test wants to see more of its groups.
const NO_END: u32 = 1_000_000;

/// What became of bad and of honest groups.
#[derive(Debug, Default)]
pub struct Tally {
    pub bad_rejected: usize,
    pub honest_passed: usize,
    /// Bad groups that a forward pass checked, and that were not rejected.
    pub bad_passed_audit: Vec<String>,
    /// Bad groups that nobody looked at.
    pub bad_unaudited: usize,
    pub honest_rejected: Vec<String>,
    /// Groups that differ from the prescribed ones by no more than rounding does.
    pub within_rounding: usize,
    pub reasons: Vec<String>,
}

impl Tally {
    pub fn of(view: &View, ledger: &Ledger) -> Self {
        let mut tally = Self::default();
        for record in &view.fates {
            let entry = record.lease.and_then(|lease| ledger.of(&lease));
            let Some(entry) = entry.filter(|_| record.fate != Fate::Duplicate) else {
                continue;
            };
            match entry.difference {
                None => tally.take_in(record, None),
                Some(Difference::Bad(how)) => tally.take_in(record, Some(how)),
                // Neither may be complained about: it is what honest machines do to each other.
                Some(Difference::Rounding) => tally.within_rounding += 1,
            }
        }
        tally
    }

    fn take_in(&mut self, record: &FateRecord, bad: Option<String>) {
        let rejected = record.fate == Fate::Rejected;
        match bad {
            Some(_) if rejected => {
                self.bad_rejected += 1;
                self.reasons.push(record.reason.clone());
            }
            Some(how) if record.audited => self.bad_passed_audit.push(how),
            Some(_) => self.bad_unaudited += 1,
            None if rejected => self.honest_rejected.push(record.reason.clone()),
            None => self.honest_passed += 1,
        }
    }

    pub fn assert_just(&self, lie: Lie) {
        let none: &[String] = &[];
        assert_eq!(self.bad_passed_audit, none, "{lie:?}: bad groups accepted");
        assert_eq!(
            self.honest_rejected, none,
            "{lie:?}: honest groups rejected"
        );
        let unexplained = self.reasons.iter().find(|reason| !explains(lie, reason));
        assert_eq!(
            unexplained, None,
            "{lie:?}: a rejection without its finding"
        );
    }
}

/// Whether a fate's reason is a finding that the lie leaves, with its numbers.
fn explains(lie: Lie, reason: &str) -> bool {
    let draws = reason.contains("was not drawn as prescribed: cumulative-distribution error");
    let logprobs = reason.contains("reports a log-prob off by");
    match lie {
        Lie::ShiftedLogprobs => logprobs,
        Lie::StaleWeights | Lie::OtherKernels => draws || logprobs,
        Lie::Truncated => draws || reason.contains("claims a stop id that it does not end with"),
        Lie::Replay => draws || reason.contains("repeats the answers to lease"),
        _ => draws,
    }
}

fn plan(lie: Lie) -> Plan {
    let workers = [
        WorkerKind::Honest,
        WorkerKind::Liar(lie),
        WorkerKind::Honest,
    ];
    Plan {
        workers: workers.to_vec(),
        ..Plan::new(small(), start())
    }
}

/// Every group is audited, and the liar may go on however often it fails.
async fn every_bad_group_is_rejected(lie: Lie) {
    every_bad_group_of(lie, plan(lie)).await;
}

/// The same for a plan whose second worker lies.
pub async fn every_bad_group_of(lie: Lie, mut plan: Plan) {
    plan.config.run.steps = NonZeroU64::MAX;
    plan.config.dispatch.audit.share_min = 1.0;
    plan.config.dispatch.conduct.failures_max = NO_END;
    let mut running = Running::start(plan).await;
    let liar = running.peer(LIAR);
    let wanted = format!("{BAD_GROUPS} rejections of {lie:?}");
    running
        .until(&wanted, |view| {
            view.count(liar, Fate::Rejected) >= BAD_GROUPS && view.steps >= 3
        })
        .await;
    let outcome = running.stop().await;
    let tally = Tally::of(&outcome.view, &outcome.ledger);
    tally.assert_just(lie);
    assert_eq!(
        tally.bad_unaudited, 0,
        "{lie:?}: with a share of 1 nothing passes unseen"
    );
    assert!(
        tally.bad_rejected >= BAD_GROUPS && tally.honest_passed > 0,
        "{tally:?}"
    );
    println!(
        "{lie:?}, all audited: {} bad groups rejected of {}, honest ones {} of {}, {} steps in {:.1} s; e.g. {}",
        tally.bad_rejected,
        tally.bad_rejected + tally.bad_passed_audit.len() + tally.bad_unaudited,
        tally.honest_rejected.len(),
        tally.honest_passed + tally.honest_rejected.len(),
        outcome.view.steps,
        outcome.seconds,
        tally.reasons[0]
    );
}

/// The quickstart's share of audits and its patience with workers: the liar is sent away and the run ends.
async fn the_liar_is_sent_away_and_the_run_ends(lie: Lie) {
    let mut plan = plan(lie);
    plan.config.run.steps = NonZeroU64::new(12).unwrap();
    let failures_max = plan.config.dispatch.conduct.failures_max as usize;
    let mut running = Running::start(plan).await;
    let liar = running.peer(LIAR);
    running
        .until(&format!("the end of patience with {lie:?}"), |view| {
            view.count(liar, Fate::Rejected) >= failures_max
        })
        .await;
    let client = running.client(LIAR);
    let held = newest(&client).await;
    let ask = Ask::Lease {
        held,
        class: NumericClass::F32Cpu,
        rollouts_max: 8,
    };
    let answer = client.ask(ask).await.unwrap();
    let Reply::Wait { reason, .. } = answer else {
        panic!("{lie:?}: the liar was answered {answer:?}");
    };
    assert_eq!(reason, WaitReason::CoolDown);
    let answered = running.ledger().answered_by(liar);
    let outcome = running.finish().await;
    let tally = Tally::of(&outcome.view, &outcome.ledger);
    tally.assert_just(lie);
    // It may hold leases that it was given before.
    let most = answered + small().dispatch.conduct.leases_max as usize;
    let answered = outcome.ledger.answered_by(liar);
    assert!(
        answered <= most,
        "{lie:?}: {answered} groups, at most {most}"
    );
    println!(
        "{lie:?}, quickstart's share: sent away after {} rejections, {} bad groups were not audited, all {} steps closed \
         in {:.1} s",
        tally.bad_rejected, tally.bad_unaudited, outcome.view.steps, outcome.seconds
    );
}

macro_rules! lies {
    ($($name:ident: $lie:expr,)*) => {$(
        mod $name {
            use super::*;

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn every_bad_group_is_rejected_and_no_honest_one() {
                every_bad_group_is_rejected($lie).await;
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn is_sent_away_and_the_run_ends() {
                the_liar_is_sent_away_and_the_run_ends($lie).await;
            }
        }
    )*};
}

lies! {
    a_worker_that_draws_at_another_temperature: Lie::Temperature,
    a_worker_that_edits_one_token: Lie::EditedToken,
    a_worker_that_takes_the_best_of_four_seeds: Lie::BestOfSeeds,
    a_worker_that_takes_the_best_of_four_versions: Lie::BestOfVersions,
    a_worker_that_claims_stale_weights_to_be_fresh: Lie::StaleWeights,
    a_worker_that_replays_its_own_group: Lie::Replay,
    a_worker_that_cuts_answers_short: Lie::Truncated,
    a_worker_that_shifts_its_log_probs: Lie::ShiftedLogprobs,
}
