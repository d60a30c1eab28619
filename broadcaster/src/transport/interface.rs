//! The interface that TCP and QUIC implement: dial a peer, accept peers, say where this peer can be reached.

use std::io;
use std::time::Duration;

use async_trait::async_trait;
use muster_protocol::message::peer::PeerRecord;

use crate::transport::connection::ConnectionError;
use crate::transport::stream::Streams;

/// Paths with at least this round-trip time count as long. On them packets are often lost or delayed although the link is not
/// full, so they use BBR. On shorter paths BBR overfills the queues: 16 peers with 4 Mbit/s retransmitted 24 % of their
/// packets with BBR and 1.5 % with CUBIC.
pub(crate) const LONG_PATH: Duration = Duration::from_millis(10);

/// One way to reach other peers and to be reached by them.
#[async_trait]
pub(crate) trait Transport: std::fmt::Debug + Send + Sync {
    /// Opens streams to the first address of a record that answers.
    ///
    /// # Errors
    /// When the record has no address of this kind, or none answers.
    async fn dial(&self, record: &PeerRecord) -> Result<Streams, DialError>;

    /// Waits for the next incoming connection. [`Arrival::open`] does the slow part.
    ///
    /// # Cancel safety
    /// A cancelled call loses no connection.
    ///
    /// # Errors
    /// When the system cannot accept a connection now.
    async fn accept(&self) -> io::Result<Box<dyn Arrival>>;

    /// The addresses at which other peers reach this one, best first. They may change while the peer runs.
    fn addresses(&self) -> Vec<String>;

    /// Closes the listener; tells connected peers where the transport can.
    async fn close(&self) {}
}

/// An incoming connection that is not open yet.
#[async_trait]
pub(crate) trait Arrival: Send {
    /// Opens it, within a bounded time.
    ///
    /// # Errors
    /// When the peer is gone or too slow.
    async fn open(self: Box<Self>) -> Result<Streams, ConnectionError>;

    /// Closes it. Sends `frame` first if that is possible without waiting.
    fn turn_away(self: Box<Self>, frame: &[u8]);
}

/// Why a peer could not be reached.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DialError {
    #[error("has no address")]
    NoAddress,
    #[error("{address} does not answer ({reason})")]
    Unreachable { address: String, reason: String },
    #[error("{0}")]
    Connection(#[from] ConnectionError),
}
