//! The manifest: signed statements in hexadecimal, and readable fields that are generated from them.
//!
//! Reading a manifest generates it again and compares, so that no byte of it can change unnoticed. For weights in several files it
//! also holds the header of the one signed file, the hash of each tensor (the signed root follows from the hashes), and the number
//! of tensors in each file.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use bytes::Bytes;
use muster_protocol::envelope::{EnvelopeError, Signed, open};
use muster_protocol::id::{
    ContentHash, DescriptorHash, Generation, ObjectId, PeerId, PolicyVersion, RunId, StateRoot,
};
use muster_protocol::message::version::{
    Content, FileEntry, Object, Parameter, Version, VersionRef,
};
use serde::{Deserialize, Serialize};

use super::error::SnapshotError;
use super::layout::{Split, WeightFile};
use super::names::{INDEX_FILE, MANIFEST_FILE, WEIGHTS_FILE};
use crate::store::disk;
use crate::version::state::LENGTH_BYTES;

/// The format's name for weights in one file; another format would have another name.
const FORMAT: &str = "muster-snapshot-v1";
/// The format's name for weights in several files.
const FORMAT_SPLIT: &str = "muster-snapshot-v2";
/// Largest manifest read: two envelopes of at most 1 MiB in hexadecimal, a parameter table and hashes of 16,384 rows, and a
/// header of at most 8 MiB as a string.
const MANIFEST_BYTES_MAX: u64 = 64 << 20;

/// A snapshot's identity and files, as signed or as verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    pub version: VersionRef,
    /// Hash of the learner's signed statement: no other version content has it.
    pub statement: ContentHash,
    pub generation: Generation,
    pub learner: PeerId,
    /// The peer that described the weights' file.
    pub described_by: PeerId,
    /// The size in bytes of every file but the manifest.
    pub files: BTreeMap<String, u64>,
}

/// A verified manifest.
#[derive(Debug)]
pub(super) struct Statements {
    pub(super) version: Signed<Version>,
    pub(super) anchor: Signed<Object>,
    /// The layout of weights in several files; none for one file.
    pub(super) split: Option<Split>,
    /// Size of the manifest file.
    pub(super) manifest_bytes: u64,
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
    weights: Weights<'a>,
    files: &'a [FileEntry],
    parameters: &'a [Parameter],
    envelopes: Envelopes,
}

#[derive(Debug, Serialize)]
struct Weights<'a> {
    name: &'static str,
    bytes: u64,
    shard_bytes: u32,
    object: ObjectId,
    described_by: PeerId,
    #[serde(skip_serializing_if = "Option::is_none")]
    split: Option<Files<'a>>,
}

/// The layout of weights in several files.
#[derive(Debug, Serialize)]
struct Files<'a> {
    files: Vec<File<'a>>,
    header: &'a str,
    hashes: &'a [ContentHash],
}

#[derive(Debug, Serialize)]
struct File<'a> {
    name: &'a str,
    bytes: u64,
    tensors: usize,
}

/// The signed statements, in hexadecimal.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Envelopes {
    version: String,
    anchor: String,
}

/// The fields of a manifest that are read; the others are generated from them.
#[derive(Debug, Deserialize)]
struct Proof {
    format: String,
    envelopes: Envelopes,
}

/// The fields that are read for weights in several files. They are checked against the statements.
#[derive(Debug, Deserialize)]
struct SplitProof {
    weights: WeightsProof,
}

#[derive(Debug, Deserialize)]
struct WeightsProof {
    split: FilesProof,
}

#[derive(Debug, Deserialize)]
struct FilesProof {
    files: Vec<FileProof>,
    header: String,
    hashes: Vec<ContentHash>,
}

#[derive(Debug, Deserialize)]
struct FileProof {
    tensors: usize,
}

impl Statements {
    /// Reads and verifies a folder's manifest.
    pub(super) fn read(
        folder: &Path,
        learner: &PeerId,
        run: &RunId,
    ) -> Result<Self, SnapshotError> {
        let manifest = read(folder)?;
        let statements = parse(&manifest, run)?;
        if statements.version.author != *learner {
            return Err(SnapshotError::Author {
                expected: *learner,
                found: statements.version.author,
            });
        }
        let (version, anchor) = (&statements.version, &statements.anchor);
        check(version, anchor, statements.split.as_ref())?;
        let rendered = render(run, version, anchor, statements.split.as_ref())?;
        match first_difference(&manifest, &rendered) {
            Some(at) => Err(SnapshotError::differs(MANIFEST_FILE, at..at + 1)),
            None => Ok(statements),
        }
    }

    /// The files that hold the weights, in the order of their bytes.
    pub(super) fn weight_files(&self) -> Vec<WeightFile> {
        weight_files(&self.anchor.body, self.split.as_ref())
    }

    /// The files that the folder should have.
    pub(super) fn report(&self) -> Report {
        let (version, anchor) = (&self.version, &self.anchor);
        let named = version.body.files.iter();
        let mut files: BTreeMap<String, u64> =
            named.map(|file| (file.name.clone(), file.bytes)).collect();
        for file in self.weight_files() {
            let bytes = file.bytes();
            files.insert(file.name, bytes);
        }
        if let Some(split) = &self.split {
            files.insert(INDEX_FILE.to_owned(), split.index.len() as u64);
        }
        Report {
            version: version.body.reference(),
            statement: version.hash(),
            generation: version.body.generation,
            learner: version.author,
            described_by: anchor.author,
            files,
        }
    }

    /// An error about the manifest as a whole.
    pub(super) fn refused(&self, problem: &str) -> SnapshotError {
        SnapshotError::Manifest {
            bytes: self.manifest_bytes,
            problem: problem.to_owned(),
        }
    }
}

/// The files that hold the weights, in the order of their bytes.
pub(super) fn weight_files(anchor: &Object, split: Option<&Split>) -> Vec<WeightFile> {
    match split {
        Some(split) => split.files.clone(),
        None => vec![WeightFile::whole(anchor.bytes)],
    }
}

/// The run that a folder claims to belong to; [`super::verify`] checks the claim.
///
/// # Errors
/// When the manifest is missing or names no run.
pub fn run_named(folder: &Path) -> Result<RunId, SnapshotError> {
    #[derive(Deserialize)]
    struct Named {
        run: RunId,
    }
    let manifest = read(folder)?;
    let named = serde_json::from_slice::<Named>(&manifest);
    named
        .map(|named| named.run)
        .map_err(|error| SnapshotError::Manifest {
            bytes: manifest.len() as u64,
            problem: error.to_string(),
        })
}

/// Checks that both statements describe the same weights, and that no file names collide.
pub(super) fn check(
    version: &Signed<Version>,
    anchor: &Signed<Object>,
    split: Option<&Split>,
) -> Result<(), SnapshotError> {
    let refused = |problem: String| {
        let bytes = (version.bytes.len() + anchor.bytes.len()) as u64;
        Err(SnapshotError::Manifest { bytes, problem })
    };
    let content = Content::Anchor {
        root: version.body.root,
    };
    if anchor.body.content != content || anchor.body.version != version.body.version {
        return refused("its anchor is not an anchor of its version".to_owned());
    }
    let mut names = BTreeSet::from([WEIGHTS_FILE, MANIFEST_FILE]);
    if let Some(split) = split {
        names.insert(INDEX_FILE);
        names.extend(split.files.iter().map(|file| file.name.as_str()));
    }
    let mut files = version.body.files.iter();
    match files.find(|file| !names.insert(&file.name)) {
        Some(file) => refused(format!("the version names the file {} twice", file.name)),
        None => Ok(()),
    }
}

fn read(folder: &Path) -> Result<Vec<u8>, SnapshotError> {
    let read = disk::read_file(&folder.join(MANIFEST_FILE), MANIFEST_BYTES_MAX)?;
    read.ok_or_else(|| SnapshotError::missing(MANIFEST_FILE))
}

fn parse(manifest: &[u8], run: &RunId) -> Result<Statements, SnapshotError> {
    let bytes = manifest.len() as u64;
    let refused = |problem: String| SnapshotError::Manifest { bytes, problem };
    let unread = |error: serde_json::Error| refused(error.to_string());
    let proof: Proof = serde_json::from_slice(manifest).map_err(unread)?;
    let is_split = match proof.format.as_str() {
        FORMAT => false,
        FORMAT_SPLIT => true,
        other => {
            let shown: String = other.chars().take(64).collect();
            let known = format!("neither {FORMAT:?} nor {FORMAT_SPLIT:?}");
            return Err(refused(format!("its format is {shown:?}, {known}")));
        }
    };
    let envelope = |text: &str| {
        hex::decode(text)
            .map(Bytes::from)
            .map_err(|error| refused(error.to_string()))
    };
    let invalid = |error: EnvelopeError| refused(error.to_string());
    let version = open::<Version>(envelope(&proof.envelopes.version)?, run).map_err(invalid)?;
    let anchor = open::<Object>(envelope(&proof.envelopes.anchor)?, run).map_err(invalid)?;
    let split = match is_split {
        false => None,
        true => {
            let proof: SplitProof = serde_json::from_slice(manifest).map_err(unread)?;
            Some(open_split(proof.weights.split, &version.body, &anchor.body).map_err(refused)?)
        }
    };
    Ok(Statements {
        version,
        anchor,
        split,
        manifest_bytes: bytes,
    })
}

fn open_split(proof: FilesProof, version: &Version, anchor: &Object) -> Result<Split, String> {
    let length = (proof.header.len() as u64).to_le_bytes();
    let head = [&length[..], proof.header.as_bytes()].concat();
    let counts: Vec<usize> = proof.files.iter().map(|file| file.tensors).collect();
    Split::open(head, proof.hashes, &counts, version, anchor).map_err(|error| error.to_string())
}

/// The manifest's bytes. The same envelopes and files always give the same bytes.
pub(super) fn render(
    run: &RunId,
    version: &Signed<Version>,
    anchor: &Signed<Object>,
    split: Option<&Split>,
) -> Result<Vec<u8>, SnapshotError> {
    let refused = |problem: String| SnapshotError::Manifest { bytes: 0, problem };
    let body = &version.body;
    let files = split.map(files).transpose().map_err(refused)?;
    let (format, name) = match split {
        Some(_) => (FORMAT_SPLIT, INDEX_FILE),
        None => (FORMAT, WEIGHTS_FILE),
    };
    let manifest = Manifest {
        format,
        run,
        policy_version: body.version,
        generation: body.generation,
        learner: version.author,
        root: body.root,
        parent: body.parent,
        descriptor: body.descriptor,
        weights: Weights {
            name,
            bytes: anchor.body.bytes,
            shard_bytes: anchor.body.shard_bytes,
            object: anchor.body.id(),
            described_by: anchor.author,
            split: files,
        },
        files: &body.files,
        parameters: &body.parameters,
        envelopes: Envelopes {
            version: hex::encode(&version.bytes),
            anchor: hex::encode(&anchor.bytes),
        },
    };
    let mut bytes =
        serde_json::to_vec_pretty(&manifest).map_err(|error| refused(error.to_string()))?;
    bytes.push(b'\n');
    Ok(bytes)
}

fn files<'a>(split: &'a Split) -> Result<Files<'a>, String> {
    let header = split.head.get(LENGTH_BYTES..).unwrap_or_default();
    let file = |file: &'a WeightFile| File {
        name: &file.name,
        bytes: file.bytes(),
        tensors: file.tensors,
    };
    Ok(Files {
        files: split.files.iter().map(file).collect(),
        header: std::str::from_utf8(header).map_err(|error| error.to_string())?,
        hashes: &split.hashes,
    })
}

/// The first byte at which two files differ.
pub(super) fn first_difference(found: &[u8], expected: &[u8]) -> Option<u64> {
    let common = found
        .iter()
        .zip(expected)
        .take_while(|(a, b)| a == b)
        .count();
    (common < found.len().max(expected.len())).then_some(common as u64)
}
