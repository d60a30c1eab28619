//! Groups on their way through critique: leased to critics, admitted, joined with verdicts.

use serde::{Deserialize, Serialize};

use super::{bytes_at_most, some_of};
use crate::envelope::{Invalid, Kind, Statement};
use crate::id::{PeerId, UnixMillis};
use crate::limits::{CARRIER_BYTES_MAX, GOLD_BYTES_MAX};

/// Most verdicts of one group.
pub(crate) const VERDICTS_MAX: usize = 16;

/// A group for a critic to judge. The gold answer travels here and never to a worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CritiqueLease {
    /// The signed lease that the group answers.
    #[serde(with = "serde_bytes")]
    pub lease: Vec<u8>,
    /// The signed group.
    #[serde(with = "serde_bytes")]
    pub group: Vec<u8>,
    pub critic: PeerId,
    pub prompt: String,
    pub gold: String,
    /// Whether the critic checks every position with a forward pass.
    pub audit: bool,
    /// When dispatch leases the group to another critic.
    pub deadline: UnixMillis,
}

impl Statement for CritiqueLease {
    const KIND: Kind = Kind::CritiqueLease;
    const BYTES_MAX: usize = CARRIER_BYTES_MAX;

    fn validate(&self) -> Result<(), Invalid> {
        bytes_at_most("gold", self.gold.len(), GOLD_BYTES_MAX)?;
        bytes_at_most("prompt", self.prompt.len(), GOLD_BYTES_MAX)
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
    /// Whether the group was drawn for an audit. The draw follows the worker's signature.
    pub audit: bool,
    pub admitted: UnixMillis,
}

impl Statement for Admitted {
    const KIND: Kind = Kind::Admitted;
    const BYTES_MAX: usize = CARRIER_BYTES_MAX;

    fn validate(&self) -> Result<(), Invalid> {
        Ok(())
    }
}

/// A group and the verdicts that accepted it: a message of the ready queue, for the trainer to resolve.
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
    /// Whether a critic checked every position with a forward pass.
    pub audited: bool,
}

impl Statement for Joined {
    const KIND: Kind = Kind::Joined;
    const BYTES_MAX: usize = CARRIER_BYTES_MAX;

    fn validate(&self) -> Result<(), Invalid> {
        some_of("verdicts", self.verdicts.len(), VERDICTS_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gold_text_over_its_bound_is_refused_with_its_bytes() {
        let mut lease = CritiqueLease {
            lease: Vec::new(),
            group: Vec::new(),
            critic: PeerId([0; 32]),
            prompt: String::new(),
            gold: "a".repeat(GOLD_BYTES_MAX),
            audit: false,
            deadline: UnixMillis(0),
        };
        assert_eq!(lease.validate(), Ok(()));
        lease.gold.push('a');
        assert_eq!(
            lease.validate().unwrap_err().to_string(),
            "gold has 65537 bytes, at most 65536 are allowed"
        );
    }
}
