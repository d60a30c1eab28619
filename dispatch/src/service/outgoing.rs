//! Messages that leave dispatch's hands: decisions on their way to a queue or a log, and acknowledgements.

use bytes::Bytes;
use futures_util::future::join_all;
use tracing::debug;

use muster_protocol::bus::{BusError, Delivery, Enqueued, SharedBus};
use muster_protocol::id::TicketId;
use muster_protocol::subject::{Log, Queue};

/// A decision on its way to a queue or a log.
pub(super) enum Outgoing {
    /// A judged group goes to the trainer.
    Ready { ticket: TicketId, joined: Bytes },
    /// A fate or a member's fault goes to a log.
    Append {
        log: Log,
        key: String,
        record: Bytes,
    },
}

impl Outgoing {
    pub(super) async fn write(&self, bus: &SharedBus) -> Result<Enqueued, BusError> {
        match self {
            Self::Ready { ticket, joined } => {
                bus.enqueue(Queue::Ready, &format!("r-{ticket}"), joined.clone())
                    .await
            }
            Self::Append { log, key, record } => bus.append(*log, key, None, record.clone()).await,
        }
    }
}

/// Acknowledges all at once; returns those that were confirmed. What is not confirmed comes again, and is recognised then.
pub(super) async fn acknowledged<'a, T>(held: impl Iterator<Item = (T, &'a Delivery)>) -> Vec<T> {
    let acknowledging = held.map(|(name, delivery)| async move {
        match delivery.ack().await {
            Ok(()) => Some(name),
            Err(error) => {
                debug!(%error, "an acknowledgement was not confirmed");
                None
            }
        }
    });
    join_all(acknowledging)
        .await
        .into_iter()
        .flatten()
        .collect()
}
