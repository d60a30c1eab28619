//! The bus in memory, for simulation: a network that delays, loses and duplicates messages, members that are cut off or
//! die, and the server's permissions, queues and logs. One seed drives every random draw and tokio's timer every wait, so
//! on a paused single-threaded runtime time is virtual and equal seeds give equal runs.
//!
//! It behaves as NATS does wherever a caller can tell (`tests/bus_conformance/` runs on both): news arrives in the order
//! in which it was sent; a request goes to one of its servers; a durable call is confirmed or times out; a dead member's
//! deliveries come back after the queue's wait.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;

use self::connection::Connection;
use self::request::ReplyTo;
use self::shared::{Shared, check_permission};
use super::{BusError, SharedBus};
use crate::id::RunId;
use crate::subject::{Role, Subject};

mod connection;
mod network;
mod request;
mod routes;
mod shared;
mod state;
mod store;

pub use self::network::NetworkFaults;
pub use self::state::{MemoryConfig, MemoryCounters};

/// The bus of one run, in memory. Clones are handles to the same bus.
#[derive(Clone)]
pub struct MemoryBus {
    shared: Arc<Shared>,
}

impl MemoryBus {
    /// A new bus. Must be called inside the tokio runtime that all of its members run on.
    pub fn new(run: &RunId, config: MemoryConfig) -> Self {
        Self {
            shared: Shared::start(run, &config),
        }
    }

    /// Connects a member with the permissions of `role`. A user may connect more than once.
    pub fn connect(&self, user: &str, role: Role) -> SharedBus {
        Arc::new(Connection::open(&self.shared, user, role))
    }

    /// Ends every connection of a member, as when its process dies: it neither sends nor receives, and its deliveries
    /// come back after the queue's wait. Dropping the last handle of a connection does the same.
    pub fn disconnect(&self, user: &str) {
        self.shared
            .with_state(|state, _| state.disconnect_user(user));
    }

    /// Cuts a member off: its messages get lost both ways and its durable calls time out, until [`MemoryBus::heal`].
    pub fn cut_off(&self, user: &str) {
        self.shared.with_state(|state, _| state.cut_off(user));
    }

    /// Ends a [`MemoryBus::cut_off`]. The member's subscriptions have survived it.
    pub fn heal(&self, user: &str) {
        self.shared.with_state(|state, _| state.heal(user));
    }

    /// Changes the faults of messages sent from now on.
    pub fn set_faults(&self, faults: NetworkFaults) {
        self.shared
            .with_state(|state, _| state.network.set_faults(faults));
    }

    /// Sends a request whose reply goes to an address of the sender's choice, as a hostile client can.
    ///
    /// # Errors
    /// When `user` in `role` may not publish on `subject`.
    pub fn publish_with_reply(
        &self,
        user: &str,
        role: Role,
        subject: &Subject,
        reply: Subject,
        payload: &Bytes,
    ) -> Result<(), BusError> {
        let permissions = self.shared.permissions(user, role);
        check_permission(&permissions.publish, subject)?;
        let reply_to = ReplyTo::Address(reply);
        self.shared
            .with_state(|state, now| state.send_request(subject, payload, &reply_to, now));
        Ok(())
    }

    /// BLAKE3 over every message that moved so far: its subject, the hash of its bytes, the virtual time.
    pub fn trace_hash(&self) -> [u8; 32] {
        *self.shared.lock().trace_hash().as_bytes()
    }

    /// Counts of messages so far.
    pub fn counters(&self) -> MemoryCounters {
        self.shared.lock().counters
    }
}

impl fmt::Debug for MemoryBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MemoryBus({})", self.shared.run)
    }
}

#[cfg(test)]
mod tests;
