//! Records of the control log: the lab's decisions about a run, and the starts of its processes. A process's generation is
//! the number of its own start in that log, so a later start always fences an earlier one.

use serde::{Deserialize, Serialize};

use crate::envelope::{Invalid, Kind, Statement};
use crate::id::{Generation, PeerId, PolicyVersion, TicketId};
use crate::limits::STATEMENT_BYTES_MAX;
use crate::subject::Role;

/// An event of the control log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ControlEvent {
    /// The run was opened under a signed descriptor.
    Opened {
        /// The descriptor's envelope.
        #[serde(with = "serde_bytes")]
        descriptor: Vec<u8>,
    },
    /// A lab process started.
    Started {
        role: Role,
    },
    /// No new leases until resumed.
    Paused,
    Resumed,
    /// The run has ended.
    Finished {
        /// The last version.
        step: PolicyVersion,
    },
    /// Dispatch counted a fault of a member. The newest variant: variants are numbered on the wire.
    Fault(MemberFault),
}

/// What a worker or critic did wrong. Written by dispatch, so that its next start still knows whom to refuse.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberFault {
    /// The worker or critic.
    pub member: PeerId,
    /// The ticket of its group or verdict. A member's faults about one ticket count once.
    pub ticket: TicketId,
    /// What was wrong.
    pub kind: FaultKind,
}

/// The kinds of faults that lead to quarantine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FaultKind {
    /// Admission or the critics rejected the worker's group.
    RejectedGroup,
    /// The other critics contradicted the critic's verdict.
    Dissent,
    /// The critic's verdict named another lease or had a wrong number of rewards.
    MisfitVerdict,
}

impl Statement for ControlEvent {
    const KIND: Kind = Kind::Control;
    const BYTES_MAX: usize = STATEMENT_BYTES_MAX;

    fn validate(&self) -> Result<(), Invalid> {
        Ok(())
    }
}

/// Whether a run leases tickets, waits or has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    #[default]
    Running,
    Paused,
    Finished,
}

/// The state after all records of the control log.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControlState {
    pub phase: Phase,
    /// The newest start of dispatch.
    pub dispatch: Generation,
    /// The newest start of the trainer.
    pub trainer: Generation,
    /// The descriptor's envelope, once the run was opened.
    #[serde(with = "serde_bytes")]
    pub descriptor: Vec<u8>,
}

impl ControlState {
    /// Applies the record with number `sequence`.
    pub fn apply(&mut self, sequence: u64, event: ControlEvent) {
        match event {
            ControlEvent::Opened { descriptor } => self.descriptor = descriptor,
            ControlEvent::Started {
                role: Role::Dispatch,
            } => self.dispatch = Generation(sequence),
            ControlEvent::Started {
                role: Role::Trainer,
            } => self.trainer = Generation(sequence),
            ControlEvent::Started { .. } => {}
            ControlEvent::Paused if self.phase == Phase::Running => self.phase = Phase::Paused,
            ControlEvent::Resumed if self.phase == Phase::Paused => self.phase = Phase::Running,
            ControlEvent::Paused | ControlEvent::Resumed => {}
            ControlEvent::Finished { .. } => self.phase = Phase::Finished,
            ControlEvent::Fault(_) => {}
        }
    }
}
