//! The bus in memory, for simulation: a network that delays, loses and doubles messages, members that are cut off and
//! die, and the server's permissions, queues and logs. All chance comes from one seed and all waiting goes through tokio's
//! timer, so that on a paused single-threaded runtime time is virtual and equal seeds give equal runs.
//!
//! What it takes from the server's word, so that the same behaviours hold on both (`tests/bus_conformance.rs`): news is
//! heard in the order in which it was sent; a request goes to one of those who serve; durable calls are confirmed or time
//! out; the dead hold their deliveries until the queue's wait is over.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use bytes::Bytes;
use tokio::sync::Notify;
use tokio::time::Instant;

use self::connection::Connection;
use self::core::{Core, ReplyTo};
use super::{BusError, QueueBounds, SharedBus};
use crate::id::RunId;
use crate::subject::{Permissions, Queue, Role, Subject, Subjects};

mod asked;
mod connection;
mod core;
mod network;
mod routes;
mod store;

pub use self::network::NetworkFaults;

/// How a simulated bus behaves.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct MemoryConfig {
    /// Where all chance comes from.
    pub seed: u64,
    /// What happens to messages on their way.
    pub faults: NetworkFaults,
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
        Arc::new(Connection::open(&self.shared, user, role))
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
    pub fn set_faults(&self, faults: NetworkFaults) {
        self.shared
            .with_core(|core, _| core.network.set_faults(faults));
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
        let permissions = self.shared.permissions(user, role);
        check_permission(&permissions.publish, subject)?;
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

    fn permissions(&self, user: &str, role: Role) -> Patterns {
        let permissions = Permissions::of(role, user, &self.run);
        let patterns = |texts: Vec<String>| texts.into_iter().map(Subject::from).collect();
        Patterns {
            publish: patterns(permissions.publish),
            subscribe: patterns(permissions.subscribe),
        }
    }

    fn queue_changed(&self, queue: Queue) -> &Notify {
        &self.queue_changed[queue as usize]
    }
}

/// What a member may publish on and subscribe to.
struct Patterns {
    publish: Vec<Subject>,
    subscribe: Vec<Subject>,
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

#[cfg(test)]
mod tests;
