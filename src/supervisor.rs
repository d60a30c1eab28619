//! Supervises the child processes of a run on one machine: starts them, restarts those that fail, and stops them together.
//!
//! A child is this binary with the arguments of a member on another machine. It dies with this process. A child that exits with
//! success is not restarted; one that fails too often ends the run with the last line of its log.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use muster_protocol::child::{Child, ChildEnd};
use muster_protocol::subject::Role;

use crate::machine::disk_free;
use muster_monitor::screen::{Process, ProcessState};

/// Pause before the first restart; each further one is twice as long.
const BACKOFF_MIN: Duration = Duration::from_millis(200);
/// Longest pause before a restart.
const BACKOFF_MAX: Duration = Duration::from_secs(10);
/// After this time a child counts as healthy, and its pauses start again from the shortest.
const HEALTHY: Duration = Duration::from_secs(20);
/// Failures in a row that end the run.
const FAILURES_MAX: u32 = 8;
/// Text of ENOSPC in the last line of a child. A restart would not free any space.
const DISK_FULL: &str = "No space left on device";
/// With fewer bytes free a child cannot write its last line.
const DISK_FREE_MIN: u64 = 64 << 10;
/// Longest wait for children to end before they are killed.
const DRAIN: Duration = Duration::from_secs(4);
/// Bytes at the end of a log that are searched for the last line.
const LAST_WORDS_BYTES: usize = 8 << 10;

/// A child process and its command line.
#[derive(Debug)]
pub struct Supervised {
    name: String,
    role: Role,
    arguments: Vec<String>,
    log: PathBuf,
    state: State,
    restarts: u64,
    failures: u32,
}

#[derive(Debug)]
enum State {
    Up { child: Child, since: Instant },
    Waiting { until: Instant },
    Done,
}

impl Supervised {
    /// Starts a child whose output goes to `log`.
    ///
    /// # Errors
    /// The child cannot be started.
    pub async fn start(
        name: &str,
        role: Role,
        arguments: Vec<String>,
        log: PathBuf,
    ) -> Result<Self> {
        let child = spawn(name, &arguments, &log).await?;
        Ok(Self {
            name: name.to_owned(),
            role,
            arguments,
            log,
            state: State::Up {
                child,
                since: Instant::now(),
            },
            restarts: 0,
            failures: 0,
        })
    }

    /// Restarts the child if it failed and its pause is over.
    ///
    /// # Errors
    /// The child failed too often, or the disk is full; the error has its last line.
    pub async fn tend(&mut self) -> Result<()> {
        match &self.state {
            State::Up { child, since } if child.has_ended() => {
                let end = child.ended().await;
                let healthy = since.elapsed() >= HEALTHY;
                self.on_ended(&end, healthy)?;
            }
            State::Waiting { until } if *until <= Instant::now() => {
                let child = spawn(&self.name, &self.arguments, &self.log).await?;
                self.state = State::Up {
                    child,
                    since: Instant::now(),
                };
                self.restarts += 1;
            }
            State::Up { .. } | State::Waiting { .. } | State::Done => {}
        }
        Ok(())
    }

    fn on_ended(&mut self, end: &ChildEnd, healthy: bool) -> Result<()> {
        if end.is_success() {
            self.state = State::Done;
            return Ok(());
        }
        self.failures = if healthy { 1 } else { self.failures + 1 };
        let words = last_words(&self.log).unwrap_or_else(|| end.to_string());
        if words.contains(DISK_FULL) {
            bail!("{} stopped: {words}", self.name);
        }
        if let Some(free) = disk_free(&self.log)
            .ok()
            .filter(|free| *free < DISK_FREE_MIN)
        {
            bail!(
                "{} stopped: {DISK_FULL}: the disk of {} has {free} bytes left; free some space and run the same command again",
                self.name,
                self.log.display()
            );
        }
        if self.failures > FAILURES_MAX {
            bail!(
                "{} failed {} times in a row; last line of its log: {words} (log: {})",
                self.name,
                self.failures,
                self.log.display()
            );
        }
        let pause = BACKOFF_MIN
            .saturating_mul(1 << (self.failures - 1).min(10))
            .min(BACKOFF_MAX);
        tracing::warn!(
            process = self.name,
            %end,
            ?pause,
            "process ended; restarting it"
        );
        self.state = State::Waiting {
            until: Instant::now() + pause,
        };
        Ok(())
    }

    /// The child's state for the display.
    pub fn shown(&self) -> Process {
        let state = match &self.state {
            State::Up { .. } => ProcessState::Up,
            State::Waiting { .. } => ProcessState::Restarting,
            State::Done => ProcessState::Ended,
        };
        Process {
            name: self.name.clone(),
            state,
            restarts: self.restarts,
        }
    }

    pub fn role(&self) -> Role {
        self.role
    }

    /// Whether the child has ended with success.
    pub fn is_done(&self) -> bool {
        matches!(self.state, State::Done)
    }

    fn child(&self) -> Option<&Child> {
        match &self.state {
            State::Up { child, .. } => Some(child),
            State::Waiting { .. } | State::Done => None,
        }
    }
}

/// Sends SIGTERM to all children, and SIGKILL to those that have not ended after [`DRAIN`].
pub async fn stop(children: &[Supervised]) {
    for child in children.iter().filter_map(Supervised::child) {
        child.terminate();
    }
    let deadline = tokio::time::Instant::now() + DRAIN;
    for child in children.iter().filter_map(Supervised::child) {
        if tokio::time::timeout_at(deadline, child.ended())
            .await
            .is_err()
        {
            child.kill();
            child.ended().await;
        }
    }
}

async fn spawn(name: &str, arguments: &[String], log: &Path) -> Result<Child> {
    let program = std::env::current_exe().context("this program's own path is not known")?;
    let output = OpenOptions::new()
        .create(true)
        .append(true)
        .open(log)
        .with_context(|| format!("{} cannot be written", log.display()))?;
    let errors = output.try_clone().context("a log cannot be shared")?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(errors);
    Child::start(name, command)
        .await
        .with_context(|| format!("{name} cannot be started"))
}

/// The last error line of a log, else its last line that is not empty.
fn last_words(log: &Path) -> Option<String> {
    let text = std::fs::read(log).ok()?;
    let tail = &text[text.len().saturating_sub(LAST_WORDS_BYTES)..];
    let tail = String::from_utf8_lossy(tail).into_owned();
    let error = tail.lines().rev().find(|line| line.starts_with("muster: "));
    let line = error.or_else(|| tail.lines().rev().find(|line| !line.trim().is_empty()))?;
    Some(line.trim_start_matches("muster: ").to_owned())
}
