//! Why a NATS server does not run, and the way out.

use std::path::PathBuf;

/// Why no NATS server runs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NatsServerError {
    /// No server was found on this machine.
    #[error(
        "no nats-server on the PATH or in .venv: run ./setup in Muster's folder, or name one with --nats-server"
    )]
    Missing,
    /// Older than [`find`](super::find) accepts.
    #[error("{} is version {version}, older than 2.11: run ./setup in Muster's folder, or name a newer one with --nats-server", path.display())]
    TooOld { path: PathBuf, version: String },
    /// The program cannot be run.
    #[error("{} cannot be used as NATS server ({reason}): run ./setup in Muster's folder, or name another with --nats-server", path.display())]
    Unusable { path: PathBuf, reason: String },
    #[error("the NATS server cannot use {} ({reason}): free some space, make it writable, or choose another folder", path.display())]
    Directory { path: PathBuf, reason: String },
    #[error(
        "`{user}` is not the public key of an nkey user, or is listed twice: take it from the member's credentials"
    )]
    Member { user: String },
    /// Another process listens on the port.
    #[error("port {port} is taken by another process: stop that process, or choose another port ({} holds this one)", kept_in.display())]
    PortTaken {
        port: u16,
        /// The file that holds the port number.
        kept_in: PathBuf,
    },
    /// The server ended during its start.
    #[error("the NATS server in {} ended during its start: {complaint} (more in its nats.log and nats.out)", dir.display())]
    Ended {
        dir: PathBuf,
        /// The last error in the server's log.
        complaint: String,
    },
    /// The server runs but does not answer.
    #[error("the NATS server in {} does not answer after {waited_s} s: {complaint} (more in its nats.log)", dir.display())]
    Silent {
        dir: PathBuf,
        waited_s: u64,
        /// The last error in the server's log.
        complaint: String,
    },
}
