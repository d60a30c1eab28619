//! The inputs and outputs of the download scheduler.

use muster_protocol::id::PeerId;

use crate::store::bitmap::Bitmap;
use crate::transport::wire::{Chooser, RequestId};

/// A peer's reply to a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeerReply {
    /// The shards that it holds.
    Held {
        request: RequestId,
        /// A bitmap as received, not checked yet.
        shards: Vec<u8>,
        /// How to request them.
        chooser: Chooser,
    },
    /// A shard, already checked.
    Shard {
        request: RequestId,
        shard: u32,
        verdict: ShardVerdict,
    },
    /// It does not hold the shard.
    Missing { request: RequestId },
    /// It does not send the shard now.
    Busy {
        request: RequestId,
        /// When to ask again, from now.
        retry_ms: u32,
        /// Peers that have the shard.
        holders: Vec<PeerId>,
    },
}

/// Which peers may bring the missing shards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Availability {
    /// Peers that claim to hold some, or have a request for some.
    Holders,
    /// Peers that hold nothing that is missing here, and may receive more.
    Fetchers,
    /// No connected peer.
    Nowhere,
}

/// Whether a shard that arrived is what its description says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShardVerdict {
    /// It matches its hash.
    Good,
    /// It does not match its hash.
    Bad,
}

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Send a request.
    Send {
        peer: PeerId,
        id: RequestId,
        request: PeerRequest,
    },
    /// End the connection; the scheduler has removed the peer already.
    Disconnect { peer: PeerId, fault: Fault },
}

/// A request to a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeerRequest {
    /// Which shards do you hold?
    Have,
    /// Send this shard.
    Shard(u32),
    /// Send any shard except these.
    AnyBut(Bitmap),
}

/// Why a peer is dropped.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The peer is banned.
    #[error("served a bad shard {shard}")]
    BadShard { shard: u32 },
    /// The peer may be tried again later.
    #[error("did not answer within {waited_ms} ms")]
    Slow { waited_ms: u64 },
    /// The peer may be tried again later.
    #[error("broke the protocol: {problem}")]
    Protocol { problem: &'static str },
}

impl PeerReply {
    /// The request that this replies to.
    pub fn request(&self) -> RequestId {
        match self {
            PeerReply::Held { request, .. }
            | PeerReply::Shard { request, .. }
            | PeerReply::Missing { request }
            | PeerReply::Busy { request, .. } => *request,
        }
    }
}
