//! What dispatch remembers of each worker and critic: counters, not judgements of character. A worker that drops leases
//! or fails audits is paused; one that keeps failing is quarantined for the run.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use muster_protocol::id::{LeaseId, PeerId, UnixMillis};

use crate::audit::AuditRecord;

/// When a worker or critic is paused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ConductConfig {
    /// Leases that a worker may hold at once.
    pub leases_max: u32,
    /// Leases dropped in a row after which a worker is paused.
    pub dropped_max: u32,
    /// First pause in milliseconds; each further one is twice as long.
    pub pause_ms: u64,
    /// Failed audits after which a worker gets no more leases in this run.
    pub failures_max: u32,
    /// Verdicts against the others' after which a critic gets no more groups in this run.
    pub dissents_max: u32,
}

impl Default for ConductConfig {
    fn default() -> Self {
        Self {
            // Rows of a group of eight each, and the reserve of a worker that decodes 64.
            leases_max: 16,
            dropped_max: 3,
            pause_ms: 10_000,
            failures_max: 3,
            dissents_max: 3,
        }
    }
}

/// Longest pause: ten minutes.
const PAUSE_MS_MAX: u64 = 600_000;

/// A worker's record.
#[derive(Debug, Clone, Default)]
pub struct WorkerRecord {
    /// Leases given so far: the submission number of the next one.
    pub leases_given: u64,
    /// Leases held now.
    pub held: Vec<LeaseId>,
    /// Leases dropped in a row.
    pub dropped: u32,
    /// Pauses given so far.
    pub pauses: u32,
    /// No lease before this moment.
    pub paused_until: UnixMillis,
    /// What audits found.
    pub audits: AuditRecord,
}

/// A critic's record.
#[derive(Debug, Clone, Copy, Default)]
pub struct CriticRecord {
    /// Verdicts given.
    pub verdicts: u64,
    /// Verdicts that the others contradicted.
    pub dissents: u32,
}

/// Everybody's records.
#[derive(Debug, Default)]
pub struct Conduct {
    config: ConductConfig,
    workers: BTreeMap<PeerId, WorkerRecord>,
    critics: BTreeMap<PeerId, CriticRecord>,
}

/// Why a worker gets no lease now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pause {
    /// It holds as many as it may.
    Busy,
    /// Until this moment.
    Until(UnixMillis),
    /// For the rest of the run.
    Quarantined,
}

impl Conduct {
    /// Empty records.
    pub fn new(config: ConductConfig) -> Self {
        Self {
            config,
            ..Self::default()
        }
    }

    /// The worker's record.
    pub fn worker(&mut self, worker: PeerId) -> &mut WorkerRecord {
        self.workers.entry(worker).or_default()
    }

    /// What audits found about a worker so far.
    pub fn audit_record(&self, worker: &PeerId) -> AuditRecord {
        self.workers
            .get(worker)
            .map(|record| record.audits)
            .unwrap_or_default()
    }

    /// What keeps the worker from a lease, if anything.
    pub fn pause(&self, worker: &PeerId, now: UnixMillis) -> Option<Pause> {
        let record = self.workers.get(worker)?;
        if record.audits.failed >= self.config.failures_max {
            return Some(Pause::Quarantined);
        }
        if record.paused_until > now {
            return Some(Pause::Until(record.paused_until));
        }
        (record.held.len() >= self.config.leases_max as usize).then_some(Pause::Busy)
    }

    /// A lease was given; returns its submission number.
    pub fn lease_given(&mut self, worker: PeerId, lease: LeaseId) -> u64 {
        let record = self.worker(worker);
        record.held.push(lease);
        let number = record.leases_given;
        record.leases_given += 1;
        number
    }

    /// A lease was answered.
    pub fn lease_answered(&mut self, worker: PeerId, lease: LeaseId) {
        let record = self.worker(worker);
        record.held.retain(|held| *held != lease);
        record.dropped = 0;
    }

    /// A lease ended without an answer: dropping bad draws is the one freedom that prescribed sampling leaves, so it is
    /// counted.
    pub fn lease_dropped(&mut self, worker: PeerId, lease: LeaseId, now: UnixMillis) {
        let ConductConfig {
            dropped_max,
            pause_ms,
            ..
        } = self.config;
        let record = self.worker(worker);
        record.held.retain(|held| *held != lease);
        record.dropped += 1;
        if record.dropped >= dropped_max {
            let factor = 1u64 << record.pauses.min(16);
            record.paused_until = now.plus(pause_ms.saturating_mul(factor).min(PAUSE_MS_MAX));
            record.pauses += 1;
            record.dropped = 0;
        }
    }

    /// Whether the critic still gets groups.
    pub fn is_trusted(&self, critic: &PeerId) -> bool {
        self.critics
            .get(critic)
            .is_none_or(|record| record.dissents < self.config.dissents_max)
    }

    /// A verdict was settled by the others, with or against this critic.
    pub fn verdict_settled(&mut self, critic: PeerId, agreed: bool) {
        let record = self.critics.entry(critic).or_default();
        record.verdicts += 1;
        if !agreed {
            record.dissents += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORKER: PeerId = PeerId([1; 32]);

    fn drop_leases(conduct: &mut Conduct, count: u8, now: u64) {
        for n in 0..count {
            let lease = LeaseId([n; 16]);
            conduct.lease_given(WORKER, lease);
            conduct.lease_dropped(WORKER, lease, UnixMillis(now));
        }
    }

    #[test]
    fn dropped_leases_pause_a_worker_and_each_pause_is_longer() {
        let mut conduct = Conduct::new(ConductConfig::default());
        drop_leases(&mut conduct, 3, 0);
        assert_eq!(
            conduct.pause(&WORKER, UnixMillis(0)),
            Some(Pause::Until(UnixMillis(10_000)))
        );
        assert_eq!(conduct.pause(&WORKER, UnixMillis(10_000)), None);
        drop_leases(&mut conduct, 3, 10_000);
        assert_eq!(
            conduct.pause(&WORKER, UnixMillis(10_000)),
            Some(Pause::Until(UnixMillis(30_000)))
        );
    }

    #[test]
    fn failed_audits_end_in_quarantine() {
        let mut conduct = Conduct::new(ConductConfig::default());
        for _ in 0..3 {
            conduct
                .worker(WORKER)
                .audits
                .record(false, &Default::default());
        }
        assert_eq!(
            conduct.pause(&WORKER, UnixMillis(0)),
            Some(Pause::Quarantined)
        );
    }

    #[test]
    fn a_critic_that_keeps_dissenting_gets_no_more_groups() {
        let mut conduct = Conduct::new(ConductConfig::default());
        for _ in 0..3 {
            assert!(conduct.is_trusted(&WORKER));
            conduct.verdict_settled(WORKER, false);
        }
        assert!(!conduct.is_trusted(&WORKER));
    }

    #[test]
    fn submission_numbers_count_up() {
        let mut conduct = Conduct::new(ConductConfig::default());
        assert_eq!(conduct.lease_given(WORKER, LeaseId([0; 16])), 0);
        assert_eq!(conduct.lease_given(WORKER, LeaseId([1; 16])), 1);
    }
}
