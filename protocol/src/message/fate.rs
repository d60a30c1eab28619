//! How a ticket ended: a record of the fates log, a line of `selections.jsonl`, and the receipt of the group's author.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::short_text;
use crate::envelope::{Invalid, Kind, Statement};
use crate::id::{GroupHash, LeaseId, PeerId, PolicyVersion, TicketId};
use crate::limits::STATEMENT_BYTES_MAX;

/// How a ticket ended; `duplicate` ends only a group of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fate {
    Trained,
    /// A check failed.
    Rejected,
    /// The group was older than the async level when its turn came.
    Stale,
    /// All rewards are equal, so every advantage is zero.
    NoSignal,
    /// No worker answered before the ticket's deadline.
    Expired,
    /// The ticket is no longer needed: the run ended, or a new descriptor holds.
    Superseded,
    /// A second group for a ticket that had one. The ticket itself has another fate.
    Duplicate,
}

impl Fate {
    pub const ALL: [Fate; 7] = [
        Fate::Trained,
        Fate::Rejected,
        Fate::Stale,
        Fate::NoSignal,
        Fate::Expired,
        Fate::Superseded,
        Fate::Duplicate,
    ];

    /// Whether the ticket ended without being trained, so that dispatch may issue another in its place.
    pub fn frees_a_place(self) -> bool {
        !matches!(self, Fate::Trained | Fate::Duplicate)
    }
}

impl fmt::Display for Fate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Fate::Trained => "trained",
            Fate::Rejected => "rejected",
            Fate::Stale => "stale",
            Fate::NoSignal => "no_signal",
            Fate::Expired => "expired",
            Fate::Superseded => "superseded",
            Fate::Duplicate => "duplicate",
        })
    }
}

/// How a ticket ended, and which worker's group it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FateRecord {
    pub ticket: TicketId,
    /// `None` if the ticket ended without a group.
    pub group: Option<GroupHash>,
    pub lease: Option<LeaseId>,
    pub worker: Option<PeerId>,
    /// The version that the lease named.
    pub policy_version: Option<PolicyVersion>,
    pub fate: Fate,
    /// One sentence with the numbers.
    pub reason: String,
    /// Whether a critic checked every position with a forward pass.
    pub audited: bool,
    /// The step that trained on the group.
    pub step: Option<PolicyVersion>,
}

impl FateRecord {
    /// A fate without a group.
    pub fn new(ticket: TicketId, fate: Fate, reason: String) -> Self {
        Self {
            ticket,
            group: None,
            lease: None,
            worker: None,
            policy_version: None,
            fate,
            reason,
            audited: false,
            step: None,
        }
    }

    /// The record's key in the fates log. A ticket has one key, so that it gets one fate; each duplicate group has its own.
    pub fn key(&self) -> String {
        match self.fate {
            Fate::Duplicate => {
                let group = self.group.map_or_else(|| "none".to_owned(), |g| g.short());
                format!("d-{}-{group}", self.ticket)
            }
            _ => format!("f-{}", self.ticket),
        }
    }
}

impl Statement for FateRecord {
    const KIND: Kind = Kind::Fate;
    const BYTES_MAX: usize = STATEMENT_BYTES_MAX;

    fn validate(&self) -> Result<(), Invalid> {
        short_text("reason", &self.reason)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_has_one_key_and_each_duplicate_group_its_own() {
        let record = |fate, group| FateRecord {
            group,
            ..FateRecord::new(TicketId(7), fate, String::new())
        };
        let [one, two] = [1, 2].map(|n| Some(GroupHash([n; 32])));
        assert_eq!(record(Fate::Trained, one).key(), "f-7");
        assert_eq!(record(Fate::Rejected, two).key(), "f-7");
        assert_eq!(record(Fate::Duplicate, None).key(), "d-7-none");
        assert_ne!(
            record(Fate::Duplicate, one).key(),
            record(Fate::Duplicate, two).key()
        );
    }
}
