//! Being reached behind a home router: what is configured, and what can be wrong with it.
//!
//! What does it is `transport/nat.rs`, which only builds with the cargo feature `nat` hold. The configuration is known to every
//! build, so that one that cannot follow it says so.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use muster_protocol::identity::Identity;
use serde::{Deserialize, Serialize};

use crate::transport::Transport;

/// In front of an address of this kind in a peer's record.
pub(crate) const SCHEME: &str = "nat:";

/// How a peer is reached behind a home router.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NatConfig {
    /// Where to listen for UDP; every interface and any free port by default, since behind a router no port is known outside.
    pub listen: Option<SocketAddr>,
    /// `https://host` of the relays where peers meet, tell one another their outside addresses and, when no direct way is
    /// found, pass shards. None by default: then only peers with an address that others can dial are reached. Peers meet at a
    /// relay that both are configured with.
    pub relays: Vec<String>,
    /// A PEM file with the certificates by which relays are known, for relays of one's own; the public ones by default.
    pub relay_roots: Option<PathBuf>,
}

/// Why there is no way through routers.
#[derive(Debug, thiserror::Error)]
pub enum NatError {
    /// The build has no QUIC.
    #[error(
        "this muster was built without the feature `nat`: build it with `--features nat`, or leave the nat transport off"
    )]
    Absent,
    /// Not the address of a relay.
    #[error("relay {url:?} is not an address ({reason}): write it as https://host")]
    Relay {
        /// As configured.
        url: String,
        /// What is wrong.
        reason: String,
    },
    /// The relays' certificates cannot be read.
    #[error("cannot read the relays' certificates in {path} ({reason}): name a PEM file")]
    Roots {
        /// As configured.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// No socket.
    #[error(
        "cannot listen for QUIC ({reason}): choose another address, or port 0 for any free one"
    )]
    Listen {
        /// What is wrong.
        reason: String,
    },
}

/// What the record of a peer says that is reached by QUIC at `place`, for peers whom nobody introduces.
///
/// # Errors
/// In a build without QUIC.
#[cfg(feature = "nat")]
pub fn address(identity: &Identity, place: SocketAddr) -> Result<String, NatError> {
    Ok(crate::transport::nat::address(identity, place))
}

/// What the record of a peer says that is reached by QUIC at `place`, which this build does not have.
///
/// # Errors
/// Always.
#[cfg(not(feature = "nat"))]
pub fn address(_identity: &Identity, _place: SocketAddr) -> Result<String, NatError> {
    Err(NatError::Absent)
}

/// The transport of this configuration.
#[cfg(feature = "nat")]
pub(crate) async fn transport(
    config: &NatConfig,
    identity: &Identity,
) -> Result<Arc<dyn Transport>, NatError> {
    let nat = crate::transport::nat::Nat::listen(config, identity).await?;
    Ok(Arc::new(nat))
}

/// The transport of this configuration, which this build does not have.
#[cfg(not(feature = "nat"))]
pub(crate) async fn transport(
    _config: &NatConfig,
    _identity: &Identity,
) -> Result<Arc<dyn Transport>, NatError> {
    std::future::ready(Err(NatError::Absent)).await
}

#[cfg(all(test, not(feature = "nat")))]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_build_without_the_feature_says_so() {
        let refused = transport(&NatConfig::default(), &Identity::generate()).await;
        assert!(matches!(refused, Err(NatError::Absent)), "{refused:?}");
    }
}
