//! The serving half: accepts peers, has them prove who they are, and answers what they ask.
//!
//! Shards of one connection leave one after the other, and of all connections a few at once ([`crate::swarm::slots`]). A peer that
//! sends faster than it is answered waits in its own socket. Decides nothing about shards: that is [`crate::swarm::uploads`].
//! Invariant: connections are bounded, in all and per peer, and so are their requests.

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
use crate::swarm::rate::PIECE_BYTES;
use crate::swarm::slots::{Slot, Slots};
use crate::swarm::uploads::{SendOutcome, UploadDecision, WantedShard};
use crate::transport::connection::{
    Connection, ConnectionError, Side, misplaced, read_frame, write_message, write_shard,
};
use crate::transport::interface::{Arrival, Transport};
use crate::transport::stream::{Reader, Writer};
use crate::transport::wire::{
    self, Chooser, Frame, MESSAGE_BYTES_MAX, Message, Refusal, RequestId,
};

/// How long a connection may ask nothing: a fetcher that needs nothing for so long can connect again.
const IDLE: Duration = Duration::from_secs(60);
/// How long a write may take, besides what its bytes need at the slowest rate: a reader that stops reading is gone.
const WRITE: Duration = Duration::from_secs(10);
/// The slowest rate: 16 KiB/s, as in [`crate::swarm::plan`].
const BYTES_PER_MS_MIN: u64 = 16;
/// Requests of one connection waiting for their answers, of each kind; whoever asks more waits in its own socket.
const REQUESTS_MAX: usize = 32;
/// How long to wait when the system has no socket left, before trying again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The serving half of a peer.
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

    /// Accepts the peers that come by one way until the shutdown; each is served by a task of its own on `tracker`.
    pub(crate) async fn run(self: Arc<Self>, way: Arc<dyn Transport>, tracker: TaskTracker) {
        let shutdown = self.node.shutdown.clone();
        loop {
            let accepted = tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                accepted = way.accept() => accepted,
            };
            match accepted {
                Ok(arrival) => self.admit(arrival, &tracker),
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a peer");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        way.close().await;
    }

    fn admit(self: &Arc<Self>, arrival: Box<dyn Arrival>, tracker: &TaskTracker) {
        let Ok(place) = Arc::clone(&self.limits.free).try_acquire_owned() else {
            self.node.counters.count_refused_connection();
            return turn_away(arrival, self.limits.connections_max);
        };
        let server = Arc::clone(self);
        tracker.spawn(async move {
            let shutdown = server.node.shutdown.clone();
            let served = tokio::select! {
                biased;
                () = shutdown.cancelled() => Ok(()),
                served = server.serve(arrival, place) => served,
            };
            if let Err(error) = served {
                server.node.counters.count_refused_connection();
                tracing::debug!(%error, "connection of a peer ended");
            }
        });
    }

    async fn serve(
        &self,
        arrival: Box<dyn Arrival>,
        place: OwnedSemaphorePermit,
    ) -> Result<(), ConnectionError> {
        let streams = arrival.open().await?;
        let mut connection =
            Connection::prove(streams, &self.node.identity, Side::Acceptor).await?;
        let refusal = match ConnectionLimits::admit(&self.limits, connection.peer, place) {
            _ if self.node.counters.is_banned(&connection.peer) => Refusal::Banned,
            None => Refusal::Full {
                connections_max: CONNECTIONS_PER_PEER_MAX as u32,
            },
            Some(permit) => return self.answer_all(connection, &permit).await,
        };
        write_message(&mut connection.writer, &Message::Refused(refusal.clone())).await?;
        Err(ConnectionError::Refused(refusal))
    }

    /// Reads requests and writes answers side by side, so that what a peer is told about us never waits behind the shards
    /// that it asked for.
    async fn answer_all(
        &self,
        connection: Connection,
        permit: &ConnectionPermit,
    ) -> Result<(), ConnectionError> {
        let Connection { reader, writer, .. } = connection;
        let (says, said) = mpsc::channel(REQUESTS_MAX);
        let (wants, wanted) = mpsc::channel(REQUESTS_MAX);
        // Neither half is started anew, so that a half that loses the race loses nothing that matters.
        tokio::select! {
            read = self.read_requests(reader, &says, &wants) => read,
            written = self.write_answers(writer, permit.peer, said, wanted) => written,
        }
    }

    async fn read_requests(
        &self,
        mut reader: Reader,
        says: &mpsc::Sender<Message>,
        wants: &mpsc::Sender<ShardRequest>,
    ) -> Result<(), ConnectionError> {
        loop {
            let mut reading = pin!(read_frame(&mut reader, MESSAGE_BYTES_MAX));
            let frame = loop {
                match timeout(IDLE, &mut reading).await {
                    // It waits for us and not we for it.
                    Err(_) if wants.capacity() < REQUESTS_MAX => {}
                    Ok(Err(ConnectionError::Io(_))) | Err(_) => return Ok(()),
                    Ok(frame) => break frame?,
                }
            };
            let taken = match frame {
                Frame::Message(Message::Have { request, object }) => {
                    let answer = self.held(request, &object);
                    says.send(answer).await.is_ok()
                }
                other => wants.send(ShardRequest::of(other)?).await.is_ok(),
            };
            if !taken {
                return Ok(());
            }
        }
    }

    async fn write_answers(
        &self,
        mut writer: Writer,
        peer: PeerId,
        mut said: mpsc::Receiver<Message>,
        mut wanted: mpsc::Receiver<ShardRequest>,
    ) -> Result<(), ConnectionError> {
        loop {
            let want = tokio::select! {
                biased;
                Some(message) = said.recv() => {
                    self.say(&mut writer, &message).await?;
                    continue;
                }
                Some(want) = wanted.recv() => want,
                else => return Ok(()),
            };
            let slot = self.wait(&mut writer, &mut said).await?;
            self.grant(&mut writer, peer, want, slot).await?;
        }
    }

    /// Waits for a slot, and says meanwhile what there is to say. A slot that comes while a reader does not read goes on to
    /// others after a while.
    async fn wait(
        &self,
        writer: &mut Writer,
        said: &mut mpsc::Receiver<Message>,
    ) -> Result<Slot<'_>, ConnectionError> {
        let mut slot = pin!(self.slots.take());
        loop {
            let message = tokio::select! {
                biased;
                Some(message) = said.recv() => message,
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

    /// Answers a request for a shard; which one is sent is decided only now that it can leave at once.
    async fn grant(
        &self,
        writer: &mut Writer,
        peer: PeerId,
        want: ShardRequest,
        slot: Slot<'_>,
    ) -> Result<(), ConnectionError> {
        let request = want.request;
        match self.decide(peer, want.object, want.shard, &want.except)? {
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
                let sending = self.send(writer, peer, request, (want.object, shard));
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
        object: ObjectId,
        shard: Option<u32>,
        except: &[u8],
    ) -> Result<UploadDecision, ConnectionError> {
        let (Some(description), Some(held)) = (
            self.node.store.object(&object),
            self.node.store.held(&object),
        ) else {
            return Ok(UploadDecision::Missing);
        };
        let except = match shard {
            Some(_) => None,
            None => Some(Bitmap::from_bytes(except, shard_count(&description)).ok_or(
                ConnectionError::Unexpected {
                    expected: "a bitmap of the object's shards",
                    found: "a bitmap of another length",
                },
            )?),
        };
        let wanted = match (shard, &except) {
            (Some(shard), _) => WantedShard::Shard(shard),
            (None, Some(except)) => WantedShard::AnyBut(except),
            (None, None) => return Ok(UploadDecision::Missing),
        };
        let now_ms = self.node.now_ms();
        Ok(self
            .node
            .uploads()
            .decide(now_ms, peer, object, &held, wanted))
    }

    async fn send(
        &self,
        stream: &mut Writer,
        peer: PeerId,
        request: RequestId,
        (object, shard): (ObjectId, u32),
    ) -> Result<(), ConnectionError> {
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

    /// Writes a shard, in one piece or at the pace of the upload cap.
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

/// A shard on its way. However its sending ends, also when the connection does, that is noted: what did not arrive was not
/// sent, and goes to the next who asks.
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
    /// Which; any but `except` otherwise.
    shard: Option<u32>,
    except: Vec<u8>,
}

impl ShardRequest {
    fn of(frame: Frame) -> Result<Self, ConnectionError> {
        match frame {
            Frame::Message(Message::Want {
                request,
                object,
                shard,
            }) => Ok(Self {
                request,
                object,
                shard: Some(shard),
                except: Vec::new(),
            }),
            Frame::Message(Message::WantAny {
                request,
                object,
                except,
            }) => Ok(Self {
                request,
                object,
                shard: None,
                except,
            }),
            other => Err(misplaced("a request", &other)),
        }
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
            step: "an answer",
            limit_ms,
        })?
}

/// Says why without waiting.
fn turn_away(arrival: Box<dyn Arrival>, connections_max: u32) {
    if let Ok(frame) = wire::encode_message(&Message::Refused(Refusal::Full { connections_max })) {
        arrival.turn_away(&frame);
    }
}
