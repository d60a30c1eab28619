//! A whole swarm in one process, made of the shipped services: starts the members of a plan, follows the run and ends it.

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
use muster_protocol::message::fate::FateRecord;
use muster_protocol::message::lease::NumericClass;
use muster_protocol::nats_server::{Member as ServerMember, NatsServer, ServerConfig};
use muster_protocol::subject::{Log, Queue, Role};
use muster_rewards::critic::scorer::PolicyScorer;
use muster_rewards::critic::{Critic, CriticParts};
use muster_rollout::engine::Task;
use muster_rollout::worker::{Worker, WorkerParts};

use super::critic::{CriticCounts, LyingCritic, RewardChange};
use super::in_turn::InTurn;
use super::offered_weights::OfferedWeights;
use super::plan::{BusKind, CriticKind, Plan, WeightTransfer, WorkerKind};
use super::results::{FinishedRun, Progress};
use super::submissions::Submissions;
use super::worker_model::{Behaviour, WorkerModel};

/// Pause between two polls.
const POLL: Duration = Duration::from_millis(20);
/// Number of members that are the lab's: dispatch and trainer.
const LAB: usize = 2;
/// Versions that a critic keeps beyond the async level, as `muster critic` does.
const VERSIONS_BEYOND: usize = 3;

/// A connected member.
struct SwarmMember {
    name: String,
    identity: Identity,
    client: DispatchClient,
    swarm: Option<Swarm>,
}

enum Server {
    Memory(MemoryBus),
    Nats(NatsServer),
}

/// A run in progress.
pub struct Running {
    plan: Plan,
    dir: TempDir,
    server: Server,
    members: Vec<SwarmMember>,
    offered: Arc<OfferedWeights>,
    submissions: Submissions,
    critic_counts: Arc<Mutex<CriticCounts>>,
    tasks: JoinSet<(String, Result<(), String>)>,
    done: Vec<String>,
    tracker: TaskTracker,
    shutdown: CancellationToken,
    /// Ends dispatch and trainer after all others: workers still submit the groups of their last leases.
    lab_shutdown: CancellationToken,
    began: Instant,
}

impl Running {
    /// Starts all members.
    pub async fn start(plan: Plan) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let identities = identities(&plan);
        let members = identities
            .iter()
            .map(|(name, role, identity)| Member::of(name, *role, identity));
        let roster = Roster {
            members: members.collect(),
        };
        let server = start_server(&plan, &roster, dir.path()).await;
        let mut running = Self {
            plan,
            dir,
            server,
            members: Vec::new(),
            offered: OfferedWeights::new(None),
            submissions: Submissions::default(),
            critic_counts: Arc::default(),
            tasks: JoinSet::new(),
            done: Vec::new(),
            tracker: TaskTracker::new(),
            shutdown: CancellationToken::new(),
            lab_shutdown: CancellationToken::new(),
            began: Instant::now(),
        };
        for (name, role, identity) in identities {
            running.connect(name, role, identity, &roster).await;
        }
        running.offered = OfferedWeights::new(running.member("trainer").swarm.clone());
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

    async fn connect(&mut self, name: String, role: Role, identity: Identity, roster: &Roster) {
        let run = self.plan.config.run.name.clone();
        let bus: SharedBus = match &self.server {
            Server::Memory(bus) => bus.connect(&identity.login_user(), role),
            Server::Nats(server) => {
                let login = identity.login_seed().unwrap();
                let config = NatsConfig::new(&server.url(), &run, &login, &name);
                NatsBus::connect(config).await.unwrap()
            }
        };
        let learner = roster.first(Role::Trainer).unwrap().peer;
        let client = DispatchClient::new(bus, identity.clone(), run, learner);
        let swarm = match self.plan.weights {
            WeightTransfer::FromTrainer => None,
            WeightTransfer::BetweenPeers => Some(self.join_peers(role, &identity, &client).await),
        };
        self.members.push(SwarmMember {
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

    fn member(&self, name: &str) -> &SwarmMember {
        let member = self.members.iter().find(|member| member.name == name);
        member.unwrap_or_else(|| panic!("no member is called {name}"))
    }

    /// The dispatch client of a member.
    pub fn client(&self, name: &str) -> DispatchClient {
        self.member(name).client.clone()
    }

    /// The peer id of a member.
    pub fn peer(&self, name: &str) -> PeerId {
        self.member(name).identity.peer_id()
    }

    /// The groups submitted so far.
    pub fn submissions(&self) -> &Submissions {
        &self.submissions
    }

    /// The weights offered so far.
    pub fn offered(&self) -> Arc<OfferedWeights> {
        self.offered.clone()
    }

    /// The peer-to-peer swarm of a member.
    pub fn swarm(&self, name: &str) -> Swarm {
        let swarm = self.member(name).swarm.clone();
        swarm.expect("weights travel between peers in this plan")
    }

    /// Runs a role on its own thread, since its future need not be `Send`.
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
        let trainer = self.member("trainer");
        let parts = TrainerParts {
            client: trainer.client.clone(),
            roster: roster.clone(),
            dir: self.dir.path().to_owned(),
            stepper: Box::new(stepper.unwrap()),
            swarm: self.offered.clone(),
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
        let dispatch = self.member("dispatch");
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
        let member = self.member(name);
        let source: Arc<dyn ObjectSource> = match &member.swarm {
            Some(swarm) => Arc::new(swarm.clone()),
            None => self.offered.clone(),
        };
        let stop = self.shutdown.child_token();
        Follower::start(member.client.clone(), source, follow, &self.tracker, stop)
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
        let model = WorkerModel::new(
            Behaviour { lie, class },
            model,
            engine,
            task,
            self.submissions.clone(),
        );
        let parts = WorkerParts {
            client: self.client(&name),
            clock: clock(),
            answerer: Box::new(InTurn::new(model, rollouts_max.get())),
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
        let change = match kind {
            CriticKind::Honest => None,
            CriticKind::Inflates => Some(RewardChange::Inflated),
            CriticKind::Permutes => Some(RewardChange::Permuted),
        };
        if let Some(change) = change {
            let (start, critic_counts) = (self.plan.start.clone(), self.critic_counts.clone());
            let critic = LyingCritic {
                change,
                client,
                start,
                critic_counts,
            };
            self.spawn(&name, || async move {
                tokio::select! {
                    done = critic.run() => done,
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

    /// The progress of the run so far.
    pub async fn progress(&self) -> Progress {
        let client = &self.member("trainer").client;
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
        Progress {
            issued: tickets.last_sequence,
            steps: versions.saturating_sub(1),
            fates,
        }
    }

    /// Waits until the progress is `enough`; `event` names it in the panic after the time limit.
    pub async fn wait_for(&mut self, event: &str, enough: impl Fn(&Progress) -> bool) -> Progress {
        self.opened().await;
        loop {
            let progress = self.progress().await;
            if enough(&progress) {
                return progress;
            }
            self.note_ended_members();
            assert!(
                self.began.elapsed() < self.plan.timeout,
                "{event} did not come in {:?}: {} steps, {} of {} tickets ended; ended tasks: {:?}",
                self.plan.timeout,
                progress.steps,
                progress.ended(),
                progress.issued,
                self.done
            );
            tokio::time::sleep(POLL).await;
        }
    }

    /// Waits until the streams exist.
    async fn opened(&self) {
        let bus = self.member("trainer").client.bus().clone();
        while bus.last(Log::Control).await.ok().flatten().is_none() {
            assert!(
                self.began.elapsed() < self.plan.timeout,
                "the run was not opened"
            );
            tokio::time::sleep(POLL).await;
        }
    }

    /// Notes members that have ended; a failed member fails the test.
    fn note_ended_members(&mut self) {
        while let Some(ended) = self.tasks.try_join_next() {
            let (name, result) = ended.unwrap();
            if let Err(error) = result {
                panic!("{name} failed: {error}");
            }
            self.done.push(name);
        }
    }

    /// Waits until all steps are closed and every ticket has ended, then ends the run.
    pub async fn finish(mut self) -> FinishedRun {
        let steps = self.plan.config.run.steps.get();
        let everything = "the run's end with a fate for every ticket";
        self.wait_for(everything, |progress| {
            progress.steps >= steps && progress.ended() == progress.issued
        })
        .await;
        let last = self
            .dir
            .path()
            .join(format!("checkpoints/{steps}/manifest.json"));
        while !last.exists() {
            self.note_ended_members();
            assert!(self.began.elapsed() < self.plan.timeout, "no checkpoint");
            tokio::time::sleep(POLL).await;
        }
        self.stop().await
    }

    /// Ends the run.
    pub async fn stop(mut self) -> FinishedRun {
        self.shutdown.cancel();
        let members = self.done.len() + self.tasks.len();
        while self.done.len() < members {
            if self.done.len() + LAB == members {
                self.lab_shutdown.cancel();
            }
            let (name, result) = self.tasks.join_next().await.unwrap().unwrap();
            result.unwrap_or_else(|error| panic!("{name} failed: {error}"));
            self.done.push(name);
        }
        let progress = self.progress().await;
        self.tracker.close();
        self.tracker.wait().await;
        if let Server::Nats(server) = self.server {
            server.stop().await;
        }
        let peers = self.members.iter();
        let names = peers.map(|member| (member.identity.peer_id(), member.name.clone()));
        let critic_counts = *self.critic_counts.lock().unwrap();
        FinishedRun {
            progress,
            names: names.collect(),
            submissions: self.submissions,
            offered: self.offered,
            critic_counts,
            start: self.plan.start,
            dir: self.dir,
            seconds: self.began.elapsed().as_secs_f64(),
        }
    }
}

fn clock() -> SharedClock {
    Arc::new(SystemClock)
}

/// Names, roles and keys of the members. The keys are fixed, since dispatch provides the randomness of a run.
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

async fn start_server(plan: &Plan, roster: &Roster, dir: &Path) -> Server {
    let run = &plan.config.run.name;
    if plan.bus == BusKind::Memory {
        return Server::Memory(MemoryBus::new(run, MemoryConfig::default()));
    }
    let users = roster.members.iter();
    let users = users.map(|member| ServerMember {
        user: member.user.clone(),
        role: member.role,
    });
    let mut config = ServerConfig::new(run, &dir.join("nats"), users.collect());
    config.project = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let server = NatsServer::start(&config).await;
    Server::Nats(server.unwrap_or_else(|error| panic!("this test needs a NATS server: {error}")))
}
