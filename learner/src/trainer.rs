//! The trainer: takes judged groups, closes batches, takes steps, makes versions known.
//!
//! The order that makes it safe to kill at any instant (design §4.5): group bodies on disk, then the batch manifest in
//! the log (fenced, so that of two trainers one stops), then the acknowledgements, then the step, then the new image on
//! disk, then the announcement. A restart loads the newest full state and replays the manifests after it; with a fixed
//! number of gradient shards a replay makes the same bits.
//!
//! It knows weights as bytes ([`crate::stepper`]) and shares nothing with dispatch but the bus.

pub mod announce;
pub mod archive;
mod batch;
mod checkpoint;
mod intake;
pub mod objects;
pub mod record;
mod replay;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use muster_broadcaster::snapshot;
use muster_protocol::bus::{BusError, Delivery};
use muster_protocol::credentials::Roster;
use muster_protocol::dispatch_client::DispatchClient;
use muster_protocol::envelope::{EnvelopeError, Signed, open};
use muster_protocol::id::{Generation, GroupHash, PolicyVersion, StateRoot, TicketId};
use muster_protocol::message::control::{ControlEvent, ControlState, Phase};
use muster_protocol::message::descriptor::{Descriptor, descriptor_hash};
use muster_protocol::message::fate::{Fate, FateRecord};
use muster_protocol::message::group::Group;
use muster_protocol::record::{JsonLinesError, StepMetrics};
use muster_protocol::subject::{Log, Role};

use crate::advantage::AdvantageConfig;
use crate::resolver::{Candidate, ResolveConfig, Resolver, Selected};
use crate::stepper::{StepError, StepOutput, Stepper};

use announce::{Announced, Announcer, Outlet, RunFile};
use archive::{Archive, ArchiveError};
use batch::Intake;
use intake::Opener;
use objects::BroadcastConfig;
use record::{RunRecord, batch_metrics};
use replay::{open_run, restore_state};

/// Groups taken from the queue at once.
const CHUNK: usize = 64;
/// How long to wait for a group before looking at the logs again.
const TAKE_WAIT: Duration = Duration::from_millis(500);
/// How long a turn that has begun may take once the trainer is told to stop.
const GRACE: Duration = Duration::from_secs(3);
/// Pause after the bus did not answer.
const RETRY: Duration = Duration::from_millis(500);

/// Why the trainer ended.
#[derive(Debug, thiserror::Error)]
pub enum TrainerError {
    /// The bus failed in a way that waiting does not mend.
    #[error("the trainer lost its bus: {0}")]
    Bus(#[from] BusError),
    /// A message of its own could not be made, or a durable one not read.
    #[error("a message of the run cannot be used: {0}")]
    Envelope(#[from] EnvelopeError),
    /// The run directory could not be written.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// A log of the run directory could not be written.
    #[error(transparent)]
    Lines(#[from] JsonLinesError),
    /// The step failed.
    #[error("step {step} failed: {source}")]
    Step {
        /// Which version it was to make.
        step: PolicyVersion,
        /// Why.
        source: StepError,
    },
    /// A version could not be described or offered.
    #[error("a version could not be announced: {0}")]
    Announce(String),
    /// A checkpoint folder could not be written.
    #[error(transparent)]
    Snapshot(#[from] snapshot::SnapshotError),
    /// Another trainer has started.
    #[error("another trainer has started for this run: this one stops")]
    Replaced,
    /// The configuration is not the one that the run was opened with.
    #[error(
        "the run was opened with another {what} than the configuration now says: \
         go back to the old one, or start a new run in another --dir"
    )]
    Changed {
        /// What differs.
        what: &'static str,
    },
}

/// The part of the configuration that the trainer reads.
#[derive(Debug, Clone, Copy)]
pub struct TrainerSettings {
    /// Groups per batch.
    pub batch_groups: usize,
    /// Steps of the run.
    pub steps: u64,
    /// Full state and a checkpoint folder every so many steps.
    pub checkpoint_every: u64,
    /// How rewards become advantages.
    pub advantage: AdvantageConfig,
    /// How versions are offered.
    pub broadcast: BroadcastConfig,
}

/// What the trainer needs to start.
pub struct TrainerParts {
    /// The trainer's way to the bus, under the learner's keys.
    pub client: DispatchClient,
    /// The lab's members.
    pub roster: Roster,
    /// The run directory.
    pub dir: PathBuf,
    /// The model.
    pub stepper: Box<dyn Stepper>,
    /// Where bytes are offered.
    pub outlet: Arc<dyn Outlet>,
    /// What the run is; signed and published if the run is new.
    pub descriptor: Descriptor,
    /// Files that travel with the weights.
    pub files: Vec<RunFile>,
    /// Batches, steps, checkpoints.
    pub settings: TrainerSettings,
}

/// The trainer, connected.
pub struct Trainer {
    client: DispatchClient,
    opener: Arc<Opener>,
    dir: PathBuf,
    /// Away while a step runs.
    stepper: Option<Box<dyn Stepper>>,
    outlet: Arc<dyn Outlet>,
    descriptor: Signed<Descriptor>,
    files: Vec<RunFile>,
    settings: TrainerSettings,
    generation: Generation,
    archive: Archive,
    record: RunRecord,
    resolver: Resolver<Group>,
    announcer: Announcer,
    /// Groups of earlier manifests, by ticket.
    trained: BTreeMap<TicketId, GroupHash>,
    held: BTreeMap<TicketId, Delivery>,
    batches_read: u64,
    fates_read: u64,
    control: ControlState,
    control_read: u64,
    saved: PolicyVersion,
    root: StateRoot,
    step_ended: Instant,
    drawn_tokens: u64,
}

impl Trainer {
    /// Starts the trainer: takes its generation, opens the run or checks that it is the same, goes back to the newest
    /// full state and replays what was decided since.
    ///
    /// # Errors
    /// When the bus refuses, the run was opened otherwise, or the run directory cannot be used.
    pub async fn start(parts: TrainerParts) -> Result<Self, TrainerError> {
        let TrainerParts {
            client,
            roster,
            dir,
            mut stepper,
            outlet,
            descriptor,
            files,
            settings,
        } = parts;
        let bus = client.bus().clone();
        bus.create_streams().await?;
        let started = client.sign(ControlEvent::Started {
            role: Role::Trainer,
        })?;
        // A key of its own for every start: two starts under one key would share a generation.
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
            outlet.clone(),
            hash,
            generation,
            &files,
            settings.broadcast,
        )
        .await?;
        let config = ResolveConfig {
            batch_groups: settings.batch_groups,
            async_level: descriptor.body.async_level,
            advantage: settings.advantage,
        };
        let opener = Opener {
            run: client.run().clone(),
            dispatch: descriptor.body.dispatch,
            roster,
            archive: archive.clone(),
        };
        let mut trainer = Self {
            opener: Arc::new(opener),
            record: RunRecord::open(&dir, version)?,
            resolver: Resolver::new(config, version, Default::default()),
            client,
            dir,
            stepper: Some(stepper),
            outlet,
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
            drawn_tokens: 0,
        };
        trainer.replay(saved).await?;
        info!(generation = generation.0, version = %trainer.resolver.version(), "trainer started");
        Ok(trainer)
    }

    /// Trains until the last step or `shutdown`; after the last step it goes on serving its record until `shutdown`.
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
                biased; // what has begun (a manifest, a step) is finished first, if the bus lets it
                done = self.turn() => done,
                () = overdue => return Ok(()), // as a kill would: what is not durable is done again at the next start
            };
            match done {
                Ok(()) => {}
                Err(TrainerError::Bus(error)) if error.is_transient() => {
                    warn!(%error, "the bus did not answer: trying again");
                    tokio::time::sleep(RETRY).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// One round: take groups, and take a step when a batch is full.
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

    async fn append_fate(&self, record: FateRecord) -> Result<(), TrainerError> {
        let key = match (record.fate, record.group) {
            (Fate::Duplicate, Some(group)) => format!("d-{}-{}", record.ticket, group.short()),
            _ => format!("f-{}", record.ticket),
        };
        let signed = self.client.sign(record)?;
        loop {
            let bytes = signed.bytes.clone();
            match self
                .client
                .bus()
                .append(Log::Fates, &key, None, bytes)
                .await
            {
                Ok(_) => return Ok(()),
                Err(error) if error.is_transient() => {
                    // Given up here, the decision would be lost: nothing else remembers it.
                    warn!(%error, "a fate is not confirmed: trying again");
                    tokio::time::sleep(RETRY).await;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Manifest, step, image, announcement: in this order. Once the manifest stands, fates and acknowledgements can be made
    /// again at any time; they are made while the step runs.
    async fn resolve(&mut self, batch: Vec<Selected<Group>>) -> Result<(), TrainerError> {
        let began = Instant::now();
        let waited = began.duration_since(self.step_ended);
        let step = self.resolver.version().next();
        self.commit(step, &batch).await?;
        let (output, trained) = self.step(step, &batch, Intake::Open).await?;
        let announcing = Instant::now();
        let announced = self.publish(step, &output.image).await?;
        let whole = self.step_ended.elapsed().as_secs_f64();
        let line = StepMetrics {
            time_step: whole,
            time_wait_for_batch: waited.as_secs_f64(),
            time_broadcast: announcing.elapsed().as_secs_f64(),
            rollout_tokens_per_second: self.drawn_tokens as f64 / whole.max(1e-9),
            learner_tokens_per_second: output.stats.tokens as f64 / trained.as_secs_f64().max(1e-9),
            broadcast_bytes: announced.bytes,
            ..self.metrics_of(step, &batch, &output)
        };
        self.step_ended = Instant::now();
        self.drawn_tokens = 0;
        self.write_lines(step, &batch, line)?;
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
                    warn!(%error, "the version is not announced yet: trying again");
                    tokio::time::sleep(RETRY).await;
                }
                done => return done.map(|()| announced),
            }
        }
    }

    fn metrics_of(
        &self,
        step: PolicyVersion,
        batch: &[Selected<Group>],
        output: &StepOutput,
    ) -> StepMetrics {
        let stats = output.stats;
        StepMetrics {
            loss: stats.loss,
            entropy_mean: stats.entropy,
            mismatch_kl_mean: stats.mismatch_kl,
            clip_fraction_mean: stats.clip_fraction,
            grad_norm: stats.gradient_norm,
            lr: stats.learning_rate,
            updates: stats.updates,
            broadcast_full_bytes: output.image.len() as u64,
            broadcast_changed_fraction: stats.changed_fraction,
            ..batch_metrics(step, self.resolver.version(), batch)
        }
    }

    fn write_lines(
        &mut self,
        step: PolicyVersion,
        batch: &[Selected<Group>],
        line: StepMetrics,
    ) -> Result<(), TrainerError> {
        info!(
            %step,
            reward = format!("{:.3}", line.reward_mean),
            staleness = format!("{:.2}", line.staleness_mean),
            seconds = format!("{:.2}", line.time_step),
            "step"
        );
        let temperature = self.descriptor.body.sampling.temperature;
        self.record.rollouts(step, batch, temperature)?;
        self.record.step(line)?;
        Ok(())
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
        Ok(())
    }

    fn stepper(&mut self, step: PolicyVersion) -> Result<&mut Box<dyn Stepper>, TrainerError> {
        self.stepper.as_mut().ok_or_else(|| lost(step))
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
        info!(%step, uploaded = self.outlet.uploaded(), "the run is finished");
        Ok(())
    }

    async fn read_logs(&mut self) -> Result<(), TrainerError> {
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
                self.record.fate(&fate)?;
            }
        }
    }
}

/// A step that was given up half way has the model.
fn lost(step: PolicyVersion) -> TrainerError {
    let source = StepError("an earlier step did not end: restart the trainer".to_owned());
    TrainerError::Step { step, source }
}

/// What is not confirmed comes again, and is recognised by its ticket then.
async fn acknowledge(delivery: &Delivery) {
    if let Err(error) = delivery.ack().await {
        warn!(%error, "an acknowledgement was not confirmed");
    }
}

fn fate_of(
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
