//! The bus in memory, for simulation: a network that delays, loses and doubles messages, members that are cut off and
//! die, and the server's permissions, queues and logs. All chance comes from one seed and all waiting goes through tokio's
//! timer, so that on a paused single-threaded runtime time is virtual and equal seeds give equal runs.
//!
//! What it takes from the server's word, so that the same behaviours hold on both (`tests/bus_conformance.rs`): news is
//! heard in the order in which it was sent; a request goes to one of those who serve; durable calls are confirmed or time
//! out; the dead hold their deliveries until the queue's wait is over.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;

use self::core::{ConnectionId, Core, Ear, ReplyTo};
use self::network::{Hop, Moved};
use self::store::{ReaderId, Taken, Unstored};
use super::{
    Acker, Bus, BusError, DURABLE_TIMEOUT, Delivery, Enqueued, QueueBounds, Record, Requests,
    SharedBus, StreamState, Subscription, TAKE_MESSAGES_MAX, check_key, check_size, inbox,
    void_delivery,
};
use crate::id::RunId;
use crate::limits::{INBOX_MESSAGES_MAX, PAYLOAD_BYTES_MAX};
use crate::subject::{Log, Permissions, Queue, Role, Subject, Subjects};

mod core;
mod network;
mod routes;
mod store;

pub use self::network::Weather;

/// How a simulated bus behaves.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct MemoryConfig {
    /// Where all chance comes from.
    pub seed: u64,
    /// What happens to messages on their way.
    pub weather: Weather,
    /// Other bounds of the queues than their own.
    pub bounds: QueueBounds,
}

/// What has happened to messages since the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemoryCounters {
    /// News that reached a subscriber.
    pub heard: u64,
    /// Requests that reached a server.
    pub asked: u64,
    /// Answers that reached their asker.
    pub answered: u64,
    /// Messages that the network lost, or that went to or from a member cut off.
    pub lost: u64,
    /// Messages that the network doubled.
    pub doubled: u64,
    /// Messages lost because a reader's inbox was full.
    pub overflowed: u64,
    /// Requests dropped because their answer would not go to their asker's own inbox.
    pub refused: u64,
}

/// The bus of one run, in memory. Clones are handles to the same bus.
#[derive(Clone)]
pub struct MemoryBus {
    shared: Arc<Shared>,
}

struct Shared {
    run: RunId,
    subjects: Subjects,
    core: Mutex<Core>,
    /// Wakes the pump when something is to arrive earlier than it knows.
    agenda_changed: Arc<Notify>,
    /// Wakes who waits for a queue, by [`Queue::ALL`].
    queue_changed: [Notify; Queue::ALL.len()],
}

impl MemoryBus {
    /// A new bus. Must be called inside the tokio runtime that all of its members run on.
    pub fn new(run: &RunId, config: MemoryConfig) -> Self {
        let agenda_changed = Arc::new(Notify::new());
        let shared = Arc::new(Shared {
            run: run.clone(),
            subjects: Subjects::of(run),
            core: Mutex::new(Core::new(&config)),
            agenda_changed: agenda_changed.clone(),
            queue_changed: std::array::from_fn(|_| Notify::new()),
        });
        tokio::spawn(pump(Arc::downgrade(&shared), agenda_changed));
        Self { shared }
    }

    /// Connects a member with the permissions of `role`. A user may connect more than once.
    pub fn connect(&self, user: &str, role: Role) -> SharedBus {
        let permissions = Permissions::of(role, user, &self.shared.run);
        let patterns = |texts: Vec<String>| texts.into_iter().map(Subject::from).collect();
        Arc::new(Connection {
            shared: self.shared.clone(),
            id: self.shared.with_core(|core, _| core.connect(user)),
            user: user.to_owned(),
            publish: patterns(permissions.publish),
            subscribe: patterns(permissions.subscribe),
        })
    }

    /// Ends every connection of a member as the death of its process does: nobody hears it and it hears nobody, what it
    /// holds comes back after the queue's wait. Dropping the last handle of a connection does the same.
    pub fn disconnect(&self, user: &str) {
        self.shared.with_core(|core, _| core.disconnect_user(user));
    }

    /// Cuts a member off: its messages get lost both ways and its durable calls time out, until [`MemoryBus::heal`].
    pub fn cut_off(&self, user: &str) {
        self.shared.with_core(|core, _| core.cut_off(user));
    }

    /// Ends a [`MemoryBus::cut_off`]; what the member listened to is still there.
    pub fn heal(&self, user: &str) {
        self.shared.with_core(|core, _| core.heal(user));
    }

    /// Changes what happens to messages sent from now on.
    pub fn set_weather(&self, weather: Weather) {
        self.shared
            .with_core(|core, _| core.network.set_weather(weather));
    }

    /// Sends a request whose answer goes to an address of the sender's choice, as anybody can who writes his own client.
    ///
    /// # Errors
    /// When `user` in `role` may not publish on `subject`.
    pub fn publish_with_reply(
        &self,
        (user, role): (&str, Role),
        subject: &Subject,
        reply: Subject,
        payload: &Bytes,
    ) -> Result<(), BusError> {
        let permissions = Permissions::of(role, user, &self.shared.run);
        let patterns: Vec<Subject> = permissions.publish.into_iter().map(Subject::from).collect();
        check_permission(&patterns, subject)?;
        let reply_to = ReplyTo::Address(reply);
        self.shared
            .with_core(|core, now| core.send_request(subject, payload, &reply_to, now));
        Ok(())
    }

    /// BLAKE3 over every message that moved so far: its subject, the hash of its bytes, the virtual time.
    pub fn trace_hash(&self) -> [u8; 32] {
        *self.shared.lock().trace_hash().as_bytes()
    }

    /// What has happened to messages so far.
    pub fn counters(&self) -> MemoryCounters {
        self.shared.lock().counters
    }
}

impl fmt::Debug for MemoryBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MemoryBus({})", self.shared.run)
    }
}

impl Shared {
    /// No code panics while it holds the lock, so a poisoned one is still whole.
    fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state, then lets everything arrive that takes no time.
    fn with_core<T>(self: &Arc<Self>, act: impl FnOnce(&mut Core, Instant) -> T) -> T {
        let now = Instant::now();
        let mut core = self.lock();
        let before = core.next_arrival();
        let result = act(&mut core, now);
        core.run_due(self, now);
        let after = core.next_arrival();
        drop(core);
        if after.is_some() && after != before {
            self.agenda_changed.notify_one();
        }
        result
    }

    fn queue_changed(&self, queue: Queue) -> &Notify {
        &self.queue_changed[queue as usize]
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.agenda_changed.notify_one();
    }
}

/// Lets messages arrive when their time comes, as long as the bus exists.
async fn pump(shared: Weak<Shared>, agenda_changed: Arc<Notify>) {
    loop {
        let next = match shared.upgrade() {
            Some(shared) => {
                let mut core = shared.lock();
                core.run_due(&shared, Instant::now());
                core.next_arrival()
            }
            None => return,
        };
        tokio::select! {
            biased;
            () = agenda_changed.notified() => {}
            () = sleep_until(next) => {}
        }
    }
}

/// Waits for a moment, or for ever.
async fn sleep_until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

fn check_permission(patterns: &[Subject], subject: &Subject) -> Result<(), BusError> {
    if patterns.iter().any(|pattern| pattern.covers(subject)) {
        return Ok(());
    }
    Err(BusError::Denied {
        subject: subject.as_str().to_owned(),
    })
}

/// What the server calls the management of queues and logs, for its permissions.
fn management(token: &str) -> Subject {
    Subject::from(format!("$JS.API.{token}"))
}

fn elapsed_ms(start: Instant) -> u64 {
    start.elapsed().as_millis() as u64
}

/// A member's connection.
struct Connection {
    shared: Arc<Shared>,
    id: ConnectionId,
    user: String,
    publish: Vec<Subject>,
    subscribe: Vec<Subject>,
}

impl Connection {
    /// One durable call: a way there, the act, and a confirmation; either way may get lost.
    async fn durable<T>(
        &self,
        permission: Subject,
        act: impl FnOnce(&mut Core, Instant) -> Result<T, BusError> + Send,
    ) -> Result<T, BusError>
    where
        T: Send,
    {
        check_permission(&self.publish, &permission)?;
        let way = DurableWay {
            shared: &self.shared,
            connection: self.id,
            start: Instant::now(),
        };
        way.hop(&permission).await?;
        let result = self.shared.with_core(|core, now| {
            core.check(self.id)?;
            act(core, now)
        });
        way.hop(&permission).await?;
        result
    }

    fn timeout(&self, subject: &Subject, start: Instant) -> BusError {
        BusError::Timeout {
            subject: subject.as_str().to_owned(),
            waited_ms: elapsed_ms(start),
        }
    }
}

/// The ways of one durable call.
struct DurableWay<'a> {
    shared: &'a Arc<Shared>,
    connection: ConnectionId,
    start: Instant,
}

impl DurableWay<'_> {
    /// Takes the time of one way, or of giving up.
    async fn hop(&self, subject: &Subject) -> Result<(), BusError> {
        let hop = self.shared.with_core(|core, _| {
            core.check(self.connection)?;
            let reached = core.reaches(self.connection);
            let hop = if reached {
                core.network.durable_hop()
            } else {
                Hop::Lost
            };
            core.counters.lost += u64::from(hop == Hop::Lost);
            Ok(hop)
        })?;
        match hop {
            Hop::Arrives(delay) if delay.is_zero() => Ok(()),
            Hop::Arrives(delay) => {
                tokio::time::sleep(delay).await;
                Ok(())
            }
            Hop::Lost => {
                tokio::time::sleep_until(self.start + DURABLE_TIMEOUT).await;
                let subject = subject.as_str().to_owned();
                Err(BusError::Timeout {
                    subject,
                    waited_ms: elapsed_ms(self.start),
                })
            }
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.shared.with_core(|core, _| core.disconnect(self.id));
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MemoryConnection({} of {})", self.user, self.shared.run)
    }
}

#[async_trait]
impl Bus for Connection {
    fn user(&self) -> &str {
        &self.user
    }

    async fn publish(&self, subject: &Subject, payload: Bytes) -> Result<(), BusError> {
        check_permission(&self.publish, subject)?;
        check_size(subject.as_str(), &payload, PAYLOAD_BYTES_MAX)?;
        let start = Instant::now();
        let reached = self.shared.with_core(|core, now| {
            core.check(self.id)?;
            let reached = core.reaches(self.id);
            if reached {
                core.publish(subject, &payload, now);
            }
            Ok(reached)
        })?;
        if !reached {
            tokio::time::sleep(DURABLE_TIMEOUT).await;
            return Err(self.timeout(subject, start));
        }
        Ok(())
    }

    async fn subscribe(&self, pattern: &Subject) -> Result<Subscription, BusError> {
        check_permission(&self.subscribe, pattern)?;
        let (writer, inbox) = inbox::channel();
        self.shared
            .with_core(|core, _| core.listen(self.id, pattern, Ear::News(writer)))?;
        Ok(Subscription { inbox })
    }

    async fn request(
        &self,
        subject: &Subject,
        payload: Bytes,
        timeout: Duration,
    ) -> Result<Bytes, BusError> {
        check_permission(&self.publish, subject)?;
        check_size(subject.as_str(), &payload, PAYLOAD_BYTES_MAX)?;
        let start = Instant::now();
        let (number, answer) = self
            .shared
            .with_core(|core, now| core.ask(self.id, subject, &payload, now))?;
        let open = OpenAsk {
            shared: &self.shared,
            number,
        };
        let answered = tokio::time::timeout(timeout, answer).await;
        drop(open);
        match answered {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(BusError::Closed(
                "the connection to the bus was closed during a request: connect again".to_owned(),
            )),
            Err(_) => Err(self.timeout(subject, start)),
        }
    }

    async fn serve(&self, pattern: &Subject) -> Result<Requests, BusError> {
        check_permission(&self.subscribe, pattern)?;
        let (sender, inbox) = mpsc::channel(INBOX_MESSAGES_MAX);
        self.shared
            .with_core(|core, _| core.listen(self.id, pattern, Ear::Serve(sender)))?;
        Ok(Requests { inbox })
    }

    async fn create_streams(&self) -> Result<(), BusError> {
        self.durable(management("STREAM.CREATE"), |_, _| Ok(()))
            .await
    }

    async fn enqueue(&self, queue: Queue, key: &str, payload: Bytes) -> Result<Enqueued, BusError> {
        let subject = self.shared.subjects.queue(queue);
        check_key(key)?;
        check_size(subject.as_str(), &payload, queue.limits().message_bytes_max)?;
        let enqueued = self.durable(subject.clone(), |core, now| {
            let store = core.queues.get_mut(&queue);
            let stored = store.map(|store| store.enqueue(key, payload.clone(), now));
            let enqueued = stored
                .unwrap_or(Err(Unstored::Full))
                .map_err(|_| full(queue.token()))?;
            if let Enqueued::Stored(sequence) = enqueued {
                core.record(Moved::Stored, subject.as_str(), sequence, &payload);
                self.shared.queue_changed(queue).notify_waiters();
            }
            Ok(enqueued)
        });
        enqueued.await
    }

    async fn take(
        &self,
        queue: Queue,
        max: usize,
        wait: Duration,
    ) -> Result<Vec<Delivery>, BusError> {
        let permission = management("CONSUMER.MSG.NEXT");
        check_permission(&self.publish, &permission)?;
        let deadline = Instant::now() + wait;
        let way = DurableWay {
            shared: &self.shared,
            connection: self.id,
            start: Instant::now(),
        };
        if let Err(error) = way.hop(&permission).await {
            // A lost question and an empty queue look alike to who asks.
            return if error.is_transient() {
                Ok(Vec::new())
            } else {
                Err(error)
            };
        }
        loop {
            let mut changed = std::pin::pin!(self.shared.queue_changed(queue).notified());
            changed.as_mut().enable();
            let (taken, next_release) = self.take_now(queue, max)?;
            if !taken.is_empty() || Instant::now() >= deadline {
                return Ok(taken
                    .into_iter()
                    .map(|taken| self.delivery(queue, taken))
                    .collect());
            }
            let until = next_release.map_or(deadline, |moment| moment.min(deadline));
            tokio::select! {
                biased;
                () = &mut changed => {}
                () = tokio::time::sleep_until(until) => {}
            }
        }
    }

    async fn reclaim(&self, queue: Queue) -> Result<(), BusError> {
        let reclaimed = self.durable(management("CONSUMER.DELETE"), |core, _| {
            if let Some(store) = core.queues.get_mut(&queue) {
                store.reclaim();
            }
            self.shared.queue_changed(queue).notify_waiters();
            Ok(())
        });
        reclaimed.await
    }

    async fn queue_state(&self, queue: Queue) -> Result<StreamState, BusError> {
        let state = self.durable(management("STREAM.INFO"), |core, _| {
            Ok(core
                .queues
                .get(&queue)
                .map(store::QueueStore::state)
                .unwrap_or_default())
        });
        state.await
    }

    async fn append(
        &self,
        log: Log,
        key: &str,
        expected_last: Option<u64>,
        payload: Bytes,
    ) -> Result<Enqueued, BusError> {
        let subject = self.shared.subjects.log(log);
        check_key(key)?;
        check_size(subject.as_str(), &payload, log.limits().message_bytes_max)?;
        let appended = self.durable(subject.clone(), |core, now| {
            let store = core.logs.get_mut(&log);
            let stored = store.map(|store| store.append(key, expected_last, payload.clone(), now));
            let appended =
                stored
                    .unwrap_or(Err(Unstored::Full))
                    .map_err(|unstored| match unstored {
                        Unstored::Full => full(log.token()),
                        Unstored::Fenced { found } => BusError::Fenced {
                            log: log.token().to_owned(),
                            expected: expected_last.unwrap_or_default(),
                            found,
                        },
                    })?;
            if let Enqueued::Stored(sequence) = appended {
                core.record(Moved::Appended, subject.as_str(), sequence, &payload);
            }
            Ok(appended)
        });
        appended.await
    }

    async fn read(&self, log: Log, after: u64, max: usize) -> Result<Vec<Record>, BusError> {
        let records = self.durable(management("STREAM.MSG.GET"), |core, _| {
            Ok(core
                .logs
                .get(&log)
                .map(|store| store.read(after, max))
                .unwrap_or_default())
        });
        records.await
    }

    async fn last(&self, log: Log) -> Result<Option<Record>, BusError> {
        let last = self.durable(management("STREAM.MSG.GET"), |core, _| {
            Ok(core.logs.get(&log).and_then(store::LogStore::last))
        });
        last.await
    }

    async fn close(&self) {
        self.shared.with_core(|core, _| core.disconnect(self.id));
    }
}

fn full(token: &str) -> BusError {
    BusError::Full {
        queue: token.to_owned(),
    }
}

impl Connection {
    fn take_now(
        &self,
        queue: Queue,
        max: usize,
    ) -> Result<(Vec<Taken>, Option<Instant>), BusError> {
        let subject = self.shared.subjects.queue(queue);
        self.shared.with_core(|core, now| {
            core.check(self.id)?;
            if !core.reaches(self.id) {
                return Ok((Vec::new(), None));
            }
            let Some(store) = core.queues.get_mut(&queue) else {
                return Ok((Vec::new(), None));
            };
            let taken = store.take(max.min(TAKE_MESSAGES_MAX), now);
            let next_release = store.next_release();
            for taken in &taken {
                core.record(
                    Moved::Taken,
                    subject.as_str(),
                    taken.sequence,
                    &taken.payload,
                );
            }
            Ok((taken, next_release))
        })
    }

    fn delivery(&self, queue: Queue, taken: Taken) -> Delivery {
        let acker = MemoryAcker {
            shared: self.shared.clone(),
            connection: self.id,
            queue,
            sequence: taken.sequence,
            reader: taken.reader,
        };
        Delivery {
            payload: taken.payload,
            sequence: taken.sequence,
            delivered: taken.delivered,
            acker: Box::new(acker),
        }
    }
}

/// A request that waits; forgotten when its asker stops waiting.
struct OpenAsk<'a> {
    shared: &'a Arc<Shared>,
    number: u64,
}

impl Drop for OpenAsk<'_> {
    fn drop(&mut self) {
        self.shared
            .with_core(|core, _| core.forget_ask(self.number));
    }
}

struct MemoryAcker {
    shared: Arc<Shared>,
    connection: ConnectionId,
    queue: Queue,
    sequence: u64,
    reader: ReaderId,
}

/// What can be done with a delivery.
enum Settle {
    Ack,
    GiveBack(Duration),
    Renew,
}

impl MemoryAcker {
    async fn settle(&self, settle: Settle) -> Result<(), BusError> {
        let subject = self.shared.subjects.queue(self.queue);
        let way = DurableWay {
            shared: &self.shared,
            connection: self.connection,
            start: Instant::now(),
        };
        way.hop(&subject).await?;
        let settled = self.shared.with_core(|core, now| {
            core.check(self.connection)?;
            let Some(store) = core.queues.get_mut(&self.queue) else {
                return Ok(());
            };
            let settled = match settle {
                Settle::Ack => store.ack(self.reader, self.sequence),
                Settle::GiveBack(delay) => {
                    store.hold_until(self.reader, self.sequence, now + delay)
                }
                Settle::Renew => store.renew(self.reader, self.sequence, now),
            };
            settled.map_err(|_| void_delivery(self.queue, self.sequence))?;
            if matches!(settle, Settle::Ack) {
                core.record(Moved::Acked, subject.as_str(), self.sequence, &[]);
            }
            self.shared.queue_changed(self.queue).notify_waiters();
            Ok(())
        });
        way.hop(&subject).await?;
        settled
    }
}

#[async_trait]
impl Acker for MemoryAcker {
    async fn ack(&self) -> Result<(), BusError> {
        self.settle(Settle::Ack).await
    }

    async fn give_back(&self, delay: Duration) -> Result<(), BusError> {
        self.settle(Settle::GiveBack(delay)).await
    }

    async fn renew(&self) -> Result<(), BusError> {
        self.settle(Settle::Renew).await
    }
}

#[cfg(test)]
mod tests;
