//! The versions of a live run as a source for the gateway. A version is pulled into a cache on request.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use async_trait::async_trait;

use muster_broadcaster::snapshot::FILE_BYTES_MAX;
use muster_hub::gateway::edition::Trust;
use muster_hub::gateway::source::{Listed, VersionSource};

use super::live::LiveRun;

/// A live run and the folder that keeps its versions.
pub(super) struct LiveVersions {
    pub(super) run: LiveRun,
    /// Folders are named by version and commit, and by the size of files if it is not the default.
    pub(super) cache: PathBuf,
    /// Most folders kept.
    pub(super) keep: usize,
    /// Most bytes of a file of weights.
    pub(super) file_bytes_max: u64,
}

#[async_trait]
impl VersionSource for LiveVersions {
    async fn list(&mut self, _trust: &Trust) -> Result<Vec<Listed>> {
        self.run.refresh().await?;
        let listed = self.run.heard().map(|opened| {
            let body = &opened.version.body;
            Listed::new(body.version, body.root, &opened.version.hash())
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

    fn discard(&self, folder: &Path) {
        if let Err(error) = muster_broadcaster::store::disk::remove(folder) {
            tracing::warn!(%error, "a folder that failed its check stays behind");
        }
    }

    async fn close(self: Box<Self>) {
        self.run.member.leave().await;
    }
}

impl LiveVersions {
    /// Removes the oldest folders to make room for one more.
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
            // Other entries of the folder are not ours.
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
