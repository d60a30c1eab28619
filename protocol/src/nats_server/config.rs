//! The text of the server's configuration: where it listens and stores, who may log in and what each may do.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

use super::{NatsServerError, ServerConfig};
use crate::limits::PAYLOAD_BYTES_MAX;
use crate::subject::{Log, Permissions, Queue};

/// What the server may store: twice the bounds of a run's streams, so that a second run fits.
fn store_bytes_max() -> u64 {
    let queues = Queue::ALL.iter().map(|queue| queue.limits().bytes_max);
    let logs = Log::ALL.iter().map(|log| log.limits().bytes_max);
    2 * queues.chain(logs).sum::<u64>()
}

/// Who listens to the server's state over HTTP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Monitor {
    /// Nobody.
    #[default]
    Off,
    /// Whoever is on this machine, on a free port written into the ports file: it asks for no password.
    On,
}

/// How often the server makes sure that what it stored is on the disk. A killed process loses nothing either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SyncInterval {
    /// Before each confirmation: nothing confirmed is lost with the power either.
    Always,
    /// This often: what was confirmed since is lost with the power.
    Every(Duration),
}

impl Default for SyncInterval {
    fn default() -> Self {
        Self::Every(Duration::from_secs(10))
    }
}

/// The configuration, as the server reads it.
///
/// * `listen_port` — `None` for a free one
pub(super) fn text(
    config: &ServerConfig,
    listen_port: Option<u16>,
) -> Result<String, NatsServerError> {
    let port = listen_port.map_or_else(|| "-1".to_owned(), |port| port.to_string());
    let dir = quoted(&config.dir)?;
    let log = quoted(&config.dir.join(super::LOG_FILE))?;
    let store = quoted(&config.dir.join(super::STORE_DIR))?;
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

/// Subjects of ours need no escape: they hold no quotation mark and no backslash.
fn list(subjects: &[String]) -> String {
    let quoted: Vec<String> = subjects
        .iter()
        .map(|subject| format!("\"{subject}\""))
        .collect();
    format!("[{}]", quoted.join(", "))
}

/// A path as a string of the configuration, whose escapes are fewer than a path may need.
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
            reason: "its name holds characters that the server's configuration cannot".to_owned(),
        }),
    }
}
