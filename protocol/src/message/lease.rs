//! A lease: a ticket bound to one worker, one version and one seed. Dispatch signs it, so that a dispatch that has restarted
//! since, and lost its memory of the lease, can still admit the submission.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::ticket::Ticket;
use super::version::VersionRef;
use crate::envelope::{Invalid, Kind, Statement};
use crate::id::{LeaseId, PeerId, RunId, UnixMillis};
use crate::limits::STATEMENT_BYTES_MAX;
use crate::seed::{SeedBinding, lease_seed};

/// The arithmetic of a machine. Answers of one class agree to rounding, answers of two classes only within thresholds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NumericClass {
    /// The published weights, computed in f32 on a processor.
    F32Cpu,
    /// The published weights, computed in f32 on a GPU.
    F32Cuda,
    /// The published weights, computed in bf16 on a GPU.
    Bf16Cuda,
    /// The published weights with every matrix rounded to eight bits, computed in f32 on a processor. The rounding is
    /// prescribed, so a critic of any class can compute in this one.
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

/// The names of the classes, joined by commas.
pub fn class_names(classes: &[NumericClass]) -> String {
    let names: Vec<&str> = classes.iter().map(|class| class.name()).collect();
    names.join(", ")
}

/// What a worker does with an unfinished answer when new weights arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightsRule {
    /// It finishes the answer under the lease's version, so a group has exactly one.
    #[default]
    Drain,
    /// It may continue under newer versions, in segments that name them. Only for workers that the lab trusts: a worker that
    /// chooses the moment of the swap chooses among answers.
    InFlight,
}

/// Rollouts `first .. first + count` of a ticket's group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RolloutRange {
    /// Counted from 0.
    pub first: u32,
    pub count: u32,
}

/// A ticket bound to a worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Lease {
    /// Also the key under which its submission is idempotent.
    pub id: LeaseId,
    pub ticket: Ticket,
    pub worker: PeerId,
    /// The weights to sample from; [`WeightsRule::InFlight`] allows newer ones.
    pub version: VersionRef,
    pub weights: WeightsRule,
    pub class: NumericClass,
    /// A part of the ticket's group, so that slow workers may share one.
    pub rollouts: RolloutRange,
    /// The generation of the dispatch that signed it.
    pub epoch: u64,
    /// Dispatch's counter for this worker.
    pub submission: u64,
    /// Unpredictable, so that keys ground in advance gain nothing.
    pub nonce: [u8; 32],
    /// Seeds the sampling: [`crate::seed::lease_seed`] of the fields above.
    pub seed: [u8; 32],
    /// When dispatch leases the ticket to another worker.
    pub deadline: UnixMillis,
}

impl Lease {
    /// Whether the lease's own fields prescribe its seed: dispatch cannot choose one freely either.
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
