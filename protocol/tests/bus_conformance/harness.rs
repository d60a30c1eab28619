//! The buses under test, with the same members on each.

use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use muster_protocol::bus::memory::{MemoryBus, MemoryConfig};
use muster_protocol::bus::nats::{NatsBus, NatsConfig};
use muster_protocol::bus::{QueueBounds, SharedBus};
use muster_protocol::id::RunId;
use muster_protocol::identity::{Identity, MachineSeed};
use muster_protocol::nats_server::{Member, NatsServer, ServerConfig};
use muster_protocol::subject::{Role, Subject, Subjects};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Short enough for a test to wait, long enough for a slow machine to act.
pub const ACK_WAIT: Duration = Duration::from_secs(3);
/// Small enough for a test to fill a queue.
pub const MESSAGES_MAX: u64 = 40;
/// Longer than an immediate call takes on a slow machine.
pub const AT_ONCE: Duration = Duration::from_millis(1_500);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TestMember {
    Dispatch,
    Trainer,
    Worker,
    OtherWorker,
    Critic,
}

impl TestMember {
    pub const ALL: [TestMember; 5] = [
        TestMember::Dispatch,
        TestMember::Trainer,
        TestMember::Worker,
        TestMember::OtherWorker,
        TestMember::Critic,
    ];

    pub fn role(self) -> Role {
        match self {
            TestMember::Dispatch => Role::Dispatch,
            TestMember::Trainer => Role::Trainer,
            TestMember::Worker | TestMember::OtherWorker => Role::Worker,
            TestMember::Critic => Role::Critic,
        }
    }

    pub fn identity(self) -> Identity {
        Identity::from_seed(&MachineSeed::from_bytes([self as u8 + 1; 32]))
    }

    pub fn user(self) -> String {
        self.identity().login_user()
    }
}

/// A bus under test.
#[async_trait]
pub trait Harness: Send + Sync {
    /// A new connection of a member.
    async fn connect(&self, member: TestMember) -> SharedBus;

    /// Sends a request with the reply address `reply`, as a hostile client can.
    async fn publish_with_reply(
        &self,
        member: TestMember,
        subject: &Subject,
        reply: Subject,
        payload: Bytes,
    );

    /// Starts an outage.
    async fn interrupt(&self);

    /// Ends the outage; the server keeps its store.
    async fn resume(&self);

    /// Connections of dispatch and trainer, with the streams created.
    async fn lab(&self) -> (SharedBus, SharedBus) {
        let dispatch = self.connect(TestMember::Dispatch).await;
        dispatch.create_streams().await.unwrap();
        (dispatch, self.connect(TestMember::Trainer).await)
    }
}

pub fn run() -> RunId {
    "conformance-1".parse().unwrap()
}

pub fn subjects() -> Subjects {
    Subjects::of(&run())
}

pub fn bytes(text: impl ToString) -> Bytes {
    Bytes::from(text.to_string().into_bytes())
}

const BOUNDS: QueueBounds = QueueBounds {
    messages_max: Some(MESSAGES_MAX),
    ack_wait: Some(ACK_WAIT),
};

pub struct MemoryHarness {
    bus: MemoryBus,
}

impl MemoryHarness {
    pub fn open() -> Self {
        let config = MemoryConfig {
            seed: 1,
            bounds: BOUNDS,
            ..MemoryConfig::default()
        };
        Self {
            bus: MemoryBus::new(&run(), config),
        }
    }
}

#[async_trait]
impl Harness for MemoryHarness {
    async fn connect(&self, member: TestMember) -> SharedBus {
        self.bus.connect(&member.user(), member.role())
    }

    async fn publish_with_reply(
        &self,
        member: TestMember,
        subject: &Subject,
        reply: Subject,
        payload: Bytes,
    ) {
        self.bus
            .publish_with_reply(&member.user(), member.role(), subject, reply, &payload)
            .unwrap();
    }

    async fn interrupt(&self) {
        TestMember::ALL
            .iter()
            .for_each(|member| self.bus.cut_off(&member.user()));
    }

    async fn resume(&self) {
        TestMember::ALL
            .iter()
            .for_each(|member| self.bus.heal(&member.user()));
    }
}

pub struct NatsHarness {
    config: ServerConfig,
    url: String,
    server: Mutex<Option<NatsServer>>,
    _dir: tempfile::TempDir,
}

impl NatsHarness {
    pub async fn open() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let members = TestMember::ALL.map(|member| Member {
            user: member.user(),
            role: member.role(),
        });
        let project = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let config = ServerConfig {
            project,
            ..ServerConfig::new(&run(), dir.path(), members.to_vec())
        };
        let server = NatsServer::start(&config).await;
        let server =
            server.unwrap_or_else(|error| panic!("these tests need a NATS server: {error}"));
        Self {
            config,
            url: server.url(),
            server: Mutex::new(Some(server)),
            _dir: dir,
        }
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    pub fn bus_config(&self, identity: &Identity) -> NatsConfig {
        let seed = identity.login_seed().unwrap();
        NatsConfig {
            bounds: BOUNDS,
            ..NatsConfig::new(&self.url, &run(), &seed, "conformance")
        }
    }
}

#[async_trait]
impl Harness for NatsHarness {
    async fn connect(&self, member: TestMember) -> SharedBus {
        NatsBus::connect(self.bus_config(&member.identity()))
            .await
            .unwrap()
    }

    async fn publish_with_reply(
        &self,
        member: TestMember,
        subject: &Subject,
        reply: Subject,
        payload: Bytes,
    ) {
        let seed = member.identity().login_seed().unwrap();
        let client = async_nats::ConnectOptions::with_nkey(seed)
            .connect(&self.url)
            .await
            .unwrap();
        let (subject, reply) = (subject.to_string(), reply.to_string());
        client
            .publish_with_reply(subject, reply, payload)
            .await
            .unwrap();
        client.flush().await.unwrap();
    }

    async fn interrupt(&self) {
        let server = self.server.lock().unwrap().take().unwrap();
        let pid = Pid::from_raw(server.pid().unwrap().cast_signed());
        kill(pid, Signal::SIGKILL).unwrap();
        server.ended().await;
    }

    async fn resume(&self) {
        let server = NatsServer::start(&self.config).await.unwrap();
        assert_eq!(server.url(), self.url);
        *self.server.lock().unwrap() = Some(server);
    }
}
