//! The versions that are ready to be served, and a task that prepares others: each newest one, and older ones on request. It
//! prepares one at a time, so that clients cannot overload the machine.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::edition::{Edition, Trust};
use super::revision::Revision;
use super::source::{Listed, VersionSource};

/// Usual and shortest interval between checks for a newer version.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Longest wait for a version that is not ready; clients give up soon after.
const READY_WAIT: Duration = Duration::from_secs(55);
/// Most requests that wait for a version.
const WAITING_MAX: usize = 64;
/// Most versions that are ready at once: their files are held open.
const READY_MAX: usize = 8;

#[derive(Debug, Clone, thiserror::Error)]
pub enum Absent {
    #[error("there is no such version: see / for the available ones")]
    Unknown,
    #[error("the version is being prepared: try again")]
    NotYet,
    /// The version failed its check.
    #[error("{0}")]
    Refused(String),
}

#[derive(Debug, Clone, Default)]
pub struct Inventory {
    /// Ready versions, oldest first.
    ready: Vec<Arc<Edition>>,
    /// Available versions, oldest first.
    pub listed: Arc<[Listed]>,
}

struct Want {
    revision: Revision,
    answer: oneshot::Sender<Result<Arc<Edition>, Absent>>,
}

/// A handle to the ready versions.
#[derive(Debug, Clone)]
pub struct VersionCache {
    inventory: watch::Receiver<Inventory>,
    wants: mpsc::Sender<Want>,
}

/// The task that prepares versions.
pub struct Preparer {
    source: Box<dyn VersionSource>,
    trust: Trust,
    inventory: watch::Sender<Inventory>,
    wants: mpsc::Receiver<Want>,
    looked: Instant,
}

impl VersionCache {
    pub fn inventory(&self) -> Inventory {
        self.inventory.borrow().clone()
    }

    /// A version, prepared first if it is not ready.
    ///
    /// # Errors
    /// The version does not exist, is not ready in time, or failed its check.
    pub async fn find(&self, revision: Revision) -> Result<Arc<Edition>, Absent> {
        if let Some(edition) = self.inventory.borrow().find(&revision) {
            return Ok(edition);
        }
        let (answer, answered) = oneshot::channel();
        let want = Want { revision, answer };
        self.wants.try_send(want).map_err(|_| Absent::NotYet)?;
        match tokio::time::timeout(READY_WAIT, answered).await {
            Ok(Ok(found)) => found,
            Ok(Err(_)) | Err(_) => Err(Absent::NotYet),
        }
    }
}

impl Inventory {
    fn find(&self, revision: &Revision) -> Option<Arc<Edition>> {
        let mut newest_first = self.ready.iter().rev();
        let found = match revision {
            Revision::Latest => newest_first.next(),
            Revision::Number(number) => {
                newest_first.find(|edition| edition.report.version.version.0 == *number)
            }
            Revision::Root(root) => {
                newest_first.find(|edition| edition.report.version.root.to_string() == *root)
            }
            Revision::Commit(commit) => newest_first.find(|edition| edition.commit() == *commit),
        };
        found.filter(|edition| edition.is_intact()).cloned()
    }

    fn listed(&self, revision: &Revision) -> Option<&Listed> {
        let mut newest_first = self.listed.iter().rev();
        match revision {
            Revision::Latest => newest_first.next(),
            Revision::Number(number) => newest_first.find(|listed| listed.version.0 == *number),
            Revision::Root(root) => newest_first.find(|listed| listed.root.to_string() == *root),
            Revision::Commit(commit) => newest_first.find(|listed| listed.commit == *commit),
        }
    }
}

impl Preparer {
    /// Prepares the newest version.
    ///
    /// # Errors
    /// There is no version, or the newest one fails its check.
    pub async fn start(
        source: Box<dyn VersionSource>,
        trust: Trust,
    ) -> Result<(Self, VersionCache)> {
        let (inventory, watched) = watch::channel(Inventory::default());
        let (wants, wanted) = mpsc::channel(WAITING_MAX);
        let mut preparer = Self {
            source,
            trust,
            inventory,
            wants: wanted,
            looked: Instant::now(),
        };
        preparer.look().await?;
        let newest = preparer.inventory.borrow().listed.last().cloned();
        let newest =
            newest.context("there is no version to serve that the run's learner signed")?;
        preparer.make_ready(&newest).await?;
        let cache = VersionCache {
            inventory: watched,
            wants,
        };
        Ok((preparer, cache))
    }

    /// Prepares versions until `shutdown`.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let mut look = tokio::time::interval(LOOK_EVERY);
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                Some(want) = self.wants.recv() => {
                    tokio::select! {
                        biased;
                        () = shutdown.cancelled() => break,
                        () = self.on_want(want) => {}
                    }
                }
                _ = look.tick() => {
                    tokio::select! {
                        biased;
                        () = shutdown.cancelled() => break,
                        () = self.on_look() => {}
                    }
                }
            }
        }
        self.source.close().await;
    }

    async fn on_want(&mut self, want: Want) {
        let found = self.provide(&want.revision).await;
        if want.answer.send(found).is_err() {
            tracing::debug!("whoever asked for a version has gone");
        }
    }

    async fn provide(&mut self, revision: &Revision) -> Result<Arc<Edition>, Absent> {
        // Another request may have prepared it meanwhile.
        if let Some(edition) = self.inventory.borrow().find(revision) {
            return Ok(edition);
        }
        let is_listed = self.inventory.borrow().listed(revision).is_some();
        if !is_listed && self.looked.elapsed() > LOOK_EVERY {
            self.look().await.map_err(refused)?;
        }
        let listed = self.inventory.borrow().listed(revision).cloned();
        let listed = listed.ok_or(Absent::Unknown)?;
        self.make_ready(&listed).await.map_err(refused)
    }

    async fn on_look(&mut self) {
        if let Err(error) = self.look().await {
            return tracing::warn!(error = format!("{error:#}"), "versions are not known");
        }
        let newest = self.inventory.borrow().listed.last().cloned();
        let Some(newest) = newest else { return };
        let is_ready = self
            .inventory
            .borrow()
            .find(&Revision::Commit(newest.commit.clone()));
        if is_ready.is_some() {
            return;
        }
        match self.make_ready(&newest).await {
            Ok(_) => tracing::info!(version = %newest.version, "serving"),
            Err(error) => {
                tracing::warn!(version = %newest.version, error = format!("{error:#}"), "not served")
            }
        }
    }

    async fn look(&mut self) -> Result<()> {
        self.looked = Instant::now();
        let listed: Arc<[Listed]> = self.source.list(&self.trust).await?.into();
        self.inventory
            .send_modify(|inventory| inventory.listed = listed);
        Ok(())
    }

    async fn make_ready(&mut self, listed: &Listed) -> Result<Arc<Edition>> {
        let folder = self.source.folder(listed).await?;
        let opened = self.open(folder.clone()).await;
        if opened.is_err() {
            self.source.discard(&folder);
        }
        let edition = Arc::new(opened?);
        self.inventory.send_modify(|inventory| {
            let ready = &mut inventory.ready;
            ready.retain(|other| other.report.statement != edition.report.statement);
            if ready.len() >= READY_MAX {
                ready.remove(0);
            }
            ready.push(Arc::clone(&edition));
            ready
                .sort_by_key(|edition| (edition.report.version.version, edition.report.generation));
        });
        Ok(edition)
    }

    async fn open(&self, folder: PathBuf) -> Result<Edition> {
        let trust = self.trust.clone();
        let opened = tokio::task::spawn_blocking(move || Edition::open(&folder, &trust));
        Ok(opened.await.context("the check of a folder broke off")??)
    }
}

fn refused(error: anyhow::Error) -> Absent {
    Absent::Refused(format!("{error:#}"))
}
