//! The arguments that every member of a run takes.

use std::num::NonZeroU64;
use std::path::PathBuf;

use clap::Args;

use muster_broadcaster::SwarmConfig;
use muster_broadcaster::transport::nat::NatConfig;

/// The arguments of every member of a run.
#[derive(Debug, Clone, Args)]
pub struct MemberArgs {
    /// The member's credentials
    #[arg(long, value_name = "FILE")]
    pub creds: PathBuf,
    /// Address of the NATS server, instead of the one in the credentials
    #[arg(long, value_name = "URL")]
    pub nats: Option<String>,
    /// Address on which to listen for peers, `host:port`; port 0 takes any free port
    #[arg(long, value_name = "ADDRESS")]
    pub listen: Option<std::net::SocketAddr>,
    /// Address, `host:port`, under which peers reach this member, if it differs from the one in --listen
    #[arg(long, value_name = "ADDRESS")]
    pub advertise: Vec<String>,
    /// Upload limit in megabits per second; no limit by default
    #[arg(long, value_name = "X")]
    pub upload_mbps: Option<NonZeroU64>,
    #[command(flatten)]
    pub nat: NatArgs,
    /// Most bytes of older weights kept, from which deltas over several versions are made for late peers; 0 makes none [default: 1 GiB]
    #[arg(long, value_name = "N")]
    pub squash_bytes_max: Option<u64>,
}

impl MemberArgs {
    pub fn swarm(&self) -> SwarmConfig {
        let mut swarm = SwarmConfig {
            advertise: self.advertise.clone(),
            ..SwarmConfig::default()
        };
        swarm.squash.bytes_max = self.squash_bytes_max.unwrap_or(swarm.squash.bytes_max);
        swarm.listen = self.listen.unwrap_or(swarm.listen);
        swarm.upload_bytes_per_second = self
            .upload_mbps
            .map(|mbps| mbps.saturating_mul(BYTES_PER_MEGABIT));
        swarm.nat = self.nat.config();
        swarm
    }
}

/// How a member reaches peers behind home routers.
#[derive(Debug, Clone, Args)]
pub struct NatArgs {
    /// Connect to peers behind home routers, and accept connections behind one; needs a build with the feature `nat`
    #[arg(long, requires = "creds")]
    pub nat: bool,
    /// Relay through which peers behind routers find each other, `https://host`; the same for all members of a run
    #[arg(long, value_name = "URL", requires = "nat")]
    pub nat_relay: Vec<String>,
    /// PEM file of root certificates for a relay of your own; the public roots by default
    #[arg(long, value_name = "FILE", requires = "nat_relay")]
    pub nat_relay_roots: Option<PathBuf>,
}

impl NatArgs {
    /// The NAT configuration, if `--nat` was given.
    pub fn config(&self) -> Option<NatConfig> {
        self.nat.then(|| NatConfig {
            relays: self.nat_relay.clone(),
            relay_roots: self.nat_relay_roots.clone(),
            ..NatConfig::default()
        })
    }
}

const BYTES_PER_MEGABIT: NonZeroU64 = NonZeroU64::new(125_000).unwrap();
