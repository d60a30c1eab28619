//! A bus connection of dispatch or the trainer that reports their decisions to the observer before they are stored.

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

use muster_protocol::bus::{
    Bus, BusError, Delivery, Enqueued, Record, Requests, SharedBus, StreamState, Subscription,
};
use muster_protocol::subject::{Log, Queue, Subject};

use crate::observer::Observer;

#[derive(Debug)]
pub struct ObservedBus {
    inner: SharedBus,
    observer: Observer,
    /// Number of this connection; a restarted process has another.
    connection: u64,
}

impl ObservedBus {
    pub fn new(inner: SharedBus, observer: Observer) -> Self {
        let connection = observer.new_connection();
        Self {
            inner,
            observer,
            connection,
        }
    }
}

#[async_trait]
impl Bus for ObservedBus {
    fn user(&self) -> &str {
        self.inner.user()
    }

    async fn publish(&self, subject: &Subject, payload: Bytes) -> Result<(), BusError> {
        self.inner.publish(subject, payload).await
    }

    async fn subscribe(&self, pattern: &Subject) -> Result<Subscription, BusError> {
        self.inner.subscribe(pattern).await
    }

    async fn request(
        &self,
        subject: &Subject,
        payload: Bytes,
        timeout: Duration,
    ) -> Result<Bytes, BusError> {
        self.inner.request(subject, payload, timeout).await
    }

    async fn serve(&self, pattern: &Subject) -> Result<Requests, BusError> {
        self.inner.serve(pattern).await
    }

    async fn create_streams(&self) -> Result<(), BusError> {
        self.inner.create_streams().await
    }

    async fn enqueue(&self, queue: Queue, key: &str, payload: Bytes) -> Result<Enqueued, BusError> {
        self.observer
            .enqueued(queue, self.connection, payload.clone());
        self.inner.enqueue(queue, key, payload).await
    }

    async fn take(
        &self,
        queue: Queue,
        max: usize,
        wait: Duration,
    ) -> Result<Vec<Delivery>, BusError> {
        let taken = self.inner.take(queue, max, wait).await?;
        for delivery in &taken {
            self.observer.taken(queue, delivery.payload.clone());
        }
        Ok(taken)
    }

    async fn reclaim(&self, queue: Queue) -> Result<(), BusError> {
        self.inner.reclaim(queue).await
    }

    async fn queue_state(&self, queue: Queue) -> Result<StreamState, BusError> {
        self.inner.queue_state(queue).await
    }

    async fn append(
        &self,
        log: Log,
        key: &str,
        expected_last: Option<u64>,
        payload: Bytes,
    ) -> Result<Enqueued, BusError> {
        self.observer.appended(log, payload.clone());
        self.inner.append(log, key, expected_last, payload).await
    }

    async fn read(&self, log: Log, after: u64, max: usize) -> Result<Vec<Record>, BusError> {
        self.inner.read(log, after, max).await
    }

    async fn last(&self, log: Log) -> Result<Option<Record>, BusError> {
        self.inner.last(log).await
    }

    async fn close(&self) {
        self.inner.close().await;
    }
}
