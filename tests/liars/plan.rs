//! The plan of a swarm: its configuration, its members and how they lie.

use std::sync::Arc;
use std::time::Duration;

use super::config::RunConfig;
use super::start::Start;
use super::worker_model::Lie;

/// Time limit of a wait. Each takes a few seconds on a quiet machine.
const TIMEOUT: Duration = Duration::from_secs(120);

/// The bus of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BusKind {
    Memory,
    Nats,
}

/// How the members get weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightTransfer {
    /// Peer to peer over loopback.
    BetweenPeers,
    /// From the trainer's memory.
    FromTrainer,
}

/// How a worker behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WorkerKind {
    Honest,
    Liar(Lie),
    /// Computes with int8 weights; honest without a lie.
    Int8(Option<Lie>),
    /// Enrolled only: the test sends its messages.
    Absent,
}

/// How a critic behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CriticKind {
    Honest,
    Inflates,
    Permutes,
}

/// A run and its members.
#[derive(Clone)]
pub struct Plan {
    pub config: RunConfig,
    pub start: Arc<Start>,
    pub bus: BusKind,
    pub weights: WeightTransfer,
    pub workers: Vec<WorkerKind>,
    pub critics: Vec<CriticKind>,
    pub seeders: usize,
    /// Time limit of each wait of the test.
    pub timeout: Duration,
}

impl Plan {
    /// Two honest workers, one honest critic, all in memory.
    pub fn new(config: RunConfig, start: Arc<Start>) -> Self {
        Self {
            config,
            start,
            bus: BusKind::Memory,
            weights: WeightTransfer::FromTrainer,
            workers: vec![WorkerKind::Honest; 2],
            critics: vec![CriticKind::Honest],
            seeders: 0,
            timeout: TIMEOUT,
        }
    }
}
