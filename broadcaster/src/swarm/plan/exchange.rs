//! What goes into a plan and what comes out of it.

use muster_protocol::id::PeerId;

use crate::store::bitmap::Bitmap;
use crate::transport::wire::{Chooser, RequestId};

/// What a peer answers, as the plan sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeerReply {
    /// Which shards it holds.
    Held {
        /// What it answers.
        request: RequestId,
        /// The bitmap as received.
        shards: Vec<u8>,
        /// How it wants to be asked.
        chooser: Chooser,
    },
    /// A shard, looked at already.
    Shard {
        /// What it answers.
        request: RequestId,
        /// Its number.
        shard: u32,
        /// What it turned out to be.
        verdict: ShardVerdict,
    },
    /// It does not hold that.
    Missing {
        /// What it answers.
        request: RequestId,
    },
    /// Not now.
    Busy {
        /// What it answers.
        request: RequestId,
        /// When to ask again.
        retry_ms: u32,
        /// Who has it.
        holders: Vec<PeerId>,
    },
}

/// From whom missing shards may come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Availability {
    /// Peers that say they hold some, or were asked for some.
    Holders,
    /// Peers that have only what is here, and may come by more.
    Fetchers,
    /// Nobody.
    Nobody,
}

/// What became of a shard that arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShardVerdict {
    /// Verified, or held already.
    Good,
    /// Not the bytes described.
    Bad,
}

/// What the plan wants done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Send this request.
    PeerRequest {
        /// To whom.
        source: PeerId,
        /// Its number.
        request: RequestId,
        /// What to ask.
        ask: PeerRequest,
    },
    /// End the connection; the plan has forgotten the peer already.
    Drop {
        /// With whom.
        source: PeerId,
        /// Why.
        fault: Fault,
    },
}

/// A request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeerRequest {
    /// Which shards do you hold?
    Have,
    /// This one, please.
    Shard(u32),
    /// Any but these, please.
    AnyBut(Bitmap),
}

/// What a peer did wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// It is banned for it.
    #[error("served a bad shard {shard}")]
    BadShard {
        /// Which.
        shard: u32,
    },
    /// It may be tried again later.
    #[error("did not answer within {waited_ms} ms")]
    Slow {
        /// How long it was waited for.
        waited_ms: u64,
    },
    /// It may be tried again later.
    #[error("broke the protocol: {problem}")]
    Protocol {
        /// How.
        problem: &'static str,
    },
}

impl PeerReply {
    /// The request that it answers.
    pub fn request(&self) -> RequestId {
        match self {
            PeerReply::Held { request, .. }
            | PeerReply::Shard { request, .. }
            | PeerReply::Missing { request }
            | PeerReply::Busy { request, .. } => *request,
        }
    }
}
