//! One worker of three lies. If every group is audited, every bad group is rejected and no honest group is. With the audit
//! share of the quickstart, the liar gets no more leases and the run finishes.
//!
//! A group is bad if its tokens, finish, version or log-probs differ from those that its lease prescribes; the worker model
//! of the test also computes the honest answer.

use std::num::NonZeroU64;

use muster_protocol::message::ask::{Ask, Reply, WaitReason};
use muster_protocol::message::fate::{Fate, FateRecord};
use muster_protocol::message::lease::NumericClass;

use super::hostile_submissions::newest;
use super::plan::{Plan, WorkerKind};
use super::results::Progress;
use super::start::{small, start};
use super::submissions::{Difference, Submissions};
use super::swarm::Running;
use super::worker_model::Lie;

/// The worker that lies: neither the first nor the last.
const LIAR: &str = "worker-2";
/// Rejected bad groups that a test waits for.
const BAD_GROUPS: usize = 12;
/// Failed audits that a worker may have in a test that needs more of its groups.
const FAILURES_UNLIMITED: u32 = 1_000_000;

/// Counts of bad and honest groups by their fate.
#[derive(Debug, Default)]
pub struct Tally {
    pub bad_rejected: usize,
    pub honest_passed: usize,
    /// Bad groups that were audited and not rejected.
    pub bad_passed_audit: Vec<String>,
    /// Bad groups that were not audited.
    pub bad_unaudited: usize,
    pub honest_rejected: Vec<String>,
    /// Groups that differ from the prescribed ones by rounding alone.
    pub within_rounding: usize,
    pub reasons: Vec<String>,
}

impl Tally {
    pub fn of(progress: &Progress, submissions: &Submissions) -> Self {
        let mut tally = Self::default();
        for record in &progress.fates {
            let entry = record.lease.and_then(|lease| submissions.of(&lease));
            let Some(entry) = entry.filter(|_| record.fate != Fate::Duplicate) else {
                continue;
            };
            match entry.difference {
                None => tally.count(record, None),
                Some(Difference::Bad(how)) => tally.count(record, Some(how)),
                // Honest machines differ by this much, so that either fate is right.
                Some(Difference::Rounding) => tally.within_rounding += 1,
            }
        }
        tally
    }

    fn count(&mut self, record: &FateRecord, bad: Option<String>) {
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

    pub fn assert_only_bad_groups_rejected(&self, lie: Lie) {
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

/// Whether the reason of a fate is a finding that this lie causes, with its numbers.
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

/// Every group is audited, and the liar gets leases however often it fails.
async fn every_bad_group_is_rejected(lie: Lie) {
    every_bad_group_of(lie, plan(lie)).await;
}

/// The same with a plan whose second worker lies.
pub async fn every_bad_group_of(lie: Lie, mut plan: Plan) {
    plan.config.run.steps = NonZeroU64::MAX;
    plan.config.dispatch.audit.share_min = 1.0;
    plan.config.dispatch.conduct.failures_max = FAILURES_UNLIMITED;
    let mut running = Running::start(plan).await;
    let liar = running.peer(LIAR);
    let wanted = format!("{BAD_GROUPS} rejections of {lie:?}");
    running
        .wait_for(&wanted, |progress| {
            progress.count(liar, Fate::Rejected) >= BAD_GROUPS && progress.steps >= 3
        })
        .await;
    let run = running.stop().await;
    let tally = Tally::of(&run.progress, &run.submissions);
    tally.assert_only_bad_groups_rejected(lie);
    assert_eq!(
        tally.bad_unaudited, 0,
        "{lie:?}: with a share of 1 every group is audited"
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
        run.progress.steps,
        run.seconds,
        tally.reasons[0]
    );
}

/// The quickstart's share of audits and its timeout with workers: the liar is sent away and the run ends.
async fn the_liar_gets_no_more_leases_and_the_run_finishes(lie: Lie) {
    let mut plan = plan(lie);
    plan.config.run.steps = NonZeroU64::new(12).unwrap();
    let failures_max = plan.config.dispatch.conduct.failures_max as usize;
    let mut running = Running::start(plan).await;
    let liar = running.peer(LIAR);
    running
        .wait_for(&format!("the end of timeout with {lie:?}"), |progress| {
            progress.count(liar, Fate::Rejected) >= failures_max
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
    let answered = running.submissions().count_of(liar);
    let run = running.finish().await;
    let tally = Tally::of(&run.progress, &run.submissions);
    tally.assert_only_bad_groups_rejected(lie);
    // The liar may still hold earlier leases.
    let most = answered + small().dispatch.conduct.leases_max as usize;
    let answered = run.submissions.count_of(liar);
    assert!(
        answered <= most,
        "{lie:?}: {answered} groups, at most {most}"
    );
    println!(
        "{lie:?}, quickstart's share: refused after {} rejections, {} bad groups were not audited, all {} steps closed \
         in {:.1} s",
        tally.bad_rejected, tally.bad_unaudited, run.progress.steps, run.seconds
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
            async fn gets_no_more_leases_and_the_run_finishes() {
                the_liar_gets_no_more_leases_and_the_run_finishes($lie).await;
            }
        }
    )*};
}

lies! {
    a_worker_that_draws_at_another_temperature: Lie::Temperature,
    a_worker_that_edits_one_token: Lie::EditedToken,
    a_worker_that_takes_the_best_of_four_seeds: Lie::BestOfSeeds,
    a_worker_that_takes_the_best_of_four_versions: Lie::BestOfVersions,
    a_worker_that_claims_a_newer_version_than_it_uses: Lie::StaleWeights,
    a_worker_that_replays_its_own_group: Lie::Replay,
    a_worker_that_cuts_answers_short: Lie::Truncated,
    a_worker_that_shifts_its_log_probs: Lie::ShiftedLogprobs,
}
