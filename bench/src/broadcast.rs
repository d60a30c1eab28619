//! `muster-bench broadcast`: measures the time of one object from one host to many over home links, beside the physical bound.
//!
//! Each host is a network namespace with its own link ([`net`]). It runs the shipped swarm ([`host`]) or a rival's script (an
//! HTTP star, libtorrent), over a [`path`] that may be long and lose packets. The bound is the fluid
//! limit of the links, T* = max(S/u_s, S/d_min, N·S/(u_s + Σu)), with S the object's bytes, u_s the seeder's uplink, u and d
//! the peers' up- and downlinks. It counts the object alone: headers of Ethernet, IP and TCP take 1514/1448 of it, those of
//! QUIC a little more.

mod frames;
pub(super) mod host;
mod net;
pub(super) mod path;
mod race;

use std::num::{NonZeroU64, NonZeroUsize};
use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::{Args, ValueEnum};
use muster_broadcaster::swarm::uploads::Sharing;
use serde::Serialize;

use self::host::{Carrier, Plan};
use self::net::{Between, HOSTS_MAX, Link, Net};
use self::path::Path;
use self::race::{Finish, Race};
use crate::spread::Spread;
use muster_monitor::machine::load_average;
use muster_monitor::output::say;

#[derive(Debug, Args)]
pub(super) struct BroadcastArgs {
    /// Number of hosts that fetch the object
    #[arg(long, value_name = "N", default_value = "16")]
    peers: NonZeroUsize,
    /// Uplink of each peer, Mbit/s
    #[arg(long, value_name = "MBIT", default_value = "20")]
    up: NonZeroU64,
    /// Downlink of each peer, Mbit/s
    #[arg(long, value_name = "MBIT", default_value = "20")]
    down: NonZeroU64,
    /// Uplink of the first holder, Mbit/s; that of the peers by default
    #[arg(long, value_name = "MBIT")]
    seeder_up: Option<NonZeroU64>,
    /// Round-trip time between any two hosts, ms, without queues on links
    #[arg(long, value_name = "MS", default_value = "0")]
    round_trip: f64,
    /// Packet loss, percent
    #[arg(long, value_name = "P", default_value = "0")]
    loss: f64,
    /// Size of the object, bytes
    #[arg(long, value_name = "B", default_value = "67108864")]
    bytes: NonZeroU64,
    /// Transport of shards; `quic` needs a build with the feature `nat`
    #[arg(long, value_enum, default_value = "tcp")]
    transport: Carrier,
    /// How the first holder uploads: like a learner, or like any peer
    #[arg(long, value_enum, default_value = "learner")]
    seeder: Seeder,
    /// Rivals to measure on the same links
    #[arg(long, value_name = "RIVAL", value_enum, value_delimiter = ',')]
    against: Vec<Rival>,
    /// A Python program with libtorrent, for `--against libtorrent`
    #[arg(long, value_name = "FILE", default_value = "python3")]
    python: PathBuf,
    /// Runs of each; the median counts
    #[arg(long, value_name = "N", default_value = "1")]
    runs: NonZeroUsize,
    /// Longest time of a run, in seconds
    #[arg(long, value_name = "S", default_value = "600")]
    patience: NonZeroU64,
    /// Print JSON lines
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Seeder {
    /// Each shard once, and again only to peers that no other peer serves
    Learner,
    /// Any shard to any peer
    Peer,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Rival {
    /// All hosts fetch from one HTTP server
    Star,
    /// BitTorrent, tuned for one short broadcast
    Libtorrent,
}

#[derive(Debug, Serialize)]
struct Row {
    what: &'static str,
    /// Transport of the swarm's shards; rivals choose their own.
    transport: Option<Carrier>,
    peers: usize,
    bytes: u64,
    bound_seconds: f64,
    /// Bound over time, from 0 to 1.
    last: f64,
    /// Bytes that the first holder sent, as a share of the object.
    seeder_sent: f64,
    load_average: Option<f64>,
    #[serde(flatten)]
    finish: Finish,
}

pub(super) async fn run(args: BroadcastArgs) -> Result<()> {
    let hosts = args.peers.get() + 1;
    ensure!(
        hosts <= HOSTS_MAX,
        "{hosts} hosts are more than the {HOSTS_MAX} that one machine is asked to play: lower --peers"
    );
    ensure!(
        (0.0..=10_000.0).contains(&args.round_trip) && (0.0..=50.0).contains(&args.loss),
        "a path of {} ms and {} % loss is not one: --round-trip takes 0 to 10000, --loss 0 to 50",
        args.round_trip,
        args.loss
    );
    args.transport.check()?;
    let (peer, seeder) = links(&args);
    let mut shapes = vec![peer; hosts];
    shapes[0] = seeder;
    let is_far = args.round_trip > 0.0 || args.loss > 0.0;
    let between = if is_far {
        Between::Path
    } else {
        Between::Bridge
    };
    let net = Net::build(&shapes, between)?;
    let _path = match between {
        Between::Bridge => None,
        Between::Path => Some(Path::start(&net, hosts, args.round_trip / 2.0, args.loss).await?),
    };
    let bound = bound_seconds(&args);
    if !args.json {
        say(&format!(
            "{} peers with {} up and {} down, {} up at the seeder (Mbit/s), {} bytes by {}: bound {bound:.1} s, {:.1} s with headers",
            args.peers,
            args.up,
            args.down,
            seeder.up_mbit,
            args.bytes,
            args.transport.name(),
            bound * args.transport.headers()
        ))?;
    }
    let sharing = match args.seeder {
        Seeder::Learner => Sharing::FirstCopies,
        Seeder::Peer => Sharing::OnDemand,
    };
    let plan = |addresses, object| Plan {
        addresses,
        transport: args.transport,
        sharing,
        object,
    };
    let race = Race::prepare(&net, hosts, args.bytes.get(), args.patience.get(), plan)?;
    let mut contenders = vec![None];
    contenders.extend(args.against.iter().copied().map(Some));
    for contender in contenders {
        let mut finishes = Vec::new();
        for _ in 0..args.runs.get() {
            let load = load_average();
            let finish = match contender {
                None => race.swarm().await?,
                Some(rival) => race.rival(&args.python, rival.name()).await?,
            };
            report(&args, contender, bound, load, &finish)?;
            finishes.push(finish.last_seconds);
        }
        if args.runs.get() > 1 && !args.json {
            let last = Spread::of(finishes).median;
            say(&format!(
                "{:<10} median of {}: last {last:.1} s = {:.2} of the bound",
                name(contender),
                args.runs,
                last / bound
            ))?;
        }
    }
    Ok(())
}

impl Rival {
    fn name(self) -> &'static str {
        match self {
            Rival::Star => "star",
            Rival::Libtorrent => "libtorrent",
        }
    }
}

fn name(contender: Option<Rival>) -> &'static str {
    contender.map_or("muster", Rival::name)
}

/// The links of the peers and of the first holder.
fn links(args: &BroadcastArgs) -> (Link, Link) {
    let peer = Link {
        up_mbit: args.up.get(),
        down_mbit: args.down.get(),
    };
    let seeder = Link {
        up_mbit: args.seeder_up.unwrap_or(args.up).get(),
        ..peer
    };
    (peer, seeder)
}

/// T*, in seconds.
fn bound_seconds(args: &BroadcastArgs) -> f64 {
    let (peer, seeder) = links(args);
    let megabits = args.bytes.get() as f64 * 8.0 / 1e6;
    let peers = args.peers.get() as f64;
    let (up, down) = (peer.up_mbit as f64, peer.down_mbit as f64);
    let all = seeder.up_mbit as f64 + peers * up;
    (megabits / seeder.up_mbit as f64)
        .max(megabits / down)
        .max(peers * megabits / all)
}

fn report(
    args: &BroadcastArgs,
    contender: Option<Rival>,
    bound: f64,
    load_average: Option<f64>,
    finish: &Finish,
) -> Result<()> {
    let row = Row {
        what: name(contender),
        transport: contender.is_none().then_some(args.transport),
        peers: args.peers.get(),
        bytes: args.bytes.get(),
        bound_seconds: bound,
        last: finish.last_seconds / bound,
        seeder_sent: finish.seeder_bytes as f64 / args.bytes.get() as f64,
        load_average,
        finish: finish.clone(),
    };
    if args.json {
        return say(&serde_json::to_string(&row)?);
    }
    let fetched = (args.bytes.get() * args.peers.get() as u64) as f64;
    let gigabytes = fetched / 1e9;
    say(&format!(
        "{:<10} first {:>6.1} s  median {:>6.1} s  last {:>6.1} s = {:>5.2} of the bound  seeder sent {:.2}  twice {:.1} %  CPU {:.1} s/GB  {:.0} MB  load {:.1}",
        row.what,
        finish.first_seconds,
        finish.median_seconds,
        finish.last_seconds,
        row.last,
        row.seeder_sent,
        100.0 * finish.twice_bytes as f64 / fetched,
        finish.cpu_seconds / gigabytes,
        finish.memory_peak_bytes as f64 / 1e6,
        load_average.unwrap_or(f64::NAN),
    ))
}
