//! Files mapped into memory for reading: a weight file is looked at where the system keeps it, so that reading a model
//! copies every byte once, into the form in which it is used, and a page that nobody asks for is never read.
//!
//! The crate's one `unsafe` call outside of its kernels. Invariant: a mapping lives no longer than the reading of its file.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::path::Path;

use memmap2::{Mmap, UncheckedAdvice};

use crate::disk::DiskError;

/// The bytes of a file.
#[derive(Debug)]
pub(crate) struct Mapping(Option<Mmap>);

impl Mapping {
    /// Maps a file of at most `bytes_max` bytes; `hint` tells what to do when it is missing.
    #[allow(unsafe_code)]
    pub(crate) fn open(path: &Path, bytes_max: u64, hint: &'static str) -> Result<Self, DiskError> {
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
        let metadata = file.metadata().map_err(refused)?;
        if !metadata.is_file() {
            return Err(refused(io::ErrorKind::InvalidInput.into()));
        }
        let bytes = metadata.len();
        if bytes > bytes_max {
            return Err(DiskError::TooLarge {
                path: path.to_owned(),
                bytes,
                bytes_max,
            });
        }
        // An empty file cannot be mapped, and has no bytes to map.
        if bytes == 0 {
            return Ok(Self(None));
        }
        // SAFETY: the memory is only ever read, as bytes, of which every pattern is valid. What the types cannot promise is
        // that no other process changes the file meanwhile. This crate's own writers never do: they write a new file and
        // rename it over the old one, which leaves the mapped one as it was. A foreign program that writes into the file
        // while it is being read makes the values garbage, as it would with any other way of reading, and one that cuts
        // it short ends this process by a signal; neither lets bytes be read that are not the file's. The mapping is
        // dropped when the reading is done, so nothing verified later lies in it.
        let map = unsafe { Mmap::map(&file) }.map_err(refused)?;
        Ok(Self(Some(map)))
    }

    /// Gives the memory of what was read back, where the system takes advice: it is read again from the system's own
    /// cache of the file if it is looked at once more.
    #[allow(unsafe_code)]
    pub(crate) fn give_back(&self) {
        if let Some(map) = &self.0 {
            // SAFETY: the mapping was never written, so there is nothing in it that the file has not.
            // Where the system does not take it, the memory stays until the mapping ends.
            drop(unsafe { map.unchecked_advise(UncheckedAdvice::DontNeed) });
        }
    }
}

impl Deref for Mapping {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.0.as_deref().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_mapped_whole_and_an_empty_one_has_no_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        std::fs::write(&path, b"abc").unwrap();
        let mapping = Mapping::open(&path, 3, "").unwrap();
        assert_eq!(&*mapping, b"abc");
        mapping.give_back();
        assert_eq!(&*mapping, b"abc", "it is read again");
        assert!(matches!(
            Mapping::open(&path, 2, ""),
            Err(DiskError::TooLarge { bytes: 3, .. })
        ));
        std::fs::write(&path, b"").unwrap();
        assert_eq!(&*Mapping::open(&path, 3, "").unwrap(), b"");
    }

    #[test]
    fn what_is_no_file_or_not_there_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let missing = Mapping::open(&folder.path().join("f"), 3, "fetch it")
            .unwrap_err()
            .to_string();
        assert!(missing.contains("f is missing; fetch it"), "{missing}");
        let directory = Mapping::open(folder.path(), 3, "").unwrap_err().to_string();
        assert!(directory.contains("cannot be read"), "{directory}");
    }
}
