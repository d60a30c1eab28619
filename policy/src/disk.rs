//! The crate's calls to the file system: bounded reads, and writes that are seen whole or not at all.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

/// Largest `config.json` read: the longest in use have a few KiB.
pub(crate) const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// Largest weight file read, 1 TiB. It stops a read that follows a device file; no model comes near it.
pub(crate) const WEIGHTS_BYTES_MAX: u64 = 1 << 40;

/// Why a file was not read or written.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The file is not there.
    #[error("{} is missing; {hint}", path.display())]
    Missing {
        /// Which file.
        path: PathBuf,
        /// What to do about it.
        hint: &'static str,
    },
    /// The file is larger than anything it could rightly hold.
    #[error("{} has {bytes} bytes, above the limit of {bytes_max}; it is not the file that was meant", path.display())]
    TooLarge {
        /// Which file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// Largest size accepted.
        bytes_max: u64,
    },
    /// The operating system refused.
    #[error("{} cannot be {action}: {source}; check the path, its permissions and the free space", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// `read` or `written`.
        action: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// Reads a file of at most `bytes_max` bytes; `hint` tells what to do when it is missing.
///
/// # Errors
/// When the file is missing, too large or unreadable.
pub fn read_file(path: &Path, bytes_max: u64, hint: &'static str) -> Result<Vec<u8>, DiskError> {
    let refused = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => DiskError::Missing {
            path: path.to_owned(),
            hint,
        },
        _ => DiskError::Io {
            path: path.to_owned(),
            action: "read",
            source,
        },
    };
    let file = File::open(path).map_err(refused)?;
    let bytes = file.metadata().map_err(refused)?.len();
    if bytes > bytes_max {
        return Err(DiskError::TooLarge {
            path: path.to_owned(),
            bytes,
            bytes_max,
        });
    }
    let mut contents = Vec::with_capacity(usize::try_from(bytes).unwrap_or(0));
    // The size may have changed since; the limit still holds.
    file.take(bytes_max)
        .read_to_end(&mut contents)
        .map_err(refused)?;
    Ok(contents)
}

/// Writes a file beside its place, flushes it to the disk and renames it, so that a reader (or a process killed at any
/// moment) sees the old file or the new one, never a part.
///
/// # Errors
/// When the disk refuses; the temporary file is then removed and the old file stands.
pub fn write_atomically(
    path: &Path,
    contents: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<(), DiskError> {
    let refused = |source: io::Error| DiskError::Io {
        path: path.to_owned(),
        action: "written",
        source,
    };
    let name = path
        .file_name()
        .ok_or_else(|| refused(io::ErrorKind::InvalidInput.into()))?;
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    // The process id keeps two writers apart.
    let temporary = parent.join(format!(
        ".{}.{}.partial",
        name.to_string_lossy(),
        std::process::id()
    ));
    let written = write_through(&temporary, contents).and_then(|()| fs::rename(&temporary, path));
    if let Err(source) = written {
        // Already failing: a leftover that cannot be removed either changes nothing for the caller.
        fs::remove_file(&temporary).ok();
        return Err(refused(source));
    }
    // The rename itself is durable only once the folder is.
    File::open(parent)
        .and_then(|folder| folder.sync_all())
        .map_err(refused)
}

/// Makes a folder and those above it, if they are not there.
pub(crate) fn create_folder(path: &Path) -> Result<(), DiskError> {
    fs::create_dir_all(path).map_err(|source| DiskError::Io {
        path: path.to_owned(),
        action: "written",
        source,
    })
}

fn write_through(
    path: &Path,
    contents: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> io::Result<()> {
    let mut writer = BufWriter::with_capacity(1 << 20, File::create(path)?);
    contents(&mut writer)?;
    writer.flush()?;
    writer.get_ref().sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_that_fails_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        write_atomically(&path, |file| file.write_all(b"old")).unwrap();
        let failed = write_atomically(&path, |file| {
            file.write_all(b"half")?;
            Err(io::ErrorKind::StorageFull.into())
        });
        assert!(failed.unwrap_err().to_string().contains("state"));
        assert_eq!(read_file(&path, 10, "").unwrap(), b"old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_missing_or_oversized_file_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights");
        let missing = read_file(&path, 10, "download it").unwrap_err().to_string();
        assert!(
            missing.contains("weights") && missing.contains("download it"),
            "{missing}"
        );
        write_atomically(&path, |file| file.write_all(&[0; 11])).unwrap();
        assert!(matches!(
            read_file(&path, 10, ""),
            Err(DiskError::TooLarge { bytes: 11, .. })
        ));
    }
}
