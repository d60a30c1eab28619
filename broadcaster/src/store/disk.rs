//! The crate's calls to the file system: bounded reads, files and folders that are seen whole or not at all, and errors
//! that say what is missing.
//!
//! Everything here blocks. Knows nothing of shards or versions.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Why the disk did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// No room.
    #[error("no space to write {}: {needed} bytes are needed and {free} are free: free some or choose another directory", path.display())]
    Full {
        /// What was to be written.
        path: PathBuf,
        /// How much was to be written.
        needed: u64,
        /// What the file system has left.
        free: u64,
    },
    /// A file is larger than anything that belongs there.
    #[error("{} has more than {limit} bytes: it is not what was written there", path.display())]
    TooLarge {
        /// Which.
        path: PathBuf,
        /// Its bound.
        limit: u64,
    },
    /// Something is there already.
    #[error("{} exists already: remove it or choose another directory", path.display())]
    Exists {
        /// Which.
        path: PathBuf,
    },
    /// Anything else.
    #[error("cannot {action} {} ({source}): check the path and its permissions", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Whether what was written must survive a loss of power.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// The next reader checks a hash, so a torn file is only a file to fetch again.
    Cache,
    /// Flushed to the device before it is seen.
    Durable,
}

/// What to do when a folder is there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    /// Leave it and refuse.
    Refuse,
    /// Put the new one in its place.
    Replace,
}

/// Creates a directory and those above it.
///
/// # Errors
/// When the system refuses.
pub fn create_directory(path: &Path) -> Result<(), DiskError> {
    fs::create_dir_all(path).map_err(|source| failed("create directory", path, 0, source))
}

/// Writes a file beside its place and renames it, so that a reader, or a process killed at any moment, finds all of it or
/// nothing.
///
/// # Errors
/// When there is no room or the system refuses; nothing is left behind then.
pub fn write_file(path: &Path, bytes: &[u8], durability: Durability) -> Result<(), DiskError> {
    let temporary = beside(path, "partial");
    let failed = |source| {
        remove_quietly(&temporary);
        failed("write", path, bytes.len() as u64, source)
    };
    fill(&temporary, |file| file.write_all(bytes), durability)
        .and_then(|()| fs::rename(&temporary, path))
        .map_err(failed)?;
    if durability == Durability::Durable {
        sync_parent(path)?;
    }
    Ok(())
}

/// A folder that nobody sees yet.
#[derive(Debug)]
pub struct NewFolder {
    path: PathBuf,
}

impl NewFolder {
    /// Where it is meanwhile.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes a file of `bytes` bytes into it, flushed.
    ///
    /// # Errors
    /// When there is no room, the system refuses, or `write` fails.
    pub fn file(
        &self,
        name: &str,
        bytes: u64,
        write: impl FnOnce(&mut File) -> io::Result<()>,
    ) -> Result<(), DiskError> {
        let path = self.path.join(name);
        fill(&path, write, Durability::Durable)
            .map_err(|source| failed("write", &path, bytes, source))
    }
}

/// Makes a whole folder of files beside its place, flushed, and renames it when `fill` has succeeded; gives what `fill` gave.
///
/// # Errors
/// When something is there already and is to stay, there is no room, the system refuses, or `fill` fails; nothing is left
/// behind then.
pub fn write_folder<T, E: From<DiskError>>(
    path: &Path,
    existing: Existing,
    fill: impl FnOnce(&NewFolder) -> Result<T, E>,
) -> Result<T, E> {
    let occupied = path.symlink_metadata().is_ok();
    if occupied && existing == Existing::Refuse {
        return Err(E::from(DiskError::Exists {
            path: path.to_owned(),
        }));
    }
    if let Some(parent) = parent_of(path) {
        create_directory(parent)?;
    }
    let new = NewFolder {
        path: beside(path, "partial"),
    };
    let written = create_directory(&new.path)
        .map_err(E::from)
        .and_then(|()| fill(&new))
        .and_then(|filled| {
            sync_directory(&new.path)?;
            swap_in(&new.path, path, occupied)?;
            Ok(filled)
        });
    if written.is_err() {
        remove_quietly(&new.path);
    }
    written
}

/// Puts a finished folder in its place. A folder cannot be renamed over another one that holds files, so an old one moves
/// aside first; killed in between, the old one lies beside the place under its temporary name.
fn swap_in(temporary: &Path, path: &Path, occupied: bool) -> Result<(), DiskError> {
    let rename = |from: &Path, to: &Path| {
        fs::rename(from, to).map_err(|source| failed("rename to", to, 0, source))
    };
    if !occupied {
        rename(temporary, path)?;
        return sync_parent(path);
    }
    let aside = beside(path, "replaced");
    rename(path, &aside)?;
    if let Err(error) = rename(temporary, path) {
        rename(&aside, path)?;
        return Err(error);
    }
    sync_parent(path)?;
    remove_quietly(&aside);
    Ok(())
}

/// Reads a file of at most `bytes_max` bytes. `None` when it is not there.
///
/// # Errors
/// When it is larger, or the system refuses.
pub fn read_file(path: &Path, bytes_max: u64) -> Result<Option<Vec<u8>>, DiskError> {
    let failed = |source| failed("read", path, 0, source);
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(failed)?,
    };
    let expected = file.metadata().map_err(failed)?.len();
    if expected > bytes_max {
        return Err(DiskError::TooLarge {
            path: path.to_owned(),
            limit: bytes_max,
        });
    }
    let mut bytes = Vec::with_capacity(expected as usize);
    // One byte more, so that a file that grows meanwhile is seen.
    file.take(bytes_max + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    if bytes.len() as u64 > bytes_max {
        return Err(DiskError::TooLarge {
            path: path.to_owned(),
            limit: bytes_max,
        });
    }
    Ok(Some(bytes))
}

/// What a name in a folder stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum EntryKind {
    /// A file, or a link to one: caches of models are folders of links.
    File,
    /// A folder itself, no link to one.
    Folder,
    /// A device, a link to a folder or to nothing.
    Other,
}

/// A name in a folder, and what it stands for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct FolderEntry {
    /// Its name; what is not UTF-8 is written with replacements.
    pub name: String,
    /// What it stands for.
    pub kind: EntryKind,
    /// Its size.
    pub bytes: u64,
}

/// What is in a folder, in the order of the names. Reads at most `entries_max`.
///
/// # Errors
/// When it is not there or the system refuses.
pub fn list_folder(path: &Path, entries_max: usize) -> Result<Vec<FolderEntry>, DiskError> {
    let failed = |source| failed("list", path, 0, source);
    let mut entries = Vec::new();
    for entry in fs::read_dir(path).map_err(failed)?.take(entries_max) {
        let entry = entry.map_err(failed)?;
        let metadata = entry.metadata().map_err(failed)?;
        let behind = fs::metadata(entry.path()).ok();
        let file = behind.filter(std::fs::Metadata::is_file);
        let kind = match &file {
            Some(_) => EntryKind::File,
            None if metadata.is_dir() => EntryKind::Folder,
            None => EntryKind::Other,
        };
        entries.push(FolderEntry {
            name: entry.file_name().to_string_lossy().into_owned(),
            kind,
            bytes: file.map_or(0, |file| file.len()),
        });
    }
    entries.sort();
    Ok(entries)
}

/// Removes a file or a folder with all that is in it; that it is gone already is no error.
///
/// # Errors
/// When the system refuses.
pub fn remove(path: &Path) -> Result<(), DiskError> {
    let removed = match path.symlink_metadata() {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.map_err(|source| failed("remove", path, 0, source)),
    }
}

/// Cleans up after a failure that is being reported already; what stays is seen in the log.
fn remove_quietly(path: &Path) {
    if let Err(error) = remove(path) {
        tracing::warn!(%error, "temporary file stays behind");
    }
}

fn fill(
    path: &Path,
    write: impl FnOnce(&mut File) -> io::Result<()>,
    durability: Durability,
) -> io::Result<()> {
    let mut file = File::create(path)?;
    write(&mut file)?;
    match durability {
        Durability::Durable => file.sync_all(),
        Durability::Cache => Ok(()),
    }
}

fn sync_directory(path: &Path) -> Result<(), DiskError> {
    let synced = File::open(path).and_then(|directory| directory.sync_all());
    synced.map_err(|source| failed("flush", path, 0, source))
}

fn sync_parent(path: &Path) -> Result<(), DiskError> {
    parent_of(path).map_or(Ok(()), sync_directory)
}

fn parent_of(path: &Path) -> Option<&Path> {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Some(Path::new(".")),
        parent => parent,
    }
}

/// A hidden name beside `path`. The process and a counter keep two writers apart.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{}-{number}.{suffix}", std::process::id()))
}

fn failed(action: &'static str, path: &Path, needed: u64, source: io::Error) -> DiskError {
    let path = path.to_owned();
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            let free = free_bytes(&path);
            DiskError::Full { path, needed, free }
        }
        _ => DiskError::Io {
            action,
            path,
            source,
        },
    }
}

/// What the file system of `path` has left for us; zero when it does not say.
fn free_bytes(path: &Path) -> u64 {
    // A file that is not there yet has the file system of the first directory above it that is.
    path.ancestors()
        .find_map(|place| nix::sys::statvfs::statvfs(place).ok())
        .map_or(0, |stat| {
            stat.blocks_available().saturating_mul(stat.fragment_size())
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_nothing_else_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        write_file(&path, b"one", Durability::Cache).unwrap();
        write_file(&path, b"two", Durability::Durable).unwrap();
        assert_eq!(read_file(&path, 3).unwrap().unwrap(), b"two");
        assert_eq!(list_folder(folder.path(), 10).unwrap().len(), 1);
        assert!(matches!(
            read_file(&path, 2),
            Err(DiskError::TooLarge { limit: 2, .. })
        ));
        assert!(read_file(&folder.path().join("b"), 3).unwrap().is_none());
    }

    fn write(path: &Path, files: &[(&str, &[u8])], existing: Existing) -> Result<(), DiskError> {
        write_folder(path, existing, |new| {
            files.iter().try_for_each(|(name, bytes)| {
                new.file(name, bytes.len() as u64, |file| file.write_all(bytes))
            })
        })
    }

    #[test]
    fn a_folder_is_refused_or_replaced_as_asked() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("new/12");
        write(&path, &[("a", b"1"), ("b", b"2")], Existing::Refuse).unwrap();
        let again = write(&path, &[("a", b"3")], Existing::Refuse);
        assert!(matches!(again, Err(DiskError::Exists { .. })));
        write(&path, &[("a", b"3")], Existing::Replace).unwrap();
        let expected = FolderEntry {
            name: "a".to_owned(),
            kind: EntryKind::File,
            bytes: 1,
        };
        assert_eq!(list_folder(&path, 10).unwrap(), [expected]);
        assert_eq!(
            list_folder(&parent.path().join("new"), 10).unwrap().len(),
            1
        );
    }

    #[test]
    fn a_folder_that_cannot_be_written_leaves_the_old_one() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("12");
        write(&path, &[("a", b"1")], Existing::Refuse).unwrap();
        let bad = write(&path, &[("no/such/place", b"2")], Existing::Replace);
        assert!(matches!(bad, Err(DiskError::Io { .. })));
        assert_eq!(read_file(&path.join("a"), 9).unwrap().unwrap(), b"1");
        assert_eq!(list_folder(parent.path(), 10).unwrap().len(), 1);
    }

    #[test]
    fn a_full_disk_says_how_much_is_needed_and_free() {
        let full = io::Error::from(io::ErrorKind::StorageFull);
        let error = failed("write", Path::new("/no/such/file"), 70, full);
        let DiskError::Full {
            needed: 70, free, ..
        } = error
        else {
            panic!("{error}")
        };
        assert!(free > 0);
    }
}
