//! A NATS server as a child process: found, configured, started, watched, stopped.
//!
//! The server never outlives its parent. The system signals a child when the *thread* that started it ends, so a thread of
//! its own starts the server and lives as long as it does. The port is chosen once and kept in the server's folder, so that
//! clients find the server after a restart. Knows nothing of the messages.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tokio::io::AsyncReadExt;

use crate::child::Child;

use self::config::{LOG_FILE, STORE_DIR};
use self::log::{first_words, is_disk_full, is_port_taken, last_complaint, tail};

mod config;
mod error;
mod find;
mod log;

pub use self::config::{Member, Monitor, ServerConfig, SyncInterval};
pub use self::error::NatsServerError;

const CONFIG_FILE: &str = "nats.conf";
/// The server's output before it opens its log.
const OUTPUT_FILE: &str = "nats.out";
const PORT_FILE: &str = "port";

/// How long a server may take to read its store. Ten gigabytes after a crash take half of this.
const READY_TIMEOUT: Duration = Duration::from_secs(60);
/// How long an earlier server may hold the port after its parent was killed.
const PORT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the server may take to stop before it is killed.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// Interval of looks at a server that starts.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// The server program: `named`, else one on the PATH, else the one in `.venv` of `project`.
///
/// # Errors
/// When no suitable program is there.
pub fn program(named: Option<&Path>, project: &Path) -> Result<PathBuf, NatsServerError> {
    let search_path: Vec<PathBuf> = std::env::var_os("PATH")
        .iter()
        .flat_map(std::env::split_paths)
        .collect();
    find::find(named, &search_path, project)
}

/// A running server. Dropping it without [`NatsServer::stop`] kills it.
pub struct NatsServer {
    dir: PathBuf,
    port: u16,
    child: Child,
    /// Length of the log when this server started: earlier servers wrote the part before.
    log_start: u64,
}

impl NatsServer {
    /// Starts a server and waits until it answers.
    ///
    /// # Errors
    /// One sentence that names what is missing, taken or full, with the last error of the server's log.
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
                    tokio::time::sleep(10 * POLL_INTERVAL).await;
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
                let complaint = self.complaint_or("it printed nothing");
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
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    /// The port in the ports file of this very process: a killed server may have left a ports file of its own.
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

    /// The address for clients.
    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// The process id, `None` once the server has ended.
    pub fn pid(&self) -> Option<u32> {
        self.child.pid()
    }

    /// Waits until the server has ended. Returns its last complaint, or how it ended.
    ///
    /// # Cancel safety
    /// Holds no state.
    pub async fn ended(&self) -> String {
        let how = self.child.ended().await;
        self.complaint_or(&how.to_string())
    }

    /// This server's last error that is not about a client. A full disk shows only here: writes merely time out.
    pub fn complaint(&self) -> Option<String> {
        let log = tail(&self.dir.join(LOG_FILE), self.log_start);
        let output = tail(&self.dir.join(OUTPUT_FILE), 0);
        last_complaint(&log.unwrap_or_default())
            .or_else(|| first_words(&output.unwrap_or_default()))
    }

    /// The error, if the server's disk is full. A stream that failed to write stays refused until the server restarts, even
    /// when there is room again.
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

    /// Stops the server: SIGTERM, a wait, SIGKILL.
    pub async fn stop(self) {
        self.child.terminate();
        if tokio::time::timeout(STOP_TIMEOUT, self.child.ended())
            .await
            .is_err()
        {
            tracing::warn!(dir = %self.dir.display(), "the NATS server does not stop; killing it");
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

/// Makes the folder and its path absolute, since the server may run in another directory. Removes the ports files of killed
/// servers, since process ids are reused.
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

/// Whether a NATS server answers on this port.
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

#[cfg(test)]
mod tests;
