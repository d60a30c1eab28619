//! A request in memory on its last way: whose inbox its answer goes to, and the answer.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

use super::Shared;
use super::core::{ConnectionId, ReplyTo};
use crate::bus::{Responder, check_size};
use crate::limits::PAYLOAD_BYTES_MAX;
use crate::subject::{Subject, Subjects};

/// A request that has arrived.
pub(super) struct Asked {
    pub(super) subject: Subject,
    pub(super) payload: Bytes,
    pub(super) reply_to: ReplyTo,
    pub(super) hash: blake3::Hash,
}

impl Asked {
    /// Whether the answer goes to the inbox of who stands in the subject.
    pub(super) fn is_from_own_inbox(&self) -> bool {
        let asker = self.subject.as_str().rsplit('.').next().unwrap_or_default();
        match &self.reply_to {
            ReplyTo::Ask { user, .. } => &**user == asker,
            ReplyTo::Address(address) => Subjects::is_inbox_of(asker, address.as_str()),
        }
    }
}

/// Answers one request.
pub(super) struct MemoryResponder {
    pub(super) shared: Arc<Shared>,
    pub(super) connection: ConnectionId,
    pub(super) subject: Subject,
    pub(super) reply_to: ReplyTo,
}

#[async_trait]
impl Responder for MemoryResponder {
    async fn reply(self: Box<Self>, payload: Bytes) {
        if let Err(error) = check_size(self.subject.as_str(), &payload, PAYLOAD_BYTES_MAX) {
            tracing::error!(%error, "answer not sent");
            return;
        }
        self.shared.with_core(|core, now| {
            if core.reaches(self.connection) {
                core.answer(&self.reply_to, &Ok(payload), now);
            } else {
                core.counters.lost += 1;
            }
        });
    }
}
