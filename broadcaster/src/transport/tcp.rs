//! TCP: what every peer speaks. The system paces it; where it can, without taking a lost packet for a full link.

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

/// How long one address may take to answer: beyond it another peer is the better choice.
const CONNECT: Duration = Duration::from_secs(3);
/// Bytes that the system may hold of a connection and has not sent yet: a few milliseconds of a home link.
const UNSENT_BYTES_MAX: u32 = 32 << 10;
/// Bytes that may lie ready before a reader who waits for more is woken: some packets, so that a shard costs a few wakings and
/// not one for each packet, and half of what the system keeps at first for a connection.
const WAKE_BYTES_MAX: u32 = 32 << 10;
/// Bytes read at once where small messages are to be expected: many fit, and a shard passes by but for its first bytes.
const READ_BYTES: usize = 4 << 10;
/// Congestion control for long paths, which does not take a lost packet for a full link; and for short ones, which does not
/// overfill their queues. Where the system has them.
const LONG_PATH_CONTROL: &[u8] = b"bbr";
const SHORT_PATH_CONTROL: &[u8] = b"cubic";
/// Bytes sent until the system has seen a path often enough to tell its length from what waits in queues: while everybody
/// connects at once, opening packets wait too. Until then it is taken for as long as these say.
const PATH_KNOWN_BYTES: usize = 128 << 10;

/// A listening socket, and dialling from any port.
#[derive(Debug)]
pub(crate) struct Tcp {
    listener: TcpListener,
    address: SocketAddr,
    advertise: Vec<String>,
}

impl Tcp {
    /// Listens on `listen`. Others are told `advertise`, or else that address, unless it stands for every interface.
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

    /// Where it listens, the port chosen.
    pub(crate) fn local_address(&self) -> SocketAddr {
        self.address
    }
}

#[async_trait]
impl Transport for Tcp {
    async fn dial(&self, record: &PeerRecord) -> Result<Streams, DialError> {
        let mut failure = DialError::NoAddress;
        // What names another way is not for this one.
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
        // What does not fit into an empty socket's buffer is not said.
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

/// What goes out, and how many bytes of it until the path is known.
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

/// What comes in, and at how many bytes the system wakes its reader.
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
            Err(error) => tracing::debug!(%error, "the system wakes readers as it likes"),
        }
    }
}

/// Has the system take a shard only as fast as the link does. With the usual buffers whole shards of every connection lie
/// half sent in the system, and none of them can be passed on.
fn tune(stream: &TcpStream) {
    if let Err(error) = SockRef::from(stream).set_tcp_notsent_lowat(UNSENT_BYTES_MAX) {
        tracing::debug!(%error, "the system keeps its own bound on unsent bytes");
    }
    control(stream);
}

/// Has the system control congestion as the path asks for, as far as it is known.
fn control(stream: &TcpStream) {
    let is_long = |shortest| shortest >= LONG_PATH;
    let name = match options::shortest_round_trip(stream).is_some_and(is_long) {
        true => LONG_PATH_CONTROL,
        false => SHORT_PATH_CONTROL,
    };
    if let Err(error) = SockRef::from(stream).set_tcp_congestion(name) {
        tracing::debug!(%error, "the system keeps its own congestion control");
    }
}
