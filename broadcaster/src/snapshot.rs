//! A snapshot: a version as a Hugging Face folder with its own proof. It holds the weights, the files beside them, and a manifest
//! with the learner's signed statements.
//!
//! Weights are one file, or several with an index if one would be too large. Bytes that no signed hash covers are generated from
//! the signed statements; verification generates them again and compares. So no byte of any file can change unnoticed. The same
//! code writes the learner's checkpoints and pulled snapshots. Every function here blocks.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, Write as _};
use std::path::Path;

use bytes::Bytes;
use muster_protocol::envelope::Signed;
use muster_protocol::id::{ContentHash, PeerId, RunId};
use muster_protocol::message::version::{Object, Version};

use self::check::{Joined, check_file, check_folder, pump, weights_error};
use self::layout::{Split, WeightFile};
use self::manifest::Statements;
use crate::store::disk::{self, EntryKind, Existing, NewFolder};
use crate::version::state::stream::{Checked, StreamError, verify_stream};

mod check;
mod error;
mod layout;
mod manifest;
mod names;

pub use self::error::SnapshotError;
pub use self::layout::FOLDER_FILES_MAX;
pub use self::manifest::{Report, run_named};
use self::names::INDEX_FILE;
pub use self::names::{MANIFEST_FILE, WEIGHTS_FILE};

/// Default size limit of one file of weights: that of `huggingface_hub`, 5 GB.
pub const FILE_BYTES_MAX: u64 = 5_000_000_000;

/// The parts of a snapshot.
#[derive(Debug, Clone, Copy)]
pub struct Contents<'a> {
    pub run: &'a RunId,
    pub version: &'a Signed<Version>,
    /// The description of the weights as one file, by any peer.
    pub anchor: &'a Signed<Object>,
    /// A safetensors file.
    pub weights: &'a [u8],
    /// The files beside the weights that the version names, by name.
    pub files: &'a BTreeMap<String, Bytes>,
    /// Size limit of a file of weights; a larger tensor has a file of its own.
    pub file_bytes_max: u64,
}

/// Verifies the parts, and writes a snapshot, whole or not at all.
///
/// # Errors
/// When the parts do not fit together, or the disk fails.
pub fn write(
    folder: &Path,
    contents: &Contents<'_>,
    existing: Existing,
) -> Result<(), SnapshotError> {
    let (version, anchor) = (contents.version, contents.anchor);
    manifest::check(version, anchor, None)?;
    check_named(contents)?;
    let found = contents.weights.len() as u64;
    if found != anchor.body.bytes {
        return Err(SnapshotError::Size {
            file: WEIGHTS_FILE.to_owned(),
            expected: anchor.body.bytes,
            found,
        });
    }
    let checked = verify_stream(&mut &*contents.weights, &version.body, &anchor.body);
    let checked = checked.map_err(|error| match error {
        StreamError::Read(source) => SnapshotError::Read(source),
        StreamError::State(error) => weights_error(error),
    })?;
    let draft = Draft::new(
        contents.run,
        version,
        anchor,
        &checked,
        contents.file_bytes_max,
    )?;
    disk::write_folder(folder, existing, |new| {
        draft.write(new, &mut &*contents.weights)?;
        for (name, bytes) in contents.files {
            new.file(name, bytes.len() as u64, |file| file.write_all(bytes))?;
        }
        Ok(())
    })
}

/// Copies a snapshot, whole or not at all, into files of weights of at most `file_bytes_max` bytes. Verifies both.
///
/// # Errors
/// When the snapshot is not valid, or the disk fails.
pub fn copy(
    from: &Path,
    to: &Path,
    (learner, run): (&PeerId, &RunId),
    file_bytes_max: u64,
    existing: Existing,
) -> Result<Report, SnapshotError> {
    let found = check::list(from)?;
    let source = Statements::read(from, learner, run)?;
    let checked = check_folder(from, &found, &source)?;
    let (version, anchor) = (&source.version, &source.anchor);
    let draft = Draft::new(run, version, anchor, &checked, file_bytes_max)?;
    let files = source.weight_files();
    disk::write_folder(to, existing, |new| {
        draft.write(new, &mut Joined::new(from, source.split.as_ref(), &files))?;
        for entry in &version.body.files {
            let mut file = check::open(&from.join(&entry.name), 0)?;
            new.file(&entry.name, entry.bytes, |to| {
                pump(&mut file, to, entry.bytes)
            })?;
        }
        verify(new.path(), learner, run)
    })
}

/// Reads a folder's manifest and verifies its signatures. Does not read the other files; [`verify`] does.
///
/// # Errors
/// When the manifest is not valid, or another key than the learner's signed it.
pub fn signed_contents(
    folder: &Path,
    learner: &PeerId,
    run: &RunId,
) -> Result<Report, SnapshotError> {
    Ok(Statements::read(folder, learner, run)?.report())
}

/// Verifies a folder against the learner's key: signatures, root, and every byte of every file. Holds one shard of the weights in
/// memory at a time.
///
/// # Errors
/// Names the first wrong file and, if known, its wrong bytes.
pub fn verify(folder: &Path, learner: &PeerId, run: &RunId) -> Result<Report, SnapshotError> {
    let found = check::list(folder)?;
    let statements = Statements::read(folder, learner, run)?;
    check_folder(folder, &found, &statements)?;
    Ok(statements.report())
}

/// Bytes of the weights in a folder, in one file or several. Verifies nothing.
///
/// # Errors
/// When there are no weights, or the folder cannot be listed.
pub fn weights_bytes(folder: &Path) -> Result<u64, SnapshotError> {
    let found = check::list(folder)?;
    let files = found.iter().filter(|entry| entry.kind == EntryKind::File);
    let weights = files.filter(|entry| entry.name.ends_with(".safetensors"));
    match weights.map(|entry| entry.bytes).sum() {
        0 => Err(SnapshotError::missing(WEIGHTS_FILE)),
        bytes => Ok(bytes),
    }
}

/// Checks that the files beside the weights are those that the version names.
fn check_named(contents: &Contents<'_>) -> Result<(), SnapshotError> {
    let version = &contents.version.body;
    let named = version.files.iter().map(|file| file.name.as_str());
    let named: BTreeSet<&str> = named.collect();
    let mut names = contents.files.keys();
    if let Some(file) = names.find(|name| !named.contains(name.as_str())) {
        return Err(SnapshotError::Unexpected { file: file.clone() });
    }
    for entry in &version.files {
        let bytes = contents.files.get(&entry.name);
        let bytes = bytes.ok_or_else(|| SnapshotError::missing(&entry.name))?;
        check_file(entry, bytes.len() as u64, &ContentHash::of(bytes))?;
    }
    Ok(())
}

/// The generated files and the layout of verified weights.
struct Draft {
    manifest: Vec<u8>,
    /// Bytes at the start of the image that no file holds.
    head_bytes: u64,
    files: Vec<WeightFile>,
    index: Option<Vec<u8>>,
}

impl Draft {
    fn new(
        run: &RunId,
        version: &Signed<Version>,
        anchor: &Signed<Object>,
        checked: &Checked,
        bytes_max: u64,
    ) -> Result<Self, SnapshotError> {
        let split = Split::plan(checked, &version.body, &anchor.body, bytes_max);
        let split = split.map_err(|error| SnapshotError::Split {
            bytes: anchor.body.bytes,
            bytes_max,
            problem: error.to_string(),
        })?;
        manifest::check(version, anchor, split.as_ref())?;
        Ok(Self {
            manifest: manifest::render(run, version, anchor, split.as_ref())?,
            head_bytes: split.as_ref().map_or(0, |split| split.head.len() as u64),
            files: manifest::weight_files(&anchor.body, split.as_ref()),
            index: split.map(|split| split.index),
        })
    }

    /// Writes the weights, the index and the manifest. `image` is the weights as one file, read from its start.
    fn write(&self, new: &NewFolder, image: &mut impl Read) -> Result<(), SnapshotError> {
        pump(image, &mut io::sink(), self.head_bytes)?;
        for file in &self.files {
            new.file(&file.name, file.bytes(), |to| {
                to.write_all(&file.head)?;
                pump(image, to, file.data.end - file.data.start)
            })?;
        }
        let index = self.index.as_deref().map(|index| (INDEX_FILE, index));
        for (name, bytes) in index
            .into_iter()
            .chain([(MANIFEST_FILE, &self.manifest[..])])
        {
            new.file(name, bytes.len() as u64, |to| to.write_all(bytes))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
