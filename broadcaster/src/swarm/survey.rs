//! Who holds what: asks the peers that are known which shards of some objects they hold, and fetches nothing. What can be had is
//! then known before anybody waits for it.

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
use crate::transport::connection::{misplaced, read_frame, write_message};
use crate::transport::interface::DialError;
use crate::transport::wire::{Frame, MESSAGE_BYTES_MAX, Message, RequestId};

/// How long one peer may take to answer for all objects: whoever is slower is of little use to a fetch either.
const PEER_WAIT: Duration = Duration::from_secs(5);

/// Requests sent before their answers are read: far peers are not waited for one by one, and 16 answers of 8 KiB are fewer
/// than sockets hold.
const BATCH: usize = 16;

/// Which shards of each object are held by some peer.
#[derive(Debug, Clone, Default)]
pub struct Holdings(BTreeMap<ObjectId, Bitmap>);

impl Holdings {
    /// Whether every shard of an object is held by somebody.
    pub fn are_whole(&self, object: &ObjectId) -> bool {
        self.0.get(object).is_some_and(Bitmap::is_full)
    }

    /// Adds what one more peer holds.
    pub(crate) fn join(&mut self, object: ObjectId, held: &Bitmap) {
        match self.0.get_mut(&object) {
            Some(known) => known.insert_all(held),
            None => {
                self.0.insert(object, held.clone());
            }
        }
    }
}

/// Asks `peers`, all at once, for `objects`. Whoever does not answer holds nothing.
pub(crate) async fn survey(
    node: &Arc<Node>,
    peers: Vec<PeerRecord>,
    objects: &[Object],
) -> Holdings {
    // Equal weights of two versions are one object.
    let shards: BTreeMap<ObjectId, u32> = objects
        .iter()
        .map(|object| (object.id(), shard_count(object)))
        .collect();
    let shards = Arc::new(shards);
    let mut asked = JoinSet::new();
    for peer in peers.into_iter().take(PEERS_MAX) {
        let (node, shards) = (Arc::clone(node), Arc::clone(&shards));
        asked.spawn(async move {
            // What was answered in time counts.
            let mut held = Vec::new();
            match timeout(PEER_WAIT, ask(&node, &peer, &shards, &mut held)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    tracing::debug!(peer = %peer.handshake.short(), %error, "a peer does not say what it holds");
                }
                Err(_) => {
                    tracing::debug!(peer = %peer.handshake.short(), "a peer is too slow to say what it holds");
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
                    // A bitmap of another length is about another object.
                    let bitmap = Bitmap::from_bytes(&bitmap, *shards);
                    held.extend(bitmap.map(|bitmap| (**object, bitmap)));
                }
                Frame::Message(Message::Missing { request: answered }) if answered == *request => {}
                other => return Err(misplaced("what is held", &other).into()),
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
    async fn what_some_peer_holds_can_be_had_and_what_nobody_holds_cannot() {
        let shutdown = CancellationToken::new();
        let (one, other) = (peer(&shutdown).await, peer(&shutdown).await);
        let [(first, first_bytes), (second, second_bytes), (third, _)] = [1, 2, 3].map(anchor);
        one.offer(&first, first_bytes).await.unwrap();
        other.offer(&second, second_bytes).await.unwrap();
        let nobody = PeerRecord {
            handshake: Identity::generate().handshake_id(),
            addresses: vec!["127.0.0.1:1".to_owned()],
            issued: UnixMillis(0),
        };
        // Somebody else's address: the key is not proved.
        let impostor = PeerRecord {
            addresses: one.peer_record().addresses,
            ..nobody.clone()
        };
        let objects = [first.clone(), second.clone(), third.clone()];
        let asker = peer(&shutdown).await;
        let peers = vec![nobody.clone(), one.peer_record(), other.peer_record()];
        let holdings = asker.survey(peers, &objects).await;
        assert!(holdings.are_whole(&first.id()) && holdings.are_whole(&second.id()));
        assert!(!holdings.are_whole(&third.id()));
        let holdings = asker.survey(vec![nobody, impostor], &objects).await;
        assert!(!holdings.are_whole(&first.id()));
        shutdown.cancel();
    }
}
