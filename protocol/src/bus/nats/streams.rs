//! Queues and logs as JetStream streams: creating them, writing to them, and the readers of queues. A queue is a work queue
//! with one durable consumer, its reader. A log is a stream that denies deletion. Both refuse messages when they are full.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use async_nats::jetstream;
use async_nats::jetstream::consumer::{self, AckPolicy, DeliverPolicy, IntoConsumerConfig};
use async_nats::jetstream::stream::{
    Config as StreamConfig, DiscardPolicy, RetentionPolicy, StorageType,
};
use async_nats::{HeaderMap, header};
use bytes::Bytes;
use rand::Rng;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::Semaphore;

use super::api::{Confirmation, Reply, Wire, code};
use super::link::timed_out;
use crate::bus::{BusError, DURABLE_TIMEOUT, Enqueued, QueueBounds, StreamState};
use crate::subject::{Log, Queue, StreamLimits, Subjects};

/// The server counts a message's headers as part of its size.
const HEADER_BYTES_MAX: usize = 1_024;
/// Unconfirmed bytes under way to the server, in KiB: half of the server's buffer for one stream.
const IN_FLIGHT_KIB_MAX: u32 = 64 << 10;
/// Prefix of the readers' names. The rest is new with each reclaim, so that acknowledgements to an earlier reader have no
/// effect.
const READER_PREFIX: &str = "reader-";

/// The durable half of a connection.
pub(super) struct Streams {
    pub(super) wire: Wire,
    /// Parses the addresses of deliveries.
    pub(super) context: jetstream::Context,
    pub(super) subjects: Subjects,
    bounds: QueueBounds,
    replicas: usize,
    /// The last known reader of each queue.
    readers: Mutex<BTreeMap<Queue, String>>,
    in_flight: Semaphore,
}

#[derive(Deserialize)]
struct StreamInfo {
    state: Counts,
}

#[derive(Deserialize)]
struct Counts {
    messages: u64,
    last_seq: u64,
}

#[derive(Deserialize)]
struct ConsumerNames {
    #[serde(default)]
    consumers: Option<Vec<String>>,
}

#[derive(Serialize)]
struct CreateConsumer<'a> {
    stream_name: &'a str,
    config: consumer::Config,
}

impl Streams {
    pub(super) fn new(
        wire: Wire,
        subjects: Subjects,
        bounds: QueueBounds,
        replicas: usize,
    ) -> Self {
        Self {
            context: jetstream::new(wire.client.clone()),
            wire,
            subjects,
            bounds,
            replicas,
            readers: Mutex::new(BTreeMap::new()),
            in_flight: Semaphore::new(IN_FLIGHT_KIB_MAX as usize),
        }
    }

    /// Creates the streams and readers that do not exist yet.
    pub(super) async fn create(&self) -> Result<(), BusError> {
        for log in Log::ALL {
            let subject = self.subjects.log(log).as_str().to_owned();
            let mut config = self.stream_config(log.token(), subject, &log.limits());
            config.deny_delete = true;
            config.deny_purge = true;
            config.allow_direct = true;
            self.create_stream(log.token(), config).await?;
        }
        for queue in Queue::ALL {
            let subject = self.subjects.queue(queue).as_str().to_owned();
            let mut config = self.stream_config(queue.token(), subject, &self.bounds.of(queue));
            config.retention = RetentionPolicy::WorkQueue;
            self.create_stream(queue.token(), config).await?;
            self.find_reader(queue).await?;
        }
        Ok(())
    }

    fn stream_config(&self, token: &str, subject: String, limits: &StreamLimits) -> StreamConfig {
        let signed = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        let message_bytes_max = limits.message_bytes_max + HEADER_BYTES_MAX;
        StreamConfig {
            name: self.subjects.stream(token),
            description: Some(format!("muster: {token}")),
            subjects: vec![subject],
            retention: RetentionPolicy::Limits,
            // A full stream refuses new messages; it never drops old ones.
            discard: DiscardPolicy::New,
            storage: StorageType::File,
            num_replicas: self.replicas,
            max_messages: limits.messages_max.map_or(-1, signed),
            max_bytes: signed(limits.bytes_max),
            max_message_size: i32::try_from(message_bytes_max).unwrap_or(i32::MAX),
            max_messages_per_subject: -1,
            max_consumers: -1,
            duplicate_window: limits.duplicate_window,
            ..StreamConfig::default()
        }
    }

    async fn create_stream(&self, token: &str, config: StreamConfig) -> Result<(), BusError> {
        let create = format!("STREAM.CREATE.{}", config.name);
        match self
            .wire
            .manage::<serde::de::IgnoredAny>(&create, &config)
            .await?
        {
            // Created by another build or with other limits: the update keeps its messages.
            Reply::Refused { error } if error.err_code == code::STREAM_EXISTS_OTHERWISE => {
                let update = format!("STREAM.UPDATE.{}", config.name);
                let updated = self
                    .wire
                    .manage::<serde::de::IgnoredAny>(&update, &config)
                    .await?;
                updated.or_meaning(token).map(|_| ())
            }
            reply => reply.or_meaning(token).map(|_| ()),
        }
    }

    /// The name of the queue's reader. Creates one if there is none.
    pub(super) async fn find_reader(&self, queue: Queue) -> Result<String, BusError> {
        if let Some(reader) = self.lock().get(&queue) {
            return Ok(reader.clone());
        }
        if let Some(reader) = self.reader_names(queue).await?.into_iter().next() {
            self.lock().insert(queue, reader.clone());
            return Ok(reader);
        }
        self.create_reader(queue).await
    }

    async fn reader_names(&self, queue: Queue) -> Result<Vec<String>, BusError> {
        let names = format!("CONSUMER.NAMES.{}", self.subjects.stream(queue.token()));
        let answer = self
            .wire
            .manage::<ConsumerNames>(&names, &json!({ "offset": 0 }))
            .await?;
        Ok(answer
            .or_meaning(queue.token())?
            .consumers
            .unwrap_or_default())
    }

    async fn create_reader(&self, queue: Queue) -> Result<String, BusError> {
        let limits = self.bounds.of(queue);
        let stream = self.subjects.stream(queue.token());
        let name = format!("{READER_PREFIX}{:016x}", rand::rng().random::<u64>());
        let config = consumer::pull::Config {
            durable_name: Some(name.clone()),
            deliver_policy: DeliverPolicy::All,
            ack_policy: AckPolicy::Explicit,
            ack_wait: limits.ack_wait,
            max_deliver: -1,
            // Every message of the queue may be delivered at once.
            max_ack_pending: limits.messages_max.map_or(-1, |most| most as i64),
            ..consumer::pull::Config::default()
        };
        let request = CreateConsumer {
            stream_name: &stream,
            config: config.into_consumer_config(),
        };
        let create = format!("CONSUMER.CREATE.{stream}.{name}");
        match self
            .wire
            .manage::<serde::de::IgnoredAny>(&create, &request)
            .await?
        {
            // Another process was faster: a work queue has only one reader.
            Reply::Refused { error } if code::WORK_QUEUE_TAKEN.contains(&error.err_code) => {
                let other = self.reader_names(queue).await?.into_iter().next();
                let Some(other) = other else {
                    return Err(error.meaning(queue.token()));
                };
                self.lock().insert(queue, other.clone());
                Ok(other)
            }
            reply => {
                reply.or_meaning(queue.token())?;
                self.lock().insert(queue, name.clone());
                Ok(name)
            }
        }
    }

    /// Replaces the queue's reader. The new one gets every message from the start, and acknowledgements to the old one have
    /// no address any more.
    pub(super) async fn reclaim(&self, queue: Queue) -> Result<(), BusError> {
        let stream = self.subjects.stream(queue.token());
        for reader in self.reader_names(queue).await? {
            let delete = format!("CONSUMER.DELETE.{stream}.{reader}");
            match self
                .wire
                .manage::<serde::de::IgnoredAny>(&delete, &json!({}))
                .await?
            {
                Reply::Refused { error } if error.err_code == code::CONSUMER_NOT_FOUND => {}
                reply => {
                    reply.or_meaning(queue.token())?;
                }
            }
        }
        self.lock().remove(&queue);
        self.create_reader(queue).await.map(|_| ())
    }

    /// Whether the queue still has the reader `reader`.
    pub(super) async fn has_reader(&self, queue: Queue, reader: &str) -> Result<bool, BusError> {
        Ok(self
            .reader_names(queue)
            .await?
            .iter()
            .any(|name| name == reader))
    }

    /// Acknowledges a delivery at its own address.
    pub(super) async fn settle(&self, address: &str, settle: Bytes) -> Result<(), BusError> {
        self.wire
            .request(address, None, settle, DURABLE_TIMEOUT)
            .await
            .map(|_| ())
    }

    pub(super) async fn enqueue(
        &self,
        queue: Queue,
        key: &str,
        payload: Bytes,
    ) -> Result<Enqueued, BusError> {
        let subject = self.subjects.queue(queue);
        let reply = self
            .store(subject.as_str(), headers(key, None), payload)
            .await?;
        reply.or_meaning(queue.token()).map(Enqueued::from)
    }

    pub(super) async fn store(
        &self,
        subject: &str,
        headers: HeaderMap,
        payload: Bytes,
    ) -> Result<Reply<Confirmation>, BusError> {
        let start = Instant::now();
        let kib = u32::try_from(payload.len() >> 10)
            .unwrap_or(u32::MAX)
            .saturating_add(1);
        let room = self.in_flight.acquire_many(kib.min(IN_FLIGHT_KIB_MAX));
        let Ok(Ok(_room)) = tokio::time::timeout(DURABLE_TIMEOUT, room).await else {
            return Err(timed_out(subject, start));
        };
        let confirmed = self.wire.ask(subject, Some(headers), payload).await;
        if matches!(confirmed, Err(BusError::Timeout { .. })) && self.wire.link.is_up() {
            // The server does not reply to a write that its disk refused.
            tracing::warn!(
                subject,
                "a connected NATS server did not confirm a write: is its disk full?"
            );
        }
        confirmed
    }

    /// The content of a queue or log, from its leader.
    pub(super) async fn state(&self, token: &str) -> Result<StreamState, BusError> {
        let info = format!("STREAM.INFO.{}", self.subjects.stream(token));
        let info = self
            .wire
            .manage::<StreamInfo>(&info, &json!({}))
            .await?
            .or_meaning(token)?;
        Ok(StreamState {
            messages: info.state.messages,
            last_sequence: info.state.last_seq,
        })
    }

    /// Forgets the last known reader of a queue.
    pub(super) fn forget_reader(&self, queue: Queue) {
        self.lock().remove(&queue);
    }

    /// No code panics while it holds the lock, so a poisoned one is still whole.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Queue, String>> {
        self.readers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The headers of a durable message.
pub(super) fn headers(key: &str, expected_last: Option<u64>) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(header::NATS_MESSAGE_ID, key);
    if let Some(expected) = expected_last {
        headers.insert(header::NATS_EXPECTED_LAST_SEQUENCE, expected.to_string());
    }
    headers
}

impl From<Confirmation> for Enqueued {
    fn from(confirmation: Confirmation) -> Self {
        if confirmation.duplicate {
            Enqueued::Duplicate(confirmation.seq)
        } else {
            Enqueued::Stored(confirmation.seq)
        }
    }
}
