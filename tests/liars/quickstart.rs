//! The quickstart with one liar among three workers, or among three critics, still learns. Each of these runs takes minutes,
//! so that they are ignored by default:
//!
//! `cargo test --release --test liars -- --ignored --nocapture --test-threads 1 still_reaches`

use std::num::NonZeroU64;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::config::{QUICKSTART, RunConfig};
use super::harness::{muster, succeed, text};
use super::lying_critics::falsified_rewards;
use super::lying_workers::Tally;
use super::plan::{CriticKind, Plan, WorkerKind};
use super::results::FinishedRun;
use super::start::Start;
use super::swarm::Running;
use super::worker_model::Lie;

const FILE: &str = "configs/quickstart.toml";
/// Greedy accuracy on the held-out prompts that a run must reach.
const ACCURACY: f64 = 0.9;
/// Accuracy that a run with meaningless rewards may gain by chance.
const CHANCE: f64 = 0.05;
/// Time limit of a run on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(1_200);

fn plan() -> Plan {
    static START: OnceLock<Arc<Start>> = OnceLock::new();
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(FILE);
    let config = RunConfig::parse(QUICKSTART, &file).unwrap();
    let start = START.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR"))
            .join(format!("liars-quickstart-{}", std::process::id()));
        Arc::new(Start::warm_up(&config, &file, &folder))
    });
    Plan {
        timeout: TIMEOUT,
        ..Plan::new(config, start.clone())
    }
}

/// Greedy accuracy of a model folder on the held-out split, as `muster eval` measures it.
fn accuracy(folder: &Path) -> f64 {
    let printed = succeed(&mut muster(&[
        "eval",
        FILE,
        "--json",
        "--model",
        text(folder),
    ]));
    let line: serde_json::Value = serde_json::from_str(&printed).unwrap();
    line["accuracy"].as_f64().unwrap()
}

fn report(name: &str, run: &FinishedRun) -> f64 {
    let steps = run.progress.steps;
    let before = accuracy(&run.start.folder);
    let after = accuracy(&run.dir.path().join(format!("checkpoints/{steps}")));
    println!(
        "{name}: held-out accuracy {before:.3} to {after:.3} in {steps} steps, {:.0} s",
        run.seconds
    );
    after
}

async fn a_liar_among_three_workers(lie: Lie) {
    let workers = [
        WorkerKind::Honest,
        WorkerKind::Liar(lie),
        WorkerKind::Honest,
    ];
    let plan = Plan {
        workers: workers.to_vec(),
        ..plan()
    };
    let run = Running::start(plan).await.finish().await;
    let tally = Tally::of(&run.progress, &run.submissions);
    let after = report(&format!("{lie:?}"), &run);
    println!(
        "{lie:?}: {} bad groups rejected, {} not audited, {} within rounding; {} of {} honest groups rejected",
        tally.bad_rejected,
        tally.bad_unaudited,
        tally.within_rounding,
        tally.honest_rejected.len(),
        tally.honest_passed + tally.honest_rejected.len()
    );
    tally.assert_only_bad_groups_rejected(lie);
    assert!(after >= ACCURACY, "{lie:?}: accuracy {after:.3}");
}

macro_rules! lies {
    ($($name:ident: $lie:expr,)*) => {$(
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        #[ignore = "takes minutes: run with --ignored"]
        async fn $name() {
            a_liar_among_three_workers($lie).await;
        }
    )*};
}

lies! {
    still_reaches_ninety_percent_with_a_worker_at_another_temperature: Lie::Temperature,
    still_reaches_ninety_percent_with_a_worker_that_edits_one_token: Lie::EditedToken,
    still_reaches_ninety_percent_with_a_worker_that_takes_the_best_of_four_seeds: Lie::BestOfSeeds,
    still_reaches_ninety_percent_with_a_worker_that_takes_the_best_of_four_versions: Lie::BestOfVersions,
    still_reaches_ninety_percent_with_a_worker_on_stale_weights: Lie::StaleWeights,
    still_reaches_ninety_percent_with_a_worker_that_replays: Lie::Replay,
    still_reaches_ninety_percent_with_a_worker_that_cuts_answers_short: Lie::Truncated,
    still_reaches_ninety_percent_with_a_worker_that_shifts_its_log_probs: Lie::ShiftedLogprobs,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes: run with --ignored"]
async fn still_reaches_ninety_percent_with_a_critic_that_inflates() {
    let mut plan = plan();
    plan.config.dispatch.critique.verdicts = 2;
    plan.critics = vec![CriticKind::Inflates, CriticKind::Honest, CriticKind::Honest];
    let run = Running::start(plan).await.finish().await;
    assert_eq!(falsified_rewards(&run), Vec::<String>::new());
    let after = report("inflating critic", &run);
    println!("inflating critic: {:?}", run.critic_counts);
    assert!(after >= ACCURACY, "accuracy {after:.3}");
}

/// The control of the quickstart: the same run with rewards that are permuted within each group.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes: run with --ignored"]
async fn still_reaches_no_more_accuracy_when_rewards_are_permuted_within_each_group() {
    let mut plan = plan();
    plan.critics = vec![CriticKind::Permutes];
    let before = accuracy(&plan.start.folder);
    let run = Running::start(plan).await.finish().await;
    let after = report("permuted rewards", &run);
    let trained = run.rollouts().len();
    assert!(
        trained > 0 && run.critic_counts.inflated > 0,
        "nothing was permuted"
    );
    assert!(
        after < before + CHANCE,
        "accuracy {before:.3} to {after:.3}"
    );
}

/// The quickstart's model has anchors of tens of shards.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes a minute: run with --ignored"]
async fn still_reaches_every_peer_with_little_more_than_one_anchor_per_version() {
    let mut plan = plan();
    plan.config.run.steps = NonZeroU64::new(12).unwrap();
    super::uploads::assert_uploads(plan).await;
}
