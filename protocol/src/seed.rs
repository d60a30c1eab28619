//! Whose randomness an answer uses: the seed that dispatch prescribes with a lease.
//!
//! `seed = BLAKE3("swarm-task-v1\0" ‖ run ‖ 0 ‖ u64le epoch ‖ pk ‖ u64le step ‖ u64le submission_no)`, then the lease's own
//! unpredictable nonce is mixed in, `seed' = BLAKE3("muster-lease-v1\0" ‖ seed ‖ nonce)`, so that keys ground in advance
//! gain nothing. The draws u(g, t) of `seed'` are `policy::sampling`'s. Knows nothing of prompts: those come with tickets.

use crate::id::{PeerId, PolicyVersion, RunId};

/// What a lease's seed is bound to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeedBinding<'a> {
    /// The run.
    pub run: &'a RunId,
    /// Which life of dispatch gave the lease, so that its counters may start anew.
    pub epoch: u64,
    /// The lessee.
    pub worker: &'a PeerId,
    /// The version leased.
    pub version: PolicyVersion,
    /// Dispatch's counter for this worker.
    pub submission: u64,
}

/// The seed before the nonce.
pub fn task_seed(binding: &SeedBinding<'_>) -> [u8; 32] {
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

/// The seed that an answer's draws come from.
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
