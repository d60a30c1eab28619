//! Where versions come from: folders that are here, or a live run, of which they are pulled into a cache. A folder is named by
//! what the learner signed; its other bytes are for [`super::edition`] to check.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use muster_broadcaster::snapshot::{FILE_BYTES_MAX, Report, SnapshotError, signed_contents};
use muster_protocol::id::{PolicyVersion, StateRoot};

use super::edition::{Trust, commit};
use crate::commands::snapshot::live::LiveRun;
use crate::run_dir::RunDir;

/// A version that can be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Listed {
    pub(crate) version: PolicyVersion,
    pub(crate) root: StateRoot,
    pub(crate) commit: String,
}

impl Listed {
    fn of(report: &Report) -> Self {
        Self {
            version: report.version.version,
            root: report.version.root,
            commit: commit(&report.statement),
        }
    }
}

/// Where versions come from.
pub(crate) enum Stock {
    /// The checkpoints of a run directory, which may be running.
    Run(RunDir, Known),
    /// Folders that were pulled.
    Folders(Vec<PathBuf>, Known),
    /// A live run.
    Live(Box<LiveStock>),
}

/// What is known of folders, by path, so that each manifest is read once.
#[derive(Debug, Default)]
pub(crate) struct Known(BTreeMap<PathBuf, Option<Listed>>);

/// A live run, and where its versions are kept.
pub(crate) struct LiveStock {
    pub(crate) run: LiveRun,
    /// Folders are named after version and commit, and the size of files where that is not the usual one.
    pub(crate) cache: PathBuf,
    /// How many are kept.
    pub(crate) keep: usize,
    /// Most bytes of a file of weights.
    pub(crate) file_bytes_max: u64,
}

impl Stock {
    /// The versions that can be had now, oldest first.
    pub(crate) async fn list(&mut self, trust: &Trust) -> Result<Vec<Listed>> {
        match self {
            Self::Run(dir, known) => Ok(known.list(checkpoints(dir)?, trust)),
            Self::Folders(folders, known) => Ok(known.list(folders.clone(), trust)),
            Self::Live(live) => live.list().await,
        }
    }

    /// The folder of a version that was listed.
    pub(crate) async fn folder(&mut self, wanted: &Listed) -> Result<PathBuf> {
        match self {
            Self::Run(_, known) | Self::Folders(_, known) => known.folder(wanted),
            Self::Live(live) => live.folder(wanted).await,
        }
    }

    /// Takes away what a check has refused, where it is ours to take away.
    pub(crate) fn discard(&self, folder: &Path) {
        if let Self::Live(_) = self
            && let Err(error) = muster_broadcaster::store::disk::remove(folder)
        {
            tracing::warn!(%error, "a folder that does not hold stays behind");
        }
    }

    /// Ends what is under way.
    pub(crate) async fn close(self) {
        if let Self::Live(live) = self {
            live.run.seat.leave().await;
        }
    }
}

impl Known {
    fn list(&mut self, paths: Vec<PathBuf>, trust: &Trust) -> Vec<Listed> {
        self.0.retain(|path, _| paths.contains(path));
        for path in paths {
            self.0.entry(path).or_insert_with_key(|path| {
                let signed = signed_contents(path, &trust.learner, &trust.run);
                let refused = |error: SnapshotError| tracing::warn!(folder = %path.display(), %error, "not served");
                signed
                    .map_err(refused)
                    .ok()
                    .map(|report| Listed::of(&report))
            });
        }
        let mut listed: Vec<Listed> = self.0.values().flatten().cloned().collect();
        listed.sort_by_key(|listed| listed.version);
        listed
    }

    fn folder(&self, wanted: &Listed) -> Result<PathBuf> {
        let mut known = self.0.iter();
        let found = known.find(|(_, listed)| listed.as_ref() == Some(wanted));
        let missing = || format!("version {} is not here any more", wanted.version);
        found.map(|(path, _)| path.clone()).with_context(missing)
    }
}

impl LiveStock {
    async fn list(&mut self) -> Result<Vec<Listed>> {
        self.run.refresh().await?;
        let listed = self.run.heard().map(|opened| Listed {
            version: opened.version.body.version,
            root: opened.version.body.root,
            commit: commit(&opened.version.hash()),
        });
        Ok(listed.collect())
    }

    async fn folder(&mut self, wanted: &Listed) -> Result<PathBuf> {
        let short: String = wanted.commit.chars().take(12).collect();
        let mut name = format!("{}-{short}", wanted.version);
        if self.file_bytes_max != FILE_BYTES_MAX {
            name = format!("{name}-{}", self.file_bytes_max);
        }
        let folder = self.cache.join(name);
        if folder.is_dir() {
            return Ok(folder);
        }
        self.make_room()?;
        self.run
            .pull(wanted.version, &folder, self.file_bytes_max)
            .await?;
        Ok(folder)
    }

    /// Removes the oldest folders, so that one more may come.
    fn make_room(&self) -> Result<()> {
        let mut held: Vec<(u64, PathBuf)> = Vec::new();
        let entries = match self.cache.read_dir() {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            entries => entries.with_context(|| self.cache.display().to_string())?,
        };
        for entry in entries {
            let entry = entry.with_context(|| self.cache.display().to_string())?;
            let name = entry.file_name();
            let version = name.to_str().and_then(|name| name.split_once('-'));
            // What somebody else put there is left alone.
            if let Some((version, _)) = version
                && let Ok(version) = version.parse()
            {
                held.push((version, entry.path()));
            }
        }
        held.sort();
        let excess = (held.len() + 1).saturating_sub(self.keep.max(1));
        for (_, folder) in held.into_iter().take(excess) {
            muster_broadcaster::store::disk::remove(&folder)?;
        }
        Ok(())
    }
}

/// The checkpoint folders of a run, oldest first.
fn checkpoints(dir: &RunDir) -> Result<Vec<PathBuf>> {
    let versions = crate::commands::snapshot::versions_on_disk(dir)?;
    if versions.is_empty() {
        bail!(
            "{} has no checkpoint yet: wait for the first, or serve the live run with --creds",
            dir.root().display()
        );
    }
    Ok(versions.into_iter().map(|v| dir.checkpoint(v)).collect())
}
