//! The transport for peers behind home routers: QUIC with hole punching.
//!
//! Only builds with the cargo feature `nat` contain `nat/quic.rs`; other builds answer with [`NatError::Absent`].

use std::net::SocketAddr;
use std::sync::Arc;

use muster_protocol::identity::Identity;

use crate::transport::interface::Transport;

pub use crate::transport::nat::config::{NatConfig, NatError};

pub(crate) mod config;
#[cfg(feature = "nat")]
mod quic;

/// The address, for a peer's record, of the peer that listens for QUIC at `place`. For peers that know each other's addresses
/// beforehand and need no relay.
///
/// # Errors
/// In a build without QUIC.
pub fn address(identity: &Identity, place: SocketAddr) -> Result<String, NatError> {
    #[cfg(feature = "nat")]
    return Ok(quic::address(identity, place));
    #[cfg(not(feature = "nat"))]
    return Err(absent(&(identity, place)));
}

/// Starts the transport of this configuration.
///
/// # Errors
/// In a build without QUIC, or when the configuration cannot be used.
pub(crate) async fn transport(
    config: &NatConfig,
    identity: &Identity,
) -> Result<Arc<dyn Transport>, NatError> {
    #[cfg(feature = "nat")]
    return Ok(Arc::new(quic::Quic::listen(config, identity).await?));
    #[cfg(not(feature = "nat"))]
    return std::future::ready(Err(absent(&(config, identity)))).await;
}

#[cfg(not(feature = "nat"))]
fn absent<T>(_unused: &T) -> NatError {
    NatError::Absent
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
