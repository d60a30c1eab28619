//! Acknowledges a message taken from a queue over NATS. The server confirms every acknowledgement, since a lost one would
//! bring the message back.

use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::{AckKind, Message};
use async_trait::async_trait;

use super::streams::Streams;
use crate::bus::{Acker, BusError, DURABLE_TIMEOUT, void_delivery};
use crate::subject::Queue;

/// Acknowledges one delivery.
pub(super) struct NatsAcker {
    streams: Arc<Streams>,
    queue: Queue,
    address: String,
    reader: String,
    pub(super) sequence: u64,
    pub(super) delivered: u64,
}

impl NatsAcker {
    pub(super) fn new(
        streams: Arc<Streams>,
        queue: Queue,
        message: &Message,
    ) -> Result<Self, BusError> {
        let info = message.info().map_err(|error| {
            BusError::Server(format!(
                "a delivery of queue {} cannot be read ({error}): is the server a nats-server 2.11 or newer?",
                queue.token()
            ))
        })?;
        let (reader, sequence) = (info.consumer.to_owned(), info.stream_sequence);
        let delivered = u64::try_from(info.delivered).unwrap_or_default();
        let address = message
            .reply
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default();
        Ok(Self {
            streams,
            queue,
            address,
            reader,
            sequence,
            delivered,
        })
    }

    async fn settle(&self, kind: AckKind) -> Result<(), BusError> {
        match self.streams.settle(&self.address, kind.into()).await {
            Err(BusError::NoResponders { subject }) => {
                // The address of this acknowledgement is gone: the reader was replaced, or the server is starting.
                if self.streams.has_reader(self.queue, &self.reader).await? {
                    let waited_ms = DURABLE_TIMEOUT.as_millis() as u64;
                    return Err(BusError::Timeout { subject, waited_ms });
                }
                Err(void_delivery(self.queue, self.sequence))
            }
            settled => settled,
        }
    }
}

#[async_trait]
impl Acker for NatsAcker {
    async fn ack(&self) -> Result<(), BusError> {
        self.settle(AckKind::Ack).await
    }

    async fn give_back(&self, delay: Duration) -> Result<(), BusError> {
        self.settle(AckKind::Nak((!delay.is_zero()).then_some(delay)))
            .await
    }

    async fn renew(&self) -> Result<(), BusError> {
        self.settle(AckKind::Progress).await
    }
}
