//! The addresses at which a peer serves shards. The peer signs them, so that no peer can direct traffic to another's address.

use serde::{Deserialize, Serialize};

use super::{at_most, short_text};
use crate::envelope::{Invalid, Kind, Statement};
use crate::id::{PeerId, UnixMillis};
use crate::limits::STATEMENT_BYTES_MAX;

/// Most addresses of one peer.
pub(crate) const ADDRESSES_MAX: usize = 8;

/// A peer's own record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerRecord {
    /// The public key that the peer proves in its handshake.
    pub handshake: PeerId,
    /// `host:port`, best first. Empty if the peer cannot be dialled.
    pub addresses: Vec<String>,
    /// A newer record replaces an older one.
    pub issued: UnixMillis,
}

impl Statement for PeerRecord {
    const KIND: Kind = Kind::Peer;
    const BYTES_MAX: usize = STATEMENT_BYTES_MAX;

    fn validate(&self) -> Result<(), Invalid> {
        at_most("addresses", self.addresses.len(), ADDRESSES_MAX)?;
        self.addresses
            .iter()
            .try_for_each(|address| short_text("addresses", address))
    }
}
