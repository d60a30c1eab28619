//! The sources of a gateway's versions: folders on this disk, or another source such as a live run. A source reads the signed
//! statement alone; [`super::edition`] checks the other bytes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use async_trait::async_trait;

use muster_broadcaster::snapshot::{Report, SnapshotError, signed_contents};
use muster_protocol::id::{ContentHash, PolicyVersion, StateRoot};

use super::edition::{Trust, commit};

/// A version that the source can provide.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    pub version: PolicyVersion,
    pub root: StateRoot,
    /// The first 40 digits of the hash of the learner's statement.
    pub commit: String,
}

impl Listed {
    /// The entry of a version whose learner signed `statement`.
    pub fn new(version: PolicyVersion, root: StateRoot, statement: &ContentHash) -> Self {
        let commit = commit(statement);
        Self {
            version,
            root,
            commit,
        }
    }

    fn of(report: &Report) -> Self {
        Self::new(
            report.version.version,
            report.version.root,
            &report.statement,
        )
    }
}

/// A source of versions, owned by the task of [`super::version_cache`].
#[async_trait]
pub trait VersionSource: Send + Sync {
    /// The versions that can be provided now, oldest first.
    async fn list(&mut self, trust: &Trust) -> Result<Vec<Listed>>;

    /// The folder of a version that was listed.
    async fn folder(&mut self, wanted: &Listed) -> Result<PathBuf>;

    /// Removes a folder that failed its check, if the source made it.
    fn discard(&self, folder: &Path);

    /// Ends what is under way.
    async fn close(self: Box<Self>);
}

/// Lists the paths of folders that hold versions.
type ListFolders = Box<dyn FnMut() -> Result<Vec<PathBuf>> + Send + Sync>;

/// Folders on this disk: checkpoints of a run directory, or snapshots that were pulled.
pub struct Folders {
    paths: ListFolders,
    /// By path, so that each manifest is read once; `None` where it was refused.
    known: BTreeMap<PathBuf, Option<Listed>>,
}

impl Folders {
    /// Folders whose paths `paths` lists anew each time.
    pub fn new(paths: impl FnMut() -> Result<Vec<PathBuf>> + Send + Sync + 'static) -> Self {
        Self {
            paths: Box::new(paths),
            known: BTreeMap::new(),
        }
    }
}

#[async_trait]
impl VersionSource for Folders {
    async fn list(&mut self, trust: &Trust) -> Result<Vec<Listed>> {
        let paths = (self.paths)()?;
        self.known.retain(|path, _| paths.contains(path));
        for path in paths {
            self.known.entry(path).or_insert_with_key(|path| {
                let signed = signed_contents(path, &trust.learner, &trust.run);
                let refused = |error: SnapshotError| tracing::warn!(folder = %path.display(), %error, "not served");
                signed
                    .map_err(refused)
                    .ok()
                    .map(|report| Listed::of(&report))
            });
        }
        let mut listed: Vec<Listed> = self.known.values().flatten().cloned().collect();
        listed.sort_by_key(|listed| listed.version);
        Ok(listed)
    }

    async fn folder(&mut self, wanted: &Listed) -> Result<PathBuf> {
        let mut known = self.known.iter();
        let found = known.find(|(_, listed)| listed.as_ref() == Some(wanted));
        let missing = || format!("version {} is not here any more", wanted.version);
        found.map(|(path, _)| path.clone()).with_context(missing)
    }

    fn discard(&self, _folder: &Path) {}

    async fn close(self: Box<Self>) {}
}
