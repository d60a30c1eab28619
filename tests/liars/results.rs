//! The progress of a run and its results.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use tempfile::TempDir;

use muster_protocol::id::PeerId;
use muster_protocol::message::fate::{Fate, FateRecord};
use muster_protocol::record::{Line, RolloutLine, StepMetrics, read_all};

use super::critic::CriticCounts;
use super::offered_weights::OfferedWeights;
use super::start::Start;
use super::submissions::Submissions;

/// The progress of a run.
pub struct Progress {
    /// Tickets issued.
    pub issued: u64,
    /// Steps closed.
    pub steps: u64,
    /// Fates of tickets and groups, in order.
    pub fates: Vec<FateRecord>,
}

impl Progress {
    /// Tickets that have ended.
    pub fn ended(&self) -> u64 {
        self.fates
            .iter()
            .filter(|record| record.fate != Fate::Duplicate)
            .count() as u64
    }

    /// Number of groups of `worker` with this fate.
    pub fn count(&self, worker: PeerId, fate: Fate) -> usize {
        let of = |record: &&FateRecord| record.worker == Some(worker) && record.fate == fate;
        self.fates.iter().filter(of).count()
    }
}

/// What a run left behind: its fates, submissions and directory.
pub struct FinishedRun {
    pub progress: Progress,
    pub names: BTreeMap<PeerId, String>,
    pub submissions: Submissions,
    pub offered: Arc<OfferedWeights>,
    pub critic_counts: CriticCounts,
    pub start: Arc<Start>,
    pub dir: TempDir,
    pub seconds: f64,
}

impl FinishedRun {
    /// The lines of metrics.jsonl.
    pub fn steps(&self) -> Vec<StepMetrics> {
        read_all(&self.dir.path().join(StepMetrics::FILE)).unwrap()
    }

    /// Every trained rollout, in the order of steps.
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
