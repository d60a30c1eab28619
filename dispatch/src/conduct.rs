//! What dispatch remembers of each worker and critic. A worker that drops leases is paused. A worker whose groups keep being
//! rejected, and a critic whose verdicts keep being wrong, is quarantined for the rest of the run.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use muster_protocol::id::{LeaseId, PeerId, TicketId, UnixMillis};
use muster_protocol::message::control::{FaultKind, MemberFault};

use crate::audit::{AuditConfig, AuditRecord};

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
    /// Rejected groups after which a worker gets no more leases in this run.
    pub failures_max: u32,
    /// Verdicts that the others contradict, or that do not fit their group, after which a critic gets no more groups in
    /// this run.
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
pub(crate) struct WorkerRecord {
    /// Leases given so far: the submission number of the next one.
    pub(crate) leases_given: u64,
    /// Leases held now.
    pub(crate) held: Vec<LeaseId>,
    /// Leases dropped in a row.
    pub(crate) dropped: u32,
    /// Pauses given so far.
    pub(crate) pauses: u32,
    /// No lease before this moment.
    pub(crate) paused_until: UnixMillis,
    pub(crate) audits: AuditRecord,
}

/// The records of all members. Faults are durable: dispatch appends each to the control log and restores them from there.
/// Pauses and passed audits live as long as the process.
#[derive(Debug, Default)]
pub(crate) struct Conduct {
    config: ConductConfig,
    workers: BTreeMap<PeerId, WorkerRecord>,
    /// Faults counted so far, at most one for each member and ticket. A member that reached its limit gets no more tickets, so
    /// the set is bounded by members times the limits, and what they held then.
    faults: BTreeSet<(PeerId, TicketId)>,
    /// Faults of each critic.
    critic_faults: BTreeMap<PeerId, u32>,
}

/// Why a worker gets no lease now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pause {
    /// It holds as many as it may.
    Busy,
    /// Until this moment.
    Until(UnixMillis),
    /// For the rest of the run.
    Quarantined,
}

impl Conduct {
    pub(crate) fn new(config: ConductConfig) -> Self {
        Self {
            config,
            ..Self::default()
        }
    }

    /// The worker's record.
    pub(crate) fn worker(&mut self, worker: PeerId) -> &mut WorkerRecord {
        self.workers.entry(worker).or_default()
    }

    /// What audits found about a worker so far.
    pub(crate) fn audit_record(&self, worker: &PeerId) -> AuditRecord {
        self.workers
            .get(worker)
            .map(|record| record.audits)
            .unwrap_or_default()
    }

    /// What keeps the worker from a lease, if anything.
    pub(crate) fn pause(&self, worker: &PeerId, now: UnixMillis) -> Option<Pause> {
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
    pub(crate) fn lease_given(&mut self, worker: PeerId, lease: LeaseId) -> u64 {
        let record = self.worker(worker);
        record.held.push(lease);
        let number = record.leases_given;
        record.leases_given += 1;
        number
    }

    /// A lease was answered.
    pub(crate) fn lease_answered(&mut self, worker: PeerId, lease: LeaseId) {
        let record = self.worker(worker);
        record.held.retain(|held| *held != lease);
        record.dropped = 0;
    }

    /// A lease ended through no fault of its worker.
    pub(crate) fn lease_released(&mut self, worker: PeerId, lease: LeaseId) {
        self.worker(worker).held.retain(|held| *held != lease);
    }

    /// A lease ended without an answer: dropping bad draws is the one freedom that prescribed sampling leaves, so it is
    /// counted.
    pub(crate) fn lease_dropped(&mut self, worker: PeerId, lease: LeaseId, now: UnixMillis) {
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

    /// Counts a fault; returns whether it is the member's first for this ticket. Repeating a fault changes nothing, so that
    /// the control log can be replayed over decisions that were made again.
    pub(crate) fn count(&mut self, fault: &MemberFault, audit: &AuditConfig) -> bool {
        if !self.faults.insert((fault.member, fault.ticket)) {
            return false;
        }
        match fault.kind {
            FaultKind::RejectedGroup => self.worker(fault.member).audits.record(false, audit),
            FaultKind::Dissent | FaultKind::MisfitVerdict => {
                *self.critic_faults.entry(fault.member).or_default() += 1;
            }
        }
        true
    }

    /// Whether the critic still gets groups.
    pub(crate) fn is_trusted(&self, critic: &PeerId) -> bool {
        self.critic_faults
            .get(critic)
            .is_none_or(|faults| *faults < self.config.dissents_max)
    }

    /// Leases that workers hold now.
    pub(crate) fn leases_held(&self) -> usize {
        self.workers.values().map(|record| record.held.len()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(ticket: u64, kind: FaultKind) -> MemberFault {
        MemberFault {
            member: WORKER,
            ticket: TicketId(ticket),
            kind,
        }
    }

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
    fn rejected_groups_end_in_quarantine_and_each_counts_once() {
        let mut conduct = Conduct::new(ConductConfig::default());
        for ticket in [1, 1, 2, 2, 1] {
            conduct.count(
                &fault(ticket, FaultKind::RejectedGroup),
                &Default::default(),
            );
        }
        assert_eq!(conduct.pause(&WORKER, UnixMillis(0)), None);
        assert!(conduct.count(&fault(3, FaultKind::RejectedGroup), &Default::default()));
        assert_eq!(
            conduct.pause(&WORKER, UnixMillis(0)),
            Some(Pause::Quarantined)
        );
    }

    #[test]
    fn a_critic_whose_verdicts_keep_being_wrong_gets_no_more_groups() {
        let mut conduct = Conduct::new(ConductConfig::default());
        let kinds = [
            FaultKind::Dissent,
            FaultKind::MisfitVerdict,
            FaultKind::Dissent,
        ];
        for (ticket, kind) in (1..).zip(kinds) {
            assert!(conduct.is_trusted(&WORKER));
            conduct.count(&fault(ticket, kind), &Default::default());
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
