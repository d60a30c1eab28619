//! Taking messages from a queue, and requests with several replies.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_nats::{Message, StatusCode, jetstream};
use futures_util::StreamExt;
use serde_json::json;

use super::api::Wire;
use super::delivery::NatsAcker;
use super::link::{Use, timed_out};
use super::streams::Streams;
use crate::bus::{BusError, DURABLE_TIMEOUT, Delivery, TAKE_MESSAGES_MAX};
use crate::subject::Queue;

/// Most bytes of one pull.
const PULL_BYTES_MAX: usize = 64 << 20;
/// How much longer than the server a pull waits for the server's report that no message came.
const PULL_GRACE: Duration = Duration::from_secs(2);

enum Pulled {
    Messages(Vec<Message>),
    /// The reader does not exist, or no longer.
    NoReader,
}

#[derive(Clone, Copy)]
enum Pull {
    /// Takes the messages that are there.
    Now { max: usize },
    /// Waits for one message.
    One { wait: Duration },
}

impl Streams {
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
                    // Another process has reclaimed the queue: this one uses the new reader as well.
                    self.forget_reader(queue);
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
                // The reader was deleted, or is unusable: find the current one.
                Ok(Pulled::NoReader)
            }
            Ok(_) => Ok(Pulled::Messages(pulled)),
            // The messages that came are taken, even if the rest failed.
            Err(_) if !pulled.is_empty() => Ok(Pulled::Messages(pulled)),
            Err(BusError::Timeout { .. }) if matches!(pull, Pull::One { .. }) => {
                Ok(Pulled::Messages(pulled))
            }
            Err(error) => Err(error),
        }
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

    /// Sends a request with any number of replies and passes each to `take`, until a status ends them.
    pub(super) async fn collect(
        &self,
        subject: &str,
        body: String,
        timeout: Duration,
        mut take: impl FnMut(Message) -> Collect,
    ) -> Result<End, BusError> {
        let Wire { client, link } = &self.wire;
        let connection = link.ready(client, subject, timeout).await?;
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
        connection.run(Use::Publish, timeout, collecting).await
    }
}

/// Whether to wait for more replies.
pub(super) enum Collect {
    More,
    Enough,
}

/// How a sequence of replies ended.
pub(super) enum End {
    Enough,
    Status(StatusCode),
}
