//! The bus over NATS JetStream.
//!
//! Every call ends soon, with the server's confirmation or with an error. The client library alone does not guarantee that:
//! it buffers messages while the server is away, a refused permission looks like a request without a server, and a
//! subscription returns before the server has it. So every call first waits for the connection, watches for a refusal
//! while it waits for its reply, and makes a round trip to the server where there is no reply to wait for.
//!
//! After a lost connection the library reconnects by itself, without end. Its pauses are drawn uniformly below a bound that
//! doubles up to 30 s. It restores the subscriptions. Refused credentials end the connection for good.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_nats::{Client, ConnectError, ConnectErrorKind, ConnectOptions};
use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use self::api::Wire;
use self::forward::{NewsForwarder, RequestForwarder};
use self::link::{Link, Use, refused_credentials};
use self::streams::Streams;
use super::{
    Bus, BusError, DURABLE_TIMEOUT, Delivery, Enqueued, QueueBounds, Record, Requests, SharedBus,
    StreamState, Subscription, check_key, check_size, inbox,
};
use crate::id::RunId;
use crate::limits::{INBOX_MESSAGES_MAX, PAYLOAD_BYTES_MAX};
use crate::subject::{Log, Queue, Subject, Subjects};

mod api;
mod delivery;
mod forward;
mod link;
mod logs;
mod pull;
mod streams;

/// Batched reads of a log came with this version.
const SERVER_VERSION_MIN: (i64, i64, i64) = (2, 11, 0);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a server that refuses the connection is tried again: it may be starting.
const CONNECT_PATIENCE: Duration = Duration::from_secs(3);
const CONNECT_PAUSE: Duration = Duration::from_millis(100);
/// Interval of pings. The library gives a connection up after two lost replies.
const PING_INTERVAL: Duration = Duration::from_secs(20);
/// How long closing waits for buffered messages to leave.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a refusal may take from the library's reader to the task that reports it. A later one ends the subscription.
const REPORT_PAUSE: Duration = Duration::from_millis(20);
/// Memory of unanswered requests in KiB: 64 of the largest. Further requests are dropped; their senders repeat them.
const REQUESTS_KIB_MAX: usize = 256 << 10;
/// The queue group of all processes that serve a subject.
const SERVERS: &str = "muster";

/// How to reach a run's bus.
#[derive(Clone)]
pub struct NatsConfig {
    /// One server, such as `nats://127.0.0.1:4222`, or the members of a cluster.
    pub urls: Vec<String>,
    pub run: RunId,
    /// The secret seed of the user's nkey, `SU…`.
    pub login_seed: String,
    /// Names the connection in the server's lists.
    pub name: String,
    /// Overrides of the queues' limits, for their creation.
    pub bounds: QueueBounds,
    /// Number of servers that hold each stream, for its creation: 1, or 3 in a cluster.
    pub replicas: usize,
}

impl NatsConfig {
    /// One server, the queues' own limits, no replication.
    pub fn new(url: &str, run: &RunId, login_seed: &str, name: &str) -> Self {
        Self {
            urls: vec![url.to_owned()],
            run: run.clone(),
            login_seed: login_seed.to_owned(),
            name: name.to_owned(),
            bounds: QueueBounds::default(),
            replicas: 1,
        }
    }
}

impl fmt::Debug for NatsConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let servers = shown(&self.urls);
        write!(
            f,
            "NatsConfig({} as {} at {servers}, seed secret)",
            self.run, self.name
        )
    }
}

/// A connection to a run's bus over NATS.
pub struct NatsBus {
    wire: Wire,
    streams: Arc<Streams>,
    /// Tasks that forward messages from the client library to readers.
    forwarders: TaskTracker,
    requests_room: Arc<Semaphore>,
    shutdown: CancellationToken,
    /// Ends the forwarders of a bus that is dropped without being closed.
    _shutdown_on_drop: DropGuard,
}

impl NatsBus {
    /// Connects and logs in. Fails within seconds if no server answers.
    ///
    /// # Errors
    /// [`BusError::Closed`] with the server's address, the reason and the way out.
    pub async fn connect(config: NatsConfig) -> Result<SharedBus, BusError> {
        let servers = shown(&config.urls);
        let user = nkeys::KeyPair::from_seed(&config.login_seed)
            .map(|pair| pair.public_key())
            .ok()
            .filter(|user| user.starts_with('U'))
            .ok_or_else(|| {
                let name = &config.name;
                BusError::Closed(format!(
                    "the login seed of {name} is not the seed of an nkey user (SU…): take it from the run's credentials"
                ))
            })?;
        let link = Arc::new(Link::new(user.clone(), servers));
        let client = connect_patiently(&config, &link).await?;
        let (major, minor, patch) = SERVER_VERSION_MIN;
        if !client.is_server_compatible(major, minor, patch) {
            let version = client.server_info().version;
            return Err(BusError::Closed(format!(
                "the NATS server at {} is version {version}, older than {major}.{minor}: run ./setup, or start a newer one",
                link.servers
            )));
        }
        let wire = Wire { client, link };
        let subjects = Subjects::of(&config.run);
        let streams = Streams::new(wire.clone(), subjects, config.bounds, config.replicas);
        let shutdown = CancellationToken::new();
        Ok(Arc::new(Self {
            wire,
            streams: Arc::new(streams),
            forwarders: TaskTracker::new(),
            requests_room: Arc::new(Semaphore::new(REQUESTS_KIB_MAX)),
            _shutdown_on_drop: shutdown.clone().drop_guard(),
            shutdown,
        }))
    }

    /// Waits until the server has processed every earlier message and its refusals have arrived.
    async fn sync(&self) -> Result<(), BusError> {
        let link = &self.wire.link;
        let sync = Subjects::sync(&link.user);
        match self
            .wire
            .request(sync.as_str(), None, Bytes::new(), DURABLE_TIMEOUT)
            .await
        {
            // No member may listen there: the refusal is the reply.
            Ok(_) | Err(BusError::NoResponders { .. } | BusError::Denied { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Fails if the server has refused `pattern`.
    async fn confirm_subscription(&self, pattern: &Subject) -> Result<(), BusError> {
        self.sync().await?;
        // The refusal arrives before the reply, but another task reports it.
        tokio::time::sleep(REPORT_PAUSE).await;
        if self.wire.link.was_denied(Use::Subscribe, pattern.as_str()) {
            return Err(BusError::Denied {
                subject: pattern.as_str().to_owned(),
            });
        }
        Ok(())
    }

    /// Waits for the connection before a message is handed to the library.
    async fn ready(&self, subject: &Subject) -> Result<(), BusError> {
        let Wire { client, link } = &self.wire;
        link.ready(client, subject.as_str(), DURABLE_TIMEOUT)
            .await
            .map(|_| ())
    }
}

/// Connects. Tries a server that is not reachable again for [`CONNECT_PATIENCE`].
async fn connect_patiently(config: &NatsConfig, link: &Arc<Link>) -> Result<Client, BusError> {
    let start = Instant::now();
    loop {
        match options(config, link).connect(&config.urls[..]).await {
            Ok(client) => return Ok(client),
            Err(error) if is_absent(&error) && start.elapsed() < CONNECT_PATIENCE => {
                tokio::time::sleep(CONNECT_PAUSE).await;
            }
            Err(error) => return Err(unreachable(&error, link)),
        }
    }
}

/// Whether a later attempt may succeed: not after a wrong name, wrong credentials or a wrong certificate.
fn is_absent(error: &ConnectError) -> bool {
    matches!(
        error.kind(),
        ConnectErrorKind::Io | ConnectErrorKind::TimedOut
    )
}

fn options(config: &NatsConfig, link: &Arc<Link>) -> ConnectOptions {
    let (on_event, on_attempt) = (link.clone(), link.clone());
    ConnectOptions::with_nkey(config.login_seed.clone())
        .name(&config.name)
        .custom_inbox_prefix(Subjects::inbox_prefix(&link.user))
        .connection_timeout(CONNECT_TIMEOUT)
        .ping_interval(PING_INTERVAL)
        .request_timeout(None)
        .subscription_capacity(INBOX_MESSAGES_MAX)
        .reconnect_delay_callback(move |attempts| on_attempt.reconnect_pause(attempts))
        .event_callback(move |event| {
            on_event.on_event(&event);
            std::future::ready(())
        })
}

/// The addresses without the user and password that a URL may hold.
fn shown(urls: &[String]) -> String {
    let shown = urls
        .iter()
        .map(|url| match (url.split_once("://"), url.rsplit_once('@')) {
            (Some((scheme, _)), Some((_, host))) => format!("{scheme}://{host}"),
            (None, Some((_, host))) => host.to_owned(),
            (_, None) => url.clone(),
        });
    shown.collect::<Vec<_>>().join(", ")
}

fn unreachable(error: &ConnectError, link: &Link) -> BusError {
    let servers = &link.servers;
    BusError::Closed(match error.kind() {
        ConnectErrorKind::AuthorizationViolation | ConnectErrorKind::Authentication => {
            refused_credentials(&link.user, servers)
        }
        ConnectErrorKind::ServerParse => {
            format!("`{servers}` is not an address of a NATS server: write it as nats://host:4222")
        }
        kind => {
            // The library's own sentence repeats its kind in front of the reason.
            let reason = std::error::Error::source(error)
                .map_or_else(|| kind.to_string(), ToString::to_string);
            format!(
                "no NATS server answers at {servers} ({reason}): start it, or give the address of one that runs"
            )
        }
    })
}

impl fmt::Debug for NatsBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Link { user, servers, .. } = &*self.wire.link;
        write!(
            f,
            "NatsBus({user} at {servers}, {} lost)",
            self.wire.link.news_lost()
        )
    }
}

#[async_trait]
impl Bus for NatsBus {
    fn user(&self) -> &str {
        &self.wire.link.user
    }

    async fn publish(&self, subject: &Subject, payload: Bytes) -> Result<(), BusError> {
        check_size(subject.as_str(), &payload, PAYLOAD_BYTES_MAX)?;
        self.ready(subject).await?;
        let denied = || BusError::Denied {
            subject: subject.as_str().to_owned(),
        };
        if self.wire.link.was_denied(Use::Publish, subject.as_str()) {
            return Err(denied());
        }
        let sent = self
            .wire
            .client
            .publish(subject.as_str().to_owned(), payload)
            .await;
        sent.map_err(|error| not_sent(subject, &error))?;
        self.sync().await?;
        // The refusal arrives before the reply, but another task reports it. If that task is late, the next call fails.
        tokio::task::yield_now().await;
        if self.wire.link.was_denied(Use::Publish, subject.as_str()) {
            return Err(denied());
        }
        Ok(())
    }

    async fn subscribe(&self, pattern: &Subject) -> Result<Subscription, BusError> {
        self.ready(pattern).await?;
        let subscribed = self
            .wire
            .client
            .subscribe(pattern.as_str().to_owned())
            .await;
        let subscriber = subscribed.map_err(|error| not_sent(pattern, &error))?;
        self.confirm_subscription(pattern).await?;
        let (writer, inbox) = inbox::channel();
        let forwarder = NewsForwarder {
            pattern: pattern.clone(),
            subscriber,
            writer,
            link: self.wire.link.clone(),
        };
        self.forwarders.spawn(forwarder.run(self.shutdown.clone()));
        Ok(Subscription { inbox })
    }

    async fn request(
        &self,
        subject: &Subject,
        payload: Bytes,
        timeout: Duration,
    ) -> Result<Bytes, BusError> {
        check_size(subject.as_str(), &payload, PAYLOAD_BYTES_MAX)?;
        self.wire
            .request(subject.as_str(), None, payload, timeout)
            .await
    }

    async fn serve(&self, pattern: &Subject) -> Result<Requests, BusError> {
        self.ready(pattern).await?;
        let client = &self.wire.client;
        let subscribed = client
            .queue_subscribe(pattern.as_str().to_owned(), SERVERS.to_owned())
            .await;
        let subscriber = subscribed.map_err(|error| not_sent(pattern, &error))?;
        self.confirm_subscription(pattern).await?;
        let (sender, inbox) = mpsc::channel(INBOX_MESSAGES_MAX);
        let forwarder = RequestForwarder {
            pattern: pattern.clone(),
            subscriber,
            sender,
            wire: self.wire.clone(),
            room: self.requests_room.clone(),
        };
        self.forwarders.spawn(forwarder.run(self.shutdown.clone()));
        Ok(Requests { inbox })
    }

    async fn create_streams(&self) -> Result<(), BusError> {
        self.streams.create().await
    }

    async fn enqueue(&self, queue: Queue, key: &str, payload: Bytes) -> Result<Enqueued, BusError> {
        check_key(key)?;
        check_size(queue.token(), &payload, queue.limits().message_bytes_max)?;
        self.streams.enqueue(queue, key, payload).await
    }

    async fn take(
        &self,
        queue: Queue,
        max: usize,
        wait: Duration,
    ) -> Result<Vec<Delivery>, BusError> {
        self.streams.take(queue, max, wait).await
    }

    async fn reclaim(&self, queue: Queue) -> Result<(), BusError> {
        self.streams.reclaim(queue).await
    }

    async fn queue_state(&self, queue: Queue) -> Result<StreamState, BusError> {
        self.streams.state(queue.token()).await
    }

    async fn append(
        &self,
        log: Log,
        key: &str,
        expected_last: Option<u64>,
        payload: Bytes,
    ) -> Result<Enqueued, BusError> {
        check_key(key)?;
        check_size(log.token(), &payload, log.limits().message_bytes_max)?;
        self.streams.append(log, key, expected_last, payload).await
    }

    async fn read(&self, log: Log, after: u64, max: usize) -> Result<Vec<Record>, BusError> {
        self.streams.read(log, after, max).await
    }

    async fn last(&self, log: Log) -> Result<Option<Record>, BusError> {
        self.streams.last(log).await
    }

    async fn close(&self) {
        let Wire { client, link } = &self.wire;
        if link.is_up()
            && tokio::time::timeout(FLUSH_TIMEOUT, client.flush())
                .await
                .is_err()
        {
            tracing::warn!("the last published messages may not have reached the NATS server");
        }
        link.close();
        self.shutdown.cancel();
        self.forwarders.close();
        self.forwarders.wait().await;
        if let Err(error) = client.drain().await {
            tracing::debug!(%error, "NATS connection was closed already");
        }
    }
}

fn not_sent(subject: &Subject, error: &dyn fmt::Display) -> BusError {
    BusError::Server(format!("nothing sent on {subject}: {error}"))
}
