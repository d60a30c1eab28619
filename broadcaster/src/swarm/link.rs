//! One outgoing connection of a fetch: dials a peer, sends what the plan asks, and reports what comes back, each shard
//! verified before anybody hears of it.
//!
//! Decides nothing. Ends when either side of the connection does, and says why.

use std::sync::Arc;

use muster_protocol::id::{ObjectId, PeerId};
use muster_protocol::message::peer::PeerRecord;
use muster_protocol::message::version::Object;
use tokio::sync::mpsc;

use crate::store::{Inserted, StoreError};
use crate::swarm::metrics::Transfer;
use crate::swarm::node::Node;
use crate::swarm::plan::{PeerReply, ShardVerdict};
use crate::transport::connection::{
    Connection, ConnectionError, misplaced, read_large_frame, write_message,
};
use crate::transport::interface::DialError;
use crate::transport::stream::{Reader, Writer};
use crate::transport::wire::{Frame, MESSAGE_BYTES_MAX, Message, SHARD_PREFIX_BYTES};

/// Requests waiting to be written: more than a plan ever has in flight with one peer.
pub(crate) const ASKS_MAX: usize = 16;

/// One attempt to reach a peer; the number tells it from earlier ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct LinkId(pub(crate) u64);

/// What a link reports.
#[derive(Debug)]
pub(crate) enum LinkEvent {
    /// The peer has proved its key and may be asked.
    Up {
        source: PeerId,
        asks: mpsc::Sender<Message>,
    },
    /// The peer has answered.
    PeerReply(PeerReply),
    /// A shard was good and could not be kept.
    Unkept(StoreError),
    /// It is over.
    Down(LinkError),
}

/// Why a peer could not be reached, or not any longer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    #[error("{0}")]
    Dial(#[from] DialError),
    #[error("{0}")]
    Connection(#[from] ConnectionError),
    #[error("closed the connection")]
    Closed,
}

/// An outgoing connection.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) id: LinkId,
    pub(crate) node: Arc<Node>,
    pub(crate) object: Arc<Object>,
    pub(crate) object_id: ObjectId,
    pub(crate) record: PeerRecord,
    pub(crate) events: mpsc::Sender<(LinkId, LinkEvent)>,
}

impl Link {
    /// Runs until the connection ends, and reports why.
    pub(crate) async fn run(self) {
        let ended = self.connect_and_talk().await;
        if let Err(error) = ended {
            self.report(LinkEvent::Down(error)).await;
        }
    }

    async fn connect_and_talk(&self) -> Result<(), LinkError> {
        let node = &self.node;
        let dialled = node.transports.dial(&self.record, &node.identity).await?;
        let Connection {
            peer: source,
            reader,
            writer,
        } = dialled;
        let (asks, requests) = mpsc::channel(ASKS_MAX);
        self.report(LinkEvent::Up { source, asks }).await;
        // Neither half is started anew, so that a half that loses the race loses nothing that matters.
        tokio::select! {
            read = self.read_answers(reader, source) => read,
            written = write_requests(writer, requests) => written,
        }
    }

    async fn read_answers(&self, mut reader: Reader, source: PeerId) -> Result<(), LinkError> {
        let shard_frame = self.object.shard_bytes as usize + SHARD_PREFIX_BYTES;
        let frame_bytes_max = shard_frame.max(MESSAGE_BYTES_MAX);
        loop {
            let event = match read_large_frame(&mut reader, frame_bytes_max).await? {
                Frame::Shard {
                    request,
                    shard,
                    bytes,
                } => {
                    let length = bytes.len();
                    let verdict = match self.node.insert(self.object_id, shard, bytes).await {
                        Ok(inserted) => {
                            self.count(&source, inserted, length);
                            ShardVerdict::Good
                        }
                        Err(StoreError::Content(_)) => ShardVerdict::Bad,
                        Err(error) => {
                            self.report(LinkEvent::Unkept(error)).await;
                            return Err(LinkError::Closed);
                        }
                    };
                    LinkEvent::PeerReply(PeerReply::Shard {
                        request,
                        shard,
                        verdict,
                    })
                }
                Frame::Message(Message::Held {
                    request,
                    shards,
                    chooser,
                }) => LinkEvent::PeerReply(PeerReply::Held {
                    request,
                    shards,
                    chooser,
                }),
                Frame::Message(Message::Missing { request }) => {
                    LinkEvent::PeerReply(PeerReply::Missing { request })
                }
                Frame::Message(Message::Busy {
                    request,
                    retry_ms,
                    holders,
                }) => LinkEvent::PeerReply(PeerReply::Busy {
                    request,
                    retry_ms,
                    holders,
                }),
                other @ Frame::Message(_) => return Err(misplaced("an answer", &other).into()),
            };
            self.report(event).await;
        }
    }

    fn count(&self, source: &PeerId, inserted: Inserted, bytes: usize) {
        let moved = match inserted {
            Inserted::New => Transfer::Download,
            Inserted::Duplicate => Transfer::Duplicate,
        };
        self.node
            .counters
            .count(&self.object_id, source, moved, bytes);
    }

    async fn report(&self, event: LinkEvent) {
        // The fetch that would have heard of it is over: there is nobody left to tell.
        self.events.send((self.id, event)).await.ok();
    }
}

async fn write_requests(
    mut writer: Writer,
    mut requests: mpsc::Receiver<Message>,
) -> Result<(), LinkError> {
    while let Some(message) = requests.recv().await {
        write_message(&mut writer, &message).await?;
    }
    Err(LinkError::Closed)
}
