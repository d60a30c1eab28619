//! Swarms in one process, over loopback sockets.

mod gone;
mod liar;

use std::time::{Duration, Instant};

use muster_protocol::clock::SystemClock;
use muster_protocol::id::{ContentHash, PolicyVersion, StateRoot, UnixMillis};
use muster_protocol::message::version::Content;
use tokio::io::AsyncWriteExt;

use self::liar::Lie;
use super::*;
use crate::store::object::describe_object;
use crate::transport::connection::{ConnectionError, Side, handshake, read_frame, write_message};
use crate::transport::wire::{Frame, MESSAGE_BYTES_MAX, Message, RequestId};

/// A peer and its identity.
struct Peer {
    swarm: Swarm,
    identity: Identity,
    shutdown: CancellationToken,
}

impl Peer {
    async fn start(config: SwarmConfig) -> Self {
        let (identity, shutdown) = (Identity::generate(), CancellationToken::new());
        let clock = Arc::new(SystemClock);
        let tracker = TaskTracker::new();
        let swarm = Swarm::start(config, identity.clone(), clock, &tracker, shutdown.clone());
        Self {
            swarm: swarm.await.unwrap(),
            identity,
            shutdown,
        }
    }

    async fn worker() -> Self {
        Self::start(SwarmConfig::default()).await
    }

    async fn learner() -> Self {
        Self::start(SwarmConfig {
            sharing: Sharing::FirstCopies,
            ..SwarmConfig::default()
        })
        .await
    }

    fn knows(&self, others: &[&Peer]) {
        for other in others {
            self.swarm
                .add_peer(other.identity.peer_id(), other.swarm.peer_record());
        }
    }

    fn uploaded(&self, object: &Object) -> u64 {
        self.swarm
            .metrics()
            .objects
            .get(&object.id())
            .map_or(0, |traffic| traffic.bytes_uploaded)
    }

    /// Waits until it has counted so many bytes: what was received is counted by the sender a moment later.
    async fn has_uploaded(&self, object: &Object, bytes: u64) {
        wait_until(|| self.uploaded(object) >= bytes).await;
        assert_eq!(self.uploaded(object), bytes);
    }
}

async fn wait_until(is_so: impl Fn() -> bool) {
    let waiting = async {
        while !is_so() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), waiting)
        .await
        .unwrap();
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

fn anchor(length: usize) -> (Object, Bytes) {
    let mut bytes = vec![0; length];
    blake3::Hasher::new()
        .update(&length.to_le_bytes())
        .finalize_xof()
        .fill(&mut bytes);
    let content = Content::Anchor {
        root: StateRoot([1; 32]),
    };
    (
        describe_object(content, PolicyVersion(1), &bytes).unwrap(),
        bytes.into(),
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_learner_feeds_a_swarm_with_about_one_copy() {
    let (object, bytes) = anchor(1_240_000);
    let learner = Peer::learner().await;
    learner.swarm.offer(&object, bytes.clone()).await.unwrap();
    let others = [
        Peer::worker().await,
        Peer::worker().await,
        Peer::worker().await,
    ];
    for peer in &others {
        peer.knows(&[&learner, &others[0], &others[1], &others[2]]);
    }
    let [a, b, c] = &others;
    let (a, b, c) = tokio::join!(
        a.swarm.fetch(&object),
        b.swarm.fetch(&object),
        c.swarm.fetch(&object)
    );
    for fetched in [a, b, c] {
        assert_eq!(fetched.unwrap(), bytes);
    }
    let uploaded = learner.uploaded(&object) as f64 / object.bytes as f64;
    assert!(
        (1.0..1.5).contains(&uploaded),
        "the learner uploaded {uploaded:.3} of the object"
    );
    let from_peers: u64 = others
        .iter()
        .map(|peer| peer.swarm.metrics().total.bytes_downloaded)
        .sum();
    assert_eq!(from_peers, 3 * object.bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_swarm_finishes_though_every_other_peer_is_dead() {
    let (object, bytes) = anchor(300_000);
    let learner = Peer::learner().await;
    learner.swarm.offer(&object, bytes.clone()).await.unwrap();
    let others = [
        Peer::worker().await,
        Peer::worker().await,
        Peer::worker().await,
    ];
    let dead = liar::start(Lie::Silence, &object).await;
    for peer in &others {
        peer.knows(&[&learner]);
        peer.swarm.add_peer(dead.0, dead.1.clone());
    }
    let [a, b, c] = &others;
    let (a, b, c) = tokio::join!(
        a.swarm.fetch(&object),
        b.swarm.fetch(&object),
        c.swarm.fetch(&object)
    );
    for fetched in [a, b, c] {
        assert_eq!(fetched.unwrap(), bytes);
    }
    assert!(learner.swarm.metrics().busy_replies > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_serves_a_corrupt_shard_is_banned_and_the_fetch_finishes() {
    let (object, bytes) = anchor(400_000);
    let (honest, worker) = (Peer::worker().await, Peer::worker().await);
    let liar = liar::start(Lie::CorruptShards, &object).await;
    worker.swarm.add_peer(liar.0, liar.1.clone());
    let fetching = tokio::spawn({
        let (swarm, object) = (worker.swarm.clone(), object.clone());
        async move { swarm.fetch(&object).await }
    });
    // The liar is alone at first, so that it is certainly asked; an honest peer joins late.
    while worker.swarm.metrics().bans.is_empty() {
        tokio::task::yield_now().await;
    }
    honest.swarm.offer(&object, bytes.clone()).await.unwrap();
    worker.knows(&[&honest]);
    assert_eq!(fetching.await.unwrap().unwrap(), bytes);
    let bans = worker.swarm.metrics().bans;
    assert_eq!(bans.len(), 1);
    assert!(bans[&liar.1.handshake].to_string().contains("bad shard"));
}

#[tokio::test(flavor = "multi_thread")]
async fn peers_that_are_silent_or_only_promise_or_send_noise_do_not_stop_a_fetch() {
    let (object, bytes) = anchor(400_000);
    let (honest, worker) = (Peer::worker().await, Peer::worker().await);
    honest.swarm.offer(&object, bytes.clone()).await.unwrap();
    for lie in [Lie::Silence, Lie::Promises, Lie::HugeFrame, Lie::Noise] {
        let (peer, record) = liar::start(lie, &object).await;
        worker.swarm.add_peer(peer, record);
    }
    worker.knows(&[&honest]);
    let begun = Instant::now();
    assert_eq!(worker.swarm.fetch(&object).await.unwrap(), bytes);
    assert!(
        begun.elapsed() < Duration::from_secs(8),
        "took {:?}",
        begun.elapsed()
    );
    assert!(worker.swarm.metrics().bans.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_where_somebody_else_answers_is_of_no_use() {
    let (object, bytes) = anchor(50_000);
    let (impostor, worker) = (Peer::worker().await, Peer::start(impatient()).await);
    impostor.swarm.offer(&object, bytes).await.unwrap();
    let mut record = impostor.swarm.peer_record();
    record.handshake = Identity::generate().handshake_id();
    worker.swarm.add_peer(impostor.identity.peer_id(), record);
    let error = worker.swarm.fetch(&object).await.unwrap_err();
    let FetchError::Stalled {
        held: 0,
        peers: 1,
        last,
        ..
    } = &error
    else {
        panic!("{error}")
    };
    assert!(last.contains("where"), "{last}");
    assert_eq!(impostor.uploaded(&object), 0);
}

fn impatient() -> SwarmConfig {
    SwarmConfig {
        stall_ms: NonZeroU64::new(400).unwrap(),
        ..SwarmConfig::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fetch_from_nobody_fails_with_what_to_do_and_keeps_what_it_has() {
    let (object, bytes) = anchor(200_000);
    let (honest, worker) = (Peer::worker().await, Peer::start(impatient()).await);
    let error = worker.swarm.fetch(&object).await.unwrap_err();
    assert!(error.to_string().contains("no peer is known"), "{error}");
    honest.swarm.offer(&object, bytes.clone()).await.unwrap();
    worker.knows(&[&honest]);
    assert_eq!(worker.swarm.fetch(&object).await.unwrap(), bytes);
    assert_eq!(worker.swarm.held(&object.id()), Some(bytes));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_serves_what_it_has_while_it_fetches_the_rest() {
    let (object, bytes) = anchor(200_000);
    let slow = SwarmConfig {
        upload_bytes_per_second: NonZeroU64::new(200_000),
        ..SwarmConfig::default()
    };
    let (seeder, first, second) = (
        Peer::start(slow).await,
        Peer::worker().await,
        Peer::worker().await,
    );
    seeder.swarm.offer(&object, bytes.clone()).await.unwrap();
    first.knows(&[&seeder]);
    // The second peer knows only the first, which has nothing but what it is fetching.
    second.knows(&[&first]);
    let (one, two) = tokio::join!(first.swarm.fetch(&object), second.swarm.fetch(&object));
    assert_eq!((one.unwrap(), two.unwrap()), (bytes.clone(), bytes));
    assert_eq!(seeder.swarm.metrics().peers.len(), 1);
    first.has_uploaded(&object, object.bytes).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_cap_holds_over_all_connections() {
    let (object, bytes) = anchor(300_000);
    let rate = 600_000;
    let capped = SwarmConfig {
        upload_bytes_per_second: NonZeroU64::new(rate),
        ..SwarmConfig::default()
    };
    let (seeder, a, b) = (
        Peer::start(capped).await,
        Peer::worker().await,
        Peer::worker().await,
    );
    seeder.swarm.offer(&object, bytes).await.unwrap();
    a.knows(&[&seeder]);
    b.knows(&[&seeder]);
    let begun = Instant::now();
    let (one, two) = tokio::join!(a.swarm.fetch(&object), b.swarm.fetch(&object));
    assert_eq!(one.unwrap(), two.unwrap());
    let seconds = begun.elapsed().as_secs_f64();
    let uploaded = seeder.uploaded(&object) as f64;
    assert!(uploaded >= 500_000.0);
    assert!(
        uploaded <= rate as f64 * (seconds + 0.06),
        "{uploaded} bytes in {seconds:.2} s"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fetch_goes_on_from_the_shards_on_disk() {
    let (object, bytes) = anchor(200_000);
    let folder = tempfile::tempdir().unwrap();
    let store = StoreConfig {
        directory: Some(folder.path().to_owned()),
        ..StoreConfig::default()
    };
    let config = SwarmConfig {
        store,
        ..SwarmConfig::default()
    };
    let seeder = Peer::worker().await;
    seeder.swarm.offer(&object, bytes.clone()).await.unwrap();
    {
        let worker = Peer::start(config.clone()).await;
        worker.knows(&[&seeder]);
        worker.swarm.fetch(&object).await.unwrap();
    }
    let lost = folder.path().join(object.id().to_string()).join("3");
    std::fs::remove_file(lost).unwrap();
    seeder.has_uploaded(&object, object.bytes).await;
    let worker = Peer::start(config).await;
    worker.knows(&[&seeder]);
    assert_eq!(worker.swarm.fetch(&object).await.unwrap(), bytes);
    seeder
        .has_uploaded(&object, object.bytes + u64::from(object.shard_bytes))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_fetches_of_one_object_share_the_work() {
    let (object, bytes) = anchor(500_000);
    let (seeder, worker) = (Peer::worker().await, Peer::worker().await);
    seeder.swarm.offer(&object, bytes.clone()).await.unwrap();
    worker.knows(&[&seeder]);
    let (one, two) = tokio::join!(worker.swarm.fetch(&object), worker.swarm.fetch(&object));
    assert_eq!((one.unwrap(), two.unwrap()), (bytes.clone(), bytes));
    seeder.has_uploaded(&object, object.bytes).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_not_what_its_description_promises_is_refused() {
    let bytes = Bytes::from_static(b"{}");
    let content = Content::File {
        hash: ContentHash::of(b"something else"),
    };
    let object = describe_object(content, PolicyVersion(1), &bytes).unwrap();
    let (seeder, worker) = (Peer::worker().await, Peer::worker().await);
    seeder.swarm.offer(&object, bytes).await.unwrap();
    worker.knows(&[&seeder]);
    let error = worker.swarm.fetch(&object).await.unwrap_err();
    assert!(matches!(error, FetchError::WrongContent { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_over_the_limit_are_told_why() {
    let one = NonZeroU32::MIN;
    let server = Peer::start(SwarmConfig {
        connections_max: one,
        ..SwarmConfig::default()
    })
    .await;
    let expected = server.identity.handshake_id();
    let dial = || async {
        let mut stream = tokio::net::TcpStream::connect(server.swarm.local_address())
            .await
            .unwrap();
        let side = Side::Dialler { expected };
        let proved = handshake(&mut stream, &Identity::generate(), side).await;
        (stream, proved)
    };
    let (_open, first) = dial().await;
    first.unwrap();
    let (_, second) = dial().await;
    // The reason is lost when the system resets the connection for the greeting that was not read.
    let refused = matches!(
        second,
        Err(ConnectionError::Refused(_) | ConnectionError::Io(_))
    );
    assert!(refused, "{second:?}");
    assert_eq!(server.swarm.metrics().connections_refused, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_for_what_is_not_there_and_garbage_do_no_harm() {
    let (object, bytes) = anchor(50_000);
    let server = Peer::worker().await;
    server.swarm.offer(&object, bytes).await.unwrap();
    let connect = || async {
        let mut stream = tokio::net::TcpStream::connect(server.swarm.local_address())
            .await
            .unwrap();
        let side = Side::Dialler {
            expected: server.identity.handshake_id(),
        };
        handshake(&mut stream, &Identity::generate(), side)
            .await
            .unwrap();
        stream
    };
    let mut stream = connect().await;
    let request = RequestId(5);
    for message in [
        Message::Want {
            request,
            object: object.id(),
            shard: u32::MAX,
        },
        Message::Want {
            request,
            object: ObjectId([0; 32]),
            shard: 0,
        },
        Message::Have {
            request,
            object: ObjectId([0; 32]),
        },
    ] {
        write_message(&mut stream, &message).await.unwrap();
        let answer = read_frame(&mut stream, MESSAGE_BYTES_MAX).await.unwrap();
        assert_eq!(answer, Frame::Message(Message::Missing { request }));
    }
    // Each of these ends its connection, and only its own.
    let wrong_bitmap = Message::WantAny {
        request,
        object: object.id(),
        except: vec![0; 99],
    };
    write_message(&mut stream, &wrong_bitmap).await.unwrap();
    assert!(read_frame(&mut stream, MESSAGE_BYTES_MAX).await.is_err());
    for garbage in [&[0xff; 64][..], &[4, 0, 0, 0, 9, 9, 9, 9], &[0, 0, 0, 0]] {
        let mut stream = connect().await;
        stream.write_all(garbage).await.unwrap();
        assert!(read_frame(&mut stream, MESSAGE_BYTES_MAX).await.is_err());
    }
    wait_until(|| server.swarm.metrics().connections_refused == 4).await;
    let have = Message::Have {
        request,
        object: object.id(),
    };
    let mut stream = connect().await;
    write_message(&mut stream, &have).await.unwrap();
    let answer = read_frame(&mut stream, MESSAGE_BYTES_MAX).await.unwrap();
    assert!(matches!(answer, Frame::Message(Message::Held { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_that_is_taken_is_named() {
    let taken = Peer::worker().await;
    let config = SwarmConfig {
        listen: taken.swarm.local_address(),
        ..SwarmConfig::default()
    };
    let (clock, tracker) = (Arc::new(SystemClock), TaskTracker::new());
    let shutdown = CancellationToken::new();
    let started = Swarm::start(config, Identity::generate(), clock, &tracker, shutdown).await;
    let error = started.unwrap_err().to_string();
    assert!(
        error.contains(&taken.swarm.local_address().to_string()),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_ends_a_fetch_and_the_server() {
    let (object, _) = anchor(50_000);
    let (clock, tracker) = (Arc::new(SystemClock), TaskTracker::new());
    let shutdown = CancellationToken::new();
    let config = SwarmConfig::default();
    let swarm = Swarm::start(
        config,
        Identity::generate(),
        clock,
        &tracker,
        shutdown.clone(),
    );
    let swarm = swarm.await.unwrap();
    let fetching = tokio::spawn({
        let swarm = swarm.clone();
        async move { swarm.fetch(&object).await }
    });
    tokio::task::yield_now().await;
    shutdown.cancel();
    assert!(matches!(fetching.await.unwrap(), Err(FetchError::Stopped)));
    tracker.close();
    tracker.wait().await;
}

#[test]
fn a_newer_record_replaces_an_older_one_and_the_book_is_bounded() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let peer = Peer::worker().await;
        let record = |issued, port| PeerRecord {
            handshake: PeerId([9; 32]),
            addresses: vec![format!("127.0.0.1:{port}")],
            issued: UnixMillis(issued),
        };
        let known = |id: PeerId| peer.swarm.node.address_book.borrow().get(&id).cloned();
        peer.swarm.add_peer(PeerId([1; 32]), record(5, 1));
        peer.swarm.add_peer(PeerId([1; 32]), record(4, 2));
        assert_eq!(known(PeerId([1; 32])), Some(record(5, 1)));
        peer.swarm.add_peer(PeerId([1; 32]), record(6, 3));
        assert_eq!(known(PeerId([1; 32])), Some(record(6, 3)));
        for number in 0..2 * PEERS_MAX {
            peer.swarm
                .add_peer(PeerId([number as u8; 32]), record(100 + number as u64, 4));
        }
        assert_eq!(peer.swarm.node.address_book.borrow().len(), PEERS_MAX);
    });
}
