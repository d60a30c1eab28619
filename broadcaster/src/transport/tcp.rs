//! TCP: what every peer speaks. The system paces it; where it can, without taking a lost packet for a full link.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use muster_protocol::message::peer::PeerRecord;
use socket2::SockRef;
use tokio::io::{AsyncRead, BufReader, ReadBuf};
use tokio::net::tcp::OwnedReadHalf;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use super::{Arrival, DialError, Incoming, LONG_PATH, Streams, Transport};
use crate::connection::ConnectionError;
use crate::nat::SCHEME;

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
/// Congestion control for long paths, which does not take a lost packet for a full link, where the system has it.
const CONGESTION: &[u8] = b"bbr";

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
    tokio::io::join(Box::new(reader), Box::new(writer))
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
/// half sent in the system, and none of them can be passed on. And has it keep its pace over long paths that lose packets.
fn tune(stream: &TcpStream) {
    let socket = SockRef::from(stream);
    if let Err(error) = socket.set_tcp_notsent_lowat(UNSENT_BYTES_MAX) {
        tracing::debug!(%error, "the system keeps its own bound on unsent bytes");
    }
    let is_long = options::round_trip(stream).is_ok_and(|round_trip| round_trip >= LONG_PATH);
    if is_long && let Err(error) = socket.set_tcp_congestion(CONGESTION) {
        tracing::debug!(%error, "the system keeps its own congestion control");
    }
}
