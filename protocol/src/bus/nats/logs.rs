//! Logs: appended behind a fence, read in order. The leader tells the numbers. Any replica may send the records; a replica that
//! lags behind the leader is asked again.

use std::time::{Duration, Instant};

use async_nats::{Message, header};
use bytes::Bytes;
use serde_json::json;

use super::api::{ApiError, Reply, code};
use super::link::timed_out;
use super::pull::Collect;
use super::streams::{Streams, headers};
use crate::bus::{BusError, DURABLE_TIMEOUT, Enqueued, Record};
use crate::subject::Log;

/// Records of one request: the server sends at most 1,024.
const READ_RECORDS_MAX: usize = 512;
/// Bytes of one request.
const READ_BYTES_MAX: usize = 16 << 20;
/// Pause before a replica that lags behind is asked again.
const REPLICA_PAUSE: Duration = Duration::from_millis(50);

/// A record and the key that it was stored under.
struct Stored {
    key: Option<String>,
    record: Record,
}

impl Streams {
    pub(super) async fn append(
        &self,
        log: Log,
        key: &str,
        expected_last: Option<u64>,
        payload: Bytes,
    ) -> Result<Enqueued, BusError> {
        let subject = self.subjects.log(log);
        let headers = headers(key, expected_last);
        match (
            self.store(subject.as_str(), headers, payload).await?,
            expected_last,
        ) {
            (Reply::Refused { error }, Some(expected))
                if error.err_code == code::WRONG_LAST_SEQUENCE =>
            {
                self.look_behind_fence(log, key, expected, &error).await
            }
            (reply, _) => reply.or_meaning(log.token()).map(Enqueued::from),
        }
    }

    /// Tells a writer that was overtaken from one whose confirmation was lost. The server checks the fence before the key. The
    /// second writer's record is right behind the fence, under its key.
    async fn look_behind_fence(
        &self,
        log: Log,
        key: &str,
        expected: u64,
        error: &ApiError,
    ) -> Result<Enqueued, BusError> {
        let found = match error.sequence_found() {
            Some(found) => found,
            None => self.state(log.token()).await?.last_sequence,
        };
        if found > expected {
            let behind = self.read_range(log, expected, expected + 1).await?;
            if behind
                .iter()
                .any(|stored| stored.key.as_deref() == Some(key))
            {
                return Ok(Enqueued::Duplicate(expected + 1));
            }
        }
        Err(BusError::Fenced {
            log: log.token().to_owned(),
            expected,
            found,
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
        let stored = self.read_range(log, after, newest.min(most)).await?;
        Ok(stored.into_iter().map(|stored| stored.record).collect())
    }

    /// The newest record.
    pub(super) async fn last(&self, log: Log) -> Result<Option<Record>, BusError> {
        let newest = self.state(log.token()).await?.last_sequence;
        let stored = self
            .read_range(log, newest.saturating_sub(1), newest)
            .await?;
        Ok(stored.into_iter().next_back().map(|stored| stored.record))
    }

    /// The records after number `after` up to number `until`, which the leader has. A log never loses a record, so a missing
    /// one has not reached the replica yet.
    async fn read_range(&self, log: Log, after: u64, until: u64) -> Result<Vec<Stored>, BusError> {
        let start = Instant::now();
        let subject = format!("$JS.API.DIRECT.GET.{}", self.subjects.stream(log.token()));
        let mut records: Vec<Stored> = Vec::new();
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
                let sequence = header_of(&message, header::NATS_SEQUENCE);
                if sequence.and_then(|number| number.parse().ok()) == Some(read + 1) {
                    read += 1;
                    let key = header_of(&message, header::NATS_MESSAGE_ID).map(str::to_owned);
                    let record = Record {
                        sequence: read,
                        payload: message.payload,
                    };
                    records.push(Stored { key, record });
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
}

fn header_of(message: &Message, name: header::HeaderName) -> Option<&str> {
    message
        .headers
        .as_ref()?
        .get(name)
        .map(header::HeaderValue::as_str)
}
