//! A swarm of which some lie, vanish or keep silent, over real connections: every honest peer comes by the right bytes, and
//! who served wrong ones is banned. How much longer it takes is measured over capped uplinks by
//! `cargo test --release -p muster-broadcaster --test faults -- --ignored --nocapture`.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use muster_broadcaster::store::bitmap::Bitmap;
use muster_broadcaster::store::object::{describe_object, shard_count, shard_range};
use muster_broadcaster::swarm::uploads::Sharing;
use muster_broadcaster::transport::connection::{
    Side, handshake, read_frame, write_message, write_shard,
};
use muster_broadcaster::transport::wire::{Chooser, Frame, MESSAGE_BYTES_MAX, Message};
use muster_broadcaster::{Swarm, SwarmConfig};
use muster_protocol::clock::SystemClock;
use muster_protocol::id::{PeerId, PolicyVersion, StateRoot, UnixMillis};
use muster_protocol::identity::Identity;
use muster_protocol::message::peer::PeerRecord;
use muster_protocol::message::version::{Content, Object};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Peers besides the learner, honest or not.
const PEERS: usize = 10;
/// Of which these offend: three of ten.
const OFFENCES: [Offence; 3] = [Offence::Corrupt, Offence::Vanish, Offence::Silent];
/// Most that offenders may cost, in times of the undisturbed swarm.
const TIMES_MAX: f64 = 1.6;

/// What an offender does. Each draws shards from the learner and from others as an honest peer does.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Offence {
    /// Says that it holds everything and sends other bytes.
    Corrupt,
    /// Is gone when it has a third of the object, whatever it was sending.
    Vanish,
    /// Says that it holds everything and sends nothing.
    Silent,
}

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Trouble {
    None,
    /// Three of ten peers offend.
    Offenders,
    /// The learner is gone when it has sent everything once.
    LearnerDies,
}

struct Peer {
    swarm: Swarm,
    identity: Identity,
    shutdown: CancellationToken,
}

impl Peer {
    async fn start(sharing: Sharing, rate: Option<NonZeroU64>) -> Self {
        let (identity, shutdown) = (Identity::generate(), CancellationToken::new());
        let config = SwarmConfig {
            sharing,
            upload_bytes_per_second: rate,
            ..SwarmConfig::default()
        };
        let (clock, tracker) = (Arc::new(SystemClock), TaskTracker::new());
        let swarm = Swarm::start(config, identity.clone(), clock, &tracker, shutdown.clone());
        Self {
            swarm: swarm.await.unwrap(),
            identity,
            shutdown,
        }
    }

    fn id(&self) -> PeerId {
        self.identity.peer_id()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

fn object(length: usize) -> (Object, Bytes) {
    let mut bytes = vec![0; length];
    ChaCha8Rng::seed_from_u64(1).fill(&mut bytes[..]);
    let root = StateRoot([1; 32]);
    let object = describe_object(Content::Anchor { root }, PolicyVersion(1), &bytes);
    (object.unwrap(), bytes.into())
}

/// A listener in the name of `identity` that offends.
async fn offend(offence: Offence, identity: &Identity, object: &Object) -> PeerRecord {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let record = PeerRecord {
        handshake: identity.handshake_id(),
        addresses: vec![listener.local_addr().unwrap().to_string()],
        issued: UnixMillis(1),
    };
    let (identity, object) = (identity.clone(), object.clone());
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(lie(offence, stream, identity.clone(), object.clone()));
        }
    });
    record
}

async fn lie(offence: Offence, mut stream: TcpStream, identity: Identity, object: Object) {
    let proved = handshake(&mut stream, &identity, Side::Acceptor).await;
    if proved.is_err() {
        return;
    }
    while let Ok(Frame::Message(message)) = read_frame(&mut stream, MESSAGE_BYTES_MAX).await {
        let said = match message {
            Message::Have { request, .. } => {
                let held = Message::Held {
                    request,
                    shards: Bitmap::full(shard_count(&object)).as_bytes().to_vec(),
                    chooser: Chooser::Asker,
                };
                write_message(&mut stream, &held).await
            }
            Message::Want { request, shard, .. } if offence == Offence::Corrupt => {
                let range = shard_range(&object, shard).unwrap();
                let bytes = Bytes::from(vec![7; (range.end - range.start) as usize]);
                write_shard(&mut stream, request, shard, bytes).await
            }
            _ => Ok(()),
        };
        if said.is_err() {
            return;
        }
    }
}

/// What came of a broadcast.
struct Broadcast {
    seconds: f64,
    learner_sent: u64,
    peers: Vec<(Option<Offence>, Peer)>,
}

/// One broadcast; every honest peer has the right bytes at its end.
async fn broadcast(
    (object, bytes): &(Object, Bytes),
    trouble: Trouble,
    rate: Option<NonZeroU64>,
) -> Broadcast {
    let learner = Peer::start(Sharing::FirstCopies, rate).await;
    learner.swarm.offer(object, bytes.clone()).await.unwrap();
    let mut peers = Vec::new();
    let mut records = vec![(learner.id(), learner.swarm.peer_record())];
    for number in 0..PEERS {
        let peer = Peer::start(Sharing::OnDemand, rate).await;
        let offence = OFFENCES.get(number).copied();
        let offence = offence.filter(|_| trouble == Trouble::Offenders);
        let record = match offence {
            None | Some(Offence::Vanish) => peer.swarm.peer_record(),
            Some(lies) => offend(lies, &peer.identity, object).await,
        };
        records.push((peer.id(), record));
        peers.push((offence, peer));
    }
    let begun = Instant::now();
    let (mut honest, mut others) = (JoinSet::new(), JoinSet::new());
    for (offence, peer) in &peers {
        for (id, record) in records.iter().filter(|(id, _)| *id != peer.id()) {
            peer.swarm.add_peer(*id, record.clone());
        }
        let size = object.bytes;
        let (swarm, object, bytes) = (peer.swarm.clone(), object.clone(), bytes.clone());
        let fetching = async move { assert_eq!(swarm.fetch(&object).await.unwrap(), bytes) };
        match offence {
            None => honest.spawn(fetching),
            Some(Offence::Vanish) => {
                let vanishing = vanish(peer.swarm.clone(), size, peer.shutdown.clone());
                others.spawn(async {
                    tokio::select! {
                        () = fetching => {}
                        () = vanishing => {}
                    }
                })
            }
            Some(_) => others.spawn(fetching),
        };
    }
    let mut learner = Some(learner);
    let mut learner_sent = 0;
    while !honest.is_empty() {
        if let Some(alive) = &learner {
            learner_sent = alive.swarm.metrics().total.bytes_uploaded;
            if trouble == Trouble::LearnerDies && learner_sent >= object.bytes {
                learner = None;
            }
        }
        let waited = tokio::time::timeout(Duration::from_millis(5), honest.join_next()).await;
        if let Ok(Some(done)) = waited {
            done.unwrap();
        }
    }
    Broadcast {
        seconds: begun.elapsed().as_secs_f64(),
        learner_sent,
        peers,
    }
}

/// Ends a peer when it has received a third of the object.
async fn vanish(swarm: Swarm, bytes: u64, shutdown: CancellationToken) {
    while swarm.metrics().total.bytes_downloaded < bytes / 3 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    shutdown.cancel();
}

/// The size of an object of 64 shards.
const OBJECT_BYTES: usize = 4 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn honest_peers_get_the_right_bytes_among_offenders_and_ban_the_one_that_serves_wrong_bytes()
{
    let object = object(OBJECT_BYTES);
    let ended = broadcast(&object, Trouble::Offenders, NonZeroU64::new(8 << 20)).await;
    let corrupt = ended
        .peers
        .iter()
        .find(|(offence, _)| *offence == Some(Offence::Corrupt));
    let corrupt = corrupt.unwrap().1.identity.handshake_id();
    let mut bans = 0;
    for (_, peer) in ended.peers.iter().filter(|(offence, _)| offence.is_none()) {
        for (banned, ban) in peer.swarm.metrics().bans {
            assert_eq!(banned, corrupt, "an honest peer was banned: {ban}");
            assert!(ban.to_string().starts_with("served a bad shard"), "{ban}");
            bans += 1;
        }
    }
    assert!(bans > 0, "no peer banned the corrupt one");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_swarm_finishes_without_its_learner_once_that_has_sent_everything() {
    let object = object(OBJECT_BYTES);
    let ended = broadcast(&object, Trouble::LearnerDies, NonZeroU64::new(8 << 20)).await;
    let times = ended.learner_sent as f64 / object.0.bytes as f64;
    assert!(
        (1.0..=1.1).contains(&times),
        "it had sent {times:.2} times the object"
    );
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement: two minutes, on a machine that does nothing else"]
async fn trouble_costs_little_time() {
    let object = object(4 * OBJECT_BYTES);
    let mut seconds = [const { Vec::new() }; 3];
    for _ in 0..3 {
        for (trouble, seconds) in [Trouble::None, Trouble::Offenders, Trouble::LearnerDies]
            .into_iter()
            .zip(&mut seconds)
        {
            let ended = broadcast(&object, trouble, NonZeroU64::new(2 << 20)).await;
            seconds.push(ended.seconds);
        }
    }
    let [undisturbed, offenders, orphans] = seconds.map(|mut seconds: Vec<f64>| {
        seconds.sort_by(f64::total_cmp);
        seconds[seconds.len() / 2]
    });
    println!(
        "undisturbed {undisturbed:.2} s; three of ten offend {:.2} of it; the learner dies {:.2} of it",
        offenders / undisturbed,
        orphans / undisturbed
    );
    for seconds in [offenders, orphans] {
        assert!(
            seconds <= TIMES_MAX * undisturbed,
            "{:.2} times",
            seconds / undisturbed
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_cap_holds_for_all_connections_together() {
    let (object, bytes) = object(OBJECT_BYTES);
    let rate = 4 << 20;
    let seeder = Peer::start(Sharing::OnDemand, NonZeroU64::new(rate)).await;
    seeder.swarm.offer(&object, bytes).await.unwrap();
    let mut fetches = JoinSet::new();
    let begun = Instant::now();
    let mut peers = Vec::new();
    for _ in 0..3 {
        let peer = Peer::start(Sharing::OnDemand, None).await;
        peer.swarm.add_peer(seeder.id(), seeder.swarm.peer_record());
        let (swarm, object) = (peer.swarm.clone(), object.clone());
        fetches.spawn(async move { swarm.fetch(&object).await.map(drop) });
        peers.push(peer);
    }
    while let Some(done) = fetches.join_next().await {
        done.unwrap().unwrap();
    }
    let reached = 3.0 * object.bytes as f64 / begun.elapsed().as_secs_f64() / rate as f64;
    println!("{:.1} % of the cap", 100.0 * reached);
    assert!(reached <= 1.05, "{reached:.3} of the cap");
}
