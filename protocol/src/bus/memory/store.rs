//! The durable half of the in-memory bus: work queues and logs with the server's semantics. Pure: it takes the time and returns
//! values. Invariant: every message of a queue is either available or held until some time, never both.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use crate::bus::{Enqueued, Record, StreamState};
use crate::subject::StreamLimits;

/// Why a message was not stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unstored {
    /// The stream is at its bound.
    Full,
    /// Another writer has appended to the log.
    Fenced { found: u64 },
}

/// A reclaim has voided the delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Void;

/// A message that was taken.
#[derive(Debug)]
pub(super) struct Taken {
    pub(super) payload: Bytes,
    pub(super) sequence: u64,
    pub(super) delivered: u64,
    pub(super) reader: ReaderId,
}

/// The reader that a delivery went to. A reclaim starts the next one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ReaderId(u64);

/// Keys seen within the duplicate window.
#[derive(Debug)]
struct Keys {
    window: Duration,
    sequences: BTreeMap<String, u64>,
    by_age: VecDeque<(Instant, String)>,
}

impl Keys {
    fn new(window: Duration) -> Self {
        Self {
            window,
            sequences: BTreeMap::new(),
            by_age: VecDeque::new(),
        }
    }

    /// The sequence number stored under `key`, within the window.
    fn find(&mut self, key: &str, now: Instant) -> Option<u64> {
        while self
            .by_age
            .front()
            .is_some_and(|(stored, _)| *stored + self.window <= now)
        {
            if let Some((_, key)) = self.by_age.pop_front() {
                self.sequences.remove(&key);
            }
        }
        self.sequences.get(key).copied()
    }

    fn insert(&mut self, key: &str, sequence: u64, now: Instant) {
        self.sequences.insert(key.to_owned(), sequence);
        self.by_age.push_back((now, key.to_owned()));
    }
}

/// A work queue.
#[derive(Debug)]
pub(super) struct QueueStore {
    limits: StreamLimits,
    keys: Keys,
    messages: BTreeMap<u64, Message>,
    available: BTreeSet<u64>,
    held: BTreeSet<(Instant, u64)>,
    bytes: u64,
    last_sequence: u64,
    reader: ReaderId,
}

#[derive(Debug)]
struct Message {
    payload: Bytes,
    delivered: u64,
    held_until: Option<Instant>,
}

impl QueueStore {
    pub(super) fn new(limits: StreamLimits) -> Self {
        Self {
            limits,
            keys: Keys::new(limits.duplicate_window),
            messages: BTreeMap::new(),
            available: BTreeSet::new(),
            held: BTreeSet::new(),
            bytes: 0,
            last_sequence: 0,
            reader: ReaderId(0),
        }
    }

    /// Stores a message once per key. A known key is recognised even when the queue is full.
    pub(super) fn enqueue(
        &mut self,
        key: &str,
        payload: Bytes,
        now: Instant,
    ) -> Result<Enqueued, Unstored> {
        if let Some(sequence) = self.keys.find(key, now) {
            return Ok(Enqueued::Duplicate(sequence));
        }
        let messages_full = self
            .limits
            .messages_max
            .is_some_and(|most| self.messages.len() as u64 >= most);
        if messages_full || self.bytes + payload.len() as u64 > self.limits.bytes_max {
            return Err(Unstored::Full);
        }
        self.last_sequence += 1;
        self.bytes += payload.len() as u64;
        self.keys.insert(key, self.last_sequence, now);
        self.available.insert(self.last_sequence);
        self.messages.insert(
            self.last_sequence,
            Message {
                payload,
                delivered: 0,
                held_until: None,
            },
        );
        Ok(Enqueued::Stored(self.last_sequence))
    }

    /// Takes up to `max` messages, oldest first, and holds each for the queue's wait.
    pub(super) fn take(&mut self, max: usize, now: Instant) -> Vec<Taken> {
        while let Some(&(until, sequence)) = self.held.first() {
            if until > now {
                break;
            }
            self.release(sequence);
        }
        let mut taken = Vec::new();
        while taken.len() < max {
            let Some(sequence) = self.available.pop_first() else {
                break;
            };
            let Some(message) = self.messages.get_mut(&sequence) else {
                continue;
            };
            let until = now + self.limits.ack_wait;
            message.delivered += 1;
            message.held_until = Some(until);
            self.held.insert((until, sequence));
            taken.push(Taken {
                payload: message.payload.clone(),
                sequence,
                delivered: message.delivered,
                reader: self.reader,
            });
        }
        debug_assert_eq!(
            self.messages.len(),
            self.available.len() + self.held.len(),
            "a message is either available or held"
        );
        taken
    }

    /// When the next held message becomes available again.
    pub(super) fn next_release(&self) -> Option<Instant> {
        self.held.first().map(|(until, _)| *until)
    }

    /// Removes a message for good, also one that is available again. Acknowledging twice is not an error.
    pub(super) fn ack(&mut self, reader: ReaderId, sequence: u64) -> Result<(), Void> {
        self.check(reader)?;
        if let Some(message) = self.messages.remove(&sequence) {
            self.bytes -= message.payload.len() as u64;
            self.available.remove(&sequence);
            if let Some(until) = message.held_until {
                self.held.remove(&(until, sequence));
            }
        }
        Ok(())
    }

    /// Makes a held message available at `until`.
    pub(super) fn hold_until(
        &mut self,
        reader: ReaderId,
        sequence: u64,
        until: Instant,
    ) -> Result<(), Void> {
        self.check(reader)?;
        if let Some(message) = self.messages.get_mut(&sequence)
            && let Some(before) = message.held_until.replace(until)
        {
            self.held.remove(&(before, sequence));
            self.available.remove(&sequence);
            self.held.insert((until, sequence));
        }
        Ok(())
    }

    /// Holds a held message for another wait.
    pub(super) fn renew(
        &mut self,
        reader: ReaderId,
        sequence: u64,
        now: Instant,
    ) -> Result<(), Void> {
        self.hold_until(reader, sequence, now + self.limits.ack_wait)
    }

    /// Makes every message available and voids every delivery.
    pub(super) fn reclaim(&mut self) {
        self.reader.0 += 1;
        self.held.clear();
        for (sequence, message) in &mut self.messages {
            message.held_until = None;
            message.delivered = 0;
            self.available.insert(*sequence);
        }
    }

    pub(super) fn state(&self) -> StreamState {
        StreamState {
            messages: self.messages.len() as u64,
            last_sequence: self.last_sequence,
        }
    }

    fn check(&self, reader: ReaderId) -> Result<(), Void> {
        if reader == self.reader {
            Ok(())
        } else {
            Err(Void)
        }
    }

    fn release(&mut self, sequence: u64) {
        if let Some(message) = self.messages.get_mut(&sequence)
            && let Some(until) = message.held_until.take()
        {
            self.held.remove(&(until, sequence));
            self.available.insert(sequence);
        }
    }
}

#[derive(Debug)]
pub(super) struct LogStore {
    limits: StreamLimits,
    keys: Keys,
    /// Key and payload.
    records: Vec<(String, Bytes)>,
    bytes: u64,
}

impl LogStore {
    pub(super) fn new(limits: StreamLimits) -> Self {
        let keys = Keys::new(limits.duplicate_window);
        Self {
            limits,
            keys,
            records: Vec::new(),
            bytes: 0,
        }
    }

    /// Appends once per key. The fence is checked before the key, as on the server. But a writer whose confirmation was lost
    /// finds its own record right behind the fence, and gets [`Enqueued::Duplicate`].
    pub(super) fn append(
        &mut self,
        key: &str,
        expected_last: Option<u64>,
        payload: Bytes,
        now: Instant,
    ) -> Result<Enqueued, Unstored> {
        let found = self.records.len() as u64;
        if let Some(expected) = expected_last.filter(|expected| *expected != found) {
            let behind = usize::try_from(expected)
                .ok()
                .and_then(|index| self.records.get(index));
            return match behind {
                Some((stored, _)) if stored == key => Ok(Enqueued::Duplicate(expected + 1)),
                _ => Err(Unstored::Fenced { found }),
            };
        }
        if let Some(sequence) = self.keys.find(key, now) {
            return Ok(Enqueued::Duplicate(sequence));
        }
        if self.bytes + payload.len() as u64 > self.limits.bytes_max {
            return Err(Unstored::Full);
        }
        self.bytes += payload.len() as u64;
        self.records.push((key.to_owned(), payload));
        self.keys.insert(key, found + 1, now);
        Ok(Enqueued::Stored(found + 1))
    }

    /// Up to `max` records after number `after`.
    pub(super) fn read(&self, after: u64, max: usize) -> Vec<Record> {
        let start = usize::try_from(after).unwrap_or(usize::MAX);
        let rest = self.records.get(start..).unwrap_or_default();
        let numbered = rest.iter().zip(after.saturating_add(1)..).take(max);
        numbered
            .map(|((_, payload), sequence)| Record {
                sequence,
                payload: payload.clone(),
            })
            .collect()
    }

    pub(super) fn last(&self) -> Option<Record> {
        let (_, payload) = self.records.last()?.clone();
        Some(Record {
            sequence: self.records.len() as u64,
            payload,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::subject::{Log, Queue};

    const WAIT: Duration = Duration::from_secs(30);

    fn queue() -> (QueueStore, Instant) {
        let limits = StreamLimits {
            ack_wait: WAIT,
            ..Queue::Ready.limits()
        };
        (QueueStore::new(limits), Instant::now())
    }

    fn payload() -> Bytes {
        Bytes::from_static(b"x")
    }

    #[test]
    fn a_message_stays_with_its_reader_until_the_wait_is_over() {
        let (mut queue, start) = queue();
        queue.enqueue("a", payload(), start).unwrap();
        assert_eq!(queue.take(9, start).len(), 1);
        assert_eq!(queue.next_release(), Some(start + WAIT));
        assert!(
            queue
                .take(9, start + WAIT - Duration::from_millis(1))
                .is_empty()
        );
        assert_eq!(queue.take(9, start + WAIT)[0].delivered, 2);
    }

    #[test]
    fn a_message_that_is_given_back_or_renewed_is_counted_once() {
        let (mut queue, start) = queue();
        queue.enqueue("a", payload(), start).unwrap();
        let taken = queue.take(1, start).remove(0);
        queue
            .renew(taken.reader, taken.sequence, start + WAIT / 2)
            .unwrap();
        assert!(queue.take(1, start + WAIT).is_empty());
        queue
            .hold_until(taken.reader, taken.sequence, start + WAIT)
            .unwrap();
        assert_eq!(queue.take(1, start + WAIT).len(), 1);
        queue.ack(taken.reader, taken.sequence).unwrap();
        assert_eq!(
            (queue.held.len(), queue.available.len(), queue.bytes),
            (0, 0, 0)
        );
        queue.renew(taken.reader, taken.sequence, start).unwrap();
        assert_eq!(queue.next_release(), None);
    }

    #[test]
    fn a_reclaimed_message_belongs_to_the_next_reader_only() {
        let (mut queue, start) = queue();
        queue.enqueue("a", payload(), start).unwrap();
        let before = queue.take(1, start).remove(0);
        queue.reclaim();
        let after = queue.take(1, start).remove(0);
        assert_eq!(after.delivered, 1);
        assert_eq!(queue.ack(before.reader, before.sequence), Err(Void));
        assert_eq!(queue.state().messages, 1);
    }

    #[test]
    fn a_key_is_forgotten_after_the_window() {
        let (mut queue, start) = queue();
        let window = queue.limits.duplicate_window;
        assert_eq!(
            queue.enqueue("a", payload(), start),
            Ok(Enqueued::Stored(1))
        );
        let within = start + window - Duration::from_millis(1);
        assert_eq!(
            queue.enqueue("a", payload(), within),
            Ok(Enqueued::Duplicate(1))
        );
        assert_eq!(
            queue.enqueue("a", payload(), start + window),
            Ok(Enqueued::Stored(2))
        );
    }

    #[test]
    fn a_log_over_its_bytes_refuses() {
        let limits = StreamLimits {
            bytes_max: 1,
            ..Log::Fates.limits()
        };
        let mut log = LogStore::new(limits);
        assert_eq!(
            log.append("a", None, payload(), Instant::now()),
            Ok(Enqueued::Stored(1))
        );
        assert_eq!(
            log.append("b", None, payload(), Instant::now()),
            Err(Unstored::Full)
        );
    }
}
