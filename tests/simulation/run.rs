//! One simulated run: its parameters, its loop over virtual time, and its report.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use tokio::time::Instant;

use muster_protocol::bus::SharedBus;
use muster_protocol::bus::memory::{MemoryCounters, NetworkFaults};
use muster_protocol::envelope::{Statement, open};
use muster_protocol::id::{ContentHash, TicketId};
use muster_protocol::message::batch::Batch;
use muster_protocol::message::fate::{Fate, FateRecord};
use muster_protocol::subject::{Log, Queue, Role};

use crate::checks::{RunRecord, check};
use crate::members::WORKERS_MAX;
use crate::observer::{Quality, Rules};
use crate::processes::Processes;
use crate::schedule::Schedule;
use crate::swarm::SimulatedSwarm;
use crate::task::{ASYNC_LEVEL, BATCH_GROUPS, LEASE_MS};

/// Virtual time after which a run that has not ended counts as stuck.
const LIMIT: Duration = Duration::from_secs(1_800);
/// Virtual time that pending decisions get after the last step is closed.
const DRAIN: Duration = Duration::from_secs(60);

/// The parameters of a simulated run.
#[derive(Debug, Clone, Copy)]
pub struct Scenario {
    pub seed: u64,
    pub workers: usize,
    pub steps: u64,
    /// Agreeing verdicts that a group needs.
    pub verdicts: u32,
    pub dispatch_deaths: u64,
    pub trainer_deaths: u64,
    pub faults: NetworkFaults,
}

impl Scenario {
    /// Seeds differ in their random numbers, in how many critics must agree, and in which lab processes die.
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

    pub fn rules(&self) -> Rules {
        Rules {
            batch_groups: BATCH_GROUPS,
            async_level: ASYNC_LEVEL,
            steps: self.steps,
            lease_ms: LEASE_MS,
        }
    }
}

/// What a run resulted in.
#[derive(Debug)]
pub struct Report {
    pub seed: u64,
    pub violations: Vec<String>,
    pub trace: [u8; 32],
    pub virtual_seconds: f64,
    pub wall_seconds: f64,
    pub counters: MemoryCounters,
    pub fates: BTreeMap<Fate, u64>,
    pub lies: Lies,
}

/// Counts of bad groups; each is part of the one before.
#[derive(Debug)]
pub struct Lies {
    pub admitted: usize,
    pub audited: usize,
    pub rejected: usize,
}

impl Report {
    /// The run in one line.
    pub fn line(&self) -> String {
        let fates: Vec<String> = self
            .fates
            .iter()
            .map(|(fate, count)| format!("{fate} {count}"))
            .collect();
        let Lies {
            admitted,
            audited,
            rejected,
        } = &self.lies;
        let counters = self.counters;
        format!(
            "seed {:>3}: {:>5.1} s of {:>6.1} virtual, {}; lies {admitted}, audited {audited}, rejected {rejected}; \
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

/// Simulates a run on a runtime of its own, under virtual time.
pub fn simulate(scenario: Scenario) -> Report {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    // A run writes some thousand small files, in memory if the system has a folder for that.
    let memory = Path::new("/dev/shm");
    let dir = match memory.is_dir() {
        true => tempfile::tempdir_in(memory).unwrap(),
        false => tempfile::tempdir().unwrap(),
    };
    // The models are not `Send`, so that a run stays on one thread.
    let local = tokio::task::LocalSet::new();
    runtime.block_on(local.run_until(async {
        SimulatedSwarm::new(scenario, dir.path().to_owned())
            .run()
            .await
    }))
}

impl SimulatedSwarm {
    async fn run(self) -> Report {
        let (began, wall) = (Instant::now(), std::time::Instant::now());
        let monitor = self.bus.connect("monitor", Role::Dispatch);
        let depths = self.run_until_finished(&monitor).await;
        let (virtual_time, wall_time) = (began.elapsed(), wall.elapsed());
        self.bus.set_faults(NetworkFaults::default());
        let record = RunRecord {
            fates: self.read::<FateRecord>(&monitor, Log::Fates).await,
            batches: self.read::<Batch>(&monitor, Log::Batches).await,
            counters: self.bus.counters(),
            depths,
        };
        self.report(&record, virtual_time, wall_time)
    }

    /// Runs the schedule until the run has finished or is stuck. Returns the most messages seen in each queue.
    async fn run_until_finished(&self, monitor: &SharedBus) -> BTreeMap<&'static str, u64> {
        let began = Instant::now();
        let mut schedule = Schedule::of(&self.scenario);
        let mut processes = Processes::new(self);
        let mut depths: BTreeMap<&'static str, u64> = BTreeMap::new();
        let mut finished_since: Option<Instant> = None;
        let mut sampled = 0;
        loop {
            let now_ms = began.elapsed().as_millis() as u64;
            while let Some(event) = schedule.next_due(now_ms) {
                processes.on_event(event, now_ms, &mut schedule);
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
                let seen = self.observer.observations();
                (seen.finished, seen.decided.len() as u64 >= seen.issued)
            };
            if finished {
                let since = *finished_since.get_or_insert_with(Instant::now);
                if (all_decided && since.elapsed() > Duration::from_secs(1))
                    || since.elapsed() > DRAIN
                {
                    return depths;
                }
            }
            if began.elapsed() > LIMIT {
                let newest = self.observer.observations().newest;
                self.observer.violation(format!(
                    "stuck: at version {newest} after {} s",
                    LIMIT.as_secs()
                ));
                return depths;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    fn report(&self, record: &RunRecord, virtual_time: Duration, wall_time: Duration) -> Report {
        let seen = self.observer.observations();
        let mut fates: BTreeMap<Fate, u64> = BTreeMap::new();
        for fate in &record.fates {
            *fates.entry(fate.fate).or_default() += 1;
        }
        let bad: Vec<_> = seen
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
        Report {
            seed: self.scenario.seed,
            violations: check(&seen, record),
            trace: self.bus.trace_hash(),
            virtual_seconds: virtual_time.as_secs_f64(),
            wall_seconds: wall_time.as_secs_f64(),
            counters: record.counters,
            fates,
            lies: Lies {
                admitted: bad.len(),
                audited: audited.count(),
                rejected: caught,
            },
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
}
