//! Child processes of one machine's run: started, watched, started again with growing pauses, stopped together.
//!
//! A child is the same binary with the arguments that a person would type on another machine. It dies with this process.
//! One that ends with success is done; one that keeps failing is given up with its own last words.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use muster_protocol::child::{Child, ChildEnd};

use crate::machine::disk_free;
use muster_monitor::screen::{Process, ProcessState};

/// First pause before a child is started again; each further one is twice as long.
const BACKOFF_MIN: Duration = Duration::from_millis(200);
/// Longest pause.
const BACKOFF_MAX: Duration = Duration::from_secs(10);
/// A child that ran this long is healthy: its pauses begin anew.
const HEALTHY: Duration = Duration::from_secs(20);
/// Failures in a row after which a child is given up.
const FAILURES_MAX: u32 = 8;
/// What a process says that ended because the disk is full: starting it again frees none of it.
const DISK_FULL: &str = "No space left on device";
/// With fewer bytes free a process cannot even print why it ended.
const DISK_FREE_MIN: u64 = 64 << 10;
/// How long children may take to drain before they are killed.
const DRAIN: Duration = Duration::from_secs(4);
/// How much of a log's end is searched for last words.
const LAST_WORDS_BYTES: usize = 8 << 10;

/// A child process and how to start it.
#[derive(Debug)]
pub struct Supervised {
    name: String,
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
    /// Starts a child that prints to `log`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub async fn start(name: &str, arguments: Vec<String>, log: PathBuf) -> Result<Self> {
        let child = spawn(name, &arguments, &log).await?;
        Ok(Self {
            name: name.to_owned(),
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

    /// Looks after the child: starts it again when its pause is over.
    ///
    /// # Errors
    /// When it failed too often, with its last words.
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
                "{} stopped: {DISK_FULL}: {free} bytes are free where {} lies: free some and give the same command again",
                self.name,
                self.log.display()
            );
        }
        if self.failures > FAILURES_MAX {
            bail!(
                "{} failed {} times in a row; its last words: {words} (all of them: {})",
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
            "ended: it is started again"
        );
        self.state = State::Waiting {
            until: Instant::now() + pause,
        };
        Ok(())
    }

    /// What the screen shows of it.
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

    /// Whether it has ended with success.
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

/// Asks children to end, and ends those that do not within a few seconds.
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

/// The last line that a process printed.
fn last_words(log: &Path) -> Option<String> {
    let text = std::fs::read(log).ok()?;
    let tail = &text[text.len().saturating_sub(LAST_WORDS_BYTES)..];
    let tail = String::from_utf8_lossy(tail).into_owned();
    let said = tail.lines().rev().find(|line| line.starts_with("muster: "));
    let line = said.or_else(|| tail.lines().rev().find(|line| !line.trim().is_empty()))?;
    Some(line.trim_start_matches("muster: ").to_owned())
}
