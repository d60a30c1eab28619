//! Asks peers which shards of some objects they hold, without fetching any, so that a command can tell beforehand which versions
//! can be fetched.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use muster_protocol::id::ObjectId;
use muster_protocol::limits::PEERS_MAX;
use muster_protocol::message::peer::PeerRecord;
use muster_protocol::message::version::Object;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::store::bitmap::Bitmap;
use crate::store::object::shard_count;
use crate::swarm::node::Node;
use crate::transport::connection::{read_frame, unexpected, write_message};
use crate::transport::interface::DialError;
use crate::transport::wire::{Frame, MESSAGE_BYTES_MAX, Message, RequestId};

/// How long one peer may take to answer for all objects: a slower peer is of little use to a fetch.
const PEER_WAIT: Duration = Duration::from_secs(5);

/// Requests sent before their replies are read. Hides the round trips to distant peers; 16 replies of 8 KiB fit into a
/// socket's buffers.
const BATCH: usize = 16;

/// The shards of each object that at least one peer holds.
#[derive(Debug, Clone, Default)]
pub struct Holdings(BTreeMap<ObjectId, Bitmap>);

impl Holdings {
    /// Whether every shard of an object is held by some peer.
    pub(crate) fn are_whole(&self, object: &ObjectId) -> bool {
        self.0.get(object).is_some_and(Bitmap::is_full)
    }

    /// Adds the shards that one more peer holds.
    pub(crate) fn join(&mut self, object: ObjectId, held: &Bitmap) {
        match self.0.get_mut(&object) {
            Some(known) => known.insert_all(held),
            None => {
                self.0.insert(object, held.clone());
            }
        }
    }
}

/// Asks `peers`, all at once, which shards of `objects` they hold. A peer that does not answer counts as holding nothing.
pub(crate) async fn survey(
    node: &Arc<Node>,
    peers: Vec<PeerRecord>,
    objects: &[Object],
) -> Holdings {
    // Two versions with equal weights share an object.
    let shards: BTreeMap<ObjectId, u32> = objects
        .iter()
        .map(|object| (object.id(), shard_count(object)))
        .collect();
    let shards = Arc::new(shards);
    let mut asked = JoinSet::new();
    for peer in peers.into_iter().take(PEERS_MAX) {
        let (node, shards) = (Arc::clone(node), Arc::clone(&shards));
        asked.spawn(async move {
            // Replies that came before a timeout or an error count.
            let mut held = Vec::new();
            match timeout(PEER_WAIT, ask(&node, &peer, &shards, &mut held)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    tracing::debug!(peer = %peer.handshake.short(), %error, "survey of a peer failed");
                }
                Err(_) => {
                    tracing::debug!(peer = %peer.handshake.short(), "survey of a peer timed out");
                }
            }
            held
        });
    }
    let mut holdings = Holdings::default();
    while let Some(answered) = asked.join_next().await {
        for (object, held) in answered.unwrap_or_default() {
            holdings.join(object, &held);
        }
    }
    holdings
}

async fn ask(
    node: &Node,
    peer: &PeerRecord,
    shards: &BTreeMap<ObjectId, u32>,
    held: &mut Vec<(ObjectId, Bitmap)>,
) -> Result<(), DialError> {
    let mut connection = node.transports.dial(peer, &node.identity).await?;
    let wanted: Vec<(RequestId, &ObjectId, u32)> = (0..)
        .zip(shards)
        .map(|(number, (object, shards))| (RequestId(number), object, *shards))
        .collect();
    for batch in wanted.chunks(BATCH) {
        for (request, object, _) in batch {
            let (request, object) = (*request, **object);
            write_message(&mut connection.writer, &Message::Have { request, object }).await?;
        }
        for (request, object, shards) in batch {
            match read_frame(&mut connection.reader, MESSAGE_BYTES_MAX).await? {
                Frame::Message(Message::Held {
                    request: answered,
                    shards: bitmap,
                    ..
                }) if answered == *request => {
                    // A bitmap of the wrong length is ignored.
                    let bitmap = Bitmap::from_bytes(&bitmap, *shards);
                    held.extend(bitmap.map(|bitmap| (**object, bitmap)));
                }
                Frame::Message(Message::Missing { request: answered }) if answered == *request => {}
                other => return Err(unexpected("a bitmap of held shards", &other).into()),
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use muster_protocol::clock::SystemClock;
    use muster_protocol::id::{PolicyVersion, StateRoot, UnixMillis};
    use muster_protocol::identity::Identity;
    use muster_protocol::message::version::Content;
    use tokio_util::sync::CancellationToken;
    use tokio_util::task::TaskTracker;

    use super::*;
    use crate::store::object::describe_object;
    use crate::{Swarm, SwarmConfig};

    fn anchor(seed: u8) -> (Object, Bytes) {
        let bytes = vec![seed; 40_000];
        let root = StateRoot([seed; 32]);
        let object = describe_object(Content::Anchor { root }, PolicyVersion(1), &bytes).unwrap();
        (object, bytes.into())
    }

    async fn peer(shutdown: &CancellationToken) -> Swarm {
        let (config, identity) = (SwarmConfig::default(), Identity::generate());
        let (clock, tracker) = (Arc::new(SystemClock), TaskTracker::new());
        let swarm = Swarm::start(config, identity, clock, &tracker, shutdown.clone());
        swarm.await.unwrap()
    }

    #[tokio::test]
    async fn an_object_is_available_if_and_only_if_some_peer_holds_it() {
        let shutdown = CancellationToken::new();
        let (one, other) = (peer(&shutdown).await, peer(&shutdown).await);
        let [(first, first_bytes), (second, second_bytes), (third, _)] = [1, 2, 3].map(anchor);
        one.offer(&first, first_bytes).await.unwrap();
        other.offer(&second, second_bytes).await.unwrap();
        let absent = PeerRecord {
            handshake: Identity::generate().handshake_id(),
            addresses: vec!["127.0.0.1:1".to_owned()],
            issued: UnixMillis(0),
        };
        // The address of another peer, which cannot prove this key.
        let impostor = PeerRecord {
            addresses: one.peer_record().addresses,
            ..absent.clone()
        };
        let objects = [first.clone(), second.clone(), third.clone()];
        let asker = peer(&shutdown).await;
        let peers = vec![absent.clone(), one.peer_record(), other.peer_record()];
        let holdings = asker.survey(peers, &objects).await;
        assert!(holdings.are_whole(&first.id()) && holdings.are_whole(&second.id()));
        assert!(!holdings.are_whole(&third.id()));
        let holdings = asker.survey(vec![absent, impostor], &objects).await;
        assert!(!holdings.are_whole(&first.id()));
        shutdown.cancel();
    }
}
