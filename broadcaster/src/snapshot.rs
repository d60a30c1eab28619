//! A version as a Hugging Face folder that carries its own proof: the weights, the files beside them, and a manifest with
//! what the learner signed.
//!
//! Weights are one file, or several with an index where one would be too large. Whatever is not covered by a hash in the
//! signed statements is written from them, and verifying writes it again and compares: so no byte of any file in the folder
//! can change unnoticed. The learner's checkpoints and what an evaluator pulls are written by the same code. Everything here
//! blocks.

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
pub use self::names::{INDEX_FILE, MANIFEST_FILE, WEIGHTS_FILE};

/// Default size limit of one file of weights: that of `huggingface_hub`, 5 GB.
pub const FILE_BYTES_MAX: u64 = 5_000_000_000;

/// What a snapshot is made of.
#[derive(Debug, Clone, Copy)]
pub struct Contents<'a> {
    /// The run that the statements belong to.
    pub run: &'a RunId,
    /// What the learner signed.
    pub version: &'a Signed<Version>,
    /// The description of the weights' file, by whoever made it.
    pub anchor: &'a Signed<Object>,
    /// A safetensors file.
    pub weights: &'a [u8],
    /// The files that the version names, by name.
    pub files: &'a BTreeMap<String, Bytes>,
    /// Most bytes of a file of weights; a larger tensor has a file of its own.
    pub file_bytes_max: u64,
}

/// Writes a snapshot, all of it or nothing, after checking that it is one.
///
/// # Errors
/// When the parts do not belong together, or the disk fails.
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

/// Copies a snapshot, all of it or nothing, in files of at most `file_bytes_max` bytes, however it lies now. Both are verified.
///
/// # Errors
/// When the snapshot does not hold, or the disk fails.
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

/// What a folder's manifest says, after its signatures were checked. The other files are not looked at: their bytes are for
/// [`verify`].
///
/// # Errors
/// When the manifest does not hold, or the version is somebody else's.
pub fn signed_contents(
    folder: &Path,
    learner: &PeerId,
    run: &RunId,
) -> Result<Report, SnapshotError> {
    Ok(Statements::read(folder, learner, run)?.report())
}

/// Checks a folder against the learner's key: signatures, root, and every byte of every file. One shard of the weights is
/// in memory at a time.
///
/// # Errors
/// Names the first file that is wrong and, where that is known, its bytes.
pub fn verify(folder: &Path, learner: &PeerId, run: &RunId) -> Result<Report, SnapshotError> {
    let found = check::list(folder)?;
    let statements = Statements::read(folder, learner, run)?;
    check_folder(folder, &found, &statements)?;
    Ok(statements.report())
}

/// Bytes of the weights in a folder, in one file or several; nothing is checked.
///
/// # Errors
/// When there are none, or the folder cannot be listed.
pub fn weights_bytes(folder: &Path) -> Result<u64, SnapshotError> {
    let found = check::list(folder)?;
    let files = found.iter().filter(|entry| entry.kind == EntryKind::File);
    let weights = files.filter(|entry| entry.name.ends_with(".safetensors"));
    match weights.map(|entry| entry.bytes).sum() {
        0 => Err(SnapshotError::missing(WEIGHTS_FILE)),
        bytes => Ok(bytes),
    }
}

/// Whether the files beside the weights are those that the version names.
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

/// What is to be written of weights that were checked.
struct Draft {
    manifest: Vec<u8>,
    /// Bytes of the image that are in none of the files.
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

    /// Writes the weights, read from their beginning as one file, and what belongs to them.
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
