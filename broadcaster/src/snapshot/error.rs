//! Why a folder is not a snapshot. Each message names the file, and where known its bytes.

use std::io;
use std::ops::Range;

use muster_protocol::id::PeerId;

use super::names::{MANIFEST_FILE, WEIGHTS_FILE};
use crate::store::disk::DiskError;
use crate::version::state::StateError;

/// Why a folder is not a snapshot, or cannot become one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    #[error("{0}")]
    Disk(#[from] DiskError),
    #[error("file {file} is missing: pull the snapshot again")]
    Missing { file: String },
    /// A file that the version does not name, or an entry that is not a file.
    #[error("{file} does not belong to the snapshot: remove it, or pull the snapshot again")]
    Unexpected { file: String },
    #[error(
        "file {file} has {found} bytes, but the manifest says {expected}: pull the snapshot again"
    )]
    Size {
        file: String,
        expected: u64,
        found: u64,
    },
    /// A file's content has another hash than the signed one.
    #[error("file {file} differs from its signed hash in bytes {}..{}{place}: pull the snapshot again", range.start, range.end)]
    Differs {
        file: String,
        /// The smallest part that has a hash of its own.
        range: Range<u64>,
        /// The tensor in that range, in brackets; empty outside the tensors.
        place: String,
    },
    /// The manifest cannot be read, or its signatures are not valid.
    #[error(
        "file {MANIFEST_FILE} (bytes 0..{bytes}) is not valid: {problem}: pull the snapshot again"
    )]
    Manifest { bytes: u64, problem: String },
    /// Another key than the learner's signed the version.
    #[error(
        "version was signed by {found}, but the learner of this run is {expected}: pull the snapshot from this run"
    )]
    Author { expected: PeerId, found: PeerId },
    /// The weights match the anchor's description, but not the version's root.
    #[error("file {WEIGHTS_FILE} is not valid: {0}")]
    Weights(StateError),
    /// The weights do not fit in the allowed number of files of that size.
    #[error(
        "weights of {bytes} bytes cannot be put in files of {bytes_max} bytes ({problem}): allow larger files"
    )]
    Split {
        bytes: u64,
        bytes_max: u64,
        problem: String,
    },
    #[error("{0}")]
    Read(#[from] io::Error),
}

impl SnapshotError {
    pub(super) fn missing(file: &str) -> Self {
        let file = file.to_owned();
        Self::Missing { file }
    }

    pub(super) fn differs(file: &str, range: Range<u64>) -> Self {
        Self::Differs {
            file: file.to_owned(),
            range,
            place: String::new(),
        }
    }
}
