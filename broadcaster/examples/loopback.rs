//! How fast objects travel over loopback, beside a plain copy of the same bytes through a socket in the same run, and how
//! much a learner uploads to a small swarm.
//!
//! `cargo run --release -p muster-broadcaster --example loopback -- [MEBIBYTES] [WORKERS]`
#![allow(clippy::print_stdout, reason = "an example's results go to stdout")]

use std::error::Error;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use muster_broadcaster::store::object::describe_object;
use muster_broadcaster::swarm::uploads::Sharing;
use muster_broadcaster::{Swarm, SwarmConfig};
use muster_protocol::clock::SystemClock;
use muster_protocol::id::{PeerId, PolicyVersion, StateRoot};
use muster_protocol::identity::Identity;
use muster_protocol::message::version::{Content, Object};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

const ROUNDS: usize = 5;

#[tokio::main]
async fn main() -> Outcome<()> {
    let mut arguments = std::env::args()
        .skip(1)
        .map(|argument| argument.parse::<usize>());
    let mebibytes = arguments.next().transpose()?.unwrap_or(256);
    let workers = arguments.next().transpose()?.unwrap_or(3);
    let (object, bytes) = anchor(mebibytes << 20)?;
    println!(
        "{mebibytes} MiB in {} shards of {} bytes",
        object.shards.len(),
        object.shard_bytes
    );
    for round in 0..ROUNDS {
        let plain = plain_copy(bytes.clone()).await?;
        let (fetched, _) = swarm(&object, &bytes, 1, Sharing::OnDemand).await?;
        let (spread, uploaded) = swarm(&object, &bytes, workers, Sharing::FirstCopies).await?;
        let rate = |seconds: f64| bytes.len() as f64 / 1e9 / seconds;
        println!(
            "round {round}: plain copy {:.2} GB/s, one fetch {:.2} GB/s, {workers} workers from a learner {:.2} GB/s each, \
             learner uploaded {uploaded:.3} of the object in {spread:.3} s",
            rate(plain),
            rate(fetched),
            rate(spread),
        );
    }
    Ok(())
}

fn anchor(length: usize) -> Outcome<(Object, Bytes)> {
    let mut bytes = vec![0; length];
    for (block, number) in bytes.chunks_mut(32).zip(0u64..) {
        block.copy_from_slice(&blake3::hash(&number.to_le_bytes()).as_bytes()[..block.len()]);
    }
    let content = Content::Anchor {
        root: StateRoot([1; 32]),
    };
    Ok((
        describe_object(content, PolicyVersion(1), &bytes)?,
        bytes.into(),
    ))
}

/// Seconds to copy the bytes through a socket into memory: no hash, no protocol.
async fn plain_copy(bytes: Bytes) -> Outcome<f64> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let mut received = Vec::with_capacity(bytes.len());
    let begun = Instant::now();
    let sender = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await?;
        stream.write_all(&bytes).await?;
        stream.shutdown().await
    });
    tokio::io::copy(&mut TcpStream::connect(address).await?, &mut received).await?;
    sender.await??;
    Ok(begun.elapsed().as_secs_f64())
}

/// Seconds until every worker has the object, and how much of it the first peer uploaded.
async fn swarm(
    object: &Object,
    bytes: &Bytes,
    workers: usize,
    sharing: Sharing,
) -> Outcome<(f64, f64)> {
    let (tracker, shutdown) = (TaskTracker::new(), CancellationToken::new());
    let start = async |sharing| -> Outcome<(PeerId, Swarm)> {
        let identity = Identity::generate();
        let config = SwarmConfig {
            sharing,
            ..SwarmConfig::default()
        };
        let (peer, clock) = (identity.peer_id(), Arc::new(SystemClock));
        let swarm = Swarm::start(config, identity, clock, &tracker, shutdown.clone()).await?;
        Ok((peer, swarm))
    };
    let mut peers = vec![start(sharing).await?];
    peers[0].1.offer(object, bytes.clone()).await?;
    for _ in 0..workers {
        peers.push(start(Sharing::OnDemand).await?);
    }
    let begun = Instant::now();
    let mut fetches = JoinSet::new();
    for (_, worker) in &peers[1..] {
        peers
            .iter()
            .for_each(|(peer, swarm)| worker.add_peer(*peer, swarm.peer_record()));
        let (worker, object) = (worker.clone(), object.clone());
        fetches.spawn(async move { worker.fetch(&object).await });
    }
    while let Some(fetched) = fetches.join_next().await {
        assert_eq!(fetched??.len(), bytes.len(), "fetched something else");
    }
    let seconds = begun.elapsed().as_secs_f64();
    let uploaded = peers[0].1.metrics().total.bytes_uploaded as f64 / bytes.len() as f64;
    shutdown.cancel();
    tracker.close();
    tracker.wait().await;
    Ok((seconds, uploaded))
}
