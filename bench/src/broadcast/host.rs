//! One host of a broadcast: the swarm as it is shipped, with an object to offer or to fetch. Told over standard input when
//! to begin and, by its end, when to stop; says on standard output when it is ready, when it is done, and what it counted.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use clap::{Args, ValueEnum};
use muster_broadcaster::store::object::describe_object;
use muster_broadcaster::swarm::uploads::Sharing;
use muster_broadcaster::transport::nat::{self, NatConfig};
use muster_broadcaster::{Swarm, SwarmConfig};
use muster_protocol::clock::SystemClock;
use muster_protocol::id::{PolicyVersion, StateRoot, UnixMillis};
use muster_protocol::identity::{Identity, MachineSeed};
use muster_protocol::message::peer::PeerRecord;
use muster_protocol::message::version::{Content, Object};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use muster_monitor::machine::peak_memory;
use muster_monitor::output::say;

/// The file that tells every host about the race.
pub(super) const PLAN_FILE: &str = "plan.json";
/// The object's bytes, for whoever does not make them itself.
pub(super) const OBJECT_FILE: &str = "object.bin";
/// Where every swarm listens.
const PORT: u16 = 7_000;

/// What `bench broadcast-host` takes.
#[derive(Debug, Args)]
pub(crate) struct HostArgs {
    /// Which host this is; 0 has the object
    #[arg(long)]
    number: usize,
    /// Where the plan is
    #[arg(long, value_name = "DIR")]
    folder: PathBuf,
}

/// What every host knows.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Plan {
    pub(super) addresses: Vec<Ipv4Addr>,
    pub(super) transport: Carrier,
    pub(super) sharing: Sharing,
    pub(super) object: Object,
}

/// What carries shards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(super) enum Carrier {
    /// Connections of the system
    Tcp,
    /// The transport that leads through home routers, here without any between
    Quic,
}

impl Carrier {
    /// Fails when this build does not have it.
    pub(super) fn check(self) -> Result<()> {
        self.address(&identity(0), Ipv4Addr::LOCALHOST).map(drop)
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Quic => "QUIC",
        }
    }

    /// Bytes on the wire for each byte of a shard, in a full frame.
    pub(super) fn headers(self) -> f64 {
        match self {
            Self::Tcp => 1514.0 / 1448.0,
            // The largest datagram that is tried for is of 1452 bytes, 33 of them QUIC's own.
            Self::Quic => 1494.0 / 1419.0,
        }
    }

    /// What the record of a host says: one way only, so that no other is taken.
    fn address(self, identity: &Identity, host: Ipv4Addr) -> Result<String> {
        match self {
            Self::Tcp => Ok(format!("{host}:{PORT}")),
            Self::Quic => Ok(nat::address(identity, SocketAddr::from((host, PORT)))?),
        }
    }
}

/// What a host says when it has everything.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Done {
    pub(super) seconds: f64,
}

/// What a host counted from its start to its end.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Counted {
    pub(super) sent_bytes: u64,
    pub(super) twice_bytes: u64,
    pub(super) cpu_seconds: f64,
    pub(super) memory_peak_bytes: u64,
}

/// Describes `bytes` as the object of a race.
pub(super) fn describe(bytes: &[u8]) -> Result<Object> {
    let root = StateRoot([7; 32]);
    Ok(describe_object(
        Content::Anchor { root },
        PolicyVersion(1),
        bytes,
    )?)
}

/// Plays one host.
pub(crate) async fn run(args: HostArgs) -> Result<()> {
    let plan: Plan = serde_json::from_slice(&std::fs::read(args.folder.join(PLAN_FILE))?)?;
    ensure!(
        args.number < plan.addresses.len(),
        "host {} is not in the plan",
        args.number
    );
    let (tracker, shutdown) = (TaskTracker::new(), CancellationToken::new());
    let listen = SocketAddr::from((plan.addresses[args.number], PORT));
    let quic = || NatConfig {
        listen: Some(listen),
        ..NatConfig::default()
    };
    let config = SwarmConfig {
        listen,
        nat: (plan.transport == Carrier::Quic).then(quic),
        sharing: if args.number == 0 {
            plan.sharing
        } else {
            Sharing::OnDemand
        },
        ..SwarmConfig::default()
    };
    let clock = Arc::new(SystemClock);
    let identity = identity(args.number);
    let swarm = Swarm::start(config, identity, clock, &tracker, shutdown.clone()).await?;
    if args.number == 0 {
        let bytes = Bytes::from(std::fs::read(args.folder.join(OBJECT_FILE))?);
        swarm.offer(&plan.object, bytes).await?;
    }
    for (number, address) in plan.addresses.iter().enumerate() {
        let identity = self::identity(number);
        let record = PeerRecord {
            handshake: identity.handshake_id(),
            addresses: vec![plan.transport.address(&identity, *address)?],
            issued: UnixMillis(1),
        };
        swarm.add_peer(identity.peer_id(), record);
    }
    say("ready")?;
    told().await?;
    let begun = Instant::now();
    if args.number > 0 {
        swarm.fetch(&plan.object).await?;
    }
    let seconds = begun.elapsed().as_secs_f64();
    say(&serde_json::to_string(&Done { seconds })?)?;
    // Serves on until everybody is done.
    while told().await? {}
    let total = swarm.metrics().total;
    let counted = Counted {
        sent_bytes: total.bytes_uploaded,
        twice_bytes: total.bytes_duplicate,
        cpu_seconds: cpu_seconds()?,
        memory_peak_bytes: peak_memory().context("no VmHWM in /proc/self/status")?,
    };
    say(&serde_json::to_string(&counted)?)?;
    shutdown.cancel();
    tracker.close();
    tracker.wait().await;
    Ok(())
}

/// Waits for a line on standard input; false at its end.
async fn told() -> Result<bool> {
    let read = || std::io::stdin().read_line(&mut String::new());
    Ok(tokio::task::spawn_blocking(read).await?? > 0)
}

fn identity(number: usize) -> Identity {
    let mut seed = [0; 32];
    seed[..8].copy_from_slice(&(number as u64 + 1).to_le_bytes());
    Identity::from_seed(&MachineSeed::from_bytes(seed))
}

/// Seconds of processor time of this process. A thread that ends while it is looked at counts as none.
fn cpu_seconds() -> Result<f64> {
    let threads = std::fs::read_dir("/proc/self/task")?;
    let nanoseconds: f64 = threads
        .filter_map(|thread| thread_nanoseconds(&thread.ok()?.path()))
        .sum();
    Ok(nanoseconds / 1e9)
}

fn thread_nanoseconds(task: &Path) -> Option<f64> {
    let line = std::fs::read_to_string(task.join("schedstat")).ok()?;
    line.split(' ').next()?.parse().ok()
}
