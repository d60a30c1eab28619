//! One run: who starts when, who dies when, and when it is over.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rand::Rng;
use rand::rngs::StdRng;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use muster_broadcaster::follower::{Follow, Follower};
use muster_dispatch::audit::AuditConfig;
use muster_dispatch::conduct::ConductConfig;
use muster_dispatch::prompts::{Prompt, PromptSource, Reference};
use muster_dispatch::reviews::CritiqueConfig;
use muster_dispatch::service::{DispatchError, DispatchParts, DispatchService, DispatchSettings};
use muster_learner::advantage::AdvantageConfig;
use muster_learner::trainer::objects::BroadcastConfig;
use muster_learner::trainer::{Trainer, TrainerError, TrainerParts, TrainerSettings};
use muster_protocol::bus::memory::{MemoryBus, MemoryConfig, MemoryCounters, NetworkFaults};
use muster_protocol::bus::{QueueBounds, SharedBus};
use muster_protocol::clock::{SharedClock, TimerClock};
use muster_protocol::dispatch_client::DispatchClient;
use muster_protocol::envelope::{Statement, open};
use muster_protocol::id::{ContentHash, PolicyVersion, RunId, TicketId, UnixMillis};
use muster_protocol::message::batch::Batch;
use muster_protocol::message::descriptor::{Descriptor, Thresholds};
use muster_protocol::message::fate::{Fate, FateRecord};
use muster_protocol::message::lease::NumericClass;
use muster_protocol::message::ticket::SamplingRules;
use muster_protocol::subject::{Log, Queue, Role};
use muster_rewards::RewardConfig;
use muster_rewards::critic::{Critic, CriticParts};
use muster_rollout::answerer::Answerer;
use muster_rollout::worker::{Worker, WorkerParts};

use crate::cast::{CRITICS, Cast, Player, SPARES, WORKERS_MAX, cast};
use crate::checks::{Record, check};
use crate::in_turn::{BatchAnswerer, InTurn};
use crate::ledger::{Ledger, Quality, Rules};
use crate::liar::LyingAnswerer;
use crate::shelf::{Reach, Shelf};
use crate::table::{STOP, TOKENS_MAX, TableAnswerer, TableScorer, TableStepper, VOCABULARY, dice};
use crate::watched::Watched;

const GROUP_SIZE: u32 = 4;
const BATCH_GROUPS: u64 = 8;
const ASYNC_LEVEL: u64 = 2;
const LEASE_MS: u64 = 10_000;
const TICKET_MS: u64 = 120_000;
/// Virtual time after which a run that has not ended is called stuck.
const LIMIT: Duration = Duration::from_secs(1_800);
/// Virtual time given to decisions that are under way when the last step is closed.
const LAST_WORDS: Duration = Duration::from_secs(60);
/// Workers that die during a run.
const CHURN: f64 = 0.2;
/// Members die between these seconds of a run.
const DEATHS: std::ops::Range<u64> = 2_000..45_000;

/// A run to be played.
#[derive(Debug, Clone, Copy)]
pub struct Play {
    pub seed: u64,
    pub workers: usize,
    pub steps: u64,
    /// Agreeing verdicts that a group needs.
    pub verdicts: u32,
    pub dispatch_deaths: u64,
    pub trainer_deaths: u64,
    pub faults: NetworkFaults,
}

impl Play {
    /// Seeds differ in chance, in how many critics must agree, and in which lab processes die.
    pub fn of_seed(seed: u64) -> Self {
        Self {
            seed,
            workers: WORKERS_MAX,
            steps: 50,
            verdicts: 1 + (seed % 2) as u32,
            dispatch_deaths: seed / 2 % 2 * 2,
            trainer_deaths: seed / 4 % 2 * 2,
            faults: NetworkFaults {
                delay: (Duration::from_micros(200), Duration::from_millis(4)),
                loss: 0.05,
                duplication: 0.02,
                durable_loss: 0.0002,
            },
        }
    }

    fn rules(&self) -> Rules {
        Rules {
            batch_groups: BATCH_GROUPS,
            async_level: ASYNC_LEVEL,
            steps: self.steps,
            lease_ms: LEASE_MS,
        }
    }
}

/// What came of a run.
#[derive(Debug)]
pub struct Outcome {
    pub seed: u64,
    pub violations: Vec<String>,
    pub trace: [u8; 32],
    pub virtual_seconds: f64,
    pub wall_seconds: f64,
    pub counters: MemoryCounters,
    pub fates: BTreeMap<Fate, u64>,
    /// Bad groups that were admitted; of these, audited; of these, rejected.
    pub lies: [usize; 3],
}

impl Outcome {
    /// The run in one line.
    pub fn line(&self) -> String {
        let fates: Vec<String> = self
            .fates
            .iter()
            .map(|(fate, count)| format!("{fate} {count}"))
            .collect();
        let [told, audited, caught] = self.lies;
        let counters = self.counters;
        format!(
            "seed {:>3}: {:>5.1} s of {:>6.1} virtual, {}; lies {told}, audited {audited}, rejected {caught}; \
             asked {}, lost {}, doubled {}; trace {}",
            self.seed,
            self.wall_seconds,
            self.virtual_seconds,
            fates.join(", "),
            counters.asked,
            counters.lost,
            counters.doubled,
            ContentHash(self.trace).short(),
        )
    }
}

/// Plays a run on a runtime of its own, under virtual time.
pub fn play(play: Play) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    // A run writes some thousand small files: in memory where there is such a folder.
    let memory = Path::new("/dev/shm");
    let dir = match memory.is_dir() {
        true => tempfile::tempdir_in(memory).unwrap(),
        false => tempfile::tempdir().unwrap(),
    };
    // Models are not shared between threads, so the shells of a run stay on one.
    let local = tokio::task::LocalSet::new();
    runtime.block_on(
        local.run_until(async { Stage::new(play, dir.path().to_owned()).perform().await }),
    )
}

#[derive(Clone)]
struct Stage {
    play: Play,
    run: RunId,
    bus: MemoryBus,
    clock: SharedClock,
    ledger: Ledger,
    shelf: Shelf,
    dir: PathBuf,
}

/// A process of the run.
struct Life {
    user: String,
    task: JoinHandle<()>,
    shutdown: CancellationToken,
}

impl Life {
    /// Ends it as SIGKILL does.
    fn end(self, bus: &MemoryBus) {
        bus.disconnect(&self.user);
        self.task.abort();
        self.shutdown.cancel();
    }
}

#[derive(Debug, Clone, Copy)]
enum Event {
    Start(Part),
    Die(Part),
    /// A worker dies: the newest lessee, or this one.
    WorkerDies {
        slot: usize,
        busy: bool,
    },
    CutOff(Part),
    Heal(Part),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Dispatch,
    Trainer,
    Critic(usize),
    Worker(usize),
}

/// Events by moment and number.
#[derive(Default)]
struct Calendar {
    events: BTreeMap<(u64, u64), Event>,
    added: u64,
}

impl Calendar {
    fn add(&mut self, at_ms: u64, event: Event) {
        self.added += 1;
        self.events.insert((at_ms, self.added), event);
    }

    fn next_due(&mut self, now_ms: u64) -> Option<Event> {
        let first = self.events.first_entry()?;
        (first.key().0 <= now_ms).then(|| first.remove())
    }

    /// Everything starts within a second or two; then members die, and come back.
    fn of(play: &Play) -> Self {
        let mut chance = dice(play.seed, "calendar", 0);
        let mut calendar = Self::default();
        calendar.add(0, Event::Start(Part::Dispatch));
        calendar.add(100, Event::Start(Part::Trainer));
        for critic in 0..CRITICS {
            calendar.add(
                chance.random_range(0..2_000),
                Event::Start(Part::Critic(critic)),
            );
        }
        for slot in 0..play.workers {
            calendar.add(
                chance.random_range(0..4_000),
                Event::Start(Part::Worker(slot)),
            );
        }
        for death in 0..(play.workers as f64 * CHURN) as usize {
            let slot = chance.random_range(0..play.workers);
            let busy = death % 4 == 0;
            calendar.add(
                chance.random_range(DEATHS),
                Event::WorkerDies { slot, busy },
            );
        }
        for (part, deaths) in [
            (Part::Dispatch, play.dispatch_deaths),
            (Part::Trainer, play.trainer_deaths),
        ] {
            for _ in 0..deaths {
                calendar.add(chance.random_range(DEATHS), Event::Die(part));
            }
        }
        for _ in 0..2 {
            let critic = Part::Critic(chance.random_range(0..CRITICS));
            calendar.add(chance.random_range(DEATHS), Event::Die(critic));
            let cut = chance.random_range(DEATHS);
            let part = Part::Critic(chance.random_range(0..CRITICS));
            calendar.add(cut, Event::CutOff(part));
            calendar.add(cut + 5_000, Event::Heal(part));
        }
        calendar
    }
}

impl Stage {
    fn new(play: Play, dir: PathBuf) -> Self {
        let run: RunId = format!("simulation-{}", play.seed).parse().unwrap();
        let bounds = QueueBounds::default();
        let config = MemoryConfig {
            seed: play.seed,
            faults: play.faults,
            bounds,
        };
        Self {
            bus: MemoryBus::new(&run, config),
            clock: Arc::new(TimerClock::starting_at(UnixMillis(1_800_000_000_000))),
            ledger: Ledger::new(run.clone(), play.rules()),
            shelf: Shelf::default(),
            play,
            run,
            dir,
        }
    }

    async fn perform(self) -> Outcome {
        let (began, wall) = (Instant::now(), std::time::Instant::now());
        let mut calendar = Calendar::of(&self.play);
        let mut players = Players::new(&self);
        let monitor = self.bus.connect("monitor", Role::Dispatch);
        let mut depths: BTreeMap<&'static str, u64> = BTreeMap::new();
        let mut last_words: Option<Instant> = None;
        let mut sampled = 0;
        loop {
            let now_ms = began.elapsed().as_millis() as u64;
            while let Some(event) = calendar.next_due(now_ms) {
                players.on_event(event, now_ms, &mut calendar);
            }
            if now_ms >= sampled + 1_000 {
                sampled = now_ms;
                for queue in Queue::ALL {
                    if let Ok(state) = monitor.queue_state(queue).await {
                        let deepest = depths.entry(queue.token()).or_default();
                        *deepest = state.messages.max(*deepest);
                    }
                }
            }
            let (finished, all_decided) = {
                let book = self.ledger.book();
                (book.finished, book.decided.len() as u64 >= book.issued)
            };
            if finished {
                let since = *last_words.get_or_insert_with(Instant::now);
                if (all_decided && since.elapsed() > Duration::from_secs(1))
                    || since.elapsed() > LAST_WORDS
                {
                    break;
                }
            }
            if began.elapsed() > LIMIT {
                let newest = self.ledger.book().newest;
                self.ledger.violation(format!(
                    "stuck: at version {newest} after {} s",
                    LIMIT.as_secs()
                ));
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let virtual_seconds = began.elapsed().as_secs_f64();
        self.bus.set_faults(NetworkFaults::default());
        let record = Record {
            fates: self.read::<FateRecord>(&monitor, Log::Fates).await,
            batches: self.read::<Batch>(&monitor, Log::Batches).await,
            counters: self.bus.counters(),
            depths,
        };
        let book = self.ledger.book();
        let mut fates: BTreeMap<Fate, u64> = BTreeMap::new();
        for fate in &record.fates {
            *fates.entry(fate.fate).or_default() += 1;
        }
        let bad: Vec<_> = book
            .admitted
            .values()
            .filter(|group| group.quality == Quality::Bad)
            .collect();
        let rejected: BTreeSet<TicketId> = record
            .fates
            .iter()
            .filter(|fate| fate.fate == Fate::Rejected)
            .map(|fate| fate.ticket)
            .collect();
        let audited = bad.iter().filter(|group| group.audit);
        let caught = audited
            .clone()
            .filter(|group| rejected.contains(&group.ticket))
            .count();
        Outcome {
            seed: self.play.seed,
            violations: check(&book, &record),
            trace: self.bus.trace_hash(),
            virtual_seconds,
            wall_seconds: wall.elapsed().as_secs_f64(),
            counters: record.counters,
            fates,
            lies: [bad.len(), audited.count(), caught],
        }
    }

    async fn read<T: Statement>(&self, monitor: &SharedBus, log: Log) -> Vec<T> {
        let mut records = Vec::new();
        let mut after = 0;
        loop {
            let chunk = monitor.read(log, after, 1_000).await.unwrap();
            let Some(last) = chunk.last() else {
                return records;
            };
            after = last.sequence;
            let bodies = chunk
                .into_iter()
                .map(|record| open::<T>(record.payload, &self.run).unwrap().body);
            records.extend(bodies);
        }
    }

    fn client(&self, player: &Player, role: Role) -> DispatchClient {
        let mut bus = self.bus.connect(&player.user, role);
        if role.is_lab() {
            bus = Arc::new(Watched::new(bus, self.ledger.clone()));
        }
        let learner = cast().trainer.identity.peer_id();
        DispatchClient::new(bus, player.identity.clone(), self.run.clone(), learner)
    }

    fn chance(&self, purpose: &str, player: &Player, life: u64) -> StdRng {
        dice(self.play.seed, purpose, player.number as u64 * 1_000 + life)
    }

    fn reach(&self, purpose: &str, player: &Player, life: u64) -> Arc<Reach> {
        let chance = Mutex::new(self.chance(purpose, player, life));
        Arc::new(Reach {
            shelf: self.shelf.clone(),
            chance,
        })
    }

    /// Starts dispatch again whenever it ends, as its supervisor does.
    async fn dispatch(self, shutdown: CancellationToken) {
        loop {
            let done = self.dispatch_once(&shutdown).await;
            match done {
                Ok(()) => return,
                Err(DispatchError::Bus(error)) if error.is_transient() => {}
                Err(error) => self.ledger.violation(format!("dispatch ended: {error}")),
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }

    async fn dispatch_once(&self, shutdown: &CancellationToken) -> Result<(), DispatchError> {
        let client = self.client(&cast().dispatch, Role::Dispatch);
        let parts = DispatchParts {
            bus: client.bus().clone(),
            identity: cast().dispatch.identity.clone(),
            run: self.run.clone(),
            learner: cast().trainer.identity.peer_id(),
            roster: cast().roster.clone(),
            prompts: Arc::new(Prompts),
            clock: self.clock.clone(),
            settings: DispatchSettings {
                batch_groups: BATCH_GROUPS,
                steps: self.play.steps,
                ticket_ms: TICKET_MS,
                lease_ms: LEASE_MS,
                audit: AuditConfig {
                    share_min: 0.2,
                    trust_after: 2,
                    groups_after_failure: 50,
                },
                critique: CritiqueConfig {
                    verdicts: self.play.verdicts,
                    critics_max: 5,
                    lease_ms: 5_000,
                },
                conduct: ConductConfig::default(),
            },
            secret: ContentHash::of(&self.play.seed.to_le_bytes()).0,
        };
        let service = DispatchService::start(parts).await?;
        service.run(shutdown.clone()).await
    }

    /// Starts the trainer again whenever it ends, as its supervisor does.
    async fn trainer(self, shutdown: CancellationToken) {
        loop {
            let done = self.trainer_once(&shutdown).await;
            match done {
                Ok(()) => return,
                Err(TrainerError::Bus(error)) if error.is_transient() => {}
                Err(error) => self.ledger.violation(format!("the trainer ended: {error}")),
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }

    async fn trainer_once(&self, shutdown: &CancellationToken) -> Result<(), TrainerError> {
        let parts = TrainerParts {
            client: self.client(&cast().trainer, Role::Trainer),
            roster: cast().roster.clone(),
            dir: self.dir.clone(),
            stepper: Box::new(TableStepper::new(self.play.seed)),
            outlet: Arc::new(self.shelf.clone()),
            descriptor: descriptor(),
            files: Vec::new(),
            settings: TrainerSettings {
                batch_groups: BATCH_GROUPS as usize,
                steps: self.play.steps,
                checkpoint_every: 20,
                advantage: AdvantageConfig::default(),
                broadcast: BroadcastConfig::default(),
            },
        };
        let trainer = Trainer::start(parts).await?;
        trainer.run(shutdown.clone()).await
    }

    async fn critic(self, player: &'static Player, life: u64, shutdown: CancellationToken) {
        let tracker = TaskTracker::new();
        let client = self.client(player, Role::Critic);
        let source = self.reach("critic-shelf", player, life);
        let judged = async {
            let follower = Follower::start(
                client.clone(),
                source,
                Follow::Every,
                &tracker,
                shutdown.child_token(),
            );
            let scorer = TableScorer {
                chance: self.chance("critic", player, life),
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
            self.ledger
                .violation(format!("critic {} ended: {error}", player.number));
        }
    }

    async fn worker(self, player: &'static Player, life: u64, shutdown: CancellationToken) {
        let tracker = TaskTracker::new();
        let client = self.client(player, Role::Worker);
        let source = self.reach("worker-shelf", player, life);
        let (chance, ledger) = (self.chance("worker", player, life), self.ledger.clone());
        let answerer: Box<dyn Answerer> = match Cast::lie(player.number) {
            Some(lie) => in_turn(LyingAnswerer {
                lie,
                chance,
                ledger,
                roots: Vec::new(),
                earlier: None,
            }),
            None => in_turn(TableAnswerer { chance, ledger }),
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
            self.ledger
                .violation(format!("worker {} ended: {error}", player.number));
        }
    }
}

/// Who is alive, and who plays which worker.
struct Players<'a> {
    stage: &'a Stage,
    lives: BTreeMap<Part, Life>,
    /// The player of each worker's place: another one after some deaths.
    seats: Vec<usize>,
    spare: usize,
    started: u64,
    chance: StdRng,
}

impl<'a> Players<'a> {
    fn new(stage: &'a Stage) -> Self {
        Self {
            stage,
            lives: BTreeMap::new(),
            seats: (0..stage.play.workers).collect(),
            spare: 0,
            started: 0,
            chance: dice(stage.play.seed, "players", 0),
        }
    }

    fn on_event(&mut self, event: Event, now_ms: u64, calendar: &mut Calendar) {
        match event {
            Event::Start(part) => self.start(part),
            Event::Die(part) => self.die(part, now_ms, calendar),
            Event::WorkerDies { slot, busy } => {
                let slot = if busy {
                    self.newest_lessee().unwrap_or(slot)
                } else {
                    slot
                };
                self.die(Part::Worker(slot), now_ms, calendar);
            }
            Event::CutOff(part) => self.stage.bus.cut_off(&self.player(part).user),
            Event::Heal(part) => self.stage.bus.heal(&self.player(part).user),
        }
    }

    fn player(&self, part: Part) -> &'static Player {
        match part {
            Part::Dispatch => &cast().dispatch,
            Part::Trainer => &cast().trainer,
            Part::Critic(number) => &cast().critics[number],
            Part::Worker(slot) => &cast().workers[self.seats[slot]],
        }
    }

    fn newest_lessee(&self) -> Option<usize> {
        let newest = *self.stage.ledger.book().lessees.last()?;
        self.seats
            .iter()
            .position(|player| cast().workers[*player].identity.peer_id() == newest)
    }

    fn start(&mut self, part: Part) {
        let (stage, player) = (self.stage.clone(), self.player(part));
        let shutdown = CancellationToken::new();
        self.started += 1;
        let (life, token) = (self.started, shutdown.clone());
        let task = match part {
            Part::Dispatch => tokio::task::spawn_local(stage.dispatch(token)),
            Part::Trainer => tokio::task::spawn_local(stage.trainer(token)),
            Part::Critic(_) => tokio::task::spawn_local(stage.critic(player, life, token)),
            Part::Worker(_) => tokio::task::spawn_local(stage.worker(player, life, token)),
        };
        let user = player.user.clone();
        self.lives.insert(
            part,
            Life {
                user,
                task,
                shutdown,
            },
        );
    }

    /// Ends a process and has it come back; half of the workers come back as somebody else.
    fn die(&mut self, part: Part, now_ms: u64, calendar: &mut Calendar) {
        let Some(life) = self.lives.remove(&part) else {
            return;
        };
        life.end(&self.stage.bus);
        if let Part::Worker(slot) = part
            && self.chance.random::<bool>()
            && self.spare < SPARES
        {
            self.seats[slot] = WORKERS_MAX + self.spare;
            self.spare += 1;
        }
        calendar.add(
            now_ms + self.chance.random_range(500..6_000),
            Event::Start(part),
        );
    }
}

/// Prompts of three tokens, a few hundred of them.
struct Prompts;

impl PromptSource for Prompts {
    fn prompt(&self, ticket: TicketId) -> Prompt {
        let item = ticket.0 % 500;
        let digit = |place: u64| (item / place % 8) as u32 + 1;
        Prompt {
            item,
            tokens: vec![digit(1), digit(8), digit(64)],
        }
    }

    fn reference(&self, item: u64) -> Option<Reference> {
        Some(Reference {
            prompt: item.to_string(),
            gold: "1".to_owned(),
        })
    }
}

/// About half of the answers begin with a letter that is paid for, so that most groups have a signal.
const REWARD: &str = r#"
[task]
type = "running_sums"

[[reward]]
type = "regex"
pattern = "^[b-h]"
"#;

fn descriptor() -> Descriptor {
    let hash = |text: &str| ContentHash::of(text.as_bytes());
    Descriptor {
        architecture: hash("a table"),
        tokenizer: hash("letters"),
        chat_template: None,
        task: hash("a few hundred prompts"),
        rewards: RewardConfig::from_toml(REWARD)
            .unwrap()
            .canonical_json()
            .unwrap(),
        sampling: SamplingRules {
            temperature: 1.0,
            tokens_max: TOKENS_MAX,
            stop_ids: vec![STOP],
            stop_strings: Vec::new(),
        },
        group_size: GROUP_SIZE,
        async_level: ASYNC_LEVEL,
        same_class: Thresholds::SAME_CLASS,
        cross_class: Thresholds::CROSS_CLASS,
        vocabulary: VOCABULARY,
        classes: vec![NumericClass::F32Cpu],
        learner: cast().trainer.identity.peer_id(),
        dispatch: cast().dispatch.identity.peer_id(),
        from_step: PolicyVersion(0),
        labels: BTreeMap::new(),
    }
}

fn in_turn(model: impl BatchAnswerer + 'static) -> Box<dyn Answerer> {
    Box::new(InTurn::new(model, 2 * GROUP_SIZE))
}
