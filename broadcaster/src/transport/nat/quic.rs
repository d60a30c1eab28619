//! QUIC through home routers by hole punching: both peers send to each other's outside address at the same time, so that each
//! router takes the other's packets for replies. A relay tells them these addresses and when to start.
//!
//! The endpoint has its own key, derived from the machine's seed. The peer's signed record names it, TLS proves it, and the
//! handshake over the streams then proves the peer's key, as over TCP. Invariant: this peer connects only to the relays of its
//! own configuration, never to others that a record names.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::str::FromStr;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use iroh::endpoint::{Connection, Incoming, QuicTransportConfig, RecvStream, SendStream, presets};
use iroh::tls::CaTlsConfig;
use iroh::{Endpoint, EndpointAddr, EndpointId, RelayMode, RelayUrl, SecretKey, TransportAddr};
use muster_protocol::identity::Identity;
use muster_protocol::limits::TEXT_BYTES_MAX;
use muster_protocol::message::peer::PeerRecord;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use tokio::io::AsyncWrite;
use tokio::runtime::Handle;
use tokio::time::{sleep, timeout};

use crate::transport::connection::ConnectionError;
use crate::transport::interface::{Arrival, DialError, Transport};
use crate::transport::nat::config::{NatConfig, NatError, SCHEME};
use crate::transport::stream::{self, Streams};

use self::congestion::ByPath;

mod congestion;

/// The protocol name in TLS.
const ALPN: &[u8] = b"muster/1";
/// Most socket addresses and relays in one address of a record: a machine's interfaces and its outside address.
const PLACES_MAX: usize = 16;
/// Longest relay URL: leaves room for socket addresses in a record's address.
const RELAY_BYTES_MAX: usize = 256;
/// How long connecting may take: some round trips over a distant relay, and a lost packet.
const CONNECT: Duration = Duration::from_secs(10);
/// How long to wait for a direct path before shards go over the relay, whose bandwidth other peers need.
const DIRECT: Duration = Duration::from_secs(5);
/// How often to check for a direct path.
const LOOK: Duration = Duration::from_millis(20);
/// How long the last bytes may take to arrive after this side has dropped the connection.
const LINGER: Duration = Duration::from_secs(2);
/// Send window of a connection: 50 Mbit/s at 80 ms. With more, shards would lie half sent and no peer could pass them on.
const UNSENT_BYTES_MAX: u64 = 512 << 10;
/// Pause before accepting again after the endpoint has closed.
const CLOSED_PAUSE: Duration = Duration::from_secs(1);

/// A QUIC endpoint.
#[derive(Debug)]
pub(crate) struct Quic {
    endpoint: Endpoint,
    relays: Vec<RelayUrl>,
}

impl Quic {
    /// Listens. The endpoint finds its relay and its outside address in the background.
    ///
    /// # Errors
    /// When the configuration or the address cannot be used.
    pub(crate) async fn listen(config: &NatConfig, identity: &Identity) -> Result<Self, NatError> {
        let relay = |url: &String| {
            let failed = |reason: String| NatError::Relay {
                url: url.clone(),
                reason,
            };
            if url.len() > RELAY_BYTES_MAX {
                return Err(failed(format!("over {RELAY_BYTES_MAX} bytes")));
            }
            RelayUrl::from_str(url).map_err(|error| failed(error.to_string()))
        };
        let relays: Vec<RelayUrl> = config.relays.iter().map(relay).collect::<Result<_, _>>()?;
        let failed = |reason: String| NatError::Listen { reason };
        let mut builder = Endpoint::builder(presets::Minimal)
            .secret_key(SecretKey::from_bytes(identity.transport_secret()))
            .alpns(vec![ALPN.to_vec()])
            .transport_config(quic())
            .relay_mode(match relays.is_empty() {
                true => RelayMode::Disabled,
                false => RelayMode::custom(relays.clone()),
            });
        if let Some(listen) = config.listen {
            builder = builder
                .clear_ip_transports()
                .bind_addr(listen)
                .map_err(|error| failed(error.to_string()))?;
        }
        if let Some(path) = &config.relay_roots {
            builder = builder.ca_tls_config(CaTlsConfig::custom_roots(roots(path).await?));
        }
        let endpoint = builder.bind().await;
        let endpoint = endpoint.map_err(|error| failed(error.to_string()))?;
        Ok(Self { endpoint, relays })
    }

    /// The endpoint's address in a record, with the text that it was parsed from. Relays that are not configured here are left
    /// out, so that no record can make this peer connect to a server of the record's choice.
    fn endpoint_address(&self, record: &PeerRecord) -> Option<(String, EndpointAddr)> {
        let address = record
            .addresses
            .iter()
            .find(|text| text.starts_with(SCHEME))?;
        let mut parts = address.strip_prefix(SCHEME)?.split(',');
        let mut place = EndpointAddr::new(EndpointId::from_str(parts.next()?).ok()?);
        for part in parts.take(PLACES_MAX) {
            if let Ok(address) = SocketAddr::from_str(part) {
                place = place.with_ip_addr(address);
            } else if let Some(relay) = self.relays.iter().find(|url| url.as_str() == part) {
                place = place.with_relay_url(relay.clone());
            }
        }
        Some((address.clone(), place))
    }
}

#[async_trait]
impl Transport for Quic {
    async fn dial(&self, record: &PeerRecord) -> Result<Streams, DialError> {
        let (address, place) = self.endpoint_address(record).ok_or(DialError::NoAddress)?;
        let unreachable = |reason: String| DialError::Unreachable {
            address: address.clone(),
            reason,
        };
        let connecting = async {
            let connection = self.endpoint.connect(place, ALPN).await;
            let connection = connection.map_err(|error| error.to_string())?;
            let streams = connection.open_bi().await;
            let (writer, reader) = streams.map_err(|error| error.to_string())?;
            Ok((connection, writer, reader))
        };
        let late = |_| unreachable(format!("no answer within {} s", CONNECT.as_secs()));
        let connected = timeout(CONNECT, connecting).await.map_err(late)?;
        let (connection, writer, reader) = connected.map_err(unreachable)?;
        if timeout(DIRECT, direct(&connection)).await.is_err() {
            tracing::debug!(%address, "no direct path: shards go over a relay");
        }
        Ok(streams(connection, writer, reader))
    }

    async fn accept(&self) -> io::Result<Box<dyn Arrival>> {
        let Some(incoming) = self.endpoint.accept().await else {
            sleep(CLOSED_PAUSE).await;
            return Err(io::Error::from(io::ErrorKind::NotConnected));
        };
        Ok(Box::new(IncomingConnection(incoming)))
    }

    fn addresses(&self) -> Vec<String> {
        let own = self.endpoint.addr();
        let mut text = format!("{SCHEME}{}", own.id);
        for place in own.addrs.iter().take(PLACES_MAX) {
            let place = match place {
                TransportAddr::Relay(url) => url.to_string(),
                TransportAddr::Ip(address) => address.to_string(),
                _ => continue,
            };
            if text.len() + 1 + place.len() <= TEXT_BYTES_MAX {
                text = text + "," + &place;
            }
        }
        vec![text]
    }

    async fn close(&self) {
        self.endpoint.close().await;
    }
}

/// The result of [`Quic::addresses`] for a peer whose only socket address is `place`.
pub(crate) fn address(identity: &Identity, place: SocketAddr) -> String {
    let id = SecretKey::from_bytes(identity.transport_secret()).public();
    format!("{SCHEME}{id},{place}")
}

struct IncomingConnection(Incoming);

#[async_trait]
impl Arrival for IncomingConnection {
    async fn open(self: Box<Self>) -> Result<Streams, ConnectionError> {
        let opening = async {
            let connection = self.0.accept().map_err(io::Error::other)?;
            let connection = connection.await.map_err(io::Error::other)?;
            let (writer, reader) = connection.accept_bi().await.map_err(io::Error::other)?;
            Ok(streams(connection, writer, reader))
        };
        let late = |_| ConnectionError::Late {
            step: "opening the connection",
            limit_ms: (CONNECT + DIRECT).as_millis() as u64,
        };
        timeout(CONNECT + DIRECT, opening).await.map_err(late)?
    }

    fn turn_away(self: Box<Self>, _frame: &[u8]) {
        // Before its handshake a QUIC connection can only be refused without a reason.
        self.0.refuse();
    }
}

/// QUIC with a single stream per direction.
fn quic() -> QuicTransportConfig {
    QuicTransportConfig::builder()
        .congestion_controller_factory(Arc::new(ByPath))
        .max_concurrent_bidi_streams(1u8.into())
        .max_concurrent_uni_streams(0u8.into())
        .datagram_receive_buffer_size(None)
        .send_window(UNSENT_BYTES_MAX)
        .build()
}

async fn roots(path: &Path) -> Result<Vec<CertificateDer<'static>>, NatError> {
    let failed = |reason: String| NatError::Roots {
        path: path.to_owned(),
        reason,
    };
    let text = tokio::fs::read(path).await;
    let text = text.map_err(|error| failed(error.to_string()))?;
    let roots: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    match roots {
        Ok(roots) if roots.is_empty() => Err(failed("it holds no certificate".to_owned())),
        roots => roots.map_err(|error| failed(error.to_string())),
    }
}

/// Waits until the connection uses a direct path.
async fn direct(connection: &Connection) {
    let is_direct = || {
        let paths = connection.paths();
        paths.iter().any(|path| path.is_selected() && path.is_ip())
    };
    while !is_direct() {
        sleep(LOOK).await;
    }
}

fn streams(connection: Connection, stream: SendStream, reader: RecvStream) -> Streams {
    let writer = Outgoing { stream, connection };
    tokio::io::join(Box::new(reader), Box::new(writer))
}

impl stream::Incoming for RecvStream {}

/// The sending half. When dropped, it still delivers the last bytes, as the system does for a socket; without this, a connection
/// ends at once with its last handle.
struct Outgoing {
    stream: SendStream,
    connection: Connection,
}

impl AsyncWrite for Outgoing {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        AsyncWrite::poll_write(Pin::new(&mut self.stream), context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        AsyncWrite::poll_flush(Pin::new(&mut self.stream), context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        AsyncWrite::poll_shutdown(Pin::new(&mut self.stream), context)
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        // The other side has closed the stream already.
        if self.stream.finish().is_err() {
            return;
        }
        let (stopped, connection) = (self.stream.stopped(), self.connection.clone());
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn(async move {
                timeout(LINGER, stopped).await.ok();
                drop(connection);
            });
        }
    }
}

#[cfg(test)]
mod tests;
