//! Peers that go while others want something of them, and objects that go while they are fetched.

use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

use super::*;

/// A learner that uploads `rate` bytes per second and keeps the newest version alone.
async fn forgetful(rate: u64) -> Peer {
    Peer::start(SwarmConfig {
        sharing: Sharing::FirstCopies,
        upload_bytes_per_second: NonZeroU64::new(rate),
        store: StoreConfig {
            versions_kept: 1,
            ..StoreConfig::default()
        },
        ..SwarmConfig::default()
    })
    .await
}

fn next_version(length: usize) -> (Object, Bytes) {
    let (mut object, bytes) = anchor(length);
    object.version = PolicyVersion(2);
    (object, bytes)
}

async fn becomes_unreachable_within(swarm: &Swarm, object: &Object, limit: Duration) {
    let waiting = async {
        while !ObjectSource::is_unreachable(swarm, object) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(limit, waiting).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_that_its_only_holder_lets_go_is_forsaken_though_others_have_parts_of_it() {
    let (object, bytes) = anchor(400_000);
    let (learner, a, b) = (
        forgetful(100_000).await,
        Peer::worker().await,
        Peer::worker().await,
    );
    learner.swarm.offer(&object, bytes).await.unwrap();
    a.knows(&[&learner, &b]);
    b.knows(&[&learner, &a]);
    let fetches: Vec<_> = [&a, &b]
        .map(|peer| {
            let (swarm, object) = (peer.swarm.clone(), object.clone());
            tokio::spawn(async move { swarm.fetch(&object).await })
        })
        .into();
    wait_until(|| {
        [&a, &b]
            .iter()
            .all(|peer| peer.swarm.metrics().total.bytes_downloaded > 0)
    })
    .await;
    let (newer, bytes) = next_version(50_000);
    learner.swarm.offer(&newer, bytes.clone()).await.unwrap();
    for peer in [&a, &b] {
        becomes_unreachable_within(&peer.swarm, &object, Duration::from_secs(10)).await;
        assert!(peer.swarm.held(&object.id()).is_none());
        assert_eq!(peer.swarm.fetch(&newer).await.unwrap(), bytes);
    }
    fetches.iter().for_each(|fetching| fetching.abort());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_that_comes_back_is_fetched_to_its_end() {
    let (object, bytes) = anchor(400_000);
    let (first, worker) = (forgetful(100_000).await, Peer::worker().await);
    first.swarm.offer(&object, bytes.clone()).await.unwrap();
    worker.knows(&[&first]);
    let fetching = tokio::spawn({
        let (swarm, object) = (worker.swarm.clone(), object.clone());
        async move { swarm.fetch(&object).await }
    });
    wait_until(|| worker.swarm.metrics().total.bytes_downloaded > 0).await;
    let (newer, newer_bytes) = next_version(50_000);
    first.swarm.offer(&newer, newer_bytes).await.unwrap();
    becomes_unreachable_within(&worker.swarm, &object, Duration::from_secs(10)).await;
    let second = Peer::worker().await;
    second.swarm.offer(&object, bytes.clone()).await.unwrap();
    worker.knows(&[&second]);
    assert_eq!(fetching.await.unwrap().unwrap(), bytes);
    assert!(!ObjectSource::is_unreachable(&worker.swarm, &object));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_on_its_way_to_a_peer_that_died_goes_to_the_next_who_asks() {
    let (object, bytes) = anchor(800_000);
    let (learner, worker) = (forgetful(400_000).await, Peer::worker().await);
    learner.swarm.offer(&object, bytes.clone()).await.unwrap();
    let mut stream = TcpStream::connect(learner.swarm.local_address())
        .await
        .unwrap();
    let side = Side::Dialler {
        expected: learner.identity.handshake_id(),
    };
    handshake(&mut stream, &Identity::generate(), side)
        .await
        .unwrap();
    let nothing = crate::store::bitmap::Bitmap::empty(crate::store::object::shard_count(&object));
    let want = Message::WantAny {
        request: RequestId(1),
        object: object.id(),
        except: nothing.as_bytes().to_vec(),
    };
    write_message(&mut stream, &want).await.unwrap();
    // The rest of the shard is held back by the learner's cap.
    stream.read_exact(&mut [0; 16]).await.unwrap();
    drop(stream);
    worker.knows(&[&learner]);
    assert_eq!(worker.swarm.fetch(&object).await.unwrap(), bytes);
    assert_eq!(
        learner.swarm.metrics().busy_replies,
        0,
        "it was made to wait for the dead"
    );
}
