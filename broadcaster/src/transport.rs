//! How one peer reaches another: the seam between what peers say and what carries it.
//!
//! A [`Transport`] finds in a record where a peer is, opens a stream each way to it, takes those that others open, and tells
//! where it can be reached itself. Who is at the other end is proved over the streams, in the same words whatever carries
//! them. Costs a byte no copy: a read or a write is one call through a pointer more. Invariant: sockets are named only in the
//! files below this one.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use muster_protocol::id::PeerId;
use muster_protocol::identity::Identity;
use muster_protocol::message::peer::PeerRecord;
use tokio::io::{AsyncRead, AsyncWrite, Join};

use crate::connection::{ConnectionError, Side, handshake};

#[cfg(feature = "nat")]
pub(crate) mod nat;
pub(crate) mod tcp;

/// Paths from here on are long: packets are lost on them, or delayed, for other reasons than a full link, and finding out takes
/// long. Over shorter ones BBR overfills the queues: 16 peers with 4 Mbit/s sent 24 % of their packets again with it, and 1.5 %
/// with CUBIC.
pub(crate) const LONG_PATH: Duration = Duration::from_millis(10);

/// What comes from a peer.
pub(crate) type Reader = Box<dyn Incoming>;
/// What goes to a peer.
pub(crate) type Writer = Box<dyn AsyncWrite + Send + Unpin>;
/// Both, before anybody has proved anything.
pub(crate) type Streams = Join<Reader, Writer>;

/// Bytes from a peer.
pub(crate) trait Incoming: AsyncRead + Send + Unpin {
    /// Says that nothing can be done before so many more bytes are there, so that nobody need be woken for fewer. Holds until
    /// something else is said; whatever is there is read all the same, and so is the end.
    fn expect(&mut self, _bytes: usize) {}
}

/// One way to other peers, and for them to this one.
#[async_trait]
pub(crate) trait Transport: std::fmt::Debug + Send + Sync {
    /// Opens streams to the first of a record's addresses that answers.
    ///
    /// # Errors
    /// When the record has no address of this kind, or none answers.
    async fn dial(&self, record: &PeerRecord) -> Result<Streams, DialError>;

    /// The next peer that wants in; what it takes to hear it out is left to [`Arrival::open`].
    ///
    /// # Cancel safety
    /// A cancelled call loses nobody.
    ///
    /// # Errors
    /// When the system cannot give one now.
    async fn accept(&self) -> io::Result<Box<dyn Arrival>>;

    /// Where others reach this peer by this way, best first; it may change while the peer runs.
    fn addresses(&self) -> Vec<String>;

    /// Ends, saying goodbye where that is the custom.
    async fn close(&self) {}
}

/// A peer at the door.
#[async_trait]
pub(crate) trait Arrival: Send {
    /// Lets it in, within a bounded time.
    ///
    /// # Errors
    /// When it is gone, or too slow.
    async fn open(self: Box<Self>) -> Result<Streams, ConnectionError>;

    /// Turns it away, with `frame` as far as that can be said without waiting.
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

/// Streams to a peer that has proved who it is.
pub(crate) struct Connection {
    pub(crate) peer: PeerId,
    pub(crate) reader: Reader,
    pub(crate) writer: Writer,
}

impl Connection {
    /// Proves our key and has the other side prove its own.
    ///
    /// # Errors
    /// When it proves nothing, or something else than expected.
    pub(crate) async fn prove(
        mut streams: Streams,
        identity: &Identity,
        side: Side,
    ) -> Result<Self, ConnectionError> {
        let peer = handshake(&mut streams, identity, side).await?;
        let (reader, writer) = streams.into_inner();
        Ok(Self {
            peer,
            reader,
            writer,
        })
    }
}

/// The ways of a peer, in the order in which they are tried.
#[derive(Debug, Clone)]
pub(crate) struct Transports(Arc<[Arc<dyn Transport>]>);

impl Transports {
    pub(crate) fn new(ways: Vec<Arc<dyn Transport>>) -> Self {
        Self(ways.into())
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<dyn Transport>> {
        self.0.iter()
    }

    /// Reaches the peer of a record by the first way on which it proves its key. Who answers with another key at one address,
    /// as a stranger in our own house may at an address of somebody else's house, is not the last word about the next.
    ///
    /// # Errors
    /// When no way leads there, with what was wrong with the last that the record names.
    pub(crate) async fn dial(
        &self,
        record: &PeerRecord,
        identity: &Identity,
    ) -> Result<Connection, DialError> {
        let expected = record.handshake;
        let mut failure = DialError::NoAddress;
        for way in self.iter() {
            let reached = match way.dial(record).await {
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
