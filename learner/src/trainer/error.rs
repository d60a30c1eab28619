//! Why a trainer ends.

use tokio::task::JoinError;

use muster_broadcaster::snapshot;
use muster_protocol::bus::BusError;
use muster_protocol::envelope::EnvelopeError;
use muster_protocol::id::{PolicyVersion, TicketId};
use muster_protocol::record::JsonLinesError;

use super::archive::ArchiveError;
use crate::advantage::AdvantageError;
use crate::stepper::StepError;

/// Why the trainer ended.
#[derive(Debug, thiserror::Error)]
pub enum TrainerError {
    /// The bus failed in a way that a retry does not mend.
    #[error("the trainer lost its bus: {0}")]
    Bus(#[from] BusError),
    /// A statement could not be signed, or a durable one could not be read.
    #[error("a message of the run cannot be used: {0}")]
    Envelope(#[from] EnvelopeError),
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    #[error(transparent)]
    Lines(#[from] JsonLinesError),
    #[error("step {step} failed: {source}")]
    Step {
        /// The version that the step was to make.
        step: PolicyVersion,
        source: StepError,
    },
    /// A version could not be described or offered.
    #[error("a version could not be announced: {0}")]
    Announce(String),
    /// Work on a thread of its own panicked or was cancelled.
    #[error("a thread of the trainer failed: {0}; start the trainer again")]
    Thread(#[from] JoinError),
    /// The manifest of a step holds a group that no trainer would select.
    #[error("step {step} cannot be replayed: in its manifest, {source} (ticket {ticket})")]
    Replay {
        step: PolicyVersion,
        ticket: TicketId,
        source: AdvantageError,
    },
    /// A checkpoint folder could not be written.
    #[error(transparent)]
    Snapshot(#[from] snapshot::SnapshotError),
    #[error("another trainer has started for this run: this one stops")]
    Replaced,
    /// The configuration is not the one that the run was opened with.
    #[error(
        "the run was opened with another {what} than the configuration now says: \
         go back to the old one, or start a new run in another --dir"
    )]
    Changed { what: &'static str },
}

/// A step that was abandoned still has the model.
pub(super) fn lost(step: PolicyVersion) -> TrainerError {
    let source = StepError("an earlier step did not end: restart the trainer".to_owned());
    TrainerError::Step { step, source }
}
