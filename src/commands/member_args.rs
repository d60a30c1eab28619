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
    /// Where the bus is, instead of what the credentials say
    #[arg(long, value_name = "URL")]
    pub nats: Option<String>,
    /// Where to listen for peers, `host:port`; port 0 for any free one
    #[arg(long, value_name = "ADDRESS")]
    pub listen: Option<std::net::SocketAddr>,
    /// Under which `host:port` other peers reach this one, when it is not the address listened on
    #[arg(long, value_name = "ADDRESS")]
    pub advertise: Vec<String>,
    /// Most megabits per second to upload; no limit by default
    #[arg(long, value_name = "X")]
    pub upload_mbps: Option<NonZeroU64>,
    #[command(flatten)]
    pub nat: NatArgs,
    /// Most bytes of older weights kept to make deltas over several versions for late peers; 0 makes none [default: 1 GiB]
    #[arg(long, value_name = "N")]
    pub squash_bytes_max: Option<u64>,
}

impl MemberArgs {
    /// How this member takes part in the swarm.
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
    /// Reach peers behind home routers too, and be reached; needs a build with the feature `nat`
    #[arg(long, requires = "creds")]
    pub nat: bool,
    /// Where peers behind routers meet, `https://host`; all members of a run name the same
    #[arg(long, value_name = "URL", requires = "nat")]
    pub nat_relay: Vec<String>,
    /// The PEM file by which such a relay is known, for one of your own; the public certificates by default
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

/// 10⁶ bits.
const BYTES_PER_MEGABIT: NonZeroU64 = match NonZeroU64::new(125_000) {
    Some(bytes) => bytes,
    None => unreachable!(),
};
