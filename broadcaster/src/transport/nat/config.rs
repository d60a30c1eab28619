//! The configuration of the NAT transport, and its errors. Every build knows them, so that a build without QUIC can say that
//! it lacks it.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Prefix of a QUIC address in a peer's record.
pub(crate) const SCHEME: &str = "nat:";

/// How a peer is reached behind a home router.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NatConfig {
    /// Where to listen for UDP. Default: every interface and any free port, since a router hides the port anyway.
    pub listen: Option<SocketAddr>,
    /// `https://host` of each relay. At a relay peers meet and exchange their outside addresses; it also carries shards when
    /// no direct path is found. Two peers meet only at a relay that both are configured with. Default: none; then only peers
    /// with a dialable address are reached.
    pub relays: Vec<String>,
    /// A PEM file with the certificates that sign the relays' own, for private relays. Default: the public certificates.
    pub relay_roots: Option<PathBuf>,
}

/// Why the NAT transport could not start.
#[derive(Debug, thiserror::Error)]
pub enum NatError {
    /// The build has no QUIC.
    #[error(
        "this muster was built without the feature `nat`: build it with `--features nat`, or leave the nat transport off"
    )]
    Absent,
    /// A relay's address does not parse.
    #[error("relay {url:?} is not an address ({reason}): write it as https://host")]
    Relay { url: String, reason: String },
    /// The relays' certificates cannot be read.
    #[error("cannot read the relays' certificates in {path} ({reason}): name a PEM file")]
    Roots { path: PathBuf, reason: String },
    /// The UDP socket cannot be opened.
    #[error(
        "cannot listen for QUIC ({reason}): choose another address, or port 0 for any free one"
    )]
    Listen { reason: String },
}
