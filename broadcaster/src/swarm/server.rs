//! The server of a peer: accepts connections, does the handshake, and answers requests.
//!
//! The shards of one connection leave one after the other, and a few at once over all connections ([`crate::swarm::slots`]). A
//! peer that sends requests faster than they are answered waits in its own socket. [`crate::swarm::uploads`] decides which
//! shards to send. Invariant: connections are bounded, in all and per peer, and so are their requests.

use std::num::NonZeroU32;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use muster_protocol::id::{ObjectId, PeerId};
use tokio::io::AsyncWriteExt;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::timeout;
use tokio_util::task::TaskTracker;

use crate::store::bitmap::Bitmap;
use crate::store::object::shard_count;
use crate::swarm::connection_limits::{
    CONNECTIONS_PER_PEER_MAX, ConnectionLimits, ConnectionPermit,
};
use crate::swarm::metrics::Transfer;
use crate::swarm::node::Node;
use crate::swarm::plan::BYTES_PER_MS_MIN;
use crate::swarm::rate::PIECE_BYTES;
use crate::swarm::slots::{Slot, Slots};
use crate::swarm::uploads::{SendOutcome, UploadDecision, WantedShard};
use crate::transport::connection::{
    Connection, ConnectionError, Side, read_frame, unexpected, write_message, write_shard,
};
use crate::transport::interface::{Arrival, Transport};
use crate::transport::stream::{Reader, Writer};
use crate::transport::wire::{
    self, Chooser, Frame, MESSAGE_BYTES_MAX, Message, Refusal, RequestId,
};

/// How long a connection may be idle: a fetcher that needs nothing for this long can connect again later.
const IDLE: Duration = Duration::from_secs(60);
/// How long a write may take, besides the time of its bytes at [`BYTES_PER_MS_MIN`].
const WRITE: Duration = Duration::from_secs(10);
/// Most requests of one connection that wait for a reply, of each kind. Further ones wait in the peer's socket.
const REQUESTS_MAX: usize = 32;
/// Pause after a failed accept, as when the system has no socket left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The server of a peer.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) node: Arc<Node>,
    pub(crate) chooser: Chooser,
    limits: Arc<ConnectionLimits>,
    slots: Slots,
}

impl Server {
    pub(crate) fn new(node: Arc<Node>, chooser: Chooser, connections_max: NonZeroU32) -> Self {
        Self {
            node,
            chooser,
            limits: Arc::new(ConnectionLimits::new(connections_max)),
            slots: Slots::default(),
        }
    }

    /// Accepts connections over one transport until the shutdown, and serves each in a task of its own on `tracker`.
    pub(crate) async fn run(self: Arc<Self>, transport: Arc<dyn Transport>, tracker: TaskTracker) {
        let shutdown = self.node.shutdown.clone();
        loop {
            let accepted = tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                accepted = transport.accept() => accepted,
            };
            match accepted {
                Ok(arrival) => self.admit(arrival, &tracker),
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        transport.close().await;
    }

    fn admit(self: &Arc<Self>, arrival: Box<dyn Arrival>, tracker: &TaskTracker) {
        let Ok(permit) = Arc::clone(&self.limits.free).try_acquire_owned() else {
            self.node.counters.count_refused_connection();
            return turn_away(arrival, self.limits.connections_max);
        };
        let server = Arc::clone(self);
        tracker.spawn(async move {
            let shutdown = server.node.shutdown.clone();
            let served = tokio::select! {
                biased;
                () = shutdown.cancelled() => Ok(()),
                served = server.serve(arrival, permit) => served,
            };
            if let Err(error) = served {
                server.node.counters.count_refused_connection();
                tracing::debug!(%error, "connection ended");
            }
        });
    }

    async fn serve(
        &self,
        arrival: Box<dyn Arrival>,
        permit: OwnedSemaphorePermit,
    ) -> Result<(), ConnectionError> {
        let streams = arrival.open().await?;
        let mut connection =
            Connection::prove(streams, &self.node.identity, Side::Acceptor).await?;
        let refusal = match ConnectionLimits::admit(&self.limits, connection.peer, permit) {
            _ if self.node.counters.is_banned(&connection.peer) => Refusal::Banned,
            None => Refusal::Full {
                connections_max: CONNECTIONS_PER_PEER_MAX as u32,
            },
            Some(permit) => return self.answer_all(connection, &permit).await,
        };
        write_message(&mut connection.writer, &Message::Refused(refusal.clone())).await?;
        Err(ConnectionError::Refused(refusal))
    }

    /// Reads requests and writes replies side by side, so that small replies never wait behind shards.
    async fn answer_all(
        &self,
        connection: Connection,
        permit: &ConnectionPermit,
    ) -> Result<(), ConnectionError> {
        let Connection { reader, writer, .. } = connection;
        let (small_replies, to_say) = mpsc::channel(REQUESTS_MAX);
        let (shard_requests, to_send) = mpsc::channel(REQUESTS_MAX);
        // When one half ends, the connection ends, so the cancelled half loses nothing that matters.
        tokio::select! {
            read = self.read_requests(reader, &small_replies, &shard_requests) => read,
            written = self.write_replies(writer, permit.peer, to_say, to_send) => written,
        }
    }

    async fn read_requests(
        &self,
        mut reader: Reader,
        small_replies: &mpsc::Sender<Message>,
        shard_requests: &mpsc::Sender<ShardRequest>,
    ) -> Result<(), ConnectionError> {
        loop {
            let mut reading = pin!(read_frame(&mut reader, MESSAGE_BYTES_MAX));
            let frame = loop {
                match timeout(IDLE, &mut reading).await {
                    // Not idle: the peer waits for shards.
                    Err(_) if shard_requests.capacity() < REQUESTS_MAX => {}
                    Ok(Err(ConnectionError::Io(_))) | Err(_) => return Ok(()),
                    Ok(frame) => break frame?,
                }
            };
            let queued = match frame {
                Frame::Message(Message::Have { request, object }) => {
                    let reply = self.held(request, &object);
                    small_replies.send(reply).await.is_ok()
                }
                other => shard_requests.send(ShardRequest::of(other)?).await.is_ok(),
            };
            if !queued {
                return Ok(());
            }
        }
    }

    async fn write_replies(
        &self,
        mut writer: Writer,
        peer: PeerId,
        mut to_say: mpsc::Receiver<Message>,
        mut to_send: mpsc::Receiver<ShardRequest>,
    ) -> Result<(), ConnectionError> {
        loop {
            let request = tokio::select! {
                biased;
                Some(message) = to_say.recv() => {
                    self.say(&mut writer, &message).await?;
                    continue;
                }
                Some(request) = to_send.recv() => request,
                else => return Ok(()),
            };
            let slot = self.wait_for_slot(&mut writer, &mut to_say).await?;
            self.answer(&mut writer, peer, &request, slot).await?;
        }
    }

    /// Waits for a slot, and writes small replies meanwhile. A slot that comes while the peer does not read is given back after a
    /// while.
    async fn wait_for_slot(
        &self,
        writer: &mut Writer,
        to_say: &mut mpsc::Receiver<Message>,
    ) -> Result<Slot<'_>, ConnectionError> {
        let mut slot = pin!(self.slots.take());
        loop {
            let message = tokio::select! {
                biased;
                Some(message) = to_say.recv() => message,
                slot = &mut slot => return Ok(slot),
            };
            let mut saying = pin!(self.say(writer, &message));
            let mut granted = tokio::select! {
                biased;
                done = &mut saying => {
                    done?;
                    continue;
                }
                granted = &mut slot => granted,
            };
            granted.lend(saying).await?;
            if granted.is_held() {
                return Ok(granted);
            }
            slot.set(self.slots.take());
        }
    }

    /// Answers a request for a shard. The shard is chosen only now that it can leave at once.
    async fn answer(
        &self,
        writer: &mut Writer,
        peer: PeerId,
        wanted: &ShardRequest,
        slot: Slot<'_>,
    ) -> Result<(), ConnectionError> {
        let request = wanted.request;
        match self.decide(peer, wanted)? {
            UploadDecision::Missing => {
                drop(slot);
                self.say(writer, &Message::Missing { request }).await
            }
            UploadDecision::Busy { retry_ms, holders } => {
                drop(slot);
                self.node.counters.count_busy_reply();
                let retry_ms = u32::try_from(retry_ms).unwrap_or(u32::MAX);
                let busy = Message::Busy {
                    request,
                    retry_ms,
                    holders,
                };
                self.say(writer, &busy).await
            }
            UploadDecision::Send { shard } => {
                let sending = self.send(writer, peer, wanted, shard);
                slot.hold(sending).await
            }
        }
    }

    fn held(&self, request: RequestId, object: &ObjectId) -> Message {
        match self.node.store.held(object) {
            Some(held) => {
                let shards = held.as_bytes().to_vec();
                Message::Held {
                    request,
                    shards,
                    chooser: self.chooser,
                }
            }
            None => Message::Missing { request },
        }
    }

    fn decide(
        &self,
        peer: PeerId,
        wanted: &ShardRequest,
    ) -> Result<UploadDecision, ConnectionError> {
        let (store, object) = (&self.node.store, wanted.object);
        let (Some(description), Some(held)) = (store.object(&object), store.held(&object)) else {
            return Ok(UploadDecision::Missing);
        };
        let except;
        let shard = match &wanted.shard {
            RequestedShard::Number(shard) => WantedShard::Shard(*shard),
            RequestedShard::AnyBut(bytes) => {
                let bitmap = Bitmap::from_bytes(bytes, shard_count(&description));
                except = bitmap.ok_or(ConnectionError::Unexpected {
                    expected: "a bitmap of the object's shards",
                    found: "a bitmap of the wrong length",
                })?;
                WantedShard::AnyBut(&except)
            }
        };
        let now_ms = self.node.now_ms();
        let mut uploads = self.node.uploads();
        Ok(uploads.decide(now_ms, peer, object, &held, shard))
    }

    async fn send(
        &self,
        stream: &mut Writer,
        peer: PeerId,
        wanted: &ShardRequest,
        shard: u32,
    ) -> Result<(), ConnectionError> {
        let (request, object) = (wanted.request, wanted.object);
        let mut sending = Sending {
            node: &self.node,
            peer,
            object,
            shard,
            outcome: SendOutcome::Failed,
        };
        let Some(bytes) = self.node.store.shard(&object, shard) else {
            return self.say(stream, &Message::Missing { request }).await;
        };
        let length = bytes.len();
        self.upload(stream, request, shard, bytes).await?;
        sending.outcome = SendOutcome::Sent;
        self.node
            .counters
            .count(&object, &peer, Transfer::Upload, length);
        Ok(())
    }

    /// Writes a shard: whole, or in pieces at the pace of the upload cap.
    async fn upload(
        &self,
        stream: &mut Writer,
        request: RequestId,
        shard: u32,
        mut bytes: Bytes,
    ) -> Result<(), ConnectionError> {
        if !self.node.has_upload_cap() {
            let length = bytes.len();
            return in_time(length, write_shard(stream, request, shard, bytes)).await;
        }
        let header = wire::shard_header(request, shard, bytes.len());
        in_time(header.len(), async { Ok(stream.write_all(&header).await?) }).await?;
        while !bytes.is_empty() {
            let piece = bytes.split_to(bytes.len().min(PIECE_BYTES));
            let wait_ms = self.node.take_from_upload_cap(piece.len());
            tokio::time::sleep(Duration::from_millis(wait_ms)).await;
            in_time(piece.len(), async { Ok(stream.write_all(&piece).await?) }).await?;
        }
        Ok(())
    }

    async fn say(&self, stream: &mut Writer, message: &Message) -> Result<(), ConnectionError> {
        in_time(MESSAGE_BYTES_MAX, write_message(stream, message)).await
    }
}

/// A shard being sent. Its drop records how sending ended, also when the connection breaks: a shard that did not leave whole
/// counts as not sent, and goes to the next peer that asks.
struct Sending<'a> {
    node: &'a Node,
    peer: PeerId,
    object: ObjectId,
    shard: u32,
    outcome: SendOutcome,
}

impl Drop for Sending<'_> {
    fn drop(&mut self) {
        let now_ms = self.node.now_ms();
        self.node
            .uploads()
            .finish(now_ms, &self.peer, &self.object, self.shard, self.outcome);
    }
}

/// A request for a shard.
#[derive(Debug)]
struct ShardRequest {
    request: RequestId,
    object: ObjectId,
    shard: RequestedShard,
}

#[derive(Debug)]
enum RequestedShard {
    Number(u32),
    /// Any shard except those in this bitmap, as received.
    AnyBut(Vec<u8>),
}

impl ShardRequest {
    fn of(frame: Frame) -> Result<Self, ConnectionError> {
        let (request, object, shard) = match frame {
            Frame::Message(Message::Want {
                request,
                object,
                shard,
            }) => (request, object, RequestedShard::Number(shard)),
            Frame::Message(Message::WantAny {
                request,
                object,
                except,
            }) => (request, object, RequestedShard::AnyBut(except)),
            other => return Err(unexpected("a request", &other)),
        };
        Ok(Self {
            request,
            object,
            shard,
        })
    }
}

async fn in_time(
    bytes: usize,
    write: impl Future<Output = Result<(), ConnectionError>>,
) -> Result<(), ConnectionError> {
    let limit = WRITE + Duration::from_millis(bytes as u64 / BYTES_PER_MS_MIN);
    let limit_ms = limit.as_millis() as u64;
    timeout(limit, write)
        .await
        .map_err(|_| ConnectionError::Late {
            step: "writing a reply",
            limit_ms,
        })?
}

/// Refuses a connection, and says why if that is possible without waiting.
fn turn_away(arrival: Box<dyn Arrival>, connections_max: u32) {
    if let Ok(frame) = wire::encode_message(&Message::Refused(Refusal::Full { connections_max })) {
        arrival.turn_away(&frame);
    }
}
