//! How each submitted group differs from the group that its lease prescribes. The workers of a test note it as they answer;
//! the test reads it when the fates of the groups are known.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use muster_protocol::id::{LeaseId, PeerId};
use muster_protocol::message::descriptor::Thresholds;
use muster_protocol::message::group::Rollout;
use muster_protocol::message::lease::Lease;

/// How a group differs from the one that its lease prescribes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Difference {
    /// By the rounding of one numeric class: log-probs are within its tolerance, and tokens differ only where the
    /// prescribed draw is within its tolerance of the edge between the two tokens.
    Rounding,
    /// By more than rounding: the group is bad.
    Bad(String),
}

/// A submitted group.
#[derive(Debug, Clone)]
pub struct Submission {
    pub worker: PeerId,
    pub difference: Option<Difference>,
}

/// The submitted groups of a run, by lease.
#[derive(Debug, Clone, Default)]
pub struct Submissions {
    entries: Arc<Mutex<BTreeMap<LeaseId, Submission>>>,
}

impl Submissions {
    /// Notes how the group submitted for `lease` differs from the prescribed one.
    pub fn note(&self, lease: &Lease, difference: Option<Difference>) {
        let worker = lease.worker;
        let entry = Submission { worker, difference };
        self.entries.lock().unwrap().insert(lease.id, entry);
    }

    pub fn of(&self, lease: &LeaseId) -> Option<Submission> {
        self.entries.lock().unwrap().get(lease).cloned()
    }

    /// Number of groups that a worker has submitted.
    pub fn count_of(&self, worker: PeerId) -> usize {
        let entries = self.entries.lock().unwrap();
        entries
            .values()
            .filter(|entry| entry.worker == worker)
            .count()
    }
}

/// Compares a group with the prescribed one. `draw_error` gives, for a rollout and a position, the distance of the
/// prescribed draw from the interval of the submitted token under the leased version.
pub fn difference(
    honest: &[Rollout],
    submitted: &[Rollout],
    draw_error: impl Fn(usize, usize) -> f64,
) -> Option<Difference> {
    let bad = |how: String| Some(Difference::Bad(how));
    if honest.len() != submitted.len() {
        return bad(format!("{} rollouts for {}", submitted.len(), honest.len()));
    }
    let bounds = Thresholds::SAME_CLASS;
    let mut found = None;
    for (number, (honest, submitted)) in honest.iter().zip(submitted).enumerate() {
        let ((tokens, logprobs), (submitted_tokens, submitted_logprobs)) =
            (honest.drawn(), submitted.drawn());
        if honest.oldest_version() != submitted.oldest_version() {
            return bad(format!("rollout {number} has another version"));
        }
        if tokens != submitted_tokens {
            let same = tokens
                .iter()
                .zip(&submitted_tokens)
                .take_while(|(a, b)| a == b);
            let position = same.count();
            if position == submitted_tokens.len()
                || draw_error(number, position) > bounds.draw_error_max
            {
                return bad(format!("rollout {number} has another token at {position}"));
            }
            found = Some(Difference::Rounding);
            continue;
        }
        if honest.finish != submitted.finish {
            return bad(format!("rollout {number} has another finish"));
        }
        let errors = logprobs.iter().zip(&submitted_logprobs);
        let errors = errors.map(|(one, other)| f64::from((one - other).abs()));
        let error = errors.fold(0.0, f64::max);
        if error > bounds.logprob_error_max {
            return bad(format!("rollout {number} has log-probs off by {error:.4}"));
        }
        if error > 0.0 {
            found = Some(Difference::Rounding);
        }
    }
    found
}
