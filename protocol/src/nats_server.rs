//! A NATS server as a supervised child: found, configured, started, waited for, stopped.
//!
//! It never outlives its parent: it is started by a thread that lives as long as it does and is tied to it, since the
//! system signals a child when the *thread* that started it ends. Its port is chosen once and kept in its folder, so that
//! clients find it after a restart. Knows nothing of what is said over it.

use std::fmt;
use std::fs;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tokio::io::AsyncReadExt;

use crate::child::Child;
use crate::id::RunId;
use crate::subject::Role;

mod config;
mod find;

pub use self::config::{Monitor, SyncInterval};

const CONFIG_FILE: &str = "nats.conf";
const LOG_FILE: &str = "nats.log";
const STORE_DIR: &str = "js";
/// What the server says before it has read its configuration.
const OUTPUT_FILE: &str = "nats.out";
/// Where the port is kept.
const PORT_FILE: &str = "port";

/// How long a server may take to read its store: ten gigabytes after a crash take half of this.
const READY_TIMEOUT: Duration = Duration::from_secs(60);
/// How long an earlier server on the same port may take to go, after its parent was killed.
const PORT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the server may take to stop before it is killed.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// How often its state is looked at while it starts.
const LOOK_AGAIN: Duration = Duration::from_millis(10);
/// The end of a log that is searched for its last complaint.
const LOG_TAIL_BYTES: u64 = 16 << 10;

/// Why there is no server.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NatsServerError {
    /// None on this machine.
    #[error(
        "no nats-server on the PATH or in .venv: run ./setup in Muster's folder, or name one with --nats-server"
    )]
    Missing,
    /// It does not know what is asked of it.
    #[error("{} is version {version}, older than 2.11: run ./setup in Muster's folder, or name a newer one with --nats-server", path.display())]
    TooOld {
        /// Which.
        path: PathBuf,
        /// Its version.
        version: String,
    },
    /// It does not run.
    #[error("{} cannot be used as NATS server ({reason}): run ./setup in Muster's folder, or name another with --nats-server", path.display())]
    Unusable {
        /// Which.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// Its folder cannot be used.
    #[error("the NATS server cannot use {} ({reason}): free space there, make it writable, or choose another folder", path.display())]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A member that cannot log in.
    #[error(
        "`{user}` is not the public key of an nkey user, or a member twice: take it from the member's own credentials"
    )]
    Member {
        /// As it was given.
        user: String,
    },
    /// Somebody else listens there.
    #[error("port {port} is taken by another process: stop that one, or choose another port ({} keeps this one)", kept_in.display())]
    PortTaken {
        /// Which.
        port: u16,
        /// The file to delete.
        kept_in: PathBuf,
    },
    /// It ended while it started.
    #[error("the NATS server in {} ended as it started: {complaint} (more in its nats.log and nats.out)", dir.display())]
    Ended {
        /// Its folder.
        dir: PathBuf,
        /// Its own last words.
        complaint: String,
    },
    /// It runs and does not answer.
    #[error("the NATS server in {} does not answer after {waited_s} s: {complaint} (more in its nats.log)", dir.display())]
    Silent {
        /// Its folder.
        dir: PathBuf,
        /// How long it was waited for.
        waited_s: u64,
        /// Its own last words.
        complaint: String,
    },
}

/// Which server would be run: the one that was named, else one on the PATH, else the one in `.venv` of `project`.
///
/// # Errors
/// When there is none that can be used.
pub fn program(named: Option<&Path>, project: &Path) -> Result<PathBuf, NatsServerError> {
    let search_path: Vec<PathBuf> = std::env::var_os("PATH")
        .iter()
        .flat_map(std::env::split_paths)
        .collect();
    find::find(named, &search_path, project)
}

/// Who may log in, and as what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// The public key of an nkey, `U…`.
    pub user: String,
    /// What it may do.
    pub role: Role,
}

/// What server to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerConfig {
    /// The run that it serves.
    pub run: RunId,
    /// The folder of its configuration, log, port and store.
    pub dir: PathBuf,
    /// Who may log in.
    pub members: Vec<Member>,
    /// The program, if the user named one.
    pub binary: Option<PathBuf>,
    /// Muster's folder, whose `.venv` may hold a server.
    pub project: PathBuf,
    /// The port, if the user named one: otherwise the one kept in `dir`, or a free one.
    pub port: Option<u16>,
    /// How often the disk is made sure of.
    pub sync: SyncInterval,
    /// Who sees its state.
    pub monitor: Monitor,
}

impl ServerConfig {
    /// A server with everything else as usual.
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

/// A server that runs. Dropped without [`NatsServer::stop`] it is killed.
pub struct NatsServer {
    dir: PathBuf,
    port: u16,
    child: Child,
    /// Where this server's words begin in a log that earlier ones wrote before it.
    log_start: u64,
}

impl NatsServer {
    /// Starts a server and returns when it answers.
    ///
    /// # Errors
    /// One sentence that names what is missing, taken or full, with the server's own last words.
    pub async fn start(config: &ServerConfig) -> Result<Self, NatsServerError> {
        let start = Instant::now();
        let mut config = config.clone();
        prepare_dir(&mut config)?;
        let binary = program(config.binary.as_deref(), &config.project)?;
        let port_file = config.dir.join(PORT_FILE);
        let kept_port = fs::read_to_string(&port_file)
            .ok()
            .and_then(|text| text.trim().parse().ok());
        let port = config.port.or(kept_port);
        let config_file = config.dir.join(CONFIG_FILE);
        write(&config_file, &config::text(&config, port)?)?;
        loop {
            let mut server = Self::launch(&config.dir, &binary).await?;
            match server.wait_until_ready(start).await {
                Ok(()) => {
                    write(&port_file, &server.port.to_string())?;
                    return Ok(server);
                }
                Err(NatsServerError::Ended { complaint, .. }) if is_port_taken(&complaint) => {
                    let port = port.unwrap_or_default();
                    if start.elapsed() > PORT_TIMEOUT {
                        return Err(NatsServerError::PortTaken {
                            port,
                            kept_in: port_file,
                        });
                    }
                    tokio::time::sleep(10 * LOOK_AGAIN).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn launch(dir: &Path, binary: &Path) -> Result<Self, NatsServerError> {
        let output =
            fs::File::create(dir.join(OUTPUT_FILE)).map_err(|error| unusable_dir(dir, &error))?;
        let errors = output
            .try_clone()
            .map_err(|error| unusable_dir(dir, &error))?;
        let log_start = fs::metadata(dir.join(LOG_FILE)).map_or(0, |log| log.len());
        let mut command = Command::new(binary);
        command.arg("-c").arg(dir.join(CONFIG_FILE));
        command.stdin(Stdio::null()).stdout(output).stderr(errors);
        let started = Child::start("nats-server", command).await;
        let child = started.map_err(|error| NatsServerError::Unusable {
            path: binary.to_owned(),
            reason: error.to_string(),
        })?;
        Ok(Self {
            dir: dir.to_owned(),
            port: 0,
            child,
            log_start,
        })
    }

    async fn wait_until_ready(&mut self, start: Instant) -> Result<(), NatsServerError> {
        loop {
            let ended = self.child.has_ended();
            if let Some(reason) = self.complaint().filter(|complaint| is_disk_full(complaint)) {
                return Err(NatsServerError::Directory {
                    path: self.dir.clone(),
                    reason,
                });
            }
            if ended {
                let complaint = self.complaint_or("it left no word");
                return Err(NatsServerError::Ended {
                    dir: self.dir.clone(),
                    complaint,
                });
            }
            if let Some(port) = self.announced_port() {
                self.port = port;
                if answers(port).await {
                    return Ok(());
                }
            }
            if start.elapsed() > READY_TIMEOUT {
                let complaint = self.complaint_or("its log holds no complaint");
                let waited_s = start.elapsed().as_secs();
                return Err(NatsServerError::Silent {
                    dir: self.dir.clone(),
                    waited_s,
                    complaint,
                });
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// The port that this very child has written into its ports file; an earlier one, killed, may have left its own.
    fn announced_port(&self) -> Option<u16> {
        let suffix = format!("_{}.ports", self.child.pid()?);
        let entries = fs::read_dir(&self.dir).ok()?;
        let file = entries
            .filter_map(Result::ok)
            .find(|entry| entry.file_name().to_string_lossy().ends_with(&suffix))?;
        let ports: serde_json::Value = serde_json::from_slice(&fs::read(file.path()).ok()?).ok()?;
        ports
            .get("nats")?
            .get(0)?
            .as_str()?
            .rsplit(':')
            .next()?
            .parse()
            .ok()
    }

    /// Where clients connect to.
    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    /// The port that it listens on.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The process, `None` once it has ended.
    pub fn pid(&self) -> Option<u32> {
        self.child.pid()
    }

    /// Returns when the server has ended, with its last words.
    ///
    /// # Cancel safety
    /// Holds no state.
    pub async fn ended(&self) -> String {
        let how = self.child.ended().await;
        self.complaint_or(&how)
    }

    /// This server's last complaint that is not about a client: a full disk shows here, while writes merely time out.
    pub fn complaint(&self) -> Option<String> {
        let log = tail(&self.dir.join(LOG_FILE), self.log_start);
        let output = tail(&self.dir.join(OUTPUT_FILE), 0);
        last_complaint(&log.unwrap_or_default())
            .or_else(|| first_words(&output.unwrap_or_default()))
    }

    /// Why the server cannot store any more, if its disk is full. A stream that failed to write stays refused until the
    /// server is started again, even when there is room.
    pub fn disk_trouble(&self) -> Option<NatsServerError> {
        let reason = self
            .complaint()
            .filter(|complaint| is_disk_full(complaint))?;
        let path = self.dir.clone();
        Some(NatsServerError::Directory { path, reason })
    }

    fn complaint_or(&self, otherwise: &str) -> String {
        self.complaint().unwrap_or_else(|| otherwise.to_owned())
    }

    /// Stops the server: asks it, waits, kills it.
    pub async fn stop(self) {
        self.child.terminate();
        if tokio::time::timeout(STOP_TIMEOUT, self.child.ended())
            .await
            .is_err()
        {
            tracing::warn!(dir = %self.dir.display(), "the NATS server does not stop: killing it");
            self.child.kill();
            self.child.ended().await;
        }
    }
}

impl fmt::Debug for NatsServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NatsServer({} in {})", self.url(), self.dir.display())
    }
}

/// Makes the folder and its path absolute: the server's working directory is none of its business. Removes what a killed
/// server has left, since numbers of processes come again.
fn prepare_dir(config: &mut ServerConfig) -> Result<(), NatsServerError> {
    let dir = config.dir.clone();
    let unusable = |error: io::Error| unusable_dir(&dir, &error);
    fs::create_dir_all(dir.join(STORE_DIR)).map_err(unusable)?;
    config.dir = dir.canonicalize().map_err(unusable)?;
    for entry in fs::read_dir(&config.dir).map_err(unusable)? {
        let path = entry.map_err(unusable)?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "ports")
        {
            fs::remove_file(&path).map_err(unusable)?;
        }
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<(), NatsServerError> {
    fs::write(path, text).map_err(|error| unusable_dir(path, &error))
}

fn unusable_dir(path: &Path, error: &io::Error) -> NatsServerError {
    NatsServerError::Directory {
        path: path.to_owned(),
        reason: error.to_string(),
    }
}

fn is_port_taken(complaint: &str) -> bool {
    complaint.contains("address already in use")
}

/// Whether a NATS server greets on this port.
async fn answers(port: u16) -> bool {
    let greeted = async {
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await?;
        let mut greeting = [0u8; 5];
        stream.read_exact(&mut greeting).await?;
        io::Result::Ok(&greeting == b"INFO ")
    };
    matches!(
        tokio::time::timeout(Duration::from_secs(1), greeted).await,
        Ok(Ok(true))
    )
}

fn is_disk_full(complaint: &str) -> bool {
    complaint.contains("no space left on device")
}

/// The end of a log, from `start` at the earliest; from the beginning when it has been cut since.
fn tail(log: &Path, start: u64) -> io::Result<String> {
    let mut file = fs::File::open(log)?;
    let length = file.metadata()?.len();
    let start = if start > length { 0 } else { start };
    file.seek(SeekFrom::Start(
        start.max(length.saturating_sub(LOG_TAIL_BYTES)),
    ))?;
    let mut tail = Vec::new();
    file.take(LOG_TAIL_BYTES).read_to_end(&mut tail)?;
    Ok(String::from_utf8_lossy(&tail).into_owned())
}

/// The last line that a log calls fatal or an error, without its number, time and level. What is about a connection is a
/// client's fault, and its words may be a client's.
fn last_complaint(log: &str) -> Option<String> {
    let complaint = |line: &str| {
        let words = line
            .split_once("[FTL]")
            .or_else(|| line.split_once("[ERR]"))?
            .1;
        (!line.contains(" - cid:")).then(|| words.trim().to_owned())
    };
    log.lines().rev().find_map(complaint)
}

/// What the server says before it has a log.
fn first_words(output: &str) -> Option<String> {
    let line = output
        .lines()
        .rev()
        .find_map(|line| line.strip_prefix("nats-server:"))?;
    Some(line.trim().to_owned())
}

#[cfg(test)]
mod tests;
