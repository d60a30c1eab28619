//! One version, ready to be served: a folder checked against the learner's signature, with its files held open.
//!
//! Files are read through the handles opened before the check, so a file that replaces one later is not served. A file changed in
//! place is recognised by its size and time, and refused. All functions block.

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

/// Bytes per read.
const PIECE_BYTES: u64 = 256 << 10;

/// The run and the learner whose versions are served.
#[derive(Debug, Clone)]
pub struct Trust {
    pub learner: PeerId,
    pub run: RunId,
}

/// Why a folder is not served.
#[derive(Debug, thiserror::Error)]
pub enum EditionError {
    /// The folder differs from the signed version.
    #[error("{}: {source}", folder.display())]
    Snapshot {
        folder: PathBuf,
        source: SnapshotError,
    },
    #[error("{} cannot be read: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    /// Another process writes into the folder.
    #[error("{} was changed while it was checked: leave the folder alone, then ask again", path.display())]
    Changed { path: PathBuf },
}

/// A checked version.
#[derive(Debug)]
pub struct Edition {
    /// The signed description.
    pub report: Report,
    /// The files, the manifest among them.
    pub leaves: BTreeMap<String, Leaf>,
}

/// A file of a version.
#[derive(Debug)]
pub struct Leaf {
    pub bytes: u64,
    /// SHA-256 of the content in hexadecimal. Hubs name large files by it, and clients check it.
    pub sha256: String,
    path: PathBuf,
    file: File,
    seen: Stamp,
}

/// Properties of a file that a change alters.
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

/// The commit of a version: the first 40 hexadecimal digits of the hash of the learner's signed statement.
pub fn commit(statement: &ContentHash) -> String {
    statement.to_string().chars().take(40).collect()
}

impl Edition {
    /// Opens and checks a folder.
    ///
    /// # Errors
    /// A file is missing, or a byte differs from the signed version.
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

    pub fn commit(&self) -> String {
        commit(&self.report.statement)
    }

    /// Whether all files are unchanged since the check.
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

    /// Hashes the open file, and checks that its path still leads to it, since the check read the path.
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

    /// The first bytes of a range, at most [`PIECE_BYTES`].
    ///
    /// # Errors
    /// The file was changed since the check, or cannot be read.
    pub fn read_piece(&self, range: &Range<u64>) -> io::Result<Bytes> {
        self.check_untouched()?;
        // The length is at most a piece's, so the cast is exact.
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
