//! A member's connection to the bus in memory: every call of the bus behind the server's permissions, and the deliveries that
//! the member was handed.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::network::{Hop, Moved};
use super::request::ConnectionId;
use super::shared::{Shared, check_permission};
use super::state::{Inbox, State};
use super::store::{self, ReaderId, Taken, Unstored};
use crate::bus::{
    Acker, Bus, BusError, DURABLE_TIMEOUT, Delivery, Enqueued, Record, Requests, StreamState,
    Subscription, TAKE_MESSAGES_MAX, check_key, check_size, inbox, void_delivery,
};
use crate::limits::{INBOX_MESSAGES_MAX, PAYLOAD_BYTES_MAX};
use crate::subject::{Log, Queue, Role, Subject};

/// The server's subject for managing queues and logs, which its permissions name.
fn management(token: &str) -> Subject {
    Subject::from(format!("$JS.API.{token}"))
}

fn elapsed_ms(start: Instant) -> u64 {
    start.elapsed().as_millis() as u64
}

/// A member's connection.
pub(super) struct Connection {
    shared: Arc<Shared>,
    id: ConnectionId,
    user: String,
    publish: Vec<Subject>,
    subscribe: Vec<Subject>,
}

impl Connection {
    /// Connects `user` with the permissions of `role`.
    pub(super) fn open(shared: &Arc<Shared>, user: &str, role: Role) -> Self {
        let permissions = shared.permissions(user, role);
        Self {
            shared: shared.clone(),
            id: shared.with_state(|state, _| state.connect(user)),
            user: user.to_owned(),
            publish: permissions.publish,
            subscribe: permissions.subscribe,
        }
    }

    /// One durable call: the request, the act, and the confirmation. Either message may get lost.
    async fn durable<T>(
        &self,
        permission: Subject,
        act: impl FnOnce(&mut State, Instant) -> Result<T, BusError> + Send,
    ) -> Result<T, BusError>
    where
        T: Send,
    {
        check_permission(&self.publish, &permission)?;
        let call = DurableCall {
            shared: &self.shared,
            connection: self.id,
            start: Instant::now(),
        };
        call.hop(&permission).await?;
        let result = self.shared.with_state(|state, now| {
            state.check(self.id)?;
            act(state, now)
        });
        call.hop(&permission).await?;
        result
    }

    fn timeout(&self, subject: &Subject, start: Instant) -> BusError {
        BusError::Timeout {
            subject: subject.as_str().to_owned(),
            waited_ms: elapsed_ms(start),
        }
    }
}

/// The messages of one durable call.
struct DurableCall<'a> {
    shared: &'a Arc<Shared>,
    connection: ConnectionId,
    start: Instant,
}

impl DurableCall<'_> {
    /// Waits as long as one message takes, or as long as a caller waits for a lost one.
    async fn hop(&self, subject: &Subject) -> Result<(), BusError> {
        let hop = self.shared.with_state(|state, _| {
            state.check(self.connection)?;
            let reached = state.reaches(self.connection);
            let hop = if reached {
                state.network.durable_hop()
            } else {
                Hop::Lost
            };
            state.counters.lost += u64::from(hop == Hop::Lost);
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
        self.shared.with_state(|state, _| state.disconnect(self.id));
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
        let reached = self.shared.with_state(|state, now| {
            state.check(self.id)?;
            let reached = state.reaches(self.id);
            if reached {
                state.publish(subject, &payload, now);
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
            .with_state(|state, _| state.listen(self.id, pattern, Inbox::News(writer)))?;
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
        let (number, reply) = self
            .shared
            .with_state(|state, now| state.open_request(self.id, subject, &payload, now))?;
        let open = ForgetOnDrop {
            shared: &self.shared,
            number,
        };
        let replied = tokio::time::timeout(timeout, reply).await;
        drop(open);
        match replied {
            Ok(Ok(reply)) => reply,
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
            .with_state(|state, _| state.listen(self.id, pattern, Inbox::Requests(sender)))?;
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
        let enqueued = self.durable(subject.clone(), |state, now| {
            let store = state.queues.get_mut(&queue);
            let stored = store.map(|store| store.enqueue(key, payload.clone(), now));
            let enqueued = stored
                .unwrap_or(Err(Unstored::Full))
                .map_err(|_| full(queue.token()))?;
            if let Enqueued::Stored(sequence) = enqueued {
                state.record(Moved::Stored, subject.as_str(), sequence, &payload);
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
        let call = DurableCall {
            shared: &self.shared,
            connection: self.id,
            start: Instant::now(),
        };
        if let Err(error) = call.hop(&permission).await {
            // A lost request and an empty queue look alike to the caller.
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
        let reclaimed = self.durable(management("CONSUMER.DELETE"), |state, _| {
            if let Some(store) = state.queues.get_mut(&queue) {
                store.reclaim();
            }
            self.shared.queue_changed(queue).notify_waiters();
            Ok(())
        });
        reclaimed.await
    }

    async fn queue_state(&self, queue: Queue) -> Result<StreamState, BusError> {
        let info = self.durable(management("STREAM.INFO"), |state, _| {
            Ok(state
                .queues
                .get(&queue)
                .map(store::QueueStore::state)
                .unwrap_or_default())
        });
        info.await
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
        let appended = self.durable(subject.clone(), |state, now| {
            let store = state.logs.get_mut(&log);
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
                state.record(Moved::Appended, subject.as_str(), sequence, &payload);
            }
            Ok(appended)
        });
        appended.await
    }

    async fn read(&self, log: Log, after: u64, max: usize) -> Result<Vec<Record>, BusError> {
        let records = self.durable(management("STREAM.MSG.GET"), |state, _| {
            Ok(state
                .logs
                .get(&log)
                .map(|store| store.read(after, max))
                .unwrap_or_default())
        });
        records.await
    }

    async fn last(&self, log: Log) -> Result<Option<Record>, BusError> {
        let last = self.durable(management("STREAM.MSG.GET"), |state, _| {
            Ok(state.logs.get(&log).and_then(store::LogStore::last))
        });
        last.await
    }

    async fn close(&self) {
        self.shared.with_state(|state, _| state.disconnect(self.id));
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
        self.shared.with_state(|state, now| {
            state.check(self.id)?;
            if !state.reaches(self.id) {
                return Ok((Vec::new(), None));
            }
            let Some(store) = state.queues.get_mut(&queue) else {
                return Ok((Vec::new(), None));
            };
            let taken = store.take(max.min(TAKE_MESSAGES_MAX), now);
            let next_release = store.next_release();
            for taken in &taken {
                state.record(
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

/// Forgets a request when its sender stops waiting.
struct ForgetOnDrop<'a> {
    shared: &'a Arc<Shared>,
    number: u64,
}

impl Drop for ForgetOnDrop<'_> {
    fn drop(&mut self) {
        self.shared
            .with_state(|state, _| state.forget_request(self.number));
    }
}

struct MemoryAcker {
    shared: Arc<Shared>,
    connection: ConnectionId,
    queue: Queue,
    sequence: u64,
    reader: ReaderId,
}

enum Settle {
    Ack,
    GiveBack(Duration),
    Renew,
}

impl MemoryAcker {
    async fn settle(&self, settle: Settle) -> Result<(), BusError> {
        let subject = self.shared.subjects.queue(self.queue);
        let call = DurableCall {
            shared: &self.shared,
            connection: self.connection,
            start: Instant::now(),
        };
        call.hop(&subject).await?;
        let settled = self.shared.with_state(|state, now| {
            state.check(self.connection)?;
            let Some(store) = state.queues.get_mut(&self.queue) else {
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
                state.record(Moved::Acked, subject.as_str(), self.sequence, &[]);
            }
            self.shared.queue_changed(self.queue).notify_waiters();
            Ok(())
        });
        call.hop(&subject).await?;
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
