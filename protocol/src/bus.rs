//! The bus: what carries messages between processes. Two implementations, one conformance suite.
//!
//! Three ways to speak:
//! * **ask** — request and reply, for one answer now (leases, submissions);
//! * **news** — publish and subscribe, may be missed (whatever is announced can also be asked for);
//! * **durable** — work queues (each message to one reader, until acknowledged) and logs (appended, numbered).
//!
//! Only the lab's credentials reach the durable part: the server refuses volunteers there. The bus sees bytes, never
//! what they mean.

use std::fmt;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

use crate::subject::{Log, Queue, StreamLimits, Subject};

mod inbox;
pub mod memory;
pub mod nats;

/// How long a durable write, or a look at what is stored, waits for the server: a restart of a local server takes a
/// third of a second, a write to a busy disk less than one.
pub const DURABLE_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest key of a durable message: it travels in a header and is remembered for the duplicate window.
pub const KEY_BYTES_MAX: usize = 256;

/// Most messages handed out by one call of [`Bus::take`]: they are all in memory at once.
pub const TAKE_MESSAGES_MAX: usize = 1_024;

/// Why the bus did not do what was asked. Variants are what a caller can do about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// Nobody answered in time, or the server is away: try again.
    #[error("no answer on {subject} within {waited_ms} ms")]
    Timeout {
        /// What was asked or written.
        subject: String,
        /// How long.
        waited_ms: u64,
    },
    /// Nobody serves the subject now: try again later.
    #[error("nobody serves {subject}")]
    NoResponders {
        /// What was asked.
        subject: String,
    },
    /// These credentials may not do this: stop and say so.
    #[error("these credentials may not use {subject}: ask the run's lab for a role that may")]
    Denied {
        /// What was refused.
        subject: String,
    },
    /// The queue is at its bound: wait until readers catch up.
    #[error("queue {queue} is full")]
    Full {
        /// Which one.
        queue: String,
    },
    /// A message over the bound: never retry.
    #[error("message of {bytes} bytes is over the limit of {limit} bytes on {subject}")]
    TooLarge {
        /// Where.
        subject: String,
        /// Its size.
        bytes: usize,
        /// The bound.
        limit: usize,
    },
    /// Another writer appended first: this one has been fenced off and must stop.
    #[error("log {log} is at sequence {found}, not at {expected}: another writer holds it")]
    Fenced {
        /// Which log.
        log: String,
        /// What the writer believed.
        expected: u64,
        /// What the server holds.
        found: u64,
    },
    /// The connection is gone for good (refused credentials, closed client).
    #[error("{0}")]
    Closed(String),
    /// Anything else the server said.
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

/// Other bounds of the queues than [`Queue::limits`]: for tests, and for a machine that knows its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct QueueBounds {
    /// Most messages held.
    pub messages_max: Option<u64>,
    /// How long a message that was taken may stay unacknowledged.
    pub ack_wait: Option<Duration>,
}

impl QueueBounds {
    /// The bounds of `queue` with these in place of its own.
    pub(crate) fn of(self, queue: Queue) -> StreamLimits {
        let limits = queue.limits();
        StreamLimits {
            messages_max: self.messages_max.or(limits.messages_max),
            ack_wait: self.ack_wait.unwrap_or(limits.ack_wait),
            ..limits
        }
    }
}

/// Refuses what is over the bound before it is sent: the server would cut the connection of who sends it.
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

/// Refuses a key that a header cannot carry, and the empty one, which would identify nothing.
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

/// Says that a delivery was voided by [`Bus::reclaim`]: never retry its acknowledgement.
pub(crate) fn void_delivery(queue: Queue, sequence: u64) -> BusError {
    BusError::Server(format!(
        "message {sequence} of queue {} was reclaimed by another reader: this delivery of it is void",
        queue.token()
    ))
}

/// Whether a keyed message was new.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Enqueued {
    /// Stored under this sequence number.
    Stored(u64),
    /// A message with this key was stored before, under this number; nothing was stored.
    Duplicate(u64),
}

impl Enqueued {
    /// The number under which the message stands.
    pub fn sequence(self) -> u64 {
        match self {
            Self::Stored(sequence) | Self::Duplicate(sequence) => sequence,
        }
    }
}

/// What a queue or log holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StreamState {
    /// Messages held now (for a queue: not yet acknowledged).
    pub messages: u64,
    /// Number of the newest message ever stored, 0 if none.
    pub last_sequence: u64,
}

/// A record of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Its number, from 1.
    pub sequence: u64,
    /// Its bytes.
    pub payload: Bytes,
}

/// A message as heard by a subscriber.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct News {
    /// Where it was published.
    pub subject: Subject,
    /// Its bytes.
    pub payload: Bytes,
}

/// What a subscriber reads: bounded; when the reader is too slow the oldest news is lost, and counted by the bus.
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

/// A request that waits for its answer.
pub struct Request {
    /// Where it came in; its last token is the asker's user name, which the server has checked.
    pub subject: Subject,
    /// Its bytes.
    pub payload: Bytes,
    pub(crate) responder: Box<dyn Responder>,
}

impl Request {
    /// The user name of who asks.
    pub fn user(&self) -> &str {
        self.subject.as_str().rsplit('.').next().unwrap_or_default()
    }

    /// Answers. A lost answer is the asker's to notice: it asks again.
    pub async fn reply(self, payload: Bytes) {
        self.responder.reply(payload).await;
    }
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Request({}, {} bytes)", self.subject, self.payload.len())
    }
}

/// How an answer finds its way back.
#[async_trait]
pub(crate) trait Responder: Send + Sync {
    async fn reply(self: Box<Self>, payload: Bytes);
}

/// What a server of requests reads: bounded; when full, a request is dropped and its asker times out.
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

    /// The next request if it is here already.
    pub fn try_next(&mut self) -> Option<Request> {
        self.inbox.try_recv().ok()
    }
}

/// A message taken from a queue. Dropped without an acknowledgement it is handed out again after the queue's wait.
pub struct Delivery {
    /// Its bytes.
    pub payload: Bytes,
    /// Its number in the queue.
    pub sequence: u64,
    /// How often it was handed out, 1 for the first time.
    pub delivered: u64,
    pub(crate) acker: Box<dyn Acker>,
}

impl Delivery {
    /// Removes the message for good; returns when the server has confirmed it.
    ///
    /// # Errors
    /// When the server did not confirm: the message may come again.
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

    /// Renews the hold on the message for another wait.
    ///
    /// # Errors
    /// When the server did not hear it.
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

/// How a delivery is acknowledged.
#[async_trait]
pub(crate) trait Acker: Send + Sync {
    async fn ack(&self) -> Result<(), BusError>;
    async fn give_back(&self, delay: Duration) -> Result<(), BusError>;
    async fn renew(&self) -> Result<(), BusError>;
}

/// A connection to the bus under one member's credentials, for one run.
#[async_trait]
pub trait Bus: Send + Sync + fmt::Debug {
    /// The user name that the server knows this connection by.
    fn user(&self) -> &str;

    /// Tells everybody who listens.
    async fn publish(&self, subject: &Subject, payload: Bytes) -> Result<(), BusError>;

    /// Listens to a subject or pattern.
    async fn subscribe(&self, pattern: &Subject) -> Result<Subscription, BusError>;

    /// Asks and waits for the answer.
    async fn request(
        &self,
        subject: &Subject,
        payload: Bytes,
        timeout: Duration,
    ) -> Result<Bytes, BusError>;

    /// Serves requests on a pattern, together with every other process that serves it. A request whose reply address
    /// is not its asker's own inbox is dropped (an answer must not be published on somebody else's behalf).
    async fn serve(&self, pattern: &Subject) -> Result<Requests, BusError>;

    /// Makes the run's queues and logs where they do not exist yet. Idempotent.
    async fn create_streams(&self) -> Result<(), BusError>;

    /// Stores a message in a queue, once per key (within the queue's duplicate window). After [`BusError::Timeout`] it
    /// may or may not stand there: the same call again tells which.
    async fn enqueue(&self, queue: Queue, key: &str, payload: Bytes) -> Result<Enqueued, BusError>;

    /// Takes up to `max` messages (at most [`TAKE_MESSAGES_MAX`]), waiting up to `wait` for the first. Empty when none
    /// came.
    ///
    /// # Cancel safety
    /// Not cancel safe: what a cancelled call was handed comes again only after the queue's wait. Await it in a task of
    /// its own, never as an arm of a select.
    async fn take(
        &self,
        queue: Queue,
        max: usize,
        wait: Duration,
    ) -> Result<Vec<Delivery>, BusError>;

    /// Makes every message that was taken and not acknowledged available at once, and voids those deliveries: what a
    /// restarted reader does first.
    async fn reclaim(&self, queue: Queue) -> Result<(), BusError>;

    /// What a queue holds.
    async fn queue_state(&self, queue: Queue) -> Result<StreamState, BusError>;

    /// Appends to a log, once per key; refused as [`BusError::Fenced`] when `expected_last` is given and is not the
    /// number of the log's newest record.
    async fn append(
        &self,
        log: Log,
        key: &str,
        expected_last: Option<u64>,
        payload: Bytes,
    ) -> Result<Enqueued, BusError>;

    /// Up to `max` records after number `after`, in order. Empty when there are none; never waits for new ones.
    async fn read(&self, log: Log, after: u64, max: usize) -> Result<Vec<Record>, BusError>;

    /// The newest record of a log.
    async fn last(&self, log: Log) -> Result<Option<Record>, BusError>;

    /// Flushes what was published and closes the connection.
    async fn close(&self);
}

/// A shared connection.
pub type SharedBus = std::sync::Arc<dyn Bus>;
