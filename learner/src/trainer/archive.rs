//! The trainer's files, so that a kill at any instant loses nothing: group bodies under their hash exactly as signed, each
//! version's published image until no group can come from it, and the optimizer's full state every few steps. Each file is
//! written whole or not at all.

use std::fs;
use std::path::{Path, PathBuf};

use bytes::Bytes;

use muster_protocol::id::{GroupHash, PolicyVersion};

/// Why the archive could not be used.
#[derive(Debug, thiserror::Error)]
#[error(
    "{path} cannot be {verb}: {source}; free space or check its permissions, then start the same command again"
)]
pub struct ArchiveError {
    pub path: PathBuf,
    /// A participle, such as `written`.
    pub verb: &'static str,
    pub source: std::io::Error,
}

/// The trainer's files under the run directory.
#[derive(Debug, Clone)]
pub(super) struct Archive {
    groups: PathBuf,
    images: PathBuf,
    states: PathBuf,
}

const STATE_EXTENSION: &str = "state";
const IMAGE_EXTENSION: &str = "safetensors";

impl Archive {
    /// Opens the archive in a run directory and creates missing folders.
    pub(super) fn open(dir: &Path) -> Result<Self, ArchiveError> {
        let root = dir.join("learner");
        let archive = Self {
            groups: root.join("groups"),
            images: root.join("images"),
            states: root.join("states"),
        };
        for folder in [&archive.groups, &archive.images, &archive.states] {
            fs::create_dir_all(folder).map_err(|source| failed(folder, "made", source))?;
        }
        Ok(archive)
    }

    /// Stores a group's signed envelope under its hash.
    pub(super) fn put_group(&self, group: GroupHash, envelope: &[u8]) -> Result<(), ArchiveError> {
        let path = self.group_path(group);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(|source| failed(folder, "made", source))?;
        }
        write_whole(&path, envelope)
    }

    /// A stored group's envelope.
    pub(super) fn group(&self, group: GroupHash) -> Result<Bytes, ArchiveError> {
        read(&self.group_path(group))
    }

    fn group_path(&self, group: GroupHash) -> PathBuf {
        let name = group.to_string();
        self.groups.join(&name[..2]).join(name)
    }

    /// Stores a version's published image.
    pub(super) fn put_image(
        &self,
        version: PolicyVersion,
        image: &[u8],
    ) -> Result<(), ArchiveError> {
        write_whole(&self.images.join(numbered(version, IMAGE_EXTENSION)), image)
    }

    /// The stored images of `from ..= to`, those that exist.
    pub(super) fn images(
        &self,
        from: PolicyVersion,
        to: PolicyVersion,
    ) -> Result<Vec<(PolicyVersion, Bytes)>, ArchiveError> {
        let mut images = Vec::new();
        for version in (from.0..=to.0).map(PolicyVersion) {
            let path = self.images.join(numbered(version, IMAGE_EXTENSION));
            if path
                .try_exists()
                .map_err(|source| failed(&path, "read", source))?
            {
                images.push((version, read(&path)?));
            }
        }
        Ok(images)
    }

    pub(super) fn state_path(&self, version: PolicyVersion) -> PathBuf {
        self.states.join(numbered(version, STATE_EXTENSION))
    }

    /// The newest version whose full state is kept.
    pub(super) fn newest_state(&self) -> Result<Option<PolicyVersion>, ArchiveError> {
        Ok(self
            .versions(&self.states, STATE_EXTENSION)?
            .into_iter()
            .max())
    }

    /// Removes states before `state`, and images that no group can come from after a restart at `state`.
    pub(super) fn prune(&self, state: PolicyVersion, async_level: u64) -> Result<(), ArchiveError> {
        let oldest_image = PolicyVersion(state.0.saturating_sub(async_level));
        for (folder, extension, oldest) in [
            (&self.states, STATE_EXTENSION, state),
            (&self.images, IMAGE_EXTENSION, oldest_image),
        ] {
            for version in self.versions(folder, extension)? {
                if version < oldest {
                    let path = folder.join(numbered(version, extension));
                    fs::remove_file(&path).map_err(|source| failed(&path, "removed", source))?;
                }
            }
        }
        Ok(())
    }

    fn versions(&self, folder: &Path, extension: &str) -> Result<Vec<PolicyVersion>, ArchiveError> {
        let entries = fs::read_dir(folder).map_err(|source| failed(folder, "read", source))?;
        let mut versions = Vec::new();
        for entry in entries {
            let path = entry
                .map_err(|source| failed(folder, "read", source))?
                .path();
            let is_version = path.extension().is_some_and(|found| found == extension);
            let number = path
                .file_stem()
                .and_then(|stem| stem.to_str()?.parse().ok());
            versions.extend(number.filter(|_| is_version).map(PolicyVersion));
        }
        versions.sort();
        Ok(versions)
    }
}

fn numbered(version: PolicyVersion, extension: &str) -> String {
    format!("{:08}.{extension}", version.0)
}

fn failed(path: &Path, verb: &'static str, source: std::io::Error) -> ArchiveError {
    ArchiveError {
        path: path.to_owned(),
        verb,
        source,
    }
}

fn read(path: &Path) -> Result<Bytes, ArchiveError> {
    fs::read(path)
        .map(Bytes::from)
        .map_err(|source| failed(path, "read", source))
}

/// The file survives the death of every process. Only queues and logs survive a loss of power: their server is told how
/// often to synchronise.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), ArchiveError> {
    let temporary = path.with_extension("part");
    let written = fs::write(&temporary, bytes).and_then(|()| fs::rename(&temporary, path));
    written.map_err(|source| failed(path, "written", source))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_comes_back_and_pruning_keeps_what_a_replay_needs() {
        let dir = tempfile::tempdir().unwrap();
        let archive = Archive::open(dir.path()).unwrap();
        let hash = GroupHash::of(b"group");
        archive.put_group(hash, b"group").unwrap();
        assert_eq!(archive.group(hash).unwrap(), &b"group"[..]);
        for version in 0..=6 {
            archive
                .put_image(PolicyVersion(version), &[version as u8])
                .unwrap();
        }
        for version in [0, 3, 6] {
            fs::write(archive.state_path(PolicyVersion(version)), b"state").unwrap();
        }
        assert_eq!(archive.newest_state().unwrap(), Some(PolicyVersion(6)));
        archive.prune(PolicyVersion(6), 2).unwrap();
        let images = archive.images(PolicyVersion(0), PolicyVersion(9)).unwrap();
        let kept: Vec<u64> = images.iter().map(|(version, _)| version.0).collect();
        assert_eq!(kept, [4, 5, 6]);
        assert!(!archive.state_path(PolicyVersion(3)).exists());
    }

    #[test]
    fn a_missing_group_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = Archive::open(dir.path())
            .unwrap()
            .group(GroupHash([7; 32]))
            .unwrap_err();
        assert!(error.to_string().contains(&"07".repeat(32)), "{error}");
    }
}
