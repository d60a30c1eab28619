//! Answers leases with the policy: one engine on its own thread decodes the rollouts of all leases together and takes new
//! leases and new weights between two steps.
//!
//! When the first weights come, the thread measures its speed and chooses its rows ([`crate::capacity`]). A reserve of
//! leases waits in the engine, so that a free slot is used in the same step.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::{mpsc, oneshot};

use muster_broadcaster::follower::Held;
use muster_policy::{Config, Device, EngineConfig, KernelSet, Policy, Threads};
use muster_protocol::id::LeaseId;
use muster_protocol::message::group::Rollout;
use muster_protocol::message::lease::Lease;

use crate::answerer::{AnswerError, AnsweredLease, Answerer};
use runner::{Command, Runner};
pub use task::Task;

mod runner;
mod task;

/// Most commands, and most answers, between worker and engine. Each belongs to a lease or a version, and a worker holds
/// fewer of those.
const UNDERWAY_MAX: usize = 1_024;

/// One rollout waits in the engine for every `RESERVE` rows that decode.
const RESERVE: u32 = 4;

/// The policy as an [`Answerer`].
#[derive(Debug)]
pub struct PolicyAnswerer {
    config: Config,
    kernels: KernelSet,
    device: Device,
    engine: EngineConfig,
    task: Task,
    thread: Option<Thread>,
    /// Number of rollouts of each lease that is not answered yet.
    underway: BTreeMap<LeaseId, u32>,
}

/// A handle to the engine's thread. Dropping it ends the thread after the current step.
#[derive(Debug)]
struct Thread {
    commands: mpsc::Sender<Command>,
    answers: mpsc::Receiver<Result<Vec<AnsweredLease>, AnswerError>>,
    /// Rows that decode together.
    rows: u32,
}

impl PolicyAnswerer {
    /// An answerer for models of this shape, without weights yet. `engine.slots` bounds the rows that it takes.
    pub fn new(
        config: Config,
        kernels: KernelSet,
        device: Device,
        engine: EngineConfig,
        task: Task,
    ) -> Self {
        Self {
            config,
            kernels,
            device,
            engine,
            task,
            thread: None,
            underway: BTreeMap::new(),
        }
    }

    /// Answers these leases and takes no others meanwhile.
    ///
    /// # Errors
    /// As [`Answerer::take`] and [`Answerer::answered`].
    pub async fn answer(&mut self, leases: &[Lease]) -> Result<Vec<Vec<Rollout>>, AnswerError> {
        self.take(leases.to_vec()).await?;
        let mut answers = BTreeMap::new();
        while answers.len() < leases.len() {
            answers.extend(self.answered().await?);
        }
        let of_lease = |lease: &Lease| answers.remove(&lease.id).unwrap_or_default();
        Ok(leases.iter().map(of_lease).collect())
    }

    async fn send(&mut self, command: Command) -> Result<(), AnswerError> {
        let no_weights = || AnswerError::new("no weights were adopted yet");
        let thread = self.thread.as_ref().ok_or_else(no_weights)?;
        thread.commands.send(command).await.map_err(|_| ended())
    }

    async fn start(&mut self, policy: Policy, version: u64) -> Result<(), AnswerError> {
        let (commands, inbox) = mpsc::channel(UNDERWAY_MAX);
        let (outbox, answers) = mpsc::channel(UNDERWAY_MAX);
        let (started, measured) = oneshot::channel();
        let (engine, task) = (self.engine.clone(), self.task.clone());
        let run = move || {
            let (runner, told) = match Runner::start(policy, version, &engine, task) {
                Ok((runner, rows)) => (Some(runner), Ok(rows)),
                Err(error) => (None, Err(error)),
            };
            // If the receiver is gone, the answerer was dropped and the inbox is closed too.
            if started.send(told).is_ok()
                && let Some(runner) = runner
            {
                runner.run(inbox, &outbox);
            }
        };
        let thread = std::thread::Builder::new().name("engine".to_owned());
        thread.spawn(run).map_err(AnswerError::new)?;
        let rows = measured.await.map_err(|_| ended())??;
        self.thread = Some(Thread {
            commands,
            answers,
            rows,
        });
        Ok(())
    }
}

fn ended() -> AnswerError {
    AnswerError::new("the engine has ended; start the worker again")
}

#[async_trait]
impl Answerer for PolicyAnswerer {
    async fn adopt(&mut self, held: &Arc<Held>) -> Result<(), AnswerError> {
        let (config, kernels) = (self.config.clone(), self.kernels);
        let (device, image) = (self.device.clone(), held.image.clone());
        let threads = Threads::one();
        let built = tokio::task::spawn_blocking(move || {
            Policy::for_inference(&config, &image, kernels, &device, &threads)
                .map_err(AnswerError::new)
        });
        let policy = built.await.map_err(AnswerError::new)??;
        let version = held.version.body.version.0;
        match &self.thread {
            None => self.start(policy, version).await,
            Some(_) => self.send(Command::Adopt(policy, version)).await,
        }
    }

    fn adopts(&self) -> bool {
        true // each lease's rule says whether its answer goes on under the new weights
    }

    fn room(&self) -> u32 {
        let Some(Thread { rows, .. }) = self.thread else {
            return self.engine.slots.get() as u32;
        };
        let underway: u32 = self.underway.values().sum();
        let room = (rows + rows.div_ceil(RESERVE)).saturating_sub(underway);
        // Single leases would cost more than their answers: the worker asks again once the reserve is used up.
        if room < rows.div_ceil(RESERVE) {
            0
        } else {
            room
        }
    }

    async fn take(&mut self, leases: Vec<Lease>) -> Result<(), AnswerError> {
        for lease in &leases {
            self.underway.insert(lease.id, lease.rollouts.count);
        }
        self.send(Command::Take(leases)).await
    }

    async fn answered(&mut self) -> Result<Vec<AnsweredLease>, AnswerError> {
        let Some(thread) = &mut self.thread else {
            return std::future::pending().await;
        };
        let answered = thread.answers.recv().await.ok_or_else(ended)??;
        for (lease, _) in &answered {
            self.underway.remove(lease);
        }
        Ok(answered)
    }
}
