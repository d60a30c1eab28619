//! The serving half: accepts peers, has them prove who they are, and answers what they ask, one request at a time.
//!
//! A peer that sends faster than it is answered waits in its own socket, so requests in flight need no queue here.
//! Decides nothing about shards: that is [`crate::uploads`]. Invariant: connections are bounded, in all and per peer.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use muster_protocol::id::{ObjectId, PeerId};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_util::task::TaskTracker;

use crate::bitmap::Bitmap;
use crate::connection::{
    ConnectionError, Side, handshake, misplaced, read_frame, write_message, write_shard,
};
use crate::meter::Moved;
use crate::node::Node;
use crate::object::shard_count;
use crate::rate::PIECE_BYTES;
use crate::uploads::{Decision, Outcome, Wanted};
use crate::wire::{self, Chooser, Frame, MESSAGE_BYTES_MAX, Message, Refusal, RequestId};

/// Most connections of one peer: one for each object that it fetches, an anchor and the files beside it.
const CONNECTIONS_PER_PEER_MAX: usize = 16;
/// How long a connection may ask nothing: a fetcher that needs nothing for so long can connect again.
const IDLE: Duration = Duration::from_secs(60);
/// How long a write may take, besides what its bytes need at the slowest rate: a reader that stops reading is gone.
const WRITE: Duration = Duration::from_secs(10);
/// The slowest rate: 16 KiB/s, as in [`crate::plan`].
const BYTES_PER_MS_MIN: u64 = 16;
/// How long to wait when the system has no socket left, before trying again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The serving half of a peer.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) node: Arc<Node>,
    pub(crate) chooser: Chooser,
    seats: Arc<Seats>,
}

impl Server {
    pub(crate) fn new(node: Arc<Node>, chooser: Chooser, connections_max: NonZeroU32) -> Self {
        Self {
            node,
            chooser,
            seats: Arc::new(Seats::new(connections_max)),
        }
    }

    /// Accepts peers until the shutdown; each is served by a task of its own on `tracker`.
    pub(crate) async fn run(self: Arc<Self>, listener: TcpListener, tracker: TaskTracker) {
        let shutdown = self.node.shutdown.clone();
        loop {
            let accepted = tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, _)) => self.admit(stream, &tracker),
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a peer");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn admit(self: &Arc<Self>, stream: TcpStream, tracker: &TaskTracker) {
        let Ok(place) = Arc::clone(&self.seats.places).try_acquire_owned() else {
            self.node.meter.connection_refused();
            return turn_away(&stream, self.seats.connections_max);
        };
        let server = Arc::clone(self);
        tracker.spawn(async move {
            let shutdown = server.node.shutdown.clone();
            let served = tokio::select! {
                biased;
                () = shutdown.cancelled() => Ok(()),
                served = server.serve(stream, place) => served,
            };
            if let Err(error) = served {
                server.node.meter.connection_refused();
                tracing::debug!(%error, "connection of a peer ended");
            }
        });
    }

    async fn serve(
        &self,
        mut stream: TcpStream,
        place: OwnedSemaphorePermit,
    ) -> Result<(), ConnectionError> {
        stream.set_nodelay(true)?;
        let peer = handshake(&mut stream, &self.node.identity, Side::Acceptor).await?;
        let refusal = match Seats::take(&self.seats, peer, place) {
            _ if self.node.meter.is_banned(&peer) => Refusal::Banned,
            None => Refusal::Full {
                connections_max: CONNECTIONS_PER_PEER_MAX as u32,
            },
            Some(seat) => return self.answer_all(&mut stream, &seat).await,
        };
        write_message(&mut stream, &Message::Refused(refusal.clone())).await?;
        Err(ConnectionError::Refused(refusal))
    }

    async fn answer_all(&self, stream: &mut TcpStream, seat: &Seat) -> Result<(), ConnectionError> {
        loop {
            let frame = match timeout(IDLE, read_frame(stream, MESSAGE_BYTES_MAX)).await {
                Ok(Err(ConnectionError::Io(_))) | Err(_) => return Ok(()),
                Ok(frame) => frame?,
            };
            self.answer(stream, seat.peer, frame).await?;
        }
    }

    async fn answer(
        &self,
        stream: &mut TcpStream,
        peer: PeerId,
        frame: Frame,
    ) -> Result<(), ConnectionError> {
        let (request, object, shard, except) = match frame {
            Frame::Message(Message::Have { request, object }) => {
                let answer = self.held(request, &object);
                return self.say(stream, &answer).await;
            }
            Frame::Message(Message::Want {
                request,
                object,
                shard,
            }) => (request, object, Some(shard), Vec::new()),
            Frame::Message(Message::WantAny {
                request,
                object,
                except,
            }) => (request, object, None, except),
            other => return Err(misplaced("a request", &other)),
        };
        match self.decide(peer, object, shard, &except)? {
            Decision::Missing => self.say(stream, &Message::Missing { request }).await,
            Decision::Busy { retry_ms, holders } => {
                self.node.meter.answered_busy();
                let retry_ms = u32::try_from(retry_ms).unwrap_or(u32::MAX);
                self.say(
                    stream,
                    &Message::Busy {
                        request,
                        retry_ms,
                        holders,
                    },
                )
                .await
            }
            Decision::Send { shard } => self.send(stream, peer, request, (object, shard)).await,
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
    ) -> Result<Decision, ConnectionError> {
        let (Some(description), Some(held)) = (
            self.node.store.object(&object),
            self.node.store.held(&object),
        ) else {
            return Ok(Decision::Missing);
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
            (Some(shard), _) => Wanted::Shard(shard),
            (None, Some(except)) => Wanted::AnyBut(except),
            (None, None) => return Ok(Decision::Missing),
        };
        let now_ms = self.node.now_ms();
        Ok(self
            .node
            .uploads()
            .decide(now_ms, peer, object, &held, wanted))
    }

    async fn send(
        &self,
        stream: &mut TcpStream,
        peer: PeerId,
        request: RequestId,
        (object, shard): (ObjectId, u32),
    ) -> Result<(), ConnectionError> {
        let finish = |outcome| {
            self.node
                .uploads()
                .finish(self.node.now_ms(), &peer, &object, shard, outcome);
        };
        let Some(bytes) = self.node.store.shard(&object, shard) else {
            finish(Outcome::Failed);
            return self.say(stream, &Message::Missing { request }).await;
        };
        let length = bytes.len();
        let sent = self.upload(stream, request, shard, bytes).await;
        match &sent {
            Ok(()) => {
                finish(Outcome::Sent);
                self.node.meter.moved(&object, &peer, Moved::Up, length);
            }
            Err(_) => finish(Outcome::Failed),
        }
        sent
    }

    /// Writes a shard, in one piece or at the pace of the upload cap.
    async fn upload(
        &self,
        stream: &mut TcpStream,
        request: RequestId,
        shard: u32,
        mut bytes: Bytes,
    ) -> Result<(), ConnectionError> {
        if !self.node.is_capped() {
            let length = bytes.len();
            return in_time(length, write_shard(stream, request, shard, bytes)).await;
        }
        let header = wire::shard_header(request, shard, bytes.len());
        in_time(header.len(), async { Ok(stream.write_all(&header).await?) }).await?;
        while !bytes.is_empty() {
            let piece = bytes.split_to(bytes.len().min(PIECE_BYTES));
            let wait_ms = self.node.take_upload(piece.len());
            tokio::time::sleep(Duration::from_millis(wait_ms)).await;
            in_time(piece.len(), async { Ok(stream.write_all(&piece).await?) }).await?;
        }
        Ok(())
    }

    async fn say(&self, stream: &mut TcpStream, message: &Message) -> Result<(), ConnectionError> {
        in_time(MESSAGE_BYTES_MAX, write_message(stream, message)).await
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

/// Says why without waiting: what does not fit into an empty socket's buffer is not said.
fn turn_away(stream: &TcpStream, connections_max: u32) {
    if let Ok(frame) = wire::encode_message(&Message::Refused(Refusal::Full { connections_max })) {
        stream.try_write(&frame).ok();
    }
}

/// Places for connections.
#[derive(Debug)]
struct Seats {
    places: Arc<Semaphore>,
    connections_max: u32,
    by_peer: Mutex<BTreeMap<PeerId, usize>>,
}

/// A connection's place; it is free again when this is dropped.
#[derive(Debug)]
struct Seat {
    peer: PeerId,
    seats: Arc<Seats>,
    _place: OwnedSemaphorePermit,
}

impl Seats {
    fn new(connections_max: NonZeroU32) -> Self {
        let connections_max = connections_max.get();
        Self {
            places: Arc::new(Semaphore::new(connections_max as usize)),
            connections_max,
            by_peer: Mutex::new(BTreeMap::new()),
        }
    }

    fn take(seats: &Arc<Self>, peer: PeerId, place: OwnedSemaphorePermit) -> Option<Seat> {
        let mut by_peer = seats.by_peer.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = by_peer.entry(peer).or_default();
        if *taken >= CONNECTIONS_PER_PEER_MAX {
            return None;
        }
        *taken += 1;
        Some(Seat {
            peer,
            seats: Arc::clone(seats),
            _place: place,
        })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut by_peer = self
            .seats
            .by_peer
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(taken) = by_peer.get_mut(&self.peer) {
            *taken -= 1;
            if *taken == 0 {
                by_peer.remove(&self.peer);
            }
        }
    }
}
