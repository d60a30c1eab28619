//! A child process that dies with its parent, watched by a thread of its own.
//!
//! On Linux a child is tied to the thread that started it. A thread of the runtime's pool may end, and would take the child
//! with it; so a thread of its own starts the child and lives until the child has ended.

use std::fmt;
use std::io;
use std::process::{Command, ExitStatus};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::signal::Signal;
use tokio::sync::{oneshot, watch};

use crate::os;

/// How a child ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChildEnd {
    Exited(ExitStatus),
    /// The thread that watched the child lost it; the text says why.
    Lost(String),
}

impl ChildEnd {
    /// Whether the child exited with status 0.
    pub fn is_success(&self) -> bool {
        matches!(self, Self::Exited(status) if status.success())
    }
}

impl fmt::Display for ChildEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(status) => write!(f, "it ended with {status}"),
            Self::Lost(reason) => write!(f, "it cannot be watched ({reason})"),
        }
    }
}

/// A child process with a thread of its own, which starts it and waits for it.
#[derive(Debug)]
pub struct Child {
    /// `None` once the child was waited for: its id may be another process's by then, which must get no signal.
    pid: Arc<Mutex<Option<u32>>>,
    end: watch::Receiver<Option<ChildEnd>>,
}

impl Child {
    /// Starts `command` under a thread called `name`.
    ///
    /// # Errors
    /// When the system cannot start it.
    pub async fn start(name: &str, mut command: Command) -> io::Result<Self> {
        os::tie_to_parent(&mut command);
        let pid = Arc::new(Mutex::new(None));
        let (started, starting) = oneshot::channel();
        let (ending, end) = watch::channel(None);
        let supervised = pid.clone();
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || supervise(command, &supervised, started, &ending))?;
        match starting.await {
            Ok(Ok(())) => Ok(Self { pid, end }),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(io::Error::other("the thread that starts the child ended")),
        }
    }

    /// The process id, `None` once the child was waited for.
    pub fn pid(&self) -> Option<u32> {
        *lock(&self.pid)
    }

    pub fn has_ended(&self) -> bool {
        self.end.borrow().is_some()
    }

    /// Waits until the child has ended.
    ///
    /// # Cancel safety
    /// Holds no state.
    pub async fn ended(&self) -> ChildEnd {
        let mut end = self.end.clone();
        let ended = end.wait_for(Option::is_some).await;
        let ended = ended.ok().and_then(|ended| ended.clone());
        ended.unwrap_or_else(|| ChildEnd::Lost("its thread ended".to_owned()))
    }

    /// Sends SIGTERM; no effect once the process has ended.
    pub fn terminate(&self) {
        self.signal(Signal::SIGTERM);
    }

    /// Sends SIGKILL; no effect once the process has ended.
    pub fn kill(&self) {
        self.signal(Signal::SIGKILL);
    }

    fn signal(&self, signal: Signal) {
        if let Some(pid) = *lock(&self.pid)
            && let Err(error) = os::signal(pid, signal)
        {
            tracing::debug!(pid, %signal, %error, "signal not sent");
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.signal(Signal::SIGKILL);
    }
}

/// Starts the child and waits until it has ended.
fn supervise(
    mut command: Command,
    pid: &Mutex<Option<u32>>,
    started: oneshot::Sender<io::Result<()>>,
    ending: &watch::Sender<Option<ChildEnd>>,
) {
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            if started.send(Err(error)).is_err() {
                tracing::debug!("child not started, and its caller was cancelled");
            }
            return;
        }
    };
    *lock(pid) = Some(child.id());
    if started.send(Ok(())).is_err() {
        // The caller was cancelled.
        if let Err(error) = child.kill() {
            tracing::debug!(%error, "child not killed");
        }
    }
    if let Err(error) = os::wait_for_end(child.id()) {
        tracing::debug!(%error, "child cannot be watched");
    }
    let mut supervised = lock(pid);
    let ended = match child.wait() {
        Ok(status) => ChildEnd::Exited(status),
        Err(error) => ChildEnd::Lost(error.to_string()),
    };
    *supervised = None;
    drop(supervised);
    ending.send_replace(Some(ended));
}

/// No code panics while it holds the lock, so a poisoned one is still whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
