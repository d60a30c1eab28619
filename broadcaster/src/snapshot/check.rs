//! Verifies a folder's bytes against its manifest, as a stream: one shard of the weights at a time.
//!
//! Weights in several files are read as the one signed file: its header comes from the manifest, its tensors from the files. If a
//! shard is wrong, the hashes of the tensors in it tell which file is wrong.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Take};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::slice;

use muster_protocol::id::ContentHash;
use muster_protocol::message::version::{FILES_MAX, FileEntry};

use super::error::SnapshotError;
use super::layout::{FOLDER_FILES_MAX, Split, WeightFile};
use super::manifest::{Statements, first_difference};
use super::names::{DOWNLOADER_FOLDER, INDEX_FILE, MANIFEST_FILE, WEIGHTS_FILE};
use crate::store::disk::{self, EntryKind, FolderEntry};
use crate::version::state::StateError;
use crate::version::state::stream::{Checked, StreamError, verify_stream};

/// Most entries listed: more than any valid snapshot has.
const ENTRIES_MAX: usize = FILES_MAX + FOLDER_FILES_MAX + 5;
/// Buffer for copying and hashing files.
const PIECE_BYTES: u64 = 256 << 10;

/// The entries of a folder.
pub(super) fn list(folder: &Path) -> Result<Vec<FolderEntry>, SnapshotError> {
    Ok(disk::list_folder(folder, ENTRIES_MAX)?)
}

/// Verifies every byte of every file but the manifest. Returns the parts of the weights.
pub(super) fn check_folder(
    folder: &Path,
    found: &[FolderEntry],
    statements: &Statements,
) -> Result<Checked, SnapshotError> {
    check_listing(found, statements)?;
    for entry in &statements.version.body.files {
        let hash = hash_file(folder, &entry.name, 0..entry.bytes)?;
        check_file(entry, entry.bytes, &hash)?;
    }
    if let Some(split) = &statements.split {
        check_start(folder, INDEX_FILE, &split.index, "")?;
        for file in &split.files {
            check_start(folder, &file.name, &file.head, " (header)")?;
        }
    }
    let files = statements.weight_files();
    let mut image = Joined::new(folder, statements.split.as_ref(), &files);
    let (version, anchor) = (&statements.version.body, &statements.anchor.body);
    verify_stream(&mut image, version, anchor).map_err(|error| match error {
        StreamError::Read(source) => SnapshotError::Read(source),
        StreamError::State(error) => explained(folder, statements, error),
    })
}

/// Checks that a file beside the weights is the one that the version names.
pub(super) fn check_file(
    entry: &FileEntry,
    found: u64,
    hash: &ContentHash,
) -> Result<(), SnapshotError> {
    if found != entry.bytes {
        return Err(SnapshotError::Size {
            file: entry.name.clone(),
            expected: entry.bytes,
            found,
        });
    }
    if *hash != entry.hash {
        return Err(SnapshotError::differs(&entry.name, 0..found));
    }
    Ok(())
}

/// Maps an error about the weights to one about a file.
pub(super) fn weights_error(error: StateError) -> SnapshotError {
    match error {
        StateError::Differs { range, place } => SnapshotError::Differs {
            file: WEIGHTS_FILE.to_owned(),
            range,
            place: format!(" ({place})"),
        },
        error => SnapshotError::Weights(error),
    }
}

fn explained(folder: &Path, statements: &Statements, error: StateError) -> SnapshotError {
    let Some(split) = &statements.split else {
        return weights_error(error);
    };
    let range = match &error {
        StateError::Differs { range, .. } => range.clone(),
        _ => 0..statements.anchor.body.bytes,
    };
    match wrong_tensor(folder, statements, split, &range) {
        Ok(Some(named)) | Err(named) => named,
        // The header and the description are left, and both are in the manifest.
        Ok(None) => statements.refused(&format!(
            "the tensors match their signed hashes, but its header does not match its description of the weights ({error})"
        )),
    }
}

/// The first tensor in a range of the image whose hash is wrong.
fn wrong_tensor(
    folder: &Path,
    statements: &Statements,
    split: &Split,
    range: &Range<u64>,
) -> Result<Option<SnapshotError>, SnapshotError> {
    let rows = statements.version.body.parameters.iter();
    let rows: Vec<_> = rows.zip(&split.hashes).collect();
    for span in &split.spans {
        let bytes = span.range.start as u64..span.range.end as u64;
        let common = bytes.start.max(range.start)..bytes.end.min(range.end);
        let row = rows
            .iter()
            .find(|(row, _)| !common.is_empty() && row.name == span.parameter.name);
        let (Some((_, expected)), Some(file)) = (row, split.file_of(span)) else {
            continue;
        };
        if hash_file(folder, &file.name, file.place(&bytes))? != **expected {
            return Ok(Some(SnapshotError::Differs {
                file: file.name.clone(),
                range: file.place(&common),
                place: format!(" (tensor `{}`)", span.parameter.name),
            }));
        }
    }
    Ok(None)
}

/// Checks that the folder holds exactly the right files, each of the right size.
fn check_listing(found: &[FolderEntry], statements: &Statements) -> Result<(), SnapshotError> {
    let expected = statements.report().files;
    for entry in found {
        if entry.kind == EntryKind::Folder && entry.name == DOWNLOADER_FOLDER {
            continue;
        }
        let is_expected = entry.name == MANIFEST_FILE || expected.contains_key(&entry.name);
        if !is_expected || entry.kind != EntryKind::File {
            return Err(SnapshotError::Unexpected {
                file: entry.name.clone(),
            });
        }
    }
    for (name, bytes) in expected {
        match found.iter().find(|entry| entry.name == name) {
            None => return Err(SnapshotError::missing(&name)),
            Some(entry) if entry.bytes != bytes => {
                return Err(SnapshotError::Size {
                    file: name,
                    expected: bytes,
                    found: entry.bytes,
                });
            }
            Some(_) => {}
        }
    }
    Ok(())
}

/// Checks that a file begins with `expected`.
fn check_start(
    folder: &Path,
    name: &str,
    expected: &[u8],
    place: &str,
) -> Result<(), SnapshotError> {
    let mut found = Vec::with_capacity(expected.len());
    let start = open(&folder.join(name), 0).map(|file| file.take(expected.len() as u64));
    start.and_then(|mut start| start.read_to_end(&mut found))?;
    match first_difference(&found, expected) {
        None => Ok(()),
        Some(at) => Err(SnapshotError::Differs {
            file: name.to_owned(),
            range: at..at + 1,
            place: place.to_owned(),
        }),
    }
}

fn hash_file(folder: &Path, name: &str, range: Range<u64>) -> Result<ContentHash, SnapshotError> {
    let mut hasher = blake3::Hasher::new();
    let mut file = open(&folder.join(name), range.start)?;
    let bytes = range.end.saturating_sub(range.start);
    pump(&mut file, &mut hasher, bytes)?;
    Ok(ContentHash(*hasher.finalize().as_bytes()))
}

/// Copies exactly `bytes` bytes.
pub(super) fn pump(
    from: &mut impl Read,
    to: &mut impl io::Write,
    mut bytes: u64,
) -> io::Result<()> {
    // At most the size of a piece, so the casts hold.
    let mut piece = vec![0; bytes.min(PIECE_BYTES) as usize];
    while bytes > 0 {
        let now = &mut piece[..bytes.min(PIECE_BYTES) as usize];
        from.read_exact(now)?;
        to.write_all(now)?;
        bytes -= now.len() as u64;
    }
    Ok(())
}

/// Opens a file at byte `start`.
pub(super) fn open(path: &Path, start: u64) -> io::Result<File> {
    let opened = File::open(path).and_then(|mut file| {
        file.seek(SeekFrom::Start(start))?;
        Ok(file)
    });
    opened.map_err(|error| unread(path, &error))
}

fn unread(path: &Path, error: &io::Error) -> io::Error {
    let problem = format!(
        "cannot read {} ({error}): check the path and its permissions",
        path.display()
    );
    io::Error::new(error.kind(), problem)
}

/// Reads the one signed file from the files that hold its bytes.
pub(super) struct Joined<'a> {
    folder: &'a Path,
    head: &'a [u8],
    files: slice::Iter<'a, WeightFile>,
    open: Option<(PathBuf, Take<File>)>,
}

impl<'a> Joined<'a> {
    pub(super) fn new(folder: &'a Path, split: Option<&'a Split>, files: &'a [WeightFile]) -> Self {
        Self {
            folder,
            head: split.map_or(&[], |split| &split.head),
            files: files.iter(),
            open: None,
        }
    }
}

impl Read for Joined<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if !self.head.is_empty() || buffer.is_empty() {
            return self.head.read(buffer);
        }
        loop {
            if let Some((path, file)) = &mut self.open {
                let read = file.read(buffer).map_err(|error| unread(path, &error))?;
                if read > 0 {
                    return Ok(read);
                }
            }
            let Some(next) = self.files.next() else {
                return Ok(0);
            };
            let path = self.folder.join(&next.name);
            let file = open(&path, next.head.len() as u64)?;
            let bytes = next.data.end - next.data.start;
            self.open = Some((path, file.take(bytes)));
        }
    }
}
