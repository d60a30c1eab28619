//! Files mapped into memory for reading: bytes are copied once, from the page cache into the form in which they are used,
//! and pages that are not read are never loaded.
//!
//! Invariant: a mapping is dropped when its file has been read, so no data that was verified lies in one.

use std::ops::Deref;
use std::path::Path;

use memmap2::{Mmap, UncheckedAdvice};

use crate::disk::{DiskError, open_file};

/// The bytes of a file.
#[derive(Debug)]
pub(crate) struct Mapping(Option<Mmap>);

impl Mapping {
    /// Maps a file of at most `bytes_max` bytes; `hint` says what to do when it is missing.
    #[allow(unsafe_code)]
    pub(crate) fn open(path: &Path, bytes_max: u64, hint: &'static str) -> Result<Self, DiskError> {
        let (file, bytes) = open_file(path, bytes_max, hint)?;
        // The system refuses to map an empty file.
        if bytes == 0 {
            return Ok(Self(None));
        }
        // SAFETY: the memory is only read, as bytes, and every bit pattern is a valid byte. The types cannot promise that no
        // other process changes the file meanwhile. This crate never does: it writes a new file and renames it over the old
        // one, which leaves the mapped file unchanged. If a foreign program writes into the file, values become garbage, as
        // with any other way of reading; if it truncates the file, a signal ends this process. Neither exposes bytes from
        // outside the file. The mapping is dropped when reading ends, so no verified data lies in it.
        let map = unsafe { Mmap::map(&file) };
        let map = map.map_err(|source| DiskError::failed(path, "read", source))?;
        Ok(Self(Some(map)))
    }

    /// Frees the memory of all pages read so far, where the system takes such advice. A later read loads them again.
    #[allow(unsafe_code)]
    pub(crate) fn free_pages(&self) {
        if let Some(map) = &self.0 {
            // SAFETY: the mapping was never written, so its pages hold nothing that the file does not.
            // Without this advice the memory is merely freed later, with the mapping.
            unsafe { map.unchecked_advise(UncheckedAdvice::DontNeed) }.ok();
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
        mapping.free_pages();
        assert_eq!(&*mapping, b"abc", "the page is loaded again");
        assert!(matches!(
            Mapping::open(&path, 2, ""),
            Err(DiskError::TooLarge { bytes: 3, .. })
        ));
        std::fs::write(&path, b"").unwrap();
        assert_eq!(&*Mapping::open(&path, 3, "").unwrap(), b"");
    }

    #[test]
    fn a_folder_or_a_missing_file_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let missing = Mapping::open(&folder.path().join("f"), 3, "fetch it")
            .unwrap_err()
            .to_string();
        assert!(missing.contains("f is missing; fetch it"), "{missing}");
        let directory = Mapping::open(folder.path(), 3, "").unwrap_err().to_string();
        assert!(directory.contains("cannot be read"), "{directory}");
    }
}
