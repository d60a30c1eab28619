//! Where the behaviours are tried: a bus with the same members on either side.

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

/// Short enough that a test may wait for it, long enough for a slow machine to act within it.
pub const ACK_WAIT: Duration = Duration::from_secs(3);
/// Small enough to be filled.
pub const MESSAGES_MAX: u64 = 40;
/// Longer than anything that happens at once takes on a slow machine.
pub const AT_ONCE: Duration = Duration::from_millis(1_500);

/// The members.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    Dispatch,
    Trainer,
    Worker,
    OtherWorker,
    Critic,
}

impl Who {
    pub const ALL: [Who; 5] = [
        Who::Dispatch,
        Who::Trainer,
        Who::Worker,
        Who::OtherWorker,
        Who::Critic,
    ];

    pub fn role(self) -> Role {
        match self {
            Who::Dispatch => Role::Dispatch,
            Who::Trainer => Role::Trainer,
            Who::Worker | Who::OtherWorker => Role::Worker,
            Who::Critic => Role::Critic,
        }
    }

    pub fn identity(self) -> Identity {
        Identity::from_seed(&MachineSeed::from_bytes([self as u8 + 1; 32]))
    }

    pub fn user(self) -> String {
        self.identity().login_user()
    }
}

/// A bus and what can be done to it.
#[async_trait]
pub trait Venue: Send + Sync {
    /// A new connection of a member.
    async fn connect(&self, who: Who) -> SharedBus;

    /// Sends a request whose answer shall go to `reply`, as a client of one's own can.
    async fn publish_with_reply(&self, who: Who, subject: &Subject, reply: Subject, payload: Bytes);

    /// The server dies, or nobody reaches it.
    async fn interrupt(&self);

    /// The server is there again, with what it had stored.
    async fn resume(&self);

    /// Two connections to the lab's side, with the streams made.
    async fn lab(&self) -> (SharedBus, SharedBus) {
        let dispatch = self.connect(Who::Dispatch).await;
        dispatch.create_streams().await.unwrap();
        (dispatch, self.connect(Who::Trainer).await)
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

pub struct MemoryVenue {
    bus: MemoryBus,
}

impl MemoryVenue {
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
impl Venue for MemoryVenue {
    async fn connect(&self, who: Who) -> SharedBus {
        self.bus.connect(&who.user(), who.role())
    }

    async fn publish_with_reply(
        &self,
        who: Who,
        subject: &Subject,
        reply: Subject,
        payload: Bytes,
    ) {
        self.bus
            .publish_with_reply(&who.user(), who.role(), subject, reply, &payload)
            .unwrap();
    }

    async fn interrupt(&self) {
        Who::ALL
            .iter()
            .for_each(|who| self.bus.cut_off(&who.user()));
    }

    async fn resume(&self) {
        Who::ALL.iter().for_each(|who| self.bus.heal(&who.user()));
    }
}

pub struct NatsVenue {
    config: ServerConfig,
    url: String,
    server: Mutex<Option<NatsServer>>,
    _dir: tempfile::TempDir,
}

impl NatsVenue {
    pub async fn open() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let members = Who::ALL.map(|who| Member {
            user: who.user(),
            role: who.role(),
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
impl Venue for NatsVenue {
    async fn connect(&self, who: Who) -> SharedBus {
        NatsBus::connect(self.bus_config(&who.identity()))
            .await
            .unwrap()
    }

    async fn publish_with_reply(
        &self,
        who: Who,
        subject: &Subject,
        reply: Subject,
        payload: Bytes,
    ) {
        let seed = who.identity().login_seed().unwrap();
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
