//! One outgoing connection of a fetch: dials a peer, sends the requests of the download scheduler, and reports the replies.
//!
//! Decides nothing. Ends when either direction of the connection ends, and reports why. Invariant: a shard is verified before
//! it is reported.

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
    Connection, ConnectionError, read_large_frame, unexpected, write_message,
};
use crate::transport::interface::DialError;
use crate::transport::stream::{Reader, Writer};
use crate::transport::wire::{Frame, MESSAGE_BYTES_MAX, Message, SHARD_PREFIX_BYTES};

/// Requests waiting to be written: more than the scheduler ever has in flight to one peer.
const REQUESTS_MAX: usize = 16;

/// The number of one attempt to reach a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct LinkId(pub(crate) u64);

/// What a link reports.
#[derive(Debug)]
pub(crate) enum LinkEvent {
    /// The peer has proved its key and accepts requests.
    Up {
        peer: PeerId,
        requests: mpsc::Sender<Message>,
    },
    Reply(PeerReply),
    /// The store could not keep a verified shard.
    NotStored(StoreError),
    /// The connection has ended.
    Down(LinkError),
}

/// Why a connection failed or ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    #[error("{0}")]
    Dial(#[from] DialError),
    #[error("{0}")]
    Connection(#[from] ConnectionError),
    #[error("closed the connection")]
    Closed,
}

/// The arguments of an outgoing connection.
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
            peer,
            reader,
            writer,
        } = dialled;
        let (requests, to_write) = mpsc::channel(REQUESTS_MAX);
        self.report(LinkEvent::Up { peer, requests }).await;
        // When one half ends, the connection ends, so the cancelled half loses nothing that matters.
        tokio::select! {
            read = self.read_replies(reader, peer) => read,
            written = write_requests(writer, to_write) => written,
        }
    }

    async fn read_replies(&self, mut reader: Reader, peer: PeerId) -> Result<(), LinkError> {
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
                            self.count(&peer, inserted, length);
                            ShardVerdict::Good
                        }
                        Err(StoreError::Content(_)) => ShardVerdict::Bad,
                        Err(error) => {
                            self.report(LinkEvent::NotStored(error)).await;
                            return Err(LinkError::Closed);
                        }
                    };
                    LinkEvent::Reply(PeerReply::Shard {
                        request,
                        shard,
                        verdict,
                    })
                }
                Frame::Message(Message::Held {
                    request,
                    shards,
                    chooser,
                }) => LinkEvent::Reply(PeerReply::Held {
                    request,
                    shards,
                    chooser,
                }),
                Frame::Message(Message::Missing { request }) => {
                    LinkEvent::Reply(PeerReply::Missing { request })
                }
                Frame::Message(Message::Busy {
                    request,
                    retry_ms,
                    holders,
                }) => LinkEvent::Reply(PeerReply::Busy {
                    request,
                    retry_ms,
                    holders,
                }),
                other @ Frame::Message(_) => return Err(unexpected("a reply", &other).into()),
            };
            self.report(event).await;
        }
    }

    fn count(&self, peer: &PeerId, inserted: Inserted, bytes: usize) {
        let transfer = match inserted {
            Inserted::New => Transfer::Download,
            Inserted::Duplicate => Transfer::Duplicate,
        };
        self.node
            .counters
            .count(&self.object_id, peer, transfer, bytes);
    }

    async fn report(&self, event: LinkEvent) {
        // The receiver is gone if the fetch has ended; then the report is of no use.
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
