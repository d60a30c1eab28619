//! A request on its last hop in memory: which inbox its reply goes to, and how the server of the request replies.
//! Knows nothing of the bus's state: a reply goes to a [`ReplySink`].

use std::sync::{Arc, Weak};

use async_trait::async_trait;
use bytes::Bytes;

use crate::bus::{Responder, check_size};
use crate::limits::PAYLOAD_BYTES_MAX;
use crate::subject::{Subject, Subjects};

/// One connection of a member.
pub(super) type ConnectionId = u64;

/// Where a reply goes.
#[derive(Clone)]
pub(super) enum ReplyTo {
    /// To the open request with this number, in the inbox of `user`.
    Request { number: u64, user: Arc<str> },
    /// To an address that the sender of the request chose.
    Address(Subject),
}

/// A request that has arrived.
pub(super) struct ArrivedRequest {
    pub(super) subject: Subject,
    pub(super) payload: Bytes,
    pub(super) reply_to: ReplyTo,
    pub(super) hash: blake3::Hash,
}

impl ArrivedRequest {
    /// Whether the reply goes to the inbox of the user named in the subject.
    pub(super) fn replies_to_own_inbox(&self) -> bool {
        let sender = self.subject.as_str().rsplit('.').next().unwrap_or_default();
        match &self.reply_to {
            ReplyTo::Request { user, .. } => &**user == sender,
            ReplyTo::Address(address) => Subjects::is_inbox_of(sender, address.as_str()),
        }
    }
}

/// Takes replies of servers to the network.
pub(super) trait ReplySink: Send + Sync {
    /// Sends the reply that the server on `from` gives.
    fn send_reply(&self, from: ConnectionId, reply_to: &ReplyTo, payload: Bytes);
}

/// Replies to one request.
pub(super) struct MemoryResponder {
    /// Gone only when every connection is gone, the server's own included.
    pub(super) sink: Weak<dyn ReplySink>,
    pub(super) connection: ConnectionId,
    pub(super) subject: Subject,
    pub(super) reply_to: ReplyTo,
}

#[async_trait]
impl Responder for MemoryResponder {
    async fn reply(self: Box<Self>, payload: Bytes) {
        if let Err(error) = check_size(self.subject.as_str(), &payload, PAYLOAD_BYTES_MAX) {
            tracing::error!(%error, "reply not sent");
            return;
        }
        if let Some(sink) = self.sink.upgrade() {
            sink.send_reply(self.connection, &self.reply_to, payload);
        }
    }
}
