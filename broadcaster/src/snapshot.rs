//! A version as a Hugging Face folder that carries its own proof: the weights, the files beside them, and a manifest with
//! what the learner signed.
//!
//! The manifest's readable fields are written from the signed envelopes that it holds, and verifying writes them again and
//! compares: so no byte of any file in the folder can change unnoticed. The learner's checkpoints and what an evaluator
//! pulls are written by the same code. Everything here blocks.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;

use bytes::Bytes;
use muster_protocol::envelope::{EnvelopeError, Signed, open};
use muster_protocol::id::{
    ContentHash, DescriptorHash, Generation, ObjectId, PeerId, PolicyVersion, RunId, StateRoot,
};
use muster_protocol::message::version::{
    Content, FILES_MAX, FileEntry, Object, Parameter, Version, VersionRef,
};
use serde::{Deserialize, Serialize};

use crate::disk::{self, DiskError, EntryKind, Existing, FolderEntry};
use crate::state::{StateError, verify_state};

/// The weights, under the name that Hugging Face libraries look for.
pub const WEIGHTS_FILE: &str = "model.safetensors";
/// The proof.
pub const MANIFEST_FILE: &str = "manifest.json";
/// Where `huggingface_hub` keeps its notes in a folder that it downloaded. No library reads weights from there.
const DOWNLOADER_FOLDER: &str = ".cache";
/// What a manifest calls itself; another layout gets another name.
const FORMAT: &str = "muster-snapshot-v1";
/// Largest manifest read: two envelopes of at most 1 MiB in hexadecimal, and a parameter table of 16,384 rows.
const MANIFEST_BYTES_MAX: u64 = 32 << 20;
/// Most names listed of a folder: one more than can be right shows that something is wrong.
const ENTRIES_MAX: usize = FILES_MAX + 4;

/// Why a folder is not a snapshot, or cannot become one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// The disk failed.
    #[error("{0}")]
    Disk(#[from] DiskError),
    /// A file is not there.
    #[error("file {file} is missing: pull the snapshot again")]
    Missing {
        /// Which.
        file: String,
    },
    /// A file that the version does not name, or something that is no file.
    #[error("{file} does not belong to the snapshot: remove it, or pull the snapshot again")]
    Unexpected {
        /// Which.
        file: String,
    },
    /// A file is cut short or too long.
    #[error(
        "file {file} has {found} bytes where the manifest says {expected}: pull the snapshot again"
    )]
    Size {
        /// Which.
        file: String,
        /// As signed.
        expected: u64,
        /// As found.
        found: u64,
    },
    /// A file's content is not what was signed.
    #[error("file {file} differs from what was signed in bytes {}..{}{place}: pull the snapshot again", range.start, range.end)]
    Differs {
        /// Which.
        file: String,
        /// Where: the part that has a hash of its own.
        range: Range<u64>,
        /// The tensor there, in brackets, when there is one.
        place: String,
    },
    /// The manifest is no manifest, or its signatures do not hold.
    #[error(
        "file {MANIFEST_FILE} (bytes 0..{bytes}) does not hold: {problem}: pull the snapshot again"
    )]
    Manifest {
        /// Its size.
        bytes: u64,
        /// What is wrong.
        problem: String,
    },
    /// Somebody else signed the version.
    #[error(
        "version was signed by {found} where the learner of the run is {expected}: it is not this run's"
    )]
    Author {
        /// Who may sign.
        expected: PeerId,
        /// Who did.
        found: PeerId,
    },
    /// The weights are not those of the version, though they are what the anchor describes.
    #[error("file {WEIGHTS_FILE} does not hold: {0}")]
    Weights(StateError),
}

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
}

/// What a snapshot is: as signed, or as verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Which version.
    pub version: VersionRef,
    /// Hash of the statement that the learner signed: it names this version's content and no other.
    pub statement: ContentHash,
    /// Of which start of the learner.
    pub generation: Generation,
    /// Who signed the version.
    pub learner: PeerId,
    /// Who described the weights' file.
    pub described_by: PeerId,
    /// Every file but the manifest, with its size.
    pub files: BTreeMap<String, u64>,
}

#[derive(Debug, Serialize)]
struct Manifest<'a> {
    format: &'static str,
    run: &'a RunId,
    policy_version: PolicyVersion,
    generation: Generation,
    learner: PeerId,
    root: StateRoot,
    parent: Option<StateRoot>,
    descriptor: DescriptorHash,
    weights: Weights,
    files: &'a [FileEntry],
    parameters: &'a [Parameter],
    envelopes: Envelopes,
}

#[derive(Debug, Serialize)]
struct Weights {
    name: &'static str,
    bytes: u64,
    shard_bytes: u32,
    object: ObjectId,
    described_by: PeerId,
}

/// The signed statements, in hexadecimal.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Envelopes {
    version: String,
    anchor: String,
}

/// The part of a manifest that is believed: all else follows from it.
#[derive(Debug, Deserialize)]
struct Proof {
    format: String,
    envelopes: Envelopes,
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
    check_statements(contents.version, contents.anchor)?;
    check_weights(contents.weights, contents.version, contents.anchor)?;
    let version = &contents.version.body;
    let named: BTreeSet<&str> = version
        .files
        .iter()
        .map(|file| file.name.as_str())
        .collect();
    if let Some(file) = contents
        .files
        .keys()
        .find(|name| !named.contains(name.as_str()))
    {
        return Err(SnapshotError::Unexpected { file: file.clone() });
    }
    let manifest = render(contents.run, contents.version, contents.anchor)?;
    let mut files: Vec<(&str, &[u8])> =
        vec![(WEIGHTS_FILE, contents.weights), (MANIFEST_FILE, &manifest)];
    for entry in &version.files {
        let missing = || SnapshotError::Missing {
            file: entry.name.clone(),
        };
        let bytes = contents.files.get(&entry.name).ok_or_else(missing)?;
        check_file(entry, bytes)?;
        files.push((&entry.name, bytes));
    }
    Ok(disk::write_folder(folder, &files, existing)?)
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
    let (version, anchor) = read_statements(folder, learner, run)?;
    Ok(report(&version, &anchor))
}

/// Checks a folder against the learner's key: signatures, root, and every byte of every file.
///
/// # Errors
/// Names the first file that is wrong and, where that is known, its bytes.
pub fn verify(folder: &Path, learner: &PeerId, run: &RunId) -> Result<Report, SnapshotError> {
    let found = disk::list_folder(folder, ENTRIES_MAX)?;
    let (version, anchor) = read_statements(folder, learner, run)?;
    let report = report(&version, &anchor);
    check_listing(&found, &report.files)?;
    for entry in &version.body.files {
        check_file(entry, &read(folder, &entry.name, entry.bytes)?)?;
    }
    check_weights(
        &read(folder, WEIGHTS_FILE, anchor.body.bytes)?,
        &version,
        &anchor,
    )?;
    Ok(report)
}

/// The statements of a folder's manifest, every byte of which was checked.
fn read_statements(
    folder: &Path,
    learner: &PeerId,
    run: &RunId,
) -> Result<(Signed<Version>, Signed<Object>), SnapshotError> {
    let manifest = read(folder, MANIFEST_FILE, MANIFEST_BYTES_MAX)?;
    let (version, anchor) = open_manifest(&manifest, run)?;
    if version.author != *learner {
        return Err(SnapshotError::Author {
            expected: *learner,
            found: version.author,
        });
    }
    check_statements(&version, &anchor)?;
    let rendered = render(run, &version, &anchor)?;
    if let Some(at) = first_difference(&manifest, &rendered) {
        let file = MANIFEST_FILE.to_owned();
        return Err(SnapshotError::Differs {
            file,
            range: at..at + 1,
            place: String::new(),
        });
    }
    Ok((version, anchor))
}

fn report(version: &Signed<Version>, anchor: &Signed<Object>) -> Report {
    let named = version.body.files.iter();
    let mut files: BTreeMap<String, u64> =
        named.map(|file| (file.name.clone(), file.bytes)).collect();
    files.insert(WEIGHTS_FILE.to_owned(), anchor.body.bytes);
    Report {
        version: version.body.reference(),
        statement: version.hash(),
        generation: version.body.generation,
        learner: version.author,
        described_by: anchor.author,
        files,
    }
}

/// The run that a folder says it belongs to: no more than a claim until [`verify`] has been asked about that run.
///
/// # Errors
/// When the manifest is missing or names no run.
pub fn run_named(folder: &Path) -> Result<RunId, SnapshotError> {
    #[derive(Deserialize)]
    struct Named {
        run: RunId,
    }
    let manifest = read(folder, MANIFEST_FILE, MANIFEST_BYTES_MAX)?;
    let named = serde_json::from_slice::<Named>(&manifest);
    named
        .map(|named| named.run)
        .map_err(|error| SnapshotError::Manifest {
            bytes: manifest.len() as u64,
            problem: error.to_string(),
        })
}

/// Whether both statements speak of the same weights, and the files can lie beside them.
fn check_statements(
    version: &Signed<Version>,
    anchor: &Signed<Object>,
) -> Result<(), SnapshotError> {
    let refused = |problem: String| {
        let bytes = (version.bytes.len() + anchor.bytes.len()) as u64;
        Err(SnapshotError::Manifest { bytes, problem })
    };
    let content = Content::Anchor {
        root: version.body.root,
    };
    if anchor.body.content != content || anchor.body.version != version.body.version {
        return refused("the anchor it holds is not one of the version it holds".to_owned());
    }
    let mut names = BTreeSet::from([WEIGHTS_FILE, MANIFEST_FILE]);
    match version
        .body
        .files
        .iter()
        .find(|file| !names.insert(&file.name))
    {
        Some(file) => refused(format!("the version names the file {} twice", file.name)),
        None => Ok(()),
    }
}

fn check_weights(
    weights: &[u8],
    version: &Signed<Version>,
    anchor: &Signed<Object>,
) -> Result<(), SnapshotError> {
    let file = || WEIGHTS_FILE.to_owned();
    verify_state(weights, &version.body, Some(&anchor.body)).map_err(|error| match error {
        StateError::Differs { range, place } => SnapshotError::Differs {
            file: file(),
            range,
            place: format!(" ({place})"),
        },
        StateError::Length {
            needed: expected,
            found,
        } => SnapshotError::Size {
            file: file(),
            expected,
            found,
        },
        error => SnapshotError::Weights(error),
    })
}

fn check_file(entry: &FileEntry, bytes: &[u8]) -> Result<(), SnapshotError> {
    let (file, found) = (entry.name.clone(), bytes.len() as u64);
    if found != entry.bytes {
        return Err(SnapshotError::Size {
            file,
            expected: entry.bytes,
            found,
        });
    }
    if ContentHash::of(bytes) != entry.hash {
        return Err(SnapshotError::Differs {
            file,
            range: 0..found,
            place: String::new(),
        });
    }
    Ok(())
}

/// Whether the folder holds the files that it should, of the right size, and nothing else.
fn check_listing(
    found: &[FolderEntry],
    expected: &BTreeMap<String, u64>,
) -> Result<(), SnapshotError> {
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
        let file = name.clone();
        match found.iter().find(|entry| entry.name == *name) {
            None => return Err(SnapshotError::Missing { file }),
            Some(entry) if entry.bytes != *bytes => {
                return Err(SnapshotError::Size {
                    file,
                    expected: *bytes,
                    found: entry.bytes,
                });
            }
            Some(_) => {}
        }
    }
    Ok(())
}

fn read(folder: &Path, name: &str, bytes_max: u64) -> Result<Vec<u8>, SnapshotError> {
    let read = disk::read_file(&folder.join(name), bytes_max)?;
    read.ok_or_else(|| SnapshotError::Missing {
        file: name.to_owned(),
    })
}

fn open_manifest(
    manifest: &[u8],
    run: &RunId,
) -> Result<(Signed<Version>, Signed<Object>), SnapshotError> {
    let bytes = manifest.len() as u64;
    let refused = |problem: String| SnapshotError::Manifest { bytes, problem };
    let proof: Proof =
        serde_json::from_slice(manifest).map_err(|error| refused(error.to_string()))?;
    if proof.format != FORMAT {
        let shown: String = proof.format.chars().take(64).collect();
        return Err(refused(format!("its format is {shown:?}, not {FORMAT:?}")));
    }
    let envelope = |text: &str| {
        hex::decode(text)
            .map(Bytes::from)
            .map_err(|error| refused(error.to_string()))
    };
    let invalid = |error: EnvelopeError| refused(error.to_string());
    let version = open::<Version>(envelope(&proof.envelopes.version)?, run).map_err(invalid)?;
    let anchor = open::<Object>(envelope(&proof.envelopes.anchor)?, run).map_err(invalid)?;
    Ok((version, anchor))
}

/// The manifest's bytes: always the same for the same envelopes.
fn render(
    run: &RunId,
    version: &Signed<Version>,
    anchor: &Signed<Object>,
) -> Result<Vec<u8>, SnapshotError> {
    let body = &version.body;
    let manifest = Manifest {
        format: FORMAT,
        run,
        policy_version: body.version,
        generation: body.generation,
        learner: version.author,
        root: body.root,
        parent: body.parent,
        descriptor: body.descriptor,
        weights: Weights {
            name: WEIGHTS_FILE,
            bytes: anchor.body.bytes,
            shard_bytes: anchor.body.shard_bytes,
            object: anchor.body.id(),
            described_by: anchor.author,
        },
        files: &body.files,
        parameters: &body.parameters,
        envelopes: Envelopes {
            version: hex::encode(&version.bytes),
            anchor: hex::encode(&anchor.bytes),
        },
    };
    let mut bytes =
        serde_json::to_vec_pretty(&manifest).map_err(|error| SnapshotError::Manifest {
            bytes: 0,
            problem: error.to_string(),
        })?;
    bytes.push(b'\n');
    Ok(bytes)
}

fn first_difference(found: &[u8], expected: &[u8]) -> Option<u64> {
    let common = found
        .iter()
        .zip(expected)
        .take_while(|(a, b)| a == b)
        .count();
    (common < found.len().max(expected.len())).then_some(common as u64)
}

#[cfg(test)]
mod tests;
