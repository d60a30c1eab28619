//! The trainer's state, with the steps that all its parts share: reading the logs, recording fates and step lines.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tracing::{debug, info, warn};

use muster_broadcaster::ObjectSource;
use muster_protocol::bus::Delivery;
use muster_protocol::dispatch_client::DispatchClient;
use muster_protocol::envelope::{Signed, open};
use muster_protocol::id::{Generation, GroupHash, PolicyVersion, StateRoot, TicketId};
use muster_protocol::life;
use muster_protocol::message::control::{ControlEvent, ControlState};
use muster_protocol::message::descriptor::Descriptor;
use muster_protocol::message::fate::{Fate, FateRecord};
use muster_protocol::message::group::Group;
use muster_protocol::subject::Log;

use super::announce::{Announcer, RunFile};
use super::archive::Archive;
use super::error::{TrainerError, lost};
use super::logs::{RunLogs, StepRecord};
use super::opener::Opener;
use super::settings::TrainerSettings;
use crate::resolver::{Candidate, Resolver};
use crate::stepper::Stepper;

/// Most groups taken from the queue at once.
pub(super) const CHUNK: usize = 64;
/// Pause after a call to the bus that timed out.
pub(super) const RETRY: Duration = Duration::from_millis(500);

/// The trainer, connected.
pub struct Trainer {
    pub(super) client: DispatchClient,
    pub(super) opener: Arc<Opener>,
    pub(super) dir: PathBuf,
    /// None while a step runs.
    pub(super) stepper: Option<Box<dyn Stepper>>,
    pub(super) swarm: Arc<dyn ObjectSource>,
    pub(super) descriptor: Signed<Descriptor>,
    pub(super) files: Vec<RunFile>,
    pub(super) settings: TrainerSettings,
    pub(super) generation: Generation,
    pub(super) archive: Archive,
    pub(super) logs: RunLogs,
    pub(super) resolver: Resolver<Group>,
    pub(super) announcer: Announcer,
    /// Groups of earlier manifests.
    pub(super) trained: BTreeMap<TicketId, GroupHash>,
    /// Deliveries of groups that wait in the resolver, not yet acknowledged.
    pub(super) held: BTreeMap<TicketId, Delivery>,
    /// Newest sequence read of the batches log.
    pub(super) batches_read: u64,
    /// Newest sequence read of the fates log.
    pub(super) fates_read: u64,
    pub(super) control: ControlState,
    /// Newest sequence read of the control log.
    pub(super) control_read: u64,
    /// The version of the newest full state on disk.
    pub(super) saved: PolicyVersion,
    /// State root of the newest version.
    pub(super) root: StateRoot,
    pub(super) step_ended: Instant,
    /// Completion tokens that arrived since `step_ended`.
    pub(super) tokens_arrived: u64,
}

impl Trainer {
    pub(super) async fn read_logs(&mut self) -> Result<(), TrainerError> {
        let bus = self.client.bus().clone();
        for record in bus.read(Log::Control, self.control_read, CHUNK).await? {
            self.control_read = record.sequence;
            let event = open::<ControlEvent>(record.payload, self.client.run())?;
            self.control.apply(record.sequence, event.body);
        }
        if self.control.trainer > self.generation {
            return Err(TrainerError::Replaced);
        }
        loop {
            let records = bus.read(Log::Fates, self.fates_read, 4 * CHUNK).await?;
            let Some(last) = records.last() else {
                return Ok(());
            };
            self.fates_read = last.sequence;
            for record in records {
                let fate = open::<FateRecord>(record.payload, self.client.run())?.body;
                self.logs.fate(&fate)?;
            }
        }
    }

    pub(super) async fn append_fate(&self, record: FateRecord) -> Result<(), TrainerError> {
        let key = record.key();
        let signed = self.client.sign(record)?;
        loop {
            let bytes = signed.bytes.clone();
            match self
                .client
                .bus()
                .append(Log::Fates, &key, None, bytes)
                .await
            {
                Ok(_) => {
                    let record = &signed.body;
                    debug!(
                        target: life::TARGET,
                        ticket = %record.ticket,
                        group = record.group.map(|group| group.short()),
                        fate = %record.fate,
                        reason = record.reason,
                        "ended by the trainer"
                    );
                    return Ok(());
                }
                Err(error) if error.is_transient() => {
                    // Giving up here would lose the decision: it is stored nowhere else.
                    warn!(%error, "a fate is not confirmed; trying again");
                    tokio::time::sleep(RETRY).await;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    pub(super) fn write_lines(&mut self, record: &StepRecord<'_>) -> Result<(), TrainerError> {
        let temperature = self.descriptor.body.sampling.temperature;
        let line = self.logs.step(record, temperature)?;
        info!(
            step = line.step,
            reward = format!("{:.3}", line.reward_mean),
            staleness = format!("{:.2}", line.staleness_mean),
            seconds = format!("{:.2}", line.time_step),
            "step"
        );
        Ok(())
    }

    pub(super) fn assert_held_are_waiting(&self) {
        debug_assert_eq!(
            self.held.len(),
            self.resolver.waiting(),
            "every delivery held belongs to a group that waits"
        );
    }

    pub(super) fn stepper(
        &mut self,
        step: PolicyVersion,
    ) -> Result<&mut Box<dyn Stepper>, TrainerError> {
        self.stepper.as_mut().ok_or_else(|| lost(step))
    }
}

/// A delivery whose acknowledgement is lost comes again; the trainer recognises its ticket then.
pub(super) async fn acknowledge(delivery: &Delivery) {
    if let Err(error) = delivery.ack().await {
        warn!(%error, "an acknowledgement was not confirmed");
    }
}

pub(super) fn fate_of(
    candidate: &Candidate<Group>,
    fate: Fate,
    reason: String,
    step: Option<PolicyVersion>,
) -> FateRecord {
    FateRecord {
        ticket: candidate.ticket,
        group: Some(candidate.group),
        lease: Some(candidate.carried.lease),
        worker: Some(candidate.worker),
        policy_version: Some(candidate.version),
        fate,
        reason,
        audited: candidate.audited,
        step,
    }
}
