use std::collections::BTreeMap;
use std::sync::Mutex;

use async_trait::async_trait;
use muster_protocol::envelope::seal;
use muster_protocol::id::{DescriptorHash, Generation, ObjectId, RunId};
use muster_protocol::identity::Identity;
use muster_protocol::message::version::state_root;

use super::*;
use crate::codec::delta::encode;
use crate::store::StoreError;
use crate::store::bitmap::Bitmap;
use crate::store::object::{describe_object, shard_count};
use crate::version::state::describe_state;

/// The objects of a run's versions, in memory, and a record of the calls.
#[derive(Debug, Default)]
struct MemorySource {
    objects: BTreeMap<ObjectId, Bytes>,
    fetched_bytes: Mutex<Vec<u64>>,
    offered: Mutex<Vec<ObjectId>>,
    distrusted: Mutex<Vec<PeerId>>,
}

#[async_trait]
impl ObjectSource for MemorySource {
    async fn fetch(&self, object: &Object) -> Result<Bytes, FetchError> {
        self.fetched_bytes.lock().unwrap().push(object.bytes);
        let found = self.objects.get(&object.id()).cloned();
        found.ok_or(FetchError::Stopped)
    }

    async fn offer(&self, object: &Object, _bytes: Bytes) -> Result<(), StoreError> {
        self.offered.lock().unwrap().push(object.id());
        Ok(())
    }

    fn distrust(&self, maker: PeerId, _object: &Object, _reason: &str) {
        self.distrusted.lock().unwrap().push(maker);
    }

    fn is_distrusted(&self, maker: &PeerId) -> bool {
        self.distrusted.lock().unwrap().contains(maker)
    }
}

/// Weights of 4,096 bf16 numbers, of which each version moves forty more.
fn weights(version: u64) -> Vec<u8> {
    let header = br#"{"w":{"dtype":"BF16","shape":[4096],"data_offsets":[0,8192]}}"#;
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    let weight = |i: u64| 0x3c00 + (i * 31 % 700) as u16 + u16::from(i < 40 * version);
    file.extend((0..4_096).flat_map(|i| weight(i).to_le_bytes()));
    file
}

fn root_of(version: u64) -> StateRoot {
    let (_, part) = describe_state(&weights(version)).unwrap();
    state_root(&[part])
}

/// The run's learner, which also describes the objects.
struct Author {
    identity: Identity,
    run: RunId,
    source: MemorySource,
}

impl Author {
    fn new() -> Self {
        Self {
            identity: Identity::generate(),
            run: "test".parse().unwrap(),
            source: MemorySource::default(),
        }
    }

    fn object(&mut self, content: Content, version: u64, bytes: Vec<u8>) -> Signed<Object> {
        let object = describe_object(content, PolicyVersion(version), &bytes).unwrap();
        self.source.objects.insert(object.id(), bytes.into());
        seal(&self.identity, &self.run, 1, object).unwrap()
    }

    fn anchor(&mut self, version: u64) -> Signed<Object> {
        let root = root_of(version);
        self.object(Content::Anchor { root }, version, weights(version))
    }

    fn delta(&mut self, from: u64, to: u64) -> Signed<Object> {
        let delta = encode(&weights(from), &weights(to), NonZeroUsize::MIN).unwrap();
        self.named(from, to, delta.bytes)
    }

    /// A delta that says where it leads.
    fn named(&mut self, from: u64, to: u64, bytes: Vec<u8>) -> Signed<Object> {
        let content = Content::Delta {
            from: root_of(from),
            to: root_of(to),
        };
        self.object(content, to, bytes)
    }

    fn opened(&self, version: u64, objects: &[&Signed<Object>]) -> Opened {
        let (parameters, part) = describe_state(&weights(version)).unwrap();
        let body = Version {
            descriptor: DescriptorHash([0; 32]),
            generation: Generation(1),
            version: PolicyVersion(version),
            parent: None,
            parameters,
            parts: vec![part],
            root: state_root(&[part]),
            files: Vec::new(),
        };
        Opened {
            version: seal(&self.identity, &self.run, 2, body).unwrap(),
            objects: objects.iter().map(|object| (*object).clone()).collect(),
            files: Vec::new(),
        }
    }

    fn held(&self, version: u64) -> Held {
        Held {
            version: self.opened(version, &[]).version,
            anchor: None,
            objects: Vec::new(),
            files: Vec::new(),
            image: weights(version).into(),
        }
    }
}

#[test]
fn a_version_can_be_had_while_peers_hold_some_route_to_it_whole() {
    let mut author = Author::new();
    let (old, delta, anchor) = (author.anchor(1), author.delta(1, 2), author.anchor(2));
    let with = |whole: &[&Signed<Object>], part: &[&Signed<Object>]| {
        let mut holdings = Holdings::default();
        for object in whole {
            let shards = shard_count(&object.body);
            holdings.join(object.body.id(), &Bitmap::full(shards));
        }
        for object in part {
            let shards = shard_count(&object.body);
            holdings.join(object.body.id(), &Bitmap::empty(shards));
        }
        let mut opened = author.opened(2, &[&old, &delta, &anchor]);
        let can_be_had = opened.keep_held(&holdings);
        (can_be_had, opened.objects.len())
    };
    assert_eq!(with(&[&anchor], &[]), (true, 1));
    assert_eq!(with(&[&old, &delta], &[&anchor]), (true, 2));
    assert_eq!(with(&[&delta], &[&old, &anchor]), (false, 1));
    assert_eq!(with(&[], &[]), (false, 0));
}

#[tokio::test]
async fn whoever_holds_the_parent_fetches_the_delta_and_can_serve_the_anchor() {
    let mut author = Author::new();
    let (delta, anchor) = (author.delta(1, 2), author.anchor(2));
    let opened = author.opened(2, &[&anchor, &delta]);
    let parent = author.held(1);
    let held = fetch(&author.source, opened, Some(&parent)).await.unwrap();
    assert_eq!(held.image, weights(2));
    assert_eq!(parent.image, weights(1), "the parent stays as it is");
    assert_eq!(
        *author.source.fetched_bytes.lock().unwrap(),
        [delta.body.bytes]
    );
    assert_eq!(*author.source.offered.lock().unwrap(), [anchor.body.id()]);
}

#[tokio::test]
async fn a_newcomer_goes_by_the_last_anchor_and_the_deltas_since() {
    let mut author = Author::new();
    let objects = [author.anchor(1), author.delta(1, 2), author.delta(2, 3)];
    let opened = author.opened(3, &objects.each_ref());
    let held = fetch(&author.source, opened, None).await.unwrap();
    assert_eq!(held.image, weights(3));
    assert!(held.anchor.is_none());
    assert_eq!(author.source.fetched_bytes.lock().unwrap().len(), 3);
}

#[tokio::test]
async fn a_late_peer_takes_the_squashed_delta() {
    let mut author = Author::new();
    let mut objects: Vec<_> = (1..5).map(|v| author.delta(v, v + 1)).collect();
    objects.push(author.delta(1, 5));
    objects.push(author.anchor(5));
    let objects: Vec<&Signed<Object>> = objects.iter().collect();
    let opened = author.opened(5, &objects);
    let parent = author.held(1);
    let held = fetch(&author.source, opened, Some(&parent)).await.unwrap();
    assert_eq!(held.image, weights(5));
    assert_eq!(
        *author.source.fetched_bytes.lock().unwrap(),
        [objects[4].body.bytes]
    );
}

#[tokio::test]
async fn a_delta_that_leads_elsewhere_than_it_says_is_refused_and_the_anchor_taken() {
    let mut author = Author::new();
    let elsewhere = encode(&weights(1), &weights(9), NonZeroUsize::MIN).unwrap();
    let lie = author.named(1, 2, elsewhere.bytes);
    let garbage = author.named(1, 2, vec![7; 300]);
    let anchor = author.anchor(2);
    let opened = author.opened(2, &[&lie, &garbage, &anchor]);
    let parent = author.held(1);
    let held = fetch(&author.source, opened, Some(&parent)).await.unwrap();
    assert_eq!(held.image, weights(2));
    let taken = author.source.fetched_bytes.lock().unwrap().clone();
    assert_eq!(taken, [lie.body.bytes, 300, anchor.body.bytes]);
}

#[tokio::test]
async fn without_an_anchor_a_lying_delta_is_an_error_and_no_weights() {
    let mut author = Author::new();
    let elsewhere = encode(&weights(1), &weights(9), NonZeroUsize::MIN).unwrap();
    let lie = author.named(1, 2, elsewhere.bytes);
    let opened = author.opened(2, &[&lie]);
    let parent = author.held(1);
    let refused = fetch(&author.source, opened, Some(&parent))
        .await
        .unwrap_err();
    assert!(matches!(refused, FollowError::Bytes { .. }), "{refused}");
}

#[tokio::test]
async fn a_version_that_is_held_is_not_fetched_again() {
    let mut author = Author::new();
    let anchor = author.anchor(2);
    let opened = author.opened(2, &[&anchor]);
    let parent = author.held(2);
    let held = fetch(&author.source, opened, Some(&parent)).await.unwrap();
    assert_eq!(held.image, weights(2));
    assert!(author.source.fetched_bytes.lock().unwrap().is_empty());
}

/// Another member of the run, which describes deltas.
impl Author {
    fn squashed(&mut self, maker: &Identity, from: u64, to: u64, bytes: Vec<u8>) -> Signed<Object> {
        let described = self.named(from, to, bytes).body;
        seal(maker, &self.run, 1, described).unwrap()
    }

    fn chain(&mut self, from: u64, to: u64) -> Vec<Signed<Object>> {
        (from..to).map(|v| self.delta(v, v + 1)).collect()
    }

    /// Opens what `objects` lead to, with what members described of it.
    fn opened_with(
        &self,
        version: u64,
        objects: &[Signed<Object>],
        squashed: &[Signed<Object>],
    ) -> Opened {
        let objects: Vec<&Signed<Object>> = objects.iter().collect();
        let mut opened = self.opened(version, &objects);
        opened.add_squashed(&self.source, squashed.to_vec());
        opened
    }
}

fn coded(from: u64, to: u64) -> Vec<u8> {
    encode(&weights(from), &weights(to), NonZeroUsize::MIN)
        .unwrap()
        .bytes
}

#[tokio::test]
async fn a_late_peer_takes_members_squashed_deltas_beside_the_learners_and_fewer_bytes() {
    let (mut author, maker) = (Author::new(), Identity::generate());
    let chain = author.chain(1, 9);
    let squashed = author.squashed(&maker, 4, 8, coded(4, 8));
    let parent = author.held(3);
    let opened = author.opened_with(9, &chain, &[]);
    fetch(&author.source, opened, Some(&parent)).await.unwrap();
    let single: u64 = author.source.fetched_bytes.lock().unwrap().drain(..).sum();
    let opened = author.opened_with(9, &chain, std::slice::from_ref(&squashed));
    let held = fetch(&author.source, opened, Some(&parent)).await.unwrap();
    assert_eq!(held.image, weights(9));
    let taken = author.source.fetched_bytes.lock().unwrap().clone();
    let expected = [&chain[2], &squashed, &chain[7]].map(|object| object.body.bytes);
    assert_eq!(taken, expected);
    assert!(
        taken.iter().sum::<u64>() < single,
        "{taken:?} against {single}"
    );
    assert!(author.source.distrusted.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_squashed_delta_with_one_wrong_bit_or_another_root_is_left_out_and_its_maker_struck() {
    for lie in ["bit", "root", "garbage"] {
        let (mut author, liar, honest) =
            (Author::new(), Identity::generate(), Identity::generate());
        let chain = author.chain(0, 8);
        let bytes = match lie {
            "bit" => {
                let mut bytes = coded(0, 4);
                *bytes.last_mut().unwrap() ^= 1;
                bytes
            }
            "root" => coded(0, 5),
            _ => vec![7; 40],
        };
        let first = author.squashed(&liar, 0, 4, bytes);
        // What the same member says of another step is not tried.
        let second = author.squashed(&liar, 4, 8, coded(4, 8));
        let squashed = [first, second];
        let parent = author.held(0);
        let opened = author.opened_with(8, &chain, &squashed);
        let held = fetch(&author.source, opened.clone(), Some(&parent))
            .await
            .unwrap();
        assert_eq!(held.image, weights(8), "{lie}");
        let distrusted = author.source.distrusted.lock().unwrap().clone();
        assert_eq!(distrusted, [liar.peer_id()], "{lie}");
        let mut known = held.objects.iter();
        assert!(known.all(|object| object.author != liar.peer_id()), "{lie}");
        // From then on it is not even taken in; another member's is.
        let true_one = author.squashed(&honest, 0, 4, coded(0, 4));
        let mut again = author.opened_with(8, &chain, &squashed);
        again.add_squashed(&author.source, vec![true_one]);
        let makers: Vec<PeerId> = again.objects[8..]
            .iter()
            .map(|object| object.author)
            .collect();
        assert_eq!(makers, [honest.peer_id()], "{lie}");
    }
}

#[tokio::test]
async fn a_lie_early_on_the_way_is_found_though_the_end_is_wrong_and_the_honest_go_unstruck() {
    let (mut author, liar, honest) = (Author::new(), Identity::generate(), Identity::generate());
    let chain = author.chain(0, 9);
    let squashed = [
        author.squashed(&liar, 0, 4, coded(0, 3)),
        author.squashed(&honest, 4, 8, coded(4, 8)),
    ];
    let parent = author.held(0);
    let opened = author.opened_with(9, &chain, &squashed);
    let held = fetch(&author.source, opened, Some(&parent)).await.unwrap();
    assert_eq!(held.image, weights(9));
    assert_eq!(*author.source.distrusted.lock().unwrap(), [liar.peer_id()]);
    let taken = author.source.fetched_bytes.lock().unwrap().clone();
    assert_eq!(taken.last_chunk::<6>().unwrap(), &{
        let singles = chain[..4].iter().chain([&squashed[1], &chain[8]]);
        let bytes: Vec<u64> = singles.map(|object| object.body.bytes).collect();
        <[u64; 6]>::try_from(bytes).unwrap()
    });
}

#[tokio::test]
async fn a_squashed_delta_that_does_not_come_is_left_out_and_nobody_struck() {
    let (mut author, maker) = (Author::new(), Identity::generate());
    let chain = author.chain(0, 4);
    let squashed = author.squashed(&maker, 0, 4, coded(0, 4));
    author.source.objects.remove(&squashed.body.id());
    let parent = author.held(0);
    let opened = author.opened_with(4, &chain, &[squashed]);
    let held = fetch(&author.source, opened, Some(&parent)).await.unwrap();
    assert_eq!(held.image, weights(4));
    assert!(author.source.distrusted.lock().unwrap().is_empty());
}

#[test]
fn an_anchor_of_a_member_and_a_delta_larger_than_the_weights_are_not_taken_in() {
    let (mut author, maker) = (Author::new(), Identity::generate());
    let anchor = author.anchor(4).body;
    let anchor = seal(&maker, &author.run, 1, anchor).unwrap();
    let large = author.squashed(&maker, 0, 4, vec![0; 9 << 20]);
    let later = author.squashed(&maker, 4, 8, coded(4, 8));
    let opened = author.opened_with(4, &[], &[anchor, large, later]);
    assert!(opened.objects.is_empty());
}
