//! What every worker answered, beside what its lease prescribed. Written by the workers of a test as they answer, read when
//! their groups' fates are known.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use muster_protocol::id::{LeaseId, PeerId};
use muster_protocol::message::descriptor::Thresholds;
use muster_protocol::message::group::Rollout;
use muster_protocol::message::lease::Lease;

/// How a group differs from the one that its lease prescribes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Difference {
    /// No more than the rounding of one numeric class: log-probs within its bound, and other tokens only where the
    /// prescribed draw lies within its bound of the edge between the two.
    Rounding,
    /// More than that: the group is bad.
    Bad(String),
}

/// One group as it was submitted.
#[derive(Debug, Clone)]
pub struct Entry {
    pub worker: PeerId,
    pub difference: Option<Difference>,
}

/// All groups of a run, by lease.
#[derive(Debug, Clone, Default)]
pub struct Ledger {
    entries: Arc<Mutex<BTreeMap<LeaseId, Entry>>>,
}

impl Ledger {
    /// Notes how what is submitted for `lease` differs from what an honest worker would submit.
    pub fn note(&self, lease: &Lease, difference: Option<Difference>) {
        let worker = lease.worker;
        let entry = Entry { worker, difference };
        self.entries.lock().unwrap().insert(lease.id, entry);
    }

    pub fn of(&self, lease: &LeaseId) -> Option<Entry> {
        self.entries.lock().unwrap().get(lease).cloned()
    }

    /// Groups that a worker has answered.
    pub fn answered_by(&self, worker: PeerId) -> usize {
        let entries = self.entries.lock().unwrap();
        entries
            .values()
            .filter(|entry| entry.worker == worker)
            .count()
    }
}

/// Compares a group with the prescribed one. `draw_error` says how far the prescribed draw lies from the interval of the
/// told token at a position of a rollout, under the leased version.
pub fn difference(
    honest: &[Rollout],
    told: &[Rollout],
    draw_error: impl Fn(usize, usize) -> f64,
) -> Option<Difference> {
    let bad = |how: String| Some(Difference::Bad(how));
    if honest.len() != told.len() {
        return bad(format!("{} rollouts for {}", told.len(), honest.len()));
    }
    let bounds = Thresholds::SAME_CLASS;
    let mut found = None;
    for (number, (honest, told)) in honest.iter().zip(told).enumerate() {
        let ((tokens, logprobs), (told_tokens, told_logprobs)) = (honest.drawn(), told.drawn());
        if honest.oldest_version() != told.oldest_version() {
            return bad(format!("rollout {number} has another version"));
        }
        if tokens != told_tokens {
            let same = tokens.iter().zip(&told_tokens).take_while(|(a, b)| a == b);
            let position = same.count();
            if position == told_tokens.len() || draw_error(number, position) > bounds.draw_error_max
            {
                return bad(format!("rollout {number} has another token at {position}"));
            }
            found = Some(Difference::Rounding);
            continue;
        }
        if honest.finish != told.finish {
            return bad(format!("rollout {number} has another finish"));
        }
        let off = logprobs.iter().zip(&told_logprobs);
        let off = off.map(|(one, other)| f64::from((one - other).abs()));
        let off = off.fold(0.0, f64::max);
        if off > bounds.logprob_error_max {
            return bad(format!("rollout {number} has log-probs off by {off:.4}"));
        }
        if off > 0.0 {
            found = Some(Difference::Rounding);
        }
    }
    found
}
