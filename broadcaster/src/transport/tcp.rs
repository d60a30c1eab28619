//! The TCP transport, which every peer speaks. The system does the congestion control, with BBR on long paths where it has it.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use muster_protocol::message::peer::PeerRecord;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, BufReader, ReadBuf};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use crate::transport::connection::ConnectionError;
use crate::transport::interface::{Arrival, DialError, LONG_PATH, Transport};
use crate::transport::nat::config::SCHEME;
use crate::transport::stream::{Incoming, Streams};

mod options;

/// How long one address may take to answer. After that another peer is the better choice.
const CONNECT: Duration = Duration::from_secs(3);
/// Most unsent bytes that the system holds per connection: a few milliseconds of a home link.
const UNSENT_BYTES_MAX: u32 = 32 << 10;
/// Most bytes that the system collects before it wakes a reader: some packets, so that a shard does not wake its reader for
/// each one; and half of a connection's initial receive buffer.
const WAKE_BYTES_MAX: u32 = 32 << 10;
/// The read buffer: many small messages fit, and only the first bytes of a shard pass through it.
const READ_BYTES: usize = 4 << 10;
/// Congestion control for long paths, where a lost packet does not mean a full link, and for short ones, whose queues BBR
/// overfills. See [`LONG_PATH`].
const LONG_PATH_CONTROL: &[u8] = b"bbr";
const SHORT_PATH_CONTROL: &[u8] = b"cubic";
/// Bytes sent before the shortest round trip is trusted again. While all peers connect at once the first packets wait in queues,
/// so that a short path looks long; until then the control chosen by the first packets stays.
const PATH_KNOWN_BYTES: usize = 128 << 10;

/// A listening socket, and dialling from any port.
#[derive(Debug)]
pub(crate) struct Tcp {
    listener: TcpListener,
    address: SocketAddr,
    advertise: Vec<String>,
}

impl Tcp {
    /// Listens on `listen`. Other peers are told `advertise`, or by default that address unless it means every interface.
    ///
    /// # Errors
    /// When the address is taken or not ours.
    pub(crate) async fn listen(listen: SocketAddr, advertise: Vec<String>) -> io::Result<Self> {
        let listener = TcpListener::bind(listen).await?;
        let address = listener.local_addr()?;
        let advertise = match advertise.is_empty() && !address.ip().is_unspecified() {
            true => vec![address.to_string()],
            false => advertise,
        };
        Ok(Self {
            listener,
            address,
            advertise,
        })
    }

    /// The listening address, with the port that the system chose.
    pub(crate) fn local_address(&self) -> SocketAddr {
        self.address
    }
}

#[async_trait]
impl Transport for Tcp {
    async fn dial(&self, record: &PeerRecord) -> Result<Streams, DialError> {
        let mut failure = DialError::NoAddress;
        // Addresses of the NAT transport have a prefix.
        let is_own = |address: &&String| !address.starts_with(SCHEME);
        for address in record.addresses.iter().filter(is_own) {
            let reason = match timeout(CONNECT, TcpStream::connect(address.as_str())).await {
                Ok(Ok(stream)) => {
                    stream.set_nodelay(true).map_err(ConnectionError::Io)?;
                    return Ok(streams(stream));
                }
                Ok(Err(error)) => error.to_string(),
                Err(_) => format!("no answer within {} s", CONNECT.as_secs()),
            };
            failure = DialError::Unreachable {
                address: address.clone(),
                reason,
            };
        }
        Err(failure)
    }

    async fn accept(&self) -> io::Result<Box<dyn Arrival>> {
        let (stream, _) = self.listener.accept().await?;
        Ok(Box::new(Accepted(stream)))
    }

    fn addresses(&self) -> Vec<String> {
        self.advertise.clone()
    }
}

struct Accepted(TcpStream);

#[async_trait]
impl Arrival for Accepted {
    async fn open(self: Box<Self>) -> Result<Streams, ConnectionError> {
        self.0.set_nodelay(true)?;
        tune(&self.0);
        Ok(streams(self.0))
    }

    fn turn_away(self: Box<Self>, frame: &[u8]) {
        // The frame fits into the empty buffer of a new socket; if not, it is not sent.
        self.0.try_write(frame).ok();
    }
}

fn streams(stream: TcpStream) -> Streams {
    let (reader, writer) = stream.into_split();
    let reader = TcpReader {
        inner: BufReader::with_capacity(READ_BYTES, reader),
        wakes_at: 1,
    };
    let writer = TcpWriter {
        inner: writer,
        until_known: PATH_KNOWN_BYTES,
    };
    tokio::io::join(Box::new(reader), Box::new(writer))
}

/// The sending half, and the bytes until the path's length is known.
#[derive(Debug)]
struct TcpWriter {
    inner: OwnedWriteHalf,
    until_known: usize,
}

impl TcpWriter {
    fn wrote(&mut self, bytes: usize) {
        if self.until_known == 0 {
            return;
        }
        self.until_known = self.until_known.saturating_sub(bytes);
        if self.until_known == 0 {
            control(self.inner.as_ref());
        }
    }
}

impl AsyncWrite for TcpWriter {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write(context, bytes);
        if let Poll::Ready(Ok(bytes)) = written {
            self.wrote(bytes);
        }
        written
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write_vectored(context, pieces);
        if let Poll::Ready(Ok(bytes)) = written {
            self.wrote(bytes);
        }
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}

/// The receiving half, and the number of bytes at which the system wakes its reader.
#[derive(Debug)]
struct TcpReader {
    inner: BufReader<OwnedReadHalf>,
    wakes_at: u32,
}

impl AsyncRead for TcpReader {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(context, buffer)
    }
}

impl Incoming for TcpReader {
    fn expect(&mut self, bytes: usize) {
        let missing = bytes.saturating_sub(self.inner.buffer().len());
        let bytes = u32::try_from(missing).unwrap_or(u32::MAX);
        let bytes = bytes.clamp(1, WAKE_BYTES_MAX);
        if bytes == self.wakes_at {
            return;
        }
        match options::set_wakes_at(self.inner.get_ref().as_ref(), bytes) {
            Ok(()) => self.wakes_at = bytes,
            Err(error) => tracing::debug!(%error, "cannot set when the system wakes readers"),
        }
    }
}

/// Limits the system's send buffer, so that it takes a shard only as fast as the link does. With the default buffer a shard of
/// every connection would lie half sent in the system, and no peer could pass one on yet.
fn tune(stream: &TcpStream) {
    if let Err(error) = SockRef::from(stream).set_tcp_notsent_lowat(UNSENT_BYTES_MAX) {
        tracing::debug!(%error, "cannot set the bound of unsent bytes");
    }
    control(stream);
}

/// Sets the congestion control that suits the path, as far as its length is known.
fn control(stream: &TcpStream) {
    let is_long = |shortest| shortest >= LONG_PATH;
    let name = match options::shortest_round_trip(stream).is_some_and(is_long) {
        true => LONG_PATH_CONTROL,
        false => SHORT_PATH_CONTROL,
    };
    if let Err(error) = SockRef::from(stream).set_tcp_congestion(name) {
        tracing::debug!(%error, "cannot set the congestion control");
    }
}
