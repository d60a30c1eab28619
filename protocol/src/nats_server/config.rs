//! The server's configuration: where it listens and stores, which members may log in, and what each may do.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::error::NatsServerError;
use crate::id::RunId;
use crate::limits::PAYLOAD_BYTES_MAX;
use crate::subject::{Log, Permissions, Queue, Role};

pub(super) const LOG_FILE: &str = "nats.log";
pub(super) const STORE_DIR: &str = "js";

/// The server's disk quota: twice the bounds of one run's streams, so that a second run fits.
fn store_bytes_max() -> u64 {
    let queues = Queue::ALL.iter().map(|queue| queue.limits().bytes_max);
    let logs = Log::ALL.iter().map(|log| log.limits().bytes_max);
    2 * queues.chain(logs).sum::<u64>()
}

/// Whether the server shows its state over HTTP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Monitor {
    #[default]
    Off,
    /// To every user of this machine, without a password, on a free port that the server writes into its ports file.
    On,
}

/// How often the server flushes its store to the disk. A killed process loses nothing either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SyncInterval {
    /// Before each confirmation: a power failure loses nothing that was confirmed.
    Always,
    /// At this interval: a power failure loses what was confirmed since the last flush.
    Every(Duration),
}

impl Default for SyncInterval {
    fn default() -> Self {
        Self::Every(Duration::from_secs(10))
    }
}

/// A user that may log in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// The public key of an nkey, `U…`.
    pub user: String,
    pub role: Role,
}

/// How to run a NATS server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerConfig {
    pub run: RunId,
    /// Holds the server's configuration, log, port and store.
    pub dir: PathBuf,
    pub members: Vec<Member>,
    /// The program. `None`: search for one.
    pub binary: Option<PathBuf>,
    /// Muster's folder; its `.venv` may hold a server.
    pub project: PathBuf,
    /// `None`: the port of an earlier start in `dir`, or a free one.
    pub port: Option<u16>,
    pub sync: SyncInterval,
    pub monitor: Monitor,
}

impl ServerConfig {
    /// The defaults: any suitable program, any free port, a sync every 10 s, no monitor.
    pub fn new(run: &RunId, dir: &Path, members: Vec<Member>) -> Self {
        Self {
            run: run.clone(),
            dir: dir.to_owned(),
            members,
            binary: None,
            project: PathBuf::from("."),
            port: None,
            sync: SyncInterval::default(),
            monitor: Monitor::default(),
        }
    }
}

/// The configuration file.
///
/// * `listen_port` — `None` for a free one
pub(super) fn text(
    config: &ServerConfig,
    listen_port: Option<u16>,
) -> Result<String, NatsServerError> {
    let port = listen_port.map_or_else(|| "-1".to_owned(), |port| port.to_string());
    let dir = quoted(&config.dir)?;
    let log = quoted(&config.dir.join(LOG_FILE))?;
    let store = quoted(&config.dir.join(STORE_DIR))?;
    let sync = match config.sync {
        SyncInterval::Always => "always".to_owned(),
        SyncInterval::Every(interval) => format!("\"{}ms\"", interval.as_millis().max(1)),
    };
    let monitor = match config.monitor {
        Monitor::Off => "",
        Monitor::On => "http: \"127.0.0.1:-1\"\n",
    };
    Ok(format!(
        "server_name: \"muster-{run}\"
listen: \"127.0.0.1:{port}\"
{monitor}ports_file_dir: {dir}
log_file: {log}
logfile_size_limit: 64MB
logfile_max_num: 3
max_payload: {PAYLOAD_BYTES_MAX}
jetstream {{
  store_dir: {store}
  max_mem: 64MB
  max_file: {store_bytes_max}
  sync_interval: {sync}
}}
authorization {{
  users: [
{users}  ]
}}
",
        run = config.run,
        store_bytes_max = store_bytes_max(),
        users = users(config)?,
    ))
}

fn users(config: &ServerConfig) -> Result<String, NatsServerError> {
    let mut seen = BTreeSet::new();
    let mut users = String::new();
    for member in &config.members {
        let is_user =
            member.user.starts_with('U') && nkeys::KeyPair::from_public_key(&member.user).is_ok();
        if !is_user || !seen.insert(&member.user) {
            return Err(NatsServerError::Member {
                user: member.user.chars().take(64).collect(),
            });
        }
        let permissions = Permissions::of(member.role, &member.user, &config.run);
        let entry = format!(
            "    {{ nkey: {user}, permissions: {{ publish: {{ allow: {publish} }}, subscribe: {{ allow: {subscribe} }} }} }}",
            user = member.user,
            publish = list(&permissions.publish),
            subscribe = list(&permissions.subscribe),
        );
        if writeln!(users, "{entry}").is_err() {
            return Err(NatsServerError::Member {
                user: member.user.clone(),
            });
        }
    }
    Ok(users)
}

/// Our subjects need no escape: they hold no quotation mark and no backslash.
fn list(subjects: &[String]) -> String {
    let quoted: Vec<String> = subjects
        .iter()
        .map(|subject| format!("\"{subject}\""))
        .collect();
    format!("[{}]", quoted.join(", "))
}

/// A path as a quoted string. The configuration's escapes cannot write every path.
fn quoted(path: &Path) -> Result<String, NatsServerError> {
    match path.to_str() {
        Some(text)
            if !text
                .chars()
                .any(|c| c.is_control() || c == '"' || c == '\\') =>
        {
            Ok(format!("\"{text}\""))
        }
        _ => Err(NatsServerError::Directory {
            path: path.to_owned(),
            reason: "its name holds characters that the server's configuration cannot hold"
                .to_owned(),
        }),
    }
}
