//! What the connections of one in-memory bus share: its state under a lock, and the task that delivers messages when their
//! time comes.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use bytes::Bytes;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::request::{ConnectionId, ReplySink, ReplyTo};
use super::state::{MemoryConfig, State};
use crate::bus::BusError;
use crate::id::RunId;
use crate::subject::{Permissions, Queue, Role, Subject, Subjects};

pub(super) struct Shared {
    pub(super) run: RunId,
    pub(super) subjects: Subjects,
    state: Mutex<State>,
    /// Wakes [`deliver`] when a message is to arrive earlier than it knows.
    schedule_changed: Arc<Notify>,
    /// Wakes readers of a queue, in the order of [`Queue::ALL`].
    queue_changed: [Notify; Queue::ALL.len()],
}

impl Shared {
    /// The shared part of a new bus, with the task that delivers its messages.
    pub(super) fn start(run: &RunId, config: &MemoryConfig) -> Arc<Self> {
        let schedule_changed = Arc::new(Notify::new());
        let shared = Arc::new_cyclic(|shared: &Weak<Self>| Self {
            run: run.clone(),
            subjects: Subjects::of(run),
            state: Mutex::new(State::new(config, shared.clone())),
            schedule_changed: schedule_changed.clone(),
            queue_changed: std::array::from_fn(|_| Notify::new()),
        });
        tokio::spawn(deliver(Arc::downgrade(&shared), schedule_changed));
        shared
    }

    /// No code panics while it holds the lock, so a poisoned one is still whole.
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state, then delivers every message that takes no time.
    pub(super) fn with_state<T>(&self, act: impl FnOnce(&mut State, Instant) -> T) -> T {
        let now = Instant::now();
        let mut state = self.lock();
        let before = state.next_arrival();
        let result = act(&mut state, now);
        state.run_due(now);
        let after = state.next_arrival();
        drop(state);
        if after.is_some() && after != before {
            self.schedule_changed.notify_one();
        }
        result
    }

    pub(super) fn permissions(&self, user: &str, role: Role) -> Patterns {
        let permissions = Permissions::of(role, user, &self.run);
        let patterns = |texts: Vec<String>| texts.into_iter().map(Subject::from).collect();
        Patterns {
            publish: patterns(permissions.publish),
            subscribe: patterns(permissions.subscribe),
        }
    }

    pub(super) fn queue_changed(&self, queue: Queue) -> &Notify {
        &self.queue_changed[queue as usize]
    }
}

impl ReplySink for Shared {
    fn send_reply(&self, from: ConnectionId, reply_to: &ReplyTo, payload: Bytes) {
        self.with_state(|state, now| {
            if state.reaches(from) {
                state.reply(reply_to, &Ok(payload), now);
            } else {
                state.counters.lost += 1;
            }
        });
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.schedule_changed.notify_one();
    }
}

/// The subjects that a member may use.
pub(super) struct Patterns {
    pub(super) publish: Vec<Subject>,
    pub(super) subscribe: Vec<Subject>,
}

pub(super) fn check_permission(patterns: &[Subject], subject: &Subject) -> Result<(), BusError> {
    if patterns.iter().any(|pattern| pattern.covers(subject)) {
        return Ok(());
    }
    Err(BusError::Denied {
        subject: subject.as_str().to_owned(),
    })
}

/// Delivers messages when their time comes, until the bus is dropped.
async fn deliver(shared: Weak<Shared>, schedule_changed: Arc<Notify>) {
    loop {
        let next = match shared.upgrade() {
            Some(shared) => {
                let mut state = shared.lock();
                state.run_due(Instant::now());
                state.next_arrival()
            }
            None => return,
        };
        tokio::select! {
            biased;
            () = schedule_changed.notified() => {}
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
