//! What dispatch knows and decides, pure: values, the time and randomness in, values out.

mod leasing;

use std::collections::{BTreeMap, BTreeSet};

use muster_protocol::envelope::Signed;
use muster_protocol::id::{GroupHash, PeerId, PolicyVersion, RunId, TicketId, UnixMillis};
use muster_protocol::message::ask::WaitReason;
use muster_protocol::message::control::{FaultKind, MemberFault, Phase};
use muster_protocol::message::fate::{Fate, FateRecord};
use muster_protocol::message::group::Group;
use muster_protocol::message::lease::{Lease, NumericClass};
use muster_protocol::message::ticket::Ticket;
use muster_protocol::message::verdict::{Decision, Verdict};
use muster_protocol::message::version::VersionRef;

use crate::admission::{Mismatch, check};
use crate::audit::{AuditConfig, AuditDraws, is_drawn};
use crate::conduct::{Conduct, ConductConfig};
use crate::reviews::{CritiqueConfig, PendingReview, ReviewOutcome, ReviewQueue, VerdictRefusal};
use crate::tickets::{Budget, TicketStage, TicketTable};
use crate::waiting::{Wait, WaitingMembers};

#[derive(Debug, Clone)]
pub(crate) struct DispatchConfig {
    pub(crate) run: RunId,
    /// How many tickets may be open.
    pub(crate) budget: Budget,
    /// How long a worker may take over a lease, in milliseconds.
    pub(crate) lease_ms: u64,
    /// Ids are below this.
    pub(crate) vocabulary: u32,
    /// Classes that may answer.
    pub(crate) classes: Vec<NumericClass>,
    /// How often groups are re-checked.
    pub(crate) audit: AuditConfig,
    /// How groups are judged.
    pub(crate) critique: CritiqueConfig,
    /// When members are paused.
    pub(crate) conduct: ConductConfig,
}

/// What becomes of a submission.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Admission {
    /// Store it, then [`Dispatch::admitted`].
    Admit {
        /// Whether a forward pass is to check it.
        audit: bool,
    },
    /// The same group was admitted before.
    Repeated,
    /// Another group has the ticket, or the ticket has ended.
    TooLate(FateRecord),
    /// It does not answer its lease: the ticket ends as rejected.
    Reject(FateRecord),
    /// Not this worker's to submit: nothing ends.
    Refuse(Mismatch),
}

/// The state of dispatch.
#[derive(Debug)]
pub(crate) struct Dispatch {
    config: DispatchConfig,
    /// The number of this start of dispatch in the control log.
    generation: u64,
    /// What audits are drawn with.
    secret: [u8; 32],
    versions: Vec<VersionRef>,
    /// Workers that may change weights in mid-answer.
    trusted: BTreeSet<PeerId>,
    phase: Phase,
    tickets: TicketTable,
    conduct: Conduct,
    reviews: ReviewQueue,
    draws: AuditDraws,
    waiting_workers: WaitingMembers,
    waiting_critics: WaitingMembers,
}

/// Versions that leases and audits may name: more than any async level that validates.
const VERSIONS_KEPT: usize = 64;

impl Dispatch {
    pub(crate) fn new(config: DispatchConfig, generation: u64, secret: [u8; 32]) -> Self {
        Self {
            tickets: TicketTable::new(config.budget),
            conduct: Conduct::new(config.conduct),
            reviews: ReviewQueue::new(config.critique),
            draws: AuditDraws::default(),
            config,
            generation,
            secret,
            versions: Vec::new(),
            trusted: BTreeSet::new(),
            phase: Phase::Running,
            waiting_workers: WaitingMembers::default(),
            waiting_critics: WaitingMembers::default(),
        }
    }

    /// Lets these workers, which must be the lab's, change weights in mid-answer. A worker that chooses the moment of the swap
    /// chooses among answers.
    pub(crate) fn trust(&mut self, workers: BTreeSet<PeerId>) {
        self.trusted = workers;
    }

    /// The newest version, once there is one.
    pub(crate) fn version(&self) -> Option<VersionRef> {
        self.versions.last().copied()
    }

    /// Takes in an announced version. A later generation may announce a number again: then the newer weights hold.
    pub(crate) fn version_made(&mut self, version: VersionRef) {
        self.versions
            .retain(|known| known.version < version.version);
        self.versions.push(version);
        let excess = self.versions.len().saturating_sub(VERSIONS_KEPT);
        self.versions.drain(..excess);
    }

    pub(crate) fn set_phase(&mut self, phase: Phase) {
        self.phase = phase;
    }

    pub(crate) fn tickets(&self) -> &TicketTable {
        &self.tickets
    }

    /// The groups in review.
    pub(crate) fn reviews(&self) -> &ReviewQueue {
        &self.reviews
    }

    /// Tells how many tickets were issued before this start.
    pub(crate) fn restore_issued(&mut self, issued: u64) {
        self.tickets.restore_issued(issued);
    }

    /// Numbers of the tickets to issue now.
    pub(crate) fn tickets_wanted(&self) -> std::ops::RangeInclusive<u64> {
        let wanted = match (self.version(), self.phase) {
            (Some(newest), Phase::Running) => self.tickets.wanted(newest.version),
            _ => 0,
        };
        self.tickets.issued() + 1..=self.tickets.issued() + wanted
    }

    /// The oldest version that may answer a ticket issued now.
    pub(crate) fn oldest_version(&self) -> PolicyVersion {
        let newest = self.version().map_or(0, |newest| newest.version.0);
        PolicyVersion(newest.saturating_sub(self.config.budget.async_level))
    }

    /// Takes in a ticket of the queue.
    pub(crate) fn ticket_issued(&mut self, ticket: Ticket) {
        self.tickets.open(ticket);
    }

    /// The classes that may answer, unless this is one of them: no wait changes that.
    pub(crate) fn refuses(&self, class: NumericClass) -> Option<&[NumericClass]> {
        let classes = &self.config.classes;
        (!classes.contains(&class)).then_some(classes)
    }

    /// Decides about a group that `author` submitted for a lease signed by dispatch.
    pub(crate) fn admit(&mut self, lease: &Lease, group: &Signed<Group>) -> Admission {
        let hash = GroupHash::of(&group.bytes);
        if let Err(mismatch) = check(&group.body, &group.author, lease, self.config.vocabulary) {
            if group.author != lease.worker {
                return Admission::Refuse(mismatch);
            }
            let late = !self.is_answerable(lease.ticket.id);
            let fate = if late {
                Fate::Duplicate
            } else {
                Fate::Rejected
            };
            let record = fate_of(lease, Some(hash), fate, mismatch.to_string());
            return if late {
                Admission::TooLate(record)
            } else {
                Admission::Reject(record)
            };
        }
        if self
            .reviews
            .get(lease.ticket.id)
            .is_some_and(|review| review.group == hash)
        {
            return Admission::Repeated;
        }
        if !self.is_answerable(lease.ticket.id) {
            let reason = format!(
                "ticket {} has a group already, or has ended",
                lease.ticket.id
            );
            return Admission::TooLate(fate_of(lease, Some(hash), Fate::Duplicate, reason));
        }
        let several = group.body.versions().len() > 1;
        // The trainer recomputes log-probs under one version, so that others are confirmed by a critic always.
        let audit = several || self.is_audited(lease, &hash);
        Admission::Admit { audit }
    }

    /// The versions that drew a group. A number that dispatch does not know, which only a trusted worker can name, is left
    /// out here and found by the critic, which holds no such version.
    fn versions_of(&self, lease: &Lease, group: &Group) -> Vec<VersionRef> {
        let named = group.versions();
        let newer = |known: &&VersionRef| {
            known.version > lease.version.version && named.contains(&known.version)
        };
        let mut versions = vec![lease.version];
        versions.extend(self.versions.iter().filter(newer));
        versions
    }

    fn is_answerable(&self, ticket: TicketId) -> bool {
        matches!(
            self.tickets.stage(ticket),
            Some(TicketStage::Open | TicketStage::Leased { .. })
        )
    }

    fn is_audited(&mut self, lease: &Lease, group: &GroupHash) -> bool {
        let record = self.conduct.audit_record(&lease.worker);
        let share = self.config.audit.share(&record);
        let draw = || is_drawn(&self.secret, group, share);
        self.draws.once(lease.ticket.id, lease.id, draw)
    }

    /// A group was stored in the intake queue (or found there at the start): the critics may have it.
    pub(crate) fn admitted(&mut self, lease: &Signed<Lease>, group: &Signed<Group>, audit: bool) {
        let Lease {
            ticket, worker, id, ..
        } = &lease.body;
        let versions = self.versions_of(&lease.body, &group.body);
        self.conduct.lease_answered(*worker, *id);
        self.release_lease(ticket.id);
        self.tickets.restore_in_review(ticket);
        self.draws.forget(ticket.id);
        let hash = GroupHash::of(&group.bytes);
        self.reviews.open(PendingReview::new(
            hash,
            group.bytes.clone(),
            lease.clone(),
            versions,
            audit,
        ));
        self.check_leases();
    }

    /// Admission rejected a submission: its lease is answered and its ticket has ended. Returns the worker's fault.
    pub(crate) fn submission_rejected(&mut self, lease: &Lease) -> MemberFault {
        self.conduct.lease_answered(lease.worker, lease.id);
        let fault = MemberFault {
            member: lease.worker,
            ticket: lease.ticket.id,
            kind: FaultKind::RejectedGroup,
        };
        self.count_fault(&fault);
        fault
    }

    /// Counts a fault, decided now or read from the control log.
    pub(crate) fn count_fault(&mut self, fault: &MemberFault) {
        self.conduct.count(fault, &self.config.audit);
    }

    /// A critic asks for groups: see [`ReviewQueue::take_back`].
    pub(crate) fn critic_asks(&mut self, critic: &PeerId) {
        self.reviews.take_back(critic);
    }

    /// Gives a critic the next group to judge.
    ///
    /// # Errors
    /// Why there is none for it now.
    pub(crate) fn assign(
        &mut self,
        critic: PeerId,
        held: &[VersionRef],
        now: UnixMillis,
    ) -> Result<(TicketId, UnixMillis), Wait> {
        if !self.conduct.is_trusted(&critic) {
            return Err(Wait {
                retry_ms: 60_000,
                reason: WaitReason::CoolDown,
            });
        }
        match self.reviews.assign(critic, held, now) {
            Some((ticket, deadline)) => {
                self.waiting_critics.leave(&critic);
                Ok((ticket, deadline))
            }
            None => Err(self
                .waiting_critics
                .wait(critic, WaitReason::NothingOpen, now)),
        }
    }

    /// Records a verdict, and counts what it shows about author and critics. The faults are for the control log.
    ///
    /// # Errors
    /// When it answers no open review of this critic, or does not fit the group.
    pub(crate) fn record_verdict(
        &mut self,
        verdict: Signed<Verdict>,
    ) -> (Result<ReviewOutcome, VerdictRefusal>, Vec<MemberFault>) {
        let (critic, ticket) = (verdict.author, verdict.body.ticket);
        let fault = |member, kind| MemberFault {
            member,
            ticket,
            kind,
        };
        let outcome = self.reviews.record(verdict);
        let mut faults = Vec::new();
        match &outcome {
            Ok(ReviewOutcome::Settled {
                review,
                decision,
                dissenters,
                ..
            }) => {
                let dissents = dissenters.iter();
                faults.extend(dissents.map(|critic| fault(*critic, FaultKind::Dissent)));
                if *decision == Decision::Reject {
                    faults.push(fault(review.author(), FaultKind::RejectedGroup));
                } else if review.audit {
                    let author = self.conduct.worker(review.author());
                    author.audits.record(true, &self.config.audit);
                }
            }
            Err(VerdictRefusal::Misfit { .. }) => {
                faults.push(fault(critic, FaultKind::MisfitVerdict));
            }
            Ok(ReviewOutcome::Pending | ReviewOutcome::Undecided(_)) | Err(_) => {}
        }
        for fault in &faults {
            self.count_fault(fault);
        }
        (outcome, faults)
    }

    /// The group went to the trainer, which owns the ticket from now on.
    pub(crate) fn handed_on(&mut self, ticket: TicketId) {
        self.reviews.close(ticket);
        self.tickets.advance(ticket, TicketStage::Ready);
    }

    /// A ticket ended, by dispatch's or the trainer's decision.
    pub(crate) fn ended(&mut self, record: &FateRecord) {
        if record.fate == Fate::Duplicate {
            return;
        }
        self.release_lease(record.ticket);
        self.reviews.close(record.ticket);
        self.draws.forget(record.ticket);
        self.tickets.end(record.ticket, record.fate);
    }

    /// Takes a ticket from the worker that holds it, which did nothing wrong: another worker's late group came first, or the
    /// ticket ended.
    fn release_lease(&mut self, ticket: TicketId) {
        if let Some(TicketStage::Leased { lease, worker, .. }) = self.tickets.stage(ticket) {
            self.conduct.lease_released(*worker, *lease);
            self.tickets.advance(ticket, TicketStage::Open);
        }
    }

    fn check_leases(&self) {
        debug_assert_eq!(
            self.conduct.leases_held(),
            self.tickets.leased(),
            "leases held return to zero: each is a leased ticket's"
        );
    }

    /// What time alone brings: leases that ran out open their tickets again; returns tickets that expire.
    pub(crate) fn tick(&mut self, now: UnixMillis) -> Vec<FateRecord> {
        for (_, lease, worker) in self.tickets.reopen_overdue(now) {
            self.conduct.lease_dropped(worker, lease, now);
        }
        self.check_leases();
        let expired = self.tickets.expired(now);
        let reason = "no worker answered before the ticket's deadline";
        expired
            .into_iter()
            .map(|ticket| FateRecord::new(ticket, Fate::Expired, reason.to_owned()))
            .collect()
    }

    /// The fates of groups whose review cannot end, for instance since no critic holds their version any more: groups that the
    /// trainer would refuse as too old by now, and groups whose ticket's deadline has passed.
    pub(crate) fn overdue_reviews(&self, now: UnixMillis) -> Vec<FateRecord> {
        let newest = self
            .version()
            .map_or(PolicyVersion(0), |newest| newest.version);
        let async_level = self.config.budget.async_level;
        let mut ended: BTreeMap<TicketId, (Fate, String)> = BTreeMap::new();
        for ticket in self.tickets.overdue_reviews(now) {
            let reason = "no critic judged the group before the ticket's deadline".to_owned();
            ended.insert(ticket, (Fate::Expired, reason));
        }
        for (ticket, version) in self.reviews.older_than(self.oldest_version()) {
            let staleness_steps = newest.steps_since(version);
            let reason = format!(
                "no critic judged the group in time: it is {staleness_steps} steps stale, at most {async_level} are \
                 admitted"
            );
            ended.insert(ticket, (Fate::Stale, reason));
        }
        let listed = ended.into_iter().filter_map(|(ticket, (fate, reason))| {
            let review = self.reviews.get(ticket)?;
            Some(fate_of(
                &review.lease.body,
                Some(review.group),
                fate,
                reason,
            ))
        });
        listed.collect()
    }

    /// A ticket's fate is decided and on its way to the log: it takes no group and no verdict any more.
    pub(crate) fn ending(&mut self, ticket: TicketId) {
        debug_assert!(
            self.tickets.stage(ticket).is_none() || !self.is_settled(ticket),
            "one fate per ticket: {ticket} has one"
        );
        self.release_lease(ticket);
        self.reviews.close(ticket);
        self.tickets.advance(ticket, TicketStage::Ending);
    }

    /// Whether neither a worker nor a critic is wanted for the ticket any more.
    pub(crate) fn is_settled(&self, ticket: TicketId) -> bool {
        matches!(
            self.tickets.stage(ticket),
            None | Some(TicketStage::Ready | TicketStage::Ending)
        )
    }

    /// The tickets that a run which is over no longer wants.
    pub(crate) fn superseded(&self) -> Vec<FateRecord> {
        let tickets = match self.phase {
            Phase::Finished => self.tickets.unanswered(),
            Phase::Running | Phase::Paused => Vec::new(),
        };
        let reason = "the run reached its last step";
        tickets
            .into_iter()
            .map(|ticket| FateRecord::new(ticket, Fate::Superseded, reason.to_owned()))
            .collect()
    }
}

/// The fate of a leased ticket.
pub(crate) fn fate_of(
    lease: &Lease,
    group: Option<GroupHash>,
    fate: Fate,
    reason: String,
) -> FateRecord {
    FateRecord {
        group,
        lease: Some(lease.id),
        worker: Some(lease.worker),
        policy_version: Some(lease.version.version),
        ..FateRecord::new(lease.ticket.id, fate, reason)
    }
}

#[cfg(test)]
mod tests;
