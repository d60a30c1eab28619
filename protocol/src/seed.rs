//! The seed that dispatch prescribes with a lease: an answer's only source of randomness.
//!
//! `seed = BLAKE3("swarm-task-v1\0" ‖ run ‖ 0 ‖ u64le epoch ‖ pk ‖ u64le step ‖ u64le submission_no)`, then the lease's own
//! unpredictable nonce is mixed in, `seed' = BLAKE3("muster-lease-v1\0" ‖ seed ‖ nonce)`, so that keys ground in advance
//! gain nothing. `policy::sampling` derives the draws u(g, t) from `seed'`. Knows nothing of prompts, which come with tickets.

use crate::id::{PeerId, PolicyVersion, RunId};

/// The fields of a lease that its seed depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeedBinding<'a> {
    pub run: &'a RunId,
    /// The generation of the dispatch that gave the lease: its counters start anew.
    pub epoch: u64,
    pub worker: &'a PeerId,
    pub version: PolicyVersion,
    /// Dispatch's counter for this worker.
    pub submission: u64,
}

/// The seed before the nonce.
pub(crate) fn task_seed(binding: &SeedBinding<'_>) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"swarm-task-v1\0");
    hasher.update(binding.run.as_str().as_bytes());
    hasher.update(&[0]);
    hasher.update(&binding.epoch.to_le_bytes());
    hasher.update(&binding.worker.0);
    hasher.update(&binding.version.0.to_le_bytes());
    hasher.update(&binding.submission.to_le_bytes());
    *hasher.finalize().as_bytes()
}

/// The seed of an answer's draws.
pub fn lease_seed(binding: &SeedBinding<'_>, nonce: &[u8; 32]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"muster-lease-v1\0");
    hasher.update(&task_seed(binding));
    hasher.update(nonce);
    *hasher.finalize().as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn task_seeds_are_those_of_the_golden_vectors() {
        let vectors: serde_json::Value =
            serde_json::from_str(include_str!("../testdata/seeds_sampling.json")).unwrap();
        for case in vectors["cases"].as_array().unwrap() {
            let run: RunId = case["run"].as_str().unwrap().parse().unwrap();
            let worker: PeerId = case["worker_pk"].as_str().unwrap().parse().unwrap();
            let binding = SeedBinding {
                run: &run,
                epoch: case["epoch"].as_u64().unwrap(),
                worker: &worker,
                version: PolicyVersion(case["step"].as_u64().unwrap()),
                submission: case["submission"].as_u64().unwrap(),
            };
            assert_eq!(
                hex::encode(task_seed(&binding)),
                case["seed"].as_str().unwrap()
            );
        }
    }

    #[test]
    fn the_nonce_changes_the_seed() {
        let run: RunId = "a".parse().unwrap();
        let worker = PeerId([1; 32]);
        let binding = SeedBinding {
            run: &run,
            epoch: 1,
            worker: &worker,
            version: PolicyVersion(1),
            submission: 1,
        };
        assert_ne!(
            lease_seed(&binding, &[0; 32]),
            lease_seed(&binding, &[1; 32])
        );
    }
}
