//! What the learner uploads if peers share its weights.

use std::num::NonZeroU64;

use super::plan::{Plan, WeightTransfer};
use super::start::{small, start};
use super::swarm::Running;

/// Most bytes that the learner may upload of one version, as a multiple of its anchor.
const ANCHORS_MAX: f64 = 1.5;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_two_workers_and_a_seeder_the_learner_uploads_little_more_than_one_anchor_of_any_version()
 {
    let mut config = small();
    config.run.steps = NonZeroU64::new(12).unwrap();
    assert_uploads(Plan::new(config, start())).await;
}

/// Runs two workers, a critic and a seeder, and compares what the learner uploaded with the size of its anchors.
pub async fn assert_uploads(plan: Plan) {
    let plan = Plan {
        weights: WeightTransfer::BetweenPeers,
        seeders: 1,
        ..plan
    };
    let running = Running::start(plan).await;
    let learner = running.swarm("trainer");
    let offered = running.offered();
    let run = running.finish().await;
    let stats = learner.metrics();
    let mut sizes = Vec::new();
    for (version, (object, bytes)) in offered.anchors() {
        let uploaded = stats
            .objects
            .get(&object)
            .map_or(0, |moved| moved.bytes_uploaded);
        let anchors = uploaded as f64 / bytes.len() as f64;
        println!("version {version}: {anchors:.2} anchors uploaded");
        sizes.push(anchors);
    }
    let mean = sizes.iter().sum::<f64>() / sizes.len() as f64;
    let most = sizes.iter().copied().fold(0.0, f64::max);
    println!(
        "uploads: {} versions, mean {mean:.2} and most {most:.2} anchors, {} bytes in all, {:.1} s",
        sizes.len(),
        stats.total.bytes_uploaded,
        run.seconds
    );
    assert!(sizes.len() > 10);
    assert!(most < ANCHORS_MAX, "{most:.2} anchors of one version");
}
