//! What critics are given to judge, and what dispatch keeps between the steps of judging.

use serde::{Deserialize, Serialize};

use super::at_most;
use crate::envelope::{Invalid, Kind, Statement};
use crate::id::{PeerId, UnixMillis};
use crate::limits::{CARRIER_BYTES_MAX, GOLD_BYTES_MAX};

/// Most verdicts that a group is joined with.
pub const VERDICTS_MAX: usize = 16;

/// A group to judge. The gold answer travels here and never to a worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CritiqueLease {
    /// The signed lease that the group answers.
    #[serde(with = "serde_bytes")]
    pub lease: Vec<u8>,
    /// The signed group.
    #[serde(with = "serde_bytes")]
    pub group: Vec<u8>,
    /// Who may judge.
    pub critic: PeerId,
    /// The prompt as text.
    pub prompt: String,
    /// What the answer is compared with.
    pub gold: String,
    /// Whether every position is to be re-checked by a forward pass.
    pub audit: bool,
    /// When dispatch gives the group to somebody else.
    pub deadline: UnixMillis,
}

impl Statement for CritiqueLease {
    const KIND: Kind = Kind::CritiqueLease;
    const BYTES_MAX: usize = CARRIER_BYTES_MAX;

    fn validate(&self) -> Result<(), Invalid> {
        at_most("gold", self.gold.len(), GOLD_BYTES_MAX)?;
        at_most("prompt", self.prompt.len(), GOLD_BYTES_MAX)
    }
}

/// A group that dispatch admitted, with the lease that it answers: a message of the intake queue.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Admitted {
    /// The signed lease.
    #[serde(with = "serde_bytes")]
    pub lease: Vec<u8>,
    /// The signed group.
    #[serde(with = "serde_bytes")]
    pub group: Vec<u8>,
    /// Whether the group was drawn for an audit. Drawn after the group was signed.
    pub audit: bool,
    /// When it came.
    pub admitted: UnixMillis,
}

impl Statement for Admitted {
    const KIND: Kind = Kind::Admitted;
    const BYTES_MAX: usize = CARRIER_BYTES_MAX;

    fn validate(&self) -> Result<(), Invalid> {
        Ok(())
    }
}

/// A group and the verdicts that accepted it: a message of the ready queue, what the trainer resolves.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Joined {
    /// The signed lease.
    #[serde(with = "serde_bytes")]
    pub lease: Vec<u8>,
    /// The signed group.
    #[serde(with = "serde_bytes")]
    pub group: Vec<u8>,
    /// The signed verdicts that agree.
    pub verdicts: Vec<serde_bytes::ByteBuf>,
    /// Whether a forward pass checked every position.
    pub audited: bool,
}

impl Statement for Joined {
    const KIND: Kind = Kind::Joined;
    const BYTES_MAX: usize = CARRIER_BYTES_MAX;

    fn validate(&self) -> Result<(), Invalid> {
        super::some_of("verdicts", self.verdicts.len(), VERDICTS_MAX)
    }
}
