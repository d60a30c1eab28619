//! One version, ready to be sent: a folder whose every byte was checked against the run's learner, its files held open.
//!
//! Files are read through what was opened before the check, so what is put in their place later is not sent; a file that was
//! changed where it lies is noticed by its size and time, and refused. Everything here blocks.

use std::collections::BTreeMap;
use std::fs::{File, Metadata};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use sha2::{Digest, Sha256};

use muster_broadcaster::snapshot::{MANIFEST_FILE, Report, SnapshotError, signed_contents, verify};
use muster_protocol::id::{ContentHash, PeerId, RunId};

/// Bytes read at once.
const PIECE_BYTES: u64 = 256 << 10;

/// Whose versions are believed.
#[derive(Debug, Clone)]
pub struct Trust {
    /// The run's learner.
    pub learner: PeerId,
    /// The run.
    pub run: RunId,
}

/// Why a folder is not served.
#[derive(Debug, thiserror::Error)]
pub enum EditionError {
    /// It is not what was signed.
    #[error("{}: {source}", folder.display())]
    Snapshot {
        folder: PathBuf,
        source: SnapshotError,
    },
    /// A file cannot be read.
    #[error("{} cannot be read: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    /// Somebody writes into the folder.
    #[error("{} was changed while it was checked: leave the folder alone, then ask again", path.display())]
    Changed { path: PathBuf },
}

/// A version, checked.
#[derive(Debug)]
pub struct Edition {
    /// What the learner signed.
    pub report: Report,
    /// The files, the manifest among them.
    pub leaves: BTreeMap<String, Leaf>,
}

/// A file of it.
#[derive(Debug)]
pub struct Leaf {
    /// Its size.
    pub bytes: u64,
    /// SHA-256 of its content in hexadecimal: what hubs name large files by, and what clients check.
    pub sha256: String,
    path: PathBuf,
    file: File,
    seen: Stamp,
}

/// What would differ after a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        }
    }
}

/// The commit that stands for a version: 40 hexadecimal digits, as hubs have them, of the hash of what the learner signed.
pub fn commit(statement: &ContentHash) -> String {
    statement.to_string().chars().take(40).collect()
}

impl Edition {
    /// Opens and checks a folder.
    ///
    /// # Errors
    /// When a file is missing, or a byte differs from what the learner signed.
    pub fn open(folder: &Path, trust: &Trust) -> Result<Self, EditionError> {
        let refused = |source| EditionError::Snapshot {
            folder: folder.to_owned(),
            source,
        };
        let signed = signed_contents(folder, &trust.learner, &trust.run).map_err(refused)?;
        let names = signed.files.keys().map(String::as_str);
        let mut leaves = BTreeMap::new();
        for name in names.chain([MANIFEST_FILE]) {
            leaves.insert(name.to_owned(), Leaf::open(folder.join(name))?);
        }
        let report = verify(folder, &trust.learner, &trust.run).map_err(refused)?;
        if report != signed {
            let path = folder.join(MANIFEST_FILE);
            return Err(EditionError::Changed { path });
        }
        for leaf in leaves.values_mut() {
            leaf.name_content()?;
        }
        Ok(Self { report, leaves })
    }

    /// Its commit.
    pub fn commit(&self) -> String {
        commit(&self.report.statement)
    }

    /// Whether no file was changed since it was checked.
    pub fn is_intact(&self) -> bool {
        let check = |leaf: &Leaf| leaf.check_untouched().is_ok();
        self.leaves.values().all(check)
    }
}

impl Leaf {
    fn open(path: PathBuf) -> Result<Self, EditionError> {
        let failed = |source| EditionError::Read {
            path: path.clone(),
            source,
        };
        let file = File::open(&path).map_err(failed)?;
        let seen = Stamp::of(&file.metadata().map_err(failed)?);
        Ok(Self {
            bytes: seen.bytes,
            sha256: String::new(),
            path,
            file,
            seen,
        })
    }

    /// Hashes what was opened, and holds that it is still what its path leads to: that is what was checked.
    fn name_content(&mut self) -> Result<(), EditionError> {
        let failed = |source| EditionError::Read {
            path: self.path.clone(),
            source,
        };
        let mut digest = Sha256::new();
        let mut at = 0;
        while at < self.bytes {
            let piece = self.read_piece(&(at..self.bytes)).map_err(failed)?;
            at += piece.len() as u64;
            digest.update(&piece);
        }
        let named = std::fs::metadata(&self.path).map_err(failed)?;
        if Stamp::of(&named) != self.seen {
            let path = self.path.clone();
            return Err(EditionError::Changed { path });
        }
        self.sha256 = hex::encode(digest.finalize());
        Ok(())
    }

    /// The first bytes of a range, as many as are read at once.
    ///
    /// # Errors
    /// When the file was changed since it was checked, or cannot be read.
    pub fn read_piece(&self, range: &Range<u64>) -> io::Result<Bytes> {
        self.check_untouched()?;
        // At most the size of a piece, so the cast holds.
        let mut piece = vec![0; range.end.saturating_sub(range.start).min(PIECE_BYTES) as usize];
        self.file.read_exact_at(&mut piece, range.start)?;
        Ok(piece.into())
    }

    fn check_untouched(&self) -> io::Result<()> {
        if Stamp::of(&self.file.metadata()?) == self.seen {
            return Ok(());
        }
        let problem = format!("{} was changed after it was checked", self.path.display());
        Err(io::Error::other(problem))
    }
}
