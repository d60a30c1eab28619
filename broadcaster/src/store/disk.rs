//! The crate's calls to the file system: reads with a bound, and writes after which a reader sees the whole file or folder or
//! nothing of it. Every function here blocks. Knows nothing of shards or versions.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Why the file system refused a call.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    #[error("no space to write {}: {needed} bytes are needed and {free} are free: free some or choose another directory", path.display())]
    Full {
        path: PathBuf,
        /// Bytes to be written.
        needed: u64,
        /// Bytes that the file system has left.
        free: u64,
    },
    /// A file is larger than its bound.
    #[error("{} has more than {limit} bytes, so muster did not write it: remove it", path.display())]
    TooLarge { path: PathBuf, limit: u64 },
    #[error("{} exists already: remove it or choose another directory", path.display())]
    Exists { path: PathBuf },
    /// Any other failure.
    #[error("cannot {action} {} ({source}): check the path and its permissions", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
}

/// Whether a written file must survive a power failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Durability {
    /// It need not: the next reader checks a hash, and fetches a torn file again.
    Cache,
    /// It must: the file is flushed to the device before a reader can see it.
    Durable,
}

/// What to do when the folder exists already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    /// Leave it, and return an error.
    Refuse,
    /// Replace it with the new one.
    Replace,
}

/// Creates a directory and those above it.
///
/// # Errors
/// When the system refuses.
pub(crate) fn create_directory(path: &Path) -> Result<(), DiskError> {
    fs::create_dir_all(path).map_err(|source| failed("create directory", path, 0, source))
}

/// Writes a file beside its place and renames it. A reader, even after a crash, finds the whole file or none.
///
/// # Errors
/// When there is no room or the system refuses. No partial file stays behind.
pub(crate) fn write_file(
    path: &Path,
    bytes: &[u8],
    durability: Durability,
) -> Result<(), DiskError> {
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

/// A folder under its temporary name, which no reader looks for.
#[derive(Debug)]
pub struct NewFolder {
    path: PathBuf,
}

impl NewFolder {
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

/// Writes a folder of files beside its place, flushes it, and renames it after `fill` has succeeded. Returns the result of
/// `fill`.
///
/// # Errors
/// When the folder exists and must stay, there is no room, the system refuses, or `fill` fails. No partial folder stays behind.
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

/// Renames a finished folder to its place. A folder cannot be renamed over one that holds files, so the old one is renamed
/// first. If the process is killed in between, the old folder stays beside the place under its temporary name.
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

/// Reads a file of at most `bytes_max` bytes. `None` if the file does not exist.
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
    // One byte more shows that the file has grown since.
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

/// The kind of an entry of a folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum EntryKind {
    /// A file, or a link to a file: model caches are folders of links.
    File,
    /// A folder, but not a link to one.
    Folder,
    /// A device, a link to a folder, or a broken link.
    Other,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct FolderEntry {
    /// Invalid UTF-8 is replaced.
    pub name: String,
    pub kind: EntryKind,
    pub bytes: u64,
}

/// The entries of a folder, sorted by name. Reads at most `entries_max` of them.
///
/// # Errors
/// When the folder does not exist or the system refuses.
pub(crate) fn list_folder(path: &Path, entries_max: usize) -> Result<Vec<FolderEntry>, DiskError> {
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

/// Removes a file, or a folder with its content. It is no error if the path does not exist.
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

/// Removes a temporary file after a failure that the caller reports; a second failure is only logged.
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

/// A hidden name beside `path`. The process id and a counter keep the names of two writers apart.
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

/// Bytes that the file system of `path` has left for this user; 0 if it does not say.
fn free_bytes(path: &Path) -> u64 {
    // A new file lies in the file system of the nearest directory above it that exists.
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
