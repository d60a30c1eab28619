//! A member of a run: its connection to the bus under its own credentials, and its peers. Every role joins this way, on the
//! lab's machines and on a volunteer's.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use muster_broadcaster::follower::{Follow, Follower, Opened, fetch_file, first_version};
use muster_broadcaster::swarm::presence;
use muster_broadcaster::version::squash::SquashConfig;
use muster_broadcaster::version::squasher;
use muster_broadcaster::{ObjectSource, Swarm, SwarmConfig};
use muster_policy::{Config, Tokenizer};
use muster_protocol::bus::nats::{NatsBus, NatsConfig};
use muster_protocol::clock::{SharedClock, SystemClock};
use muster_protocol::credentials::Credentials;
use muster_protocol::dispatch_client::DispatchClient;
use muster_protocol::id::ContentHash;
use muster_protocol::identity::Identity;
use muster_protocol::subject::Role;

/// Longest wait for tasks to end after the role has ended.
const CLOSE_WAIT: Duration = Duration::from_secs(2);

/// A connected member.
pub struct Member {
    pub credentials: Credentials,
    pub identity: Identity,
    pub client: DispatchClient,
    pub swarm: Swarm,
    squash: SquashConfig,
    pub clock: SharedClock,
    /// The member's background tasks.
    pub tracker: TaskTracker,
    /// Cancelled when the process must end.
    pub shutdown: CancellationToken,
}

impl Member {
    /// Connects under the credentials in `path`, which must be for `role`. `nats` replaces the server's address in them.
    ///
    /// # Errors
    /// The credentials, the bus or the address to listen on cannot be used.
    pub async fn join(
        path: &Path,
        role: Role,
        nats: Option<&str>,
        swarm: SwarmConfig,
    ) -> Result<Self> {
        let credentials = Credentials::load(path)?;
        if credentials.role != role {
            let found = credentials.role;
            bail!(
                "{} holds credentials for the role {found}, this command needs the role {role}: name that file with --creds",
                path.display()
            );
        }
        let identity = credentials.identity();
        let login_seed = identity
            .login_seed()
            .context("the login key cannot be used")?;
        let mut config = NatsConfig::new("", &credentials.run, &login_seed, &credentials.name);
        config.urls = match nats {
            Some(url) => vec![url.to_owned()],
            None => credentials.nats.clone(),
        };
        let bus = NatsBus::connect(config).await?;
        let client = DispatchClient::new(
            bus,
            identity.clone(),
            credentials.run.clone(),
            credentials.learner,
        );
        let clock: SharedClock = Arc::new(SystemClock);
        let (tracker, shutdown) = (TaskTracker::new(), CancellationToken::new());
        let squash = swarm.squash;
        let swarm = Swarm::start(
            swarm,
            identity.clone(),
            clock.clone(),
            &tracker,
            shutdown.child_token(),
        )
        .await?;
        presence::keep(
            client.clone(),
            swarm.clone(),
            &tracker,
            shutdown.child_token(),
        );
        crate::signals::cancel_on_signal(&shutdown);
        Ok(Self {
            credentials,
            identity,
            client,
            swarm,
            squash,
            clock,
            tracker,
            shutdown,
        })
    }

    /// The source of this member's weights.
    pub fn source(&self) -> Arc<dyn ObjectSource> {
        Arc::new(self.swarm.clone())
    }

    /// Starts to follow the run's versions, and to make squashed deltas of them if the role does so.
    ///
    /// # Errors
    /// The credentials do not permit it.
    pub async fn follow(&self, follow: Follow) -> Result<Follower> {
        let shutdown = self.shutdown.child_token();
        let (client, source) = (self.client.clone(), self.source());
        let follower = Follower::start(client, source, follow, &self.tracker, shutdown).await?;
        if self.credentials.role.squashes() {
            let (client, swarm) = (self.client.clone(), self.swarm.clone());
            let shutdown = self.shutdown.child_token();
            squasher::keep(
                client,
                swarm,
                follower.watch(),
                self.squash,
                &self.tracker,
                shutdown,
            );
        }
        Ok(follower)
    }

    /// Fetches the run's model without its weights from the peers, and checks it against the run's descriptor.
    ///
    /// # Errors
    /// A file is not received, or has another hash than the descriptor's.
    pub async fn model(&self) -> Result<(Config, Tokenizer, Opened)> {
        let descriptor = self.client.descriptor().await?;
        let opened = first_version(&self.client).await?;
        let config = self.file(&opened, "config.json").await?;
        let tokenizer = self.file(&opened, "tokenizer.json").await?;
        let settings = self.file(&opened, "tokenizer_config.json").await.ok();
        check_hash("config.json", &config, descriptor.body.architecture)?;
        check_hash("tokenizer.json", &tokenizer, descriptor.body.tokenizer)?;
        let chat = match descriptor.body.chat_template {
            None => None,
            Some(expected) => {
                let chat = self.file(&opened, crate::descriptor::CHAT_FILE).await?;
                check_hash(crate::descriptor::CHAT_FILE, &chat, expected)?;
                Some(chat)
            }
        };
        let tokenizer = Tokenizer::with_chat(&tokenizer, settings.as_deref(), chat)?;
        Ok((Config::parse(&config)?, tokenizer, opened))
    }

    async fn file(&self, opened: &Opened, name: &str) -> Result<String> {
        let bytes = fetch_file(self.source().as_ref(), opened, name).await?;
        String::from_utf8(bytes.to_vec()).with_context(|| format!("{name} is not text"))
    }

    /// Ends the member's tasks and closes its connection.
    pub async fn leave(self) {
        self.shutdown.cancel();
        self.tracker.close();
        if tokio::time::timeout(CLOSE_WAIT, self.tracker.wait())
            .await
            .is_err()
        {
            tracing::debug!("some tasks did not end in time");
        }
        self.client.bus().close().await;
    }
}

fn check_hash(name: &str, text: &str, expected: ContentHash) -> Result<()> {
    let found = ContentHash::of(text.as_bytes());
    if found != expected {
        bail!(
            "{name} of the run has hash {}, the run's descriptor says {}",
            found.short(),
            expected.short()
        );
    }
    Ok(())
}
