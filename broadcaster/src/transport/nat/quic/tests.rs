//! Peers that reach one another over QUIC on one machine, and those that must not.

use std::net::Ipv4Addr;
use std::sync::Arc;

use bytes::Bytes;
use muster_protocol::clock::SystemClock;
use muster_protocol::id::{PeerId, PolicyVersion, StateRoot, UnixMillis};
use muster_protocol::message::version::Content;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use super::*;
use crate::store::object::describe_object;
use crate::transport::Transports;
use crate::{Swarm, SwarmConfig};

fn loopback() -> NatConfig {
    NatConfig {
        listen: Some(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))),
        ..NatConfig::default()
    }
}

async fn peer(identity: &Identity) -> (Swarm, DropGuard) {
    let config = SwarmConfig {
        nat: Some(loopback()),
        ..SwarmConfig::default()
    };
    let shutdown = CancellationToken::new();
    let (clock, tracker) = (Arc::new(SystemClock), TaskTracker::new());
    let swarm = Swarm::start(config, identity.clone(), clock, &tracker, shutdown.clone());
    (swarm.await.unwrap(), shutdown.drop_guard())
}

/// What a peer behind a router tells: nothing that TCP could dial.
fn without_tcp(mut record: PeerRecord) -> PeerRecord {
    record
        .addresses
        .retain(|address| address.starts_with(SCHEME));
    assert_eq!(record.addresses.len(), 1);
    record
}

async fn dialler(identity: &Identity) -> Transports {
    let nat = Quic::listen(&loopback(), identity).await.unwrap();
    Transports::new(vec![Arc::new(nat)])
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_comes_over_quic_alone() {
    let (from, to) = (Identity::generate(), Identity::generate());
    let ((from_swarm, _from), (to_swarm, _to)) = (peer(&from).await, peer(&to).await);
    let bytes = Bytes::from(vec![7; 3_000_000]);
    let content = Content::Anchor {
        root: StateRoot([1; 32]),
    };
    let object = describe_object(content, PolicyVersion(1), &bytes).unwrap();
    from_swarm.offer(&object, bytes.clone()).await.unwrap();
    to_swarm.add_peer(from.peer_id(), without_tcp(from_swarm.peer_record()));
    assert_eq!(to_swarm.fetch(&object).await.unwrap(), bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_key_of_the_record_is_proved_and_a_strangers_is_refused() {
    let (server, stranger, asker) = (
        Identity::generate(),
        Identity::generate(),
        Identity::generate(),
    );
    let (swarm, _running) = peer(&server).await;
    let ways = dialler(&asker).await;
    let record = without_tcp(swarm.peer_record());
    let connection = ways.dial(&record, &asker).await.unwrap();
    assert_eq!(connection.peer, server.handshake_id());
    // The right endpoint, whose peer has another key than the record says.
    let stolen = PeerRecord {
        handshake: stranger.handshake_id(),
        ..record.clone()
    };
    let refused = ways.dial(&stolen, &asker).await.err().unwrap();
    let DialError::Connection(ConnectionError::WrongPeer { expected, found }) = refused else {
        panic!("{refused}")
    };
    assert_eq!(
        (expected, found),
        (stranger.handshake_id(), server.handshake_id())
    );
    // The right peer at the right place, under an endpoint's key that is not its own.
    let key = |identity: &Identity| SecretKey::from_bytes(identity.transport_secret()).public();
    let (own, other) = (key(&server).to_string(), key(&stranger).to_string());
    let forged = PeerRecord {
        addresses: vec![record.addresses[0].replace(&own, &other)],
        ..record
    };
    assert_ne!(forged.addresses, without_tcp(swarm.peer_record()).addresses);
    let refused = ways.dial(&forged, &asker).await.err().unwrap();
    assert!(
        matches!(refused, DialError::Unreachable { .. }),
        "{refused}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn addresses_that_are_none_are_passed_over_and_relays_of_others_are_not_used() {
    let nat = Quic::listen(&loopback(), &Identity::generate())
        .await
        .unwrap();
    let id = nat.endpoint.id();
    let at = |address: String| PeerRecord {
        handshake: PeerId([1; 32]),
        addresses: vec![address],
        issued: UnixMillis(0),
    };
    for address in ["", "nat:", "nat:00", "127.0.0.1:1", "nat:,,,"] {
        let found = nat.endpoint_address(&at(address.to_owned()));
        assert!(found.is_none(), "{address:?}: {found:?}");
    }
    let many: String = (0..100).map(|host| format!(",10.0.0.{host}:1")).collect();
    let (_, place) = nat
        .endpoint_address(&at(format!("nat:{id}{many}")))
        .unwrap();
    assert_eq!(place.ip_addrs().count(), PLACES_MAX);
    let record = at(format!(
        "nat:{id},https://elsewhere.example/,nonsense,[::1]:7"
    ));
    let (_, place) = nat.endpoint_address(&record).unwrap();
    assert_eq!(place.relay_urls().count(), 0);
    assert_eq!(place.ip_addrs().count(), 1);
}

#[tokio::test]
async fn a_relay_that_is_no_address_is_named() {
    let config = NatConfig {
        relays: vec!["not a relay".to_owned()],
        ..loopback()
    };
    let error = Quic::listen(&config, &Identity::generate())
        .await
        .unwrap_err();
    assert!(error.to_string().contains("not a relay"), "{error}");
}

#[tokio::test]
async fn what_is_said_of_a_peer_beforehand_is_what_it_tells_itself() {
    let identity = Identity::generate();
    let nat = Quic::listen(&loopback(), &identity).await.unwrap();
    let told = nat.addresses().concat();
    let place = told.rsplit(',').next().unwrap().parse().unwrap();
    assert_eq!(address(&identity, place), told);
}
