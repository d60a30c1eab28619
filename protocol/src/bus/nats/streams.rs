//! Queues and logs as JetStream streams. A queue is a work queue with one durable reader; a log is a stream that nothing
//! is ever removed from. Numbers come from the server's leader, bytes of a log may come from any replica, which is then
//! asked again until it has what the leader has.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_nats::jetstream;
use async_nats::jetstream::consumer::{self, AckPolicy, DeliverPolicy, IntoConsumerConfig};
use async_nats::jetstream::stream::{
    Config as StreamConfig, DiscardPolicy, RetentionPolicy, StorageType,
};
use async_nats::{HeaderMap, Message, StatusCode, header};
use bytes::Bytes;
use futures_util::StreamExt;
use rand::Rng;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::Semaphore;

use super::api::{Confirmation, Reply, Wire, code};
use super::delivery::NatsAcker;
use super::link::{Use, timed_out};
use crate::bus::{
    BusError, DURABLE_TIMEOUT, Delivery, Enqueued, QueueBounds, Record, StreamState,
    TAKE_MESSAGES_MAX,
};
use crate::subject::{Log, Queue, StreamLimits, Subjects};

/// Unconfirmed bytes on their way to the server, in KiB: half of what it buffers for one stream before it refuses.
const IN_FLIGHT_KIB_MAX: u32 = 64 << 10;
/// Bytes handed out by one pull.
const PULL_BYTES_MAX: usize = 64 << 20;
/// Records asked for at once: the server answers at most 1,024.
const READ_RECORDS_MAX: usize = 512;
/// Bytes asked for at once.
const READ_BYTES_MAX: usize = 16 << 20;
/// What a message's headers may add to its size in the server's eyes.
const HEADER_BYTES_MAX: usize = 1_024;
/// How much longer than the server a pull waits for the server's word that nothing came.
const PULL_GRACE: Duration = Duration::from_secs(2);
/// Pause before a replica that lags behind is asked again.
const REPLICA_PAUSE: Duration = Duration::from_millis(50);
/// Prefix of the readers' names; the rest is new with each reclaim, so that acknowledgements of deliveries to an earlier
/// reader go nowhere.
const READER_PREFIX: &str = "reader-";

/// The durable half of a connection.
pub(super) struct Streams {
    wire: Wire,
    /// Reads the addresses of deliveries.
    context: jetstream::Context,
    subjects: Subjects,
    bounds: QueueBounds,
    replicas: usize,
    /// The current reader of each queue, as last heard.
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

/// What a pull brought.
enum Pulled {
    Messages(Vec<Message>),
    /// The reader is not there (any more).
    NoReader,
}

/// How a pull waits.
#[derive(Clone, Copy)]
enum Pull {
    /// For nothing.
    Now { max: usize },
    /// For one message.
    One { wait: Duration },
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

    /// Makes what does not exist yet.
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
            // A full stream refuses: it never drops the oldest, which somebody relies on.
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
            // An earlier version of the program, or other bounds: what it holds stays.
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

    /// The name of the queue's reader, made if there is none.
    async fn find_reader(&self, queue: Queue) -> Result<String, BusError> {
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
            // Every open message may be in somebody's hands at once.
            max_ack_pending: limits.messages_max.map_or(-1, |most| most as i64),
            ..consumer::pull::Config::default()
        };
        let request = CreateConsumer {
            stream_name: &stream,
            config: config.into_consumer_config(),
        };
        let create = format!("CONSUMER.DURABLE.CREATE.{stream}.{name}");
        match self
            .wire
            .manage::<serde::de::IgnoredAny>(&create, &request)
            .await?
        {
            // Another process was faster: a work queue has room for one reader.
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

    /// Replaces the queue's reader: the new one is handed everything from the start, and acknowledgements of what the
    /// old one was handed have no address any more.
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

    /// Whether the reader that a delivery went to is still the queue's.
    pub(super) async fn has_reader(&self, queue: Queue, reader: &str) -> Result<bool, BusError> {
        Ok(self
            .reader_names(queue)
            .await?
            .iter()
            .any(|name| name == reader))
    }

    /// Settles a delivery by its own address.
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

    pub(super) async fn append(
        &self,
        log: Log,
        key: &str,
        expected_last: Option<u64>,
        payload: Bytes,
    ) -> Result<Enqueued, BusError> {
        let subject = self.subjects.log(log);
        match (
            self.store(subject.as_str(), headers(key, expected_last), payload)
                .await?,
            expected_last,
        ) {
            (Reply::Refused { error }, Some(expected))
                if error.err_code == code::WRONG_LAST_SEQUENCE =>
            {
                let found = match error.sequence_found() {
                    Some(found) => found,
                    None => self.state(log.token()).await?.last_sequence,
                };
                Err(BusError::Fenced {
                    log: log.token().to_owned(),
                    expected,
                    found,
                })
            }
            (reply, _) => reply.or_meaning(log.token()).map(Enqueued::from),
        }
    }

    async fn store(
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
        self.wire.ask(subject, Some(headers), payload).await
    }

    /// What a queue or log holds, as its leader knows it.
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

    /// Up to `max` messages, waiting up to `wait` for the first: first all that are there, then for one.
    pub(super) async fn take(
        self: &Arc<Self>,
        queue: Queue,
        max: usize,
        wait: Duration,
    ) -> Result<Vec<Delivery>, BusError> {
        let start = Instant::now();
        let max = max.min(TAKE_MESSAGES_MAX);
        if max == 0 {
            return Ok(Vec::new());
        }
        loop {
            let reader = self.find_reader(queue).await?;
            let pulled = match self.pull(queue, &reader, Pull::Now { max }).await? {
                Pulled::Messages(messages) if messages.is_empty() => {
                    let left = wait.saturating_sub(start.elapsed());
                    if left < Duration::from_millis(1) {
                        return Ok(Vec::new());
                    }
                    self.pull(queue, &reader, Pull::One { wait: left }).await?
                }
                pulled => pulled,
            };
            match pulled {
                Pulled::Messages(messages) => {
                    let deliveries = messages.into_iter();
                    return deliveries
                        .map(|message| self.delivery(queue, message))
                        .collect();
                }
                Pulled::NoReader => {
                    // Reclaimed by another process: its reader is ours as well.
                    self.lock().remove(&queue);
                    if start.elapsed() > wait + DURABLE_TIMEOUT {
                        return Err(timed_out(queue.token(), start));
                    }
                }
            }
        }
    }

    async fn pull(&self, queue: Queue, reader: &str, pull: Pull) -> Result<Pulled, BusError> {
        let stream = self.subjects.stream(queue.token());
        let subject = format!("$JS.API.CONSUMER.MSG.NEXT.{stream}.{reader}");
        let (body, count, timeout) = match pull {
            Pull::Now { max } => {
                let body = json!({ "batch": max, "no_wait": true, "max_bytes": PULL_BYTES_MAX });
                (body, max, DURABLE_TIMEOUT)
            }
            Pull::One { wait } => {
                let body = json!({ "batch": 1, "expires": wait.as_nanos() as u64 });
                (body, 1, wait + PULL_GRACE)
            }
        };
        let mut pulled = Vec::new();
        let end = self.collect(&subject, body.to_string(), timeout, |message| {
            pulled.push(message);
            if pulled.len() < count {
                Collect::More
            } else {
                Collect::Enough
            }
        });
        match end.await {
            Ok(End::Status(StatusCode::NO_RESPONDERS)) if pulled.is_empty() => Ok(Pulled::NoReader),
            Ok(End::Status(status)) if pulled.is_empty() && status.as_u16() == 409 => {
                // The reader was deleted, or something else is wrong with it: look who reads now.
                Ok(Pulled::NoReader)
            }
            Ok(_) => Ok(Pulled::Messages(pulled)),
            // What has come is ours, whatever happened to the rest.
            Err(_) if !pulled.is_empty() => Ok(Pulled::Messages(pulled)),
            Err(BusError::Timeout { .. }) if matches!(pull, Pull::One { .. }) => {
                Ok(Pulled::Messages(pulled))
            }
            Err(error) => Err(error),
        }
    }

    /// Sends a request that is answered by any number of messages and hands over each, until a status ends them.
    async fn collect(
        &self,
        subject: &str,
        body: String,
        timeout: Duration,
        mut take: impl FnMut(Message) -> Collect,
    ) -> Result<End, BusError> {
        let Wire { client, link } = &self.wire;
        let lifeline = link.ready(client, subject, timeout).await?;
        let gone = |error: &dyn std::fmt::Display| {
            BusError::Closed(format!(
                "request on {subject} not sent ({error}): connect again"
            ))
        };
        let collecting = async {
            let inbox = client.new_inbox();
            let mut answers = client
                .subscribe(inbox.clone())
                .await
                .map_err(|error| gone(&error))?;
            let sent = client
                .publish_with_reply(subject.to_owned(), inbox, body.into())
                .await;
            sent.map_err(|error| gone(&error))?;
            while let Some(message) = answers.next().await {
                match message.status {
                    None | Some(StatusCode::OK) => {
                        if matches!(take(message), Collect::Enough) {
                            return Ok(End::Enough);
                        }
                    }
                    Some(StatusCode::IDLE_HEARTBEAT) => {}
                    Some(status) => return Ok(End::Status(status)),
                }
            }
            Err(gone(&"the connection ended"))
        };
        lifeline.run(Use::Publish, timeout, collecting).await
    }

    fn delivery(self: &Arc<Self>, queue: Queue, message: Message) -> Result<Delivery, BusError> {
        let message = jetstream::Message {
            message,
            context: self.context.clone(),
        };
        let acker = NatsAcker::new(self.clone(), queue, &message)?;
        let payload = message.message.payload;
        Ok(Delivery {
            payload,
            sequence: acker.sequence,
            delivered: acker.delivered,
            acker: Box::new(acker),
        })
    }

    /// Up to `max` records after number `after`.
    pub(super) async fn read(
        &self,
        log: Log,
        after: u64,
        max: usize,
    ) -> Result<Vec<Record>, BusError> {
        let newest = self.state(log.token()).await?.last_sequence;
        let most = after.saturating_add(u64::try_from(max).unwrap_or(u64::MAX));
        self.read_range(log, after, newest.min(most)).await
    }

    /// The newest record.
    pub(super) async fn last(&self, log: Log) -> Result<Option<Record>, BusError> {
        let newest = self.state(log.token()).await?.last_sequence;
        Ok(self
            .read_range(log, newest.saturating_sub(1), newest)
            .await?
            .pop())
    }

    /// The records after number `after` up to number `until`, which the leader has. Nothing is ever removed from a log,
    /// so a record that does not come is one that a replica does not have yet.
    async fn read_range(&self, log: Log, after: u64, until: u64) -> Result<Vec<Record>, BusError> {
        let start = Instant::now();
        let subject = format!("$JS.API.DIRECT.GET.{}", self.subjects.stream(log.token()));
        let mut records: Vec<Record> = Vec::new();
        let mut read = after;
        let mut progress = start;
        while read < until {
            let batch = (until - read).min(READ_RECORDS_MAX as u64);
            let body = json!({
                "seq": read + 1,
                "batch": batch,
                "max_bytes": READ_BYTES_MAX,
                "next_by_subj": self.subjects.log(log).as_str(),
            });
            let before = read;
            let end = self.collect(&subject, body.to_string(), DURABLE_TIMEOUT, |message| {
                if sequence_of(&message) == Some(read + 1) {
                    read += 1;
                    records.push(Record {
                        sequence: read,
                        payload: message.payload,
                    });
                }
                if read < before + batch {
                    Collect::More
                } else {
                    Collect::Enough
                }
            });
            end.await?;
            if read > before {
                progress = Instant::now();
            } else if progress.elapsed() > DURABLE_TIMEOUT {
                return Err(timed_out(&subject, start));
            } else {
                tokio::time::sleep(REPLICA_PAUSE).await;
            }
        }
        Ok(records)
    }

    /// No code panics while it holds the lock, so a poisoned one is still whole.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Queue, String>> {
        self.readers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether more is to come.
enum Collect {
    More,
    Enough,
}

/// How a sequence of answers ended.
enum End {
    Enough,
    Status(StatusCode),
}

fn sequence_of(message: &Message) -> Option<u64> {
    message
        .headers
        .as_ref()?
        .get(header::NATS_SEQUENCE)?
        .as_str()
        .parse()
        .ok()
}

fn headers(key: &str, expected_last: Option<u64>) -> HeaderMap {
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
