//! Which groups a forward pass re-checks: drawn after the group was signed, from a secret of dispatch, at a rate that
//! falls with a worker's record and returns to one after a failure.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use muster_protocol::id::{GroupHash, LeaseId, TicketId};

/// How often groups are audited.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AuditConfig {
    /// Share audited of a worker with a long good record. 0 turns audits off, for runs whose workers are all the lab's.
    pub share_min: f64,
    /// Good audits after which the extra share has fallen to 1/e.
    pub trust_after: u32,
    /// Groups audited without exception after a failed audit.
    pub groups_after_failure: u32,
}

impl Default for AuditConfig {
    fn default() -> Self {
        Self {
            share_min: 0.05,
            trust_after: 20,
            groups_after_failure: 50,
        }
    }
}

/// What audits have found about a worker.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct AuditRecord {
    /// Audits passed since the last failure.
    pub passed: u32,
    /// Groups still to be audited without exception.
    pub probation: u32,
    /// Audits failed in all.
    pub failed: u32,
}

impl AuditRecord {
    /// Takes in an audit's outcome.
    pub(crate) fn record(&mut self, passed: bool, config: &AuditConfig) {
        if passed {
            self.passed += 1;
            self.probation = self.probation.saturating_sub(1);
        } else {
            self.passed = 0;
            self.failed += 1;
            self.probation = config.groups_after_failure;
        }
    }
}

impl AuditConfig {
    /// Share of this worker's groups to audit: `q_min + (1 − q_min)·exp(−passed / trust_after)`, 1 on probation, 0 when
    /// audits are off.
    pub(crate) fn share(&self, record: &AuditRecord) -> f64 {
        if self.share_min <= 0.0 {
            return 0.0;
        }
        if record.probation > 0 {
            return 1.0;
        }
        let trust = f64::from(record.passed) / f64::from(self.trust_after.max(1));
        (self.share_min + (1.0 - self.share_min) * (-trust).exp()).clamp(self.share_min, 1.0)
    }
}

/// Whether a group is drawn: its hash under a secret that its author does not know falls in the share.
pub(crate) fn is_drawn(secret: &[u8; 32], group: &GroupHash, share: f64) -> bool {
    let mut hasher = blake3::Hasher::new_keyed(secret);
    hasher.update(b"muster-audit-v1\0");
    hasher.update(&group.0);
    let mut first = [0u8; 8];
    first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    let draw = (u64::from_le_bytes(first) >> 11) as f64 / (1u64 << 53) as f64;
    draw < share
}

/// What was drawn for groups that are not stored yet, by ticket and lease. A group whose way to the queue failed is
/// submitted again, and its author's record may have grown since: the first draw holds, and later submissions do not change it.
#[derive(Debug, Default)]
pub(crate) struct AuditDraws {
    drawn: BTreeMap<TicketId, BTreeMap<LeaseId, bool>>,
}

impl AuditDraws {
    /// The draw of a lease: the one made before, else `draw`.
    pub(crate) fn once(
        &mut self,
        ticket: TicketId,
        lease: LeaseId,
        draw: impl FnOnce() -> bool,
    ) -> bool {
        let drawn = self.drawn.entry(ticket).or_default();
        *drawn.entry(lease).or_insert_with(draw)
    }

    /// Forgets a ticket that has its group, or has ended.
    pub(crate) fn forget(&mut self, ticket: TicketId) {
        self.drawn.remove(&ticket);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_newcomer_is_always_audited_and_a_veteran_at_the_least_share() {
        let config = AuditConfig::default();
        assert_eq!(config.share(&AuditRecord::default()), 1.0);
        let veteran = AuditRecord {
            passed: 1_000,
            ..Default::default()
        };
        assert!((config.share(&veteran) - 0.05).abs() < 1e-9);
    }

    #[test]
    fn a_failure_brings_the_share_back_to_one() {
        let config = AuditConfig::default();
        let mut record = AuditRecord {
            passed: 1_000,
            ..Default::default()
        };
        record.record(false, &config);
        assert_eq!(config.share(&record), 1.0);
        for _ in 0..50 {
            record.record(true, &config);
        }
        assert!(config.share(&record) < 0.2);
    }

    #[test]
    fn the_drawn_share_is_the_share_asked_for() {
        let drawn = (0..10_000u32)
            .filter(|n| is_drawn(&[7; 32], &GroupHash::of(&n.to_le_bytes()), 0.25))
            .count();
        assert!((2_300..2_700).contains(&drawn), "{drawn}");
    }
}
