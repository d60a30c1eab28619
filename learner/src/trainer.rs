//! The trainer: takes judged groups, closes batches, takes steps and announces versions.
//!
//! A kill at any instant loses nothing, because of the order of writes: group bodies on disk, then the batch manifest in
//! the log (fenced, so of two trainers one stops), then the acknowledgements, then the step, then the new image on disk,
//! then the announcement. A restart loads the newest full state and replays the manifests after it. A replay makes the
//! same bits, since the number of gradient shards is fixed.
//!
//! The trainer knows weights as bytes ([`crate::stepper`]) and shares nothing with dispatch but the bus. Invariants: every
//! joined group gets one fate; every delivery held belongs to a group that waits in the resolver.

pub mod announce;
mod archive;
mod batch;
mod checkpoint;
mod error;
mod intake;
mod logs;
pub mod objects;
mod opener;
mod replay;
mod settings;
mod state;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use muster_broadcaster::ObjectSource;
use muster_protocol::credentials::Roster;
use muster_protocol::dispatch_client::DispatchClient;
use muster_protocol::id::{Generation, PolicyVersion, StateRoot};
use muster_protocol::life;
use muster_protocol::message::control::{ControlEvent, Phase};
use muster_protocol::message::descriptor::{Descriptor, descriptor_hash};
use muster_protocol::message::group::Group;
use muster_protocol::subject::{Log, Role};

use crate::resolver::{Resolver, Selected};
use crate::stepper::Stepper;

use announce::{Announced, Announcer, RunFile};
use archive::Archive;
use batch::Intake;
pub use error::TrainerError;
use logs::{RunLogs, StepRecord, StepTimes};
use opener::Opener;
use replay::{open_run, restore_state};
pub use settings::TrainerSettings;
pub use state::Trainer;
use state::{RETRY, acknowledge, fate_of};

/// How long the trainer waits for a group before it reads the logs again.
const TAKE_WAIT: Duration = Duration::from_millis(500);
/// How long a turn that has begun may take after the shutdown signal.
const GRACE: Duration = Duration::from_secs(3);

/// What the trainer needs to start.
pub struct TrainerParts {
    /// The trainer's connection, under the learner's keys.
    pub client: DispatchClient,
    /// The lab's members.
    pub roster: Roster,
    /// The run directory.
    pub dir: PathBuf,
    pub stepper: Box<dyn Stepper>,
    /// Offers the bytes of versions and files to the peers.
    pub swarm: Arc<dyn ObjectSource>,
    /// Describes the run; the trainer signs and publishes it if the run is new.
    pub descriptor: Descriptor,
    /// Files that travel with the weights.
    pub files: Vec<RunFile>,
    pub settings: TrainerSettings,
}

impl Trainer {
    /// Starts the trainer: takes a new generation, opens the run or checks that its configuration is unchanged, loads the
    /// newest full state and replays the manifests after it.
    ///
    /// # Errors
    /// When the bus refuses, the run was opened with another configuration, or the run directory cannot be used.
    pub async fn start(parts: TrainerParts) -> Result<Self, TrainerError> {
        let TrainerParts {
            client,
            roster,
            dir,
            mut stepper,
            swarm,
            descriptor,
            files,
            settings,
        } = parts;
        let bus = client.bus().clone();
        bus.create_streams().await?;
        let started = client.sign(ControlEvent::Started {
            role: Role::Trainer,
        })?;
        // Every start has its own key: two starts under one key would share a generation.
        let key = format!("s-{:016x}", rand::random::<u64>());
        let sequence = bus.append(Log::Control, &key, None, started.bytes).await?;
        let generation = Generation(sequence.sequence());
        let (descriptor, control, control_read) = open_run(&client, descriptor).await?;
        let archive = Archive::open(&dir)?;
        let saved = restore_state(stepper.as_mut(), &archive, descriptor.body.async_level).await?;
        let version = saved.unwrap_or_default();
        let hash = descriptor_hash(&descriptor.bytes);
        let announcer = Announcer::new(
            client.clone(),
            swarm.clone(),
            hash,
            generation,
            &files,
            settings.broadcast,
        )
        .await?;
        let config = settings.resolve_config(descriptor.body.async_level);
        let opener = Opener {
            run: client.run().clone(),
            dispatch: descriptor.body.dispatch,
            roster,
            archive: archive.clone(),
        };
        let mut trainer = Self {
            opener: Arc::new(opener),
            logs: RunLogs::open(&dir, version)?,
            resolver: Resolver::new(config, version, Default::default()),
            client,
            dir,
            stepper: Some(stepper),
            swarm,
            descriptor,
            files,
            settings,
            generation,
            archive,
            announcer,
            trained: BTreeMap::new(),
            held: BTreeMap::new(),
            batches_read: 0,
            fates_read: 0,
            control,
            control_read,
            saved: version,
            root: StateRoot([0; 32]),
            step_ended: Instant::now(),
            tokens_arrived: 0,
        };
        trainer.replay(saved).await?;
        info!(generation = generation.0, version = %trainer.resolver.version(), "trainer started");
        Ok(trainer)
    }

    /// Trains until `shutdown`. After the last step it only follows the logs.
    ///
    /// # Errors
    /// When the bus is gone for good, a step fails, the disk refuses, or another trainer has started.
    pub async fn run(mut self, shutdown: CancellationToken) -> Result<(), TrainerError> {
        loop {
            if shutdown.is_cancelled() {
                return self.save().await;
            }
            let overdue = async {
                shutdown.cancelled().await;
                tokio::time::sleep(GRACE).await;
            };
            let done = tokio::select! {
                biased; // a turn that has begun (a manifest, a step) ends first, if the bus lets it
                done = self.turn() => done,
                () = overdue => return Ok(()), // like a kill: the next start repeats what is not durable
            };
            match done {
                Ok(()) => {}
                Err(TrainerError::Bus(error)) if error.is_transient() => {
                    warn!(%error, "the bus did not answer; trying again");
                    tokio::time::sleep(RETRY).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Takes a step if a batch is full, else takes groups.
    async fn turn(&mut self) -> Result<(), TrainerError> {
        self.read_logs().await?;
        if self.resolver.version().0 >= self.settings.steps {
            self.finish().await?;
            tokio::time::sleep(TAKE_WAIT).await;
            return Ok(());
        }
        if let Some(batch) = self.resolver.close_batch() {
            return self.resolve(batch).await;
        }
        self.take_groups(TAKE_WAIT).await?;
        Ok(())
    }

    /// Writes the manifest, takes the step, stores the image and announces the version, in this order. Once the manifest
    /// is stored, fates and acknowledgements can be repeated at any time, so they are sent while the step runs.
    async fn resolve(&mut self, batch: Vec<Selected<Group>>) -> Result<(), TrainerError> {
        let wait_for_batch = self.step_ended.elapsed();
        let step = self.resolver.version().next();
        self.commit(step, &batch).await?;
        let (output, training) = self.step(step, &batch, Intake::Open).await?;
        let announcing = Instant::now();
        let announced = self.publish(step, &output.image).await?;
        let times = StepTimes {
            whole: self.step_ended.elapsed(),
            wait_for_batch,
            training,
            broadcast: announcing.elapsed(),
        };
        self.step_ended = Instant::now();
        let tokens_arrived = std::mem::take(&mut self.tokens_arrived);
        self.write_lines(&StepRecord {
            step,
            batch: &batch,
            output: &output,
            broadcast_bytes: announced.bytes,
            tokens_arrived,
            times,
        })?;
        self.advance(step).await?;
        self.checkpoint(step, &announced).await
    }

    async fn publish(
        &mut self,
        version: PolicyVersion,
        image: &Bytes,
    ) -> Result<Announced, TrainerError> {
        let announced = self.announcer.describe(version, image.clone()).await?;
        self.root = announced.version.body.root;
        loop {
            match self.announcer.announce(&announced).await {
                Err(TrainerError::Bus(error)) if error.is_transient() => {
                    warn!(%error, %version, "a version is not announced yet; trying again");
                    tokio::time::sleep(RETRY).await;
                }
                done => {
                    done?;
                    debug!(target: life::TARGET, %version, bytes = announced.bytes, "version announced");
                    return Ok(announced);
                }
            }
        }
    }

    async fn advance(&mut self, version: PolicyVersion) -> Result<(), TrainerError> {
        for (refusal, candidate) in self.resolver.advance(version) {
            let reason = refusal.to_string();
            self.append_fate(fate_of(&candidate, refusal.fate(), reason, None))
                .await?;
            if let Some(delivery) = self.held.remove(&candidate.ticket) {
                acknowledge(&delivery).await;
            }
        }
        self.assert_held_are_waiting();
        Ok(())
    }

    async fn finish(&mut self) -> Result<(), TrainerError> {
        if self.control.phase == Phase::Finished {
            return Ok(());
        }
        let step = self.resolver.version();
        let event = self.client.sign(ControlEvent::Finished { step })?;
        let bus = self.client.bus();
        bus.append(
            Log::Control,
            &format!("finished-{step}"),
            None,
            event.bytes.clone(),
        )
        .await?;
        bus.publish(&self.client.subjects().news(Log::Control), event.bytes)
            .await?;
        self.control.phase = Phase::Finished;
        info!(%step, uploaded = self.swarm.uploaded_bytes(), "the run is finished");
        Ok(())
    }
}

#[cfg(test)]
mod tests;
