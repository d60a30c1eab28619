//! Requests to JetStream's API and the meaning of its refusals. This file does not use the client library's typed layer, which
//! takes "no responders" for a confirmed acknowledgement and hides the error codes that tell a full queue from a full disk. It
//! does use the library's configuration types.

use std::sync::Arc;
use std::time::Duration;

use async_nats::client::RequestErrorKind;
use async_nats::{Client, HeaderMap, RequestError};
use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::link::{Link, Use};
use crate::bus::{BusError, DURABLE_TIMEOUT};

/// The server's error codes.
pub(super) mod code {
    pub(crate) const CONSUMER_NOT_FOUND: u64 = 10_014;
    pub(crate) const INSUFFICIENT_RESOURCES: u64 = 10_023;
    pub(crate) const STORAGE_EXCEEDED: u64 = 10_047;
    pub(crate) const STREAM_EXISTS_OTHERWISE: u64 = 10_058;
    pub(crate) const STREAM_NOT_FOUND: u64 = 10_059;
    pub(crate) const WRONG_LAST_SEQUENCE: u64 = 10_071;
    pub(crate) const STORE_FAILED: u64 = 10_077;
    pub(crate) const WORK_QUEUE_TAKEN: [u64; 2] = [10_099, 10_100];
    pub(crate) const TOO_MANY_REQUESTS: u64 = 10_167;
}

/// A connection and its state.
#[derive(Clone)]
pub(super) struct Wire {
    pub(super) client: Client,
    pub(super) link: Arc<Link>,
}

/// A reply of the JetStream API.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Reply<T> {
    Refused { error: ApiError },
    Done(T),
}

/// A refusal by JetStream.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct ApiError {
    #[serde(default)]
    pub(super) err_code: u64,
    #[serde(default)]
    pub(super) description: String,
}

/// A durable write, confirmed.
#[derive(Debug, Deserialize)]
pub(super) struct Confirmation {
    pub(super) seq: u64,
    #[serde(default)]
    pub(super) duplicate: bool,
}

impl Wire {
    /// Sends a request and waits for the reply. Each way of not getting one is an error of its own.
    pub(super) async fn request(
        &self,
        subject: &str,
        headers: Option<HeaderMap>,
        payload: Bytes,
        timeout: Duration,
    ) -> Result<Bytes, BusError> {
        let connection = self.link.ready(&self.client, subject, timeout).await?;
        // No timeout of the library: the wait below also ends when the connection is lost.
        let mut request = async_nats::Request::new().payload(payload).timeout(None);
        if let Some(headers) = headers {
            request = request.headers(headers);
        }
        let asked = async {
            let sent = self.client.send_request(subject.to_owned(), request).await;
            sent.map(|message| message.payload)
                .map_err(|error| request_failed(subject, &error))
        };
        connection.run(Use::Publish, timeout, asked).await
    }

    /// Sends a request to JetStream's API.
    pub(super) async fn manage<T: DeserializeOwned>(
        &self,
        verb: &str,
        body: &impl Serialize,
    ) -> Result<Reply<T>, BusError> {
        let subject = format!("$JS.API.{verb}");
        let body = serde_json::to_vec(body).map_err(|error| unreadable(&subject, &error))?;
        self.ask(&subject, None, Bytes::from(body)).await
    }

    /// Sends a request that has a JSON reply within [`DURABLE_TIMEOUT`].
    pub(super) async fn ask<T: DeserializeOwned>(
        &self,
        subject: &str,
        headers: Option<HeaderMap>,
        payload: Bytes,
    ) -> Result<Reply<T>, BusError> {
        let answer = self
            .request(subject, headers, payload, DURABLE_TIMEOUT)
            .await?;
        serde_json::from_slice(&answer).map_err(|error| unreadable(subject, &error))
    }
}

fn request_failed(subject: &str, error: &RequestError) -> BusError {
    match error.kind() {
        RequestErrorKind::NoResponders => BusError::NoResponders {
            subject: subject.to_owned(),
        },
        RequestErrorKind::Other => BusError::Closed(format!(
            "the connection to the NATS server ended during a request on {subject}: connect again"
        )),
        kind => BusError::Server(format!("request on {subject} not sent: {kind}")),
    }
}

fn unreadable(subject: &str, error: &serde_json::Error) -> BusError {
    BusError::Server(format!(
        "the answer on {subject} cannot be read ({error}): is the server a nats-server 2.11 or newer?"
    ))
}

impl ApiError {
    /// The meaning of the refusal for the queue or log `token`.
    pub(super) fn meaning(&self, token: &str) -> BusError {
        match self.err_code {
            code::STORE_FAILED if self.description.contains("maximum") => BusError::Full {
                queue: token.to_owned(),
            },
            code::TOO_MANY_REQUESTS => BusError::Full {
                queue: token.to_owned(),
            },
            code::STREAM_NOT_FOUND => BusError::Server(format!(
                "the NATS server holds no stream for {token}: start the run's dispatch or trainer, which creates it"
            )),
            code::INSUFFICIENT_RESOURCES | code::STORAGE_EXCEEDED | code::STORE_FAILED => {
                BusError::Server(format!(
                    "the NATS server cannot store {token} ({}): free disk space or raise its `max_file`",
                    self.description
                ))
            }
            err_code => BusError::Server(format!(
                "the NATS server refuses an operation on {token}: {} (code {err_code})",
                self.description
            )),
        }
    }

    /// The number in `wrong last sequence: 5`.
    pub(super) fn sequence_found(&self) -> Option<u64> {
        self.description.rsplit(' ').next()?.parse().ok()
    }
}

impl<T> Reply<T> {
    /// The result, or the meaning of the refusal for the queue or log `token`.
    pub(super) fn or_meaning(self, token: &str) -> Result<T, BusError> {
        match self {
            Reply::Done(done) => Ok(done),
            Reply::Refused { error } => Err(error.meaning(token)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(json: &str) -> ApiError {
        match serde_json::from_str::<Reply<Confirmation>>(json).unwrap() {
            Reply::Refused { error } => error,
            Reply::Done(done) => panic!("{done:?}"),
        }
    }

    #[test]
    fn a_full_queue_is_told_from_a_full_disk() {
        let full = r#"{"error":{"code":503,"err_code":10077,"description":"maximum messages exceeded"},"seq":0}"#;
        assert!(refusal(full).meaning("ready").is_transient());
        let disk = r#"{"error":{"code":503,"err_code":10077,"description":"no space left on device"},"seq":0}"#;
        let meaning = refusal(disk).meaning("ready");
        assert!(!meaning.is_transient() && meaning.to_string().contains("free disk space"));
    }

    #[test]
    fn a_fenced_writer_learns_the_newest_number() {
        let fenced =
            r#"{"error":{"code":400,"err_code":10071,"description":"wrong last sequence: 5"}}"#;
        assert_eq!(refusal(fenced).sequence_found(), Some(5));
    }
}
