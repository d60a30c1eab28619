//! A lease: a ticket bound to one worker, one version and one seed. Signed by dispatch, so that a submission can be
//! admitted by a dispatch that has restarted since and forgotten it.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::ticket::Ticket;
use super::version::VersionRef;
use crate::envelope::{Invalid, Kind, Statement};
use crate::id::{LeaseId, PeerId, RunId, UnixMillis};
use crate::limits::STATEMENT_BYTES_MAX;
use crate::seed::{SeedBinding, lease_seed};

/// Which arithmetic answered: answers of one class agree to rounding, answers of two classes only within thresholds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NumericClass {
    /// The published weights, computed in f32 on a processor.
    F32Cpu,
    /// The same on a GPU.
    F32Cuda,
    /// In bf16 on a GPU.
    Bf16Cuda,
    /// The published weights with every matrix rounded to eight bits, computed in f32 on a processor. The rounding is
    /// prescribed, so whoever holds the weights can compute in this class, whatever else it computes in.
    Int8Cpu,
}

impl NumericClass {
    /// Its name in messages and configurations.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32Cpu => "f32-cpu",
            Self::F32Cuda => "f32-cuda",
            Self::Bf16Cuda => "bf16-cuda",
            Self::Int8Cpu => "int8-cpu",
        }
    }
}

impl fmt::Display for NumericClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The names of some classes, for people.
pub fn class_names(classes: &[NumericClass]) -> String {
    let names: Vec<&str> = classes.iter().map(|class| class.name()).collect();
    names.join(", ")
}

/// What a worker does with an answer that is not finished when new weights come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightsRule {
    /// Ends it under the lease's version: a group has exactly one.
    #[default]
    Drain,
    /// May go on under newer versions, in segments that name them: for workers whom the lab trusts, because whoever
    /// chooses the moment of the swap chooses among answers.
    InFlight,
}

/// Rollouts `first .. first + count` of a ticket's group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RolloutRange {
    /// Number of the first rollout.
    pub first: u32,
    /// How many.
    pub count: u32,
}

/// A ticket bound to a worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Lease {
    /// Its id; also the idempotency key of its submission.
    pub id: LeaseId,
    /// What to answer.
    pub ticket: Ticket,
    /// Who may answer.
    pub worker: PeerId,
    /// With which weights; exactly these, unless `weights` says otherwise.
    pub version: VersionRef,
    /// Whether it may go on under newer ones.
    pub weights: WeightsRule,
    /// In which arithmetic.
    pub class: NumericClass,
    /// Which of the group's rollouts.
    pub rollouts: RolloutRange,
    /// Which life of dispatch gave it.
    pub epoch: u64,
    /// Dispatch's counter for this worker.
    pub submission: u64,
    /// What nobody could know before.
    pub nonce: [u8; 32],
    /// Where the draws come from: [`crate::seed::lease_seed`] of the fields above.
    pub seed: [u8; 32],
    /// When dispatch gives the ticket to somebody else.
    pub deadline: UnixMillis,
}

impl Lease {
    /// Whether the seed is the one that the lease's own fields prescribe: dispatch cannot choose it freely either.
    pub fn seed_is_prescribed(&self, run: &RunId) -> bool {
        let binding = SeedBinding {
            run,
            epoch: self.epoch,
            worker: &self.worker,
            version: self.version.version,
            submission: self.submission,
        };
        lease_seed(&binding, &self.nonce) == self.seed
    }
}

impl Statement for Lease {
    const KIND: Kind = Kind::Lease;
    const BYTES_MAX: usize = STATEMENT_BYTES_MAX;

    fn validate(&self) -> Result<(), Invalid> {
        self.ticket.check()?;
        let end = self.rollouts.first.checked_add(self.rollouts.count);
        if self.rollouts.count == 0 || end.is_none_or(|end| end > self.ticket.group_size) {
            let RolloutRange { first, count } = self.rollouts;
            let problem = format!(
                "are {count} from {first} in a group of {}",
                self.ticket.group_size
            );
            return Err(Invalid::new("rollouts", problem));
        }
        Ok(())
    }
}
