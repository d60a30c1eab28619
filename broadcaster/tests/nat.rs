//! Peers in two homes, each behind a router that masquerades, exchange shards over the `nat` transport, with a relay on the
//! network between them. The homes, their routers and the network are namespaces of this machine: needs root, `ip` of iproute2
//! and `nft` of nftables.
//!
//! `cargo test --release -p muster-broadcaster --features nat-tests --test nat`
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout)]

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Barrier};
use std::thread::{JoinHandle, spawn};
use std::time::Duration;

use bytes::Bytes;
use iroh_relay::server::{CertConfig, QuicConfig, RelayConfig, Server, ServerConfig, TlsConfig};
use muster_broadcaster::store::object::describe_object;
use muster_broadcaster::transport::nat::NatConfig;
use muster_broadcaster::{Swarm, SwarmConfig};
use muster_protocol::clock::SystemClock;
use muster_protocol::id::{PeerId, PolicyVersion, StateRoot};
use muster_protocol::identity::Identity;
use muster_protocol::message::peer::PeerRecord;
use muster_protocol::message::version::{Content, Object};
use nix::sched::{CloneFlags, setns};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

const RELAY: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 1);
const OBJECT_BYTES: usize = 8 << 20;
/// Tests of one process that stand beside one another.
static NETS: AtomicU32 = AtomicU32::new(0);

/// How a router chooses the outside port of what leaves.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Router {
    /// The inner port where it is free, whatever the destination, as most home routers do.
    KeepsPort,
    /// Another port for each destination: an address that the relay sees is of no use to other peers.
    DrawsPort,
}

/// Two homes, their routers, and the network between.
struct Net {
    prefix: String,
}

impl Net {
    fn build(router: Router) -> Self {
        let number = NETS.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("muster-nat-{}-{number}", std::process::id());
        let net = Self { prefix };
        let wan = net.name("wan");
        run("ip", &["netns", "add", &wan]);
        net.ip("wan", "link add hub type bridge");
        net.ip("wan", &format!("addr add {RELAY}/24 dev hub"));
        net.ip("wan", "link set hub up");
        net.ip("wan", "link set lo up");
        for home in 0..2 {
            net.settle(home, router);
        }
        net
    }

    fn settle(&self, home: usize, router: Router) {
        let (inside, gate) = (format!("home{home}"), format!("gate{home}"));
        run("ip", &["netns", "add", &self.name(&inside)]);
        run("ip", &["netns", "add", &self.name(&gate)]);
        let port = format!(
            "link add port{home} type veth peer name wan0 netns {}",
            self.name(&gate)
        );
        self.ip("wan", &port);
        self.ip("wan", &format!("link set port{home} master hub up"));
        let cable = format!(
            "link add lan0 type veth peer name up0 netns {}",
            self.name(&inside)
        );
        self.ip(&gate, &cable);
        self.ip(&gate, &format!("addr add 10.78.0.{}/24 dev wan0", home + 2));
        self.ip(
            &gate,
            &format!("addr add 192.168.{}.1/24 dev lan0", home + 1),
        );
        self.ip(&inside, &format!("addr add {}/24 dev up0", address(home)));
        for (place, device) in [
            (&gate, "wan0"),
            (&gate, "lan0"),
            (&inside, "up0"),
            (&inside, "lo"),
        ] {
            self.ip(place, &format!("link set {device} up"));
        }
        self.ip(
            &inside,
            &format!("route add default via 192.168.{}.1", home + 1),
        );
        let forward = "echo 1 > /proc/sys/net/ipv4/ip_forward";
        run(
            "ip",
            &["netns", "exec", &self.name(&gate), "sh", "-c", forward],
        );
        let way = match router {
            Router::KeepsPort => "masquerade",
            Router::DrawsPort => "masquerade fully-random",
        };
        // As home routers do, they drop every packet that answers no request from inside.
        let rules = format!(
            "table ip home {{
                chain out {{ type nat hook postrouting priority 100; oifname \"wan0\" {way}; }}
                chain to {{ type filter hook input priority 0; iifname \"wan0\" ct state new drop; }}
                chain through {{ type filter hook forward priority 0; iifname \"wan0\" ct state new drop; }}
            }}"
        );
        run("ip", &["netns", "exec", &self.name(&gate), "nft", &rules]);
    }

    fn name(&self, place: &str) -> String {
        format!("{}-{place}", self.prefix)
    }

    fn ip(&self, place: &str, line: &str) {
        let name = self.name(place);
        let words: Vec<&str> = ["-n", name.as_str()]
            .into_iter()
            .chain(line.split(' '))
            .collect();
        run("ip", &words);
    }

    /// Runs something in a place, on a thread of its own.
    fn within<T: Send + 'static>(
        &self,
        place: &str,
        work: impl AsyncFnOnce() -> T + Send + 'static,
    ) -> JoinHandle<T> {
        let path = Path::new("/var/run/netns").join(self.name(place));
        spawn(move || {
            let namespace = File::open(&path).unwrap();
            setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            runtime.unwrap().block_on(work())
        })
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for place in ["home0", "home1", "gate0", "gate1", "wan"] {
            Command::new("ip")
                .args(["netns", "del", &self.name(place)])
                .output()
                .ok();
        }
    }
}

fn address(home: usize) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, home as u8 + 1, 2)
}

fn run(tool: &str, words: &[&str]) {
    let done = Command::new(tool).args(words).output();
    let done = done.unwrap_or_else(|error| {
        panic!("cannot run `{tool}` ({error}): install iproute2 and nftables")
    });
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(
        done.status.success(),
        "`{tool} {}` failed, which needs root, iproute2 and nftables: {said}",
        words.join(" ")
    );
}

/// A relay with a certificate of its own; returns how many bytes it passed on once it is told to stop.
fn relay(net: &Net, roots: PathBuf, ready: Sender<()>, stop: Receiver<()>) -> JoinHandle<u64> {
    net.within("wan", async move || {
        let signed = rcgen::generate_simple_self_signed(vec![RELAY.to_string()]).unwrap();
        std::fs::write(&roots, signed.cert.pem()).unwrap();
        let key = rustls::pki_types::PrivatePkcs8KeyDer::from(signed.signing_key.serialize_der());
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let server_config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![signed.cert.der().clone()], key.into())
            .unwrap();
        let mut relay = RelayConfig::new((RELAY, 80));
        relay.tls = Some(TlsConfig::new(
            (RELAY, 443),
            CertConfig::Manual { server_config },
        ));
        let mut config = ServerConfig::default();
        config.relay = Some(relay);
        config.quic = Some(QuicConfig::new((
            RELAY,
            iroh_relay::defaults::DEFAULT_RELAY_QUIC_PORT,
        )));
        let server = Server::spawn(config).await.unwrap();
        ready.send(()).unwrap();
        tokio::task::spawn_blocking(move || stop.recv().ok())
            .await
            .unwrap();
        let passed = server.metrics().server.bytes_sent.get();
        server.shutdown().await.unwrap();
        passed
    })
}

fn object(home: usize) -> (Object, Bytes) {
    let bytes: Vec<u8> = (0..OBJECT_BYTES)
        .map(|place| ((place * (home + 3)) >> 7) as u8)
        .collect();
    let root = StateRoot([home as u8; 32]);
    let object = describe_object(Content::Anchor { root }, PolicyVersion(1), &bytes).unwrap();
    (object, bytes.into())
}

/// What a peer tells the others, as the bus would.
type Told = (PeerId, PeerRecord, SocketAddr);

/// A peer that offers an object, tells of itself once its relay knows it, and fetches the other's.
async fn peer(
    home: usize,
    roots: PathBuf,
    tell: Sender<Told>,
    hear: Receiver<Told>,
    done: Arc<Barrier>,
) {
    let (identity, shutdown, tracker) = (
        Identity::generate(),
        CancellationToken::new(),
        TaskTracker::new(),
    );
    let nat = NatConfig {
        relays: vec![format!("https://{RELAY}/")],
        relay_roots: Some(roots),
        ..NatConfig::default()
    };
    let config = SwarmConfig {
        listen: SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
        nat: Some(nat),
        ..SwarmConfig::default()
    };
    let swarm = Swarm::start(
        config,
        identity.clone(),
        Arc::new(SystemClock),
        &tracker,
        shutdown.clone(),
    );
    let swarm = swarm.await.unwrap();
    let (own, bytes) = object(home);
    swarm.offer(&own, bytes).await.unwrap();
    let outside = format!("10.78.0.{}:", home + 2);
    let is_known = |record: &PeerRecord| {
        let said = record.addresses.concat();
        said.contains("https://") && said.contains(&outside)
    };
    while !is_known(&swarm.peer_record()) {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let inside = SocketAddr::from((address(home), swarm.local_address().port()));
    tell.send((identity.peer_id(), swarm.peer_record(), inside))
        .unwrap();
    let (other, record, their_inside) = tokio::task::spawn_blocking(move || hear.recv())
        .await
        .unwrap()
        .unwrap();
    // The control: no ordinary connection leads from home to home.
    assert!(TcpStream::connect(their_inside).await.is_err());
    swarm.add_peer(other, record);
    let (wanted, expected) = object(1 - home);
    assert_eq!(swarm.fetch(&wanted).await.unwrap(), expected);
    // Who is done goes on serving until both are.
    tokio::task::spawn_blocking(move || done.wait())
        .await
        .unwrap();
    shutdown.cancel();
    tracker.close();
    tracker.wait().await;
}

/// Has both homes fetch what the other offers; returns how many bytes the relay passed on.
fn exchange(router: Router) -> u64 {
    let net = Net::build(router);
    let folder = tempfile::tempdir().unwrap();
    let roots = folder.path().join("relay.pem");
    let ((ready, is_ready), (stop, stopping)) = (channel(), channel());
    let relay = relay(&net, roots.clone(), ready, stopping);
    is_ready.recv().unwrap();
    let ((tell0, hear0), (tell1, hear1)) = (channel(), channel());
    let done = Arc::new(Barrier::new(2));
    let (first, second) = ((roots.clone(), done.clone()), (roots, done));
    let homes = [
        net.within("home0", async move || {
            peer(0, first.0, tell0, hear1, first.1).await
        }),
        net.within("home1", async move || {
            peer(1, second.0, tell1, hear0, second.1).await
        }),
    ];
    for home in homes {
        home.join().unwrap();
    }
    stop.send(()).unwrap();
    relay.join().unwrap()
}

#[test]
fn homes_whose_routers_keep_ports_exchange_shards_directly() {
    let relayed = exchange(Router::KeepsPort);
    println!(
        "the relay passed on {relayed} of {} bytes",
        2 * OBJECT_BYTES
    );
    assert!(
        relayed < OBJECT_BYTES as u64 / 8,
        "the relay passed on {relayed} bytes"
    );
}

#[test]
fn homes_whose_routers_draw_ports_exchange_shards_over_the_relay() {
    let relayed = exchange(Router::DrawsPort);
    println!(
        "the relay passed on {relayed} of {} bytes",
        2 * OBJECT_BYTES
    );
    assert!(
        relayed > 2 * OBJECT_BYTES as u64,
        "the relay passed on {relayed} bytes"
    );
}
