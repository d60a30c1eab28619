//! A child process that dies with its parent, watched by a thread of its own.
//!
//! The thread starts the child and lives until it has ended: on Linux a child is tied to the thread that started it, so a
//! thread of the runtime's pool, which may end, would take the child with it.

use std::io;
use std::process::{Command, ExitStatus};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::signal::Signal;
use tokio::sync::{oneshot, watch};

use crate::os;

/// A child process with a thread of its own, which starts it and waits for it.
#[derive(Debug)]
pub struct Child {
    /// Its number as long as it has not been waited for, so that a signal cannot reach another process.
    pid: Arc<Mutex<Option<u32>>>,
    end: watch::Receiver<Option<String>>,
}

impl Child {
    /// Starts `command` under a thread called `name`.
    ///
    /// # Errors
    /// When the system does not start it.
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
            Err(_) => Err(io::Error::other("the thread that starts it ended")),
        }
    }

    /// Its number as long as it has not been waited for.
    pub fn pid(&self) -> Option<u32> {
        *lock(&self.pid)
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        self.end.borrow().is_some()
    }

    /// Returns how it ended, when it has.
    ///
    /// # Cancel safety
    /// Holds no state.
    pub async fn ended(&self) -> String {
        let mut end = self.end.clone();
        match end.wait_for(Option::is_some).await {
            Ok(how) => how.clone().unwrap_or_default(),
            Err(_) => "the thread that waits for it ended".to_owned(),
        }
    }

    /// Asks it to end.
    pub fn terminate(&self) {
        self.signal(Signal::SIGTERM);
    }

    /// Ends it.
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

/// Starts the child and lives until it has ended.
fn supervise(
    mut command: Command,
    pid: &Mutex<Option<u32>>,
    started: oneshot::Sender<io::Result<()>>,
    ending: &watch::Sender<Option<String>>,
) {
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            if started.send(Err(error)).is_err() {
                tracing::debug!("nobody waits for the child any more");
            }
            return;
        }
    };
    *lock(pid) = Some(child.id());
    if started.send(Ok(())).is_err() {
        // Whoever asked for it was cancelled.
        if let Err(error) = child.kill() {
            tracing::debug!(%error, "child not killed");
        }
    }
    if let Err(error) = os::wait_for_end(child.id()) {
        tracing::debug!(%error, "child cannot be watched");
    }
    let mut supervised = lock(pid);
    let status = child.wait();
    *supervised = None;
    drop(supervised);
    ending.send_replace(Some(how_it_ended(status)));
}

fn how_it_ended(status: io::Result<ExitStatus>) -> String {
    match status {
        Ok(status) => format!("it ended with {status}"),
        Err(error) => format!("it cannot be waited for ({error})"),
    }
}

/// No code panics while it holds the lock, so a poisoned one is still whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
