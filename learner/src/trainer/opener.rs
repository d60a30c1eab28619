//! Opens joined groups: checks every signature and stores the group's body.

use bytes::Bytes;

use muster_protocol::credentials::Roster;
use muster_protocol::envelope::{EnvelopeError, Signed, open};
use muster_protocol::id::{GroupHash, PeerId, RunId};
use muster_protocol::message::critique::Joined;
use muster_protocol::message::fate::{Fate, FateRecord};
use muster_protocol::message::group::Group;
use muster_protocol::message::lease::Lease;
use muster_protocol::message::verdict::{Decision, Verdict};
use muster_protocol::subject::Role;

use super::archive::{Archive, ArchiveError};
use crate::resolver::Candidate;

/// Opens messages of the ready queue.
pub(super) struct Opener {
    pub(super) run: RunId,
    pub(super) dispatch: PeerId,
    pub(super) roster: Roster,
    pub(super) archive: Archive,
}

/// Why a message of the ready queue was not taken in.
pub(super) enum Unusable {
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
    pub(super) fn open(&self, payload: &Bytes) -> Result<Candidate<Group>, Unusable> {
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
