//! The byte streams of one connection, whatever carries them.

use tokio::io::{AsyncRead, AsyncWrite, Join};

/// Bytes from a peer.
pub(crate) type Reader = Box<dyn Incoming>;
/// Bytes to a peer.
pub(crate) type Writer = Box<dyn AsyncWrite + Send + Unpin>;
/// Both directions of a connection before the handshake.
pub(crate) type Streams = Join<Reader, Writer>;

/// The receiving half of a connection.
pub(crate) trait Incoming: AsyncRead + Send + Unpin {
    /// Hints that the reader needs `bytes` more bytes, so that the system need not wake it for fewer. The hint holds until
    /// the next one. It never blocks a read: bytes that have arrived can be read, and the end of the stream too.
    fn expect(&mut self, _bytes: usize) {}
}
