//! Files on the disk: bounded reads, and writes that readers see whole or not at all.

use std::fs::{self, File, Permissions};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Largest `config.json` read: the longest in use have a few KiB.
pub(crate) const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// Largest weight file read, 1 TiB. It stops a read that follows a device file; no model comes near it.
pub(crate) const WEIGHTS_BYTES_MAX: u64 = 1 << 40;

/// Why a file was not read or written.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// `hint` says what to do about it.
    #[error("{} is missing; {hint}", path.display())]
    Missing { path: PathBuf, hint: &'static str },
    #[error("{} has {bytes} bytes, but at most {bytes_max} are read; check that it is the intended file", path.display())]
    TooLarge {
        path: PathBuf,
        bytes: u64,
        bytes_max: u64,
    },
    /// The operating system refused; `action` is `read` or `written`.
    #[error("{} cannot be {action}: {source}; check the path, its permissions and the free space", path.display())]
    Io {
        path: PathBuf,
        action: &'static str,
        source: io::Error,
    },
}

impl DiskError {
    pub(crate) fn failed(path: &Path, action: &'static str, source: io::Error) -> Self {
        Self::Io {
            path: path.to_owned(),
            action,
            source,
        }
    }
}

/// Opens a file of at most `bytes_max` bytes; `hint` says what to do when it is missing.
///
/// Returns the file and its size in bytes.
pub(crate) fn open_file(
    path: &Path,
    bytes_max: u64,
    hint: &'static str,
) -> Result<(File, u64), DiskError> {
    let opened = File::open(path).and_then(|file| Ok((file.metadata()?, file)));
    let (metadata, file) = opened.map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => DiskError::Missing {
            path: path.to_owned(),
            hint,
        },
        _ => DiskError::failed(path, "read", source),
    })?;
    if !metadata.is_file() {
        let source = io::Error::new(io::ErrorKind::InvalidInput, "it is not a file");
        return Err(DiskError::failed(path, "read", source));
    }
    let bytes = metadata.len();
    if bytes > bytes_max {
        return Err(DiskError::TooLarge {
            path: path.to_owned(),
            bytes,
            bytes_max,
        });
    }
    Ok((file, bytes))
}

/// Reads a file of at most `bytes_max` bytes; `hint` says what to do when it is missing.
///
/// # Errors
/// When the file is missing, too large or unreadable.
pub fn read_file(path: &Path, bytes_max: u64, hint: &'static str) -> Result<Vec<u8>, DiskError> {
    let (file, bytes) = open_file(path, bytes_max, hint)?;
    let mut contents = Vec::with_capacity(usize::try_from(bytes).unwrap_or(0));
    // The file may have grown since it was opened; the limit still holds.
    file.take(bytes_max)
        .read_to_end(&mut contents)
        .map_err(|source| DiskError::failed(path, "read", source))?;
    Ok(contents)
}

/// Writes a temporary file beside `path`, flushes it to the disk and renames it, so that a reader sees the old file or the
/// new one, never a part, even if the process is killed.
///
/// # Errors
/// When the disk refuses; the temporary file is then removed and the old file stays.
pub fn write_atomically(
    path: &Path,
    contents: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<(), DiskError> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let write = || {
        let mut file = tempfile::Builder::new()
            .suffix(".partial")
            // The process's umask applies, as to any other file; the library's default is 0600.
            .permissions(Permissions::from_mode(0o666))
            .tempfile_in(parent)?;
        let mut writer = BufWriter::with_capacity(1 << 20, file.as_file_mut());
        contents(&mut writer)?;
        writer.flush()?;
        drop(writer);
        file.as_file().sync_all()?;
        file.persist(path)?;
        // A rename is durable once its folder is.
        File::open(parent)?.sync_all()
    };
    write().map_err(|source| DiskError::failed(path, "written", source))
}

/// Makes a folder and its parents, if they do not exist.
pub(crate) fn create_folder(path: &Path) -> Result<(), DiskError> {
    fs::create_dir_all(path).map_err(|source| DiskError::failed(path, "written", source))
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
    fn a_written_file_has_the_permissions_of_any_other() {
        let folder = tempfile::tempdir().unwrap();
        let (ours, plain) = (folder.path().join("ours"), folder.path().join("plain"));
        write_atomically(&ours, |file| file.write_all(b"x")).unwrap();
        fs::write(&plain, b"x").unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&ours), mode(&plain));
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
