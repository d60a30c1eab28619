//! A follower on the in-memory bus, in virtual time; objects come from a map instead of a swarm.

use std::collections::BTreeMap;
use std::sync::Mutex;

use async_trait::async_trait;
use bytes::Bytes;
use muster_protocol::bus::memory::{MemoryBus, MemoryConfig};
use muster_protocol::bus::{Requests, SharedBus};
use muster_protocol::envelope::seal;
use muster_protocol::id::{DescriptorHash, Generation, ObjectId, RunId};
use muster_protocol::identity::Identity;
use muster_protocol::message::version::{Version, state_root};
use muster_protocol::subject::{Role, Subjects};
use serde_bytes::ByteBuf;
use tokio::time::{sleep, timeout};

use super::*;
use crate::store::object::describe_object;
use crate::swarm::FetchError;
use crate::version::state::describe_state;

/// Objects that peers hold.
#[derive(Debug, Default)]
struct Peers(Mutex<BTreeMap<ObjectId, Bytes>>);

#[async_trait]
impl ObjectSource for Peers {
    async fn fetch(&self, object: &Object) -> Result<Bytes, FetchError> {
        let held = self.0.lock().unwrap().get(&object.id()).cloned();
        match held {
            Some(bytes) => Ok(bytes),
            None => std::future::pending().await,
        }
    }

    fn is_unreachable(&self, object: &Object) -> bool {
        !self.0.lock().unwrap().contains_key(&object.id())
    }
}

/// The announcements that dispatch has stored, by version.
type Announced = Arc<Mutex<BTreeMap<u64, Announcement>>>;

struct Run {
    bus: MemoryBus,
    run: RunId,
    learner: Identity,
    peers: Arc<Peers>,
    announced: Announced,
    tracker: TaskTracker,
    shutdown: CancellationToken,
}

fn weights(version: u64) -> Bytes {
    let header = br#"{"w":{"dtype":"BF16","shape":[4],"data_offsets":[0,8]}}"#;
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend(version.to_le_bytes());
    file.into()
}

async fn answer_as_dispatch(mut requests: Requests, run: RunId, announced: Announced) {
    let identity = Identity::generate();
    while let Some(request) = requests.next().await {
        let ask = open::<Ask>(request.payload.clone(), &run).unwrap();
        let announced = announced.lock().unwrap().clone();
        let reply = match ask.body {
            Ask::Latest { version: None } => Reply::Version(announced.into_values().last()),
            Ask::Latest {
                version: Some(version),
            } => Reply::Version(announced.get(&version.0).cloned()),
            other => panic!("a follower does not ask {other:?}"),
        };
        let reply = seal(&identity, &run, 1, reply).unwrap();
        request.reply(reply.bytes).await;
    }
}

impl Run {
    async fn start() -> Self {
        let (run, learner): (RunId, Identity) = ("test".parse().unwrap(), Identity::generate());
        let bus = MemoryBus::new(&run, MemoryConfig::default());
        let tracker = TaskTracker::new();
        let announced = Announced::default();
        let dispatch = bus.connect("DISPATCH", Role::Dispatch);
        let requests = dispatch.serve(&Subjects::of(&run).all_asks()).await;
        let answering = answer_as_dispatch(requests.unwrap(), run.clone(), announced.clone());
        tracker.spawn(async move {
            let _connection: SharedBus = dispatch;
            answering.await;
        });
        Self {
            bus,
            run,
            learner,
            peers: Arc::default(),
            announced,
            tracker,
            shutdown: CancellationToken::new(),
        }
    }

    async fn follow(&self, follow: Follow) -> Follower {
        let bus = self.bus.connect("WORKER", Role::Worker);
        let learner = self.learner.peer_id();
        let client = DispatchClient::new(bus, Identity::generate(), self.run.clone(), learner);
        let (source, stop) = (self.peers.clone(), self.shutdown.child_token());
        let follower = Follower::start(client, source, follow, &self.tracker, stop);
        follower.await.unwrap()
    }

    /// A version signed by `author`, with an anchor of `bytes`. The weights that it promises are those of its number.
    fn announcement(&self, author: &Identity, version: u64, bytes: &Bytes) -> Announcement {
        let (parameters, part) = describe_state(&weights(version)).unwrap();
        let root = state_root(&[part]);
        let number = PolicyVersion(version);
        let object = describe_object(Content::Anchor { root }, number, bytes).unwrap();
        let object = seal(author, &self.run, 1, object).unwrap();
        let body = Version {
            descriptor: DescriptorHash([0; 32]),
            generation: Generation(1),
            version: number,
            parent: None,
            parameters,
            parts: vec![part],
            root,
            files: Vec::new(),
        };
        let signed = seal(author, &self.run, 1, body).unwrap();
        Announcement {
            version: signed.bytes.to_vec(),
            objects: vec![ByteBuf::from(object.bytes.to_vec())],
        }
    }

    /// The learner's announcement of a version, whose weights a peer holds.
    fn published(&self, version: u64) -> Announcement {
        let announcement = self.announcement(&self.learner, version, &weights(version));
        self.hold(&announcement, weights(version));
        announcement
    }

    fn hold(&self, announcement: &Announcement, bytes: Bytes) {
        let object = announcement.objects[0].to_vec().into();
        let object = open::<Object>(object, &self.run).unwrap();
        self.peers.0.lock().unwrap().insert(object.body.id(), bytes);
    }

    /// Stores an announcement at dispatch, for followers that ask.
    fn store(&self, version: u64, announcement: Announcement) {
        self.announced.lock().unwrap().insert(version, announcement);
    }

    async fn broadcast(&self, announcement: &Announcement) {
        let subject = Subjects::of(&self.run).news(Log::Versions);
        let trainer = self.bus.connect("TRAINER", Role::Trainer);
        let bytes = Bytes::from(announcement.encode().unwrap());
        trainer.publish(&subject, bytes).await.unwrap();
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

/// Waits for the next adopted version; `None` if there is none within a minute.
async fn next_version(follower: &mut Follower) -> Option<u64> {
    timeout(Duration::from_secs(60), follower.changed())
        .await
        .ok()?;
    follower.latest().map(|held| held.version.body.version.0)
}

#[tokio::test(start_paused = true)]
async fn an_announced_version_is_adopted() {
    let run = Run::start().await;
    let mut follower = run.follow(Follow::Newest).await;
    assert!(follower.latest().is_none());
    run.broadcast(&run.published(3)).await;
    assert_eq!(next_version(&mut follower).await, Some(3));
    assert_eq!(follower.latest().unwrap().image, weights(3));
}

#[tokio::test(start_paused = true)]
async fn a_version_that_another_key_signed_is_refused() {
    let run = Run::start().await;
    let mut follower = run.follow(Follow::Newest).await;
    let forged = run.announcement(&Identity::generate(), 9, &weights(9));
    run.hold(&forged, weights(9));
    run.broadcast(&forged).await;
    run.store(9, forged);
    assert_eq!(next_version(&mut follower).await, None);
    // The forged number does not hide the learner's smaller one.
    run.broadcast(&run.published(3)).await;
    assert_eq!(next_version(&mut follower).await, Some(3));
}

#[tokio::test(start_paused = true)]
async fn weights_that_do_not_match_the_signed_root_are_refused() {
    let run = Run::start().await;
    let mut follower = run.follow(Follow::Newest).await;
    let wrong = run.announcement(&run.learner, 1, &weights(7));
    run.hold(&wrong, weights(7));
    run.broadcast(&wrong).await;
    assert_eq!(next_version(&mut follower).await, None);
    run.broadcast(&run.published(2)).await;
    assert_eq!(next_version(&mut follower).await, Some(2));
}

#[tokio::test(start_paused = true)]
async fn bytes_that_are_no_announcement_are_ignored() {
    let run = Run::start().await;
    let mut follower = run.follow(Follow::Newest).await;
    let garbled = Announcement {
        version: vec![1, 2, 3],
        objects: Vec::new(),
    };
    run.broadcast(&garbled).await;
    run.broadcast(&run.published(1)).await;
    assert_eq!(next_version(&mut follower).await, Some(1));
}

#[tokio::test(start_paused = true)]
async fn a_follower_that_missed_the_announcement_asks_for_the_newest_version() {
    let run = Run::start().await;
    let mut follower = run.follow(Follow::Newest).await;
    sleep(Duration::from_millis(100)).await;
    run.store(4, run.published(4));
    let begun = Instant::now();
    assert_eq!(next_version(&mut follower).await, Some(4));
    assert!(begun.elapsed() <= 2 * SILENCE_MIN, "{:?}", begun.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_follower_of_every_version_asks_for_those_that_it_missed() {
    let run = Run::start().await;
    let mut follower = run.follow(Follow::Every).await;
    run.broadcast(&run.published(0)).await;
    assert_eq!(next_version(&mut follower).await, Some(0));
    for version in 1..4 {
        run.store(version, run.published(version));
    }
    run.broadcast(&run.published(3)).await;
    while next_version(&mut follower).await != Some(3) {}
    let taken: Vec<u64> = std::iter::from_fn(|| follower.take_next())
        .map(|held| held.version.body.version.0)
        .collect();
    assert_eq!(taken, [0, 1, 2, 3]);
}

#[tokio::test(start_paused = true)]
async fn a_stored_announcement_of_another_version_than_asked_for_is_skipped() {
    let run = Run::start().await;
    let mut follower = run.follow(Follow::Every).await;
    run.broadcast(&run.published(1)).await;
    assert_eq!(next_version(&mut follower).await, Some(1));
    run.store(2, run.published(9));
    run.broadcast(&run.published(3)).await;
    assert_eq!(next_version(&mut follower).await, Some(3));
    let taken = std::iter::from_fn(|| follower.take_next());
    assert_eq!(taken.count(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_version_that_no_peer_holds_is_skipped_for_a_newer_one() {
    let run = Run::start().await;
    let mut follower = run.follow(Follow::Newest).await;
    let lost = run.announcement(&run.learner, 1, &weights(1));
    run.broadcast(&lost).await;
    assert_eq!(next_version(&mut follower).await, None);
    run.broadcast(&run.published(2)).await;
    assert_eq!(next_version(&mut follower).await, Some(2));
}
