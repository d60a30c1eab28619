//! Which groups enter a batch, and when a batch is closed. Pure: joined groups and the learner's version in, a selection
//! out. Invariants: at most one group per ticket; oldest ticket first, so that quick short answers are not preferred;
//! every group taken in leaves exactly once, in a batch or with a reason.

use std::collections::{BTreeMap, BTreeSet};

use muster_protocol::id::{GroupHash, PeerId, PolicyVersion, TicketId};
use muster_protocol::message::fate::Fate;

use crate::advantage::AdvantageConfig;

/// What bounds a batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ResolveConfig {
    /// Groups per batch, B.
    pub batch_groups: usize,
    /// Largest staleness admitted, in steps.
    pub async_level: u64,
    /// How rewards become advantages.
    pub advantage: AdvantageConfig,
}

/// A judged group, as far as the choice is concerned; `T` is whatever goes with it.
#[derive(Debug, Clone)]
pub struct Candidate<T> {
    /// Its ticket.
    pub ticket: TicketId,
    /// Its name.
    pub group: GroupHash,
    /// Who answered.
    pub worker: PeerId,
    /// The oldest version that drew a token of it.
    pub version: PolicyVersion,
    /// One per rollout, as the critics agree.
    pub rewards: Vec<f32>,
    /// Whether a forward pass checked it.
    pub audited: bool,
    /// What goes with it.
    pub carried: T,
}

/// Why a group may not enter a batch. Each variant is a fate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Older than the async level.
    #[error("the group is {staleness_steps} steps stale, at most {async_level} are admitted")]
    Stale {
        /// Learner version − group version.
        staleness_steps: u64,
        /// η.
        async_level: u64,
    },
    /// Nothing to learn.
    #[error("all {group_size} rewards are equal, so every advantage is zero")]
    NoSignal {
        /// G.
        group_size: usize,
    },
    /// A version that the learner has not made.
    #[error("the group claims version {claimed}, the learner is at {learner}")]
    FromTheFuture {
        /// As claimed.
        claimed: PolicyVersion,
        /// As is.
        learner: PolicyVersion,
    },
    /// The ticket is trained, or another group of it waits.
    #[error("ticket {ticket} has a group already")]
    Duplicate {
        /// Which.
        ticket: TicketId,
    },
}

impl Refusal {
    /// The fate that the refusal is.
    pub fn fate(&self) -> Fate {
        match self {
            Refusal::Stale { .. } => Fate::Stale,
            Refusal::NoSignal { .. } => Fate::NoSignal,
            Refusal::FromTheFuture { .. } => Fate::Rejected,
            Refusal::Duplicate { .. } => Fate::Duplicate,
        }
    }
}

/// A member of a batch.
#[derive(Debug, Clone)]
pub struct Selected<T> {
    /// The group.
    pub candidate: Candidate<T>,
    /// One per rollout.
    pub advantages: Vec<f32>,
}

/// The groups that wait, and the version that they wait for.
#[derive(Debug)]
pub struct Resolver<T> {
    config: ResolveConfig,
    version: PolicyVersion,
    waiting: BTreeMap<TicketId, Selected<T>>,
    ended: BTreeSet<TicketId>,
}

impl<T> Resolver<T> {
    /// A resolver at `version`, for a run whose tickets in `ended` have ended.
    pub fn new(config: ResolveConfig, version: PolicyVersion, ended: BTreeSet<TicketId>) -> Self {
        Self {
            config,
            version,
            waiting: BTreeMap::new(),
            ended,
        }
    }

    /// The learner's version.
    pub fn version(&self) -> PolicyVersion {
        self.version
    }

    /// Groups that wait for their batch.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Whether this very group waits for its batch.
    pub fn holds(&self, ticket: TicketId, group: GroupHash) -> bool {
        let waiting = self.waiting.get(&ticket);
        waiting.is_some_and(|waiting| waiting.candidate.group == group)
    }

    /// Takes a group in, or says why not.
    ///
    /// # Errors
    /// The reason, with the group.
    pub fn admit(&mut self, candidate: Candidate<T>) -> Result<(), (Refusal, Candidate<T>)> {
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
                self.waiting.insert(
                    ticket,
                    Selected {
                        candidate,
                        advantages,
                    },
                );
                Ok(())
            }
            Err(_) => {
                self.ended.insert(ticket);
                let group_size = candidate.rewards.len();
                Err((Refusal::NoSignal { group_size }, candidate))
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

    /// The batch of the oldest tickets, when enough groups wait.
    pub fn close_batch(&mut self) -> Option<Vec<Selected<T>>> {
        if self.waiting.len() < self.config.batch_groups {
            return None;
        }
        let oldest: Vec<TicketId> = self
            .waiting
            .keys()
            .copied()
            .take(self.config.batch_groups)
            .collect();
        self.ended.extend(oldest.iter().copied());
        Some(
            oldest
                .iter()
                .filter_map(|ticket| self.waiting.remove(ticket))
                .collect(),
        )
    }

    /// The learner has made `version`: groups that are now too old leave with their reason.
    pub fn advance(&mut self, version: PolicyVersion) -> Vec<(Refusal, Candidate<T>)> {
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
        let refusal = refused(&mut resolver(0), group(1, 0, &[1.0, 1.0]));
        assert_eq!(refusal, Some(Refusal::NoSignal { group_size: 2 }));
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
