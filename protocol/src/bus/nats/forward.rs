//! Tasks that forward messages from the client library to readers, and replies to requests back.

use std::sync::Arc;

use async_nats::{Message, Subscriber};
use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

use super::api::Wire;
use super::link::{Link, Use};
use crate::bus::inbox::{Pushed, Writer};
use crate::bus::{News, Request, Responder, check_size};
use crate::limits::PAYLOAD_BYTES_MAX;
use crate::subject::{Subject, Subjects};

/// Forwards news from the library to one subscription.
pub(super) struct NewsForwarder {
    pub(super) pattern: Subject,
    pub(super) subscriber: Subscriber,
    pub(super) writer: Writer<News>,
    pub(super) link: Arc<Link>,
}

impl NewsForwarder {
    /// Ends with the bus, with the reader, or with a refusal that comes late.
    pub(super) async fn run(mut self, shutdown: CancellationToken) {
        loop {
            tokio::select! {
                biased; // the ends first, so that a flood cannot starve them
                () = shutdown.cancelled() => break,
                () = self.writer.closed() => break,
                _ = self.link.denied(Use::Subscribe, self.pattern.as_str()) => break,
                message = self.subscriber.next() => match message {
                    Some(message) => self.on_message(message),
                    None => break,
                },
            }
        }
    }

    fn on_message(&self, message: Message) {
        let subject = Subject::from(message.subject.to_string());
        let news = News {
            subject,
            payload: message.payload,
        };
        if self.writer.push(news) == Pushed::Evicted {
            self.link.on_lost_news("a subscription's inbox was full");
        }
    }
}

/// Forwards requests from the library to one server of requests.
pub(super) struct RequestForwarder {
    pub(super) pattern: Subject,
    pub(super) subscriber: Subscriber,
    pub(super) sender: mpsc::Sender<Request>,
    pub(super) wire: Wire,
    /// Memory for unanswered requests, in KiB.
    pub(super) room: Arc<Semaphore>,
}

impl RequestForwarder {
    /// Ends with the bus, with the reader, or with a refusal that comes late.
    pub(super) async fn run(mut self, shutdown: CancellationToken) {
        loop {
            tokio::select! {
                biased; // the ends first, so that a flood cannot starve them
                () = shutdown.cancelled() => break,
                () = self.sender.closed() => break,
                _ = self.wire.link.denied(Use::Subscribe, self.pattern.as_str()) => break,
                message = self.subscriber.next() => match message {
                    Some(message) => self.on_message(message),
                    None => break,
                },
            }
        }
    }

    /// Forwards a request, unless its reply address is not the sender's own inbox.
    fn on_message(&self, message: Message) {
        let sender = message.subject.rsplit('.').next().unwrap_or_default();
        let own_inbox = message
            .reply
            .filter(|reply| Subjects::is_inbox_of(sender, reply.as_str()));
        let Some(reply) = own_inbox else {
            tracing::debug!(
                sender,
                "request dropped: its reply address is not in the sender's inbox"
            );
            return;
        };
        let kib = u32::try_from(message.payload.len() >> 10)
            .unwrap_or(u32::MAX)
            .saturating_add(1);
        let Ok(room) = self.room.clone().try_acquire_many_owned(kib) else {
            self.wire
                .link
                .on_lost_news("unanswered requests take too much memory");
            return;
        };
        let subject = Subject::from(message.subject.to_string());
        let responder = NatsResponder {
            wire: self.wire.clone(),
            reply,
            _room: room,
        };
        let request = Request {
            subject,
            payload: message.payload,
            responder: Box::new(responder),
        };
        if self.sender.try_send(request).is_err() {
            self.wire.link.on_lost_news("a server's inbox was full");
        }
    }
}

struct NatsResponder {
    wire: Wire,
    reply: async_nats::Subject,
    /// Released when the request is answered or dropped.
    _room: OwnedSemaphorePermit,
}

#[async_trait]
impl Responder for NatsResponder {
    async fn reply(self: Box<Self>, payload: Bytes) {
        let Wire { client, link } = &self.wire;
        if let Err(error) = check_size(self.reply.as_str(), &payload, PAYLOAD_BYTES_MAX) {
            tracing::error!(%error, "reply not sent");
        } else if !link.is_up() {
            tracing::debug!("reply not sent: the NATS server is away");
        } else if let Err(error) = client.publish(self.reply, payload).await {
            tracing::warn!(%error, "reply not sent");
        }
    }
}
