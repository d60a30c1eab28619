use std::sync::{Mutex, PoisonError};

use muster_protocol::bus::memory::{MemoryBus, MemoryConfig};
use muster_protocol::bus::{Requests, SharedBus};
use muster_protocol::clock::SystemClock;
use muster_protocol::envelope::{open, seal};
use muster_protocol::id::{DescriptorHash, Generation, PeerId, RunId};
use muster_protocol::identity::Identity;
use muster_protocol::message::ask::{Ask, Reply};
use muster_protocol::message::peer::PeerRecord;
use muster_protocol::message::version::{Announcement, Version, state_root};
use muster_protocol::subject::{Log, Role, Subjects};
use serde_bytes::ByteBuf;

use super::*;
use crate::codec::delta::encode;
use crate::follower::{Follow, Follower};
use crate::version::state::describe_state;
use crate::{ObjectSource, SwarmConfig};

/// Weights of 65,536 bf16 numbers, of which each version moves the same sixteenth, scattered as in training: what is far from
/// the last version is not more than what is near.
fn weights(version: u64) -> Bytes {
    let header = br#"{"w":{"dtype":"BF16","shape":[65536],"data_offsets":[0,131072]}}"#;
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    let moved = |i: u64| u64::from(blake3::hash(&i.to_le_bytes()).as_bytes()[0] < 16) * version;
    let weight = |i: u64| 0x3c00 + (i * 31 % 700) as u16 + moved(i) as u16;
    file.extend((0..65_536).flat_map(|i| weight(i).to_le_bytes()));
    file.into()
}

fn root_of(version: u64) -> StateRoot {
    state_root(&[describe_state(&weights(version)).unwrap().1])
}

/// What dispatch knows: announcements, and what members described.
#[derive(Default)]
struct Desks {
    announced: Vec<Announcement>,
    described: Vec<ByteBuf>,
    asked: usize,
}

/// A run on a bus in memory: its learner announces an anchor of version 0 and single steps, dispatch answers.
struct Run {
    bus: MemoryBus,
    run: RunId,
    learner: Identity,
    learners_swarm: Swarm,
    desks: Arc<Mutex<Desks>>,
    trail: Vec<Signed<Object>>,
    tracker: TaskTracker,
    shutdown: CancellationToken,
}

async fn swarm(identity: &Identity, tracker: &TaskTracker, shutdown: &CancellationToken) -> Swarm {
    let (config, clock) = (SwarmConfig::default(), Arc::new(SystemClock));
    let swarm = Swarm::start(config, identity.clone(), clock, tracker, shutdown.clone());
    swarm.await.unwrap()
}

/// Answers what followers and squashers ask, as dispatch does.
async fn answer(mut requests: Requests, run: RunId, desks: Arc<Mutex<Desks>>) {
    let identity = Identity::generate();
    while let Some(request) = requests.next().await {
        let ask = open::<Ask>(request.payload.clone(), &run).unwrap();
        let answer = {
            let mut desks = desks.lock().unwrap_or_else(PoisonError::into_inner);
            match ask.body {
                Ask::Latest { version: None } => Reply::Version(desks.announced.last().cloned()),
                Ask::Latest {
                    version: Some(version),
                } => Reply::Version(desks.announced.get(version.0 as usize).cloned()),
                Ask::Deltas { mine, .. } => {
                    desks.asked += 1;
                    desks.described.extend(mine);
                    Reply::Deltas(desks.described.clone())
                }
                other => panic!("unexpected request {other:?}"),
            }
        };
        let answer = seal(&identity, &run, 1, answer).unwrap();
        request.reply(answer.bytes).await;
    }
}

impl Run {
    async fn start() -> Self {
        let (run, learner): (RunId, Identity) = ("test".parse().unwrap(), Identity::generate());
        let bus = MemoryBus::new(&run, MemoryConfig::default());
        let (tracker, shutdown) = (TaskTracker::new(), CancellationToken::new());
        let desks: Arc<Mutex<Desks>> = Arc::default();
        let dispatch = bus.connect("DISPATCH", Role::Dispatch);
        let requests = dispatch
            .serve(&Subjects::of(&run).all_asks())
            .await
            .unwrap();
        let answering = answer(requests, run.clone(), desks.clone());
        tracker.spawn(async move {
            let _connected: SharedBus = dispatch;
            answering.await;
        });
        let learners_swarm = swarm(&learner, &tracker, &shutdown).await;
        Self {
            bus,
            run,
            learner,
            learners_swarm,
            desks,
            trail: Vec::new(),
            tracker,
            shutdown,
        }
    }

    fn client(&self, user: &str, role: Role, identity: &Identity) -> DispatchClient {
        let bus = self.bus.connect(user, role);
        DispatchClient::new(
            bus,
            identity.clone(),
            self.run.clone(),
            self.learner.peer_id(),
        )
    }

    async fn offer(&mut self, content: Content, version: u64, bytes: Bytes) {
        let object = describe_object(content, PolicyVersion(version), &bytes).unwrap();
        self.learners_swarm.offer(&object, bytes).await.unwrap();
        self.learners_swarm.pin(&object.id());
        let object = seal(&self.learner, &self.run, 1, object).unwrap();
        self.trail.push(object);
    }

    /// The learner makes a version known: the first as an anchor, the others as deltas.
    async fn announce(&mut self, version: u64) {
        let (image, to) = (weights(version), root_of(version));
        match version.checked_sub(1) {
            None => {
                self.offer(Content::Anchor { root: to }, version, image.clone())
                    .await
            }
            Some(before) => {
                let delta = encode(&weights(before), &image, NonZeroUsize::MIN).unwrap();
                let from = root_of(before);
                let content = Content::Delta { from, to };
                self.offer(content, version, delta.bytes.into()).await;
            }
        }
        let (parameters, part) = describe_state(&image).unwrap();
        let body = Version {
            descriptor: DescriptorHash([0; 32]),
            generation: Generation(1),
            version: PolicyVersion(version),
            parent: None,
            parameters,
            parts: vec![part],
            root: to,
            files: Vec::new(),
        };
        let signed = seal(&self.learner, &self.run, 1, body).unwrap();
        let objects = self
            .trail
            .iter()
            .map(|object| ByteBuf::from(object.bytes.to_vec()));
        let announcement = Announcement {
            version: signed.bytes.to_vec(),
            objects: objects.collect(),
        };
        let record = Bytes::from(announcement.encode().unwrap());
        self.desks.lock().unwrap().announced.push(announcement);
        let news = Subjects::of(&self.run).news(Log::Versions);
        let trainer = self.bus.connect("TRAINER", Role::Trainer);
        trainer.publish(&news, record).await.unwrap();
    }

    async fn member(&self, user: &str, peers: &[&Swarm]) -> Member {
        let identity = Identity::generate();
        let swarm = swarm(&identity, &self.tracker, &self.shutdown).await;
        meet(
            &swarm,
            &self.learner.peer_id(),
            self.learners_swarm.peer_record(),
        );
        for (number, peer) in peers.iter().enumerate() {
            meet(&swarm, &PeerId([number as u8; 32]), peer.peer_record());
        }
        let client = self.client(user, Role::Seeder, &identity);
        let source: Arc<dyn ObjectSource> = Arc::new(swarm.clone());
        let stop = self.shutdown.child_token();
        let follower = Follower::start(client.clone(), source, Follow::Newest, &self.tracker, stop);
        Member {
            follower: follower.await.unwrap(),
            client,
            swarm,
        }
    }

    fn squash(&self, member: &Member) {
        let (client, swarm) = (member.client.clone(), member.swarm.clone());
        let (newest, config) = (member.follower.watch(), SquashConfig::default());
        let stop = self.shutdown.child_token();
        keep(client, swarm, newest, config, &self.tracker, stop);
    }

    /// What members described so far, opened.
    fn described(&self) -> Vec<Signed<Object>> {
        let described = self.desks.lock().unwrap().described.clone();
        let opened = described
            .into_iter()
            .map(|bytes| open(bytes.into_vec().into(), &self.run));
        opened.map(Result::unwrap).collect()
    }
}

fn meet(swarm: &Swarm, peer: &PeerId, record: PeerRecord) {
    swarm.add_peer(*peer, record);
}

struct Member {
    follower: Follower,
    client: DispatchClient,
    swarm: Swarm,
}

impl Member {
    async fn arrives_at(&mut self, version: u64) -> Arc<Held> {
        loop {
            match self.follower.latest() {
                Some(held) if held.version.body.version.0 == version => return held,
                _ => self.follower.changed().await,
            }
        }
    }
}

/// Waits for something that other tasks bring about, a minute at most so that a mistake is no hang.
async fn until<T>(mut look: impl FnMut() -> Option<T>) -> T {
    for _ in 0..3_000 {
        match look() {
            Some(found) => return found,
            None => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
    panic!("what was waited for did not come about")
}

#[tokio::test]
async fn a_seeder_squashes_what_it_holds_and_a_late_peer_fetches_fewer_bytes_by_it() {
    let mut run = Run::start().await;
    run.announce(0).await;
    let mut seeder = run.member("SEEDER", &[]).await;
    run.squash(&seeder);
    let mut late = run.member("LATE", &[&seeder.swarm]).await;
    for member in [&mut seeder, &mut late] {
        member.arrives_at(0).await;
    }
    run.bus.cut_off("LATE");
    for version in 1..=4 {
        run.announce(version).await;
        seeder.arrives_at(version).await;
    }
    let delta = until(|| run.described().pop()).await;
    let (from, to) = (root_of(0), root_of(4));
    assert_eq!(delta.body.content, Content::Delta { from, to });
    assert_eq!(delta.author, seeder.client.identity().peer_id());
    let singles: u64 = run.trail[1..].iter().map(|object| object.body.bytes).sum();
    assert!(
        delta.body.bytes < singles,
        "{} against {singles}",
        delta.body.bytes
    );
    let before = late.swarm.metrics().total.bytes_downloaded;
    run.bus.heal("LATE");
    run.announce(5).await;
    let held = late.arrives_at(5).await;
    assert_eq!(held.image, weights(5));
    let fetched = late.swarm.metrics().total.bytes_downloaded - before;
    let last = run.trail.last().unwrap().body.bytes;
    assert_eq!(fetched, delta.body.bytes + last);
    run.shutdown.cancel();
}

#[tokio::test]
async fn a_step_that_somebody_has_described_is_not_made_again() {
    let mut run = Run::start().await;
    run.announce(0).await;
    let other = Identity::generate();
    let content = Content::Delta {
        from: root_of(0),
        to: root_of(4),
    };
    let object = describe_object(content, PolicyVersion(4), b"what another made").unwrap();
    let object = seal(&other, &run.run, 1, object).unwrap();
    let bytes = ByteBuf::from(object.bytes.to_vec());
    run.desks.lock().unwrap().described.push(bytes);
    let mut seeder = run.member("SEEDER", &[]).await;
    run.squash(&seeder);
    seeder.arrives_at(0).await;
    for version in 1..=8 {
        run.announce(version).await;
        seeder.arrives_at(version).await;
        if version == 4 {
            // At its turn it looks first.
            until(|| Some(()).filter(|()| run.desks.lock().unwrap().asked > 0)).await;
        }
    }
    // The member makes the next delta after its turn, so it left the first to the other member.
    let described = until(|| Some(run.described()).filter(|described| described.len() > 1)).await;
    let made: Vec<Content> = described[1..]
        .iter()
        .map(|delta| delta.body.content)
        .collect();
    let (from, to) = (root_of(4), root_of(8));
    assert_eq!(made, [Content::Delta { from, to }]);
    run.shutdown.cancel();
}

#[tokio::test]
async fn descriptions_of_another_run_and_broken_ones_are_not_used() {
    let mut run = Run::start().await;
    run.announce(0).await;
    let (maker, elsewhere) = (Identity::generate(), "other".parse().unwrap());
    let content = Content::Delta {
        from: root_of(0),
        to: root_of(4),
    };
    let object = describe_object(content, PolicyVersion(4), b"bytes").unwrap();
    let replayed = seal(&maker, &elsewhere, 1, object.clone()).unwrap();
    let mut forged = seal(&maker, &run.run, 1, object).unwrap().bytes.to_vec();
    let own = forged.clone();
    *forged.last_mut().unwrap() ^= 1;
    run.desks.lock().unwrap().described = vec![
        ByteBuf::from(replayed.bytes.to_vec()),
        ByteBuf::from(forged),
        ByteBuf::from(own),
    ];
    let client = run.client("SEEDER", Role::Seeder, &maker);
    let known = squashed_deltas(&client, PolicyVersion(0)).await;
    assert_eq!(known.len(), 1);
    run.shutdown.cancel();
}
