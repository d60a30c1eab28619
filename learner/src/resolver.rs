//! Decides which groups enter a batch, and when a batch is closed. Pure: joined groups and the learner's version in, a
//! selection out. Invariants: at most one group per ticket; the oldest tickets enter first, so quick short answers have no
//! advantage; every group taken in leaves exactly once, in a batch or with a reason.

use std::collections::{BTreeMap, BTreeSet};

use muster_protocol::id::{GroupHash, PeerId, PolicyVersion, TicketId};
use muster_protocol::message::fate::Fate;

use crate::advantage::{AdvantageConfig, AdvantageError};

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ResolveConfig {
    /// Groups per batch, B.
    pub batch_groups: usize,
    /// Largest staleness admitted, in steps.
    pub async_level: u64,
    pub advantage: AdvantageConfig,
}

/// A judged group with what the selection needs of it. `T` is the group itself.
#[derive(Debug, Clone)]
pub struct Candidate<T> {
    pub ticket: TicketId,
    pub group: GroupHash,
    pub worker: PeerId,
    /// The oldest version that drew a token of it.
    pub version: PolicyVersion,
    /// `[G]`, as the critics agree.
    pub rewards: Vec<f32>,
    /// Whether a forward pass checked the group.
    pub audited: bool,
    pub carried: T,
}

/// Why a group may not enter a batch. Each variant is a fate.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Refusal {
    #[error("the group is {staleness_steps} steps stale, at most {async_level} are admitted")]
    Stale {
        /// Learner version − group version.
        staleness_steps: u64,
        /// η, the most steps of staleness that are admitted.
        async_level: u64,
    },
    /// The rewards are all equal, or one is not a number of ordinary size.
    #[error(transparent)]
    Rewards(#[from] AdvantageError),
    #[error("the group claims version {claimed}, the learner is at {learner}")]
    FromTheFuture {
        claimed: PolicyVersion,
        learner: PolicyVersion,
    },
    /// The ticket has ended, or another group of it waits.
    #[error("ticket {ticket} has a group already")]
    Duplicate { ticket: TicketId },
}

impl Refusal {
    pub fn fate(&self) -> Fate {
        match self {
            Refusal::Stale { .. } => Fate::Stale,
            Refusal::Rewards(AdvantageError::NoSignal { .. }) => Fate::NoSignal,
            Refusal::Rewards(AdvantageError::Reward { .. }) | Refusal::FromTheFuture { .. } => {
                Fate::Rejected
            }
            Refusal::Duplicate { .. } => Fate::Duplicate,
        }
    }
}

/// A group of a batch.
#[derive(Debug, Clone)]
pub struct Selected<T> {
    pub candidate: Candidate<T>,
    /// `[G]`, summing to zero.
    pub advantages: Vec<f32>,
}

/// The groups that wait for a batch, at the learner's version.
#[derive(Debug)]
pub(crate) struct Resolver<T> {
    config: ResolveConfig,
    version: PolicyVersion,
    waiting: BTreeMap<TicketId, Selected<T>>,
    ended: BTreeSet<TicketId>,
}

impl<T> Resolver<T> {
    /// `ended` are the tickets that have a fate.
    pub(crate) fn new(
        config: ResolveConfig,
        version: PolicyVersion,
        ended: BTreeSet<TicketId>,
    ) -> Self {
        Self {
            config,
            version,
            waiting: BTreeMap::new(),
            ended,
        }
    }

    pub(crate) fn version(&self) -> PolicyVersion {
        self.version
    }

    /// Groups that wait for their batch.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Whether this very group waits for its batch.
    pub(crate) fn holds(&self, ticket: TicketId, group: GroupHash) -> bool {
        let waiting = self.waiting.get(&ticket);
        waiting.is_some_and(|waiting| waiting.candidate.group == group)
    }

    /// Ends a ticket whose group cannot be a candidate. False if the ticket has ended or another group of it waits.
    pub(crate) fn end(&mut self, ticket: TicketId) -> bool {
        !self.waiting.contains_key(&ticket) && self.ended.insert(ticket)
    }

    /// Takes a group in.
    ///
    /// # Errors
    /// The reason of the refusal, with the group.
    pub(crate) fn admit(&mut self, candidate: Candidate<T>) -> Result<(), (Refusal, Candidate<T>)> {
        let ticket = candidate.ticket;
        if self.ended.contains(&ticket) || self.waiting.contains_key(&ticket) {
            return Err((Refusal::Duplicate { ticket }, candidate));
        }
        if let Some(refusal) = self.age(candidate.version) {
            self.ended.insert(ticket);
            return Err((refusal, candidate));
        }
        match self.config.advantage.advantages(&candidate.rewards) {
            Ok(advantages) => {
                let selected = Selected {
                    candidate,
                    advantages,
                };
                self.waiting.insert(ticket, selected);
                debug_assert!(!self.ended.contains(&ticket), "one fate per ticket");
                Ok(())
            }
            Err(error) => {
                self.ended.insert(ticket);
                Err((error.into(), candidate))
            }
        }
    }

    fn age(&self, version: PolicyVersion) -> Option<Refusal> {
        if version > self.version {
            return Some(Refusal::FromTheFuture {
                claimed: version,
                learner: self.version,
            });
        }
        let staleness_steps = self.version.steps_since(version);
        let async_level = self.config.async_level;
        (staleness_steps > async_level).then_some(Refusal::Stale {
            staleness_steps,
            async_level,
        })
    }

    /// The batch of the oldest tickets, if enough groups wait.
    pub(crate) fn close_batch(&mut self) -> Option<Vec<Selected<T>>> {
        if self.waiting.len() < self.config.batch_groups {
            return None;
        }
        let mut batch = Vec::with_capacity(self.config.batch_groups);
        while batch.len() < self.config.batch_groups {
            let (ticket, selected) = self.waiting.pop_first()?;
            let first = self.ended.insert(ticket);
            debug_assert!(first, "one fate per ticket");
            batch.push(selected);
        }
        debug_assert!(
            batch.is_sorted_by_key(|selected| selected.candidate.ticket),
            "the oldest tickets enter first"
        );
        Some(batch)
    }

    /// Moves to `version`, which the learner has made. Returns the groups that are now too old, with the reason.
    pub(crate) fn advance(&mut self, version: PolicyVersion) -> Vec<(Refusal, Candidate<T>)> {
        debug_assert!(version >= self.version, "versions only rise");
        self.version = version;
        let too_old: Vec<(TicketId, Refusal)> = self
            .waiting
            .iter()
            .filter_map(|(ticket, waiting)| {
                self.age(waiting.candidate.version)
                    .map(|refusal| (*ticket, refusal))
            })
            .collect();
        let mut leaving = Vec::with_capacity(too_old.len());
        for (ticket, refusal) in too_old {
            self.ended.insert(ticket);
            if let Some(waiting) = self.waiting.remove(&ticket) {
                leaving.push((refusal, waiting.candidate));
            }
        }
        leaving
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolver(version: u64) -> Resolver<()> {
        let config = ResolveConfig {
            batch_groups: 2,
            async_level: 4,
            advantage: AdvantageConfig::default(),
        };
        Resolver::new(config, PolicyVersion(version), BTreeSet::new())
    }

    fn group(ticket: u64, version: u64, rewards: &[f32]) -> Candidate<()> {
        Candidate {
            ticket: TicketId(ticket),
            group: GroupHash::of(&ticket.to_le_bytes()),
            worker: PeerId([0; 32]),
            version: PolicyVersion(version),
            rewards: rewards.to_vec(),
            audited: false,
            carried: (),
        }
    }

    fn refused(resolver: &mut Resolver<()>, group: Candidate<()>) -> Option<Refusal> {
        resolver.admit(group).err().map(|(refusal, _)| refusal)
    }

    #[test]
    fn a_group_older_than_the_async_level_is_refused() {
        let refusal = refused(&mut resolver(9), group(1, 4, &[0.0, 1.0]));
        assert_eq!(
            refusal,
            Some(Refusal::Stale {
                staleness_steps: 5,
                async_level: 4
            })
        );
    }

    #[test]
    fn a_group_at_the_async_level_is_admitted() {
        assert_eq!(refused(&mut resolver(9), group(1, 5, &[0.0, 1.0])), None);
    }

    #[test]
    fn a_group_without_reward_variance_is_refused() {
        let refusal = refused(&mut resolver(0), group(1, 0, &[1.0, 1.0])).unwrap();
        assert_eq!(
            refusal.to_string(),
            "all 2 rewards are equal, so every advantage is zero"
        );
        assert_eq!(refusal.fate(), Fate::NoSignal);
    }

    #[test]
    fn a_group_with_a_reward_out_of_range_is_rejected_with_the_reward() {
        let refusal = refused(&mut resolver(0), group(1, 0, &[0.0, f32::MAX])).unwrap();
        assert!(
            refusal
                .to_string()
                .starts_with("the reward of rollout 1 is"),
            "{refusal}"
        );
        assert_eq!(refusal.fate(), Fate::Rejected);
    }

    #[test]
    fn a_ticket_is_ended_once_and_not_while_a_group_of_it_waits() {
        let mut resolver = resolver(0);
        assert_eq!(refused(&mut resolver, group(1, 0, &[0.0, 1.0])), None);
        assert!(!resolver.end(TicketId(1)));
        assert!(resolver.end(TicketId(2)));
        assert!(!resolver.end(TicketId(2)));
        let refusal = refused(&mut resolver, group(2, 0, &[0.0, 1.0]));
        assert!(matches!(refusal, Some(Refusal::Duplicate { .. })));
    }

    #[test]
    fn a_version_that_does_not_exist_yet_is_refused() {
        let refusal = refused(&mut resolver(3), group(1, 4, &[0.0, 1.0]));
        assert!(matches!(refusal, Some(Refusal::FromTheFuture { .. })));
    }

    #[test]
    fn a_ticket_is_trained_once() {
        let mut resolver = resolver(0);
        for ticket in [1, 2] {
            assert_eq!(refused(&mut resolver, group(ticket, 0, &[0.0, 1.0])), None);
        }
        assert!(resolver.close_batch().is_some());
        let refusal = refused(&mut resolver, group(1, 0, &[0.0, 1.0]));
        assert_eq!(
            refusal,
            Some(Refusal::Duplicate {
                ticket: TicketId(1)
            })
        );
    }

    #[test]
    fn a_batch_is_made_of_the_oldest_tickets() {
        let mut resolver = resolver(0);
        assert_eq!(refused(&mut resolver, group(7, 0, &[0.0, 1.0])), None);
        assert!(resolver.close_batch().is_none());
        for ticket in [3, 5] {
            assert_eq!(refused(&mut resolver, group(ticket, 0, &[0.0, 1.0])), None);
        }
        let batch = resolver.close_batch().unwrap();
        let tickets: Vec<u64> = batch.iter().map(|s| s.candidate.ticket.0).collect();
        assert_eq!(tickets, [3, 5]);
        assert_eq!(resolver.waiting(), 1);
    }

    #[test]
    fn groups_that_wait_too_long_leave_as_stale() {
        let mut resolver = resolver(4);
        assert_eq!(refused(&mut resolver, group(1, 0, &[0.0, 1.0])), None);
        let leaving = resolver.advance(PolicyVersion(5));
        assert_eq!(leaving.len(), 1);
        assert_eq!(leaving[0].0.fate(), Fate::Stale);
        assert_eq!(resolver.waiting(), 0);
    }
}
