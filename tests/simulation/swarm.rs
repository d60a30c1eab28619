//! The processes of a simulated swarm, made of the shipped services over the bus in memory.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rand::rngs::StdRng;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use muster_broadcaster::follower::{Follow, Follower};
use muster_dispatch::audit::AuditConfig;
use muster_dispatch::conduct::ConductConfig;
use muster_dispatch::reviews::CritiqueConfig;
use muster_dispatch::service::{DispatchError, DispatchParts, DispatchService, DispatchSettings};
use muster_learner::advantage::AdvantageConfig;
use muster_learner::trainer::objects::BroadcastConfig;
use muster_learner::trainer::{Trainer, TrainerError, TrainerParts, TrainerSettings};
use muster_protocol::bus::QueueBounds;
use muster_protocol::bus::memory::{MemoryBus, MemoryConfig};
use muster_protocol::clock::{SharedClock, TimerClock};
use muster_protocol::dispatch_client::DispatchClient;
use muster_protocol::id::{ContentHash, RunId, UnixMillis};
use muster_protocol::message::lease::NumericClass;
use muster_protocol::subject::Role;
use muster_rewards::critic::{Critic, CriticParts};
use muster_rollout::answerer::Answerer;
use muster_rollout::worker::{Worker, WorkerParts};

use crate::in_turn::{BatchAnswerer, InTurn};
use crate::liar::LyingAnswerer;
use crate::members::{Members, SwarmMember, members};
use crate::memory_objects::MemoryObjects;
use crate::objects::UnreliableSource;
use crate::observed_bus::ObservedBus;
use crate::observer::Observer;
use crate::run::Scenario;
use crate::table::{TableAnswerer, TableScorer, TableStepper, seeded_rng};
use crate::task::{ASYNC_LEVEL, BATCH_GROUPS, GROUP_SIZE, LEASE_MS, Prompts, descriptor};

const TICKET_MS: u64 = 120_000;

#[derive(Clone)]
pub struct SimulatedSwarm {
    pub scenario: Scenario,
    pub run: RunId,
    pub bus: MemoryBus,
    pub clock: SharedClock,
    pub observer: Observer,
    pub objects: MemoryObjects,
    pub dir: PathBuf,
}

impl SimulatedSwarm {
    pub fn new(scenario: Scenario, dir: PathBuf) -> Self {
        let run: RunId = format!("simulation-{}", scenario.seed).parse().unwrap();
        let bounds = QueueBounds::default();
        let config = MemoryConfig {
            seed: scenario.seed,
            faults: scenario.faults,
            bounds,
        };
        Self {
            bus: MemoryBus::new(&run, config),
            clock: Arc::new(TimerClock::starting_at(UnixMillis(1_800_000_000_000))),
            observer: Observer::new(run.clone(), scenario.rules()),
            objects: MemoryObjects::default(),
            scenario,
            run,
            dir,
        }
    }

    fn client(&self, member: &SwarmMember, role: Role) -> DispatchClient {
        let mut bus = self.bus.connect(&member.user, role);
        if role.is_lab() {
            bus = Arc::new(ObservedBus::new(bus, self.observer.clone()));
        }
        let learner = members().trainer.identity.peer_id();
        DispatchClient::new(bus, member.identity.clone(), self.run.clone(), learner)
    }

    fn rng(&self, purpose: &str, member: &SwarmMember, start: u64) -> StdRng {
        seeded_rng(
            self.scenario.seed,
            purpose,
            member.number as u64 * 1_000 + start,
        )
    }

    fn source(&self, purpose: &str, member: &SwarmMember, start: u64) -> Arc<UnreliableSource> {
        let rng = Mutex::new(self.rng(purpose, member, start));
        Arc::new(UnreliableSource {
            objects: self.objects.clone(),
            rng,
        })
    }

    /// Runs dispatch and restarts it after a transient error, as its supervisor does.
    pub async fn dispatch(self, shutdown: CancellationToken) {
        loop {
            let done = self.dispatch_once(&shutdown).await;
            match done {
                Ok(()) => return,
                Err(DispatchError::Bus(error)) if error.is_transient() => {}
                Err(error) => self.observer.violation(format!("dispatch ended: {error}")),
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }

    async fn dispatch_once(&self, shutdown: &CancellationToken) -> Result<(), DispatchError> {
        let client = self.client(&members().dispatch, Role::Dispatch);
        let parts = DispatchParts {
            bus: client.bus().clone(),
            identity: members().dispatch.identity.clone(),
            run: self.run.clone(),
            learner: members().trainer.identity.peer_id(),
            roster: members().roster.clone(),
            prompts: Arc::new(Prompts),
            clock: self.clock.clone(),
            settings: DispatchSettings {
                batch_groups: BATCH_GROUPS,
                steps: self.scenario.steps,
                ticket_ms: TICKET_MS,
                lease_ms: LEASE_MS,
                audit: AuditConfig {
                    share_min: 0.2,
                    trust_after: 2,
                    groups_after_failure: 50,
                },
                critique: CritiqueConfig {
                    verdicts: self.scenario.verdicts,
                    critics_max: 5,
                    lease_ms: 5_000,
                },
                conduct: ConductConfig::default(),
            },
            secret: ContentHash::of(&self.scenario.seed.to_le_bytes()).0,
        };
        let service = DispatchService::start(parts).await?;
        service.run(shutdown.clone()).await
    }

    /// Runs the trainer and restarts it after a transient error, as its supervisor does.
    pub async fn trainer(self, shutdown: CancellationToken) {
        loop {
            let done = self.trainer_once(&shutdown).await;
            match done {
                Ok(()) => return,
                Err(TrainerError::Bus(error)) if error.is_transient() => {}
                Err(error) => self
                    .observer
                    .violation(format!("the trainer ended: {error}")),
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }

    async fn trainer_once(&self, shutdown: &CancellationToken) -> Result<(), TrainerError> {
        let parts = TrainerParts {
            client: self.client(&members().trainer, Role::Trainer),
            roster: members().roster.clone(),
            dir: self.dir.clone(),
            stepper: Box::new(TableStepper::new(self.scenario.seed)),
            swarm: Arc::new(self.objects.clone()),
            descriptor: descriptor(),
            files: Vec::new(),
            settings: TrainerSettings {
                batch_groups: BATCH_GROUPS as usize,
                steps: self.scenario.steps,
                checkpoint_every: 20,
                advantage: AdvantageConfig::default(),
                broadcast: BroadcastConfig::default(),
            },
        };
        let trainer = Trainer::start(parts).await?;
        trainer.run(shutdown.clone()).await
    }

    pub async fn critic(
        self,
        member: &'static SwarmMember,
        start: u64,
        shutdown: CancellationToken,
    ) {
        let tracker = TaskTracker::new();
        let client = self.client(member, Role::Critic);
        let source = self.source("critic-source", member, start);
        let judged = async {
            let follower = Follower::start(
                client.clone(),
                source,
                Follow::Every,
                &tracker,
                shutdown.child_token(),
            );
            let scorer = TableScorer {
                rng: self.rng("critic", member, start),
                versions_kept: ASYNC_LEVEL as usize + 3,
                held: BTreeMap::new(),
            };
            let parts = CriticParts {
                client: client.clone(),
                scorer: Box::new(scorer),
                follower: follower.await.map_err(|error| error.to_string())?,
                class: NumericClass::F32Cpu,
                groups_max: 4,
            };
            let critic = Critic::start(parts)
                .await
                .map_err(|error| error.to_string())?;
            critic
                .run(shutdown.clone())
                .await
                .map_err(|error| error.to_string())
        };
        if let Err(error) = judged.await {
            self.observer
                .violation(format!("critic {} ended: {error}", member.number));
        }
    }

    pub async fn worker(
        self,
        member: &'static SwarmMember,
        start: u64,
        shutdown: CancellationToken,
    ) {
        let tracker = TaskTracker::new();
        let client = self.client(member, Role::Worker);
        let source = self.source("worker-source", member, start);
        let (rng, observer) = (self.rng("worker", member, start), self.observer.clone());
        let answerer: Box<dyn Answerer> = match Members::lie(member.number) {
            Some(lie) => in_turn(LyingAnswerer {
                lie,
                rng,
                observer,
                roots: Vec::new(),
                earlier: None,
            }),
            None => in_turn(TableAnswerer { rng, observer }),
        };
        let worked = async {
            let follower = Follower::start(
                client.clone(),
                source,
                Follow::Newest,
                &tracker,
                shutdown.child_token(),
            );
            let parts = WorkerParts {
                client: client.clone(),
                clock: self.clock.clone(),
                answerer,
                follower: follower.await.map_err(|error| error.to_string())?,
                class: NumericClass::F32Cpu,
            };
            let worker = Worker::start(parts)
                .await
                .map_err(|error| error.to_string())?;
            worker
                .run(shutdown.clone())
                .await
                .map_err(|error| error.to_string())
        };
        if let Err(error) = worked.await {
            self.observer
                .violation(format!("worker {} ended: {error}", member.number));
        }
    }
}

fn in_turn(model: impl BatchAnswerer + 'static) -> Box<dyn Answerer> {
    Box::new(InTurn::new(model, 2 * GROUP_SIZE))
}
