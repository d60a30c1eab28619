//! The bus: it carries messages between processes. Two implementations pass one conformance suite.
//!
//! Three kinds of calls:
//! * **request and reply**, for leases and submissions;
//! * **news**: publish and subscribe. A subscriber may miss a message; whatever is announced can also be requested;
//! * **durable**: work queues (one reader per message, until acknowledged) and logs (append-only, numbered).
//!
//! The server refuses durable calls of volunteers. The bus sees bytes and does not decode them.

use std::fmt;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

use crate::subject::{Log, Queue, StreamLimits, Subject};

mod inbox;
pub mod memory;
pub mod nats;

/// How long a durable call waits for the server. A restart of a local server takes a third of a second, a write to a busy
/// disk less than one.
pub(crate) const DURABLE_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest key of a durable message. It travels in a header, and the server remembers it for the duplicate window.
pub(crate) const KEY_BYTES_MAX: usize = 256;

/// Most messages of one call of [`Bus::take`]: all of them are in memory at once.
pub(crate) const TAKE_MESSAGES_MAX: usize = 1_024;

/// Why a call of the bus failed. Each variant tells the caller what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// Try again: no reply came in time, or the server is away.
    #[error("no answer on {subject} within {waited_ms} ms")]
    Timeout { subject: String, waited_ms: u64 },
    /// Try again later: no process serves the subject now.
    #[error("no process serves {subject}")]
    NoResponders { subject: String },
    /// Stop: the credentials do not permit the call.
    #[error("these credentials may not use {subject}: ask the run's lab for a role that may")]
    Denied { subject: String },
    /// Wait until readers catch up.
    #[error("queue {queue} is full")]
    Full { queue: String },
    /// Do not retry: the same message fails again.
    #[error("message of {bytes} bytes is over the limit of {limit} bytes on {subject}")]
    TooLarge {
        subject: String,
        bytes: usize,
        limit: usize,
    },
    /// Stop: another writer appended first, so this one is fenced off.
    #[error("log {log} is at sequence {found}, not at {expected}: another writer holds it")]
    Fenced {
        log: String,
        /// The newest record that the writer knew.
        expected: u64,
        /// The newest record of the log.
        found: u64,
    },
    /// The connection has ended for good: refused credentials, or a closed client.
    #[error("{0}")]
    Closed(String),
    /// Any other error of the server.
    #[error("{0}")]
    Server(String),
}

impl BusError {
    /// Whether the same call may succeed later.
    pub fn is_transient(&self) -> bool {
        matches!(
            self,
            Self::Timeout { .. } | Self::NoResponders { .. } | Self::Full { .. }
        )
    }
}

/// Overrides of a queue's limits, [`Queue::limits`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct QueueBounds {
    pub messages_max: Option<u64>,
    pub ack_wait: Option<Duration>,
}

impl QueueBounds {
    /// The limits of `queue` with these overrides.
    pub(crate) fn of(self, queue: Queue) -> StreamLimits {
        let limits = queue.limits();
        StreamLimits {
            messages_max: self.messages_max.or(limits.messages_max),
            ack_wait: self.ack_wait.unwrap_or(limits.ack_wait),
            ..limits
        }
    }
}

/// Refuses a message over the bound before it is sent: the server would disconnect the sender.
pub(crate) fn check_size(subject: &str, payload: &Bytes, limit: usize) -> Result<(), BusError> {
    if payload.len() > limit {
        return Err(BusError::TooLarge {
            subject: subject.to_owned(),
            bytes: payload.len(),
            limit,
        });
    }
    Ok(())
}

/// Refuses a key that a header cannot carry, and the empty key.
pub(crate) fn check_key(key: &str) -> Result<(), BusError> {
    if key.is_empty()
        || key.len() > KEY_BYTES_MAX
        || !key.bytes().all(|byte| byte.is_ascii_graphic())
    {
        let shown: String = key.chars().take(64).collect();
        return Err(BusError::Server(format!(
            "key `{}` is not 1 to {KEY_BYTES_MAX} visible ASCII characters: choose such a key",
            shown.escape_debug()
        )));
    }
    Ok(())
}

/// The error for a delivery that [`Bus::reclaim`] has voided. Retrying its acknowledgement does not help.
pub(crate) fn void_delivery(queue: Queue, sequence: u64) -> BusError {
    BusError::Server(format!(
        "message {sequence} of queue {} was reclaimed by another reader: this delivery is void",
        queue.token()
    ))
}

/// Whether a keyed message was stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Enqueued {
    /// Under this sequence number.
    Stored(u64),
    /// An earlier message with this key has this sequence number; nothing was stored.
    Duplicate(u64),
}

impl Enqueued {
    /// The sequence number of the message with the key.
    pub fn sequence(self) -> u64 {
        match self {
            Self::Stored(sequence) | Self::Duplicate(sequence) => sequence,
        }
    }
}

/// The content of a queue or log in numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StreamState {
    /// Messages held now; in a queue, those not yet acknowledged.
    pub messages: u64,
    /// Number of the newest message ever stored, 0 if none.
    pub last_sequence: u64,
}

/// A record of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Counted from 1.
    pub sequence: u64,
    pub payload: Bytes,
}

/// A message to a subscriber.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct News {
    pub subject: Subject,
    pub payload: Bytes,
}

/// A subscriber's inbox. It is bounded: when the reader is too slow the bus drops the oldest message, and counts it.
#[derive(Debug)]
pub struct Subscription {
    pub(crate) inbox: inbox::Reader<News>,
}

impl Subscription {
    /// The next message, `None` when the bus is closed.
    ///
    /// # Cancel safety
    /// A cancelled call loses nothing.
    pub async fn next(&mut self) -> Option<News> {
        self.inbox.next().await
    }
}

/// A request that waits for its reply.
pub struct Request {
    /// Its last token is the sender's user name, which the server has checked.
    pub subject: Subject,
    pub payload: Bytes,
    pub(crate) responder: Box<dyn Responder>,
}

impl Request {
    /// The sender's user name.
    pub fn user(&self) -> &str {
        self.subject.as_str().rsplit('.').next().unwrap_or_default()
    }

    /// Replies. The sender notices a lost reply and repeats its request.
    pub async fn reply(self, payload: Bytes) {
        self.responder.reply(payload).await;
    }
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Request({}, {} bytes)", self.subject, self.payload.len())
    }
}

#[async_trait]
pub(crate) trait Responder: Send + Sync {
    async fn reply(self: Box<Self>, payload: Bytes);
}

/// The inbox of a server of requests. It is bounded: when it is full the bus drops the request, which times out.
#[derive(Debug)]
pub struct Requests {
    pub(crate) inbox: tokio::sync::mpsc::Receiver<Request>,
}

impl Requests {
    /// The next request, `None` when the bus is closed.
    ///
    /// # Cancel safety
    /// A cancelled call loses nothing.
    pub async fn next(&mut self) -> Option<Request> {
        self.inbox.recv().await
    }

    /// The next request, if it has arrived.
    pub fn try_next(&mut self) -> Option<Request> {
        self.inbox.try_recv().ok()
    }
}

/// A message taken from a queue. Without an acknowledgement it is delivered again after the queue's wait.
pub struct Delivery {
    pub payload: Bytes,
    pub sequence: u64,
    /// Number of deliveries, 1 for the first.
    pub delivered: u64,
    pub(crate) acker: Box<dyn Acker>,
}

impl Delivery {
    /// Removes the message for good and waits until the server has confirmed it.
    ///
    /// # Errors
    /// When the server did not confirm: the message may be delivered again.
    pub async fn ack(&self) -> Result<(), BusError> {
        self.acker.ack().await
    }

    /// Gives the message back, to be handed out again after `delay`.
    ///
    /// # Errors
    /// When the server did not hear it: the message comes again after the queue's wait.
    pub async fn give_back(&self, delay: Duration) -> Result<(), BusError> {
        self.acker.give_back(delay).await
    }

    /// Holds the message for another wait.
    ///
    /// # Errors
    /// When the server did not confirm: the message may be delivered again.
    pub async fn renew(&self) -> Result<(), BusError> {
        self.acker.renew().await
    }
}

impl fmt::Debug for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Delivery({}, {} bytes)",
            self.sequence,
            self.payload.len()
        )
    }
}

#[async_trait]
pub(crate) trait Acker: Send + Sync {
    async fn ack(&self) -> Result<(), BusError>;
    async fn give_back(&self, delay: Duration) -> Result<(), BusError>;
    async fn renew(&self) -> Result<(), BusError>;
}

/// A connection to the bus under one member's credentials, for one run.
#[async_trait]
pub trait Bus: Send + Sync + fmt::Debug {
    /// The user name of this connection.
    fn user(&self) -> &str;

    /// Sends a message to every current subscriber.
    async fn publish(&self, subject: &Subject, payload: Bytes) -> Result<(), BusError>;

    /// Subscribes to a subject or pattern.
    async fn subscribe(&self, pattern: &Subject) -> Result<Subscription, BusError>;

    /// Sends a request and waits for the reply.
    async fn request(
        &self,
        subject: &Subject,
        payload: Bytes,
        timeout: Duration,
    ) -> Result<Bytes, BusError>;

    /// Serves requests on a pattern; every process that serves it takes a share. The bus drops a request whose reply address
    /// is not the sender's own inbox: a reply would reach a subject that the sender may not write to.
    async fn serve(&self, pattern: &Subject) -> Result<Requests, BusError>;

    /// Creates the run's queues and logs that do not exist yet. Idempotent.
    async fn create_streams(&self) -> Result<(), BusError>;

    /// Stores a message in a queue, once per key within the queue's duplicate window. After [`BusError::Timeout`] the message
    /// may be stored or not; the same call again tells which.
    async fn enqueue(&self, queue: Queue, key: &str, payload: Bytes) -> Result<Enqueued, BusError>;

    /// Takes up to `max` messages (at most [`TAKE_MESSAGES_MAX`]), waiting up to `wait` for the first. Empty if none came.
    ///
    /// # Cancel safety
    /// Not cancel safe: the messages of a cancelled call are delivered again only after the queue's wait. Await it in a task of
    /// its own, never as an arm of a select.
    async fn take(
        &self,
        queue: Queue,
        max: usize,
        wait: Duration,
    ) -> Result<Vec<Delivery>, BusError>;

    /// Makes every unacknowledged message available at once and voids its deliveries. A restarted reader calls this first.
    async fn reclaim(&self, queue: Queue) -> Result<(), BusError>;

    async fn queue_state(&self, queue: Queue) -> Result<StreamState, BusError>;

    /// Appends to a log, once per key. Fails with [`BusError::Fenced`] if `expected_last` is given and is not the number of the
    /// log's newest record.
    async fn append(
        &self,
        log: Log,
        key: &str,
        expected_last: Option<u64>,
        payload: Bytes,
    ) -> Result<Enqueued, BusError>;

    /// Up to `max` records after number `after`, in order. Never waits for new ones.
    async fn read(&self, log: Log, after: u64, max: usize) -> Result<Vec<Record>, BusError>;

    /// The newest record of a log.
    async fn last(&self, log: Log) -> Result<Option<Record>, BusError>;

    /// Sends what is still buffered and closes the connection.
    async fn close(&self);
}

/// A shared connection.
pub type SharedBus = std::sync::Arc<dyn Bus>;
