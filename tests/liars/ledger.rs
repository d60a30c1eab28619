//! What every worker answered, beside what its lease prescribed. Written by the workers of a test as they answer, read when
//! their groups' fates are known.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use muster_protocol::id::{LeaseId, PeerId};
use muster_protocol::message::descriptor::Thresholds;
use muster_protocol::message::group::Rollout;
use muster_protocol::message::lease::Lease;

/// One group as it was submitted.
#[derive(Debug, Clone)]
pub struct Entry {
    pub worker: PeerId,
    /// How it differs from what its lease prescribes, if it does.
    pub bad: Option<String>,
}

/// All groups of a run, by lease.
#[derive(Debug, Clone, Default)]
pub struct Ledger {
    entries: Arc<Mutex<BTreeMap<LeaseId, Entry>>>,
}

impl Ledger {
    /// Notes what is submitted for `lease` beside what an honest worker would submit.
    pub fn note(&self, lease: &Lease, honest: &[Rollout], told: &[Rollout]) {
        let bad = difference(honest, told);
        let worker = lease.worker;
        self.entries
            .lock()
            .unwrap()
            .insert(lease.id, Entry { worker, bad });
    }

    pub fn of(&self, lease: &LeaseId) -> Option<Entry> {
        self.entries.lock().unwrap().get(lease).cloned()
    }
}

/// How a group differs from the prescribed one: tokens, finish, version, or log-probs beyond what the rounding of one
/// numeric class explains.
pub fn difference(honest: &[Rollout], told: &[Rollout]) -> Option<String> {
    if honest.len() != told.len() {
        return Some(format!("{} rollouts for {}", told.len(), honest.len()));
    }
    let mut pairs = honest.iter().zip(told).enumerate();
    pairs.find_map(|(number, (honest, told))| {
        let ((tokens, logprobs), (told_tokens, told_logprobs)) = (honest.drawn(), told.drawn());
        if tokens != told_tokens {
            return Some(format!("rollout {number} has other tokens"));
        }
        if honest.finish != told.finish || honest.oldest_version() != told.oldest_version() {
            return Some(format!("rollout {number} has another finish or version"));
        }
        let off = logprobs.iter().zip(&told_logprobs);
        let off = off
            .map(|(one, other)| f64::from((one - other).abs()))
            .fold(0.0, f64::max);
        (off > Thresholds::SAME_CLASS.logprob_error_max)
            .then(|| format!("rollout {number} has log-probs off by {off:.4}"))
    })
}
