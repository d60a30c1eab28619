//! Groups in review: which critic has which group, and what the verdicts amount to.
//!
//! A group needs `verdicts` agreeing verdicts of different critics, none of them its author. If verdicts disagree, one more
//! critic is asked, up to a bound. A group drawn for an audit goes only to critics that hold its versions.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use bytes::Bytes;
use muster_protocol::envelope::Signed;
use muster_protocol::id::{GroupHash, PeerId, PolicyVersion, TicketId, UnixMillis};
use muster_protocol::message::lease::Lease;
use muster_protocol::message::verdict::{Decision, Verdict};
use muster_protocol::message::version::VersionRef;

/// How groups are reviewed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CritiqueConfig {
    /// Agreeing verdicts that a group needs: 1 if all critics are the lab's, else 2 or more.
    pub verdicts: u32,
    /// Most verdicts about one group before it is rejected as undecided.
    pub critics_max: u32,
    /// How long a critic may take, in milliseconds.
    pub lease_ms: u64,
}

impl Default for CritiqueConfig {
    fn default() -> Self {
        Self {
            verdicts: 1,
            critics_max: 5,
            lease_ms: 30_000,
        }
    }
}

/// A group in review.
#[derive(Debug, Clone)]
pub(crate) struct PendingReview {
    pub(crate) group: GroupHash,
    /// The versions that drew the group, oldest first; one unless weights changed in flight.
    pub(crate) versions: Vec<VersionRef>,
    /// Whether a forward pass is to check it.
    pub(crate) audit: bool,
    pub(crate) lease: Signed<Lease>,
    /// The group's signed envelope.
    pub(crate) envelope: Bytes,
    /// Critics that hold a critique lease, with its deadline.
    asked: BTreeMap<PeerId, UnixMillis>,
    /// Critics whose verdict did not fit: they are not asked again.
    misfits: BTreeSet<PeerId>,
    verdicts: Vec<Signed<Verdict>>,
}

impl PendingReview {
    pub(crate) fn new(
        group: GroupHash,
        envelope: Bytes,
        lease: Signed<Lease>,
        versions: Vec<VersionRef>,
        audit: bool,
    ) -> Self {
        Self {
            group,
            versions,
            audit,
            lease,
            envelope,
            asked: BTreeMap::new(),
            misfits: BTreeSet::new(),
            verdicts: Vec::new(),
        }
    }

    pub(crate) fn author(&self) -> PeerId {
        self.lease.body.worker
    }

    fn reviewed_by(&self, critic: &PeerId) -> bool {
        self.verdicts
            .iter()
            .any(|verdict| verdict.author == *critic)
    }

    /// Whether `critic`, which holds the versions `held`, may be asked now. No critic is asked while as many as are
    /// missing have time left.
    fn may_ask(
        &self,
        critic: &PeerId,
        held: &[VersionRef],
        now: UnixMillis,
        config: &CritiqueConfig,
    ) -> bool {
        let in_time = |deadline: &UnixMillis| *deadline > now;
        let pending = self.asked.values().filter(|deadline| in_time(deadline));
        self.author() != *critic
            && !self.reviewed_by(critic)
            && !self.misfits.contains(critic)
            && !self.asked.get(critic).is_some_and(in_time)
            && pending.count() < self.missing(config)
            && (!self.audit || self.versions.iter().all(|version| held.contains(version)))
    }

    /// How many more verdicts the group needs, at best.
    fn missing(&self, config: &CritiqueConfig) -> usize {
        let agreeing = self.agreement();
        let is_grey = agreeing
            .first()
            .is_some_and(|verdict| verdict.body.decision == Decision::Grey);
        let counted = if is_grey { 0 } else { agreeing.len() };
        let room = (config.critics_max as usize).saturating_sub(self.verdicts.len());
        (config.verdicts as usize).saturating_sub(counted).min(room)
    }

    /// The largest set of verdicts that say the same.
    fn agreement(&self) -> Vec<&Signed<Verdict>> {
        let mut largest = Vec::new();
        for one in &self.verdicts {
            let agrees = |other: &&Signed<Verdict>| other.body.agrees_with(&one.body);
            let set: Vec<&Signed<Verdict>> = self.verdicts.iter().filter(agrees).collect();
            if set.len() > largest.len() {
                largest = set;
            }
        }
        largest
    }

    /// Checks that a verdict names this group's lease and has one reward per rollout.
    fn check_fit(&self, verdict: &Verdict) -> Result<(), VerdictRefusal> {
        let (found, wanted) = (verdict.rewards.len(), self.lease.body.rollouts.count);
        if found != wanted as usize {
            return Err(VerdictRefusal::Misfit {
                group: self.group,
                problem: format!("has {found} rewards, the group has {wanted} rollouts"),
            });
        }
        if verdict.lease != self.lease.body.id {
            return Err(VerdictRefusal::Misfit {
                group: self.group,
                problem: format!("names lease {}, not {}", verdict.lease, self.lease.body.id),
            });
        }
        Ok(())
    }
}

/// What a verdict led to.
#[derive(Debug)]
pub(crate) enum ReviewOutcome {
    /// More verdicts are needed.
    Pending,
    /// Enough critics agree; the review is over.
    Settled {
        review: Box<PendingReview>,
        /// Accept or reject, as the agreeing verdicts say.
        decision: Decision,
        /// The agreeing verdicts.
        verdicts: Vec<Signed<Verdict>>,
        /// Critics that decided otherwise.
        dissenters: Vec<PeerId>,
    },
    /// As many verdicts as allowed came and too few agree; the review is over.
    Undecided(Box<PendingReview>),
}

/// Why a verdict was not recorded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum VerdictRefusal {
    #[error("group {0} is not in review: its review is over, or it never began")]
    NotInReview(GroupHash),
    #[error("group {0} was not given to this critic")]
    NotAsked(GroupHash),
    #[error("group {0} was drawn for an audit, the verdict has none")]
    NotAudited(GroupHash),
    #[error("the verdict about group {group} {problem}")]
    Misfit { group: GroupHash, problem: String },
}

/// The groups in review, oldest ticket first.
#[derive(Debug)]
pub(crate) struct ReviewQueue {
    config: CritiqueConfig,
    reviews: BTreeMap<TicketId, PendingReview>,
}

impl ReviewQueue {
    pub(crate) fn new(config: CritiqueConfig) -> Self {
        Self {
            config,
            reviews: BTreeMap::new(),
        }
    }

    /// Adds a group. A ticket has one group in review: a second one is ignored.
    pub(crate) fn open(&mut self, review: PendingReview) {
        let ticket = review.lease.body.ticket.id;
        self.reviews.entry(ticket).or_insert(review);
    }

    /// Drops the group of a ticket that ended otherwise.
    pub(crate) fn close(&mut self, ticket: TicketId) {
        self.reviews.remove(&ticket);
    }

    pub(crate) fn len(&self) -> usize {
        self.reviews.len()
    }

    pub(crate) fn get(&self, ticket: TicketId) -> Option<&PendingReview> {
        self.reviews.get(&ticket)
    }

    /// Takes back what `critic` holds. A critic that asks for groups holds none: earlier ones were lost on the way, or the
    /// critic has restarted.
    pub(crate) fn take_back(&mut self, critic: &PeerId) {
        for review in self.reviews.values_mut() {
            review.asked.remove(critic);
        }
    }

    /// Gives `critic`, which holds the versions `held`, the oldest group that needs one more verdict, until the deadline
    /// returned.
    pub(crate) fn assign(
        &mut self,
        critic: PeerId,
        held: &[VersionRef],
        now: UnixMillis,
    ) -> Option<(TicketId, UnixMillis)> {
        let config = self.config;
        let deadline = now.plus(config.lease_ms);
        let (ticket, review) = self
            .reviews
            .iter_mut()
            .find(|(_, review)| review.may_ask(&critic, held, now, &config))?;
        debug_assert_ne!(review.author(), critic, "no author reviews its own group");
        review.asked.insert(critic, deadline);
        Some((*ticket, deadline))
    }

    /// Records a verdict.
    ///
    /// # Errors
    /// When it answers no open review of this critic, or does not fit the group.
    pub(crate) fn record(
        &mut self,
        verdict: Signed<Verdict>,
    ) -> Result<ReviewOutcome, VerdictRefusal> {
        let ticket = verdict.body.ticket;
        let group = verdict.body.group;
        let review = self
            .reviews
            .get_mut(&ticket)
            .filter(|review| review.group == group)
            .ok_or(VerdictRefusal::NotInReview(group))?;
        if review.reviewed_by(&verdict.author) {
            return Ok(ReviewOutcome::Pending);
        }
        if review.asked.remove(&verdict.author).is_none() {
            return Err(VerdictRefusal::NotAsked(group));
        }
        if let Err(refusal) = review.check_fit(&verdict.body) {
            review.misfits.insert(verdict.author);
            return Err(refusal);
        }
        let skipped = review.audit && !verdict.body.audited;
        if skipped && verdict.body.decision != Decision::Reject {
            return Err(VerdictRefusal::NotAudited(group));
        }
        review.verdicts.push(verdict);
        Ok(self.settle(ticket))
    }

    /// The groups of a version before `oldest`, with that version.
    pub(crate) fn older_than(&self, oldest: PolicyVersion) -> Vec<(TicketId, PolicyVersion)> {
        let versions = self
            .reviews
            .iter()
            .filter_map(|(ticket, review)| Some((*ticket, review.versions.first()?.version)));
        versions.filter(|(_, version)| *version < oldest).collect()
    }

    fn settle(&mut self, ticket: TicketId) -> ReviewOutcome {
        let config = self.config;
        let Some(review) = self.reviews.get(&ticket) else {
            return ReviewOutcome::Pending;
        };
        let agreeing: Vec<Signed<Verdict>> = review.agreement().into_iter().cloned().collect();
        let decision = agreeing.first().map(|verdict| verdict.body.decision);
        let settled =
            agreeing.len() >= config.verdicts as usize && decision != Some(Decision::Grey);
        if !settled && review.verdicts.len() < config.critics_max as usize {
            return ReviewOutcome::Pending;
        }
        let Some(review) = self.reviews.remove(&ticket).map(Box::new) else {
            return ReviewOutcome::Pending;
        };
        let Some(decision) = decision.filter(|_| settled) else {
            return ReviewOutcome::Undecided(review);
        };
        let agrees = |peer: &PeerId| agreeing.iter().any(|verdict| verdict.author == *peer);
        let critics = review.verdicts.iter().map(|verdict| verdict.author);
        let dissenters = critics.filter(|critic| !agrees(critic)).collect();
        ReviewOutcome::Settled {
            review,
            decision,
            verdicts: agreeing,
            dissenters,
        }
    }
}

#[cfg(test)]
mod tests;
