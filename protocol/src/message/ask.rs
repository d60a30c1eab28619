//! Requests of members to dispatch and its replies. Whatever is announced can also be requested.

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use super::control::ControlState;
use super::lease::NumericClass;
use super::version::{Announcement, VersionRef};
use super::{at_most, bytes_at_most};
use crate::envelope::{Invalid, Kind, Statement};
use crate::id::{GroupHash, LeaseId, PolicyVersion};
use crate::limits::{
    CARRIER_BYTES_MAX, HELD_VERSIONS_MAX, PEERS_MAX, SQUASHED_MAX, STATEMENT_BYTES_MAX,
};
use crate::subject::Verb;

/// Most receipts in one reply.
pub(crate) const RECEIPTS_MAX: usize = 64;

/// A request, signed by its sender.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Ask {
    Lease {
        /// The newest version that the worker holds.
        held: VersionRef,
        class: NumericClass,
        /// Most rollouts that fit at once. Dispatch grants as many leases as fit.
        rollouts_max: u32,
    },
    /// Submits a group for a lease.
    Submit {
        /// Signed by dispatch.
        lease: ByteBuf,
        /// Signed by the worker.
        group: ByteBuf,
    },
    /// Requests groups to critique.
    Critique {
        /// The versions that the critic holds.
        held: Vec<VersionRef>,
        /// The arithmetic that the critic computes in.
        class: NumericClass,
        groups_max: u32,
    },
    Verdict {
        /// Signed by the critic.
        verdicts: Vec<ByteBuf>,
    },
    /// Requests an announced version.
    Latest {
        /// `None`: the newest.
        version: Option<PolicyVersion>,
    },
    /// Requests the peers that serve shards.
    Peers {
        /// The sender's own signed record, if it serves shards.
        mine: Option<ByteBuf>,
    },
    /// Requests the fates of groups.
    Receipt {
        /// The leases that the groups answer.
        leases: Vec<LeaseId>,
    },
    /// Requests the run's state.
    Control,
    /// Requests the run's descriptor.
    Descriptor,
    /// Requests squashed deltas, each of which leads over several versions. Members make and describe them.
    Deltas {
        /// Deltas that start at this version or later.
        from: PolicyVersion,
        /// A delta that the sender made, described and signed by it, for dispatch to pass on.
        mine: Option<ByteBuf>,
    },
}

impl Ask {
    /// The verb of its subject. Dispatch refuses a request on another verb's subject.
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
            } => bytes_at_most("mine", mine.len(), STATEMENT_BYTES_MAX),
            _ => Ok(()),
        }
    }
}

/// Most leases, critique leases or verdicts in one message.
pub const LEASES_MAX: usize = 64;

/// Why dispatch has nothing for the sender now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WaitReason {
    /// Every open ticket is leased, or every group is with a critic.
    NothingOpen,
    /// The learner is behind: the bound on open tickets is reached.
    Backpressure,
    /// The version that the sender holds is too old: it fetches the newest.
    VersionTooOld,
    Paused,
    Starting,
    /// The worker pauses because too many of its leases were dropped or rejected.
    CoolDown,
}

/// A reply, signed by dispatch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Reply {
    /// Leases, each signed by dispatch.
    Leases(Vec<ByteBuf>),
    /// Critique leases, each signed by dispatch.
    CritiqueLeases(Vec<ByteBuf>),
    /// Nothing to do now.
    Wait {
        /// How long to wait before the next request.
        retry_ms: u64,
        reason: WaitReason,
    },
    /// The group is durable; its receipt follows when its fate is known.
    Accepted {
        group: GroupHash,
    },
    /// The other verdicts are recorded.
    Recorded {
        /// A reason for each verdict that was refused.
        refused: Vec<String>,
    },
    /// The announced version, `None` if no such version was announced.
    Version(Option<Announcement>),
    /// Signed peer records.
    Peers(Vec<ByteBuf>),
    /// Signed fates of the requested leases, as far as they are known.
    Receipts(Vec<ByteBuf>),
    Control(ControlState),
    /// The signed descriptor.
    Descriptor(ByteBuf),
    /// The run has ended.
    Finished,
    /// The request was refused. Repeating it does not help.
    Refused {
        /// One sentence with the numbers.
        reason: String,
    },
    /// The sender's protocol version is not served.
    UpgradeRequired {
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
