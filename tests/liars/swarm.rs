//! A whole swarm in one process out of the shipped shells. A plan says who takes part and how they lie; a running swarm can
//! be looked at; its outcome is what the run left behind.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use muster_broadcaster::follower::{Follow, Follower};
use muster_broadcaster::swarm::presence;
use muster_broadcaster::swarm::uploads::Sharing;
use muster_broadcaster::{ObjectSource, Swarm, SwarmConfig};
use muster_dispatch::service::{DispatchParts, DispatchService, DispatchSettings};
use muster_learner::policy_stepper::{ModelConfig, PolicyStepper};
use muster_learner::trainer::{Trainer, TrainerParts, TrainerSettings};
use muster_policy::{Device, EngineConfig, KernelSet};
use muster_protocol::bus::SharedBus;
use muster_protocol::bus::memory::{MemoryBus, MemoryConfig};
use muster_protocol::bus::nats::{NatsBus, NatsConfig};
use muster_protocol::clock::{SharedClock, SystemClock};
use muster_protocol::credentials::{Member, Roster};
use muster_protocol::dispatch_client::DispatchClient;
use muster_protocol::envelope::open;
use muster_protocol::id::PeerId;
use muster_protocol::identity::{Identity, MachineSeed};
use muster_protocol::message::fate::{Fate, FateRecord};
use muster_protocol::message::lease::NumericClass;
use muster_protocol::nats_server::{Member as ServerMember, NatsServer, ServerConfig};
use muster_protocol::record::{Line, RolloutLine, StepMetrics, read_all};
use muster_protocol::subject::{Log, Queue, Role};
use muster_rewards::critic::scorer::PolicyScorer;
use muster_rewards::critic::{Critic, CriticParts};
use muster_rollout::engine::Task;
use muster_rollout::worker::{Worker, WorkerParts};

use super::config::RunConfig;
use super::critic::{Deeds, Inflator, Making};
use super::in_turn::InTurn;
use super::ledger::Ledger;
use super::shelf::Shelf;
use super::start::Start;
use super::suspect::{Conduct, Lie, Suspect};

/// How long a test waits for what it expects before it says what is missing. Each takes a few seconds on a quiet machine.
const PATIENCE: Duration = Duration::from_secs(120);
/// How often a test looks.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Members who are the lab's: dispatch and trainer.
const LAB: usize = 2;
/// Versions that a critic keeps beyond the async level, as `muster critic` does.
const VERSIONS_BEYOND: usize = 3;

/// What carries messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Venue {
    Memory,
    Nats,
}

/// How weights travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weights {
    /// From peer to peer over loopback.
    Peers,
    /// From the trainer's hands.
    Shelf,
}

/// A worker's conduct.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WorkerKind {
    Honest,
    Liar(Lie),
    /// With int8 weights, honest or not.
    Int8(Option<Lie>),
    /// Enrolled, and driven by the test.
    Absent,
}

/// A critic's conduct.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CriticKind {
    Honest,
    Inflates,
    Permutes,
}

/// Who takes part in what run.
#[derive(Clone)]
pub struct Plan {
    pub config: RunConfig,
    pub start: Arc<Start>,
    pub venue: Venue,
    pub weights: Weights,
    pub workers: Vec<WorkerKind>,
    pub critics: Vec<CriticKind>,
    pub seeders: usize,
    /// How long until the test gives up.
    pub patience: Duration,
}

impl Plan {
    /// Two honest workers, one honest critic, all in memory.
    pub fn new(config: RunConfig, start: Arc<Start>) -> Self {
        Self {
            config,
            start,
            venue: Venue::Memory,
            weights: Weights::Shelf,
            workers: vec![WorkerKind::Honest; 2],
            critics: vec![CriticKind::Honest],
            seeders: 0,
            patience: PATIENCE,
        }
    }
}

/// A member that takes part.
struct Seat {
    name: String,
    identity: Identity,
    client: DispatchClient,
    swarm: Option<Swarm>,
}

enum Hub {
    Memory(MemoryBus),
    Nats(NatsServer),
}

/// A run as it goes.
pub struct Running {
    plan: Plan,
    dir: TempDir,
    hub: Hub,
    seats: Vec<Seat>,
    shelf: Arc<Shelf>,
    ledger: Ledger,
    deeds: Arc<Mutex<Deeds>>,
    tasks: JoinSet<(String, Result<(), String>)>,
    done: Vec<String>,
    tracker: TaskTracker,
    shutdown: CancellationToken,
    /// Ends dispatch and trainer, who go last: a worker submits what it has answered for as long as its lease lasts.
    lab_shutdown: CancellationToken,
    began: Instant,
}

/// What a run has come to.
pub struct View {
    /// Tickets issued.
    pub issued: u64,
    /// Steps closed.
    pub steps: u64,
    /// How tickets and groups ended, in order.
    pub fates: Vec<FateRecord>,
}

impl View {
    /// Tickets that have ended.
    pub fn ended(&self) -> u64 {
        self.fates
            .iter()
            .filter(|record| record.fate != Fate::Duplicate)
            .count() as u64
    }

    /// Groups of `worker` with this fate.
    pub fn count(&self, worker: PeerId, fate: Fate) -> usize {
        let of = |record: &&FateRecord| record.worker == Some(worker) && record.fate == fate;
        self.fates.iter().filter(of).count()
    }
}

impl Running {
    /// Starts everybody.
    pub async fn start(plan: Plan) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let identities = identities(&plan);
        let members = identities
            .iter()
            .map(|(name, role, identity)| Member::of(name, *role, identity));
        let roster = Roster {
            members: members.collect(),
        };
        let hub = open_hub(&plan, &roster, dir.path()).await;
        let mut running = Self {
            plan,
            dir,
            hub,
            seats: Vec::new(),
            shelf: Shelf::new(None),
            ledger: Ledger::default(),
            deeds: Arc::default(),
            tasks: JoinSet::new(),
            done: Vec::new(),
            tracker: TaskTracker::new(),
            shutdown: CancellationToken::new(),
            lab_shutdown: CancellationToken::new(),
            began: Instant::now(),
        };
        for (name, role, identity) in identities {
            running.take_seat(name, role, identity, &roster).await;
        }
        running.shelf = Shelf::new(running.seat("trainer").swarm.clone());
        running.start_learner(&roster);
        for (number, kind) in running.plan.workers.clone().into_iter().enumerate() {
            running.start_worker(number, kind).await;
        }
        for (number, kind) in running.plan.critics.clone().into_iter().enumerate() {
            running.start_critic(number, kind).await;
        }
        for number in 0..running.plan.seeders {
            running.start_seeder(number).await;
        }
        running
    }

    async fn take_seat(&mut self, name: String, role: Role, identity: Identity, roster: &Roster) {
        let run = self.plan.config.run.name.clone();
        let bus: SharedBus = match &self.hub {
            Hub::Memory(bus) => bus.connect(&identity.login_user(), role),
            Hub::Nats(server) => {
                let login = identity.login_seed().unwrap();
                let config = NatsConfig::new(&server.url(), &run, &login, &name);
                NatsBus::connect(config).await.unwrap()
            }
        };
        let learner = roster.first(Role::Trainer).unwrap().peer;
        let client = DispatchClient::new(bus, identity.clone(), run, learner);
        let swarm = match self.plan.weights {
            Weights::Shelf => None,
            Weights::Peers => Some(self.join_peers(role, &identity, &client).await),
        };
        self.seats.push(Seat {
            name,
            identity,
            client,
            swarm,
        });
    }

    async fn join_peers(&self, role: Role, identity: &Identity, client: &DispatchClient) -> Swarm {
        let mut config = SwarmConfig::default();
        if role == Role::Trainer {
            config.sharing = Sharing::FirstCopies;
            let kept = self.plan.config.run.async_level as usize + 2;
            config.store.versions_kept = config.store.versions_kept.max(kept);
        }
        let stop = self.shutdown.child_token();
        let swarm = Swarm::start(config, identity.clone(), clock(), &self.tracker, stop);
        let swarm = swarm.await.unwrap();
        let stop = self.shutdown.child_token();
        presence::keep(client.clone(), swarm.clone(), &self.tracker, stop);
        swarm
    }

    fn seat(&self, name: &str) -> &Seat {
        let seat = self.seats.iter().find(|seat| seat.name == name);
        seat.unwrap_or_else(|| panic!("nobody is called {name}"))
    }

    /// A member's way to dispatch.
    pub fn client(&self, name: &str) -> DispatchClient {
        self.seat(name).client.clone()
    }

    /// A member's key.
    pub fn peer(&self, name: &str) -> PeerId {
        self.seat(name).identity.peer_id()
    }

    /// What was answered so far.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// The weights offered so far.
    pub fn shelf(&self) -> Arc<Shelf> {
        self.shelf.clone()
    }

    /// A member's place among the peers.
    pub fn swarm(&self, name: &str) -> Swarm {
        let swarm = self.seat(name).swarm.clone();
        swarm.expect("weights travel between peers in this plan")
    }

    /// Plays a role on a thread of its own, as its process would: a role's future need not move between threads.
    fn spawn<F, E>(&mut self, name: &str, role: impl FnOnce() -> F + Send + 'static)
    where
        F: Future<Output = Result<(), E>>,
        E: std::fmt::Display,
    {
        let (name, runtime) = (name.to_owned(), tokio::runtime::Handle::current());
        self.tasks.spawn_blocking(move || {
            let done = runtime.block_on(role());
            (name, done.map_err(|error| error.to_string()))
        });
    }

    fn start_learner(&mut self, roster: &Roster) {
        let (config, start) = (&self.plan.config, self.plan.start.clone());
        let model = ModelConfig {
            config: start.model.config.clone(),
            storage: config.model.storage,
            kernels: config.model.kernels,
            device: Device::Cpu,
        };
        let (steps, async_level) = (config.run.steps.get(), config.run.async_level);
        let train = config.learner.train.clone();
        let stepper = PolicyStepper::new(model, train, &start.model.image, steps, async_level);
        let trainer = self.seat("trainer");
        let parts = TrainerParts {
            client: trainer.client.clone(),
            roster: roster.clone(),
            dir: self.dir.path().to_owned(),
            stepper: Box::new(stepper.unwrap()),
            outlet: self.shelf.clone(),
            descriptor: start.describe(config, roster),
            files: start.files(config),
            settings: TrainerSettings {
                batch_groups: config.learner.batch_groups.get(),
                steps,
                checkpoint_every: config.learner.checkpoint_every.get(),
                advantage: config.learner.advantage,
                broadcast: config.learner.broadcast,
            },
        };
        let dispatch = self.seat("dispatch");
        let service = DispatchParts {
            bus: dispatch.client.bus().clone(),
            identity: dispatch.identity.clone(),
            run: config.run.name.clone(),
            learner: trainer.identity.peer_id(),
            roster: roster.clone(),
            prompts: start,
            clock: clock(),
            settings: DispatchSettings {
                batch_groups: config.learner.batch_groups.get() as u64,
                steps,
                ticket_ms: config.dispatch.ticket_ms.get(),
                lease_ms: config.dispatch.lease_ms.get(),
                audit: config.dispatch.audit,
                critique: config.dispatch.critique,
                conduct: config.dispatch.conduct,
            },
            secret: [11; 32],
        };
        let stop = self.lab_shutdown.clone();
        self.spawn("trainer", || async move {
            Trainer::start(parts).await?.run(stop).await
        });
        let stop = self.lab_shutdown.clone();
        self.spawn("dispatch", || async move {
            DispatchService::start(service).await?.run(stop).await
        });
    }

    async fn follower(&self, name: &str, follow: Follow) -> Follower {
        let seat = self.seat(name);
        let source: Arc<dyn ObjectSource> = match &seat.swarm {
            Some(swarm) => Arc::new(swarm.clone()),
            None => self.shelf.clone(),
        };
        let stop = self.shutdown.child_token();
        Follower::start(seat.client.clone(), source, follow, &self.tracker, stop)
            .await
            .unwrap()
    }

    async fn start_worker(&mut self, number: usize, kind: WorkerKind) {
        let (lie, class) = match kind {
            WorkerKind::Honest => (None, NumericClass::F32Cpu),
            WorkerKind::Liar(lie) => (Some(lie), NumericClass::F32Cpu),
            WorkerKind::Int8(lie) => (lie, NumericClass::Int8Cpu),
            WorkerKind::Absent => return,
        };
        let name = format!("worker-{}", number + 1);
        let rollouts_max = self.plan.config.worker.rollouts_max;
        let slots = NonZeroUsize::try_from(rollouts_max).unwrap();
        let model = self.plan.start.model.config.clone();
        let engine = EngineConfig {
            slots,
            ..EngineConfig::default()
        };
        let task = Task {
            tokens_max: self.plan.config.sampling.tokens_max.get(),
            tokenizer: self.plan.start.model.tokenizer.clone(),
        };
        let suspect = Suspect::new(
            Conduct { lie, class },
            model,
            engine,
            task,
            self.ledger.clone(),
        );
        let parts = WorkerParts {
            client: self.client(&name),
            clock: clock(),
            answerer: Box::new(InTurn::new(suspect, rollouts_max.get())),
            follower: self.follower(&name, Follow::Newest).await,
            class,
        };
        let stop = self.shutdown.clone();
        self.spawn(&name, || async move {
            Worker::start(parts).await?.run(stop).await.map(drop)
        });
    }

    async fn start_critic(&mut self, number: usize, kind: CriticKind) {
        let name = format!("critic-{}", number + 1);
        let (stop, client) = (self.shutdown.clone(), self.client(&name));
        let making = match kind {
            CriticKind::Honest => None,
            CriticKind::Inflates => Some(Making::Inflated),
            CriticKind::Permutes => Some(Making::Permuted),
        };
        if let Some(making) = making {
            let (start, deeds) = (self.plan.start.clone(), self.deeds.clone());
            let inflator = Inflator {
                making,
                client,
                start,
                deeds,
            };
            self.spawn(&name, || async move {
                tokio::select! {
                    done = inflator.run() => done,
                    () = stop.cancelled() => Ok(()),
                }
            });
            return;
        }
        let model = &self.plan.start.model;
        let kept = self.plan.config.run.async_level as usize + VERSIONS_BEYOND;
        let (config, tokenizer) = (model.config.clone(), model.tokenizer.clone());
        let scorer = PolicyScorer::new(config, KernelSet::Fused, Device::Cpu, tokenizer, kept)
            .for_classes(&self.plan.config.dispatch.classes);
        let parts = CriticParts {
            client,
            scorer: Box::new(scorer),
            follower: self.follower(&name, Follow::Every).await,
            class: NumericClass::F32Cpu,
            groups_max: self.plan.config.critic.groups_max.get(),
        };
        self.spawn(&name, || async move {
            Critic::start(parts).await?.run(stop).await
        });
    }

    async fn start_seeder(&mut self, number: usize) {
        let name = format!("seeder-{}", number + 1);
        let mut follower = self.follower(&name, Follow::Newest).await;
        let stop = self.shutdown.clone();
        self.spawn(&name, || async move {
            loop {
                tokio::select! {
                    () = stop.cancelled() => return Ok::<(), String>(()),
                    () = follower.changed() => drop(follower.latest()),
                }
            }
        });
    }

    /// What the run has come to so far.
    pub async fn view(&self) -> View {
        let client = &self.seat("trainer").client;
        let bus = client.bus();
        let mut fates = Vec::new();
        let mut after = 0;
        loop {
            let records = bus.read(Log::Fates, after, 256).await.unwrap();
            let Some(last) = records.last() else { break };
            after = last.sequence;
            let opened = records.into_iter().map(|record| {
                open::<FateRecord>(record.payload, client.run())
                    .unwrap()
                    .body
            });
            fates.extend(opened);
        }
        let versions = bus.last(Log::Versions).await.unwrap();
        let versions = versions.map_or(0, |record| record.sequence);
        let tickets = bus.queue_state(Queue::Tickets).await.unwrap();
        View {
            issued: tickets.last_sequence,
            steps: versions.saturating_sub(1),
            fates,
        }
    }

    /// Waits until the run has come to what `enough` wants; `what` says it in words.
    pub async fn until(&mut self, what: &str, enough: impl Fn(&View) -> bool) -> View {
        self.opened().await;
        loop {
            let view = self.view().await;
            if enough(&view) {
                return view;
            }
            self.notice_ends();
            assert!(
                self.began.elapsed() < self.plan.patience,
                "{what} did not come in {:?}: {} steps, {} of {} tickets ended; ended tasks: {:?}",
                self.plan.patience,
                view.steps,
                view.ended(),
                view.issued,
                self.done
            );
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Waits until the streams are there to be looked at.
    async fn opened(&self) {
        let bus = self.seat("trainer").client.bus().clone();
        while bus.last(Log::Control).await.ok().flatten().is_none() {
            assert!(
                self.began.elapsed() < self.plan.patience,
                "the run was not opened"
            );
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Notes members that have ended; one that failed fails the test.
    fn notice_ends(&mut self) {
        while let Some(ended) = self.tasks.try_join_next() {
            let (name, result) = ended.unwrap();
            if let Err(error) = result {
                panic!("{name} failed: {error}");
            }
            self.done.push(name);
        }
    }

    /// Waits until the run is over for every honest worker and every ticket has ended, then ends it.
    pub async fn finish(mut self) -> Outcome {
        let steps = self.plan.config.run.steps.get();
        let everything = "the run's end with a fate for every ticket";
        self.until(everything, |view| {
            view.steps >= steps && view.ended() == view.issued
        })
        .await;
        let last = self
            .dir
            .path()
            .join(format!("checkpoints/{steps}/manifest.json"));
        while !last.exists() {
            self.notice_ends();
            assert!(self.began.elapsed() < self.plan.patience, "no checkpoint");
            tokio::time::sleep(LOOK_EVERY).await;
        }
        self.stop().await
    }

    /// Ends the run as it stands.
    pub async fn stop(mut self) -> Outcome {
        self.shutdown.cancel();
        let everybody = self.done.len() + self.tasks.len();
        while self.done.len() < everybody {
            if self.done.len() + LAB == everybody {
                self.lab_shutdown.cancel();
            }
            let (name, result) = self.tasks.join_next().await.unwrap().unwrap();
            result.unwrap_or_else(|error| panic!("{name} failed: {error}"));
            self.done.push(name);
        }
        let view = self.view().await;
        self.tracker.close();
        self.tracker.wait().await;
        if let Hub::Nats(server) = self.hub {
            server.stop().await;
        }
        let peers = self.seats.iter();
        let names = peers.map(|seat| (seat.identity.peer_id(), seat.name.clone()));
        let deeds = *self.deeds.lock().unwrap();
        Outcome {
            view,
            names: names.collect(),
            ledger: self.ledger,
            shelf: self.shelf,
            deeds,
            start: self.plan.start,
            dir: self.dir,
            seconds: self.began.elapsed().as_secs_f64(),
        }
    }
}

/// What a run left behind.
pub struct Outcome {
    pub view: View,
    pub names: BTreeMap<PeerId, String>,
    pub ledger: Ledger,
    pub shelf: Arc<Shelf>,
    pub deeds: Deeds,
    pub start: Arc<Start>,
    pub dir: TempDir,
    pub seconds: f64,
}

impl Outcome {
    /// The lines of metrics.jsonl.
    pub fn steps(&self) -> Vec<StepMetrics> {
        read_all(&self.dir.path().join(StepMetrics::FILE)).unwrap()
    }

    /// Every rollout trained on, in the order of steps.
    pub fn rollouts(&self) -> Vec<RolloutLine> {
        let folder = self.dir.path().join(RolloutLine::FILE);
        let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        files.sort();
        files
            .iter()
            .flat_map(|file| read_all::<RolloutLine>(file).unwrap())
            .collect()
    }
}

fn clock() -> SharedClock {
    Arc::new(SystemClock)
}

/// Everybody's names, roles and keys. The keys are fixed: a run's randomness is dispatch's.
fn identities(plan: &Plan) -> Vec<(String, Role, Identity)> {
    let numbered = |name: &str, role: Role, count: usize| -> Vec<(String, Role)> {
        (1..=count)
            .map(|number| (format!("{name}-{number}"), role))
            .collect()
    };
    let mut members = vec![
        ("dispatch".to_owned(), Role::Dispatch),
        ("trainer".to_owned(), Role::Trainer),
    ];
    members.extend(numbered("worker", Role::Worker, plan.workers.len()));
    members.extend(numbered("critic", Role::Critic, plan.critics.len()));
    members.extend(numbered("seeder", Role::Seeder, plan.seeders));
    let named = members.into_iter().enumerate();
    named
        .map(|(number, (name, role))| {
            let seed = MachineSeed::from_bytes([number as u8 + 1; 32]);
            (name, role, Identity::from_seed(&seed))
        })
        .collect()
}

async fn open_hub(plan: &Plan, roster: &Roster, dir: &Path) -> Hub {
    let run = &plan.config.run.name;
    if plan.venue == Venue::Memory {
        return Hub::Memory(MemoryBus::new(run, MemoryConfig::default()));
    }
    let users = roster.members.iter();
    let users = users.map(|member| ServerMember {
        user: member.user.clone(),
        role: member.role,
    });
    let mut config = ServerConfig::new(run, &dir.join("nats"), users.collect());
    config.project = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let server = NatsServer::start(&config).await;
    Hub::Nats(server.unwrap_or_else(|error| panic!("this test needs a NATS server: {error}")))
}
