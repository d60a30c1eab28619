//! Workers with int8 weights: a run that lists their class trains on their groups and on those of other workers, and detects
//! their lies equally well. A critic reviews them in their own arithmetic, with the tolerance of one class.

use std::num::NonZeroU64;

use muster_protocol::dispatch_client::DispatchClientError;
use muster_protocol::message::ask::Ask;
use muster_protocol::message::fate::Fate;
use muster_protocol::message::lease::NumericClass;

use super::hostile_submissions::newest;
use super::lying_workers::{Tally, every_bad_group_of};
use super::plan::{Plan, WorkerKind};
use super::start::{small, start};
use super::swarm::Running;
use super::worker_model::Lie;

/// Least number of steps of a run.
const STEPS: u64 = 12;
/// Least number of trained groups of each worker.
const GROUPS: usize = 4;

fn plan(workers: &[WorkerKind]) -> Plan {
    let mut plan = Plan {
        workers: workers.to_vec(),
        ..Plan::new(small(), start())
    };
    plan.config.dispatch.classes = vec![NumericClass::F32Cpu, NumericClass::Int8Cpu];
    plan
}

/// Runs one worker of each class. The first step trains on answers of version 0 alone, so that its policy differs from the
/// workers' only by the rounding of weights.
async fn trains_on_both_classes(audit_share: f64) {
    let mut plan = plan(&[WorkerKind::Honest, WorkerKind::Int8(None)]);
    plan.config.run.steps = NonZeroU64::MAX;
    plan.config.dispatch.audit.share_min = audit_share;
    let mut running = Running::start(plan).await;
    let workers = ["worker-1", "worker-2"].map(|name| running.peer(name));
    running
        .wait_for("groups of both classes in batches", |progress| {
            let trained = |worker| progress.count(worker, Fate::Trained) >= GROUPS;
            progress.steps >= STEPS && workers.into_iter().all(trained)
        })
        .await;
    let run = running.stop().await;
    let tally = Tally::of(&run.progress, &run.submissions);
    assert_eq!(tally.honest_rejected, Vec::<String>::new());
    assert!(
        tally.honest_passed > 0 && tally.bad_rejected == 0,
        "{tally:?}"
    );
    let steps = run.steps();
    let mismatch: Vec<f64> = steps.iter().map(|step| step.mismatch_kl_mean).collect();
    println!(
        "audit share {audit_share}: {} steps, groups trained {:?}, mismatch_kl {mismatch:?}",
        run.progress.steps,
        workers.map(|worker| run.progress.count(worker, Fate::Trained)),
    );
    assert!((0.0..1e-3).contains(&mismatch[0]), "{mismatch:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn beside_others_are_trained_on_and_every_group_passes_its_audit() {
    trains_on_both_classes(1.0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn beside_others_are_trained_on_without_audits() {
    trains_on_both_classes(0.0).await;
}

macro_rules! lies {
    ($($name:ident: $worker:expr, $lie:expr,)*) => {$(
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() {
            let workers = [WorkerKind::Honest, $worker, WorkerKind::Int8(None)];
            every_bad_group_of($lie, plan(&workers)).await;
        }
    )*};
}

lies! {
    that_claim_to_have_whole_weights_are_rejected: WorkerKind::Liar(Lie::OtherKernels), Lie::OtherKernels,
    that_have_whole_weights_in_truth_are_rejected: WorkerKind::Int8(Some(Lie::OtherKernels)), Lie::OtherKernels,
    that_edit_one_token_are_rejected: WorkerKind::Int8(Some(Lie::EditedToken)), Lie::EditedToken,
    that_shift_their_log_probs_are_rejected: WorkerKind::Int8(Some(Lie::ShiftedLogprobs)), Lie::ShiftedLogprobs,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn are_refused_by_a_run_that_does_not_list_their_class() {
    let mut plan = plan(&[WorkerKind::Honest, WorkerKind::Absent]);
    plan.config.dispatch.classes = small().dispatch.classes;
    let running = Running::start(plan).await;
    let client = running.client("worker-2");
    let held = newest(&client).await;
    let ask = Ask::Lease {
        held,
        class: NumericClass::Int8Cpu,
        rollouts_max: 8,
    };
    match client.ask(ask).await {
        Err(DispatchClientError::Refused(reason)) => assert_eq!(
            reason,
            "this run takes answers of class f32-cpu, f32-cuda, not int8-cpu"
        ),
        other => panic!("answered {other:?}"),
    }
    running.stop().await;
}
