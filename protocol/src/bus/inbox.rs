//! A bounded channel for news with one reader. When the reader is too slow the channel drops its oldest message, since the
//! newest news matters most. Knows nothing of subjects.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Notify;

use crate::limits::INBOX_MESSAGES_MAX;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pushed {
    Queued,
    /// Queued, and the oldest message was dropped for it.
    Evicted,
    /// The reader was dropped.
    Unread,
}

/// The writing end. Dropping it ends the reader.
pub(crate) struct Writer<T> {
    ring: Arc<Ring<T>>,
}

pub(crate) struct Reader<T> {
    ring: Arc<Ring<T>>,
}

struct Ring<T> {
    state: Mutex<State<T>>,
    /// Wakes the reader: a message came, or the writer was dropped.
    arrived: Notify,
    /// Wakes [`Writer::closed`].
    abandoned: Notify,
}

struct State<T> {
    messages: VecDeque<T>,
    writer: End,
    reader: End,
}

#[derive(PartialEq, Eq)]
enum End {
    Open,
    Closed,
}

/// A new channel that holds [`INBOX_MESSAGES_MAX`] messages.
pub(crate) fn channel<T>() -> (Writer<T>, Reader<T>) {
    let state = State {
        messages: VecDeque::new(),
        writer: End::Open,
        reader: End::Open,
    };
    let ring = Arc::new(Ring {
        state: Mutex::new(state),
        arrived: Notify::new(),
        abandoned: Notify::new(),
    });
    (Writer { ring: ring.clone() }, Reader { ring })
}

impl<T> Ring<T> {
    /// No code panics while it holds the lock, so a poisoned one is still whole.
    fn lock(&self) -> std::sync::MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Writer<T> {
    /// Queues a message for the reader.
    pub(crate) fn push(&self, message: T) -> Pushed {
        let mut state = self.ring.lock();
        if state.reader == End::Closed {
            return Pushed::Unread;
        }
        let evicted =
            (state.messages.len() >= INBOX_MESSAGES_MAX).then(|| state.messages.pop_front());
        state.messages.push_back(message);
        debug_assert!(
            state.messages.len() <= INBOX_MESSAGES_MAX,
            "an inbox stays within its bound"
        );
        drop(state);
        self.ring.arrived.notify_one();
        if evicted.is_some() {
            Pushed::Evicted
        } else {
            Pushed::Queued
        }
    }

    /// Waits until the reader is dropped.
    ///
    /// # Cancel safety
    /// Holds no state.
    pub(crate) async fn closed(&self) {
        let mut abandoned = std::pin::pin!(self.ring.abandoned.notified());
        abandoned.as_mut().enable();
        if self.ring.lock().reader == End::Open {
            abandoned.await;
        }
    }
}

impl<T> Drop for Writer<T> {
    fn drop(&mut self) {
        self.ring.lock().writer = End::Closed;
        self.ring.arrived.notify_one();
    }
}

impl<T> Reader<T> {
    /// The next message; `None` when the writer was dropped and every message was read.
    ///
    /// # Cancel safety
    /// A cancelled call loses nothing.
    pub(crate) async fn next(&mut self) -> Option<T> {
        loop {
            {
                let mut state = self.ring.lock();
                if let Some(message) = state.messages.pop_front() {
                    return Some(message);
                }
                if state.writer == End::Closed {
                    return None;
                }
            }
            // A message that was pushed since the check above has left a permit here.
            self.ring.arrived.notified().await;
        }
    }
}

impl<T> Drop for Reader<T> {
    fn drop(&mut self) {
        self.ring.lock().reader = End::Closed;
        self.ring.abandoned.notify_waiters();
    }
}

impl<T> fmt::Debug for Reader<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Reader({} messages)", self.ring.lock().messages.len())
    }
}

impl<T> fmt::Debug for Writer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Writer")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_slow_reader_loses_the_oldest_messages() {
        let (writer, mut reader) = channel();
        for number in 0..INBOX_MESSAGES_MAX {
            assert_eq!(writer.push(number), Pushed::Queued);
        }
        assert_eq!(writer.push(INBOX_MESSAGES_MAX), Pushed::Evicted);
        assert_eq!(reader.next().await, Some(1));
        drop(writer);
        let mut last = None;
        while let Some(number) = reader.next().await {
            last = Some(number);
        }
        assert_eq!(last, Some(INBOX_MESSAGES_MAX));
    }

    #[tokio::test]
    async fn a_writer_learns_that_its_reader_was_dropped() {
        let (writer, reader) = channel::<u8>();
        drop(reader);
        writer.closed().await;
        assert_eq!(writer.push(1), Pushed::Unread);
    }
}
