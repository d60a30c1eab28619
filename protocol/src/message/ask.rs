//! What members ask of dispatch and what it answers. Whatever is announced can also be asked for.

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use super::at_most;
use super::control::ControlState;
use super::lease::NumericClass;
use super::version::{Announcement, VersionRef};
use crate::envelope::{Invalid, Kind, Statement};
use crate::id::{GroupHash, LeaseId, PolicyVersion};
use crate::limits::{
    CARRIER_BYTES_MAX, HELD_VERSIONS_MAX, PEERS_MAX, SQUASHED_MAX, STATEMENT_BYTES_MAX,
};
use crate::subject::Verb;

/// Most receipts in one answer.
pub const RECEIPTS_MAX: usize = 64;

/// A question, signed by who asks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Ask {
    /// Something to answer.
    Lease {
        /// The newest version held.
        held: VersionRef,
        /// The arithmetic offered.
        class: NumericClass,
        /// Most rollouts that fit at once: as many leases are given as they hold.
        rollouts_max: u32,
    },
    /// A group for a lease.
    Submit {
        /// The lease as signed by dispatch.
        lease: ByteBuf,
        /// The group as signed by the worker.
        group: ByteBuf,
    },
    /// Groups to judge.
    Critique {
        /// Versions held.
        held: Vec<VersionRef>,
        /// The arithmetic that the judgement is made in.
        class: NumericClass,
        /// Most groups at once.
        groups_max: u32,
    },
    /// Judgements.
    Verdict {
        /// Verdicts as signed by the critic.
        verdicts: Vec<ByteBuf>,
    },
    /// A version, the newest when none is named.
    Latest {
        /// Which.
        version: Option<PolicyVersion>,
    },
    /// Who serves shards.
    Peers {
        /// The asker's own record, signed, if it serves.
        mine: Option<ByteBuf>,
    },
    /// What became of groups.
    Receipt {
        /// Whose leases.
        leases: Vec<LeaseId>,
    },
    /// What the run is doing.
    Control,
    /// What the run is.
    Descriptor,
    /// Squashed deltas: what leads over several versions at once, described by members.
    Deltas {
        /// Those from this version or a later one.
        from: PolicyVersion,
        /// One that the asker made, described and signed by it, so that others hear of it.
        mine: Option<ByteBuf>,
    },
}

impl Ask {
    /// The verb under which it is asked: a message on another verb's subject is refused.
    pub fn verb(&self) -> Verb {
        match self {
            Ask::Lease { .. } => Verb::Lease,
            Ask::Submit { .. } => Verb::Submit,
            Ask::Critique { .. } => Verb::Critique,
            Ask::Verdict { .. } => Verb::Verdict,
            Ask::Latest { .. } => Verb::Latest,
            Ask::Peers { .. } => Verb::Peers,
            Ask::Receipt { .. } => Verb::Receipt,
            Ask::Control => Verb::Control,
            Ask::Descriptor => Verb::Descriptor,
            Ask::Deltas { .. } => Verb::Deltas,
        }
    }
}

impl Statement for Ask {
    const KIND: Kind = Kind::Ask;
    const BYTES_MAX: usize = CARRIER_BYTES_MAX;

    fn validate(&self) -> Result<(), Invalid> {
        match self {
            Ask::Critique { held, .. } => at_most("held", held.len(), HELD_VERSIONS_MAX),
            Ask::Verdict { verdicts } => at_most("verdicts", verdicts.len(), LEASES_MAX),
            Ask::Receipt { leases } => at_most("leases", leases.len(), RECEIPTS_MAX),
            Ask::Deltas {
                mine: Some(mine), ..
            } if mine.len() > STATEMENT_BYTES_MAX => {
                let problem = format!(
                    "has {} bytes, at most {STATEMENT_BYTES_MAX} are allowed",
                    mine.len()
                );
                Err(Invalid::new("mine", problem))
            }
            _ => Ok(()),
        }
    }
}

/// Most leases, critique leases or verdicts in one message.
pub const LEASES_MAX: usize = 64;

/// Why there is nothing to do just now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WaitReason {
    /// Every open ticket is leased, or every group is with a critic.
    NothingOpen,
    /// The learner is behind: the bound on open tickets is reached.
    Backpressure,
    /// The version held is too old: fetch the newest.
    VersionTooOld,
    /// The run is paused.
    Paused,
    /// Dispatch is starting.
    Starting,
    /// Too many leases were dropped or rejected: a pause for this worker.
    CoolDown,
}

/// An answer, signed by dispatch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Reply {
    /// Signed leases.
    Leases(Vec<ByteBuf>),
    /// Signed critique leases.
    CritiqueLeases(Vec<ByteBuf>),
    /// Nothing just now.
    Wait {
        /// When to ask again.
        retry_ms: u64,
        /// Why.
        reason: WaitReason,
    },
    /// The group is durable; its receipt follows when its fate is known.
    Accepted {
        /// Its name.
        group: GroupHash,
    },
    /// The verdicts are recorded; the reasons of those that were not.
    Recorded {
        /// One sentence each.
        refused: Vec<String>,
    },
    /// An announced version, if there is such.
    Version(Option<Announcement>),
    /// Signed peer records.
    Peers(Vec<ByteBuf>),
    /// Signed fates of the leases asked for, where known.
    Receipts(Vec<ByteBuf>),
    /// The run's state.
    Control(ControlState),
    /// The signed descriptor.
    Descriptor(ByteBuf),
    /// The run is over.
    Finished,
    /// Not done, and why. Asking again changes nothing.
    Refused {
        /// One sentence with the numbers.
        reason: String,
    },
    /// Another protocol version is needed.
    UpgradeRequired {
        /// The versions served.
        served: Vec<u16>,
    },
    /// Signed descriptions of squashed deltas.
    Deltas(Vec<ByteBuf>),
}

impl Statement for Reply {
    const KIND: Kind = Kind::Reply;
    const BYTES_MAX: usize = CARRIER_BYTES_MAX + 4_096;

    fn validate(&self) -> Result<(), Invalid> {
        match self {
            Reply::Peers(peers) => at_most("peers", peers.len(), PEERS_MAX),
            Reply::Leases(leases) | Reply::CritiqueLeases(leases) => {
                at_most("leases", leases.len(), LEASES_MAX)
            }
            Reply::Receipts(receipts) => at_most("receipts", receipts.len(), RECEIPTS_MAX),
            Reply::Deltas(deltas) => at_most("deltas", deltas.len(), SQUASHED_MAX),
            _ => Ok(()),
        }
    }
}
