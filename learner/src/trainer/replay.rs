//! Restarts a trainer: opens the run or checks its configuration, loads the newest full state, and replays every later
//! batch from the stored groups.

use std::collections::BTreeMap;

use tokio::time::Instant;
use tracing::warn;

use muster_protocol::dispatch_client::DispatchClient;
use muster_protocol::envelope::{EnvelopeError, Signed, open};
use muster_protocol::id::{PolicyVersion, StateRoot};
use muster_protocol::message::batch::Batch;
use muster_protocol::message::control::{ControlEvent, ControlState};
use muster_protocol::message::descriptor::Descriptor;
use muster_protocol::message::group::Group;
use muster_protocol::message::version::{Announcement, Version};
use muster_protocol::subject::{Log, Queue};

use super::archive::Archive;
use super::batch::Intake;
use super::error::TrainerError;
use super::logs::{StepRecord, StepTimes};
use super::state::{CHUNK, Trainer};
use crate::resolver::{Candidate, Resolver, Selected};
use crate::stepper::Stepper;

impl Trainer {
    /// Brings a restarted trainer to the version that the manifests lead to.
    pub(super) async fn replay(
        &mut self,
        saved: Option<PolicyVersion>,
    ) -> Result<(), TrainerError> {
        let announced = self.announced_roots().await?;
        let version = saved.unwrap_or_default();
        let image = self.stepper(version)?.image();
        self.archive.put_image(version, &image)?;
        let described = self.announcer.describe(version, image.clone()).await?;
        self.root = described.version.body.root;
        // An earlier announcement may name deltas that only the earlier process offered.
        if announced.get(&version) != Some(&self.root) || self.announcer.makes_deltas(&image) {
            self.announcer.announce(&described).await?;
        }
        if saved.is_none() {
            let path = self.archive.state_path(version);
            let done = self.stepper(version)?.save(&path).await;
            done.map_err(|source| TrainerError::Step {
                step: version,
                source,
            })?;
            self.write_folder(&described, image).await?;
        }
        self.read_logs().await?;
        let manifests = self.manifests().await?;
        for (step, manifest) in manifests {
            if step > version {
                self.replay_step(step, &manifest, announced.get(&step))
                    .await?;
            }
        }
        self.read_logs().await?;
        self.logs.forget_counts();
        let (version, ended) = (self.resolver.version(), self.logs.ended().clone());
        let config = self
            .settings
            .resolve_config(self.descriptor.body.async_level);
        self.resolver = Resolver::new(config, version, ended);
        self.client.bus().reclaim(Queue::Ready).await?;
        self.step_ended = Instant::now();
        Ok(())
    }

    async fn announced_roots(&self) -> Result<BTreeMap<PolicyVersion, StateRoot>, TrainerError> {
        let mut roots = BTreeMap::new();
        let mut after = 0;
        loop {
            let records = self.client.bus().read(Log::Versions, after, CHUNK).await?;
            let Some(last) = records.last() else {
                return Ok(roots);
            };
            after = last.sequence;
            for record in records {
                let announcement =
                    Announcement::decode(&record.payload).map_err(EnvelopeError::from)?;
                let version = open::<Version>(announcement.version.into(), self.client.run())?;
                roots.insert(version.body.version, version.body.root);
            }
        }
    }

    /// The manifest of each step. Of two for one step, the one of the newer generation holds.
    async fn manifests(&mut self) -> Result<BTreeMap<PolicyVersion, Batch>, TrainerError> {
        let mut manifests = BTreeMap::new();
        loop {
            let records = self
                .client
                .bus()
                .read(Log::Batches, self.batches_read, CHUNK)
                .await?;
            let Some(last) = records.last() else { break };
            self.batches_read = last.sequence;
            for record in records {
                let batch = open::<Batch>(record.payload, self.client.run())?.body;
                manifests.insert(batch.step, batch);
            }
        }
        for entry in manifests.values().flat_map(|batch| &batch.groups) {
            self.trained.insert(entry.ticket, entry.group);
        }
        Ok(manifests)
    }

    async fn replay_step(
        &mut self,
        step: PolicyVersion,
        manifest: &Batch,
        announced: Option<&StateRoot>,
    ) -> Result<(), TrainerError> {
        let began = Instant::now();
        let mut batch = Vec::with_capacity(manifest.groups.len());
        for entry in &manifest.groups {
            let group = open::<Group>(self.archive.group(entry.group)?, self.client.run())?;
            let candidate = Candidate {
                ticket: entry.ticket,
                group: entry.group,
                worker: entry.worker,
                version: entry.version,
                rewards: entry.rewards.clone(),
                audited: entry.audited,
                carried: group.body,
            };
            let advantages =
                self.settings
                    .advantage
                    .advantages(&entry.rewards)
                    .map_err(|source| TrainerError::Replay {
                        step,
                        ticket: entry.ticket,
                        source,
                    })?;
            batch.push(Selected {
                candidate,
                advantages,
            });
        }
        let (output, training) = self.step(step, &batch, Intake::Closed).await?;
        let described = self.announcer.describe(step, output.image.clone()).await?;
        self.root = described.version.body.root;
        if announced != Some(&self.root) || self.announcer.makes_deltas(&output.image) {
            if announced.is_some_and(|announced| *announced != self.root) {
                warn!(%step, "the replayed step made other bits; its new announcement replaces the earlier one");
            }
            self.announcer.announce(&described).await?;
        }
        self.logs.forget_counts();
        self.write_lines(&StepRecord {
            step,
            batch: &batch,
            output: &output,
            broadcast_bytes: described.bytes,
            tokens_arrived: 0,
            times: StepTimes {
                whole: began.elapsed(),
                training,
                ..StepTimes::default()
            },
        })?;
        self.resolver.advance(step);
        self.checkpoint(step, &described).await
    }
}

/// Opens a new run under `descriptor`, or checks that the run was opened under the same one. Also returns the control
/// state and the newest sequence read of the control log.
pub(super) async fn open_run(
    client: &DispatchClient,
    descriptor: Descriptor,
) -> Result<(Signed<Descriptor>, ControlState, u64), TrainerError> {
    let mut control = ControlState::default();
    let mut read = 0;
    loop {
        let records = client.bus().read(Log::Control, read, CHUNK).await?;
        let Some(last) = records.last() else { break };
        read = last.sequence;
        for record in records {
            let event = open::<ControlEvent>(record.payload, client.run())?;
            control.apply(record.sequence, event.body);
        }
    }
    if control.descriptor.is_empty() {
        let signed = client.sign(descriptor)?;
        let event = client.sign(ControlEvent::Opened {
            descriptor: signed.bytes.to_vec(),
        })?;
        let stored = client
            .bus()
            .append(Log::Control, "opened", None, event.bytes)
            .await?;
        control.descriptor = signed.bytes.to_vec();
        return Ok((signed, control, stored.sequence()));
    }
    let signed = open::<Descriptor>(control.descriptor.clone().into(), client.run())?;
    match changed(&signed.body, &descriptor) {
        Some(what) => Err(TrainerError::Changed { what }),
        None => Ok((signed, control, read)),
    }
}

/// The first part in which two descriptors differ.
fn changed(opened: &Descriptor, now: &Descriptor) -> Option<&'static str> {
    let differences = [
        (
            "model architecture",
            opened.architecture != now.architecture,
        ),
        ("tokenizer", opened.tokenizer != now.tokenizer),
        ("task", opened.task != now.task),
        ("reward configuration", opened.rewards != now.rewards),
        ("sampling configuration", opened.sampling != now.sampling),
        ("group size", opened.group_size != now.group_size),
        ("async level", opened.async_level != now.async_level),
        ("learner key", opened.learner != now.learner),
        ("dispatch key", opened.dispatch != now.dispatch),
        (
            "set of thresholds",
            (opened.same_class, opened.cross_class) != (now.same_class, now.cross_class),
        ),
    ];
    differences
        .into_iter()
        .find(|(_, differs)| *differs)
        .map(|(what, _)| what)
}

pub(super) async fn restore_state(
    stepper: &mut dyn Stepper,
    archive: &Archive,
    async_level: u64,
) -> Result<Option<PolicyVersion>, TrainerError> {
    let Some(version) = archive.newest_state()? else {
        return Ok(None);
    };
    let images = archive.images(
        PolicyVersion(version.0.saturating_sub(async_level)),
        version,
    )?;
    let restored = stepper
        .restore(&archive.state_path(version), version, images)
        .await;
    restored.map_err(|source| TrainerError::Step {
        step: version,
        source,
    })?;
    Ok(Some(version))
}
