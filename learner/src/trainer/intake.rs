//! Takes joined groups from the ready queue: opens, checks and stores them, then offers them to the resolver.
//!
//! Signatures and files take time, so a chunk of groups is opened off the runtime's threads; the groups of the next step are
//! opened while a step runs. Invariant: every joined message of this run's dispatch gets a fate.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{join_all, try_join_all};
use tracing::{info, warn};

use muster_broadcaster::blocking::off_loop_if_large;
use muster_protocol::bus::Delivery;
use muster_protocol::credentials::Roster;
use muster_protocol::envelope::{EnvelopeError, Signed, open};
use muster_protocol::id::{GroupHash, PeerId, RunId};
use muster_protocol::message::critique::Joined;
use muster_protocol::message::fate::{Fate, FateRecord};
use muster_protocol::message::group::{Group, Rollout};
use muster_protocol::message::lease::Lease;
use muster_protocol::message::verdict::{Decision, Verdict};
use muster_protocol::subject::{Queue, Role};

use super::archive::{Archive, ArchiveError};
use super::{CHUNK, Trainer, TrainerError, acknowledge, fate_of};
use crate::resolver::{Candidate, Refusal};

/// Opens messages of the ready queue.
pub(super) struct Opener {
    pub(super) run: RunId,
    pub(super) dispatch: PeerId,
    pub(super) roster: Roster,
    pub(super) archive: Archive,
}

/// Why a message of the ready queue was not taken in.
enum Unusable {
    /// The message names no ticket of this run, so no fate can be recorded.
    Message(String),
    /// The group breaks a rule: its ticket ends here.
    Group(Box<FateRecord>),
    /// The group could not be stored.
    Disk(ArchiveError),
}

/// Why a joined group cannot be trained on. The sentence becomes the reason of its fate.
#[derive(Debug, thiserror::Error)]
enum BadGroup {
    #[error("the group cannot be opened: {0}")]
    Group(EnvelopeError),
    #[error("the group does not answer its lease")]
    Lease,
    #[error("a verdict cannot be opened: {0}")]
    Verdict(EnvelopeError),
    #[error("a verdict is signed by {0}, which is not a critic for this group")]
    Author(PeerId),
    #[error("a verdict does not accept this group")]
    Decision,
    #[error("a verdict has {rewards} rewards for {rollouts} rollouts")]
    Rewards { rewards: usize, rollouts: usize },
}

/// A group with the rewards of its last verdict.
struct Judged {
    group: Signed<Group>,
    rewards: Vec<f32>,
}

impl Opener {
    /// Opens a joined group and all its parts. Dispatch has checked them too; the learner relies on signatures alone.
    fn open(&self, payload: &Bytes) -> Result<Candidate<Group>, Unusable> {
        let message = |error: EnvelopeError| Unusable::Message(error.to_string());
        let joined = open::<Joined>(payload.clone(), &self.run).map_err(message)?;
        let Joined {
            lease,
            group: group_bytes,
            verdicts,
            audited,
        } = joined.body;
        let lease = open::<Lease>(lease.into(), &self.run).map_err(message)?;
        if joined.author != self.dispatch || lease.author != self.dispatch {
            let reason = "it is not signed by the run's dispatch";
            return Err(Unusable::Message(reason.to_owned()));
        }
        let hash = GroupHash::of(&group_bytes);
        let judged = self.judged(&lease.body, hash, group_bytes.into(), verdicts);
        let Judged { group, rewards } = judged.map_err(|bad| {
            Unusable::Group(Box::new(FateRecord {
                ticket: lease.body.ticket.id,
                group: Some(hash),
                lease: Some(lease.body.id),
                worker: Some(lease.body.worker),
                policy_version: Some(lease.body.version.version),
                fate: Fate::Rejected,
                reason: bad.to_string(),
                audited,
                step: None,
            }))
        })?;
        self.archive
            .put_group(hash, &group.bytes)
            .map_err(Unusable::Disk)?;
        Ok(Candidate {
            ticket: lease.body.ticket.id,
            group: hash,
            worker: group.author,
            version: group.body.oldest_version(),
            rewards,
            audited,
            carried: group.body,
        })
    }

    fn judged(
        &self,
        lease: &Lease,
        hash: GroupHash,
        group: Bytes,
        verdicts: Vec<serde_bytes::ByteBuf>,
    ) -> Result<Judged, BadGroup> {
        let group = open::<Group>(group, &self.run).map_err(BadGroup::Group)?;
        if group.author != lease.worker || group.body.lease != lease.id {
            return Err(BadGroup::Lease);
        }
        let rollouts = group.body.rollouts.len();
        let mut rewards = Vec::new();
        for bytes in verdicts {
            let verdict =
                open::<Verdict>(bytes.into_vec().into(), &self.run).map_err(BadGroup::Verdict)?;
            let member = self.roster.by_peer(&verdict.author);
            if !member.is_some_and(|m| m.role == Role::Critic && m.peer != group.author) {
                return Err(BadGroup::Author(verdict.author));
            }
            let verdict = verdict.body;
            if verdict.group != hash || verdict.decision != Decision::Accept {
                return Err(BadGroup::Decision);
            }
            if verdict.rewards.len() != rollouts {
                let rewards = verdict.rewards.len();
                return Err(BadGroup::Rewards { rewards, rollouts });
            }
            rewards = verdict.rewards.iter().map(|reward| reward.total).collect();
        }
        Ok(Judged { group, rewards })
    }
}

/// Groups that were looked at and need no place in the resolver.
#[derive(Default)]
struct Spent {
    fates: Vec<FateRecord>,
    deliveries: Vec<Delivery>,
}

impl Trainer {
    /// Takes groups of the ready queue, at most a chunk, and waits up to `wait` for the first.
    pub(super) async fn take_groups(&mut self, wait: Duration) -> Result<(), TrainerError> {
        let deliveries = self.client.bus().take(Queue::Ready, CHUNK, wait).await?;
        if deliveries.is_empty() {
            return Ok(());
        }
        let payloads: Vec<Bytes> = deliveries.iter().map(|d| d.payload.clone()).collect();
        let opener = Arc::clone(&self.opener);
        let bytes = payloads.iter().map(Bytes::len).sum();
        let opening = off_loop_if_large(bytes, move || {
            let opened = payloads.iter().map(|payload| opener.open(payload));
            opened.collect::<Vec<_>>()
        });
        let mut spent = Spent::default();
        for (delivery, opened) in deliveries.into_iter().zip(opening.await?) {
            self.on_group(delivery, opened, &mut spent)?;
        }
        try_join_all(spent.fates.into_iter().map(|fate| self.append_fate(fate))).await?;
        join_all(spent.deliveries.iter().map(acknowledge)).await;
        Ok(())
    }

    fn on_group(
        &mut self,
        delivery: Delivery,
        opened: Result<Candidate<Group>, Unusable>,
        spent: &mut Spent,
    ) -> Result<(), TrainerError> {
        match opened {
            Ok(candidate) => self.on_candidate(delivery, candidate, spent),
            Err(Unusable::Message(reason)) => {
                warn!(%reason, "a message of the ready queue is dropped");
                spent.deliveries.push(delivery);
            }
            Err(Unusable::Group(record)) => {
                warn!(ticket = %record.ticket, reason = %record.reason, "a joined group is rejected");
                spent.fates.extend(self.rejected(*record));
                spent.deliveries.push(delivery);
            }
            Err(Unusable::Disk(error)) => return Err(error.into()),
        }
        Ok(())
    }

    /// The fate of a group that breaks a rule; none if its ticket has one on record.
    fn rejected(&mut self, mut record: FateRecord) -> Option<FateRecord> {
        if self.logs.ended().contains(&record.ticket) {
            return None;
        }
        if !self.resolver.end(record.ticket) {
            record.fate = Fate::Duplicate; // another group of the ticket waits or is in a batch
        }
        Some(record)
    }

    fn on_candidate(&mut self, delivery: Delivery, candidate: Candidate<Group>, spent: &mut Spent) {
        let ticket = candidate.ticket;
        if self.trained.get(&ticket) == Some(&candidate.group) {
            spent.deliveries.push(delivery); // a kill came between the manifest and this acknowledgement
            return;
        }
        if self.resolver.holds(ticket, candidate.group) {
            self.held.insert(ticket, delivery); // a restarted server delivers again
            return;
        }
        let drawn = candidate.carried.rollouts.iter().map(Rollout::drawn_tokens);
        self.tokens_arrived += drawn.sum::<u64>();
        match self.resolver.admit(candidate) {
            Ok(()) => {
                self.held.insert(ticket, delivery);
                return;
            }
            Err((Refusal::Duplicate { .. }, candidate)) if self.logs.ended().contains(&ticket) => {
                // The log has the ticket's fate: this group's own, before a kill, or another group's.
                info!(%ticket, group = %candidate.group.short(), "a group of an ended ticket");
            }
            Err((refusal, candidate)) => {
                let reason = refusal.to_string();
                let fate = fate_of(&candidate, refusal.fate(), reason, None);
                spent.fates.push(fate);
            }
        }
        spent.deliveries.push(delivery);
    }
}
