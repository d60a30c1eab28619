//! How one peer reaches another.
//!
//! * [`wire`] defines the frames that peers exchange; [`connection`] does the handshake, and reads and writes frames.
//! * `interface` is what a transport must do; `tcp` and [`nat`] (QUIC through home routers) implement it.
//!
//! The handshake proves the peer's key over the streams, so it is the same on every transport. Invariant: sockets are named
//! only in the files of this folder.

use std::sync::Arc;

use muster_protocol::identity::Identity;
use muster_protocol::message::peer::PeerRecord;

use crate::transport::connection::{Connection, Side};
use crate::transport::interface::{DialError, Transport};

pub mod connection;
pub(crate) mod interface;
pub mod nat;
pub(crate) mod stream;
pub(crate) mod tcp;
pub mod wire;

/// The transports of a peer, in the order in which a dial tries them.
#[derive(Debug, Clone)]
pub(crate) struct Transports(Arc<[Arc<dyn Transport>]>);

impl Transports {
    pub(crate) fn new(transports: Vec<Arc<dyn Transport>>) -> Self {
        Self(transports.into())
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<dyn Transport>> {
        self.0.iter()
    }

    /// Reaches the peer of a record over the first transport on which it proves its key. A wrong key at one address does not
    /// end the dial: a private address of the peer's network may belong to another machine in ours.
    ///
    /// # Errors
    /// When no transport reaches the peer; the error is the last one of an address in the record.
    pub(crate) async fn dial(
        &self,
        record: &PeerRecord,
        identity: &Identity,
    ) -> Result<Connection, DialError> {
        let expected = record.handshake;
        let mut failure = DialError::NoAddress;
        for transport in self.iter() {
            let reached = match transport.dial(record).await {
                Ok(streams) => {
                    let side = Side::Dialler { expected };
                    Connection::prove(streams, identity, side).await
                }
                Err(DialError::NoAddress) => continue,
                Err(error) => {
                    failure = error;
                    continue;
                }
            };
            match reached {
                Ok(connection) => return Ok(connection),
                Err(error) => failure = error.into(),
            }
        }
        Err(failure)
    }
}
