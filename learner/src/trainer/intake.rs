//! Groups as dispatch hands them on: opened, checked and kept on disk, then offered to the resolver.
//!
//! Signatures and files take time, so a chunk of groups is opened off the runtime's threads; while a step runs, the
//! groups of the next one are.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{join_all, try_join_all};
use tracing::{info, warn};

use muster_broadcaster::follower::off_loop_if_large;
use muster_protocol::bus::Delivery;
use muster_protocol::credentials::Roster;
use muster_protocol::envelope::open;
use muster_protocol::id::{GroupHash, PeerId, RunId};
use muster_protocol::message::critique::Joined;
use muster_protocol::message::fate::FateRecord;
use muster_protocol::message::group::Group;
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
    /// It is not what dispatch makes.
    Message(String),
    /// Its group could not be kept.
    Disk(ArchiveError),
}

impl From<String> for Unusable {
    fn from(reason: String) -> Self {
        Self::Message(reason)
    }
}

impl Opener {
    /// Opens a joined group and everything in it. Dispatch has checked all of it; the learner believes signatures alone.
    fn open(&self, payload: &Bytes) -> Result<Candidate<Group>, Unusable> {
        let (run, dispatch) = (&self.run, self.dispatch);
        let joined = open::<Joined>(payload.clone(), run).map_err(|error| error.to_string())?;
        let lease =
            open::<Lease>(joined.body.lease.into(), run).map_err(|error| error.to_string())?;
        if joined.author != dispatch || lease.author != dispatch {
            return Err("not signed by the run's dispatch".to_owned().into());
        }
        let group =
            open::<Group>(joined.body.group.into(), run).map_err(|error| error.to_string())?;
        if group.author != lease.body.worker || group.body.lease != lease.body.id {
            return Err("the group does not answer its lease".to_owned().into());
        }
        let hash = GroupHash::of(&group.bytes);
        let mut rewards = Vec::new();
        for bytes in joined.body.verdicts {
            let verdict =
                open::<Verdict>(bytes.into_vec().into(), run).map_err(|error| error.to_string())?;
            let is_critic = self
                .roster
                .by_peer(&verdict.author)
                .is_some_and(|member| member.role == Role::Critic && member.peer != group.author);
            let fits = verdict.body.group == hash
                && verdict.body.decision == Decision::Accept
                && verdict.body.rewards.len() == group.body.rollouts.len();
            if !is_critic || !fits {
                let reason = "a verdict is not an accepting critic's of this group";
                return Err(reason.to_owned().into());
            }
            rewards = verdict
                .body
                .rewards
                .iter()
                .map(|reward| reward.total)
                .collect();
        }
        self.archive
            .put_group(hash, &group.bytes)
            .map_err(Unusable::Disk)?;
        Ok(Candidate {
            ticket: lease.body.ticket.id,
            group: hash,
            worker: group.author,
            version: group.body.oldest_version(),
            rewards,
            audited: joined.body.audited,
            carried: group.body,
        })
    }
}

/// What is left to do about groups that were looked at.
#[derive(Default)]
struct Spent {
    fates: Vec<FateRecord>,
    deliveries: Vec<Delivery>,
}

impl Trainer {
    /// Takes groups of the ready queue, at most a chunk, and waits up to `wait` for the first; returns how many came.
    pub(super) async fn take_groups(&mut self, wait: Duration) -> Result<usize, TrainerError> {
        let deliveries = self.client.bus().take(Queue::Ready, CHUNK, wait).await?;
        let count = deliveries.len();
        if count == 0 {
            return Ok(0);
        }
        let payloads: Vec<Bytes> = deliveries.iter().map(|d| d.payload.clone()).collect();
        let opener = Arc::clone(&self.opener);
        let bytes = payloads.iter().map(Bytes::len).sum();
        let opening = off_loop_if_large(bytes, move || {
            let opened = payloads.iter().map(|payload| opener.open(payload));
            opened.collect::<Vec<_>>()
        });
        let opened = opening
            .await
            .map_err(|error| TrainerError::Announce(error.to_string()))?;
        let mut spent = Spent::default();
        for (delivery, opened) in deliveries.into_iter().zip(opened) {
            self.on_group(delivery, opened, &mut spent)?;
        }
        try_join_all(spent.fates.into_iter().map(|fate| self.append_fate(fate))).await?;
        join_all(spent.deliveries.iter().map(acknowledge)).await;
        Ok(count)
    }

    fn on_group(
        &mut self,
        delivery: Delivery,
        opened: Result<Candidate<Group>, Unusable>,
        spent: &mut Spent,
    ) -> Result<(), TrainerError> {
        let candidate = match opened {
            Ok(candidate) => candidate,
            Err(Unusable::Message(reason)) => {
                warn!(%reason, "a message of the ready queue cannot be used: it is dropped");
                spent.deliveries.push(delivery);
                return Ok(());
            }
            Err(Unusable::Disk(error)) => return Err(error.into()),
        };
        let ticket = candidate.ticket;
        if self.trained.get(&ticket) == Some(&candidate.group) {
            spent.deliveries.push(delivery); // in a manifest already: the kill came before the acknowledgement
            return Ok(());
        }
        if self.resolver.holds(ticket, candidate.group) {
            self.held.insert(ticket, delivery); // handed out again: a server that was killed forgot that we have it
            return Ok(());
        }
        self.drawn_tokens += drawn_tokens(&candidate.carried);
        match self.resolver.admit(candidate) {
            Ok(()) => {
                self.held.insert(ticket, delivery);
                return Ok(());
            }
            Err((Refusal::Duplicate { .. }, candidate))
                if self.record.ended().contains(&ticket) =>
            {
                // Its fate is in the log: either this group's own, before a kill, or another group's.
                info!(%ticket, group = %candidate.group.short(), "a group of an ended ticket");
            }
            Err((refusal, candidate)) => {
                let reason = refusal.to_string();
                let fate = fate_of(&candidate, refusal.fate(), reason, None);
                spent.fates.push(fate);
            }
        }
        spent.deliveries.push(delivery);
        Ok(())
    }
}

fn drawn_tokens(group: &Group) -> u64 {
    group
        .rollouts
        .iter()
        .map(|rollout| rollout.drawn().0.len() as u64)
        .sum()
}
