//! A peer that is killed again and again while it fetches: a process of its own with its shards on a disk, a seeder here, a
//! real connection between them. What it had verified stays; what it fetches again is what was on its way.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use muster_broadcaster::store::object::describe_object;
use muster_broadcaster::store::{Store, StoreConfig};
use muster_broadcaster::{Swarm, SwarmConfig};
use muster_protocol::clock::SystemClock;
use muster_protocol::id::{PolicyVersion, StateRoot, UnixMillis};
use muster_protocol::identity::{Identity, MachineSeed};
use muster_protocol::message::peer::PeerRecord;
use muster_protocol::message::version::{Content, Object};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStdout, Command};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

const KILLS: usize = 100;
/// 128 shards of 64 KiB.
const BYTES: usize = 8 << 20;
/// What the seeder uploads per second: the whole object takes as long as some thirty lives of a peer.
const RATE: NonZeroU64 = NonZeroU64::new(8 << 20).unwrap();
/// Longest life of a peer after it has begun to fetch.
const LIFE_MS: u64 = 80;
/// Shards that a peer may have to fetch again for each time that it is killed.
const AGAIN: u64 = 2;

/// Where the peer's process finds its folder, and the seeder's address.
const FOLDER: &str = "MUSTER_TEST_FOLDER";
const SEEDER: &str = "MUSTER_TEST_SEEDER";

fn identity(number: u8) -> Identity {
    Identity::from_seed(&MachineSeed::from_bytes([number; 32]))
}

fn object() -> (Object, Bytes) {
    let mut bytes = vec![0; BYTES];
    ChaCha8Rng::seed_from_u64(1).fill(&mut bytes[..]);
    let root = StateRoot([1; 32]);
    let object = describe_object(Content::Anchor { root }, PolicyVersion(1), &bytes);
    (object.unwrap(), bytes.into())
}

async fn swarm(number: u8, config: SwarmConfig) -> Swarm {
    let (tracker, shutdown) = (TaskTracker::new(), CancellationToken::new());
    let clock = Arc::new(SystemClock);
    let swarm = Swarm::start(config, identity(number), clock, &tracker, shutdown);
    swarm.await.unwrap()
}

fn on_disk(folder: &Path) -> StoreConfig {
    StoreConfig {
        directory: Some(folder.to_owned()),
        ..StoreConfig::default()
    }
}

/// The peer: started by the test below in a process of its own.
#[tokio::test]
#[ignore = "not a test: the process that is killed"]
async fn a_peer_that_fetches() {
    let folder = PathBuf::from(std::env::var(FOLDER).unwrap());
    let seeder = PeerRecord {
        handshake: identity(1).handshake_id(),
        addresses: vec![std::env::var(SEEDER).unwrap()],
        issued: UnixMillis(1),
    };
    let config = SwarmConfig {
        store: on_disk(&folder),
        ..SwarmConfig::default()
    };
    let swarm = swarm(2, config).await;
    swarm.add_peer(identity(1).peer_id(), seeder);
    println!("\nbegun");
    let (object, bytes) = object();
    assert_eq!(swarm.fetch(&object).await.unwrap(), bytes);
    println!("\ndone");
}

/// The peer's process.
struct Peer {
    process: Child,
    lines: tokio::io::Lines<BufReader<ChildStdout>>,
}

impl Peer {
    async fn start(folder: &Path, seeder: SocketAddr) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["a_peer_that_fetches", "--exact", "--ignored", "--nocapture"])
            .env(FOLDER, folder)
            .env(SEEDER, seeder.to_string())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let mut peer = Self { process, lines };
        assert!(peer.says("begun").await);
        peer
    }

    /// Waits for a line; false when the process has ended without it.
    async fn says(&mut self, wanted: &str) -> bool {
        while let Some(line) = self.lines.next_line().await.unwrap() {
            if line == wanted {
                return true;
            }
        }
        false
    }
}

/// Shards on the disk, each of which was verified when the store was opened.
fn held(folder: &Path, object: &Object, bytes: &Bytes) -> u64 {
    let store = Store::open(on_disk(folder)).unwrap();
    let Some(held) = store.held(&object.id()) else {
        return 0;
    };
    let size = object.shard_bytes as usize;
    for shard in held.iter() {
        let range = shard as usize * size..(shard as usize + 1) * size;
        assert_eq!(store.shard(&object.id(), shard).unwrap(), bytes[range]);
    }
    u64::from(held.count())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_killed_a_hundred_times_fetches_only_what_was_on_its_way_again() {
    let (object, bytes) = object();
    let seeder = swarm(
        1,
        SwarmConfig {
            upload_bytes_per_second: Some(RATE),
            ..SwarmConfig::default()
        },
    );
    let seeder = seeder.await;
    seeder.offer(&object, bytes.clone()).await.unwrap();
    let sent = || seeder.metrics().total.bytes_uploaded / u64::from(object.shard_bytes);
    let folder = tempfile::tempdir().unwrap();
    let mut instants = ChaCha8Rng::seed_from_u64(2);
    let (mut before, mut fetches, mut again, mut most) = (0, 0, 0, 0);
    for _ in 0..KILLS {
        let sent_before = sent();
        let mut peer = Peer::start(folder.path(), seeder.local_address()).await;
        let life = Duration::from_millis(instants.random_range(0..LIFE_MS));
        let is_done = tokio::time::timeout(life, peer.says("done")).await == Ok(true);
        peer.process.kill().await.unwrap();
        let after = held(folder.path(), &object, &bytes);
        assert!(
            after >= before,
            "{before} shards were held, {after} are left"
        );
        assert!(!is_done || after == object.shards.len() as u64);
        // What was sent and is not there has to be sent again.
        let lost = (sent() - sent_before).saturating_sub(after - before);
        again += lost;
        most = most.max(lost);
        assert!(lost <= AGAIN, "{lost} shards have to be fetched again");
        before = after;
        if is_done {
            fetches += 1;
            before = 0;
            std::fs::remove_dir_all(folder.path()).unwrap();
        }
    }
    println!("{fetches} whole fetches, {again} shards sent again, at most {most} after a kill");
    let mut peer = Peer::start(folder.path(), seeder.local_address()).await;
    assert!(peer.says("done").await, "it did not come to its end");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shard_that_was_damaged_on_the_disk_is_fetched_again_and_no_other() {
    let (object, bytes) = object();
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(on_disk(folder.path())).unwrap();
    store.offer(&object, bytes.clone()).unwrap();
    drop(store);
    let shard = folder.path().join(object.id().to_string()).join("77");
    let mut damaged = std::fs::read(&shard).unwrap();
    damaged[1_000] ^= 1;
    std::fs::write(&shard, damaged).unwrap();
    let seeder = swarm(1, SwarmConfig::default()).await;
    seeder.offer(&object, bytes).await.unwrap();
    let mut peer = Peer::start(folder.path(), seeder.local_address()).await;
    assert!(peer.says("done").await);
    assert_eq!(
        seeder.metrics().total.bytes_uploaded,
        u64::from(object.shard_bytes)
    );
}
